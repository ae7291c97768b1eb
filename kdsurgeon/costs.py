"""What nodes, blocks and stepping stones cost, counted before anything is trained.

The unit is the multiply-add of convolutions and matrix products (two floating-point operations),
per sample. Element-wise work is not counted; it is within 4 % for usual networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kdsurgeon.tracing import Trace, call_on_fakes


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
    return _Counter(trace).count()


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def module_cost(module: nn.Module, inputs: Sequence[tuple[int, ...]], dtype: Any) -> Cost:
    """The cost of running ``module`` once on inputs of these shapes (without the batch axis)."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, FlopCounterMode(display=False) as flops, torch.no_grad():
        before = module.training
        module.eval()
        values = [torch.empty((1, *shape), dtype=dtype) for shape in inputs]
        out = module(*values)
        module.train(before)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Cost(flops.get_total_flops() // 2, parameters, out.numel() * out.element_size())


class _Counter(fx.Interpreter):
    """Runs a trace on fake tensors of batch one and books what each node adds."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.graph_module)
        self.trace = trace
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.flops = FlopCounterMode(display=False)
        self.counted: set[int] = set()
        self.costs: dict[str, Cost] = {}

    def count(self) -> dict[str, Cost]:
        with self.fake, self.flops, torch.no_grad():
            # two samples, halved: some models treat a batch of one differently
            example = torch.empty_like(self.trace.example[:1]).repeat(2, 1, 1, 1)
            self.run(example)
        return self.costs

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return call_on_fakes(self.fetch_attr(str(target)), self.fake, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        before = self.flops.get_total_flops()
        value = super().run_node(n)
        size = value.numel() * value.element_size() if isinstance(value, Tensor) else 0
        self.costs[n.meta["qualname"]] = Cost(
            multiply_adds=(self.flops.get_total_flops() - before) // 4,
            parameters=self._new_parameters(n),
            activation_bytes=size // 2 if n.op not in ("placeholder", "output", "get_attr") else 0,
        )
        return value

    def _new_parameters(self, node: fx.Node) -> int:
        if node.op == "call_module":
            parameters = self.fetch_attr(str(node.target)).parameters()
        elif node.op == "get_attr" and isinstance(self.fetch_attr(str(node.target)), nn.Parameter):
            parameters = [self.fetch_attr(str(node.target))]
        else:
            return 0
        new = [parameter for parameter in parameters if id(parameter) not in self.counted]
        self.counted.update(id(parameter) for parameter in new)
        return sum(parameter.numel() for parameter in new)
