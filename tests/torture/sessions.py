"""A real distillation in miniature, on whose folder the torture is done, and what must be of it."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdsurgeon.checkpoints import read_tensors
from kdsurgeon.distillation import Distillation, prepare
from kdsurgeon.errors import ModelFileError
from kdsurgeon.recipe import Recipe
from kdsurgeon.runs import Run

CLASSES = 3
CLOCKS = ("seconds", "samples_per_second", "started", "time")  # what no two runs have in common


def network(width: int, seed: int) -> nn.Module:
    """Two convolutions and a linear layer; 4×4 images of one channel in."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, CLASSES),
    )


@cache
def _prepared(epochs: int) -> tuple[Distillation, dict[str, Tensor]]:
    spread = torch.Generator().manual_seed(0)
    teacher, student = network(4, 1).eval(), network(2, 2)
    images = [torch.rand(4, 1, 4, 4, generator=spread) for _ in range(2)]
    with torch.no_grad():
        batches = [(each, teacher(each).argmax(1)) for each in images]
    recipe = Recipe(epochs=epochs, optim={"model_ema": True})
    ready = prepare(teacher, student, batches, recipe=recipe, validation=batches)
    return ready, copy.deepcopy(ready.model.state_dict())


@dataclass
class Session:
    """Train in ``folder`` until done; call it again after whatever happened meanwhile."""

    folder: Path
    epochs: int = 2
    keep_every: int = 0

    def __call__(self) -> None:
        ready, initial = _prepared(self.epochs)
        ready = replace(ready, recipe=ready.recipe.replace(keep_every=self.keep_every))
        torch.manual_seed(0)
        ready.model.load_state_dict(initial)
        is_begun = (self.folder / "config.yaml").is_file()
        run = Run.resume(self.folder) if is_begun else Run.create(self.folder)
        try:
            if not is_begun:
                run.write("config.yaml", f"epochs: {self.epochs}\n")
            for _ in ready.epochs(run=run):
                pass
        finally:
            run.close()


def outcome(folder: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on what it went through."""
    checkpoint, complaints = Run.look(folder).latest_checkpoint()
    if checkpoint is None:
        return {}
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "name": checkpoint.path.name,
        "complaints": complaints,
        "tensors": {
            f"{file}/{name}": (str(tensor.dtype), tensor.tolist())
            for file, tensors in checkpoint.tensors.items()
            for name, tensor in tensors.items()
        },
        "state": _without_clocks(checkpoint.state),
        "metrics": [_without_clocks(json.loads(line)) for line in lines],
        "students": {
            path.name: path.read_bytes() for path in (folder / "student").glob("*.safetensors")
        },
    }


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_clocks(v) for k, v in value.items() if k not in CLOCKS}
    return value


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What is not as in the run that nothing happened to."""
    return [key for key in wanted if found.get(key) != wanted[key]]


def missing(folder: Path, before: Kept) -> list[str]:
    """What of ``before`` is lost, and what cannot be loaded any more."""
    problems = []
    after = Kept.of(folder, problems)
    if before.step is not None and (after.step is None or after.step < before.step):
        problems.append(f"step {before.step} was saved, {after.step} is left")
    problems += [f"{name} is gone" for name in sorted(before.students - after.students)]
    return problems


@dataclass(frozen=True)
class Kept:
    """What a run has to lose: its newest whole checkpoint and its students."""

    step: int | None
    students: frozenset[str]

    @classmethod
    def of(cls, folder: Path, problems: list[str]) -> Kept:
        if not (folder / "config.yaml").is_file():
            return cls(None, frozenset())
        step = None
        try:
            checkpoint, complaints = Run.look(folder).latest_checkpoint()
            problems += complaints
            step = checkpoint.facts["step"] if checkpoint else None
        except ModelFileError as error:
            problems.append(str(error))
        students = set()
        for path in (folder / "student").glob("*.safetensors"):
            try:
                network(2, 0).load_state_dict(read_tensors(path), strict=True)
                students.add(path.name)
            except Exception as error:
                problems.append(f"{path.name}: {error}")
        return cls(step, frozenset(students))


def leftovers(folder: Path) -> list[str]:
    """Drafts that lie in a run folder."""
    return sorted(str(path) for path in folder.rglob("*") if "tmp" in path.name)
