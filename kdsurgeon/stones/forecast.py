"""What stepping stones cost before any is trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch

from kdsurgeon import adapters
from kdsurgeon.costs import Cost, module_cost, total
from kdsurgeon.errors import PlanError, UsageError
from kdsurgeon.recipe import Recipe
from kdsurgeon.stones.plan import Plan, Stone, check_depths
from kdsurgeon.stones.sets import chosen_depths, parts_of_run

# What memory costs beside arithmetic, as multiply-adds: fitted to steps on a CPU, and checked on
# other pairs, in benchmarks/forecast.py.
PER_ACTIVATION_BYTE = 12
PER_WEIGHT_READ = 64


@dataclass(frozen=True)
class Forecast:
    """One training step per sample: plain distillation, and with these stones.

    Multiply-adds: backward through trained weights costs twice the forward pass, through a frozen
    tail once: distillation T + 3 S, each stone 3 adapter + 2 tail more. Time, in multiply-adds too,
    adds :data:`PER_ACTIVATION_BYTE` for each byte of activations that is computed, and
    :data:`PER_WEIGHT_READ` for each weight that is read, once a batch. Activation bytes are what is
    kept for the backward pass: the student's, the adapters', the tails'. The teacher's own pass
    keeps none, and what it needs while it runs is left out.
    """

    distillation: int
    with_stones: int
    distillation_time: float
    with_stones_time: float
    distillation_bytes: int
    with_stones_bytes: int
    adapter_parameters: int
    depths: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """Multiply-adds, relative to plain distillation."""
        return self.with_stones / max(1, self.distillation)

    @property
    def time_ratio(self) -> float:
        """Time, relative to plain distillation: what ``--budget`` limits."""
        return self.with_stones_time / max(1.0, self.distillation_time)

    @property
    def memory_ratio(self) -> float:
        return self.with_stones_bytes / max(1, self.distillation_bytes)


def forecast(plan: Plan, depths: Collection[int] | None = None, *, batch: int = 64) -> Forecast:
    """What a step costs with the stones of ``depths``, before any is run.

    Left out, those are all stones that have a weight. The larger the ``batch``, the less the
    weights count that it reads.

    Raises:
        PlanError: a depth that the plan lacks.
    """
    if depths is not None:
        check_depths(plan, depths)
    chosen = [
        stone
        for stone in plan.stones
        if (stone.weight > 0 if depths is None else stone.depth in depths)
    ]
    plain = [(1, plan.teacher.cost), (3, plan.student.cost)]
    adapters_used = [adapter_cost(stone) for stone in chosen]
    tails = [tail_cost(plan, stone) for stone in chosen]
    extra = [(3, cost) for cost in adapters_used] + [(2, cost) for cost in tails]
    # merged tails read their weights once: the first one's are all
    weights = [(3, cost) for cost in adapters_used] + [(2, tail) for tail in tails[:1]]
    kept = plan.student.cost.activation_bytes
    return Forecast(
        distillation=_multiply_adds(plain),
        with_stones=_multiply_adds(plain + extra),
        distillation_time=_time(plain, plain, batch),
        with_stones_time=_time(plain + extra, plain + weights, batch),
        distillation_bytes=kept,
        with_stones_bytes=kept + sum(cost.activation_bytes for cost in adapters_used + tails),
        adapter_parameters=sum(cost.parameters for cost in adapters_used),
        depths=tuple(stone.depth for stone in chosen),
    )


def forecast_of_run(plan: Plan, recipe: Recipe, *, batch: int = 64) -> Forecast:
    """What a step costs in the mean over a run: its stones may be drawn, or change on the way.

    Activation bytes are those of the largest step, adapters those of all stones.

    Raises:
        PlanError: a stone that the plan lacks.
    """
    every = forecast(plan, chosen_depths(plan, recipe), batch=batch)
    steps = [
        (share, forecast(plan, depths, batch=batch)) for share, depths in parts_of_run(plan, recipe)
    ]
    return replace(
        every,
        with_stones=round(sum(share * step.with_stones for share, step in steps)),
        with_stones_time=sum(share * step.with_stones_time for share, step in steps),
        with_stones_bytes=max(step.with_stones_bytes for share, step in steps if share),
    )


def within_budget(plan: Plan, ratio: float, *, batch: int = 64) -> tuple[int, ...]:
    """The stones, deepest first, that a step of ``ratio`` × plain distillation's time allows.

    The deepest have the largest weight and the shortest tail.

    Raises:
        UsageError: ``ratio`` is not a number of 1 or more.
        PlanError: not even the last stone fits, or no stone has a weight.
    """
    _check_ratio(ratio)
    chosen: tuple[int, ...] = ()
    weighted = [stone for stone in plan.stones if stone.weight > 0]
    if not weighted:
        raise PlanError(
            "the plan has no stone to train.",
            why="every weight is 0" if plan.stones else "it has no boundaries",
            fix="give a stone a weight above 0, or use --method kd",
        )
    for stone in reversed(weighted):
        if forecast(plan, (stone.depth, *chosen), batch=batch).time_ratio > ratio:
            break
        chosen = (stone.depth, *chosen)
    if not chosen:
        least = forecast(plan, (weighted[-1].depth,), batch=batch).time_ratio
        raise PlanError(
            f"no stone fits a budget of {ratio:g} × plain distillation.",
            why=f"the last stone alone needs {least:.2f} ×",
            fix=f"--budget {least + 0.005:.2f}x or more, or --method kd",
        )
    return chosen


def _check_ratio(ratio: Any) -> None:
    is_number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if not is_number or not float(ratio) >= 1:  # which NaN is not
        raise UsageError(
            f"a budget of {ratio!r} is not a multiple of what plain distillation costs.",
            why="no step costs less than a step of plain distillation, which is 1",
            fix="give a number of 1 or more, e.g. 1.5",
        )


def adapter_cost(stone: Stone) -> Cost:
    return total(
        module_cost(adapters.build(spec), spec.source, torch.float32) for spec in stone.adapters
    )


def tail_cost(plan: Plan, stone: Stone) -> Cost:
    """What the teacher's blocks after the stone's boundary cost."""
    return total(block.cost for block in plan.teacher.blocks[stone.depth :])


Passes = Sequence[tuple[int, Cost]]  # how often, what


def _multiply_adds(passes: Passes) -> int:
    return sum(times * cost.multiply_adds for times, cost in passes)


def _time(passes: Passes, reads: Passes, batch: int) -> float:
    """Per sample, in multiply-adds, when ``reads`` are the weights that a step reads."""
    moved = sum(times * cost.activation_bytes for times, cost in passes)
    read = sum(times * cost.parameters for times, cost in reads)
    return _multiply_adds(passes) + PER_ACTIVATION_BYTE * moved + PER_WEIGHT_READ * read / batch
