"""Put quantize and dequantize nodes into an fp32 ONNX graph where ONNX Runtime can fuse them away.

Activations are u8 per tensor with a zero point, weights s8 per output channel: the pair that
ONNX Runtime multiplies in one instruction where the CPU has VNNI, and its fastest on any x86.
Symmetric activations, or s8 ones, were measured to be slower there. Two things are ours:

* A mean over height and width becomes GlobalAveragePool. The quantizer passes over ReduceMean, and
  the runtime then leaves int8 and comes back for this one node.
* The logits stay in fp32. To round them to 256 steps saves nothing and ties classes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    TensorsData,
    create_calibrator,
    quantize_dynamic,
)
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

Method = Literal["min-max", "entropy", "percentile"]

METHODS = {
    "min-max": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
PERCENTILE = 99.99  # of the values of a tensor lie inside of its range
# Of a tensor's histogram. The runtime's 128 for entropy are as many as its rounded twin has, which
# leaves nothing to choose; more than 512 were measured to take longer and to gain nothing.
BINS = {"min-max": 0, "entropy": 512, "percentile": 2048}
CHUNK = 32  # calibration images whose activations are held at once
SMALL = 4096  # bytes of a constant, up to which an equal one is looked for
# They hand on what they are given, or are merged into the node before
_PASSIVE = {
    "ArgMax", "Clip", "DepthToSpace", "EmbedLayerNormalization", "Flatten", "Gather", "MaxPool",
    "Pad", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
_PLUMBING = ("QuantizeLinear", "DequantizeLinear")


def prepared(original: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model with shapes inferred, as the quantizer needs it; ``folder`` takes its drafts."""
    path = folder / "prepared.onnx"
    quant_pre_process(_pooling(original), path)
    model = onnx.load(path)
    taken = {node.name for node in model.graph.node}
    fresh = (name for index in itertools.count() if (name := f"node{index}") not in taken)
    for node in model.graph.node:
        node.name = node.name or next(fresh)  # a node without one could not be left out
    return model


def calibrated(model: onnx.ModelProto, images: Tensor, method: Method, folder: Path) -> TensorsData:
    """The range of every activation of a prepared model over ``images`` (n, …), float32.

    ``min-max`` takes all values in. ``percentile`` leaves out the outermost 0.01 %, ``entropy`` as
    many as minimise the divergence of the rounded from the true distribution.
    """
    path = folder / "calibrated.onnx"
    onnx.save(model, path)
    calibrator = create_calibrator(
        path,
        _quantizable(),
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=METHODS[method],
        # ONNX Runtime's percentiles are symmetric unless told: half of what a ReLU uses, for naught
        extra_options={"symmetric": False, "percentile": PERCENTILE, "num_bins": BINS[method]},
    )
    for chunk in images.detach().cpu().contiguous().split(CHUNK):
        calibrator.collect_data(_Feed(model.graph.input[0].name, chunk))
    return calibrator.compute_data()


def quantized(
    model: onnx.ModelProto, ranges: TensorsData, excluded: Collection[str] = ()
) -> onnx.ModelProto:
    """A prepared model in int8, but for the nodes named in ``excluded``."""
    quantizer = QDQQuantizer(
        copy.deepcopy(model),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=[],
        nodes_to_exclude=list(excluded),
        op_types_to_quantize=_quantizable(),
        extra_options={},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    result = quantizer.model.model
    _free_logits(result)
    return _compact(result)


def quantized_dynamically(
    model: onnx.ModelProto, folder: Path, excluded: Collection[str] = ()
) -> onnx.ModelProto:
    """The prepared model with s8 weights in its matrix products; activations round as they come."""
    source, target = folder / "fp32.onnx", folder / "dynamic.onnx"
    onnx.save(model, source)
    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul", "Gemm"],  # ConvInteger is slower than fp32
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=list(excluded),
        extra_options={"MatMulConstBOnly": True},
    )
    return _compact(onnx.load(target))


def rounding_nodes(model: onnx.ModelProto) -> list[str]:
    """The names of the nodes that int8 makes round anything, in graph order."""
    kinds = set(_quantizable()) - _PASSIVE
    return [node.name for node in model.graph.node if node.op_type in kinds]


def scales(model: onnx.ModelProto) -> Iterator[tuple[str, np.ndarray]]:
    """The name and value of every scale that the file holds."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in _PLUMBING and node.input[1] in values:
            yield node.input[1], numpy_helper.to_array(values[node.input[1]])


class _Feed(CalibrationDataReader):
    """Calibration images, once, as the calibrator asks for them."""

    def __init__(self, name: str, images: Tensor) -> None:
        self._batches = iter([{name: images.numpy()}])

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return next(self._batches, None)


def _quantizable() -> list[str]:
    return sorted({*QLinearOpsRegistry, *QDQRegistry})


def _pooling(original: onnx.ModelProto) -> onnx.ModelProto:
    model = copy.deepcopy(original)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*model.graph.value_info, *model.graph.input)
    }
    for node in model.graph.node:
        if node.op_type != "ReduceMean" or ranks.get(node.input[0]) != 4:
            continue
        axes = values.get(node.input[1]) if len(node.input) > 1 else None
        keeps = all(each.i == 1 for each in node.attribute if each.name == "keepdims")
        if axes is None or not keeps:
            continue
        if sorted(int(axis) % 4 for axis in numpy_helper.to_array(axes)) == [2, 3]:
            node.op_type = "GlobalAveragePool"
            del node.input[1:]
            del node.attribute[:]
    read = {name for node in model.graph.node for name in node.input}
    unread = [axes for name, axes in values.items() if name not in read]
    for tensor in unread:
        model.graph.initializer.remove(tensor)
    return model


def _free_logits(model: onnx.ModelProto) -> None:
    """Let the last node give the output itself, in place of what is quantized and back."""
    graph, makers = model.graph, _makers(model)
    for output in graph.output:
        back = makers.get(output.name)
        there = makers.get(back.input[0]) if back is not None else None
        if back is None or there is None or back.op_type != _PLUMBING[1]:
            continue
        rounded = there.input[0]
        if there.op_type != _PLUMBING[0] or rounded not in makers:
            continue
        if makers[rounded].op_type in ("Conv", "ConvTranspose"):
            continue  # the runtime has no such node with int8 in and fp32 out
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [output.name if name == rounded else name for name in names]
        graph.node.remove(back)
        graph.node.remove(there)


def _makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def _compact(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in fewer bytes: a small network's int8 file would else outgrow its fp32 one.

    Equal small constants are held once, those that nothing reads and all inferred shapes are
    dropped, and what quantization put in gets short names, or none. Weights keep theirs.
    """
    graph = model.graph
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return model  # a graph inside the graph may read any of these names
    del graph.value_info[:]
    renamed = _shared(graph.initializer)
    outputs = {value.name for value in graph.output}
    made = [node.output[0] for node in graph.node if node.op_type in _PLUMBING]
    made += [t.name for t in graph.initializer if t.name.endswith(("_scale", "_zero_point"))]
    fresh = _fresh_names(graph)
    for name in made:
        if name not in outputs and name not in renamed:
            renamed[name] = next(fresh)
    for node in graph.node:
        if node.op_type in _PLUMBING:
            node.ClearField("name")
        for names in (node.input, node.output):
            names[:] = [_last(renamed, name) for name in names]
    for tensor in graph.initializer:
        tensor.name = _last(renamed, tensor.name)
    read = {name for node in graph.node for name in node.input}
    kept = {tensor.name: tensor for tensor in graph.initializer if tensor.name in read}
    del graph.initializer[:]
    graph.initializer.extend(kept.values())
    return model


def _shared(tensors: Sequence[onnx.TensorProto]) -> dict[str, str]:
    """For every small constant that equals an earlier one, the name of that one."""
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed = {}
    for tensor in tensors:
        if tensor.ByteSize() > SMALL:
            continue
        content = numpy_helper.to_array(tensor).tobytes()
        key = (tensor.data_type, tuple(tensor.dims), content)
        if first.setdefault(key, tensor.name) != tensor.name:
            renamed[tensor.name] = first[key]
    return renamed


def _fresh_names(graph: onnx.GraphProto) -> Iterator[str]:
    taken = {value.name for value in (*graph.input, *graph.initializer)}
    taken.update(name for node in graph.node for name in node.output)
    return (name for name in (f"q{index}" for index in itertools.count()) if name not in taken)


def _last(renamed: Mapping[str, str], name: str) -> str:
    while name in renamed:
        name = renamed[name]
    return name
