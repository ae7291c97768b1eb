"""Say how the axes of a tensor are to be read: which one is the channels, where the positions lie.

A shape alone does not tell a map from tokens, nor channels-first from channels-last, and the square
root of a number of tokens is a guess. The layers around a tensor do tell: a convolution reads
channels from axis 1, a linear layer from the last; tokens were once flattened from a map.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Tensor, fx, nn

from kdsurgeon.tracing import Trace, batch_axis, operation_name

Kind = Literal["map", "tokens", "vector"]
Grid = tuple[tuple[int, int], int]  # (height, width), and how many tokens stand before
MAX_PREFIX = 16  # class and register tokens that may stand before those of the grid
_STEPS = 24  # how far around a tensor the layers are asked


@dataclass(frozen=True)
class Activation:
    """One tensor at a cut.

    ``shape`` is without the batch, in the tensor's own order of axes; ``axes`` names them: BCHW,
    BHWC, BTC, BCT, TBC or BC. ``grid`` is (height, width) of a map, and of tokens that were
    flattened from one, row by row, after ``prefix`` others. ``is_rectified`` says that the value
    cannot be negative, ``is_normalized`` that it comes straight out of a layer normalisation.
    """

    name: str
    shape: tuple[int, ...]
    axes: str
    grid: tuple[int, int] | None = None
    prefix: int = 0
    is_rectified: bool = False
    is_normalized: bool = False

    def __str__(self) -> str:
        return f"{self.name} {'×'.join(map(str, self.shape))}"

    @property
    def kind(self) -> Kind:
        return {"BCHW": "map", "BHWC": "map", "BC": "vector"}.get(self.axes, "tokens")  # pyright: ignore[reportReturnType]

    @property
    def channels(self) -> int:
        return self.shape[self.axes.replace("B", "").index("C")]

    @property
    def positions(self) -> int:
        """How many places the channels are given for: pixels, tokens, or one."""
        return prod(self.shape) // self.channels


def describe_activations(trace: Trace, nodes: Collection[fx.Node]) -> dict[fx.Node, Activation]:
    """What each node's tensor is; those that no adapter could feed are left out.

    That is what is not floating point, has no batch axis of its own, or has too many axes.

    >>> import torch
    >>> from kdsurgeon.tracing import trace
    >>> layers = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), nn.Conv1d(8, 8, 1))
    >>> net = nn.Sequential(layers, nn.Flatten(), nn.Linear(128, 5))
    >>> captured = trace(net, torch.zeros(2, 3, 8, 8))
    >>> tokens = describe_activations(captured, [captured.nodes["0.1"]])[captured.nodes["0.1"]]
    >>> tokens.axes, tokens.grid
    ('BCT', (4, 4))
    """
    grids = _grids(trace)
    found = {}
    for node in nodes:
        value = node.meta["val"]
        known = grids.get(node, {})
        axes = _axes(node, trace, known)
        if axes is None or not value.is_floating_point():
            continue
        shape = tuple(size for axis, size in enumerate(value.shape) if axes[axis] != "B")
        count = value.shape[axes.index("T")] if "T" in axes else 0
        grid, prefix = known.get(count, (None, 0))
        if "H" in axes:
            grid, prefix = (value.shape[axes.index("H")], value.shape[axes.index("W")]), 0
        found[node] = Activation(
            name=node.meta["qualname"],
            shape=shape,
            axes=axes,
            grid=grid,
            prefix=prefix,
            is_rectified=_is_rectified(node, trace),
            is_normalized=_is_normalized(node, trace),
        )
    return found


# channels ────────────────────────────────────────────────────────────────────────────────────────


def _axes(node: fx.Node, trace: Trace, grids: Mapping[int, Grid]) -> str | None:
    """The axes by their letters, told by the layers around; else by a grid of so many tokens."""
    value = node.meta["val"]
    batch = batch_axis(value)
    if batch is None:
        return None
    if value.ndim == 2:
        return "BC" if batch == 0 else None
    if value.ndim == 3:
        if batch == 1:
            return "TBC"
        if batch != 0:
            return None
        told = _channel_axis(node, trace)
        if told is None:
            told = 1 if value.shape[2] in grids and value.shape[1] not in grids else 2
        return {1: "BCT", 2: "BTC"}[told]
    if value.ndim == 4 and batch == 0:
        told = _channel_axis(node, trace)
        return {None: "BCHW", 1: "BCHW", 3: "BHWC"}.get(told)
    return None


def _channel_axis(start: fx.Node, trace: Trace) -> int | None:
    """Which axis the nearest layers take for the channels: their readers first, then the makers."""
    ndim = start.meta["val"].ndim
    queue: list[tuple[fx.Node, tuple[int, ...]]] = [(start, tuple(range(ndim)))]
    seen = {start}
    for node, axes in queue:  # axes[i]: which axis of the start is axis i here
        if len(seen) > _STEPS:
            break
        for user in node.users:
            told = _told_by_reader(user, node, trace)
            if told is not None and axes[told]:
                return axes[told]
            step = _same_axes_after(user, node, axes)
            if step is not None and user not in seen:
                seen.add(user)
                queue.append((user, step))
        told = _told_by_maker(node, trace)
        if told is not None and axes[told]:
            return axes[told]
        for other in node.all_input_nodes:
            step = _same_axes_before(node, other, axes)
            if step is not None and other not in seen:
                seen.add(other)
                queue.append((other, step))
    return None


_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.BatchNorm1d, nn.BatchNorm2d,
    nn.SyncBatchNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.MaxPool1d,
    nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.PixelUnshuffle, nn.PixelShuffle,
)  # fmt: skip
_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.LSTM, nn.GRU)
_FIRST_FUNCTIONS = frozenset(
    {
        "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "batch_norm", "group_norm",
        "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d",
        "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "interpolate",
        "pixel_shuffle", "pixel_unshuffle", "unfold", "instance_norm",
    }
)  # fmt: skip
_LAST_FUNCTIONS = frozenset({"linear", "layer_norm", "rms_norm"})


def _told_by_reader(user: fx.Node, node: fx.Node, trace: Trace) -> int | None:
    """The axis of ``node`` that ``user`` takes for the channels, if it is a layer that says so."""
    if not user.args or user.args[0] is not node:
        return None
    ndim = node.meta["val"].ndim
    layer = _layer(user, trace)
    name = operation_name(user)
    if isinstance(layer, _FIRST) or (layer is None and name in _FIRST_FUNCTIONS):
        return 1
    if isinstance(layer, _LAST) or (layer is None and name in _LAST_FUNCTIONS):
        return ndim - 1 if _normalizes_last_only(layer) else None
    if name in ("mean", "amax", "sum"):
        return _kept_axis(user, ndim)
    if name == "getitem":  # one token of all: x[:, 0]
        index = user.args[1]
        if isinstance(index, tuple) and ndim == 3 and len(index) == 2 and isinstance(index[1], int):
            return 2
    return None


def _told_by_maker(node: fx.Node, trace: Trace) -> int | None:
    layer, name = _layer(node, trace), operation_name(node)
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return None
    if isinstance(layer, _FIRST) or (layer is None and name in _FIRST_FUNCTIONS):
        return 1
    if isinstance(layer, (*_LAST, nn.Embedding)) or (layer is None and name in _LAST_FUNCTIONS):
        return value.ndim - 1 if _normalizes_last_only(layer) else None
    return None


def _normalizes_last_only(layer: nn.Module | None) -> bool:
    return len(getattr(layer, "normalized_shape", (0,))) == 1


def _kept_axis(user: fx.Node, ndim: int) -> int | None:
    dims = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, (tuple, list)) or not all(isinstance(dim, int) for dim in dims):
        return None
    kept = set(range(1, ndim)) - {dim % ndim for dim in dims if isinstance(dim, int)}
    return kept.pop() if len(kept) == 1 else None


def _same_axes_after(user: fx.Node, node: fx.Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """``axes`` as they stand in the reader's result, where it only computes or moves axes."""
    value, result = node.meta["val"], user.meta.get("val")
    if not isinstance(result, Tensor):
        return None
    if result.ndim != value.ndim:
        return _folded(value, result, axes)
    order = _permutation(user, value.ndim)
    if order is not None:
        return tuple(axes[axis] for axis in order) if user.args[0] is node else None
    return axes if _keeps_axes(user, result, value) else None


def _same_axes_before(
    node: fx.Node, other: fx.Node, axes: tuple[int, ...]
) -> tuple[int, ...] | None:
    """``axes`` as they stand in what ``node`` read."""
    value, source = node.meta["val"], other.meta.get("val")
    if not isinstance(source, Tensor) or other.op == "get_attr":
        return None
    if source.ndim != value.ndim:
        return _folded(value, source, axes)
    order = _permutation(node, value.ndim)
    if order is not None:
        return tuple(axes[order.index(axis)] for axis in range(value.ndim))
    return axes if _keeps_axes(node, value, source) else None


def _folded(value: Tensor, other: Tensor, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """``axes`` where a map's rows and columns become tokens, or tokens rows and columns.

    An axis that has no counterpart stands as the batch, which nobody takes for the channels.
    """
    flat, grid = (value, other) if value.ndim == 3 else (other, value)
    if (flat.ndim, grid.ndim) != (3, 4) or batch_axis(flat) != 0 or batch_axis(grid) != 0:
        return None
    rows, columns, last = grid.shape[1:]
    if flat.shape[1:] == (rows * columns, last):  # channels last
        return (0, 0, 0, axes[2]) if value is flat else (0, 0, axes[3])
    if flat.shape[1:] == (rows, columns * last):  # channels first
        return (0, axes[1], 0, 0) if value is flat else (0, axes[1], 0)
    return None


def _keeps_axes(node: fx.Node, result: Tensor, source: Tensor) -> bool:
    name = operation_name(node)
    if name in ("cat", "concat"):
        return True
    mixes = name in ("view", "reshape", "matmul", "flatten", "unflatten", "getitem")
    return result.shape == source.shape and not mixes


def _permutation(node: fx.Node, ndim: int) -> tuple[int, ...] | None:
    name, args = operation_name(node), node.args[1:]
    if name == "permute":
        dims = args[0] if args and isinstance(args[0], (tuple, list)) else args
        dims = dims or node.kwargs.get("dims") or ()
        if len(dims) == ndim and all(isinstance(dim, int) for dim in dims):  # pyright: ignore
            return tuple(dim % ndim for dim in dims)  # pyright: ignore
    if name in ("transpose", "swapaxes", "swapdims") and len(args) == 2:
        first, second = (int(arg) % ndim for arg in args)  # pyright: ignore[reportArgumentType]
        order = list(range(ndim))
        order[first], order[second] = order[second], order[first]
        return tuple(order)
    if name == "mT":
        return (*range(ndim - 2), ndim - 1, ndim - 2)
    return None


def _layer(node: fx.Node, trace: Trace) -> nn.Module | None:
    if node.op != "call_module":
        return None
    return trace.graph_module.get_submodule(str(node.target))


# grids ───────────────────────────────────────────────────────────────────────────────────────────


def _grids(trace: Trace) -> dict[fx.Node, dict[int, Grid]]:
    """For tokens the map that they were flattened from, and how many others stand before them.

    By the size of the axis that may count the tokens, as either axis of three may.
    """
    grids: dict[fx.Node, dict[int, Grid]] = {}
    latest: dict[int, Grid] = {}
    for node in trace.graph_module.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim != 3 or batch_axis(value) is None:
            continue
        for axis, count in enumerate(value.shape):
            grid = _inherited(node, count, grids) or latest.get(count)
            if axis != batch_axis(value) and grid is not None:
                grids.setdefault(node, {})[count] = latest[count] = grid
    return grids


def _inherited(
    node: fx.Node, count: int, grids: Mapping[fx.Node, Mapping[int, Grid]]
) -> Grid | None:
    for other in node.all_input_nodes:
        value = other.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        for (height, width), prefix in grids.get(other, {}).values():
            now = count - height * width
            if now == prefix or (0 <= now <= MAX_PREFIX and _moves_prefix(node, other)):
                return (height, width), now
        if value.ndim == 4 and batch_axis(value) == 0:
            for height, width in (tuple(value.shape[2:]), tuple(value.shape[1:3])):
                if height * width == count and min(height, width) > 1:
                    return (height, width), 0
    return None


def _moves_prefix(node: fx.Node, other: fx.Node) -> bool:
    """Whether tokens were put before or taken from before ``other``'s."""
    name = operation_name(node)
    if name in ("cat", "concat"):
        parts = node.args[0]
        return isinstance(parts, (tuple, list)) and bool(parts) and parts[-1] is other
    return name == "getitem"


# values ──────────────────────────────────────────────────────────────────────────────────────────

_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout)
_SHAPING = (nn.Identity, nn.Flatten)
_RECTIFYING = frozenset({"relu", "relu6", "sigmoid", "hardsigmoid", "softplus", "softmax"})
_KEEPING_SIGN = frozenset(
    {
        "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "flatten",
        "view", "reshape", "mean", "amax", "dropout", "cat", "clone", "contiguous", "permute",
        "transpose", "getitem", "detach", "after",
    }
)  # fmt: skip


def _is_rectified(node: fx.Node, trace: Trace) -> bool:
    """Whether no value can be negative: a rectifier, or what only moves or averages its result."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        layer, name = _layer(current, trace), operation_name(current)
        if isinstance(layer, _RECTIFIERS) or (layer is None and name in _RECTIFYING):
            continue
        if not isinstance(layer, _POOLS + _SHAPING) and (layer or name not in _KEEPING_SIGN):
            return False
        tensors = [n for n in current.all_input_nodes if isinstance(n.meta["val"], Tensor | tuple)]
        if not tensors:
            return False
        pending += tensors
    return True


def _is_normalized(node: fx.Node, trace: Trace) -> bool:
    layer = _layer(node, trace)
    if layer is None:
        return operation_name(node) in ("layer_norm", "rms_norm")
    return type(layer).__name__.endswith(("LayerNorm", "RMSNorm"))
