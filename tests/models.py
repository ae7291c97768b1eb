"""Tiny classifiers named by the shape of their graph; 3×16×16 images in, ten classes out."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdsurgeon import Batches, Recipe, load_data, train_alone
from kdsurgeon.demo import build

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


class Tokens(nn.Module):
    """ViT: patches behind a convolved stem, a class token, pre-norm attention, dropout."""

    class Unit(nn.Module):
        def __init__(self, width: int, heads: int, dropout: float) -> None:
            super().__init__()
            self.heads, self.dropout = heads, dropout
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attended, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        def forward(self, x: Tensor) -> Tensor:
            batch, count, width = x.shape
            parts = self.attended(self.norm1(x)).view(batch, count, 3, self.heads, -1)
            query, key, value = parts.permute(2, 0, 3, 1, 4)
            found = functional.scaled_dot_product_attention(query, key, value)
            found = self.mixed(found.transpose(1, 2).reshape(batch, count, width))
            x = x + functional.dropout(found, self.dropout, self.training)
            found = self.narrow(functional.gelu(self.wide(self.norm2(x))))
            return x + functional.dropout(found, self.dropout, self.training)

    def __init__(
        self, width: int = 12, depth: int = 4, heads: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, width, stride=2), *conv(width, width, stride=2))
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.5)
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.5)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.Sequential(*(self.Unit(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.layers(self.drop(x)))[:, 0])


class Streams(nn.Module):
    """HRNet, CrossViT: a fine and a coarse stream that exchange what they see at every stage.

    No tensor holds both together, from the stem to the head.
    """

    class Stage(nn.Module):
        def __init__(self, width_in: int, width: int, stride: int) -> None:
            super().__init__()
            self.fine = nn.Sequential(*conv(width_in, width, stride=stride))
            self.coarse = nn.Sequential(*conv(2 * width_in, 2 * width, stride=stride))
            self.down = nn.Sequential(
                nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width)
            )
            self.up = nn.Sequential(
                nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width)
            )

        def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
            fine, coarse = self.fine(fine), self.coarse(coarse)
            coarse = torch.relu(coarse + self.down(fine))
            seen = functional.interpolate(self.up(coarse), scale_factor=2.0)
            return torch.relu(fine + seen), coarse

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, width))
        self.coarse = nn.Sequential(*conv(width, 2 * width, stride=2))
        widths = ((width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1))
        self.stages = nn.ModuleList(self.Stage(*each) for each in widths)
        self.head = nn.Linear(6 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = self.coarse(fine)
        for stage in self.stages:
            fine, coarse = stage(fine, coarse)
        return self.head(torch.cat([fine.mean((2, 3)), coarse.mean((2, 3))], 1))


ALL = {
    "chain": chain,
    "residual": Residual,
    "dense": Dense,
    "inverted": Inverted,
    "branching": Branching,
    "shuffle": Shuffle,
    "shared": Shared,
    "tokens": Tokens,
    "streams": Streams,
}


def make(name: str, *, seed: int = 0, **kwargs: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return settled(ALL[name](**kwargs), seed=seed)


def digit_models(folder):
    """A ``teacher.pt`` in ``folder`` that knows the digits and a ``student.pt`` that does not."""
    torch.manual_seed(0)
    teacher, student = build("teacher"), build("student")
    recipe = Recipe(method="ce", epochs=1, optim={"lr": 3e-3, "warmup_epochs": 0.2})
    batches = Batches(load_data("digits").train, 64, shuffle=True, seed=0)
    assert len(list(train_alone(teacher, batches, recipe))) == 1
    for name, model in (("teacher", teacher), ("student", student)):
        card = {"arch": f"demo/{name}", "input_size": [1, 8, 8], "num_classes": 10}
        torch.save({**card, "state_dict": model.state_dict()}, folder / f"{name}.pt")
    return folder


def uneven(teacher, path):
    """Writes the function of a :func:`digit_models` teacher to ``path``, the first channel inside
    each unit 4,096 times as large as it was: one scale of int8 does not fit all."""
    file = torch.load(teacher, weights_only=True)
    state = file["state_dict"]
    for norm in [name.removesuffix("bn1.weight") for name in state if name.endswith("bn1.weight")]:
        state[f"{norm}bn1.weight"][0] *= 2**12
        state[f"{norm}bn1.bias"][0] *= 2**12
        state[f"{norm}conv2.weight"][:, 0] /= 2**12
    torch.save(file, path)
