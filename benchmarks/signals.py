"""Seconds from a signal to the end of the command, in each phase of a run.

    python -m benchmarks.signals

What is asked for: saved within two seconds and the step that runs, and after a second Ctrl-C
within half a second. One process, one thread, the digits; the suite checks the exit codes and what
is saved (tests/test_resume.py), this the time. torch 2.13.0, 2026-11-21, on two cores that seven
other processes kept busy; a step takes about 0.05 s then.

    phase            SIGINT   SIGTERM   seconds
    load               0.00      0.00
    calibrate          0.00      0.00
    train              0.04      0.16
    evaluation         0.09      0.19
    save               0.03      0.04
    prune              0.01      0.00
    export             0.01      0.01
    data wait          0.06      0.18
    second Ctrl-C      0.00

16 of 16 ended with 130 or 143.
"""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.models import digit_models
from tests.resuming import fresh
from tests.test_resume import PHASES, signalled


def main() -> None:
    table = Table("phase", "signal", "exit code", "seconds")
    for phase in PHASES:
        for number in (signal.SIGINT, signal.SIGTERM):
            table.add_row(phase, number.name, *_measured(phase, number, twice=False))
    table.add_row("train", "SIGINT twice", *_measured("train", signal.SIGINT, twice=True))
    Console().print(table)


def _measured(phase: str, number: signal.Signals, *, twice: bool) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as name:
        folder = digit_models(Path(name))
        code, seconds = fresh(signalled, folder, phase, number, twice)
    return str(code), f"{seconds:.2f}"


if __name__ == "__main__":
    main()
