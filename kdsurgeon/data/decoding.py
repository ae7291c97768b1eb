"""Decode image files, each once, into one uint8 array.

Decisions a reader would otherwise undo:

* Whatever a file does to the decoder makes it a bad image, which is named; nothing is replaced.
* Alpha is dropped and colour profiles are ignored, as torchvision and timm do, because a teacher
  was trained on such pixels; EXIF orientation is applied, because such pixels are upright.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from kdsurgeon.data.sets import MAX_PIXELS, WHOLE, BadImage, Fit, Size, height_width_channels
from kdsurgeon.data.words import by, listed, shown
from kdsurgeon.errors import DataError, ResourceError

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
MAX_FILE_BYTES = 256 * 2**20
RAM_BYTES = 2**30  # decoded images above this size live in a temporary file
_SLICE = 1024  # files handed to the thread pool at a time

MODES = {1: "L", 3: "RGB"}
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_GRAY = frozenset({"1", "L", "LA", "La", "I"})
_ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_UPRIGHT = {  # EXIF 2.32, tag 274, as the turn that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class File:
    """An image file: where it lies, its path below the root as shown to people, its class."""

    path: str
    id: str
    label: str


@dataclass(frozen=True)
class Fact:
    """A file that could be decoded: what its image was before it was fitted."""

    file: File
    digest: bytes
    num_bytes: int
    height: int
    width: int
    is_gray: bool
    remarks: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class DecodedPart:
    """The images that could be decoded, a fact for each row, and those that could not."""

    images: np.ndarray
    facts: tuple[Fact, ...]
    bad: tuple[BadImage, ...]


def decode_parts(
    name: str,
    parts: Sequence[Sequence[File]],
    input_size: Size | None,
    fits: Sequence[Fit] = (WHOLE, WHOLE),
) -> list[DecodedPart]:
    """Both parts decoded at one size; gray only if that was asked, or if every image is."""
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on metadata; its limit is kept here
        shape = height_width_channels(input_size)
        target = shape or _common_shape(parts[0])
        decoded = [
            _decode(name, files, target, fit, is_fixed=shape is None)
            for files, fit in zip(parts, fits, strict=True)
        ]
    if shape is None and all(fact.is_gray for part in decoded for fact in part.facts):
        decoded = [replace(part, images=part.images[..., :1]) for part in decoded]
    return decoded


def _common_shape(files: Iterable[File]) -> Size:
    """The shape of the first image that can be read."""
    for file in files:
        fact = _decode_into(None, file, fit=WHOLE, is_fixed=True)
        if isinstance(fact, Fact):
            return fact.height, fact.width, 3
    return 1, 1, 3


def _decode(
    name: str, files: Sequence[File], shape: Size, fit: Fit, *, is_fixed: bool
) -> DecodedPart:
    images = allocate((len(files), *shape))
    facts: list[Fact | BadImage] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(files), _SLICE):
            some = files[first : first + _SLICE]
            rows = images[first : first + _SLICE]
            facts.extend(pool.map(partial(_decode_into, fit=fit, is_fixed=is_fixed), rows, some))
            if is_fixed:
                _check_sizes(name, facts[first:], shape)
    good = [row for row, fact in enumerate(facts) if isinstance(fact, Fact)]
    for to, row in enumerate(good):
        if to != row:
            images[to] = images[row]
    kept = tuple(fact for fact in facts if isinstance(fact, Fact))
    bad = tuple(fact for fact in facts if isinstance(fact, BadImage))
    return DecodedPart(images[: len(kept)], kept, bad)


def _check_sizes(name: str, facts: Iterable[Fact | BadImage], shape: Size) -> None:
    odd = {
        (fact.height, fact.width): fact.file.id
        for fact in facts
        if isinstance(fact, Fact) and (fact.height, fact.width) != shape[:2]
    }
    if odd:
        raise differing_sizes(name, shape, odd)


def differing_sizes(name: str, first: Size, odd: Mapping[tuple[int, int], str]) -> DataError:
    """``odd`` has an image's name for each other (height, width)."""
    others = listed(f"{by(size)} ({file})" for size, file in odd.items())
    return DataError(
        f"{name}: the images differ in size.",
        where=f"{by(first[:2])} (the first image), {others}",
        fix="choose one: --input-size C,H,W, for example --input-size 3,224,224",
    )


def _decode_into(
    row: np.ndarray | None, file: File, *, fit: Fit, is_fixed: bool
) -> Fact | BadImage:
    """Fill ``row`` (H, W, C) with the image of ``file``; where its size is fixed, only if it fits.

    Whatever a file does to the decoder makes it a bad image; only a machine that runs out of
    memory or file handles stops the run.
    """
    try:
        data = read_file(file.path)
        image, is_gray, remarks = _open(data, "RGB" if row is None else MODES[row.shape[2]])
    except MemoryError as error:
        raise ResourceError(f"not enough memory to decode {file.id}.") from error
    except ResourceError:
        raise
    except Exception as error:  # decoders fail in a dozen ways
        return BadImage(file.id, reason(error))
    if row is not None and (not is_fixed or (image.height, image.width) == row.shape[:2]):
        fit_into(row, image, fit)
    digest = hashlib.sha256(data).digest()
    return Fact(file, digest, len(data), image.height, image.width, is_gray, remarks)


def read_file(path: str) -> bytes:
    """What a file holds; an error where it is no file, too large or empty."""
    try:
        info = os.stat(path)  # noqa: PTH116
        if not stat.S_ISREG(info.st_mode):
            raise DataError("not a regular file")
        if info.st_size > MAX_FILE_BYTES:
            raise DataError(f"{info.st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
        data = Path(path).read_bytes()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise ResourceError("the system ran out of files or memory.", why=str(error)) from error
        raise
    if not data:
        raise DataError("empty, 0 bytes")
    return data


def open_image(data: bytes, mode: str) -> Image.Image:
    """The image in a file's bytes, upright, as L or RGB; decoders fail in a dozen ways."""
    return _open(data, mode)[0]


def _open(data: bytes, mode: str) -> tuple[Image.Image, bool, tuple[str, ...]]:
    """The image, upright, as L or RGB; whether it is stored as gray; and what to remark on it."""
    if data.startswith(b"version https://git-lfs"):
        raise DataError("a Git LFS pointer, not the image; `git lfs pull` fetches it")
    try:
        image: Image.Image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        begins = shown(data[:24].decode("latin-1"))
        raise DataError(f'not a readable image; it begins "{begins}"') from error
    except Image.DecompressionBombError as error:
        raise DataError(f"more than {MAX_PIXELS:,} pixels") from error
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{image.width:,}×{image.height:,}, more than {MAX_PIXELS:,} pixels")
    remarks = []
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a JPEG with its preview
        remarks.append("images of several frames, of which the first was taken")
        image.seek(0)
    image.load()
    try:
        turn = _UPRIGHT.get(image.getexif().get(274, 1))
    except Exception:
        turn = None
        remarks.append("images with damaged EXIF data, taken as upright")
    if turn is not None:
        image = image.transpose(turn)
        remarks.append("images turned upright by EXIF orientation")
    if image.mode in _ALPHA or "transparency" in image.info:
        remarks.append("images whose alpha channel was dropped")
    if image.mode == "CMYK":
        remarks.append("images converted from CMYK")
    if image.mode.startswith("I"):
        remarks.append("images reduced from 16 bits to 8")
    is_gray = image.mode in _GRAY or image.mode.startswith("I;16")
    return _eight_bits(image, mode), is_gray, tuple(remarks)


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """The image as L or RGB."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError("32 bits per pixel, a range that cannot be known; store 8 or 16")
    elif image.mode in ("P", "PA", "RGBa", "La") and mode not in image.mode:
        image = image.convert("RGBA")  # else Pillow warns of, or cannot drop, the alpha
    return image.convert(mode)


def fit_into(row: np.ndarray, image: Image.Image, fit: Fit = WHOLE) -> None:
    """Fill ``row`` (H, W, C) with the largest centred part of its aspect, resized.

    Equal, up to half a pixel, to resizing until the image covers the target and cropping the
    centre, but without the intermediate image, which an elongated one would make huge. With a
    ``crop_pct`` below 1 the part is by so much smaller, unless the image has the size already.
    """
    height, width, _ = row.shape
    if (image.height, image.width) != (height, width):
        scale = fit.crop_pct * min(image.width / width, image.height / height)
        left = max(0.0, (image.width - width * scale) / 2)
        top = max(0.0, (image.height - height * scale) / 2)
        box = (left, top, image.width - left, image.height - top)
        image = image.resize((width, height), _RESAMPLING[fit.interpolation], box=box)
    row[:] = np.asarray(image).reshape(row.shape)


def crop_into(row: np.ndarray, image: Image.Image, box: np.ndarray, fit: Fit = WHOLE) -> None:
    """Fill ``row`` (H, W, C) with the part of the image in ``box`` (top, left, height, width)."""
    top, left, high, wide = box.tolist()
    part = image.crop((left, top, left + wide, top + high))
    part = part.resize((row.shape[1], row.shape[0]), _RESAMPLING[fit.interpolation])
    row[:] = np.asarray(part).reshape(row.shape)


def allocate(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 memory; if large, of a file without a name, which goes when the array goes.

    The file's room is reserved at once, because a full disk would kill the process at a later
    write to the map.
    """
    num_bytes = math.prod(shape)
    if num_bytes <= RAM_BYTES:
        return np.empty(shape, dtype=np.uint8)
    try:
        with tempfile.TemporaryFile(prefix="kdsurgeon-") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:
                file.truncate(num_bytes)
            return np.memmap(file, dtype=np.uint8, mode="r+", shape=shape)
    except OSError as error:
        raise ResourceError(
            f"{num_bytes / 2**30:.1f} GiB of decoded images do not fit into the temporary folder.",
            where=tempfile.gettempdir(),
            why=error.strerror,
            fix="point TMPDIR at a folder with more room, or choose a smaller --input-size",
        ) from error


def reason(error: Exception) -> str:
    """Why an image could not be decoded, on one line that is safe to print."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(text)[:200] or type(error).__name__
