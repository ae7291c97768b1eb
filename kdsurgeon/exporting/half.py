"""Write a graph in float16: weights and arithmetic, while what goes in and comes out stays float32.

Inputs and outputs in float32 are the field's convention (``keep_io_types``): whoever feeds a
camera's pixels need not know float16. An operator that has no float16 in the operator set keeps
float32, between two casts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from kdsurgeon.errors import NumericsError, UsageError
from kdsurgeon.exporting.runtime import open_session
from kdsurgeon.exporting.samples import Samples, chunks, count, repeated

LARGEST = 65504.0  # of float16, IEEE 754-2008
_NAMES: dict[int, str] = {TensorProto.FLOAT: "float", TensorProto.FLOAT16: "half"}
_PEAK = "kdsurgeon.peak."
_TRIED = 8  # samples at a time, of all of whose values the largest is sought


def halved(model: onnx.ModelProto, weights: set[str]) -> onnx.ModelProto:
    """A copy in float16; ``weights`` names the initializers that are parameters of the network.

    Constants beyond the range of float16 (a mask's -3.4e38) become its ends. Raises
    :class:`NumericsError` for a weight beyond it and :class:`UsageError` for a graph in a graph.
    """
    found = onnx.ModelProto()
    found.CopyFrom(model)
    _Halving(found, weights).apply()
    del found.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(found)


class _Halving:
    """One graph being rewritten, and the type that every value has by then."""

    def __init__(self, model: onnx.ModelProto, weights: set[str]) -> None:
        self.graph = model.graph
        self.weights = weights
        self.opset = next(each.version for each in model.opset_import if not each.domain)
        self.types: dict[str, int] = {}
        self.nodes: list[NodeProto] = []
        self.cast: dict[tuple[str, int], str] = {}
        self.original = {tensor.name: tensor for tensor in model.graph.initializer}
        self.stored: dict[str, TensorProto] = {}

    def apply(self) -> None:
        for value in self.graph.input:
            self.types[value.name] = value.type.tensor_type.elem_type
        for name, tensor in self.original.items():
            is_float = tensor.data_type == TensorProto.FLOAT
            half = _half(tensor, is_weight=name in self.weights) if is_float else tensor
            self.stored[name], self.types[name] = half, half.data_type
        for node in self.graph.node:
            self._rewrite(node)
        for value in self.graph.output:
            self._restore(value)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        kept = [tensor for name, tensor in self.stored.items() if name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def _rewrite(self, node: NodeProto) -> None:
        if any(attribute.HasField("g") for attribute in node.attribute):
            raise UsageError(
                f"{node.op_type} holds a graph of its own, which is not written in float16.",
                where=node.name,
                fix="export without --half",
            )
        schema = onnx.defs.get_schema(node.op_type, self.opset, node.domain)
        allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
        for index, name in enumerate(node.input):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            may_be_half = "tensor(float16)" in allowed.get(formal.type_str, [formal.type_str])
            if name and self.types.get(name) in _NAMES:
                node.input[index] = self._as(
                    name, TensorProto.FLOAT16 if may_be_half else TensorProto.FLOAT
                )
        self._halve_attributes(node)
        self.nodes.append(node)
        self._note_outputs(node, schema, allowed)

    def _note_outputs(
        self, node: NodeProto, schema: onnx.defs.OpSchema, allowed: Mapping[str, Sequence[str]]
    ) -> None:
        """The types of what ``node`` makes: those of its inputs where they share a letter."""
        by_letter: dict[str, int] = {}
        for index, name in enumerate(node.input):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            if name in self.types:
                by_letter.setdefault(formal.type_str, self.types[name])
        for index, name in enumerate(node.output):
            formal = schema.outputs[min(index, len(schema.outputs) - 1)]
            letter = formal.type_str
            said = self._said(node)
            if said is not None:
                self.types[name] = said
            elif letter in by_letter:
                self.types[name] = by_letter[letter]
            elif letter in allowed and "tensor(float16)" in allowed[letter]:
                self.types[name] = TensorProto.FLOAT16
            else:
                self.types[name] = TensorProto.FLOAT if "float" in letter else TensorProto.INT64

    @staticmethod
    def _said(node: NodeProto) -> int | None:
        """The type that an attribute of the node says of its output."""
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i:
                return attribute.i
            if node.op_type in ("Constant", "ConstantOfShape") and attribute.HasField("t"):
                return attribute.t.data_type
            if node.op_type == "Constant" and attribute.name.startswith("value_int"):
                return TensorProto.INT64
        return TensorProto.FLOAT if node.op_type == "ConstantOfShape" else None

    def _halve_attributes(self, node: NodeProto) -> None:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            elif attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(_half(attribute.t, is_weight=False))
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                values = attribute.floats if attribute.name == "value_floats" else attribute.f
                tensor = numpy_helper.from_array(np.asarray(values, np.float32))
                attribute.CopyFrom(helper.make_attribute("value", _half(tensor, is_weight=False)))

    def _as(self, name: str, kind: int) -> str:
        """The value in that type: another initializer, or behind a cast, made once."""
        if self.types[name] == kind:
            return name
        known = self.cast.get((name, kind))
        if known:
            return known
        other = f"{name}.{_NAMES[kind]}"
        if name in self.original:
            self.stored[other] = TensorProto()
            self.stored[other].CopyFrom(self.original[name])
            self.stored[other].name = other
        else:
            self.nodes.append(
                helper.make_node("Cast", [name], [other], to=kind, name=f"node_{other}")
            )
        self.types[other] = kind
        self.cast[name, kind] = other
        return other

    def _restore(self, value: onnx.ValueInfoProto) -> None:
        """Let an output have its name and its type of before."""
        name, kind = value.name, value.type.tensor_type.elem_type
        if kind not in _NAMES or self.types[name] == kind:
            return
        inner = f"{name}.half"
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, each in enumerate(names):
                    if each == name:
                        names[index] = inner
        self.nodes.append(
            helper.make_node("Cast", [inner], [name], to=kind, name=f"node_{name}_float")
        )


def _half(tensor: TensorProto, *, is_weight: bool) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    beyond = np.isfinite(values) & (np.abs(values) > LARGEST)
    if is_weight and beyond.any():
        raise NumericsError(
            f"a weight of {np.abs(values[beyond]).max():.3g} does not fit into float16.",
            where=tensor.name,
            why=f"float16 ends at {LARGEST:,.0f}",
            fix="export without --half",
        )
    with np.errstate(over="ignore"):
        ends = np.where(beyond, np.sign(values) * LARGEST, values)
        return numpy_helper.from_array(ends.astype(np.float16), tensor.name)


def check_range(
    model: onnx.ModelProto, samples: Samples, name: str, *, batch: int | None = None
) -> None:
    """Raise :class:`NumericsError` where a value of the fp32 graph is too large for float16.

    ONNX Runtime on a CPU computes float16 in float32 between casts that it partly leaves out, so
    an overflow that a device would meet does not show in the logits here. ``name`` is the file's.
    """
    for value, peak in largest_values(model, samples, batch=batch):
        if not peak <= LARGEST:
            node = next(each for each in model.graph.node if value in each.output)
            raise NumericsError(
                f"{name} would overflow: a value reaches {peak:.3g} in fp32.",
                where=f"node {node.name} ({node.op_type}), value {value}",
                why=f"float16 ends at {LARGEST:,.0f}",
                fix="export without --half",
            )


def largest_values(
    model: onnx.ModelProto, samples: Samples, *, batch: int | None = None
) -> Iterator[tuple[str, float]]:
    """The largest absolute entry of every float32 value, in the order they are computed.

    Infinities that the network itself makes, as of masks, do not count. ``batch`` is the one batch
    size that the graph takes, None when it takes every one.
    """
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*model.graph.value_info, *model.graph.output)
    }
    names = [
        name
        for node in model.graph.node
        for name in node.output
        if kinds.get(name) == TensorProto.FLOAT
    ]
    for name in names:
        shown.graph.node.extend(_peak_of(name))
    shown.graph.output.extend(onnx.ValueInfoProto(name=f"{_PEAK}{name}") for name in names)
    zero = numpy_helper.from_array(np.zeros((), np.float32), f"{_PEAK}zero")
    shown.graph.initializer.append(zero)
    run = open_session(shown.SerializeToString(), {}, torch.get_num_threads())
    peaks = np.zeros(len(names))
    for chunk in chunks(samples, batch or _TRIED):
        filled = repeated(chunk, batch or count(chunk))
        feed = {name: value.numpy() for name, value in filled.items()}
        found = run.run([f"{_PEAK}{name}" for name in names], feed)
        peaks = np.maximum(peaks, np.asarray(found, np.float64))
    yield from zip(names, peaks.tolist(), strict=True)


def _peak_of(name: str) -> list[NodeProto]:
    """Nodes for the largest absolute finite entry of a value."""
    size, infinite, finite = (f"{_PEAK}{part}.{name}" for part in ("size", "infinite", "finite"))
    return [
        helper.make_node("Abs", [name], [size]),
        helper.make_node("IsInf", [size], [infinite]),
        helper.make_node("Where", [infinite, f"{_PEAK}zero", size], [finite]),
        helper.make_node("ReduceMax", [finite], [f"{_PEAK}{name}"], keepdims=0),
    ]
