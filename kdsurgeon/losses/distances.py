"""Take a distance from a plugin, and see that it is one before a run depends on it."""

from __future__ import annotations

import torch
from torch import Tensor

from kdsurgeon import plugins
from kdsurgeon.errors import PluginError, SurgeonError
from kdsurgeon.losses.formulas import Distance, kl


def load_distance(name: str) -> Distance:
    """The distance called ``name``; whatever it raises later is the plugin's fault, and says so.

    Raises:
        PluginError: it is no distance: tried on a few logits, it fails, gives another shape than
            one value for each leading index, passes on no gradient, or writes into the teacher's.

    >>> logits = torch.zeros(2, 3, 5, requires_grad=True)  # two stones, three samples, five classes
    >>> load_distance("dkd")(logits, torch.zeros(3, 5), torch.tensor([0, 1, 2]), 4.0).shape
    torch.Size([2])
    """
    if name == "kl":
        return kl
    distance = plugins.load("distances", name)

    def guarded(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
        try:
            return distance(student, teacher, target, temperature)
        except (SurgeonError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _no_distance(name, f"{type(error).__name__}: {error}") from error

    _try(name, guarded)
    return guarded


def _try(name: str, distance: Distance) -> None:
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 5, generator=draw, requires_grad=True)
    teacher = torch.randn(3, 5, generator=draw)
    before = teacher.clone()
    found = distance(student, teacher, torch.tensor([0, 1, 4]), 4.0)
    if not isinstance(found, Tensor) or found.shape != (2,):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise _no_distance(
            name, f"for logits of 2 stones, 3 samples and 5 classes it gave {shape}, not (2,)"
        )
    if not found.requires_grad:
        raise _no_distance(name, "no gradient flows from it into the student's logits")
    if not torch.equal(teacher, before):
        raise _no_distance(name, "it writes into the teacher's logits")


def _no_distance(name: str, why: str) -> PluginError:
    known = plugins.installed("distances")[name]
    return PluginError(
        f'the distance "{name}" of {known.distribution} {known.version} failed.',
        where=known.target,
        why=why,
        fix="d(student, teacher, target, temperature): logits (…, batch, classes) against (batch, "
        "classes), the mean over the batch for each leading index",
    )
