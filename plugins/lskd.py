"""Logit standardisation: KL of logits of mean 0 and deviation 1, so that τ means the same for every
sample and for both models."""

from torch import Tensor
from torch.nn import functional

SMALLEST_DEVIATION = 1e-7


def lskd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """``τ² · KL`` of the softened probabilities of z-scores, mean over the batch (Sun et al.,
    CVPR 2024, arXiv 2403.01427, equation 10 and algorithm 1).

    Args:
        student: logits (…, batch, classes); the gradient flows here only.
        teacher: logits (batch, classes).
        target: not used; every distance takes it.

    >>> import torch
    >>> logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    >>> abs(lskd(5 * logits + 1, logits, torch.tensor([0, 1]), 4.0).item()) < 1e-5
    True
    """
    wanted = functional.log_softmax(_standardised(teacher.detach()) / temperature, dim=-1)
    given = functional.log_softmax(_standardised(student) / temperature, dim=-1)
    return (wanted.exp() * (wanted - given)).sum(-1).mean(-1) * temperature**2


def _standardised(logits: Tensor) -> Tensor:
    centred = logits - logits.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + SMALLEST_DEVIATION**2).sqrt()  # of equal logits, too, a gradient
