"""DIST: match how classes and samples relate, not the probabilities themselves."""

import torch
from torch import Tensor

BETWEEN_CLASSES_WEIGHT = 2.0  # β of the paper
WITHIN_CLASS_WEIGHT = 2.0  # γ of the paper


def dist(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """``τ² (β · inter + γ · intra)``: one minus Pearson's correlation of the softened
    probabilities, over the classes of each sample and over the samples of each class
    (Huang et al., NeurIPS 2022, equations 8 to 10).

    Args:
        student: logits (…, batch, classes); the gradient flows here only.
        teacher: logits (batch, classes).
        target: not used; every distance takes it.

    >>> logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    >>> round(dist(logits, logits, torch.tensor([0, 1]), 1.0).item(), 5)
    0.0
    """
    wanted = (teacher.detach() / temperature).softmax(-1)
    given = (student / temperature).softmax(-1)
    between = (1 - _correlation(given, wanted, dim=-1)).mean(-1)
    within = (1 - _correlation(given, wanted, dim=-2)).mean(-1)
    return (BETWEEN_CLASSES_WEIGHT * between + WITHIN_CLASS_WEIGHT * within) * temperature**2


def _correlation(left: Tensor, right: Tensor, dim: int) -> Tensor:
    left = left - left.mean(dim, keepdim=True)
    right = right - right.mean(dim, keepdim=True)
    return torch.cosine_similarity(left, right.expand_as(left), dim=dim, eps=1e-8)
