"""Serve a data set in shuffled, augmented batches that are pure functions of (seed, epoch, row).

So a resumed run needs no state. Order and augmentation are built on integer streams that never
change (PCG64's raw output and splitmix64), not on ``Generator.permutation``, whose result NumPy may
change between releases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from kdsurgeon.data.sets import Augment, Dataset, check_seed, raw_numbers
from kdsurgeon.errors import UsageError, nearest


class Batches:
    """One epoch of a data set in batches: ``(x, y)`` with x normalised float32 (B, C, H, W) and
    y int64 (B,), in an order that is a pure function of (seed, epoch).

    ``augment="shift"`` pads each side by an eighth of its length (at least 1) with black, crops at
    a random offset; ``"shift-flip"`` also mirrors every second image. Black is the raw value 0
    *before* normalisation, as in the CIFAR protocol (He et al. 2015, arXiv 1512.03385, section 4.2;
    torchvision's ``RandomCrop(32, padding=4)`` before ``Normalize``). What happens to a sample is a
    pure function of (seed, epoch, its row), whatever the batch size. With ``views`` it repeats
    after so many epochs; the order does not.

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
        augment: Augment = "none",
        drop_last: bool = False,
        views: int | None = None,
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
        if views is not None and views < 1:
            raise UsageError(f"{views} views of each image make no epoch.", fix="1 or more")
        check_seed(seed)
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augment: Augment = augment
        self.drop_last = drop_last
        self.views = 1 if augment == "none" else views
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
        return np.argsort(raw_numbers(len(self.dataset), [self.seed, self.epoch]), kind="stable")

    @property
    def view(self) -> int:
        """Which augmentation of its images the epoch shows."""
        return self.epoch if self.views is None else self.epoch % self.views

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((images, labels) for _, images, labels in self.with_rows())

    def with_rows(self) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """The same pass, with the rows of the data set that each batch is made of."""
        start, self._start = self._start, 0
        return self._pass(self.view, self.order(), start)

    def _pass(
        self, view: int, order: np.ndarray, start: int
    ) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        for batch in range(start, len(self)):
            rows = self._rows(order, batch)
            images = self.dataset.normalise(self._pixels(rows, view))
            yield rows, images, torch.from_numpy(self.dataset.labels[rows])

    def _rows(self, order: np.ndarray, batch: int) -> np.ndarray:
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _pixels(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """uint8 (B, C, H, W), augmented."""
        images = self.dataset.images[rows]
        if self.augment == "none":
            return images.transpose(0, 3, 1, 2)
        draws = partial(draw, self.seed, epoch, rows)
        shifted = _shift(images, draws)
        if self.augment == "shift-flip":
            mirrored = draws(2, 2) == 1
            shifted[mirrored] = shifted[mirrored][..., ::-1]
        return shifted


def draw(seed: int, epoch: int, rows: np.ndarray, use: int, bound: int) -> np.ndarray:
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


def _shift(images: np.ndarray, draws: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """uint8 (B, H, W, C) to (B, C, H, W), each moved by what ``draws(use, bound)`` says."""
    count, height, width, channels = images.shape
    down, right = max(1, height // 8), max(1, width // 8)
    padded = np.zeros((count, height + 2 * down, width + 2 * right, channels), dtype=np.uint8)
    padded[:, down : down + height, right : right + width] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    return windows[np.arange(count), draws(0, 2 * down + 1), draws(1, 2 * right + 1)]
