"""Divide a graph into programs, each of them run by whoever holds the weights that it reads.

Consecutive nodes of one place become one program, called by the graph as a module. Weights that
are fetched by a node of their own are fetched in every program that reads them: what leaves a
program is never a weight.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import fx, nn

from kdsurgeon.stones.surgery import root_of

Run = Callable[[Hashable, fx.GraphModule], nn.Module]


def divide(
    graph: fx.Graph,
    state: Mapping[str, Any],
    place_of: Callable[[fx.Node], Hashable],
    run: Run,
) -> fx.GraphModule:
    """The graph with a module in place of each run of nodes of one place.

    Args:
        state: every module and attribute that the graph calls, by name.
        place_of: where a node's weights are held; None for a node that stays in the graph. What
            grafting inserted goes with the node after it.
        run: makes the module of a place and its program, which takes and returns tuples.

    >>> traced = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    >>> state = dict(traced.named_modules())
    >>> divided = divide(traced.graph, state, lambda node: node.op == "call_module" or None,
    ...                  lambda _, program: program)
    >>> [node.op for node in divided.graph.nodes]
    ['placeholder', 'call_module', 'call_function', 'output']
    """
    found = _Division(graph, state, place_of, run)
    for node in graph.nodes:
        found.take(node)
    found.outer.lint()
    return fx.GraphModule(root_of(found.state), found.outer)


class _Division:
    def __init__(
        self,
        graph: fx.Graph,
        state: Mapping[str, Any],
        place_of: Callable[[fx.Node], Hashable],
        run: Run,
    ) -> None:
        self.graph, self.given, self.place_of, self.run = graph, state, place_of, run
        self.outer = fx.Graph()
        self.state: dict[str, Any] = {}
        self.values: dict[fx.Node, fx.Node] = {}
        self.open: list[fx.Node] = []
        self.place: Hashable = None
        self.waiting: list[fx.Node] = []  # for the node that they were inserted for

    def take(self, node: fx.Node) -> None:
        if node.op == "get_attr":  # where it is read
            return
        place = None if node.op in ("placeholder", "output") else self.place_of(node)
        if place is None and _is_inserted(node):
            self.waiting.append(node)
            return
        if self.open and place != self.place:
            self._close()
        waiting, self.waiting = self.waiting, []
        if place is not None:
            self.place = place
            self.open += [*waiting, node]
            return
        for each in (*waiting, node):
            for other in each.all_input_nodes:
                if other.op == "get_attr" and other not in self.values:
                    self.values[other] = self._copy(self.outer, other, self.values, self.state)
            self.values[each] = self._copy(self.outer, each, self.values, self.state)

    def _close(self) -> None:
        """One program of the nodes that are open."""
        inside = set(self.open)
        read = dict.fromkeys(other for node in self.open for other in node.all_input_nodes)
        inputs = [node for node in read if node not in inside and node.op != "get_attr"]
        outputs = [node for node in self.open if any(user not in inside for user in node.users)]
        graph, state = fx.Graph(), dict[str, Any]()
        values = {node: graph.placeholder(node.name) for node in inputs}
        for node, twin in values.items():
            twin.meta = dict(node.meta)
        for node in [*(each for each in read if each.op == "get_attr"), *self.open]:
            values[node] = self._copy(graph, node, values, state)
        graph.output(tuple(values[node] for node in outputs))
        name = f"programs.{sum(key.startswith('programs.') for key in self.state)}"
        self.state[name] = self.run(self.place, fx.GraphModule(root_of(state), graph))
        found = self.outer.call_module(name, tuple(self.values[node] for node in inputs))
        for index, node in enumerate(outputs):
            self.values[node] = self.outer.call_function(operator.getitem, (found, index))
            self.values[node].meta = dict(node.meta)
        self.open = []

    def _copy(
        self,
        graph: fx.Graph,
        node: fx.Node,
        values: Mapping[fx.Node, fx.Node],
        state: dict[str, Any],
    ) -> fx.Node:
        if node.op in ("call_module", "get_attr"):
            state[str(node.target)] = self.given[str(node.target)]
        return graph.node_copy(node, values.__getitem__)


def _is_inserted(node: fx.Node) -> bool:
    """Whether it is a copy, or the size of a batch, that grafting put before what reads it.

    A copy belongs to its reader: torch lets nobody overwrite what enters a program.
    """
    inserted = node.op == "call_method" or node.target is operator.mul
    return inserted and "qualname" not in node.meta
