"""All of it in about two minutes: two small networks, real handwritten digits, the user's verbs."""

from __future__ import annotations

from torch import Tensor, nn

from kdsurgeon.errors import UsageError, nearest


class ResidualUnit(nn.Module):
    """Two 3×3 convolutions beside a shortcut, as in ResNet's basic block."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, images: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(images)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(images))


class SeparableUnit(nn.Module):
    """A depthwise and a pointwise convolution, as in MobileNet."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width_in, width_in, 3, stride, 1, groups=width_in, bias=False)
        self.bn1 = nn.BatchNorm2d(width_in)
        self.pointwise = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.depthwise(images)))
        return self.relu(self.bn2(self.pointwise(out)))


class DigitNet(nn.Module):
    """A stem, stages of units that halve the resolution, and a linear head; 8×8 grey images in."""

    def __init__(
        self, unit: type[ResidualUnit | SeparableUnit], widths: tuple[int, ...], num_classes: int
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.Sequential()
        width_in = widths[0]
        for index, width in enumerate(widths):
            self.stages.append(unit(width_in, width, stride=1 if index == 0 else 2))
            width_in = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width_in, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.stages(self.stem(images))).flatten(1))


def build(name: str, *, num_classes: int = 10) -> nn.Module:
    """``demo/teacher`` (residual, 0.9 M parameters) or ``demo/student`` (depthwise-separable).

    >>> sum(parameter.numel() for parameter in build("student").parameters())
    3730
    """
    networks = {
        "teacher": (ResidualUnit, (32, 64, 128, 192)),
        "student": (SeparableUnit, (8, 16, 32, 48)),
    }
    if name not in networks:
        fix = nearest(name, networks) or f"one of {', '.join(networks)}"
        raise UsageError(f"demo has no model {name}.", fix=fix)
    unit, widths = networks[name]
    return DigitNet(unit, widths, num_classes)
