"""What every view says about a block: where it ends, what it costs and which operations it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, fx, nn

from kdsurgeon.costs import Cost
from kdsurgeon.layouts import Activation
from kdsurgeon.partitioning import CutPoint, Partition
from kdsurgeon.views import units

_MODULE_WORDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), "BN"),
    ((nn.LayerNorm,), "LN"),
    ((nn.MaxPool2d, nn.AdaptiveMaxPool2d), "max pool"),
    ((nn.AvgPool2d, nn.AdaptiveAvgPool2d), "avg pool"),
    ((nn.ConvTranspose2d,), "deconv"),
    ((nn.Linear,), "linear"),
    ((nn.Softmax,), "softmax"),
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
    "scaled_dot_product_attention": "attention",
}
_SILENT_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten)
_SILENT_FUNCTIONS = frozenset(
    {
        "chunk", "clone", "contiguous", "detach", "dropout", "expand", "flatten", "getattr",
        "getitem", "permute", "repeat", "reshape", "size", "split", "squeeze", "to", "transpose",
        "type_as", "unbind", "unflatten", "unsqueeze", "view",
    }
)  # fmt: skip


class End(NamedTuple):
    """A tensor that leaves a block: the node's name, and how its values are laid out."""

    name: str
    layout: str


@dataclass(frozen=True)
class BlockFacts:
    """One block: the tensors that leave it, its cost and its share of the model's compute.

    ``operations`` counts what the block runs, most frequent first. ``label`` is the block's number,
    or "head" for the last one.
    """

    label: str
    ends: tuple[End, ...]
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
    >>> first.label, first.ends, first.operations
    ('1', (End(name='1', layout='2×2×2'),), (('conv', 1), ('ReLU', 1)))
    >>> head.label, head.ends, round(head.share, 2)
    ('head', (End(name='3', layout='5'),), 0.36)
    """
    trace = partition.trace
    whole = max(1, partition.cost.multiply_adds)
    ends = [ends_of(point) for point in partition.cuts]
    logits = units.shape(trace.logits.meta["val"].shape[1:])
    ends.append((End(units.printable(trace.logits.meta["qualname"]), logits),))
    labels = [str(depth) for depth in range(1, len(ends))] + ["head"]
    return tuple(
        BlockFacts(
            label=label,
            ends=leaving,
            share=block.cost.multiply_adds / whole,
            cost=block.cost,
            operations=_operations(block.nodes, trace.graph_module),
        )
        for label, leaving, block in zip(labels, ends, partition.blocks, strict=True)
    )


def ends_of(point: CutPoint) -> tuple[End, ...]:
    """The tensors of a cut point, the one that was produced last first."""
    return tuple(End(units.printable(each.name), layout(each)) for each in point.tensors)


def layout(activation: Activation) -> str:
    """A tensor's shape as people read it: positions of a kind stand together.

    >>> layout(Activation("x", (64, 56, 56), "BCHW", (56, 56)))
    '64×56×56'
    >>> layout(Activation("x", (56, 56, 96), "BHWC", (56, 56)))
    '56×56 × 96'
    >>> layout(Activation("x", (197, 192), "BTC", (14, 14), prefix=1))
    '14×14+1 tokens × 192'
    >>> layout(Activation("x", (32, 768), "BTC"))
    '32 tokens × 768'
    """
    if activation.kind == "tokens":
        prefix = f"+{activation.prefix}" if activation.prefix else ""
        where = units.shape(activation.grid) + prefix if activation.grid else activation.positions
        return f"{where} token{'' if where == 1 else 's'} × {activation.channels}"
    if activation.axes == "BHWC":
        return f"{units.shape(activation.shape[:2])} × {activation.channels}"
    return units.shape(activation.shape)


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
