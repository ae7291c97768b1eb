"""Capture a model as a graph whose values know their shapes.

A graph freezes ``if self.training`` at capture. Capture a model once in each mode you need.
"""

from kdsurgeon.tracing.capture import Trace, trace, trace_whole
from kdsurgeon.tracing.outputs import (
    Inputs,
    call_model,
    count_classes,
    describe,
    find_logits,
    in_mode,
    logits_in,
    logits_of,
    move,
)
from kdsurgeon.tracing.recording import unchanged
from kdsurgeon.tracing.values import BATCH, batch_axis, evaluate, operation_name
from kdsurgeon.tracing.writes import after, memory_of

__all__ = [
    "BATCH",
    "Inputs",
    "Trace",
    "after",
    "batch_axis",
    "call_model",
    "count_classes",
    "describe",
    "evaluate",
    "find_logits",
    "in_mode",
    "logits_in",
    "logits_of",
    "memory_of",
    "move",
    "operation_name",
    "trace",
    "trace_whole",
    "unchanged",
]
