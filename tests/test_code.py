"""Code that a file names runs only where the user has typed it."""

from __future__ import annotations

import shutil
from contextlib import chdir
from pathlib import Path

import pytest

from kdsurgeon.cli import main

NETS = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("ran").touch()


def net(width=4):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(width, 10))
"""
ONCE = ["--data-dir", "digits", "--epochs", "1", "--track", "none"]


@pytest.fixture(scope="module")
def home(digit_models, tmp_path_factory):
    """A run of a student that nets.py makes, in ./run beside it."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copy(digit_models / "teacher.pt", folder)
    (folder / "nets.py").write_text(NETS)
    with chdir(folder):
        assert main(["distill", "teacher.pt", "py:nets.py:net", *ONCE, "-o", "run"]) == 0
    return folder


@pytest.fixture
def elsewhere(home, tmp_path, monkeypatch):
    """Another folder, from which the run is looked at; nothing has run since."""
    (home / "ran").unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    return home


VERBS = {
    "eval": ["eval", "RUN"],
    "resume": ["distill", "--resume", "RUN"],
    "export": ["export", "RUN", "x.onnx"],
    "stones": ["export", "RUN", "y.onnx", "--stones"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_names_code_and_the_user_types_it(verb, elsewhere, capsys):
    line = [word.replace("RUN", str(elsewhere / "run")) for word in VERBS[verb]]
    assert main(line) == 3
    said = capsys.readouterr().err
    assert "never names code" in said
    assert not (elsewhere / "ran").exists()
    code = f"py:{elsewhere / 'nets.py'}:net"
    for other in (f"py:{elsewhere / 'nets.py'}:other", "py:nets.py:net", "sha256:" + "0" * 12):
        assert main([*line, "--trust-code", other]) == 3
    assert not (elsewhere / "ran").exists()
    assert main([*line, "--trust-code", code]) == 0
    assert (elsewhere / "ran").exists()


def test_what_is_printed_next_can_be_typed(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert main(["distill", "teacher.pt", "py:nets.py:net", *ONCE, "-o", "again"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next")]
    assert main(line.split()[2:]) == 0
    assert Path("student.onnx").is_file()


def test_a_recipe_names_code_and_the_user_types_it(elsewhere, capsys):
    recipe = (elsewhere / "run" / "config.yaml").read_text()
    Path("run.yaml").write_text(recipe.replace("teacher.pt", str(elsewhere / "teacher.pt")))
    shutil.copy(elsewhere / "nets.py", "nets.py")
    line = ["distill", "-c", "run.yaml", "--dry-run", "--data-dir", "digits"]
    assert main(line) == 3
    assert f"run.yaml asks to run py:{Path('nets.py').resolve()}:net" in capsys.readouterr().err
    assert not Path("ran").exists()
    assert main([*line, "--set", "student=py:nets.py:net"]) == 0
    assert main([*line, "--trust-code", "py:nets.py:net"]) == 0


def test_a_file_that_is_typed_is_the_one_from_here(elsewhere, capsys):
    Path("nets.py").write_text(NETS)
    run = str(elsewhere / "run")
    assert main(["export", run, "x.onnx", "--arch", "py:nets.py:net", "--no-check"]) == 0
    assert Path("ran").exists() and not (elsewhere / "ran").exists()
    Path("deeper").mkdir()
    with chdir("deeper"):
        assert main(["export", run, "x.onnx", "--arch", "py:../nets.py:net", "--no-check"]) == 0
