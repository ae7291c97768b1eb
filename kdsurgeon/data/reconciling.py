"""Let a teacher that knows other images or more classes stand in front of the student's batches.

The teacher is wrapped before anything is cut: what it needs becomes part of its graph, the student
stays untouched, and one batch serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdsurgeon.errors import UsageError
from kdsurgeon.tracing import logits_in


@dataclass(frozen=True)
class ImageSpec:
    """The images that a model was trained on: (height, width), mean and std on the 0..1 scale."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"


class ReconciledTeacher(nn.Module):
    """``teacher`` on images that were prepared for a student, and for some classes alone.

    Args:
        teacher: maps images (batch, channels, height, width) to logits (batch, classes).
        given: what the images of the batches are.
        own: what the teacher was trained on; None: the same.
        classes: which logits are kept, in this order; None: all.

    Its forward turns the normalisation into its own, (x·std + mean - own mean) / own std, resizes,
    and runs the teacher. Images made smaller are averaged over what one pixel covers
    (antialiasing), as in Pillow. Values between pixels are not rounded to 8 bits.

    Raises:
        UsageError: the two have another number of channels.

    >>> teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> own = ImageSpec((2, 2), (0.5,), (0.25,))
    >>> given = ImageSpec((2, 2), (0.0,), (1.0,))
    >>> x = torch.rand(5, 1, 2, 2)
    >>> found = ReconciledTeacher(teacher, given, own, classes=[2, 0])(x)
    >>> torch.allclose(found, teacher((x - 0.5) / 0.25)[:, [2, 0]], atol=1e-5)
    True
    """

    factor: Tensor
    offset: Tensor
    classes: Tensor

    def __init__(
        self,
        teacher: nn.Module,
        given: ImageSpec,
        own: ImageSpec | None = None,
        *,
        classes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        own = own or given
        if len(own.mean) != len(given.mean):
            raise UsageError(
                f"the teacher sees {len(own.mean)} channels, the images have {len(given.mean)}.",
                fix=f"--input-size {len(own.mean)},{given.size[0]},{given.size[1]}",
            )
        device = next((weight.device for weight in teacher.parameters()), torch.device("cpu"))
        (mean, std), (to_mean, to_std) = (
            (torch.tensor(numbers, dtype=torch.float64) for numbers in (spec.mean, spec.std))
            for spec in (given, own)
        )
        self.teacher = teacher
        self.size = None if own.size == given.size else own.size
        self.interpolation = own.interpolation
        self.is_shifted = (own.mean, own.std) != (given.mean, given.std)
        self.register_buffer("factor", _per_channel(std / to_std, device), persistent=False)
        self.register_buffer(
            "offset", _per_channel((mean - to_mean) / to_std, device), persistent=False
        )
        self.says = f"given={given}, own={own}, classes={classes and list(classes)}"
        self.is_restricted = classes is not None
        index = torch.tensor(list(classes or ()), dtype=torch.int64, device=device)
        self.register_buffer("classes", index, persistent=False)
        self.train(teacher.training)

    def extra_repr(self) -> str:
        """Everything that the logits depend on beside the teacher."""
        return self.says

    def forward(self, images: Tensor) -> Tensor:
        if self.is_shifted:
            images = images * self.factor + self.offset
        if self.size is not None:
            smooth = self.interpolation in ("bilinear", "bicubic")
            images = functional.interpolate(
                images,
                size=self.size,
                mode=self.interpolation,
                align_corners=False if smooth else None,
                antialias=smooth,
            )
        logits = logits_in(self.teacher(images))
        return logits.index_select(-1, self.classes) if self.is_restricted else logits


def _per_channel(numbers: Tensor, device: torch.device) -> Tensor:
    return numbers.to(torch.float32)[:, None, None].to(device)
