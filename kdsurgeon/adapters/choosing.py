"""Choose the adapters of a boundary: who feeds whom, by which operation, within a budget."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from math import log

from kdsurgeon.adapters.building import num_parameters
from kdsurgeon.adapters.spec import AdapterSpec, natural, num_cells
from kdsurgeon.errors import PlanError, UsageError
from kdsurgeon.layouts import Activation
from kdsurgeon.partitioning import CutPoint


def adapter_for(
    student: CutPoint, teacher: CutPoint, *, max_parameters: int | None = None
) -> tuple[AdapterSpec, ...]:
    """One adapter for every tensor of the teacher's cut; ``spec.source.name`` says what feeds it.

    It is fed by the student's tensor of the nearest resolution; of equally near ones by that with
    the most channels, then by the first. A vector is never chosen to be spread over a grid.

    Args:
        max_parameters: for all of them together. Where it is exceeded, every map gets the same
            largest rank that fits, 3×3 and 4×4 kernels becoming depthwise ones first.

    Raises:
        PlanError: the student offers only vectors to a grid, or not even rank 1 fits.

    >>> small = CutPoint((Activation("a", (8, 6, 6), "BCHW", (6, 6)),), 0.5, True)
    >>> large = CutPoint((Activation("b", (32, 6, 6), "BCHW", (6, 6)),), 0.5, True)
    >>> [str(spec) for spec in adapter_for(small, large)]
    ['conv 1×1 8→32 + BN']
    >>> [str(spec) for spec in adapter_for(small, large, max_parameters=200)]
    ['conv 1×1 8→3→32 + BN']
    """
    pairs = [(_feeding(student, target), target) for target in teacher.tensors]
    specs = tuple(AdapterSpec(natural(*pair), *pair) for pair in pairs)
    if max_parameters is None or _total(specs) <= max_parameters:
        return specs
    ranks = range(1, max(_full_rank(spec) for spec in specs) + 1)
    fitting = bisect_right(ranks, max_parameters, key=lambda rank: _total(_limited(specs, rank)))
    if fitting == 0:
        check_limit([(student, teacher)], max_parameters)
    return _limited(specs, ranks[fitting - 1])


def check_limit(boundaries: Sequence[tuple[CutPoint, CutPoint]], max_parameters: int) -> None:
    """Whether :func:`adapter_for` can keep the limit at every boundary (student, teacher).

    Raises:
        UsageError: the limit is not a whole number.
        PlanError: it cannot; names the boundary that needs most, and what suffices for all.
    """
    if isinstance(max_parameters, bool) or not isinstance(max_parameters, int):
        raise UsageError(
            f"max_adapter_parameters is {max_parameters!r}.", fix="give a whole number: 20000"
        )
    needs = [(_least(*pair), *pair) for pair in boundaries]
    most, student, teacher = max(needs, key=lambda need: need[0])
    if most <= max_parameters:
        return
    is_all = ", enough for every boundary" if len(needs) > 1 else ""
    raise PlanError(
        f"no adapter from the student's {student.name} to the teacher's {teacher.name} has as few "
        f"as {max_parameters} parameters.",
        why=f"even the narrowest still have {most}",
        fix=f"allow {most} or more{is_all}; or choose another boundary",
    )


def _least(student: CutPoint, teacher: CutPoint) -> int:
    """How many parameters the smallest adapters of a boundary have."""
    whole = adapter_for(student, teacher)
    return min(_total(whole), _total(_limited(whole, 1)))


def _feeding(student: CutPoint, target: Activation) -> Activation:
    is_grid = num_cells(target) > 1
    able = [source for source in student.tensors if source.kind != "vector" or not is_grid]
    if not able:
        raise PlanError(
            f"{student.name} is a vector: it has no positions for {target.name}.",
            why="spreading one vector over a grid would teach the student nothing about places",
            fix="choose a boundary before the student's pooling, or the adapter resize by name",
        )
    return min(able, key=lambda source: (_distance(source, target), -source.channels))


def _distance(source: Activation, target: Activation) -> float:
    return abs(log(num_cells(source) / num_cells(target)))


def _total(specs: Sequence[AdapterSpec]) -> int:
    return sum(num_parameters(spec) for spec in specs)


def _limited(specs: Sequence[AdapterSpec], rank: int) -> tuple[AdapterSpec, ...]:
    """Each with ``rank`` at most; maps that this neither factors nor separates stay whole."""
    limited = [replace(spec, rank=min(rank, _full_rank(spec))) for spec in specs]
    return tuple(
        new if new.is_factored or spec.operation in ("downsample", "upsample") else spec
        for spec, new in zip(specs, limited, strict=True)
    )


def _full_rank(spec: AdapterSpec) -> int:
    return min(spec.source.channels, spec.target.channels)
