"""The objective of block-wise logit distillation, over whatever computes its terms best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kdsurgeon.errors import UsageError
from kdsurgeon.losses.formulas import (
    Distance,
    Logits,
    Losses,
    at_least_float32,
    cross_entropy,
    halving_weights,
    kl,
    no_sample,
    without_ignored,
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

    Raises:
        UsageError: target, weights, temperature or smoothing do not fit the logits.

    >>> logits = Logits(torch.zeros(2, 3), torch.zeros(1, 2, 3), torch.zeros(2, 3), depths=(1,))
    >>> round(block_kd_loss(logits, torch.tensor([0, 1])).total.item(), 3)  # 2 · ln 3
    2.197
    """
    count = len(logits.stones)
    weights = halving_weights(count) if weights is None else weights
    _check(logits, target, weights, temperature, label_smoothing)
    everyone = torch.cat([logits.student[None], logits.stones])
    teacher = logits.teacher.detach()
    names = ["student", *(f"stone {depth}" for depth in logits.depths)]
    if fused and can_fuse(everyone, teacher, target, distance) is None:
        terms = partial(
            fused_ce_kl,
            target=target,
            temperature=temperature,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
    else:
        everyone, teacher = at_least_float32(everyone), at_least_float32(teacher)
        target, everyone, teacher = without_ignored(target, ignore_index, everyone, teacher)
        if not len(target):
            return no_sample(everyone)
        terms = partial(
            _stacked,
            target=target,
            temperature=temperature,
            label_smoothing=label_smoothing,
            distance=distance,
        )
    factors = (1.0, *weights)
    total, ce, kd = terms(
        everyone,
        teacher,
        ce_factors=[ce_weight * factor for factor in factors],
        kd_factors=[kd_weight * factor for factor in factors],
    )
    parts = (_by_name("ce", names, ce) if ce_weight else {}) | (
        _by_name("kd", names, kd) if kd_weight else {}
    )
    if cross_weight and count:
        ensemble = everyone[1:].detach().mean(0)
        cross_total, _, cross = terms(
            everyone,
            ensemble,
            ce_factors=[0.0] * len(factors),
            kd_factors=[cross_weight] * len(factors),
        )
        total = total + cross_total
        parts |= _by_name("cross", names, cross)
    return Losses(total, parts)


def _check(
    logits: Logits,
    target: Tensor,
    weights: Sequence[float],
    temperature: float,
    label_smoothing: float,
) -> None:
    """What needs no look at the numbers on the device."""
    count, (batch, classes) = len(logits.stones), logits.student.shape
    indices = target.dtype == torch.int64 and target.shape == (batch,)
    shares = target.is_floating_point() and target.shape == (batch, classes)
    if not indices and not shares:
        raise UsageError(
            f"the target is {target.dtype} of shape {tuple(target.shape)}.",
            logits=f"{batch} samples, {classes} classes",
            fix=f"give class indices, int64 ({batch},), or shares of classes ({batch}, {classes})",
        )
    if len(weights) != count:
        raise UsageError(
            f"{len(weights)} weights for {count} stones.", fix="give one weight for each stone"
        )
    if not 0 < temperature < math.inf:
        raise UsageError(f"a temperature of {temperature} is not a number above 0.")
    if not 0 <= label_smoothing < 1:
        raise UsageError(f"a label smoothing of {label_smoothing} is not in 0 … 1.")


def _stacked(
    everyone: Tensor,
    teacher: Tensor,
    *,
    target: Tensor,
    temperature: float,
    label_smoothing: float,
    distance: Distance,
    ce_factors: Sequence[float],
    kd_factors: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted sum, CE of each set, distance of each set), in operations on all sets at once."""
    ce = kd = everyone.detach()[:, 0, 0]  # not looked at where the factors are 0
    sums = []
    if any(ce_factors):
        ce = cross_entropy(everyone, target, label_smoothing)
        sums.append((everyone.new_tensor(ce_factors) * ce).sum())
    if any(kd_factors):
        kd = distance(everyone, teacher, target, temperature)
        sums.append((everyone.new_tensor(kd_factors) * kd).sum())
    return (sum(sums[1:], sums[0]) if sums else 0 * everyone.sum()), ce, kd


def _by_name(name: str, who: list[str], values: Tensor) -> dict[str, Tensor]:
    return {f"{name} {one}": value for one, value in zip(who, values.detach(), strict=True)}
