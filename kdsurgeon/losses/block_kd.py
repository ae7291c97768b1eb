"""The objective of block-wise logit distillation, over whatever computes its terms best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdsurgeon.losses.formulas import (
    Distance,
    Logits,
    Losses,
    at_least_float32,
    cross_entropy,
    halving_weights,
    kl,
)
from kdsurgeon.losses.fused import can_fuse, fused_ce_kl


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
    fused: bool = True,
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
        fused: use one kernel for all terms of all stones where :func:`can_fuse` allows it: the
            logits on a CUDA device, the distance kl.

    >>> logits = Logits(torch.zeros(2, 3), torch.zeros(1, 2, 3), torch.zeros(2, 3), depths=(1,))
    >>> round(block_kd_loss(logits, torch.tensor([0, 1])).total.item(), 3)  # 2 · ln 3
    2.197
    """
    count = len(logits.stones)
    weights = halving_weights(count) if weights is None else weights
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} stones")
    everyone = torch.cat([logits.student[None], logits.stones])
    teacher = logits.teacher.detach()
    names = ["student", *(f"stone {depth}" for depth in logits.depths)]
    with_ensemble = bool(cross_weight) and count > 0
    if fused and can_fuse(everyone, teacher, target, distance) is None:
        terms = _fused_terms
    else:
        terms = _stacked_terms
        everyone, teacher = at_least_float32(everyone), at_least_float32(teacher)
        if ignore_index is not None and not target.is_floating_point():
            counted = target != ignore_index
            everyone, teacher, target = everyone[:, counted], teacher[counted], target[counted]
            if not len(target):
                return Losses(everyone.sum(), {})  # zero, and still part of the graph
    total, ce, kd = terms(
        everyone, teacher, target, temperature, distance, label_smoothing, ignore_index,
        [factor * ce_weight for factor in (1.0, *weights)],
        [factor * kd_weight for factor in (1.0, *weights)],
    )  # fmt: skip
    parts = (_by_name("ce", names, ce) if ce_weight else {}) | (
        _by_name("kd", names, kd) if kd_weight else {}
    )
    if with_ensemble:
        ensemble = at_least_float32(everyone[1:].detach()).mean(0).to(everyone.dtype)
        cross_total, _, cross = terms(
            everyone, ensemble, target, temperature, distance, label_smoothing, ignore_index,
            [0.0] * (count + 1), [cross_weight] * (count + 1),
        )  # fmt: skip
        total = total + cross_total
        parts |= _by_name("cross", names, cross)
    return Losses(total, parts)


def _stacked_terms(
    everyone: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float,
    distance: Distance,
    label_smoothing: float,
    ignore_index: int | None,
    ce_factors: Sequence[float],
    kd_factors: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, CE of each set, distance of each set) by operations on all sets at once."""
    zeros = everyone.new_zeros(len(everyone))
    total = everyone.new_zeros(())
    ce, kd = zeros, zeros
    if any(ce_factors):
        ce = cross_entropy(everyone, target, label_smoothing)
        total = total + (everyone.new_tensor(ce_factors) * ce).sum()
    if any(kd_factors):
        kd = distance(everyone, teacher, target, temperature)
        total = total + (everyone.new_tensor(kd_factors) * kd).sum()
    return total, ce, kd


def _fused_terms(
    everyone: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float,
    distance: Distance,
    label_smoothing: float,
    ignore_index: int | None,
    ce_factors: Sequence[float],
    kd_factors: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by one kernel."""
    return fused_ce_kl(
        everyone,
        teacher,
        target,
        temperature,
        ce_factors=ce_factors,
        kd_factors=kd_factors,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )


def _by_name(name: str, who: list[str], values: Tensor) -> dict[str, Tensor]:
    return {f"{name} {one}": value for one, value in zip(who, values.detach(), strict=True)}
