"""The flags of ``export`` that say what kind of file is written, from the command line to disk."""

import json
import shutil
from pathlib import Path

import onnxruntime
import pytest

from kdsurgeon.cli import main
from kdsurgeon.exporting import read_metadata

EXPORT = ("export", "student.pt", "x.onnx", "--data-dir", "digits")


@pytest.fixture(autouse=True)
def workplace(digit_models, tmp_path, monkeypatch):
    shutil.copy(digit_models / "student.pt", tmp_path)
    monkeypatch.chdir(tmp_path)


def test_a_file_that_takes_raw_images_says_all_that_a_consumer_needs(capsys):
    flags = ("--embed-preprocessing", "--half", "--softmax", "--license", "MIT")
    assert main([*EXPORT, *flags]) == 0
    shown = capsys.readouterr().out
    assert "ONNX fp16" in shown and "at the edge" in shown
    found = read_metadata("x.onnx")
    assert (found["layout"], found["license"]) == ("NHWC uint8", "MIT")
    assert (found["kdsurgeon.precision"], found["kdsurgeon.output"]) == ("fp16", "probabilities")
    assert json.loads(found["scale"]) == 16.0 and len(json.loads(found["class_names"])) == 10
    (given,) = onnxruntime.InferenceSession("x.onnx").get_inputs()
    assert (given.name, given.type) == ("image", "tensor(uint8)")
    assert given.shape == ["batch", "height", "width", 1]


def test_a_static_file_and_weights_apart(capsys):
    assert main([*EXPORT, "--static", "--external"]) == 0
    shown = capsys.readouterr().out
    assert "batch 1" in shown and "the two files belong together" in shown
    assert len(list(Path().glob("x.onnx.*.data"))) == 1


def test_a_failed_gate_ends_with_5_and_keeps_a_file_only_when_forced(capsys):
    assert main([*EXPORT, "--tolerance", "0"]) == 5
    assert list(Path().glob("*.onnx")) == []
    assert main([*EXPORT, "--tolerance", "0", "--force"]) == 5
    assert [path.name for path in Path().glob("*.onnx")] == ["x.unproved.onnx"]
    assert read_metadata("x.unproved.onnx")["kdsurgeon.verified"] == "false"
    assert "x.unproved.onnx, which failed; do not ship it" in capsys.readouterr().err


def test_forms_that_contradict_each_other_are_refused(capsys):
    assert main([*EXPORT, "--static", "--dynamic-size"]) == 2
    assert main([*EXPORT, "--half", "--int8"]) == 2
    assert list(Path().glob("*.onnx")) == []
