"""Prove a written ONNX file equal to the network it was written from, in the form asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor

from kdsurgeon.errors import ModelFileError, NumericsError, UsageError
from kdsurgeon.exporting.converting import Conversion, Network, free_axes
from kdsurgeon.exporting.divergence import first_divergence
from kdsurgeon.exporting.form import Form
from kdsurgeon.exporting.gate import session, vouch
from kdsurgeon.exporting.interface import check_interface, check_refusals, type_name
from kdsurgeon.exporting.parity import FP16_TOLERANCE, FP32_TOLERANCE, Parity, prove
from kdsurgeon.exporting.preprocessing import IMAGE, Embedded, other_sizes
from kdsurgeon.exporting.samples import (
    ONE,
    Samples,
    by_name,
    count,
    edges_of,
    random_like,
    repeated,
    rows,
)
from kdsurgeon.exporting.staging import first_line
from kdsurgeon.tracing import Inputs


@dataclass(frozen=True)
class Subject:
    """What is written, and what it is proved on."""

    network: Network
    form: Form
    example: Samples  # as the network takes it
    given: Samples  # as the file takes it
    tolerance: float | None

    @property
    def reference(self) -> Network:
        """What the file must equal, of the inputs that the file takes."""
        if self.form.preprocessing is None:
            return self.network
        embedded = Embedded(self.network.model, self.form.preprocessing)
        return _Embedding(embedded, softmax=self.network.softmax)

    def seen(self, given: Samples) -> Samples:
        """What the network itself is given for the inputs of the file."""
        if self.form.preprocessing is None:
            return given
        return {ONE: self.form.preprocessing.pixels(given[IMAGE])}


class _Embedding(Network):
    """A network behind its preprocessing; messages name the model, not what was put before it."""

    def __init__(self, model: Embedded, *, softmax: bool) -> None:
        super().__init__(model, (ONE,), softmax=softmax)

    @property
    def label(self) -> str:
        return type(self.model.model).__name__

    def answer(self, samples: Samples) -> Tensor:
        return self(samples[IMAGE])


@dataclass(frozen=True)
class File:
    """What was written, as it lies in memory."""

    conversion: Conversion  # the network in fp32, as torch wrote it
    model: onnx.ModelProto  # what became of it, with its weights
    data: Path | None
    overflow: NumericsError | None = None  # of float16


def check_file(part: Path, subject: Subject) -> onnxruntime.InferenceSession:
    """Valid ONNX of the standard operators in the version asked for, of the axes asked for."""
    opset = subject.form.opset
    try:
        onnx.checker.check_model(str(part), full_check=True)
    except Exception as error:
        raise NumericsError(f"{part.name} is not valid ONNX.", why=first_line(error)) from error
    model = onnx.load(part, load_external_data=False)
    found = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if found != {"ai.onnx": opset}:
        versions = ", ".join(f"{domain} {version}" for domain, version in found.items())
        raise NumericsError(f"{part.name} needs {versions}; ai.onnx {opset} was asked for.")
    run = _opened(part, subject)
    given = repeated(subject.given, subject.form.batch or 2)
    free = free_axes(given, batch=subject.form.batch, dynamic_size=subject.form.dynamic_size)
    if subject.form.preprocessing is not None and subject.form.batch is None:
        free = {IMAGE: {0: "batch", 1: "height", 2: "width"}}
    types = {name: type_name(value) for name, value in given.items()}
    check_interface(run, part, batch=subject.form.batch, inputs=types, free=free)
    check_refusals(run, given, part)
    return run


def _opened(part: Path, subject: Subject) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the file as it lies on the disk."""
    try:
        vouch(part)
        return session(part)
    except ModelFileError as error:  # the file is ours, so the fault is not in what was read
        raise NumericsError(error.what, **error.notes) from error
    except OSError:
        raise
    except Exception as error:  # the runtime's own kinds
        raise NumericsError(
            f"{part.name} is not a model that ONNX Runtime can run.", why=first_line(error)
        ) from error


def prove_file(
    part: Path, run: onnxruntime.InferenceSession, subject: Subject, file: File
) -> Parity:
    form = subject.form
    others: list[Samples] = []
    if form.preprocessing is not None:
        images = [subject.given[IMAGE][:2]]
        if form.batch is None:
            others = [{IMAGE: each} for each in other_sizes(images[0])]
            images += [other[IMAGE] for other in others]
        for each in images:
            form.preprocessing.check(file.model, repeated({IMAGE: each}, form.batch or 2)[IMAGE])
    if form.dynamic_size:
        others = _of_other_sizes(subject)
    return prove(
        subject.reference,
        run,
        part,
        subject.given,
        tolerance=subject.tolerance,
        precision=form.precision,
        others=others,
        batch=form.batch,
        locate=partial(_locate, subject, file),
    )


def _locate(subject: Subject, file: File, given: Samples) -> str | None:
    """The first value of the file that is not the network's, on samples that show a gap."""
    given = repeated(given, subject.form.batch or count(given))
    tolerance = subject.tolerance or (FP16_TOLERANCE if subject.form.half else FP32_TOLERANCE)
    return first_divergence(
        subject.network, file.conversion, file.model, subject.seen(given), tolerance, given
    )


Change = Callable[[int], int]
_CHANGES: tuple[tuple[Change, Change], ...] = (  # of the first free axis, and of those behind it
    (lambda size: size + 32, lambda size: size + 32),
    (lambda size: max(1, size // 2), lambda size: max(1, size // 2)),
    (lambda size: 2 * size, lambda size: size),
    (lambda size: size, lambda size: 2 * size),
)


def _of_other_sizes(subject: Subject) -> list[Samples]:
    """Samples of sizes that the network takes beside its own: at least one, and one for each axis
    that grows alone."""
    found: list[Samples] = []
    for change in _CHANGES:
        shapes = {name: _resized(value, *change) for name, value in subject.example.items()}
        if all(shapes[name] == value.shape[1:] for name, value in subject.example.items()):
            continue  # only one axis is free
        zeros = {
            name: torch.zeros((2, *shapes[name]), dtype=value.dtype)
            for name, value in subject.example.items()
        }
        filled = _filled(zeros, subject.given)
        try:
            with torch.inference_mode():
                subject.network.answer(filled)
        except Exception as error:  # not a size for this network
            is_aspect = change in _CHANGES[2:] and all(len(shape) > 1 for shape in shapes.values())
            if is_aspect and found:
                raise UsageError(
                    f"{subject.network.label} takes no image of another aspect than the example's.",
                    why=first_line(error),
                    fix="export it without --dynamic-size: height and width would not be free",
                ) from error
            continue
        found.append(filled)
    if not found:
        raise UsageError(
            f"{subject.network.label} takes no size but that of the example.",
            fix="export it without a free size",
        )
    return found


def _resized(value: Tensor, first: Change, rest: Change) -> tuple[int, ...]:
    keep = 2 if value.is_floating_point() else 1
    free = value.shape[keep:]
    return (*value.shape[1:keep], *map(first, free[:1]), *map(rest, free[1:]))


def _filled(shapes: Samples, like: Samples) -> Samples:
    """Samples of those shapes: noise, or what the given ones hold, over and over."""
    found = {}
    for name, value in shapes.items():
        if value.is_floating_point():
            found[name] = random_like({name: value}, len(value), 1)[name]
        else:
            source = like[name].flatten()
            index = torch.arange(value.numel()) % source.numel()
            found[name] = source[index].reshape(value.shape)
    return found


def proving_samples(form: Form, example: Samples, samples: Inputs | None) -> Samples:
    """What the file is compared on, as the file takes it."""
    if form.preprocessing is None:
        return example if samples is None else by_name(samples)
    if samples is not None:
        assert isinstance(samples, Tensor), "checked before"
        return {IMAGE: samples.detach().cpu()}
    channels, height, width = form.preprocessing.input_size
    generator = torch.Generator().manual_seed(0)
    shape = (8, height, width, channels)
    return {IMAGE: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)}


def tried_samples(subject: Subject) -> Samples:
    """Samples of all kinds, on which no value may leave the range of float16."""
    seen = subject.seen(rows(subject.given, slice(32)))
    groups = [seen, random_like(seen, 8, 0), edges_of(seen)]
    return {name: torch.cat([group[name] for group in groups]) for name in seen}
