"""Start an adapter at the least-squares map from the student's tensors to the teacher's.

SN-Net (Pan et al. 2023, arXiv 2302.06586) starts its stitching layers so, from all rows at once by
a pseudo-inverse. Ours streams: only Gram matrices are kept, ridge steadies them, and a tenth of the
samples, never seen by the fit, says whether it is worth anything.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdsurgeon.adapters.building import Adapter, ChannelNorm, channels_first, smoothing
from kdsurgeon.errors import DataError, NumericsError

HELD_OUT = 10  # every tenth sample judges the fit
WORTHLESS = 0.02  # share of variance explained below which the initial weights stay
MOST_FEATURES = 2304  # a Gram matrix of 40 MiB; wider 3×3 and 4×4 kernels are fitted smooth
ROW_BUDGET = 2**23  # float64 numbers of one chunk of rows: 64 MiB


class Fit:
    """Ridge least squares for one adapter: :meth:`add` batches of both tensors, then :meth:`solve`.

    What is fitted is the linear map before norm and ReLU. A 3×3 or 4×4 kernel is fitted whole
    where its inputs are at most ``MOST_FEATURES`` numbers, else as a smooth kernel times a 1×1 map.
    A factored map is the best one of its rank (reduced-rank regression, Izenman 1975). Before a
    LayerNorm the target is taken normalised, and the norm's scale and shift are fitted to undo it.

    Args:
        adapter: what :func:`kdsurgeon.adapters.build` made; identity has nothing to fit.
        ridges: relative to the mean variance of the inputs; the one that predicts the held-out
            samples best is taken.

    >>> from kdsurgeon.adapters import AdapterSpec, build
    >>> from kdsurgeon.layouts import Activation
    >>> source, target = Activation("a", (4,), "BC"), Activation("b", (3,), "BC")
    >>> adapter = build(AdapterSpec("linear", source, target))
    >>> fit, inputs = Fit(adapter), torch.randn(200, 4)
    >>> fit.add(inputs, inputs[:, :3] * 2 + 1)
    >>> fit.solve() > 0.999
    True
    """

    def __init__(
        self, adapter: Adapter, *, ridges: Sequence[float] = (1e-6, 1e-4, 1e-2, 1.0)
    ) -> None:
        assert isinstance(adapter, Adapter), "only an Adapter has weights to fit"
        self.adapter = adapter
        self.ridges = tuple(ridges)
        device = next(adapter.parameters()).device
        self._device = torch.device("cpu") if device.type == "mps" else device  # it lacks float64
        self._spatial = copy.deepcopy(nn.Sequential(adapter.before, adapter.after)).to(
            self._device, torch.float64
        )
        self._kernels = _kernels(adapter).to(self._device, torch.float64)
        features = adapter.spec.source.channels * len(self._kernels)
        width = adapter.spec.target.channels
        self._fitted, self._held_out = (
            _Moments(*(self._zeros(*shape) for shape in _Moments.shapes(features, width)))
            for _ in range(2)
        )
        self._cells = self._zeros(features + 1)
        self._prefix = self._zeros(width, adapter.spec.target.prefix - adapter.spec.carried)
        self._reads = adapter.spec.source.channels * self._kernels[0].numel()
        self._seen = 0

    @torch.no_grad()
    def add(self, source: Tensor, target: Tensor) -> None:
        """Take a batch of the student's and the teacher's tensors for the same samples.

        Both in their own axes, of any float dtype; memory does not grow with the batches.
        """
        spec = self.adapter.spec
        inputs, targets = channels_first(source, spec.source), channels_first(target, spec.target)
        assert len(inputs) == len(targets), "both tensors must stem from the same samples"
        numbers = torch.arange(self._seen, self._seen + len(inputs))
        self._seen += len(inputs)
        is_held_out = numbers % HELD_OUT == HELD_OUT - 1
        per_sample = max(inputs.shape[2], targets.shape[2]) * self._reads
        for held_out in (False, True):
            indices = (is_held_out == held_out).nonzero().flatten()
            for some in indices.split(max(1, ROW_BUDGET // per_sample)):
                self._add(inputs[some], targets[some], held_out=held_out)

    def solve(self) -> float:
        """Write the solution into the adapter and return its R² on the held-out samples.

        R² counts the linear prediction, over all channels together. Below ``WORTHLESS`` the adapter
        keeps its initial weights. Afterwards it predicts alike in evaluation and in train mode.

        Raises:
            DataError: fewer than ten samples were added.
            NumericsError: one of the tensors held NaN or infinity.
        """
        if self._seen < HELD_OUT:
            raise DataError(
                f"the least-squares start saw {self._seen} samples.",
                why=f"every {HELD_OUT}th sample judges the fit",
                fix=f"give it {HELD_OUT} or more",
            )
        if not self._is_finite():
            raise NumericsError(
                "the least-squares start met NaN or infinity.",
                where=f"{self.adapter.spec.source.name} → {self.adapter.spec.target.name}",
                fix="check the inputs and the precision of both models",
            )
        best = max((self._solution(ridge) for ridge in self.ridges), key=lambda one: one.score)
        if best.score >= WORTHLESS:
            self._write(best)
        return best.score

    def _is_finite(self) -> bool:
        moments = (self._fitted, self._held_out)
        sums = [sums for one in moments for sums in (one.gram, one.cross, one.squares)]
        return all(bool(one.isfinite().all()) for one in (*sums, self._prefix))

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self._device)

    def _add(self, inputs: Tensor, targets: Tensor, *, held_out: bool) -> None:
        spec, moments = self.adapter.spec, self._held_out if held_out else self._fitted
        inputs, targets = (one.to(self._device).double() for one in (inputs, targets))
        prefix, grid = self.adapter.split(inputs)
        cells = rows = _with_ones(self._features(grid))
        if spec.carried:
            rows = torch.cat([_with_ones(prefix.flatten(2)), cells], 2)
        wanted = _normalized(targets) if isinstance(self.adapter.norm, ChannelNorm) else targets
        present = _without(wanted, spec.carried, spec.target.prefix)
        moments.add(_rows(rows), _rows(present))
        if wanted is not targets:
            moments.add_raw(present, _without(targets, spec.carried, spec.target.prefix))
        if self.adapter.prefix is not None and not held_out:
            self._cells += cells.sum((0, 2))
            self._prefix += wanted[..., spec.carried : spec.target.prefix].sum(0)

    def _features(self, grid: Tensor) -> Tensor:
        """(batch, inputs, positions): what the 1×1 map to be found turns into the prediction."""
        if self._kernels.numel() == 1:
            return self._spatial(grid).flatten(2)
        patches = _patches(
            grid, is_transposed=isinstance(self.adapter.channels, nn.ConvTranspose2d)
        )
        taps = patches.unflatten(1, (grid.shape[1], -1))
        return torch.einsum("bctp,kt->bckp", taps, self._kernels.flatten(1)).flatten(1, 2)

    def _solution(self, ridge: float) -> _Solution:
        mean, target_mean, spread, shared = self._fitted.centred()
        steadied = spread.clone()
        count = self._fitted.gram[-1, -1]
        energy = self._fitted.gram.diagonal()[:-1].mean() / count
        # the last two terms keep the matrix definite where all inputs are constant but for the
        # rounding of as many sums, or zero
        rounding = (1e-12 + count * torch.finfo(count.dtype).eps) * energy
        steadied.diagonal().add_(ridge * spread.diagonal().mean() + rounding + 1e-30)
        weight = torch.cholesky_solve(shared, torch.linalg.cholesky(steadied))
        factor = None
        if self.adapter.spec.is_factored:
            assert self.adapter.spec.rank is not None
            explained = weight.T @ spread @ weight
            factor = torch.linalg.eigh(explained).eigenvectors[:, -self.adapter.spec.rank :]
            weight = weight @ factor @ factor.T
        bias = target_mean - mean @ weight
        return _Solution(weight, bias, factor, self._held_out.score(weight, bias))

    @torch.no_grad()
    def _write(self, found: _Solution) -> None:
        channels, norm = self.adapter.channels, self.adapter.norm
        if isinstance(channels, nn.Sequential):
            assert found.factor is not None
            _fill(channels[0], (found.weight @ found.factor).T[..., None, None])
            _fill(channels[1], found.factor[..., None, None])
        else:
            kernels = found.weight.unflatten(0, (-1, len(self._kernels)))
            order = "sthw" if isinstance(channels, nn.ConvTranspose2d) else "tshw"
            _fill(channels, torch.einsum(f"sjt,jhw->{order}", kernels, self._kernels))
        mean, target_mean, spread, _ = self._fitted.centred()
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            variance = (found.weight * (spread @ found.weight)).sum(0).clamp(min=0)
            norm.running_mean.copy_(mean @ found.weight)
            norm.running_var.copy_(variance)
            norm.weight.copy_((variance + norm.eps).sqrt())
            norm.bias.copy_(target_mean)
        if isinstance(norm, ChannelNorm):
            scale, shift = self._fitted.undo_normalization()
            norm.weight.copy_(scale)
            norm.bias.copy_(shift)
        if self.adapter.bias is not None:
            self.adapter.bias.copy_(found.bias[:, None, None])
        if self.adapter.prefix is not None:
            height, width = self.adapter.spec.sizes[1]
            mapped = self._cells[:-1] / self._cells[-1] @ found.weight + found.bias
            mean_token = self._prefix / (self._cells[-1] / (height * width))
            self.adapter.prefix.copy_((mean_token - mapped[:, None]).unsqueeze(1))


@dataclass(frozen=True)
class _Solution:
    """``weight`` (inputs, channels) and its left ``factor`` (channels, rank) where it has one."""

    weight: Tensor
    bias: Tensor
    factor: Tensor | None
    score: float


@dataclass(frozen=True)
class _Moments:
    """Sums over rows: of the inputs x (with a one at the end), the fitted targets z, the raw y."""

    gram: Tensor  # x xᵀ
    cross: Tensor  # x zᵀ
    squares: Tensor  # z²
    raw: Tensor  # y
    mixed: Tensor  # z y

    @staticmethod
    def shapes(features: int, width: int) -> tuple[tuple[int, ...], ...]:
        return ((features + 1, features + 1), (features + 1, width), (width,), (width,), (width,))

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(inputs.T, targets)
        self.squares.add_(torch.linalg.vector_norm(targets, dim=0).square())

    def add_raw(self, targets: Tensor, raw: Tensor) -> None:
        self.raw.add_(raw.sum((0, 2)))
        self.mixed.add_((targets * raw).sum((0, 2)))

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means of inputs and targets, covariance of the inputs, and of inputs with targets."""
        count = self.gram[-1, -1]
        mean, target_mean = self.gram[-1, :-1] / count, self.cross[-1] / count
        spread = self.gram[:-1, :-1] / count - torch.outer(mean, mean)
        return mean, target_mean, spread, self.cross[:-1] / count - torch.outer(mean, target_mean)

    def score(self, weight: Tensor, bias: Tensor) -> float:
        """R² of the linear prediction, over all rows and channels; 0 for constant targets."""
        whole = torch.cat([weight, bias[None]])
        explained = 2 * (whole * self.cross).sum() - (whole * (self.gram @ whole)).sum()
        squares = self.squares.sum()
        around_mean = squares - (self.cross[-1].square() / self.gram[-1, -1]).sum()
        if around_mean <= 1e-12 * squares:
            return 0.0
        return (1 - (squares - explained) / around_mean).item()

    def undo_normalization(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of every channel that lead from the normalised target back to the raw."""
        count = self.gram[-1, -1]
        mean, raw_mean = self.cross[-1] / count, self.raw / count
        variance = (self.squares / count - mean.square()).clamp(min=1e-12)
        scale = (self.mixed / count - mean * raw_mean) / variance
        return scale, raw_mean - scale * mean


def _kernels(adapter: Adapter) -> Tensor:
    """The spatial kernels (kernels, height, width) whose sum, each times a 1×1 map, is fitted."""
    spec = adapter.spec
    if spec.rank is not None or spec.operation not in ("downsample", "upsample"):
        return torch.ones(1, 1, 1)
    size = 3 if spec.operation == "downsample" else 4
    if spec.source.channels * size * size > MOST_FEATURES:
        return smoothing(spec.operation).unsqueeze(0)
    return torch.eye(size * size).unflatten(1, (size, size))


def _patches(grid: Tensor, *, is_transposed: bool) -> Tensor:
    """(batch, channels * taps, positions): what each tap of the kernel reads for each output."""
    if not is_transposed:
        return functional.unfold(grid, 3, padding=1, stride=2)
    batch, channels, height, width = grid.shape
    spaced = grid.new_zeros(batch, channels, 2 * height + 3, 2 * width + 3)
    spaced[..., 2:-1:2, 2:-1:2] = grid  # a transposed convolution reads its inputs from the far end
    taps = functional.unfold(spaced, 4).unflatten(1, (channels, -1))
    return taps.flip(2).flatten(1, 2)


def _normalized(sequence: Tensor) -> Tensor:
    """(batch, channels, positions) with mean 0 and variance 1 over the channels."""
    return functional.layer_norm(sequence.mT, sequence.shape[1:2]).mT


def _without(sequence: Tensor, first: int, last: int) -> Tensor:
    """The sequence less the positions from ``first`` to before ``last``: tokens that it lacks."""
    if first == last:
        return sequence
    return torch.cat([sequence[..., :first], sequence[..., last:]], 2)


def _with_ones(sequence: Tensor) -> Tensor:
    return functional.pad(sequence, (0, 0, 0, 1), value=1.0)


def _rows(sequence: Tensor) -> Tensor:
    return sequence.mT.flatten(0, 1)


def _fill(module: nn.Module, weight: Tensor) -> None:
    assert isinstance(module.weight, Tensor)
    module.weight.copy_(weight)
