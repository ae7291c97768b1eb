"""What an ONNX file may take and return: logits out, and no axis free that was not proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from kdsurgeon.errors import NumericsError, UsageError
from kdsurgeon.exporting.samples import Samples

_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(uint8)": torch.uint8,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
}


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


def type_name(value: Tensor) -> str:
    """What ONNX Runtime calls the type of a tensor."""
    return next((name for name, dtype in _TYPES.items() if dtype == value.dtype), str(value.dtype))


def check_fit(given: Sequence[onnxruntime.NodeArg], samples: Samples, path: Path) -> None:
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
