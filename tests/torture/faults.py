"""Every call of the writer × every error × every index; and a disk that is full at every byte.

What must hold after each: the newest checkpoint that was saved before still loads, and so does
every student; an error names the file and ends with its exit code; a run that went on in spite of
it comes to the same result or says so in train.log; resumed, it ends in the bits of a run that
nothing happened to.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from kdsurgeon.errors import ResourceError, SurgeonError
from kdsurgeon.runs import Run
from tests.torture.interposed import ERRORS, Died, Disk, Faulty, Full
from tests.torture.sessions import Kept, Session, differences, leftovers, missing, outcome

KINDS = ("SIGKILL", *ERRORS)


@dataclass(frozen=True)
class Case:
    """A fault: at which call, of what kind, after half of a write, for good."""

    index: int
    error: str
    half: bool = False
    lasting: bool = False

    def __str__(self) -> str:
        words = [self.error, f"at call {self.index}"]
        return " ".join(words + ["half-way"] * self.half + ["and from then on"] * self.lasting)


class Faults:
    """A folder to try cases in, and what a run comes to without any."""

    def __init__(self, base: Path) -> None:
        self.base = base
        with _stopped_clocks(), Disk(base) as disk:
            Session(base / "whole")()
        self.calls = disk.calls
        self.wanted = outcome(base / "whole")
        self._ends: dict[str, list[str]] = {}  # by the state that a fault left

    def cases(self) -> Iterator[Case]:
        """All of them; a disk that is full stays so, and is full for one call, too."""
        for index, call in enumerate(self.calls):
            for error in KINDS:
                yield Case(index, error)
                if call.name == "write":
                    yield Case(index, error, half=True)
            yield Case(index, "ENOSPC", lasting=True)

    def problems(self, case: Case) -> list[str]:
        """What is wrong after one fault; nothing, if all is well."""
        folder = self.base / "run"
        shutil.rmtree(folder, ignore_errors=True)
        disk = Faulty(self.base, case.index, case.error, half=case.half, lasting=case.lasting)
        with _stopped_clocks():
            found = self._first(folder, disk, case)
            state = _digest(folder)
            if state not in self._ends:
                self._ends[state] = self._end(folder)
        return found + self._ends[state]

    def _first(self, folder: Path, disk: Faulty, case: Case) -> list[str]:
        """The run up to the fault and what it makes of it."""
        watch = _Watch(folder)
        problems: list[str] = []
        error: BaseException | None = None
        try:
            with disk, watch:
                Session(folder)()
        except (Died, SurgeonError) as caught:
            error = caught
        except BaseException as caught:
            return [f"{type(caught).__name__}: {caught}"]
        problems += missing(folder, watch.kept) if folder.exists() else []
        if disk.hit is None:
            return [*problems, "the fault was not reached"]
        if case.error == "SIGKILL":
            return problems if isinstance(error, Died) else [*problems, "survived its death"]
        if error is None:
            return problems + _unsaid(folder, self.wanted)
        return problems + _unclear(error, folder, case)

    def _end(self, folder: Path) -> list[str]:
        try:
            Session(folder)()
        except SurgeonError as error:
            return [f"cannot be resumed: {error}"]
        problems = [f"{name} differs" for name in differences(outcome(folder), self.wanted)]
        return problems + [f"left: {path}" for path in leftovers(folder)]


class _Watch:
    """Notes what is saved as soon as ``save_checkpoint`` has returned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept = Kept(None, frozenset())

    def __enter__(self) -> _Watch:
        save = Run.save_checkpoint

        def saved(run: Run, step: int, *args: Any, **options: Any) -> Path:
            path = save(run, step, *args, **options)
            students = {file.name for file in (self.folder / "student").glob("*.safetensors")}
            self.kept = Kept(step, frozenset(students))
            return path

        self._patch = mock.patch.object(Run, "save_checkpoint", saved)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def _unsaid(folder: Path, wanted: dict[str, Any]) -> list[str]:
    """Where a run went on over an error: all must be there, and the log must say what happened."""
    problems = [f"{name} differs" for name in differences(outcome(folder), wanted)]
    log = (folder / "train.log").read_text(encoding="utf-8")
    if "could not be removed" not in log and "made room" not in log:
        problems.append("an error was passed over in silence")
    return problems


def _unclear(error: BaseException, folder: Path, case: Case) -> list[str]:
    problems = []
    if not isinstance(error, ResourceError) or error.exit_code != 6:
        problems.append(f"is a {type(error).__name__}, not a ResourceError")
    if str(folder) not in str(error):
        problems.append(f"names no file: {error}")
    if case.error == "ENOSPC" and not ("needs" in str(error) or "are free" in str(error)):
        problems.append(f"names no need: {error}")
    return problems


@contextmanager
def _stopped_clocks() -> Iterator[None]:
    """Equal runs leave equal bytes."""
    with mock.patch("time.monotonic", lambda: 0.0):
        yield


def _digest(folder: Path) -> str:
    """The state of a run folder, whatever the log says and the time is."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.name not in ("train.log", ".lock"):
            digest.update(f"{path.relative_to(folder)}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"")
    return digest.hexdigest()


# a full disk ─────────────────────────────────────────────────────────────────────────────────────


class FullDisk:
    """A run that goes on with its last epoch on a disk that has room for only a part of it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        with _stopped_clocks():
            Session(base / "whole", epochs=3)()
            self.wanted = outcome(base / "whole")
            begun = base / "begun"
            with suppress(Died), _dying_after(3), Disk(base):
                Session(begun, epochs=3)()
            shutil.copytree(begun, base / "run")
            with Full(base, 1 << 40) as disk:
                Session(base / "run", epochs=3)()
        self.size = disk.written  # type: ignore[attr-defined]
        self.before = Kept.of(begun, [])

    def rooms(self, count: int) -> list[int]:
        """Byte offsets at which the disk is full, evenly spread over what would be written."""
        return [index * self.size // count for index in range(count)]

    def problems(self, room: int, *, frees: bool) -> list[str]:
        """What is wrong after it was full at ``room`` bytes; nothing, if all is well."""
        folder = self.base / "run"
        shutil.rmtree(folder)
        shutil.copytree(self.base / "begun", folder)
        problems: list[str] = []
        with _stopped_clocks():
            try:
                with Full(self.base, room, frees=frees):
                    Session(folder, epochs=3)()
            except SurgeonError as error:
                problems += _unclear(error, folder, Case(0, "ENOSPC"))
            except OSError as error:
                problems.append(f"{type(error).__name__} came through: {error}")
            else:
                if not frees:
                    problems.append("was not refused")
            problems += missing(folder, self.before)
            problems += [f"left: {path}" for path in leftovers(folder)]
            Session(folder, epochs=3)()
        return problems + differences(outcome(folder), self.wanted)


@contextmanager
def _dying_after(count: int) -> Iterator[None]:
    """Let the process die when so many checkpoints have been saved."""
    save, left = Run.save_checkpoint, [count]

    def saved(run: Run, *args: Any, **options: Any) -> Path:
        path = save(run, *args, **options)
        left[0] -= 1
        if not left[0]:
            raise Died
        return path

    with mock.patch.object(Run, "save_checkpoint", saved):
        yield
