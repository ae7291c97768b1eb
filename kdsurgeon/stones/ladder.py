"""A stepping stone as a network of its own: a rung between student and teacher.

Training leaves more than a student. Each stone is a classifier, dearer than the student and cheaper
than the teacher, and nothing more has to be trained to use it.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from kdsurgeon.costs import Cost, total
from kdsurgeon.errors import UsageError
from kdsurgeon.partitioning import Partition
from kdsurgeon.stones.forecast import adapter_cost, tail_cost
from kdsurgeon.stones.plan import Plan, check_depths
from kdsurgeon.stones.surgery import (
    Values,
    Walk,
    block_sources,
    context_inputs,
    frozen_twins,
    graft,
    root_of,
    state_of,
)
from kdsurgeon.stones.training_graph import SteppingStones
from kdsurgeon.tracing import Trace


def stone_network(plan: Plan, stones: SteppingStones, depth: int) -> fx.GraphModule:
    """The student's blocks up to ``depth``, the adapters there, and the teacher's blocks after.

    One module from images (batch, …), or the models' several inputs, to logits (batch, classes): in
    evaluation mode, what the training graph ``stones`` of this ``plan`` gives as the logits of that
    stone. It shares the weights of student, adapters and teacher; nothing else is changed.

    Raises:
        PlanError: the plan has no stone of that depth.
        UsageError: ``stones`` were made without it.

    >>> import torch
    >>> from torch import nn
    >>> from kdsurgeon.stones import partition, synthesize
    >>> def net(width):
    ...     return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
    ...                          nn.Flatten(), nn.Linear(width, 10))
    >>> plan = partition(net(16), net(4), torch.zeros(2, 1, 8, 8))
    >>> stones, images = synthesize(plan).eval(), torch.randn(3, 1, 8, 8)
    >>> found = stone_network(plan, stones, 1)(images)
    >>> torch.allclose(found, stones(images).stones[0], atol=1e-5)
    True
    """
    check_depths(plan, [depth], "depth")
    if depth not in stones.depths:
        known = ", ".join(map(str, stones.depths)) or "none"
        raise UsageError(f"there is no stone of depth {depth}.", known=known)
    student, teacher = plan.student, plan.teacher
    graph = fx.Graph()
    names = dict.fromkeys(name for side in (student, teacher) for name in side.trace.inputs)
    inputs = {name: graph.placeholder(name) for name in names}
    walk = Walk(student, _given(student.trace, inputs))
    for block in range(depth):
        walk.step(graph, block, "student.")
    reads = (spec.source.name for spec in plan.stones[depth - 1].adapters)
    adapted = [
        graph.call_module(f"adapters.{index}", (walk.at(depth)[name],))
        for index, name in enumerate(reads)
    ]
    graph.output(_tail(graph, teacher, depth, adapted, _given(teacher.trace, inputs)))
    graph.lint()
    network = fx.GraphModule(root_of(_state(plan, stones, depth)), graph)
    network.delete_all_unused_submodules()
    return network


def _tail(
    graph: fx.Graph, teacher: Partition, depth: int, tensors: list[fx.Node], inputs: Values
) -> fx.Node:
    """The logits that the teacher's blocks after the boundary make of ``tensors`` there."""
    sources = block_sources(teacher)
    ends = [*sources[1:], [teacher.trace.logits]]
    context = context_inputs(teacher.trace, inputs)
    for block in range(depth, len(teacher.blocks)):
        boundary = dict(zip(sources[block], tensors, strict=True)) | context
        values = graft(graph, teacher.blocks[block].nodes, boundary, {}, "teacher.") | boundary
        tensors = [values[node] for node in ends[block]]
    return tensors[0]


def _state(plan: Plan, stones: SteppingStones, depth: int) -> dict[str, Any]:
    """What the network's graph calls, by name."""
    state = {f"teacher.{name}": own for name, own in frozen_twins(plan.teacher.trace).items()}
    state |= {f"student.{name}": own for name, own in state_of(plan.student.trace).items()}
    adapters = stones.adapters[str(depth)]
    assert isinstance(adapters, nn.ModuleList)
    return state | {f"adapters.{index}": own for index, own in enumerate(adapters)}


def stone_cost(plan: Plan, depth: int) -> Cost:
    """What a stone costs as a network: per sample, and its parameters.

    Counted by blocks: where the student is cut across several tensors, what leads to one that no
    adapter reads counts, too.
    """
    front = total(block.cost for block in plan.student.blocks[:depth])
    stone = plan.stones[depth - 1]
    return front + adapter_cost(stone) + tail_cost(plan, stone)


def _given(captured: Trace, inputs: dict[str, fx.Node]) -> Values:
    return {node: inputs[str(node.target)] for node in captured.placeholders}


def num_parameters(network: fx.GraphModule) -> int:
    """How many numbers it holds as parameters; a tensor that two layers share counts once."""
    return sum({own.data_ptr(): own.numel() for own in network.parameters()}.values())
