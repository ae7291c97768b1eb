"""What nodes, blocks and stepping stones cost, counted before anything is trained.

The unit is the multiply-add of convolutions and matrix products (two floating-point operations),
per sample. Element-wise work is not counted; it is within 4 % for usual networks.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from kdsurgeon.layouts import Activation
from kdsurgeon.tracing import BATCH, Trace, evaluate, memory_of, operation_name


@dataclass(frozen=True)
class Cost:
    """Per sample: multiply-adds, activation bytes; in all: parameters."""

    multiply_adds: int = 0
    parameters: int = 0
    activation_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.multiply_adds + other.multiply_adds,
            self.parameters + other.parameters,
            self.activation_bytes + other.activation_bytes,
        )


def node_costs(trace: Trace) -> dict[str, Cost]:
    """The cost of every node by its qualified name; a shared weight counts where it is first used.

    >>> import torch
    >>> from kdsurgeon.tracing import trace
    >>> layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5))
    >>> costs = node_costs(trace(layers, torch.zeros(1, 1, 4, 4)))
    >>> costs["0"].multiply_adds, costs["2"].multiply_adds, costs["2"].parameters
    (72, 40, 45)
    """
    kept = trace.graph_module.meta
    if "costs" not in kept:
        kept["costs"] = _count(trace)
    return kept["costs"]


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def module_cost(module: nn.Module, source: Activation, dtype: torch.dtype) -> Cost:
    """The cost of running ``module`` on one sample of ``source``."""
    shape = list(source.shape)
    shape.insert(source.axes.index("B"), 1)
    bare = copy.deepcopy(module).to("meta").eval()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        out = bare(torch.empty(shape, dtype=dtype, device="meta"))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Cost(flops.get_total_flops() // 2, parameters, out.numel() * out.element_size())


def _count(trace: Trace) -> dict[str, Cost]:
    model = trace.graph_module
    counted: set[int] = set()
    costs = {}
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        for node in model.graph.nodes:
            before = flops.get_total_flops()
            if _may_multiply(node, model):
                evaluate(node, model)
            own = flops.get_total_flops() - before + 2 * _recurrent_multiply_adds(node, model)
            computes = node.op not in ("placeholder", "output", "get_attr")
            size = _bytes(node) if computes and isinstance(node.meta["val"], Tensor) else 0
            costs[node.meta["qualname"]] = Cost(
                multiply_adds=own // (2 * BATCH),
                parameters=_new_parameters(node, model, counted),
                activation_bytes=size // BATCH,
            )
    return costs


_ELEMENT_WISE = frozenset(
    {
        "abs", "add", "after", "arange", "adaptive_avg_pool2d", "avg_pool2d", "batch_norm", "cat",
        "chunk", "clamp", "clone", "contiguous", "detach", "div", "dropout", "exp", "expand",
        "flatten", "gelu", "getitem", "group_norm", "hardsigmoid", "hardswish", "layer_norm",
        "max_pool2d", "mean", "mul", "neg", "ones", "pad", "permute", "pow", "relu", "relu6",
        "repeat", "reshape", "rms_norm", "roll", "sigmoid", "silu", "size", "softmax", "split",
        "sqrt", "square", "squeeze", "stack", "sub", "sum", "to", "transpose", "truediv", "unbind",
        "unflatten", "unsqueeze", "var", "view", "zeros",
    }
)  # fmt: skip


def _may_multiply(node: fx.Node, model: fx.GraphModule) -> bool:
    """Whether there may be a convolution or matrix product in it, which is slower to find out."""
    if node.op in ("placeholder", "output", "get_attr") or "whole" in node.meta:
        return False
    if node.op == "call_module":
        layer = model.get_submodule(str(node.target))
        is_known = type(layer).__module__.startswith("torch.nn.modules")
        return not is_known or any(weight.ndim > 1 for weight in layer.parameters())
    return operation_name(node) not in _ELEMENT_WISE


def _recurrent_multiply_adds(node: fx.Node, model: fx.GraphModule) -> int:
    """Of a recurrent layer, which multiplies each of its matrices once for every token."""
    layer = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(layer, nn.RNNBase) or not isinstance(node.args[0], fx.Node):
        return 0
    sequence = node.args[0].meta["val"]
    tokens = sequence.numel() // sequence.shape[-1]
    return tokens * sum(weight.numel() for weight in layer.parameters() if weight.ndim > 1)


def _bytes(node: fx.Node) -> int:
    """How much memory the node's tensor takes that none of its inputs' does."""
    value = node.meta["val"]
    if any(memory_of(other) == memory_of(node) for other in node.all_input_nodes):
        return 0
    return value.numel() * value.element_size()


def _new_parameters(node: fx.Node, model: nn.Module, counted: set[int]) -> int:
    """How many parameters ``node`` reads that no node before it read."""
    if node.op not in ("call_module", "get_attr"):
        return 0
    owner = operator.attrgetter(str(node.target))(model)
    own = owner.parameters() if isinstance(owner, nn.Module) else [owner]
    new = [p for p in own if isinstance(p, nn.Parameter) and id(p) not in counted]
    counted.update(map(id, new))
    return sum(parameter.numel() for parameter in new)
