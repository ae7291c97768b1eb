"""Read a model file whole, and the weights beside it: plain files under bare names only."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import numpy as np
from onnx import ModelProto, TensorProto

from kdsurgeon.checkpoints.pickles import printable
from kdsurgeon.errors import ModelFileError, ResourceError
from kdsurgeon.exporting.soundness import num_bytes, num_elements

MAX_DATA = 16 << 30  # bytes of weights in other files

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


def opened(path: Path, name: str, *, is_beside: bool = False) -> BinaryIO:
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


def read(file: BinaryIO, name: str, most: int) -> bytes:
    size = os.fstat(file.fileno()).st_size
    if size > most:
        raise ModelFileError(f"{name} has {size:,} bytes; an ONNX file has at most {most:,}.")
    return _bytes(file, 0, size, name)


def _bytes(file: BinaryIO, start: int, count: int, name: str) -> bytes:
    try:
        file.seek(start)
        return file.read(count)
    except MemoryError as error:
        raise ResourceError(
            f"{name} does not fit into memory.", fix="use a machine with more memory"
        ) from error
    except OSError as error:
        raise ResourceError(f"{name} cannot be read.", why=error.strerror) from error


def weights_outside(model: ModelProto, path: Path) -> dict[str, np.ndarray]:
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
        with opened(path.with_name(place), path.name, is_beside=True) as file:
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
    is_there = offset + size <= os.fstat(file.fileno()).st_size
    raw = _bytes(file, offset, size, place) if is_there else b""
    if len(raw) != size:
        raise ModelFileError(
            f'{name} is damaged: tensor "{printable(tensor.name)}" lies at {offset:,} of {place}, '
            f"which ends before.",
            fix="copy both files again",
        )
    kind = np.dtype(_NUMPY[tensor.data_type])
    return np.frombuffer(raw, kind, num_elements(tensor)).reshape(tensor.dims)
