"""How alike two networks see the same images, cut point by cut point: evidence for an alignment.

Of an untrained student it says little; let it count once the student has learned something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kdsurgeon.layouts import Activation
from kdsurgeon.partitioning import CutPoint, tap
from kdsurgeon.tracing import Inputs, Trace, in_mode

MAX_GRID = 7  # maps are pooled to at most 7×7 first: CKA compares images, not pixels


def probe(
    teacher: Trace, student: Trace, batches: Sequence[Inputs]
) -> Callable[[Sequence[CutPoint], Sequence[CutPoint]], Mapping[tuple[str, str], float]]:
    """Linear CKA of teacher and student on ``batches``, for :func:`kdsurgeon.alignment.align`.

    The unbiased estimate of Song et al. 2012 (Feature Selection via Dependence Maximization, eq. 4)
    in the index of Kornblith et al. 2019 (arXiv 1905.00414): with few images the plain one is large
    for any two wide layers. Values below 0 are given as 0.
    """

    def similarity(
        rows: Sequence[CutPoint], columns: Sequence[CutPoint]
    ) -> dict[tuple[str, str], float]:
        left, right = (
            _kernels(trace, points, batches)
            for trace, points in ((teacher, rows), (student, columns))
        )
        return {
            (row.name, column.name): linear_cka(left[row.name], right[column.name])
            for row in rows
            for column in columns
        }

    return similarity


def linear_cka(first: Tensor, second: Tensor) -> float:
    """CKA of two centred kernels (samples, samples), from 0 to 1.

    >>> features = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    >>> kernel = features @ features.T
    >>> round(linear_cka(kernel, 3 * kernel), 4)
    1.0
    """
    norm = (_hsic(first, first) * _hsic(second, second)) ** 0.5
    value = _hsic(first, second) / norm if norm > 0 else 0.0
    return min(1.0, max(0.0, value))


def _hsic(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate of the dependence of two kernels."""
    count = len(first)
    one, other = (kernel - torch.diag(kernel.diagonal()) for kernel in (first, second))
    trace_term = (one * other).sum()
    sums = one.sum() * other.sum() / ((count - 1) * (count - 2))
    rows = 2 * (one.sum(0) @ other.sum(0)) / (count - 2)
    return max(0.0, ((trace_term + sums - rows) / (count * (count - 3))).item())


@torch.no_grad()
def _kernels(
    trace: Trace, points: Sequence[CutPoint], batches: Sequence[Inputs]
) -> dict[str, Tensor]:
    """For every cut point the inner products of the samples' features, in double precision."""
    tapped = tap(trace, [point.main.name for point in points])
    features: dict[str, list[Tensor]] = {point.name: [] for point in points}
    with in_mode(trace.model, training=False):
        for inputs in batches:
            values = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
            _, tensors = tapped.forward(*values)
            for point in points:
                features[point.name].append(_flat(tensors[point.main.name], point.main))
    stacked = {name: torch.cat(parts).double() for name, parts in features.items()}
    return {name: values @ values.T for name, values in stacked.items()}


def _flat(tensor: Tensor, what: Activation) -> Tensor:
    """(batch, features), maps pooled."""
    if what.axes == "TBC":
        tensor = tensor.transpose(0, 1)
    if what.axes == "BHWC":
        tensor = tensor.permute(0, 3, 1, 2)
    if what.kind == "map" and max(tensor.shape[2:]) > MAX_GRID:
        height, width = (min(MAX_GRID, size) for size in tensor.shape[2:])
        tensor = functional.adaptive_avg_pool2d(tensor, (height, width))
    return tensor.flatten(1)
