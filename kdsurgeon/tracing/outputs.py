"""Find the logits in whatever a model takes and returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdsurgeon.errors import UsageError
from kdsurgeon.tracing.values import BATCH

Inputs = Tensor | Mapping[str, Tensor]

_LOGITS = ("logits", "out", "prediction_logits", "logits_per_image")


def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits that ``model`` gives for ``inputs``, alone, in its present mode.

    Args:
        inputs: a tensor for the first parameter of ``forward``, or tensors by parameter name.

    Raises:
        ValueError: nothing in what it returns can be logits.

    >>> import torch
    >>> class Net(nn.Module):
    ...     def forward(self, x, mask=None):
    ...         return {"features": x, "logits": x.flatten(1)}
    >>> logits_of(Net(), torch.zeros(2, 3, 4)).shape
    torch.Size([2, 12])
    """
    return logits_in(call_model(model, inputs))


def logits_in(result: Any) -> Tensor:
    """The logits in what a model returned; ValueError where there are none."""
    if isinstance(result, Tensor):
        return result
    found = find_logits(result)
    if found is None:
        raise ValueError(f"the model returns {describe(result)}, and no logits in it")
    return found[1]


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """``model`` of ``inputs``; a language model is told to keep no cache."""
    if isinstance(inputs, Tensor):
        return model(inputs, **_quiet(model))
    return model(**inputs, **_quiet(model))


def move(inputs: Inputs, device: torch.device) -> Inputs:
    """The batch on ``device``."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: value.to(device) for name, value in inputs.items()}


def _quiet(model: nn.Module) -> dict[str, Any]:
    """Arguments that switch off what has nothing to do with the logits."""
    try:
        known = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}
    return {name: False for name in ("use_cache",) if name in known}


def find_logits(result: Any) -> tuple[str, Tensor] | None:
    """The logits in a tuple, dict or dataclass, and where they stand there.

    What is called logits; else the first floating-point tensor of two axes or more.
    """
    items = dict(_items(result))
    for name in _LOGITS:
        if isinstance(items.get(name), Tensor):
            return name, items[name]
    for name, value in items.items():
        if isinstance(value, Tensor) and value.ndim > 1 and value.is_floating_point():
            return name, value
    nested = [(name, find_logits(value)) for name, value in items.items()]
    return next(((f"{name}.{inner[0]}", inner[1]) for name, inner in nested if inner), None)


def lost_beside(result: Any, chosen: str) -> Iterator[str]:
    """What a graph that returns the chosen tensor alone lacks, and what it may have taken wrongly.

    >>> import torch
    >>> list(lost_beside((torch.zeros(2, 3), torch.zeros(2, 3)), "0"))
    ['outputs other than 0: 1', 'a choice: 1 could be the logits as well as 0']
    """
    head, _, inner = chosen.partition(".")
    items = dict(_items(result))
    others = {name: value for name, value in items.items() if name != head and value is not None}
    if others:
        yield f"outputs other than {chosen}: {', '.join(others)}"
    if chosen in _LOGITS or inner:
        return
    shape = items[chosen].shape
    alike = [name for name, value in others.items() if getattr(value, "shape", None) == shape]
    if alike:
        yield f"a choice: {' and '.join(alike)} could be the logits as well as {chosen}"


def count_classes(model: nn.Module, example: Inputs, *, name: str | None = None) -> int:
    """How many logits ``model`` gives for each sample, tried on three of them, in evaluation mode.

    Of tokens there may be logits for each token. ``name`` is what messages call the model.

    Raises :class:`UsageError` when it fails or gives anything but one tensor of logits.

    >>> count_classes(nn.Linear(4, 2), torch.zeros(1, 4))
    2
    """
    name = name or type(model).__name__
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    samples = move(_three(example), device)
    shapes = _shapes(samples)
    try:
        with in_mode(model, training=False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = call_model(model, samples)
    except Exception as error:
        raise UsageError(
            f"{name} does not take 3 samples of {shapes}.",
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="give inputs of the size it was made for; the batch size must stay free",
        ) from error
    logits = result if isinstance(result, Tensor) else (find_logits(result) or ("", None))[1]
    most = 2 if _are_images(samples) else 3
    if logits is not None and 2 <= logits.ndim <= most and len(logits) == 3:
        return logits.shape[-1]
    raise UsageError(
        f"{name} does not return one tensor of logits (batch, classes).",
        returned=f"{describe(result)}, for 3 samples",
        fix="wrap it in a module whose forward returns the logits alone",
    )


def _three(example: Inputs) -> Inputs:
    """The first sample, three times."""
    if isinstance(example, Tensor):
        return example[:1].repeat(3, *[1 for _ in example.shape[1:]])
    return {name: value[:1].repeat(3, *[1] * (value.ndim - 1)) for name, value in example.items()}


def _are_images(samples: Inputs) -> bool:
    values = [samples] if isinstance(samples, Tensor) else samples.values()
    return all(value.is_floating_point() for value in values)


def _shapes(samples: Inputs) -> str:
    values = [samples] if isinstance(samples, Tensor) else samples.values()
    return ", ".join("×".join(map(str, value.shape[1:])) or "one number" for value in values)


def _items(result: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(result, Tensor) or result is None:
        return
    if isinstance(result, Mapping):
        yield from ((str(name), value) for name, value in result.items())
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        yield from zip(result._fields, result, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(result, (tuple, list)):
        yield from ((str(index), value) for index, value in enumerate(result))
    elif is_dataclass(result):
        yield from ((each.name, getattr(result, each.name)) for each in fields(result))


def describe(value: Any) -> str:
    """What a model returned, for people.

    >>> import torch
    >>> describe(torch.zeros(2, 3))
    'a tensor of shape 2×3'
    """
    if value is None:
        return "nothing"
    if isinstance(value, Tensor):
        sizes = ["batch" if size == BATCH else str(size) for size in value.shape]
        kind = "a tensor" if value.is_floating_point() else f"a tensor of {value.dtype}"
        return f"{kind.replace('torch.', '')} of shape {'×'.join(sizes) or '() (one number)'}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return f"a {kind} of {len(value)} values"
    return f"of type {type(value).__name__}"


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Every module of ``model`` in one mode, and afterwards in its own again."""
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = training
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
