"""Draw numbers as pure functions of (seed, epoch, row, use): no state, no order, no worker.

They are built on an integer stream that never changes (splitmix64), not on ``Generator``, whose
results NumPy may change between releases.
"""

from __future__ import annotations

import numpy as np

# What the numbers are drawn for. A use that is in a release keeps its number.
DOWN, RIGHT, MIRROR = 0, 1, 2
OPERATION, SIGN = 16, 32  # one for each operation of RandAugment, at most 16
CUT_DOWN, CUT_RIGHT = 48, 49
ERASE = 63
ERASE_BOX = 64  # four for each of ten tries
CROP_BOX = 128  # four for each of ten tries

_MASK = 2**64 - 1
_FINE = 2**31


def draw(seed: int, epoch: int, rows: np.ndarray, use: int, bound: int) -> np.ndarray:
    """One int64 in ``range(bound)`` per row, a pure function of (seed, epoch, row, use).

    splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") as a
    hash: each number is mixed into the state of those before it.

    >>> draw(1, 2, np.arange(6), 0, 9).tolist()
    [4, 0, 2, 0, 7, 1]
    """
    state = np.zeros(len(rows), dtype=np.uint64)
    for number in (seed & _MASK, epoch & _MASK, rows, use):
        state = _splitmix(state ^ np.asarray(number, dtype=np.uint64))
    return ((state >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)).astype(np.int64)


def draw_share(seed: int, epoch: int, rows: np.ndarray, use: int) -> np.ndarray:
    """The same as float64 from 0 to below 1, in steps of 2⁻³¹."""
    return draw(seed, epoch, rows, use, _FINE) / _FINE


def _splitmix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
