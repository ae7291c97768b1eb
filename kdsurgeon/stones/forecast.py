"""What stepping stones cost before any is trained, and whether the surgery is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdsurgeon import adapters
from kdsurgeon.costs import Cost, module_cost, total
from kdsurgeon.errors import PlanError
from kdsurgeon.partitioning import Partition
from kdsurgeon.stones.plan import Plan, Stone
from kdsurgeon.stones.surgery import compose
from kdsurgeon.stones.training_graph import synthesize
from kdsurgeon.tracing import in_mode


@dataclass(frozen=True)
class Forecast:
    """Multiply-adds of one training step per sample: plain distillation, and with these stones.

    Backward through trained weights costs twice the forward pass, through a frozen tail once:
    distillation T + 3 S, each stone 3 adapter + 2 tail more.
    """

    distillation: int
    with_stones: int
    adapter_parameters: int

    @property
    def ratio(self) -> float:
        return self.with_stones / max(1, self.distillation)


def forecast(plan: Plan, depths: Sequence[int] | None = None) -> Forecast:
    """What a step costs with the stones of ``depths`` (all by default), before any is run."""
    plain = plan.teacher.cost.multiply_adds + 3 * plan.student.cost.multiply_adds
    chosen = [stone for stone in plan.stones if depths is None or stone.depth in depths]
    costs = {stone.depth: adapter_cost(stone) for stone in chosen}
    extra = sum(
        3 * costs[stone.depth].multiply_adds + 2 * tail_cost(plan, stone).multiply_adds
        for stone in chosen
    )
    parameters = sum(cost.parameters for cost in costs.values())
    return Forecast(plain, plain + extra, parameters)


def adapter_cost(stone: Stone) -> Cost:
    return module_cost(adapters.build(stone.adapter), stone.adapter.source, torch.float32)


def tail_cost(plan: Plan, stone: Stone) -> Cost:
    """What the teacher's blocks after the stone's boundary cost."""
    return total(block.cost for block in plan.teacher.blocks[stone.depth :])


@dataclass(frozen=True)
class Certificate:
    """Largest absolute differences in logits: models rebuilt from their blocks against the
    originals, and merged tails against tails run one by one."""

    teacher_gap: float
    student_gap: float
    merged_gap: float


def certify(plan: Plan) -> Certificate:
    """Recompose both models from their blocks and compare, in evaluation mode, on random input.

    Raises:
        PlanError: a recomposed model differs from the original; names it.
    """
    example = plan.student.trace.example
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((3, *example.shape[1:]), generator=generator).to(example)
    gaps = [_recomposition_gap(whole, images) for whole in (plan.teacher, plan.student)]
    for whole, gap in zip((plan.teacher, plan.student), gaps, strict=True):
        if gap > 0:
            raise PlanError(
                f"{whole.trace.name} differs by {gap:.2e} when rebuilt from its blocks.",
                why="it writes to a tensor through a view, or calls a function that kept state",
                fix="cut it elsewhere with --pair TEACHER=STUDENT, and report this model to us",
            )
    return Certificate(gaps[0], gaps[1], _merged_gap(plan, images))


@torch.no_grad()
def _recomposition_gap(whole: Partition, images: Tensor) -> float:
    model = whole.trace.model
    with in_mode(model, training=False):
        return (model(images.clone()) - compose(whole)(images.clone())).abs().max().item()


@torch.no_grad()
def _merged_gap(plan: Plan, images: Tensor) -> float:
    if not plan.stones:
        return 0.0
    merged, looped = (synthesize(plan, merge=merge).eval() for merge in (None, False))
    return (merged(images).stones - looped(images).stones).abs().max().item()
