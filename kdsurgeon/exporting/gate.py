"""The one door through which an ONNX file comes in: read once, checked, tried out, then opened.

Weights in other files are taken only from files that lie beside the model, under a bare name, and
under no other name. What was read is what runs: ONNX Runtime is given bytes and opens no file.

read_onnx(path)     the file after every check that needs no runtime
session(path)       ONNX Runtime on it, after a trial in a process of its own
vouch(path)         no trial for what this process has written itself
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from kdsurgeon.checkpoints.kinds import REFUSED, kind_of
from kdsurgeon.checkpoints.pickles import printable
from kdsurgeon.errors import ModelFileError, ResourceError
from kdsurgeon.exporting import runtime
from kdsurgeon.exporting.soundness import check_model, num_bytes, num_elements
from kdsurgeon.exporting.wire import Malformed, check_wire

MAX_FILE = 2**31 - 1  # bytes of one protobuf message
MAX_DATA = 16 << 30  # bytes of weights in other files
MAX_INPUT = 1 << 26  # numbers in one sample
SECONDS = 60  # that opening a file and running one sample of it may take
SPARE_MEMORY = 4 << 30  # bytes that it may take beside 4 × its size

# Types that numpy and ONNX Runtime share; others (bfloat16, 4 bits) lie inside the model.
_NUMPY: dict[int, str] = {
    TensorProto.FLOAT: "<f4",
    TensorProto.FLOAT16: "<f2",
    TensorProto.DOUBLE: "<f8",
    TensorProto.INT8: "i1",
    TensorProto.UINT8: "u1",
    TensorProto.INT16: "<i2",
    TensorProto.UINT16: "<u2",
    TensorProto.INT32: "<i4",
    TensorProto.UINT32: "<u4",
    TensorProto.INT64: "<i8",
    TensorProto.UINT64: "<u8",
}


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file after every check, and the weights that lie beside it; all is in memory."""

    path: Path
    content: bytes
    model: ModelProto  # what ``content`` says; outside weights are described, not held
    outside: Mapping[str, np.ndarray]  # by the name of the tensor
    sha256: str  # of all of it

    @property
    def size(self) -> int:
        """Bytes on disk that are used: the model and the weights beside it."""
        return len(self.content) + sum(value.nbytes for value in self.outside.values())

    @property
    def metadata(self) -> dict[str, str]:
        """What the model says of itself."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    @property
    def input_size(self) -> tuple[int, int, int] | None:
        """Channels, height and width, where kdsurgeon recorded them; else None.

        Raises :class:`ModelFileError` when what is recorded is no size.
        """
        recorded = self.metadata.get("input_size")
        if recorded is None:
            return None
        found = re.fullmatch(r"\[(\d{1,6}), ?(\d{1,6}), ?(\d{1,6})\]", recorded, re.ASCII)
        sizes = [int(size) for size in found.groups()] if found else []
        if not sizes or not 0 < math.prod(sizes) <= MAX_INPUT:
            raise ModelFileError(
                f"{self.path.name} records an input size that is none: {printable(recorded)[:40]}."
            )
        channels, height, width = sizes
        return channels, height, width

    def whole(self) -> ModelProto:
        """A copy of the model that holds all weights itself.

        Raises :class:`ResourceError` when that is more than one model may hold.
        """
        if self.size > MAX_FILE:
            raise ResourceError(f"{self.path.name} with its weights is too large for one piece.")
        model = ModelProto()
        model.CopyFrom(self.model)
        for tensor in model.graph.initializer:
            if tensor.name in self.outside:
                tensor.raw_data = self.outside[tensor.name].tobytes()
                tensor.ClearField("data_location")
                del tensor.external_data[:]
        return model


def read_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Read an ONNX file and the weights beside it; every reading of an .onnx file starts here.

    Raises :class:`ModelFileError` when it is damaged, made to harm, no ONNX model, or takes weights
    from anywhere but a file of its own folder, and :class:`ResourceError` when a file may not be
    read or does not fit into memory.
    """
    path = Path(path)
    with _opened(path, path.name) as file:
        content = _read(file, path.name, MAX_FILE)
    model = _parsed(content, path.name)
    check_model(model, path.name)
    outside = _outside(model, path)
    digest = hashlib.sha256(content)
    for value in outside.values():
        digest.update(value.reshape(-1).view(np.uint8).data)
    return OnnxFile(path, content, model, outside, digest.hexdigest())


def session(
    path: str | os.PathLike[str], *, threads: int = 0, sample: Sequence[int] | None = None
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU; ``threads`` 0 means as many as torch uses.

    A file that this process did not write is first opened, and run on one sample, in a process of
    its own with limits on memory and time; ``sample`` is the shape of one, without the batch axis,
    where the model leaves it free. Raises as :func:`read_onnx` does, and :class:`ModelFileError`
    when ONNX Runtime cannot run the model within these limits.
    """
    file = read_onnx(path)
    if file.sha256 not in _known:
        _try_out(file, sample)
        _known.add(file.sha256)
    try:
        return runtime.open_session(file.content, file.outside, threads or torch.get_num_threads())
    except Exception as error:  # the runtime's own kinds
        raise _cannot_run(file, str(error)) from error


def vouch(path: str | os.PathLike[str]) -> OnnxFile:
    """Read a file that this process has written itself; opening it then needs no trial."""
    file = read_onnx(path)
    _known.add(file.sha256)
    return file


_known: set[str] = set()  # hashes of files that were written here, or went through a trial


def _opened(path: Path, name: str, *, is_beside: bool = False) -> BinaryIO:
    """A regular file, opened once; one ``is_beside`` another must be no link of any kind."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    nofollow = getattr(os, "O_NOFOLLOW", 0) if is_beside else 0
    try:
        if is_beside:
            _check_link(os.lstat(path), path.name, name)
        descriptor = os.open(path, flags | nofollow)
    except ValueError as error:  # a NUL in the name
        raise ModelFileError(f"{str(path)!r} is not a file name.") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        if is_beside:
            raise ModelFileError(
                f"{path} cannot be read: {name} takes weights from it.",
                why=error.strerror,
                fix="keep both files together under the names they were written with",
            ) from error
        raise ModelFileError(f"{path} cannot be read.", why=error.strerror) from error
    except OSError as error:
        if is_beside and error.errno == errno.ELOOP:  # made a link since it was looked at
            raise _outside_refused(name, path.name, "it is a link") from error
        raise ResourceError(f"{path} cannot be read.", why=error.strerror) from error
    found = os.fstat(descriptor)
    try:
        if stat.S_ISDIR(found.st_mode):
            raise ModelFileError(f"{path} is a folder, not a model file.")
        if not stat.S_ISREG(found.st_mode):
            raise ModelFileError(f"{path} is not a regular file.", fix="give a model file")
        if is_beside:  # once more, of what was opened
            _check_link(found, path.name, name)
        return os.fdopen(os.dup(descriptor), "rb")
    finally:
        os.close(descriptor)


def _check_link(found: os.stat_result, place: str, name: str) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise _outside_refused(name, place, "it is a link")
    if stat.S_ISREG(found.st_mode) and found.st_nlink != 1:
        raise _outside_refused(name, place, "it is a hard link: it has another name, too")


def _read(file: BinaryIO, name: str, most: int) -> bytes:
    size = os.fstat(file.fileno()).st_size
    if size > most:
        raise ModelFileError(f"{name} has {size:,} bytes; an ONNX file has at most {most:,}.")
    try:
        return file.read(most)
    except MemoryError as error:
        raise ResourceError(
            f"{name} does not fit into memory.", fix="use a machine with more memory"
        ) from error
    except OSError as error:
        raise ResourceError(f"{name} cannot be read.", why=error.strerror) from error


def _parsed(content: bytes, name: str) -> ModelProto:
    if not content:
        raise ModelFileError(f"{name} is not an ONNX file.", why="it is empty", fix="copy it again")
    try:
        check_wire(content, ModelProto.DESCRIPTOR)
        return onnx.load_model_from_string(content)
    except (Malformed, DecodeError) as error:
        kind = kind_of(content, name)
        why = str(error) if kind in ("ONNX", "other") else f"it {_described(kind)}"
        raise ModelFileError(
            f"{name} is not an ONNX file.", why=why, fix="copy it again"
        ) from error


def _described(kind: str) -> str:
    return REFUSED[kind][0].rstrip(".") if kind in REFUSED else f"looks like {kind}"


def _outside(model: ModelProto, path: Path) -> dict[str, np.ndarray]:
    """The weights that lie in files beside the model, by name."""
    by_file: dict[str, list[tuple[TensorProto, int]]] = {}
    total = 0
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        place, offset = _place(tensor, path.name)
        by_file.setdefault(place, []).append((tensor, offset))
        total += num_bytes(tensor)
    if total > MAX_DATA:
        raise ModelFileError(
            f"{path.name} claims {total:,} bytes of weights in other files; "
            f"{MAX_DATA:,} are allowed."
        )
    found = {}
    for place, tensors in by_file.items():
        with _opened(path.with_name(place), path.name, is_beside=True) as file:
            size = os.fstat(file.fileno()).st_size
            if sum(num_bytes(tensor) for tensor, _ in tensors) > size:
                raise ModelFileError(
                    f"{path.name} is damaged: its weights do not fit into {place}, "
                    f"which has {size:,} bytes.",
                    fix="copy both files again",
                )
            for tensor, offset in tensors:
                found[tensor.name] = _values(file, tensor, offset, place, path.name)
    return found


def _place(tensor: TensorProto, name: str) -> tuple[str, int]:
    """In which file of the folder the bytes of a tensor lie, and from where."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    strange = entries.keys() - {"location", "offset", "length", "checksum"}
    label = printable(tensor.name)
    if len(entries) < len(tensor.external_data) or strange or "location" not in entries:
        raise _outside_refused(name, label, "its place is not told by location, offset and length")
    place = entries["location"]
    if not _is_bare(place) or place == name:
        raise _outside_refused(name, printable(place) or '""', "it is not the bare name of a file")
    numbers = [entries.get(key, "") for key in ("offset", "length")]
    if any(n and not (n.isascii() and n.isdigit() and len(n) < 20) for n in numbers):
        raise _outside_refused(name, label, "offset and length are no numbers")
    offset, length = (int(number) if number else None for number in numbers)
    if tensor.data_type not in _NUMPY:
        raise _outside_refused(name, label, "only plain numbers may lie in another file")
    if length is not None and length != num_bytes(tensor):
        raise ModelFileError(
            f'{name} is damaged: tensor "{label}" takes {num_bytes(tensor):,} bytes, '
            f"not {length:,}.",
            fix="copy it again",
        )
    return place, offset or 0


def _is_bare(place: str) -> bool:
    """Whether a name can only mean a file of the very folder, on any system."""
    return (
        place.isprintable()
        and place not in ("", ".", "..")
        and not set(place) & set('/\\:*?"<>|')
        and len(place.encode()) <= 255
        and PurePosixPath(place).name == place == PureWindowsPath(place).name
    )


def _outside_refused(name: str, place: str, why: str) -> ModelFileError:
    return ModelFileError(
        f"{name} takes weights from outside of itself that may not be read: {place}.",
        why=why,
        fix="keep the model and its weights as two plain files in one folder, or in one file",
    )


def _values(file: BinaryIO, tensor: TensorProto, offset: int, place: str, name: str) -> np.ndarray:
    size = num_bytes(tensor)
    kind = np.dtype(_NUMPY[tensor.data_type])
    try:
        file.seek(offset)
        raw = file.read(size)
    except (OSError, ValueError, OverflowError):  # an offset that no file has
        raw = b""
    except MemoryError as error:
        raise ResourceError(f"{name} does not fit into memory.") from error
    if len(raw) != size:
        raise ModelFileError(
            f'{name} is damaged: tensor "{printable(tensor.name)}" lies at {offset:,} of {place}, '
            f"which ends before.",
            fix="copy both files again",
        )
    return np.frombuffer(raw, kind, num_elements(tensor)).reshape(tensor.dims)


def _try_out(file: OnnxFile, sample: Sequence[int] | None) -> None:
    """Open a foreign model, and run one sample, in a process that may come to harm."""
    name = file.path.name
    order = {
        "size": len(file.content),
        "tensors": [
            {"name": key, "type": value.dtype.str, "shape": value.shape, "size": value.nbytes}
            for key, value in file.outside.items()
        ],
        "shape": None if sample is None else list(sample),
        "memory": SPARE_MEMORY + 4 * file.size,
        "seconds": SECONDS,
    }
    start = time.monotonic()
    code, said = _child([json.dumps(order).encode() + b"\n", file.content, *file.outside.values()])
    if not said and time.monotonic() - start >= SECONDS:
        raise ModelFileError(
            f"{name} took more than {SECONDS} s for one sample; stopped.",
            why="it is made to run without end, or by far too large",
        )
    if not said:
        raise ModelFileError(
            f"{name} is not a model that ONNX Runtime can run.",
            why=f"it ended the process that tried it out (code {code})",
            fix="copy it again",
        )
    report = json.loads(said)
    why = report.get("why", "")
    if not report["loaded"]:
        raise _cannot_run(file, why)
    if why and (report["is_sure"] or "alloc" in why or "memory" in why):
        raise ModelFileError(f"{name} cannot run one sample.", why=_first_line(why))


def _child(parts: Sequence[bytes | np.ndarray]) -> tuple[int, str]:
    """How the trial program ended, and what it said; Python's own search path is handed on."""
    paths = os.pathsep.join(place for place in sys.path if place)
    child = subprocess.Popen(
        [sys.executable, "-P", runtime.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert child.stdin is not None and child.stdout is not None
    timer = threading.Timer(SECONDS, child.kill)
    timer.start()
    said = b""
    try:
        with child, suppress(BrokenPipeError):  # it ended before it had read all
            for part in parts:
                child.stdin.write(part)
            child.stdin.close()
            said = child.stdout.read()
    finally:
        child.kill()
        timer.cancel()
    return child.returncode, said.decode(errors="replace")


def _cannot_run(file: OnnxFile, why: str) -> ModelFileError:
    return ModelFileError(
        f"{file.path.name} is not a model that ONNX Runtime can run.", why=_first_line(why)
    )


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[0]) if lines else "it does not say why"
