"""The losses of block-wise logit distillation as pure functions of logits.

All stones are stacked along one leading axis, so that the number of operations does not depend on
how many stones there are. Source: Yu et al., arXiv 2411.01547; each decision that is ours says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Distance = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""``d(student, teacher, target, temperature)``: how far (…, batch, classes) logits are from the
teacher's (batch, classes), mean over the batch, one value for each leading index; the gradient
flows into ``student`` only. ``target`` is (batch,), or shares (batch, classes)."""


@dataclass(frozen=True)
class Logits:
    """What a training graph returns for one batch.

    ``student`` and ``teacher`` are (batch, classes); ``stones`` is (stones, batch, classes) in
    the order of ``depths``, with no stones an empty first axis.
    """

    student: Tensor
    stones: Tensor
    teacher: Tensor
    depths: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.depths) == len(self.stones)
        assert self.student.shape == self.teacher.shape == self.stones.shape[1:], (
            self.student.shape,
            self.stones.shape,
            self.teacher.shape,
        )


@dataclass(frozen=True)
class Losses:
    """The scalar to minimise, and every component of it by name, unweighted and detached."""

    total: Tensor
    parts: dict[str, Tensor]


def kl(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """τ² · KL(softmax(teacher/τ) ‖ softmax(student/τ)), mean over the batch.

    Hinton et al. 2015, section 2; τ² keeps gradients comparable across temperatures.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> kl(logits, logits, torch.tensor([0, 1]), 4.0).item()
    0.0
    """
    wanted = functional.log_softmax(teacher.detach() / temperature, dim=-1)
    given = functional.log_softmax(student / temperature, dim=-1)
    divergence = (wanted.exp() * (wanted - given)).sum(-1)
    return divergence.mean(-1) * temperature**2


def halving_weights(count: int) -> tuple[float, ...]:
    """``2^-(n-i)`` for i = 1…n: the last stone counts 1, the first least (Yu et al., the stones'
    terms are divided by 2^(n-i)).

    >>> halving_weights(3)
    (0.25, 0.5, 1.0)
    """
    return tuple(0.5 ** (count - depth) for depth in range(1, count + 1))


def task_loss(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Losses:
    """Cross-entropy alone, for a model that learns without a teacher."""
    target, logits = without_ignored(target, ignore_index, logits)
    if not len(target):
        return no_sample(logits)
    task = functional.cross_entropy(logits, target, label_smoothing=label_smoothing)
    return Losses(task, {"ce student": task.detach()})


def without_ignored(target: Tensor, label: int | None, *logits: Tensor) -> tuple[Tensor, ...]:
    """The target and each (…, batch, classes) without the samples of this label."""
    if label is None or target.is_floating_point():
        return target, *logits
    counted = target != label
    return target[counted], *(each[..., counted, :] for each in logits)


def no_sample(logits: Tensor) -> Losses:
    """Zero, and still part of the graph: every sample of the batch is left out."""
    return Losses(logits.sum(), {})


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits of mixed precision are too coarse for a logarithm of small probabilities."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def cross_entropy(everyone: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """(sets, batch, classes) → (sets,)."""
    sets, batch, _ = everyone.shape
    losses = functional.cross_entropy(
        everyone.flatten(0, 1),
        target.repeat(sets, *(1,) * (target.ndim - 1)),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view(sets, batch).mean(-1)
