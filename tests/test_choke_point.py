"""Only kdsurgeon.checkpoints may turn files into objects or strings into code, and only
kdsurgeon.exporting.gate reads ONNX files.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MODULES = {
    *(
        "pickle",
        "_pickle",
        "cPickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
        "runpy",
    ),
    *("torch.package", "torch.hub", "torch.distributed.checkpoint", "code", "pickletools"),
}
FUNCTIONS = {
    *("torch.load", "torch.jit.load", "torch.export.load", "torch.serialization.load"),
    *("torch.utils.model_zoo.load_url", "torch.storage._load_from_bytes"),
    *("numpy.load", "numpy.lib.npyio.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all"),
    *("importlib.import_module", "importlib.util.spec_from_file_location", "importlib.__import__"),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}


def offences(source: str) -> list[str]:
    """Every forbidden name that a module reaches, however it was renamed, with its line."""
    tree = ast.parse(source)
    known = dict(_bindings(tree))
    found = [f"{line}: {name}" for name, line in _imports(tree) if _is_forbidden(name)]
    for node in ast.walk(tree):
        name = _name_of(node, known)
        if name is not None and _is_forbidden(name):
            found.append(f"{node.lineno}: {name}")  # type: ignore[attr-defined]
    return sorted(set(found))


def _is_forbidden(name: str) -> bool:
    return name in FUNCTIONS or any(name == m or name.startswith(f"{m}.") for m in MODULES)


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _bindings(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What each name of the module stands for, by imports and plain assignments."""
    for name in BUILTINS:
        yield name, f"builtins.{name}"
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = _name_of(node.value, {**dict.fromkeys(BUILTINS, ""), **known})
            if name:
                known[node.targets[0].id] = name
    yield from known.items()


def _name_of(node: ast.AST, known: dict[str, str]) -> str | None:
    """The full name of ``a.b.c`` or ``getattr(a, "b")``, where ``a`` is known."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        base = _name_of(node.value, known)
        return f"{base}.{node.attr}" if base else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
        base, attribute = _name_of(node.args[0], known), node.args[1]
        if node.func.id == "getattr" and base and isinstance(attribute, ast.Constant):
            return f"{base}.{attribute.value}"
    return None


def guarded_files() -> list[Path]:
    """Every module of ours outside of the choke point."""
    files = [*ROOT.glob("kdsurgeon/**/*.py"), *ROOT.glob("plugins/**/*.py")]
    return sorted(f for f in files if "checkpoints" not in f.relative_to(ROOT).parts)


def test_nothing_outside_the_checkpoints_package_loads_objects_or_runs_strings() -> None:
    files = guarded_files()
    assert {"plugins.py", "errors.py", "timm.py"} <= {file.name for file in files}
    found = {
        str(file.relative_to(ROOT)): offences(file.read_text(encoding="utf-8")) for file in files
    }
    # CIFAR-100 is published as pickles: their opcodes are listed there, which runs none of them
    listed = {offence.partition(": ")[2] for offence in found.pop("plugins/cifar.py")}
    assert listed == {"pickletools", "pickletools.genops"}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import _pickle",
        "import joblib, os",
        "from dill import load as open_file",
        "import marshal",
        "import runpy",
        "import shelve",
        "import torch\ntorch.load('x')",
        "import torch as t\nread = t.load",
        "from torch import load",
        "from torch import load as read\nread('x')",
        "from torch import jit\njit.load('x')",
        "import torch\ntorch.jit.load('x')",
        "import torch.export\ntorch.export.load('x')",
        "from torch.export import load",
        "import torch\nloader = torch\nloader.load('x')",
        "import torch\ngetattr(torch, 'load')('x')",
        "from torch.serialization import load",
        "import torch.hub",
        "import torch\ntorch.hub.load('a', 'b')",
        "import torch.distributed.checkpoint as dcp",
        "def f():\n    import numpy as np\n    return np.load('x')",
        "from numpy import load",
        "import yaml\nyaml.load('x')",
        "import yaml\nyaml.unsafe_load('x')",
        "import importlib\nimportlib.import_module('x')",
        "from importlib import import_module",
        "from importlib.util import spec_from_file_location",
        "eval('1')",
        "exec('1')",
        "x = compile('1', 'f', 'eval')",
        "run = exec\nrun('1')",
        "import builtins\nbuiltins.exec('1')",
        "__import__('os')",
        "class A:\n    def f(self):\n        return [eval(x) for x in 'a']",
    ],
)
def test_a_seeded_offender_is_caught(source: str) -> None:
    assert offences(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nmodel.eval()\ntorch.compile(model)",
        "import re\nre.compile('x')",
        "from kdsurgeon import plugins\nplugins.load('models', 'demo')",
        "import json\njson.load(file)",
        "import onnx\nonnx.load('x')",
        "from importlib.metadata import entry_points\nentry_points()",
        "import numpy as np\nnp.loadtxt",
    ],
)
def test_an_honest_line_is_not_accused(source: str) -> None:
    assert offences(source) == []


def test_the_choke_point_itself_loads_in_one_place_and_says_how() -> None:
    calls = []
    for file in (ROOT / "kdsurgeon" / "checkpoints").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        known = dict(_bindings(tree))
        assert not [name for name, _ in _imports(tree) if name.split(".")[0] in ("pickle", "dill")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _name_of(node.func, known) in FUNCTIONS:
                keywords = {keyword.arg for keyword in node.keywords}
                calls.append((file.name, _name_of(node.func, known), "weights_only" in keywords))
    assert sorted(calls) == [
        ("reader.py", "torch.load", True),
        ("specs.py", "importlib.import_module", False),
        ("specs.py", "importlib.util.spec_from_file_location", False),
    ]


# --- ONNX -----------------------------------------------------------------------------------------

# What opens an ONNX file or the weights beside it, or makes a model of bytes.
ONNX_READERS = {
    *("onnx.load", "onnx.load_model", "onnx.load_from_string", "onnx.load_model_from_string"),
    *("onnx.load_tensor", "onnx.load_tensor_from_string", "onnx.hub.load"),
    *("onnx.external_data_helper.load_external_data_for_model", "onnx.ModelProto.FromString"),
    *("onnx.external_data_helper.load_external_data_for_tensor", "onnx_ir.load"),
    *("onnxruntime.InferenceSession", "onnx.model_container.ModelContainer.load"),
}
ONNX_METHODS = {
    *("ParseFromString", "MergeFromString", "register_custom_ops_library"),
    *("add_external_initializers_from_files_in_memory", "set_ep_context_data_read_func"),
}
# Drafts that a tool has just written for us into a private folder: nobody else's files.
ONNX_DRAFTS = {
    "kdsurgeon/exporting/onnx.py": "onnx.load",
    "kdsurgeon/exporting/proving.py": "onnx.load",
    "kdsurgeon/exporting/qdq.py": "onnx.load",
}
ONNX_GATE = {
    "kdsurgeon/exporting/gate.py": ["onnx.load_model_from_string"],
    "kdsurgeon/exporting/runtime.py": ["onnxruntime.InferenceSession"],
}


def onnx_readings(source: str) -> list[str]:
    """Every place where a module opens an ONNX file, with its line; annotations do not count."""
    tree = ast.parse(source)
    known = dict(_bindings(tree))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = _name_of(node.func, known)
            method = node.func.attr if isinstance(node.func, ast.Attribute) else None
            if name in ONNX_READERS or (name or "").startswith("onnx.reference."):
                found.append(f"{node.lineno}: {name}")
            elif method in ONNX_METHODS:
                found.append(f"{node.lineno}: {method}")
        for value in _handed_on(node):
            if (name := _name_of(value, known)) in ONNX_READERS:
                found.append(f"{value.lineno}: {name}")
    return sorted(set(found))


def _handed_on(node: ast.AST) -> list[ast.expr]:
    """Where a function goes without being called: into a name, an argument, or back."""
    if isinstance(node, ast.Call):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, ast.Assign | ast.Return | ast.NamedExpr) and node.value is not None:
        return [node.value]
    return []


def test_an_onnx_file_is_read_at_the_gate_alone() -> None:
    found = {
        str(file.relative_to(ROOT)): onnx_readings(file.read_text(encoding="utf-8"))
        for file in (*ROOT.glob("kdsurgeon/**/*.py"), *ROOT.glob("plugins/**/*.py"))
    }
    for name, readings in ONNX_GATE.items():
        assert [entry.partition(": ")[2] for entry in found.pop(name)] == readings
    for name, reading in ONNX_DRAFTS.items():
        found[name] = [entry for entry in found[name] if entry.partition(": ")[2] != reading]
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import onnx\nonnx.load('x')",
        "import onnx as o\no.load_model('x')",
        "from onnx import load\nload('x')",
        "from onnx import load as read\nread('x')",
        "import onnx\nonnx.load_model_from_string(b'x')",
        "import onnx\nread = onnx.load\nread('x')",
        "import onnx\ngetattr(onnx, 'load')('x')",
        "import onnx\nmap(onnx.load, ['x'])",
        "import onnx\ndef f():\n    return onnx.load",
        "import onnx\nonnx.ModelProto.FromString(b'x')",
        "from onnx import ModelProto\nModelProto.FromString(b'x')",
        "from onnx import ModelProto\nmodel = ModelProto()\nmodel.ParseFromString(b'x')",
        "from onnx.external_data_helper import load_external_data_for_model as fill\nfill(m, '.')",
        "import onnxruntime\nonnxruntime.InferenceSession('x')",
        "import onnxruntime as ort\nort.InferenceSession('x')",
        "from onnxruntime import InferenceSession\nInferenceSession('x')",
        "import onnxruntime\nopen_it = onnxruntime.InferenceSession\nopen_it('x')",
        "options.register_custom_ops_library('x.so')",
        "from onnx.reference import ReferenceEvaluator\nReferenceEvaluator('x')",
    ],
)
def test_a_seeded_reading_of_an_onnx_file_is_caught(source: str) -> None:
    assert onnx_readings(source) != []


@pytest.mark.parametrize(
    "source",
    [
        "import onnxruntime\ndef f(run: onnxruntime.InferenceSession) -> None: ...",
        "import onnx\nonnx.checker.check_model(model)",
        "import onnx\nmodel.SerializeToString()",
        "import json\njson.load(file)",
        "from kdsurgeon.exporting.gate import read_onnx\nread_onnx('x')",
    ],
)
def test_an_honest_use_of_onnx_is_not_accused(source: str) -> None:
    assert onnx_readings(source) == []
