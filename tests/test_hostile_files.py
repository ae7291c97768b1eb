"""500 hostile or damaged files run nothing and are refused alike; 2,000 mutants of our own files
never load wrong; 50 bombs stay within memory.

Every file is made here from a seed. The payloads are harmless: each would create one marker file.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kdsurgeon.checkpoints as checkpoints
from kdsurgeon.checkpoints import store
from kdsurgeon.checkpoints.disk import read_once
from kdsurgeon.checkpoints.kinds import LEGACY_START
from kdsurgeon.errors import DataError, ModelFileError, ResourceError, SurgeonError

SEED = 20250
MARKER = "marker-of-a-payload-that-ran"


# --- watching: an audit hook cannot be removed, so it looks away unless asked -------------------

FORBIDDEN = ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "subprocess.")
FORBIDDEN += ("socket.", "exec", "pickle.find_class", "ctypes.dlopen", "shutil.", "urllib.")


class Watch:
    """Audit events of code that runs, noted while active."""

    def __init__(self) -> None:
        self.is_active = False
        self.events: list[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        if self.is_active and event.startswith(FORBIDDEN):
            self.events.append(f"{event} {arguments!r}"[:200])

    def __enter__(self) -> Watch:
        self.events.clear()
        self.is_active = True
        return self

    def __exit__(self, *_: object) -> None:
        self.is_active = False


@pytest.fixture(scope="module")
def watch() -> Watch:
    "".encode("raw_unicode_escape")  # a codec that pickletools imports on first use
    return Watch()


# --- pickles by hand ---------------------------------------------------------------------------


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def calls(marker: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """Functions that would leave the marker, or lead to one that does: module, name, arguments."""
    touch = f"touch {marker}"
    code = f"open({marker!r}, 'w').close()"
    return [
        ("os", "system", (touch,)),
        ("posix", "system", (touch,)),
        ("nt", "system", (touch,)),
        ("os", "popen", (touch,)),
        ("os", "mkdir", (marker,)),
        ("subprocess", "getoutput", (touch,)),
        ("subprocess", "check_output", (touch,)),
        ("builtins", "exec", (code,)),
        ("__builtin__", "eval", (code,)),
        ("builtins", "eval", (code,)),
        ("builtins", "open", (marker, "w")),
        ("io", "open", (marker, "w")),
        ("_io", "FileIO", (marker, "w")),
        ("pathlib", "Path.touch", (marker,)),
        ("timeit", "timeit", (code,)),
        ("pty", "spawn", ("/bin/sh",)),
        ("runpy", "run_path", (marker,)),
        ("code", "interact", ()),
        ("importlib", "import_module", ("antigravity",)),
        ("builtins", "__import__", ("antigravity",)),
        ("webbrowser", "open", ("http://localhost",)),
        ("socket", "create_connection", ("localhost", "9")),
        ("urllib.request", "urlretrieve", ("http://localhost:9", marker)),
        ("torch", "load", (marker,)),
        ("torch.hub", "load", (marker, "x")),
        ("torch.jit", "load", (marker,)),
        ("torch", "save", ("x", marker)),
        ("numpy", "save", (marker, "x")),
        ("numpy.testing._private.utils", "runstring", (code, "{}")),
        ("shutil", "rmtree", (marker,)),
        ("cProfile", "run", (code,)),
        ("pdb", "run", (code,)),
        ("ctypes", "CDLL", ("libc.so.6",)),
        ("operator", "attrgetter", ("system",)),
        ("functools", "partial", ("x",)),
        ("torch._utils", "_import_dotted_name", ("os.system",)),
        ("torch.serialization", "_get_layout", ("x",)),
        ("torch.nn.modules.module", "Module", ()),
        ("collections", "namedtuple", (marker, "x")),
        ("getattr", "x", ("os", "system")),
    ]


def tuple_of(values: tuple[str, ...]) -> bytes:
    return b"(" + b"".join(map(text, values)) + b"t"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def opcodes(module: str, name: str, values: tuple[str, ...]) -> list[bytes]:
    """One call in the ways that the pickle machine knows; each leaves one value on the stack."""
    spelled = named(module, name)
    stacked = text(module) + text(name) + b"\x93"
    arguments = tuple_of(values)
    quoted = "".join(f"V{value}\n" for value in values).encode()
    return [
        spelled + arguments + b"R",
        stacked + arguments + b"R",
        spelled + arguments + b"\x81",
        spelled + arguments + b"}\x92",
        b"(" + spelled + b"".join(map(text, values)) + b"o",
        b"(" + quoted + f"i{module}\n{name}\n".encode(),
        b"}q\x01" + spelled + arguments + b"Rb",
        spelled + b"q\x05" + b"0h\x05" + arguments + b"R",
        b"ccollections\nOrderedDict\n)R}" + text("x") + spelled + arguments + b"Rsb",
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + spelled + arguments + b"RK\x00))\x89}tR",
        text("storage") + spelled + arguments + b"R" + text("0") + b"\x87Q",
    ]


def around(call: bytes, position: int) -> bytes:
    """The call as the root, a value, a key, an item, or behind a harmless state dict."""
    return [
        b"\x80\x02" + call + b".",
        b"\x80\x02}" + text("state_dict") + call + b"s.",
        b"\x80\x02}" + call + text("x") + b"s.",
        b"\x80\x02](" + text("x") + call + b"e.",
        b"\x80\x02" + call + b"0}" + text("state_dict") + b"}s.",
        b"\x80\x04\x95" + (len(call) + 1).to_bytes(8, "little") + call + b".",
    ][position]


# --- archives by hand --------------------------------------------------------------------------


def archive(
    entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED, comment: bytes = b""
) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as opened:
        for name, content in entries:
            opened.writestr(zipfile.ZipInfo(name), content, compress_type=method)
        opened.comment = comment
    return stream.getvalue()


def checkpoint(content: bytes, *more: tuple[str, bytes]) -> bytes:
    entries = [("a/data.pkl", content), ("a/byteorder", b"little"), ("a/version", b"3\n")]
    return archive([*entries, ("a/data/0", bytes(64)), *more])


def saved(value: object, **options: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def tiny() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


STATE = saved({"state_dict": tiny().state_dict(), "epoch": 3})


def tensor_pickle(count: int, size: str, stride: str, offset: int = 0, key: str = "0") -> bytes:
    """A state dict of one tensor that says of itself what the arguments say, in pickle opcodes."""

    def numbers(values: str) -> bytes:
        each = [int(value) for value in values.split()]
        return b"(" + b"".join(long(value) for value in each) + b"t"

    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text(key) + text("cpu")
    storage += long(count) + b"tQ"
    rest = long(offset) + numbers(size) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)R"
    body = named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + rest + b"tR"
    return b"\x80\x02}" + text("weight") + body + b"s."


def long(value: int) -> bytes:
    width = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([width]) + value.to_bytes(width, "little", signed=True)


def safetensors(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + body


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# --- the 500 -----------------------------------------------------------------------------------


def hostile_pickles(marker: str) -> Iterator[bytes]:
    """Calls × opcodes × positions, as bare pickles and inside of checkpoints of several kinds."""
    spread = random.Random(SEED)
    every = [
        (call, way, position)
        for call in calls(marker)
        for way in range(11)
        for position in range(6)
    ]
    for index, (call, way, position) in enumerate(spread.sample(every, 250)):
        content = around(opcodes(*call)[way], position)
        yield [content, checkpoint(content), checkpoint(content)][index % 3]


def hostile_objects(marker: str) -> Iterator[bytes]:
    """What Python itself pickles: real objects with payloads, in every protocol and container."""

    class Payload:
        def __init__(self, function: Callable[..., object], *arguments: object) -> None:
            self.call = (function, arguments)

        def __reduce__(self) -> tuple:
            return self.call

    import os

    payloads = [Payload(os.system, f"touch {marker}"), Payload(os.mkdir, marker)]
    payloads += [Payload(exec, f"open({marker!r}, 'w')"), Payload(open, marker, "w")]
    for payload in payloads:
        for protocol in range(6):
            yield pickle.dumps(payload, protocol)
        for protocol in (2, 3, 4, 5):
            inside = {"state_dict": tiny().state_dict(), "extra": payload}
            yield saved(inside, pickle_protocol=protocol)
        yield saved({"a": payload}, _use_new_zipfile_serialization=False)
        yield saved([payload, torch.ones(2)])
        yield checkpoint(pickle.dumps({"state_dict": {"w": payload}}, 2))
        yield zlib.compress(pickle.dumps(payload))
        yield pickle.dumps(np.array([payload], dtype=object))
        yield npy_of_objects(payload)
        yield archive([("x.npy", npy_of_objects(payload))])
        yield b"\x80\x02}" + pickle.dumps(payload, 2)[2:] + STATE
    yield saved(tiny())
    yield saved({"model": tiny(), "epoch": 1})
    yield saved(tiny().state_dict(), _use_new_zipfile_serialization=False)


def npy_of_objects(payload: object) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.array([payload], dtype=object), allow_pickle=True)
    return stream.getvalue()


def zip_tricks(marker: str) -> Iterator[bytes]:
    """Archives that two readers would read differently, or that leave their folder."""
    bad = around(opcodes("os", "system", (f"touch {marker}",))[0], 0)
    with zipfile.ZipFile(io.BytesIO(STATE)) as opened:
        good = [(entry.filename, opened.read(entry)) for entry in opened.infolist()]
    root = good[0][0].partition("/")[0]
    with pytest.warns(UserWarning, match="Duplicate name"):
        yield archive([*good, (f"{root}/data.pkl", bad)])
    yield archive([*good, (f"{root}/DATA.PKL", bad)])
    for name in (
        "/etc/x",
        "../x",
        f"{root}/../../x",
        "a\\..\\x",
        f"{root}/data/\n",
        f"{root}/é\x01",
    ):
        yield archive([*good, (name, b"x")])
    for name in ("other/data.pkl", f"{root}/deep/data.pkl", "data.pkl"):
        yield archive([*good, (name, bad)])
    for name in ("code/x.py", "constants.pkl", "archive_format", "models/model.json"):
        yield archive([*good, (f"{root}/{name}", b"x")])
    yield archive(good, zipfile.ZIP_DEFLATED)
    yield archive(good, zipfile.ZIP_BZIP2)
    yield archive(good, zipfile.ZIP_LZMA)
    yield archive(good, comment=b"something follows")
    yield archive(good) + b"trailing"
    yield b"leading" + archive(good)
    yield STATE + STATE
    yield STATE + bad
    yield b"\x89PNG\r\n\x1a\n" + STATE
    yield b"%PDF-1.7\n" + STATE
    yield b"GIF89a" + STATE
    yield archive([])
    yield archive([("readme.txt", b"hello")])
    yield archive([("a.npy", b"\x93NUMPY")])
    yield archive([(name, content) for name, content in good if not name.endswith("data.pkl")])
    yield archive([(name, b"" if "/data/" in name else body) for name, body in good])
    yield archive([(name, b"big" if name.endswith("byteorder") else body) for name, body in good])
    yield archive([("config.json", b"{}"), ("model.weights.h5", b"\x89HDF")])
    yield from patched(STATE)


def patched(raw: bytes) -> Iterator[bytes]:
    """The archive with one field of one directory entry or local header changed."""
    central = [place for place in range(len(raw)) if raw[place : place + 4] == b"PK\1\2"]
    local = [place for place in range(len(raw)) if raw[place : place + 4] == b"PK\3\4"]
    fields = {"flags": 8, "method": 10, "crc": 16, "packed": 20, "size": 24, "offset": 42}
    for place in central[:2]:
        for shift in fields.values():
            yield raw[: place + shift] + b"\x09" + raw[place + shift + 1 :]
    for place in local[:2]:
        for shift in (6, 8, 26, 30):
            yield raw[: place + shift] + b"\x01" + raw[place + shift + 1 :]
    end = len(raw) - 22
    for shift in (4, 8, 10, 12, 16, 20):
        yield raw[: end + shift] + b"\x07" + raw[end + shift + 1 :]
    for shift in (0, 8, 16):
        yield raw[: end - 20 + shift] + b"\x07" + raw[end - 20 + shift + 1 :]


def lying_tensors() -> Iterator[bytes]:
    """State dicts whose tensors lie outside of their storage, and pickles of no state dict."""
    yield checkpoint(tensor_pickle(16, "1000000", "1"))
    yield checkpoint(tensor_pickle(16, "1000000000000 1000", "0 0"))
    yield checkpoint(tensor_pickle(1 << 40, "16", "1"))
    yield checkpoint(tensor_pickle(1 << 61, "16", "1"))
    yield checkpoint(tensor_pickle(17, "17", "1"))
    yield checkpoint(tensor_pickle(16, "16", "1", offset=1))
    yield checkpoint(tensor_pickle(16, "4", "-1"))
    yield checkpoint(tensor_pickle(16, "-4", "1"))
    yield checkpoint(tensor_pickle(16, "4", "1", offset=-4))
    yield checkpoint(tensor_pickle(16, "4 4", "4"))
    yield checkpoint(tensor_pickle(16, "4", "1", key="../version"))
    yield checkpoint(tensor_pickle(16, "4", "1", key="absent"))
    yield checkpoint(b"\x80\x02}" + text("a") + b"K\x01s.")
    yield checkpoint(b"\x80\x02].")
    yield checkpoint(b"\x80\x02N.")
    yield checkpoint(b"")
    yield checkpoint(b"\x80\x02")
    yield checkpoint(b"\x80\x02}")
    yield checkpoint(b".")
    yield checkpoint(b"\x80\x09}.")
    yield checkpoint(b"\x80\x02}(((" + b"t" * 9 + b".")
    yield checkpoint(b"\x80\x02" + b"]" * 30 + b"a" * 29 + b".")
    yield checkpoint(b"\x80\x02}q\x00" + text("a") + b"h\x00s.")
    yield checkpoint(b"\x80\x02h\x09.")
    yield checkpoint(b"\x80\x02\x82\x01.")
    yield checkpoint(b"\x80\x02Pxyz\n.")
    yield saved({"state_dict": {3: torch.ones(2)}})
    yield saved({"state_dict": {"w": torch.ones(2), "x": 1}})
    yield saved({"w": torch.full((3,), float("nan"))})
    yield saved({"w": torch.tensor([1.0, float("inf")])})
    yield saved({"w": torch.eye(3).to_sparse()})
    yield saved(torch.ones(3))
    yield saved([torch.ones(3)])
    yield saved({})
    yield saved({"epoch": 3})
    deep: object = torch.ones(1)
    for _ in range(40):
        deep = {"x": deep}
    yield saved({"state_dict": {"w": torch.ones(1)}, "more": deep})


def lying_safetensors() -> Iterator[bytes]:
    body = bytes(16)
    yield safetensors({"a": entry([4], 0, 16)}, body, length=1 << 40)
    yield safetensors({"a": entry([4], 0, 16)}, body, length=1 << 25)
    yield safetensors({"a": entry([4], 0, 16)}, body, length=3)
    yield safetensors({"a": entry([4], 0, 16)}, b"")
    yield safetensors({"a": entry([4], 0, 16)}, body * 2)
    yield safetensors({"a": entry([5], 0, 16)}, body)
    yield safetensors({"a": entry([4], 16, 0)}, body)
    yield safetensors({"a": entry([4], -16, 0)}, body)
    yield safetensors({"a": entry([4], 4, 20)}, body)
    yield safetensors({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, body)
    yield safetensors({"a": entry([4], 0, 16, "F99")}, body)
    yield safetensors({"a": entry([1 << 62, 4], 0, 16)}, body)
    yield safetensors({"a": entry([-4], 0, 16)}, body)
    yield safetensors({"a": {"dtype": "F32"}}, body)
    yield safetensors({"a": 3}, body)
    yield safetensors({"__metadata__": {"a": 3}, "b": entry([4], 0, 16)}, body)
    yield safetensors({"__metadata__": {"kdsurgeon": "{}"}, "b": entry([4], 0, 16)}, body)
    yield safetensors(
        {"__metadata__": {"kdsurgeon.sha256": "0" * 64}, "b": entry([4], 0, 16)}, body
    )
    yield safetensors({}, b"")
    yield safetensors(b"{" * 50, b"")
    yield safetensors(b'{"a":' * 5000, b"")
    yield safetensors(b'{"a": NaN}', body)
    yield safetensors(b'{"\xff": 1}', body)
    yield safetensors({"a": entry([4], 0, 16)}, b"\x00\x00\xc0\x7f" * 4)


def other_kinds() -> Iterator[bytes]:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize %d\n"
    for size in range(3):
        yield pointer % (size, size)
    yield b""
    yield b"\0" * 100
    yield b"<!DOCTYPE html><html><body>Sign in</body></html>"
    yield b"  \n<html><head></head></html>"
    yield b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'
    yield b'{"error": "not found"}'
    yield b"epochs: 3\nmodel: !!python/object/apply:os.system ['true']\n"
    yield b"import os\nos.system('true')\n"
    yield b"\x08\x07\x12\x07pytorch\x1a\x052.0.0:" + bytes(40)
    yield b"\x08\x0a\x3a" + bytes(40)
    yield b"\x93NUMPY\x01\x00" + bytes(60)
    yield b"\x89HDF\r\n\x1a\n" + bytes(60)
    yield b"GGUF" + bytes(60)
    yield b"\x1c\0\0\0TFL3" + bytes(60)
    yield b"\x1f\x8b\x08" + bytes(60)
    yield b"BZh91AY" + bytes(60)
    yield b"\xfd7zXZ\0" + bytes(60)
    yield b"PK\3\4"
    yield b"PK\5\6" + bytes(18)
    yield b"\x7fELF" + bytes(60)
    yield b"MZ" + bytes(60)
    yield b"#!/bin/sh\ntrue\n"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as opened:
        for name in ("storages", "tensors", "pickle"):
            opened.addfile(tarfile.TarInfo(name))
    yield stream.getvalue()


def programs(folder: Path) -> Iterator[bytes]:
    """TorchScript and .pt2 archives as torch writes them, and archives laid out as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, its files are still about
        torch.jit.script(nn.Linear(2, 2)).save(folder / "program.pt")
    torch.export.save(
        torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), folder / "program.pt2"
    )
    yield (folder / "program.pt").read_bytes()
    yield (folder / "program.pt2").read_bytes()
    entries = ["data/0", "data.pkl", "code/__torch__/m.py", "constants.pkl", "version"]
    yield archive([(f"net/{name}", b"x") for name in entries])
    exported = ["data/weights/weight_0", "models/model.json", "archive_format", "archive_version"]
    yield archive([(f"net/{name}", b"x") for name in exported])
    yield archive([("serialized_exported_program.json", b"{}"), ("version", b"8")])
    yield archive([("model.json", b"{}"), ("tensors/0", b"x")])


def damaged_states(count: int) -> Iterator[bytes]:
    """A good checkpoint, cut off or with a run of zeros over its records."""
    spread = random.Random(SEED + 1)
    with zipfile.ZipFile(io.BytesIO(STATE)) as opened:
        bodies = [e for e in opened.infolist() if "/data/" in e.filename and e.file_size > 30]
    for index in range(count):
        if index % 2:
            yield STATE[: spread.randrange(1, len(STATE))]
            continue
        place = spread.choice(bodies).header_offset + spread.randrange(40)
        yield STATE[:place] + b"\xa5" * 130 + STATE[place + 130 :]


def hostile_files(folder: Path) -> list[bytes]:
    marker = str(folder / MARKER)
    made = [*hostile_pickles(marker), *hostile_objects(marker), *zip_tricks(marker)]
    made += [*lying_tensors(), *lying_safetensors(), *other_kinds(), *programs(folder)]
    assert len(made) < 500, len(made)
    return made + list(damaged_states(500 - len(made)))


def verdict(read: Callable[[], object]) -> str:
    """The name of the error that reading raised; anything but a refusal is the test's failure."""
    try:
        read()
    except SurgeonError as error:
        assert "Traceback" not in str(error)
        return type(error).__name__
    return "loaded"


def test_500_hostile_files_run_nothing_and_are_all_refused_alike(
    tmp_path: Path, watch: Watch
) -> None:
    files = hostile_files(tmp_path)
    path = tmp_path / "model.pt"
    path.write_bytes(STATE)
    checkpoints.read_model(path)  # what torch imports on first use is not the file's doing
    outcomes: list[tuple[int, str, str]] = []
    for number, content in enumerate(files):
        path.write_bytes(content)
        with watch:
            outcome = verdict(lambda: checkpoints.read_model(path))
        if outcome != "ModelFileError" or watch.events:
            outcomes.append((number, outcome, str(watch.events) + repr(content[:120])))
    assert len(files) == 500 and len(set(files)) > 490
    assert outcomes == []
    assert not (tmp_path / MARKER).exists()
    assert ModelFileError.exit_code == 3


def test_the_payloads_would_run_in_an_ordinary_reader(tmp_path: Path, watch: Watch) -> None:
    """A control: hostile files that could do nothing anyway would prove nothing."""
    marker = tmp_path / MARKER
    ran, events = 0, 0
    for content in (made for made in hostile_objects(str(marker)) if made[:1] == b"\x80"):
        with watch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the payloads leave files open
            with suppress(Exception):
                pickle.loads(content)
        events += bool(watch.events)
        ran += marker.exists()
        if marker.is_dir():
            marker.rmdir()
        marker.unlink(missing_ok=True)
    assert ran >= 20
    assert events >= 20


def test_converting_hostile_files_runs_nothing_either(tmp_path: Path, watch: Watch) -> None:
    """The reader of ``convert`` makes plain data of pickles that name anything."""
    from kdsurgeon.checkpoints.conversion import _convert

    marker = tmp_path / MARKER
    draft = tmp_path / "draft.safetensors"
    tensors = 0
    for content in [*hostile_objects(str(marker)), *list(hostile_pickles(str(marker)))[:120]]:
        with watch:
            outcome = verdict(lambda c=content: _convert(c, "model.pt", draft, True))
        assert outcome in ("loaded", "ModelFileError"), content[:100]
        assert watch.events == []
        tensors += outcome == "loaded"
    assert not marker.exists()
    assert tensors >= 16  # the state dicts beside a payload are still rescued


STORAGE = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu")
EMPTY = b"ccollections\nOrderedDict\n)R"
NO_STATE = {
    "appends to a dict": (b"}Na", "it appends to dict"),
    "puts into a list": (b"]NNs", "it puts items into list"),
    "a key of a tuple": (b"})Ns", "a tuple as a key"),
    "changes a list": (b"]}b", "it changes list"),
    "calls a type": (named("torch", "float32") + b")R", "it calls torch.float32"),
    "calls with a list": (named("torch", "Size") + b"]R", "it calls torch.Size"),
    "a storage of no name": (b"(" + text("x") + b"NNNK\1tQ", "a storage is not described"),
    "a storage of no count": (STORAGE + b"NtQ", "a storage is not described"),
    "a storage of no type": (
        b"(" + text("storage") + named("torch", "Size") + text("0") + b"NK\1tQ",
        "a storage of type torch.Size",
    ),
    "a tensor of no type": (
        named("torch._utils", "_rebuild_tensor_v3")
        + b"("
        + (STORAGE + b"K\1tQK\0K\1\x85K\1\x85\x89" + EMPTY + b"NtR"),
        "a tensor without a type",
    ),
    "a parameter of nothing": (
        named("torch._utils", "_rebuild_parameter") + b"N\x89" + EMPTY + b"\x87R",
        "a parameter that is not a tensor",
    ),
    "a device of a list": (named("torch", "device") + b"]\x85R", "a device that is not one"),
    "no end": (b"}", "pickle exhausted before seeing STOP"),
}


@pytest.mark.parametrize("name", NO_STATE)
def test_a_pickle_that_no_state_dict_has_is_refused_and_named(tmp_path: Path, name: str) -> None:
    content, words = NO_STATE[name]
    end = b"" if name == "no end" else b"."
    path = tmp_path / "model.pt"
    path.write_bytes(checkpoint(b"\x80\x02" + content + end))
    with pytest.raises(ModelFileError, match="its pickle is not one of a state dict") as info:
        checkpoints.read_model(path)
    assert words in info.value.notes["why"]


def test_a_device_that_would_be_endless_in_words_is_not_put_into_words(tmp_path: Path) -> None:
    doubled = b"]q\0" + b"".join(
        b"](h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
        for level in range(99)
    )
    path = tmp_path / "model.pt"
    path.write_bytes(
        checkpoint(b"\x80\x02(" + doubled + b"t" + named("torch", "device") + b"hc\x85R.")
    )
    with pytest.raises(ModelFileError, match="its pickle is not one of a state dict"):
        checkpoints.read_model(path)


def test_the_pickles_in_front_of_an_old_checkpoint_name_nothing_either(tmp_path: Path) -> None:
    from kdsurgeon.checkpoints.conversion import _convert

    content = saved({"w": torch.ones(1)}, _use_new_zipfile_serialization=False)
    call = b"\x80\x02" + opcodes("os", "system", ("true",))[0] + b"."
    raw = content[: len(LEGACY_START)] + call + content[len(LEGACY_START) :]
    with pytest.raises(ModelFileError) as info:
        _convert(raw, "model.pt", tmp_path / "draft.safetensors", True)
    assert info.value.notes["why"] == "it names os.system"


def test_objects_of_old_python_are_left_out(tmp_path: Path) -> None:
    from kdsurgeon.checkpoints.conversion import _convert

    old = b"(" + named("models", "OldStyle") + b"o}U\1xK\1sb"  # with a string of bytes as a name
    raw = checkpoint(tensor_pickle(16, "4", "1")[:-2] + b"s" + text("old") + old + b"s.")
    draft = tmp_path / "draft.safetensors"
    assert _convert(raw, "model.pt", draft, True)["dropped"] == ["entry 'old'", "models.OldStyle"]
    assert set(checkpoints.read_tensors(draft)) == {"weight"}


@pytest.mark.parametrize("opcode", [b"\x82\x01", b"}2a", b"P0\n"])
def test_convert_knows_no_opcode_that_torch_does_not_write(tmp_path: Path, opcode: bytes) -> None:
    from kdsurgeon.checkpoints.conversion import _convert

    with pytest.raises(ModelFileError) as info:
        _convert(checkpoint(b"\x80\x02" + opcode + b"."), "m.pt", tmp_path / "draft", True)
    assert info.value.notes["why"].startswith("opcode ")


def test_a_trusted_file_that_needs_an_absent_module_says_which(tmp_path: Path) -> None:
    raw = checkpoint(b"\x80\x02" + named("absent_module_xyz", "Net") + b")R.")
    path = tmp_path / "model.pt"
    path.write_bytes(raw)
    with pytest.raises(ModelFileError, match='needs the module "absent_module_xyz"') as info:
        checkpoints.read_model(path, trust=[hashlib.sha256(raw).hexdigest()])
    assert info.value.notes["fix"].startswith("run from the folder that holds it")


def test_archives_of_arrays_with_pickles_are_refused(tmp_path: Path, watch: Watch) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, images=np.zeros((2, 2), np.uint8))
    checkpoints.read_arrays(path)
    with path.open("wb") as file:
        np.savez(file, images=np.array([{"a": 1}, open], dtype=object))
    with watch, pytest.raises(DataError, match="holds Python objects, not numbers"):
        checkpoints.read_arrays(path)
    assert watch.events == []


# --- our own files -----------------------------------------------------------------------------


def mutants(raw: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Copies of ``raw`` with a flipped bit, cut off, zeroed in part, or spliced from themselves."""
    spread = random.Random(seed)
    for index in range(count):
        place = spread.randrange(len(raw))
        width = spread.choice((1, 4, 16, 64, 256))
        if index % 4 == 0:
            flipped = raw[place] ^ (1 << spread.randrange(8))
            yield raw[:place] + bytes([flipped]) + raw[place + 1 :]
        elif index % 4 == 1:
            yield raw[:place]
        elif index % 4 == 2:
            yield raw[:place] + bytes(width) + raw[place + width :]
        else:
            other = spread.randrange(len(raw))
            yield raw[:place] + raw[other : other + width] + raw[place + width :]


def test_2000_mutants_of_our_own_files_never_load_wrong(tmp_path: Path) -> None:
    model = tiny()
    card = checkpoints.ModelCard(arch="demo/tiny", input_size=(1, 8, 8), num_classes=4)
    checkpoints.save_model(model, tmp_path / "good.safetensors", card)
    raw = (tmp_path / "good.safetensors").read_bytes()
    path = tmp_path / "mutant.safetensors"
    refused, unchanged, wrong = 0, 0, []
    for mutant in mutants(raw, 2000, SEED + 2):
        path.write_bytes(mutant)
        outcome = verdict(lambda: checkpoints.read_model(path))
        if mutant == raw:
            unchanged += 1
            assert outcome == "loaded"
        elif outcome == "ModelFileError":
            refused += 1
        else:
            wrong.append((outcome, len(mutant)))
    assert wrong == []
    assert refused + unchanged == 2000
    assert refused > 1900


def test_without_the_seal_the_mutants_would_load_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control: the count of 0 above is the seal's doing."""
    path = tmp_path / "good.safetensors"
    checkpoints.save_model(tiny(), path, checkpoints.ModelCard(arch="demo/tiny"))
    raw = path.read_bytes()
    monkeypatch.setattr(store, "_verify_seal", lambda *_: None)
    loaded = 0
    for mutant in mutants(raw, 400, SEED + 3):
        path.write_bytes(mutant)
        loaded += mutant != raw and verdict(lambda: checkpoints.read_model(path)) == "loaded"
    assert loaded > 40


def test_every_bit_of_the_header_is_under_the_seal(tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    checkpoints.write_tensors({"a": torch.arange(3), "b": torch.ones(2)}, path, {"step": "7"})
    raw = path.read_bytes()
    for place in range(len(raw)):
        for bit in range(8):
            path.write_bytes(raw[:place] + bytes([raw[place] ^ (1 << bit)]) + raw[place + 1 :])
            assert verdict(lambda: checkpoints.read_tensors(path)) == "ModelFileError", place


# --- bombs -------------------------------------------------------------------------------------


def bombs() -> list[bytes]:
    """50 small files that would take much memory or time if they were believed."""
    zeros = [("a/data.pkl", b"\x80\x02}."), ("a/data/0", bytes(1 << 24))]
    laughs = b"\x80\x02]q\x00" + b"".join(
        b"](" + b"h" + bytes([level]) * 1 + (b"h" + bytes([level])) * 9 + b"eq" + bytes([level + 1])
        for level in range(20)
    )
    hashes = b"\x80\x02K\x01q\x00" + b"".join(
        b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
        for level in range(200)
    )
    made = [
        archive(zeros, zipfile.ZIP_DEFLATED),
        archive(zeros, zipfile.ZIP_LZMA),
        checkpoint(laughs + b"."),
        checkpoint(b"\x80\x02}" + hashes[2:] + b"K\x01s."),
        checkpoint(b"\x80\x02}r\xff\xff\xff\xff."),
        checkpoint(b"\x80\x02" + b"N" * 3_000_000 + b"."),
        checkpoint(b"\x80\x02" + b"(" * 3_000_000 + b"."),
        checkpoint(b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b"."),
        checkpoint(b"\x80\x02](" + b"N" * 300_000 + b"eq\0" + b"(h\0e" * 90_000 + b"."),
        checkpoint(b"\x80\x02](" + b"]" * 300_000 + b"e."),
        checkpoint(b"\x80\x02\x8b\xff\xff\xff\x7f."),
        checkpoint(b"\x80\x02\x8d" + b"\xff" * 7 + b"\x7f."),
        checkpoint(b"\x80\x02X\xff\xff\xff\x7f."),
        checkpoint(b"\x80\x02cbuiltins\nbytearray\n" + long(1 << 40) + b"\x85R."),
        checkpoint(b"\x80\x02ctorch\nempty\n" + long(1 << 40) + b"\x85R."),
        checkpoint(b"\x80\x02ctorch\nSize\n(" + b"K\x01" * 150_000 + b"t\x85R."),
        checkpoint(b"\x80\x02" + b"ccollections\nOrderedDict\n)R" * 120_000 + b"."),
        checkpoint(repeated_calls()),
        b"\x80\x02" + b"]" * 2_000_000 + b".",
        b"\x80\x04\x95" + b"\xff" * 8 + b".",
        safetensors(b'{"a":' * 400_000),
        safetensors(b"[" * 2_000_000),
        safetensors(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"),
        safetensors({"a": {"dtype": "F32", "shape": [0] * 500_000, "data_offsets": [0, 0]}}),
        safetensors({f"{n}": entry([0], 0, 0) for n in range(100_001)}),
        safetensors({"__metadata__": {str(n): "" for n in range(200_000)}}),
        safetensors({"a": entry([1 << 40], 0, 1 << 42)}),
        safetensors(b"{}", length=(1 << 63) - 1),
        safetensors(b"{" + b" " * (17 << 20) + b"}"),
        many_records(150_000),
        overlapping(),
    ]
    sizes = [(1 << power, f"{1 << power}", "1") for power in range(24, 40, 2)]
    sizes += [(16, f"{1 << power}", "0") for power in range(24, 40, 2)]
    made += [checkpoint(tensor_pickle(*size)) for size in sizes]
    made += [checkpoint(tensor_pickle(16, "1 " * count, "1 " * count)) for count in (65, 900, 9000)]
    return made


def repeated_calls() -> bytes:
    """A long list, given over and over to a constructor that would walk it each time."""
    pairs = b"](" + b"N" * 100_000 + b"eq\x00"
    return (
        b"\x80\x02" + pairs + b"ccollections\nCounter\nq\x01" + b"h\x01h\x00\x85R" * 60_000 + b"."
    )


def many_records(count: int) -> bytes:
    return archive([("a/data.pkl", b"\x80\x02}."), *((f"a/{n}", b"") for n in range(count))])


def overlapping() -> bytes:
    """One body that many directory entries share."""
    raw = archive([("a/data.pkl", b"\x80\x02}."), ("a/data/0", bytes(1 << 20))])
    start = raw.index(b"PK\1\2")
    end = raw.index(b"PK\5\6")
    first, second = raw[start:].split(b"PK\1\2")[1:3]
    second = second[: end - start - len(first) - 8]
    entries = b"PK\1\2" + first
    for number in range(200):
        label = f"a/data/{number % 10}".encode()
        entries += b"PK\1\2" + second[:42] + label + second[42 + 8 :]
    tail = bytearray(raw[end:])
    tail[8:10] = tail[10:12] = (201).to_bytes(2, "little")
    tail[12:16] = len(entries).to_bytes(4, "little")
    return raw[:start] + entries + bytes(tail)


BOMB_CHILD = """
import json, resource, sys, time
from pathlib import Path
sys.path[:] = json.loads(sys.argv[1])
import torch
torch.set_num_threads(1)
import kdsurgeon.checkpoints as checkpoints
from kdsurgeon.errors import ModelFileError
folder = Path(sys.argv[2])
checkpoints.read_model(folder / "good.pt")
# VmHWM and not ru_maxrss, which a child inherits from its parent
status = lambda: Path('/proc/self/status').read_text()
peak = lambda: int(status().split('VmHWM:')[1].split()[0]) * 1024
pages = int(Path('/proc/self/statm').read_text().split()[1])
before, report = pages * resource.getpagesize(), []
for path in sorted(folder.glob("bomb-*"), key=lambda path: path.stat().st_size):
    start = time.perf_counter()
    try:
        checkpoints.read_model(path)
        outcome = "loaded"
    except ModelFileError as error:
        outcome = "refused"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"[:200]
    spent = time.perf_counter() - start
    report.append([path.name, outcome, path.stat().st_size, peak() - before, spent])
print(json.dumps(report))
"""


def test_50_bombs_stay_within_twice_their_size_and_300_megabytes(tmp_path: Path) -> None:
    made = bombs()
    (tmp_path / "good.pt").write_bytes(STATE)
    for number, content in enumerate(made):
        (tmp_path / f"bomb-{number:02d}.pt").write_bytes(content)
    command = [sys.executable, "-c", BOMB_CHILD, json.dumps(sys.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    report = json.loads(done.stdout)
    assert len(report) == len(made) == 50
    assert [line for line in report if line[1] != "refused"] == []
    assert [line for line in report if line[3] > 2 * line[2] + 300e6] == []


def test_an_array_archive_that_would_unpack_too_far_is_refused_before_it_is_unpacked(
    tmp_path: Path,
) -> None:
    path = tmp_path / "zeros.npz"
    np.savez_compressed(path, images=np.zeros((64, 1 << 20), np.uint8))
    with pytest.raises(
        ResourceError, match=r"would unpack from [\d,]+ to 67,1[\d,]+ bytes"
    ) as info:
        checkpoints.read_arrays(path, max_bytes=1 << 20)
    assert info.value.exit_code == 6


def test_a_file_that_lies_about_its_unpacked_size_yields_no_more_than_it_says(
    tmp_path: Path,
) -> None:
    path = tmp_path / "liar.npz"
    np.savez_compressed(path, images=np.zeros(1 << 20, np.uint8))
    raw = bytearray(path.read_bytes())
    for place in range(len(raw)):
        if raw[place : place + 4] == b"PK\1\2":
            raw[place + 24 : place + 28] = (1000).to_bytes(4, "little")
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="is damaged"):
        checkpoints.read_arrays(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    path = tmp_path / "pipe.pt"
    os.mkfifo(path)
    with pytest.raises(ModelFileError, match="is not a regular file"):
        checkpoints.read_model(path)
    with pytest.raises(ModelFileError, match="is not a file name"):
        read_once(Path("a\0b.pt"))
