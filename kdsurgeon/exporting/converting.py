"""Turn a network into an ONNX graph, and keep the program it was written from beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import Message
from torch import Tensor, nn

from kdsurgeon.errors import TraceError
from kdsurgeon.exporting.samples import ONE, Samples, repeated
from kdsurgeon.exporting.staging import first_line, silence
from kdsurgeon.exporting.translating import translations
from kdsurgeon.tracing import call_model, logits_in

_INSIDE = "model."  # what Network puts before every name
_EXAMPLES = 2  # a batch of one would be taken for a constant


class Network(nn.Module):
    """What is written: the logits alone, of inputs in the order of their names.

    Whatever else the model returns is left out; ``softmax`` makes probabilities of the logits.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], *, softmax: bool = False) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.softmax = softmax

    @property
    def label(self) -> str:
        """What messages call it."""
        return type(self.model).__name__

    @property
    def output(self) -> str:
        """What the file calls its output."""
        return "probabilities" if self.softmax else "logits"

    def forward(self, *inputs: Tensor) -> Tensor:
        by_name = dict(zip(self.names, inputs, strict=True))
        given = by_name[ONE] if self.names == (ONE,) else by_name
        logits = logits_in(call_model(self.model, given))
        return logits.softmax(-1) if self.softmax else logits

    def answer(self, samples: Samples) -> Tensor:
        """The logits (n, classes) of samples by name."""
        return self(*(samples[name] for name in self.names))


@dataclass(frozen=True)
class Conversion:
    """An ONNX graph, and the program that torch wrote it from, where that is known.

    Values of the graph are called as the program's nodes are, so the two can be compared.
    """

    proto: onnx.ModelProto
    program: torch.export.ExportedProgram | None = None


def convert(
    network: Network,
    samples: Samples,
    opset: int,
    *,
    batch: int | None = None,
    dynamic_size: bool = False,
) -> Conversion:
    """The graph of a resting network; its axis of samples is free unless ``batch`` fixes it.

    With ``dynamic_size`` height and width of images, or the length of tokens, are free too.
    Raises :class:`TraceError` when that cannot be written.
    """
    inputs = repeated(samples, batch or _EXAMPLES)
    free = free_axes(inputs, batch=batch, dynamic_size=dynamic_size)
    dims = {name: torch.export.Dim(name) for axes in free.values() for name in axes.values()}
    shapes = tuple(
        {axis: dims[name] for axis, name in free[each].items()} for each in network.names
    )
    _read_translations_once()
    try:
        with silence(), torch.no_grad(), _own_randomness():
            program = torch.onnx.export(
                network,
                tuple(inputs[name] for name in network.names),
                dynamo=True,
                opset_version=opset,
                input_names=list(network.names),
                output_names=[network.output],
                dynamic_shapes=(shapes,) if dims else None,
                custom_translation_table=translations(opset),
                verbose=False,
            )
            assert program is not None, "torch.onnx.export returns a program when dynamo is on"
            return Conversion(_named_as_inside(program.model_proto), program.exported_program)
    except Exception as error:
        raise _cannot_be_written(network, error, dynamic_size=dynamic_size) from error


@cache
def _read_translations_once() -> None:
    """Let onnxscript keep what it reads in the source of its 500 translations: a third of the time
    that a small network takes, the same for every file."""
    with suppress(ImportError, AttributeError):  # of its own insides: then it reads them anew
        from onnxscript._internal.values import TracedOnnxFunction

        kept = cached_property(TracedOnnxFunction.function_ir.fget)  # pyright: ignore
        kept.__set_name__(TracedOnnxFunction, "function_ir")
        TracedOnnxFunction.function_ir = kept  # pyright: ignore


def free_axes(
    samples: Samples, *, batch: int | None, dynamic_size: bool
) -> dict[str, dict[int, str]]:
    """The name of every free axis of every input.

    >>> image = {"input": torch.zeros(2, 3, 8, 8)}
    >>> free_axes(image, batch=None, dynamic_size=True)
    {'input': {0: 'batch', 2: 'height', 3: 'width'}}
    """
    found: dict[str, dict[int, str]] = {}
    for name, value in samples.items():
        found[name] = {} if batch else {0: "batch"}
        if dynamic_size and value.is_floating_point() and value.ndim == 4:
            found[name] |= {2: "height", 3: "width"}
        elif dynamic_size and not value.is_floating_point() and value.ndim == 2:
            found[name] |= {1: "sequence"}
    return found


def write_content(model: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Give ``model`` this ``metadata`` in place of what the exporter noted about source files."""
    for part in (model, *messages(model)):
        for noted in ("doc_string", "metadata_props"):
            if noted in part.DESCRIPTOR.fields_by_name:
                part.ClearField(noted)
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    oldest = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    model.ir_version = max(model.ir_version, oldest)


def messages(message: Message) -> Iterator[Message]:
    """Every message inside a protobuf message, at any depth."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for child in [value] if isinstance(value, Message) else value:
            yield child
            yield from messages(child)


def _named_as_inside(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with weights called as the model calls them, not as :class:`Network` does."""
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.removeprefix(_INSIDE)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = name.removeprefix(_INSIDE)
    for value in model.graph.value_info:
        value.name = value.name.removeprefix(_INSIDE)
    return model


def module_path(stack: Mapping[str, Any] | None) -> str:
    """The path of the innermost module in a node's ``nn_module_stack``; empty for the model.

    >>> module_path({"": ("", "Network"), "model.stem": ("model.stem", "Conv2d")})
    'stem'
    """
    paths = [entry[0] for entry in (stack or {}).values() if isinstance(entry, tuple)]
    return paths[-1].removeprefix("model").removeprefix(".") if paths else ""


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Draws inside change no generator of the caller."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _cannot_be_written(network: Network, error: Exception, *, dynamic_size: bool) -> TraceError:
    fix = "the batch size must stay free, and no branch may depend on the values computed"
    if dynamic_size:
        fix = "many networks take one size only, or multiples of one: write it for that size"
    return TraceError(
        f"{network.label} cannot be written as ONNX{' with a free size' if dynamic_size else ''}.",
        why=first_line(error),
        fix=fix,
    )
