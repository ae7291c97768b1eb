"""A power cut after every call of the writer, on a disk that keeps only what was flushed.

After Pillai et al. 2014, "All file systems are not created equal" (OSDI, ALICE): the calls of real
saves are recorded, then every state is built that a disk may be in when the power goes. A write
that was not flushed may be there in part, as zeros, or not at all; a name that was given, moved or
taken away may be as before until its folder is flushed, independently of all others.

A state is bad when a checkpoint that ``save_checkpoint`` had returned is gone, when anything looks
damaged although only the power went, or when metrics do not reach as far as the checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch

from kdsurgeon.checkpoints import read_sealed, write_tensors
from kdsurgeon.errors import SurgeonError
from kdsurgeon.runs import Run
from tests.torture import seeded
from tests.torture.interposed import REAL, Call, Disk

SAVES = 4
ALL_SUBSETS = 8  # so many open names are tried in every combination, more of them in part


@dataclass(frozen=True)
class Step:
    """One recorded call, in terms of files and folders themselves, not of their paths."""

    kind: str  # name, move, drop, write, flush, return
    folder: int = 0
    name: str = ""
    to_folder: int = 0
    to_name: str = ""
    node: int = 0
    data: bytes = b""
    saved: int = -1


@dataclass(frozen=True)
class Fault:
    """What is wrong with a writer: flushes that do nothing, or a fault of ``seeded``."""

    is_deaf: Callable[[Call], bool] = lambda _: False
    patched: Callable[[], AbstractContextManager[None]] = nullcontext


SOUND = Fault()


class Recorder(Disk):
    """Turns the calls below ``root`` into steps, without the flushes that a fault ignores."""

    def __init__(self, root: Path, is_deaf: Callable[[Call], bool]) -> None:
        super().__init__(root)
        self.is_deaf = is_deaf
        self.steps: list[Step] = []
        self.folders = {0}
        self._nodes = {self.root: 0}

    def _new(self, path: Path, *, is_folder: bool) -> None:
        node = len(self._nodes) + len(self.steps) + 1
        self._nodes[str(path)] = node
        if is_folder:
            self.folders.add(node)
        self.steps.append(Step("name", self._of(path.parent), path.name, node=node))

    def _of(self, path: Path) -> int:
        return self._nodes[str(path)]

    def before(self, call: Call) -> None:
        if call.name == "open" and call.flags & os.O_CREAT and not call.path.exists():
            self._new(call.path, is_folder=False)

    def write(self, call: Call, descriptor: int, data: Any) -> int:
        written = REAL.write(descriptor, data)
        self.steps.append(
            Step("write", node=self._of(call.path), data=bytes(memoryview(data)[:written]))
        )
        return written

    def done(self, call: Call, args: tuple[Any, ...], result: Any) -> None:
        path, target = call.path, call.target
        if call.name == "mkdir":
            self._new(path, is_folder=True)
        elif call.name == "fsync" and not self.is_deaf(call):
            self.steps.append(Step("flush", node=self._of(path)))
        elif target is not None:
            node = self._of(path)
            places = self._of(path.parent), path.name, self._of(target.parent), target.name
            self.steps.append(Step("move", *places, node=node))
            for known in [k for k in self._nodes if k == str(path) or k.startswith(f"{path}/")]:
                self._nodes[str(target) + known[len(str(path)) :]] = self._nodes.pop(known)
        elif call.name in ("unlink", "rmdir"):
            self.steps.append(Step("drop", self._of(path.parent), path.name))


def record(base: Path, fault: Fault) -> Recorder:
    """The steps of four saves with metrics, students, pruning, a best one and a repeated one."""
    base.mkdir()
    disk = Recorder(base, fault.is_deaf)
    with fault.patched(), disk:
        run = Run.create(base / "run")
        try:
            run.write("config.yaml", "epochs: 1\n")
            for index in range(SAVES):
                step = min(index, SAVES - 2)  # the last is saved twice
                if index:
                    run.add_metrics({"epoch": index})
                weights = {"weight": torch.full((3,), float(step))}
                write_tensors(weights, run.path / "student" / "last.safetensors")
                state = {"training": {"step": step, "lines": index}}
                run.save_checkpoint(step, {"student": weights}, state, best=index == 1)
                disk.steps.append(Step("return", saved=step))
        finally:
            run.close()
    return disk


# the states of the disk ──────────────────────────────────────────────────────────────────────────


def states(disk: Recorder) -> Iterator[tuple[int, int, dict[str, bytes | None]]]:
    """(crash point, step saved by then, tree by path) for every distinct tree of every point."""
    seen: set[tuple[int, bytes]] = set()
    for end in range(len(disk.steps) + 1):
        past = disk.steps[:end]
        saved = max((step.saved for step in past if step.kind == "return"), default=-1)
        for lost, content in product(_losses(past), _contents(past)):
            tree = _tree(disk, past, lost, content)
            key = (saved, _digest(tree))
            if key not in seen:
                seen.add(key)
                yield end, saved, tree


def _losses(past: Sequence[Step]) -> list[frozenset[int]]:
    """Which changes of names the disk may have forgotten."""
    flushed = _flushed(past)
    open_ = [
        index
        for index, step in enumerate(past)
        if step.kind in ("name", "move", "drop")
        and min(flushed.get(each, -1) for each in _folders_of(step)) < index
    ]
    if len(open_) <= ALL_SUBSETS:
        sizes: Sequence[int] = range(len(open_) + 1)
    else:
        sizes = (0, 1, 2, len(open_) - 2, len(open_) - 1, len(open_))
    subsets = [frozenset(each) for size in sizes for each in combinations(open_, size)]
    prefixes = [frozenset(open_[cut:]) for cut in range(len(open_))]
    return list(dict.fromkeys([*subsets, *prefixes]))


def _folders_of(step: Step) -> set[int]:
    return {step.folder, step.to_folder} if step.kind == "move" else {step.folder}


def _flushed(past: Sequence[Step]) -> dict[int, int]:
    """At which call each file and folder was brought to the disk last."""
    return {step.node: index for index, step in enumerate(past) if step.kind == "flush"}


CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "all": lambda data: data,
    "nothing": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
}


def _contents(past: Sequence[Step]) -> list[dict[int, str]]:
    """What may have become of each write that was not flushed: one at a time, and all of them."""
    flushed = _flushed(past)
    open_ = [
        index
        for index, step in enumerate(past)
        if step.kind == "write" and flushed.get(step.node, -1) < index
    ]
    found: list[dict[int, str]] = [{}]
    for fate in ("nothing", "half", "zeros"):
        found += [{index: fate} for index in open_]
        found.append(dict.fromkeys(open_, fate))
    return found


def _tree(
    disk: Recorder, past: Sequence[Step], lost: frozenset[int], content: dict[int, str]
) -> dict[str, bytes | None]:
    folders: dict[int, dict[str, int]] = {0: {}}
    files: dict[int, bytes] = {}
    for index, step in enumerate(past):
        if step.kind == "write":
            files[step.node] = files.get(step.node, b"") + CONTENTS[content.get(index, "all")](
                step.data
            )
        if index in lost or step.kind not in ("name", "move", "drop"):
            continue
        if step.kind == "move":
            folders.setdefault(step.folder, {}).pop(step.name, None)
            folders.setdefault(step.to_folder, {})[step.to_name] = step.node
        elif step.kind == "name":
            folders.setdefault(step.folder, {})[step.name] = step.node
        else:
            folders.setdefault(step.folder, {}).pop(step.name, None)
    return dict(_walk(0, "", folders, files, disk.folders))


def _walk(
    node: int,
    prefix: str,
    folders: dict[int, dict[str, int]],
    files: dict[int, bytes],
    are_folders: set[int],
) -> Iterator[tuple[str, bytes | None]]:
    for name, child in folders.get(node, {}).items():
        path = f"{prefix}{name}"
        if child in are_folders:
            yield path, None
            yield from _walk(child, f"{path}/", folders, files, are_folders)
        else:
            yield path, files.get(child, b"")


def _digest(tree: dict[str, bytes | None]) -> bytes:
    digest = hashlib.sha256()
    for path in sorted(tree):
        content = tree[path]
        digest.update(f"{path} {-1 if content is None else len(content)}\n".encode())
        digest.update(content or b"")
    return digest.digest()


# what must hold of them ──────────────────────────────────────────────────────────────────────────


def problem(folder: Path, saved: int, tree: dict[str, bytes | None]) -> str | None:
    """What is bad about a state in which ``saved`` was the last step to be saved; None if nothing.

    ``folder`` is filled with it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name in sorted(tree):
        content = tree[name]
        path = folder / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    run_folder = folder / "run"
    if not (run_folder / "config.yaml").is_file():
        return None if saved < 0 else f"the run is gone, step {saved} with it"
    try:
        with Run.resume(run_folder) as run:
            return _problem_of(run, saved)
    except SurgeonError as error:
        return str(error)


def _problem_of(run: Run, saved: int) -> str | None:
    checkpoint, complaints = run.latest_checkpoint()
    if complaints:
        return complaints[0]
    if checkpoint is None:
        return None if saved < 0 else f"step {saved} is gone"
    found = checkpoint.state["training"]
    if found["step"] < saved:
        return f"step {saved} is gone, {found['step']} is the newest"
    run.rewind(checkpoint)
    if len(run.metrics()) != found["lines"]:
        return f"{len(run.metrics())} lines of metrics, {found['lines']} when it was saved"
    for student in (run.path / "student").glob("*.safetensors"):
        read_sealed(student)
    return None


def search(base: Path, fault: Fault = SOUND, *, first: bool = False) -> tuple[int, list[str]]:
    """How many states there are, and what is bad about which; only the first one, if so asked."""
    disk = record(base / "recorded", fault)
    found, count = [], 0
    for end, saved, tree in states(disk):
        count += 1
        bad = problem(base / "state", saved, tree)
        if bad is not None:
            found.append(f"power cut after call {end} of {len(disk.steps)}: {bad}")
            if first:
                break
    return count, found


# faults put into the writer ──────────────────────────────────────────────────────────────────────


FAULTS = {
    "files are not flushed": Fault(is_deaf=lambda call: call.path.is_file()),
    "folders are not flushed": Fault(is_deaf=lambda call: call.path.is_dir()),
    "drafts are not flushed": Fault(is_deaf=lambda call: call.path.name.startswith(".tmp-")),
    "the new name is not flushed": Fault(is_deaf=lambda call: call.path.name == "checkpoints"),
    "pruned before published": Fault(patched=seeded.pruned_before_published),
    "written in place": Fault(patched=seeded.written_in_place_manifest_first),
    "removed before replaced": Fault(patched=seeded.removed_before_replaced),
    "metrics are not flushed": Fault(patched=seeded.metrics_are_not_flushed),
    "students are overwritten": Fault(patched=seeded.students_are_overwritten),
}
