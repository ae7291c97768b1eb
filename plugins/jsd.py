"""Jensen-Shannon divergence: a distance that is bounded and the same in both directions."""

import math

import torch
from torch import Tensor
from torch.nn import functional


def jsd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """``τ² · ½ (KL(p ‖ m) + KL(q ‖ m))`` of the softened probabilities p, q and their mean m, mean
    over the batch (Lin, IEEE Transactions on Information Theory 1991, equation 4.1 with equal
    weights; τ² as in Hinton et al. 2015).

    Args:
        student: logits (…, batch, classes); the gradient flows here only.
        teacher: logits (batch, classes).
        target: not used; every distance takes it.

    >>> apart = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
    >>> round(jsd(*apart, torch.tensor([0]), 1.0).item(), 4)  # ln 2, its largest value
    0.6931
    """
    wanted = functional.log_softmax(teacher.detach() / temperature, dim=-1)
    given = functional.log_softmax(student / temperature, dim=-1)
    middle = torch.logaddexp(wanted, given) - math.log(2)
    divergence = wanted.exp() * (wanted - middle) + given.exp() * (given - middle)
    return divergence.sum(-1).mean(-1) * temperature**2 / 2
