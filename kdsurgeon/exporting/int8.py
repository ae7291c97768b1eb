"""Turn a verified fp32 ONNX file into an int8 one, and say what that costs in accuracy.

Static quantization in QDQ form (Jacob et al. 2018, section 3): where the nodes stand is in
``qdq.py``. When the file loses too much, the few nodes that cost most stay in fp32, up to a budget;
``sensitivity.py`` finds them. Transformers lose less by dynamic quantization: s8 weights, and
activations rounded by the range that each input has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from torch import Tensor

from kdsurgeon.errors import NumericsError, UsageError
from kdsurgeon.exporting import qdq, runtime
from kdsurgeon.exporting.answers import QUANTIZATION, logits, predicted
from kdsurgeon.exporting.form import VERIFIED
from kdsurgeon.exporting.gate import read_onnx, session, vouch
from kdsurgeon.exporting.interface import check_interface
from kdsurgeon.exporting.sensitivity import IMAGES, Quantize, sensitivities
from kdsurgeon.exporting.staging import first_line, silence, staged

Mode = Literal["static", "dynamic"]

MIN_AGREEMENT = 0.97  # share of samples; our proposal, to be set from data
MAX_DROP = 0.01  # accuracy, 0 to 1; one point
BUDGET = 4  # nodes that may stay in fp32


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
    excluded: tuple[str, ...] = ()  # nodes that stay in fp32, dearest first

    def __str__(self) -> str:
        text = f"top-1 agreement with fp32 {self.agreement:.2%} on {self.samples} samples"
        if self.accuracy is not None and self.drop is not None:
            text += f", accuracy {self.accuracy:.2%} ({0.0 - 100 * self.drop:+.2f} points)"
        if self.excluded:
            text += f", in fp32: {', '.join(self.excluded)}"
        return text


def quantize(
    fp32_path: str | os.PathLike[str],
    int8_path: str | os.PathLike[str],
    calibration: Tensor | None,
    *,
    samples: Tensor | None = None,
    labels: Tensor | None = None,
    mode: Mode = "static",
    method: qdq.Method = "min-max",
    budget: int = BUDGET,
    gate: bool = True,
    min_agreement: float = MIN_AGREEMENT,
    max_drop: float = MAX_DROP,
    reference: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Int8:
    """Write an int8 file beside an fp32 one, and measure it.

    ``calibration`` is (n, …), float32, normalised training images; they set the ranges by
    ``method``: ``min-max``, ``entropy`` or ``percentile``. ``mode="dynamic"`` needs none to do so.
    ``samples`` (n, …), on which the two files are compared, should be other images; the calibration
    images stand in when there are none. With ``labels`` (n,) the accuracies are compared too.

    A file whose agreement is below ``min_agreement``, or whose accuracy falls by more than
    ``max_drop`` (0 to 1), does not pass. Then up to ``budget`` nodes stay in fp32, one more at a
    time, the dearest first by a measurement on calibration images. ``gate=False`` measures and
    lets everything but a broken file pass, as it is. ``reference`` names another fp32 file to
    compare with, where the one that is quantized is the same student trained on. ``force=True``
    keeps the last file that did not pass, as ``NAME.unproved.onnx``.

    Raises :class:`NumericsError`, and writes nothing to ``int8_path``, when no file passes, or when
    a scale is zero or not finite; :class:`UsageError` on calibration images that cannot serve;
    :class:`ResourceError` when the file cannot be written.
    """
    source, target = Path(fp32_path), Path(int8_path)
    if target.absolute() == source.absolute():
        raise UsageError(f"{target} is the fp32 file itself.", fix="name another file for int8")
    _check_options(mode, method, budget, max_drop)
    images = _checked(calibration, samples, mode)
    samples = images if samples is None else samples
    with staged(target) as part:
        original = read_onnx(source).whole()
        prepared, make = _maker(original, source.name, part.parent, images, mode, method)
        scheme: dict[str, object] = {"mode": mode, "activations": "u8", "weights": "s8 per channel"}
        if mode == "static":
            scheme |= {"calibration": method, "calibration_images": len(images)}

        def measured(excluded: Sequence[str]) -> Int8:
            model = _finished(make(excluded), original, scheme, excluded)
            _check_scales(model, target.name)
            part.write_bytes(model.SerializeToString(deterministic=True))
            _check_file(part)
            return _measured(part, target, samples, labels, wanted, tuple(excluded))

        other = source if reference is None else Path(reference)
        wanted = predicted(session(other, sample=samples.shape[1:]), samples, other)
        found = measured(())
        if gate and not _passes(found, min_agreement, max_drop):
            order = _dearest(prepared, make, images) if budget else []
            for count in range(1, min(budget, len(order)) + 1):
                found = measured(order[:count])
                if _passes(found, min_agreement, max_drop):
                    break
            else:
                error = _refusal(found, min_agreement, max_drop, is_trained=reference is not None)
                raise _kept(error, target, part) if force else error
    return found


def _check_options(mode: str, method: str, budget: int, max_drop: float) -> None:
    for name, value, known in (
        ("mode", mode, ("static", "dynamic")),
        ("calibration method", method, tuple(qdq.METHODS)),
    ):
        if value not in known:
            raise UsageError(f"{value} is no int8 {name}.", fix=f"one of {', '.join(known)}")
    if budget < 0:
        raise UsageError(f"a budget of {budget} nodes cannot be kept.", fix="0 or more")
    if not 0 <= max_drop <= 1:
        raise UsageError(
            f"a drop of at most {max_drop:g} is not a share of accuracy.", fix="0.01 is one point"
        )


def _checked(calibration: Tensor | None, samples: Tensor | None, mode: Mode) -> Tensor:
    """The images that ranges, or costs of nodes, are measured on."""
    images = samples if calibration is None and mode == "dynamic" else calibration
    if images is None or not len(images):
        raise UsageError("int8 needs calibration images; got none.")
    bad = int((~images.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise UsageError(f"{bad} of {len(images)} calibration images hold values not finite.")
    return images


def _maker(
    original: onnx.ModelProto,
    name: str,
    folder: Path,
    images: Tensor,
    mode: Mode,
    method: qdq.Method,
) -> tuple[onnx.ModelProto, Quantize]:
    """The prepared model, and a function from its nodes to leave out to the int8 model."""

    def translated(work: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:
        try:
            with silence():
                return work()
        except OSError:
            raise  # the folder, which staged() reports
        except Exception as error:
            raise NumericsError(
                f"{name} could not be quantized to int8.", why=first_line(error)
            ) from error

    prepared = translated(lambda: qdq.prepared(original, folder))
    if mode == "dynamic":
        return prepared, lambda excluded: translated(
            lambda: qdq.quantized_dynamically(prepared, folder, excluded)
        )
    ranges = []

    def calibrate() -> onnx.ModelProto:
        ranges.append(qdq.calibrated(prepared, images, method, folder))
        return prepared

    translated(calibrate)
    return prepared, lambda excluded: translated(
        lambda: qdq.quantized(prepared, ranges[0], excluded)
    )


def _dearest(prepared: onnx.ModelProto, make: Quantize, images: Tensor) -> list[str]:
    """The names of the nodes that cost something in int8, dearest first."""
    few = images[:IMAGES]

    def answers(model: onnx.ModelProto) -> Tensor:
        run = runtime.open_session(model.SerializeToString(), {}, torch.get_num_threads())
        return logits(run, few, Path("int8"))

    names = [node.name for node in prepared.graph.node]
    found = sensitivities(names, qdq.rounding_nodes(prepared), answers(prepared), make, answers)
    return [each.node for each in found if each.cost > 0]


def _finished(
    model: onnx.ModelProto,
    original: onnx.ModelProto,
    scheme: Mapping[str, object],
    excluded: Sequence[str],
) -> onnx.ModelProto:
    """The quantizer's model with the original's metadata and only the operator sets it uses."""
    used = {node.domain for node in model.graph.node}
    opsets = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    del model.metadata_props[:]
    properties = {entry.key: entry.value for entry in original.metadata_props}
    properties.pop(VERIFIED, None)  # said of the fp32 file; this one differs
    if excluded:
        scheme = {**scheme, "fp32_nodes": ", ".join(excluded)}
    properties[QUANTIZATION] = json.dumps(scheme)
    onnx.helper.set_model_props(model, dict(sorted(properties.items())))
    return model


def _check_scales(model: onnx.ModelProto, name: str) -> None:
    for place, scale in qdq.scales(model):
        if not np.all(np.isfinite(scale) & (scale > 0)):
            raise NumericsError(
                f"{name} has a scale that is zero or not finite.",
                where=place,
                fix="calibrate on other images; those given leave this value without a range",
            )


def _check_file(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise NumericsError(f"{path.name} is not valid ONNX.", why=first_line(error)) from error


def _measured(
    part: Path,
    target: Path,
    samples: Tensor,
    labels: Tensor | None,
    wanted: Tensor,
    excluded: tuple[str, ...],
) -> Int8:
    file, run = vouch(part), session(part)
    check_interface(run, part)
    found = predicted(run, samples, part)
    agreement = (wanted == found).double().mean().item()
    score = drop = None
    if labels is not None:
        if len(labels) != len(samples):
            raise UsageError(f"{len(samples)} samples came with {len(labels)} labels.")
        labels = labels.cpu()
        score = (found == labels).double().mean().item()
        drop = (wanted == labels).double().mean().item() - score
    size, digest = file.size, file.sha256
    return Int8(target, size, digest, agreement, len(samples), score, drop, excluded)


def _passes(measured: Int8, min_agreement: float, max_drop: float) -> bool:
    """By the accuracy where it is known, and by the agreement in any case."""
    return measured.agreement >= min_agreement and (measured.drop or 0.0) <= max_drop


def _refusal(
    measured: Int8, min_agreement: float, max_drop: float, *, is_trained: bool
) -> NumericsError:
    """``is_trained`` says that a few epochs with rounding inside were tried already."""
    drop = measured.drop
    if drop is None:
        lost = "accuracy drop not measured"
    elif drop < 0:
        lost = f"no accuracy drop ({-100 * drop:+.2f} points)"
    else:
        lost = f"accuracy drop {100 * drop:.2f} points"
    differs_only = measured.agreement < min_agreement and (drop or 0.0) <= max_drop
    what = "gives too many samples another class" if differs_only else "loses too much"
    kept = f", with {', '.join(measured.excluded)} in fp32" if measured.excluded else ""
    ways = ["calibrate on more images of the kind the model will see (--calib-images)"]
    ways += ["leave more nodes in fp32 (--int8-budget)"]
    ways += [] if is_trained else ["train with rounding (--int8-mode qat, of a run)"]
    return NumericsError(
        f"{measured.path.name} {what}: top-1 agreement with fp32 "
        f"{measured.agreement:.2%}, {lost}{kept}.",
        needs=f"agreement of at least {min_agreement:.0%}, a drop of at most "
        f"{100 * max_drop:g} points",
        fix=f"{', '.join(ways)}, write it as it is (--no-int8-gate), or keep fp32",
    )


def _kept(error: NumericsError, target: Path, part: Path) -> NumericsError:
    """The refusal, after the file has got a name that says what it is."""
    model = vouch(part).model
    properties = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, dict(sorted({**properties, VERIFIED: "false"}.items())))
    other = target.with_suffix(f".unproved{target.suffix}")
    with staged(other) as place:
        place.write_bytes(model.SerializeToString(deterministic=True))
    return NumericsError(error.what, **error.notes, kept=f"{other}, which failed; do not ship it")
