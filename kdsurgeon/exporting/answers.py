"""What a network and an ONNX file answer, in batches that bound the memory."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from kdsurgeon.errors import NumericsError, UsageError
from kdsurgeon.exporting.converting import Network
from kdsurgeon.exporting.gate import session
from kdsurgeon.exporting.interface import check_fit, check_interface, fixed_batch
from kdsurgeon.exporting.samples import Samples, chunks, count, repeated
from kdsurgeon.exporting.staging import first_line
from kdsurgeon.tracing import Inputs

QUANTIZATION = "kdsurgeon.quantization"  # how a file was rounded, in its metadata
CHUNK = 64  # samples per run when all are run; bounds the memory, not the result


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

    A file that takes one ``batch`` size only is given that; the last batch is filled up. One that
    rounds by the range of what it is given is given one sample at a time, as it is used.
    """
    if batch is None and _rounds_by_its_input(run):
        batch = 1
    given = run.get_inputs()
    if isinstance(samples, Tensor) or len(given) == 1:
        value = samples if isinstance(samples, Tensor) else next(iter(samples.values()))
        samples = {given[0].name: value.detach().cpu()}
    check_fit(given, samples, path)
    found = []
    for chunk in chunks(samples, batch or CHUNK):
        wanted = count(chunk)
        found.append(_run(run, repeated(chunk, batch or wanted), path)[:wanted])
    return torch.cat(found)


def _rounds_by_its_input(run: onnxruntime.InferenceSession) -> bool:
    """Whether it is an int8 file of ours that rounds dynamically, so that a batch has one range."""
    said = run.get_modelmeta().custom_metadata_map.get(QUANTIZATION, "{}")
    try:
        return json.loads(said)["mode"] == "dynamic"
    except (ValueError, KeyError, TypeError):
        return False


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
