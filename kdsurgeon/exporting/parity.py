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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnxruntime
import torch
from torch import Tensor, nn

from kdsurgeon.errors import NumericsError, UsageError
from kdsurgeon.exporting.converting import Network, messages
from kdsurgeon.exporting.gate import session
from kdsurgeon.exporting.samples import (
    Samples,
    by_name,
    chunks,
    count,
    edges_of,
    random_like,
    repeated,
    rows,
)
from kdsurgeon.exporting.staging import first_line
from kdsurgeon.tracing import Inputs

__all__ = ["Parity", "accuracy", "check_interface", "first_line", "logits", "messages", "parity",
           "predicted", "reference", "resting"]  # fmt: skip

BATCH_SIZES = (1, 2, 3, 7)
CHUNK = 64  # samples per run when all are run; bounds the memory, not the result
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
    edges: int = 0  # samples at the edge: zeros and extremes
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
    edges = edges_of(samples)
    groups.append(gate.measure(edges, is_edge=True))
    groups += [gate.measure(other) for other in others]
    worst = max(groups, key=lambda group: group.gap / group.bound if group.bound else group.gap)
    compared = groups[:2] if random else groups[:1]
    num = sum(group.samples for group in compared)
    agreement = sum(group.agreement * group.samples for group in compared) / num
    sizes = {*BATCH_SIZES, *(min(CHUNK, group.samples) for group in compared)}
    return Parity(
        worst.gap, worst.scale, worst.bound, agreement, count(samples), random,
        (batch,) if batch else tuple(sorted(sizes)), count(edges),
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


def accuracy(path: str | os.PathLike[str], samples: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy, 0 to 1, of an ONNX file on ``samples`` (n, …) with ``labels`` (n,).

    Raises :class:`UsageError` when the two are not equally many, and as :func:`session` does.
    """
    if len(samples) != len(labels) or not len(labels):
        raise UsageError(f"accuracy needs a label for each sample; got {len(samples)} samples and "
                         f"{len(labels)} labels.")  # fmt: skip
    path = Path(path)
    run = session(path, sample=samples.shape[1:])
    batch = check_interface(run, path, batch=fixed_batch(run))
    return hits(run, samples, labels, path, batch=batch)


def hits(
    run: onnxruntime.InferenceSession,
    samples: Inputs,
    labels: Tensor,
    path: Path,
    *,
    batch: int | None = None,
) -> float:
    """The share of samples, 0 to 1, whose largest logit is that of their label (n,)."""
    found = logits(run, samples, path, batch=batch).argmax(-1)
    return (found == labels.cpu()).double().mean().item()


def predicted(run: onnxruntime.InferenceSession, samples: Tensor, path: Path) -> Tensor:
    """The top-1 class of each sample, (n,), int64."""
    return logits(run, samples, path).argmax(1)


def resting(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the CPU in eval mode; the model itself stays as it is.

    A tensor that the last forward pass left behind on a module is copied without its history.
    Raises :class:`UsageError` when the model cannot be copied.
    """
    left_behind = (value for module in model.modules() for value in vars(module).values())
    memo = {
        id(value): value.detach().clone()
        for value in left_behind
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, memo).cpu().eval()
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__} cannot be copied, so it cannot be measured untouched.",
            why=first_line(error),
            fix="keep files, locks and other open things out of the module",
        ) from error


def reference(
    network: Network, samples: Samples, *, seed: int = 0, may_be_infinite: bool = False
) -> Tensor:
    """The logits of a resting network, (n, classes), its randomness if any drawn from ``seed``.

    Raises :class:`UsageError` when it does not run and :class:`NumericsError` when they are not
    finite.
    """
    total = count(samples)
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed reseeds CUDA too
            found = torch.cat([network.answer(chunk) for chunk in chunks(samples, CHUNK)])
    except Exception as error:
        shape = tuple(next(iter(samples.values())).shape[1:])
        raise UsageError(
            f"{network.label} cannot run a batch of {min(CHUNK, total)} samples of shape {shape}.",
            why=first_line(error),
        ) from error
    if not may_be_infinite and not bool(found.isfinite().all()):
        bad = int((~found.isfinite()).flatten(1).any(1).sum())
        raise NumericsError(
            f"{network.label} itself gives logits that are not finite, "
            f"for {bad} of {total} samples.",
            fix="export weights from before training went wrong, and check how the images are "
            "normalised",
        )
    return found


def logits(
    run: onnxruntime.InferenceSession, samples: Inputs, path: Path, *, batch: int | None = None
) -> Tensor:
    """What the session computes for ``samples`` (n, …), :data:`CHUNK` at a time: (n, classes).

    A file that takes one ``batch`` size only is given that; the last batch is filled up.
    """
    given = run.get_inputs()
    if isinstance(samples, Tensor) or len(given) == 1:
        value = samples if isinstance(samples, Tensor) else next(iter(samples.values()))
        samples = {given[0].name: value.detach().cpu()}
    _check_fit(given, samples, path)
    found = []
    for chunk in chunks(samples, batch or CHUNK):
        wanted = count(chunk)
        found.append(_run(run, repeated(chunk, batch or wanted), path)[:wanted])
    return torch.cat(found)


def _run(run: onnxruntime.InferenceSession, chunk: Samples, path: Path) -> Tensor:
    """The logits of one batch."""
    shape = tuple(next(iter(chunk.values())).shape)
    try:
        (found,) = run.run(None, {name: value.numpy() for name, value in chunk.items()})
    except Exception as error:
        raise NumericsError(
            f"{path.name} cannot run an input of shape {shape}.", why=first_line(error)
        ) from error
    result = torch.from_numpy(found)
    axes = (2, 3) if any(not value.is_floating_point() for value in chunk.values()) else (2,)
    if result.ndim not in axes or len(result) != shape[0]:
        raise NumericsError(
            f"{path.name} returns shape {tuple(result.shape)} for {shape[0]} samples, "
            f"not (batch, classes)."
        )
    return result


def check_interface(
    run: onnxruntime.InferenceSession,
    path: Path,
    *,
    batch: int | None = None,
    inputs: Mapping[str, str] | None = None,
    free: Mapping[str, Mapping[int, str]] | None = None,
) -> int | None:
    """One input, one fp32 output of logits, and the axes free that should be, and no others.

    The batch axis is free, or ``batch``, which is returned. ``inputs`` are the types of other
    inputs than one of fp32, by name; ``free`` names all axes that may be free, where that is known.
    Raises :class:`NumericsError`.
    """
    given, results = run.get_inputs(), run.get_outputs()
    wanted = {value.name: "tensor(float)" for value in given[:1]} if inputs is None else inputs
    for values, names, kind in ((given, list(wanted), "input"), (results, None, "output")):
        if len(values) != (len(wanted) if names else 1):
            listed = ", ".join(value.name for value in values) or "none"
            num = f"the inputs {', '.join(wanted)}" if names and len(names) > 1 else f"one {kind}"
            raise NumericsError(f"{path.name} must have {num}; it has {listed}.")
        for value in values:
            _check_value(value, kind, wanted if names else {}, batch, path)
    for value in given if free is not None else ():
        _check_axes(value, (free or {}).get(value.name, {}), path)
    return batch


def fixed_batch(run: onnxruntime.InferenceSession) -> int | None:
    """The one batch size that a file declares; None when it is free."""
    shape = run.get_inputs()[0].shape
    return shape[0] if shape and isinstance(shape[0], int) else None


def _check_value(
    value: onnxruntime.NodeArg, kind: str, types: Mapping[str, str], batch: int | None, path: Path
) -> None:
    type_name = types.get(value.name, "tensor(float)")
    if value.type != type_name:
        wanted = "fp32" if type_name == "tensor(float)" else type_name
        raise NumericsError(f'{path.name}: {kind} "{value.name}" is {value.type}, not {wanted}.')
    if batch is not None and value.shape and value.shape[0] == batch:
        return
    if batch is not None or not value.shape or isinstance(value.shape[0], int):
        raise NumericsError(
            f'{path.name}: the batch axis of {kind} "{value.name}" is not '
            f"{'dynamic' if batch is None else batch}; its shape is {_spelled(value.shape)}.",
            fix="in the model, write -1 or x.shape[0] where a batch size stands as a number",
        )


def _check_axes(value: onnxruntime.NodeArg, free: Mapping[int, str], path: Path) -> None:
    """Every axis of an input that should be free is, and no other."""
    found = {axis for axis, size in enumerate(value.shape) if not isinstance(size, int)}
    for axis in sorted(found ^ set(free)):
        what = "is free, though only one size was proved" if axis in found else "is not free"
        raise NumericsError(
            f'{path.name}: axis {axis} of input "{value.name}" {what}; '
            f"its shape is {_spelled(value.shape)}."
        )


def check_refusals(run: onnxruntime.InferenceSession, samples: Samples, path: Path) -> None:
    """ONNX Runtime refuses what the file does not declare: another size of any axis that is fixed.

    A file that broadcasts instead would answer, wrongly, with no word. Raises
    :class:`NumericsError`.
    """
    for value in run.get_inputs():
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int):
                continue
            grown = dict(samples)
            grown[value.name] = grown[value.name].repeat_interleave(2, axis)
            try:
                run.run(None, {name: each.numpy() for name, each in grown.items()})
            except Exception:  # as it should
                continue
            raise NumericsError(
                f'{path.name} answers when axis {axis} of "{value.name}" is '
                f"{grown[value.name].shape[axis]}, though it declares {size}."
            )


_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(uint8)": torch.uint8,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


def type_name(value: Tensor) -> str:
    """What ONNX Runtime calls the type of a tensor."""
    return next((name for name, dtype in _TYPES.items() if dtype == value.dtype), str(value.dtype))


def _check_fit(given: Sequence[onnxruntime.NodeArg], samples: Samples, path: Path) -> None:
    for each in given:
        value = samples.get(each.name)
        if value is None:
            raise UsageError(f'{path.name} takes an input "{each.name}", which was not given.')
        fits = len(each.shape) == value.ndim and all(
            wanted == found
            for wanted, found in zip(each.shape[1:], value.shape[1:], strict=True)
            if isinstance(wanted, int)
        )
        if not fits or value.dtype != _TYPES.get(each.type):
            kind = str(_TYPES.get(each.type, each.type)).removeprefix("torch.")
            raise UsageError(
                f"{path.name} takes {kind} of shape {_spelled(each.shape)}, not {value.dtype} of "
                f"shape {tuple(value.shape)}."
            )


def _spelled(shape: list[int | str | None]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


def _peak(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _larger(a: float, b: float) -> float:
    """The larger of two, where NaN is larger than any number."""
    return b if math.isnan(b) or b > a else a
