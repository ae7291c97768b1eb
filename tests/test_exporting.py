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
from types import SimpleNamespace
from typing import Any

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
    export,
    latency,
    parity,
    quantize,
    read_metadata,
)
from kdsurgeon.exporting.converting import Conversion
from kdsurgeon.exporting.gate import session
from kdsurgeon.exporting.interface import check_refusals

onnx_module = import_module("kdsurgeon.exporting.onnx")
proving_module = import_module("kdsurgeon.exporting.proving")
parity_module = import_module("kdsurgeon.exporting.parity")

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
    monkeypatch.setattr(onnx_module, "_converted", lambda *_: Conversion(proto))
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
    def convert(network: nn.Module, *rest: object) -> Conversion:
        broken = copy.deepcopy(network)
        broken.model.norm = OnBatchStatistics(broken.model.norm)
        return original(broken, *rest)

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

    monkeypatch.setattr(proving_module, "session", fails)
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
    with pytest.raises(NumericsError, match="gives 2 of 50 samples another class than Tiny"):
        parity(student, exported.path, clear_images())


def test_half_may_change_one_close_answer_and_no_more(
    exported: Exported, student: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity_module, "compare", lambda *_: (0.0, 0.9, 0))
    with pytest.raises(NumericsError, match="gives 5 of 50 samples another class") as caught:
        parity(student, exported.path, clear_images(), precision="fp16")
    assert "leave out --half" in caught.value.notes["fix"]
    assert parity(student, exported.path, clear_images()).agreement < 1  # within fp32's bound


def test_half_that_overflows_is_refused_though_the_network_does_not(
    exported: Exported, student: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parity_module.logits

    def overflows(*given: Any, **others: Any) -> Tensor:
        found = real(*given, **others)
        found[0] = math.inf
        return found

    monkeypatch.setattr(parity_module, "logits", overflows)
    with pytest.raises(NumericsError, match="logits that are not finite for 1 of 50") as caught:
        parity(student, exported.path, clear_images(), precision="fp16")
    assert "65,504" in caught.value.notes["why"]


class Contrast(Flat):
    """Has no answer for a picture of one shade, dark or bright."""

    def forward(self, x: Tensor) -> Tensor:
        shades = x.flatten(1).abs()
        return super().forward(x) + 1 / (shades.amax(1) - shades.amin(1))[:, None]


def test_where_the_network_itself_has_no_answer_nothing_is_compared(tmp_path: Path) -> None:
    done = export(Contrast(), tmp_path / "x.onnx", images(4).clamp(-2, 2))
    assert done.parity is not None and (done.parity.edges, done.parity.samples) == (0, 4)


def test_a_failed_export_leaves_an_earlier_file_as_it_was(
    proto: onnx.ModelProto, student: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.onnx").write_bytes(b"earlier")
    del proto.graph.output[:]
    monkeypatch.setattr(onnx_module, "_converted", lambda *_: Conversion(proto))
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
        assert x.shape[0] <= 5, "five at most"
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        (BatchStatistics(), 5, "other logits in a batch of 1 than in one of 2"),
        (Random(), 5, "other logits each time, in eval mode too"),
        (FixedBatch(), 2, "(?s)does not take 3 samples of 1×8×8.*must stay free"),
        (BranchesOnValues(), 2, "BranchesOnValues cannot be written as ONNX"),
        (SmallBatchesOnly(), 2, "(?s)cannot run a batch of 7 .*five at most"),
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


@pytest.mark.parametrize("what", ["tuple", "dict"])
def test_the_logits_are_found_in_what_a_model_returns(what: str, tmp_path: Path) -> None:
    done = export(Returns(what), tmp_path / "x.onnx", images(2))
    assert done.classes == 64
    (output,) = onnx.load(done.path).graph.output
    assert output.name == "logits"


@pytest.mark.parametrize(
    ("what", "described"),
    [
        ("map", "a tensor of shape 3×1×8×8"),
        ("sum", r"a tensor of shape \(\) \(one number\)"),
        ("text", "of type str"),
    ],
)
def test_a_model_without_one_tensor_of_logits_is_told_what_it_returned(
    what: str, described: str, tmp_path: Path
) -> None:
    words = f"(?s)Returns does not return one tensor of logits.*{described}, for 3 samples"
    with pytest.raises(UsageError, match=words) as caught:
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset 17 cannot be written"),
        ({"opset": 25}, "opset 25 cannot be written"),
        ({"metadata": {"classes": ["a"]}}, "'classes' does not"),
        ({"example": images(0)}, r"example must be float32 of shape \(n, 1, 8, 8\)"),
        ({"example": images(2).double()}, "example must be float32"),
        ({"example": torch.zeros(2, 3, 8, 8)}, "does not take 3 samples of 3×8×8"),
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

    monkeypatch.setattr(onnx_module, "_converted", lambda *_: Conversion(proto))
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


def test_a_file_that_takes_weights_from_another_folder_is_refused(
    proto: onnx.ModelProto, tmp_path: Path
) -> None:
    tensor = kernel(proto)
    (tmp_path / "secret").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.append(onnx.StringStringEntryProto(key="location", value="../secret"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError, match="takes weights from outside of itself"):
        latency(tmp_path / "model" / "x.onnx", images(1))


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


def test_a_reference_that_takes_more_than_images_is_refused(
    exported: Exported, proto: onnx.ModelProto, tmp_path: Path
) -> None:
    more = helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch"])
    proto.graph.input.append(more)
    onnx.save(proto, tmp_path / "more.onnx")
    with pytest.raises(UsageError, match=r'more\.onnx takes an input "mask", which was not given'):
        quantize(
            exported.path, tmp_path / "int8.onnx", images(20), reference=tmp_path / "more.onnx"
        )
    assert names(tmp_path) == ["more.onnx"]


def test_a_runtime_that_runs_what_a_file_does_not_declare_is_noticed(exported: Exported) -> None:
    run, samples = session(exported.path), {"input": images(2)}
    check_refusals(run, samples, exported.path)
    lenient: Any = SimpleNamespace(get_inputs=run.get_inputs, run=lambda *_: [])
    told = r'answers when axis 1 of "input" is 2, though it declares 1'
    with pytest.raises(NumericsError, match=told):
        check_refusals(lenient, samples, exported.path)


# What is printed


def test_measurements_print_as_one_line(exported: Exported) -> None:
    assert exported.parity is not None
    assert "top-1 agreement 100.00% on 50 samples and 16 random ones" in str(exported.parity)


@pytest.mark.parametrize("name", ["onnx", "parity", "latency"])
def test_the_examples_in_the_docstrings_run(name: str) -> None:
    found = doctest.testmod(import_module(f"kdsurgeon.exporting.{name}"))
    assert found.attempted and not found.failed
