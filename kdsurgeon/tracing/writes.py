"""Make writes in place visible as data flow, so that no slice of a graph loses one.

A write through a view changes what other names of the same memory hold. Whoever reads such a name
later reads it here through a node that also takes the write, so that cutting, grafting and dropping
unread nodes follow plain inputs and nothing else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx


def after(tensor: Tensor, write: Any) -> Tensor:
    """``tensor``, once ``write`` has changed the memory that it lies in."""
    return tensor


def connect_writes(graph: fx.Graph) -> None:
    """Let every later reader of overwritten memory depend on the write.

    A reader of the very tensor that was overwritten whole reads the writer's result instead.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    sharing: dict[int | None, list[fx.Node]] = {}
    for node in list(graph.nodes):
        for written in node.meta.get("writes", ()):
            names = sharing.setdefault(memory_of(written), [])
            for other in [*names]:
                later = [user for user in other.users if order.get(user, -1) > order[node]]
                if not later:
                    continue
                now = node
                if not _is_whole_result(node, other, written):
                    now = _insert_after(graph, node, other)
                    names.append(now)
                for user in later:
                    user.replace_input_with(other, now)
        if memory_of(node) is not None:
            sharing.setdefault(memory_of(node), []).append(node)


def memory_of(node: fx.Node) -> int | None:
    """Which memory a node's tensor lies in; views of a tensor lie in the same."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _is_whole_result(node: fx.Node, other: fx.Node, written: fx.Node) -> bool:
    """Whether the writer's result is ``other`` as it is now."""
    result, value = node.meta["val"], other.meta["val"]
    return isinstance(result, Tensor) and other is written and result.shape == value.shape


def _insert_after(graph: fx.Graph, write: fx.Node, tensor: fx.Node) -> fx.Node:
    with graph.inserting_after(write):
        now = graph.call_function(after, (tensor, write))
    now.meta = {
        "val": tensor.meta["val"],
        "qualname": f"{tensor.meta['qualname']}.after.{write.meta['qualname']}",
    }
    return now
