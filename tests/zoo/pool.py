"""Run tasks one by one in forked children, so that a crash is a result and not an end."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

Record = dict[str, Any]
Task = Callable[[str, Record], None]  # fills the record, or raises


@dataclass(frozen=True)
class Limits:
    seconds: float
    gigabytes: float


@dataclass(frozen=True)
class _Running:
    name: str
    process: BaseProcess
    started: float


def run(names: Iterable[str], task: Task, limits: Limits, jobs: int = 1) -> Iterator[Record]:
    """The record of every name as it is finished; ``error`` in it says what went wrong.

    Children are forks of this process: what is loaded or cached here is there, too.
    """
    context = multiprocessing.get_context("fork")
    gc.freeze()  # else every child's first collection copies all pages
    waiting, running = iter(names), dict[Connection, _Running]()
    while True:
        while len(running) < jobs and (name := next(waiting, None)) is not None:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(there, name, task, limits))
            process.start()
            there.close()
            running[here] = _Running(name, process, time.monotonic())
        if not running:
            return
        ready = set(wait(list(running), timeout=1.0))
        for pipe, one in list(running.items()):
            if pipe in ready or time.monotonic() - one.started > limits.seconds:
                del running[pipe]
                yield _collect(pipe, one, limits)


def _child(pipe: Connection, name: str, task: Task, limits: Limits) -> None:
    size = int(limits.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    record: Record = {"name": name}
    try:
        task(name, record)
    except BaseException as error:  # a model may raise anything
        record["error"] = one_line(error)
    pipe.send(record)
    pipe.close()


def _collect(pipe: Connection, one: _Running, limits: Limits) -> Record:
    record: Record = {"name": one.name, "error": f"time limit of {limits.seconds:.0f} s"}
    if pipe.poll():
        try:
            record = pipe.recv()
        except EOFError:
            one.process.join()
            record["error"] = f"the process died: exit code {one.process.exitcode}"
    one.process.kill()
    one.process.join()
    pipe.close()
    return {**record, "seconds": round(time.monotonic() - one.started, 2)}


def one_line(error: BaseException) -> str:
    """The message in one line, with the kind of error where it is not one of ours."""
    text = str(error) or type(error).__name__
    line = " | ".join(" ".join(part.split()) for part in text.splitlines() if part.strip())
    is_ours = type(error).__module__.startswith(("kdsurgeon", "tests"))
    return (line if is_ours else f"{type(error).__name__}: {line}")[:600]
