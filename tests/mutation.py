"""Small changes to the code that guards files and graphs, each of which a test must notice.

``python -m tests.mutation [AREA …] --count N --seed S --jobs J`` draws N changes in each area, runs
on each, in a forked process, a minute of those of its tests that reach the changed line (of all,
where none does: it may run at import, or in other processes), and prints what none of them noticed.
Changes that change nothing are told apart by a person, in mutation-reviewed.txt.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import coverage
import numpy  # noqa: F401  so that no forked process need import it, and the next seven
import onnx  # noqa: F401
import onnxruntime  # noqa: F401
import onnxscript  # noqa: F401
import pydantic  # noqa: F401
import pytest
import torch
import torch._dynamo  # noqa: F401
import typer  # noqa: F401

ROOT = Path(__file__).parent.parent
MINUTE = 60.0  # seconds, as the tests took them without a change
REVIEWED = Path(__file__).with_name("mutation-reviewed.txt")


@dataclass(frozen=True)
class Area:
    """Modules of one concern, and the tests that answer for them; the fastest first."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]


AREAS = {
    "checkpoint": Area(
        ("runs", "checkpoints.disk", "checkpoints.store"),
        (
            "test_runs.py",
            "test_outputs.py",
            "test_reader.py",
            "test_checkpoints.py",
            "test_types.py",
        ),
    ),
    "loader": Area(
        ("checkpoints.reader", "checkpoints.archive", "checkpoints.pickles"),
        (
            "test_archive.py",
            "test_pickles.py",
            "test_reader.py",
            "test_choke_point.py",
            "test_checkpoints.py",
            "test_hostile_files.py",
            "test_types.py",
        ),
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
            "test_ladder.py",
            "test_types.py",
        ),
    ),
    "export": Area(
        ("exporting.gate", "exporting.beside", "exporting.trial", "exporting.soundness"),
        ("test_soundness.py", "test_hostile_onnx.py", "test_exporting.py", "test_types.py"),
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


class Source:
    """A module of kdsurgeon as it is: its text, and every change that is tried in it."""

    def __init__(self, module: str) -> None:
        self.path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        self.text = self.path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.statements = [node for node in ast.walk(self.tree) if isinstance(node, ast.stmt)]
        self.changes = tuple(changes(self.tree))  # none of which is ever applied here

    def around(self, line: int) -> list[ast.stmt]:
        """The statements that a line lies in, from the outside in."""
        return [node for node in self.statements if _first(node) <= line <= (node.end_lineno or 0)]


def _first(statement: ast.stmt) -> int:
    """Its first line, that of a decorator if it has any."""
    decorators = getattr(statement, "decorator_list", ())
    return min([statement.lineno, *(each.lineno for each in decorators)])


source_of = cache(Source)


@dataclass(frozen=True)
class Mutant(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """A module of kdsurgeon with its ``number``-th change; imported in its place."""

    module: str
    number: int

    @property
    def source(self) -> Source:
        return source_of(self.module)

    @property
    def change(self) -> Change:
        return self.source.changes[self.number]

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.source.path, loader=self)

    def get_source(self, fullname: str) -> str:
        return self.source.text

    def get_code(self, fullname: str):
        tree = ast.parse(self.source.text)
        list(changes(tree))[self.number].apply()
        return compile(ast.fix_missing_locations(tree), str(self.source.path), "exec")

    @property
    def statement(self) -> range:
        """The lines of the innermost statement, without those of the statements in it."""
        line = self.change.line
        node = self.source.around(line)[-1]
        inner = [each.lineno for each in ast.iter_child_nodes(node) if isinstance(each, ast.stmt)]
        end = min((at for at in inner if at > line), default=(node.end_lineno or line) + 1)
        return range(_first(node), max(end, line + 1))

    @property
    def _definitions(self) -> list[ast.FunctionDef | ast.ClassDef]:
        around = self.source.around(self.change.line)
        return [node for node in around if isinstance(node, ast.FunctionDef | ast.ClassDef)]

    @property
    def is_in_function(self) -> bool:
        """Whether it runs when a function is called, not when its module is imported."""
        return any(
            isinstance(node, ast.FunctionDef) and self.change.line >= node.body[0].lineno
            for node in self._definitions
        )

    @property
    def name(self) -> str:
        """The same wherever the function stands in its file."""
        inside = [node.name for node in self._definitions]
        place = ".".join([self.module.removeprefix("kdsurgeon."), *inside])
        text = self.source.text.splitlines()[self.change.line - 1].strip()
        return f"{place} | {text} | {self.change.what}"

    def __str__(self) -> str:
        return f"{self.source.path.relative_to(ROOT)}:{self.change.line}: {self.name}"


def mutants(area: Area) -> list[Mutant]:
    modules = [f"kdsurgeon.{name}" for name in area.modules]
    return [
        Mutant(module, number)
        for module in modules
        for number in range(len(source_of(module).changes))
    ]


def reviewed() -> dict[str, str]:
    """The changes that a person found to change nothing that could be noticed, each with why."""
    entries: dict[str, str] = {}
    for line in REVIEWED.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, why = line.rpartition(" | ")
            entries[name] = why
    return entries


@dataclass(frozen=True)
class Reach:
    """Which tests run which lines, and how long each test takes, measured without a change."""

    tests: Mapping[tuple[str, int], list[str]]  # by path and line
    seconds: Mapping[str, float]

    @classmethod
    def measure(cls, area: Area) -> Reach:
        """Raises AssertionError where the tests fail as they are."""
        with TemporaryDirectory() as folder:
            record = Path(folder) / "reach.json"
            paths = [str(source_of(f"kdsurgeon.{name}").path) for name in area.modules]
            passed = _passes(area, None, Watch(paths, record), limit=1800)
            assert passed, "the tests fail without any change"
            lines, seconds = json.loads(record.read_text(encoding="utf-8"))
        return cls({(path, line): tests for path, line, tests in lines}, seconds)

    def order(self, mutant: Mutant) -> list[str]:
        """A minute of the tests that reach what is changed, the fastest first.

        What runs at import is reached by all. What no test reaches may run in a process that one of
        them starts: those that take their time come first then.
        """
        path = str(mutant.source.path)
        found = {test for at in mutant.statement for test in self.tests.get((path, at), ())}
        ordered = sorted(found or self.seconds, key=lambda test: (self.seconds[test], test))
        if not found and mutant.is_in_function:
            ordered.reverse()
        sums = accumulate((self.seconds[test] for test in ordered[:-1]), initial=0.0)
        return [test for test, before in zip(ordered, sums, strict=True) if before < MINUTE]


class Watch:
    """A plugin of pytest that keeps which test ran which line of ``paths``."""

    def __init__(self, paths: list[str], record: Path) -> None:
        self.record, self.seconds = record, defaultdict(float)
        self.coverage = coverage.Coverage(
            data_file=str(record.with_suffix(".coverage")), include=paths, config_file=False
        )
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.coverage.switch_context(item.nodeid)
        try:
            return (yield)
        finally:
            self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self):
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = [
            (path, line, [test for test in tests if test])
            for path in data.measured_files()
            for line, tests in data.contexts_by_lineno(path).items()
        ]
        self.record.write_text(json.dumps([lines, self.seconds]), encoding="utf-8")


@dataclass(frozen=True)
class Only:
    """A plugin of pytest that runs these tests, in this order, and no others."""

    tests: list[str]

    def pytest_collection_modifyitems(self, items):
        named = {item.nodeid: item for item in items}
        items[:] = [named[test] for test in self.tests]


def _passes(area: Area, mutant: Mutant | None, plugin: Watch | Only, limit: float) -> bool:
    """Whether the tests pass, in a process of their own that may take so many seconds."""
    child = os.fork()
    if child == 0:
        _play(area, mutant, plugin)
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _play(area: Area, mutant: Mutant | None, plugin: Watch | Only) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        if mutant is not None:
            sys.meta_path.insert(0, mutant)
        files = [str(ROOT / "tests" / name) for name in area.tests]
        quiet = ["-x", "-p", "no:randomly", "-p", "no:cacheprovider"]
        code = pytest.main([*quiet, *files], plugins=[plugin])
    finally:
        os._exit(int(code))


def _report(name: str, count: int, seed: int, jobs: int) -> None:
    area, started = AREAS[name], time.monotonic()
    reach = Reach.measure(area)
    limit = 30 + 3 * (time.monotonic() - started)
    every, known = mutants(area), reviewed()
    drawn = random.Random(seed).sample(every, min(count, len(every)))

    def survives(mutant: Mutant) -> bool:
        return _passes(area, mutant, Only(reach.order(mutant)), limit)

    idle = left = 0
    with ThreadPoolExecutor(jobs) as pool:
        for mutant, survived in zip(drawn, pool.map(survives, drawn), strict=True):
            if survived and mutant.name in known:
                idle += 1
            elif survived:
                left += 1
                print(f"  not noticed: {mutant}", flush=True)
    noticed = len(drawn) - idle - left
    print(
        f"{name}: {noticed} of {len(drawn)} changes noticed, {idle} others change nothing, "
        f"{left} are left: {noticed / max(1, noticed + left):.1%}; "
        f"of {len(every)} there are, seed {seed}, {time.monotonic() - started:.0f} s",
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
