"""Read a data set from named arrays: an .npz file, or the digits that ship with the package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kdsurgeon.checkpoints import read_arrays
from kdsurgeon.data.decoding import MODES, allocate, fit_into
from kdsurgeon.data.sets import (
    WHOLE,
    Fit,
    Options,
    Part,
    Size,
    Split,
    content_hash,
    finish,
    height_width_channels,
    stratified,
)
from kdsurgeon.data.words import SHOWN, by, kind, listed, shown
from kdsurgeon.errors import DataError

_WHOLE = (("images", "labels"), ("x", "y"), ("X", "y"), ("X", "Y"))
_PARTS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "val": (("x_val", "y_val"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}


def load_arrays(name: str, path: Path, options: Options, *, scale: float = 255.0) -> Split:
    """The data set in an ``.npz`` file; ``scale`` is the white of its integer images."""
    arrays = read_arrays(path)
    keys, notes = _part_keys(name, arrays)
    images = _as_images(name, {key: arrays[key] for key, _ in keys}, options.input_size)
    labels = [
        _as_labels(name, key, arrays[key], len(pixels))
        for (_, key), pixels in zip(keys, images, strict=True)
    ]
    class_names = _class_names(name, arrays.get("class_names"), np.concatenate(labels))
    return finish_arrays(name, images, labels, class_names, options, notes, scale)


def finish_arrays(
    name: str,
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    class_names: tuple[str, ...],
    options: Options,
    notes: list[str],
    scale: float,
) -> Split:
    """The data set of uint8 images (N, H, W, C) in one part, which is split here, or in two."""
    fingerprint = content_hash(array_content(images, labels), class_names)
    if len(images) == 1:
        rows = stratified(name, labels[0], options)
        images, labels = ([whole[part] for part in rows] for (whole,) in (images, labels))
    own, wanted = images[0].shape[1:], height_width_channels(options.input_size)
    if wanted and own != wanted:
        notes.append(f"images were resized from {by(own)} to {by(wanted)}.")
        pairs = zip(images, options.fits, strict=True)
        images, scale = [refit(pixels, wanted, scale, fit) for pixels, fit in pairs], 255.0
    train, val = map(hashed, images, labels)
    return finish(
        name, train, val, class_names, options, fingerprint=fingerprint, notes=notes, scale=scale
    )


def hashed(images: np.ndarray, labels: np.ndarray) -> Part:
    """A part that knows its images by their pixels."""
    return Part(images, labels, tuple(hashlib.sha256(row).digest() for row in images))


def _part_keys(name: str, arrays: dict[str, np.ndarray]) -> tuple[list[tuple[str, str]], list[str]]:
    """Keys of (images, labels) of two parts, or of one that is still to be split; and notes."""

    def first(pairs: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
        return next((pair for pair in pairs if pair[0] in arrays and pair[1] in arrays), None)

    train, val, test = (first(_PARTS[part]) for part in ("train", "val", "test"))
    if train and val:
        return [train, val], [f'"{test[0]}" was left out.'] if test else []
    if train and test:
        return [train, test], [f'"{test[0]}" serves as the validation part.']
    whole = train or first(_WHOLE)
    if whole:
        return [whole], []
    raise DataError(
        f"{name} has no images with labels.",
        where=f"it holds {listed(arrays)}" if arrays else "it holds no array",
        fix='name the arrays "images" and "labels", or x_train, y_train, x_test, y_test',
    )


def _as_images(
    name: str, arrays: dict[str, np.ndarray], input_size: Size | None
) -> list[np.ndarray]:
    """Every array as uint8 (N, H, W, C)."""
    key, array = next(iter(arrays.items()))
    for other, also in arrays.items():
        if also.shape[1:] != array.shape[1:]:
            raise DataError(f"{name}: {key} is {kind(array)}, but {other} is {kind(also)}.")
        if 0 in also.shape:
            raise DataError(f"{name}: {other} is empty, {kind(also)}.")
    factor = _factor_to_255(name, arrays)
    channels_first = _is_channels_first(name, key, array, input_size)
    images = []
    for pixels in arrays.values():
        if pixels.ndim == 3:
            pixels = pixels[..., None]
        elif channels_first:
            pixels = pixels.transpose(0, 2, 3, 1)
        if pixels.dtype.kind == "f":
            pixels = np.rint(pixels * factor)
        images.append(np.ascontiguousarray(pixels, dtype=np.uint8))
    return images


def _factor_to_255(name: str, arrays: dict[str, np.ndarray]) -> float:
    """What brings these numbers to 0..255; an error where they are of another range."""
    for key, array in arrays.items():
        if array.dtype.kind not in "uif":
            raise DataError(
                f"{name}: {key} is {kind(array)}, not numbers.", fix="store the images as uint8"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(
                f"{name}: {key} has values that are not finite.",
                fix="replace them (numpy.nan_to_num), or leave these images out",
            )
        if array.min() < 0 or array.max() > 255:
            raise DataError(
                f"{name}: {key} runs from {array.min():g} to {array.max():g}.",
                why="images are integers in 0..255 or floats in 0..1 or 0..255",
                fix="undo its normalisation, or scale it; mean and std are measured here",
            )
    is_unit = max(array.max() for array in arrays.values()) <= 1
    return 255.0 if is_unit else 1.0


def _is_channels_first(name: str, key: str, array: np.ndarray, input_size: Size | None) -> bool:
    if array.ndim == 3:
        return False
    first, last = (array.ndim == 4 and array.shape[axis] in (1, 3) for axis in (1, 3))
    if first and last and input_size:
        first, last = (
            array.shape[1:] == shape for shape in (input_size, height_width_channels(input_size))
        )
    if first != last:
        return first
    raise DataError(
        f"{name}: the layout of {key}, {by(array.shape) or 'one number'}, "
        + ("can be read in two ways." if first else "is not that of images."),
        why="images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3",
        fix="state the size: --input-size C,H,W" if first else None,
    )


def _as_labels(name: str, key: str, array: np.ndarray, count: int) -> np.ndarray:
    """int64 (count,), none of them negative."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise DataError(
            f"{name}: {key} is {kind(array)}, not one integer per image.",
            fix="take the index of the class" + (": y.argmax(1)" if array.ndim == 2 else ""),
        )
    if len(array) != count:
        raise DataError(f"{name}: {key} has {len(array):,} labels for {count:,} images.")
    if array.min() < 0 or array.max() > np.iinfo(np.int64).max:
        raise DataError(
            f"{name}: {key} runs from {array.min()} to {array.max()}, not from 0 to K-1."
        )
    return array.astype(np.int64)


def _class_names(name: str, stored: np.ndarray | None, labels: np.ndarray) -> tuple[str, ...]:
    present, top = np.unique(labels), int(labels.max())
    if stored is None:
        if len(present) <= top:
            gaps = np.setdiff1d(np.arange(min(top, len(present) + SHOWN)), present)
            raise DataError(
                f"{name}: the labels go up to {top}, but {len(present)} of them occur.",
                where=f"absent: {listed(map(str, gaps.tolist()))}",
                fix='number the classes 0 to K-1, or store "class_names"',
            )
        return tuple(map(str, range(top + 1)))
    if stored.ndim != 1 or stored.dtype.kind not in "US":
        raise DataError(f"{name}: class_names is {kind(stored)}, not a list of texts.")
    if stored.dtype.kind == "S":
        stored = np.char.decode(stored, "utf-8", "backslashreplace")
    names = tuple(map(shown, stored.tolist()))
    if len(set(names)) < len(names) or "" in names:
        raise DataError(f"{name}: class_names repeats a name or has an empty one.")
    if top >= len(names):
        raise DataError(f"{name}: the labels go up to {top}, but class_names has {len(names)}.")
    return names


def refit(images: np.ndarray, shape: Size, scale: float, fit: Fit = WHOLE) -> np.ndarray:
    """uint8 (N, *shape) on the 0..255 scale, resized and converted as files are."""
    channels = shape[2]
    stretched = images if scale == 255 else np.rint(images * (255 / scale)).astype(np.uint8)
    result = allocate((len(images), *shape))
    for row, pixels in zip(result, stretched, strict=True):
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        fit_into(row, image.convert(MODES[channels]), fit)
    return result


def array_content(
    images: Sequence[np.ndarray], labels: Sequence[np.ndarray]
) -> Iterator[bytes | memoryview]:
    for pixels, numbers in zip(images, labels, strict=True):
        yield f"{by(pixels.shape)}\n".encode()
        yield pixels.data
        yield numbers.astype("<i8").data
