"""The gate before every zip: what it reads is what Python's own reader reads, or it is refused."""

from __future__ import annotations

import struct
import zipfile
from io import BytesIO

import pytest

from kdsurgeon.checkpoints.archive import check_crc, read_records
from kdsurgeon.errors import ModelFileError

CONTENTS = {"net/data.pkl": b"p" * 30, "net/data/0": bytes(range(256)), "net/version": b"3\n"}


def written(monkeypatch, limit: int | None, contents: dict[str, bytes] = CONTENTS) -> bytes:
    """A zip in which all sizes and offsets above ``limit`` are long ones, as beyond 4 GiB."""
    if limit is not None:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in contents.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


@pytest.mark.parametrize("limit", [None, 400, 250, 100, 10])
def test_short_and_long_records_are_those_that_python_reads(limit, monkeypatch):
    raw = written(monkeypatch, limit)
    records = read_records(raw, "net.pt")
    with zipfile.ZipFile(BytesIO(raw)) as archive:
        known = archive.infolist()
    found = [(each.name, each.size, each.packed, each.offset, each.crc) for each in records]
    assert found == [
        (each.filename, each.file_size, each.compress_size, each.header_offset, each.CRC)
        for each in known
    ]
    assert {each.name: bytes(each.body(raw)) for each in records} == CONTENTS
    for record in records:
        check_crc(record, raw, "net.pt")


def test_the_long_directory_of_this_test_is_one(monkeypatch):
    assert b"PK\6\6" not in written(monkeypatch, None)
    assert b"PK\6\6" in written(monkeypatch, 10)


def _long_field(raw: bytes) -> int:
    """Where the first long field of the directory begins."""
    central = raw.index(b"PK\1\2")
    (label,) = struct.unpack_from("<H", raw, central + 28)
    return central + 46 + label


def _without_long_size(raw: bytearray) -> None:
    struct.pack_into("<H", raw, _long_field(raw), 9)  # of another kind


def _short_long_size(raw: bytearray) -> None:
    struct.pack_into("<H", raw, _long_field(raw) + 2, 4)


def _without_long_directory(raw: bytearray) -> None:
    raw[raw.index(b"PK\6\7")] = 0


def _moved_long_directory(raw: bytearray) -> None:
    raw[raw.index(b"PK\6\7") + 8] ^= 1


def _two_counts(raw: bytearray) -> None:
    raw[raw.index(b"PK\6\6") + 24] += 1


def _beyond_the_end(raw: bytearray) -> None:
    place = _long_field(raw) + 4
    struct.pack_into("<Q", raw, place + 8, 1 << 40)
    struct.pack_into("<Q", raw, place, 1 << 40)


LONG = {
    "no long size": (_without_long_size, "a long record has no long size"),
    "a short long size": (_short_long_size, "a long record has no long size"),
    "no long directory": (_without_long_directory, "its long directory is missing"),
    "a moved long directory": (_moved_long_directory, "its long directory is not where it says"),
    "two counts": (_two_counts, "its two directories disagree"),
    "beyond the end": (_beyond_the_end, "overlaps what follows it or is cut off"),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_archive_that_contradicts_itself_is_refused(name, monkeypatch):
    damage, words = LONG[name]
    raw = bytearray(written(monkeypatch, 10))
    if name == "no long directory":  # its short one announces the most there can be
        struct.pack_into("<L", raw, len(raw) - 10, 0xFFFFFFFF)
    damage(raw)
    with pytest.raises(ModelFileError, match=rf"net\.pt is damaged: .*{words}"):
        read_records(bytes(raw), "net.pt")


def _more_records(raw: bytearray) -> None:
    for place in (len(raw) - 14, len(raw) - 12):
        struct.pack_into("<H", raw, place, 60_000)


def _fewer_records(raw: bytearray) -> None:
    for place in (len(raw) - 14, len(raw) - 12):
        struct.pack_into("<H", raw, place, 2)


def _no_directory(raw: bytearray) -> None:
    raw[raw.index(b"PK\1\2") + 1] = 0


def _outside(raw: bytearray) -> None:
    struct.pack_into("<L", raw, raw.index(b"PK\1\2") + 42, len(raw) + 1)


def _cut_off(raw: bytearray) -> None:
    struct.pack_into("<L", raw, raw.index(b"PK\1\2") + 42, len(raw) - 29)


def _not_text(raw: bytearray) -> None:
    for sign in (b"PK\3\4", b"PK\1\2"):
        raw[raw.index(sign) + {b"PK\3\4": 30, b"PK\1\2": 46}[sign]] = 0xFF


def _larger_than_what_is_there(raw: bytearray) -> None:
    last = raw.rindex(b"PK\1\2")
    struct.pack_into("<2L", raw, last + 20, 500, 500)


SHORT = {
    "more records": (_more_records, "its directory announces 60,000 records"),
    "fewer records": (_fewer_records, "its directory has another length than it says"),
    "no directory": (_no_directory, "its directory is not one"),
    "outside": (_outside, 'record "net/data.pkl" lies outside of the file'),
    "cut off": (_cut_off, 'record "net/data.pkl" lies outside of the file'),
    "not text": (_not_text, "a record's name is not text"),
    "too large": (_larger_than_what_is_there, 'record "net/version" overlaps what follows it'),
}


@pytest.mark.parametrize("name", SHORT)
def test_an_archive_that_contradicts_itself_is_refused(name, monkeypatch):
    damage, words = SHORT[name]
    raw = bytearray(written(monkeypatch, None))
    damage(raw)
    with pytest.raises(ModelFileError, match=rf"net\.pt is damaged: .*{words}"):
        read_records(bytes(raw), "net.pt")


def test_a_directory_that_ends_before_its_last_record_is_cut_off(monkeypatch):
    names = [f"net/{letter * 50}" for letter in "ab"]  # as long as a record without a name
    raw = bytearray(written(monkeypatch, None, dict.fromkeys(names, b"")))
    struct.pack_into("<2H", raw, len(raw) - 14, 3, 3)
    with pytest.raises(ModelFileError, match=r"net\.pt is damaged: its directory is cut off"):
        read_records(bytes(raw), "net.pt")


@pytest.mark.parametrize("length", [0, 21])
def test_what_is_shorter_than_an_end_is_cut_off(length):
    with pytest.raises(ModelFileError, match="it is cut off"):
        read_records(bytes(length), "net.pt")
