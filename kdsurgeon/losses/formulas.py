"""The losses of block-wise logit distillation as pure functions of logits.

All stones are stacked along one leading axis, so that the number of operations does not depend on
how many stones there are. Source: Yu et al., arXiv 2411.01547; each decision that is ours says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def block_kd_loss(
    logits: Logits,
    target: Tensor,
    *,
    weights: Sequence[float] | None = None,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    cross_weight: float = 0.0,
    temperature: float = 4.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    distance: Distance = kl,
) -> Losses:
    """``ce_weight · L_task + kd_weight · L_distill + cross_weight · L_cross``.

    With student S, stones N_i, teacher T and stone weights w_i (Yu et al., section 3):
    L_task = CE(S, y) + Σ w_i CE(N_i, y); L_distill = d(S, T) + Σ w_i d(N_i, T);
    L_cross = d(S, E) + Σ d(N_i, E) with E the mean of the stones. Ours: E is detached, and the
    w_i do not enter L_cross.

    Args:
        target: class indices (batch,), or the share of every class (batch, classes), as mixup and
            cutmix make them.
        weights: one w_i for each stone, 2^-(n-i) when left out.
        ignore_index: the label of samples that no term counts.

    >>> logits = Logits(torch.zeros(2, 3), torch.zeros(1, 2, 3), torch.zeros(2, 3), depths=(1,))
    >>> round(block_kd_loss(logits, torch.tensor([0, 1])).total.item(), 3)  # 2 · ln 3
    2.197
    """
    count = len(logits.stones)
    weights = halving_weights(count) if weights is None else weights
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} stones")
    everyone = _at_least_float32(torch.cat([logits.student[None], logits.stones]))
    teacher = _at_least_float32(logits.teacher)
    if ignore_index is not None and not target.is_floating_point():
        counted = target != ignore_index
        everyone, teacher, target = everyone[:, counted], teacher[counted], target[counted]
        if not len(target):
            return Losses(everyone.sum(), {})  # zero, and still part of the graph
    factors = everyone.new_tensor([1.0, *weights])
    names = ["student", *(f"stone {depth}" for depth in logits.depths)]
    parts: dict[str, Tensor] = {}
    total = everyone.new_zeros(())
    if ce_weight:
        task = _cross_entropy(everyone, target, label_smoothing)
        total = total + ce_weight * (factors * task).sum()
        parts |= _by_name("ce", names, task)
    if kd_weight:
        distill = distance(everyone, teacher, target, temperature)
        total = total + kd_weight * (factors * distill).sum()
        parts |= _by_name("kd", names, distill)
    if cross_weight and count:
        ensemble = everyone[1:].mean(0).detach()
        cross = distance(everyone, ensemble, target, temperature)
        total = total + cross_weight * cross.sum()
        parts |= _by_name("cross", names, cross)
    return Losses(total, parts)


def task_loss(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Losses:
    """Cross-entropy alone, for a model that learns without a teacher."""
    if ignore_index is not None and not target.is_floating_point():
        counted = target != ignore_index
        logits, target = logits[counted], target[counted]
        if not len(target):
            return Losses(logits.sum(), {})
    task = functional.cross_entropy(logits, target, label_smoothing=label_smoothing)
    return Losses(task, {"ce student": task.detach()})


def _at_least_float32(logits: Tensor) -> Tensor:
    """Logits of mixed precision are too coarse for a logarithm of small probabilities."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _cross_entropy(everyone: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """(sets, batch, classes) → (sets,)."""
    sets, batch, _ = everyone.shape
    losses = functional.cross_entropy(
        everyone.flatten(0, 1),
        target.repeat(sets, *(1,) * (target.ndim - 1)),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view(sets, batch).mean(-1)


def _by_name(name: str, who: list[str], values: Tensor) -> dict[str, Tensor]:
    return {f"{name} {one}": value for one, value in zip(who, values.detach(), strict=True)}
