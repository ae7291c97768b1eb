"""Write a trained student as an ONNX file that is proved to compute the same logits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from kdsurgeon.errors import ModelFileError, NumericsError, ResourceError, TraceError, UsageError
from kdsurgeon.exporting.int8 import Int8, quantize
from kdsurgeon.exporting.parity import (
    Parity,
    accuracy,
    check_interface,
    first_line,
    messages,
    parity,
    read,
    resting,
    session,
)
from kdsurgeon.exporting.staging import silence, staged

OPSETS = range(18, 25)  # 17 is silently written as 18 by torch, so it is refused
MAX_BYTES = 2**31 - 2**20  # of weights: protobuf holds 2 GiB in one file


@dataclass(frozen=True)
class Exported:
    """An ONNX file that has its final name, and what was measured on it before it got it."""

    path: Path
    opset: int
    bytes: int
    sha256: str
    classes: int
    parity: Parity | None  # None with verify=False
    accuracy: float | None  # of the ONNX file on the samples, 0 to 1; None without labels
    int8: Int8 | None
    metadata: Mapping[str, str] = field(default_factory=dict)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Tensor,
    *,
    opset: int = 18,
    metadata: Mapping[str, str] | None = None,
    samples: Tensor | None = None,
    labels: Tensor | None = None,
    calibration: Tensor | None = None,
    int8_path: str | os.PathLike[str] | None = None,
    int8_gate: bool = True,
    tolerance: float = 1e-5,
    verify: bool = True,
) -> Exported:
    """Write ``model`` in eval mode to ``path``, and give the file that name only once it is proved.

    ``example`` is (n, …), float32, as the model takes it; only its shape without n and its values
    as samples matter, the batch axis of the file is free. The input is called "input", the output
    "logits". ``metadata`` is stored as it is (class names, normalisation, input size, where the
    model comes from, as JSON strings); names of source files that torch would add are removed, so
    equal models give equal bytes.

    ``samples`` (n, …), real ones if possible, are what the file is compared on, ``example`` when
    there are none; with ``labels`` (n,) its accuracy is measured. ``calibration`` (n, …) asks for
    an int8 file too, at ``int8_path`` or at ``NAME.int8.onnx`` beside ``path``;
    ``int8_gate=False`` lets it pass whatever it loses. ``verify=False`` skips the comparison, and
    the file says so.
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
    _check_options(opset, metadata or {}, example, samples, labels, calibration)
    quantized = _int8_path(path, calibration, int8_path)
    twin = resting(model)
    _check_weights(twin)
    classes = _classes(twin, example)
    properties = {**(metadata or {}), "kdsurgeon.verified": "true" if verify else "false"}
    samples = example if samples is None else samples
    with staged(path) as part:
        part.write_bytes(_content(_converted(twin, example, opset), properties))
        _check_file(part, opset)
        measured = parity(twin, part, samples, tolerance=tolerance) if verify else None
        score = None if labels is None else accuracy(part, samples, labels)
        int8 = None
        if quantized is not None and calibration is not None:
            int8 = quantize(
                part, quantized, calibration, samples=samples, labels=labels, gate=int8_gate
            )
        content = part.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Exported(
        path, opset, len(content), digest, classes, measured, score, int8, dict(properties)
    )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of an ONNX file; raises :class:`ModelFileError` when it is not one."""
    model = onnx.load_model_from_string(read(Path(path)))
    return {entry.key: entry.value for entry in model.metadata_props}


def _check_options(
    opset: int,
    metadata: Mapping[str, str],
    example: Tensor,
    samples: Tensor | None,
    labels: Tensor | None,
    calibration: Tensor | None,
) -> None:
    if opset not in OPSETS:
        raise UsageError(
            f"opset {opset} cannot be written.",
            why=f"the exporter writes opset {OPSETS.start} to {OPSETS.stop - 1}",
            fix=f"choose one of these; {OPSETS.start} runs on the most devices",
        )
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
    given = {"example": example, "samples": samples, "calibration": calibration}
    for name, inputs in given.items():
        if inputs is None:
            continue
        if (
            not len(inputs)
            or inputs.dtype != torch.float32
            or inputs.shape[1:] != example.shape[1:]
        ):
            raise UsageError(
                f"{name} must be float32 of shape (n, {', '.join(map(str, example.shape[1:]))}) "
                f"with n ≥ 1; it is {inputs.dtype} {tuple(inputs.shape)}."
            )
    if labels is not None and (samples is None or len(samples) != len(labels)):
        raise UsageError(
            f"{len(labels)} labels came with {0 if samples is None else len(samples)} samples."
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


def _check_weights(model: nn.Module) -> None:
    """All in float32 and without NaN; a buffer may hold infinities, as attention masks do."""
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
                f"{type(model).__name__} holds weights that are not finite.", where=name
            )
    if total > MAX_BYTES:
        raise ResourceError(
            f"{type(model).__name__} holds {total:,} bytes of weights, too many for one ONNX file.",
            why=f"a file of one piece holds {MAX_BYTES:,}",
        )


def _classes(model: nn.Module, example: Tensor) -> int:
    """How many logits per sample the model gives."""
    inputs = example.detach().cpu()[:2]
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            output = model(inputs)
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__} does not take an input of shape {tuple(inputs.shape)}.",
            why=first_line(error),
        ) from error
    if isinstance(output, Tensor) and output.ndim == 2 and len(output) == len(inputs):
        return output.shape[1]
    raise UsageError(
        f"{type(model).__name__} returns {_described(output)}, not one tensor of logits "
        f"(batch, classes).",
        fix="wrap it in a module that returns the logits alone",
    )


def _described(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} of {', '.join(map(str, output))}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


def _converted(model: nn.Module, example: Tensor, opset: int) -> onnx.ModelProto:
    # Two samples whatever was given: a batch of one would be taken for a constant, and equal
    # models would give files that depend on the example.
    inputs = example.detach().cpu()[torch.arange(2) % len(example)].contiguous()
    try:
        with silence(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            program = torch.onnx.export(
                model,
                (inputs,),
                dynamo=True,
                opset_version=opset,
                input_names=["input"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
            assert program is not None, "torch.onnx.export returns a program when dynamo is on"
            return program.model_proto
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be written as ONNX.",
            why=first_line(error),
            fix="the batch size must stay free, and no branch may depend on the values computed",
        ) from error


def _content(model: onnx.ModelProto, metadata: Mapping[str, str]) -> bytes:
    """The file, holding ``metadata`` in place of what the exporter noted about source files."""
    for part in (model, *messages(model)):
        for noted in ("doc_string", "metadata_props"):
            if noted in part.DESCRIPTOR.fields_by_name:
                part.ClearField(noted)
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    oldest = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    model.ir_version = max(model.ir_version, oldest)
    return model.SerializeToString(deterministic=True)


def _check_file(path: Path, opset: int) -> None:
    """Valid ONNX of the standard operators in the version asked for, with a free batch axis."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise NumericsError(f"{path.name} is not valid ONNX.", why=first_line(error)) from error
    model = onnx.load_model_from_string(read(path))
    found = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if found != {"ai.onnx": opset}:
        versions = ", ".join(f"{domain} {version}" for domain, version in found.items())
        raise NumericsError(f"{path.name} needs {versions}; ai.onnx {opset} was asked for.")
    try:
        run = session(path)
    except ModelFileError as error:  # the file is ours, so the fault is not in what was read
        raise NumericsError(error.what, **error.notes) from error
    check_interface(run, path)
