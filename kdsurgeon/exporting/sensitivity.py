"""Find the few nodes whose rounding to int8 costs most, by rounding one at a time.

The cost of a node is how far the logits move when it alone is in int8, its inputs, its weights and
its result: the mean Kullback-Leibler divergence from the fp32 logits over calibration images, so no
label is needed and none is used up. To leave out one node of an int8 file instead would say less: a
value that rounds badly stays rounded as long as either side of it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

IMAGES = 128  # calibration images that the divergence is measured on

Quantize = Callable[[Collection[str]], onnx.ModelProto]
Logits = Callable[[onnx.ModelProto], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """What one node costs when it is in int8."""

    node: str
    cost: float  # nats

    def __str__(self) -> str:
        return f"{self.node}: {self.cost:.2g} nats"


def sensitivities(
    names: Sequence[str],
    candidates: Sequence[str],
    wanted: Tensor,
    quantize: Quantize,
    logits: Logits,
) -> tuple[Sensitivity, ...]:
    """The cost of every node of ``candidates``, dearest first.

    ``names`` are all nodes of the graph, ``wanted`` (n, classes) the fp32 file's logits,
    ``quantize`` makes a model without the nodes it is given, and ``logits`` runs one, (n, classes),
    on the same images.
    """
    found = [
        Sensitivity(
            node,
            divergence(wanted, logits(quantize([name for name in names if name != node]))),
        )
        for node in candidates
    ]
    return tuple(sorted(found, key=lambda each: -each.cost))


def divergence(wanted: Tensor, found: Tensor) -> float:
    """Mean of KL(wanted ‖ found) over samples, in nats; both are logits (n, classes).

    >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    0.0
    """
    first, second = (each.double().log_softmax(1) for each in (wanted, found))
    return torch.nn.functional.kl_div(second, first, reduction="batchmean", log_target=True).item()
