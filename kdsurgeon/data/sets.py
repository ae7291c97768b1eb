"""Labelled images of one size in two parts, split and normalised: where every source ends."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from kdsurgeon.checkpoints import INTERPOLATIONS
from kdsurgeon.data.words import kind, listed
from kdsurgeon.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from kdsurgeon.data.pictures import Pictures

Size = tuple[int, int, int]
Augment = Literal["none", "shift", "shift-flip", "crop-flip"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 89_478_485  # Pillow's own limit, which by itself only warns up to twice as many


@dataclass(frozen=True)
class Fit:
    """How an image of another size is brought to that of the network, in timm's words.

    ``crop_pct`` is the share of the largest centred part that is kept, of each side.
    Raises :class:`UsageError` for a share that is none, or an unknown interpolation.
    """

    crop_pct: float = 1.0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise UsageError(f"crop_pct is {self.crop_pct}; it must be above 0, at most 1.")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(
                f'no interpolation is called "{self.interpolation}".',
                fix=nearest(self.interpolation, INTERPOLATIONS) or ", ".join(INTERPOLATIONS),
            )


WHOLE = Fit()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size, and the numbers that turn them into a network's input.

    ``images`` is uint8 (N, H, W, C) with C 1 or 3, in memory, a memory map or :class:`Pictures`
    that are decoded when they are asked for; ``labels`` int64 (N,)
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
    images: np.ndarray | Pictures
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
            raise DataError(f"{self.name}: images are {kind(images)}, not uint8 (N, H, W, C).")
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise DataError(f"{self.name}: labels are {kind(labels)}, not int64 ({len(images)},).")
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

    def normalise(self, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        """``(pixels / scale - mean) / std`` for uint8 ``pixels`` (B, C, H, W), as a new tensor.

        A tensor's stays on its device; the two roundings are the same on every device.
        """
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (self.mean, self.std))
        factor, offset = 1 / (self.scale * std), -mean / std
        if isinstance(pixels, torch.Tensor):
            x = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        else:
            x = torch.from_numpy(pixels.astype(np.float32, order="C"))
        x *= factor.to(torch.float32)[:, None, None].to(x.device)
        x += offset.to(torch.float32)[:, None, None].to(x.device)
        return x

    def name_of(self, row: int) -> str:
        """What messages call the sample: its file below the data folder, or its row."""
        return self.ids[row] if self.ids else f"{self.name}[{row}]"

    def select(self, rows: np.ndarray, class_names: Sequence[str], number: np.ndarray) -> Dataset:
        """Those rows alone, their label y as ``number[y]``, under other class names."""
        images = self.images
        return replace(
            self,
            images=images[rows] if isinstance(images, np.ndarray) else images.take(rows),
            labels=number[self.labels[rows]],
            class_names=tuple(class_names),
            ids=None if self.ids is None else tuple(self.ids[row] for row in rows),
        )


@dataclass(frozen=True)
class BadImage:
    """An image that could not be used: its path below the data folder, and why."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Split:
    """A data set in two parts that share classes, size and normalisation.

    ``bad`` are the images left out; ``fingerprint`` is a sha256 of the content of both parts and
    of the class names, whatever the split; ``notes`` are sentences about what was found and done;
    ``source_classes`` are those of the source, where only some were chosen; ``fit`` says how images
    of another size are brought to this one to be judged.
    """

    train: Dataset
    val: Dataset
    bad: tuple[BadImage, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()
    source_classes: tuple[str, ...] | None = None
    fit: Fit = WHOLE

    def normalised_by(self, mean: Sequence[float], std: Sequence[float]) -> Split:
        """The same images, served with another mean and std per channel on the 0..1 scale."""
        numbers = {"mean": tuple(mean), "std": tuple(std)}
        return replace(self, train=replace(self.train, **numbers), val=replace(self.val, **numbers))

    def __post_init__(self) -> None:
        assert self.train.input_size == self.val.input_size
        for field in ("class_names", "mean", "std", "scale"):
            assert getattr(self.train, field) == getattr(self.val, field), field


@dataclass(frozen=True)
class Options:
    """What the caller asked of a data set, checked."""

    val_split: float
    seed: int
    input_size: Size | None
    max_bad_images: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    fit: Fit = WHOLE
    stream: bool | None = None

    @property
    def fits(self) -> tuple[Fit, Fit]:
        """Of the training part, of which no margin is cut, and of the validation part."""
        return replace(self.fit, crop_pct=1.0), self.fit

    def __post_init__(self) -> None:
        if not 0 < self.val_split < 1:
            raise UsageError(f"val_split is {self.val_split}; it must lie between 0 and 1.")
        check_seed(self.seed)
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


def check_seed(seed: int) -> None:
    if seed < 0:
        raise UsageError(f"the seed is {seed}; it must be 0 or more.")


@dataclass(frozen=True, eq=False)
class Part:
    """Images of one part before normalisation; ``digests`` tell equal images, where known."""

    images: np.ndarray | Pictures
    labels: np.ndarray
    digests: tuple[bytes, ...]
    ids: tuple[str, ...] | None = None


def finish(
    name: str,
    train: Part,
    val: Part,
    class_names: tuple[str, ...],
    options: Options,
    *,
    fingerprint: str,
    notes: Iterable[str],
    scale: float = 255.0,
    is_natural: bool = False,
    bad: tuple[BadImage, ...] = (),
) -> Split:
    """Both parts as data sets, after the checks that every source shares."""
    notes = [*notes, *check_classes(name, train.labels, val.labels, class_names)]
    known = set(train.digests)
    twins = sum(digest in known for digest in val.digests)
    if twins:
        notes.append(f"{twins:,} validation images are also in the training part.")
    mean, std = _normalisation(name, train.images, scale, is_natural, options)

    def dataset(part: str, of: Part) -> Dataset:
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

    parts = dataset("train", train), dataset("val", val)
    return Split(*parts, bad, fingerprint, tuple(notes), fit=options.fit)


def check_classes(
    name: str, train: np.ndarray, val: np.ndarray, class_names: tuple[str, ...]
) -> list[str]:
    """What to say of classes that only one part has; an error where that cannot work."""
    for part, labels in (("training", train), ("validation", val)):
        if not len(labels):
            raise DataError(f"{name}: the {part} part is empty.", fix="add images")
    if len(class_names) < 2:
        raise DataError(
            f"{name}: there is one class only, {listed(class_names)}.",
            why="a classifier needs two classes or more",
        )
    in_train, in_val = (np.bincount(x, minlength=len(class_names)) for x in (train, val))
    foreign = [class_names[i] for i in np.flatnonzero((in_train == 0) & (in_val > 0))]
    if foreign:
        raise DataError(
            f"{name}: the validation part has classes without training images: {listed(foreign)}.",
            fix="add training images of these classes, or remove the classes",
        )
    absent = [class_names[i] for i in np.flatnonzero((in_train == 0) & (in_val == 0))]
    unseen = [class_names[i] for i in np.flatnonzero((in_train > 0) & (in_val == 0))]
    notes = []
    if absent:
        notes.append(f"classes without any image: {listed(absent)}.")
    if unseen:
        notes.append(f"classes without a validation image: {listed(unseen)}.")
    return notes


def stratified(name: str, labels: np.ndarray, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to validate on, both sorted, split alike in every class.

    The validation part has ``ceil(N * val_split)`` rows, shared out by largest remainder; a class
    never gives up its last row. Raises :class:`DataError` when no row can be spared.
    """
    counts = np.bincount(labels)
    spare = np.maximum(counts - 1, 0)
    quota = counts * options.val_split
    take = np.minimum(np.floor(quota).astype(np.int64), spare)
    wanted = min(math.ceil(round(len(labels) * options.val_split, 6)), int(spare.sum()))
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
        order = np.argsort(raw_numbers(len(rows), options.seed, spawn=label), kind="stable")
        val[rows[order[:count]]] = True
    return np.flatnonzero(~val), np.flatnonzero(val)


def _normalisation(
    name: str, images: np.ndarray | Pictures, scale: float, is_natural: bool, options: Options
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = images.shape[3]
    for label, values in (("mean", options.mean), ("std", options.std)):
        if values is not None and len(values) != channels:
            have = f"{channels} channel{'s' * (channels > 1)}"
            raise UsageError(
                f"{label} has {len(values)} numbers; the images of {name} have {have}.",
                fix=f"give one number a channel: --{label} {','.join(['0.5'] * channels)}",
            )
    if options.mean and options.std:
        return options.mean, options.std
    if is_natural and channels == 3:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        mean, std = moments(_some(images), scale)
    std = options.std or std
    if min(std) == 0:
        raise DataError(
            f"{name}: all training pixels of channel {std.index(min(std))} are equal.",
            fix="check the images, or give mean and std",
        )
    return options.mean or mean, std


def _some(images: np.ndarray | Pictures) -> np.ndarray:
    """All images in memory, or 4,096 evenly spaced ones of those that have to be decoded."""
    if isinstance(images, np.ndarray):
        return images
    return images[np.linspace(0, len(images) - 1, min(len(images), 4096)).astype(np.int64)]


def moments(images: np.ndarray, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
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


def content_hash(content: Iterable[bytes | memoryview], class_names: Sequence[str]) -> str:
    """The fingerprint of a data set whose images and labels are ``content``."""
    digest = hashlib.sha256()
    for piece in (*content, "\0".join(class_names).encode()):
        digest.update(piece)
    return digest.hexdigest()


def raw_numbers(count: int, seed: int | list[int], *, spawn: int | None = None) -> np.ndarray:
    """``count`` uint64 of PCG64, whose raw stream NumPy promises not to change (NEP 19)."""
    key = () if spawn is None else (spawn,)
    return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)


def height_width_channels(size: Size | None) -> Size | None:
    return size and (size[1], size[2], size[0])
