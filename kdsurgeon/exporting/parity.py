"""Measure how far an ONNX file is from the network it was written from, and refuse what is too far.

The network is run in large batches and the file in small ones (and in large ones), so a file that
is right only at one batch size, and a network whose logits depend on its neighbours in the batch,
both show as a gap.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError, Message
from torch import Tensor, nn

from kdsurgeon.errors import ModelFileError, NumericsError, UsageError

BATCH_SIZES = (1, 2, 3, 7)
CHUNK = 64  # samples per run when all are run; bounds the memory, not the result


@dataclass(frozen=True)
class Parity:
    """How an ONNX file compares with the network it was written from."""

    gap: float  # largest absolute difference of any logit, at any batch size
    scale: float  # largest absolute logit of the network
    bound: float  # tolerance · max(1, scale); a larger gap is refused
    agreement: float  # share of samples with the same top-1 class
    samples: int  # real samples compared
    random: int  # random samples compared
    batch_sizes: tuple[int, ...]

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.batch_sizes))
        return (
            f"gap {self.gap:.1e} (bound {self.bound:.1e}), top-1 agreement {self.agreement:.2%} "
            f"on {self.samples} samples and {self.random} random ones, batch sizes {sizes}"
        )


def parity(
    model: nn.Module,
    path: str | os.PathLike[str],
    samples: Tensor,
    *,
    tolerance: float = 1e-5,
    random: int = 16,
    seed: int = 0,
) -> Parity:
    """Compare an ONNX file with ``model`` in eval mode, both in fp32 on the CPU.

    ``samples`` is (n, …), float32, as the model takes them (normalised); ``random`` standard normal
    samples of the same shape are compared as well. Batch sizes 1, 2, 3, 7 and up to 64 are run. The
    largest difference may be ``tolerance · max(1, max |y|)``; torch's own floor for fp32 is 1e-5.
    ``model`` is left as it was.

    Raises :class:`NumericsError` when the difference is larger, when the top-1 class differs on a
    sample whose margin exceeds that bound, or when the file's outputs are not the model's in
    number, shape or dtype, or its batch axis is fixed; :class:`ModelFileError` when the file is no
    ONNX model.
    """
    twin, path = resting(model), Path(path)
    run = session(path)
    check_interface(run, path)
    real = samples.detach().cpu()
    noise = torch.randn(
        random, *real.shape[1:], dtype=real.dtype, generator=torch.Generator().manual_seed(seed)
    )
    groups = [group for group in (real, noise) if len(group)]
    expected = [reference(twin, group) for group in groups]
    actual = [logits(run, group, path) for group in groups]
    _check_form(expected[0], actual[0], path)
    scale = max(_peak(group) for group in expected)
    bound = tolerance * max(1.0, scale)
    for inputs, wanted in zip(groups, expected, strict=True):
        _check_steady(twin, inputs, wanted, bound)

    gap, agreement, wrong = compare(torch.cat(expected), torch.cat(actual), bound)
    for size in BATCH_SIZES:
        for inputs, wanted in zip(groups, expected, strict=True):
            rows = torch.arange(size) % len(inputs)
            found = logits(run, inputs[rows], path)
            gap = _larger(gap, _peak(found - wanted[rows]))
    if not gap <= bound:  # also when either is not a number
        raise NumericsError(
            f"{path.name} does not compute what {type(model).__name__} computes: the logits differ "
            f"by {gap:.3g}, {bound:.3g} is allowed."
        )
    if wrong:
        raise NumericsError(
            f"{path.name} gives {wrong} of {len(real) + len(noise)} samples another class than "
            f"{type(model).__name__}, each by a margin above {bound:.3g}."
        )
    sizes = {*BATCH_SIZES, *(min(CHUNK, len(group)) for group in groups)}
    return Parity(gap, scale, bound, agreement, len(real), len(noise), tuple(sorted(sizes)))


def compare(expected: Tensor, actual: Tensor, bound: float) -> tuple[float, float, int]:
    """Largest difference, top-1 agreement, and how many disagree by a margin above ``bound``.

    Both tensors are logits, (batch, classes). The margin of a sample is its largest expected logit
    minus the one of the class that was found instead.

    >>> compare(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 1.0]]), 0.5)
    (1.0, 0.0, 1)
    """
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
    run = session(path)
    check_interface(run, path)
    return (predicted(run, samples, path) == labels.cpu()).double().mean().item()


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


def reference(model: nn.Module, samples: Tensor, *, seed: int = 0) -> Tensor:
    """The logits of a resting model, (n, classes), its randomness if any drawn from ``seed``.

    Raises :class:`UsageError` when it does not run and :class:`NumericsError` when they are not
    finite.
    """
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed reseeds CUDA too
            found = torch.cat([model(chunk) for chunk in samples.split(CHUNK)])
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__} cannot run a batch of {min(CHUNK, len(samples))} samples of "
            f"shape {tuple(samples.shape[1:])}.",
            why=first_line(error),
        ) from error
    if not bool(found.isfinite().all()):
        rows = int((~found.isfinite()).any(1).sum())
        raise NumericsError(
            f"{type(model).__name__} itself gives logits that are not finite, "
            f"for {rows} of {len(samples)} samples."
        )
    return found


def session(path: str | os.PathLike[str], *, threads: int = 0) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU; ``threads`` 0 means as many as torch uses.

    The file is read once, and what was read is what runs. Raises :class:`ModelFileError` when there
    is no such file, when it is no ONNX model, or when it takes weights from another file.
    """
    path = Path(path)
    content = read(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Waiting threads that keep a core busy would slow down whatever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelFileError(
            f"{path.name} is not a model that ONNX Runtime can run.", why=first_line(error)
        ) from error


def read(path: Path) -> bytes:
    """The bytes of an ONNX file that stands alone; raises :class:`ModelFileError` otherwise."""
    try:
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read.", why=error.strerror) from error
    except DecodeError as error:
        raise ModelFileError(f"{path.name} is not an ONNX file.", why=first_line(error)) from error
    if not model.graph.node:
        raise ModelFileError(f"{path.name} is not an ONNX file.", why="it holds no graph")
    for part in messages(model):
        if isinstance(part, onnx.TensorProto) and part.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelFileError(
                f"{path.name} takes weights from another file; it was not loaded.",
                where=part.name,
                why="such a reference can name any file of this machine",
                fix="save the model as one file",
            )
    return content


def messages(message: Message) -> Iterator[Message]:
    """Every message inside a protobuf message, at any depth."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for child in [value] if isinstance(value, Message) else value:
            yield child
            yield from messages(child)


def logits(run: onnxruntime.InferenceSession, samples: Tensor, path: Path) -> Tensor:
    """What the session computes for ``samples`` (n, …), :data:`CHUNK` at a time: (n, classes)."""
    (given,) = run.get_inputs()
    _check_fit(given.shape, samples, path)
    found = []
    for chunk in samples.detach().cpu().split(CHUNK):
        try:
            (result,) = run.run(None, {given.name: chunk.numpy()})
        except Exception as error:
            raise NumericsError(
                f"{path.name} cannot run an input of shape {tuple(chunk.shape)}.",
                why=first_line(error),
            ) from error
        result = torch.from_numpy(result)
        if result.ndim != 2 or len(result) != len(chunk):
            raise NumericsError(
                f"{path.name} returns shape {tuple(result.shape)} for {len(chunk)} samples, "
                f"not (batch, classes)."
            )
        found.append(result)
    return torch.cat(found)


def check_interface(run: onnxruntime.InferenceSession, path: Path) -> None:
    """One input, one fp32 output of logits, the batch axis free; else :class:`NumericsError`."""
    inputs, outputs = run.get_inputs(), run.get_outputs()
    for values, kind in ((inputs, "input"), (outputs, "output")):
        if len(values) != 1:
            names = ", ".join(value.name for value in values) or "none"
            raise NumericsError(f"{path.name} must have one {kind}; it has {names}.")
        (value,) = values
        if value.type != "tensor(float)":
            raise NumericsError(f'{path.name}: {kind} "{value.name}" is {value.type}, not fp32.')
        if not value.shape or isinstance(value.shape[0], int):
            raise NumericsError(
                f'{path.name}: the batch axis of {kind} "{value.name}" is not dynamic; '
                f"its shape is {_spelled(value.shape)}.",
                fix="in the model, write -1 or x.shape[0] where a batch size stands as a number",
            )


def first_line(error: BaseException) -> str:
    """The first line that the innermost cause of ``error`` says."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _check_fit(shape: list[int | str | None], samples: Tensor, path: Path) -> None:
    fits = len(shape) == samples.ndim and all(
        wanted == found
        for wanted, found in zip(shape[1:], samples.shape[1:], strict=True)
        if isinstance(wanted, int)
    )
    if not fits or samples.dtype != torch.float32:
        raise UsageError(
            f"{path.name} takes float32 of shape {_spelled(shape)}, not {samples.dtype} of shape "
            f"{tuple(samples.shape)}."
        )


def _spelled(shape: list[int | str | None]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


def _check_form(expected: Tensor, actual: Tensor, path: Path) -> None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise NumericsError(
            f"{path.name} returns {actual.dtype} {tuple(actual.shape)} where the model returns "
            f"{expected.dtype} {tuple(expected.shape)}."
        )


def _check_steady(twin: nn.Module, samples: Tensor, expected: Tensor, bound: float) -> None:
    """The network gives a sample the same logits every time and in every company.

    Without this a network that is random, or mixes its batch, would be reported as a wrong file, or
    pass because the file mixes it alike.
    """
    name = type(twin).__name__
    if _peak(reference(twin, samples, seed=1) - expected) > bound:
        raise NumericsError(
            f"{name} gives the same samples other logits each time, in eval mode too.",
            fix="switch off what is random in it when self.training is False",
        )
    for size in BATCH_SIZES:
        rows = torch.arange(size) % len(samples)
        if _peak(reference(twin, samples[rows]) - expected[rows]) > bound:
            raise NumericsError(
                f"{name} gives a sample other logits in a batch of {size} than in one of "
                f"{min(CHUNK, len(samples))}.",
                why="its logits depend on the batch, as batch norm on batch statistics does",
            )


def _peak(values: Tensor) -> float:
    return values.abs().max().item()


def _larger(a: float, b: float) -> float:
    """The larger of two, where NaN is larger than any number."""
    return b if math.isnan(b) or b > a else a
