"""The student with the rounding of its int8 file inside, so that distillation trains against it.

Layers and batch normalisation are folded and weights rounded to s8 per output channel, activations
to u8 per tensor, at the places where the file has its nodes (Jacob et al. 2018, section 3). The
gradient passes straight through, and stops where a value is cut off (Bengio et al. 2013, section
2.3). Ours: a graph of torch.fx in place of torchao's, because it holds the student's own weights:
what is trained is the user's module, and it is exported like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from kdsurgeon.errors import UsageError
from kdsurgeon.partitioning import activations
from kdsurgeon.stones.surgery import root_of, state_of
from kdsurgeon.tracing import Trace, in_mode, operation_name, trace

Modules = Mapping[str, nn.Module]

CHUNK = 64  # calibration images at once

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# What the quantizer merges into the node before, by its range
_CUTS = {"relu", "relu6", "hardtanh", "clamp", "clip"}
_CUT_LAYERS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
# What only moves values, so that they stay as they are rounded
_MOVES = {
    "after", "chunk", "contiguous", "detach", "flatten", "getitem", "identity", "max_pool2d",
    "permute", "reshape", "split", "squeeze", "transpose", "unbind", "unflatten", "unsqueeze",
    "view", "channel_shuffle", "clone",
}  # fmt: skip
_MOVE_LAYERS = (nn.Flatten, nn.Identity, nn.MaxPool2d, nn.Dropout, nn.Unflatten, nn.ChannelShuffle)


class Rounded(nn.Module):
    """``student`` as its int8 file computes it; training this trains ``student`` itself.

    ``images`` (n, …), float32, calibrate the ranges of the activations; :meth:`calibrate` does so
    again once the weights have moved, after an epoch for example. Batch normalisation that follows
    a layer is folded into it with the statistics it has, and these stay; dropout is off.

    Raises :class:`UsageError` for a student that holds no layer to round, and
    :class:`kdsurgeon.errors.TraceError` for one that cannot be captured as a graph.

    >>> student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
    ...                         nn.Linear(144, 10))
    >>> images = torch.randn(8, 1, 8, 8)
    >>> rounded = Rounded(student, images)
    >>> rounded(images).shape, student[0].weight is next(rounded.parameters())
    (torch.Size([8, 10]), True)
    """

    def __init__(self, student: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.student = student
        if not len(images):
            raise UsageError("rounding needs calibration images; got none.")
        captured = trace(student, images[:2], name=type(student).__name__)
        modules: Modules = dict(captured.graph_module.named_modules())
        names = [node.name for node in _rounded_values(captured, modules)]
        self.activations = nn.ModuleDict({f"at_{name}": _Activation() for name in names})
        self._plain = captured.graph_module
        self._graph_module = _synthesized(captured, modules, self.activations)
        self.calibrate(images)

    def forward(self, input: Tensor) -> Tensor:
        return self._graph_module.forward(input)

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """Take the range of every activation from the student as it now is, without rounding."""
        device = next(self.student.parameters()).device
        watch = _Watch(self._plain, [name[3:] for name in self.activations])
        with in_mode(self.student, training=False):
            for chunk in images.split(CHUNK):
                watch.run(chunk.to(device))
        for name, (low, high) in watch.ranges.items():
            rounding = self.activations[f"at_{name}"]
            assert isinstance(rounding, _Activation)
            rounding.set_range(low, high)


def _synthesized(captured: Trace, modules: Modules, roundings: nn.ModuleDict) -> fx.GraphModule:
    """The student's graph with its layers and values rounded."""
    graph, values, added = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, nn.Module]()
    folded = dict[fx.Node, fx.Node]()  # a norm, and the layer that it is part of
    for node in captured.graph_module.graph.nodes:
        if node.op == "output":
            graph.output(values[captured.logits])
            continue
        if node in folded:
            values[node] = values[folded[node]]
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
        if _is_layer(node, modules):
            norm = _norm_after(node, modules)
            name = f"layer_{node.name}"
            own = None if norm is None else modules[str(norm.target)]
            added[name] = _Layer(modules[str(node.target)], own)
            values[node].target = name
            if norm is not None:
                folded[norm] = node
        if f"at_{node.name}" in roundings:
            name = f"at_{node.name}"
            added[name] = roundings[name]
            values[node] = graph.call_module(name, (values[node],))
    if not any(isinstance(each, _Layer) for each in added.values()):
        raise UsageError(
            f"{captured.name} holds no layer whose weights could be rounded.",
            why="convolutions and linear layers of torch.nn are",
        )
    graph.lint()
    return fx.GraphModule(root_of(state_of(captured) | added), graph)


class _Layer(nn.Module):
    """A layer and the batch normalisation after it as one, its weight rounded per output channel.

    Both stay the student's own modules; their parameters receive the gradient.
    """

    layer: Any
    norm: Any

    def __init__(self, layer: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, value: Tensor) -> Tensor:
        weight, bias = self._folded()
        axes = tuple(range(1, weight.ndim))
        peak = weight.detach().abs().amax(axes, keepdim=True)
        scale = peak.clamp(min=torch.finfo(peak.dtype).tiny) / 127
        weight = round_to(weight, scale, torch.zeros_like(scale), -127, 127)
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(value, weight, bias)
        return self.layer._conv_forward(value, weight, bias)

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        weight, bias, norm = self.layer.weight, self.layer.bias, self.norm
        if norm is None:
            return weight, bias
        factor = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        shift = shift * factor
        if norm.bias is not None:
            shift = shift + norm.bias
        return weight * factor.view(-1, *(1 for _ in weight.shape[1:])), shift


class _Activation(nn.Module):
    """Rounds to 256 steps of a range that holds zero."""

    scale: Tensor
    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero", torch.zeros(()))

    def set_range(self, low: float, high: float) -> None:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255 or 1.0
        self.scale.fill_(scale)
        self.zero.fill_(round(-low / scale))

    def forward(self, value: Tensor) -> Tensor:
        return round_to(value, self.scale, self.zero, 0, 255)


class _Watch(fx.Interpreter):
    """Runs a graph and keeps the least and the largest value of some of its nodes."""

    def __init__(self, graph_module: fx.GraphModule, names: list[str]) -> None:
        super().__init__(graph_module)
        self.names = set(names)
        self.ranges: dict[str, tuple[float, float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            low, high = self.ranges.get(n.name, (0.0, 0.0))
            self.ranges[n.name] = min(low, value.min().item()), max(high, value.max().item())
        return value


@torch.library.custom_op("kdsurgeon::round_to", mutates_args=())
def round_to(value: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """``value`` at the nearest of the steps ``scale · (n - zero)``, n from ``low`` to ``high``.

    One operator, so that a graph shows one node. The gradient passes where nothing is cut off.

    >>> x = torch.tensor([0.4, 0.6, 9.0], requires_grad=True)
    >>> rounded = round_to(x, torch.tensor(1.0), torch.tensor(0.0), 0, 2)
    >>> rounded.sum().backward()
    >>> rounded.tolist(), x.grad.tolist()
    ([0.0, 1.0, 2.0], [1.0, 1.0, 0.0])
    """
    return ((value / scale).round() + zero).clamp(low, high).sub(zero).mul(scale)


@round_to.register_fake
def _(value: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    return torch.empty_like(value)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, scale, zero, low, high = inputs
    steps = (value / scale).round() + zero
    ctx.save_for_backward((steps >= low) & (steps <= high))


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    (inside,) = ctx.saved_tensors
    return gradient * inside, None, None, None, None


round_to.register_autograd(_backward, setup_context=_remember)


def _rounded_values(captured: Trace, modules: Modules) -> Iterator[fx.Node]:
    """The values that the file holds in int8, in order: all that is computed from the data but the
    logits, what is merged into the node after it, and what only moves other values."""
    for node in activations(captured):
        value = node.meta["val"]
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        if node is captured.logits or not is_float:
            continue
        if _norm_after(node, modules) is not None or _is_cut_after(node, modules):
            continue
        if not _moves(node, modules):
            yield node


def _is_layer(node: fx.Node, modules: Modules) -> bool:
    return node.op == "call_module" and isinstance(modules[str(node.target)], _LAYERS)


def _norm_after(node: fx.Node, modules: Modules) -> fx.Node | None:
    """The batch normalisation, by statistics that it keeps, that alone reads a layer."""
    if not _is_layer(node, modules) or len(node.users) != 1:
        return None
    (user,) = node.users
    if user.op != "call_module":
        return None
    norm = modules[str(user.target)]
    return user if isinstance(norm, _NORMS) and norm.running_mean is not None else None


def _is_cut_after(node: fx.Node, modules: Modules) -> bool:
    if len(node.users) != 1 or node.op == "placeholder":
        return False
    (user,) = node.users
    if user.op == "call_module":
        return isinstance(modules[str(user.target)], _CUT_LAYERS)
    return user.op != "output" and operation_name(user) in _CUTS


def _moves(node: fx.Node, modules: Modules) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _MOVE_LAYERS)
    return node.op in ("call_function", "call_method") and operation_name(node) in _MOVES
