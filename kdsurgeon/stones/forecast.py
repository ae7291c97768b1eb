"""What stepping stones cost before any is trained."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from kdsurgeon import adapters
from kdsurgeon.costs import Cost, module_cost, total
from kdsurgeon.errors import PlanError
from kdsurgeon.stones.plan import Plan, Stone


@dataclass(frozen=True)
class Forecast:
    """One training step per sample: plain distillation, and with these stones.

    Multiply-adds: backward through trained weights costs twice the forward pass, through a frozen
    tail once: distillation T + 3 S, each stone 3 adapter + 2 tail more. Activation bytes are what
    is kept for the backward pass: the student's, the adapters', the tails'.
    """

    distillation: int
    with_stones: int
    distillation_bytes: int
    with_stones_bytes: int
    adapter_parameters: int
    depths: tuple[int, ...]

    @property
    def ratio(self) -> float:
        return self.with_stones / max(1, self.distillation)

    @property
    def memory_ratio(self) -> float:
        return self.with_stones_bytes / max(1, self.distillation_bytes)


def forecast(plan: Plan, depths: Collection[int] | None = None) -> Forecast:
    """What a step costs with the stones of ``depths``, before any is run.

    Left out, those are all stones that have a weight.
    """
    chosen = [
        stone
        for stone in plan.stones
        if (stone.weight > 0 if depths is None else stone.depth in depths)
    ]
    plain = plan.teacher.cost.multiply_adds + 3 * plan.student.cost.multiply_adds
    kept = plan.student.cost.activation_bytes
    carried = [(adapter_cost(stone), tail_cost(plan, stone)) for stone in chosen]
    extra = sum(3 * own.multiply_adds + 2 * tail.multiply_adds for own, tail in carried)
    extra_bytes = sum(own.activation_bytes + tail.activation_bytes for own, tail in carried)
    return Forecast(
        distillation=plain,
        with_stones=plain + extra,
        distillation_bytes=kept,
        with_stones_bytes=kept + extra_bytes,
        adapter_parameters=sum(own.parameters for own, _ in carried),
        depths=tuple(stone.depth for stone in chosen),
    )


def within_budget(plan: Plan, ratio: float) -> tuple[int, ...]:
    """The stones, deepest first, that a step of at most ``ratio`` × plain distillation allows.

    The deepest have the largest weight and the shortest tail.

    Raises:
        PlanError: not even the last stone fits.
    """
    chosen: tuple[int, ...] = ()
    for stone in reversed([stone for stone in plan.stones if stone.weight > 0]):
        if forecast(plan, (stone.depth, *chosen)).ratio > ratio:
            break
        chosen = (stone.depth, *chosen)
    if not chosen:
        least = forecast(plan, (len(plan.stones),)).ratio
        raise PlanError(
            f"no stone fits a budget of {ratio:g} × plain distillation.",
            why=f"the last stone alone needs {least:.2f} ×",
            fix=f"--budget {least + 0.005:.2f}x or more, or --method kd",
        )
    return chosen


def adapter_cost(stone: Stone) -> Cost:
    return total(
        module_cost(adapters.build(spec), spec.source, torch.float32) for spec in stone.adapters
    )


def tail_cost(plan: Plan, stone: Stone) -> Cost:
    """What the teacher's blocks after the stone's boundary cost."""
    return total(block.cost for block in plan.teacher.blocks[stone.depth :])
