"""Modules that carry a student boundary tensor into the teacher's shape.

Ours, as the paper's connector is not described in what we could read: a 1×1 convolution without
bias and BatchNorm for maps, ReLU only if the receiving block expects post-ReLU input; a stride-2
3×3 convolution where the teacher's map is half as large, a stride-2 4×4 transposed one where it is
twice as large, interpolation for every other ratio; Linear and LayerNorm for tokens and vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdsurgeon.errors import PlanError, nearest
from kdsurgeon.partitioning import CutPoint

Operation = Literal["identity", "conv", "downsample", "upsample", "resize", "linear"]


@dataclass(frozen=True)
class AdapterSpec:
    """What carries ``source`` (a shape without the batch) to ``target``."""

    operation: Operation
    source: tuple[int, ...]
    target: tuple[int, ...]
    is_rectified: bool

    def __post_init__(self) -> None:
        if self.operation not in get_args(Operation):
            known = get_args(Operation)
            raise PlanError(
                f'no adapter is called "{self.operation}".',
                known=", ".join(known),
                fix=nearest(str(self.operation), known),
            )
        if not _fits(self):
            raise PlanError(
                f"the adapter {self.operation} cannot carry {_times(self.source)} to "
                f"{_times(self.target)}.",
                fix=f"use {_operation(self.source, self.target)}",
            )

    def __str__(self) -> str:
        if self.operation == "identity":
            return "identity"
        width = 0 if len(self.source) == 3 else -1
        shapes = f"{self.source[width]}→{self.target[width]}"
        name = {
            "conv": "conv 1×1",
            "downsample": "conv 3×3 ÷2",
            "upsample": "deconv 4×4 ×2",
            "resize": f"resize {_times(self.target[1:])}, conv 1×1",
            "linear": "linear",
        }[self.operation]
        return f"{name} {shapes}" + (" + ReLU" if self.is_rectified else "")


def adapter_for(student: CutPoint, teacher: CutPoint) -> AdapterSpec:
    """The adapter that the reader of the teacher's cut expects, fed by the student's."""
    operation = _operation(student.shape, teacher.shape)
    return AdapterSpec(operation, student.shape, teacher.shape, teacher.is_rectified)


def build(spec: AdapterSpec, *, seed: int = 0) -> nn.Module:
    """A fresh adapter, (batch, *source) → (batch, *target); the global random state is untouched.

    >>> spec = AdapterSpec("downsample", (8, 16, 16), (32, 8, 8), is_rectified=True)
    >>> build(spec)(torch.zeros(2, 8, 16, 16)).shape
    torch.Size([2, 32, 8, 8])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(spec)


def _build(spec: AdapterSpec) -> nn.Module:
    width, target = spec.source[0], spec.target[0]
    if spec.operation == "identity":
        return nn.Identity()
    if spec.operation == "linear":
        layers: list[nn.Module] = [nn.Linear(spec.source[-1], spec.target[-1])]
        if spec.source[:-1] != spec.target[:-1]:
            layers.insert(0, _ResizeTokens(spec.target[0]))
        layers.append(nn.LayerNorm(spec.target[-1]))
    else:
        layers = {
            "conv": lambda: [nn.Conv2d(width, target, 1, bias=False)],
            "downsample": lambda: [nn.Conv2d(width, target, 3, 2, 1, bias=False)],
            "upsample": lambda: [nn.ConvTranspose2d(width, target, 4, 2, 1, bias=False)],
            "resize": lambda: _resize(spec),
        }[spec.operation]()
        layers.append(nn.BatchNorm2d(target))
    return nn.Sequential(*layers, *([nn.ReLU()] if spec.is_rectified else []))


def _resize(spec: AdapterSpec) -> list[nn.Module]:
    """The channel map stands on the smaller side, where it is cheaper."""
    convolution = nn.Conv2d(spec.source[0], spec.target[0], 1, bias=False)
    size = (spec.target[1], spec.target[2])
    if spec.target[1] < spec.source[1]:
        return [nn.AdaptiveAvgPool2d(size), convolution]
    return [convolution, nn.Upsample(size, mode="bilinear", align_corners=False)]


class _ResizeTokens(nn.Module):
    """(batch, tokens, width) → (batch, count, width) by linear interpolation along the tokens."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.interpolate(tokens.mT, size=self.count, mode="linear").mT


def _operation(source: tuple[int, ...], target: tuple[int, ...]) -> Operation:
    if len(source) < 3:
        return "linear"
    sizes, wanted = source[1:], target[1:]
    if sizes == wanted:
        return "conv"
    if all((size + 1) // 2 == want for size, want in zip(sizes, wanted, strict=True)):
        return "downsample"
    if all(size * 2 == want for size, want in zip(sizes, wanted, strict=True)):
        return "upsample"
    return "resize"


def _fits(spec: AdapterSpec) -> bool:
    if len(spec.source) != len(spec.target):
        return False
    if spec.operation == "identity":
        return spec.source == spec.target
    if len(spec.source) == 3 and spec.operation == "resize":
        return True
    return spec.operation == _operation(spec.source, spec.target)


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
