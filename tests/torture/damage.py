"""Files of a run changed behind its back: mutants, damaged checkpoints, bytes of an ended run."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kdsurgeon.checkpoints import write_tensors
from kdsurgeon.errors import ModelFileError
from kdsurgeon.runs import MANIFEST, Run, read_checkpoint, verify, verify_run
from tests.torture.sessions import Session, differences, outcome

WIDTHS = (1, 4, 16, 64, 256)


def mutant(raw: bytes, spread: random.Random) -> bytes:
    """``raw`` with a flipped bit, cut off, zeroed in part, or spliced from itself."""
    place, width = spread.randrange(len(raw)), spread.choice(WIDTHS)
    kind = spread.choice(("flip", "cut", "zeros", "splice"))
    if kind == "flip":
        return raw[:place] + bytes([raw[place] ^ 1 << spread.randrange(8)]) + raw[place + 1 :]
    if kind == "cut":
        return raw[:place]
    if kind == "zeros":
        return raw[:place] + bytes(min(width, len(raw) - place)) + raw[place + width :]
    other = spread.randrange(len(raw))
    return raw[:place] + raw[other : other + width] + raw[place + width :]


# mutants of a checkpoint ─────────────────────────────────────────────────────────────────────────


class Mutants:
    """A checkpoint of which one file at a time is replaced by a mutant of it."""

    def __init__(self, base: Path) -> None:
        tensors = {
            "student": {"weight": torch.arange(300.0), "count": torch.tensor(7)},
            "optimizer": {"0.exp_avg": torch.ones(40)},
        }
        with Run.create(base / "run") as run:
            state = {"training": {"step": 3, "sums": {"total": 0.25}}, "names": ["a"] * 20}
            self.path = run.save_checkpoint(3, tensors, state)
        self.raws = {path: path.read_bytes() for path in sorted(self.path.iterdir())}

    def problems(self, seed: int) -> list[str]:
        """What is wrong with what one mutant does; it may be the very file by chance."""
        spread = random.Random(seed)
        path = spread.choice(list(self.raws))
        changed = mutant(self.raws[path], spread)
        path.write_bytes(changed)
        try:
            read_checkpoint(self.path)
        except ModelFileError:
            return []
        except Exception as error:
            return [f"{path.name}: refused by {type(error).__name__}: {error}"]
        finally:
            path.write_bytes(self.raws[path])
        return [] if changed == self.raws[path] else [f"{path.name}: loaded wrong"]


# the newest checkpoint damaged in 20 ways ────────────────────────────────────────────────────────


def _edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def _swap(folder: Path) -> None:
    first, second = folder / "student.safetensors", folder / "optimizer.safetensors"
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)


def _other_tensors(folder: Path) -> None:
    """A whole file of ours, but not the one that was saved."""
    write_tensors({"weight": torch.zeros(2)}, folder / "student.safetensors")


def _link_away(folder: Path) -> None:
    (folder / "state.json").unlink()
    (folder / "state.json").symlink_to(folder / "gone.json")


def _as_folder(folder: Path) -> None:
    (folder / "state.json").unlink()
    (folder / "state.json").mkdir()


def _relabel(folder: Path) -> None:
    """The content of an older step under the newest name."""
    older = sorted(folder.parent.glob("step-*"))[0]
    shutil.rmtree(folder)
    shutil.copytree(older, folder)


def _rewrite(folder: Path) -> None:
    body = json.loads((folder / MANIFEST).read_bytes())
    body["step"] += 1
    (folder / MANIFEST).write_bytes(json.dumps(body, indent=1).encode())


def _add_file(folder: Path) -> None:
    (folder / "extra.safetensors").write_bytes(b"x")


def _first_bit(raw: bytes) -> bytes:
    return bytes([raw[0] ^ 1]) + raw[1:]


def _last_bit(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit of the weights flipped": _edit("student.safetensors", _last_bit),
    "a bit of the header flipped": _edit("student.safetensors", _first_bit),
    "a bit of the optimiser flipped": _edit("optimizer.safetensors", _last_bit),
    "the weights cut off": _edit("student.safetensors", lambda raw: raw[: len(raw) // 2]),
    "the weights empty": _edit("student.safetensors", lambda raw: b""),
    "the weights all zeros": _edit("student.safetensors", lambda raw: bytes(len(raw))),
    "the weights longer": _edit("student.safetensors", lambda raw: raw + b"\0"),
    "the weights of another model": _other_tensors,
    "two files swapped": _swap,
    "the weights missing": lambda folder: (folder / "student.safetensors").unlink(),
    "the state missing": lambda folder: (folder / "state.json").unlink(),
    "the state edited": _edit("state.json", lambda raw: raw.replace(b"1", b"2")),
    "the state no JSON": _edit("state.json", lambda raw: raw[:-2]),
    "the state linked to nothing": _link_away,
    "the state a folder": _as_folder,
    "one file too many": _add_file,
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "the manifest cut off": _edit(MANIFEST, lambda raw: raw[:-9]),
    "the manifest edited": _rewrite,
    "an older step under its name": _relabel,
}


class Fallback:
    """A run with four checkpoints, its newest damaged, and what it comes to all the same."""

    def __init__(self, base: Path) -> None:
        self.base = base
        Session(base / "whole", epochs=4, keep_every=1)()
        self.wanted = outcome(base / "whole")
        self.names = sorted(path.name for path in (base / "whole" / "checkpoints").iterdir())

    def problems(self, damage: str, count: int) -> list[str]:
        """After the newest ``count`` were damaged; all but the first of them by a flipped bit."""
        folder = self.base / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.base / "whole", folder)
        newest = sorted((folder / "checkpoints").iterdir())[-count:]
        for path in newest[:-1]:
            DAMAGES["a bit of the weights flipped"](path)
        DAMAGES[damage](newest[-1])
        if count == len(self.names):
            return self._refusal(folder)
        try:
            with Run.resume(folder) as run:
                checkpoint, complaints = run.latest_checkpoint()
        except ModelFileError as error:
            return [f"finds nothing whole: {error}"]
        wanted = self.names[-count - 1]
        if checkpoint is None or checkpoint.path.name != wanted:
            return [f"goes on from {checkpoint and checkpoint.path.name}, not from {wanted}"]
        said = [
            f"{path.name} is damaged" in text
            for path, text in zip(reversed(newest), complaints, strict=False)
        ]
        problems = [] if said == [True] * count else [f"says {complaints}"]
        Session(folder, epochs=4, keep_every=1)()
        log = (folder / "train.log").read_text(encoding="utf-8")
        problems += [
            f"{p.name} not in the log" for p in newest if f"{p.name} is damaged" not in log
        ]
        return problems + differences(outcome(folder), self.wanted)

    def _refusal(self, folder: Path) -> list[str]:
        try:
            Session(folder, epochs=4)()
        except ModelFileError as error:
            return [] if error.exit_code == 3 and "whole" in str(error) else [str(error)]
        return ["began anew"]


# bytes of an ended run ───────────────────────────────────────────────────────────────────────────


@dataclass
class Sealed:
    """An ended run; one byte of one of its files is changed at a time."""

    base: Path

    def __post_init__(self) -> None:
        self.folder = self.base / "run"
        Session(self.folder)()
        with Run.resume(self.folder) as run:
            run.write("report.html", "<p>done</p>")
            run.seal()
        self.files = [p for p in sorted(self.folder.rglob("*")) if p.is_file() and p.stat().st_size]
        self.files = [path for path in self.files if path.name != ".lock"]
        verify_run(self.folder)

    def problems(self, seed: int) -> list[str]:
        """A changed byte that ``verify`` does not see."""
        spread = random.Random(seed)
        path = spread.choice(self.files)
        raw = path.read_bytes()
        place = spread.randrange(len(raw))
        changed = raw[place] ^ spread.randrange(1, 256)
        path.write_bytes(raw[:place] + bytes([changed]) + raw[place + 1 :])
        try:
            verify(self.folder)
        except ModelFileError:
            return self._by_parts(path)
        finally:
            path.write_bytes(raw)
        return [f"byte {place} of {path.relative_to(self.folder)} changed unseen"]

    def _by_parts(self, path: Path) -> list[str]:
        """The same must be seen by the checkpoint's own manifest, without that of the run."""
        if path.parent.parent.name != "checkpoints":
            return []
        try:
            verify(path.parent)
        except ModelFileError:
            return []
        return [f"{path.name} of {path.parent.name} changed unseen by its own manifest"]
