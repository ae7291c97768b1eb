"""Spell attention and GELU so that ONNX Runtime fuses them.

torch spells attention with shapes computed in the file and scales both factors, and GELU in an
order that no fusion knows; some forms (five axes, a mask) it does not write at all. Here attention
is MatMul, Softmax, MatMul, of which the transposition and the scale melt into the first MatMul, and
GELU is x·(1 + erf(x/√2))·½, which becomes one node with the bias before it. From the operator sets
on that have them as one operator (GELU 20, attention 23), torch's own is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnxscript
import torch

_GELU_OPSET, _ATTENTION_OPSET = 20, 23

Table = dict[Callable[..., Any], Callable[..., Any]]


def translations(opset: int) -> Table:
    """Functions that write operators of torch in ``opset``, by operator."""
    found: Table = {}
    if opset >= _ATTENTION_OPSET:
        return found
    op = getattr(onnxscript, f"opset{opset}")
    if opset < _GELU_OPSET:
        found[torch.ops.aten.gelu.default] = _gelu(op)
    found[torch.ops.aten.scaled_dot_product_attention.default] = _attention(op)
    return found


def _gelu(op: Any) -> Callable[..., Any]:
    def gelu(self: Any, approximate: str = "none") -> Any:
        if approximate == "tanh":
            cubic = op.Mul(op.Mul(op.Mul(self, self), self), op.Constant(value_float=0.044715))
            inner = op.Mul(op.Add(self, cubic), op.Constant(value_float=math.sqrt(2 / math.pi)))
            bent = op.Tanh(inner)
        else:
            bent = op.Erf(op.Div(self, op.Constant(value_float=math.sqrt(2))))
        raised = op.Add(bent, op.Constant(value_float=1.0))
        return op.Mul(op.Mul(self, raised), op.Constant(value_float=0.5))

    return gelu


def _attention(op: Any) -> Callable[..., Any]:
    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """Vaswani et al. 2017, section 3.2.1; a mask of truth values says what may be seen."""
        if enable_gqa:
            times = query.shape[-3] // key.shape[-3]
            key, value = (_repeated(op, each, times) for each in (key, value))
        axes = list(range(len(key.shape)))
        axes[-1], axes[-2] = axes[-2], axes[-1]
        scores = op.MatMul(query, op.Transpose(key, perm=axes))
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = op.Mul(scores, op.Constant(value_float=float(factor)))
        if is_causal:
            attn_mask = _causal(op, query, key)
        if attn_mask is not None and (is_causal or attn_mask.dtype == onnxscript.ir.DataType.BOOL):
            scores = op.Where(attn_mask, scores, op.Constant(value_float=-math.inf))
        elif attn_mask is not None:
            scores = op.Add(scores, attn_mask)
        return op.MatMul(op.Softmax(scores, axis=-1), value)

    return attention


def _causal(op: Any, query: Any, key: Any) -> Any:
    """Truth values (queries, keys): no query sees a later key."""
    ends = (op.Shape(each, start=-2, end=-1) for each in (query, key))
    rows, columns = (op.Squeeze(end) for end in ends)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    late = op.Unsqueeze(op.Range(zero, rows, one), op.Constant(value_ints=[1]))
    early = op.Unsqueeze(op.Range(zero, columns, one), op.Constant(value_ints=[0]))
    return op.GreaterOrEqual(late, early)


def _repeated(op: Any, heads: Any, times: int) -> Any:
    """Each head of (batch, heads, tokens, width) as often as queries share it."""
    shape = op.Shape(heads)
    copies = op.Constant(value_ints=[1, 1, times, 1, 1])
    apart = op.Expand(op.Unsqueeze(heads, op.Constant(value_ints=[2])), copies)
    count = op.Constant(value_ints=[heads.shape[-3] * times])
    batch, rest = op.Slice(shape, [0], [1]), op.Slice(shape, [2], [4])
    return op.Reshape(apart, op.Concat(batch, count, rest, axis=0))
