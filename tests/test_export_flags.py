"""The flags of ``export`` that say what kind of file is written, from the command line to disk."""

import json
import shutil
from contextlib import chdir
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from kdsurgeon.checkpoints import load_model
from kdsurgeon.cli import main
from kdsurgeon.data import load
from kdsurgeon.exporting import read_metadata
from tests.models import uneven

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


# What is never written over, and what stays beside


@pytest.mark.parametrize("name", ["config.yaml", "plan.yaml", "metrics.jsonl", "train.log", "x"])
def test_a_file_of_a_run_is_never_an_output(name, capsys):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("teacher: t.pt")
    output = Path("run", name)
    output.write_text("of the run")
    assert main(["export", "run", str(output)]) == 2
    assert "a name that ends in .onnx" in capsys.readouterr().err
    assert output.read_text() == "of the run"
    assert main(["export", "student.pt", "y.json", "--data-dir", "digits"]) == 2
    assert not Path("y.json").exists()


def test_an_int8_file_of_an_earlier_export_is_told(capsys):
    assert main([*EXPORT, "--int8"]) == 0
    assert "of an earlier export" not in capsys.readouterr().out
    assert main([*EXPORT]) == 0
    assert "x.int8.onnx is of an earlier export" in capsys.readouterr().out


def test_forced_int8_that_fails_its_gate_is_kept_under_a_name_that_says_so(digit_models, capsys):
    Path("x.onnx").write_bytes(b"earlier")
    uneven(digit_models / "teacher.pt", "uneven.pt")
    line = ["export", "uneven.pt", "x.onnx", "--data-dir", "digits", "--int8", "--int8-budget", "0"]
    assert main(line) == 5
    assert [path.name for path in Path().glob("*.onnx")] == ["x.onnx"]
    assert main([*line, "--force"]) == 5
    assert "x.int8.unproved.onnx, which failed; do not ship it" in capsys.readouterr().err
    names = sorted(path.name for path in Path().glob("*.onnx"))
    assert names == ["x.int8.unproved.onnx", "x.onnx"]
    assert Path("x.onnx").read_bytes() == b"earlier"
    assert read_metadata("x.int8.unproved.onnx")["kdsurgeon.verified"] == "false"
    Path("y.int8.unproved.onnx").mkdir()
    line[2] = "y.onnx"
    assert main([*line, "--force"]) == 2


# What the file says of itself without data


def test_what_flags_say_of_the_images_is_stored_without_data():
    line = ["export", "student.pt", "x.onnx", "--input-size", "1,8,8"]
    assert main(line) == 0
    found = read_metadata("x.onnx")
    assert json.loads(found["input_size"]) == [1, 8, 8]
    assert not {"mean", "std", "scale", "class_names"} & found.keys()
    assert main([*line, "--mean", "0.3", "--std", "0.25"]) == 0
    found = read_metadata("x.onnx")
    assert (json.loads(found["mean"]), json.loads(found["std"])) == ([0.3], [0.25])
    assert main([*line, "--mean", "0.3,0.3", "--std", "0.2,0.2"]) in (2, 4)


def test_a_mean_of_images_in_0_to_255_is_doubted(capsys):
    assert main([*EXPORT, "--mean", "78", "--std", "96"]) == 0
    assert "--mean above 1" in capsys.readouterr().err
    assert main([*EXPORT, "--mean", "1", "--std", "0.5"]) == 0
    assert "--mean above 1" not in capsys.readouterr().err


def test_calibration_images_say_how_they_are_normalised_and_judge_no_accuracy(capsys):
    assert main(["export", "student.pt", "x.onnx", "--int8", "--calib-data", "digits"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy was not judged" in shown and "agreement on 512 samples only" in shown
    for name in ("x.onnx", "x.int8.onnx"):
        found = read_metadata(name)
        assert json.loads(found["scale"]) == 16.0 and json.loads(found["input_size"]) == [1, 8, 8]
        assert 0.2 < json.loads(found["mean"])[0] < 0.4, "of the digits, in 0..1"
        assert "class_names" not in found, "these are not the classes of the model's file"


# What a run says, where flags do not


@pytest.fixture
def run_of_three(digit_models, capsys):
    """A run in ./home/run on framed digits in folders, with all that its validation needs."""
    home, digits = Path("home"), load("digits")
    for part, images in (("train", digits.train), ("val", digits.val)):
        for number in range(4):
            folder = home / "pictures" / part / str(number)
            folder.mkdir(parents=True)
            for row in np.flatnonzero(images.labels == number)[:8]:
                digit = Image.fromarray((images.images[row, ..., 0] * 15.9).astype(np.uint8))
                framed = Image.new("L", (26, 20))  # crop_pct takes the frame away
                framed.paste(digit.resize((12, 12)), (7, 4))
                framed.save(folder / f"{row}.png")
    (home / "pictures" / "val" / "0" / "damaged.png").write_bytes(b"no picture")
    (home / "three.txt").write_text("3\n0\n1\n")
    shutil.copy(digit_models / "teacher.pt", home)
    with chdir(home):
        line = "distill teacher.pt demo/student --data-dir pictures --classes three.txt -o run"
        line += " --input-size 1,8,8 --mean 0.4 --std 0.2 --crop-pct 0.6 --interpolation bicubic"
        line += " --epochs 1 --method ce --max-bad-images 1"
        assert main(line.split()) == 0
    capsys.readouterr()
    return home / "run"


@pytest.mark.parametrize(
    ("flags", "mean"),
    [([], 0.4), (["--mean", "0.1", "--std", "0.5"], 0.1), (["--max-bad-images", "3"], 0.4)],
)
def test_a_run_says_what_flags_leave_open(flags, mean, run_of_three, capsys):
    assert main(["export", str(run_of_three), "x.onnx", *flags]) == 0
    found = read_metadata("x.onnx")
    told = ("class_names", "mean", "input_size", "crop_pct", "interpolation")
    assert [json.loads(found[name]) for name in told] == [
        ["3", "0", "1"], [mean], [1, 8, 8], 0.6, "bicubic",
    ]  # fmt: skip
    assert "24 samples" in capsys.readouterr().out, "of the run's three classes"


def test_other_data_is_treated_as_the_runs_own(run_of_three, capsys):
    shutil.copytree("home/pictures", "elsewhere")
    line = ["export", str(run_of_three), "x.onnx"]
    assert main([*line, "--data-dir", "elsewhere"]) == 0
    assert "24 samples" in capsys.readouterr().out
    assert main([*line, "--int8", "--no-int8-gate", "--calib-data", "elsewhere"]) == 0
    found = read_metadata("x.onnx")
    assert (found["crop_pct"], json.loads(found["class_names"])) == ("0.6", ["3", "0", "1"])


def test_a_students_file_says_how_its_images_were_resized(run_of_three, capsys):
    card = load_model(str(run_of_three / "student" / "best.safetensors"), arch="demo/student").card
    assert (card.crop_pct, card.interpolation) == (0.6, "bicubic")


def test_calibration_needs_no_classes(run_of_three, capsys):
    images = load("digits").train.images[:40, ..., 0]
    numbers = np.arange(40) % 2
    np.savez("two.npz", images=images, labels=numbers, class_names=np.array(["even", "odd"]))
    line = ["export", str(run_of_three), "x.onnx", "--int8", "--no-int8-gate"]
    assert main([*line, "--calib-data", "two.npz"]) == 0
    assert json.loads(read_metadata("x.int8.onnx")["class_names"]) == ["3", "0", "1"]


def test_raw_images_need_a_normalisation_that_somebody_names():
    line = ["export", "student.pt", "x.onnx", "--embed-preprocessing", "--input-size", "1,8,8"]
    assert main(line) == 2
    assert main([*line, "--mean", "0.3", "--std", "0.2"]) == 0


CONTRADICTING = [
    ("--static", "--dynamic-size"), ("--dynamic-size", "--embed-preprocessing"),
    ("--int8", "--half"), ("--int8", "--static"), ("--int8", "--embed-preprocessing"),
    ("--opset", "12"), ("--mean", "0.3"), ("--std", "0.3"),
]  # fmt: skip


@pytest.mark.parametrize("flags", CONTRADICTING)
def test_contradictions_are_refused_before_anything_is_read(flags, monkeypatch, capsys):
    def never(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("kdsurgeon.cli.deploy.load_model", never)
    assert main([*EXPORT, *flags]) == 2
    assert "fix:" in capsys.readouterr().err


# Options that would be ignored, and wrong targets


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (["--int8-mode", "static"], "--int8"),
        (["--no-int8-gate"], "--int8"),
        (["--int8-budget", "4"], "--int8"),
        (["--calib-data", "digits"], "--int8"),
        (["--calib-method", "entropy"], "--int8"),
        (["--calib-images", "9"], "--int8"),
        (["--max-drop", "1"], "--int8"),
        (["--int8", "--qat-epochs", "2"], "--int8-mode qat"),
        (["--last"], "a run folder"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(flags, needed, capsys):
    assert main([*EXPORT, *flags]) == 2
    assert f" needs {needed}" in capsys.readouterr().err
    assert list(Path().glob("*.onnx")) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["export", "runs", "x.onnx"], "runs is a folder of runs"),
        (["benchmark", "runs"], "name one, e.g. runs/a"),
        (["benchmark", "runs/a"], "runs/a/student/best.safetensors"),
        (["benchmark", "demo/student"], "--input-size C,H,W\n"),
    ],
)
def test_what_is_no_model_is_told_what_to_name(line, words, capsys):
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/config.yaml").touch()
    assert main(line) == 2
    shown = capsys.readouterr().err
    assert words in shown and "--data-dir" not in shown


# benchmark


def test_a_file_that_takes_raw_images_is_timed_beside_others(capsys):
    assert main([*EXPORT, "--embed-preprocessing"]) == 0
    capsys.readouterr()
    assert main(["benchmark", "x.onnx", "student.pt", "--batch-size", "1,2"]) == 0
    assert capsys.readouterr().out.count(" ms ") == 4 + 2  # and twice in the head
    assert main(["benchmark", "x.onnx", "--compile"]) == 2
    assert "--compile needs a PyTorch model" in capsys.readouterr().err


def test_weights_that_are_not_beside_their_file_are_named(capsys):
    assert main([*EXPORT, "--external"]) == 0
    (data,) = Path().glob("*.data")
    data.rename("other.data")
    assert main(["benchmark", "x.onnx"]) == 3
    shown = capsys.readouterr().err
    assert data.name in shown and "under the names they were written with" in shown


def test_a_file_of_one_image_at_a_time_is_not_timed_on_four(capsys):
    assert main([*EXPORT, "--static"]) == 0
    capsys.readouterr()
    assert main(["benchmark", "x.onnx", "-b", "4"]) == 2
    said = capsys.readouterr().err
    assert "x.onnx takes 1 sample at a time, not 4" in said and "--batch-size 1" in said
