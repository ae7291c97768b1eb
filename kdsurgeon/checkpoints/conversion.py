"""``kdsurgeon convert``: take the tensors out of a foreign checkpoint and run nothing in it.

The file is read by our own pickle machine, which builds plain data only, in a child process with
limits on memory and time and no descriptor but the file itself. The child is damage control, not a
sandbox.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdsurgeon.checkpoints.archive import Record, read_records
from kdsurgeon.checkpoints.disk import read_once, write_whole
from kdsurgeon.checkpoints.kinds import kind_of, kind_of_zip, refuse, refuse_folder
from kdsurgeon.checkpoints.pickles import (
    ALLOWED,
    Dropped,
    Storage,
    View,
    interpret,
    list_globals,
    storages_in,
    walk,
)
from kdsurgeon.checkpoints.reader import (
    STATE_KEYS,
    check_storages,
    check_tensors,
    foreign_card,
    manifest_of,
    open_checkpoint,
    strip_prefixes,
)
from kdsurgeon.checkpoints.store import ModelCard, parse, save_state, unpack_card
from kdsurgeon.errors import ModelFileError, ResourceError, SurgeonError, UsageError

SECONDS = 600
SPARE_MEMORY = 512 << 20  # bytes the child may use beside 3 × the file

_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from kdsurgeon.checkpoints.conversion import child; child(json.loads(sys.argv[2]))"
)


@dataclass(frozen=True)
class Conversion:
    """What was taken out of a checkpoint, and what was left behind.

    ``key`` is the entry the weights lay under; ``dropped`` names the objects that were not made.
    """

    path: Path
    out: Path
    manifest: Path
    sha256: str
    source_sha256: str
    num_tensors: int
    num_bytes: int
    key: str | None
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        where = f' under "{self.key}"' if self.key else ""
        lines = [
            f"{self.out}: {self.num_tensors} tensors of {self.path}{where}",
            f"  sha256:   {self.sha256}",
            f"  manifest: {self.manifest}",
        ]
        if self.dropped:
            lines.append(f"  left out: {', '.join(self.dropped)}")
        return "\n".join(lines)


def convert(path: str | Path, out: str | Path, *, drop_extra: bool = False) -> Conversion:
    """Write the weights of a checkpoint as safetensors, with a manifest beside it.

    Reads torch.save files of every age and safetensors. Objects beside the tensors are refused by
    name, or left out with ``drop_extra``; of a whole pickled module its parameters and persistent
    buffers are taken. Raises :class:`ModelFileError` as :func:`read_model` does and
    :class:`ResourceError` when time, memory or the folder do not suffice; then nothing is written.
    """
    path, out = Path(path), Path(out)
    if path.is_dir():
        raise refuse_folder(path)
    if out.suffix != ".safetensors":
        raise UsageError(
            f"{out} should end in .safetensors.", fix=f"{out.with_suffix('.safetensors')}"
        )
    draft = out.with_name(f".{out.name}.{os.getpid()}.draft")
    try:
        said = _run_child(path, draft, drop_extra)
        draft_bytes = read_once(draft)
        manifest = _manifest(path, out, draft_bytes, said)
        with suppress(FileNotFoundError):
            manifest_of(out).unlink()  # a kill between the two renames leaves no wrong pair
        write_whole(out, [draft_bytes])
        write_whole(manifest_of(out), [json.dumps(manifest, indent=2).encode() + b"\n"])
    finally:
        with suppress(OSError):
            draft.unlink()
    return Conversion(
        path=path,
        out=out,
        manifest=manifest_of(out),
        sha256=manifest["sha256"],
        source_sha256=said["source_sha256"],
        num_tensors=said["num_tensors"],
        num_bytes=len(draft_bytes),
        key=said["key"],
        dropped=tuple(said["dropped"]),
    )


def _manifest(path: Path, out: Path, content: bytes, said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": 1,
        "file": out.name,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "source": {"file": path.name, "sha256": said["source_sha256"]},
        "num_tensors": said["num_tensors"],
        "key": said["key"],
        "dropped": said["dropped"],
    }


def _run_child(path: Path, draft: Path, drop_extra: bool) -> dict[str, Any]:
    """What the child reports; its refusals are raised here as its own error class."""
    _probe(path)
    order = {"name": str(path), "draft": str(draft), "drop": drop_extra, "seconds": SECONDS}
    command = [sys.executable, "-I", "-c", _BOOT, json.dumps(sys.path), json.dumps(order)]
    try:
        with path.open("rb") as file:
            done = subprocess.run(command, stdin=file, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ResourceError(f"{path} took more than {SECONDS} s to read; stopped.") from error
    except OSError as error:
        raise ResourceError(f"{path} could not be read.", why=error.strerror) from error
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode or not lines:
        raise ModelFileError(
            f"reading {path} ended its process (code {done.returncode}); nothing was written.",
            why="the file is damaged or made to harm, or memory did not suffice",
            fix="copy it again",
        )
    said = json.loads(lines[-1])
    if "refused" in said:
        kinds = {kind.__name__: kind for kind in (ModelFileError, ResourceError, UsageError)}
        raise kinds.get(said["refused"], ModelFileError)(said["what"], **said["notes"])
    return said


def _probe(path: Path) -> None:
    """Raise what :func:`read_once` raises for a path that is no readable, regular file."""
    if not path.is_file():
        read_once(path)


def child(order: dict[str, Any]) -> None:
    """The other process: read the checkpoint on stdin, write the draft, report one line of JSON."""
    report: dict[str, Any]
    try:
        raw = _read_limited(order["seconds"])
        report = _convert(raw, order["name"], Path(order["draft"]), order["drop"])
    except MemoryError:
        what = f"{order['name']} needs too much memory."
        report = {"refused": "ResourceError", "what": what, "notes": {}}
    except SurgeonError as error:
        report = {"refused": type(error).__name__, "what": error.what, "notes": error.notes}
    sys.stdout.write(json.dumps(report) + "\n")


def _read_limited(seconds: int) -> bytes:
    """The file on stdin, after memory and time were limited to what it may need."""
    size = os.fstat(0).st_size
    with suppress(ImportError, ValueError, OSError):  # other systems limit differently, or not
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 3 * size + SPARE_MEMORY
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return sys.stdin.buffer.read()


def _convert(raw: bytes, name: str, draft: Path, drop: bool) -> dict[str, Any]:
    kind = kind_of(raw, name)
    if kind == "safetensors":
        tensors, card = unpack_card(*parse(raw, name), name)
        key, dropped = None, []
    else:
        content, numbers, dropped = _open(raw, kind, name, drop)
        state, key = _find_state(content, name)
        named = strip_prefixes(_only_tensors(state, name, dropped, drop))
        tensors = {label: _tensor(view, numbers) for label, view in named.items()}
        card = foreign_card(content) if isinstance(content, dict) and key else ModelCard()
    check_tensors(tensors, name, len(raw), allow_nonfinite=True)
    source = hashlib.sha256(raw).hexdigest()
    provenance = {**card.provenance, "converted_from": f"sha256:{source}"}
    save_state(tensors, draft, ModelCard(**{**vars(card), "provenance": provenance}))
    return {
        "source_sha256": source,
        "num_tensors": len(tensors),
        "key": key,
        "dropped": sorted(set(dropped)),
    }


def _open(
    raw: bytes, kind: str, name: str, drop: bool
) -> tuple[Any, Callable[[Storage], memoryview], list[str]]:
    """Plain data, a way to a storage's bytes, and the names that were not followed."""
    if kind == "legacy":
        return _open_legacy(raw, name, drop)
    if kind != "zip":
        raise refuse(kind, name)
    records = read_records(raw, name)
    if (inner := kind_of_zip(record.name for record in records)) != "checkpoint":
        raise refuse(inner, name)
    pickle = open_checkpoint(records, raw, name)
    unknown = _unknown(io.BytesIO(pickle), name, drop)
    content = interpret(io.BytesIO(pickle), name, drop=drop)
    check_storages(content, records, name)
    bodies = {record.name.partition("/")[2]: record for record in records}

    def numbers(storage: Storage) -> memoryview:
        record: Record = bodies[f"data/{storage.key}"]
        return record.body(raw)

    return content, numbers, unknown


def _open_legacy(
    raw: bytes, name: str, drop: bool
) -> tuple[Any, Callable[[Storage], memoryview], list[str]]:
    """The format of torch before 1.6: five pickles, then each storage behind its length."""
    stream = io.BytesIO(raw)
    _, _, system = (interpret(stream, name) for _ in range(3))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ModelFileError(f"{name} was written on a big-endian machine; it cannot be read here.")
    start = stream.tell()
    unknown = _unknown(stream, name, drop)
    stream.seek(start)
    content = interpret(stream, name, drop=drop)
    keys = interpret(stream, name)
    kinds = {storage.key: storage for storage in storages_in(content)}
    places: dict[str, tuple[int, int]] = {}
    place = stream.tell()
    for key in keys if isinstance(keys, list) else []:
        count = int.from_bytes(raw[place : place + 8], "little")
        storage = kinds.get(key)
        if storage is None or storage.count != count:
            raise ModelFileError(f"{name} is damaged: its storages are not those it describes.")
        places[key] = (place + 8, place + 8 + count * storage.dtype.itemsize)
        place = places[key][1]
    if place != len(raw) or set(kinds) - set(places):
        raise ModelFileError(f"{name} is damaged: it is cut off.", fix="copy or download it again")
    return content, lambda storage: memoryview(raw)[slice(*places[storage.key])], unknown


def _unknown(stream: io.BytesIO, name: str, drop: bool) -> list[str]:
    unknown = [entry for entry in list_globals(stream) if entry not in ALLOWED]
    if unknown and not drop:
        raise ModelFileError(
            f"{name} holds Python objects beside its tensors.",
            needs=", ".join(unknown[:6]) + (" …" if len(unknown) > 6 else ""),
            fix="leave them out, running nothing: --drop-extra",
        )
    return unknown


def _find_state(content: Any, name: str) -> tuple[dict[Any, Any], str | None]:
    """The mapping from names to views, and the key it lies under."""
    if (own := _state_of(content)) and not isinstance(content, dict):
        return own, None
    entries = content if isinstance(content, dict) else {}
    for key in STATE_KEYS:
        if state := _state_of(entries.get(key)):
            return state, key
    if own:
        return own, None
    states = {key: state for key, value in entries.items() if (state := _state_of(value))}
    if len(states) == 1:
        key, state = states.popitem()
        return state, str(key)
    raise ModelFileError(
        f"{name} holds no state dict; its entries are {', '.join(map(repr, list(entries)[:6]))}."
    )


def _state_of(value: Any) -> dict[Any, Any]:
    """The state dict that a mapping is, or that an object (a module) would have had; or nothing."""
    if isinstance(value, dict):
        return value if any(isinstance(part, View) for part in value.values()) else {}
    return dict(_module_state(value, "", 0)) if isinstance(value, Dropped) else {}


def _module_state(module: Dropped, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    state = module.state
    if not isinstance(state, dict) or depth > 64:
        return
    passing = {t for t in walk(state.get("_non_persistent_buffers_set")) if isinstance(t, str)}
    for group in ("_parameters", "_buffers"):
        tensors = state.get(group)
        for name, value in tensors.items() if isinstance(tensors, dict) else ():
            if isinstance(value, View) and name not in passing:
                yield f"{prefix}{name}", value
    children = state.get("_modules")
    for name, part in children.items() if isinstance(children, dict) else ():
        if isinstance(part, Dropped):
            yield from _module_state(part, f"{prefix}{name}.", depth + 1)


def _only_tensors(
    state: Mapping[Any, Any], name: str, dropped: list[str], drop: bool
) -> dict[str, View]:
    strangers = [k for k, v in state.items() if not (isinstance(k, str) and isinstance(v, View))]
    if strangers and not drop:
        raise ModelFileError(
            f"{name} holds more than tensors among its weights: {strangers[:3]}.",
            fix="leave them out: --drop-extra",
        )
    dropped.extend(f"entry {key!r}" for key in strangers)
    return {key: value for key, value in state.items() if key not in strangers}


def _tensor(view: View, numbers: Callable[[Storage], memoryview]) -> Tensor:
    """The tensor that a view describes, on a storage of its own."""
    if 0 in view.size:
        return torch.empty(view.size, dtype=view.dtype)
    width = view.dtype.itemsize
    body = bytearray(numbers(view.storage)[view.offset * width : view.end * width])
    return torch.frombuffer(body, dtype=view.dtype).as_strided(view.size, view.stride)
