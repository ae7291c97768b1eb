"""Read ``.npz`` archives: arrays of plain numbers, no pickles, no more memory than allowed."""

from __future__ import annotations

import io
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from kdsurgeon.checkpoints.archive import DEFLATED, STORED, Record, read_records
from kdsurgeon.checkpoints.disk import read_once
from kdsurgeon.errors import DataError, ModelFileError, ResourceError

MAX_BYTES = 8 << 30


def read_arrays(path: str | Path, *, max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """The arrays of a ``.npz`` file by name, as ``numpy.savez`` or ``savez_compressed`` wrote them.

    The sizes that the archive announces are added up before anything is unpacked; more than
    ``max_bytes`` raises :class:`ResourceError`. A file that is missing, damaged, no ``.npz`` or
    holds Python objects raises :class:`DataError`.

    >>> import numpy, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     numpy.savez(f"{folder}/two.npz", images=numpy.zeros((2, 8, 8), "uint8"))
    ...     read_arrays(f"{folder}/two.npz")["images"].shape
    (2, 8, 8)
    """
    name = str(path)
    try:
        raw = read_once(Path(path))
        if raw[:2] != b"PK":
            raise DataError(f"{name} is not an .npz archive.", fix="write it with numpy.savez")
        records = read_records(raw, name)
    except ModelFileError as error:
        raise DataError(error.what, **error.notes) from error
    total = sum(record.size for record in records)
    if total > max_bytes:
        raise ResourceError(
            f"{name} would unpack from {len(raw):,} to {total:,} bytes; refused.",
            why=f"at most {max_bytes:,} bytes are unpacked",
            fix="store the images as files in class folders",
        )
    return {_array_name(record, name): _array(record, raw, name) for record in records}


def _array_name(record: Record, name: str) -> str:
    if not record.name.endswith(".npy"):
        raise DataError(f'{name} holds "{record.name}", which is no numpy array.')
    return record.name.removesuffix(".npy")


def _array(record: Record, raw: bytes, name: str) -> np.ndarray:
    data = _unpack(record, raw, name)
    stream = io.BytesIO(data)
    try:
        version = npy.read_magic(stream)
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, is_fortran, dtype = reader(stream)
    except Exception as error:  # numpy parses with ast and tokenize: seven kinds of failure
        raise _damaged(record, name, "its header is not a numpy header") from error
    if dtype.hasobject:
        raise DataError(
            f'{name}: the array "{_array_name(record, name)}" holds Python objects, not numbers; '
            "it was not read.",
            why="reading it would unpickle, and so run, what the file says",
            fix="store numbers: images as uint8, labels as int64",
        )
    start = stream.tell()
    try:
        if dtype.itemsize * math.prod(shape) != len(data) - start:
            raise ValueError("more or fewer bytes")
        flat = np.frombuffer(data, dtype, offset=start)
        return flat.reshape(shape, order="F" if is_fortran else "C").copy()
    except (TypeError, ValueError) as error:  # a side is negative, no number or beyond reach
        raise _damaged(record, name, f"its shape {shape} does not fit its content") from error


def _unpack(record: Record, raw: bytes, name: str) -> bytes:
    """The content of a record, never more than it announces, with the checksum it announces."""
    body = record.body(raw)
    if record.method == STORED:
        data = bytes(body)
    elif record.method == DEFLATED:
        try:
            unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
            data = unpacker.decompress(body, record.size + 1)
        except zlib.error as error:
            raise _damaged(record, name, "it does not unpack") from error
    else:
        raise _damaged(record, name, "it is packed in a way numpy never uses")
    if len(data) != record.size or zlib.crc32(data) != record.crc:
        raise _damaged(record, name, "it fails its checksum")
    return data


def _damaged(record: Record, name: str, why: str) -> DataError:
    return DataError(
        f'{name} is damaged: record "{record.name}": {why}.', fix="copy or download it again"
    )
