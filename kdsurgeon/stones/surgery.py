"""Graft blocks of one graph into another: the only place where graphs are put together.

Grafting copies nodes and shares weights. A boundary tensor has two readers, the next block and the
adapter: a block that would overwrite it in place is given a copy.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from kdsurgeon.partitioning import Partition, activations, primary_input
from kdsurgeon.tracing import Trace, batch_axis, memory_of

Values = dict[fx.Node, fx.Node]


def graft(
    graph: fx.Graph, nodes: Sequence[fx.Node], boundary: Values, context: Values, prefix: str
) -> Values:
    """Copy ``nodes`` into ``graph``; the copy of each, and of all context that came along.

    Args:
        boundary: the node of ``graph`` that stands for each tensor, or input, that is read from
            before. The size of the batch is read from it, too.
        context: the same for what does not depend on the data; what is missing is copied along.
        prefix: under which modules and attributes are called.

    Raises:
        AssertionError: the nodes read a data value from before the boundary; names it.
    """
    written = {memory_of(target) for node in nodes for target in node.meta.get("writes", ())}
    values = dict(boundary)
    for node, value in boundary.items():
        if memory_of(node) in written:
            values[node] = graph.call_method("clone", (value,))
    values |= context
    for node in nodes:
        _copy(graph, node, values, prefix)
    return {node: value for node, value in values.items() if node not in boundary}


def _copy(graph: fx.Graph, node: fx.Node, values: Values, prefix: str) -> None:
    if "batch" in node.meta:
        values[node] = _number_of_samples(graph, node.meta["batch"], values)
        return
    for other in node.all_input_nodes:
        if other not in values and not _needs_no_data(node, other):
            assert other.op != "placeholder", f"{node.name} reads the input from before its cut"
            _copy(graph, other, values, prefix)
    anything = next(iter(values.values()))
    twin = graph.node_copy(node, lambda other: values.get(other, anything))
    twin.meta = {"qualname": f"{prefix}{node.meta['qualname']}", "val": node.meta["val"]}
    if node.op in ("call_module", "get_attr"):
        twin.target = f"{prefix}{node.target}"
    values[node] = twin


def _needs_no_data(node: fx.Node, other: fx.Node) -> bool:
    """``x.new_zeros(…)`` reads of x but dtype and device, which any boundary tensor has."""
    reads_shape = node.op == "call_method" and str(node.target).startswith("new_")
    return reads_shape and node.args[0] is other


def _number_of_samples(graph: fx.Graph, factor: int, values: Values) -> fx.Node:
    source = next(node for node in values if batch_axis(node.meta.get("val")) is not None)
    size = graph.call_method("size", (values[source], batch_axis(source.meta["val"])))
    return size if factor == 1 else graph.call_function(operator.mul, (size, factor))


def compose(partition: Partition) -> fx.GraphModule:
    """The model rebuilt from its blocks, one after the other; shares the model's modules."""
    whole = partition.trace
    graph = fx.Graph()
    inputs = {node: graph.placeholder(str(node.target)) for node in whole.placeholders}
    walk = Walk(partition, inputs)
    for depth in range(len(partition.blocks)):
        walk.step(graph, depth, "")
    graph.output(walk.values[whole.logits])
    graph.lint()
    return fx.GraphModule(whole.graph_module, graph)


class Walk:
    """One pass through a model's blocks, grafted one by one; its context is computed once."""

    def __init__(self, partition: Partition, inputs: Values) -> None:
        self.partition = partition
        self.inputs = inputs
        self.values = dict(inputs)
        self._sources = block_sources(partition)
        self._data = set(activations(partition.trace))

    def at(self, depth: int) -> dict[str, fx.Node]:
        """What stands for the tensors that block ``depth`` reads, by name."""
        return {node.meta["qualname"]: self.values[node] for node in self._sources[depth]}

    def step(self, graph: fx.Graph, depth: int, prefix: str) -> None:
        boundary = {node: self.values[node] for node in self._sources[depth]}
        boundary |= context_inputs(self.partition.trace, self.inputs)
        context = {
            node: value
            for node, value in self.values.items()
            if node not in self._data and node not in boundary
        }
        nodes = self.partition.blocks[depth].nodes
        self.values = graft(graph, nodes, boundary, context, prefix) | self.values


def context_inputs(whole: Trace, inputs: Values) -> Values:
    """The inputs that blocks after a cut may read: all but the data, and the data if token ids."""
    data = primary_input(whole)
    may_all = not data.meta["val"].is_floating_point()
    return {node: value for node, value in inputs.items() if may_all or node is not data}


def block_sources(whole: Partition) -> list[list[fx.Node]]:
    """The nodes that each block reads: the inputs, then those of every cut."""
    carried = whole.carried or ((),) * len(whole.cuts)
    return [
        whole.trace.placeholders,
        *(
            [whole.trace.nodes[name] for name in (*point.names, *others)]
            for point, others in zip(whole.cuts, carried, strict=True)
        ),
    ]


def state_of(whole: Trace) -> dict[str, Any]:
    """Every module and attribute that the graph calls, by its name there."""
    return {
        str(node.target): operator.attrgetter(str(node.target))(whole.graph_module)
        for node in whole.graph_module.graph.nodes
        if node.op in ("call_module", "get_attr")
    }


def frozen_twins(teacher: Trace) -> dict[str, Any]:
    """Every module and attribute that the teacher's graph reads, frozen, sharing storage."""
    twins: dict[int, nn.Module] = {}
    return {
        target: _frozen_twin(own, twins) if isinstance(own, nn.Module) else own.detach()
        for target, own in state_of(teacher).items()
    }


def root_of(state: Mapping[str, Any]) -> nn.Module:
    """A module in which every name of ``state`` leads to what it names, for an fx graph.

    What lies inside of a module that is named, too, is reached through it: setting it there would
    change that module.
    """
    root = nn.Module()
    for name in sorted(state):
        path, _, last = name.rpartition(".")
        if any(f"{name}.".startswith(f"{other}.") and other != name for other in state):
            continue
        owner = root
        for part in path.split(".") if path else ():
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        setattr(owner, last, state[name])
    return root


def _frozen_twin(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """A copy that shares storage with ``module`` but not its mode, hooks or gradients."""
    if id(module) in twins:
        return twins[id(module)]
    twin = copy.copy(module)
    twins[id(module)] = twin
    for hooks in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(twin, hooks, OrderedDict())  # those before a call stay: weight normalisation is one
    twin._parameters = {
        name: None if own is None else nn.Parameter(own.detach(), requires_grad=False)
        for name, own in module._parameters.items()
    }
    twin._buffers = dict(module._buffers)
    twin._modules = {
        name: None if child is None else _frozen_twin(child, twins)
        for name, child in module._modules.items()
    }
    twin.training = False
    return twin
