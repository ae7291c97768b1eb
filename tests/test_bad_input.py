"""Bad input through the command line: what is said, the exit code, and nothing half-written."""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kdsurgeon import Recipe, distill, partition
from kdsurgeon.checkpoints import load_model
from kdsurgeon.cli import main
from kdsurgeon.demo import build
from kdsurgeon.errors import AlignmentError, ConfigError, PlanError, TraceError, UsageError
from kdsurgeon.runs import Run, read_checkpoint, read_metrics
from tests.models import uneven

DIGITS = ("--data-dir", "digits")
QUICK = (*DIGITS, "--epochs", "1", "--batch-size", "256")

NETS = '''
import torch
from torch import nn


class Net(nn.Module):
    """Answers with whatever ``kind`` asks for."""

    def __init__(self, kind="logits", num_classes=10):
        super().__init__()
        self.kind = kind
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        features = self.body(self.stem(x))
        logits = self.head(features.mean((2, 3)))
        if self.kind == "two":
            return logits.reshape(2, 10)
        kinds = {"logits": logits, "dict": {"logits": logits}, "tuple": (logits, features)}
        kinds |= {"features": {"features": features}, "maps": (features, features)}
        kinds |= {"map": features, "vector": logits.sum(-1), "class": logits.argmax(1)}
        return (kinds | {"nothing": None, "text": "cat"})[self.kind]


class Branches(Net):
    def forward(self, x):
        logits = super().forward(x)
        return -logits if logits.sum() > 0 else logits


class Reads(Net):
    def forward(self, x):
        return super().forward(x) * float(x.max())


class Picks(Net):
    def forward(self, x):
        features = self.body(self.stem(x))
        return super().forward(x) + features[features > 0].mean()


class Overwrites(Net):
    def forward(self, x):
        return super().forward(x.mul_(2))


class TwoInputs(Net):
    def forward(self, image, age):
        return super().forward(image) + age[:, :1]


class Vectors(nn.Module):
    """Sees no places: its image is a vector from the start."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))

    def forward(self, x):
        return self.layers(x)


class Places(nn.Module):
    """Has no vector but its logits."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 1))

    def forward(self, x):
        return self.layers(x).mean((2, 3))


class Sounds(nn.Module):
    """Hears one channel over time."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.layers(x).flatten(1))


def half():
    return Net().half()


def lazy():
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(10))


def broken():
    net = Net()
    nn.init.constant_(net.stem[0].weight, float("nan"))
    return net


def crash():
    raise RuntimeError("boom")


def leave():
    raise SystemExit(0)


def number():
    return 3
'''


@pytest.fixture(scope="module")
def models(digit_models, tmp_path_factory):
    """A folder with a teacher that knows digits, a student that does not, and odd factories."""
    folder = Path(shutil.copytree(digit_models, tmp_path_factory.mktemp("models") / "all"))
    weights = torch.load(folder / "teacher.pt", weights_only=True)["state_dict"]
    torch.save(weights, folder / "weights.pt")
    (folder / "nets.py").write_text(NETS)
    return folder


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """A run of two epochs; copied by whoever changes it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    pair = [str(models / "teacher.pt"), str(models / "student.pt")]
    settings = ["--epochs", "2", "--batch-size", "128", "--blocks", "2", "-o", str(folder)]
    assert main(["distill", *pair, *DIGITS, *settings]) == 0
    return folder


@pytest.fixture(scope="module")
def made_plan(models, tmp_path_factory):
    file = tmp_path_factory.mktemp("plans") / "plan.yaml"
    pair = [str(models / "teacher.pt"), str(models / "student.pt")]
    assert main(["partition", *pair, "-o", str(file)]) == 0
    return file.read_text()


@pytest.fixture
def plan(made_plan):
    """A plan of the pair, for the test to change."""
    Path("plan.yaml").write_text(made_plan)
    return Path("plan.yaml")


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(autouse=True)
def workplace(models, tmp_path, monkeypatch):
    """Every test runs in a folder of its own, with the models in it."""
    monkeypatch.chdir(tmp_path)
    for file in models.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)


def contents():
    """Every file and folder here, with its size; compiled Python is nobody's output."""
    return {
        (str(path), path.is_file() and path.stat().st_size)
        for path in Path().rglob("*")
        if "__pycache__" not in path.parts
    }


@pytest.fixture
def refused(capsys):
    """Run a command line that must fail with a code and these words, and write nothing."""

    def check(arguments, code, *words, writes=False):
        before = contents()
        assert main([str(argument) for argument in arguments]) == code
        text = capsys.readouterr().err
        assert "Traceback" not in text
        assert "a fault of kdsurgeon" not in text
        for word in words:
            assert word in text, text
        assert writes or contents() == before
        return text

    return check


# ── model files ──────────────────────────────────────────────────────────────────────────────────


class Payload:
    """A pickle that leaves a mark when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("EXECUTED",)


def whole_model(path):
    torch.save(nn.Linear(2, 2), path)


def torchscript(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def exported_program(path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(2, 2),)), path)


FILES = {
    "missing": (lambda path: None, "does not exist", "check the path"),
    "folder": (lambda path: path.mkdir(), "is a folder, not a model file", "give a model file"),
    "empty": (lambda path: path.touch(), "is empty", "copy or download it again"),
    "truncated": (
        lambda path: path.write_bytes(Path("teacher.pt").read_bytes()[:5000]),
        "is damaged: it does not end as a zip archive does",
        "copy or download it again",
    ),
    "text": (lambda path: path.write_text("hello " * 99), "is text, not a model file", "fix:"),
    "page": (lambda path: path.write_text("<!DOCTYPE html><html>"), "not a model file", "fix:"),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps(Payload())),
        "is a bare pickle, not a torch.save file; it was not loaded",
        "torch.save the state_dict",
    ),
    "payload": (
        lambda path: torch.save({"state_dict": Payload()}, path),
        "holds Python objects, not only tensors; it was not loaded",
        "--trust-code sha256:",
    ),
    "lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
        "this is a Git LFS pointer",
        "git lfs pull",
    ),
    "whole model": (
        whole_model,
        "needs: torch.nn.modules.linear.Linear",
        "name the architecture",
    ),
    "torchscript": (torchscript, "is a TorchScript archive; it was not opened", "load it yourself"),
    "pt2": (exported_program, "is a torch.export archive (.pt2); it was not", "load it yourself"),
}


@pytest.mark.parametrize("verb", ["partition", "distill", "export"])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_model_is_refused_unopened(kind, verb, refused):
    make, what, fix = FILES[kind]
    make(Path("given.pt"))
    arguments = {
        "partition": ["partition", "given.pt", "student.pt", "-o", "plan.yaml"],
        "distill": ["distill", "teacher.pt", "given.pt", *QUICK, "-o", "new"],
        "export": ["export", "given.pt", "student.onnx", *DIGITS],
    }[verb]
    refused(arguments, 3, "error: given.pt", what, fix)
    assert not Path("EXECUTED").exists()


@pytest.mark.parametrize("kind", ["missing", "truncated", "lfs", "payload"])
def test_nothing_is_converted_from_what_is_no_checkpoint(kind, refused):
    FILES[kind][0](Path("given.pt"))
    refused(["convert", "given.pt", "out.safetensors"], 3, "error: given.pt", "fix:")
    assert not Path("EXECUTED").exists()


def test_a_damaged_student_of_a_run_is_refused(run, refused):
    file = run / "student" / "best.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    refused(["export", run, "student.onnx"], 3, "best.safetensors", "sha256")


@pytest.mark.parametrize(
    "trust, code, what, fix",
    [
        ("sha256:" + "0" * 64, 3, "holds Python objects", "--trust-code sha256:"),
        ("sha256:abcd", 2, "does not name a file", "at least 12 hex digits"),
        ("yes", 2, "does not name a file", "never by a bare yes"),
    ],
)
def test_trust_is_for_one_file_by_its_hash(trust, code, what, fix, refused):
    whole_model("given.pt")
    refused(["partition", "given.pt", "student.pt", "--trust-code", trust], code, what, fix)


def test_the_hash_that_a_refusal_prints_is_the_one_that_opens_the_file(refused):
    whole_model("given.pt")
    text = refused(["inspect", "given.pt", "--input-size", "1,2,2"], 3, "holds Python objects")
    shown = text.split("--trust-code ")[1].split()[0]
    assert hashlib.sha256(Path("given.pt").read_bytes()).hexdigest().startswith(shown[7:])
    opened = ["inspect", "given.pt", "--input-size", "1,2,2", "--trust-code", shown]
    assert main(opened) == 0


def test_weights_without_an_architecture_name_the_flag_to_give(refused):
    refused(["partition", "weights.pt", "student.pt"], 2, "weights only", "--teacher-arch timm/")
    refused(["distill", "teacher.pt", "weights.pt", *QUICK], 2, "weights only", "--student-arch")
    refused(["export", "weights.pt", "x.onnx", *DIGITS], 2, "weights only", "--arch")


def test_weights_of_another_architecture_show_the_first_names_that_differ(refused):
    arguments = ["partition", "weights.pt", "student.pt", "--teacher-arch", "demo/student"]
    words = (
        'the weights of weights.pt do not fit "demo/student"',
        "missing:    stages.0.depthwise.weight",
        "unexpected: stages.0.conv1.weight",
        "stem.0.weight 32x1x3x3 in the file, 8x1x3x3 in demo/student",
        "--teacher-arch",
    )
    refused(arguments, 3, *words)


@pytest.mark.parametrize(
    "spec, code, what, fix",
    [
        ("demo/teachr", 2, "demo has no model teachr", 'did you mean "teacher"?'),
        ("dmeo/teacher", 2, 'no model is called "dmeo"', 'did you mean "demo"?'),
        ("teacher", 2, '"teacher" is neither a file nor a model string', "SOURCE/NAME"),
        (
            "runs/absent",
            2,
            'runs/absent does not exist, and no model is called "runs"',
            "check the",
        ),
        ("py:nets.py:Nett", 2, '"nets.py" has no factory "Nett"', 'did you mean "Net"?'),
        ("py:absent:net", 2, 'needs the module "absent"', "install it"),
        ("py:absent.py:net", 2, "absent.py does not exist", "check the path"),
        ("py:nets.py:crash", 2, "RuntimeError: boom", "call it in Python"),
        ("py:nets.py:leave", 2, "SystemExit: 0", "call it in Python"),
        ("py:nets.py:number", 2, "made int, not a torch.nn.Module", "returns the module"),
        ("py:nets.py", 2, "names no factory", "py:package.module:factory"),
        ("demo/teacher,width", 2, '"width" in "demo/teacher,width" is not key=value', "SOURCE/"),
        ("demo/teacher,width=3", 7, "unexpected keyword argument 'width'", "check the name"),
    ],
)
def test_a_model_string_that_leads_nowhere_is_answered_with_the_nearest(
    spec, code, what, fix, refused
):
    refused(["partition", spec, "student.pt", "-o", "plan.yaml"], code, what, fix)


@pytest.mark.parametrize("line", [["eval", "runs/a"], ["export", "runs/a", "x.onnx"]])
def test_a_run_that_is_not_there_is_called_so(line, refused):
    refused(line, 2, 'runs/a does not exist, and no model is called "runs"', "check the path")


def test_a_file_of_factories_offers_what_it_defines(refused):
    text = refused(["inspect", "py:nets.py:missing"], 2, '"nets.py" has no factory "missing"')
    offered = text.split("offers:")[1].splitlines()[0].strip()
    names = ["Net", "Branches", "Reads", "Picks", "Overwrites", "TwoInputs", "Vectors", "Places"]
    assert offered == ", ".join(names) + " …"
    Path("few.py").write_text(
        "from dataclasses import dataclass\nfrom functools import partial\nfrom torch import nn\n"
        "tiny = partial(nn.Linear, 2, 2)\nready = nn.Linear(2, 2)\n\n\ndef net():\n    pass\n"
    )
    refused(["inspect", "py:few.py:missing"], 2, "offers: tiny, ready, net\n")
    Path("again.py").write_text("from few import net\n")
    refused(["inspect", "py:again.py:missing"], 2, "offers: net\n")


# ── flags and recipes ────────────────────────────────────────────────────────────────────────────


PAIR = ("teacher.pt", "student.pt")


@pytest.mark.parametrize(
    "arguments, what, fix",
    [
        (["partition", *PAIR, "--blokcs", "3"], "--blokcs", 'did you mean "--blocks"?'),
        (["distill", *PAIR, "--epohcs", "3"], "--epohcs", 'did you mean "--epochs"?'),
        (["partitoin", *PAIR], "partitoin", "Did you mean 'partition'?"),
        (["partition", "teacher.pt"], "student", "kdsurgeon partition --help"),
        (["partition", *PAIR, "more.pt"], "more.pt", "kdsurgeon partition --help"),
        (["partition", *PAIR, "--blocks"], "--blocks", "--help"),
        (["distill", *PAIR, "--epochs", "three"], "--epochs", "kdsurgeon distill --help"),
        (["export", "student.pt", "x.onnx", "--threads", "0"], "--threads", "--help"),
        (["benchmark"], "models", "kdsurgeon benchmark --help"),
        (["partition", *PAIR, "--input-size", "8,8"], "--input-size 8,8", "3,224,224"),
        (["partition", *PAIR, "--input-size", "1,0,8"], "--input-size 1,0,8", "3,224,224"),
        (["partition", *PAIR, "--input-size", "1,²,8"], "--input-size 1,²,8", "3,224,224"),
        (["inspect", "student.pt", "--input-size", "1,99999,99999"], "bytes for one", "at most"),
        (["partition", *PAIR, "--blocks", "0"], "--blocks 0", "--blocks 4"),
        (["partition", *PAIR, "--blocks", "²"], "--blocks ²", "--blocks 4"),
        (["partition", *PAIR, "--blocks", "99"], "have 1 to 4", "--blocks 4 or fewer"),
        (["partition", *PAIR, "--pair", "pool"], "--pair pool", "--pair TEACHER=STUDENT"),
        (["partition", *PAIR, "--pair", "pol=pool"], "no node pol", 'did you mean "pool"?'),
        (["partition", *PAIR, "--pair", "qx=pool"], "no node qx", "kdsurgeon inspect"),
        (["partition", *PAIR, "--pair", "pool=pool", "--blocks", "1"], "exclude each", "leave out"),
        (["distill", *PAIR, *DIGITS, "--mean", "dark"], "--mean dark", "--mean 0.5,0.5,0.5"),
        (["distill", *PAIR, *DIGITS, "--mean", "nan", "--std", "0"], "--mean", "--std"),
        (["distill", *PAIR, *DIGITS, "--stones", "frist"], "--stones", '"drop-first"'),
        (["distill", *PAIR, *DIGITS, "--stones", "9"], "no stone of depth 9", "--blocks"),
        (
            ["distill", *PAIR, *DIGITS, "--stones", "last-9"],
            "but the plan has 4",
            "last-4 or fewer",
        ),
        (["distill", *PAIR, *DIGITS, "--set", "epochs"], "--set epochs", "--set optim.lr="),
        (["distill", *PAIR, *DIGITS, "--set", "lr=1"], '"lr"', '"optim.lr"'),
        (["distill", *PAIR, *DIGITS, "--device", "cuda:x"], "--device cuda:x: device", '"cuda:0"'),
        (["distill", *PAIR, *DIGITS, "--threads", "99999"], "--threads 99,999", "at most"),
        (["distill", *PAIR], '"data_dir" is missing', "a folder, an .npz file, or digits"),
        (["distill", *PAIR, *DIGITS, "-c", "absent.yaml"], "absent.yaml does not exist", "fix:"),
        (["distill", *PAIR, *DIGITS, "--plan", "absent.yaml"], "absent.yaml does not", "fix:"),
        (["export", "student.pt", "x.onnx", "--opset", "11"], "opset 11", "18"),
        (["export", "student.pt", "x.onnx", "--tolerance", "nan"], "--tolerance nan", "1e-5"),
        (["export", "student.pt", "x.onnx", "--int8"], "calibrated on images", "--calib-data"),
        (["eval", "student.pt"], "nothing to measure on", "--data-dir"),
        (["runs", "absent"], "absent holds no run folders", "fix:"),
        (["demo", "-o", "."], "is not empty", "--output"),
    ],
)
def test_a_mistaken_command_line_is_answered_with_the_way_out(arguments, what, fix, refused):
    refused(arguments, 2, what, fix)


def test_all_mistakes_of_a_command_line_are_listed_together(refused):
    flags = ["--opt", "adamx", "--epochs", "0", "--set", "loss.temperatur=2", "--set", "optim.lr=a"]
    text = refused(["distill", *PAIR, *DIGITS, *flags], 2, 'did you mean "loss.temperature"?')
    for line in ("--epochs 0: epochs must be", 'did you mean "adamw"?', "--set optim.lr=a"):
        assert line in text


def test_five_mistakes_of_a_file_are_listed_together_with_their_lines(refused):
    Path("run.yaml").write_text(
        "epochs: three\nseed: 1\noptim:\n  lerning_rate: 1\n  opt: adamm\nloss:\n"
        "  temperature: -1\nseed: 2\n"
    )
    lines = (
        "run.yaml:1: epochs must be a whole number",
        'run.yaml:4: unknown key "optim.lerning_rate"; did you mean "optim.lr"?',
        'run.yaml:5: optim.opt must be "sgd" or "adamw", not "adamm"; did you mean "adamw"?',
        "run.yaml:7: loss.temperature must be a number above 0, not -1",
        'run.yaml:8: the key "seed" is given twice (first on line 2)',
    )
    refused(["distill", *PAIR, *DIGITS, "-c", "run.yaml", "-o", "new"], 2, *lines)


def test_a_tag_in_a_file_runs_nothing(refused):
    Path("run.yaml").write_text("epochs: !!python/object/apply:os.mkdir [EXECUTED]\n")
    refused(["distill", *PAIR, *DIGITS, "-c", "run.yaml"], 2, "run.yaml:1", "without tags")


def test_control_characters_never_reach_the_terminal(refused):
    text = refused(["inspect", "a\x1b[2J.pt"], 3, r"a\x1b[2J.pt does not exist")
    assert "\x1b" not in text


# ── models that do not fit ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "verb"),
    [
        *product(["map", "vector"], ["teacher", "student", "export", "eval"]),
        *product(["features", "maps"], ["teacher", "student", "eval"]),
        *product(["vector", "class", "nothing", "text"], ["inspect"]),
    ],
)
def test_a_model_that_gives_anything_but_logits_is_refused(kind, verb, refused):
    net = f"py:nets.py:Net,kind={kind}"
    size = ("--input-size", "1,8,8")
    arguments = {
        "teacher": ["partition", net, "student.pt", *size, "-o", "plan.yaml"],
        "student": ["distill", "teacher.pt", net, *QUICK, "-o", "new"],
        "export": ["export", net, "x.onnx", *size],
        "eval": ["eval", net, *DIGITS],
        "inspect": ["inspect", net, *size],
    }[verb]
    refused(arguments, 2, "one tensor of logits (batch, classes)", "wrap it in a module")


@pytest.mark.parametrize("verb", ["partition", "eval"])
def test_a_model_for_one_batch_size_only_is_refused(verb, refused):
    net = "py:nets.py:Net,kind=two"
    rest = {"partition": ["student.pt", "--input-size", "1,8,8"], "eval": DIGITS}[verb]
    refused([verb, net, *rest], 2, "does not take 3 samples of 1×8×8", "batch size must stay free")


@pytest.mark.parametrize(
    "net, what",
    [
        ("Branches", "the model branches on the values of a tensor"),
        ("Reads", "the model turns into Python numbers the values of a tensor"),
        ("Picks", "the shape of a tensor depends on the values of another"),
    ],
)
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_model_that_depends_on_values_is_refused_with_its_line(side, net, what, refused):
    net = f"py:nets.py:{net}"
    pair = [net, "student.pt"] if side == "teacher" else ["teacher.pt", net]
    arguments = ["partition", *pair, "--input-size", "1,8,8", "-o", "plan.yaml"]
    refused(arguments, 2, what, "where:", "nets.py:", "move the decision out of forward")


def test_a_model_whose_weights_have_no_shape_yet_is_refused(refused):
    arguments = ["inspect", "py:nets.py:lazy", "--input-size", "1,8,8"]
    refused(arguments, 2, "weights without a shape yet", "run the model once on real inputs first")


@pytest.mark.parametrize(
    "net, why, fix",
    [
        ("half", "Input type (float)", "weights are float16: give inputs of float16"),
        ("TwoInputs", "'age'", 'give them by name: {"image": …, "age": …}'),
    ],
)
def test_a_model_that_cannot_run_on_images_alone_is_told_what_it_needs(net, why, fix, refused):
    arguments = ["inspect", f"py:nets.py:{net}", "--input-size", "1,8,8"]
    refused(arguments, 2, "does not accept an input of shape 1×8×8 in float32", why, fix)


def test_a_pair_without_a_boundary_in_common_is_offered_plain_distillation(refused, capsys):
    pair = ["teacher.pt", "py:nets.py:Vectors"]
    assert main(["partition", *pair, "--explain"]) == 0
    assert "vectors were allowed" in capsys.readouterr().out
    pair = ["py:nets.py:Vectors", "py:nets.py:Places"]
    words = ("Vectors and Places have no boundary in common", "vector at its cut points", "map at")
    fix = "plain distillation instead: --method kd"
    refused(["partition", *pair, "--input-size", "1,8,8"], 2, *words, fix)
    pair = ["teacher.pt", "py:nets.py:Places"]
    assert main(["distill", *pair, *QUICK, "--method", "kd", "-o", "new"]) == 0
    assert "student/last.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    "verb, what",
    [
        ("inspect", "Sounds does not accept an input of shape 1×8×8"),
        ("partition", "Sounds does not accept an input of shape 1×8×8"),
        ("export", "Sounds does not take 3 samples of 1×8×8"),
        ("benchmark", "does not take an input of shape"),
        ("eval", "Sounds does not take 3 samples of 1×8×8"),
    ],
)
def test_a_model_of_other_things_than_images_is_sent_to_python(verb, what, refused):
    rest = {"partition": ["student.pt"], "export": ["x.onnx"], "eval": DIGITS}.get(verb, [])
    size = [] if verb == "eval" else ["--input-size", "1,8,8"]
    words = ("--input-size C,H,W", "hands over images alone; other inputs are given in Python")
    refused([verb, "py:nets.py:Sounds", *rest, *size], 2, what, *words)


def test_a_model_that_overwrites_its_input_is_no_bad_input(capsys):
    arguments = ["partition", "teacher.pt", "py:nets.py:Overwrites", "--input-size", "1,8,8"]
    assert main(arguments) == 0, capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_logits_inside_of_a_dict_or_a_tuple_are_found(kind, capsys):
    net = f"py:nets.py:Net,kind={kind}"
    assert main(["inspect", net, "--input-size", "1,8,8"]) == 0
    shown = capsys.readouterr().out
    assert ("lost in the trace: outputs other than 0: 1" in shown) == (kind == "tuple")
    assert main(["partition", "teacher.pt", net, "--input-size", "1,8,8"]) == 0
    assert main(["distill", "teacher.pt", net, *QUICK, "-o", "new"]) == 0
    assert main(["eval", net, *DIGITS]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["partition", *PAIR, "--input-size", "3,8,8"],
        ["distill", *PAIR, *QUICK, "--input-size", "3,8,8", "-o", "new"],
        ["inspect", "teacher.pt", "--input-size", "3,8,8"],
        ["eval", "teacher.pt", *DIGITS, "--input-size", "3,8,8"],
        ["export", "teacher.pt", "x.onnx", *DIGITS, "--input-size", "3,8,8"],
        ["benchmark", "teacher.pt", "--input-size", "3,8,8"],
    ],
)
def test_a_wrong_input_shape_is_refused(arguments, refused):
    refused(arguments, 2, "1 channels, but got 3 channels")


def test_an_unknown_input_size_is_asked_for(refused):
    arguments = ["partition", "weights.pt", "demo/student", "--teacher-arch", "demo/teacher"]
    refused(arguments, 2, "the input size of weights is not known", "--input-size C,H,W")


@pytest.mark.parametrize(
    "arguments, what",
    [
        (
            ["partition", "teacher.pt", "demo/student,num_classes=7"],
            "has 10 classes, student has 7",
        ),
        (["distill", "teacher.pt", "demo/student,num_classes=7", *QUICK], "student has 7"),
        (["distill", *PAIR, "--data-dir", "three.npz"], "teacher has 10 classes, three"),
        (["eval", "demo/student,num_classes=7", *DIGITS], "student has 7 classes, digits"),
        (["export", "demo/student,num_classes=7", "x.onnx", *DIGITS], "student has 7 classes"),
    ],
)
def test_class_counts_that_differ_are_both_named(arguments, what, refused):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (30, 8, 8), dtype=np.uint8)
    np.savez("three.npz", images=images, labels=np.arange(30) % 3)
    refused(arguments, 2, what, "fix:")


def test_a_student_larger_than_its_teacher_is_warned_of_and_trained(capsys, trained):
    small = str(trained / "student" / "last.safetensors")
    assert main(["partition", small, "teacher.pt", "-o", "plan.yaml"]) == 0
    text = capsys.readouterr().err
    assert "warning: teacher is larger than last" in text
    assert "Did you swap the two?" in text
    assert Path("plan.yaml").is_file()


def test_a_teacher_near_chance_stops_the_run(refused):
    swapped = {"teacher.pt": torch.load("teacher.pt", weights_only=True)}
    swapped["teacher.pt"]["state_dict"]["head.weight"].neg_()
    torch.save(swapped["teacher.pt"], "upside-down.pt")
    arguments = ["distill", "upside-down.pt", "student.pt", *QUICK, "-o", "new"]
    refused(arguments, 5, "near chance (10.0%)", "check the teacher file", "--mean")


IMAGES = torch.zeros(2, 1, 8, 8)
BATCHES = [(IMAGES, torch.tensor([3, 9]))]


class TwoInputs(nn.Module):
    """Reads an image and two numbers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 10)

    def forward(self, image, age):
        return self.head(self.body(self.stem(image) + age[:, :1, None, None]).mean((2, 3)))


@pytest.mark.parametrize(
    "example, words",
    [
        ({"image": IMAGES}, ("does not accept inputs of shapes 1×8×8 (image)", "image, age")),
        (IMAGES, ("does not accept an input", '{"image": …, "age": …}')),
        ({"image": IMAGES, "ago": IMAGES}, ("no input called ago", 'did you mean "age"?')),
        ({"image": IMAGES, "x": IMAGES}, ("no input called x", "takes: image, age")),
        ({"image": IMAGES, "age": 3}, ("age in the example input", "of type int, not a tensor")),
        ({}, ("is empty", "takes: image, age")),
        ((IMAGES, IMAGES), ("is a tuple of 2 values", "several as {name: tensor}")),
        (None, ("is nothing", "give one batch as a tensor")),
    ],
)
def test_inputs_that_are_missing_or_misnamed_are_named(example, words):
    with pytest.raises(TraceError) as error:
        partition(TwoInputs(), TwoInputs(), example)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "example, words",
    [
        (IMAGES[0], ("input of shape 8×8 in float32", "the first axis counts the samples")),
        (IMAGES.double(), ("1×8×8 in float64", "weights are float32: give inputs of float32")),
        (IMAGES.long(), ("1×8×8 in int64", "weights are float32: give inputs of float32")),
        (IMAGES.expand(2, 3, 8, 8), ("3×8×8 in float32", "--input-size C,H,W")),
    ],
)
def test_an_example_of_another_shape_or_dtype_is_refused(example, words):
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    net = nn.Sequential(*layers)
    with pytest.raises(TraceError) as error:
        partition(net, build("student"), example)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "pairs, words",
    [
        (
            [("pool", "pool"), ("stem.2", "stem.2")],
            ("boundaries of teacher cross", "stem.2 does not"),
        ),
        ([("pool", "pool"), ("pool", "pool")], ("pool of teacher is given twice", "leave one")),
        ([("stem.2", "pool"), ("pool", "pool")], ("pool of student is given twice", "leave one")),
        ([("stages.0.conv1", "stem.2")], ("cannot be cut at stages.0.conv1", "still needed there")),
        ([("stages.0.relu_1", "pool"), ("pool", "stem.2")], ("boundaries of student cross",)),
    ],
)
def test_named_pairs_that_cannot_be_boundaries_are_refused(pairs, words):
    with pytest.raises(PlanError) as error:
        partition(build("teacher"), build("student"), IMAGES, pairs=pairs)
    for word in words:
        assert word in str(error.value)


def test_models_of_different_classes_are_both_counted():
    with pytest.raises(AlignmentError) as error:
        partition(build("teacher"), build("student", num_classes=7), IMAGES)
    assert "teacher has 10 classes, student has 7." in str(error.value)
    assert "num_classes=10" in str(error.value)


@pytest.mark.parametrize(
    "flags, what, fix",
    [
        (["--budget", "0.5x"], "--budget 0.5x is not a multiple", "--budget 1.5x"),
        (["--budget", "nan"], "--budget nan is not a multiple", "--budget 1.5x"),
        (["--budget", "cheap"], "--budget cheap is not a multiple", "--budget 1.5x"),
        (["--budget", "1.0001"], "no stone fits a budget of 1.0001 ×", "--method kd"),
        (["--adapter-parameters", "0"], "--adapter-parameters", "--help"),
        (["--adapter-parameters", "7"], "has as few as 7 parameters", "or more"),
        (["--probe", "16"], "--probe compares the models on images", "--data-dir"),
        (["--probe", "0", *DIGITS], "--probe", "--help"),
        (["--probe", "7", *DIGITS], "the probe holds 7 samples, too few", "give 8 or more"),
        (["--probe", "99999", *DIGITS], "--probe 99,999 asks for more images", "1347 or fewer"),
        (["--probe", "8", *DIGITS, "--pair", "pool=pool"], "does not go with --pair", "leave out"),
        (["--probe", "8", *DIGITS, "--plan", "plan.yaml"], "does not go with --plan", "leave out"),
        (
            ["--adapter-parameters", "99", "--plan", "plan.yaml"],
            "--plan and --adapter-parameters exclude each other",
            "edit adapter and rank there",
        ),
    ],
)
def test_wishes_for_a_plan_that_cannot_be_met_are_refused(flags, what, fix, refused):
    refused(["partition", *PAIR, *flags, "-o", "new.yaml"], 2, what, fix)


@pytest.mark.parametrize(
    "flags, what",
    [
        (["--budget", "0.5x"], "--budget 0.5x is not a multiple"),
        (["--budget", "1.0001"], "no stone fits a budget of 1.0001 ×"),
        (["--budget", "2x", "--stones", "last-2"], "--budget and --stones exclude each other"),
        (["--set", "budget=0.5"], "budget must be a number of 1 or more"),
    ],
)
def test_a_run_with_an_impossible_budget_is_refused(flags, what, refused):
    refused(["distill", *PAIR, *QUICK, *flags, "-o", "new"], 2, what)


@pytest.mark.parametrize(
    "loss, flags, what, fix",
    [
        ({"stones": [1, 9]}, [], "the plan has no stone of depth 9", "change loss.stones,"),
        (
            {"stone_schedule": [[0.5, [9]]]},
            [],
            "the plan has no stone of depth 9",
            "change loss.stone_schedule,",
        ),
        ({"stones": "last-9"}, [], "loss.stones is last-9, but the plan has 4 ", "last-4 or fewer"),
        (
            {"stone_schedule": [[0.2, "last-1"], [0.5, "last-9"]]},
            [],
            "loss.stone_schedule is last-9, but the plan has 4 stones",
            "last-4 or fewer",
        ),
        (
            {"stones": "drop-first"},
            ["--blocks", "1"],
            "loss.stones is drop-first, but the plan has 1 stone of",
            "last-1, or plan more blocks with --blocks",
        ),
    ],
)
def test_stones_that_the_plan_lacks_are_refused(loss, flags, what, fix, refused):
    Path("run.yaml").write_text(json.dumps({"loss": loss}))
    refused(["distill", *PAIR, *QUICK, "-c", "run.yaml", *flags, "-o", "new"], 2, what, fix)
    ((key, value),) = loss.items()
    setting = ["--set", f"loss.{key}={json.dumps(value)}"]
    refused(["distill", *PAIR, *QUICK, *setting, *flags, "-o", "new"], 2, what, fix)
    teacher, student = build("teacher"), build("student")
    plan = partition(teacher, student, IMAGES, blocks=int(flags[1]) if flags else "auto")
    with pytest.raises(PlanError) as error:
        distill(teacher, student, BATCHES, plan=plan, recipe=Recipe(loss=loss))
    assert what in str(error.value) and fix in str(error.value)


@pytest.mark.parametrize("verb", ["partition", "distill"])
@pytest.mark.parametrize(
    "weight, what, fix",
    [
        ("0.0", "edited.yaml: every weight is 0", "or leave the plan out"),
        ("-1", "edited.yaml: the weight of boundary 1 is -1", "0 or more, below 1,000,000"),
        (".nan", "edited.yaml: the weight of boundary 1 is nan", "0 or more, below 1,000,000"),
        (".inf", "edited.yaml: the weight of boundary 1 is inf", "0 or more, below 1,000,000"),
        ("1e6", "edited.yaml: the weight of boundary 1 is 1000000.0", "below 1,000,000"),
    ],
)
def test_weights_of_a_plan_that_cannot_be_meant_are_refused(verb, weight, what, fix, plan, refused):
    text, count = re.subn(r"weight: [\d.]+", f"weight: {weight}", plan.read_text())
    assert count == 4
    Path("edited.yaml").write_text(text)
    rest = {"partition": ["-o", "new.yaml"], "distill": [*QUICK, "-o", "new"]}[verb]
    refused([verb, *PAIR, "--plan", "edited.yaml", *rest], 2, what, fix)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "1", True, None])
def test_a_stone_is_never_made_with_such_a_weight(weight):
    plan = partition(build("teacher"), build("student"), IMAGES)
    with pytest.raises(PlanError, match="the weight of boundary 2 is") as error:
        replace(plan.stones[1], weight=weight)
    assert "0 or more, below 1,000,000" in error.value.notes["fix"]


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize("key", ["ce_weight", "kd_weight", "cross_weight", "temperature"])
def test_a_number_of_the_loss_that_cannot_be_meant_is_refused(key, value, refused):
    flag = f"--{key.replace('_', '-')}"
    must = f"loss.{key} must be a number "
    arguments = ["distill", *PAIR, *QUICK, "-o", "new"]
    refused([*arguments, flag, value], 2, flag, must)
    written = value if value == "-1" else f".{value}"
    refused([*arguments, "--set", f"loss.{key}={written}"], 2, must, f"not {written}")
    Path("run.yaml").write_text(f"loss:\n  {key}: {written}\n")
    refused([*arguments, "-c", "run.yaml"], 2, "run.yaml:2", must)
    with pytest.raises(ConfigError, match=must):
        Recipe(loss={key: float(value)})


def test_a_distance_that_is_not_installed_is_refused_and_those_that_are_get_named(refused):
    arguments = ["distill", *PAIR, *QUICK, "-o", "new", "--distance"]
    words = ('no distance is called "absent"', "installed: dist, dkd, jsd, kl, lskd")
    refused([*arguments, "absent"], 2, *words)
    refused([*arguments, "lsdk"], 2, 'no distance is called "lsdk"', 'did you mean "lskd"?')
    with pytest.raises(ConfigError) as error:
        Recipe(loss={"distance": "absent"})
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "old, new, what, fix",
    [
        ("plan: 2", "plan: 1", "is a plan of version 1; this reads 2", "make a new plan"),
        ("plan: 2", "plan: 99", "is a plan of version 99; this reads 2", "update kdsurgeon"),
        ("plan: 2", "plan: two", "is a plan of version two; this reads 2", "write plan: 2"),
        ("plan: 2", "paln: 2", "unknown: paln", 'did you mean "plan"?'),
        ("plan: 2", "plan: 2\nfoo: 1", "unknown: foo", "leave out what is unknown"),
        ("plan: 2", "plan: 2\nplan: 2", "is given twice", "mend what is named above"),
        ("boundaries:", "shores:", "missing: boundaries", "make a new plan"),
        ("teacher: pool", "teacher: pol", "has no node pol", 'did you mean "pool"?'),
        ("teacher: pool", "teacher: 3", "the teacher of boundary 4 is 3, not a name", '"3"'),
        ("teacher: pool", "taecher: pool", "missing: teacher", 'did you mean "teacher"?'),
        ("weight: 0.25", "weight: heavy", "the weight of boundary 2 is 'heavy'", "0 or more"),
        ("weight: 0.25", "weight: .nan", "the weight of boundary 2 is nan", "0 or more"),
        (
            "adapter: conv",
            "adapter: cnov",
            'plan.yaml: boundary 1: no adapter is called "cnov"',
            'did you mean "conv"?',
        ),
        (
            "adapter: conv",
            "adapter: 5",
            'plan.yaml: boundary 1: no adapter is called "5"',
            "known: identity, conv, downsample, upsample, resize, linear",
        ),
        (
            "adapter: conv  #",
            "adapter:  #",
            "plan.yaml: boundary 1: the adapter is empty",
            "use conv, or leave the line out",
        ),
        ("adapter: conv", "adapter: upsample", "plan.yaml: boundary 1: the adapter", "use conv"),
        ("adapter: conv", "adapter: [conv, conv]", "needs 1 adapter, one", "adapter: conv"),
        ("adapter: conv", "rank: 0", "the rank of boundary 1 is 0", "1 or more"),
        ("adapter: conv", "rank: 99", "boundary 1: the adapter conv cannot", "give 1 to 8"),
        ("adapter: conv", "rnak: 3", "unknown: rnak", 'did you mean "rank"?'),
        (
            "teacher: stages.0.relu_1",
            "teacher: stages.1.relu_1",
            "stages.1.relu_1 of teacher is given twice",
            "leave one of the two out",
        ),
        (
            "teacher: stages.1.relu_1",
            "teacher: stages.1.conv1",
            "cannot be cut at stages.1.conv1",
            "kdsurgeon inspect",
        ),
        ("boundaries:", "boundaries: [", "not valid YAML", "mend what is named above"),
    ],
)
def test_a_plan_edited_by_mistake_is_refused(old, new, what, fix, plan, refused):
    assert old in plan.read_text()
    plan.write_text(plan.read_text().replace(old, new, 1))
    text = refused(["partition", *PAIR, "--plan", "plan.yaml"], 2, what, fix)
    assert "fix:" in text


SHARES = torch.full((2, 10), 0.1)
HALF = SHARES.clone()
HALF[1, 3] = 0.6
BELOW = torch.eye(10)[:2] * 1.2 - 0.02
HOLE = SHARES.clone()
HOLE[1, 3] = float("nan")


@pytest.mark.parametrize("method", ["ce", "kd", "block-kd"])
@pytest.mark.parametrize(
    "labels, words",
    [
        (SHARES[:, :7], ("shares of 7 classes; the models have 10", "(batch, classes)")),
        (HALF, ("shares of 10 classes: those of sample 1 sum to 1.5", "0 or more that sum to 1")),
        (BELOW, ("those of sample 0 sum to 1, the least of them is -0.02", "class indices")),
        (HOLE, ("those of sample 1 sum to nan", "0 or more that sum to 1")),
        (SHARES[:1], ("holds 1 labels for inputs of another number", "one label for each sample")),
        (torch.tensor([1]), ("holds 1 labels for inputs of another number", "given: 2")),
        (torch.tensor([1, 10]), ("a label is 10; the models have 10 classes", "ignore_index")),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_the_first_step(labels, words, method):
    with pytest.raises(UsageError) as error:
        recipe = Recipe(method=method)
        distill(build("teacher"), build("student"), [(IMAGES, labels)], recipe=recipe)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_shares_may_be_rounded_as_bfloat16_rounds_them():
    shares = torch.zeros(2, 10)
    shares[:, 0], shares[:, 1] = 0.9, 0.1
    rounded = shares.bfloat16().float()
    assert (rounded.sum(1) - 1).abs().max() > 1e-3
    epochs = distill(
        build("teacher"), build("student"), [(IMAGES, rounded)], recipe=Recipe(epochs=1)
    )
    assert len(list(epochs)) == 1


def test_a_distance_that_needs_class_indices_says_so_before_the_first_step():
    recipe = Recipe(loss={"distance": "dkd"})
    with pytest.raises(UsageError, match="dkd needs the right class") as error:
        distill(build("teacher"), build("student"), [(IMAGES, SHARES)], recipe=recipe)
    assert "--distance kl" in error.value.notes["fix"]


class Answers(nn.Module):
    """Ten logits, or what ``answer`` makes of them and of the map before them."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        places = self.stem(x)
        return self.answer(self.head(places.mean((2, 3))), places)


@pytest.mark.parametrize("method", ["kd", "block-kd"])
@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize(
    "answer",
    [
        lambda logits, places: places,
        lambda logits, places: {"features": places},
        lambda logits, places: {"class": logits.argmax(1)},
        lambda logits, places: (places, logits),
        lambda logits, places: (places, places),
        lambda logits, places: (),
        lambda logits, places: logits[:, None].expand(-1, 3, -1),
        lambda logits, places: logits.sum(),
        lambda logits, places: None,
    ],
)
def test_what_is_no_logits_is_refused_before_the_first_step(answer, side, method):
    pair = {"teacher": build("teacher"), "student": build("student")}
    pair[side] = Answers(answer)
    with pytest.raises(UsageError) as error:
        distill(**pair, batches=BATCHES, recipe=Recipe(method=method))
    words = (f"{side} does not return one tensor of logits", "returned:", "wrap it in a module")
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"recipe": {"epochs": 1}}, ("the recipe is of type dict", "kdsurgeon.Recipe(")),
        ({"plan": "plan.yaml"}, ("the plan is of type str", "kdsurgeon.partition(")),
        ({"batches": iter(BATCHES)}, ("type list_iterator, cannot", "give a DataLoader")),
        ({"batches": 3}, ("type int, cannot be gone through", "give a DataLoader")),
        ({"teacher": "teacher.pt"}, ("teacher is of type str, not a torch.nn.Module",)),
    ],
)
def test_arguments_of_another_type_are_refused(given, words):
    rest = {"teacher": build("teacher"), "student": build("student"), "batches": BATCHES}
    with pytest.raises(UsageError) as error:
        distill(**rest | given)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_boundaries_of_a_plan_in_another_order_cross(plan, refused):
    head, first, second, *rest = plan.read_text().split("  - teacher:")
    plan.write_text("  - teacher:".join([head, second, first, *rest]))
    refused(["partition", *PAIR, "--plan", "plan.yaml"], 2, "boundaries of teacher cross", "list")


@pytest.mark.parametrize("text", ["[]", "{a: 1}", "none"])
def test_a_plan_without_boundaries_is_refused(text, plan, refused):
    head, _ = plan.read_text().split("boundaries:")
    plan.write_text(f"{head}boundaries: {text}\n")
    words = ("plan.yaml lists no boundaries", "write at least one below")
    refused(["partition", *PAIR, "--plan", "plan.yaml"], 2, *words)


def test_a_folder_is_no_plan(refused, trained):
    Path("empty").mkdir()
    refused(["partition", *PAIR, "--plan", "empty"], 2, "empty is a folder", "FOLDER/plan.yaml")
    refused(["partition", *PAIR, "--plan", trained], 2, "is a folder", f"{trained / 'plan.yaml'}")


def test_a_plan_for_other_models_is_refused(refused, trained):
    other = ["distill", "teacher.pt", "py:nets.py:Net", *QUICK, "--plan", trained / "plan.yaml"]
    refused(other, 2, "plan.yaml was made for another student", "kdsurgeon partition")


def test_a_plan_for_images_of_another_size_is_refused(refused, trained):
    larger = ["partition", *PAIR, "--input-size", "1,16,16", "--plan", trained / "plan.yaml"]
    refused(larger, 2, "made for another teacher", "images of another size", "make a new plan")


def test_a_plan_and_a_number_of_blocks_exclude_each_other(refused, trained):
    both = ["--plan", trained / "plan.yaml", "--blocks", "3"]
    refused(["distill", *PAIR, *QUICK, *both], 2, "a plan and 3 blocks", "leave one out")
    refused(["partition", *PAIR, *both], 2, "exclude each other", "leave out --blocks")


# ── data ─────────────────────────────────────────────────────────────────────────────────────────


def draw_classes(folder, names, count=4):
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            image = generator.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{index}.png")


def no_images(folder):
    for name in "ab":
        (folder / name).mkdir(parents=True)
        (folder / name / "notes.txt").write_text("no image")


def corrupt_images(folder):
    draw_classes(folder, [f"class{index}" for index in range(10)])
    (folder / "class1" / "0.png").write_bytes(b"junk")
    (folder / "class2" / "1.png").write_bytes(b"")


DATA = {
    "missing": (lambda path: None, "does not exist", "a folder, an .npz file, digits, or"),
    "empty": (lambda path: path.mkdir(), "has no class folders", "where:"),
    "no images": (no_images, "has no images", ".png"),
    "one class": (lambda path: draw_classes(path, ["only"]), "one class only, only", "two classes"),
    "corrupt": (corrupt_images, "2 of 40 images cannot be read", "--max-bad-images 2"),
    "npz": (lambda path: path.write_bytes(b"PK\x03\x04"), "data.npz", "copy or download it again"),
}


@pytest.mark.parametrize("verb", ["distill", "eval", "export"])
@pytest.mark.parametrize("kind", DATA)
def test_data_that_cannot_be_used_is_refused(kind, verb, refused):
    make, what, fix = DATA[kind]
    name = "data.npz" if kind == "npz" else "data"
    make(Path(name))
    arguments = {
        "distill": ["distill", *PAIR, "--data-dir", name, "-o", "new"],
        "eval": ["eval", "teacher.pt", "--data-dir", name],
        "export": ["export", "teacher.pt", "x.onnx", "--data-dir", name],
    }[verb]
    refused(arguments, 4, what, fix)


@pytest.mark.parametrize(
    "line",
    [
        ["distill", *PAIR, "--dry-run"],
        ["eval", "teacher.pt"],
        ["partition", *PAIR, "--probe", "16"],
        ["export", "teacher.pt", "x.onnx"],
    ],
    ids=lambda line: line[0],
)
def test_corrupt_images_are_named_and_left_out_only_when_allowed(line, refused, capsys):
    corrupt_images(Path("data"))
    arguments = [*line, "--data-dir", "data"]
    refused([*arguments, "--max-bad-images", "1"], 4, "class1/0.png", "class2/1.png")
    code = main([*arguments, "--max-bad-images", "2"])
    text = capsys.readouterr().err
    assert code == (5 if line[0] == "distill" else 0), text  # the teacher knows no noise
    assert "left out class1/0.png" in text and "left out class2/1.png" in text


# ── training ─────────────────────────────────────────────────────────────────────────────────────


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(refused):
    steps = ["--epochs", "2", "-b", "2000", "--opt", "sgd", "--warmup-epochs", "0"]
    arguments = ["distill", *PAIR, *DIGITS, *steps, "--lr", "1e36", "-o", "new"]
    refused(arguments, 5, "step 2: the loss is nan", "epoch 2, batch 1", "lower --lr", writes=True)
    assert [line["epoch"] for line in read_metrics(Path("new"))] == [1]
    kept = sorted(Path("new/checkpoints").iterdir())[-1]
    assert kept.name == "step-000001"
    student = read_checkpoint(kept).tensors["student"]
    assert all(values.isfinite().all() for values in student.values())
    saved = load_model("new/student/last.safetensors").model.state_dict()
    assert saved.keys() == build("student").state_dict().keys()


def test_weights_that_are_not_finite_stop_the_run_at_its_first_step(refused):
    arguments = ["distill", "teacher.pt", "py:nets.py:broken", *QUICK, "-o", "new"]
    told = "after step 0 the model holds weights that are not finite; nothing was saved"
    refused(arguments, 5, told, "student.stem.0.weight", writes=True)
    assert read_metrics(Path("new")) == []


def test_a_run_folder_that_cannot_be_made_is_refused(refused):
    refused(["distill", *PAIR, *QUICK, "-o", "/proc/new"], 6, "/proc/new", "--output")


@pytest.mark.parametrize(
    "arguments",
    [
        ["partition", *PAIR, "--svg", "/proc/plan.svg"],
        ["export", "student.pt", "/proc/x.onnx", *DIGITS],
        ["convert", "weights.pt", "/proc/x.safetensors"],
    ],
)
def test_a_place_that_cannot_be_written_is_refused(arguments, refused):
    refused(arguments, 6, "error:", "fix:")


class FullDisk:
    """``os.fsync`` on a disk that is full from the n-th call on."""

    def __init__(self, calls):
        self.left = calls
        self.works = os.fsync

    def __call__(self, descriptor):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.works(descriptor)


@pytest.mark.parametrize(
    "arguments",
    [
        ["partition", *PAIR, "-o", "plan.yaml"],
        ["export", "student.pt", "x.onnx"],
        ["distill", *PAIR, *QUICK, "-o", "new"],
    ],
)
def test_a_full_disk_leaves_nothing_half_written(arguments, refused, monkeypatch):
    monkeypatch.setattr(os, "fsync", FullDisk(0))
    refused(arguments, 6, "No space left on device", "fix:", writes="distill" in arguments)
    left = [path.name for path in Path().rglob("*") if path.is_file()]
    assert not {"plan.yaml", "x.onnx", "config.yaml"} & set(left)
    assert not [name for name in left if "tmp" in name]


def test_a_run_whose_disk_fills_up_goes_on_when_there_is_room_again(refused, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", FullDisk(30))
        text = refused(
            ["distill", *PAIR, *DIGITS, "--epochs", "3", "-b", "256", "-o", "new"], 6, writes=True
        )
    assert "No space left on device" in text
    assert len(read_metrics(Path("new"))) < 3
    assert not list(Path("new").rglob("*tmp*"))
    assert main(["distill", "--resume", "new"]) == 0
    assert [line["epoch"] for line in read_metrics(Path("new"))] == [1, 2, 3]


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_that_holds_a_run_is_not_overwritten(run, refused):
    arguments = ["distill", *PAIR, *QUICK, "-o", run]
    refused(arguments, 2, "already holds a run", "kdsurgeon distill --resume")


def test_a_run_folder_in_use_is_refused(run, refused):
    with Run.resume(run):
        refused(["distill", "--resume", run], 6, "in use by another run", f"process {os.getpid()}")
    with Run.create("begun"):
        refused(["distill", *PAIR, *QUICK, "-o", "begun"], 6, "in use", "--output")


def test_only_a_run_is_resumed(refused):
    Path("empty").mkdir()
    for folder in ("absent", "empty", "student.pt"):
        refused(["distill", "--resume", folder], 2, f"{folder} holds no run", "fix:")


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--dry-run"], "dry-run"),
        (["-o", "new"], "output"),
        (["-c", "run.yaml"], "config"),
        (["teacher.pt"], "teacher"),
    ],
)
def test_a_resumed_run_is_the_one_in_its_folder(run, flags, named, refused):
    arguments = ["distill", *flags, "--resume", run]
    refused(arguments, 2, f"it does not take {named}.", "start a new run with another --output")


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--epochs", "1"], "epochs was 2, is 1"),
        (["--amp"], "amp was False, is True"),
        (["--set", "optim.lr=0.5", "--seed", "7"], "optim.lr was 0.001, is 0.5, seed was 0, is 7"),
        (["--threads", "2"], "threads was 1, is 2"),
        (["--model-ema"], "optim.model_ema was False, is True"),
    ],
)
def test_a_resumed_run_takes_no_setting_that_its_bits_depend_on(run, flags, named, refused):
    before = torch.get_num_threads()
    try:
        arguments = ["distill", "--resume", run, *flags]
        refused(arguments, 2, f"would not be the same: {named}.", "another --output")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("flags", [["--allow-change", "lr"], ["--allow-change", "thread,torch"]])
def test_only_threads_torch_world_size_and_device_can_be_allowed_to_change(run, flags, refused):
    refused(["distill", "--resume", run, *flags], 2, "names nothing that", "choose from threads")
    refused(["distill", *PAIR, *DIGITS, *flags], 2, "--allow-change is for a run that goes on")


def test_a_run_is_not_resumed_with_another_teacher(run, refused):
    file = torch.load("teacher.pt", weights_only=True)
    file["state_dict"]["head.bias"] += 0.5
    torch.save(file, "other.pt")
    config = run / "config.yaml"
    lines = config.read_text().splitlines()
    lines = ["teacher: other.pt" if line.startswith("teacher:") else line for line in lines]
    config.write_text("\n".join(lines))
    refused(["distill", "--resume", run], 2, "the teacher of this run changed", "put it back")


@pytest.mark.parametrize(
    "name, old, new, what",
    [
        ("config.yaml", "epochs: 2", "epochs: 1", "epochs was 2, is 1"),
        ("plan.yaml", "weight: 0.5", "weight: 0.75", "the plan of this run changed"),
        ("run.json", '"data": "', '"data": "0', "the data of this run changed"),
        ("run.json", '"threads": ', '"threads": 9999', "--threads 99,99"),
    ],
)
def test_a_run_edited_behind_its_back_is_not_resumed(run, name, old, new, what, refused):
    text = (run / name).read_text()
    assert old in text
    (run / name).write_text(text.replace(old, new))
    refused(["distill", "--resume", run], 2, what, "fix:")


@pytest.mark.parametrize("name", ["run.json", "plan.yaml", "config.yaml"])
@pytest.mark.parametrize("damage", ["gone", "cut", "junk"])
def test_a_run_that_lost_its_record_is_not_resumed(run, name, damage, refused):
    file = run / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_text(file.read_text()[:40] if damage == "cut" else "{junk")
    code = 3 if name == "run.json" else 2
    words = [] if name == "config.yaml" and damage == "gone" else [name]
    refused(["distill", "--resume", run], code, *words)


def test_metrics_that_a_killed_process_left_unfinished_do_not_count(run, capsys):
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + whole[:40])
    assert main(["runs", str(run.parent)]) == 0
    assert main(["distill", "--resume", str(run)]) == 0
    assert metrics.read_text() == whole


def test_metrics_that_are_damaged_are_named(run, refused):
    metrics = run / "metrics.jsonl"
    metrics.write_text("{junk\n" + metrics.read_text())
    refused(["distill", "--resume", run], 3, "metrics.jsonl is damaged", "not JSON")
    refused(["runs", run.parent], 3, "metrics.jsonl is damaged", "not JSON")


def damage(checkpoint):
    file = checkpoint / "student.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_aloud(run, trained, capsys):
    damage(sorted((run / "checkpoints").iterdir())[-1])
    assert main(["distill", "--resume", str(run)]) == 0
    assert "student.safetensors is changed. An older one is used." in capsys.readouterr().err
    assert [line["epoch"] for line in read_metrics(run)] == [1, 2]
    last = Path("student", "last.safetensors")
    assert (run / last).read_bytes() == (trained / last).read_bytes()


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(run, refused):
    for checkpoint in (run / "checkpoints").iterdir():
        damage(checkpoint)
    for verb in (["distill", "--resume", run], ["eval", run]):
        refused(verb, 3, "has no checkpoint that is whole", "student.safetensors is changed")


@pytest.mark.parametrize("method", ["kd", "ce"])
def test_runs_without_stones_are_resumed_and_measured_like_the_others(method, capsys):
    quick = ["--epochs", "1", "-b", "256", "--method", method]
    assert main(["distill", *PAIR, *DIGITS, *quick, "-o", "new"]) == 0
    assert main(["distill", "--resume", "new"]) == 0
    assert main(["eval", "new"]) == 0
    assert "student" in capsys.readouterr().out


def test_a_run_that_cannot_begin_leaves_no_folder(refused, monkeypatch, tmp_path):
    line = ["distill", *PAIR, *DIGITS, "--epochs", "1", "-b", "256", "-o", "barred"]
    monkeypatch.setitem(sys.modules, "mlflow", None)
    refused([*line, "--track", "mlflow"], 7, "the tracker mlflow cannot be opened")
    assert not Path("barred").exists()
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    refused([*line, "--opt", "lamb"], 2, "which cannot be imported", "--opt sgd")
    assert not Path("barred").exists()


@pytest.mark.parametrize("method", ["ce", "block-kd"])
def test_a_last_batch_of_one_image_is_refused_before_the_first_step(method, refused):
    line = [
        "distill",
        *PAIR,
        *DIGITS,
        "--epochs",
        "1",
        "-b",
        "673",
        "--method",
        method,
        "-o",
        "one",
    ]
    refused(line, 2, "leaves a process one image", "--batch-size 674, for example")


def test_parts_of_a_batch_that_would_change_its_norm_are_refused_before_the_run_begins(refused):
    line = ["distill", *PAIR, *DIGITS, "--epochs", "1", "--auto-batch", "-o", "parts"]
    refused(line, 2, "would change what batch normalisation computes", "--auto-batch-norm")


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(run, refused):
    shutil.rmtree(run / "checkpoints")
    words = "has trained, and its checkpoints are gone"
    refused(["distill", "--resume", run], 3, words, writes=True)  # an empty folder checkpoints
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_flags_that_a_run_would_ignore_are_refused(run, refused):
    words = ("is measured on its own data: --data-dir changes nothing", "best.safetensors")
    refused(["eval", run, *DIGITS], 2, *words)
    assert main(["eval", str(run / "student" / "best.safetensors"), *DIGITS]) == 0


def test_verify_names_the_file_that_changed(run, refused):
    damage(sorted((run / "checkpoints").iterdir())[-1])
    refused(["verify", run], 3, "student.safetensors is changed")
    refused(["verify", "absent"], 3, "absent has no MANIFEST.json")
    refused(["verify", "teacher.pt"], 3, "teacher.pt has no manifest beside it", "name a run")


def test_int8_that_loses_too_much_is_refused_with_both_figures(refused):
    uneven("teacher.pt", "uneven.pt")
    arguments = ["export", "uneven.pt", "x.onnx", "--calib-data", "digits", "--int8"]
    refused([*arguments, *DIGITS], 5, "loses too much", "agreement", "drop", "calibrate on more")


def test_an_error_as_json_is_one_object(capsys):
    assert main(["partition", "--json", "weights.pt", "student.pt"]) == 2
    found = json.loads(capsys.readouterr().err)
    assert found["code"] == 2
    assert found["error"].startswith("weights.pt holds weights only")
    assert "--teacher-arch" in found["fix"]
