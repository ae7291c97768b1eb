"""Small changes to the code that guards files and graphs, each of which a test must notice.

``python -m tests.mutation [AREA …] --count N --seed S --jobs J`` draws N changes in each area, runs
its tests on each in a forked process, and prints what none of them noticed, to be read by a person:
some changes change nothing that could be noticed.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy  # noqa: F401  so that no forked process need import it, and the next three
import onnx  # noqa: F401
import onnxruntime  # noqa: F401
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Area:
    """Modules of one concern, and the tests that answer for them; the fastest first."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]


AREAS = {
    "checkpoint": Area(
        ("runs", "checkpoints.disk", "checkpoints.store"),
        ("test_runs.py", "test_outputs.py", "test_checkpoints.py"),
    ),
    "loader": Area(
        ("checkpoints.reader", "checkpoints.archive", "checkpoints.pickles"),
        ("test_archive.py", "test_choke_point.py", "test_checkpoints.py", "test_hostile_files.py"),
    ),
    "surgery": Area(
        ("stones.surgery", "stones.training_graph", "partitioning"),
        (
            "test_partitioning.py",
            "test_sets.py",
            "test_frozen.py",
            "test_plan.py",
            "test_stones.py",
            "test_alignment.py",
            "test_sharding.py",
            "test_ladder.py",
        ),
    ),
    "export": Area(
        ("exporting.gate", "exporting.beside", "exporting.trial", "exporting.soundness"),
        ("test_hostile_onnx.py", "test_exporting.py"),
    ),
}

_OPPOSITE: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What is done to a syntax tree at a line."""

    line: int
    what: str
    apply: Callable[[], None]


def changes(tree: ast.Module) -> Iterator[Change]:
    """Every change that is tried, in the order of the tree.

    >>> [(each.line, each.what) for each in changes(ast.parse("def f(x):\\n return x < 3"))]
    [(2, 'return None'), (2, 'Lt → LtE'), (2, '3 → 4')]
    """
    notes = {id(part) for node in ast.walk(tree) for part in _annotations(node)}
    for node in ast.walk(tree):
        if id(node) not in notes:
            yield from _of(node)


def _annotations(node: ast.AST) -> Iterator[ast.AST]:
    """What no run evaluates, or only for a type checker."""
    for name in ("annotation", "returns"):
        if part := getattr(node, name, None):
            yield from ast.walk(part)
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        yield from ast.walk(node)


def _of(node: ast.AST) -> Iterator[Change]:
    line = getattr(node, "lineno", 0)
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        for at, statement in enumerate(block if isinstance(block, list) else ()):
            if isinstance(statement, ast.Raise) or _is_call(statement):
                text = ast.unparse(statement).splitlines()[0][:60]
                yield Change(statement.lineno, f"without {text}", _setter(block, at, ast.Pass()))
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        opposite = ast.UnaryOp(ast.Not(), node.test)
        yield Change(line, f"not {ast.unparse(node.test)[:60]}", _setter(node, "test", opposite))
    if isinstance(node, ast.Return) and not isinstance(node.value, ast.Constant | None):
        yield Change(line, "return None", _setter(node, "value", ast.Constant(None)))
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _OPPOSITE:
        yield _turned(line, node.ops[0], lambda new: _setter(node.ops, 0, new))
    if isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in _OPPOSITE:
        yield _turned(line, node.op, lambda new: _setter(node, "op", new))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int):
        other = not node.value if isinstance(node.value, bool) else node.value + 1
        yield Change(line, f"{node.value} → {other}", _setter(node, "value", other))


def _is_call(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)


def _turned(
    line: int, operator: ast.AST, setter: Callable[[ast.AST], Callable[[], None]]
) -> Change:
    new = _OPPOSITE[type(operator)]()
    return Change(line, f"{type(operator).__name__} → {type(new).__name__}", setter(new))


def _setter(home: ast.AST | list, place: str | int, value: object) -> Callable[[], None]:
    if isinstance(home, list):
        return lambda: home.__setitem__(place, value)  # pyright: ignore
    return lambda: setattr(home, str(place), value)


@dataclass(frozen=True)
class Mutant(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """A module of kdsurgeon with its ``number``-th change; imported in its place."""

    module: str
    number: int

    @property
    def path(self) -> Path:
        return ROOT.joinpath(*self.module.split(".")).with_suffix(".py")

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_source(self, fullname: str) -> str:
        return self.path.read_text(encoding="utf-8")

    def get_code(self, fullname: str):
        tree = ast.parse(self.get_source(fullname))
        list(changes(tree))[self.number].apply()
        return compile(ast.fix_missing_locations(tree), str(self.path), "exec")

    def __str__(self) -> str:
        change = list(changes(ast.parse(self.get_source(self.module))))[self.number]
        return f"{self.path.relative_to(ROOT)}:{change.line}: {change.what}"


def mutants(area: Area) -> list[Mutant]:
    found = []
    for name in area.modules:
        first = Mutant(f"kdsurgeon.{name}", 0)
        tree = ast.parse(first.get_source(first.module))
        found += [Mutant(first.module, number) for number, _ in enumerate(changes(tree))]
    return found


def passes(tests: Sequence[str], mutant: Mutant | None, limit: float) -> bool:
    """Whether the tests pass, in a process of their own that may take so many seconds."""
    child = os.fork()
    if child == 0:
        _play(tests, mutant)
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _play(tests: Sequence[str], mutant: Mutant | None) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        if mutant is not None:
            sys.meta_path.insert(0, mutant)
        files = [str(ROOT / "tests" / name) for name in tests]
        code = pytest.main(["-x", "-p", "no:randomly", "-p", "no:cacheprovider", *files])
    finally:
        os._exit(int(code))


def _report(name: str, count: int, seed: int, jobs: int) -> None:
    area, started = AREAS[name], time.monotonic()
    assert passes(area.tests, None, limit=1800), f"{name}: the tests fail without any change"
    limit = 30 + 3 * (time.monotonic() - started)
    every = mutants(area)
    drawn = random.Random(seed).sample(every, min(count, len(every)))
    with ThreadPoolExecutor(jobs) as pool:
        left = pool.map(lambda mutant: passes(area.tests, mutant, limit), drawn)
        unnoticed = 0
        for mutant, passed in zip(drawn, left, strict=True):
            if passed:
                print(f"  not noticed: {mutant}", flush=True)
            unnoticed += passed
    noticed = len(drawn) - unnoticed
    print(
        f"{name}: {noticed} of {len(drawn)} changes noticed, of {len(every)} there are; "
        f"seed {seed}, {time.monotonic() - started:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"of {', '.join(AREAS)}")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    for name in given.areas or AREAS:
        _report(name, given.count, given.seed, given.jobs)


if __name__ == "__main__":
    main()
