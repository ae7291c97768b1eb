"""``kill -9`` at random moments of real command lines, resumed until the run is done.

A server imports torch once and forks a process for each ``kdsurgeon distill``. Every second kill
comes at a drawn count of function calls, so that its seed replays it; the others come from outside
at a drawn time. Whatever was killed, the run must end in the bits of one that was not.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from kdsurgeon.cli.app import main
from tests.torture.sessions import differences, leftovers, outcome

NETWORKS = '''
"""A teacher that is right about every image, because the labels are its answers; a student."""

import torch
from torch import nn


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4),
    )


def images():
    drawn = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return (drawn * 255).to(torch.uint8)


def teacher(num_classes=4):
    made = network(8, 0).eval()
    with torch.no_grad():
        made[-1].weight.mul_(20)
        made[-1].bias.sub_(made(images().float() / 255).mean(0))
    return made


def student(num_classes=4):
    return network(4, 1)
'''
ARGUMENTS = [
    *("distill", "py:nets.py:teacher", "py:nets.py:student", "--data-dir", "data.npz"),
    *("--mean", "0", "--std", "1", "--val-split", "0.25", "--augment", "shift", "--seed", "3"),
    *("--epochs", "3", "-b", "12", "--grad-accum-steps", "2", "--threads", "1"),
    *("--set", "optim.model_ema=true", "--set", "checkpoint_every=1"),
    *("--set", "loss.stones=random"),
]
RESUME = [
    *("distill", "--resume", "run"),
    *("--trust-code", "py:nets.py:teacher", "--trust-code", "py:nets.py:student"),
]


NEVER = 1 << 60


@dataclass(frozen=True)
class Kill:
    """When to kill: at so many function calls, or after so many seconds."""

    calls: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.calls} calls" if self.calls is not None else f"{self.seconds:.4f} s"


class Server:
    """Forks command lines in ``base``; knows how long one takes and what it comes to."""

    def __init__(self, base: Path) -> None:
        self.base, self.folder = base, base / "run"
        _write_inputs(base)
        with chdir(base), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            assert main([*ARGUMENTS, "-o", "warm"]) == 0  # so that no child need import anything
        counted = self._whole(Kill(calls=NEVER))
        self.calls = int((base / "calls").read_text(encoding="utf-8"))
        started = time.monotonic()
        self.wanted = self._whole(None)
        self.seconds = time.monotonic() - started
        assert differences(counted, self.wanted) == [], "two runs alike differ"

    def _whole(self, kill: Kill | None) -> dict[str, Any]:
        """What a run comes to that nothing happens to."""
        shutil.rmtree(self.folder, ignore_errors=True)
        assert self.run(kill) == 0, self.said()
        return outcome(self.folder)

    def said(self) -> str:
        return (self.base / "said").read_text(encoding="utf-8")

    def run(self, kill: Kill | None) -> int:
        """Start the run or go on with it; its exit code, or -9."""
        is_begun = (self.folder / "config.yaml").is_file()
        arguments = RESUME if is_begun else [*ARGUMENTS, "-o", "run"]
        child = os.fork()
        if child == 0:
            _play(self.base, arguments, kill.calls if kill else None)
        if kill and kill.seconds is not None:
            return self._wait(child, kill.seconds)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _wait(self, child: int, seconds: float) -> int:
        """Kill ``child`` after so many seconds, if it has not ended by then."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:  # a machine that is less busy by now is to be killed in time again
                self.seconds = min(self.seconds, 1.5 * (time.monotonic() - started))
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def draw(self, spread: random.Random) -> Kill:
        if spread.random() < 0.5:
            return Kill(calls=spread.randrange(self.calls))
        return Kill(seconds=spread.uniform(0, self.seconds))


def _write_inputs(base: Path) -> None:
    (base / "nets.py").write_text(NETWORKS, encoding="utf-8")
    made: dict[str, Any] = {}
    exec(NETWORKS, made)
    images = made["images"]()
    with torch.no_grad():
        labels = made["teacher"]()(images.float() / 255).argmax(1)
    np.savez(base / "data.npz", images=images.numpy(), labels=labels.numpy())


def _play(base: Path, arguments: list[str], calls: int | None) -> None:
    """In the child: the command line, killed at its ``calls``-th function call."""
    code = 70
    try:
        os.chdir(base)
        random.seed(0)  # what the command line leaves to chance is in the state that is compared
        np.random.seed(0)
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        count = 0

        def counted(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal count
            count += 1
            if count == calls:
                os.kill(os.getpid(), signal.SIGKILL)

        if calls is not None:
            sys.setprofile(counted)
        code = main(arguments)
        sys.setprofile(None)
        if calls is not None:
            Path("calls").write_text(str(count))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass
class Tally:
    """What a series of kills came to."""

    kills: int = 0
    runs: int = 0
    problems: tuple[str, ...] = ()


def kill_until(server: Server, count: int, seed: int, *, first: bool = False) -> Tally:
    """Kill ``count`` times in as many runs as it takes, each resumed until it is done."""
    tally = Tally()
    number = 0
    while tally.kills < count and not (first and tally.problems):
        tally.problems += tuple(_one_run(server, seed + number, tally, count))
        number += 1
    return tally


def _one_run(server: Server, seed: int, tally: Tally, count: int) -> list[str]:
    spread = random.Random(seed)
    folder = server.folder
    shutil.rmtree(folder, ignore_errors=True)
    history: list[str] = []
    newest = -1
    while True:
        kill = server.draw(spread) if tally.kills < count else None
        code = server.run(kill)
        history.append(str(kill))
        about = f"seed {seed}, after {', '.join(history)}"
        if code == 0:
            tally.runs += 1
            problems = differences(outcome(folder), server.wanted) + leftovers(folder)
            return [f"{about}: {problem} differs or is left" for problem in problems]
        if code != -signal.SIGKILL:
            return [f"{about}: exit {code}: {server.said()}"]
        tally.kills += 1
        step = _newest(folder)
        if step < newest:
            return [f"{about}: step {newest} was there, {step} is the newest now"]
        newest = step


def _newest(folder: Path) -> int:
    """The newest checkpoint by name; whether it loads shows when the run goes on from it."""
    return max((int(p.name[5:11]) for p in folder.glob("checkpoints/step-*")), default=-1)
