"""How arrays, shapes and names read in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

SHOWN = 5  # how many files, classes or labels an error lists


def by(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


class Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...


def kind(array: Shaped) -> str:
    return f"{array.dtype} of shape {by(array.shape) or '()'}"


def listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def shown(text: str) -> str:
    """Text that is safe to print: what a terminal would obey or not show stands escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
