"""What every view says about a block: where it ends, what it costs and which operations it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, fx, nn

from kdsurgeon.costs import Cost
from kdsurgeon.partitioning import Partition
from kdsurgeon.views.units import printable

_MODULE_WORDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), "BN"),
    ((nn.LayerNorm,), "LN"),
    ((nn.MaxPool2d, nn.AdaptiveMaxPool2d), "max pool"),
    ((nn.AvgPool2d, nn.AdaptiveAvgPool2d), "avg pool"),
    ((nn.ConvTranspose2d,), "deconv"),
    ((nn.Linear,), "linear"),
    ((nn.Flatten,), "flatten"),
)
_FUNCTION_WORDS = {
    "iadd": "add",
    "add": "add",
    "mul": "multiply",
    "imul": "multiply",
    "cat": "concat",
    "concat": "concat",
    "relu": "ReLU",
    "relu6": "ReLU6",
    "gelu": "GELU",
    "silu": "SiLU",
    "hardswish": "Hardswish",
    "hardsigmoid": "Hardsigmoid",
    "adaptive_avg_pool2d": "avg pool",
    "avg_pool2d": "avg pool",
    "max_pool2d": "max pool",
    "boolean_dispatch": "max pool",
    "linear": "linear",
    "conv2d": "conv",
    "batch_norm": "BN",
    "layer_norm": "LN",
}
_SILENT_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d)
_SILENT_FUNCTIONS = frozenset({"getattr", "getitem", "size", "dropout", "contiguous"})


@dataclass(frozen=True)
class BlockFacts:
    """One block: its last node, that node's shape, its cost and share of the model's compute.

    ``operations`` counts what the block runs, most frequent first. ``label`` is the block's number,
    or "head" for the last one.
    """

    label: str
    end: str
    shape: tuple[int, ...]
    share: float
    cost: Cost
    operations: tuple[tuple[str, int], ...]


def describe_blocks(partition: Partition) -> tuple[BlockFacts, ...]:
    """The facts of every block, from the input to the head.

    >>> import torch
    >>> from kdsurgeon.partitioning import cut, find_cut_points
    >>> from kdsurgeon.tracing import trace
    >>> layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))
    >>> captured = trace(layers, torch.zeros(2, 1, 4, 4))
    >>> first, head = describe_blocks(cut(captured, find_cut_points(captured)[1:2]))
    >>> first.label, first.end, first.shape, first.operations
    ('1', '1', (2, 2, 2), (('conv', 1), ('ReLU', 1)))
    >>> head.label, head.end, head.shape, round(head.share, 2)
    ('head', '3', (5,), 0.36)
    """
    trace = partition.trace
    whole = max(1, partition.cost.multiply_adds)
    ends = [(point.name, point.shape) for point in partition.cuts]
    ends.append((trace.logits.meta["qualname"], tuple(trace.logits.meta["val"].shape[1:])))
    labels = [str(depth) for depth in range(1, len(ends))] + ["head"]
    return tuple(
        BlockFacts(
            label=label,
            end=printable(name),
            shape=shape,
            share=block.cost.multiply_adds / whole,
            cost=block.cost,
            operations=_operations(block.nodes, trace.graph_module),
        )
        for label, (name, shape), block in zip(labels, ends, partition.blocks, strict=True)
    )


def _operations(nodes: Iterable[fx.Node], model: nn.Module) -> tuple[tuple[str, int], ...]:
    words = [_word(node, model) for node in nodes]
    return tuple(Counter(word for word in words if word).most_common())


def _word(node: fx.Node, model: nn.Module) -> str | None:
    """The operation's everyday name; None for what only moves or looks at data."""
    if node.op == "get_attr" or not isinstance(node.meta.get("val"), Tensor):
        return None
    if node.op == "call_module":
        return _module_word(model.get_submodule(str(node.target)))
    name = str(getattr(node.target, "__name__", node.target)).strip("_")
    return None if name in _SILENT_FUNCTIONS else _FUNCTION_WORDS.get(name, name.replace("_", " "))


def _module_word(module: nn.Module) -> str | None:
    if isinstance(module, _SILENT_MODULES):
        return None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups == 1:
            return "conv"
        return "depthwise conv" if module.groups == module.in_channels else "grouped conv"
    for kinds, word in _MODULE_WORDS:
        if isinstance(module, kinds):
            return word
    return type(module).__name__
