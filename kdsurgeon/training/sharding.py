"""Weights of which each process holds a part: how they are measured, kept and put back.

What is saved is whole, so that any number of processes can go on with it, sharing out or not.
Nothing here looks at a tensor that is not shared out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_shared(tensor: Tensor) -> bool:
    """Whether it is one of torch's DTensors, told without importing them."""
    return hasattr(tensor, "full_tensor")


def here(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds, in the same memory; all of a plain one.

    >>> here(torch.ones(2))
    tensor([1., 1.])
    """
    return tensor.to_local() if is_shared(tensor) else tensor


@torch.no_grad()
def whole(tensor: Any) -> Tensor:
    """All of it: on the CPU of rank 0, nothing on the others, which must ask at the same place."""
    if not is_shared(tensor):
        return tensor
    found = tensor.full_tensor()
    return found.cpu() if tensor.device_mesh.get_rank() == 0 else found.new_empty(0)


@torch.no_grad()
def like(value: Tensor, own: Any) -> Tensor:
    """A whole ``value``, of which every process has all, as ``own`` is held: shared out or not."""
    if not is_shared(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    placed = value.to(own.device)
    return distribute_tensor(placed, own.device_mesh, own.placements, src_data_rank=None)


def all_like(values: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whole ``values`` as those of the same name in ``own`` are held."""
    return {name: like(value, own[name]) if name in own else value
            for name, value in values.items()}  # fmt: skip


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """On rank 0 ``model`` holds all of its weights, on the CPU, as long as the context lasts."""
    held: list[tuple[dict[str, Any], str, Any]] = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_shared(parameter)
    ]
    found: dict[int, nn.Parameter] = {}
    for store, name, parameter in held:
        if id(parameter) not in found:  # tied weights stay tied
            found[id(parameter)] = nn.Parameter(whole(parameter), requires_grad=False)
        if parameter.device_mesh.get_rank() == 0:
            store[name] = found[id(parameter)]
    try:
        yield
    finally:
        for store, name, parameter in held:
            store[name] = parameter


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients, as one vector, over all parts.

    >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5.)
    """
    if not any(map(is_shared, gradients)):
        return torch.nn.utils.get_total_norm(gradients)
    squared = torch.nn.utils.get_total_norm([here(each) for each in gradients]) ** 2
    dist.all_reduce(squared)
    return squared.sqrt()


def clip(parameters: Iterable[nn.Parameter], most: float, norm: Tensor) -> None:
    """Shorten gradients of the given ``norm`` to ``most``, as torch does."""
    known = list(parameters)
    gradients = [p.grad for p in known if p.grad is not None]
    if not any(map(is_shared, gradients)):
        torch.nn.utils.clip_grads_with_norm_(known, most, norm)
        return
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([here(each) for each in gradients], factor)  # pyright: ignore[reportPrivateImportUsage]
