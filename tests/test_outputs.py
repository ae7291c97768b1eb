"""No output destroys what it is made from: refused before any work, and every file is as it was."""

import os
from pathlib import Path

import pytest

from kdsurgeon.cli import main
from kdsurgeon.cli.outputs import MODEL_SUFFIXES, Output, check_outputs
from kdsurgeon.errors import UsageError

PAIR = ("teacher.pt", "student.pt")
DIGITS = ("--data-dir", "digits")
WORK = [
    *(f"kdsurgeon.cli.{module}.load_model" for module in ("inputs", "session", "deploy")),
    "kdsurgeon.data.load",
    "kdsurgeon.checkpoints.convert",
]


@pytest.fixture(autouse=True)
def workplace(digit_models, tmp_path, monkeypatch):
    """Files of their own, as a mistake here overwrites them."""
    monkeypatch.chdir(tmp_path)
    for file in digit_models.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    Path("nets.py").write_text(
        "from kdsurgeon.demo import build\n\n\ndef net():\n    return build('student')\n"
    )
    Path("link.yaml").symlink_to("student.pt")
    os.link("teacher.pt", "hard.yaml")
    Path("folder").mkdir()
    os.mkfifo("pipe")


def contents():
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in sorted(Path().rglob("*"))
        if "__pycache__" not in path.parts
    }


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run a command line that must be refused before it loads a model or data."""

    def check(line, *words):
        before = contents()
        with monkeypatch.context() as patch:
            for name in WORK:
                patch.setattr(name, lambda *_, **__: pytest.fail("work was begun"))
            assert main([str(word) for word in line]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert "fix:" in told.err
        for word in words:
            assert word in told.err, told.err
        assert contents() == before

    return check


@pytest.mark.parametrize(
    "line",
    [
        ["partition", *PAIR, "-o", "teacher.pt"],
        ["partition", *PAIR, "-o", "student.pt"],
        ["partition", *PAIR, "-o", "folder/../student.pt"],
        ["partition", *PAIR, "-o", "link.yaml"],
        ["partition", *PAIR, "-o", "hard.yaml"],
        ["partition", *PAIR, "--svg", "./teacher.pt"],
        ["partition", *PAIR, "--html", "teacher.pt"],
        ["partition", "teacher.pt", "py:nets.py:net", "-o", "nets.py"],
        ["partition", *PAIR, "--student-arch", "py:nets.py:net,width=8", "-o", "nets.py"],
        ["partition", *PAIR, "--plan", "nets.py", "-o", "nets.py"],
        ["partition", *PAIR, "--data-dir", "nets.py", "--svg", "nets.py"],
        ["export", "student.pt", "student.pt"],
        ["export", "student.pt", "x.onnx", "--calib-data", "x.onnx"],
        ["convert", "teacher.pt", "teacher.pt"],
        ["distill", *PAIR, *DIGITS, "-o", "student.pt"],
        ["distill", *PAIR, "--data-dir", "folder", "-o", "folder"],
        ["distill", *PAIR, *DIGITS, "--plan", "folder/plan.yaml", "-o", "folder"],
        ["distill", "teacher.pt", "folder/student/best.safetensors", *DIGITS, "-o", "folder"],
    ],
)
def test_an_output_that_is_an_input_is_refused(line, refused):
    Path("x.onnx").write_text("read")
    Path("folder/plan.yaml").write_text("read")
    Path("folder/student").mkdir()
    Path("folder/student/best.safetensors").write_text("read")
    refused(line, "is read by this command", "name another")


def test_a_run_of_a_file_is_not_kept_where_the_file_lies(refused):
    settings = "teacher: teacher.pt\nstudent: student.pt\ndata_dir: digits\noutput: student.pt\n"
    Path("run.yaml").write_text(settings)
    refused(["distill", "-c", "run.yaml"], "student.pt is read by this command")
    refused(["distill", "-c", "run.yaml", "-o", "run.yaml"], "run.yaml is read by this command")


@pytest.mark.parametrize(
    "flags",
    [
        ["-o", "same.x", "--svg", "same.x", "--html", "other.x"],
        ["--svg", "same.x", "--html", "folder/../same.x"],
        ["-o", "same.x", "--html", "./same.x"],
    ],
)
def test_two_outputs_of_one_name_are_refused(flags, refused):
    refused(["partition", *PAIR, *flags], "both name", "same.x", "a name of its own")


@pytest.mark.parametrize("suffix", [*MODEL_SUFFIXES, ".PT"])
def test_an_output_with_the_name_of_a_model_file_is_refused(suffix, refused):
    words = (f"new{suffix} is the name of a model file", "call it new")
    for flag, better in (("-o", "new.yaml"), ("--svg", "new.svg"), ("--html", "new.html")):
        refused(["partition", *PAIR, flag, f"new{suffix}"], *words, better)
    refused(["distill", *PAIR, *DIGITS, "-o", f"new{suffix}"], *words)
    refused(["demo", "-o", f"new{suffix}"], *words)
    if suffix != ".onnx":
        refused(["export", "student.pt", f"new{suffix}"], *words, "new.onnx")


@pytest.mark.parametrize(
    "line, what",
    [
        (["partition", *PAIR, "-o", "."], ". is a folder; --output writes a file"),
        (["partition", *PAIR, "-o", "/"], "/ is a folder; --output writes a file"),
        (["partition", *PAIR, "--svg", "folder"], "folder is a folder; --svg writes a file"),
        (["partition", *PAIR, "--html", "pipe"], "pipe is not a regular file; --html writes"),
        (["partition", *PAIR, "-o", "nets.py/plan.yaml"], "nets.py is not a folder"),
        (["export", "student.pt", "folder"], "folder is a folder; OUTPUT writes a file"),
        (["export", "student.pt", "pipe"], "pipe is not a regular file"),
        (["export", "student.pt", "absent/x.onnx"], "there is no folder absent"),
        (["export", "student.pt", "nets.py/x.onnx"], "nets.py is not a folder"),
        (["convert", "teacher.pt", "absent/x.safetensors"], "there is no folder absent"),
        (["convert", "teacher.pt", "folder"], "folder is a folder"),
        (["distill", *PAIR, *DIGITS, "-o", "nets.py"], "nets.py is a file; --output writes a fol"),
        (["distill", *PAIR, *DIGITS, "-o", "nets.py/new"], "nets.py is not a folder"),
        (["demo", "-o", "nets.py"], "nets.py is a file; --output writes a folder"),
    ],
)
def test_an_output_that_has_no_place_is_refused_before_any_work(line, what, refused):
    refused(line, what)


def test_the_int8_file_is_an_output_too(refused):
    Path("x.int8.onnx").mkdir()
    refused(["export", "student.pt", "x.onnx", "--int8", *DIGITS], "x.int8.onnx is a folder")


def test_what_was_written_before_is_written_again():
    for _ in range(2):
        assert main(["partition", *PAIR, "-o", "new/plan.yaml", "--svg", "new/plan.svg"]) == 0
    before = Path("new/plan.yaml").read_bytes()
    assert main(["partition", *PAIR, "--plan", "new/plan.yaml", "-o", "again.yaml"]) == 0
    assert Path("again.yaml").read_bytes() == before


def test_a_folder_of_any_name_may_be_new_and_hold_other_things():
    Path("folder/notes.txt").write_text("mine")
    for path in ("folder", "absent/below", "resnet.8"):
        check_outputs([Output("--output", Path(path), "")], ["teacher.pt", "digits", None])


def test_a_name_is_compared_by_where_it_leads():
    Path("alias").symlink_to("folder", target_is_directory=True)
    two = [Output("-a", Path("alias/new"), ".x"), Output("-b", Path("folder/new"), ".x")]
    with pytest.raises(UsageError, match="-a and -b both name folder/new"):
        check_outputs(two, [])
