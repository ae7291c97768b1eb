"""What a run tells while it runs: a live table on a terminal, log lines elsewhere, trackers."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from kdsurgeon.cli.console import out, warn
from kdsurgeon.recipe import RunConfig
from kdsurgeon.tracking import Trackers
from kdsurgeon.training import Epoch, Step

KINDS = ("ce", "kd", "cross")
LEAST_SECONDS = 0.1  # between two drawings


class Display:
    """Draws the newest :class:`Step`, prints a line for every epoch, and tells both to trackers."""

    def __init__(self, settings: RunConfig, live: Live | None, trackers: Trackers) -> None:
        self._settings, self._live, self._trackers = settings, live, trackers
        self._began = time.monotonic()
        self._first: int | None = None  # batches done before this process
        self._told = 0  # intervals that ended
        self._drawn = 0.0
        self._accuracy: dict[str, float] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
        )
        self._task = self._bar.add_task("", text="")

    def step(self, step: Step) -> None:
        done = step.epoch * step.batches + step.batch
        if self._first is None:
            self._first, self._began = done - 1, time.monotonic()
            self._told = self._first // self._settings.log_interval
        is_due = done // self._settings.log_interval > self._told  # a step may be several batches
        self._told = done // self._settings.log_interval
        if is_due:
            numbers = {f"train/{name}": value for name, value in step.losses.items()}
            speed = {"train/samples per second": step.samples_per_second}
            self._trackers.log(numbers | speed, done)
        if self._live is None:
            if is_due:
                _print(self._line(step, done))
        elif time.monotonic() - self._drawn >= LEAST_SECONDS:
            self._drawn = time.monotonic()
            self._live.update(self._drawing(step, done), refresh=True)

    def epoch(self, epoch: Epoch) -> None:
        self._accuracy = accuracies(epoch)
        numbers = {f"accuracy/{name}": value for name, value in self._accuracy.items()}
        numbers |= {f"epoch/{name}": value for name, value in epoch.losses.items()}
        numbers["epoch/learning rate"] = epoch.learning_rate
        self._trackers.log(numbers, epoch.number * epoch.steps)
        score = "" if epoch.accuracy is None else f"  accuracy {epoch.accuracy:6.2%}"
        width = len(str(epoch.epochs))
        _print(
            f"epoch {epoch.number:{width}}/{epoch.epochs}{score}  {in_words(epoch.losses)}"
            f"  {epoch.samples_per_second:,.0f} img/s"
        )

    def _line(self, step: Step, done: int) -> str:
        return (
            f"  step {done:,} of {self._settings.epochs * step.batches:,}  "
            f"{in_words(step.losses)}  {step.samples_per_second:,.0f} img/s  "
            f"{self._left(step, done)}"
        )

    def _left(self, step: Step, done: int) -> str:
        assert self._first is not None
        each = (time.monotonic() - self._began) / max(1, done - self._first)
        return f"{duration(each * (self._settings.epochs * step.batches - done))} left"

    def _drawing(self, step: Step, done: int) -> RenderableType:
        total = self._settings.epochs * step.batches
        self._bar.update(
            self._task,
            total=total,
            completed=done,
            description=f"epoch {step.epoch + 1}/{self._settings.epochs}",
            text=f"{self._left(step, done)}  {step.samples_per_second:,.0f} img/s  {memory()}",
        )
        return Group(self._bar, losses_table(step.losses, self._accuracy))


def losses_table(losses: dict[str, float], accuracy: dict[str, float]) -> Table:
    """Losses by kind, and the accuracy after the last epoch, of the student and every stone."""
    learners = _learners(losses) or ["student"]
    table = Table("", *learners, box=None, pad_edge=False)
    for kind in KINDS:
        values = [losses.get(f"{kind} {learner}") for learner in learners]
        if any(value is not None for value in values):
            table.add_row(kind, *("–" if value is None else f"{value:.3f}" for value in values))
    if accuracy:
        shown = (f"{accuracy[name]:.2%}" if name in accuracy else "–" for name in learners)
        table.add_row("accuracy", *shown)
    if "total" in losses:
        table.add_row("total", f"{losses['total']:.3f}")
    return table


def _learners(losses: dict[str, float]) -> list[str]:
    """Student, stone 1, stone 2, …, whatever the order in which their losses came up."""
    found = {name.split(" ", 1)[1] for name in losses if name.split(" ", 1)[0] in KINDS}
    return sorted(found, key=lambda name: (name != "student", len(name), name))


def accuracies(epoch: Epoch) -> dict[str, float]:
    """On held-out data, by learner, as far as it was measured."""
    known = {"student": epoch.accuracy, "moving average": epoch.ema_accuracy}
    return {name: share for name, share in known.items() if share is not None} | epoch.stones


@contextmanager
def display(settings: RunConfig, folder: Path) -> Iterator[Display]:
    """For a run in ``folder``; its trackers are open meanwhile."""
    trackers = Trackers(settings.track, folder, settings.dump(), warn=warn)
    try:
        if not out.is_terminal:
            yield Display(settings, None, trackers)
            return
        with Live(console=out, transient=True, auto_refresh=False) as live:
            yield Display(settings, live, trackers)
    finally:
        trackers.close()


def in_words(losses: dict[str, float]) -> str:
    """``loss 9.03  ce 0.40|0.59 0.51  kd 1.63|2.55 1.47``: the student, then stone by stone.

    >>> in_words({"total": 9.03, "ce student": 0.4, "ce stone 2": 0.5, "ce stone 1": 0.59})
    'loss 9.030  ce 0.40|0.59 0.50'
    """
    shown = [f"loss {losses['total']:.3f}"] if "total" in losses else []
    stones = [name for name in _learners(losses) if name != "student"]
    for kind in KINDS:
        if f"{kind} student" not in losses:
            continue
        found = (losses.get(f"{kind} {stone}") for stone in stones)
        values = " ".join("–" if value is None else f"{value:.2f}" for value in found)
        shown.append(f"{kind} {losses[f'{kind} student']:.2f}" + (f"|{values}" if values else ""))
    return "  ".join(shown)


def duration(seconds: float) -> str:
    """
    >>> duration(59.6), duration(7260)
    ('1 min 0 s', '2 h 1 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def memory() -> str:
    """The most that was held so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak * (1 if sys.platform == 'darwin' else 1024) / 1e9:.1f} GB"


def _print(line: str) -> None:
    out.print(line, markup=False, soft_wrap=True)
