"""Which operation carries one activation to another, whatever their layouts.

Positions are compared as grids (height, width); a vector is a grid of one cell. Where one side's
grid is unknown both sides count as one row of positions: the square root of a token count is
nobody's grid. Prefix tokens (class, registers) stand outside the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kdsurgeon.errors import PlanError, nearest
from kdsurgeon.layouts import Activation

Operation = Literal["identity", "conv", "downsample", "upsample", "resize", "linear"]


@dataclass(frozen=True)
class AdapterSpec:
    """What carries ``source`` to ``target``.

    conv, linear: 1×1, between equal grids; linear also takes the mean of all positions to a vector.
    downsample, upsample: 3×3 with stride 2 and 4×4 transposed with stride 2.
    resize: any grid to any other, and the only one that spreads a vector over a grid.
    identity: nothing.

    ``rank`` bounds the channel map: two factors through ``rank`` channels where that is smaller
    than the whole map, and a depthwise kernel before it instead of a full 3×3 or 4×4.

    Raises:
        PlanError: unknown operation, one that cannot carry source to target, impossible rank.
    """

    operation: Operation
    source: Activation
    target: Activation
    rank: int | None = None

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
                f"the adapter {self.operation} cannot carry {_described(self.source)} to "
                f"{_described(self.target)}.",
                fix=f"use {natural(self.source, self.target)}",
            )
        most = min(self.source.channels, self.target.channels)
        if self.rank is not None and (self.operation == "identity" or not 1 <= self.rank <= most):
            raise PlanError(
                f"the adapter {self.operation} cannot have rank {self.rank}.",
                fix="leave the rank out"
                + ("" if self.operation == "identity" else f", or give 1 to {most}"),
            )

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) of source and target as the adapter sees them."""
        return sizes(self.source, self.target)

    @property
    def carried(self) -> int:
        """Prefix tokens that both sides have: they pass through the channel map one by one."""
        return min(self.source.prefix, self.target.prefix)

    @property
    def is_factored(self) -> bool:
        narrow, wide = self.source.channels, self.target.channels
        return self.rank is not None and self.rank * (narrow + wide) < narrow * wide

    @property
    def norm(self) -> str | None:
        """Batch or layer normalisation behind the channel map, as the receiver expects it."""
        if self.target.kind == "map" and num_cells(self.target) > 1:
            return "BN"
        return "LN" if self.target.kind != "map" and self.target.is_normalized else None

    def __str__(self) -> str:
        if self.operation == "identity":
            return "identity"
        widths = [self.source.channels, *([self.rank] if self.is_factored else ())]
        steps = [*_bridge(self), f"{_name(self)} {'→'.join(map(str, widths))}"]
        ends = [self.norm, "ReLU" if self.target.is_rectified else None]
        return " + ".join([f"{', '.join(steps)}→{self.target.channels}", *filter(None, ends)])


def sizes(source: Activation, target: Activation) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of both, as one row each where either side's grid is unknown."""
    cells = (num_cells(source), num_cells(target))
    grids = (source.grid, target.grid)
    is_known = all(grid or cell == 1 for grid, cell in zip(grids, cells, strict=True))
    first, second = (
        grid if grid and is_known else (1, cell) for grid, cell in zip(grids, cells, strict=True)
    )
    return first, second


def num_cells(activation: Activation) -> int:
    """Positions without the prefix tokens."""
    return activation.positions - activation.prefix


def natural(source: Activation, target: Activation) -> Operation:
    """The operation that its two grids ask for; on maps the literature's strided convolutions."""
    have, want = sizes(source, target)
    if target.kind == "vector" or (have == want and target.kind == "tokens"):
        return "linear"
    if have == want:
        return "conv"
    if target.kind == "map" and _halves(source, target):
        return "downsample"
    if target.kind == "map" and _doubles(source, target):
        return "upsample"
    return "resize"


def _fits(spec: AdapterSpec) -> bool:
    source, target = spec.source, spec.target
    if spec.operation == "identity":
        first, second = ((one.axes, one.shape, one.prefix) for one in (source, target))
        return first == second
    if spec.operation == "downsample":
        return _halves(source, target)
    if spec.operation == "upsample":
        return _doubles(source, target)
    return spec.operation in ("resize", natural(source, target))


def _halves(source: Activation, target: Activation) -> bool:
    return _has_grids(source, target) and all(
        (size + 1) // 2 == want for size, want in zip(*sizes(source, target), strict=True)
    )


def _doubles(source: Activation, target: Activation) -> bool:
    return _has_grids(source, target) and all(
        size * 2 == want for size, want in zip(*sizes(source, target), strict=True)
    )


def _has_grids(source: Activation, target: Activation) -> bool:
    """Whether a spatial kernel has room: two grids, and no prefix token for it to map."""
    return bool(source.grid and target.grid) and min(source.prefix, target.prefix) == 0


def _bridge(spec: AdapterSpec) -> list[str]:
    """What happens before the channel map: the change of kind and of size."""
    have, want = (_size(size) for size in spec.sizes)
    kinds = (spec.source.kind, spec.target.kind)
    if kinds[1] == "vector":
        return [] if kinds[0] == "vector" else [f"mean of {have}"]
    steps = [] if kinds[0] == kinds[1] else [f"{kinds[0]}→{kinds[1]} {have}"]
    if spec.operation == "resize":
        steps.append(f"resize {want}")
    if spec.rank is not None and spec.operation in ("downsample", "upsample"):
        steps.append(f"depthwise {_SPATIAL[spec.operation]}")
    return steps


_SPATIAL = {"downsample": "3×3 ÷2", "upsample": "4×4 ×2"}


def _name(spec: AdapterSpec) -> str:
    if spec.rank is None and spec.operation in _SPATIAL:
        kind = "conv" if spec.operation == "downsample" else "deconv"
        return f"{kind} {_SPATIAL[spec.operation]}"
    return "conv 1×1" if spec.target.kind == "map" else "linear"


def _size(size: tuple[int, int]) -> str:
    return str(size[1]) if size[0] == 1 else f"{size[0]}×{size[1]}"


def _described(activation: Activation) -> str:
    shape = "×".join(map(str, activation.shape))
    prefix = f" with {activation.prefix} prefix tokens" if activation.prefix else ""
    return f"{shape} ({activation.axes}{prefix})"
