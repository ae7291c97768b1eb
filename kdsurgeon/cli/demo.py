"""The demo: train a teacher alone, then run on it the verbs that a user runs."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from kdsurgeon.cli.console import out, say
from kdsurgeon.costs import Cost, node_costs, total
from kdsurgeon.data import Batches, Split, load
from kdsurgeon.demo import build
from kdsurgeon.distillation import train_alone
from kdsurgeon.errors import UsageError
from kdsurgeon.exporting import benchmark
from kdsurgeon.recipe import OptimRecipe, Recipe
from kdsurgeon.runs import read_metrics
from kdsurgeon.stones import forecast, partition
from kdsurgeon.tracing import trace
from kdsurgeon.views import Row, comparison_table

EPOCHS = 20
TEACHER = Recipe(method="ce", epochs=12, optim=OptimRecipe(lr=3e-3, warmup_epochs=4.0))


def play(folder: Path, seed: int, run_verb: Callable[[Sequence[str]], int]) -> None:
    """Everything in one folder; ``run_verb`` is the command line itself."""
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty.", fix="name another folder with --output")
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small run faster on one core than on two
    try:
        _play(folder, seed, run_verb)
    finally:
        torch.set_num_threads(threads)
    say(f"\neverything above was measured in this run, in {time.monotonic() - began:.0f} s")


def _play(folder: Path, seed: int, run_verb: Callable[[Sequence[str]], int]) -> None:
    def verb(line: str) -> None:
        say(f"\n$ kdsurgeon {line}")
        run_verb(shlex.split(line))

    digits = load("digits")
    say("real handwritten digits (UCI, CC BY 4.0): 1,797 scans of 8×8 pixels")
    torch.manual_seed(seed)
    teacher, student = build("teacher"), build("student")
    teacher_score = _train_teacher(teacher, digits, seed)
    for name, model in (("teacher", teacher), ("student", student)):
        seen = {"mean": list(digits.train.mean), "std": list(digits.train.std)}
        card = {"arch": f"demo/{name}", "input_size": [1, 8, 8], "num_classes": 10, **seen}
        torch.save({**card, "state_dict": model.state_dict()}, folder / f"{name}.pt")
    say(f"wrote {folder}/teacher.pt and {folder}/student.pt (the student is not trained yet)")

    pair = f"{folder}/teacher.pt {folder}/student.pt"
    common = (
        f"--data-dir digits --epochs {EPOCHS} --lr 1e-2 --warmup-epochs 1 --seed {seed} --threads 1"
    )
    longer = round(EPOCHS * forecast(partition(teacher, student, torch.zeros(2, 1, 8, 8))).ratio)
    verb(f"partition {pair} -o {folder}/plan.yaml --svg {folder}/plan.svg")
    verb(f"distill {pair} {common} --method ce -o {folder}/alone")
    verb(f"distill {pair} {common} --method kd -o {folder}/kd")
    verb(f"distill {pair} {common} --method kd --epochs {longer} -o {folder}/kd-longer")
    verb(f"distill {pair} {common} --plan {folder}/plan.yaml -o {folder}/block-kd")
    verb(f"export {folder}/block-kd {folder}/student.onnx --last --int8 --no-int8-gate")

    deployed = json.loads((folder / "block-kd/export/student.json").read_text(encoding="utf-8"))
    rows = benchmark({"teacher": teacher, "student": student}, digits.val.samples(slice(1)))
    teacher_ms, student_ms = (row.latency.median_ms for row in rows)
    teacher_cost, student_cost = _cost(teacher), _cost(student)
    say()
    table = [
        Row("teacher", teacher_score, *teacher_cost, _bytes(folder / "teacher.pt"), teacher_ms)
    ]
    for name, run in (
        ("student alone", "alone"),
        ("KD", "kd"),
        (f"KD, {longer} epochs", "kd-longer"),
        ("Block-KD", "block-kd"),
    ):
        size = _bytes(folder / run / "student" / "last.safetensors")
        table.append(Row(name, _last_accuracy(folder / run), *student_cost, size, student_ms))
    for name in ("ONNX fp32", "ONNX int8"):
        found = deployed[name]
        table.append(
            Row(name, found["accuracy"], *student_cost, found["bytes"], found["latency_ms"])
        )
    out.print(comparison_table(table))
    images = len(digits.val)
    say(f"accuracy after the last epoch on {images} held-out images: one image is {1 / images:.2%}")
    say(f"KD for {longer} epochs costs as many multiply-adds as Block-KD for {EPOCHS}")
    say("latency: one image, one thread; the four students are one network with other weights")


def _train_teacher(teacher: nn.Module, digits: Split, seed: int) -> float:
    train = Batches(digits.train, 64, shuffle=True, seed=seed, augment="shift")
    validation = Batches(digits.val, 256, shuffle=False, seed=seed)
    score = 0.0
    for epoch in train_alone(teacher, train, TEACHER, validation=validation):
        score = epoch.accuracy or 0.0
        say(f"teacher  epoch {epoch.number:2}/{epoch.epochs}  accuracy {score:.2%}")
    return score


def _cost(model: nn.Module) -> tuple[int, int]:
    cost: Cost = total(node_costs(trace(model, torch.zeros(2, 1, 8, 8))).values())
    return cost.parameters, cost.multiply_adds


def _last_accuracy(run: Path) -> float:
    return read_metrics(run)[-1]["accuracy"]


def _bytes(path: Path) -> int:
    return path.stat().st_size
