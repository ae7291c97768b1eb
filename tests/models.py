"""Tiny classifiers named by the shape of their graph; 3×16×16 images in, ten classes out."""

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = (3, 16, 16)
CLASSES = 10


def images(count: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, *SIZE), generator=generator, dtype=dtype)


def labels(count: int = 4, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, CLASSES, (count,), generator=generator)


def settled(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """``model`` with BatchNorm statistics and affine weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = (module.num_features,)
            module.running_mean = torch.randn(shape, generator=generator) * 0.1
            module.running_var = torch.rand(shape, generator=generator) + 0.5
            module.weight.data = torch.rand(shape, generator=generator) + 0.5
            module.bias.data = torch.randn(shape, generator=generator) * 0.1
    return model


def conv(width_in: int, width: int, *, stride: int = 1, size: int = 3) -> list[nn.Module]:
    return [
        nn.Conv2d(width_in, width, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]


def chain(width: int = 8) -> nn.Module:
    """VGG: convolutions and pools in a row."""
    layers = [*conv(3, width), nn.MaxPool2d(2), *conv(width, 2 * width), nn.MaxPool2d(2)]
    layers += [*conv(2 * width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * width, CLASSES))


class Residual(nn.Module):
    """ResNet: three stages of basic blocks, in-place ReLU and in-place addition."""

    class Unit(nn.Module):
        def __init__(self, width_in: int, width: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)
            self.down = None
            if stride > 1 or width_in != width:
                self.down = nn.Sequential(
                    nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
                )

        def forward(self, x: Tensor) -> Tensor:
            shortcut = x if self.down is None else self.down(x)
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            out += shortcut
            return self.relu(out)

    def __init__(self, width: int = 8, depth: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, width))
        self.layers = nn.ModuleList()
        width_in = width
        for stage, stride in enumerate((1, 2, 2)):
            for index in range(depth):
                unit = self.Unit(width_in, width << stage, stride if index == 0 else 1)
                self.layers.append(unit)
                width_in = width << stage
        self.dropout = dropout
        self.head = nn.Linear(width_in, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(functional.dropout(x, self.dropout, self.training))


class Dense(nn.Module):
    """DenseNet: every layer reads all before it, joined by concatenation; two transitions."""

    def __init__(self, growth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for _ in range(2):
            self.blocks.append(
                nn.ModuleList(nn.Sequential(*conv(growth * (i + 1), growth)) for i in range(3))
            )
            self.transitions.append(
                nn.Sequential(*conv(growth * 4, growth, size=1), nn.AvgPool2d(2))
            )
        self.head = nn.Linear(growth, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            features = [x]
            for layer in block:
                features.append(layer(torch.cat(features, 1)))
            x = transition(torch.cat(features, 1))
        return self.head(x.mean((2, 3)))


class Inverted(nn.Module):
    """MobileNet: expand, depthwise, project; a linear bottleneck and ReLU6."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.ReLU6(inplace=True))
        self.units = nn.Sequential()
        self.strides = (1, 2, 1, 2, 1)
        for stride in self.strides:
            hidden = width * 2
            self.units.append(
                nn.Sequential(
                    nn.Conv2d(width, hidden, 1, bias=False),
                    nn.BatchNorm2d(hidden),
                    nn.ReLU6(inplace=True),
                    nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
                    nn.BatchNorm2d(hidden),
                    nn.ReLU6(inplace=True),
                    nn.Conv2d(hidden, width, 1, bias=False),
                    nn.BatchNorm2d(width),
                )
            )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for unit, stride in zip(self.units, self.strides, strict=True):
            x = x + unit(x) if stride == 1 else unit(x)
        return self.head(x.mean((2, 3)))


class Branching(nn.Module):
    """Inception: parallel branches joined by concatenation."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, width, stride=2))
        self.left, self.right = nn.Sequential(*conv(width, width)), nn.Conv2d(width, width, 1)
        self.join = nn.Sequential(*conv(2 * width, 2 * width, stride=2))
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.join(torch.cat([self.left(x), self.right(x)], dim=1))
        return self.head(x.amax((2, 3)))


class Shuffle(nn.Module):
    """ShuffleNet: sizes read from the tensor, channels split and shuffled."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, width, stride=2))
        self.branch = nn.Sequential(*conv(width // 2, width // 2))
        self.down = nn.Sequential(*conv(width, 2 * width, stride=2))
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept, changed = x.chunk(2, dim=1)
        x = torch.cat([kept, self.branch(changed)], dim=1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        x = self.down(x.reshape(batch, channels, height, width))
        if x.shape[-1] != 4:
            raise ValueError("made for 16×16 images")
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """One module called three times."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, width))
        self.unit = nn.Sequential(*conv(width, width))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.pool(self.unit(x) + x)
        return self.head(x.mean((2, 3)))


ALL = {
    "chain": chain,
    "residual": Residual,
    "dense": Dense,
    "inverted": Inverted,
    "branching": Branching,
    "shuffle": Shuffle,
    "shared": Shared,
}


def make(name: str, *, seed: int = 0, **kwargs: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return settled(ALL[name](**kwargs), seed=seed)
