"""Measure how far an ONNX file is from the network it was written from, and refuse what is too far.

The network is run in large batches and the file in small ones (and in large ones), so a file that
is right only at one batch size, and a network whose logits depend on its neighbours in the batch,
both show as a gap. Samples are compared in groups (real, random, at the edge, of another size),
each with a bound of its own, so that large logits of one excuse no gap in another.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnxruntime
import torch
from torch import Tensor, nn

from kdsurgeon.errors import NumericsError
from kdsurgeon.exporting.answers import CHUNK, logits, reference, resting
from kdsurgeon.exporting.converting import Network
from kdsurgeon.exporting.gate import session
from kdsurgeon.exporting.interface import check_interface
from kdsurgeon.exporting.samples import (
    Samples,
    by_name,
    count,
    edges_of,
    random_like,
    rows,
)

BATCH_SIZES = (1, 2, 3, 7)
FP32_TOLERANCE = 1e-5  # of max(1, largest logit); torch's own floor for fp32
FP16_TOLERANCE = 1e-2  # of the largest logit
FP16_DISAGREEMENT = 1e-3  # share of real samples that may get another class, by a margin in bounds

Precision = Literal["fp32", "fp16"]
Locate = Callable[[Samples], str | None]


@dataclass(frozen=True)
class Parity:
    """How an ONNX file compares with the network it was written from.

    ``gap``, ``scale`` and ``bound`` are of the group of samples that came closest to its bound.
    """

    gap: float  # largest absolute difference of any logit, at any batch size
    scale: float  # largest absolute logit of the network
    bound: float  # a larger gap is refused
    agreement: float  # share of real and random samples with the same top-1 class
    samples: int  # real samples compared
    random: int  # random samples compared
    batch_sizes: tuple[int, ...]
    edges: int = 0  # compared samples at the edge: zeros and extremes
    sizes: tuple[tuple[int, ...], ...] = ()  # other sizes of the input that were compared
    precision: Precision = "fp32"

    @property
    def relative(self) -> float:
        """The gap as a share of the largest logit."""
        return self.gap / self.scale if self.scale else self.gap

    def __str__(self) -> str:
        batches = ", ".join(map(str, self.batch_sizes))
        sizes = "".join(f", size {'×'.join(map(str, size))}" for size in self.sizes)
        return (
            f"gap {self.gap:.1e}, relative {self.relative:.1e} (bound {self.bound:.1e}), "
            f"top-1 agreement {self.agreement:.2%} on {self.samples} samples and {self.random} "
            f"random ones, {self.edges} at the edge, batch sizes {batches}{sizes}"
        )


def parity(
    model: nn.Module,
    path: str | os.PathLike[str],
    samples: Tensor,
    *,
    tolerance: float | None = None,
    random: int = 16,
    seed: int = 0,
    precision: Precision = "fp32",
) -> Parity:
    """Compare an ONNX file with ``model`` in eval mode, the model in fp32, both on the CPU.

    ``samples`` is (n, …), float32, as the model takes them (normalised); ``random`` standard normal
    samples of the same shape are compared as well, and zeros and extremes. Batch sizes 1, 2, 3, 7
    and up to 64 are run. In fp32 the
    largest difference may be ``tolerance`` (1e-5, torch's own floor) · max(1, max |y|); of a file
    of fp16 weights ``tolerance`` (1e-2) · max |y|, and one real sample in a thousand, or one in
    all, may get another class. ``model`` is left as it was.

    Raises :class:`NumericsError` when the difference is larger, when the top-1 class differs on a
    sample whose margin exceeds that bound, or when the file's outputs are not the model's in
    number, shape or dtype, or its batch axis is fixed; :class:`ModelFileError` when the file is no
    ONNX model.
    """
    path = Path(path)
    run = session(path, sample=samples.shape[1:])
    check_interface(run, path)
    network = Network(resting(model), ("input",))
    named = by_name(samples)
    return prove(
        network, run, path, named, tolerance=tolerance, random=random, seed=seed,
        precision=precision,
    )  # fmt: skip


def prove(
    network: Network,
    run: onnxruntime.InferenceSession,
    path: Path,
    samples: Samples,
    *,
    tolerance: float | None = None,
    random: int = 16,
    seed: int = 0,
    precision: Precision = "fp32",
    others: Sequence[Samples] = (),
    batch: int | None = None,
    locate: Locate | None = None,
) -> Parity:
    """:func:`parity` of a resting network and an open file, over inputs by name.

    ``others`` are samples of other sizes, where the file takes these; ``batch`` is the one batch
    size that it takes, None when it takes every one. ``locate`` finds for samples with a gap the
    first value of the file that differs.
    """
    gate = _Gate(network, run, path, tolerance, precision, batch, locate)
    real, noise = dict(samples), random_like(samples, random, seed)
    groups = [gate.measure(group) for group in (real, noise) if group]
    edges = gate.measure(edges_of(samples), is_edge=True)
    groups.append(edges)
    groups += [gate.measure(other) for other in others]
    worst = max(groups, key=lambda group: group.gap / group.bound if group.bound else group.gap)
    compared = groups[:2] if random else groups[:1]
    num = sum(group.samples for group in compared)
    agreement = sum(group.agreement * group.samples for group in compared) / num
    sizes = {*BATCH_SIZES, *(min(CHUNK, group.samples) for group in compared)}
    return Parity(
        worst.gap, worst.scale, worst.bound, agreement, count(samples), random,
        (batch,) if batch else tuple(sorted(sizes)), edges.samples,
        tuple(tuple(next(iter(other.values())).shape[1:]) for other in others), precision,
    )  # fmt: skip


@dataclass(frozen=True)
class _Group:
    """What one group of samples showed."""

    gap: float
    scale: float
    bound: float
    agreement: float
    samples: int


@dataclass(frozen=True)
class _Gate:
    """What a network and its file must show on any group of samples."""

    network: Network
    run: onnxruntime.InferenceSession
    path: Path
    tolerance: float | None
    precision: Precision
    batch: int | None
    locate: Locate | None

    def measure(self, samples: Samples, *, is_edge: bool = False) -> _Group:
        expected = reference(self.network, samples, may_be_infinite=is_edge)
        clear = expected.isfinite().flatten(1).all(1)
        if not bool(clear.all()):  # only at the edge: the network itself has no answer there
            samples, expected = rows(samples, clear), expected[clear]
        if not len(expected):
            return _Group(0.0, 0.0, self._bound(0.0), 1.0, 0)
        actual = self._answers(samples)
        self._check_form(expected, actual)
        scale = _peak(expected)
        bound = self._bound(scale)
        self._check_steady(samples, expected, bound)
        self._check_finite(samples, actual)
        gap, agreement, wrong = compare(expected, actual, bound)
        for size in () if self.batch else BATCH_SIZES:
            index = torch.arange(size) % len(expected)
            found = self._answers(rows(samples, index))
            of_these = _peak(found - expected[index])
            self._check_gap(rows(samples, index), of_these, bound)
            gap = _larger(gap, of_these)
        self._check_gap(self._worst(samples, expected, actual), gap, bound)
        self._check_classes(samples, expected, agreement, wrong, bound)
        return _Group(gap, scale, bound, agreement, len(expected))

    def _answers(self, samples: Samples) -> Tensor:
        return logits(self.run, samples, self.path, batch=self.batch)

    def _bound(self, scale: float) -> float:
        if self.precision == "fp16":
            return (FP16_TOLERANCE if self.tolerance is None else self.tolerance) * scale
        return (FP32_TOLERANCE if self.tolerance is None else self.tolerance) * max(1.0, scale)

    def _worst(self, samples: Samples, expected: Tensor, actual: Tensor) -> Samples:
        """The two samples with the largest gap."""
        gaps = (actual - expected).abs().flatten(1).amax(1).nan_to_num(math.inf)
        return rows(samples, gaps.argsort(descending=True)[:2])

    def _check_form(self, expected: Tensor, actual: Tensor) -> None:
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            raise NumericsError(
                f"{self.path.name} returns {actual.dtype} {tuple(actual.shape)} where the model "
                f"returns {expected.dtype} {tuple(expected.shape)}."
            )

    def _check_finite(self, samples: Samples, actual: Tensor) -> None:
        bad = ~actual.isfinite().flatten(1).all(1)
        if bool(bad.any()) and self.precision == "fp16":
            raise NumericsError(
                f"{self.path.name} gives logits that are not finite for {int(bad.sum())} of "
                f"{len(actual)} samples; those of {self.network.label} in fp32 are.",
                where=self._where(rows(samples, bad)),
                why="float16 ends at 65,504",
            )

    def _check_gap(self, samples: Samples, gap: float, bound: float) -> None:
        if gap <= bound:  # false also when either is not a number
            return
        raise NumericsError(
            f"{self.path.name} does not compute what {self.network.label} computes: the logits "
            f"differ by {gap:.3g}, {bound:.3g} is allowed.",
            where=self._where(samples),
            **self._rounding(samples, bound, gap),
        )

    def _check_classes(
        self, samples: Samples, expected: Tensor, agreement: float, wrong: int, bound: float
    ) -> None:
        if wrong:
            raise NumericsError(
                f"{self.path.name} gives {wrong} of {len(expected)} samples another class than "
                f"{self.network.label}, each by a margin above {bound:.3g}."
            )
        differ = round((1 - agreement) * len(expected))
        if self.precision == "fp16" and differ > max(1, FP16_DISAGREEMENT * len(expected)):
            raise NumericsError(
                f"{self.path.name} gives {differ} of {len(expected)} samples another class than "
                f"{self.network.label} in fp32.",
                why="their two best logits lie closer together than float16 tells apart",
                needs="one in a thousand at most, or one in all",
                fix="train the student until it is surer of its answers, or leave out --half",
            )

    def _where(self, samples: Samples) -> str | None:
        return self.locate(samples) if self.locate and count(samples) else None

    def _rounding(self, samples: Samples, bound: float, gap: float) -> dict[str, str]:
        """Notes, where fp32 itself is to blame: the network is as far from itself in fp64."""
        if self.precision == "fp16":
            return {}
        try:
            exact = copy.deepcopy(self.network).double()
            doubled = {
                name: value.double() if value.is_floating_point() else value
                for name, value in samples.items()
            }
            found = reference(self.network, samples)
            own = _peak(found - reference(exact, doubled))
        except Exception:  # not every network can be run in double precision
            return {}
        if own <= bound / 2:
            return {}
        enough = 2 * max(own, gap) / max(1.0, _peak(found))
        why = (
            f"rounding: in fp32 {self.network.label} is {own:.3g} from its own float64 logits; "
            "a file that rounds otherwise cannot come closer"
        )
        return {"why": why, "fix": f"allow as much: --tolerance {enough:.0e}"}

    def _check_steady(self, samples: Samples, expected: Tensor, bound: float) -> None:
        """The network gives a sample the same logits every time and in every company.

        Without this a network that is random, or mixes its batch, would be reported as a wrong
        file, or pass because the file mixes it alike.
        """
        name, total = self.network.label, len(expected)
        if _peak(reference(self.network, samples, seed=1) - expected) > bound:
            raise NumericsError(
                f"{name} gives the same samples other logits each time, in eval mode too.",
                fix="switch off what is random in it when self.training is False",
            )
        for size in BATCH_SIZES:
            index = torch.arange(size) % total
            gap = _peak(reference(self.network, rows(samples, index)) - expected[index])
            if gap > bound:
                mixes = {
                    "why": "its logits depend on the batch, as batch norm on batch statistics does",
                    "fix": "let batch norm keep running statistics (track_running_stats=True), "
                    "and train it so",
                }
                raise NumericsError(
                    f"{name} gives a sample other logits in a batch of {size} than in one of "
                    f"{min(CHUNK, total)}.",
                    **(self._rounding(samples, bound, gap) or mixes),
                )


def compare(expected: Tensor, actual: Tensor, bound: float) -> tuple[float, float, int]:
    """Largest difference, top-1 agreement, and how many disagree by a margin above ``bound``.

    Both tensors are logits, (batch, classes) or (batch, tokens, classes). The margin of a sample is
    its largest expected logit minus the one of the class that was found instead.

    >>> compare(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 1.0]]), 0.5)
    (1.0, 0.0, 1)
    """
    expected, actual = expected.flatten(0, -2), actual.flatten(0, -2)
    wanted, found = expected.argmax(1), actual.argmax(1)
    margin = expected.gather(1, wanted[:, None]) - expected.gather(1, found[:, None])
    wrong = int((margin > bound).sum())
    return _peak(actual - expected), (wanted == found).double().mean().item(), wrong


def _peak(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _larger(a: float, b: float) -> float:
    """The larger of two, where NaN is larger than any number."""
    return b if math.isnan(b) or b > a else a
