"""Find the first value at which an ONNX file parts from the network it was written from.

torch calls the values of the file as it called those of the program that it captured, so every
value that the two share can be compared. A capture that is wrong itself shows before that: its
logits are not the network's, and then it is compared with the network module by module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils.hooks import RemovableHandle

from kdsurgeon.exporting.converting import Conversion, Network, module_path
from kdsurgeon.exporting.runtime import open_session
from kdsurgeon.exporting.samples import Samples

Values = dict[str, Tensor]


def first_divergence(
    network: Network, conversion: Conversion, model: onnx.ModelProto, samples: Samples,
    tolerance: float, given: Samples | None = None,
) -> str | None:  # fmt: skip
    """The first value of ``model`` that differs: its node, the module it belongs to, and the gap.

    A value differs by more than ``tolerance`` · max(1, its largest entry). ``given`` is what the
    file takes, where that is not what the network takes (as when it normalises pixels itself).
    None where nothing can be compared.
    """
    try:
        if conversion.program is None:
            return None
        nodes, values = run_program(conversion.program, network, samples)
        captured = values.pop(network.output)
        with torch.no_grad():
            if _gap(network.answer(samples), captured, tolerance) is not None:
                return _first_module(network, samples, nodes, values, tolerance)
        values[network.output] = captured
        found = file_values(model, samples if given is None else given, list(values))
        return _first_value(model, nodes, values, found, tolerance)
    except Exception:  # the failure itself is what matters; this only says more about it
        return None


def run_program(
    program: ExportedProgram, network: Network, samples: Samples
) -> tuple[dict[str, fx.Node], Values]:
    """Every tensor that the captured program computes, by the name of its node; and the nodes."""
    nodes = {node.name: node for node in program.graph.nodes}
    recorder = _Recorder(program.graph_module)
    recorder.run(*_arguments(program, network, samples))
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    (result,) = output.args[0]
    recorder.values[network.output] = recorder.values[result.name]
    return {**nodes, network.output: result}, recorder.values


def file_values(model: onnx.ModelProto, samples: Samples, names: list[str]) -> Values:
    """Those of the named values that the file computes, as ONNX Runtime finds them."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    made = {name for node in model.graph.node for name in node.output}
    outputs = {value.name for value in model.graph.output}
    names = [name for name in names if name in made]
    shown.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in names if name not in outputs
    )
    run = open_session(shown.SerializeToString(), {}, torch.get_num_threads())
    feed = {name: value.numpy() for name, value in samples.items()}
    found = run.run(names, feed)
    return {
        name: torch.from_numpy(np.asarray(value)) for name, value in zip(names, found, strict=True)
    }


class _Recorder(fx.Interpreter):
    """Keeps every tensor on the way."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: Values = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op != "placeholder":
            self.values[n.name] = result.detach()
        return result


def _arguments(program: ExportedProgram, network: Network, samples: Samples) -> Iterator[Any]:
    """What the placeholders of a captured program stand for, in order."""
    inputs = iter([samples[name] for name in network.names])
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            yield next(inputs)
        elif spec.target in program.state_dict:
            yield program.state_dict[spec.target]
        else:
            yield program.constants[spec.target or ""]


def _first_value(
    model: onnx.ModelProto,
    nodes: dict[str, fx.Node],
    expected: Values,
    found: Values,
    tolerance: float,
) -> str:
    for node in model.graph.node:
        for name in node.output:
            if name not in found or name not in expected:
                continue
            gap = _gap(expected[name], found[name], tolerance)
            if gap is not None:
                place = module_path(nodes[name].meta.get("nn_module_stack"))
                return f"node {node.name} ({node.op_type}) {_inside(place)}: {gap}"
    return "no value differs when all are looked at: a fusion of ONNX Runtime, or the batch size"


def _first_module(
    network: Network, samples: Samples, nodes: dict[str, fx.Node], values: Values, tolerance: float
) -> str:
    """The first module whose output the captured program does not compute."""
    last = {
        module_path(node.meta.get("nn_module_stack")): values[name]
        for name, node in nodes.items()
        if name in values
    }
    for path, expected in _module_outputs(network, samples):
        if path in last and (gap := _gap(expected, last[path], tolerance)) is not None:
            return f"the capture {_inside(path)}: {gap}"
    return "the capture, outside of every module"


def _module_outputs(network: Network, samples: Samples) -> list[tuple[str, Tensor]]:
    """The last tensor that each module without children returned, in the order they ran."""
    found: dict[str, Tensor] = {}
    hooks: list[RemovableHandle] = []

    def watch(path: str, module: torch.nn.Module) -> None:
        def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.setdefault(path, output.detach().clone())

        hooks.append(module.register_forward_hook(keep))

    for path, module in network.model.named_modules():
        if not any(True for _ in module.children()):
            watch(path, module)
    try:
        with torch.no_grad():
            network.answer(samples)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.items())


def _gap(expected: Tensor, found: Tensor, tolerance: float) -> str | None:
    """How two values differ, in words; None when they do not, beyond ``tolerance``."""
    if expected.shape != found.shape:
        return f"shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    if not expected.is_floating_point() or not expected.numel():
        wrong = int((expected != found).sum()) if expected.numel() else 0
        return f"{wrong} of {expected.numel()} entries differ" if wrong else None
    expected, found = expected.double(), found.double()
    same = (expected == found) | (expected.isnan() & found.isnan())
    gap = torch.where(same, torch.zeros(()), (expected - found).abs()).max().item()
    scale = torch.where(expected.isfinite(), expected.abs(), torch.zeros(())).max().item()
    if gap <= tolerance * max(1.0, scale):
        return None
    return f"gap {gap:.3g} where the largest entry is {scale:.3g}"


def _inside(path: str) -> str:
    return f"in module {path}" if path else "in forward itself"
