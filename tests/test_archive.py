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


def _flipped(place: int, value: int, sign: bytes, form: str = "<H"):
    """Damage that writes ``value`` so many bytes behind the first ``sign``."""
    return lambda raw: struct.pack_into(form, raw, raw.index(sign) + place, value)


END, CENTRAL, LOCAL, LOCATOR = b"PK\5\6", b"PK\1\2", b"PK\3\4", b"PK\6\7"
FIELDS = {
    "on another disk": (_flipped(4, 1, END), "it is one part of several"),
    "a directory on another disk": (_flipped(6, 1, END), "it is one part of several"),
    "other records here": (_flipped(8, 2, END), "it is one part of several"),
    "a comment": (_flipped(20, 1, END), "it does not end as a zip archive does"),
    "the most records": (
        lambda raw: struct.pack_into("<2H", raw, raw.index(END) + 8, 0xFFFF, 0xFFFF),
        "its long directory is missing",
    ),
    "a long place": (_flipped(16, 0xFFFFFFFF, END, "<L"), "its long directory is missing"),
    "a place before": (_flipped(16, 0, END, "<L"), "its directory is not where it says"),
    "a record on another disk": (_flipped(34, 1, CENTRAL), "its directory is not one"),
    "encrypted": (_flipped(8, 1, CENTRAL), 'record "net/data.pkl" is encrypted'),
    "encrypted here": (_flipped(6, 1, LOCAL), 'record "net/data.pkl" is encrypted'),
    "strongly encrypted": (_flipped(8, 0x40, CENTRAL), "is encrypted"),
    "a hidden directory": (_flipped(8, 0x2000, CENTRAL), "is encrypted"),
    "no local header": (_flipped(0, 0, LOCAL), "is described twice, differently"),
    "another name here": (_flipped(30, 0x7A7A, LOCAL), "is described twice, differently"),
    "another method here": (_flipped(8, 8, LOCAL), "is described twice, differently"),
    "two sizes": (_flipped(24, 29, CENTRAL, "<L"), 'record "net/data.pkl" has two sizes'),
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_held_against_what_it_should_be(name, monkeypatch):
    damage, words = FIELDS[name]
    raw = bytearray(written(monkeypatch, None))
    damage(raw)
    with pytest.raises(ModelFileError, match=rf"net\.pt is damaged: .*{words}"):
        read_records(bytes(raw), "net.pt")


@pytest.mark.parametrize("flag", [0x2, 0x8, 0x800, 0x1000])
def test_other_flags_say_nothing_of_the_content(flag, monkeypatch):
    raw = bytearray(written(monkeypatch, None))
    for place, sign in ((8, CENTRAL), (6, LOCAL)):
        _flipped(place, flag, sign)(raw)
    assert len(read_records(bytes(raw), "net.pt")) == 3


LONG_FIELDS = {
    "a directory on another disk": (4, 1), "elsewhere": (8, 0), "on several disks": (16, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG_FIELDS)
def test_every_field_of_the_locator_is_held(name, monkeypatch):
    place, value = LONG_FIELDS[name]
    raw = bytearray(written(monkeypatch, 10))
    _flipped(place, value, LOCATOR)(raw)
    with pytest.raises(ModelFileError, match="its long directory is not where it says"):
        read_records(bytes(raw), "net.pt")


@pytest.mark.parametrize(
    ("place", "form", "full"), [(8, "<2H", 0xFFFF), (12, "<L", 0xFFFFFFFF), (16, "<L", 0xFFFFFFFF)]
)
def test_short_fields_that_are_full_leave_it_to_the_long_ones(place, form, full, monkeypatch):
    raw = bytearray(written(monkeypatch, 10))
    struct.pack_into(form, raw, raw.index(END) + place, *[full] * (2 if form == "<2H" else 1))
    assert {each.name: bytes(each.body(raw)) for each in read_records(bytes(raw), "x")} == CONTENTS
    struct.pack_into(form, raw, raw.index(END) + place, *[7] * (2 if form == "<2H" else 1))
    with pytest.raises(ModelFileError, match="its two directories disagree"):
        read_records(bytes(raw), "net.pt")


def test_a_long_size_is_found_behind_other_fields(monkeypatch):
    raw = bytearray(written(monkeypatch, 10))
    central = raw.index(CENTRAL)
    field = _long_field(raw)
    other = struct.pack("<2HL", 9, 4, 0)
    raw[field:field] = other
    struct.pack_into("<H", raw, central + 30, struct.unpack_from("<H", raw, central + 30)[0] + 8)
    end64, end = raw.index(b"PK\6\6"), raw.index(END)
    for place, form in ((end64 + 40, "<Q"), (end + 12, "<L"), (raw.index(LOCATOR) + 8, "<Q")):
        (value,) = struct.unpack_from(form, raw, place)
        if value != 0xFFFFFFFF:
            struct.pack_into(form, raw, place, value + 8)
    assert {each.name: bytes(each.body(raw)) for each in read_records(bytes(raw), "x")} == CONTENTS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "would leave its folder"),
        ("/data", "would leave its folder"),
        ("net/../data", "would leave its folder"),
        ("net\\data", "would leave its folder"),
        ("NET/VERSION", 'it holds record "net/version" twice'),
        ("net/\x07", "a record's name is not plain text"),
    ],
)
def test_a_name_that_is_no_place_in_the_archive_is_refused(name, words, monkeypatch):
    raw = written(monkeypatch, None, {name: b"x"} | CONTENTS)
    with pytest.raises(ModelFileError, match=words):
        read_records(raw, "net.pt")


def test_names_with_two_dots_inside_are_places():
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("net/a..b", b"x")
    assert [each.name for each in read_records(stream.getvalue(), "x")] == ["net/a..b"]


def test_records_may_touch_and_not_overlap(monkeypatch):
    raw = bytearray(written(monkeypatch, None))
    second = raw.index(CENTRAL, raw.index(CENTRAL) + 1)
    for place in (20, 24):  # of the record before the last: one byte more than there is
        (size,) = struct.unpack_from("<L", raw, second + place)
        struct.pack_into("<L", raw, second + place, size + 1)
    with pytest.raises(ModelFileError, match='record "net/data/0" overlaps what follows it'):
        read_records(bytes(raw), "net.pt")


def test_as_many_records_as_are_allowed_are_read(monkeypatch):
    raw = written(monkeypatch, None)
    monkeypatch.setattr("kdsurgeon.checkpoints.archive.MAX_RECORDS", 3)
    assert len(read_records(raw, "net.pt")) == 3
    monkeypatch.setattr("kdsurgeon.checkpoints.archive.MAX_RECORDS", 2)
    with pytest.raises(ModelFileError, match="its directory announces 3 records"):
        read_records(raw, "net.pt")


def test_a_changed_byte_of_a_record_is_named_with_its_place(monkeypatch):
    raw = bytearray(written(monkeypatch, None))
    record = read_records(bytes(raw), "net.pt")[1]
    raw[record.start + 7] ^= 1
    with pytest.raises(
        ModelFileError, match=rf'"net/data/0" fails its checksum \(byte {record.start}'
    ):
        check_crc(record, bytes(raw), "net.pt")


def test_long_sizes_of_a_packed_record_are_told_apart(monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("net/first", "net/second"):
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(b"")
        archive.writestr("net/third", bytes(500), zipfile.ZIP_DEFLATED)
    raw = stream.getvalue()
    with zipfile.ZipFile(BytesIO(raw)) as archive:
        known = archive.getinfo("net/third")
    found = read_records(raw, "net.pt")[2]
    assert (found.size, found.packed, found.offset) == (
        500,
        known.compress_size,
        known.header_offset,
    )
    assert found.size != found.packed and found.method == zipfile.ZIP_DEFLATED


def test_a_long_field_that_ends_behind_its_record_is_refused(monkeypatch):
    raw = bytearray(written(monkeypatch, 10))
    length = _long_field(raw) + 2
    (size,) = struct.unpack_from("<H", raw, length)
    struct.pack_into("<H", raw, length, size + 1)
    with pytest.raises(ModelFileError, match="a long record has no long size"):
        read_records(bytes(raw), "net.pt")
