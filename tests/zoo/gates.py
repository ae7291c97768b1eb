"""What a captured model must show before it is believed, bit for bit; each gate raises ``Gap``."""

from __future__ import annotations

import operator
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule

from kdsurgeon import tracing
from kdsurgeon.partitioning import CutPoint, Partition, cut, find_cut_points
from kdsurgeon.stones import Plan, compose, synthesize
from kdsurgeon.tracing import Trace, trace
from tests.zoo.models import Example


class Gap(Exception):
    """Two runs that must agree do not; says where and by how much."""


@dataclass(frozen=True)
class Step:
    """Everything that one training step leaves behind."""

    outputs: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]

    def items(self) -> Iterator[tuple[str, Tensor | None]]:
        yield "logits", self.outputs
        yield from ((f"gradient of {name}", value) for name, value in self.gradients.items())
        yield from ((f"buffer {name}", value) for name, value in self.buffers.items())


def evaluates_alike(model: nn.Module, captured: Trace, example: Example) -> None:
    """The graph gives the logits of a model in evaluation mode, at the batch sizes 2 and 3.

    The mode is not set here: ``eval`` empties the caches of some models, and with them what
    tracing may have left there.
    """
    assert not model.training
    for count in (2, 3):
        batch = of_batch(example, count)
        _compare(f"batch of {count}", _logits_of(model, batch), _logits_of_graph(captured, batch))


def trains_alike(model: nn.Module, example: Example) -> Trace:
    """One same-seed step of the graph leaves the model's outputs, gradients and buffers."""
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    wanted = _step(model, model, example, before)
    captured = trace(model, example, training=True)
    got = _step(captured.graph_module, model, example, before)
    if all(_same(want, have) for (_, want), (_, have) in _beside(wanted, got)):
        return captured
    again = _step(model, model, example, before)
    for (place, want), (_, own) in _beside(wanted, again):
        _compare(f"{place}, where the model differs from itself", want, own)
    for (place, want), (_, have) in _beside(wanted, got):
        _compare(place, want, have)
    return captured


def splices_alike(model: nn.Module, captured: Trace, example: Example) -> int:
    """The model cut at every single-tensor cut point and put together again; counts the cuts."""
    model.eval()
    points = tuple(point for point in find_cut_points(captured) if width(point) == 1)
    whole = compose(cut(captured, points))
    with torch.no_grad():
        got = logits_of(whole, of_batch(example, 2))
    _compare(f"spliced at {len(points)} cut points", _logits_of(model, example), got)
    return len(points)


def width(point: CutPoint) -> int:
    return getattr(point, "width", 1)


class LeftAsItWas:
    """Checks on leaving that the model, its modes and hooks and the random state are the same."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = self._state()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for place, value in self._state().items():
                if value != self.before[place]:
                    raise Gap(f"tracing changed the model's {place}")

    def _state(self) -> dict[str, Any]:
        own = self.model
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return {
            "weights": {name: _digest(value) for name, value in own.named_parameters()},
            "buffers": {name: _digest(value) for name, value in own.named_buffers()},
            "modes": {name: module.training for name, module in own.named_modules()},
            "hooks": [[list(getattr(m, kind)) for kind in hooks] for m in own.modules()],
            "attributes": {name: _attributes(module) for name, module in own.named_modules()},
            "random state": torch.get_rng_state().tolist(),
        }


def stones_learn_where_they_should(plan: Plan, images: Tensor) -> int:
    """METHOD 4.2: stone i reaches its adapter and the student's blocks up to i, and no others."""
    stones = synthesize(plan).train()
    owned = [_parameters(plan.student, index) for index in range(len(plan.stones) + 1)]
    every = dict(stones.student.named_parameters())
    names = {id(weight): name for name, weight in every.items()}
    results = stones(images).stones
    for index, stone in enumerate(plan.stones):
        stones.zero_grad(set_to_none=True)
        results[index].square().mean().backward(retain_graph=True)
        reached = {id(weight) for weight in every.values() if _is_touched(weight)}
        front = set().union(*owned[: stone.depth])
        if reached - front:
            leaked = sorted(names[weight] for weight in reached - front)
            raise Gap(f"stone {stone.depth} sends gradient past its boundary, to {leaked[0]}")
        for depth, block in enumerate(owned[: stone.depth], start=1):
            if block and not block & reached:
                raise Gap(f"stone {stone.depth} sends no gradient to student block {depth}")
        own = list(stones.adapters[str(stone.depth)].parameters())
        if own and not any(map(_is_touched, own)):
            raise Gap(f"stone {stone.depth} sends no gradient to its adapter")
    return len(plan.stones)


def logits_of(module: nn.Module, example: Example) -> Tensor:
    """The one tensor that a classifier is asked for; on copies, as models may write to inputs."""
    inputs = example.clone() if isinstance(example, Tensor) else _copies(example)
    if isinstance(module, GraphModule):
        return module(inputs) if isinstance(inputs, Tensor) else module(**inputs)
    return tracing.logits_of(module, inputs)


def _copies(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in example.items()}


def of_batch(example: Example, count: int) -> Example:
    """``count`` samples: the example's own, over and over."""
    if isinstance(example, Mapping):
        return {name: _resized(value, count) for name, value in example.items()}
    return _resized(example, count)


def _resized(value: Tensor, count: int) -> Tensor:
    return value[torch.arange(count) % len(value)].clone()


def _logits_of(model: nn.Module, example: Example) -> Tensor:
    with torch.no_grad():
        return logits_of(model, example)


def _logits_of_graph(captured: Trace, example: Example) -> Tensor:
    return _logits_of(captured.graph_module, example)


def _step(
    module: nn.Module, owner: nn.Module, example: Example, buffers: dict[str, Tensor]
) -> Step:
    """One step of ``module``, whose weights and buffers are those of ``owner``."""
    with torch.no_grad():
        for name, buffer in owner.named_buffers():
            buffer.copy_(buffers[name])
    owner.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    outputs = logits_of(module, example)
    outputs.square().mean().backward()
    return Step(
        outputs.detach().clone(),
        {name: weight.grad for name, weight in owner.named_parameters()},
        {name: buffer.clone() for name, buffer in owner.named_buffers()},
    )


def _beside(one: Step, other: Step) -> Iterator[tuple[tuple[str, Tensor | None], ...]]:
    return zip(one.items(), other.items(), strict=True)


def _compare(place: str, wanted: Tensor | None, got: Tensor | None) -> None:
    if wanted is not None and not wanted.isfinite().all():
        raise Gap(f"{place}: the model's own value is not finite")
    if _same(wanted, got):
        return
    if wanted is None or got is None:
        raise Gap(f"{place}: {'missing' if got is None else 'unexpected'} in the graph")
    if wanted.shape != got.shape:
        raise Gap(f"{place}: {tuple(got.shape)} in place of {tuple(wanted.shape)}")
    raise Gap(f"{place}: gap {(wanted.double() - got.double()).abs().max().item():.1e}")


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _digest(value: Tensor) -> tuple[int, int]:
    """Where a tensor lies and what its bytes add up to."""
    raw = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy()
    return value.data_ptr(), zlib.crc32(raw)


def _attributes(module: nn.Module) -> dict[str, list[str]]:
    """The names of what a module holds, and of what its own dicts hold: caches are kept there."""
    held = vars(module).items()
    return {name: sorted(map(str, value)) if type(value) is dict else [] for name, value in held}


def _is_touched(weight: nn.Parameter) -> bool:
    return weight.grad is not None and bool(weight.grad.any())


def _parameters(student: Partition, index: int) -> set[int]:
    """The weights that one of the student's blocks reads, by identity."""
    found: set[int] = set()
    for node in student.blocks[index].nodes:
        found.update(map(id, _read_by(node, student.trace.model)))
    return found


def _read_by(node: fx.Node, model: nn.Module) -> list[nn.Parameter]:
    if node.op not in ("call_module", "get_attr"):
        return []
    owner = operator.attrgetter(str(node.target))(model)
    if isinstance(owner, nn.Module):
        return list(owner.parameters())
    return [owner] if isinstance(owner, nn.Parameter) else []
