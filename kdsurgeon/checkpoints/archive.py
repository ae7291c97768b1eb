"""The gate before anything reads a zip: its records, proved to lie in the file as the file says.

Two parsers that disagree about one archive are how a checksum passes and other bytes are loaded.
So only the plain shape is let through, the one torch and numpy write: no comment, nothing before
or after, no encryption, no two names alike, no overlap, local and central headers in agreement.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from struct import error as StructError

from kdsurgeon.errors import ModelFileError

MAX_RECORDS = 200_000
STORED, DEFLATED = 0, 8

_END = Struct("<4s4H2LH")
_END64 = Struct("<4sQ2H2L4Q")
_LOCATOR = Struct("<4sLQL")
_CENTRAL = Struct("<4s6H3L5H2L")
_LOCAL = Struct("<4s5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class Record:
    """One member of a zip: where its bytes lie, how many, and what they unpack to."""

    name: str
    method: int
    crc: int
    offset: int
    start: int
    packed: int
    size: int

    def body(self, raw: bytes) -> memoryview:
        """The bytes as they lie in the file, without a copy."""
        return memoryview(raw)[self.start : self.start + self.packed]


def read_records(raw: bytes, name: str) -> tuple[Record, ...]:
    """Every record of the zip ``raw``, in the order of its directory; no body is unpacked.

    Raises :class:`ModelFileError` when the archive is damaged or not of the plain shape.
    """
    try:
        records = tuple(_records(raw))
        _check_names(records)
        _check_places(records, raw)
    except StructError as error:
        raise _damaged(name, "its directory is cut off") from error
    except _Broken as error:
        raise _damaged(name, str(error)) from error
    return records


def check_crc(record: Record, raw: bytes, name: str) -> None:
    """Raise :class:`ModelFileError` unless a stored record has the checksum that the zip gives."""
    if zlib.crc32(record.body(raw)) != record.crc:
        where = f"byte {record.start:,}"
        raise _damaged(name, f'record "{record.name}" fails its checksum ({where})')


class _Broken(Exception):
    """What is wrong with a zip; named with the file in :func:`read_records`."""


def _damaged(name: str, why: str) -> ModelFileError:
    return ModelFileError(f"{name} is damaged: {why}.", fix="copy or download it again")


def _records(raw: bytes) -> Iterator[Record]:
    count, start, end = _directory(raw)
    if count > MAX_RECORDS or count * _CENTRAL.size > end - start:
        raise _Broken(f"its directory announces {count:,} records")
    place = start
    for _ in range(count):
        fields = _CENTRAL.unpack_from(raw, place)
        signature, _, _, flags, method, _, _, crc, packed, size, *lengths = fields
        label_length, extra_length, note_length, disk, _, _, offset = lengths
        place += _CENTRAL.size
        label = raw[place : place + label_length]
        extra = raw[place + label_length : place + label_length + extra_length]
        place += label_length + extra_length + note_length
        if signature != b"PK\1\2" or place > end or disk:
            raise _Broken("its directory is not one")
        size, packed, offset = _wide(extra, size, packed, offset)
        body = _body(raw, offset, label, flags, method)
        yield Record(_text(label), method, crc, offset, body, packed, size)
    if place != end:
        raise _Broken("its directory has another length than it says")


def _directory(raw: bytes) -> tuple[int, int, int]:
    """Number of records, first and last byte of the directory."""
    last = len(raw) - _END.size
    if last < 0:
        raise _Broken("it is cut off")
    signature, disk, first_disk, here, count, size, start, comment = _END.unpack_from(raw, last)
    if signature != b"PK\5\6" or comment:
        raise _Broken("it does not end as a zip archive does (cut off, or something follows it)")
    if disk or first_disk or here != count:
        raise _Broken("it is one part of several")
    end = last
    locator = last - _LOCATOR.size
    if locator >= _END64.size and raw[locator : locator + 4] == b"PK\6\7":
        end = locator - _END64.size
        wide = _END64.unpack_from(raw, end)
        _, disk64, place, disks = _LOCATOR.unpack_from(raw, locator)
        if wide[0] != b"PK\6\6" or place != end or disk64 or disks > 1:
            raise _Broken("its long directory is not where it says")
        narrow = ((count, _FULL16, wide[7]), (size, _FULL32, wide[8]), (start, _FULL32, wide[9]))
        if wide[6] != wide[7] or any(short not in (full, long) for short, full, long in narrow):
            raise _Broken("its two directories disagree")
        count, size, start = wide[7:10]
    elif count == _FULL16 or _FULL32 in (size, start):
        raise _Broken("its long directory is missing")
    if start + size != end:
        raise _Broken("its directory is not where it says")
    return count, start, end


def _wide(extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Sizes and offset, read from the zip64 extra field where the short ones are full."""
    full = [value == _FULL32 for value in (size, packed, offset)]
    if not any(full):
        return size, packed, offset
    place = 0
    while place + 4 <= len(extra):
        kind = int.from_bytes(extra[place : place + 2], "little")
        length = int.from_bytes(extra[place + 2 : place + 4], "little")
        if kind == 1 and length >= 8 * sum(full) and place + 4 + length <= len(extra):
            longs = iter(Struct(f"<{sum(full)}Q").unpack_from(extra, place + 4))
            short = (size, packed, offset)
            wide = [next(longs) if is_full else v for v, is_full in zip(short, full, strict=True)]
            return wide[0], wide[1], wide[2]
        place += 4 + length
    raise _Broken("a long record has no long size")


def _body(raw: bytes, offset: int, label: bytes, flags: int, method: int) -> int:
    """Where a record's bytes start, after its local header was held against the directory."""
    if offset + _LOCAL.size > len(raw):
        raise _Broken(f'record "{_text(label)}" lies outside of the file')
    local = _LOCAL.unpack_from(raw, offset)
    start = offset + _LOCAL.size
    if local[0] != b"PK\3\4" or raw[start : start + local[9]] != label or local[3] != method:
        raise _Broken(f'record "{_text(label)}" is described twice, differently')
    if (flags | local[2]) & 0x2041:
        raise _Broken(f'record "{_text(label)}" is encrypted')
    return start + local[9] + local[10]


def _text(label: bytes) -> str:
    try:
        name = label.decode()
    except UnicodeDecodeError as error:
        raise _Broken("a record's name is not text") from error
    if not name.isprintable():
        raise _Broken(f"a record's name is not plain text ({name!r})")
    return name


def _check_names(records: tuple[Record, ...]) -> None:
    seen: set[str] = set()
    for record in records:
        parts = record.name.split("/")
        if not record.name or record.name.startswith("/") or ".." in parts or "\\" in record.name:
            raise _Broken(f'record "{record.name}" would leave its folder')
        if record.name.lower() in seen:  # torch's zip reader ignores case
            raise _Broken(f'it holds record "{record.name}" twice')
        seen.add(record.name.lower())


def _check_places(records: tuple[Record, ...], raw: bytes) -> None:
    limit = _directory(raw)[1]
    for record in sorted(records, key=lambda record: record.offset, reverse=True):
        if record.method == STORED and record.packed != record.size:
            raise _Broken(f'record "{record.name}" has two sizes')
        if record.start + record.packed > limit:
            raise _Broken(f'record "{record.name}" overlaps what follows it or is cut off')
        limit = record.offset
