"""The int8 file: within its bounds of the fp32 one, no larger, or not there at all."""

from __future__ import annotations

import errno
import json
import math
import os
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from kdsurgeon.errors import NumericsError, ResourceError, UsageError
from kdsurgeon.exporting import Exported, accuracy, export, qdq, quantize, read_metadata
from kdsurgeon.exporting.int8 import MAX_DROP, MIN_AGREEMENT, Int8
from kdsurgeon.exporting.sensitivity import divergence, sensitivities

int8_module = import_module("kdsurgeon.exporting.int8")

CLASSES = 5
SIZE = (3, 8, 8)


class Separable(nn.Module):
    """A stem, a depthwise and a pointwise convolution beside a shortcut, a pooled linear head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, CLASSES)
        for value in self.parameters():
            value.data = torch.randn(value.shape, generator=generator) * 0.5
        self.norm.running_var = torch.rand(8, generator=generator) + 0.5
        self.head.weight.data *= 8
        self.eval()
        with torch.no_grad():  # every class is somebody's answer
            self.head.bias -= self(images(64, seed=3)).mean(0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.pointwise(torch.relu(self.norm(self.depthwise(x))))
        return self.head(self.pool(x).flatten(1))


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))


def uneven() -> Separable:
    """The same function, its depthwise channels apart by powers of two: int8 keeps few of them."""
    network = Separable()
    factor = 2.0 ** torch.tensor([12, 0, 0, 0, 0, 0, 0, 0])
    with torch.no_grad():
        network.norm.weight *= factor
        network.norm.bias *= factor
        network.pointwise.weight /= factor[None, :, None, None]
    return network


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def optimized(path: Path, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime runs for a file, and how often."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def answers(path: Path, samples: Tensor) -> Tensor:
    run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(run.run(None, {"input": samples.numpy()})[0])


@pytest.fixture(scope="module")
def clear() -> Tensor:
    """The 200 of 400 images of which the student is surest, as a trained one would be."""
    with torch.no_grad():
        first, second = Separable()(images(400)).topk(2).values.T
    return images(400)[(first - second).topk(200).indices.sort().values]


@pytest.fixture(scope="module")
def labels(clear: Tensor) -> Tensor:
    """The student's own answers with every tenth one wrong, so that its accuracy is 0.9."""
    with torch.no_grad():
        right = Separable()(clear).argmax(1)
    assert len(right.unique()) >= 4
    right[::10] = (right[::10] + 1) % CLASSES
    return right


@pytest.fixture(scope="module")
def exported(clear: Tensor, labels: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(
        Separable(),
        tmp_path_factory.mktemp("exported") / "student.onnx",
        images(1),
        metadata={"classes": "five"},
        samples=clear,
        labels=labels,
        calibration=images(64, seed=2),
    )


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 file of a student that int8 does not keep."""
    folder = tmp_path_factory.mktemp("apart")
    return export(uneven(), folder / "uneven.onnx", images(1), samples=images(8)).path


# The file


def test_the_int8_file_is_quantized_and_measured(exported: Exported) -> None:
    int8 = exported.int8
    assert int8 is not None and int8.path.name == "student.int8.onnx"
    assert int8.bytes == int8.path.stat().st_size
    assert int8.agreement >= 0.97 and int8.samples == 200
    assert int8.drop is not None and int8.drop <= 0.01
    assert exported.accuracy is not None and int8.accuracy is not None
    assert int8.accuracy == pytest.approx(exported.accuracy - int8.drop)
    assert int8.excluded == ()
    model = onnx.load(int8.path)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    quantized = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert {values[node.input[2]].data_type for node in quantized} == {TensorProto.UINT8}
    weights = [tensor for tensor in values.values() if len(tensor.dims) == 4]
    assert {tensor.data_type for tensor in weights} == {TensorProto.INT8} and len(weights) == 3
    sizes = {name: scale.shape for name, scale in qdq.scales(model)}
    assert Counter(sizes.values())[(8,)] >= 3  # per output channel of each convolution
    assert [entry.domain for entry in model.opset_import] == [""]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_all_that_runs_in_the_runtime_is_int8_from_the_first_node_to_the_logits(
    exported: Exported, tmp_path: Path
) -> None:
    assert exported.int8 is not None
    found = optimized(exported.int8.path, tmp_path)
    assert found["QLinearConv"] == 3 and found["QGemm"] == 1 and found["QLinearAdd"] == 1
    assert found["QLinearGlobalAveragePool"] == 1  # which the exporter writes as a mean
    assert found["QuantizeLinear"] == 1  # the input
    assert not {"DequantizeLinear", "Conv", "Gemm", "ReduceMean"} & set(found)


def test_the_logits_are_not_rounded(exported: Exported) -> None:
    assert exported.int8 is not None
    model = onnx.load(exported.int8.path)
    (maker,) = [node for node in model.graph.node if "logits" in node.output]
    assert maker.op_type == "Gemm"
    few = answers(exported.int8.path, images(400))
    assert len(few.unique()) > 256


def test_a_convolution_that_gives_the_logits_itself_stays_in_int8(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((CLASSES, 3, 8, 8), np.float32), "weight")
    node = helper.make_node("Conv", ["input", "weight"], ["logits"], "conv")
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *SIZE])
    result = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES, 1, 1])
    graph = helper.make_graph([node], "alone", [given], [result], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    ready = qdq.prepared(model, tmp_path)
    ranges = qdq.calibrated(ready, images(8), "min-max", tmp_path)
    onnx.save(qdq.quantized(ready, ranges), tmp_path / "x.onnx")
    assert optimized(tmp_path / "x.onnx", tmp_path)["QLinearConv"] == 1


def test_a_small_networks_int8_file_is_smaller_than_its_fp32_one(exported: Exported) -> None:
    assert exported.int8 is not None
    model = onnx.load(exported.int8.path)
    assert not model.graph.value_info
    contents = [
        (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
        for tensor in model.graph.initializer
    ]
    assert len(set(contents)) == len(contents)
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    assert any(tensor.name.startswith("depthwise.weight") for tensor in model.graph.initializer)


def test_the_int8_file_carries_the_metadata_on_but_does_not_call_itself_verified(
    exported: Exported,
) -> None:
    assert exported.int8 is not None
    found = read_metadata(exported.int8.path)
    scheme = json.loads(found.pop("kdsurgeon.quantization"))
    original = read_metadata(exported.path)
    assert original.pop("kdsurgeon.verified") == "true"
    assert found == original
    assert scheme == {
        "mode": "static", "activations": "u8", "weights": "s8 per channel",
        "calibration": "min-max", "calibration_images": 64,
    }  # fmt: skip


@pytest.mark.parametrize("method", qdq.METHODS)
def test_every_calibration_gives_a_file_whose_ranges_lie_within_the_values_seen(
    method: qdq.Method, exported: Exported, clear: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "x.onnx"
    done = quantize(
        exported.path, path, images(40, seed=2), samples=clear, method=method, gate=False
    )
    assert done.agreement > 0.9
    assert json.loads(read_metadata(path)["kdsurgeon.quantization"])["calibration"] == method
    model = onnx.load(path)
    (first,) = [node for node in model.graph.node if node.input[0] == "input"]
    scale = dict(qdq.scales(model))[first.input[1]]
    seen = images(40, seed=2)
    widest = ((seen.max() - seen.min()) / 255).item()
    assert 0 < scale <= widest * (1 + 1e-6)
    if method == "min-max":
        assert scale == pytest.approx(widest, rel=1e-6)


def test_percentiles_cut_off_an_outlier(exported: Exported, tmp_path: Path) -> None:
    seen = images(200, seed=2)  # 38,400 values, so that one is less than 0.005 % of them
    seen[0, 0, 0, 0] = 1000.0
    folder = tmp_path / "drafts"
    folder.mkdir()
    model = qdq.prepared(onnx.load(exported.path), folder)
    ranges = {
        method: qdq.calibrated(model, seen, method, folder)["input"].range_value
        for method in qdq.METHODS
    }
    assert ranges["min-max"][1] == 1000.0
    assert ranges["percentile"][1] < 10.0 and ranges["entropy"][1] < 1000.0
    assert -10.0 < ranges["percentile"][0] < 0.0  # each end of its own


def test_calibration_in_parts_sees_every_image(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = qdq.prepared(onnx.load(exported.path), tmp_path)
    seen = images(40, seed=2)
    whole = qdq.calibrated(model, seen, "min-max", tmp_path)
    monkeypatch.setattr(qdq, "CHUNK", 7)
    parts = qdq.calibrated(model, seen, "min-max", tmp_path)
    for name in whole.keys():  # noqa: SIM118 - no mapping
        first, second = (found[name].range_value for found in (whole, parts))
        assert [x.item() for x in first] == [x.item() for x in second]
    assert whole["input"].range_value[1].item() == seen.max().item()


@pytest.mark.parametrize(
    ("axes", "options", "pools"),
    [
        ([2, 3], {}, True),
        ([-1, -2], {"keepdims": 1}, True),
        ([1, 2], {}, False),
        ([3], {}, False),
        ([2, 3], {"keepdims": 0}, False),
    ],
)
def test_a_mean_becomes_a_pooling_where_it_is_one(
    axes: list[int], options: dict[str, int], pools: bool
) -> None:
    constant = numpy_helper.from_array(np.array(axes), "axes")
    node = helper.make_node("ReduceMean", ["input", "axes"], ["logits"], "mean", **options)
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *SIZE])
    result = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "means", [given], [result], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    found = qdq._pooling(model)
    assert found.graph.node[0].op_type == ("GlobalAveragePool" if pools else "ReduceMean")
    assert len(found.graph.initializer) == (0 if pools else 1)
    assert model.graph.node[0].op_type == "ReduceMean"
    before, after = (
        onnxruntime.InferenceSession(
            each.SerializeToString(), providers=["CPUExecutionProvider"]
        ).run(None, {"input": images(3).numpy()})[0]
        for each in (model, found)
    )
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-6)


# Dynamic


def test_a_file_that_rounds_by_its_input_is_judged_one_sample_at_a_time(exported, tmp_path):
    path = tmp_path / "s.int8.onnx"
    sizes = 10.0 ** torch.linspace(-2, 2, 60)[:, None, None, None]
    samples = images(60, seed=9) * sizes  # small ones are nothing in the range of large ones
    plain = onnxruntime.InferenceSession(exported.path)
    labels = torch.from_numpy(plain.run(None, {"input": samples.numpy()})[0]).argmax(1)
    done = quantize(
        exported.path, path, None, samples=samples, labels=labels, mode="dynamic", gate=False
    )
    run = onnxruntime.InferenceSession(path)

    def right(batch: int) -> float:
        parts = [run.run(None, {"input": part.numpy()})[0] for part in samples.split(batch)]
        return (torch.from_numpy(np.concatenate(parts)).argmax(1) == labels).double().mean().item()

    assert right(1) > right(60), "the batch tells"
    assert done.agreement == done.accuracy == right(1) == accuracy(path, samples, labels)


def test_dynamic_quantization_needs_no_calibration_and_rounds_matrix_products_only(
    exported: Exported, clear: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "x.onnx"
    done = quantize(exported.path, path, None, samples=clear, labels=labels, mode="dynamic")
    assert done.agreement >= 0.97 and done.drop is not None and done.drop <= 0.01
    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert kinds["DynamicQuantizeLinear"] == kinds["MatMulInteger"] == 1 and kinds["Conv"] == 3
    scheme = json.loads(read_metadata(path)["kdsurgeon.quantization"])
    assert scheme["mode"] == "dynamic" and "calibration" not in scheme


# What costs most


def test_nothing_stays_in_fp32_where_the_gate_passes(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clear: Tensor
) -> None:
    monkeypatch.setattr(int8_module, "_dearest", lambda *_: pytest.fail("measured for nothing"))
    done = quantize(exported.path, tmp_path / "x.onnx", images(64, seed=2), samples=clear)
    assert done.excluded == ()


def test_the_nodes_around_a_value_that_rounds_badly_stay_in_fp32(
    apart: Path, clear: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    given = {"samples": clear, "labels": labels}
    poor = quantize(apart, tmp_path / "x.onnx", images(64, seed=2), gate=False, **given)
    assert poor.drop is not None and poor.drop > 0.1 and poor.excluded == ()
    done = quantize(apart, tmp_path / "x.onnx", images(64, seed=2), **given)
    assert done.drop is not None and done.drop <= MAX_DROP and done.agreement >= MIN_AGREEMENT
    model = onnx.load(done.path)
    in_fp32 = [
        node
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1].split(".")[0] in ("depthwise", "pointwise")
    ]
    assert {node.name for node in in_fp32} == set(done.excluded) and len(in_fp32) == 2
    scheme = json.loads(read_metadata(done.path)["kdsurgeon.quantization"])
    assert scheme["fp32_nodes"] == ", ".join(done.excluded)
    assert f"in fp32: {', '.join(done.excluded)}" in str(done)


def test_no_more_nodes_than_the_budget_stay_in_fp32(
    apart: Path, clear: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    for budget in (0, 1):
        with pytest.raises(NumericsError, match="loses too much") as caught:
            quantize(
                apart, tmp_path / "x.onnx", images(64, seed=2), samples=clear, labels=labels,
                budget=budget,
            )  # fmt: skip
        assert ("in fp32" in caught.value.what) is bool(budget)
        assert names(tmp_path) == []


def test_sensitivities_come_dearest_first_each_of_one_node_alone() -> None:
    asked: list[list[str]] = []
    costs = {"a": 1.0, "b": 3.0, "c": 2.0}

    def quantize(excluded: list[str]) -> set[str]:
        asked.append(sorted(excluded))
        return set(costs) - set(excluded)

    def logits(left: set[str]) -> Tensor:
        return torch.tensor([[sum(costs[name] for name in left), 0.0]])

    found = sensitivities("abc", "abc", torch.zeros(1, 2), quantize, logits)  # pyright: ignore
    assert [each.node for each in found] == ["b", "c", "a"]
    assert asked == [["b", "c"], ["a", "c"], ["a", "b"]]
    assert found[0].cost > found[1].cost > found[2].cost > 0
    assert str(found[2]) == f"a: {found[2].cost:.2g} nats"


def test_divergence_is_that_of_the_formula() -> None:
    wanted = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    found = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    p, q = wanted.softmax(1), found.softmax(1)
    assert divergence(wanted, found) == pytest.approx((p * (p / q).log()).sum(1).mean().item())
    assert divergence(wanted, wanted + 3.0) == pytest.approx(0.0, abs=1e-12)


# What is refused


def test_an_int8_file_that_loses_too_much_is_refused_with_both_figures(
    exported: Exported, clear: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    useless = images(16) * 1e-4
    with pytest.raises(NumericsError) as caught:
        quantize(exported.path, tmp_path / "x.onnx", useless, samples=clear, labels=labels)
    assert caught.value.exit_code == 5
    assert "top-1 agreement with fp32" in caught.value.what
    assert "accuracy drop" in caught.value.what and "points" in caught.value.what
    assert names(tmp_path) == []
    poor = quantize(
        exported.path, tmp_path / "x.onnx", useless, samples=clear, labels=labels, gate=False
    )
    assert poor.agreement < 0.97 and poor.drop is not None and poor.drop > 0.01


@pytest.mark.parametrize(("agreement", "drop"), [(0.969, 0.0), (1.0, 0.011)])
def test_each_half_of_the_gate_holds_alone(agreement: float, drop: float) -> None:
    measured = Int8(Path("x.onnx"), 1, "", agreement, 1000, 0.9, drop)
    assert not int8_module._passes(measured, MIN_AGREEMENT, MAX_DROP)
    right = Int8(Path("x.onnx"), 1, "", 0.97, 1000, 0.9, 0.01)
    assert int8_module._passes(right, MIN_AGREEMENT, MAX_DROP)


@pytest.mark.parametrize(
    ("agreement", "drop", "is_trained", "words"),
    [
        (0.9, -0.0375, True, ["gives too many samples another class", "no accuracy drop (+3.75"]),
        (0.9, None, False, ["gives too many samples", "accuracy drop not measured"]),
        (0.99, 0.02, False, ["loses too much", "accuracy drop 2.00 points"]),
    ],
)
def test_a_refusal_names_what_failed_and_the_flags_that_help(
    agreement: float, drop: float | None, is_trained: bool, words: list[str]
) -> None:
    measured = Int8(Path("x.onnx"), 1, "", agreement, 1000, 0.9, drop)
    error = int8_module._refusal(measured, MIN_AGREEMENT, MAX_DROP, is_trained=is_trained)
    assert all(word in error.what for word in words)
    fix = error.notes["fix"]
    assert all(flag in fix for flag in ("--calib-images", "--int8-budget", "--no-int8-gate"))
    assert ("--int8-mode qat" in fix) is not is_trained


def test_a_failed_gate_leaves_neither_file(clear: Tensor, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="accuracy drop not measured"):
        export(
            Separable(), tmp_path / "x.onnx", images(2), samples=clear,
            calibration=images(16) * 1e-4,
        )  # fmt: skip
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_scale_that_is_zero_or_not_finite_is_refused(
    value: float, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*given: object) -> onnx.ModelProto:
        model = original(*given)
        name, _ = next(qdq.scales(model))
        (scale,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        scale.CopyFrom(numpy_helper.from_array(np.float32(value).reshape(()), name))
        return model

    original = qdq.quantized
    monkeypatch.setattr(qdq, "quantized", breaks)
    with pytest.raises(NumericsError, match=r"(?s)zero or not finite.*q\d+"):
        quantize(exported.path, tmp_path / "x.onnx", images(8))
    assert names(tmp_path) == []


def test_a_quantizer_that_fails_is_reported_once_and_leaves_nothing(
    exported: Exported, tmp_path: Path
) -> None:
    with pytest.raises(NumericsError, match=r"student\.onnx could not be quantized to int8"):
        quantize(exported.path, tmp_path / "x.onnx", torch.zeros(4, 3, 9, 9), samples=images(4))
    assert names(tmp_path) == []


def test_a_quantizer_without_room_is_a_resource_error(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> onnx.ModelProto:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(qdq, "quantized", full)
    with pytest.raises(ResourceError, match="No space left"):
        quantize(exported.path, tmp_path / "x.onnx", images(8))
    assert names(tmp_path) == []


def test_an_int8_file_that_is_not_valid_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\x08")
    with pytest.raises(NumericsError, match=r"x\.onnx is not valid ONNX"):
        int8_module._check_file(tmp_path / "x.onnx")


@pytest.mark.parametrize(
    ("calibration", "options", "message"),
    [
        (images(0), {}, "got none"),
        (None, {"samples": images(3)}, "got none"),
        (images(3).fill_(math.nan), {}, "3 of 3 calibration images hold values not finite"),
        (images(8), {"labels": torch.zeros(3)}, "8 samples came with 3 labels"),
        (images(8), {"mode": "fast"}, "fast is no int8 mode"),
        (images(8), {"method": "mean"}, "mean is no int8 calibration method"),
        (images(8), {"budget": -1}, "a budget of -1 nodes"),
        (images(8), {"max_drop": 1.5}, "a drop of at most 1.5 is not a share"),
    ],
)
def test_what_cannot_serve_is_refused(
    calibration: Tensor | None,
    options: dict[str, object],
    message: str,
    exported: Exported,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(exported.path, tmp_path / "x.onnx", calibration, **options)  # pyright: ignore
    assert names(tmp_path) == []


def test_the_fp32_file_is_not_overwritten_by_its_int8_twin(exported: Exported) -> None:
    with pytest.raises(UsageError, match="is the fp32 file itself"):
        quantize(exported.path, exported.path, images(8))


def test_what_was_measured_prints_as_one_line() -> None:
    plain = Int8(Path("x"), 1, "", 0.98, 50, None, None)
    assert str(plain) == "top-1 agreement with fp32 98.00% on 50 samples"
    scored = Int8(Path("x"), 1, "", 0.98, 50, 0.9, 0.005)
    assert str(scored).endswith("accuracy 90.00% (-0.50 points)")
