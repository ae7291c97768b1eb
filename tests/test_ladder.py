"""Stepping stones as networks of their own, and as files between student and teacher."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from kdsurgeon.checkpoints import load_model
from kdsurgeon.cli import main
from kdsurgeon.cli.ladder import _checkpoint, _epoch, stone_outputs, stone_path
from kdsurgeon.costs import node_costs, total
from kdsurgeon.data import load
from kdsurgeon.errors import PlanError, UsageError
from kdsurgeon.exporting import export
from kdsurgeon.runs import Run, read_checkpoint, verify
from kdsurgeon.stones import Plan, SteppingStones, partition, read_plan, synthesize
from kdsurgeon.stones.ladder import num_parameters, stone_cost, stone_network
from kdsurgeon.tracing import trace
from tests import models

PAIRS = [
    ("residual", "inverted"),
    ("dense", "residual"),
    ("branching", "branching"),
    ("shared", "shared"),
    ("tokens", "residual"),
    ("residual", "tokens"),
    ("streams", "chain"),
    ("dense", "streams"),
]


def built(teacher: str, student: str) -> tuple[Plan, SteppingStones]:
    pair = models.make(teacher, seed=1).eval(), models.make(student, seed=2).eval()
    plan = partition(*pair, models.images(2))
    return plan, synthesize(plan, fold=False, merge=False, seed=3).eval()


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_stone_alone_computes_what_it_does_in_the_training_graph(teacher, student):
    plan, stones = built(teacher, student)
    inputs = models.images(3, seed=5)
    with torch.inference_mode():
        expected = stones(inputs).stones
        assert len(expected) == len(plan.stones) > 0
        for depth, logits in zip(stones.depths, expected, strict=True):
            assert torch.equal(stone_network(plan, stones, depth).eval()(inputs), logits)


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_stone_costs_what_its_own_graph_costs(teacher, student):
    plan, stones = built(teacher, student)
    for depth in stones.depths:
        network = stone_network(plan, stones, depth).eval()
        counted = total(node_costs(trace(network, models.images(2))).values())
        cost, cut = stone_cost(plan, depth), plan.student.cuts[depth - 1]
        assert cost.multiply_adds >= counted.multiply_adds
        if cut.width == len(plan.stones[depth - 1].adapters):
            assert cost.multiply_adds == counted.multiply_adds
        assert num_parameters(network) == len(torch.cat([p.flatten() for p in distinct(network)]))


def distinct(network: nn.Module) -> list[torch.Tensor]:
    """Its parameters, each memory once."""
    found = {(p.data_ptr(), p.shape): p for p in network.parameters()}
    return list(found.values())


def test_stones_lie_between_student_and_teacher():
    plan, stones = built("residual", "inverted")
    costs = [stone_cost(plan, depth).multiply_adds for depth in stones.depths]
    assert costs == sorted(costs, reverse=True), "the deeper, the more of it is the student"
    assert plan.student.cost.multiply_adds < costs[-1]
    assert costs[0] < plan.teacher.cost.multiply_adds


def test_a_stone_shares_the_weights_and_changes_nobody():
    plan, stones = built("residual", "inverted")
    stones.train()
    modes = {name: module.training for name, module in stones.named_modules()}
    network = stone_network(plan, stones, 2)
    assert {name: module.training for name, module in stones.named_modules()} == modes
    inputs = models.images(2)
    before = stone_network(plan, stones, 2).eval()(inputs)
    with torch.no_grad():
        next(plan.student.trace.model.parameters()).mul_(1.5)
    assert not torch.equal(network.eval()(inputs), before)
    assert all(not p.requires_grad for n, p in network.named_parameters() if "teacher" in n)


def test_the_teacher_in_a_stone_rests_though_it_was_given_in_training():
    plan, stones = built("residual", "inverted")
    plan.teacher.trace.model.train()
    modules = stone_network(plan, stones, 2).named_modules()
    norms = [m for n, m in modules if n.startswith("teacher.") and isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)


def test_a_stone_that_is_not_there_is_refused():
    plan, _ = built("residual", "inverted")
    with pytest.raises(PlanError, match="no stone of depth 9"):
        stone_network(plan, synthesize(plan), 9)
    with pytest.raises(UsageError, match="no stone of depth 1") as caught:
        stone_network(plan, synthesize(plan, depths=[2]), 1)
    assert caught.value.notes["known"] == "2"


@pytest.mark.parametrize(("teacher", "student"), [("tokens", "residual"), ("streams", "chain")])
def test_the_file_of_a_stone_is_proved_and_holds_no_more_than_it_needs(teacher, student, tmp_path):
    plan, stones = built(teacher, student)
    depth = stones.depths[-1]
    network = stone_network(plan, stones, depth)
    done = export(network, tmp_path / "stone.onnx", models.images(3))
    assert done.parity is not None and done.parity.gap <= done.parity.bound
    weights = onnx.load(done.path).graph.initializer
    held = sum(onnx.numpy_helper.to_array(each).size for each in weights)
    buffers = sum(buffer.numel() for buffer in network.buffers())
    assert held <= num_parameters(network) + buffers + 64  # and shapes, axes, small constants


# ── on the command line ──────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run(digit_models, tmp_path_factory):
    """A run of two epochs with two stones, and the ladder that was exported of it."""
    folder = tmp_path_factory.mktemp("ladder")
    pair = [str(digit_models / f"{name}.pt") for name in ("teacher", "student")]
    command = ["distill", *pair, "--data-dir", "digits", "--epochs", "2", "--lr", "1e-2"]
    command += ["--blocks", "2", "--track", "none", "-o", str(folder / "run")]
    assert main(command) == 0
    with redirect_stdout(StringIO()) as shown:
        assert main(["export", str(folder / "run"), str(folder / "s.onnx"), "--stones"]) == 0
    (folder / "shown.txt").write_text(shown.getvalue(), encoding="utf-8")
    return folder


def test_every_stone_of_a_run_becomes_a_file(run):
    files = sorted(path.name for path in run.glob("*.onnx"))
    stones = len(read_plan_of(run).stones)
    assert stones >= 1
    assert files == ["s.onnx", *(f"s.stone{depth}.onnx" for depth in range(1, stones + 1))]
    assert verify(run / "run") > 5, "the run itself is as it was when it ended"


def test_what_the_images_are_is_told_once(run):
    shown = (run / "shown.txt").read_text(encoding="utf-8")
    assert shown.count("images   normalised") == 1 and "stone 1" in shown


def read_plan_of(run: Path) -> Plan:
    teacher, student = both_models(run)
    example = torch.zeros(2, 1, 8, 8)
    return read_plan(run / "run" / "plan.yaml", trace(teacher, example), trace(student, example))


def both_models(run: Path) -> tuple[nn.Module, nn.Module]:
    settings = (run / "run" / "config.yaml").read_text(encoding="utf-8")
    teacher = next(
        line.split()[-1] for line in settings.splitlines() if line.startswith("teacher:")
    )
    student = run / "run" / "student" / "best.safetensors"
    return load_model(teacher).model, load_model(str(student)).model


def test_the_files_hold_the_weights_of_the_epoch_that_the_student_is_from(run):
    plan = read_plan_of(run)
    stones = synthesize(plan, seed=99)
    saved = [read_checkpoint(path) for path in (run / "run" / "checkpoints").glob("step-*")]
    best = max((each for each in saved if each.facts["is_best"]), key=lambda each: each.path.name)
    stones.adapters.load_state_dict(best.tensors["adapters"])
    samples = load("digits").val.samples(slice(50))
    with torch.inference_mode():
        expected = stones.eval()(samples).stones
    for depth, logits in zip(stones.depths, expected, strict=True):
        found = onnx_logits(stone_path(run / "s.onnx", depth), samples)
        assert (found - logits).abs().max() <= 1e-5 * max(1.0, logits.abs().max().item())


def onnx_logits(path: Path, samples: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {"input": samples.numpy()})[0])


def test_the_ladder_is_recorded_from_the_student_to_the_teacher(run):
    rows = json.loads((run / "run" / "export" / "s.stones.json").read_text(encoding="utf-8"))
    depths = range(len(read_plan_of(run).stones), 0, -1)
    assert [row["name"] for row in rows] == ["student", *(f"stone {d}" for d in depths), "teacher"]
    costs = [row["multiply_adds"] for row in rows]
    assert costs == sorted(costs) and costs[0] < costs[-1]
    digits = load("digits").val
    for row in rows[:-1]:
        depth = row["name"].removeprefix("stone ")
        path = run / ("s.onnx" if depth == "student" else f"s.stone{depth}.onnx")
        right = onnx_logits(path, digits.samples()).argmax(1) == torch.from_numpy(digits.labels)
        assert row["accuracy"] == right.double().mean().item()
        assert row["file_bytes"] == path.stat().st_size
    assert all(row["latency_ms"] > 0 for row in rows)


def test_the_page_beside_the_record_shows_the_measured_curve(run):
    page = (run / "run" / "export" / "s.html").read_text(encoding="utf-8")
    assert "Measured on the exported files" in page
    assert "accuracy against latency" in page and "<td>stone&nbsp;1</td>" in page
    lines = (run / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    best = max(map(json.loads, lines), key=lambda line: line["accuracy"])
    assert f"Student and stones are those of epoch {best['epoch']}." in page
    assert f"Measured after epoch {len(lines)}, the last." in page


def test_a_checkpoint_is_of_the_epoch_that_its_newest_update_was_in(run):
    found = (run / "run" / "checkpoints").glob("step-*")
    for number, path in enumerate(sorted(found), start=1):
        checkpoint = read_checkpoint(path)
        assert _epoch(checkpoint) == number
        checkpoint.state["training"]["batch"] = 3
        assert _epoch(checkpoint) == number + 1


def test_the_metadata_says_which_network_it_is(run):
    known = onnxruntime.InferenceSession(run / "s.stone1.onnx").get_modelmeta().custom_metadata_map
    assert known["network"] == "stone 1" and json.loads(known["input_size"]) == [1, 8, 8]
    assert len(json.loads(known["class_names"])) == 10
    assert "student" not in known and len(known["plan"]) == 64


def test_what_has_no_stones_is_refused_before_anything_is_written(digit_models, tmp_path, capsys):
    output = tmp_path / "s.onnx"
    assert main(["export", str(digit_models / "student.pt"), str(output), "--stones"]) == 2
    assert "is no run folder" in capsys.readouterr().err
    (tmp_path / "kd").mkdir()
    (tmp_path / "kd" / "config.yaml").write_text("", encoding="utf-8")
    (tmp_path / "kd" / "plan.yaml").write_text("boundaries: []\n", encoding="utf-8")
    assert main(["export", str(tmp_path / "kd"), str(output), "--stones"]) == 2
    assert "trained no stones" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.onnx"))


def test_a_stone_in_place_of_a_folder_is_refused_before_any_work(run, tmp_path, capsys):
    (tmp_path / "s.stone1.onnx").mkdir()
    assert main(["export", str(run / "run"), str(tmp_path / "s.onnx"), "--stones"]) == 2
    assert "--stones writes a file" in capsys.readouterr().err
    assert not (tmp_path / "s.onnx").exists()


def test_forms_that_cannot_be_compared_are_refused_before_any_work(run, tmp_path, capsys):
    command = ["export", str(run / "run"), str(tmp_path / "s.onnx"), "--stones"]
    for flag in ("--static", "--dynamic-size", "--softmax", "--external", "--embed-preprocessing"):
        assert main([*command, flag]) == 2
        assert f"without {flag}" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.onnx"))


def test_every_boundary_of_the_plan_is_an_output(run):
    found = stone_outputs(str(run / "run"), Path("x.onnx"))
    names = [output.path.name for output in found]
    assert names == [f"x.stone{depth}.onnx" for depth in range(1, len(found) + 1)]
    assert len(found) == len(read_plan_of(run).stones)


def test_stones_are_of_the_best_epoch_or_of_the_last_update(tmp_path):
    with Run.create(tmp_path / "run") as run:
        run.write("config.yaml", "")
        for step, is_best in ((1, False), (2, True), (3, False)):
            tensors = {"student": {"w": torch.full((1,), float(step))}}
            run.save_checkpoint(step, tensors, {"version": 1}, best=is_best)
        assert _checkpoint(run, last=False).facts["step"] == 2
        assert _checkpoint(run, last=True).facts["step"] == 3
        (tmp_path / "run/checkpoints/step-000002/state.json").write_text("{}", encoding="utf-8")
        with pytest.raises(UsageError, match="no whole checkpoint of its best epoch") as caught:
            _checkpoint(run, last=False)
        assert "--last" in caught.value.notes["fix"]
