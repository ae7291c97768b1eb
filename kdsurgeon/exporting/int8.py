"""Turn a verified fp32 ONNX file into an int8 one, and say what that costs in accuracy.

Static quantization in QDQ form: activations u8 per tensor, weights s8 per output channel, ranges
from the minimum and maximum seen on calibration images (Jacob et al. 2018, section 3).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from kdsurgeon.errors import NumericsError, UsageError
from kdsurgeon.exporting.parity import check_interface, first_line, predicted, read, session
from kdsurgeon.exporting.staging import silence, staged

MIN_AGREEMENT = 0.97  # share of samples; our proposal, to be set from data
MAX_DROP = 0.01  # accuracy, 0 to 1; one point


@dataclass(frozen=True)
class Int8:
    """A quantized ONNX file and how it compares with its fp32 original."""

    path: Path
    bytes: int
    sha256: str
    agreement: float  # share of samples with the fp32 file's top-1 class
    samples: int  # samples compared
    accuracy: float | None  # 0 to 1; None without labels
    drop: float | None  # accuracy of the fp32 file minus this one's

    def __str__(self) -> str:
        text = f"top-1 agreement with fp32 {self.agreement:.2%} on {self.samples} samples"
        if self.accuracy is None or self.drop is None:
            return text
        return f"{text}, accuracy {self.accuracy:.2%} ({0.0 - 100 * self.drop:+.2f} points)"


def quantize(
    fp32_path: str | os.PathLike[str],
    int8_path: str | os.PathLike[str],
    calibration: Tensor,
    *,
    samples: Tensor | None = None,
    labels: Tensor | None = None,
    gate: bool = True,
    min_agreement: float = MIN_AGREEMENT,
    max_drop: float = MAX_DROP,
) -> Int8:
    """Write an int8 file beside an fp32 one, and measure it.

    ``calibration`` is (n, …), float32, normalised training images; they set the ranges.
    ``samples`` (n, …), on which the two files are compared, should be other images; the calibration
    images stand in when there are none. With ``labels`` (n,) the accuracies are compared too.
    ``gate=False`` measures and lets everything but a broken file pass.

    Raises :class:`NumericsError`, and writes nothing, when the agreement is below ``min_agreement``
    or the accuracy falls by more than ``max_drop``, or when a scale is zero or not finite;
    :class:`UsageError` on calibration images that cannot serve; :class:`ResourceError` when the
    file cannot be written.
    """
    source, target = Path(fp32_path), Path(int8_path)
    if target.absolute() == source.absolute():
        raise UsageError(f"{target} is the fp32 file itself.", fix="name another file for int8")
    _check_calibration(calibration)
    samples = calibration if samples is None else samples
    with staged(target) as part:
        model = _quantized(source, part.parent, calibration)
        _check_scales(model, target.name)
        part.write_bytes(model.SerializeToString(deterministic=True))
        _check_file(part)
        measured = _measured(source, part, target, samples, labels)
        if gate:
            _gate(measured, min_agreement, max_drop)
    return measured


class _Feed(CalibrationDataReader):
    """Calibration images in batches, as the quantizer asks for them."""

    def __init__(self, name: str, images: Tensor) -> None:
        self._batches = iter(
            {name: chunk.numpy()} for chunk in images.detach().cpu().contiguous().split(32)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return next(self._batches, None)


def _quantized(source: Path, folder: Path, calibration: Tensor) -> onnx.ModelProto:
    original = onnx.load_model_from_string(read(source))
    prepared, raw = folder / "prepared.onnx", folder / "raw.onnx"
    try:
        with silence():
            quant_pre_process(original, prepared)
            quantize_static(
                prepared,
                raw,
                _Feed(original.graph.input[0].name, calibration),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
    except OSError:
        raise  # the folder, which staged() reports
    except Exception as error:
        raise NumericsError(
            f"{source.name} could not be quantized to int8.", why=first_line(error)
        ) from error
    return _finished(onnx.load(raw), original, len(calibration))


def _finished(model: onnx.ModelProto, original: onnx.ModelProto, images: int) -> onnx.ModelProto:
    """The quantizer's model with the original's metadata and only the operator sets it uses."""
    used = {node.domain for node in model.graph.node}
    opsets = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    del model.metadata_props[:]
    scheme = {"activations": "u8", "weights": "s8 per channel", "calibration_images": images}
    properties = {entry.key: entry.value for entry in original.metadata_props}
    properties.pop("kdsurgeon.verified", None)  # said of the fp32 file; this one differs
    properties["kdsurgeon.quantization"] = json.dumps(scheme)
    onnx.helper.set_model_props(model, dict(sorted(properties.items())))
    return model


def _check_calibration(images: Tensor) -> None:
    if not len(images):
        raise UsageError("int8 needs calibration images; got none.")
    bad = int((~images.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise UsageError(f"{bad} of {len(images)} calibration images hold values not finite.")


def _check_scales(model: onnx.ModelProto, name: str) -> None:
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = numpy_helper.to_array(values[node.input[1]])
        if not np.all(np.isfinite(scale) & (scale > 0)):
            raise NumericsError(
                f"{name} has a scale that is zero or not finite.",
                where=node.input[1],
                fix="calibrate on other images; those given leave this value without a range",
            )


def _check_file(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise NumericsError(f"{path.name} is not valid ONNX.", why=first_line(error)) from error


def _measured(
    source: Path, part: Path, target: Path, samples: Tensor, labels: Tensor | None
) -> Int8:
    fp32, int8 = session(source), session(part)
    check_interface(int8, part)
    wanted, found = predicted(fp32, samples, source), predicted(int8, samples, part)
    agreement = (wanted == found).double().mean().item()
    score = drop = None
    if labels is not None:
        if len(labels) != len(samples):
            raise UsageError(f"{len(samples)} samples came with {len(labels)} labels.")
        labels = labels.cpu()
        score = (found == labels).double().mean().item()
        drop = (wanted == labels).double().mean().item() - score
    content = part.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Int8(target, len(content), digest, agreement, len(samples), score, drop)


def _gate(measured: Int8, min_agreement: float, max_drop: float) -> None:
    drop = measured.drop or 0.0
    if measured.agreement >= min_agreement and drop <= max_drop:
        return
    lost = "not measured" if measured.drop is None else f"{100 * drop:.2f} points"
    raise NumericsError(
        f"{measured.path.name} loses too much: top-1 agreement with fp32 "
        f"{measured.agreement:.2%}, accuracy drop {lost}.",
        needs=f"agreement of at least {min_agreement:.0%}, a drop of at most "
        f"{100 * max_drop:g} points",
        fix="calibrate on more images of the kind the model will see, or keep fp32",
    )
