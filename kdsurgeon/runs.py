"""The run folder: whole checkpoints or none, a student that always loads, a record of what ran.

    config.yaml  plan.yaml  run.json  metrics.jsonl  train.log
    evaluation.json  report.html  MANIFEST.json (when it has ended)
    checkpoints/step-000123/{student,adapters,optimizer}.safetensors state.json MANIFEST.json
    student/{last,best}.safetensors

A checkpoint is built in a draft folder beside its final name; every file, then the draft, is
flushed; then it is renamed and the folder above is flushed. What it replaces goes only after the
new one was read back. A manifest lists size and sha256 of each file and seals itself, so a changed
byte is noticed and the checkpoint before is used instead. Nothing in it is a pickle.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from os.path import samestat
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kdsurgeon.checkpoints import read_sealed, write_tensors, write_whole
from kdsurgeon.checkpoints.disk import (
    append,
    flush_file,
    flush_folder,
    free_space,
    in_words,
    is_full,
    make_folder,
    read_once,
)
from kdsurgeon.checkpoints.store import parse
from kdsurgeon.errors import ModelFileError, ResourceError, UsageError

KEPT_CHECKPOINTS = 2
MANIFEST = "MANIFEST.json"
MANIFEST_VERSION = 2
_FIRST_FILES = ("config.yaml", "plan.yaml", "run.json", "train.log")
_NAME = re.compile(r"step-(\d{6,})(\.old)?")
_RECORDED_PACKAGES = ("kdsurgeon", "torch", "numpy", "onnx", "onnxruntime", "safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: tensors by file, numbers, and where they stood.

    ``facts`` is what its manifest says beside the files: step, number, is_best, metrics.
    """

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One run folder, held by this process until :meth:`close`.

    Of its checkpoints stay the newest two, the newest that was saved as the best, every
    ``keep_every``-th (0: none), and the one that this process went on from.
    """

    path: Path
    _lock: int | None = field(repr=False)
    keep_every: int = 0
    _origin: Path | None = field(default=None, repr=False)

    @classmethod
    def create(cls, path: str | Path) -> Run:
        """A new, empty run folder. Raises :class:`UsageError` when one with a run is there."""
        check_is_free(path)
        return cls._open(Path(path))

    @classmethod
    def resume(cls, path: str | Path) -> Run:
        """An existing run folder. Raises :class:`UsageError` when there is no run in it."""
        return cls._open(cls.look(path).path)

    @classmethod
    def look(cls, path: str | Path) -> Run:
        """An existing run folder to read from, also while it is in use."""
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise UsageError(f"{path} holds no run.", fix="name the folder of an earlier --output")
        return cls(path, None)

    @classmethod
    def _open(cls, path: Path) -> Run:
        try:
            for folder in (path / "checkpoints", path / "student"):
                make_folder(folder)
            lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _cannot_write(path, error) from error
        run = _held[lock] = cls(path, lock)
        try:
            _hold(lock, path)
            run._tidy()
        except BaseException:
            run.close()
            raise
        return run

    def _tidy(self) -> None:
        """Remove what a killed process left half-written."""
        try:
            for stale in _drafts(self.path):
                _remove(stale)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _break_seal(self) -> None:
        """The run goes on: before the first byte that is written again."""
        try:
            if (self.path / MANIFEST).exists():
                (self.path / MANIFEST).unlink()
                flush_folder(self.path)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        if self._lock is not None:
            _held.pop(self._lock, None)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # text files ──────────────────────────────────────────────────────────────────────────────────

    def write(self, name: str, text: str) -> None:
        """A small file of the run folder, whole or not at all."""
        self._break_seal()
        write_whole(self.path / name, [text.encode()])

    def log(self, line: str) -> None:
        """One line of train.log, with the time."""
        self._break_seal()
        append(self.path / "train.log", f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}\n")

    def add_metrics(self, numbers: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; on disk for good when a checkpoint is saved after it."""
        self._break_seal()
        append(self.path / "metrics.jsonl", json.dumps(numbers) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl."""
        return read_metrics(self.path)

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Go back to when ``checkpoint`` was saved: later lines of metrics.jsonl come again.

        Later checkpoints, which are damaged, go: should one heal, its lines would be missing.

        Raises :class:`ModelFileError` when lines from before it are missing or changed.
        """
        path, wanted = self.path / "metrics.jsonl", checkpoint.facts["metrics"]
        try:
            raw = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise _cannot_read(path, error) from error
        kept = raw[: wanted["bytes"]]
        if _described(kept) != wanted:
            raise ModelFileError(
                f"{path} is damaged: it is not what it was when {checkpoint.path.name} was saved.",
                why=f"{len(raw):,} bytes, {wanted['bytes']:,} then",
                fix="put it back as it was, or start a new run with another --output",
            )
        for later in self._checkpoints():
            if _key(later) > _key(checkpoint.path):
                self._drop(later)
        if kept != raw:
            self._break_seal()
            write_whole(path, [kept])

    def seal(self) -> None:
        """List size and sha256 of every file, for :func:`verify`, when the run has ended.

        What is exported later goes into ``export/``, which is left out. Going on with the run
        breaks the seal.
        """
        files = {name: _described_file(self.path / name) for name in _listed(self.path)}
        write_whole(self.path / MANIFEST, [_manifest({"kind": "run"}, files)])

    # checkpoints ─────────────────────────────────────────────────────────────────────────────────

    def save_checkpoint(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        best: bool = False,
    ) -> Path:
        """Write ``checkpoints/step-NNNNNN``, check it by reading it back, then prune older ones.

        Args:
            step: optimiser steps taken; one of the same step is replaced.
            tensors: by file (``student`` becomes ``student.safetensors``) and name.
            state: what JSON can hold.
            best: no checkpoint before was better; it stays until a better one comes.

        Raises:
            ResourceError: it cannot be written; every checkpoint that was there still is, but
                those that a full disk made us give up (never the newest, nor the best).
        """
        self._break_seal()
        final = self.path / "checkpoints" / f"step-{step:06d}"
        facts = {
            "kind": "checkpoint",
            "step": step,
            "number": self._next_number(step),
            "is_best": best,
            "metrics": self._flushed_metrics(),
        }
        writers: dict[str, Callable[[Path], Any]] = {
            f"{name}.safetensors": partial(write_tensors, dict(values))
            for name, values in tensors.items()
        }
        text = json.dumps(state, indent=1).encode()
        writers["state.json"] = partial(write_whole, chunks=[text])
        try:
            self.making_room(partial(self._write, final, writers, facts), final.name, final)
        except ResourceError as error:
            raise self._told(error, tensors) from error
        self._read_back(final)
        self._prune(final)
        if facts["number"] <= 1:  # the second is larger: the optimiser has begun to remember
            self._check_room(final, is_first=facts["number"] == 0)
        return final

    def making_room(self, write: Callable[[], Any], name: str, newest: Path | None = None) -> None:
        """``write`` what is called ``name``; where the disk is full, once more without the
        checkpoints before the ``newest``."""
        try:
            write()
        except ResourceError as error:
            newest = newest or next(reversed(self._checkpoints()), None)
            dropped = self._prune(newest, kept=1) if newest and is_full(error) else []
            if not dropped:
                raise
            write()
            self.log(f"disk full: {', '.join(dropped)} made room for {name}")

    def withdraw(self) -> None:
        """Remove what was written of a run that could not begin; other files of the folder stay."""
        for name in (*_FIRST_FILES, ".lock"):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.path / "checkpoints", self.path / "student", self.path):
            with suppress(OSError):  # it holds something else
                folder.rmdir()

    def _write(
        self, final: Path, writers: Mapping[str, Callable[[Path], Any]], facts: Mapping[str, Any]
    ) -> None:
        """A checkpoint under its final name and on disk, or nothing of it."""
        draft = final.with_name(f".tmp-{os.getpid()}-{final.name}")
        name = MANIFEST
        try:
            draft.mkdir()
            for name, write in writers.items():
                write(draft / name)
            files = {name: _described_file(draft / name) for name in writers}
            name = MANIFEST
            write_whole(draft / name, [_manifest(facts, files)])
            name = ""
            flush_folder(draft)
            _publish(draft, final)
        except (OSError, ResourceError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            cause = error if isinstance(error, OSError) else error.__cause__
            assert isinstance(cause, OSError), "the disk refuses with an OSError only"
            raise _cannot_write(final / name, cause) from cause
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def _told(
        self, error: ResourceError, tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> ResourceError:
        """The same, with what is needed and what is still there."""
        needs = sum(each.nbytes for values in tensors.values() for each in values.values())
        whole = self._checkpoints()[-1:]
        if is_full(error):
            free = in_words(free_space(self.path))
            error.notes["room"] = f"the weights alone take {in_words(needs)}, {free} are free"
        error.notes["kept"] = f"{whole[0].name} is intact" if whole else ""
        return ResourceError(error.what, **error.notes)

    def _read_back(self, final: Path) -> None:
        try:
            verify(final)
        except ModelFileError as error:
            raise ResourceError(
                f"{final} does not hold what was written to it: {error.what}",
                why="the disk or the memory of this machine is at fault",
                fix="resume with another --output on another disk; the checkpoint before is used",
            ) from error

    def _check_room(self, saved: Path, *, is_first: bool) -> None:
        """Whether the checkpoints that will stay, and the one being written, fit on the disk.

        Raises :class:`ResourceError` before hours are spent; later, a line of the log must do.
        """
        size = sum(file.stat().st_size for file in saved.iterdir())
        free, count = free_space(self.path), KEPT_CHECKPOINTS + 1
        if free >= count * size:
            return
        why = f"a checkpoint takes {in_words(size)} and {count} must fit; {in_words(free)} are free"
        self.log(f"too little room: {why}")
        if is_first:
            raise ResourceError(
                f"{self.path} has too little room for a run.",
                why=why,
                fix="free some space on that disk, or name another --output",
            )

    def _flushed_metrics(self) -> dict[str, Any]:
        """The lines so far, brought to the disk: a checkpoint must not be ahead of them."""
        path = self.path / "metrics.jsonl"
        try:
            if not path.exists():
                return _described(b"")
            flush_file(path)
            return _described_file(path)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def _next_number(self, step: int) -> int:
        """How many checkpoints the run had saved before one of ``step``."""
        facts = [_facts(path) for path in self._checkpoints() if _key(path)[0] < step]
        return max((found["number"] + 1 for found in facts if found), default=0)

    def _prune(self, newest: Path, kept: int = KEPT_CHECKPOINTS) -> list[str]:
        """Remove what need not stay beside ``newest``, oldest first; the names of what is gone."""
        here = self._checkpoints()
        later = [path for path in here if _key(path) > _key(newest)]
        twins = [path for path in here if path.suffix and path.with_suffix("") in here]
        found = [path for path in here if path not in (*later, *twins)]
        facts = {path: _facts(path) for path in found}
        unread = [path for path, known in facts.items() if known is None]
        best = [path for path, known in facts.items() if known and known["is_best"]]
        every = [path for path, known in facts.items() if known and self._is_nth(known["number"])]
        stays = {*found[-kept:], *best[-1:], *unread, self._origin}
        if kept == KEPT_CHECKPOINTS:
            stays.update(every)
        # the run went back before later ones, which are damaged
        gone = [*twins, *found] if self._origin is None else [*later, *twins, *found]
        return [path.name for path in gone if path not in stays and self._drop(path)]

    def _is_nth(self, number: int) -> bool:
        return bool(self.keep_every and number) and number % self.keep_every == 0

    def _drop(self, path: Path) -> bool:
        """Remove a checkpoint, at once as others see it."""
        try:
            gone = path.with_name(f".tmp-{os.getpid()}-old-{path.name}")
            path.rename(gone)
            shutil.rmtree(gone)
        except OSError as error:
            self.log(f"{path.name} could not be removed: {error.strerror}")
            return False
        return True

    def latest_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and what was wrong with newer ones.

        Raises:
            ModelFileError: there are checkpoints and none is whole, or there were some.
            ResourceError: one may not be read, or does not fit into memory; it may be whole.
        """
        found = self._checkpoints()
        complaints = []
        for path in reversed(found):
            try:
                checkpoint = read_checkpoint(path)
            except ModelFileError as error:
                complaints.append(f"{path.name} is damaged: {error.what}")
                continue
            if self._lock is not None and self._origin is None:
                self._origin = path
            return checkpoint, complaints
        if found:
            raise ModelFileError(
                f"{self.path} has no checkpoint that is whole.",
                why="\n".join(complaints),
                fix="start a new run with another --output; student/last.safetensors is the "
                "student as it was saved last",
            )
        if self.metrics():
            raise ModelFileError(
                f"{self.path} has trained, and its checkpoints are gone.",
                fix="put its folder checkpoints back, or start a new run with another --output",
            )
        return None, complaints

    def _checkpoints(self) -> list[Path]:
        """From the oldest to the newest; one that is being replaced stands before its successor."""
        folder = self.path / "checkpoints"
        return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=_key)


def check_is_free(path: str | Path) -> None:
    """Raises :class:`UsageError` when ``path`` already holds a run."""
    if (Path(path) / "config.yaml").exists():
        raise UsageError(
            f"{path} already holds a run.",
            fix=f"go on with it: kdsurgeon distill --resume {path}\nor name another --output",
        )
    if any(Path(path).glob("checkpoints/step-*")):
        raise UsageError(
            f"{path} holds checkpoints of a run without its config.yaml.",
            why="a new run would go on from them",
            fix="put config.yaml back, or name another --output",
        )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every line of a run folder's metrics.jsonl, one for each epoch that ended.

    A last line that a killed process left unfinished does not count. Raises
    :class:`ModelFileError` when another line cannot be read.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ModelFileError(
            f"{path} is damaged.", why=str(error), fix="remove the lines that are not JSON"
        ) from error


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint folder whose every file has the size and sha256 of its manifest.

    What is compared are the bytes that are loaded; nothing is read twice.

    Raises:
        ModelFileError: a file is missing, changed or not listed.
        ResourceError: a file may not be read, or does not fit into memory.
    """
    facts, files = _read_manifest(path)
    step = _NAME.fullmatch(path.name)
    is_ours = facts.get("kind") == "checkpoint" and "state.json" in files
    if not is_ours or (step and int(step[1]) != facts.get("step")):
        raise ModelFileError(f"{path}/{MANIFEST} is that of another folder.")
    raws: dict[str, bytes] = {}

    def described(file: Path) -> dict[str, Any]:
        try:
            raws[file.name] = read_once(file)
        except ResourceError as error:
            if isinstance(error.__cause__, OSError):
                raise _cannot_read(file, error.__cause__) from error
            raise
        return _described(raws[file.name])

    _compare(path, files, described)
    tensors = {
        name.removesuffix(".safetensors"): parse(raw, str(path / name))[0]
        for name, raw in sorted(raws.items())
        if name.endswith(".safetensors")
    }
    return Checkpoint(path, tensors, json.loads(raws["state.json"]), facts)


def verify(folder: str | Path) -> int:
    """Compare a checkpoint, or a run that has ended, with its MANIFEST.json; the files that agree.

    Raises:
        ModelFileError: no manifest, or a file is missing, changed or not listed.
    """
    folder = Path(folder)
    _, files = _read_manifest(folder)
    _compare(folder, files, _described_file)
    return len(files)


def verify_run(folder: str | Path) -> list[str]:
    """Verify everything of a run that carries a seal; one line for each part that is whole.

    These are its checkpoints, its student files and, when it has ended, every other file.

    Raises:
        ModelFileError: as :func:`verify`.
    """
    folder = Path(folder)
    parts = sorted(folder.glob("checkpoints/step-*"), key=_key)
    lines = [f"{part}: {verify(part)} files are what was written" for part in parts]
    for student in sorted(folder.glob("student/*.safetensors")):
        read_sealed(student)
        lines.append(f"{student}: what was written")
    if (folder / MANIFEST).exists() or not lines:
        lines.append(f"{folder}: all {verify(folder)} files are as they were when the run ended")
    else:
        lines.append(f"{folder}: the run has not ended, so its other files carry no seal")
    return lines


# manifests ───────────────────────────────────────────────────────────────────────────────────────


_RESTORE = "copy the folder again from where it was made, or use an older checkpoint"


def _manifest(facts: Mapping[str, Any], files: Mapping[str, Any]) -> bytes:
    """The text of a manifest; its last entry seals the others."""
    body = {"version": MANIFEST_VERSION, **facts, "files": files}
    return _as_json({**body, "seal": hashlib.sha256(_as_json(body)).hexdigest()})


def _as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts and files of a manifest, no byte of which has changed."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        body = json.loads(raw)
        known, files = body.pop("version"), body.pop("files")
        body.pop("seal")
    except FileNotFoundError as error:
        raise ModelFileError(
            f"{folder} has no {MANIFEST}.",
            fix="name a run folder that has ended, or one of its checkpoints",
        ) from error
    except NotADirectoryError as error:
        raise ModelFileError(
            f"{folder} is a file, and no folder with a {MANIFEST}.",
            fix="name a run folder that has ended, or one of its checkpoints",
        ) from error
    except OSError as error:
        raise _cannot_read(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{path} cannot be read.", why=str(error)) from error
    if known != MANIFEST_VERSION:
        raise ModelFileError(
            f"{path} is of version {known!s:.20}; this kdsurgeon reads {MANIFEST_VERSION}.",
            fix="use the version of kdsurgeon that wrote it",
        )
    if raw != _manifest(body, files):
        raise ModelFileError(f"{path} is changed.", fix=_RESTORE)
    return body, files


def _facts(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint's manifest says; nothing if it is damaged, None if it may be whole."""
    try:
        return _read_manifest(folder)[0]
    except ModelFileError:
        return {}
    except ResourceError:
        return None


def _compare(
    folder: Path, wanted: Mapping[str, Any], described: Callable[[Path], dict[str, Any]]
) -> None:
    """Raise if a file of ``folder`` is not as ``wanted`` says, or is not in there."""
    there = _listed(folder)
    for name in sorted({*wanted, *there}):
        if name not in wanted:
            state = "unlisted"
        elif name not in there or not (folder / name).is_file():
            state = "missing"
        else:
            try:
                found = described(folder / name)
            except OSError as error:
                raise _cannot_read(folder / name, error) from error
            if found == wanted[name]:
                continue
            state = "changed"
        fix = "move it out of the folder" if state == "unlisted" else _RESTORE
        raise ModelFileError(f"{folder}: {name} is {state}.", fix=fix)


def _listed(folder: Path) -> list[str]:
    """The files that a manifest answers for: all but itself, the lock and later exports."""
    names = [
        file.relative_to(folder)
        for file in folder.rglob("*")
        if file.is_file() or file.is_symlink()
    ]
    return sorted(
        name.as_posix()
        for name in names
        if name.as_posix() != MANIFEST and name.parts[0] not in (".lock", "export")
    )


def _described(raw: bytes) -> dict[str, Any]:
    return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def _described_file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


# the disk ────────────────────────────────────────────────────────────────────────────────────────


def _key(path: Path) -> tuple[int, bool]:
    """The place of a checkpoint among others."""
    found = _NAME.fullmatch(path.name)
    return (int(found[1]), found[2] is None) if found else (-1, True)


def _publish(draft: Path, final: Path) -> None:
    """Give a draft its name; what has that name stays until prune, as an older checkpoint."""
    if final.exists():
        aside = final.with_name(f"{final.name}.old")
        if aside.exists():
            shutil.rmtree(aside)
        final.rename(aside)
    draft.rename(final)
    flush_folder(final.parent)


_held: WeakValueDictionary[int, Run] = WeakValueDictionary()  # by the descriptor of its lock


def _let_go() -> None:
    """In a process that was forked: a worker outlives its run for seconds, and must not hold it."""
    for lock, run in list(_held.items()):
        with suppress(OSError):
            if samestat(os.fstat(lock), (run.path / ".lock").stat()):  # and nothing else by now
                os.close(lock)
        run._lock = None
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _hold(lock: int, path: Path) -> None:
    """Lock the run folder and leave our number in it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
        raise ResourceError(
            f"{path} is in use by another run.",
            where=f"process {owner}",
            fix="wait until it ends, or name another --output",
        ) from error
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be locked: {error.strerror}.", fix="name an --output on another disk"
        ) from error
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    except OSError as error:
        raise _cannot_write(path / ".lock", error) from error


def _drafts(path: Path) -> list[Path]:
    """What a process that was killed while it wrote left in a run folder."""
    folders = (path, path / "student", path / "checkpoints")
    return [
        *(draft for folder in folders for draft in folder.glob(".*.tmp")),
        *(path / "checkpoints").glob(".tmp-*"),
    ]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _cannot_write(path: Path, error: OSError) -> ResourceError:
    mend = "make room there" if is_full(error) else "let it be written to"
    return ResourceError(
        f"{path} cannot be written: {error.strerror or error}.",
        room=f"{in_words(free_space(path))} are free there" if is_full(error) else None,
        fix=f"{mend}, or begin in another folder: --output FOLDER",
    )


def _cannot_read(path: Path, error: OSError) -> ModelFileError | ResourceError:
    """Damage, if the disk itself fails; something to be mended, otherwise."""
    if error.errno in (errno.EIO, errno.EISDIR, errno.ENOENT, errno.ENOTDIR, errno.EUCLEAN):
        return ModelFileError(f"{path} cannot be read.", why=error.strerror)
    return ResourceError(f"{path} may not be read: {error.strerror}.", fix="check its permissions")


def environment(command: Sequence[str]) -> dict[str, Any]:
    """What ran where: versions, platform, threads, the command line and the state of the
    repository around; no host or user names."""
    return {
        "started": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "command": list(command),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _RECORDED_PACKAGES},
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "executable": Path(sys.executable).name,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    """Of the folder that the run is started in: its commit, and whether files differ from it."""
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "-s", "-uno")
    except (OSError, subprocess.SubprocessError):
        return None  # no repository, no commit yet, no git, or one that does not answer
    return {"commit": commit, "changed": bool(changes)}


def _git(*command: str) -> str:
    """Its answer; nothing is written, and no program that the repository names is started."""
    done = subprocess.run(
        ["git", "-c", "core.fsmonitor=false", *command],
        env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
