"""Find the places where a network is held together by few tensors, and cut there.

One sweep in program order keeps the set of live activations: tensors that depend on the data input
and are read later. Where exactly one is live after its node, every path from input to logits
passes it: a cut point (for width one this equals dominance of the output, in any topological
order). Where that leaves a piece of more than a quarter of the compute, places held together by up
to four tensors are cut points too. What does not depend on the data input through a tensor is
context (constants, position tables, masks, other inputs): recomputed where needed, never counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, fx

from kdsurgeon.costs import Cost, node_costs, total
from kdsurgeon.errors import PlanError, nearest
from kdsurgeon.layouts import Activation, Kind, describe_activations
from kdsurgeon.tracing import Trace, memory_of, operation_name

MAX_WIDTH = 4  # tensors of one cut
MAX_PIECE = 0.25  # of the compute between two cuts of one tensor; beyond, wider ones are searched
_SHAPE_READERS = frozenset({"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"})


@dataclass(frozen=True)
class CutPoint:
    """A place after which only ``tensors`` are still needed; the first was produced last.

    ``progress`` is the share of the model's multiply-adds spent up to here. ``is_junction`` says
    that branches have just met.
    """

    tensors: tuple[Activation, ...]
    progress: float
    is_junction: bool

    @property
    def name(self) -> str:
        return " + ".join(tensor.name for tensor in self.tensors)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors)

    @property
    def width(self) -> int:
        return len(self.tensors)

    @property
    def main(self) -> Activation:
        return self.tensors[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.main.shape

    @property
    def kind(self) -> Kind:
        return self.main.kind

    def __str__(self) -> str:
        return " + ".join(map(str, self.tensors))


@dataclass(frozen=True)
class Block:
    """The nodes between two cuts, in order, and what they cost."""

    nodes: tuple[fx.Node, ...]
    cost: Cost


@dataclass(frozen=True)
class Partition:
    """A trace cut into blocks; the blocks in order rebuild the trace.

    ``carried`` names, for each cut, what else is still needed there: see :func:`recut`.
    """

    trace: Trace
    cuts: tuple[CutPoint, ...]
    blocks: tuple[Block, ...]
    carried: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        assert len(self.blocks) == len(self.cuts) + 1
        assert len(self.carried) in (0, len(self.cuts))

    @property
    def cost(self) -> Cost:
        return total(block.cost for block in self.blocks)


def find_cut_points(trace: Trace) -> tuple[CutPoint, ...]:
    """Every place after which few tensors are still needed, from input to logits.

    >>> import torch
    >>> from torch import nn
    >>> from kdsurgeon.tracing import trace
    >>> layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))
    >>> [str(cut) for cut in find_cut_points(trace(layers, torch.zeros(2, 1, 4, 4)))]
    ['0 2×2×2', '1 2×2×2', '2 8']
    """
    kept = trace.graph_module.meta
    if "cut points" not in kept:
        kept["cut points"] = _find(trace)
    return kept["cut points"]


def cut(trace: Trace, cuts: Sequence[CutPoint]) -> Partition:
    """``trace`` divided at ``cuts``, which are in the order of the graph.

    Raises:
        PlanError: a cut is unknown to the trace, out of order, or not a cut point.
    """
    _check_cuts(trace, cuts)
    return Partition(trace, tuple(cuts), _divide(trace, cuts))


def recut(whole: Partition, captured: Trace) -> Partition:
    """The model of ``whole`` in another mode, cut behind the same tensors.

    More may be needed after them there: in training mode what dropout has changed is another tensor
    than what it has not. Such tensors are carried across the cut.

    Raises:
        PlanError: a tensor of a cut is not computed in that mode.
    """
    nodes = activations(captured)
    position = {node: index for index, node in enumerate(nodes)}
    last_read = _last_reads(nodes)
    carried = []
    for point in whole.cuts:
        missing = [name for name in point.names if captured.nodes.get(name) not in position]
        if missing:
            raise PlanError(
                f"{captured.name} does not compute {missing[0]} in training mode.",
                where=f"cut at {point.name}",
                fix=f"`kdsurgeon inspect` lists the cut points of {captured.name}",
            )
        at = position[captured.nodes[point.main.name]]
        alive = [node for node in nodes[: at + 1] if last_read[node] > at]
        names = (node.meta["qualname"] for node in alive)
        carried.append(tuple(name for name in names if name not in point.names))
    return Partition(captured, whole.cuts, _divide(captured, whole.cuts), tuple(carried))


def _divide(trace: Trace, cuts: Sequence[CutPoint]) -> tuple[Block, ...]:
    costs = node_costs(trace)
    ends = {trace.nodes[point.main.name] for point in cuts}
    read = _ancestors(trace)
    blocks: list[list[fx.Node]] = [[] for _ in range(len(cuts) + 1)]
    place: dict[fx.Node, int] = {}
    current = 0
    for node in trace.graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        place[node] = current
        if node not in read:  # an auxiliary head, say: where its input is still at hand
            place[node] = max((place.get(other, 0) for other in node.all_input_nodes), default=0)
        blocks[place[node]].append(node)
        current += node in ends
    return tuple(
        Block(tuple(block), total(costs[node.meta["qualname"]] for node in block))
        for block in blocks
    )


def tap(trace: Trace, names: Iterable[str]) -> fx.GraphModule:
    """The trace as a module that returns (logits, {name: tensor}) for nodes of these names."""
    graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    wanted = set(names)
    taken = {}
    for node in trace.graph_module.graph.nodes:
        if node.op == "output":
            graph.output((twins[trace.logits], taken))
            break
        twins[node] = graph.node_copy(node, twins.__getitem__)
        if node.meta["qualname"] in wanted:  # a copy, as a later node may overwrite the tensor
            taken[node.meta["qualname"]] = graph.call_method("clone", (twins[node],))
    graph.lint()
    return fx.GraphModule(trace.graph_module, graph)


def fingerprint(trace: Trace) -> str:
    """sha256 of the graph: operations, wiring and shapes, independent of weights and batch size."""
    digest = hashlib.sha256()
    for node in trace.graph_module.graph.nodes:
        value = node.meta.get("val")
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        reads = [other.meta["qualname"] for other in node.all_input_nodes]
        target = getattr(node.target, "__name__", node.target)
        line = (node.op, str(target), node.meta["qualname"], reads, shape)
        digest.update(repr(line).encode())
    return digest.hexdigest()


# the sweep ───────────────────────────────────────────────────────────────────────────────────────


def activations(trace: Trace) -> list[fx.Node]:
    """The nodes that depend on the data input through tensors, in order, without the output.

    Where the data input holds integers (token ids), dependence starts at the first weight that is
    read with them: masks and positions made from the ids alone are context.
    """
    kept = trace.graph_module.meta
    if "activations" not in kept:
        kept["activations"] = _activations(trace)
    return kept["activations"]


def _activations(trace: Trace) -> list[fx.Node]:
    read = _ancestors(trace)
    return [node for node in _dependent(trace) if node in read]


def _ancestors(trace: Trace) -> set[fx.Node]:
    """Every node that the logits are computed from."""
    found, pending = set[fx.Node](), [trace.logits]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _dependent(trace: Trace) -> list[fx.Node]:
    primary = primary_input(trace)
    is_integer = not primary.meta["val"].is_floating_point()
    found: dict[fx.Node, None] = {} if is_integer else {primary: None}
    ids = {primary} if is_integer else set()
    for node in trace.graph_module.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or _reads_only_shape(node):
            continue
        inputs = node.all_input_nodes
        if any(other in found for other in inputs):
            found[node] = None
        elif any(other in ids for other in inputs):
            if _reads_weights(node, trace):
                found[node] = None
            else:
                ids.add(node)
    return list(found)


def primary_input(trace: Trace) -> fx.Node:
    """The input whose way to the logits is cut: of several, the one with most compute behind it."""
    candidates = trace.placeholders
    floating = [node for node in candidates if node.meta["val"].is_floating_point()]
    candidates = floating or candidates
    if len(candidates) == 1:
        return candidates[0]
    costs = node_costs(trace)

    def compute_behind(start: fx.Node) -> int:
        reached, spent = {start}, 0
        for node in trace.graph_module.graph.nodes:
            if any(other in reached for other in node.all_input_nodes):
                reached.add(node)
                spent += costs[node.meta["qualname"]].multiply_adds
        return spent

    return max(candidates, key=compute_behind)


def _reads_only_shape(node: fx.Node) -> bool:
    return "batch" in node.meta or (node.op == "call_method" and node.target in _SHAPE_READERS)


def _reads_weights(node: fx.Node, trace: Trace) -> bool:
    if node.op == "call_module":
        module = trace.graph_module.get_submodule(str(node.target))
        return next(module.parameters(), None) is not None
    return any(other.op == "get_attr" for other in node.all_input_nodes)


def _find(trace: Trace) -> tuple[CutPoint, ...]:
    nodes = activations(trace)
    places = _narrow_places(nodes, trace)
    costs = node_costs(trace)
    whole = max(1, total(costs.values()).multiply_adds)
    progress = _progress(trace, whole)
    chosen = [place for place in places if len(place) == 1]
    chosen += _in_large_pieces(places, progress)
    position = {node: index for index, node in enumerate(nodes)}
    chosen.sort(key=lambda place: position[place[0]])
    described = describe_activations(trace, {node for place in chosen for node in place})
    junctions = _junctions(nodes, trace)
    return tuple(
        CutPoint(
            tuple(described[node] for node in place), progress[place[0]], place[0] in junctions
        )
        for place in chosen
        if all(node in described for node in place)
    )


def _narrow_places(nodes: list[fx.Node], trace: Trace) -> list[tuple[fx.Node, ...]]:
    """After every node the live activations, where they are at most four tensors, newest first."""
    last_read = _last_reads(nodes)
    live: dict[fx.Node, None] = {}
    places = []
    for position, node in enumerate(nodes):
        live[node] = None
        live = {value: None for value in live if last_read[value] > position}
        is_inner = node.op != "placeholder" and node is not trace.logits
        if is_inner and node in live and len(live) <= MAX_WIDTH:
            place = tuple(reversed(live))
            is_apart = len({memory_of(value) for value in place}) == len(place)
            if is_apart and place[-1].op != "placeholder":  # the input itself is not a feature
                places.append(place)
    return places


def _last_reads(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """For every node the position of its last reader; what is returned is read at the very end."""
    position = {node: index for index, node in enumerate(nodes)}
    return {
        node: max(
            (position.get(user, -1 if user.op != "output" else len(nodes)) for user in node.users),
            default=-1,
        )
        for node in nodes
    }


def _progress(trace: Trace, whole: int) -> dict[fx.Node, float]:
    costs = node_costs(trace)
    spent, progress = 0, {}
    for node in trace.graph_module.graph.nodes:
        spent += costs[node.meta["qualname"]].multiply_adds
        progress[node] = spent / whole
    return progress


def _in_large_pieces(
    places: list[tuple[fx.Node, ...]], progress: Mapping[fx.Node, float]
) -> list[tuple[fx.Node, ...]]:
    """The narrowest wide place for every amount of compute that single tensors do not divide."""
    ends = [0.0, *(progress[place[0]] for place in places if len(place) == 1), 1.0]
    gaps = [(low, high) for low, high in pairwise(ends) if high - low > MAX_PIECE]
    best: dict[float, tuple[fx.Node, ...]] = {}
    for place in places:
        at = progress[place[0]]
        is_wanted = len(place) > 1 and any(low < at < high for low, high in gaps)
        if is_wanted and len(place) <= len(best.get(at, place)):
            best[at] = place
    return list(best.values())


_JOINING = frozenset({"add", "cat", "concat", "stack"})


def _junctions(nodes: list[fx.Node], trace: Trace) -> set[fx.Node]:
    """Where branches have just met: the end of a residual or concatenating unit.

    The addition, and what follows it until the next layer that mixes channels or positions.
    """
    known = set(nodes)
    found = set()
    for node in nodes:
        name = operation_name(node)
        branches = [other for other in node.all_input_nodes if other in known]
        follows = any(other in found for other in branches) and not _has_matrix(node, trace)
        if (len(branches) > 1 and name in _JOINING) or (len(branches) == 1 and follows):
            found.add(node)
    return found


def _has_matrix(node: fx.Node, trace: Trace) -> bool:
    """Whether the node is a layer that mixes channels or positions (not a mere normalisation)."""
    if node.op == "call_module":
        module = trace.graph_module.get_submodule(str(node.target))
        return any(parameter.ndim > 1 for parameter in module.parameters())
    weights = [other.meta["val"] for other in node.all_input_nodes if other.op == "get_attr"]
    return any(isinstance(weight, Tensor) and weight.ndim > 1 for weight in weights)


def _check_cuts(trace: Trace, cuts: Sequence[CutPoint]) -> None:
    known = {point.name: index for index, point in enumerate(find_cut_points(trace))}
    for point in cuts:
        if point.name in known:
            continue
        missing = [name for name in point.names if name not in trace.nodes]
        if missing:
            raise PlanError(
                f"{trace.name} has no node {missing[0]}.",
                fix=nearest(missing[0], known)
                or f"`kdsurgeon inspect` lists the cut points of {trace.name}",
            )
        raise PlanError(
            f"{trace.name} cannot be cut at {point.name}.",
            why="other tensors are still needed there",
            fix=f"`kdsurgeon inspect` lists the cut points of {trace.name}",
        )
    for earlier, later in pairwise(cuts):
        if known[earlier.name] >= known[later.name]:
            raise PlanError(
                f"boundaries of {trace.name} cross.",
                where=f"{later.name} does not come after {earlier.name}",
                fix="list the boundaries from input to logits",
            )
