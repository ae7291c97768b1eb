"""Read the bytes of an ONNX file before any parser does, so that all parsers understand the same.

A file is refused when it is cut off, when it holds a field that the format does not have, a field
twice that may stand once, text that is not UTF-8, or so many small parts that they would take far
more memory than the file has bytes.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor

MAX_DEPTH = 40  # messages in each other; a graph inside a graph adds three
MAX_PARTS = 1_000_000  # fields; a parser takes at most about 200 bytes for one
_BYTES_PER_PART = 128  # of a large file, which may have as many parts more
_NUMBERS_PER_PART = 16  # packed ones, of 8 bytes in memory

_VARINT, _FIXED64, _CHUNK, _FIXED32 = 0, 1, 2, 5
_NATURAL = {
    FieldDescriptor.TYPE_DOUBLE: _FIXED64,
    FieldDescriptor.TYPE_FLOAT: _FIXED32,
    FieldDescriptor.TYPE_STRING: _CHUNK,
    FieldDescriptor.TYPE_BYTES: _CHUNK,
    FieldDescriptor.TYPE_MESSAGE: _CHUNK,
}


class Malformed(Exception):
    """What is wrong with the bytes; whoever knows the name of the file tells the user."""


class _Field(NamedTuple):
    name: str
    wire: int
    is_repeated: bool
    is_text: bool
    members: frozenset[int] | None  # the numbers of an enumeration
    message: Descriptor | None


@cache
def _fields(kind: Descriptor) -> dict[int, _Field]:
    return {field.number: _field(field) for field in kind.fields}


def _field(field: FieldDescriptor) -> _Field:
    is_repeated = field.default_value == []  # what every version of protobuf says alike
    members = field.enum_type and frozenset(value.number for value in field.enum_type.values)
    wire = _NATURAL.get(field.type, _VARINT)
    is_text = field.type == FieldDescriptor.TYPE_STRING
    return _Field(field.name, wire, is_repeated, is_text, members, field.message_type)


def check_wire(raw: bytes, kind: Any) -> None:
    """Raise :class:`Malformed` unless ``raw`` is one whole message that every parser reads alike.

    ``kind`` is the descriptor of that message.

    >>> import onnx
    >>> check_wire(onnx.ModelProto(ir_version=8).SerializeToString(), onnx.ModelProto.DESCRIPTOR)
    >>> check_wire(bytes([8]), onnx.ModelProto.DESCRIPTOR)
    Traceback (most recent call last):
    kdsurgeon.exporting.wire.Malformed: it is cut off at byte 1
    """
    most = MAX_PARTS + len(raw) // _BYTES_PER_PART
    if _parts(raw, 0, len(raw), kind, most, 0) > most:
        raise Malformed(f"{len(raw):,} bytes hold more than {most:,} parts")


def _parts(raw: bytes, place: int, end: int, kind: Any, most: int, depth: int) -> int:
    """How many parts a message has, all counted; above ``most`` the counting stops."""
    if depth > MAX_DEPTH:
        raise Malformed(f"its parts lie more than {MAX_DEPTH} deep in each other")
    known = _fields(kind)
    seen = set()
    count = 0
    while place < end and count <= most:
        start = place
        tag, place = _varint(raw, place, end)
        number, wire = tag >> 3, tag & 7
        field = known.get(number)
        if field is None:
            raise Malformed(f"field {number} of {kind.name} at byte {start} is not known")
        if number in seen and not field.is_repeated:
            raise Malformed(f"{kind.name} has {field.name} a second time at byte {start}")
        seen.add(number)
        count += 1
        if wire == _CHUNK:
            size, place = _varint(raw, place, end)
            if size > end - place:
                raise Malformed(f"it is cut off at byte {place}")
            if field.message is not None:
                count += _parts(raw, place, place + size, field.message, most - count, depth + 1)
            else:
                count += _check_chunk(raw, place, size, field, kind)
            place += size
        else:
            place = _check_number(raw, place, end, field, wire)
    return count


def _check_number(raw: bytes, place: int, end: int, field: _Field, wire: int) -> int:
    """The place behind a number that stands alone."""
    if wire != field.wire:
        raise Malformed(f"{field.name} at byte {place} is not of its type")
    if wire == _VARINT:
        number, place = _varint(raw, place, end)
        if field.members is not None and number not in field.members:
            raise Malformed(f"{field.name} at byte {place} is {number}, which is not known")
        return place
    place += 8 if wire == _FIXED64 else 4
    if place > end:
        raise Malformed(f"it is cut off at byte {end}")
    return place


def _check_chunk(raw: bytes, place: int, size: int, field: _Field, kind: Any) -> int:
    """Check text and packed numbers; how many parts more they count for."""
    if field.wire == _CHUNK:
        if field.is_text:
            _check_text(raw[place : place + size], f"{kind.name}.{field.name} at byte {place}")
        return 0
    if not field.is_repeated or field.members is not None:
        raise Malformed(f"{field.name} at byte {place} is not of its type")
    if field.wire != _VARINT:
        if size % (8 if field.wire == _FIXED64 else 4):
            raise Malformed(f"{field.name} at byte {place} ends within a number")
        return 0
    numbers = np.frombuffer(raw, np.uint8, size, place) < 128  # the last byte of each
    if size and not numbers[-1]:
        raise Malformed(f"{field.name} at byte {place} ends within a number")
    return int(numbers.sum()) // _NUMBERS_PER_PART


def _check_text(text: bytes, where: str) -> None:
    try:
        text.decode()
    except UnicodeDecodeError:
        raise Malformed(f"{where} is not UTF-8") from None
    if b"\0" in text:
        raise Malformed(f"{where} holds a NUL")


def _varint(raw: bytes, place: int, end: int) -> tuple[int, int]:
    """A number, and the place behind it."""
    value = shift = 0
    while place < end:
        byte = raw[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if value >> 64:
                raise Malformed(f"a number at byte {place} has more than 64 bits")
            return value, place
        shift += 7
        if shift > 63:
            raise Malformed(f"a number at byte {place} has more than 64 bits")
    raise Malformed(f"it is cut off at byte {place}")
