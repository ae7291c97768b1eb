"""Read a data set (digits, a folder of class folders, an .npz) and serve it in batches.

Decisions a reader would otherwise undo:

* Every image is decoded once, into one uint8 array; what happens per epoch is array arithmetic.
* Nothing is replaced and nothing is dropped in silence: an unreadable image is an error, or is
  left out by a list (``Split.bad``); everything else worth knowing stands in ``Split.notes``.
* Order and augmentation are pure functions of (seed, epoch, row), so a resumed run needs no state.
  Both are built on integer streams that never change (PCG64's raw output and splitmix64), not on
  ``Generator.permutation``, whose result NumPy may change between releases.
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from operator import attrgetter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from kdsurgeon.checkpoints import read_arrays
from kdsurgeon.errors import DataError, ResourceError, UsageError, nearest

Size = tuple[int, int, int]
Augment = Literal["none", "shift", "shift-flip"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset(  # compared without case
    [".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"]
)
MAX_PIXELS = 89_478_485  # Pillow's own limit, which by itself only warns up to twice as many
MAX_FILE_BYTES = 256 * 2**20
RAM_BYTES = 2**30  # decoded images above this size live in a temporary file

_DIGITS = Path(__file__).parent / "assets" / "digits.npz"
_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "eval", "evaluation")
_TEST = ("test", "testing")
_SHOWN = 5  # how many files, classes or labels an error lists
_SLICE = 1024  # files handed to the thread pool at a time


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size, and the numbers that turn them into a network's input.

    ``images`` is uint8 (N, H, W, C) with C 1 or 3, in memory or a memory map; ``labels`` int64 (N,)
    in ``range(len(class_names))``; ``mean`` and ``std`` hold one number per channel on the 0..1
    scale, that is of ``images / scale``; ``ids`` are the files' paths below the data folder, where
    there are files; ``default_augment`` is what suits them: mirroring only for folders of colour
    images, since a mirrored digit is another sign or none.
    Raises :class:`DataError` when these do not fit together.

    >>> import numpy as np
    >>> pair = np.zeros((2, 8, 8, 1), np.uint8)
    >>> Dataset("pair", pair, np.array([0, 1]), ("no", "yes"), (0.5,), (0.25,)).input_size
    (1, 8, 8)
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ids: tuple[str, ...] | None = None
    scale: float = 255.0
    default_augment: Augment = "shift"

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
            raise DataError(f"{self.name}: images are {_kind(images)}, not uint8 (N, H, W, C).")
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise DataError(f"{self.name}: labels are {_kind(labels)}, not int64 ({len(images)},).")
        if labels.min() < 0 or labels.max() >= len(self.class_names):
            raise DataError(
                f"{self.name}: labels run from {labels.min()} to {labels.max()}, "
                f"but there are {len(self.class_names)} class names."
            )
        if not len(self.mean) == len(self.std) == images.shape[3]:
            raise DataError(f"{self.name}: mean and std need {images.shape[3]} numbers each.")
        if not all(map(math.isfinite, self.mean)) or not all(0 < s < math.inf for s in self.std):
            raise DataError(f"{self.name}: mean must be finite, std finite and above 0.")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def input_size(self) -> Size:
        """(C, H, W), the shape of one normalised sample."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def samples(self, rows: np.ndarray | slice = slice(None)) -> torch.Tensor:
        """The images of ``rows`` as a network sees them: normalised float32 (B, C, H, W)."""
        return self.normalise(self.images[rows].transpose(0, 3, 1, 2))

    def normalise(self, pixels: np.ndarray) -> torch.Tensor:
        """``(pixels / scale - mean) / std`` for uint8 ``pixels`` (B, C, H, W), as a new tensor."""
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (self.mean, self.std))
        factor, offset = 1 / (self.scale * std), -mean / std
        x = torch.from_numpy(pixels.astype(np.float32, order="C"))
        x *= factor.to(torch.float32)[:, None, None]
        x += offset.to(torch.float32)[:, None, None]
        return x


@dataclass(frozen=True)
class BadImage:
    """An image that could not be used: its path below the data folder, and why."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Split:
    """A data set in two parts that share classes, size and normalisation.

    ``bad`` are the images left out; ``fingerprint`` is a sha256 of the content of both parts and
    of the class names, whatever the split; ``notes`` are sentences about what was found and done.
    """

    train: Dataset
    val: Dataset
    bad: tuple[BadImage, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.train.input_size == self.val.input_size
        for field in ("class_names", "mean", "std", "scale"):
            assert getattr(self.train, field) == getattr(self.val, field), field


def load(
    source: str | os.PathLike[str],
    *,
    val_split: float | None = None,
    seed: int = 0,
    input_size: Size | None = None,
    max_bad_images: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Split:
    """The data set called ``source``, split into a training and a validation part.

    ``source`` is ``"digits"`` (UCI Optical Recognition of Handwritten Digits, 1,797 scans of 8×8,
    shipped with the package; ``./digits`` is a folder of that name), a folder or an ``.npz`` file.

    *Folder*: ``train/CLASS/…`` beside ``val/CLASS/…`` (also ``validation``, ``valid``, ``eval``; or
    ``test`` where there is none of these), or ``CLASS/…`` alone. Classes are the sorted folder
    names; folders below a class belong to it; hidden files are ignored; the first frame of an
    animation counts. Images are resized so that they cover ``input_size`` and cropped at its
    centre, in one bilinear step.

    *npz*: ``images`` and ``labels`` (or ``x``/``X`` and ``y``/``Y``), or parts named as Keras
    (``x_train``, ``y_train``, ``x_test``, …) or MedMNIST (``train_images``, ``train_labels``,
    ``val_images``, …) name them; optionally ``class_names``. Images are (N, H, W), (N, H, W, C) or
    (N, C, H, W) with C 1 or 3, integers in 0..255 or floats in 0..1 or 0..255.

    ``val_split`` is the share of each class that validates where the source has no parts of its
    own (by default 0.2; for digits 0.25, which is 450 images), drawn from ``seed``. ``input_size``
    is (C, H, W); None takes the images' own, which then must agree. At most ``max_bad_images``
    unreadable images are left out. ``mean`` and ``std`` (per channel, on the 0..1 scale) replace
    the defaults: ImageNet's for folders of three-channel images, else measured on the training
    part.

    Raises :class:`DataError` for a data set that cannot be used, :class:`UsageError` for arguments
    that cannot, :class:`ResourceError` when memory, disk or a permission is lacking.

    >>> split = load("digits")
    >>> len(split.train), len(split.val), split.train.input_size
    (1347, 450, (1, 8, 8))
    """
    options = _Options(
        val_split, seed, _tuple(input_size), max_bad_images, _tuple(mean), _tuple(std)
    )
    try:
        if source == "digits":
            return _load_arrays("digits", _DIGITS, options, scale=16.0, val_split=0.25)
        path = Path(source)
        if path.is_dir():
            return _load_folder(path, options)
        if not path.exists():
            raise DataError(
                f"{_shown(str(path))} does not exist.",
                why="a data set is a folder, an .npz file, or digits",
                fix=nearest(str(source), ["digits"]),
            )
        return _load_arrays(_shown(path.name), path, options)
    except MemoryError as error:
        raise ResourceError(
            f"not enough memory to load {_shown(str(source))}.",
            fix="choose a smaller --input-size, or fewer images",
        ) from error


class Batches:
    """One epoch of a data set in batches: ``(x, y)`` with x normalised float32 (B, C, H, W) and
    y int64 (B,), in an order that is a pure function of (seed, epoch).

    ``augment="shift"`` pads each side by an eighth of its length (at least 1) with black, crops at
    a random offset; ``"shift-flip"`` also mirrors every second image. Black is the raw value 0
    *before* normalisation, as in the CIFAR protocol (He et al. 2015, arXiv 1512.03385, section 4.2;
    torchvision's ``RandomCrop(32, padding=4)`` before ``Normalize``). What happens to a sample is a
    pure function of (seed, epoch, its row), whatever the batch size.

    Raises :class:`UsageError` for a batch size below 1, or one that leaves no batch.

    >>> batches = Batches(load("digits").train, 64, shuffle=True, seed=0, augment="shift")
    >>> x, y = next(iter(batches))
    >>> len(batches), tuple(x.shape), tuple(y.shape)
    (22, (64, 1, 8, 8), (64,))
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        augment: Augment = "none",
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1 or (drop_last and batch_size > len(dataset)):
            raise UsageError(
                f"a batch size of {batch_size} makes no batch of {len(dataset)} images.",
                fix="choose another --batch-size",
            )
        if augment not in ("none", "shift", "shift-flip"):
            raise UsageError(
                f'no augmentation is called "{augment}".',
                fix=nearest(augment, ["none", "shift", "shift-flip"]),
            )
        _check_seed(seed)
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augment: Augment = augment
        self.drop_last = drop_last
        self.epoch = 0
        self._start = 0

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever the next pass starts."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Let the next passes be those of ``epoch`` (from 0)."""
        self.epoch = epoch

    def start_at(self, batch: int) -> None:
        """Let the next pass, and only that one, begin at ``batch`` (from 0), for a resumed run."""
        if not 0 <= batch <= len(self):
            raise UsageError(f"an epoch has {len(self)} batches; it cannot start at {batch}.")
        self._start = batch

    def rows(self, batch: int) -> np.ndarray:
        """Which rows of the data set make up ``batch`` of the current epoch."""
        return self._rows(self.order(), batch)

    def order(self) -> np.ndarray:
        """The rows of the whole epoch in the order in which they are served."""
        if not self.shuffle:
            return np.arange(len(self.dataset))
        return np.argsort(_raw(len(self.dataset), [self.seed, self.epoch]), kind="stable")

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        start, self._start = self._start, 0
        return self._pass(self.epoch, self.order(), start)

    def _pass(
        self, epoch: int, order: np.ndarray, start: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in range(start, len(self)):
            rows = self._rows(order, batch)
            pixels = self._pixels(rows, epoch)
            yield self.dataset.normalise(pixels), torch.from_numpy(self.dataset.labels[rows])

    def _rows(self, order: np.ndarray, batch: int) -> np.ndarray:
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _pixels(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """uint8 (B, C, H, W), augmented."""
        images = self.dataset.images[rows]
        if self.augment == "none":
            return images.transpose(0, 3, 1, 2)
        shifted = _shift(images, lambda bound, use: _draw(self.seed, epoch, rows, use, bound))
        if self.augment == "shift-flip":
            mirrored = _draw(self.seed, epoch, rows, 2, 2) == 1
            shifted[mirrored] = shifted[mirrored][..., ::-1]
        return shifted


# ---------------------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class _Options:
    """What the caller asked of a data set, checked."""

    val_split: float | None
    seed: int
    input_size: Size | None
    max_bad_images: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def __post_init__(self) -> None:
        if self.val_split is not None and not 0 < self.val_split < 1:
            raise UsageError(f"val_split is {self.val_split}; it must lie between 0 and 1.")
        _check_seed(self.seed)
        size = self.input_size
        if size is not None and (len(size) != 3 or size[0] not in (1, 3) or min(size) < 1):
            raise UsageError(
                f"the input size {size} is not channels (1 or 3), height and width.",
                fix="for example --input-size 3,224,224",
            )
        if size is not None and size[1] * size[2] > MAX_PIXELS:
            raise UsageError(f"the input size {size} has more than {MAX_PIXELS:,} pixels.")
        if self.max_bad_images < 0:
            raise UsageError(f"max_bad_images is {self.max_bad_images}; it must be 0 or more.")
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise UsageError(f"mean is {self.mean}; it must be finite.")
        if self.std is not None and not all(0 < s < math.inf for s in self.std):
            raise UsageError(f"std is {self.std}; it must be finite and above 0.")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise UsageError(f"the seed is {seed}; it must be 0 or more.")


def _tuple(values: Sequence | None) -> tuple | None:
    return None if values is None else tuple(values)


# ------------------------------------------------------------------------- parts and splitting


@dataclass(frozen=True, eq=False)
class _Part:
    """Images of one part before normalisation; ``digests`` tell equal images."""

    images: np.ndarray
    labels: np.ndarray
    digests: tuple[bytes, ...]
    ids: tuple[str, ...] | None = None


def _finish(
    name: str,
    train: _Part,
    val: _Part,
    class_names: tuple[str, ...],
    options: _Options,
    *,
    fingerprint: str,
    notes: Iterable[str],
    scale: float = 255.0,
    is_natural: bool = False,
    bad: tuple[BadImage, ...] = (),
) -> Split:
    """Both parts as data sets, after the checks that every source shares."""
    notes = [*notes, *_check_classes(name, train.labels, val.labels, class_names)]
    known = set(train.digests)
    twins = sum(digest in known for digest in val.digests)
    if twins:
        notes.append(f"{twins:,} validation images are also in the training part.")
    mean, std = _normalisation(name, train.images, scale, is_natural, options)

    def dataset(part: str, of: _Part) -> Dataset:
        return Dataset(
            f"{name}/{part}",
            of.images,
            of.labels,
            class_names,
            mean,
            std,
            of.ids,
            scale,
            "shift-flip" if is_natural and of.images.shape[3] == 3 else "shift",
        )

    return Split(dataset("train", train), dataset("val", val), bad, fingerprint, tuple(notes))


def _check_classes(
    name: str, train: np.ndarray, val: np.ndarray, class_names: tuple[str, ...]
) -> list[str]:
    """What to say of classes that only one part has; an error where that cannot work."""
    for part, labels in (("training", train), ("validation", val)):
        if not len(labels):
            raise DataError(f"{name}: the {part} part is empty.", fix="add images")
    if len(class_names) < 2:
        raise DataError(
            f"{name}: there is one class only, {_listed(class_names)}.",
            why="a classifier needs two classes or more",
        )
    in_train, in_val = (np.bincount(x, minlength=len(class_names)) for x in (train, val))
    foreign = [class_names[i] for i in np.flatnonzero((in_train == 0) & (in_val > 0))]
    if foreign:
        raise DataError(
            f"{name}: the validation part has classes without training images: {_listed(foreign)}.",
            fix="add training images of these classes, or remove the classes",
        )
    absent = [class_names[i] for i in np.flatnonzero((in_train == 0) & (in_val == 0))]
    unseen = [class_names[i] for i in np.flatnonzero((in_train > 0) & (in_val == 0))]
    notes = []
    if absent:
        notes.append(f"classes without any image: {_listed(absent)}.")
    if unseen:
        notes.append(f"classes without a validation image: {_listed(unseen)}.")
    return notes


def _stratified(
    name: str, labels: np.ndarray, val_split: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to validate on, both sorted, split alike in every class.

    The validation part has ``ceil(N * val_split)`` rows, shared out by largest remainder; a class
    never gives up its last row. Raises :class:`DataError` when no row can be spared.
    """
    counts = np.bincount(labels)
    spare = np.maximum(counts - 1, 0)
    quota = counts * val_split
    take = np.minimum(np.floor(quota).astype(np.int64), spare)
    wanted = min(math.ceil(round(len(labels) * val_split, 6)), int(spare.sum()))
    for _ in range(wanted - int(take.sum())):
        take[np.argmax(np.where(take < spare, quota - take, -np.inf))] += 1
    if not take.sum():
        raise DataError(
            f"{name}: no image can be spared for validation.",
            why="every class has one image only",
            fix="add images, or bring a val folder (or x_val and y_val) of your own",
        )
    val = np.zeros(len(labels), dtype=bool)
    for label, count in enumerate(take):
        rows = np.flatnonzero(labels == label)
        order = np.argsort(_raw(len(rows), seed, spawn=label), kind="stable")
        val[rows[order[:count]]] = True
    return np.flatnonzero(~val), np.flatnonzero(val)


def _normalisation(
    name: str, images: np.ndarray, scale: float, is_natural: bool, options: _Options
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = images.shape[3]
    for label, values in (("mean", options.mean), ("std", options.std)):
        if values is not None and len(values) != channels:
            raise UsageError(
                f"{label} has {len(values)} numbers; the images of {name} have {channels} channels."
            )
    if options.mean and options.std:
        return options.mean, options.std
    if is_natural and channels == 3:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        mean, std = _moments(images, scale)
    std = options.std or std
    if min(std) == 0:
        raise DataError(
            f"{name}: all training pixels of channel {std.index(min(std))} are equal.",
            fix="check the images, or give mean and std",
        )
    return options.mean or mean, std


def _moments(images: np.ndarray, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of ``images / scale``, from exact histograms."""
    rows = max(1, 2**22 // images[0].size)
    counts = np.zeros((images.shape[3], 256), dtype=np.int64)
    for first in range(0, len(images), rows):
        for channel, count in enumerate(counts):
            count += np.bincount(images[first : first + rows, ..., channel].ravel(), minlength=256)
    shares = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / scale
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(axis=1)
    return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


# ------------------------------------------------------------------------------------- arrays

_WHOLE = (("images", "labels"), ("x", "y"), ("X", "y"), ("X", "Y"))
_PARTS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "val": (("x_val", "y_val"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}


def _load_arrays(
    name: str, path: Path, options: _Options, *, scale: float = 255.0, val_split: float = 0.2
) -> Split:
    arrays = read_arrays(path)
    keys, notes = _part_keys(name, arrays)
    images = _as_images(name, {key: arrays[key] for key, _ in keys}, options.input_size)
    labels = [
        _as_labels(name, key, arrays[key], len(pixels))
        for (_, key), pixels in zip(keys, images, strict=True)
    ]
    class_names = _class_names(name, arrays.get("class_names"), np.concatenate(labels))
    fingerprint = _hash_arrays(images, labels, class_names)
    if len(images) == 1:
        share = options.val_split or val_split
        rows = _stratified(name, labels[0], share, options.seed)
        images, labels = ([whole[part] for part in rows] for (whole,) in (images, labels))
    own, wanted = images[0].shape[1:], _height_width_channels(options.input_size)
    if wanted and own != wanted:
        notes.append(f"images were resized from {_by(own)} to {_by(wanted)}.")
        images, scale = [_refit(pixels, wanted, scale) for pixels in images], 255.0
    train, val = (
        _Part(pixels, numbers, tuple(hashlib.sha256(row).digest() for row in pixels))
        for pixels, numbers in zip(images, labels, strict=True)
    )
    return _finish(
        name,
        train,
        val,
        class_names,
        options,
        fingerprint=fingerprint,
        notes=notes,
        scale=scale,
    )


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
        where=f"it holds {_listed(arrays)}" if arrays else "it holds no array",
        fix='name the arrays "images" and "labels", or x_train, y_train, x_test, y_test',
    )


def _as_images(
    name: str, arrays: dict[str, np.ndarray], input_size: Size | None
) -> list[np.ndarray]:
    """Every array as uint8 (N, H, W, C)."""
    key, array = next(iter(arrays.items()))
    for other, also in arrays.items():
        if also.shape[1:] != array.shape[1:]:
            raise DataError(f"{name}: {key} is {_kind(array)}, but {other} is {_kind(also)}.")
        if 0 in also.shape:
            raise DataError(f"{name}: {other} is empty, {_kind(also)}.")
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
                f"{name}: {key} is {_kind(array)}, not numbers.", fix="store the images as uint8"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"{name}: {key} has values that are not finite.")
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
            array.shape[1:] == shape for shape in (input_size, _height_width_channels(input_size))
        )
    if first != last:
        return first
    raise DataError(
        f"{name}: the layout of {key}, {_by(array.shape) or 'one number'}, "
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
            f"{name}: {key} is {_kind(array)}, not one integer per image.",
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
            gaps = np.setdiff1d(np.arange(min(top, len(present) + _SHOWN)), present)
            raise DataError(
                f"{name}: the labels go up to {top}, but {len(present)} of them occur.",
                where=f"absent: {_listed(map(str, gaps.tolist()))}",
                fix='number the classes 0 to K-1, or store "class_names"',
            )
        return tuple(map(str, range(top + 1)))
    if stored.ndim != 1 or stored.dtype.kind not in "US":
        raise DataError(f"{name}: class_names is {_kind(stored)}, not a list of texts.")
    if stored.dtype.kind == "S":
        stored = np.char.decode(stored, "utf-8", "backslashreplace")
    names = tuple(map(_shown, stored.tolist()))
    if len(set(names)) < len(names) or "" in names:
        raise DataError(f"{name}: class_names repeats a name or has an empty one.")
    if top >= len(names):
        raise DataError(f"{name}: the labels go up to {top}, but class_names has {len(names)}.")
    return names


def _refit(images: np.ndarray, shape: Size, scale: float) -> np.ndarray:
    """uint8 (N, *shape) on the 0..255 scale, resized and converted as files are."""
    channels = shape[2]
    stretched = images if scale == 255 else np.rint(images * (255 / scale)).astype(np.uint8)
    result = _allocate((len(images), *shape))
    for row, pixels in zip(result, stretched, strict=True):
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        _fit_into(row, image.convert(_MODES[channels]))
    return result


def _hash_arrays(
    images: Sequence[np.ndarray], labels: Sequence[np.ndarray], class_names: Sequence[str]
) -> str:
    digest = hashlib.sha256()
    for pixels, numbers in zip(images, labels, strict=True):
        digest.update(f"{_by(pixels.shape)}\n".encode())
        digest.update(pixels.data)
        digest.update(numbers.astype("<i8").data)
    return _hash_names(digest, class_names)


def _hash_names(digest: hashlib._Hash, class_names: Sequence[str]) -> str:
    digest.update("\0".join(class_names).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class _File:
    """An image file: where it lies, its path below the root as shown to people, its class."""

    path: str
    id: str
    label: str


def _load_folder(folder: Path, options: _Options) -> Split:
    root = Path(os.path.realpath(folder))
    name = _shown(root.name or str(root))
    places, notes = _places(name, root)
    found = []
    for place in places:
        files, more = _files(name, place, root)
        found.append(files)
        notes.extend(more)
    class_names = tuple(sorted({file.label for files in found for file in files}))
    if len(found) == 1:
        labels = _numbers(found[0], class_names)
        rows = _stratified(name, labels, options.val_split or 0.2, options.seed)
        found = [[found[0][row] for row in part] for part in rows]
    in_train, in_val = (_numbers(files, class_names) for files in found)
    _check_classes(name, in_train, in_val, class_names)
    train, val = _decode_parts(name, found, options)
    bad = (*train.bad, *val.bad)
    _check_bad(name, bad, sum(map(len, found)), options.max_bad_images)
    lost = sorted(set(class_names) - {file.label for file in train.files})
    if lost:
        raise DataError(f"{name}: no training image of {_listed(lost)} can be read.")
    if bad:
        notes.append(f"unreadable images left out: {len(bad):,}.")
    notes.extend(f"{what}: {n:,}." for what, n in sorted((train.remarks + val.remarks).items()))
    return _finish(
        name,
        train.numbered(class_names),
        val.numbered(class_names),
        class_names,
        options,
        fingerprint=_hash_files([train, val], class_names),
        notes=notes,
        is_natural=True,
        bad=bad,
    )


def _places(name: str, root: Path) -> tuple[list[Path], list[str]]:
    """The folder of the training part, of the validation part if there is one, and notes."""
    folders = {_shown(e.name): Path(e.path) for e in _entries(root, root) if _is_folder(e)}

    def called(names: Sequence[str]) -> list[str]:
        return [folder for folder in folders if folder.casefold() in names]

    def has_folders(folder: str) -> bool:
        return any(_is_folder(entry) for entry in _entries(folders[folder], root))

    train, val, test = called(_TRAIN), called(_VAL), called(_TEST)
    if not any(map(has_folders, train)):
        orphans = [folder for folder in val + test if has_folders(folder)]
        if orphans:
            raise DataError(f"{name} has a folder {orphans[0]}, but no folder train beside it.")
        return [root], []
    for same in (train, val, [] if val else test):
        if len(same) > 1:
            raise DataError(f"{name} has {_listed(same)}, which name the same part; keep one.")
    chosen = train + (val or test)
    notes = []
    if not val and test:
        notes.append(f"{test[0]}/ serves as the validation part.")
    left_out = [folder for folder in folders if folder not in chosen]
    if left_out:
        notes.append(f"folders left out: {_listed(left_out)}.")
    return [folders[folder] for folder in chosen], notes


def _files(name: str, place: Path, root: Path) -> tuple[list[_File], list[str]]:
    """The images of every class folder in ``place``, sorted by path; and notes."""
    entries = _entries(place, root)
    classes = [entry for entry in entries if _is_folder(entry)]
    loose = [entry.path for entry in entries if not _is_folder(entry)]
    where = _shown(place.relative_to(root).as_posix()) if place != root else name
    if not classes:
        if any(map(_is_image, loose)):
            raise DataError(
                f"the images of {where} lie directly in it.",
                fix="put the images of each class into a folder of its own",
            )
        raise DataError(f"{where} has no class folders.", where=f"files in it: {len(loose)}")
    files, empty = [], []
    for entry in classes:
        paths = _walk(Path(entry.path), root)
        images = [path for path in paths if _is_image(path)]
        loose.extend(path for path in paths if not _is_image(path))
        label = _shown(entry.name)
        if not images:
            empty.append(label)
        files.extend(_File(path, _below(path, root), label) for path in images)
    if not files:
        raise DataError(
            f"{where} has no images.",
            where=f"class folders: {len(classes)}; other files: {len(loose)}",
            fix=f"images end in {' '.join(sorted(SUFFIXES))}",
        )
    if empty:
        raise DataError(
            f"{where} has class folders without an image: {_listed(empty)}.",
            fix="add images or remove these folders",
        )
    if not loose:
        return files, []
    shown = _listed(_below(path, root) for path in sorted(loose))
    return files, [f"other files left out: {len(loose):,} ({shown})."]


def _entries(folder: Path, root: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted, without hidden files; a link that leaves root is refused."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(
                (e for e in found if not e.name.startswith(".")), key=attrgetter("name")
            )
    except OSError as error:
        raise ResourceError(
            f"the folder {_below(str(folder), root)} cannot be read.", why=error.strerror
        ) from error
    for entry in entries:
        if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(root):
            raise DataError(
                f"{_below(entry.path, root)} is a link that leaves the data folder; refused.",
                fix="copy what it points to into the folder",
            )
    return entries


def _walk(folder: Path, root: Path) -> list[str]:
    """The files at and below ``folder``; a link that leads back to a folder above is refused."""
    files: list[str] = []
    stack = [(folder, frozenset[str]())]
    while stack:
        here, above = stack.pop()
        real = os.path.realpath(here)
        if real in above:
            raise DataError(
                f"{_below(str(here), root)} is a link to a folder that it lies in; refused."
            )
        for entry in _entries(here, root):
            if _is_folder(entry):
                stack.append((Path(entry.path), above | {real}))
            else:
                files.append(entry.path)
    return sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path)  # noqa: PTH112  False, not an error, for a looping link


def _is_image(path: str) -> bool:
    return Path(path).suffix.lower() in SUFFIXES


def _below(path: str, root: Path) -> str:
    return _shown(Path(path).relative_to(root).as_posix())


def _numbers(files: Iterable[_File], class_names: Sequence[str]) -> np.ndarray:
    index = {name: number for number, name in enumerate(class_names)}
    return np.array([index[file.label] for file in files], dtype=np.int64)


def _check_bad(name: str, bad: Sequence[BadImage], total: int, allowed: int) -> None:
    if len(bad) <= min(allowed, total - 1):
        return
    lines = [f"{image.path}: {image.reason}" for image in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"… and {len(bad) - _SHOWN:,} more")
    fix = "repair or remove them"
    if len(bad) < total:
        fix += f", or leave them out: --max-bad-images {len(bad)}"
    raise DataError(
        f"{name}: {len(bad):,} of {total:,} images cannot be read.",
        where="\n".join(lines),
        fix=fix,
    )


def _hash_files(parts: Iterable[_DecodedPart], class_names: Sequence[str]) -> str:
    lines = sorted(
        f"{file.id}\0{num_bytes}\0{sha.hex()}\n"
        for part in parts
        for file, num_bytes, sha in zip(part.files, part.num_bytes, part.digests, strict=True)
    )
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
    return _hash_names(digest, class_names)


# ------------------------------------------------------------------------------------ decoding

_MODES = {1: "L", 3: "RGB"}
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
class _Fact:
    """What one decoded file was, before it was fitted."""

    digest: bytes
    num_bytes: int
    height: int
    width: int
    is_gray: bool
    remarks: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _DecodedPart:
    """Files that could be decoded, row by row, and those that could not."""

    images: np.ndarray
    files: tuple[_File, ...]
    digests: tuple[bytes, ...]
    num_bytes: tuple[int, ...]
    is_gray: bool
    remarks: Counter[str]
    bad: tuple[BadImage, ...]

    def numbered(self, class_names: Sequence[str]) -> _Part:
        ids = tuple(file.id for file in self.files)
        return _Part(self.images, _numbers(self.files, class_names), self.digests, ids)


def _decode_parts(
    name: str, parts: Sequence[Sequence[_File]], options: _Options
) -> list[_DecodedPart]:
    """Both parts decoded at one size; gray only if that was asked, or if every image is."""
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on metadata; its limit is kept here
        shape = _height_width_channels(options.input_size)
        target = shape or _common_shape(parts[0])
        decoded = [_decode(name, files, target, is_fixed=shape is None) for files in parts]
    if shape is None and all(part.is_gray for part in decoded):
        decoded = [replace(part, images=part.images[..., :1]) for part in decoded]
    return decoded


def _common_shape(files: Iterable[_File]) -> Size:
    """The shape of the first image that can be read."""
    for file in files:
        fact = _decode_into(None, file, is_fixed=True)
        if isinstance(fact, _Fact):
            return fact.height, fact.width, 3
    return 1, 1, 3


def _decode(name: str, files: Sequence[_File], shape: Size, *, is_fixed: bool) -> _DecodedPart:
    images = _allocate((len(files), *shape))
    facts: list[_Fact | BadImage] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, len(files), _SLICE):
            some = files[first : first + _SLICE]
            rows = images[first : first + _SLICE]
            facts.extend(pool.map(_decode_into, rows, some, [is_fixed] * len(some)))
            if is_fixed:
                _check_sizes(name, some, facts[first:], shape)
    good = [row for row, fact in enumerate(facts) if isinstance(fact, _Fact)]
    for to, row in enumerate(good):
        if to != row:
            images[to] = images[row]
    kept = [fact for fact in facts if isinstance(fact, _Fact)]
    return _DecodedPart(
        images[: len(good)],
        tuple(files[row] for row in good),
        tuple(fact.digest for fact in kept),
        tuple(fact.num_bytes for fact in kept),
        all(fact.is_gray for fact in kept),
        Counter(remark for fact in kept for remark in fact.remarks),
        tuple(fact for fact in facts if isinstance(fact, BadImage)),
    )


def _check_sizes(
    name: str, files: Sequence[_File], facts: Sequence[_Fact | BadImage], shape: Size
) -> None:
    odd = {
        (fact.height, fact.width): file.id
        for file, fact in zip(files, facts, strict=True)
        if isinstance(fact, _Fact) and (fact.height, fact.width) != shape[:2]
    }
    if odd:
        others = _listed(f"{_by(size)} ({file})" for size, file in odd.items())
        raise DataError(
            f"{name}: the images differ in size.",
            where=f"{_by(shape[:2])} (the first image), {others}",
            fix="choose one: --input-size C,H,W, for example --input-size 3,224,224",
        )


def _decode_into(row: np.ndarray | None, file: _File, is_fixed: bool) -> _Fact | BadImage:
    """Fill ``row`` (H, W, C) with the image of ``file``; where its size is fixed, only if it fits.

    Whatever a file does to the decoder makes it a bad image; only a machine that runs out of
    memory or file handles stops the run.
    """
    try:
        data = _read(file.path)
        image, is_gray, remarks = _open(data, "RGB" if row is None else _MODES[row.shape[2]])
    except MemoryError as error:
        raise ResourceError(f"not enough memory to decode {file.id}.") from error
    except ResourceError:
        raise
    except Exception as error:  # decoders fail in a dozen ways
        return BadImage(file.id, _reason(error))
    if row is not None and (not is_fixed or (image.height, image.width) == row.shape[:2]):
        _fit_into(row, image)
    digest = hashlib.sha256(data).digest()
    return _Fact(digest, len(data), image.height, image.width, is_gray, remarks)


def _read(path: str) -> bytes:
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


def _open(data: bytes, mode: str) -> tuple[Image.Image, bool, tuple[str, ...]]:
    """The image, upright, as L or RGB; whether it is stored as gray; and what to remark on it."""
    if data.startswith(b"version https://git-lfs"):
        raise DataError("a Git LFS pointer, not the image; `git lfs pull` fetches it")
    try:
        image: Image.Image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        begins = _shown(data[:24].decode("latin-1"))
        raise DataError(f'not a readable image; it begins "{begins}"') from error
    except Image.DecompressionBombError as error:
        raise DataError(f"more than {MAX_PIXELS:,} pixels") from error
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{image.width:,}×{image.height:,}, more than {MAX_PIXELS:,} pixels")
    image.load()
    remarks = []
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


def _fit_into(row: np.ndarray, image: Image.Image) -> None:
    """Fill ``row`` (H, W, C) with the largest centred part of its aspect, resized.

    Equal, up to half a pixel, to resizing until the image covers the target and cropping the
    centre, but without the intermediate image, which an elongated one would make huge.
    """
    height, width, _ = row.shape
    if (image.height, image.width) != (height, width):
        scale = min(image.width / width, image.height / height)
        left = max(0.0, (image.width - width * scale) / 2)
        top = max(0.0, (image.height - height * scale) / 2)
        box = (left, top, image.width - left, image.height - top)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    row[:] = np.asarray(image).reshape(row.shape)


def _allocate(shape: tuple[int, ...]) -> np.ndarray:
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


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _shown(text)[:200] or type(error).__name__


# -------------------------------------------------------------------------- streams of integers


def _raw(count: int, seed: int | list[int], *, spawn: int | None = None) -> np.ndarray:
    """``count`` uint64 of PCG64, whose raw stream NumPy promises not to change (NEP 19)."""
    key = () if spawn is None else (spawn,)
    return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)


def _draw(seed: int, epoch: int, rows: np.ndarray, use: int, bound: int) -> np.ndarray:
    """One int64 in ``range(bound)`` per row, a pure function of (seed, epoch, row, use).

    splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") as a
    hash: each number is mixed into the state of those before it.
    """
    state = np.zeros(len(rows), dtype=np.uint64)
    for number in (seed & _MASK, epoch & _MASK, rows, use):
        state = _splitmix(state ^ np.asarray(number, dtype=np.uint64))
    return ((state >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


_MASK = 2**64 - 1


def _splitmix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _shift(images: np.ndarray, draw: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """uint8 (B, H, W, C) to (B, C, H, W), each moved by what ``draw(bound, use)`` says."""
    count, height, width, channels = images.shape
    down, right = max(1, height // 8), max(1, width // 8)
    padded = np.zeros((count, height + 2 * down, width + 2 * right, channels), dtype=np.uint8)
    padded[:, down : down + height, right : right + width] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    return windows[np.arange(count), draw(2 * down + 1, 0), draw(2 * right + 1, 1)]


# ---------------------------------------------------------------------------------------- words


def _height_width_channels(size: Size | None) -> Size | None:
    return size and (size[1], size[2], size[0])


def _by(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {_by(array.shape) or '()'}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _shown(text: str) -> str:
    """Text that is safe to print: what a terminal would obey or not show stands escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
