"""Networks of the CIFAR-100 bench by name: ``cifar/resnet8x4``, ``cifar/mobilenetv2``, for 32×32.

The architectures on which the field compares distillation (Tian et al. 2020, arXiv 1910.10699,
RepDistiller; Zhao et al. 2022, mdistiller). Decisions a reader would otherwise undo:

* What holds weights is called as in RepDistiller, so that its published checkpoints load strictly.
* Nothing in ``forward`` hands out features: cut points are found in the graph.
* Every ReLU is a module of its own, which gives its node a name.
"""

from collections import OrderedDict
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

import torch
from torch import Tensor, nn

from kdsurgeon import UsageError


def build(name: str, *, num_classes: int = 100) -> nn.Module:
    """A network of :data:`NETWORKS` with fresh weights, drawn as the published code draws them.

    Its input is (batch, 3, 32, 32), its output logits (batch, num_classes).

    Raises:
        UsageError: there is no network of this name.

    >>> sum(parameter.numel() for parameter in build("resnet8x4").parameters())
    1233540
    """
    if name not in NETWORKS:
        raise UsageError(
            f"cifar has no model {name}.",
            near=", ".join(get_close_matches(name, NETWORKS)),
            fix=f"one of {', '.join(NETWORKS)}",
        )
    return NETWORKS[name](num_classes)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut (He et al. 2015, arXiv 1512.03385, figure 5 left)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(width_in, width, stride)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(maps)))
        return self.relu2(self.bn2(self.conv2(out)) + self.downsample(maps))


class Bottleneck(nn.Module):
    """A 3×3 convolution of a quarter of the width between two 1×1 (figure 5 right)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        inner = width // 4
        self.conv1 = nn.Conv2d(width_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(width_in, width, stride)
        self.relu3 = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(maps)))
        out = self.relu2(self.bn2(self.conv2(out)))
        return self.relu3(self.bn3(self.conv3(out)) + self.shortcut(maps))


def _shortcut(width_in: int, width: int, stride: int) -> nn.Sequential:
    """Nothing where the shape stays, else a 1×1 convolution (option B of He et al.)."""
    if stride == 1 and width_in == width:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class ResNet(nn.Module):
    """A stem and three stages of ``units`` basic blocks (He et al. 2015, section 4.2).

    ``widths`` are those of the stem and of the stages; the "x4" networks have 32, 64, 128, 256.
    """

    def __init__(self, units: int, widths: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        stem, first, second, third = widths
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(BasicBlock, units, stem, first, 1)
        self.layer2 = _stage(BasicBlock, units, first, second, 2)
        self.layer3 = _stage(BasicBlock, units, second, third, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        _draw_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        return self.fc(self.avgpool(maps).flatten(1))


class ResNet50(nn.Module):
    """ImageNet's ResNet-50 with a 3×3 stem of stride 1 and without its first pooling."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(Bottleneck, 3, 64, 256, 1)
        self.layer2 = _stage(Bottleneck, 4, 256, 512, 2)
        self.layer3 = _stage(Bottleneck, 6, 512, 1024, 2)
        self.layer4 = _stage(Bottleneck, 3, 1024, 2048, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(2048, num_classes)
        _draw_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.bn1(self.conv1(images)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.linear(self.avgpool(maps).flatten(1))


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each convolution (Zagoruyko & Komodakis 2016, arXiv 1605.07146).

    Where the width changes, the shortcut convolves the activated tensor; else it is the raw one.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = None
        if width_in != width:
            self.convShortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        active = self.relu1(self.bn1(maps))
        shortcut = maps if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(self.relu2(self.bn2(self.conv1(active))))


class WideResNet(nn.Module):
    """A stem of 16 maps and three stages of ``units`` blocks, 16, 32 and 64 times ``widen``."""

    def __init__(self, units: int, widen: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = _layer(_stage(PreActivationBlock, units, 16, 16 * widen, 1))
        self.block2 = _layer(_stage(PreActivationBlock, units, 16 * widen, 32 * widen, 2))
        self.block3 = _layer(_stage(PreActivationBlock, units, 32 * widen, 64 * widen, 2))
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * widen, num_classes)
        _draw_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(self.avgpool(self.relu(self.bn1(maps))).flatten(1))


def _layer(stage: nn.Sequential) -> nn.Sequential:
    """A stage one level deeper, where the published checkpoints have it."""
    return nn.Sequential(OrderedDict(layer=stage))


class VGG(nn.Module):
    """Five stages of ``units`` 3×3 convolutions with BatchNorm and one linear layer.

    The first three stages are followed by a 2×2 maximum, so that the last two work on 4×4 (after
    Simonyan & Zisserman 2014, arXiv 1409.1556).
    """

    def __init__(self, units: int, num_classes: int) -> None:
        super().__init__()
        self.block0 = _plain_stage(units, 3, 64)
        self.pool0 = nn.MaxPool2d(2)
        self.block1 = _plain_stage(units, 64, 128)
        self.pool1 = nn.MaxPool2d(2)
        self.block2 = _plain_stage(units, 128, 256)
        self.pool2 = nn.MaxPool2d(2)
        self.block3 = _plain_stage(units, 256, 512)
        self.block4 = _plain_stage(units, 512, 512)
        self.pool4 = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, num_classes)
        _draw_convolutions(self)
        _draw_head(self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool0(self.block0(images))
        maps = self.pool1(self.block1(maps))
        maps = self.pool2(self.block2(maps))
        maps = self.block4(self.block3(maps))
        return self.classifier(self.pool4(maps).flatten(1))


def _plain_stage(units: int, width_in: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(units):
        before = width if index else width_in
        layers += [
            nn.Conv2d(before, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class InvertedResidual(nn.Module):
    """Wide inside, thin at both ends (Sandler et al. 2018, arXiv 1801.04381, with plain ReLU)."""

    def __init__(self, width_in: int, width: int, stride: int, *, expansion: int) -> None:
        super().__init__()
        inner = width_in * expansion
        self.is_residual = stride == 1 and width_in == width
        self.conv = nn.Sequential(
            *_conv_bn_relu(width_in, inner, 1),
            *_conv_bn_relu(inner, inner, 3, stride, groups=inner),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.conv(maps) if self.is_residual else self.conv(maps)


class MobileNetV2(nn.Module):
    """MobileNetV2 of half the width with 1,280 features (RepDistiller's ``mobile_half``).

    The stem has stride 2 and the stages 1, 1, 2, 2, 1, 2, 1: from 32×32 to 2×2.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_conv_bn_relu(3, 16, 3, 2))
        wide = partial(InvertedResidual, expansion=6)
        self.blocks = nn.Sequential(
            _stage(partial(InvertedResidual, expansion=1), 1, 16, 8, 1),
            _stage(wide, 2, 8, 12, 1),
            _stage(wide, 3, 12, 16, 2),
            _stage(wide, 4, 16, 32, 2),
            _stage(wide, 3, 32, 48, 1),
            _stage(wide, 3, 48, 80, 2),
            _stage(wide, 1, 80, 160, 1),
        )
        self.conv2 = nn.Sequential(*_conv_bn_relu(160, 1280, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        head = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(head)
        _draw_convolutions(self)
        _draw_head(head)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv2(self.blocks(self.conv1(images)))
        return self.classifier(self.avgpool(maps).flatten(1))


def _conv_bn_relu(
    width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    return [
        nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]


class ShuffleUnit(nn.Module):
    """One half passes, the other is convolved (Ma et al. 2018, arXiv 1807.11164, figure 3c)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        kept, changed = maps.chunk(2, dim=1)
        changed = self.relu1(self.bn1(self.conv1(changed)))
        changed = self.bn2(self.conv2(changed))
        changed = self.relu3(self.bn3(self.conv3(changed)))
        return _shuffled(torch.cat([kept, changed], dim=1))


class ShuffleDownUnit(nn.Module):
    """Two branches of stride 2 side by side (figure 3d)."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(width_in, width_in, 3, 2, 1, groups=width_in, bias=False)
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv2 = nn.Conv2d(width_in, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width_in, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU(inplace=True)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu5 = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        left = self.bn1(self.conv1(maps))
        left = self.relu2(self.bn2(self.conv2(left)))
        right = self.relu3(self.bn3(self.conv3(maps)))
        right = self.bn4(self.conv4(right))
        right = self.relu5(self.bn5(self.conv5(right)))
        return _shuffled(torch.cat([left, right], dim=1))


def _shuffled(maps: Tensor) -> Tensor:
    """The channels of both halves in turn."""
    return maps.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 ×1 with a 1×1 stem of stride 1 and without its first pooling.

    Its weights are drawn as torch draws them, as in the published code.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu1 = nn.ReLU(inplace=True)
        self.layer1 = _shuffle_stage(3, 24, 116)
        self.layer2 = _shuffle_stage(7, 116, 232)
        self.layer3 = _shuffle_stage(3, 232, 464)
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu1(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        maps = self.relu2(self.bn2(self.conv2(maps)))
        return self.linear(self.avgpool(maps).flatten(1))


def _shuffle_stage(units: int, width_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        ShuffleDownUnit(width_in, width), *(ShuffleUnit(width) for _ in range(units))
    )


def _stage(
    unit: Callable[[int, int, int], nn.Module], units: int, width_in: int, width: int, stride: int
) -> nn.Sequential:
    """``units`` of one kind; the first changes width and resolution."""
    rest = [unit(width, width, 1) for _ in range(units - 1)]
    return nn.Sequential(unit(width_in, width, stride), *rest)


def _draw_convolutions(network: nn.Module) -> None:
    """Normal with variance 2 / (kernel area × maps out) (He et al. 2015, arXiv 1502.01852)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _draw_head(head: nn.Linear) -> None:
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)


_NARROW, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": partial(ResNet, 1, _NARROW),
    "resnet20": partial(ResNet, 3, _NARROW),
    "resnet32": partial(ResNet, 5, _NARROW),
    "resnet56": partial(ResNet, 9, _NARROW),
    "resnet110": partial(ResNet, 18, _NARROW),
    "resnet8x4": partial(ResNet, 1, _WIDE),
    "resnet32x4": partial(ResNet, 5, _WIDE),
    "resnet50": ResNet50,
    "wrn_16_2": partial(WideResNet, 2, 2),
    "wrn_40_1": partial(WideResNet, 6, 1),
    "wrn_40_2": partial(WideResNet, 6, 2),
    "vgg8": partial(VGG, 1),
    "vgg13": partial(VGG, 2),
    "mobilenetv2": MobileNetV2,
    "shufflenetv2": ShuffleNetV2,
}
"""Every network by name; what it maps from is the number of classes."""
