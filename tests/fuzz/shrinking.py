"""Reduce a program that violates an invariant to the few steps that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tests.fuzz.generator import runs
from tests.fuzz.programs import PREAMBLE, Program, Step, inputs, without_dead_steps

_CHANNELS_SECOND = frozenset(
    {"conv", "conv_block", "batch_norm", "batch_norm_1d", "squeeze_excite"}
)
_CHANNELS_LAST = frozenset(
    {"linear", "layer_norm", "attention", "multi_head", "class_token", "tied", "position",
     "position_table"}
)  # fmt: skip


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The smallest program found that plain torch still runs and that still fails.

    Greedy, as in QuickCheck: the first smaller program that fails is taken, and reduced in turn.
    """
    while True:
        for smaller in _smaller(program):
            if runs(smaller) and fails(smaller):
                program = smaller
                break
        else:
            return program


def _smaller(program: Program) -> Iterator[Program]:
    """Programs one reduction away, the boldest first."""
    if program.returns != "tensor":
        yield replace(program, returns="tensor")
    for index in reversed(range(len(program.steps) - 1)):
        for read in dict.fromkeys(program.steps[index].reads):
            shorter = _refitted(_without(program, index, read))
            if shorter is not None and len(shorter.steps) < len(program.steps):
                yield shorter
    for index, step in enumerate(program.steps):
        for simpler in _simpler(step):
            steps = (*program.steps[:index], simpler, *program.steps[index + 1 :])
            changed = _refitted(replace(program, steps=steps))
            if changed is not None:
                yield changed


def _without(program: Program, index: int, stand_in: str) -> Program:
    """``program`` without a step; who read its value reads ``stand_in``."""
    gone = program.steps[index].out
    steps = [
        replace(step, reads=tuple(stand_in if name == gone else name for name in step.reads))
        for step in program.steps[index + 1 :]
    ]
    shorter = without_dead_steps(replace(program, steps=(*program.steps[:index], *steps)))
    has_hint = any("hint" in step.reads for step in shorter.steps)
    return replace(shorter, has_hint=has_hint)


def _simpler(step: Step) -> Iterator[Step]:
    if step.kind == "conv" and step.numbers[2:] != (1, 1, 1):
        yield replace(step, numbers=(*step.numbers[:2], 1, 1, 1))
    if step.kind == "conv_block":
        yield replace(step, kind="conv", numbers=(*step.numbers[:2], 1, 1, 1))
    if step.kind in ("squeeze_excite", "attention", "multi_head"):
        yield replace(step, kind="gelu")


def _refitted(program: Program) -> Program | None:
    """``program`` with every layer as wide as what it now reads, found out by running it."""
    batch = inputs(2, has_hint=program.has_hint)
    net = nn.Module().eval()
    names: dict[str, Any] = {"self": net, **batch}
    steps = []
    try:
        exec(PREAMBLE, names)
        for step in program.steps:
            fitted = _fitted(step, names[step.reads[0]])
            if step.layer and not hasattr(net, step.layer):
                setattr(net, step.layer, eval(fitted.maker, names))
            with torch.no_grad():
                exec("\n".join(fitted.lines), names)
            steps.append(fitted)
    except Exception:  # what does not run in plain torch is no program
        return None
    return replace(program, steps=tuple(steps))


def _fitted(step: Step, read: Any) -> Step:
    if step.kind not in _CHANNELS_SECOND | _CHANNELS_LAST:
        return step
    width = read.shape[1 if step.kind in _CHANNELS_SECOND else -1]
    old, *others = step.numbers
    if step.kind in ("linear", "conv") and others[0] == old:
        others[0] = width  # what kept the width still does
    return replace(step, numbers=(width, *others))
