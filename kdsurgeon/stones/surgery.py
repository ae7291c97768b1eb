"""Graft blocks of one graph into another: the only place where graphs are put together.

Grafting copies nodes and shares weights. What a graft would overwrite in place it computes out of
place, because a boundary tensor has two readers: the next block and the adapter.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from kdsurgeon.partitioning import Partition
from kdsurgeon.tracing import IN_PLACE_OPERATORS, Trace, writes_in_place


def graft(
    graph: fx.Graph, nodes: Iterable[fx.Node], source: fx.Node, value: fx.Node, prefix: str
) -> fx.Node:
    """Copy ``nodes`` into ``graph``, reading ``value`` where they read ``source``.

    Modules and attributes are called under ``prefix``. Values that do not depend on the data are
    copied along. Returns the copy of the last node.

    Raises:
        AssertionError: the nodes read another value from before ``source``; names it.
    """
    copies = {source: value}
    last = value
    for node in nodes:
        last = _copy(graph, node, copies, prefix)
    return last


def _copy(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node], prefix: str) -> fx.Node:
    for other in node.all_input_nodes:
        if other not in copies:
            assert other.op != "placeholder", f"{node.name} reads the input from before its cut"
            _copy(graph, other, copies, prefix)  # context: recomputed on this side of the cut
    twin = graph.node_copy(node, copies.__getitem__)
    twin.meta = {"qualname": f"{prefix}{node.meta['qualname']}", "val": node.meta["val"]}
    if node.op in ("call_module", "get_attr"):
        twin.target = f"{prefix}{node.target}"
    _write_out_of_place(twin)
    copies[node] = twin
    return twin


def _write_out_of_place(node: fx.Node) -> None:
    """A boundary tensor has two readers in the training graph; none may overwrite it."""
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    target = node.target
    if node.op == "call_method" and str(target).endswith("_") and not str(target).endswith("__"):
        if hasattr(Tensor, str(target)[:-1]):
            node.target = str(target)[:-1]
    elif node.op == "call_function":
        name = getattr(target, "__name__", "")
        if target in IN_PLACE_OPERATORS:
            plain = name[1:]  # iadd → add, ior → or_
            node.target = getattr(operator, plain, None) or getattr(operator, f"{plain}_")
        elif name.endswith("_") and callable(getattr(torch, name[:-1], None)):
            node.target = getattr(torch, name[:-1])


def compose(partition: Partition) -> fx.GraphModule:
    """The model rebuilt from its blocks, one after the other; shares the model's modules."""
    graph = fx.Graph()
    value = graph.placeholder("input")
    for block, source in zip(partition.blocks, block_sources(partition), strict=True):
        value = graft(graph, block.nodes, source, value, "")
    graph.output(value)
    graph.lint()
    return fx.GraphModule(partition.trace.graph_module, graph)


def block_sources(whole: Partition) -> list[fx.Node]:
    """The node that each block reads: the input, then every cut."""
    inputs = [node for node in whole.trace.graph_module.graph.nodes if node.op == "placeholder"]
    return inputs + [whole.trace.nodes[point.name] for point in whole.cuts]


def module_nodes(trace: Trace) -> list[fx.Node]:
    nodes = trace.graph_module.graph.nodes
    return [node for node in nodes if node.op in ("call_module", "get_attr")]


def student_modules(student: Partition) -> dict[str, Any]:
    """The student's own modules; for one that writes in place, a twin that does not."""
    found: dict[str, Any] = {}
    for node in module_nodes(student.trace):
        target = str(node.target)
        found[target] = operator.attrgetter(target)(student.trace.model)
        if node.op == "call_module" and writes_in_place(node, student.trace.model):
            assert not list(found[target].parameters()), f"{target} writes in place and has weights"
            found[target] = copy.copy(found[target])
            found[target].inplace = False
    return found


def frozen_twins(teacher: Trace) -> dict[str, Any]:
    """Every module and attribute that the teacher's graph reads, frozen, sharing storage."""
    twins: dict[int, nn.Module] = {}
    found: dict[str, Any] = {}
    for node in module_nodes(teacher):
        own = operator.attrgetter(str(node.target))(teacher.model)
        found[str(node.target)] = (
            _frozen_twin(own, twins) if isinstance(own, nn.Module) else own.detach()
        )
    return found


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
    if getattr(twin, "inplace", False):
        twin.__dict__["inplace"] = False
    twin.training = False
    return twin
