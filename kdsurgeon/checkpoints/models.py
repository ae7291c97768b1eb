"""Models in, ready to run: a file or a model string becomes a module, and what is known of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

import kdsurgeon.plugins as plugins
from kdsurgeon.checkpoints.reader import ModelFile, read_model
from kdsurgeon.checkpoints.specs import build, from_file, parse
from kdsurgeon.checkpoints.store import ModelCard
from kdsurgeon.errors import ModelFileError, UsageError

_SUFFIXES = re.compile(r"\.(pt|pth|pt2|ckpt|bin|safetensors|onnx|h5|npz|tar|pkl|gguf|ts)$", re.I)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on the CPU; ``card.arch`` is the string that builds it, where known.

    ``sha256`` is that of the file, None for a model made from a string; ``source`` is what the
    user gave.
    """

    name: str
    model: nn.Module
    card: ModelCard
    sha256: str | None
    source: str


def load_model(
    source: str,
    *,
    arch: str | None = None,
    trust: Sequence[str] = (),
    num_classes: int | None = None,
    allow_nonfinite: bool = False,
    flag: str = "--teacher-arch",
) -> Loaded:
    """The model that a file or a model string describes, its weights in place.

    ``arch`` is the model string for a file of weights only; ``flag`` is what messages call it.
    ``num_classes`` goes to the factory where neither the string nor the file says it. Raises what
    :func:`read_model` and :func:`build` raise; weights that do not fit the architecture are a
    :class:`ModelFileError` with the first names that differ.
    """
    if not is_file(source):
        model = build(source, num_classes=num_classes).cpu().eval()
        classes = num_classes or _count(parse(source).arguments.get("num_classes"))
        card = ModelCard(arch=source, num_classes=classes)
        return Loaded(_short_name(source), model, card, None, source)
    file = read_model(source, trust=trust, allow_nonfinite=allow_nonfinite)
    if file.module is not None and arch is None:
        return Loaded(Path(source).stem, file.module.cpu().eval(), file.card, file.sha256, source)
    return _from_weights(file, source, arch, num_classes, flag)


def is_file(source: str) -> bool:
    """Whether a model string means a file rather than something to build."""
    if source.startswith("py:"):
        return False
    if Path(source).is_file():
        return True
    head, slash, _ = source.partition("/")
    if slash and head in plugins.installed("models"):
        return False
    return Path(source).exists() or bool(_SUFFIXES.search(source))


def _from_weights(
    file: ModelFile, source: str, arch: str | None, num_classes: int | None, flag: str
) -> Loaded:
    own = file.card.arch
    if arch is None and own is None:
        raise UsageError(
            f"{source} holds weights only; the architecture is missing.",
            fix=f"name it: {flag} timm/resnet18, or {flag} py:package.module:factory",
        )
    spec = arch or from_file(own or "", source, flag)
    classes = file.card.num_classes or num_classes  # what lies in the file has its own count
    model = build(spec, num_classes=classes).cpu()
    _fill(model, file.tensors, source, spec, flag)
    card = replace(file.card, arch=spec, num_classes=classes)
    return Loaded(Path(source).stem, model.eval(), card, file.sha256, source)


def _fill(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str, spec: str, flag: str
) -> None:
    """Copy the weights into the model, every one of them, or say which do not fit."""
    expected = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    missing = [k for k in expected if k not in tensors and not k.endswith(".num_batches_tracked")]
    unexpected = [k for k in tensors if k not in expected]
    shapes = [
        f"{k} {_shape(tensors[k])} in the file, {_shape(expected[k])} in {spec}"
        for k in expected
        if k in tensors and tensors[k].shape != expected[k].shape
    ]
    if missing or unexpected or shapes:
        raise ModelFileError(
            f'the weights of {source} do not fit "{spec}": {len(missing)} missing, '
            f"{len(unexpected)} unexpected, {len(shapes)} of another shape.",
            missing=_first(missing, ", "),
            unexpected=_first(unexpected, ", "),
            shapes=_first(shapes, "\n"),
            fix=f"give the architecture (and num_classes) that the file was saved from: {flag} …",
        )
    model.load_state_dict(dict(tensors), strict=False)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _first(entries: list[str], between: str) -> str:
    more = f"{between}… {len(entries) - 3} more" if len(entries) > 3 else ""
    return between.join(entries[:3]) + more


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _short_name(spec: str) -> str:
    name = parse(spec).name
    return name.rpartition(":")[2] if spec.startswith("py:") else name
