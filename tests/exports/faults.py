"""Faults that an exporter could make, each put into a file on its way to the proof.

A fault changes the graph that torch wrote, or the network before it is written; what is proved
against is the untouched network. Every one must be refused, and no file be left.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from kdsurgeon.errors import NumericsError
from kdsurgeon.exporting import Form, Preprocessing, export, quantize
from kdsurgeon.exporting.converting import Conversion, Network, convert

writing = import_module("kdsurgeon.exporting.onnx")
quantizing = import_module("kdsurgeon.exporting.int8")
CLASSES = 5


class Net(nn.Module):
    """Convolutions, batch norms, a shortcut, a softmax over positions, and logits."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.look = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, CLASSES)
        generator = torch.Generator().manual_seed(seed)
        for value in self.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.5)
        self.norm.running_var = torch.rand(8, generator=generator) + 0.5
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.inner(x)) + x
        x = nn.functional.max_pool2d(x, 2)
        weights = self.look(x).flatten(2).softmax(2)
        return self.head((x.flatten(2) * weights).sum(2))


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Fault:
    """One wrong thing: with the graph that torch wrote, or with the network before."""

    in_graph: Callable[[onnx.ModelProto], None] = lambda _: None
    in_network: Callable[[Network], None] = lambda _: None
    form: Form | None = None
    scaled: float = 1.0  # what the weights of the stem are multiplied with, in the network itself
    where: str | None = None  # what the refusal must say of the place


def refusal(fault: Fault, folder: Path) -> str | None:
    """What export says of a file with the fault; None when it passes. No file may be left."""

    def broken(network: Network, example: object, form: Form) -> Conversion:
        other = copy.deepcopy(network)
        fault.in_network(other)
        found = convert(
            other, example, form.opset, batch=form.batch, dynamic_size=form.dynamic_size
        )
        fault.in_graph(found.proto)
        return found

    path = folder / "bad.onnx"
    net = Net()
    net.stem.weight.data *= fault.scaled
    with mock.patch.object(writing, "_converted", broken):
        try:
            export(net, path, images(2), samples=_samples(fault), form=fault.form)
        except NumericsError as error:
            assert error.exit_code == 5
            assert list(folder.iterdir()) == [], "a refused export left a file"
            if fault.where is not None:
                assert fault.where in error.notes.get("where", ""), error
            return " ".join(str(error).split())
    path.unlink()
    return None


def _samples(fault: Fault) -> Tensor:
    if fault.form is None or fault.form.preprocessing is None:
        return images(20)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8, generator=generator)


# what can go wrong in a graph


def _nodes(model: onnx.ModelProto, kind: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def _tensor(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _set(tensor: TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def _weights(model: onnx.ModelProto, kind: str, at: int = 0) -> TensorProto:
    return _tensor(model, _nodes(model, kind)[at].input[1])


def _rewire(model: onnx.ModelProto, node: NodeProto) -> None:
    """Leave ``node`` out: who read it reads what it read."""
    for other in model.graph.node:
        for index, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[index] = node.input[0]
    model.graph.node.remove(node)


def missing_relu(model: onnx.ModelProto) -> None:
    _rewire(model, _nodes(model, "Relu")[1])


def wrong_softmax_axis(model: onnx.ModelProto) -> None:
    (node,) = _nodes(model, "Softmax")
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", 1))


def swapped_weights(model: onnx.ModelProto) -> None:
    """The inner convolution's output channels in another order."""
    tensor = _weights(model, "Conv", 1)
    _set(tensor, numpy_helper.to_array(tensor)[::-1])


def transposed_weights(model: onnx.ModelProto) -> None:
    tensor = _weights(model, "Conv", 2)
    _set(tensor, numpy_helper.to_array(tensor).transpose(1, 0, 2, 3))


def stale_weights(model: onnx.ModelProto) -> None:
    """Weights of before the last step: a little off."""
    tensor = _weights(model, "Conv", 1)
    _set(tensor, numpy_helper.to_array(tensor) * np.float32(1.001))


def rounded_weights(model: onnx.ModelProto) -> None:
    """Stored in float16 by mistake, read as float32."""
    tensor = _weights(model, "Conv", 1)
    _set(tensor, numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32))


def zeroed_bias(model: onnx.ModelProto) -> None:
    tensor = _tensor(model, "head.bias")
    _set(tensor, np.zeros_like(numpy_helper.to_array(tensor)))


def swapped_classes(model: onnx.ModelProto) -> None:
    for name in ("head.weight", "head.bias"):
        tensor = _tensor(model, name)
        _set(tensor, numpy_helper.to_array(tensor)[[1, 0, 2, 3, 4]])


def nan_weight(model: onnx.ModelProto) -> None:
    tensor = _tensor(model, "head.bias")
    values = numpy_helper.to_array(tensor).copy()
    values[0] = math.nan
    _set(tensor, values)


def wrong_padding(model: onnx.ModelProto) -> None:
    """Shifted by a pixel: padded at one side only."""
    for attribute in _nodes(model, "Conv")[1].attribute:
        if attribute.name == "pads":
            attribute.ints[:] = [2, 2, 0, 0]


def average_pool(model: onnx.ModelProto) -> None:
    (node,) = _nodes(model, "MaxPool")
    kept = [each for each in node.attribute if each.name in ("kernel_shape", "strides", "pads")]
    node.op_type = "AveragePool"
    del node.attribute[:]
    node.attribute.extend(kept)


def dropped_output(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


def second_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["logits"], ["extra"]))
    kind = helper.make_tensor_value_info("extra", TensorProto.FLOAT, ["batch", CLASSES])
    model.graph.output.append(kind)


def dropped_class(model: onnx.ModelProto) -> None:
    for name in ("head.weight", "head.bias"):
        _set(_tensor(model, name), numpy_helper.to_array(_tensor(model, name))[:-1])
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = CLASSES - 1
    del model.graph.value_info[:]


def fixed_batch(model: onnx.ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    del model.graph.value_info[:]


def hidden_batch(model: onnx.ModelProto) -> None:
    """Free by what it declares, but reshaped to two samples inside."""
    shape = numpy_helper.from_array(np.array([2, 8]), "hidden")
    model.graph.initializer.append(shape)
    (head,) = _nodes(model, "Gemm")
    at = list(model.graph.node).index(head)
    model.graph.node.insert(at, helper.make_node("Reshape", [head.input[0], "hidden"], ["fixed"]))
    model.graph.node[at + 1].input[0] = "fixed"


def free_size(model: onnx.ModelProto) -> None:
    """A height that is declared free, though only one was asked for and proved."""
    dim = model.graph.input[0].type.tensor_type.shape.dim[2]
    dim.ClearField("dim_value")
    dim.dim_param = "height"
    del model.graph.value_info[:]


def wrong_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 19


def foreign_operator(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    for node in _nodes(model, "Relu")[:1]:
        node.op_type, node.domain = "QuickGelu", "com.microsoft"


# what can go wrong in the network that is captured


class OnBatchStatistics(nn.Module):
    """A batch norm in training mode, spelled out: torch writes a real one as if in eval mode."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (var + self.norm.eps).sqrt()
        return x * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]


def training_norm(network: Network) -> None:
    network.model.norm = OnBatchStatistics(network.model.norm)


def fresh_weights(network: Network) -> None:
    """Another student: the file of an earlier run."""
    network.model.load_state_dict(Net(seed=1).state_dict())


IMAGES = Preprocessing((3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))

FAULTS: dict[str, Fault] = {
    "a missing relu": Fault(missing_relu, where="node"),
    "softmax over the wrong axis": Fault(wrong_softmax_axis, where="(Softmax)"),
    "weights with channels swapped": Fault(swapped_weights, where="module inner"),
    "weights transposed": Fault(transposed_weights, where="module look"),
    "stale weights": Fault(stale_weights, where="module inner"),
    "weights rounded to float16": Fault(rounded_weights, where="module inner"),
    "a bias of zeros": Fault(zeroed_bias, where="module head"),
    "two classes swapped": Fault(swapped_classes, where="module head"),
    "a weight that is NaN": Fault(nan_weight, where="module head"),
    "padding at one side": Fault(wrong_padding, where="module inner"),
    "the mean pooled, not the maximum": Fault(average_pool, where="(AveragePool)"),
    "a dropped output": Fault(dropped_output),
    "an output too many": Fault(second_output),
    "a dropped class": Fault(dropped_class),
    "a fixed batch": Fault(fixed_batch),
    "a batch size hidden inside": Fault(hidden_batch),
    "a size that is free by mistake": Fault(free_size),
    "another opset": Fault(wrong_opset),
    "an operator of one runtime": Fault(foreign_operator),
    "batch norm in training mode": Fault(in_network=training_norm, where="module norm"),
    "another student's weights": Fault(in_network=fresh_weights, where="module stem"),
    "an overflow of float16": Fault(form=Form(half=True), scaled=1e5, where="node"),
    "a missing relu in float16": Fault(missing_relu, form=Form(half=True), where="node"),
    "a missing relu in a static file": Fault(missing_relu, form=Form(batch=1), where="node"),
    "a missing relu behind preprocessing": Fault(
        missing_relu, form=Form(preprocessing=IMAGES), where="node"
    ),
}


def refused_int8(folder: Path) -> str | None:
    """What quantize says of a file one of whose scales became zero; None when it passes."""
    export(Net(), folder / "good.onnx", images(2))

    def broken(*given: object) -> onnx.ModelProto:
        model = finish(*given)
        node = _nodes(model, "DequantizeLinear")[0]
        scale = _tensor(model, node.input[1])
        _set(scale, np.zeros_like(numpy_helper.to_array(scale)))
        return model

    finish = quantizing._finished
    with mock.patch.object(quantizing, "_finished", broken):
        try:
            quantize(folder / "good.onnx", folder / "bad.onnx", images(20), gate=False)
        except NumericsError as error:
            assert not (folder / "bad.onnx").exists(), "a refused file was left"
            return " ".join(str(error).split())
        finally:
            (folder / "good.onnx").unlink()
    return None
