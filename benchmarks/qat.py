"""Is training with rounding worth it, and is it the rounding that is?

    python -m benchmarks.qat --factor 256

Accuracy in percent of the demo's student on 450 digits (one digit is 0.22): of its fp32 file, of
the int8 file made of it as it is, after five more epochs as they are, and after five with rounding
inside. No node stays in fp32. ``factor`` sets channels apart, which larger depthwise networks come
to by themselves. Two CPU cores, 2026-11-22, raw lines in qat.jsonl.

    factor   seed     fp32   as it is   trained on   with rounding
         1      0    95.55      95.33        95.78           96.00
         1      1    96.00      95.56        95.33           95.56
         8      0    94.67      94.00        95.33           94.22
        32      0    94.67      93.78        92.67           93.78
       256      0    94.67      24.67        21.78           36.67
       256      1    95.11      59.33        58.67           66.22

Where int8 costs much, rounding inside regains 7 to 12 points that more training does not. Where it
costs less than a point the differences are those of single digits: no gain is shown there. Of the
four rows that lose more than half a point it is better in three, and equal in one. A twentieth of
the run's learning rate is too little to bring such channels together: to try next.
"""

from __future__ import annotations

import argparse
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from kdsurgeon import Batches, Recipe, distill, load_data, load_model, partition, train_alone
from kdsurgeon.cli import main as kdsurgeon
from kdsurgeon.cli.int8 import Int8Flags, short_recipe
from kdsurgeon.demo import build
from kdsurgeon.exporting import Int8, export, quantize
from kdsurgeon.exporting.rounding import Rounded
from kdsurgeon.recipe import RunConfig, read_config

FLAGS = Int8Flags(budget=0)  # no node stays in fp32
DATA = load_data("digits")


def write_teacher(path: Path) -> None:
    """A network that knows the digits."""
    torch.manual_seed(0)
    teacher = build("teacher")
    recipe = Recipe(method="ce", epochs=8, optim={"lr": 3e-3, "warmup_epochs": 1})
    for _ in train_alone(teacher, Batches(DATA.train, 64, shuffle=True, seed=0), recipe):
        pass
    card = {"arch": "demo/teacher", "input_size": [1, 8, 8], "num_classes": 10}
    torch.save({**card, "state_dict": teacher.state_dict()}, path)


def run(folder: Path, seed: int, epochs: int) -> Path:
    """The run of a student, as anybody starts it."""
    place = folder / f"run-{seed}"
    line = ["distill", str(folder / "teacher.pt"), "demo/student", "--data-dir", "digits"]
    line += ["--epochs", str(epochs), "--lr", "0.005", "--seed", str(seed), "--track", "none"]
    with redirect_stdout(StringIO()):
        assert kdsurgeon([*line, "-o", str(place)]) == 0
    return place


def uneven(student: nn.Module, factor: float) -> nn.Module:
    """The same function, the first channel inside each unit by ``factor`` larger than it was.

    Depthwise networks come so by themselves (Nagel et al. 2019, arXiv 1906.04721); this one is too
    small for it.
    """
    with torch.no_grad():
        for unit in student.stages:  # pyright: ignore
            unit.bn1.weight[0] *= factor
            unit.bn1.bias[0] *= factor
            unit.pointwise.weight[:, 0] /= factor
    return student


def trained_on(student: nn.Module, settings: RunConfig, calibration: Tensor | None) -> nn.Module:
    """The student after a few more epochs, with the rounding of int8 inside or without."""
    teacher = load_model(settings.teacher).model
    short = short_recipe(settings, FLAGS.epochs)
    inside = student if calibration is None else Rounded(student, calibration)
    plan = partition(teacher, inside, DATA.train.samples(range(2)), blocks=settings.blocks)
    batches = Batches(DATA.train, settings.batch_size, shuffle=True, seed=settings.seed)
    for _ in distill(teacher, inside, batches, plan=plan, recipe=short):
        if isinstance(inside, Rounded) and calibration is not None:
            inside.calibrate(calibration)
    return student


def rounded(student: nn.Module, folder: Path, reference: Path | None = None) -> Int8:
    """The int8 file of a student, its drop counted from the ``reference`` or its own fp32 file."""
    samples, labels = DATA.val.samples(range(len(DATA.val))), torch.from_numpy(DATA.val.labels)
    file = export(student.eval(), folder / "fp32.onnx", samples[:2], samples=samples).path
    return quantize(
        file, folder / "int8.onnx", FLAGS.spread(DATA.train), samples=samples, labels=labels,
        gate=False, reference=reference or file, **FLAGS.options,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--factor", type=float, default=16.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as made:
        folder = Path(made)
        write_teacher(folder / "teacher.pt")
        for seed in range(given.seeds):
            place = run(folder, seed, given.epochs)
            settings = read_config(place / "config.yaml")
            file = str(place / "student" / "best.safetensors")
            students = [uneven(load_model(file).model, given.factor) for _ in range(3)]
            found = {"as it is": rounded(students[0], folder)}
            calibration = FLAGS.spread(DATA.train)
            ways = (("trained on", None), ("with rounding", calibration))
            for student, (name, inside) in zip(students[1:], ways, strict=True):
                found[name] = rounded(trained_on(student, settings, inside), folder)
            scores = {name: round(100 * (each.accuracy or 0), 2) for name, each in found.items()}
            fp32 = round(scores["as it is"] + 100 * (found["as it is"].drop or 0), 2)
            print(json.dumps({"seed": seed, "fp32": fp32, **scores}), flush=True)


if __name__ == "__main__":
    main()
