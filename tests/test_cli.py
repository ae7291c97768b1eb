"""The command line as a user meets it: help, the whole road, Ctrl-C, plugins that stay asleep."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.main import get_command

import kdsurgeon
from kdsurgeon.checkpoints import load_model
from kdsurgeon.cli import app as application
from kdsurgeon.cli import main
from kdsurgeon.data import load
from kdsurgeon.demo import build
from kdsurgeon.recipe import RunConfig, write_yaml
from kdsurgeon.runs import read_metrics
from kdsurgeon.stones import Certificate

VERBS = get_command(application.app).commands
PAIR = ("teacher.pt", "student.pt")
DIGITS = ("--data-dir", "digits")
COMMAND = (sys.executable, "-m", "kdsurgeon")


@pytest.fixture(autouse=True)
def workplace(digit_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("PYTHONPATH", str(Path(kdsurgeon.__file__).parents[1]))
    for file in digit_models.iterdir():
        (tmp_path / file.name).symlink_to(file)


@pytest.fixture
def tell(capsys):
    """Run a command line that must succeed; what it printed."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        assert code == 0, told.err
        return told.out

    return run


def contents():
    return {path for path in Path().rglob("*") if "__pycache__" not in path.parts}


# ── help ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_shows_its_every_flag(verb, tell):
    shown = tell(verb, "--help")
    for parameter in VERBS[verb].params:
        for flag in [*parameter.opts, *parameter.secondary_opts]:
            if flag.startswith("--"):
                assert flag in shown
    assert VERBS[verb].help.splitlines()[0] in " ".join(shown.split())


def test_the_help_of_the_application_shows_every_verb(tell):
    shown = tell("--help")
    for verb in VERBS:
        assert f" {verb} " in shown
    assert "--debug" in shown and "--json" in shown


def test_a_bare_command_shows_the_help_and_counts_as_a_mistake(capsys):
    assert main([]) == 2
    assert "partition" in capsys.readouterr().out


def test_help_and_mistakes_are_answered_without_torch():
    lines = [[], ["--version"], ["plugins"], ["distill", "--epochs", "x"], ["runs", "absent"]]
    lines += [["distill", "--opt", "adamx"], ["partition", "a", "b", "--blocks", "none"]]
    lines += [[verb, "--help"] for verb in VERBS]
    script = (
        "import sys\nfrom kdsurgeon.cli import main\n"
        f"for line in {lines!r}:\n"
        "    main(line)\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_the_module_runs_as_the_command_does():
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"kdsurgeon {kdsurgeon.__version__}\n")


def test_flags_are_spelled_with_dashes_or_underscores(tell):
    dashes = tell("inspect", "demo/teacher", "--input-size", "1,8,8")
    assert tell("inspect", "demo/teacher", "--input_size", "1,8,8") == dashes
    assert "stages.0.relu_1" in dashes


def test_past_runs_are_compared_by_the_settings_in_which_they_differ(tell):
    for name, temperature in (("cold", 1), ("warm", 4)):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        settings = RunConfig(
            teacher="t.pt", student="s.pt", data_dir="digits", epochs=3, output=str(folder),
            loss={"temperature": temperature},
        )  # fmt: skip
        (folder / "config.yaml").write_text(write_yaml(settings.dump()))
        (folder / "run.json").write_text('{"teacher_accuracy": 0.9}')
        lines = [{"epoch": i, "accuracy": a, "seconds": 30} for i, a in ((1, 0.7), (2, 0.6))]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    for name in ("other", "third"):  # most are warm
        shutil.copytree(Path("runs") / "warm", Path("runs") / name)
    lines = [line.split() for line in tell("runs", "runs").splitlines()]
    assert lines[0] == ["run", "epochs", "best", "last", "teacher", "minutes"]
    assert lines[1] == ["cold", "2/3", "70.00%", "60.00%", "90.00%", "1.0"]
    assert lines[5:9] == [
        [],
        ["run", "unlike", "most"],
        ["cold", "temperature", "1.0"],
        ["other", "–"],
    ]


# ── errors and switches ──────────────────────────────────────────────────────────────────────────


def fail(error):
    def stand_in(*_):
        raise error

    return stand_in


@pytest.mark.parametrize(
    "error, code, words",
    [
        (RuntimeError("boom"), 1, "a fault of kdsurgeon: RuntimeError: boom"),
        (MemoryError(), 6, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: …"), 6, "not enough memory"),
        (OSError(28, "No space left on device", "x.bin"), 6, "x.bin: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted at once"),
    ],
)
def test_what_nobody_foresaw_is_one_line_and_a_code(error, code, words, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(Path.cwd()))
    monkeypatch.setattr("kdsurgeon.plugins.installed", fail(error))
    assert main(["plugins"]) == code
    text = capsys.readouterr().err
    assert words in text
    assert "Traceback" not in text
    reports = list(Path.cwd().glob("kdsurgeon-*.txt"))
    assert len(reports) == (code == 1)
    for report in reports:
        assert str(report) in text
        assert "Traceback" in report.read_text()


def test_debug_shows_where_it_happened(capsys):
    assert main(["inspect", "absent.pt", "--debug"]) == 3
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.splitlines()[-2] == "error: absent.pt does not exist."


def test_json_makes_an_error_one_object(capsys):
    assert main(["inspect", "absent.pt", "--json"]) == 3
    found = json.loads(capsys.readouterr().err)
    assert found == {"error": "absent.pt does not exist.", "code": 3, "fix": "check the path"}


def test_a_reader_who_has_seen_enough_is_no_fault_of_ours():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "plugins"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


# ── the whole road ───────────────────────────────────────────────────────────────────────────────


def test_the_whole_road_from_two_models_to_a_verified_onnx_file(tell):
    assert "stages.0.relu_1" in tell("inspect", "teacher.pt")
    pictures = ("--svg", "plan.svg", "--html", "plan.html")
    shown = tell("partition", *PAIR, "-o", "plan.yaml", *pictures, "--explain")
    assert "largest gap: teacher 0, student 0" in " ".join(shown.split())
    assert Path("plan.svg").read_text().startswith("<svg")
    assert "<svg" in Path("plan.html").read_text()

    quick = ("--epochs", "2", "--batch-size", "128")
    shown = tell("distill", *PAIR, *DIGITS, *quick, "--plan", "plan.yaml", "-o", "runs/one")
    assert "L = 1·[CE(S, y)" in shown
    assert "epoch 2/2" in shown
    run = Path("runs/one")
    assert (run / "plan.yaml").read_bytes() == Path("plan.yaml").read_bytes()
    for name in ("config.yaml", "run.json", "train.log", "report.html"):
        assert (run / name).stat().st_size > 0
    assert [line["epoch"] for line in read_metrics(run)] == [1, 2]
    assert json.loads((run / "run.json").read_text())["command"][0] == "kdsurgeon"

    shown = tell("eval", run)
    assert "stone 4" in shown and "teacher" in shown
    assert "accuracy" in tell("eval", run / "student" / "last.safetensors", *DIGITS)
    assert "2/2" in tell("runs", "runs")
    assert "files are what was written" in tell("verify", sorted(run.glob("checkpoints/*"))[-1])
    assert tell("verify", run).count("files are what was written") == 2

    shown = tell("export", run, "student.onnx", "--int8", "--no-int8-gate")
    assert "parity   gap" in shown and "dynamic batch" in shown and "ONNX int8" in shown
    figures = json.loads((run / "export" / "student.json").read_text())
    assert figures["ONNX fp32"]["bytes"] == Path("student.onnx").stat().st_size
    assert figures["ONNX fp32"]["accuracy"] == figures["PyTorch"]["accuracy"]
    shown = tell("benchmark", "student.pt", "student.onnx", "student.int8.onnx")
    assert len(re.findall(r"\d\.\d+ ms ", shown)) == 3  # one row each

    torch.save({"epoch": 3, "model": build("student").state_dict()}, "foreign.pt")
    tell("convert", "foreign.pt", "foreign.safetensors", "--drop-extra")
    assert Path("foreign.safetensors.manifest.json").is_file()
    assert "stages" in tell(
        "inspect", "foreign.safetensors", "--arch", "demo/student", "--input-size", "1,8,8"
    )


def test_a_plan_can_be_checked_again_and_a_boundary_named(tell):
    first = tell("partition", *PAIR, "-o", "plan.yaml")
    again = tell("partition", *PAIR, "--plan", "plan.yaml")
    assert again.split() == first.split()[: len(again.split())]
    named = tell("partition", *PAIR, "--pair", "stages.1.relu_1=stages.1.relu_1", "-o", "p.yaml")
    assert "stages.1.relu_1" in named and "stages.2.relu_1" not in named


def test_every_cut_point_is_listed_when_asked_for(tell):
    short, whole = tell("inspect", "teacher.pt"), tell("inspect", "teacher.pt", "--all")
    assert "stem.0" in whole and "stem.0" not in short
    assert "the rest with --all" in short and "--all" not in whole


def stones_of(plan):
    """The depths that have a weight, from a plan file."""
    weights = re.findall(r"^    weight: (\S+)", Path(plan).read_text(), flags=re.MULTILINE)
    return [depth for depth, weight in enumerate(weights, start=1) if float(weight) > 0]


def test_a_budget_keeps_the_deepest_stones_that_it_allows(tell):
    for budget, depths in (("1.5x", [3, 4]), ("1.1", [4]), ("99x", [1, 2, 3, 4])):
        shown = tell("partition", *PAIR, "--budget", budget, "-o", "plan.yaml")
        ratio = float(shown.split("one step: ")[1].split()[0])
        assert 1 < ratio <= float(budget.rstrip("x"))
        assert stones_of("plan.yaml") == depths


def test_a_run_within_a_budget_trains_the_stones_that_its_plan_keeps(tell):
    quick = (*DIGITS, "--epochs", "1", "--batch-size", "256")
    shown = tell("distill", *PAIR, *quick, "--budget", "1.5x", "-o", "asked")
    assert "one step: 1.31 × CPU time" in shown
    assert "CE(N3, y)" in shown and "CE(N2, y)" not in shown
    assert stones_of("asked/plan.yaml") == [3, 4]
    assert "budget: 1.5" in Path("asked/config.yaml").read_text()
    tell("partition", *PAIR, "--budget", "1.5x", "-o", "plan.yaml")
    tell("distill", *PAIR, *quick, "--plan", "plan.yaml", "-o", "planned")
    assert Path("planned/plan.yaml").read_bytes() == Path("asked/plan.yaml").read_bytes()
    students = [load_model(f"{run}/student/last.safetensors").model for run in ("asked", "planned")]
    one, other = (list(student.state_dict().values()) for student in students)
    assert all(map(torch.equal, one, other))
    shown = tell("eval", "asked")
    assert "stone 3" in shown and "stone 2" not in shown
    assert "nothing is left to train" in tell("distill", "--resume", "asked")


def test_adapters_become_narrower_under_a_limit_and_the_plan_says_so(tell):
    shown = tell("partition", *PAIR, "--adapter-parameters", "1000", "-o", "plan.yaml")
    assert "conv 1×1 32→4→128 + BN + ReLU" in shown
    text = Path("plan.yaml").read_text()
    assert "rank: 4" in text
    assert "32→4→128" in tell("partition", *PAIR, "--plan", "plan.yaml", "-o", "again.yaml")
    assert Path("again.yaml").read_text() == text


def test_models_are_compared_on_images_when_asked_to(tell):
    assert "dissimilarity" not in tell("partition", *PAIR, "--explain")
    probed = ("partition", *PAIR, *DIGITS, "--probe", "70", "--explain")
    shown = tell(*probed)
    assert shown.count("dissimilarity") == 4
    assert tell(*probed) == shown


def test_a_probe_reads_images_of_the_size_that_is_traced(tell):
    shown = tell("partition", *PAIR, *DIGITS, "--probe", "8", "--input-size", "1,16,16")
    assert "resized from 8×8×1 to 16×16×1" in shown
    assert "32×16×16" in shown


def test_the_certificate_is_kept_with_the_plan(tell):
    tell("partition", *PAIR, "-o", "plan.yaml")
    _, proof = Path("plan.yaml").read_text().split("certificate:\n")
    numbers = dict(line.strip().split(": ") for line in proof.splitlines())
    assert set(numbers) == set(Certificate.__dataclass_fields__)
    assert numbers["stones"] == "4"
    exact = set(numbers) - {"merged", "stones"}
    assert {float(numbers[name]) for name in exact} == {0.0}


TOKENS = """
import torch
from torch import nn


class Patches(nn.Module):
    \"\"\"A small vision transformer: a class token before the patches.\"\"\"

    def __init__(self, width=16, num_classes=10):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, 2)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = self.layers(torch.cat([self.first.expand(len(x), -1, -1), x], 1))
        return {"logits": self.head(x[:, 0])}
"""


def test_a_transformer_and_a_convolutional_network_teach_each_other(tell):
    Path("tokens.py").write_text(TOKENS)
    tokens = "py:tokens.py:Patches"
    size = ("--input-size", "1,8,8")
    assert "tokens→map 4×4" in tell("partition", "teacher.pt", tokens, *size)
    assert "map→tokens" in tell("partition", tokens, "student.pt", *size, "-o", "plan.yaml")
    quick = ("--epochs", "1", "--batch-size", "256", "-o", "run")
    assert "epoch 1/1" in tell("distill", "teacher.pt", tokens, *DIGITS, *quick)
    assert "stone 1" in tell("eval", "run", "--trust-code", tokens)


def test_what_is_installed_is_listed_with_where_it_comes_from(tell):
    shown = tell("plugins")
    for name in ("demo", "timm", "torchvision", "kl", "dkd", "dist", "jsd", "lskd", "cifar"):
        assert f" {name} " in shown
    assert f"kdsurgeon {kdsurgeon.__version__}" in shown


def test_the_doctor_finds_this_installation_sound(tell):
    shown = tell("doctor")
    assert "training two runs with one seed came to the same bits" in shown
    assert "largest gap 0" in shown
    assert shown.endswith("all is well\n")


def test_a_dry_run_writes_nothing(tell):
    before = contents()
    shown = tell("distill", *PAIR, *DIGITS, "--epochs", "2", "--dry-run", "-o", "run")
    assert "forecast 44 steps" in shown
    assert shown.endswith("dry run: nothing was written\n")
    assert contents() == before


def test_a_setting_on_which_nothing_depends_is_told(tell, capsys):
    line = ["distill", *PAIR, *DIGITS, "--method", "kd", "--stones", "1", "--dry-run"]
    assert main(line) == 0
    assert "nothing depends on loss.stones (without stones)" in capsys.readouterr().err


def test_a_run_without_an_output_gets_a_folder_of_its_own(tell):
    quick = ("--epochs", "1", "--batch-size", "512", "--method", "kd")
    tell("distill", *PAIR, *DIGITS, *quick)
    (folder,) = Path("runs").iterdir()
    assert folder.name.endswith("-student-kd")


def test_the_settings_of_a_run_file_give_way_to_flags(tell):
    Path("run.yaml").write_text(
        "teacher: teacher.pt\nstudent: student.pt\ndata_dir: digits\nepochs: 7\nmethod: kd\n"
    )
    shown = tell("distill", "-c", "run.yaml", "--set", "epochs=3", "--dry-run")
    assert "forecast 66 steps" in shown


def test_an_export_of_a_run_is_measured_on_the_images_that_the_run_held_out(tell):
    from PIL import Image

    digits = load("digits").val
    for label in range(10):
        Path(f"images/{label}").mkdir(parents=True)
    for index in range(200):
        image = Image.fromarray((digits.images[index, :, :, 0] * 15).astype("uint8"))
        image.save(f"images/{digits.labels[index]}/{index}.png")
    data = ("--data-dir", "images", "--val-split", "0.4")
    quick = ("--epochs", "1", "--batch-size", "64", "--method", "ce", "-o", "run")
    shown = tell("distill", *PAIR, *data, *quick)
    held_out = shown.split(" training and ")[1].split()[0]
    assert f"on {held_out} samples" in tell("export", "run", "student.onnx")


# ── stopping and going on ────────────────────────────────────────────────────────────────────────


LONG = ("distill", *PAIR, *DIGITS, "--epochs", "4", "--batch-size", "64", "-o", "run")


@pytest.fixture(scope="module")
def uninterrupted(digit_models, tmp_path_factory):
    """The run folder of ``LONG``, made at one go."""
    before = Path.cwd()
    folder = tmp_path_factory.mktemp("uninterrupted")
    for file in digit_models.iterdir():
        (folder / file.name).symlink_to(file)
    os.chdir(folder)
    try:
        assert main(LONG) == 0
    finally:
        os.chdir(before)
    return folder / "run"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_goes_on_to_the_very_same_student(number, uninterrupted, tell):
    process = subprocess.Popen([*COMMAND, *LONG], stderr=subprocess.PIPE, text=True)
    metrics = Path("run/metrics.jsonl")
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert f"interrupted ({number.name}): everything is saved in run." in said
    assert "go on: kdsurgeon distill --resume run" in said
    assert 1 <= len(read_metrics(Path("run"))) < 4
    load_model("run/student/last.safetensors")

    assert "epoch 4/4" in tell("distill", "--resume", "run")
    assert [line["epoch"] for line in read_metrics(Path("run"))] == [1, 2, 3, 4]
    for name in ("last", "best"):
        file = f"student/{name}.safetensors"
        assert Path("run", file).read_bytes() == (uninterrupted / file).read_bytes()
    wanted = [line["losses"] for line in read_metrics(uninterrupted)]
    assert [line["losses"] for line in read_metrics(Path("run"))] == wanted


def test_ctrl_c_before_a_verb_is_known_just_ends():
    code = (
        "import importlib.abc, os, signal, sys\n"
        "class CtrlC(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'kdsurgeon.cli.app': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, CtrlC())\n"
        "from kdsurgeon.__main__ import run\n"
        "sys.argv = ['kdsurgeon', '--help']; run()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_a_run_that_is_done_is_done_again_without_a_step(uninterrupted, tell):
    shutil.copytree(uninterrupted, "run")
    before = Path("run/student/last.safetensors").stat().st_mtime_ns
    told = tell("distill", "--resume", "run")
    assert "nothing is left to train" in told
    assert "epoch 1/" not in told
    assert Path("run/student/last.safetensors").stat().st_mtime_ns == before


# ── plugins ──────────────────────────────────────────────────────────────────────────────────────


def install(folder, name, *, kind, source, publishes=None):
    """A distribution ``name`` of one module that publishes itself, or another name, as ``kind``."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(
        f"[kdsurgeon.{kind}]\n{publishes or name} = {name}:build\n"
    )


@pytest.fixture
def decoys(tmp_path, monkeypatch):
    """Twenty plugins that leave a mark when they are imported, and two that crash."""
    folder = tmp_path / "site"
    folder.mkdir()
    mark = "import pathlib\npathlib.Path('IMPORTED').touch()\n"
    for index in range(20):
        kind = ("models", "distances")[index % 2]
        install(folder, f"decoy{index}", kind=kind, source=mark)
    for kind in ("models", "distances"):
        install(folder, f"crasher_{kind}", kind=kind, source="raise RuntimeError('boom')\n")
    monkeypatch.syspath_prepend(folder)
    yield folder
    assert not [name for name in sys.modules if name.startswith(("decoy", "crasher"))]


def test_no_verb_imports_a_plugin_that_was_not_named(decoys, tell):
    quick = ("--epochs", "1", "--batch-size", "512", "--distance", "dkd")
    listed = tell("plugins")
    assert listed.count("decoy") >= 20
    tell("inspect", "teacher.pt")
    tell("partition", "teacher.pt", "demo/student", "-o", "plan.yaml")
    tell("distill", *PAIR, *DIGITS, *quick, "-o", "runs/one")
    for line in (("eval", "runs/one"), ("runs", "runs"), ("doctor",)):
        tell(*line)
    for line in (
        ("partition", "dekoy0/x", "student.pt"),
        ("distill", *PAIR, "--distance", "dekoy1"),
    ):
        assert main(list(line)) == 2
    tell("export", "runs/one", "student.onnx")
    tell("benchmark", "student.pt", "student.onnx")
    tell("convert", "student.pt", "student.safetensors")
    tell("verify", "runs/one")
    assert not Path("IMPORTED").exists()


@pytest.mark.parametrize(
    "line",
    [
        ["partition", "crasher_models/net", "student.pt"],
        ["distill", *PAIR, *DIGITS, "--distance", "crasher_distances", "-o", "run"],
    ],
)
def test_a_plugin_that_crashes_is_named_with_its_distribution(decoys, line, capsys):
    assert main(line) == 7
    first, *notes = capsys.readouterr().err.splitlines()
    name = next(word.split("/")[0] for word in line if word.startswith("crasher"))
    assert first == f'error: the plugin "{name}" of {name} 1.5 failed to load.'
    assert any("RuntimeError: boom" in note for note in notes)
    assert not Path("run").exists()


def test_a_plugin_that_takes_the_name_of_ours_is_passed_over(tmp_path, monkeypatch, tell):
    (tmp_path / "site").mkdir()
    crash = "raise SystemExit(0)\n"
    install(tmp_path / "site", "thief", kind="models", source=crash, publishes="demo")
    install(tmp_path / "site", "quitter", kind="models", source=crash)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    assert "stages.0.relu_1" in tell("inspect", "demo/teacher", "--input-size", "1,8,8")
    assert main(["inspect", "quitter/net"]) == 7
    assert "thief" not in sys.modules


def test_foreign_plugins_can_be_hidden(decoys, tell, monkeypatch):
    monkeypatch.setenv("KDSURGEON_NO_PLUGINS", "0")
    shown = tell("plugins", "--no-plugins")
    assert "decoy" not in shown and "demo" in shown
    assert main(["partition", "crasher_models/net", "student.pt"]) == 2


def test_a_run_works_from_every_directory(uninterrupted, tell, tmp_path, monkeypatch):
    run = tmp_path / "work" / "run"
    (tmp_path / "work").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for name in ("teacher.pt", "student.pt"):
        shutil.copy(name, tmp_path / "work" / name)
    monkeypatch.chdir(tmp_path / "work")
    settings = ("--data-dir", "digits", "--epochs", "1", "-o", "run")
    tell("distill", "teacher.pt", "student.pt", *settings)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "stone 1" in tell("eval", run)
    assert "parity" in tell("export", run, "student.onnx")
    assert Path("student.onnx").is_file()
    assert "nothing is left to train" in tell("distill", "--resume", run)


def test_every_flag_that_a_message_advises_exists():
    source = "".join(
        path.read_text(encoding="utf-8") for path in Path(kdsurgeon.__file__).parent.rglob("*.py")
    )
    source = re.sub(r"--[a-z]+(?=:)|var\(--[a-z]+", "", source)  # variables of style sheets
    advised = set(re.findall(r"""(?<=[\s"'`(])--[a-z][a-z0-9-]+""", source))
    known = {name for verb in VERBS.values() for parameter in verb.params
             for name in (*parameter.opts, *parameter.secondary_opts)}  # fmt: skip
    known |= {"--help", "--version", "--debug", "--json", "--no-plugins"}
    known |= {"--nproc-per-node", "--max-restarts"}  # torchrun's
    assert len(advised) > 40
    assert advised - known == set()


ONCE = (*DIGITS, "--batch-size", "256", "--teacher-views", "2")


def test_the_teacher_is_asked_once_and_its_answers_serve_the_next_run(tell):
    given = (*PAIR, *ONCE, "--epochs", "2", "--teacher-cache", "answers.safetensors")
    shown = tell("distill", *given, "--stones", "random", "-o", "first")
    assert "one N a step, drawn as often as its factor says" in shown
    answers = Path("answers.safetensors").read_bytes()
    tell("distill", *given, "--stones", "random", "-o", "second")
    assert Path("answers.safetensors").read_bytes() == answers
    one, other = (Path(run, "student/last.safetensors") for run in ("first", "second"))
    for name, value in load_file(one).items():
        assert torch.equal(value, load_file(other)[name])


def test_answers_of_another_seed_are_refused(tell, capsys):
    given = (*PAIR, *ONCE, "--epochs", "1", "--method", "kd", "--teacher-cache", "answers.st")
    tell("distill", *given, "-o", "first")
    assert main(["distill", *given, "--seed", "1", "-o", "second"]) == 4
    said = capsys.readouterr().err
    assert "holds the logits of another run" in said and "seed" in said
    assert not Path("second").exists()


def test_one_logit_is_no_classification(capsys):
    Path("nets.py").write_text(
        "from torch import nn\n"
        "def net(width=4):\n"
        "    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(width, 1))\n"
    )
    pair = ("py:nets.py:net,width=8", "py:nets.py:net")
    assert main(["partition", *pair, "--input-size", "1,8,8"]) == 2
    assert "has one logit" in capsys.readouterr().err


def test_labels_alone_need_no_teacher_that_knows_anything(tell):
    untrained = ("demo/teacher", "demo/student", *ONCE, "--epochs", "1")
    assert main(["distill", *untrained, "--method", "kd", "--dry-run"]) == 5
    tell("distill", *untrained, "--method", "ce", "-o", "alone")


def test_what_is_measured_and_what_is_exported_are_told_apart(tell, capsys):
    tell("distill", *PAIR, *ONCE, "--epochs", "2", "--model-ema", "--method", "kd", "-o", "two")
    shown = tell("eval", "two")
    assert "as of step-" in shown
    metrics = Path("two/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[0]["accuracy"] = 1.0
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "export takes that of epoch 1, the best" in tell("eval", "two")


def test_the_accuracy_of_the_average_is_told(tell):
    given = (*PAIR, *ONCE, "--epochs", "1", "--method", "kd", "-o", "averaged")
    assert "student/ema.safetensors, accuracy" in tell("distill", *given, "--model-ema")


def test_one_file_is_verified_by_its_manifest_or_its_seal(tell, capsys):
    tell("convert", "teacher.pt", "plain.safetensors")
    assert "by plain.safetensors.manifest.json" in tell("verify", "plain.safetensors")
    Path("plain.safetensors.manifest.json").unlink()
    assert "by its own seal" in tell("verify", "plain.safetensors")
    raw = bytearray(Path("plain.safetensors").read_bytes())
    raw[-1] ^= 1
    Path("plain.safetensors").write_bytes(raw)
    assert main(["verify", "plain.safetensors"]) == 3
    assert main(["verify", "teacher.pt"]) == 3
    assert "no manifest beside it and no seal" in capsys.readouterr().err
