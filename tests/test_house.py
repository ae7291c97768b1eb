"""The house holds: import layers, public names, what the help needs, words decided against."""

import ast
import subprocess
import sys
from pathlib import Path

import kdsurgeon
from kdsurgeon import public

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"utils", "helpers", "common", "misc", "manager", "engine"}


def test_modules_import_only_from_the_layers_below_them():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_public_names_are_these_and_each_is_served():
    assert kdsurgeon.__all__ == [
        "load_model", "save_model", "ModelCard", "load_data", "Batches", "trace", "Trace",
        "find_cut_points", "partition", "read_plan", "Plan", "certify", "forecast",
        "within_budget", "synthesize", "fit_adapters", "Logits", "block_kd_loss",
        "linear_block_kd_loss", "cache_teacher", "Recipe",
        "prepare", "distill", "train_alone", "Epoch",
        "accuracy", "evaluate", "export", "SurgeonError", "UsageError", "DataError",
    ]  # fmt: skip
    assert sorted(kdsurgeon.__all__) == sorted(public.__all__)
    assert all(getattr(kdsurgeon, name) is getattr(public, name) for name in kdsurgeon.__all__)


def test_every_public_name_says_what_it_is():
    assert [name for name in kdsurgeon.__all__ if not getattr(kdsurgeon, name).__doc__] == []


def test_no_module_is_called_by_a_word_that_says_nothing():
    modules = {path.stem for path in (ROOT / "kdsurgeon").rglob("*.py")}
    assert modules & FORBIDDEN == set()


def test_plugins_use_public_names_only_and_never_each_other():
    for path in (ROOT / "plugins").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdsurgeon"):
                assert node.module == "kdsurgeon", path.name
                assert all(name.name in kdsurgeon.__all__ for name in node.names), path.name


def test_kdsurgeon_never_imports_its_plugins():
    for path in (ROOT / "kdsurgeon").rglob("*.py"):
        assert "import kdsurgeon_plugins" not in path.read_text(encoding="utf-8"), path.name


def test_only_the_command_line_prints():
    for path in (ROOT / "kdsurgeon").rglob("*.py"):
        if path.parent.name == "cli":
            continue
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        ]
        assert calls == [], path.name


def test_the_help_is_answered_without_torch():
    code = (
        "import sys; from kdsurgeon.cli import main; main(['--help']); main(['distill', '--help']);"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_wheel_holds_every_package():
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in (ROOT / "kdsurgeon").rglob("__init__.py"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert f'"{package}"' in listed, package
