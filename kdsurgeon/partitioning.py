"""Find the places where a network is held together by one tensor, and cut there.

One sweep in topological order keeps the set of live activations: values that depend on the data
input and are read later. Where exactly one is live after its node, every path from input to logits
passes it: a cut point (for width one this equals dominance of the output, in any topological
order). Values that do not depend on the data (constants, tables) are context and never counted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, fx, nn

from kdsurgeon.costs import Cost, node_costs, total
from kdsurgeon.errors import PlanError, nearest
from kdsurgeon.tracing import Trace

Kind = Literal["map", "tokens", "vector"]


@dataclass(frozen=True)
class CutPoint:
    """A node after which only its own tensor is still needed.

    ``shape`` is without the batch: (channels, height, width), (tokens, width) or (width,).
    ``progress`` is the share of the model's multiply-adds spent up to here. ``is_rectified`` says
    that the value cannot be negative, so that the reader expects post-activation input.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    stride: float
    progress: float
    is_rectified: bool
    is_junction: bool

    def __str__(self) -> str:
        return f"{self.name} {'×'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Block:
    """The nodes between two cuts, in order, and what they cost."""

    nodes: tuple[fx.Node, ...]
    cost: Cost


@dataclass(frozen=True)
class Partition:
    """A trace cut into blocks; the blocks in order rebuild the trace."""

    trace: Trace
    cuts: tuple[CutPoint, ...]
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        assert len(self.blocks) == len(self.cuts) + 1

    @property
    def cost(self) -> Cost:
        return total(block.cost for block in self.blocks)


def find_cut_points(trace: Trace) -> tuple[CutPoint, ...]:
    """Every node after which exactly one tensor is still needed, from input to logits.

    >>> import torch
    >>> from kdsurgeon.tracing import trace
    >>> layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))
    >>> [str(cut) for cut in find_cut_points(trace(layers, torch.zeros(2, 1, 4, 4)))]
    ['0 2×2×2', '1 2×2×2', '2 8']
    """
    costs = node_costs(trace)
    whole = max(1, total(costs.values()).multiply_adds)
    nodes = _data_nodes(trace)
    last_read = _last_reads(nodes)
    spent, live, cuts = 0, set[fx.Node](), []
    after_junction = False
    for position, node in enumerate(nodes):
        spent += costs[node.meta["qualname"]].multiply_adds
        live = {value for value in live if last_read[value] > position}
        live.add(node)
        after_junction = _is_junction(node) or (after_junction and not _has_weight(node, trace))
        value = node.meta["val"]
        is_inner = node.op != "placeholder" and node is not trace.logits
        if is_inner and live == {node} and isinstance(value, Tensor) and 2 <= value.ndim <= 4:
            cuts.append(_cut_point(node, trace, spent / whole, after_junction=after_junction))
    return tuple(cuts)


def cut(trace: Trace, cuts: tuple[CutPoint, ...]) -> Partition:
    """``trace`` divided at ``cuts``, which are in the order of the graph.

    Raises:
        PlanError: a cut is unknown to the trace, out of order, or not a cut point.
    """
    costs = node_costs(trace)
    known = {point.name: index for index, point in enumerate(find_cut_points(trace))}
    _check_cuts(trace, cuts, known)
    blocks: list[list[fx.Node]] = [[]]
    ends = {trace.nodes[point.name] for point in cuts}
    for node in trace.graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        blocks[-1].append(node)
        if node in ends:
            blocks.append([])
    return Partition(
        trace,
        cuts,
        tuple(
            Block(tuple(block), total(costs[node.meta["qualname"]] for node in block))
            for block in blocks
        ),
    )


def fingerprint(trace: Trace) -> str:
    """sha256 of the graph: operations, wiring and shapes, independent of weights and batch size."""
    digest = hashlib.sha256()
    for node in trace.graph_module.graph.nodes:
        value = node.meta.get("val")
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else None
        reads = [other.meta["qualname"] for other in node.all_input_nodes]
        target = getattr(node.target, "__name__", node.target)
        line = (node.op, str(target), node.meta["qualname"], reads, shape)
        digest.update(repr(line).encode())
    return digest.hexdigest()


def _data_nodes(trace: Trace) -> list[fx.Node]:
    """The nodes whose value depends on the data input, in order, without the output."""
    tainted: set[fx.Node] = set()
    ordered = []
    for node in trace.graph_module.graph.nodes:
        is_data = node.op == "placeholder" or any(n in tainted for n in node.all_input_nodes)
        if is_data and node.op != "output":
            tainted.add(node)
            ordered.append(node)
    return ordered


def _last_reads(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """For every node the position of its last reader; what is returned is read at the very end."""
    position = {node: index for index, node in enumerate(nodes)}
    return {
        node: max((position.get(user, len(nodes)) for user in node.users), default=-1)
        for node in nodes
    }


def _cut_point(node: fx.Node, trace: Trace, progress: float, *, after_junction: bool) -> CutPoint:
    shape = tuple(node.meta["val"].shape[1:])
    kind: Kind = {1: "vector", 2: "tokens", 3: "map"}[len(shape)]  # pyright: ignore[reportAssignmentType]
    return CutPoint(
        name=node.meta["qualname"],
        shape=shape,
        kind=kind,
        stride=trace.example.shape[-1] / shape[-1] if kind == "map" else float("inf"),
        progress=progress,
        is_rectified=_is_rectified(node, trace),
        is_junction=after_junction,
    )


def _is_junction(node: fx.Node) -> bool:
    """Whether two or more activations meet here: the end of a residual or concatenating unit."""
    inputs = [other for other in node.all_input_nodes if isinstance(other.meta["val"], Tensor)]
    inputs = [other for other in inputs if other.op != "get_attr"]
    name = str(getattr(node.target, "__name__", node.target)).strip("_")
    return len(inputs) > 1 and name in ("add", "iadd", "cat", "concat", "stack")


def _has_weight(node: fx.Node, trace: Trace) -> bool:
    """Whether the node is a layer that mixes channels or positions (not a mere normalisation)."""
    if node.op != "call_module":
        return False
    module = trace.graph_module.get_submodule(str(node.target))
    return any(parameter.ndim > 1 for parameter in module.parameters())


_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout)
_SHAPING = (nn.Identity, nn.Flatten)
_RECTIFYING = frozenset({"relu", "relu6", "sigmoid", "hardsigmoid", "softplus"})
_KEEPING_SIGN = frozenset(
    {
        "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "flatten",
        "view", "reshape", "mean", "dropout", "cat", "boolean_dispatch",
    }
)  # fmt: skip


def _is_rectified(node: fx.Node, trace: Trace) -> bool:
    if node.op == "call_module":
        module = trace.graph_module.get_submodule(str(node.target))
        rectifies = isinstance(module, _RECTIFIERS)
        keeps_sign = isinstance(module, _POOLS + _SHAPING)
    else:
        name = str(getattr(node.target, "__name__", node.target)).strip("_")
        rectifies, keeps_sign = name in _RECTIFYING, name in _KEEPING_SIGN
    if rectifies or not keeps_sign:
        return rectifies
    sources = [other for other in node.all_input_nodes if isinstance(other.meta["val"], Tensor)]
    return bool(sources) and all(_is_rectified(other, trace) for other in sources)


def _check_cuts(trace: Trace, cuts: tuple[CutPoint, ...], known: dict[str, int]) -> None:
    for point in cuts:
        if point.name in known:
            continue
        if point.name in trace.nodes:
            raise PlanError(
                f"{trace.name} cannot be cut at {point.name}.",
                why="other tensors are still needed there",
                fix=f"`kdsurgeon inspect {trace.name}` lists the cut points",
            )
        raise PlanError(
            f"{trace.name} has no node {point.name}.",
            fix=nearest(point.name, known)
            or f"`kdsurgeon inspect {trace.name}` lists the cut points",
        )
    for earlier, later in pairwise(cuts):
        if known[earlier.name] >= known[later.name]:
            raise PlanError(
                f"boundaries of {trace.name} cross.",
                where=f"{later.name} does not come after {earlier.name}",
                fix="list the boundaries from input to logits",
            )
