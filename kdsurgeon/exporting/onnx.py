"""Write a trained student as an ONNX file that is proved to compute the same logits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from kdsurgeon.errors import NumericsError, UsageError
from kdsurgeon.exporting import external
from kdsurgeon.exporting.answers import hits, resting
from kdsurgeon.exporting.converting import Conversion, Network, convert, write_content
from kdsurgeon.exporting.form import VERIFIED, Form
from kdsurgeon.exporting.gate import read_onnx
from kdsurgeon.exporting.half import check_range, halved
from kdsurgeon.exporting.int8 import Int8, quantize
from kdsurgeon.exporting.parity import Parity
from kdsurgeon.exporting.preprocessing import Preprocessing, check_images
from kdsurgeon.exporting.proving import (
    File,
    Subject,
    check_file,
    prove_file,
    proving_samples,
    tried_samples,
)
from kdsurgeon.exporting.samples import ONE, Samples, by_name, count
from kdsurgeon.exporting.staging import staged
from kdsurgeon.tracing import Inputs, count_classes


@dataclass(frozen=True)
class Exported:
    """An ONNX file that has its final name, and what was measured on it before it got it."""

    path: Path
    opset: int
    bytes: int  # of the model and its data file
    sha256: str
    classes: int
    parity: Parity | None  # None with verify=False
    accuracy: float | None  # of the ONNX file on the samples, 0 to 1; None without labels
    int8: Int8 | None
    metadata: Mapping[str, str] = field(default_factory=dict)
    data: Path | None = None  # the weights, where they lie in a file of their own


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Inputs,
    *,
    form: Form | None = None,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
    samples: Inputs | None = None,
    labels: Tensor | None = None,
    calibration: Tensor | None = None,
    int8_path: str | os.PathLike[str] | None = None,
    int8_gate: bool = True,
    int8_options: Mapping[str, Any] | None = None,
    make_int8: Callable[[Path], Int8] | None = None,
    tolerance: float | None = None,
    verify: bool = True,
    force: bool = False,
) -> Exported:
    """Write ``model`` in eval mode to ``path``, and give the file that name only once it is proved.

    ``example`` is (n, …), float32, as the model takes it, or several inputs by name (tokens, too);
    only its shape without n and its values as samples matter, the batch axis of the file is free
    unless ``form`` fixes it. One input is called "input", the output "logits": of a model that
    returns a dict or several tensors, those that :func:`kdsurgeon.tracing.find_logits` finds.
    ``opset`` is short for a :class:`Form` with it. ``metadata`` is stored as it is (class names,
    normalisation, input size, where the model comes from, as JSON strings); names of source files
    that torch would add are removed, so equal models give equal bytes.

    ``samples`` (n, …), real ones if possible, are what the file is compared on, ``example`` when
    there are none (uint8 images where the form has preprocessing); with ``labels`` (n,) its
    accuracy is measured. ``calibration`` (n, …) asks for
    an int8 file too, at ``int8_path`` or at ``NAME.int8.onnx`` beside ``path``;
    ``int8_gate=False`` lets it pass whatever it loses, and ``int8_options`` are further ones of
    :func:`quantize` by name. ``make_int8`` writes the int8 file itself, from the proved fp32 one
    that it is given, in place of ``calibration``; both files appear, or neither. ``verify=False``
    skips the comparison, and the file says so. ``force=True`` keeps a file that fails a check, as
    ``NAME.unproved.onnx``, and an int8 file that loses too much, as ``NAME.int8.unproved.onnx``.
    The caller's model stays as it was: mode, device, buffers, random state.

    Raises :class:`UsageError` on a model that does not return one tensor of logits (batch, classes)
    or does not fit ``example``, :class:`TraceError` when it cannot be captured,
    :class:`NumericsError` when the file fails a check and :class:`ResourceError` when it cannot be
    written. Then nothing is written, and a file that had the name before is still there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export(nn.Linear(4, 2), Path(folder) / "student.onnx", torch.zeros(1, 4))
    >>> done.path.name, done.opset, done.classes, done.parity.gap <= done.parity.bound
    ('student.onnx', 18, 2, True)
    """
    path = Path(path)
    form = form or Form()
    form = form if opset is None else replace(form, opset=opset)
    named = by_name(example)
    _check_options(form, metadata or {}, named, samples, labels, calibration)
    quantized = _int8_path(path, calibration, int8_path)
    if calibration is not None or make_int8 is not None:
        form.check_int8()
    twin = resting(model)
    size = _check_weights(twin)
    form = replace(form, external=form.external or size > external.MAX_BYTES)
    classes = count_classes(twin, example)
    network = Network(twin, tuple(named), softmax=form.softmax)
    given = proving_samples(form, named, samples)
    subject = Subject(network, form, named, given, tolerance)
    properties = {**(metadata or {}), **form.facts, VERIFIED: "true" if verify else "false"}
    with staged(path) as part:
        try:
            file = _write(part, subject, properties)
            if file.overflow is not None:
                raise file.overflow
            run = check_file(part, subject)
            measured = prove_file(part, run, subject, file) if verify else None
        except NumericsError as error:
            raise _kept(error, path, part, subject) if force else error from error.__cause__
        score = None if labels is None else hits(run, given, labels, part, batch=form.batch)
        int8 = None
        if quantized is not None and calibration is not None and isinstance(samples, Tensor | None):
            int8 = quantize(
                part, quantized, calibration,
                samples=None if samples is None else _images(given), labels=labels,
                gate=int8_gate, force=force, **(int8_options or {}),
            )  # fmt: skip
        elif make_int8 is not None:
            int8 = make_int8(part)
        written = _described(part, file)
    data = None if file.data is None else path.with_name(file.data.name)
    return Exported(
        path, form.opset, written.bytes, written.sha256, classes, measured, score, int8,
        dict(properties), data,
    )  # fmt: skip


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of an ONNX file; raises :class:`ModelFileError` when it is not one."""
    return read_onnx(path).metadata


def _write(part: Path, subject: Subject, properties: Mapping[str, str]) -> File:
    """Convert, give it the form that was asked for, and write it to ``part``."""
    form = subject.form
    conversion = _converted(subject.network, subject.example, form)
    model = onnx.ModelProto()
    model.CopyFrom(conversion.proto)
    overflow = None
    if form.half:
        weights = {name for name, _ in subject.network.model.named_parameters()}
        overflow = _overflow(model, subject, part.name)
        try:
            model = halved(model, weights)
        except NumericsError as error:
            raise overflow or error from None
    if form.preprocessing is not None:
        model = form.preprocessing.put_before(model, batch=form.batch)
    write_content(model, properties)
    stored, data = model, None
    if form.external:
        stored = onnx.ModelProto()
        stored.CopyFrom(model)
        data = external.put_outside(stored, part)
    part.write_bytes(stored.SerializeToString(deterministic=True))
    return File(conversion, model, data, overflow)


def _overflow(model: onnx.ModelProto, subject: Subject, name: str) -> NumericsError | None:
    """What float16 cannot hold; told once the file is there, so that it can be kept."""
    try:
        check_range(model, tried_samples(subject), name, batch=subject.form.batch)
    except NumericsError as error:
        return error
    return None


def _converted(network: Network, example: Samples, form: Form) -> Conversion:
    """Where a test puts a fault in."""
    return convert(network, example, form.opset, batch=form.batch, dynamic_size=form.dynamic_size)


def _kept(error: NumericsError, path: Path, part: Path, subject: Subject) -> NumericsError:
    """The refusal, after the file has got a name that says what it is."""
    if not part.exists():
        return error
    model = onnx.load(part, load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    write_content(model, {**properties, VERIFIED: "false"})
    other = path.with_suffix(f".unproved{path.suffix}")
    with staged(other) as place:
        for data in part.parent.glob("*.data"):
            data.replace(place.with_name(data.name))
        place.write_bytes(model.SerializeToString(deterministic=True))
    return NumericsError(error.what, **error.notes, kept=f"{other}, which failed; do not ship it")


@dataclass(frozen=True)
class _Written:
    bytes: int
    sha256: str


def _described(part: Path, file: File) -> _Written:
    digest, size = hashlib.sha256(), 0
    for path in (part, file.data):
        if path is not None:
            with path.open("rb") as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    size += len(block)
    return _Written(size, digest.hexdigest())


def _images(given: Samples) -> Tensor:
    (images,) = given.values()
    return images


def _check_options(
    form: Form,
    metadata: Mapping[str, str],
    example: Samples,
    samples: Inputs | None,
    labels: Tensor | None,
    calibration: Tensor | None,
) -> None:
    strange = [
        repr(key)
        for key, value in metadata.items()
        if not (isinstance(key, str) and isinstance(value, str))
    ]
    if strange:
        raise UsageError(
            f"metadata must map text to text; {', '.join(strange)} does not.",
            fix="json.dumps the value",
        )
    _check_inputs("example", example, example)
    if form.preprocessing is not None:
        _check_preprocessed(form.preprocessing, example, samples)
    elif samples is not None:
        _check_inputs("samples", by_name(samples), example)
    if calibration is not None:
        _check_inputs("calibration", by_name(calibration), example)
    num_samples = 0 if samples is None else count(by_name(samples))
    if labels is not None and num_samples != len(labels):
        raise UsageError(f"{len(labels)} labels came with {num_samples} samples.")


def _check_preprocessed(
    preprocessing: Preprocessing, example: Samples, samples: Inputs | None
) -> None:
    shape = tuple(next(iter(example.values())).shape[1:])
    if tuple(example) != (ONE,) or shape != tuple(preprocessing.input_size):
        raise UsageError(
            f"the preprocessing makes images of {preprocessing.input_size}, "
            f"the model takes {shape}."
        )
    if samples is not None:
        if not isinstance(samples, Tensor):
            raise UsageError("samples must be images where the file normalises them itself.")
        check_images(samples, preprocessing, "samples")


def _check_inputs(name: str, inputs: Samples, example: Samples) -> None:
    """One or more samples, of the names, types and shapes that the example has."""
    if inputs.keys() != example.keys():
        raise UsageError(f"{name} has the inputs {', '.join(inputs)}; {', '.join(example)} fit.")
    for each, value in inputs.items():
        like = example[each]
        which = name if each == ONE else f'{name} "{each}"'
        is_float = value.is_floating_point()
        if (
            not value.ndim
            or not len(value)
            or (is_float and value.dtype != torch.float32)
            or value.shape[1:] != like.shape[1:]
        ):
            raise UsageError(
                f"{which} must be float32 of shape (n, {', '.join(map(str, like.shape[1:]))}) "
                f"with n ≥ 1; it is {value.dtype} {tuple(value.shape)}."
            )


def _int8_path(
    path: Path, calibration: Tensor | None, int8_path: str | os.PathLike[str] | None
) -> Path | None:
    if calibration is None:
        if int8_path is not None:
            raise UsageError("an int8 file needs calibration images.", fix="pass calibration")
        return None
    chosen = path.with_suffix(".int8.onnx") if int8_path is None else Path(int8_path)
    if chosen.absolute() == path.absolute():
        raise UsageError(f"{path} cannot be both the fp32 and the int8 file.")
    return chosen


def _check_weights(model: nn.Module) -> int:
    """All in float32 and without NaN; a buffer may hold infinities, as masks do. Their bytes."""
    total = 0
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        total += value.nbytes
        if not value.is_floating_point():
            continue
        if value.dtype != torch.float32:
            raise UsageError(
                f"{type(model).__name__} holds {value.dtype}; it is exported in float32.",
                where=name,
                fix="model.float()",
            )
        is_weight = isinstance(value, nn.Parameter)
        if bool(value.isnan().any()) or (is_weight and bool(value.isinf().any())):
            raise NumericsError(
                f"{type(model).__name__} holds weights that are not finite.",
                where=name,
                fix="export weights from before training went wrong, of an earlier checkpoint",
            )
    return total
