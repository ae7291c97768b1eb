"""Images that stay where they are, and are decoded whenever they are asked for.

They stand where an array of images could stand. Nothing is replaced here either: an image that
cannot be decoded stops whoever asked for it, by name.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, overload

import numpy as np
from PIL import Image

from kdsurgeon.data.decoding import (
    MODES,
    File,
    allocate,
    crop_into,
    differing_sizes,
    fit_into,
    open_image,
    read_file,
    reason,
)
from kdsurgeon.data.sets import WHOLE, BadImage, Fit, Size, height_width_channels
from kdsurgeon.data.words import SHOWN
from kdsurgeon.errors import DataError, ResourceError, SurgeonError

_PROBED = 64  # images whose size is looked at where none was asked for
STREAM_BYTES = 16 * 2**30  # decoded images above this size are not kept
_SLICE = 1024  # images checked at a time


class Items(Protocol):
    """What a data source hands over: by number, the bytes of an image file or an image."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Any: ...


@dataclass(frozen=True)
class Files:
    """Image files by their paths."""

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> bytes:
        return read_file(self.paths[row])


@dataclass(frozen=True, eq=False)
class Pictures:
    """Like a uint8 array (N, H, W, C), of which an index decodes what it names.

    ``rows`` are numbers of ``items``; ``ids`` is what messages call each of these. With
    ``is_fixed`` an image of another size is refused, not fitted. ``groups`` numbers the place that
    each row lies at (a shard); those of few places are served together.

    >>> white = Image.new("L", (2, 2), 255)
    >>> few = Pictures("few", [white, white], ("a", "b"), np.arange(2), (4, 4, 1))
    >>> few.shape, few[np.array([1])].mean().item()
    ((2, 4, 4, 1), 255.0)
    """

    name: str
    items: Items
    ids: tuple[str, ...]
    rows: np.ndarray
    size: Size
    fit: Fit = WHOLE
    is_fixed: bool = False
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.rows), *self.size)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    @property
    def ndim(self) -> int:
        return 4

    @property
    def nbytes(self) -> int:
        """What they would take as an array."""
        return len(self.rows) * int(np.prod(self.size))

    def take(self, rows: np.ndarray) -> Pictures:
        """Those rows alone, without decoding them."""
        return replace(
            self,
            rows=self.rows[rows],
            ids=tuple(self.ids[row] for row in rows),
            groups=None if self.groups is None else self.groups[rows],
        )

    @overload
    def __getitem__(self, rows: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray: ...
    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, C), fitted; raises :class:`DataError` for an image that cannot be."""
        if isinstance(rows, int):
            return self[np.array([rows])][0]
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        images = np.empty((len(rows), *self.size), dtype=np.uint8)
        with _quietly():
            for into, row in zip(images, rows.tolist(), strict=True):
                fit_into(into, self.open(row), self.fit)
        return images

    def cropped(
        self, rows: np.ndarray, box_of: Callable[[int, int, int], np.ndarray]
    ) -> np.ndarray:
        """uint8 (B, H, W, C): of each image the part that ``box_of(index, height, width)`` says."""
        images = np.empty((len(rows), *self.size), dtype=np.uint8)
        with _quietly():
            for index, (into, row) in enumerate(zip(images, rows.tolist(), strict=True)):
                image = self.open(row)
                crop_into(into, image, box_of(index, image.height, image.width), self.fit)
        return images

    def fitted(self, fit: Fit) -> Pictures:
        """The same, brought to their size in another way."""
        return replace(self, fit=fit)

    def open(self, row: int) -> Image.Image:
        """The whole image, upright, as L or RGB."""
        try:
            return self._open(row)
        except MemoryError as error:
            raise ResourceError(f"not enough memory to decode {self.ids[row]}.") from error
        except ResourceError:
            raise
        except Exception as error:  # decoders fail in a dozen ways
            if isinstance(error, DataError) and "fix" in error.notes:
                raise
            raise DataError(
                f"{self.name}: the image {self.ids[row]} cannot be read.",
                why=reason(error),
                fix="repair or remove it, or leave such images out, by name: --max-bad-images N "
                "(every image is then decoded once before the run)",
            ) from error

    def _open(self, row: int) -> Image.Image:
        found = self.items[int(self.rows[row])]
        mode = MODES[self.size[2]]
        if isinstance(found, np.ndarray):
            found = Image.fromarray(found)
        if isinstance(found, Image.Image):
            image = found if found.mode == mode else found.convert(mode)
        else:
            image = open_image(bytes(found), mode)
        if self.is_fixed and (image.height, image.width) != self.size[:2]:
            raise differing_sizes(
                self.name, self.size, {(image.height, image.width): self.ids[row]}
            )
        return image

    def damaged(self) -> list[tuple[int, BadImage]]:
        """Every row that cannot be decoded, and why; decodes all of them."""
        found: list[BadImage | None] = []
        with _quietly(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for first in range(0, len(self), _SLICE):
                found.extend(pool.map(self._try, range(first, min(first + _SLICE, len(self)))))
        return [(row, bad) for row, bad in enumerate(found) if bad]

    def _try(self, row: int) -> BadImage | None:
        try:
            self.open(row)
        except ResourceError:
            raise
        except SurgeonError as error:
            return BadImage(self.ids[row], error.notes.get("why", error.what))
        return None

    def decoded(self) -> np.ndarray:
        """All of them as an array; raises :class:`DataError` for the first that cannot be."""
        images = allocate(self.shape)

        def fill(row: int) -> None:
            fit_into(images[row], self.open(row), self.fit)

        with _quietly(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for first in range(0, len(self), _SLICE):
                list(pool.map(fill, range(first, min(first + _SLICE, len(self)))))
        return images


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Pillow's remarks on metadata; not entered by threads, which share the filters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_streamed(asked: bool | None, num_bytes: int) -> bool:
    """Whether images stay where they are: as asked, else where decoded ones would be too many."""
    return num_bytes > STREAM_BYTES if asked is None else asked


def without_damaged(
    images: Pictures, labels: np.ndarray
) -> tuple[Pictures, np.ndarray, list[BadImage]]:
    """What is left without the images that cannot be decoded, and those."""
    damaged = images.damaged()
    good = np.setdiff1d(np.arange(len(images)), [row for row, _ in damaged])
    return images.take(good), labels[good], [bad for _, bad in damaged]


def check_bad(name: str, bad: Sequence[BadImage], total: int, allowed: int) -> None:
    """:class:`DataError` with their names where more images are bad than are allowed."""
    if len(bad) <= min(allowed, total - 1):
        return
    lines = [f"{image.path}: {image.reason}" for image in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"… and {len(bad) - SHOWN:,} more")
    fix = "repair or remove them"
    if len(bad) < total:
        fix += f", or leave them out: --max-bad-images {len(bad)}"
    raise DataError(
        f"{name}: {len(bad):,} of {total:,} images cannot be read.",
        where="\n".join(lines),
        fix=fix,
    )


def pictures(
    name: str,
    items: Items,
    ids: Sequence[str],
    input_size: Size | None,
    fit: Fit = WHOLE,
    groups: np.ndarray | None = None,
    like: Pictures | None = None,
) -> Pictures:
    """The images at ``input_size`` (C, H, W), or at their own, which then must agree.

    Those of a second part are as large as those of the first, ``like``.

    Raises :class:`DataError` when they do not, or none can be read.
    """
    shape = height_width_channels(input_size)
    all_rows = np.arange(len(items))
    size = shape or (1, 1, 3)
    found = Pictures(name, items, tuple(ids), all_rows, size, fit, groups=groups)
    if like is not None:
        return replace(found, size=like.size, is_fixed=like.is_fixed)
    if shape:
        return found
    sizes: dict[tuple[int, int], str] = {}
    is_gray = True
    for row in np.linspace(0, len(items) - 1, min(_PROBED, len(items))).astype(int).tolist():
        with _quietly():
            image = found.open(row)
        sizes.setdefault((image.height, image.width), found.ids[row])
        red, green, blue = image.split()
        is_gray = is_gray and red.tobytes() == green.tobytes() == blue.tobytes()
    (height, width), *odd = sizes
    own = (height, width, 1 if is_gray else 3)
    if odd:
        raise differing_sizes(name, own, {size: sizes[size] for size in odd})
    return replace(found, size=own, is_fixed=True)


def of_files(
    name: str,
    files: Sequence[File],
    input_size: Size | None,
    fit: Fit = WHOLE,
    like: Pictures | None = None,
) -> Pictures:
    """The images in these files, by :func:`pictures`."""
    paths, ids = tuple(file.path for file in files), [file.id for file in files]
    return pictures(name, Files(paths), ids, input_size, fit, like=like)
