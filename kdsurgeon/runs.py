"""The run folder: whole checkpoints or none, a student that always loads, a record of what ran.

    config.yaml  plan.yaml  run.json  metrics.jsonl  train.log
    checkpoints/step-000123/{student,adapters,optimizer}.safetensors state.json MANIFEST.json
    student/{last,best}.safetensors

A checkpoint is built in a temporary folder beside its final name, every file flushed, then renamed;
its manifest lists size and sha256 of each file, so a damaged one is noticed and the one before is
used instead. Nothing in it is a pickle.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdsurgeon.checkpoints import read_tensors, write_tensors, write_whole
from kdsurgeon.errors import ModelFileError, ResourceError, SurgeonError, UsageError

KEPT_CHECKPOINTS = 2
MANIFEST = "MANIFEST.json"
_RECORDED_PACKAGES = ("kdsurgeon", "torch", "numpy", "onnx", "onnxruntime", "safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: tensors by file, numbers, and where they stood."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


@dataclass
class Run:
    """One run folder, held by this process until :meth:`close`."""

    path: Path
    _lock: Any = field(repr=False)

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
                folder.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("a+")
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise ResourceError(
                f"{path} is in use by another run.",
                where=f"process {owner}",
                fix="wait until it ends, or name another --output",
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        for stale in (path / "checkpoints").glob(".tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        return cls(path, lock)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # text files ──────────────────────────────────────────────────────────────────────────────────

    def write(self, name: str, text: str) -> None:
        """A small file of the run folder, whole or not at all."""
        write_whole(self.path / name, [text.encode()])

    def log(self, line: str) -> None:
        """One line of train.log, with the time."""
        self._append("train.log", f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}\n")

    def add_metrics(self, numbers: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self._append("metrics.jsonl", json.dumps(numbers) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl."""
        return read_metrics(self.path)

    def _append(self, name: str, text: str) -> None:
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise _cannot_write(self.path / name, error) from error

    # checkpoints ─────────────────────────────────────────────────────────────────────────────────

    def save_checkpoint(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> Path:
        """Write ``checkpoints/step-NNNNNN``, check it by reading it back, then prune older ones."""
        final = self.path / "checkpoints" / f"step-{step:06d}"
        draft = final.with_name(f".tmp-{os.getpid()}-{final.name}")
        try:
            draft.mkdir()
            for name, values in tensors.items():
                write_tensors(dict(values), draft / f"{name}.safetensors")
            write_whole(draft / "state.json", [json.dumps(state, indent=1).encode()])
            write_whole(draft / MANIFEST, [json.dumps(_manifest(draft), indent=1).encode()])
            if final.exists():
                shutil.rmtree(final)
            draft.rename(final)
            _flush_folder(final.parent)
        except OSError as error:
            raise _cannot_write(final, error) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        read_checkpoint(final)
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def latest_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and what was wrong with newer ones.

        Raises :class:`ModelFileError` when there are checkpoints and none is whole.
        """
        found = self._checkpoints()
        complaints = []
        for path in reversed(found):
            try:
                return read_checkpoint(path), complaints
            except SurgeonError as error:
                complaints.append(f"{path.name} is damaged: {error.what}")
        if found:
            raise ModelFileError(
                f"{self.path} has no checkpoint that is whole.", why="\n".join(complaints)
            )
        return None, complaints

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-*"))


def check_is_free(path: str | Path) -> None:
    """Raises :class:`UsageError` when ``path`` already holds a run."""
    if (Path(path) / "config.yaml").exists():
        raise UsageError(
            f"{path} already holds a run.",
            fix=f"go on with it: kdsurgeon distill --resume {path}\nor name another --output",
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
    """A checkpoint folder whose every file has the size and sha256 of its manifest."""
    verify(path)
    tensors = {file.stem: read_tensors(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(path, tensors, json.loads((path / "state.json").read_text(encoding="utf-8")))


def verify(folder: str | Path) -> int:
    """Compare a folder with its MANIFEST.json; the number of files that agree.

    Raises:
        ModelFileError: no manifest, or a file is missing, changed or not listed.
    """
    folder = Path(folder)
    try:
        wanted = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        found = _manifest(folder)["files"]
    except FileNotFoundError as error:
        raise ModelFileError(f"{folder} has no {MANIFEST}.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{folder}/{MANIFEST} cannot be read.", why=str(error)) from error
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            state = "missing" if name not in found else "changed" if name in wanted else "unlisted"
            raise ModelFileError(f"{folder}: {name} is {state}.", fix="use an older checkpoint")
    return len(wanted)


def _manifest(folder: Path) -> dict[str, Any]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != MANIFEST)
    return {
        "version": 1,
        "files": {
            file.name: {
                "bytes": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in files
        },
    }


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> ResourceError:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    free = shutil.disk_usage(_existing(path)).free / 1e6 if is_full else 0.0
    return ResourceError(
        f"{path} cannot be written: {error.strerror or error}.",
        why=f"{free:,.0f} MB are free there" if is_full else None,
        fix="name a folder with room that you may write to: --output FOLDER",
    )


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def environment(command: Sequence[str]) -> dict[str, Any]:
    """What ran where: versions, platform, threads and the command line; no host or user names."""
    return {
        "started": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "command": list(command),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _RECORDED_PACKAGES},
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "executable": Path(sys.executable).name,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
