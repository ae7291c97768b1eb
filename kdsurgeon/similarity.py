"""How alike two networks see the same images, cut point by cut point: evidence for an alignment.

Of an untrained student it says little; let it count once the student has learned something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kdsurgeon.errors import UsageError
from kdsurgeon.layouts import Activation
from kdsurgeon.partitioning import CutPoint, primary_input, tap
from kdsurgeon.tracing import Inputs, Trace, in_mode

MIN_SAMPLES = 8  # the unbiased estimate divides by n - 3; of fewer samples it is mostly noise
MAX_GRID = 7  # maps are pooled to at most 7×7 first: CKA compares images, not pixels


def probe(
    teacher: Trace, student: Trace, batches: Iterable[Inputs]
) -> Callable[[Sequence[CutPoint], Sequence[CutPoint]], Mapping[tuple[str, str], float]]:
    """Linear CKA of teacher and student on ``batches``, for :func:`kdsurgeon.alignment.align`.

    The unbiased estimate of Song et al. 2012 (Feature Selection via Dependence Maximization, eq. 4)
    in the index of Kornblith et al. 2019 (arXiv 1905.00414): with few images the plain one is large
    for any two wide layers. Values below 0 are given as 0.

    Raises:
        UsageError: a batch is not like the example that the models were captured with, or not
            finite, or there are fewer than :data:`MIN_SAMPLES` samples in all.
    """
    batches = _checked(teacher, batches)

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


def _checked(trace: Trace, batches: Iterable[Inputs]) -> list[Inputs]:
    """The batches, once each of them can be shown to the models and there are enough samples."""
    if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
        raise UsageError(
            "the probe must be a list of batches.",
            given=type(batches).__name__,
            fix="probe=[images]",
        )
    found = list(batches)
    count = sum(_samples_in(trace, batch, at) for at, batch in enumerate(found, start=1))
    if count < MIN_SAMPLES:
        raise UsageError(
            f"the probe holds {count} sample{'' if count == 1 else 's'}, too few to compare two "
            "models on.",
            why="with so few, any two layers look alike or not by chance",
            fix=f"give {MIN_SAMPLES} or more, as --probe 64 does",
        )
    return found


def _samples_in(trace: Trace, batch: Any, number: int) -> int:
    """How many samples a batch holds; raises where it is not like the trace's example."""
    is_alone = isinstance(trace.example, Tensor)
    given = {"input": batch} if isinstance(batch, Tensor) else batch
    is_named = isinstance(given, Mapping) and isinstance(batch, Tensor) == is_alone
    if not is_named or set(given) != set(trace.inputs):
        wanted = "a tensor" if is_alone else f"tensors by name: {', '.join(trace.inputs)}"
        raise UsageError(
            f"batch {number} of the probe is not like the example.",
            given=_in_words(batch),
            wanted=wanted,
            fix="give inputs alone, as to the models: probe=[images for images, _ in batches]",
        )
    for name, example in trace.inputs.items():
        _check_tensor(given[name], example, f"batch {number} of the probe")
    return len(given[str(primary_input(trace).target)])


def _check_tensor(value: Any, example: Tensor, where: str) -> None:
    if not isinstance(value, Tensor) or _frame(value) != _frame(example):
        raise UsageError(
            f"{where} has another shape than the example.",
            given=_in_words(value),
            wanted=_in_words(example),
            fix="resize it; the first axis alone may differ",
        )
    if value.dtype != example.dtype:
        raise UsageError(
            f"{where} is of {value.dtype}, the example of {example.dtype}.".replace("torch.", ""),
            fix="convert it: batch.to(example.dtype)",
        )
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise UsageError(
            f"{where} has values that are not finite.",
            fix="look for NaN and infinity in the data, or in its normalisation",
        )


def _frame(value: Tensor) -> tuple[int, ...]:
    """How many axes, and their sizes but for the first."""
    return (value.ndim, *value.shape[1:])


def _in_words(value: Any) -> str:
    is_tensor = isinstance(value, Tensor)
    return f"{'×'.join(map(str, value.shape))}" if is_tensor else f"a {type(value).__name__}"


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
            named = {"input": inputs} if isinstance(inputs, Tensor) else inputs
            _, tensors = tapped.forward(*(named[name] for name in trace.inputs))
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
