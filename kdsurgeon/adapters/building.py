"""The module of an adapter: one path for every layout.

Whatever comes in becomes positions on a grid, channels first; a spatial part, one channel map
without bias and a parameter-free enlargement follow; then norm and ReLU as the receiver expects.

Ours, as the paper's connector is not described in what we could read: BatchNorm last for maps,
LayerNorm last for tokens and vectors that come straight out of a norm, else only a bias. A map of
one position gets no BatchNorm, which would refuse a batch of one sample.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdsurgeon.adapters.spec import AdapterSpec
from kdsurgeon.layouts import Activation


def build(spec: AdapterSpec, *, seed: int = 0) -> nn.Module:
    """A fresh adapter from the source's axes to the target's, for every batch size.

    The global random state is untouched. Identity is an :class:`torch.nn.Identity`, every other
    operation an :class:`Adapter`.

    >>> source = Activation("a", (196, 8), "BTC", grid=(14, 14))
    >>> target = Activation("b", (32, 7, 7), "BCHW", grid=(7, 7), is_rectified=True)
    >>> build(AdapterSpec("downsample", source, target))(torch.zeros(2, 196, 8)).shape
    torch.Size([2, 32, 7, 7])
    """
    if spec.operation == "identity":
        return nn.Identity()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA too
        return Adapter(spec)


def num_parameters(spec: AdapterSpec) -> int:
    """How many trained numbers the adapter holds, without allocating one."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(spec).parameters())


class Adapter(nn.Module):
    """(batch, *source) → (batch, *target), in the axes of each; the dtype is that of the input.

    A prefix token that both sides have passes through the same channel map as the positions. One
    that the source lacks is the mean of the mapped positions plus a learned vector: a teacher whose
    head reads only its class token still sees, and teaches, all of the student's positions.
    """

    bias: nn.Parameter | None
    prefix: nn.Parameter | None

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__()
        self.spec = spec
        width, missing = spec.target.channels, spec.target.prefix - spec.carried
        self.before = _before(spec)
        self.channels = _channel_map(spec)
        self.after = _after(spec)
        self.prefix = nn.Parameter(torch.zeros(width, 1, missing)) if missing else None
        self.norm = _norm(spec)
        has_shift = isinstance(self.norm, nn.BatchNorm2d)
        self.bias = None if has_shift else nn.Parameter(torch.zeros(width, 1, 1))
        self.activation = nn.ReLU() if spec.target.is_rectified else nn.Identity()

    def forward(self, value: Tensor) -> Tensor:
        prefix, grid = self.split(channels_first(value, self.spec.source))
        mapped = self.after(self.channels(self.before(grid)))
        if self.spec.target.prefix:
            mapped = self._with_prefix(prefix, mapped)
        if self.bias is not None:
            mapped = mapped + self.bias.to(mapped.dtype)
        carried = self.activation(self.norm(mapped)).to(value.dtype)
        return _in_axes_of(self.spec.target, carried)

    def split(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix tokens to carry, and the grid, each (batch, channels, height, width)."""
        first = self.spec.source.prefix
        prefix = sequence[..., : self.spec.carried].unsqueeze(2)
        return prefix, sequence[..., first:].unflatten(2, self.spec.sizes[0])

    def _with_prefix(self, prefix: Tensor, mapped: Tensor) -> Tensor:
        parts = [mapped.flatten(2).unsqueeze(2)]
        if self.prefix is not None:
            parts.insert(0, mapped.mean((2, 3), keepdim=True) + self.prefix.to(mapped.dtype))
        if self.spec.carried:
            parts.insert(0, self.channels(prefix))
        return torch.cat(parts, 3)


def channels_first(value: Tensor, activation: Activation) -> Tensor:
    """(batch, channels, positions): prefix tokens first, then the grid row by row."""
    match activation.axes:
        case "BCHW":
            return value.flatten(2)
        case "BHWC":
            return value.flatten(1, 2).mT
        case "BTC":
            return value.mT
        case "TBC":
            return value.permute(1, 2, 0)
        case "BC":
            return value.unsqueeze(2)
    assert activation.axes == "BCT", activation.axes
    return value


def _in_axes_of(target: Activation, value: Tensor) -> Tensor:
    """The inverse of :func:`channels_first`, from (batch, channels, height, width)."""
    sequence = value.flatten(2)
    match target.axes:
        case "BCHW":
            return sequence.unflatten(2, target.shape[1:])
        case "BHWC":
            return sequence.mT.unflatten(1, target.shape[:2])
        case "BTC":
            return sequence.mT
        case "TBC":
            return sequence.permute(2, 0, 1)
        case "BC":
            return sequence.squeeze(2)
    return sequence


def _before(spec: AdapterSpec) -> nn.Module:
    """The spatial part on the source's channels: shrinking, or a kernel of its own per channel."""
    width = spec.source.channels
    if spec.operation in ("downsample", "upsample"):
        return nn.Identity() if spec.rank is None else _depthwise(spec.operation, width)
    have, _ = spec.sizes
    small = _smaller(spec)
    return nn.Identity() if small == have else nn.AdaptiveAvgPool2d(small)


def _after(spec: AdapterSpec) -> nn.Module:
    """Enlarging, which commutes with the channel map and so stands where that is cheaper."""
    _, want = spec.sizes
    if spec.operation in ("downsample", "upsample") or _smaller(spec) == want:
        return nn.Identity()
    return nn.Upsample(want, mode="bilinear", align_corners=False)


def _smaller(spec: AdapterSpec) -> tuple[int, int]:
    have, want = spec.sizes
    return min(have[0], want[0]), min(have[1], want[1])


def _channel_map(spec: AdapterSpec) -> nn.Module:
    width, target = spec.source.channels, spec.target.channels
    if spec.rank is None and spec.operation == "downsample":
        return nn.Conv2d(width, target, 3, 2, 1, bias=False)
    if spec.rank is None and spec.operation == "upsample":
        return nn.ConvTranspose2d(width, target, 4, 2, 1, bias=False)
    if spec.rank is None or not spec.is_factored:
        return nn.Conv2d(width, target, 1, bias=False)
    return nn.Sequential(
        nn.Conv2d(width, spec.rank, 1, bias=False), nn.Conv2d(spec.rank, target, 1, bias=False)
    )


def _depthwise(operation: str, width: int) -> nn.Module:
    if operation == "downsample":
        kernel = nn.Conv2d(width, width, 3, 2, 1, groups=width, bias=False)
    else:
        kernel = nn.ConvTranspose2d(width, width, 4, 2, 1, groups=width, bias=False)
    with torch.no_grad():
        kernel.weight.copy_(smoothing(operation))
    return kernel


def smoothing(operation: str) -> Tensor:
    """The binomial 3×3 kernel that halves a grid, or the bilinear 4×4 one that doubles it."""
    taps = torch.tensor([1.0, 2.0, 1.0] if operation == "downsample" else [1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) / 16


def _norm(spec: AdapterSpec) -> nn.Module:
    kinds = {"BN": nn.BatchNorm2d, "LN": ChannelNorm}
    return kinds[spec.norm](spec.target.channels) if spec.norm else nn.Identity()


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (batch, channels, height, width)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)
