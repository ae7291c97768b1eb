"""What nodes are, computed on tensors without data: shapes, types and who overwrites whom.

The batch has the size :data:`BATCH` there, a prime, so that whatever grows with the batch can be
told from everything else: an axis, or a number that a model computed from its sizes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

BATCH = 1009


def without_data(value: Tensor) -> Tensor:
    """A tensor like ``value`` that has no data; a parameter's stand-in asks for no gradient."""
    return torch.empty_like(value, device="meta", requires_grad=False)


def example_without_data(value: Tensor, batch: int) -> Tensor:
    """The stand-in of a model input: without data, and with :data:`BATCH` samples."""
    if value.ndim == 0 or len(value) != batch:
        return without_data(value)
    return torch.empty((BATCH, *value.shape[1:]), dtype=value.dtype, device="meta")


def batch_axis(value: Any) -> int | None:
    """The one axis that counts samples, or None where there is none or it is folded with others.

    >>> batch_axis(torch.empty(7, BATCH, 3, device="meta"))
    1
    """
    if not isinstance(value, Tensor):
        return None
    scaled = [axis for axis, size in enumerate(value.shape) if size and size % BATCH == 0]
    return scaled[0] if len(scaled) == 1 and value.shape[scaled[0]] == BATCH else None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to every leaf of nested tuples, lists, dicts and slices."""
    if isinstance(value, tuple):
        items = [mapped(item, change) for item in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        is_result = hasattr(value, "n_fields")  # what torch.max and its like return
        return type(value)(items) if is_result else tuple(items)
    if isinstance(value, list):
        return [mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(mapped(part, change) for part in (value.start, value.stop, value.step)))
    return change(value)


def on_meta(value: Any) -> Any:
    """A leaf value on the device without data: tensors, and devices themselves."""
    if isinstance(value, Tensor):
        return value if value.is_meta else without_data(value)
    return torch.device("meta") if isinstance(value, torch.device) else value


def evaluate(node: fx.Node, root: nn.Module) -> Any:
    """What ``node`` gives for the recorded values of its inputs, computed without data."""
    if node.op == "get_attr":
        return node.meta["val"]
    args, kwargs = map_arg((node.args, node.kwargs), lambda other: other.meta["val"])
    if node.op == "call_module":
        return call_leaf(root.get_submodule(str(node.target)), args, kwargs)[0]
    if node.op == "call_method":
        function = getattr(type(args[0]), str(node.target))
        return call(function, args, kwargs)
    return call(node.target, args, kwargs)  # pyright: ignore[reportArgumentType]


def call(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """``function`` of stand-ins; whatever it makes is a stand-in too."""
    name = getattr(function, "__name__", "")
    if name in ("cpu", "cuda"):
        return args[0]
    args, kwargs = mapped(list(args), on_meta), mapped(kwargs, on_meta)
    if "device" in kwargs and kwargs["device"] is not None:
        kwargs["device"] = torch.device("meta")
    if name == "to":
        args = [torch.device("meta") if isinstance(arg, str) else arg for arg in args]
    if any(True for _ in tensors_in((args, list(kwargs.values())))):
        return mapped(function(*args, **kwargs), on_meta)
    with torch.device("meta"):
        return mapped(function(*args, **kwargs), on_meta)


def call_leaf(
    leaf: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """What a module gives for stand-ins, and the stand-ins of its own state that it ran on.

    So no weight or buffer is written to. Hooks before a module's call run, as weight normalisation
    is one; hooks after it do not: nobody who watches the model sees values that are not real.
    """
    found: dict[int, Tensor] = {}  # by the tensor: what is tied stays tied
    stand_ins = {
        f"{path}.{name}".removeprefix("."): found.setdefault(id(value), without_data(value))
        for path, module in leaf.named_modules()  # once each, also one of several names
        for name, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None
    }
    args, kwargs = mapped(tuple(args), on_meta), mapped(kwargs, on_meta)
    if isinstance(leaf, nn.RNNBase) and isinstance(args[0], Tensor):
        return _recurrent(leaf, args[0]), stand_ins
    with _without_hooks(leaf):
        result = torch.func.functional_call(leaf, stand_ins, args, kwargs, tie_weights=False)
    return mapped(result, on_meta), stand_ins


def _recurrent(leaf: nn.RNNBase, sequence: Tensor) -> Any:
    """What a recurrent layer gives, by its shapes alone: running it means a step per token."""
    *around, _ = sequence.shape
    directions = 2 if leaf.bidirectional else 1
    width = leaf.proj_size or leaf.hidden_size
    samples = around[:-2] if leaf.batch_first else around[1:]
    samples = [around[0]] if leaf.batch_first and len(around) == 2 else samples
    state = (directions * leaf.num_layers, *samples)
    result = sequence.new_empty((*around, directions * width))
    hidden = sequence.new_empty((*state, width))
    if isinstance(leaf, nn.LSTM):
        return result, (hidden, sequence.new_empty((*state, leaf.hidden_size)))
    return result, hidden


def operation_name(node: fx.Node) -> str:
    """What a function or method is called, without marks: ``add_`` and aten's ``add`` are "add"."""
    if node.op == "call_module":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2].strip("_")
    return str(getattr(node.target, "__name__", node.target)).strip("_")


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    before = {module: module._forward_hooks for module in model.modules()}
    for module in before:
        module._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for module, hooks in before.items():
            module._forward_hooks = hooks
