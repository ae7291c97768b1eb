"""Is this installation sound? Versions, devices, a twin short run, ONNX parity."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

import torch

from kdsurgeon.cli.console import say
from kdsurgeon.data import Batches, load
from kdsurgeon.demo import build
from kdsurgeon.distillation import prepare
from kdsurgeon.errors import NumericsError
from kdsurgeon.exporting import export
from kdsurgeon.plugins import KINDS, installed
from kdsurgeon.recipe import Recipe
from kdsurgeon.runs import environment
from kdsurgeon.stones import certify, partition


def examine() -> None:
    """Print every finding; raises :class:`NumericsError` at the first that is wrong."""
    found = environment([])
    say(f"python   {found['python']}, {found['platform']}")
    for name, version in found["packages"].items():
        say(f"package  {name} {version or 'not installed'}")
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    say(f"device   {found['cuda'] or 'CPU only'}; {threads}")
    for kind in KINDS:
        for plugin in installed(kind).values():
            say(f"plugin   {kind}/{plugin.name}: {plugin.distribution} {plugin.version}")
    torch.manual_seed(0)
    teacher, student = build("teacher"), build("student")
    proof = certify(partition(teacher, student, torch.zeros(2, 1, 8, 8)))
    gaps = (proof.teacher_evaluation, proof.teacher_training)
    gaps += (proof.student_evaluation, proof.student_training)
    say(f"surgery  largest gap {max(gaps):g}")
    first, second = (_short_run(teacher, student) for _ in range(2))
    if not all(torch.equal(one, other) for one, other in zip(first, second, strict=True)):
        raise NumericsError("two runs with one seed came to different weights.")
    say("training two runs with one seed came to the same bits")
    with tempfile.TemporaryDirectory() as folder:
        done = export(student, Path(folder) / "student.onnx", torch.zeros(2, 1, 8, 8))
    say(f"onnx     {done.parity}")
    say("all is well")


def _short_run(teacher: torch.nn.Module, student: torch.nn.Module) -> list[torch.Tensor]:
    digits = load("digits").val
    batches = Batches(digits, 64, shuffle=True, seed=0, augment="shift")
    twin = copy.deepcopy(student)
    ready = prepare(teacher, twin, batches, recipe=Recipe(epochs=1))
    for _ in ready.epochs():
        pass
    return list(twin.state_dict().values())
