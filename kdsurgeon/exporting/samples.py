"""Inputs of a file by name, cut into batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kdsurgeon.tracing import Inputs

Samples = Mapping[str, Tensor]

ONE = "input"  # what an exported file calls its input where there is but one


def by_name(inputs: Inputs) -> dict[str, Tensor]:
    """Tensors on the CPU, by the names of the file's inputs.

    >>> list(by_name(torch.zeros(2, 3)))
    ['input']
    """
    named = {ONE: inputs} if isinstance(inputs, Tensor) else inputs
    return {name: value.detach().cpu() for name, value in named.items()}


def count(samples: Samples) -> int:
    """How many samples there are."""
    return len(next(iter(samples.values())))


def rows(samples: Samples, index: Tensor | slice) -> dict[str, Tensor]:
    """Those samples alone."""
    return {name: value[index].contiguous() for name, value in samples.items()}


def repeated(samples: Samples, size: int) -> dict[str, Tensor]:
    """``size`` samples: the first ones, from the start again where there are too few.

    >>> repeated({"input": torch.arange(3)}, 5)["input"].tolist()
    [0, 1, 2, 0, 1]
    """
    return rows(samples, torch.arange(size) % count(samples))


def chunks(samples: Samples, size: int) -> Iterator[dict[str, Tensor]]:
    """The samples in order, at most ``size`` at a time."""
    for start in range(0, count(samples), size):
        yield rows(samples, slice(start, start + size))


def random_like(samples: Samples, number: int, seed: int) -> dict[str, Tensor]:
    """``number`` drawn samples of the same shapes and types.

    Floats are standard normal, bytes even over 0 to 255, and of other numbers those seen in
    ``samples``: tokens drawn from them, masks (two values at most) taken as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _drawn(value, number, generator) for name, value in repeated(samples, number).items()
    } if number else {}  # fmt: skip


def _drawn(like: Tensor, number: int, generator: torch.Generator) -> Tensor:
    if like.is_floating_point():
        return torch.randn(like.shape, dtype=like.dtype, generator=generator)
    if like.dtype == torch.uint8:
        return torch.randint(0, 256, like.shape, dtype=like.dtype, generator=generator)
    seen = like.unique()
    if len(seen) <= 2:
        return like
    return seen[torch.randint(0, len(seen), like.shape, generator=generator)]


def edges_of(samples: Samples) -> dict[str, Tensor]:
    """Four samples at the edge: all zero, all lowest, all highest, and these two in turn.

    Of inputs that are no floats or bytes, the first samples stand in.
    """
    return {name: _edges(value) for name, value in repeated(samples, 4).items()}


def _edges(like: Tensor) -> Tensor:
    if not like.is_floating_point() and like.dtype != torch.uint8:
        return like
    low, high = (0, 255) if like.dtype == torch.uint8 else (like.min().item(), like.max().item())
    if like.is_floating_point():
        low, high = min(low, -3.0), max(high, 3.0)
    found = torch.zeros_like(like)
    found[1], found[2], found[3] = low, high, high
    found[3].flatten()[::2] = low
    return found
