"""Serve a data set in shuffled, augmented batches that are pure functions of (seed, epoch, row).

So a resumed run needs no state, and neither workers nor devices nor ranks change what is served.
Order and augmentation are built on integer streams that never change (PCG64's raw output and
splitmix64), not on ``Generator.permutation``, whose result NumPy may change between releases.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdsurgeon.data import pixels
from kdsurgeon.data.augmenting import (
    Augmentation,
    Draws,
    crop_boxes,
    holes,
    is_mirrored,
    margins,
    offsets,
    parse_augmentation,
)
from kdsurgeon.data.draws import draw as draw
from kdsurgeon.data.pictures import Pictures
from kdsurgeon.data.sets import Dataset, check_seed, raw_numbers
from kdsurgeon.data.workers import MAX_WORKERS, produce
from kdsurgeon.errors import UsageError

WINDOW = 16  # shards that are mixed with each other; each is read from one place of the disk


class Batches:
    """One epoch of a data set in batches: ``(x, y)`` with x normalised float32 (B, C, H, W) and
    y int64 (B,), in an order that is a pure function of (seed, epoch).

    ``augment="shift"`` pads each side by an eighth of its length (at least 1) with black, crops at
    a random offset; ``"shift-flip"`` also mirrors every second image. Black is the raw value 0
    *before* normalisation, as in the CIFAR protocol (He et al. 2015, arXiv 1512.03385, section 4.2;
    torchvision's ``RandomCrop(32, padding=4)`` before ``Normalize``). ``"crop-flip"`` takes a part
    of random size and aspect instead; an :class:`Augmentation` says more. What happens to a sample
    is a pure function of (seed, epoch, its row), whatever the batch size. With ``views`` it repeats
    after so many epochs; the order does not.

    ``workers`` processes read, decode and augment; with a ``device`` the images live there as uint8
    and are augmented there, and x and y come from there. Neither changes a bit of x.

    Raises :class:`UsageError` for a batch size below 1, or one that leaves no batch.

    >>> from kdsurgeon.data import load
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
        augment: str | Augmentation = "none",
        drop_last: bool = False,
        views: int | None = None,
        workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        if batch_size < 1 or (drop_last and batch_size > len(dataset)):
            raise UsageError(
                f"a batch size of {batch_size} makes no batch of {len(dataset)} images.",
                fix="choose another --batch-size",
            )
        if isinstance(augment, str):
            augment = parse_augmentation(augment)
        if augment.rand and dataset.scale != 255:
            raise UsageError(
                f"RandAugment needs images in 0..255; the white of {dataset.name} is "
                f"{dataset.scale:g}.",
                fix="give their size, which converts them: --input-size C,H,W",
            )
        if views is not None and views < 1:
            raise UsageError(f"{views} views of each image make no epoch.", fix="1 or more")
        if not 0 <= workers <= MAX_WORKERS:
            raise UsageError(
                f"{workers} workers cannot read images.", fix=f"0 (none) to {MAX_WORKERS}"
            )
        check_seed(seed)
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augmentation = augment
        self.drop_last = drop_last
        self.views = 1 if self.augment == "none" else views
        self.workers = workers
        self.rank, self.world = 0, 1
        self.epoch = 0
        self._start = 0
        self._resident = None if device is None else _Resident.of(dataset, device)

    @property
    def augment(self) -> str:
        """The augmentation in words, equal for equal ones."""
        return str(self.augmentation)

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

    def shard(self, rank: int, world: int) -> Batches:
        """The part of every batch that is rank's of ``world`` processes.

        The parts of all ranks, in their order, are the batch of one process; their lengths differ
        by one at most. An epoch has as many batches on every rank; without ``shuffle`` a rank
        passes over those in which it has no sample, so that each sample is served exactly once.

        Raises:
            UsageError: no such rank; or a batch to learn from has no sample for one.
        """
        if not 0 <= rank < world:
            raise UsageError(f"there is no rank {rank} among {world} processes.")
        if self.shuffle and not self.least_part(world):
            raise UsageError(
                f"a batch of {self.least_part(1)} images cannot be shared by {world} processes.",
                where=f"{len(self.dataset):,} images in batches of {self.batch_size}",
                fix=f"--batch-size {self.roomier(world)}, for example",
            )
        part = copy.copy(self)
        part.rank, part.world = rank, world
        return part

    def least_part(self, world: int = 1) -> int:
        """How many samples one of ``world`` processes has at the least in a batch of an epoch.

        >>> from kdsurgeon.data import load
        >>> batches = Batches(load("digits").train, 64, shuffle=True, seed=0)
        >>> len(batches.dataset), batches.least_part(), batches.least_part(2)
        (1347, 3, 1)
        """
        return self._least(self.batch_size) // world

    def roomier(self, world: int = 1) -> int:
        """The next larger batch size at which each of ``world`` processes always has two samples.

        >>> from kdsurgeon.data import load
        >>> Batches(load("digits").train, 64, shuffle=True, seed=0).roomier(2)
        65
        """
        size = max(self.batch_size + 1, 2 * world)
        while self._least(size) < 2 * world and size < len(self.dataset):
            size += 1
        return size

    def _least(self, size: int) -> int:
        rest = len(self.dataset) % size
        return size if self.drop_last or not rest else rest

    def rows(self, batch: int) -> np.ndarray:
        """Which rows of the data set make up ``batch`` of the current epoch (this rank's part)."""
        return self._rows(self.order(), batch)

    def sample_ids(self, batch: int) -> list[str]:
        """What messages call the samples of ``batch`` of the current epoch."""
        return [self.dataset.name_of(row) for row in self.rows(batch).tolist()]

    def order(self) -> np.ndarray:
        """The rows of the whole epoch in the order in which they are served."""
        count = len(self.dataset)
        if not self.shuffle:
            return np.arange(count)
        order = np.argsort(raw_numbers(count, [self.seed, self.epoch]), kind="stable")
        if isinstance(self.dataset.images, Pictures) and self.dataset.images.groups is not None:
            return _by_groups(order, self.dataset.images.groups, [self.seed, self.epoch])
        return order

    @property
    def view(self) -> int:
        """Which augmentation of its images the epoch shows."""
        return self.epoch if self.views is None else self.epoch % self.views

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images, labels) for _, images, labels in self.with_rows())

    def with_rows(self) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """The same pass, with the rows of the data set that each batch is made of."""
        start, self._start = self._start, 0
        return self._pass(self.view, self.order(), start)

    def _pass(
        self, view: int, order: np.ndarray, start: int
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        parts = (self._rows(order, batch) for batch in range(start, len(self)))
        parts = [rows for rows in parts if len(rows)]
        home = self._resident
        images = self.dataset.images if home is None else home.images
        make = Making(images, self.augmentation, self.seed, view, self._mean_pixel())
        made = produce(make, parts, 0 if home else self.workers)
        for rows, found in zip(parts, made, strict=True):
            labels = self.dataset.labels[rows] if home is None else home.labels_of(rows)
            yield rows, self._normalised(found, rows, view), torch.as_tensor(labels)

    def _rows(self, order: np.ndarray, batch: int) -> np.ndarray:
        rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return np.array_split(rows, self.world)[self.rank]

    def _normalised(self, found: Tensor, rows: np.ndarray, view: int) -> Tensor:
        images = self.dataset.normalise(found)
        boxes = holes(self.augmentation, Draws(self.seed, view, rows), *images.shape[2:])
        return pixels.hollow(images, boxes)

    def _mean_pixel(self) -> tuple[int, ...]:
        """What RandAugment fills in, one number per channel."""
        data = self.dataset
        return tuple(min(255, max(0, round(data.scale * mean))) for mean in data.mean)


@dataclass(frozen=True, eq=False)
class Making:
    """What turns rows into augmented pixels; goes to workers as it is."""

    images: np.ndarray | Pictures | Tensor
    augmentation: Augmentation
    seed: int
    view: int
    fill: tuple[int, ...]

    def __call__(self, rows: np.ndarray) -> Tensor:
        """uint8 (B, C, H, W)."""
        how, drawn = self.augmentation, Draws(self.seed, self.view, rows)
        found = self._cropped(rows, drawn)
        if how.flip:
            found = pixels.mirrored(found, is_mirrored(drawn))
        if how.rand:
            fill = torch.tensor(self.fill, dtype=torch.uint8, device=found.device)
            found = pixels.rand_augmented(found, how.rand, drawn, fill)
        return found

    def _cropped(self, rows: np.ndarray, drawn: Draws) -> Tensor:
        how, images = self.augmentation, self.images
        if isinstance(images, Pictures) and how.crop == "crop":
            return _channels_first(images.cropped(rows, self._box_of(rows)))
        if isinstance(images, Tensor):
            found = images[torch.from_numpy(rows).to(images.device)]
        elif how.crop == "shift":
            return torch.from_numpy(_shift(images[rows], drawn))
        else:
            found = _channels_first(images[rows])
        height, width = found.shape[2:]
        if how.crop == "shift":
            return pixels.shifted(found, *offsets(drawn, height, width))
        if how.crop == "crop":
            size = np.full(len(rows), height), np.full(len(rows), width)
            return pixels.cropped(found, crop_boxes(how, drawn, *size))
        return found

    def _box_of(self, rows: np.ndarray) -> Callable[[int, int, int], np.ndarray]:
        def box(index: int, height: int, width: int) -> np.ndarray:
            drawn = Draws(self.seed, self.view, rows[index : index + 1])
            return crop_boxes(self.augmentation, drawn, np.array([height]), np.array([width]))[0]

        return box


@dataclass(frozen=True, eq=False)
class _Resident:
    """A data set on a device: uint8 (N, C, H, W) and its labels."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, dataset: Dataset, device: torch.device) -> _Resident:
        images = dataset.images
        if isinstance(images, Pictures):
            images = images.decoded()
        return cls(_channels_first(images).to(device), torch.tensor(dataset.labels, device=device))

    def labels_of(self, rows: np.ndarray) -> Tensor:
        return self.labels[torch.from_numpy(rows).to(self.labels.device)]


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _shift(images: np.ndarray, drawn: Draws) -> np.ndarray:
    """:func:`pixels.shifted` of uint8 (B, H, W, C), several times faster on a CPU."""
    count, height, width, channels = images.shape
    down, right = margins(height, width)
    padded = np.zeros((count, height + 2 * down, width + 2 * right, channels), dtype=np.uint8)
    padded[:, down : down + height, right : right + width] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    return windows[np.arange(count), *offsets(drawn, height, width)]


def _by_groups(order: np.ndarray, groups: np.ndarray, seed: list[int]) -> np.ndarray:
    """The same rows, sorted into windows of a few groups, which are taken in random order."""
    count = int(groups.max()) + 1
    place = np.argsort(np.argsort(raw_numbers(count, seed, spawn=1), kind="stable"))
    return order[np.argsort(place[groups[order]] // WINDOW, kind="stable")]
