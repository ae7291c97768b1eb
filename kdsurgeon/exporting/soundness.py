"""Refuse an ONNX graph that asks for more than a classifier may, before a runtime sees it.

What is refused: operators of other makers, functions, sparse and nested things without bound,
tensors whose bytes are not those of their shape, and sizes that would fill the memory. What a size
computed inside the graph does is not seen here; that is found by trying the file out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.defs import onnx_opset_version

from kdsurgeon.checkpoints.pickles import printable
from kdsurgeon.errors import ModelFileError

MAX_DEPTH = 8  # graphs inside graphs, as in the branches of an If
MAX_AXES = 64
MAX_ELEMENTS = 1 << 28  # that an operator may be told to make
MAX_SAID = 1 << 40  # elements that a value may be said to have
MAX_STEP = 1 << 16  # kernel, stride, padding, dilation
OLDEST_IR, OLDEST_OPSET = 3, 7  # what ONNX Runtime still reads

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
# Of com.microsoft what quantizers and graph optimisers write; others read files (EPContext) or
# search without end.
MICROSOFT = {
    *("Attention", "BiasGelu", "BiasSoftmax", "DequantizeLinear", "DynamicQuantizeMatMul"),
    *("FastGelu", "FusedConv", "FusedGemm", "FusedMatMul", "Gelu", "GroupNorm"),
    *("GroupQueryAttention", "MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention"),
    *("NhwcMaxPool", "Pad", "QAttention", "QGemm", "QLinearAdd", "QLinearAveragePool"),
    *("QLinearConcat", "QLinearConv", "QLinearGlobalAveragePool", "QLinearLeakyRelu"),
    *("QLinearMul", "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax", "QLinearWhere"),
    *("QuantizeLinear", "QuickGelu", "RotaryEmbedding", "SimplifiedLayerNormalization"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
}

_BITS = {
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("INT8", "UINT8", "BOOL", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ"), 8),
    **dict.fromkeys(("FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0"), 8),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("INT2", "UINT2"), 2),
    "COMPLEX128": 128,
}
_KNOWN = dict(TensorProto.DataType.items())  # of the onnx at hand, which may lack the newest
BITS: dict[int, int] = {_KNOWN[kind]: bits for kind, bits in _BITS.items() if kind in _KNOWN}
_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")

_COUNTS = {  # types in which an operator is told a size
    *(TensorProto.FLOAT, TensorProto.DOUBLE),
    *(TensorProto.INT16, TensorProto.INT32, TensorProto.INT64),
}
# Inputs that say how large the output is, where they are constants.
_SIZES = {
    **dict.fromkeys(("ConstantOfShape", "HannWindow", "HammingWindow", "BlackmanWindow"), (0,)),
    **dict.fromkeys(("Expand", "Tile", "Upsample", "Pad", "OneHot", "Reshape"), (1,)),
    **dict.fromkeys(("CenterCropPad", "AffineGrid", "DFT"), (1,)),
    "Resize": (2, 3),
    "MaxUnpool": (2,),
    "Col2Im": (0,),
    "MelWeightMatrix": (0, 1),
}
_STEPS = (
    "pads",
    "kernel_shape",
    "strides",
    "dilations",
    "output_padding",
    "output_shape",
    "scales",
)
_Numbers = dict[str, tuple[float, ...]]
_WHOLE = ("shape", "sample_size", "output_height", "output_width", "sampling_ratio", "blocksize")


def check_model(model: ModelProto, name: str) -> None:
    """Raise :class:`ModelFileError` unless ``model`` is a graph of known operators and sane sizes.

    Data in other files is left out here; see :func:`kdsurgeon.exporting.gate.read_onnx`.
    """
    _check_versions(model, name)
    if model.functions or model.training_info:
        what = "functions of its own" if model.functions else "a training graph"
        raise ModelFileError(
            f"{name} brings {what}; refused.",
            fix="export it for inference, or let onnx.inliner put its functions in their places",
        )
    if any(entry.key == "ort_config" for entry in model.metadata_props):
        raise ModelFileError(f"{name} sets options of the runtime (ort_config); refused.")
    if not model.graph.node:
        raise ModelFileError(f"{name} is not an ONNX file.", why="it holds no graph")
    _check_interface(model.graph, name)
    for graph in _graphs(model.graph, name):
        _check_graph(graph, name, may_be_elsewhere=graph is model.graph)


def num_elements(tensor: TensorProto) -> int:
    """How many elements the dims of a tensor make."""
    return math.prod(tensor.dims)


def num_bytes(tensor: TensorProto) -> int:
    """How many bytes a tensor of a known type takes; 4-bit numbers lie two in a byte."""
    return -(-num_elements(tensor) * BITS[tensor.data_type] // 8)


def _check_versions(model: ModelProto, name: str) -> None:
    if not OLDEST_IR <= model.ir_version <= onnx.IR_VERSION:
        raise ModelFileError(
            f"{name} is of ONNX format {model.ir_version}; "
            f"{OLDEST_IR} to {onnx.IR_VERSION} are read.",
            fix="update onnx, or export the model with an older opset",
        )
    found = {entry.domain: entry.version for entry in model.opset_import}
    if len(found) < len(model.opset_import) or not found.keys() & {"", "ai.onnx"}:
        raise ModelFileError(f"{name} is not an ONNX file.", why="its operator sets are not named")
    for domain, version in found.items():
        newest = onnx_opset_version()
        if domain in ("", "ai.onnx") and not OLDEST_OPSET <= version <= newest:
            raise ModelFileError(
                f"{name} needs opset {version}; {OLDEST_OPSET} to {newest} are read.",
                fix="export it with an opset in between",
            )


def _foreign(name: str, operator: str) -> ModelFileError:
    return ModelFileError(
        f"{name} needs operators outside of the standard: {printable(operator)}.",
        why="they come from a library, which is code, or read files",
        fix="export it with the operators of ONNX alone",
    )


def _check_interface(graph: GraphProto, name: str) -> None:
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    for values, kind in ((inputs, "input"), (graph.output, "output")):
        if not values:
            raise ModelFileError(f"{name} must have one {kind}; it has none.")
    for value in (*inputs, *graph.output):
        if not value.type.HasField("tensor_type") or not value.type.tensor_type.elem_type:
            raise ModelFileError(f'{name}: "{printable(value.name)}" is no tensor of a known type.')


def _graphs(graph: GraphProto, name: str, depth: int = 0) -> Iterator[GraphProto]:
    if depth > MAX_DEPTH:
        raise ModelFileError(f"{name} nests graphs more than {MAX_DEPTH} deep; refused.")
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else []
            for part in (*inner, *attribute.graphs):
                yield from _graphs(part, name, depth + 1)


def _check_graph(graph: GraphProto, name: str, *, may_be_elsewhere: bool) -> None:
    if graph.sparse_initializer:
        raise _sparse(name)
    names = [tensor.name for tensor in graph.initializer]
    if len(set(names)) < len(names):
        raise ModelFileError(f"{name} has two tensors of one name.")
    for tensor in graph.initializer:
        check_tensor(tensor, name, may_be_elsewhere=may_be_elsewhere)
    constants = {tensor.name: _numbers(tensor) for tensor in graph.initializer}
    for node in graph.node:
        _check_node(node, name)
        if node.op_type == "Constant":
            constants |= dict.fromkeys(node.output, _constant(node))
    for node in graph.node:
        _check_sizes(node, constants, name)
    for value in (*graph.input, *graph.output, *graph.value_info):
        shape = value.type.tensor_type.shape.dim
        _check_shape(
            [dim.dim_value for dim in shape if dim.HasField("dim_value")], value.name, name
        )


def _sparse(name: str) -> ModelFileError:
    return ModelFileError(f"{name} holds sparse tensors; refused.", fix="store them densely")


def _check_node(node: NodeProto, name: str) -> None:
    if node.domain not in DOMAINS:
        raise _foreign(name, f"{node.domain} {node.op_type}")
    if node.domain == "com.microsoft" and node.op_type not in MICROSOFT:
        raise _foreign(name, f"{node.domain} {node.op_type}")
    for attribute in node.attribute:
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise _sparse(name)
        for tensor in [attribute.t] if attribute.HasField("t") else attribute.tensors:
            check_tensor(tensor, name)
        _check_numbers(node, attribute, name)


def _check_numbers(node: NodeProto, attribute: AttributeProto, name: str) -> None:
    """Kernels, paddings and the like are small; what is a size stays within the bound."""
    numbers = [*attribute.ints, attribute.i, *attribute.floats]
    is_absurd = (
        attribute.name in _STEPS and any(abs(number) > MAX_STEP for number in numbers)
    ) or (attribute.name in _WHOLE and _product(numbers) > MAX_ELEMENTS)
    if is_absurd:
        raise _absurd(name, node, f"{attribute.name} {numbers[:8]}")


def _check_sizes(node: NodeProto, constants: _Numbers, name: str) -> None:
    given = [constants.get(value, ()) for value in node.input]
    for place in _SIZES.get(node.op_type, ()):
        numbers = given[place] if place < len(given) else ()
        size = max(map(abs, numbers), default=0) if node.op_type == "Pad" else _product(numbers)
        if size > MAX_ELEMENTS:
            raise _absurd(name, node, str(list(numbers[:8])))
    if node.op_type == "Range" and len(given) == 3 and all(given):
        (start, *_), (limit, *_), (delta, *_) = given
        if not abs(limit - start) <= MAX_ELEMENTS * abs(delta):
            raise _absurd(name, node, f"{start} to {limit} by {delta}")


def _product(numbers: Sequence[float]) -> float:
    """The product of those above 1 (0 and -1 stand for sizes known elsewhere), NaN as infinity."""
    if any(number != number for number in numbers):
        return math.inf
    return math.prod(number for number in numbers if number > 1)


def _constant(node: NodeProto) -> tuple[float, ...]:
    """The numbers that a Constant gives, in whichever attribute they stand."""
    found = []
    for attribute in node.attribute:
        if attribute.HasField("t"):
            found += _numbers(attribute.t)
        found += [getattr(attribute, field) for field in ("i", "f") if attribute.HasField(field)]
        found += [*attribute.ints, *attribute.floats]
    return tuple(found) if len(found) <= MAX_AXES else ()


def _numbers(tensor: TensorProto) -> tuple[float, ...]:
    """The numbers of a short constant; none of one that is long, no size, or in another file."""
    if tensor.data_location == TensorProto.EXTERNAL or tensor.data_type not in _COUNTS:
        return ()
    if num_elements(tensor) > MAX_AXES:
        return ()
    with np.errstate(invalid="ignore"):  # NaN of a short type
        return tuple(numpy_helper.to_array(tensor).astype(float).ravel().tolist())


def _absurd(name: str, node: NodeProto, size: str) -> ModelFileError:
    return ModelFileError(
        f"{name} asks {printable(node.op_type)} for an absurd size; refused.",
        where=printable(node.name or ", ".join(node.output)),
        why=size,
    )


def check_tensor(tensor: TensorProto, name: str, *, may_be_elsewhere: bool = False) -> None:
    """Raise :class:`ModelFileError` unless the bytes of a tensor are as many as its shape takes."""
    label = printable(tensor.name)
    if tensor.data_type != TensorProto.STRING and tensor.data_type not in BITS:
        raise ModelFileError(f'{name}: tensor "{label}" is of no known type.')
    _check_shape(tensor.dims, label, name)
    if tensor.HasField("segment"):
        raise ModelFileError(f'{name}: tensor "{label}" is only a part of one.')
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        if not may_be_elsewhere or tensor.data_location != TensorProto.EXTERNAL:
            raise ModelFileError(
                f'{name}: tensor "{label}" must not lie in another file.',
                why="only the weights of the graph itself may",
            )
        expected = {}
    elif tensor.data_type == TensorProto.STRING:
        expected = {"string_data": num_elements(tensor)}
    else:
        expected = _expected(tensor)
    found = {field: len(getattr(tensor, field)) for field in (*_FIELDS, "string_data")}
    found = {field: count for field, count in found.items() if count}
    if len(found) > 1 or any(expected.get(field) != count for field, count in found.items()):
        holds = ", ".join(f"{count:,} in {field}" for field, count in found.items())
        raise _mismatch(tensor, name, holds)
    if not found and expected and num_elements(tensor):
        raise _mismatch(tensor, name, "nothing")


def _mismatch(tensor: TensorProto, name: str, holds: str) -> ModelFileError:
    shape = "×".join(map(str, tensor.dims[:8])) or "one number"
    kind = TensorProto.DataType.Name(tensor.data_type).lower()
    return ModelFileError(
        f'{name} is damaged: tensor "{printable(tensor.name)}" of {shape} ({kind}) holds {holds}.',
        fix="copy it again",
    )


def _expected(tensor: TensorProto) -> dict[str, int]:
    """The fields in which a tensor of that type may hold its numbers, and how many entries."""
    count, kind = num_elements(tensor), tensor.data_type
    places: dict[int, tuple[str, int]] = {
        TensorProto.FLOAT: ("float_data", count),
        TensorProto.COMPLEX64: ("float_data", 2 * count),
        TensorProto.DOUBLE: ("double_data", count),
        TensorProto.COMPLEX128: ("double_data", 2 * count),
        TensorProto.INT64: ("int64_data", count),
        TensorProto.UINT32: ("uint64_data", count),
        TensorProto.UINT64: ("uint64_data", count),
    }
    per_entry = 8 // BITS[kind] if BITS[kind] < 8 else 1
    field, entries = places.get(kind, ("int32_data", -(-count // per_entry)))
    return {"raw_data": num_bytes(tensor), field: entries}


def _check_shape(sizes: Sequence[int], label: str, name: str) -> None:
    if len(sizes) > MAX_AXES or any(size < 0 for size in sizes):
        raise ModelFileError(f'{name}: the shape of "{printable(label)}" is not one.')
    if math.prod(max(size, 1) for size in sizes) > MAX_SAID:
        shape = "×".join(map(str, sizes[:8]))
        raise ModelFileError(f'{name}: "{printable(label)}" is said to be {shape}; refused.')
