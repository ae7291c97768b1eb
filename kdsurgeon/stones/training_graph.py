"""Synthesize the one graph that training sees.

It runs the student once, the teacher once without gradient, and the tails of all stones together:
entering a teacher block, the running tensors of every shallower stone are concatenated along the
batch. That is exact because the frozen teacher treats samples one by one. Ours, where the paper's
text was not available: the teacher's BatchNorm stays in evaluation mode, its dropout off.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from kdsurgeon import adapters
from kdsurgeon.errors import PlanError
from kdsurgeon.losses import Logits
from kdsurgeon.partitioning import Partition, cut
from kdsurgeon.stones.plan import Plan
from kdsurgeon.stones.surgery import (
    block_sources,
    frozen_twins,
    graft,
    module_nodes,
    student_modules,
)
from kdsurgeon.tracing import Trace, trace


class SteppingStones(nn.Module):
    """Images (batch, channels, height, width) in, :class:`Logits` of student, stones, teacher out.

    Its parameters are those of the student and the adapters: hand them to an optimiser. The
    teacher is a frozen twin that shares the teacher's storage, stays in evaluation mode whatever
    the caller does, and receives no gradient. In evaluation mode the evaluation graph runs.
    """

    def __init__(self, plan: Plan, depths: tuple[int, ...], *, merge: bool, seed: int) -> None:
        super().__init__()
        self.student = plan.student.trace.model
        self.adapters = nn.ModuleDict(
            {
                str(stone.depth): adapters.build(stone.adapter, seed=seed * 1000 + stone.depth)
                for stone in plan.stones
                if stone.depth in depths
            }
        )
        self.adapters.to(_device(self.student))
        self.depths = depths
        self.teacher = _Hidden(frozen_twins(plan.teacher.trace))
        self._graphs = {
            training: _training_graph(plan, self, training=training, merge=merge)
            for training in (True, False)
        }
        self.train()

    def forward(self, images: Tensor) -> Logits:
        # not by calling it: torch.fx prints to standard error when a graph module raises
        student, stones, teacher = self._graphs[self.training].forward(images)
        return Logits(student, stones, teacher, self.depths)

    def train(self, mode: bool = True) -> SteppingStones:
        super().train(mode)
        for graph in self._graphs.values():
            graph.train(mode)  # the out-of-place twins of student modules live only there
        for module in self.teacher.modules:
            module.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SteppingStones:
        super()._apply(fn, recurse)
        for module in self.teacher.modules:
            module._apply(fn)
        return self


@dataclass(frozen=True)
class _Hidden:
    """Teacher modules by their name in the graph, kept out of the module tree."""

    by_target: dict[str, Any]

    @property
    def modules(self) -> list[nn.Module]:
        return [value for value in self.by_target.values() if isinstance(value, nn.Module)]


class _CleanPass(nn.Module):
    """The teacher's own logits, without gradient."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.graph_module.forward(images)


def synthesize(
    plan: Plan,
    *,
    depths: Sequence[int] | None = None,
    merge: bool | None = None,
    seed: int = 0,
) -> SteppingStones:
    """The training graph of a plan.

    Args:
        depths: which stones to build, all by default; none gives plain distillation.
        merge: run all tails as one batch (the default wherever that is exact) or one by one.
        seed: of the adapters' initial weights.

    Raises:
        PlanError: a depth that the plan lacks, or ``merge=True`` for a teacher whose tail mixes
            the samples of a batch.

    >>> from kdsurgeon.stones import partition
    >>> def net(width):
    ...     return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
    ...                          nn.Flatten(), nn.Linear(width, 10))
    >>> stones = synthesize(partition(net(16), net(4), torch.zeros(2, 1, 8, 8)))
    >>> logits = stones(torch.zeros(5, 1, 8, 8))
    >>> logits.student.shape, logits.stones.shape
    (torch.Size([5, 10]), torch.Size([1, 5, 10]))
    """
    known = [stone.depth for stone in plan.stones]
    chosen = tuple(known if depths is None else sorted(set(depths)))
    for depth in chosen:
        if depth not in known:
            raise PlanError(
                f"the plan has no stone of depth {depth}.",
                known=", ".join(map(str, known)),
                fix="change loss.stones, or plan more blocks with --blocks",
            )
    _check_are_two(plan)
    mixing = _mixes_samples(plan.teacher.trace)
    if merge and mixing:
        raise PlanError(
            f"the tails of {plan.teacher.trace.name} cannot be merged.",
            where=mixing,
            why="this module computes with statistics of the batch",
            fix="leave merge out; the tails then run one by one",
        )
    merged = not mixing if merge is None else merge
    return SteppingStones(plan, chosen, merge=merged, seed=seed)


def _check_are_two(plan: Plan) -> None:
    teacher, student = plan.teacher.trace.model, plan.student.trace.model
    shared = {id(parameter) for parameter in teacher.parameters()}
    for name, parameter in student.named_parameters():
        if id(parameter) in shared:
            raise PlanError(
                "teacher and student share weights, so that training one changes the other.",
                where=name,
                fix="give the student weights of its own: copy.deepcopy(model)",
            )


def _training_graph(
    plan: Plan, stones: SteppingStones, *, training: bool, merge: bool
) -> fx.GraphModule:
    student, teacher = _in_mode(plan.student, training=training), plan.teacher
    graph = fx.Graph()
    value = images = graph.placeholder("images")
    clean = graph.call_module("teacher", (images,))
    tails: list[tuple[fx.Node, int]] = []  # tensors on their way to the logits, stones in each
    sources = zip(block_sources(student), block_sources(teacher), strict=True)
    for depth, (student_source, teacher_source) in enumerate(sources):
        if depth in stones.depths:
            tails.append((graph.call_module(f"adapters.{depth}", (value,)), 1))
        if merge and len(tails) > 1:
            whole = graph.call_function(torch.cat, ([tensor for tensor, _ in tails],))
            tails = [(whole, sum(count for _, count in tails))]
        nodes = teacher.blocks[depth].nodes
        tails = [
            (graft(graph, nodes, teacher_source, tensor, "tail."), count) for tensor, count in tails
        ]
        nodes = student.blocks[depth].nodes
        value = graft(graph, nodes, student_source, value, "student.")
    graph.output((value, _stack(graph, tails, clean), clean))
    graph.lint()
    modules: dict[str, Any] = {"teacher": _CleanPass(_twin_graph(plan, stones))}
    modules |= {f"adapters.{depth}": adapter for depth, adapter in stones.adapters.items()}
    modules |= {f"tail.{target}": twin for target, twin in stones.teacher.by_target.items()}
    modules |= {f"student.{target}": own for target, own in student_modules(student).items()}
    return fx.GraphModule(modules, graph)


def _stack(graph: fx.Graph, tails: list[tuple[fx.Node, int]], clean: fx.Node) -> fx.Node:
    """(stones, batch, classes) from the tensors that arrived at the logits."""
    if not tails:
        return graph.call_function(
            operator.getitem, (graph.call_method("unsqueeze", (clean, 0)), slice(0))
        )
    stacked = [graph.call_method("unflatten", (tensor, 0, (count, -1))) for tensor, count in tails]
    return stacked[0] if len(stacked) == 1 else graph.call_function(torch.cat, (stacked,))


def _in_mode(whole: Partition, *, training: bool) -> Partition:
    """The same cuts in the graph of the other mode, found by name."""
    if not training:
        return whole
    captured = trace(whole.trace.model, whole.trace.example, name=whole.trace.name, training=True)
    return cut(captured, whole.cuts)


def _twin_graph(plan: Plan, stones: SteppingStones) -> fx.GraphModule:
    return fx.GraphModule(
        stones.teacher.by_target, copy.deepcopy(plan.teacher.trace.graph_module.graph)
    )


def _mixes_samples(teacher: Trace) -> str | None:
    """The first place in the teacher where one sample's value depends on its batch."""
    for node in module_nodes(teacher):
        own = operator.attrgetter(str(node.target))(teacher.model)
        if isinstance(own, nn.modules.batchnorm._BatchNorm) and own.running_mean is None:
            return str(node.target)
    return None


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
