"""Let a frozen network cost what a frozen one must: folded, and keeping little for the way back.

A teacher in evaluation mode needs no batch normalisation: behind a convolution it is part of that
convolution's weights, elsewhere a scale and a shift. Its weights need no gradient, so of a
convolution nothing has to be kept, and of a ReLU one bit for each value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kdsurgeon.stones.rectifier import rectify
from kdsurgeon.tracing import operation_name

State = dict[str, Any]  # modules and tensors by their name in a graph

_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_FOLDED = (torch.float32, torch.float64)  # rounding folded weights to fewer bits would be felt


def simplify(graph: fx.Graph, state: State, prefix: str = "") -> None:
    """Fold and thin out the frozen network that ``graph`` calls, in place.

    Its logits change by rounding only.

    Args:
        state: its modules and tensors by name; the new ones are added, and found there again.
        prefix: under which the graph calls them; what it calls otherwise is another network's.
    """
    found = _Frozen(graph, state, prefix)
    found.fold()
    found.thin()


class FrozenConvolution(nn.Module):
    """A convolution whose weights are constants: its backward pass needs no input."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, **geometry: Any) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.geometry = geometry  # stride, padding, dilation, groups

    def forward(self, value: Tensor) -> Tensor:
        if value.requires_grad and not isinstance(self.geometry["padding"], str):
            return _Convolve.apply(value, self.weight, self.bias, self.geometry)  # pyright: ignore[reportReturnType]
        return _CONVOLVE[self.weight.ndim - 2](value, self.weight, self.bias, **self.geometry)


class FrozenScale(nn.Module):
    """``shift + scale · x`` for each channel, axis 1: a normalisation by fixed statistics."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, value: Tensor) -> Tensor:
        shape = (-1, *(1,) * (value.ndim - 2))
        return torch.addcmul(self.shift.view(shape), value, self.scale.view(shape))


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any):
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.geometry = value.shape, value.stride(), geometry
        return _CONVOLVE[weight.ndim - 2](value, weight, bias, **geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,), given = ctx.saved_tensors, ctx.geometry
        spatial = weight.ndim - 2
        sizes = [_per_axis(given[name], spatial) for name in ("stride", "padding", "dilation")]
        # only its layout is looked at; an expanded number would cost a third of the time more
        absent = gradient.new_empty_strided(ctx.shape, ctx.stride)
        (result, _, _) = torch.ops.aten.convolution_backward(
            gradient, absent, weight.to(gradient.dtype), None, *sizes, False, [0] * spatial,
            given["groups"], [True, False, False],
        )  # fmt: skip
        return result, None, None, None


def _per_axis(value: int | tuple[int, ...], axes: int) -> list[int]:
    return [value] * axes if isinstance(value, int) else list(value) * (axes // len(value))


# finding what can be simplified ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Convolution:
    source: Any
    weight: Tensor
    bias: Tensor | None
    geometry: dict[str, Any]


@dataclass(frozen=True)
class _Normalisation:
    """``shift + scale · source``; the two are computed in float64 when they are asked for, as the
    numbers are not here where the network is shared out."""

    source: Any
    numbers: Callable[[], tuple[Tensor, Tensor]]
    dtype: torch.dtype


class _Frozen:
    """The part of a graph that belongs to a frozen network."""

    def __init__(self, graph: fx.Graph, state: State, prefix: str) -> None:
        self.graph, self.state, self.prefix = graph, state, prefix

    def fold(self) -> None:
        """Batch normalisation into the convolution before it, or into a scale and a shift."""
        for node in list(self.graph.nodes):
            norm = self._normalisation(node)
            if norm is None:
                continue
            before = self._convolution(norm.source)
            if before is not None and len(norm.source.users) == 1:
                self._replace(node, "folded", before.source, partial(_folded, before, norm))
            else:
                self._replace(node, "scaled", norm.source, partial(_scaled, norm))

    def thin(self) -> None:
        """Convolutions that keep nothing and ReLUs that keep a bit."""
        for node in list(self.graph.nodes):
            found = self._convolution(node)
            if found is not None:
                make = partial(FrozenConvolution, found.weight, found.bias, **found.geometry)
                self._replace(node, "frozen", found.source, make)
            elif (source := self._rectified(node)) is not None:
                with self.graph.inserting_after(node):
                    self._become(node, self.graph.call_function(rectify, (source,)))

    def _replace(
        self, node: fx.Node, kind: str, source: fx.Node, make: Callable[[], nn.Module]
    ) -> None:
        place = node.meta["qualname"].removeprefix(self.prefix).replace(".", "_")
        name = f"{kind}.{place}"
        if name not in self.state:  # another graph may have made it
            self.state[name] = make()
        with self.graph.inserting_after(node):
            self._become(node, self.graph.call_module(f"{self.prefix}{name}", (source,)))

    def _become(self, node: fx.Node, twin: fx.Node) -> None:
        twin.meta = dict(node.meta)
        node.replace_all_uses_with(twin)
        self._erase(node)

    def _erase(self, node: fx.Node) -> None:
        """And what it alone read: a convolution that was folded, weights that were fetched."""
        read = node.all_input_nodes
        self.graph.erase_node(node)
        for other in read:
            if not other.users and (other.op == "get_attr" or self._convolution(other)):
                self._erase(other)

    def _read(self, node: fx.Node) -> Any:
        """What a node of this network calls or fetches."""
        if node.op not in ("call_module", "get_attr"):
            return None
        name = str(node.target)
        return self.state[name[len(self.prefix) :]] if name.startswith(self.prefix) else None

    def _module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls with one tensor and nothing around it."""
        module = self._read(node)
        if not isinstance(module, nn.Module) or len(node.args) != 1 or node.kwargs:
            return None
        return None if module._forward_pre_hooks or module._forward_hooks else module

    def _constant(self, value: Any) -> Any:
        """The tensor that a node fetches, or the value itself."""
        if not isinstance(value, fx.Node):
            return value
        found = self._read(value)
        return found if isinstance(found, Tensor) else _NOT_CONSTANT

    def _normalisation(self, node: fx.Node) -> _Normalisation | None:
        module = self._module(node)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            given = (module.running_mean, module.running_var, module.weight, module.bias)
            return _fixed(node.args[0], *given, eps=module.eps)
        if node.op != "call_function" or node.target is not functional.batch_norm:
            return None
        call = _arguments(functional.batch_norm, node)
        names = ("running_mean", "running_var", "weight", "bias")
        given = [self._constant(call[name]) for name in names]
        if call["training"] is not False or any(each is _NOT_CONSTANT for each in given):
            return None
        return _fixed(call["input"], *given, eps=call["eps"])

    def _convolution(self, node: fx.Node) -> _Convolution | None:
        module = self._module(node)
        if type(module) in _CONVOLUTIONS and module.padding_mode == "zeros":  # pyright: ignore[reportOptionalMemberAccess]
            return _Convolution(node.args[0], module.weight, module.bias, _geometry(vars(module)))  # pyright: ignore
        if node.op != "call_function" or operation_name(node) not in ("conv1d", "conv2d", "conv3d"):
            return None
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        call = dict(zip(names, (None, None, None, 1, 0, 1, 1), strict=True))
        call |= dict(zip(names, node.args, strict=False)) | node.kwargs
        weight, bias = self._constant(call["weight"]), self._constant(call["bias"])
        if weight is _NOT_CONSTANT or bias is _NOT_CONSTANT:
            return None
        if any(isinstance(each, fx.Node) for each in _geometry(call).values()):
            return None
        return _Convolution(call["input"], weight, bias, _geometry(call))

    def _rectified(self, node: fx.Node) -> fx.Node | None:
        if isinstance(self._module(node), nn.ReLU):
            return node.args[0]  # pyright: ignore[reportReturnType]
        is_own = str(node.meta.get("qualname", "")).startswith(self.prefix)
        if is_own and node.op != "call_module" and operation_name(node) == "relu":
            return node.args[0]  # pyright: ignore[reportReturnType]
        return None


_NOT_CONSTANT = object()


def _geometry(values: Any) -> dict[str, Any]:
    return {name: values[name] for name in ("stride", "padding", "dilation", "groups")}


def _arguments(function: Callable[..., Any], node: fx.Node) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _fixed(
    source: Any,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
) -> _Normalisation | None:
    """None where statistics are those of the batch or numbers are coarse."""
    if mean is None or variance is None or mean.dtype not in _FOLDED:
        return None

    def numbers() -> tuple[Tensor, Tensor]:
        scale = (variance.double() + eps).rsqrt()
        scale = scale if weight is None else scale * weight.double()
        shift = -mean.double() * scale
        shift = shift if bias is None else shift + bias.double()
        return scale.detach(), shift.detach()

    return _Normalisation(source, numbers, mean.dtype)


def _scaled(norm: _Normalisation) -> FrozenScale:
    scale, shift = norm.numbers()
    return FrozenScale(scale.to(norm.dtype), shift.to(norm.dtype))


def _folded(before: _Convolution, norm: _Normalisation) -> FrozenConvolution:
    scale, bias = norm.numbers()
    by_output = (-1, *(1,) * (before.weight.ndim - 1))
    weight = before.weight.detach().double() * scale.view(by_output)
    if before.bias is not None:
        bias = bias + before.bias.detach().double() * scale
    dtype = before.weight.dtype
    return FrozenConvolution(weight.to(dtype), bias.to(dtype), **before.geometry)
