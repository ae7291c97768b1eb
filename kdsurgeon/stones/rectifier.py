"""A ReLU that keeps one bit for each value: all that the gradient needs where no weight is trained.

One operator forward and one backward. On a CPU numpy packs the bits; on CUDA a Triton kernel does
it while it computes the ReLU, or, without Triton, one byte is kept for each value.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024  # bytes of bits that a program writes

# triton.language once kernels() has run: Triton looks the name up here when it compiles a kernel.
# pyright: reportInvalidTypeForm=false
tl: Any = None


def rectify(value: Tensor) -> Tensor:
    """``relu(value)``; its backward pass can be run once.

    >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
    >>> rectify(x).sum().backward()
    >>> x.grad
    tensor([0., 1.])
    """
    return _Rectify.apply(value) if value.requires_grad else value.relu()  # pyright: ignore[reportReturnType]


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor):
        result, kept = torch.ops.kdsurgeon.rectify(value)
        ctx.save_for_backward(kept)
        ctx.stride = result.stride()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (kept,) = ctx.saved_tensors
        return torch.ops.kdsurgeon.where_kept(gradient, kept, list(ctx.stride))


@torch.library.custom_op("kdsurgeon::rectify", mutates_args=())
def _rectify(value: Tensor) -> tuple[Tensor, Tensor]:
    """ReLU, and where it is above zero: eight values a byte in the order of memory, or a mask."""
    if not _packs(value):
        result = torch.relu(value)
        return result, result > 0
    if value.device.type == "cuda":
        return pack(value)
    result = torch.relu(value)
    flat = result.as_strided((result.numel(),), (1,)).numpy()
    return result, torch.from_numpy(np.packbits(flat > 0, bitorder="little"))


@_rectify.register_fake
def _(value: Tensor) -> tuple[Tensor, Tensor]:
    if not _packs(value):
        return value.relu(), value > 0
    return torch.empty_like(value), value.new_empty((value.numel() + 7) // 8, dtype=torch.uint8)


def _packs(value: Tensor) -> bool:
    """Whether a bit is kept for each value, and not a byte."""
    if value.device.type == "cuda":
        return _is_dense(value) and find_spec("triton") is not None
    return value.device.type == "cpu" and value.dtype != torch.bfloat16 and _is_dense(value)


@torch.library.custom_op("kdsurgeon::where_kept", mutates_args=())
def _where_kept(gradient: Tensor, kept: Tensor, stride: list[int]) -> Tensor:
    """The gradient where bits are set, else 0; the bits lie as a tensor of ``stride`` would."""
    if kept.dtype == torch.bool:
        return gradient * kept
    gradient = _with_stride(gradient, stride)
    if gradient.device.type == "cuda":
        return unpack(gradient, kept)
    count = gradient.numel()
    mask = np.unpackbits(kept.numpy(), count=count, bitorder="little").view(np.bool_)
    result = torch.empty_strided(gradient.shape, stride, dtype=gradient.dtype)
    flat = [each.as_strided((count,), (1,)).numpy() for each in (gradient, result)]
    np.multiply(flat[0], mask, out=flat[1])  # 2.7 times faster than torch with a mask of booleans
    return result


@_where_kept.register_fake
def _(gradient: Tensor, kept: Tensor, stride: list[int]) -> Tensor:
    if kept.dtype == torch.bool:
        return gradient * kept
    return gradient.new_empty_strided(gradient.shape, stride)


def _is_dense(value: Tensor) -> bool:
    """Whether its values lie side by side, whatever the order of its axes."""
    axes = sorted(zip(value.stride(), value.shape, strict=True))
    reach = 1
    for stride, size in axes:
        if size > 1 and stride != reach:
            return False
        reach *= size
    return value.numel() > 0


def _with_stride(value: Tensor, stride: list[int]) -> Tensor:
    if list(value.stride()) == stride:
        return value
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(
        value
    )


# on CUDA ─────────────────────────────────────────────────────────────────────────────────────────


def pack(value: Tensor) -> tuple[Tensor, Tensor]:
    """ReLU of a dense tensor, and a bit for each value above zero, in the order of memory."""
    result, count = torch.empty_like(value), value.numel()
    kept = torch.empty((count + 7) // 8, dtype=torch.uint8, device=value.device)
    kernels()[0][(_programs(kept),)](value, result, kept, count, BLOCK=BLOCK)
    return result, kept


def unpack(gradient: Tensor, kept: Tensor) -> Tensor:
    """The gradient where a bit is set, else 0; both in the order of memory."""
    result = torch.empty_like(gradient)
    kernels()[1][(_programs(kept),)](gradient, kept, result, gradient.numel(), BLOCK=BLOCK)
    return result


def _programs(kept: Tensor) -> int:
    return (kept.numel() + BLOCK - 1) // BLOCK


@cache
def kernels() -> tuple[Any, Any]:
    """With ``TRITON_INTERPRET=1`` in the environment they run, slowly, on a CPU."""
    global tl
    import triton
    import triton.language

    tl = triton.language
    varying = {"do_not_specialize": ["count"]}
    return triton.jit(_pack, **varying), triton.jit(_unpack, **varying)


def _pack(values, result, kept, count, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)[None, :]
    place = byte[:, None] * 8 + bit
    inside = place < count
    value = tl.load(values + place, mask=inside, other=0.0)
    # not a maximum: what is no number stays none
    tl.store(result + place, tl.where(value <= 0, 0.0, value), mask=inside)
    bits = tl.sum((value > 0).to(tl.int32) << bit, axis=1)
    tl.store(kept + byte, bits.to(tl.uint8), mask=byte * 8 < count)


def _unpack(gradient, kept, result, count, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)[None, :]
    place = byte[:, None] * 8 + bit
    inside = place < count
    bits = tl.load(kept + byte, mask=byte * 8 < count, other=0).to(tl.int32)
    value = tl.load(gradient + place, mask=inside, other=0.0)
    tl.store(result + place, tl.where(((bits[:, None] >> bit) & 1) > 0, value, 0.0), mask=inside)
