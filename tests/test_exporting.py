"""The exported file: proved equal to the student, or not there at all."""

from __future__ import annotations

import copy
import doctest
import errno
import functools
import json
import logging
import math
import os
import random
import stat
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from kdsurgeon.errors import (
    ModelFileError,
    NumericsError,
    ResourceError,
    SurgeonError,
    UsageError,
)
from kdsurgeon.exporting import (
    Exported,
    accuracy,
    benchmark,
    export,
    latency,
    parity,
    quantize,
    read_metadata,
)

onnx_module = import_module("kdsurgeon.exporting.onnx")
int8_module = import_module("kdsurgeon.exporting.int8")
parity_module = import_module("kdsurgeon.exporting.parity")
latency_module = import_module("kdsurgeon.exporting.latency")

CLASSES = 5
METADATA = {
    "classes": json.dumps([f"class {i}" for i in range(CLASSES)]),
    "normalisation": json.dumps({"mean": [0.25], "std": [0.5]}),
    "input_size": json.dumps([1, 8, 8]),
    "provenance": json.dumps({"teacher": "sha256:3f9a12c07be1", "epochs": 2}),
}


class Tiny(nn.Module):
    """A residual CNN whose batch norms hold statistics that matter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(32, CLASSES)
        for value in (*self.parameters(), *self.buffers()):
            if value.is_floating_point():
                value.data = torch.randn(value.shape, generator=generator) * 0.5
        for norm in (self.norm, self.norm2):
            norm.running_var = torch.rand(8, generator=generator) + 0.5
        self.eval()
        with torch.no_grad():  # every class is somebody's answer
            self.head.bias -= self(images(64, seed=3)).mean(0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm2(self.conv(x)))
        return self.head(self.drop(nn.functional.max_pool2d(x, 4).flatten(1)))


class Flat(nn.Module):
    """One linear layer, and a place to break it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@functools.cache
def clear_images() -> Tensor:
    """The 50 of 400 images of which the student is surest, as a trained one would be."""
    with torch.no_grad():
        first, second = Tiny().eval()(images(400)).topk(2).values.T
    return images(400)[(first - second).topk(50).indices.sort().values]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(scope="module")
def student() -> Tiny:
    return Tiny().eval()


@pytest.fixture(scope="module")
def labels(student: Tiny) -> Tensor:
    """The student's own answers with every tenth one wrong, so that its accuracy is 0.9."""
    with torch.no_grad():
        right = student(clear_images()).argmax(1)
    assert len(right.unique()) >= 4
    right[::10] = (right[::10] + 1) % CLASSES
    return right


@pytest.fixture(scope="module")
def exported(student: Tiny, labels: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(
        student,
        tmp_path_factory.mktemp("exported") / "student.onnx",
        images(1),
        metadata=METADATA,
        samples=clear_images(),
        labels=labels,
        calibration=images(64, seed=2),
    )


@pytest.fixture
def proto(exported: Exported) -> onnx.ModelProto:
    """The exported file, to be broken."""
    return onnx.load(exported.path)


def refused(
    model: nn.Module, folder: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> SurgeonError:
    """What export says when the exporter hands it ``proto``; nothing may be written."""
    monkeypatch.setattr(onnx_module, "_converted", lambda *_: proto)
    with pytest.raises(SurgeonError) as caught:
        export(model, folder / "bad.onnx", images(2), samples=images(20))
    assert names(folder) == []
    return caught.value


def kernel(proto: onnx.ModelProto) -> TensorProto:
    return next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)


# The file


def test_the_file_computes_the_students_logits_at_every_batch_size(exported: Exported) -> None:
    found = exported.parity
    assert found is not None
    assert found.gap <= found.bound == 1e-5 * max(1.0, found.scale)
    assert found.agreement == 1.0
    assert (found.samples, found.random, found.batch_sizes) == (50, 16, (1, 2, 3, 7, 16, 50))


def test_the_file_has_the_names_and_the_free_batch_axis_that_are_promised(
    exported: Exported, proto: onnx.ModelProto
) -> None:
    (given,), (result,) = proto.graph.input, proto.graph.output
    assert (given.name, result.name) == ("input", "logits")
    assert given.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
    assert (exported.opset, exported.classes) == (18, CLASSES)
    assert exported.bytes == exported.path.stat().st_size


def test_the_accuracy_is_that_of_the_onnx_file(exported: Exported, labels: Tensor) -> None:
    assert exported.accuracy == pytest.approx(0.9)
    assert accuracy(exported.path, clear_images(), labels) == exported.accuracy


def test_the_metadata_comes_back_as_it_was_given(exported: Exported) -> None:
    assert read_metadata(exported.path) == {**METADATA, "kdsurgeon.verified": "true"}
    assert dict(exported.metadata) == read_metadata(exported.path)


def test_the_files_name_no_path_of_this_machine(exported: Exported) -> None:
    assert exported.int8 is not None
    for path in (exported.path, exported.int8.path):
        content = path.read_bytes()
        for secret in (str(Path.cwd()), "site-packages", str(Path.home()), "test_export", "stack"):
            assert secret.encode() not in content


def test_two_exports_of_equal_models_give_equal_bytes(exported: Exported, tmp_path: Path) -> None:
    again = export(
        Tiny().train(),
        tmp_path / "other-name.onnx",
        images(3, seed=9),
        metadata=dict(reversed(METADATA.items())),
        calibration=images(64, seed=2),
        samples=clear_images(),
    )
    assert again.sha256 == exported.sha256
    assert again.int8 is not None and exported.int8 is not None
    assert again.int8.sha256 == exported.int8.sha256


def test_an_export_leaves_no_other_file_and_honours_the_umask(exported: Exported) -> None:
    assert names(exported.path.parent) == ["student.int8.onnx", "student.onnx"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(exported.path.stat().st_mode) == 0o666 & ~umask


def test_an_export_leaves_the_callers_model_and_random_state_alone(tmp_path: Path) -> None:
    model = Tiny().train()
    model.norm.eval()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    versions = [value._version for value in (*model.parameters(), *model.buffers())]
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    level, handlers = logging.getLogger().level, list(logging.getLogger().handlers)

    export(model, tmp_path / "x.onnx", images(1), calibration=images(8), int8_gate=False)

    assert [module.training for module in (model, model.norm, model.norm2)] == [True, False, True]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert versions == [value._version for value in (*model.parameters(), *model.buffers())]
    assert all(value.grad is None for value in model.parameters())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert (logging.getLogger().level, logging.getLogger().handlers) == (level, handlers)


def test_an_export_says_nothing_on_the_console(
    exported: Exported,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    export(Flat(), tmp_path / "x.onnx", images(1))
    quantize(exported.path, tmp_path / "y.onnx", images(8), gate=False)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_the_newest_opset_on_offer_is_written_as_asked(tmp_path: Path) -> None:
    done = export(Flat(), tmp_path / "x.onnx", images(1), opset=24)
    model = onnx.load(done.path)
    assert model.opset_import[0].version == done.opset == 24
    assert model.ir_version >= helper.find_min_ir_version_for(list(model.opset_import))


def test_an_unverified_file_says_so(tmp_path: Path) -> None:
    done = export(Flat(), tmp_path / "x.onnx", images(1), verify=False)
    assert done.parity is None
    assert read_metadata(done.path) == {"kdsurgeon.verified": "false"}


def test_an_activation_left_on_the_model_does_not_stop_the_export(tmp_path: Path) -> None:
    class Remembers(Flat):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.head(x.flatten(1))
            return self.seen

    model = Remembers()
    seen = model(images(2))
    assert not seen.is_leaf
    export(model, tmp_path / "x.onnx", images(1))
    assert model.seen is seen


# Seeded faults: each is refused, and no file is left


class OnBatchStatistics(nn.Module):
    """A batch norm in training mode, spelled out: torch exports a real one as if in eval mode."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (var + self.norm.eps).sqrt()
        return x * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]


def test_batch_norm_in_training_mode_is_refused(
    student: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(model: nn.Module, example: Tensor, opset: int) -> onnx.ModelProto:
        broken = copy.deepcopy(model)
        broken.norm = OnBatchStatistics(broken.norm)
        return original(broken, example, opset)

    original = onnx_module._converted
    monkeypatch.setattr(onnx_module, "_converted", convert)
    with pytest.raises(NumericsError) as caught:
        export(student, tmp_path / "bad.onnx", images(2), samples=images(20))
    assert "bad.onnx does not compute what Tiny computes" in str(caught.value)
    assert caught.value.exit_code == 5
    assert names(tmp_path) == []


def test_a_file_with_fixed_batch_is_refused(
    student: Tiny, tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    del proto.graph.value_info[:]
    error = refused(student, tmp_path, proto, monkeypatch)
    assert error.exit_code == 5
    assert "the batch axis of input" in str(error) and "is not dynamic" in str(error)


def test_a_batch_size_hidden_inside_the_file_is_refused(
    student: Tiny, tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    (head,) = [node for node in proto.graph.node if node.op_type == "Gemm"]
    shape = numpy_helper.from_array(np.array([2, 8]), "hidden")
    proto.graph.initializer.append(shape)
    at = list(proto.graph.node).index(head)
    proto.graph.node.insert(at, helper.make_node("Reshape", [head.input[0], "hidden"], ["fixed"]))
    proto.graph.node[at + 1].input[0] = "fixed"
    error = refused(student, tmp_path, proto, monkeypatch)
    assert error.exit_code == 5


def test_a_file_that_needs_seven_samples_at_least_is_refused(
    student: Tiny, tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.array([6]), "seventh"))
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    proto.graph.node[-1].output[0] = "inner"
    for kind, inputs, output in (
        ("Gather", ["inner", "seventh"], "row"),
        ("Mul", ["row", "nothing"], "zeros"),
        ("Add", ["inner", "zeros"], "logits"),
    ):
        proto.graph.node.append(helper.make_node(kind, inputs, [output]))
    error = refused(student, tmp_path, proto, monkeypatch)
    assert error.exit_code == 5
    assert "bad.onnx cannot run an input of shape (1, 1, 8, 8)" in str(error)


def test_wrong_weights_in_the_file_are_refused(
    student: Tiny, tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = kernel(proto)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.001, tensor.name))
    error = refused(student, tmp_path, proto, monkeypatch)
    assert error.exit_code == 5
    assert "bad.onnx does not compute what Tiny computes" in str(error)


def test_a_nan_in_the_file_is_refused(
    student: Tiny, tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.name == "head.bias"]
    broken = numpy_helper.to_array(tensor).copy()
    broken[0] = math.nan
    tensor.CopyFrom(numpy_helper.from_array(broken, tensor.name))
    error = refused(student, tmp_path, proto, monkeypatch)
    assert error.exit_code == 5 and "differ by nan" in str(error)


def test_a_dropped_class_is_refused(
    student: Tiny, tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tensor in proto.graph.initializer:
        if tensor.dims[0] == CLASSES:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor)[:-1], tensor.name)
            )
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = CLASSES - 1
    del proto.graph.value_info[:]
    error = refused(student, tmp_path, proto, monkeypatch)
    assert error.exit_code == 5
    assert "(20, 4) where the model returns torch.float32 (20, 5)" in str(error)


def test_a_dropped_output_is_refused(
    student: Tiny, tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    del proto.graph.output[:]
    error = refused(student, tmp_path, proto, monkeypatch)
    assert error.exit_code == 5 and "must have one output; it has none" in str(error)


def test_a_second_output_is_refused(
    student: Tiny, tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto.graph.node.append(helper.make_node("Identity", ["logits"], ["extra"]))
    proto.graph.output.append(
        helper.make_tensor_value_info("extra", TensorProto.FLOAT, ["batch", CLASSES])
    )
    error = refused(student, tmp_path, proto, monkeypatch)
    assert error.exit_code == 5 and "must have one output; it has logits, extra" in str(error)


def test_an_output_of_another_dtype_is_refused(
    student: Tiny, tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto.graph.node.append(
        helper.make_node("Cast", ["logits"], ["halved"], to=TensorProto.FLOAT16)
    )
    proto.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("halved", TensorProto.FLOAT16, ["batch", CLASSES])
    )
    error = refused(student, tmp_path, proto, monkeypatch)
    assert error.exit_code == 5 and "is tensor(float16), not fp32" in str(error)


def test_an_output_that_is_not_batch_by_classes_is_refused(
    student: Tiny, tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    proto.graph.node.append(helper.make_node("Unsqueeze", ["logits", "axis"], ["deep"]))
    proto.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("deep", TensorProto.FLOAT, ["batch", 1, CLASSES])
    )
    error = refused(student, tmp_path, proto, monkeypatch)
    assert error.exit_code == 5 and "not (batch, classes)" in str(error)


def test_a_graph_that_is_not_valid_onnx_is_refused(
    student: Tiny, tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto.graph.node[0].op_type = "Convolve"
    error = refused(student, tmp_path, proto, monkeypatch)
    assert error.exit_code == 5 and "is not valid ONNX" in str(error)


def test_a_file_that_the_runtime_cannot_run_is_refused(
    student: Tiny, tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        raise ModelFileError(f"{path.name} cannot run.", why="no kernel")

    monkeypatch.setattr(onnx_module, "session", fails)
    error = refused(student, tmp_path, proto, monkeypatch)
    assert error.exit_code == 5 and "no kernel" in str(error)


def test_operators_outside_the_standard_are_refused(
    student: Tiny, tmp_path: Path, proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    error = refused(student, tmp_path, proto, monkeypatch)
    assert error.exit_code == 5 and "com.example 1; ai.onnx 18 was asked for" in str(error)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    model = Tiny()
    model.conv.weight.data[0, 0, 0, 0] = value
    with pytest.raises(NumericsError, match=r"(?s)holds weights that are not finite.*conv\.weight"):
        export(model, tmp_path / "bad.onnx", images(2))
    assert names(tmp_path) == []


def test_logits_that_overflow_are_refused(tmp_path: Path) -> None:
    class Overflows(Flat):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mul(1e38).mul(1e38)

    with pytest.raises(NumericsError, match="itself gives logits that are not finite, for 2 of 2"):
        export(Overflows(), tmp_path / "bad.onnx", images(2))
    assert names(tmp_path) == []


def test_a_disagreement_by_a_margin_above_the_bound_is_counted() -> None:
    expected = torch.tensor([[0.0, 1.5], [0.0, 0.5], [3.0, 0.0]])
    actual = torch.tensor([[0.9, 0.6], [0.4, 0.1], [2.5, 0.5]])
    gap, agreement, wrong = parity_module.compare(expected, actual, 1.0)
    assert (gap, agreement, wrong) == (pytest.approx(0.9), pytest.approx(1 / 3), 1)


def test_a_file_that_changes_a_clear_answer_is_refused(
    exported: Exported, student: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity_module, "compare", lambda *_: (0.0, 0.9, 2))
    with pytest.raises(NumericsError, match="gives 2 of 66 samples another class than Tiny"):
        parity(student, exported.path, clear_images())


def test_a_failed_export_leaves_an_earlier_file_as_it_was(
    proto: onnx.ModelProto, student: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.onnx").write_bytes(b"earlier")
    del proto.graph.output[:]
    monkeypatch.setattr(onnx_module, "_converted", lambda *_: proto)
    with pytest.raises(SurgeonError):
        export(student, tmp_path / "old.onnx", images(2))
    assert (tmp_path / "old.onnx").read_bytes() == b"earlier"
    assert names(tmp_path) == ["old.onnx"]


# Models that cannot be exported


class BatchStatistics(Flat):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.batch_norm(x, None, None, training=True))


class Random(Flat):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), training=True)


class FixedBatch(Flat):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.view(2, 64))


class BranchesOnValues(Flat):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class SmallBatchesOnly(Flat):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] <= 2, "two at most"
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        (BatchStatistics(), 5, "other logits in a batch of 1 than in one of 2"),
        (Random(), 5, "other logits each time, in eval mode too"),
        (FixedBatch(), 5, "the batch axis of input .* is not dynamic"),
        (BranchesOnValues(), 2, "BranchesOnValues cannot be written as ONNX"),
        (SmallBatchesOnly(), 2, "(?s)cannot run a batch of 16 .*two at most"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_model_that_no_file_can_stand_for_is_refused(
    model: nn.Module, code: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SurgeonError, match=message) as caught:
        export(model, tmp_path / "bad.onnx", images(2))
    assert caught.value.exit_code == code
    assert names(tmp_path) == []


class Returns(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> object:
        y = x.flatten(1)
        return {
            "tuple": (y, y),
            "dict": {"out": y, "aux": y},
            "map": x,
            "sum": y.sum(),
            "text": "logits",
        }[self.what]


@pytest.mark.parametrize(
    ("what", "described"),
    [
        ("tuple", "a tuple of 2"),
        ("dict", "a dict of out, aux"),
        ("map", r"a tensor of shape \(2, 1, 8, 8\)"),
        ("sum", r"a tensor of shape \(\)"),
        ("text", "a str"),
    ],
)
def test_a_model_without_one_tensor_of_logits_is_told_what_it_returned(
    what: str, described: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"Returns returns {described}, not one tensor") as caught:
        export(Returns(what), tmp_path / "bad.onnx", images(2))
    assert caught.value.exit_code == 2
    assert names(tmp_path) == []


def test_a_model_in_another_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds torch\.float64; it is exported in float32"):
        export(Flat().double(), tmp_path / "bad.onnx", images(2))


def test_a_model_that_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    model = Flat()
    model.log = (entry for entry in ())  # a generator cannot be copied
    with pytest.raises(UsageError, match="Flat cannot be copied"):
        export(model, tmp_path / "bad.onnx", images(2))


def test_a_model_of_more_than_two_gigabytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_module, "MAX_BYTES", 1000)
    with pytest.raises(ResourceError, match="holds 1,300 bytes of weights") as caught:
        export(Flat(), tmp_path / "bad.onnx", images(2))
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset 17 cannot be written"),
        ({"opset": 25}, "opset 25 cannot be written"),
        ({"metadata": {"classes": ["a"]}}, "'classes' does not"),
        ({"example": images(0)}, r"example must be float32 of shape \(n, 1, 8, 8\)"),
        ({"example": images(2).double()}, "example must be float32"),
        ({"example": torch.zeros(2, 3, 8, 8)}, r"does not take an input of shape \(2, 3, 8, 8\)"),
        ({"samples": torch.zeros(2, 1, 9, 9)}, r"samples must be .* \(n, 1, 8, 8\)"),
        ({"calibration": images(0)}, "calibration must be float32"),
        ({"labels": torch.zeros(3)}, "3 labels came with 0 samples"),
        ({"samples": images(2), "labels": torch.zeros(3)}, "3 labels came with 2 samples"),
        ({"int8_path": "x.int8.onnx"}, "an int8 file needs calibration images"),
        ({"int8_path": "bad.onnx", "calibration": images(2)}, "both the fp32 and the int8"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused_before_any_work(
    options: dict[str, object],
    message: str,
    student: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    example = options.pop("example", images(2))
    with pytest.raises(UsageError, match=message) as caught:
        export(student, "bad.onnx", example, **options)
    assert caught.value.exit_code == 2
    assert names(tmp_path) == []


# Places that cannot be written


def test_a_folder_that_is_not_there_is_a_resource_error(student: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"(?s)student\.onnx could not be written.*No such"):
        export(student, tmp_path / "missing" / "student.onnx", images(2))


def test_a_folder_in_place_of_the_file_is_a_resource_error(student: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="Is a directory"):
        export(student, tmp_path, images(2))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_or_forbidden_folder_is_a_resource_error(
    code: int,
    student: Tiny,
    proto: onnx.ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(onnx_module, "_converted", lambda *_: proto)
    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(ResourceError, match=os.strerror(code)) as caught:
        export(student, tmp_path / "student.onnx", images(2))
    assert caught.value.exit_code == 6
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing(
    student: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_module, "_converted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(student, tmp_path / "student.onnx", images(2))
    assert names(tmp_path) == []


# ONNX files from elsewhere


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x08\x0a", bytes(range(256))])
def test_a_file_that_is_no_onnx_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"x\.onnx is not") as caught:
        accuracy(path, images(1), torch.zeros(1))
    assert caught.value.exit_code == 3


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"(?s)x\.onnx cannot be read.*No such file"):
        read_metadata(tmp_path / "x.onnx")


def test_a_truncated_file_is_refused(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(exported.path.read_bytes()[:-100])
    with pytest.raises(ModelFileError):
        latency(tmp_path / "x.onnx", images(1))


def test_a_file_that_takes_weights_from_another_file_is_refused(
    proto: onnx.ModelProto, tmp_path: Path
) -> None:
    tensor = kernel(proto)
    (tmp_path / "secret").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.append(onnx.StringStringEntryProto(key="location", value="secret"))
    (tmp_path / "x.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError, match="takes weights from another file; it was not loaded"):
        latency(tmp_path / "x.onnx", images(1))


def test_an_operator_that_the_runtime_does_not_know_is_refused(
    proto: onnx.ModelProto, tmp_path: Path
) -> None:
    proto.graph.node[0].op_type = "Convolve"
    (tmp_path / "x.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError, match="not a model that ONNX Runtime can run"):
        latency(tmp_path / "x.onnx", images(1))


def test_accuracy_needs_a_label_for_each_sample(exported: Exported) -> None:
    with pytest.raises(UsageError, match="got 3 samples and 2 labels"):
        accuracy(exported.path, images(3), torch.zeros(2))


def test_samples_that_a_file_does_not_take_are_named_with_both_shapes(exported: Exported) -> None:
    wanted = r"student\.onnx takes float32 of shape \(batch, 1, 8, 8\), not "
    with pytest.raises(UsageError, match=wanted + r"torch\.float32 of shape \(2, 1, 9, 9\)"):
        accuracy(exported.path, torch.zeros(2, 1, 9, 9), torch.zeros(2))
    with pytest.raises(UsageError, match=wanted + r"torch\.float32 of shape \(2, 64\)"):
        accuracy(exported.path, torch.zeros(2, 64), torch.zeros(2))
    with pytest.raises(UsageError, match=wanted + r"torch\.float64"):
        accuracy(exported.path, images(2).double(), torch.zeros(2))


# int8


def test_the_int8_file_is_quantized_and_measured(exported: Exported) -> None:
    int8 = exported.int8
    assert int8 is not None and int8.path.name == "student.int8.onnx"
    assert int8.agreement >= 0.97 and int8.samples == 50
    assert int8.drop is not None and int8.drop <= 0.01
    assert exported.accuracy is not None and int8.accuracy is not None
    assert int8.accuracy == pytest.approx(exported.accuracy - int8.drop)
    model = onnx.load(int8.path)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    quantized = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert {values[node.input[2]].data_type for node in quantized} == {TensorProto.UINT8}
    weights = [tensor for tensor in values.values() if len(tensor.dims) == 4]
    assert {tensor.data_type for tensor in weights} == {TensorProto.INT8}
    assert list(values["stem.weight_scale"].dims) == [8]
    assert [entry.domain for entry in model.opset_import] == [""]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_int8_file_carries_the_metadata_on_but_does_not_call_itself_verified(
    exported: Exported,
) -> None:
    assert exported.int8 is not None
    found = read_metadata(exported.int8.path)
    scheme = json.loads(found.pop("kdsurgeon.quantization"))
    original = read_metadata(exported.path)
    assert original.pop("kdsurgeon.verified") == "true"
    assert found == original
    assert scheme["calibration_images"] == 64


def test_an_int8_file_that_loses_too_much_is_refused_with_both_figures(
    exported: Exported, labels: Tensor, tmp_path: Path
) -> None:
    useless = images(16) * 1e-4
    with pytest.raises(NumericsError) as caught:
        quantize(exported.path, tmp_path / "x.onnx", useless, samples=clear_images(), labels=labels)
    assert caught.value.exit_code == 5
    assert "top-1 agreement with fp32" in caught.value.what
    assert "accuracy drop" in caught.value.what and "points" in caught.value.what
    assert names(tmp_path) == []
    poor = quantize(
        exported.path,
        tmp_path / "x.onnx",
        useless,
        samples=clear_images(),
        labels=labels,
        gate=False,
    )
    assert poor.agreement < 0.97 and poor.drop is not None and poor.drop > 0.01


@pytest.mark.parametrize(("agreement", "drop"), [(0.969, 0.0), (1.0, 0.011)])
def test_each_half_of_the_int8_gate_holds_alone(agreement: float, drop: float) -> None:
    measured = int8_module.Int8(Path("x.onnx"), 1, "", agreement, 1000, 0.9, drop)
    with pytest.raises(NumericsError, match="loses too much"):
        int8_module._gate(measured, int8_module.MIN_AGREEMENT, int8_module.MAX_DROP)


def test_a_failed_int8_gate_leaves_neither_file(
    proto: onnx.ModelProto, student: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_module, "_converted", lambda *_: proto)
    with pytest.raises(NumericsError, match="accuracy drop not measured"):
        export(
            student,
            tmp_path / "x.onnx",
            images(2),
            samples=clear_images(),
            calibration=images(16) * 1e-4,
        )
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_scale_that_is_zero_or_not_finite_is_refused(
    value: float, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(source: Path, target: Path, *args: object, **kwargs: object) -> None:
        original(source, target, *args, **kwargs)
        model = onnx.load(target)
        scale = next(t for t in model.graph.initializer if t.name == "input_scale")
        scale.CopyFrom(numpy_helper.from_array(np.float32(value).reshape(()), scale.name))
        onnx.save(model, target)

    original = int8_module.quantize_static
    monkeypatch.setattr(int8_module, "quantize_static", breaks)
    with pytest.raises(NumericsError, match=r"(?s)zero or not finite.*input_scale"):
        quantize(exported.path, tmp_path / "x.onnx", images(8))
    assert names(tmp_path) == []


def test_a_quantizer_that_fails_is_reported_once_and_leaves_nothing(
    exported: Exported, tmp_path: Path
) -> None:
    with pytest.raises(NumericsError, match=r"student\.onnx could not be quantized to int8"):
        quantize(exported.path, tmp_path / "x.onnx", torch.zeros(4, 1, 9, 9))
    assert names(tmp_path) == []


def test_a_quantizer_without_room_is_a_resource_error(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(int8_module, "quantize_static", full)
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
        (images(3).fill_(math.nan), {}, "3 of 3 calibration images hold values not finite"),
        (images(8), {"labels": torch.zeros(3)}, "8 samples came with 3 labels"),
    ],
)
def test_calibration_that_cannot_serve_is_refused(
    calibration: Tensor,
    options: dict[str, Tensor],
    message: str,
    exported: Exported,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(exported.path, tmp_path / "x.onnx", calibration, **options)
    assert names(tmp_path) == []


def test_the_fp32_file_is_not_overwritten_by_its_int8_twin(exported: Exported) -> None:
    with pytest.raises(UsageError, match="is the fp32 file itself"):
        quantize(exported.path, exported.path, images(8))


# Latency


def test_a_benchmark_puts_every_runtime_side_by_side(exported: Exported, student: Tiny) -> None:
    assert exported.int8 is not None
    before = torch.get_num_threads()
    rows = benchmark(
        {"student": student, "fp32": exported.path, "int8": str(exported.int8.path)},
        images(2),
        threads=2,
        batch=3,
        runs=11,
    )
    assert [row.name for row in rows] == ["student", "fp32", "int8"]
    assert [row.latency.runtime for row in rows] == ["PyTorch", "ONNX fp32", "ONNX int8"]
    assert [row.bytes for row in rows][1:] == [exported.bytes, exported.int8.bytes]
    assert rows[0].bytes == sum(value.nbytes for value in student.state_dict().values())
    for row in rows:
        found = row.latency
        assert (found.batch, found.threads, found.runs) == (3, 2, 11)
        assert 0 < found.p20 <= found.median_ms <= found.p80
    assert torch.get_num_threads() == before


def test_targets_take_turns(student: Tiny) -> None:
    calls: list[str] = []
    named = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = latency_module._timed(named, 7, 60.0)
    assert "".join(calls) == "a" * 6 + "b" * 6 + "a" * 3 + "b" * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 7, "b": 7}


def test_a_slow_target_is_called_fewer_times() -> None:
    times = latency_module._timed({"slow": lambda: None}, 1000, 0.0)
    assert len(times["slow"]) == latency_module.TURN


def test_timing_leaves_the_model_in_its_mode() -> None:
    model = Tiny().train()
    tracked = model.norm.running_mean.clone()
    latency(model, images(1), runs=1)
    assert model.training and torch.equal(model.norm.running_mean, tracked)


def test_threads_are_put_back_after_a_failure(student: Tiny) -> None:
    before = torch.get_num_threads()
    with pytest.raises(UsageError, match=r"student does not take an input of shape \(1, 3, 8, 8\)"):
        benchmark({"student": student}, torch.zeros(1, 3, 8, 8), threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("option", ["threads", "batch", "runs"])
def test_a_benchmark_of_nothing_is_refused(option: str, student: Tiny) -> None:
    with pytest.raises(UsageError, match=f"needs {option} of at least 1; got 0"):
        latency(student, images(1), **{option: 0})


# What is printed


def test_measurements_print_as_one_line(exported: Exported) -> None:
    assert exported.int8 is not None and exported.parity is not None
    assert "top-1 agreement 100.00% on 50 samples and 16 random ones" in str(exported.parity)
    line = latency_module.Latency("ONNX fp32", 1, 1, 0.12345, 0.1, 0.2, 50)
    assert str(line) == "ONNX fp32: 0.123 ms (0.100 to 0.200), batch 1, 1 thread"
    plain = int8_module.Int8(Path("x"), 1, "", 0.98, 50, None, None)
    assert str(plain) == "top-1 agreement with fp32 98.00% on 50 samples"
    scored = int8_module.Int8(Path("x"), 1, "", 0.98, 50, 0.9, 0.005)
    assert str(scored).endswith("accuracy 90.00% (-0.50 points)")


@pytest.mark.parametrize("name", ["onnx", "parity", "latency"])
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    found = doctest.testmod(import_module(f"kdsurgeon.exporting.{name}"))
    assert found.attempted and not found.failed
