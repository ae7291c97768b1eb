"""Decoupled knowledge distillation: the right class and the others, weighted apart."""

import torch
from torch import Tensor
from torch.nn import functional

from kdsurgeon import UsageError

RIGHT_CLASS_WEIGHT = 1.0  # α of the paper
OTHER_CLASSES_WEIGHT = 8.0  # β of the paper on CIFAR-100 for resnet32x4 → resnet8x4


def dkd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """``τ² (α · TCKD + β · NCKD)``, mean over the batch (Zhao et al., CVPR 2022, equation 7).

    Args:
        student: logits (…, batch, classes); the gradient flows here only.
        teacher: logits (batch, classes).
        target: class indices (batch,).

    >>> logits = torch.tensor([[3.0, 1.0, 0.0]])
    >>> dkd(logits, logits, torch.tensor([0]), 4.0).item()
    0.0
    """
    if target.is_floating_point():
        raise UsageError(
            "the distance dkd needs the right class of every sample, not shares of all classes.",
            fix="use --distance kl with mixup and cutmix",
        )
    right = functional.one_hot(target, teacher.shape[-1]).bool()
    wanted = teacher.detach() / temperature
    given = student / temperature
    binary = _kl(_right_and_rest(wanted, right), _right_and_rest(given, right))
    others = _kl(_others(wanted, right), _others(given, right))
    loss = RIGHT_CLASS_WEIGHT * binary + OTHER_CLASSES_WEIGHT * others
    return loss.mean(-1) * temperature**2


def _right_and_rest(logits: Tensor, right: Tensor) -> Tensor:
    """Log-probabilities (…, 2) of the right class and of all others together."""
    log_probabilities = functional.log_softmax(logits, dim=-1)
    on_right = log_probabilities.masked_fill(~right, 0.0).sum(-1)
    on_rest = log_probabilities.masked_fill(right, -torch.inf).logsumexp(-1)
    return torch.stack([on_right, on_rest], dim=-1)


def _others(logits: Tensor, right: Tensor) -> Tensor:
    """Log-probabilities (…, classes - 1) among the classes that are not the right one."""
    count = logits.shape[-1] - 1
    rest = logits.masked_select(~right).view(*logits.shape[:-1], count)
    return functional.log_softmax(rest, dim=-1)


def _kl(wanted: Tensor, given: Tensor) -> Tensor:
    return (wanted.exp() * (wanted - given)).sum(-1)
