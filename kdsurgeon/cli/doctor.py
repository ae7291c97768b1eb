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
from kdsurgeon.errors import NumericsError, PluginError
from kdsurgeon.exporting import export
from kdsurgeon.exporting.staging import first_line
from kdsurgeon.plugins import KINDS, Plugin, installed
from kdsurgeon.plugins import load as load_plugin
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
    unusable = 0
    for kind in KINDS:
        for plugin in installed(kind).values():
            say(f"plugin   {kind}/{plugin.name}: {plugin.distribution} {plugin.version}")
            # others' are imported only where somebody names them
            trouble = trouble_of(plugin) if plugin.distribution == "kdsurgeon" else None
            if trouble is not None:
                unusable += 1
                say(f"plugin   {kind}/{plugin.name} is not usable: {trouble}")
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
    but = f"{unusable} plugins are not usable, as said above; but for them " if unusable else ""
    say(f"{but}all is well")


def trouble_of(plugin: Plugin) -> str | None:
    """Why a plugin cannot be used, in one line; None where nothing is known against it.

    Of one for models a model that no library has is asked: it must miss that, not its library.
    """
    try:
        found = load_plugin(plugin.kind, plugin.name)
    except PluginError as error:
        return first_line(error)
    if plugin.kind != "models":
        return None
    try:
        found(" ")
    except Exception as error:
        if isinstance(error.__cause__, ImportError | RuntimeError):
            return first_line(error)
    return None


def _short_run(teacher: torch.nn.Module, student: torch.nn.Module) -> list[torch.Tensor]:
    digits = load("digits").val
    batches = Batches(digits, 64, shuffle=True, seed=0, augment="shift")
    twin = copy.deepcopy(student)
    ready = prepare(teacher, twin, batches, recipe=Recipe(epochs=1))
    for _ in ready.epochs():
        pass
    return list(twin.state_dict().values())
