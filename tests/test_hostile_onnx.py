"""ONNX files made to harm, and damaged ones: refused with exit code 3 in one line, while nothing
outside of their folder is read or written.

Every file is made here. Native reads, which Python's audit hook does not see, and those of child
processes are counted by the kernel (inotify), by inode, so a second name of a file hides nothing.
"""

from __future__ import annotations

import ctypes
import doctest
import errno
import gzip
import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from kdsurgeon.cli import main
from kdsurgeon.errors import ModelFileError, ResourceError, SurgeonError
from kdsurgeon.exporting import (
    accuracy,
    beside,
    gate,
    latency,
    parity,
    quantize,
    read_metadata,
    runtime,
    trial,
    wire,
)
from kdsurgeon.exporting.gate import read_onnx, session
from kdsurgeon.exporting.wire import Malformed, check_wire

SEED = 4096
WEIGHT = np.random.default_rng(SEED).standard_normal((16, 3)).astype(np.float32)
SIZE = ["--input-size", "1,4,4"]

# --- models ---------------------------------------------------------------------------------------


def model(
    nodes: Sequence[NodeProto] = (),
    tensors: Sequence[TensorProto] = (),
    shape: Sequence = ("b", 1, 4, 4),
) -> ModelProto:
    """Images of 1×4×4 to three logits; ``nodes`` may make of ``features`` the ``scores``."""
    weight = numpy_helper.from_array(WEIGHT, "weight")
    last = "scores" if nodes else "logits"
    body = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["features" if nodes else "logits"]),
        *nodes,
    ]
    if nodes:
        body.append(helper.make_node("Add", ["features", last], ["logits"]))
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)
    result = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("b", 3))
    graph = helper.make_graph(body, "g", [given], [result], [weight, *tensors])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def changed(change: Callable[[ModelProto], object], **options: object) -> bytes:
    """The bytes of the model after one change."""
    made = model(**options)  # type: ignore[arg-type]
    change(made)
    return made.SerializeToString()


def with_nodes(*nodes: NodeProto, tensors: Sequence[TensorProto] = ()) -> bytes:
    return model(nodes, tensors).SerializeToString()


def number(name: str, *values: float, kind: type = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.array(values, kind), name)


def scalar(name: str, value: float, kind: type = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.array(value, kind), name)


def outside(location: str | None = "weights.bin", **more: str) -> bytes:
    """The model with its weight in another file."""
    made = model()
    describe(made.graph.initializer[0], location, **more)
    return made.SerializeToString()


def describe(tensor: TensorProto, location: str | None, **more: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {**({} if location is None else {"location": location}), **more}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


GOOD = model().SerializeToString()


# --- watching -------------------------------------------------------------------------------------

_OPEN, _ACCESS, _MODIFY, _CREATE, _DELETE, _MOVE = 0x20, 0x1, 0x2, 0x100, 0x200, 0xC0
_LIBC = ctypes.CDLL(None, use_errno=True)


class Kernel:
    """What any process does with some files and folders, whichever name it uses for them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.descriptor = _LIBC.inotify_init1(os.O_NONBLOCK)
        assert self.descriptor >= 0
        for path in paths:
            mask = _OPEN | _ACCESS | _MODIFY | _CREATE | _DELETE | _MOVE
            assert _LIBC.inotify_add_watch(self.descriptor, os.fsencode(path), mask) >= 0

    def seen(self) -> int:
        """How many events there were since it was last asked."""
        count = 0
        while True:
            try:
                raw = os.read(self.descriptor, 1 << 16)
            except BlockingIOError:
                return count
            while raw:
                raw = raw[16 + struct.unpack_from("iIII", raw)[3] :]
                count += 1


class Python:
    """Audit events while active: files opened by Python outside of ``root``, code run, sockets."""

    FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "socket.", "urllib.")
    FORBIDDEN += ("pickle.find_class", "ctypes.dlopen", "shutil.", "os.link", "os.symlink")
    FORBIDDEN += ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "tempfile.")

    def __init__(self) -> None:
        self.root: Path | None = None
        self.events: list[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        if self.root is None:
            return
        if event == "subprocess.Popen":
            allowed = [sys.executable, "-P", runtime.__file__]
            bad = list(arguments[1]) != allowed
        elif event == "open":
            bad = not self.is_harmless(*arguments)
        else:
            bad = event.startswith(self.FORBIDDEN)
        if bad:
            self.events.append(f"{event} {arguments!r}"[:300])

    def is_harmless(self, path: object, mode: object, flags: object) -> bool:
        """A file of the model's folder or of Python, opened for reading; or a descriptor."""
        if isinstance(path, int):
            return True
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        place = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        if place == os.devnull:
            return True
        return not writes and (
            place.startswith(str(self.root)) or place.endswith((".py", ".pyc", ".so", ".json"))
        )


@pytest.fixture(scope="module")
def python() -> Python:
    return Python()


class Place:
    """A folder for the hostile file, and secrets around it that nobody may touch."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "model"
        self.secret = root / "outside" / "secret"
        self.home = root / "home"
        for folder in (self.folder, self.secret.parent, self.home):
            folder.mkdir()
        self.secret.write_bytes(WEIGHT.tobytes())
        (self.home / "secret").write_bytes(WEIGHT.tobytes())
        (self.home / "weights.bin").write_bytes(WEIGHT.tobytes())
        self.file = self.folder / "x.onnx"
        self.kernel = Kernel([self.secret.parent, self.secret, self.home, *self.home.iterdir()])

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    def names(self) -> list[tuple[str, int]]:
        return sorted((path.name, path.lstat().st_size) for path in self.folder.iterdir())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place(tmp_path_factory.mktemp("hostile"))
    made.file.write_bytes(GOOD)
    assert main(["benchmark", str(made.file), *SIZE]) == 0  # what Python imports, it imports here
    made.clear()
    return made


@pytest.fixture
def refused(
    place: Place,
    python: Python,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., str]]:
    """Call it on the file as it lies there: the line that ``benchmark`` refused it with."""
    monkeypatch.chdir(place.home)

    def run(*more: str) -> str:
        before = place.names()
        place.kernel.seen()
        python.events.clear()
        python.root = place.folder
        try:
            code = main(["benchmark", str(place.file), *(more or SIZE)])
        finally:
            python.root = None
        assert place.kernel.seen() == 0
        assert python.events == []
        assert place.names() == before
        said = capfd.readouterr()
        assert code == 3, said
        assert said.out == ""
        assert said.err.count("error: ") == 1 and said.err.startswith("error: ")
        assert "Traceback" not in said.err
        return said.err.splitlines()[0]

    yield run
    place.clear()


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file must be refused before anything of it reaches the runtime."""

    def never(*_: object) -> None:
        raise AssertionError("it was tried out")

    monkeypatch.setattr(gate, "try_out", never)
    monkeypatch.setattr(runtime, "open_session", never)


# --- links and names that lead outside ------------------------------------------------------------


def escapes(secret: Path) -> dict[str, str]:
    """Where a model may say that its weights lie: names that lead, or might lead, elsewhere."""
    return {
        "parent": "../outside/secret",
        "parent, dotted": "./../outside/secret",
        "down and up": "down/../../outside/secret",
        "absolute": str(secret),
        "absolute, doubled": f"/{secret}",
        "system file": "/etc/hostname",
        "memory": "/proc/self/mem",
        "environment": "/proc/self/environ",
        "endless": "/dev/zero",
        "through a linked folder": "door/secret",
        "a folder below": "down/weights.bin",
        "dotted": "./weights.bin",
        "doubled": ".//weights.bin",
        "cut by NUL": "hard\0.bin",
        "cut by NUL, parent": "../outside/secret\0weights.bin",
        "only NUL": "\0",
        "backslashes": "..\\outside\\secret",
        "drive": "C:secret",
        "share": "\\\\localhost\\share\\secret",
        "stream": "weights.bin:hidden",
        "address": "file:///etc/hostname",
        "web address": "http://localhost:9/secret",
        "nothing": "",
        "here": ".",
        "above": "..",
        "itself": "x.onnx",
        "memory of the runtime": "*/_ORT_MEM_ADDR_/*",
        "memory of the runtime, little endian": "*/_ORT_LITTLE_ENDIAN_MEM_ADDR_/*",
        "line break": "weights.bin\n",
        "escape": "\x1b[2Jweights.bin",
        "too long": "w" * 300,
        "wild": "weights.*",
        "slash of another script": "..\u2215outside\u2215secret",
        "not there": "nowhere.bin",
        "in the folder of the caller": "secret",
    }


@pytest.mark.parametrize("name", list(escapes(Path("/outside/secret"))))
@pytest.mark.usefixtures("untried")
def test_weights_elsewhere_are_not_read(
    name: str, place: Place, refused: Callable[..., str]
) -> None:
    location = escapes(place.secret)[name]
    (place.folder / "weights.bin").write_bytes(WEIGHT.tobytes())
    os.link(place.secret, place.folder / "hard")
    (place.folder / "door").symlink_to(place.secret.parent)
    offset = {"offset": str(WEIGHT.ctypes.data), "length": "192"} if "ORT" in location else {}
    place.file.write_bytes(outside(location, **offset))
    line = refused()
    assert (
        "takes weights from outside of itself" in line
        or "cannot be read" in line
        or "NUL" in line
        or "is not an ONNX file" in line
    )


LINKS: dict[str, Callable[[Path, Path], object]] = {
    "symbolic": lambda at, secret: at.symlink_to(secret),
    "symbolic, relative": lambda at, secret: at.symlink_to("../outside/secret"),
    "symbolic, twice": lambda at, secret: (
        at.with_name("other").symlink_to(secret),
        at.symlink_to("other"),
    ),
    "symbolic, dangling": lambda at, _: at.symlink_to("nowhere"),
    "symbolic, to itself": lambda at, _: at.symlink_to(at.name),
    "symbolic, to a device": lambda at, _: at.symlink_to("/dev/zero"),
    "symbolic, into the folder": lambda at, _: (
        at.with_name("real").write_bytes(WEIGHT.tobytes()),
        at.symlink_to("real"),
    ),
    "hard": lambda at, secret: os.link(secret, at),
    "hard, within the folder": lambda at, _: (
        at.with_name("real").write_bytes(WEIGHT.tobytes()),
        os.link(at.with_name("real"), at),
    ),
    "pipe": lambda at, _: os.mkfifo(at),
    "folder": lambda at, _: at.mkdir(),
}


@pytest.mark.parametrize("name", list(LINKS))
@pytest.mark.usefixtures("untried")
def test_links_pipes_and_folders_in_place_of_weights_are_not_read(
    name: str, place: Place, refused: Callable[..., str]
) -> None:
    LINKS[name](place.folder / "weights.bin", place.secret)
    place.file.write_bytes(outside("weights.bin"))
    line = refused()
    wanted = "not a regular file|is a folder" if name in ("pipe", "folder") else "outside of itself"
    assert re.search(wanted, line)


def test_a_socket_in_place_of_weights_is_not_read(
    place: Place, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("weights.bin")
        monkeypatch.chdir(place.home)
        place.file.write_bytes(outside("weights.bin"))
        with pytest.raises(ResourceError, match="cannot be read"):
            read_onnx(place.file)
    place.clear()


@pytest.mark.parametrize("which", ["lstat", "open"])
def test_weights_that_become_a_link_meanwhile_are_not_read(
    which: str, place: Place, python: Python, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = place.folder / "weights.bin"
    weights.write_bytes(WEIGHT.tobytes())
    place.file.write_bytes(outside("weights.bin"))
    real = getattr(os, which)

    def swaps(path: object, *more: object, **options: object) -> object:
        if path == weights:
            weights.unlink()
            weights.symlink_to(place.secret)
        return real(path, *more, **options)

    monkeypatch.setattr(os, which, swaps)
    place.kernel.seen()
    with pytest.raises(ModelFileError, match=r"(?s)outside of itself.*it is a link"):
        read_onnx(place.file)
    assert place.kernel.seen() == 0
    monkeypatch.undo()
    place.clear()


def test_files_swapped_after_the_check_change_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = place.folder / "weights.bin"
    weights.write_bytes(WEIGHT.tobytes())
    place.file.write_bytes(outside("weights.bin"))
    real = gate.try_out

    def swaps(*arguments: object) -> None:
        weights.unlink()
        weights.symlink_to(place.secret)
        place.file.write_bytes(outside("../outside/secret"))
        place.kernel.seen()
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gate, "_known", set())
    monkeypatch.setattr(gate, "try_out", swaps)
    run = session(place.file, threads=1)
    images = np.random.default_rng(1).standard_normal((2, 1, 4, 4)).astype(np.float32)
    (found,) = run.run(None, {"input": images})
    assert place.kernel.seen() == 0
    assert np.allclose(np.asarray(found), images.reshape(2, 16) @ WEIGHT, atol=1e-5)
    place.clear()


def test_the_watch_sees_what_the_runtime_reads_by_itself(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control: without the gate a hard link and a NUL are followed, and the watch notices."""
    os.link(place.secret, place.folder / "hard")
    for location in ("hard", "hard\0.bin", "../outside/secret"):
        place.file.write_bytes(outside(location))
        place.kernel.seen()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            onnxruntime.InferenceSession(place.file, options, providers=["CPUExecutionProvider"])
            loaded = True
        except Exception:
            loaded = False
        assert bool(place.kernel.seen()) == loaded
    (place.folder / "hard").read_bytes()
    assert place.kernel.seen() > 0
    place.clear()


def test_weights_beside_the_model_are_read_and_give_the_same_logits(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.folder / "weights.bin").write_bytes(bytes(7) + WEIGHT.tobytes() + bytes(5))
    place.file.write_bytes(outside("weights.bin", offset="7", length=str(WEIGHT.nbytes)))
    images = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = images.flatten(1) @ torch.from_numpy(WEIGHT)
    run = session(place.file, threads=1)
    (found,) = run.run(None, {"input": images.numpy()})
    assert np.abs(found - expected.numpy()).max() < 1e-5
    file = read_onnx(place.file)
    assert file.size == len(file.content) + WEIGHT.nbytes
    whole = file.whole()
    assert np.array_equal(numpy_helper.to_array(whole.graph.initializer[0]), WEIGHT)
    assert not whole.graph.initializer[0].external_data
    monkeypatch.setattr(gate, "MAX_FILE", file.size - 1)
    with pytest.raises(ResourceError, match="with its weights is too large for one piece"):
        file.whole()
    place.clear()


@pytest.mark.parametrize("name", ["x.onnx", "weights.bin"])
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (OSError(errno.EIO, "Input/output error"), "cannot be read"),
        (MemoryError(), "does not fit into memory"),
    ],
    ids=["disk", "memory"],
)
def test_a_fault_of_the_machine_is_not_taken_for_damage(
    name: str, fault: Exception, told: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.folder / "weights.bin").write_bytes(WEIGHT.tobytes())
    place.file.write_bytes(outside("weights.bin"))
    real = beside.opened

    class Failing(io.FileIO):
        def read(self, *_: object) -> bytes:
            raise fault

    def opens(path: Path, *more: object, **options: object) -> object:
        with real(path, *more, **options) as file:  # type: ignore[arg-type]
            return (Failing if path.name == name else io.FileIO)(os.dup(file.fileno()))

    monkeypatch.setattr(gate, "opened", opens)
    monkeypatch.setattr(beside, "opened", opens)
    with pytest.raises(ResourceError, match=f"{name} {told}") as caught:
        read_onnx(place.file)
    assert caught.value.exit_code == 6
    place.clear()


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(ModelFileError, match=r"'x\\x00\.onnx' is not a file name"):
        read_onnx("x\0.onnx")


# --- descriptions of outside weights that do not hold ---------------------------------------------


def copies(tensor: TensorProto, count: int) -> list[TensorProto]:
    made = []
    for index in range(count):
        made.append(TensorProto())
        made[-1].CopyFrom(tensor)
        made[-1].name = f"copy {index}"
    return made


PLACES: dict[str, bytes] = {
    "no location": outside(None, offset="0"),
    "a base path": outside("weights.bin", basepath="/etc"),
    "an unknown key": outside("weights.bin", command="true"),
    "offset negative": outside("weights.bin", offset="-64"),
    "offset in hex": outside("weights.bin", offset="0x10"),
    "offset with a blank": outside("weights.bin", offset=" 0"),
    "offset signed": outside("weights.bin", offset="+0"),
    "offset in other digits": outside("weights.bin", offset="\u0661"),
    "offset of 30 digits": outside("weights.bin", offset="9" * 30),
    "offset of 19 digits": outside("weights.bin", offset="9" * 19),
    "offset beyond the end": outside("weights.bin", offset="1000"),
    "offset too near to the end": outside("weights.bin", offset="8"),
    "length negative": outside("weights.bin", length="-1"),
    "length zero": outside("weights.bin", length="0"),
    "length too short": outside("weights.bin", length="191"),
    "length too long": outside("weights.bin", length=str(1 << 62)),
    "length no number": outside("weights.bin", length="all"),
    "two locations": changed(
        lambda m: (
            describe(m.graph.initializer[0], "weights.bin"),
            m.graph.initializer[0].external_data.add(key="location", value="../outside/secret"),
        )
    ),
    "bytes here and there": changed(
        lambda m: (
            describe(m.graph.initializer[0], "weights.bin"),
            setattr(m.graph.initializer[0], "raw_data", WEIGHT.tobytes()),
        )
    ),
    "said to be here": changed(
        lambda m: m.graph.initializer[0].external_data.add(key="location", value="weights.bin")
    ),
    "text": changed(
        lambda m: (
            describe(m.graph.initializer[0], "weights.bin"),
            setattr(m.graph.initializer[0], "data_type", TensorProto.STRING),
        )
    ),
    "bfloat16": changed(
        lambda m: (
            describe(m.graph.initializer[0], "weights.bin"),
            setattr(m.graph.initializer[0], "data_type", TensorProto.BFLOAT16),
        )
    ),
    "far more than there is": changed(
        lambda m: (
            describe(m.graph.initializer[0], "weights.bin"),
            m.graph.initializer[0].dims.extend([1 << 20, 1 << 10]),
        )
    ),
    "the same bytes a hundred times": changed(
        lambda m: (
            describe(m.graph.initializer[0], "weights.bin"),
            m.graph.initializer.extend(copies(m.graph.initializer[0], 100)),
        )
    ),
}


def outside_tensor(name: str = "w") -> TensorProto:
    tensor = numpy_helper.from_array(np.ones(3, np.float32), name)
    describe(tensor, "weights.bin")
    return tensor


def nested(tensors: Sequence[TensorProto], depth: int = 1) -> NodeProto:
    """An If whose branches hold ``tensors``."""
    branch = helper.make_graph(
        [helper.make_node("Identity", [tensors[0].name], ["out"])],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [3])],
        tensors,
    )
    for level in range(depth):
        node = helper.make_node(
            "If", ["yes"], [f"out{level}"], then_branch=branch, else_branch=branch
        )
        result = helper.make_tensor_value_info(f"out{level}", TensorProto.FLOAT, [3])
        branch = helper.make_graph([node], f"level{level}", [], [result])
    (node,) = branch.node if depth else [helper.make_node("Identity", ["x"], ["y"])]
    node.output[0] = "scores"
    return node


PLACES |= {
    "in an attribute": with_nodes(
        helper.make_node("Constant", [], ["scores"], value=outside_tensor())
    ),
    "in a branch": with_nodes(nested([outside_tensor()]), tensors=[scalar("yes", 1, np.bool_)]),
    "in a sparse tensor": changed(
        lambda m: m.graph.sparse_initializer.add().values.CopyFrom(outside_tensor())
    ),
    "in a sparse attribute": with_nodes(
        helper.make_node(
            "Constant",
            [],
            ["scores"],
            sparse_value=onnx.SparseTensorProto(values=outside_tensor(), dims=[3]),
        )
    ),
}


@pytest.mark.parametrize("name", list(PLACES))
@pytest.mark.usefixtures("untried")
def test_weights_whose_place_does_not_hold_are_refused(
    name: str, place: Place, refused: Callable[..., str]
) -> None:
    (place.folder / "weights.bin").write_bytes(WEIGHT.tobytes())
    place.file.write_bytes(PLACES[name])
    refused()


# --- code, files and options that a model may ask for ---------------------------------------------


def function(name: str, *calls: str) -> onnx.FunctionProto:
    nodes = [helper.make_node(call, ["x"], ["y"], domain="own") for call in calls]
    return helper.make_function("own", name, ["x"], ["y"], nodes, [helper.make_opsetid("", 18)])


def calls_own(m: ModelProto) -> None:
    m.opset_import.append(helper.make_opsetid("own", 1))
    m.graph.node.append(helper.make_node("f0", ["logits"], ["more"], domain="own"))


def polyglot() -> bytes:
    """An ONNX model that ONNX Runtime would take for its own format by four bytes."""
    made = changed(lambda m: (m.ClearField("producer_name"), setattr(m, "producer_name", "ORTM")))
    assert made[4:8] == b"ORTM"
    return made


CODE: dict[str, bytes] = {
    "an operator of a library": with_nodes(
        helper.make_node("Own", ["features"], ["scores"], domain="com.example")
    ),
    "an operator that reads a file": with_nodes(
        helper.make_node(
            "EPContext",
            ["features"],
            ["scores"],
            domain="com.microsoft",
            embed_mode=0,
            ep_cache_context="../outside/secret",
            main_context=1,
        )
    ),
    "an operator that runs Python": with_nodes(
        helper.make_node("PythonOp", ["features"], ["scores"], domain="com.microsoft")
    ),
    "an operator of training": with_nodes(
        helper.make_node("Adam", ["features"], ["scores"], domain="ai.onnx.preview.training")
    ),
    "an operator inside the runtime": with_nodes(
        helper.make_node("Conv", ["features"], ["scores"], domain="com.ms.internal.nhwc")
    ),
    "an operator of PyTorch": with_nodes(
        helper.make_node("ATen", ["features"], ["scores"], domain="org.pytorch.aten", operator="x")
    ),
    "an operator in a branch": with_nodes(
        helper.make_node(
            "If",
            ["yes"],
            ["scores"],
            then_branch=(
                branch := helper.make_graph(
                    [helper.make_node("Own", [], ["out"], domain="com.example")],
                    "branch",
                    [],
                    [helper.make_tensor_value_info("out", TensorProto.FLOAT, [3])],
                )
            ),
            else_branch=branch,
        ),
        tensors=[scalar("yes", 1, np.bool_)],
    ),
    "a function": changed(lambda m: (m.functions.append(function("f0")), calls_own(m))),
    "a function of itself": changed(
        lambda m: (m.functions.append(function("f0", "f0")), calls_own(m))
    ),
    "functions that double": changed(
        lambda m: (
            m.functions.extend(function(f"f{k}", f"f{k + 1}", f"f{k + 1}") for k in range(40)),
            calls_own(m),
        )
    ),
    "training": changed(lambda m: m.training_info.add().algorithm.CopyFrom(m.graph)),
    "options of the runtime": changed(
        lambda m: m.metadata_props.add(
            key="ort_config", value='{"session_options": {"enable_profiling": 1}}'
        )
    ),
    "the runtime's own format": b"\x20\0\0\0ORTM" + bytes(64),
}


@pytest.mark.parametrize("name", list(CODE))
@pytest.mark.usefixtures("untried")
def test_code_and_options_of_a_file_are_refused(
    name: str, place: Place, refused: Callable[..., str]
) -> None:
    place.file.write_bytes(CODE[name])
    refused()


def test_a_model_that_looks_like_the_runtimes_own_format_is_read_as_what_was_checked(
    place: Place,
) -> None:
    place.file.write_bytes(polyglot())
    assert [value.name for value in session(place.file, threads=1).get_inputs()] == ["input"]
    place.clear()


# --- sizes ----------------------------------------------------------------------------------------

HUGE = 1 << 40


def summed(node: NodeProto, *tensors: TensorProto) -> bytes:
    """The model with one more node, whose output ``big`` is summed into the logits."""
    sums = helper.make_node("ReduceSum", ["big"], ["scores"], keepdims=0)
    return with_nodes(node, sums, tensors=tensors)


def node(kind: str, *inputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, list(inputs), ["big"], **attributes)


SIZES: dict[str, bytes] = {
    "ConstantOfShape": summed(node("ConstantOfShape", "s"), number("s", HUGE)),
    "ConstantOfShape of many axes": summed(node("ConstantOfShape", "s"), number("s", *[8] * 20)),
    "Expand": summed(node("Expand", "features", "s"), number("s", HUGE, 1, 1)),
    "Tile": summed(node("Tile", "features", "s"), number("s", HUGE, 1)),
    "Range": summed(
        node("Range", "a", "b", "c"), scalar("a", 0), scalar("b", HUGE), scalar("c", 1)
    ),
    "Range of no step": summed(
        node("Range", "a", "b", "c"),
        *(scalar(n, v, np.float32) for n, v in zip("abc", (0, 9, 0), strict=True)),
    ),
    "Range of NaN": summed(
        node("Range", "a", "b", "c"),
        *(scalar(n, v, np.float32) for n, v in zip("abc", (0, float("nan"), 1), strict=True)),
    ),
    "Range of tiny steps": summed(
        node("Range", "a", "b", "c"),
        *(scalar(n, v, np.float32) for n, v in zip("abc", (0, 1, 1e-30), strict=True)),
    ),
    "Resize to sizes": summed(node("Resize", "input", "", "", "s"), number("s", 1, 1, HUGE, 4)),
    "Resize by scales": summed(
        node("Resize", "input", "", "s"), number("s", 1, 1, 1e9, 1e9, kind=np.float32)
    ),
    "Resize by NaN": summed(
        node("Resize", "input", "", "s"), number("s", 1, 1, float("nan"), 1, kind=np.float32)
    ),
    "Resize by infinity": summed(
        node("Resize", "input", "", "s"), number("s", 1, 1, float("inf"), 1, kind=np.float32)
    ),
    "Pad": summed(node("Pad", "features", "s"), number("s", 0, HUGE, 0, 0)),
    "OneHot": summed(
        node("OneHot", "i", "s", "v"),
        number("i", 1),
        scalar("s", HUGE),
        number("v", 0, 1, kind=np.float32),
    ),
    "HannWindow": summed(node("HannWindow", "s"), scalar("s", HUGE)),
    "RandomNormal": summed(node("RandomNormal", shape=[1 << 20, 1 << 20])),
    "kernel": summed(node("AveragePool", "input", kernel_shape=[1 << 30, 1])),
    "pads": summed(node("MaxPool", "input", kernel_shape=[2, 2], pads=[0, 0, 1 << 40, 0])),
    "dilations": summed(node("MaxPool", "input", kernel_shape=[2, 2], dilations=[1 << 40, 1])),
    "strides": summed(node("MaxPool", "input", kernel_shape=[2, 2], strides=[-(1 << 40), 1])),
    "output shape": summed(
        node("ConvTranspose", "input", "w", output_shape=[1 << 20, 1 << 20]),
        numpy_helper.from_array(np.ones((1, 1, 2, 2), np.float32), "w"),
    ),
    "a constant in an attribute": with_nodes(
        helper.make_node("Constant", [], ["s"], value_ints=[HUGE]),
        node("ConstantOfShape", "s"),
        helper.make_node("ReduceSum", ["big"], ["scores"], keepdims=0),
    ),
    "a whole number in an attribute": with_nodes(
        helper.make_node("Constant", [], ["s"], value_int=HUGE),
        node("HannWindow", "s"),
        helper.make_node("ReduceSum", ["big"], ["scores"], keepdims=0),
    ),
    "a tensor in an attribute": with_nodes(
        helper.make_node("Constant", [], ["s"], value=number("", HUGE)),
        node("ConstantOfShape", "s"),
        helper.make_node("ReduceSum", ["big"], ["scores"], keepdims=0),
    ),
    "a fraction in an attribute": with_nodes(
        helper.make_node("Constant", [], ["b"], value_float=1e30),
        node("Range", "a", "b", "c"),
        helper.make_node("ReduceSum", ["big"], ["scores"], keepdims=0),
        tensors=[scalar("a", 0, np.float32), scalar("c", 1, np.float32)],
    ),
    "an input said to be huge": model(shape=["b", 1, 1 << 30, 1 << 30]).SerializeToString(),
    "an input of negative size": model(shape=["b", 1, -4, 4]).SerializeToString(),
    "an input of 100 axes": model(shape=["b"] + [1] * 100).SerializeToString(),
    "zero hides the rest": changed(
        lambda m: (
            m.graph.initializer[0].ClearField("raw_data"),
            m.graph.initializer[0].dims.extend([1 << 62, 0]),
        )
    ),
}

# Sizes within the bounds, and numbers that are no sizes; what each adds to the logits.
SOUND: dict[str, tuple[bytes, float]] = {
    "Range": (
        summed(
            node("Range", "a", "b", "c"),
            *(scalar(n, v, np.float32) for n, v in zip("abc", (0, 4, 1), strict=True)),
        ),
        6,
    ),
    "a long constant": (
        with_nodes(
            helper.make_node("Constant", [], ["many"], value_floats=[2.0] * 65),
            helper.make_node("ReduceSum", ["many"], ["scores"], keepdims=0),
        ),
        130,
    ),
}

# Sizes that are computed inside: found by the trial, in a process with limits.
COMPUTED: dict[str, bytes] = {
    "squared": with_nodes(
        helper.make_node("Mul", ["s", "s"], ["t"]),
        node("ConstantOfShape", "t"),
        helper.make_node("ReduceSum", ["big"], ["scores"], keepdims=0),
        tensors=[number("s", 40_000)],  # 6.4 GB, which many a machine has
    ),
    "tiled thrice": with_nodes(
        helper.make_node("Tile", ["features", "s"], ["t"]),
        helper.make_node("Tile", ["t", "s"], ["u"]),
        node("Tile", "u", "s"),
        helper.make_node("ReduceSum", ["big"], ["scores"], keepdims=0),
        tensors=[number("s", 1, 1 << 14)],
    ),
    "every pixel with every pixel": with_nodes(
        helper.make_node("Tile", ["features", "s"], ["t"]),
        helper.make_node("Transpose", ["t"], ["u"]),
        node("MatMul", "u", "t"),
        helper.make_node("ReduceSum", ["big"], ["scores"], keepdims=0),
        tensors=[number("s", 1, 1 << 22)],
    ),
}


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("name", list(SIZES))
def test_absurd_sizes_are_refused(name: str, place: Place, refused: Callable[..., str]) -> None:
    place.file.write_bytes(SIZES[name])
    assert re.search("absurd size|said to be|is not one", refused())


@pytest.mark.parametrize("name", list(SOUND))
def test_sizes_within_the_bounds_are_computed(name: str, place: Place) -> None:
    content, more = SOUND[name]
    place.file.write_bytes(content)
    (found,) = session(place.file, threads=1).run(None, {"input": np.zeros((2, 1, 4, 4), "f4")})
    assert np.array_equal(found, np.full((2, 3), more, "f4"))
    place.clear()


@pytest.mark.parametrize(
    "constant",
    [
        helper.make_tensor("s", TensorProto.COMPLEX64, [2], [1 + 1j, 1e30]),
        TensorProto(name="s", data_type=TensorProto.FLOAT16, dims=[1], int32_data=[1 << 30]),
    ],
    ids=["complex", "beyond its type"],
)
def test_numbers_that_are_no_sizes_are_read_without_a_warning(
    constant: TensorProto, place: Place
) -> None:
    place.file.write_bytes(model(tensors=[constant]).SerializeToString())
    assert read_onnx(place.file).model.graph.initializer[1] == constant
    place.clear()


UNKNOWN: dict[str, tuple[int, list]] = {
    "text": (TensorProto.STRING, ["b", 1]),
    "one number": (TensorProto.FLOAT, []),
    "free sizes": (TensorProto.FLOAT, ["b", "length"]),
}


@pytest.mark.parametrize("name", list(UNKNOWN))
def test_a_file_of_whose_inputs_no_sample_can_be_made_is_opened_untried(
    name: str, place: Place
) -> None:
    kind, shape = UNKNOWN[name]
    more = helper.make_tensor_value_info("more", kind, shape)
    place.file.write_bytes(changed(lambda m: m.graph.input.append(more)))
    run = session(place.file, threads=1)
    assert [given.name for given in run.get_inputs()] == ["input", "more"]
    place.clear()


def test_an_input_larger_than_the_memory_is_found_by_trial(place: Place) -> None:
    made = model(shape=["b", 1, 1 << 16, 1 << 16])
    made.graph.node.insert(0, helper.make_node("GlobalAveragePool", ["input"], ["small"]))
    made.graph.node[1].input[0] = "small"
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(WEIGHT[:1], "weight"))
    place.file.write_bytes(made.SerializeToString())
    with pytest.raises(ModelFileError, match=r"(?s)cannot run one.*it takes too much memory"):
        session(place.file)
    place.clear()


@pytest.mark.parametrize("name", list(COMPUTED))
def test_absurd_sizes_that_are_computed_are_found_by_trial(
    name: str, place: Place, refused: Callable[..., str]
) -> None:
    place.file.write_bytes(COMPUTED[name])
    assert refused().endswith("x.onnx cannot run one sample.")


def test_a_model_that_runs_without_end_is_stopped(
    place: Place, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "SECONDS", 2)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Relu", ["x"], ["y"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["n", "yes", "features"], ["scores"], body=body)
    tensors = [scalar("n", 1 << 60), scalar("yes", 1, np.bool_)]
    place.file.write_bytes(with_nodes(loop, tensors=tensors))
    assert "took more than 2 s for one sample; stopped." in refused()


def test_a_model_that_ends_the_process_that_tries_it_out_is_refused(
    place: Place, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dies = tmp_path / "dies.py"
    dies.write_text("import os, sys; sys.stdin.buffer.read(); os.abort()")
    monkeypatch.setattr(runtime, "__file__", str(dies))
    monkeypatch.setattr(gate, "_known", set())
    place.file.write_bytes(GOOD)
    with pytest.raises(ModelFileError, match=r"(?s)cannot run|ended the process.*code -6"):
        session(place.file)
    dies.write_text("raise SystemExit(7)")  # without reading what it is given
    with pytest.raises(ModelFileError, match=r"(?s)ended the process.*code 7"):
        session(place.file)


def test_a_file_of_ours_that_cannot_run_is_refused_too(place: Place) -> None:
    place.file.write_bytes(RUNTIME["an unknown operator"])
    gate.vouch(place.file)
    with pytest.raises(ModelFileError, match="is not a model that ONNX Runtime can run") as caught:
        session(place.file)
    assert "Convolve" in caught.value.notes["why"]
    place.clear()


def test_a_file_is_tried_out_once_and_one_of_ours_not_at_all(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(gate, "_known", set())
    monkeypatch.setattr(gate, "try_out", lambda name, *_: tried.append(name))
    place.file.write_bytes(GOOD)
    session(place.file, threads=1)
    session(place.file, threads=1)
    assert tried == ["x.onnx"]
    place.file.write_bytes(polyglot())
    gate.vouch(place.file)
    session(place.file, threads=1)
    assert tried == ["x.onnx"]
    (place.folder / "weights.bin").write_bytes(WEIGHT.tobytes())
    place.file.write_bytes(outside("weights.bin"))
    session(place.file, threads=1)
    (place.folder / "weights.bin").write_bytes((2 * WEIGHT).tobytes())
    session(place.file, threads=1)
    assert tried == ["x.onnx"] * 3  # other weights, another model
    place.clear()


# --- damaged and mistaken files -------------------------------------------------------------------


def archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("x.onnx", bytes(1 << 24))
    return stream.getvalue()


def tape() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("x.onnx"))
    return stream.getvalue()


def saved() -> bytes:
    stream = io.BytesIO()
    torch.save(nn.Linear(2, 2).state_dict(), stream)
    return stream.getvalue()


def varint(value: int) -> bytes:
    made = b""
    while value > 127:
        made += bytes([value & 127 | 128])
        value >>= 7
    return made + bytes([value])


def chunk(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def noise(seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(1000)


def graph_of(content: bytes) -> bytes:
    """A model of that graph, by hand."""
    return b"\x08\x0a" + chunk(7, content) + chunk(8, b"\x0a\x00\x10\x12")


OTHERS: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\x08",
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "text": b"a model, I promise\n",
    "line break": b"\n",
    "json": b'{"ir_version": 10}',
    "yaml": b"ir_version: 10\n",
    "textproto": b"ir_version: 10\ngraph { name: 'g' }\n",
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "zip": archive(),
    "gzip": gzip.compress(GOOD),
    "tar": tape(),
    "torch.save": saved(),
    "pickle": b"\x80\x04}\x94.",
    "npy": b"\x93NUMPY\x01\x00" + bytes(100),
    "safetensors": (2).to_bytes(8, "little") + b"{}",
    "GGUF": b"GGUF\x03" + bytes(100),
    "TensorFlow Lite": b"\x1c\0\0\0TFL3" + bytes(100),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "program": b"\x7fELF\x02\x01\x01" + bytes(100),
    "byte order mark": b"\xef\xbb\xbf" + GOOD,
    "upside down": GOOD[::-1],
    "twice": GOOD + GOOD,
    "junk behind": GOOD + b"junk",
    "junk before": b"junk" + GOOD,
    "line ends translated": GOOD.replace(b"\n", b"\r\n"),
    "high bits lost": bytes(byte & 127 for byte in GOOD),
    "text of bytes": GOOD.hex().encode(),
    **{f"noise {seed}": noise(seed) for seed in range(8)},
}

WIRE: dict[str, bytes] = {
    "an unknown field": GOOD + varint(99 << 3) + b"\x01",
    "an unknown field inside": graph_of(chunk(99, b"x")),
    "field 0": GOOD + b"\x00\x01",
    "a group": GOOD + b"\x0b\x0c",
    "a group without an end": GOOD + b"\x0b",
    "wire type 6": GOOD + b"\x0e\x01",
    "wire type 7": GOOD + b"\x0f\x01",
    "a number where a graph is due": b"\x08\x0a\x38\x01",
    "text where a number is due": chunk(1, b"\x0a") + GOOD[2:],
    "fixed where a number is due": b"\x09" + bytes(8) + GOOD[2:],
    "two versions": b"\x08\x0a" + GOOD,
    "two graphs": GOOD + chunk(7, b""),
    "a number without an end": b"\x08" + b"\xff" * 20,
    "a number of 11 bytes": b"\x08" + b"\x80" * 10 + b"\x01",
    "a number of 70 bits": b"\x08" + b"\xff" * 9 + b"\x7f" + GOOD[2:],
    "a length beyond the end": GOOD + b"\x12\x7f",
    "a length of 2**63": GOOD + b"\x12" + varint(1 << 63),
    "a name that is not UTF-8": GOOD + chunk(4, b"\xff\xfe"),
    "a name of half a character": GOOD + chunk(4, b"\xe2\x82"),
    "a surrogate": GOOD + chunk(4, b"\xed\xa0\x80"),
    "a name with NUL": GOOD + chunk(4, b"a\0b"),
    "an unknown place of data": graph_of(chunk(5, b"\x70\x07")),
    "an unknown kind of attribute": graph_of(chunk(1, chunk(5, b"\xa0\x01\x63"))),
    "half a float": graph_of(chunk(5, chunk(4, b"\0\0\0"))),
    "half a double": graph_of(chunk(5, chunk(10, b"\0\0\0\0"))),
    "half a number": graph_of(chunk(5, chunk(7, b"\x80"))),
    "a float cut off": graph_of(chunk(5, b"\x25\0\0")),
}


def deep(levels: int) -> bytes:
    """A graph in a node in a graph, so many times."""
    content = b""
    for _ in range(levels):
        content = chunk(1, chunk(5, chunk(6, content)))
    return graph_of(content)


WIRE |= {"nested 20 deep": deep(20), "nested 2,000 deep": deep(2000)}


def first(m: ModelProto) -> TensorProto:
    return m.graph.initializer[0]


def value_of(m: ModelProto, kind: int) -> None:
    m.graph.input[0].type.CopyFrom(
        helper.make_sequence_type_proto(helper.make_tensor_type_proto(kind, None))
    )


CONTENT: dict[str, bytes] = {
    "no format version": changed(lambda m: m.ClearField("ir_version")),
    "format 0": changed(lambda m: setattr(m, "ir_version", 0)),
    "format 99": changed(lambda m: setattr(m, "ir_version", 99)),
    "format -1": changed(lambda m: setattr(m, "ir_version", -1)),
    "no operator set": changed(lambda m: m.ClearField("opset_import")),
    "only others' operators": changed(
        lambda m: setattr(m.opset_import[0], "domain", "com.microsoft")
    ),
    "two operator sets": changed(lambda m: m.opset_import.append(helper.make_opsetid("", 17))),
    "opset 0": changed(lambda m: setattr(m.opset_import[0], "version", 0)),
    "opset 6": changed(lambda m: setattr(m.opset_import[0], "version", 6)),
    "opset 999": changed(lambda m: setattr(m.opset_import[0], "version", 999)),
    "opset -1": changed(lambda m: setattr(m.opset_import[0], "version", -1)),
    "no graph": changed(lambda m: m.ClearField("graph")),
    "no node": changed(lambda m: m.graph.ClearField("node")),
    "no input": changed(lambda m: m.graph.ClearField("input")),
    "no output": changed(lambda m: m.graph.ClearField("output")),
    "an input of no type": changed(lambda m: m.graph.input[0].ClearField("type")),
    "an input of type 0": changed(
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 0)
    ),
    "a sequence as input": changed(lambda m: value_of(m, 1)),
    "weights of no type": changed(lambda m: first(m).ClearField("data_type")),
    "weights of type 99": changed(lambda m: setattr(first(m), "data_type", 99)),
    "weights of type -1": changed(lambda m: setattr(first(m), "data_type", -1)),
    "weights of text": changed(lambda m: setattr(first(m), "data_type", TensorProto.STRING)),
    "weights of doubles": changed(lambda m: setattr(first(m), "data_type", TensorProto.DOUBLE)),
    "weights of bytes": changed(lambda m: setattr(first(m), "data_type", TensorProto.INT8)),
    "weights of half bytes": changed(lambda m: setattr(first(m), "data_type", TensorProto.INT4)),
    "a byte too few": changed(lambda m: setattr(first(m), "raw_data", bytes(191))),
    "a byte too many": changed(lambda m: setattr(first(m), "raw_data", bytes(193))),
    "no bytes": changed(lambda m: first(m).ClearField("raw_data")),
    "no shape": changed(lambda m: first(m).ClearField("dims")),
    "another shape": changed(lambda m: first(m).dims.append(2)),
    "a negative shape": changed(lambda m: first(m).dims.extend([-1, -1])),
    "a shape that overflows": changed(lambda m: first(m).dims.extend([1 << 32, 1 << 32])),
    "a shape of 100 axes": changed(lambda m: first(m).dims.extend([1] * 100)),
    "bytes and numbers": changed(lambda m: first(m).float_data.extend([1.0] * 48)),
    "numbers of another kind": changed(
        lambda m: (first(m).ClearField("raw_data"), first(m).int64_data.extend([1] * 48))
    ),
    "too few numbers": changed(
        lambda m: (first(m).ClearField("raw_data"), first(m).float_data.extend([1.0] * 47))
    ),
    "a part of a tensor": changed(lambda m: setattr(first(m).segment, "begin", 1)),
    "two of one name": changed(lambda m: m.graph.initializer.add().CopyFrom(first(m))),
    "a sparse tensor": changed(lambda m: m.graph.sparse_initializer.add().dims.append(HUGE)),
    "branches 9 deep": with_nodes(
        nested([number("w", 1, 1, 1, kind=np.float32)], 9), tensors=[scalar("yes", 1, np.bool_)]
    ),
}

# What only the runtime knows: these go through a trial.
RUNTIME: dict[str, bytes] = {
    "an unknown operator": with_nodes(helper.make_node("Convolve", ["features"], ["scores"])),
    "an operator without inputs": with_nodes(helper.make_node("Add", [], ["scores"])),
    "an input from nowhere": with_nodes(helper.make_node("Relu", ["nowhere"], ["scores"])),
    "a circle": with_nodes(
        helper.make_node("Relu", ["b"], ["a"]),
        helper.make_node("Add", ["a", "a"], ["b"]),
        helper.make_node("Relu", ["a"], ["scores"]),
    ),
    "one name twice": with_nodes(
        helper.make_node("Relu", ["features"], ["scores"]),
        helper.make_node("Abs", ["features"], ["scores"]),
    ),
    "an attribute of another type": with_nodes(
        helper.make_node("Softmax", ["features"], ["scores"], axis="last")
    ),
    "an axis too far": with_nodes(helper.make_node("Softmax", ["features"], ["scores"], axis=7)),
    "shapes that do not fit": with_nodes(
        helper.make_node("MatMul", ["features", "weight"], ["scores"])
    ),
    "an output from nowhere": changed(lambda m: setattr(m.graph.output[0], "name", "nowhere")),
    "types that do not fit": with_nodes(
        helper.make_node("Add", ["features", "i"], ["scores"]), tensors=[number("i", 1)]
    ),
    "a reshape that cannot be": with_nodes(
        helper.make_node("Reshape", ["features", "s"], ["scores"]), tensors=[number("s", 7, -1)]
    ),
    "an index too far": with_nodes(
        helper.make_node("Gather", ["features", "s"], ["scores"], axis=1),
        tensors=[number("s", 1 << 40)],
    ),
}

CUTS = range(2, len(GOOD), len(GOOD) // 24)
DAMAGED = {
    **OTHERS,
    **WIRE,
    **CONTENT,
    **{f"cut off at {place}": GOOD[:place] for place in CUTS},
}


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("name", list(DAMAGED))
def test_a_damaged_or_mistaken_file_is_refused(
    name: str, place: Place, refused: Callable[..., str]
) -> None:
    place.file.write_bytes(DAMAGED[name])
    assert "x.onnx" in refused()


@pytest.mark.parametrize("name", list(RUNTIME))
def test_a_graph_that_cannot_run_is_refused(
    name: str, place: Place, refused: Callable[..., str]
) -> None:
    place.file.write_bytes(RUNTIME[name])
    assert re.search(r"x\.onnx (is not a model that ONNX Runtime can|cannot) run", refused())


def test_there_are_enough_cases() -> None:
    hostile = [*escapes(Path("/s")), *LINKS, *PLACES, *CODE, *SIZES, *COMPUTED]
    assert len(hostile) >= 40
    assert len({*DAMAGED.values(), *RUNTIME.values()}) >= 100


@pytest.mark.parametrize(
    "recorded",
    [
        "",
        "[",
        "[1]",
        "[1,4]",
        "[1,4,4,4]",
        "[0,4,4]",
        "[-1,4,4]",
        "[1e9,4,4]",
        '"x"',
        "null",
        "[1,100000,100000]",
        "[9999999,1,1]",
        "[" * 100_000,
        "[1,4,\u0664]",
        "\x1b[2J",
    ],
)
def test_a_recorded_size_that_is_none_is_refused(
    recorded: str, place: Place, refused: Callable[..., str]
) -> None:
    place.file.write_bytes(
        changed(lambda m: m.metadata_props.add(key="input_size", value=recorded))
    )
    line = refused("--batch-size", "1")
    assert "records an input size that is none" in line and len(line) < 200


def test_every_beginning_of_a_file_is_refused(place: Place) -> None:
    for end in range(len(GOOD)):
        place.file.write_bytes(GOOD[:end])
        with pytest.raises(ModelFileError):
            read_onnx(place.file)
    place.clear()


def test_a_sound_file_passes(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.file.write_bytes(
        changed(lambda m: m.metadata_props.add(key="input_size", value="[1, 4, 4]"))
    )
    assert main(["benchmark", str(place.file)]) == 0
    assert "ONNX fp32" in capfd.readouterr().out
    place.clear()


# --- every door -----------------------------------------------------------------------------------

IMAGES = torch.zeros(2, 1, 4, 4)


class Net(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :3]


DOORS: dict[str, Callable[[Path], object]] = {
    "metadata": read_metadata,
    "accuracy": lambda path: accuracy(path, IMAGES, torch.zeros(2)),
    "parity": lambda path: parity(Net(), path, IMAGES),
    "latency": lambda path: latency(path, IMAGES, runs=1),
    "quantize": lambda path: quantize(path, path.with_name("int8.onnx"), IMAGES),
    "session": session,
    "read": read_onnx,
}


@pytest.mark.parametrize("door", list(DOORS))
def test_every_door_refuses(door: str, place: Place, python: Python) -> None:
    os.link(place.secret, place.folder / "hard")
    for content in (outside("hard"), outside("../outside/secret"), CODE["a function of itself"]):
        place.file.write_bytes(content)
        place.kernel.seen()
        with pytest.raises(ModelFileError) as caught:
            DOORS[door](place.file)
        assert caught.value.exit_code == 3
        assert place.kernel.seen() == 0
        assert sorted(name for name, _ in place.names()) == ["hard", "x.onnx"]
    place.clear()


@pytest.mark.parametrize("verb", ["inspect", "eval", "convert", "verify"])
def test_other_verbs_take_no_onnx_file(
    verb: str, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    place.file.write_bytes(outside("../outside/secret"))
    more = {"convert": [str(place.folder / "y.safetensors")], "eval": ["--data-dir", "digits"]}
    place.kernel.seen()
    code = main([verb, str(place.file), *more.get(verb, [])])
    assert place.kernel.seen() == 0
    assert code in (2, 3)
    assert "Traceback" not in capfd.readouterr().err
    assert [name for name, _ in place.names()] == ["x.onnx"]
    place.clear()


# --- mutants --------------------------------------------------------------------------------------


def mutants(count: int, seed: int) -> Iterator[bytes]:
    """Copies of sound models with bytes flipped, cut out, doubled or made extreme."""
    spread = random.Random(seed)
    sources = [GOOD, *list(PLACES.values())[-4:], SIZES["Pad"], CODE["a function"], polyglot()]
    for _ in range(count):
        raw = bytearray(spread.choice(sources))
        for _ in range(spread.choice((1, 1, 2, 5))):
            at = spread.randrange(len(raw))
            width = spread.choice((1, 2, 8, 32))
            kind = spread.randrange(4)
            if kind == 0:
                raw[at] ^= 1 << spread.randrange(8)
            elif kind == 1:
                del raw[at : at + width]
            elif kind == 2:
                raw[at:at] = raw[at : at + width]
            else:
                raw[at] = spread.choice((0, 1, 127, 128, 255))
        yield bytes(raw)


def test_2000_mutants_are_refused_or_read_alike_by_every_parser(place: Place) -> None:
    read = 0
    for raw in mutants(2000, SEED):
        place.file.write_bytes(raw)
        try:
            file = read_onnx(place.file)
        except SurgeonError as error:
            assert error.exit_code == 3, error
            continue
        read += 1
        again = ModelProto.FromString(raw)
        again.DiscardUnknownFields()  # type: ignore[attr-defined]
        assert again.SerializeToString(deterministic=True) == (
            file.model.SerializeToString(deterministic=True)
        )
    assert 100 < read < 1900
    place.clear()


def test_mutants_are_opened_or_refused_and_nothing_else(place: Place) -> None:
    opened = 0
    place.kernel.seen()
    for raw in mutants(40, SEED + 1):
        place.file.write_bytes(raw)
        try:
            session(place.file, threads=1)
            opened += 1
        except ModelFileError:
            pass
    assert place.kernel.seen() == 0
    assert opened > 0
    place.clear()


# --- memory ---------------------------------------------------------------------------------------


def bombs() -> list[bytes]:
    """Files whose few bytes would take much memory or time if they were believed."""
    flood = 1_200_000
    return [
        graph_of(chunk(1, b"") * flood),
        graph_of(chunk(1, b"\x0a\x00" * flood)),
        graph_of(chunk(5, chunk(7, b"\x01" * 20_000_000))),
        graph_of(chunk(5, b"\x08\x01" * flood * 2)),
        b"\x08\x0a" + chunk(14, b"") * flood,
        deep(3_000),
    ]


BOMB_CHILD = """
import json, resource, sys, time
from pathlib import Path
sys.path[:] = json.loads(sys.argv[1])
from kdsurgeon.errors import ModelFileError
from kdsurgeon.exporting.gate import read_onnx
folder = Path(sys.argv[2])
status = lambda: Path('/proc/self/status').read_text()
peak = lambda: int(status().split('VmHWM:')[1].split()[0]) * 1024
pages = int(Path('/proc/self/statm').read_text().split()[1])
before, report = pages * resource.getpagesize(), []
for path in sorted(folder.glob("*.onnx"), key=lambda path: path.stat().st_size):
    try:
        read_onnx(path)
        outcome = "read"
    except ModelFileError as error:
        outcome = "refused"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"[:200]
    report.append([path.name, outcome, path.stat().st_size, peak() - before])
print(json.dumps(report))
"""


def test_bombs_stay_within_twice_their_size_and_300_megabytes(tmp_path: Path) -> None:
    made = bombs()
    for index, content in enumerate(made):
        (tmp_path / f"{index}.onnx").write_bytes(content)
    with (tmp_path / "holes.onnx").open("wb") as file:
        file.truncate(1 << 40)
    command = [sys.executable, "-c", BOMB_CHILD, json.dumps(sys.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    report = json.loads(done.stdout)
    assert len(report) == len(made) + 1
    assert [line for line in report if line[1] != "refused"] == []
    assert [line for line in report if line[3] > 2 * line[2] + 300e6] == []


def test_the_wire_is_read_before_any_parser() -> None:
    check_wire(GOOD, ModelProto.DESCRIPTOR)
    for content in WIRE.values():
        if content not in (WIRE["nested 20 deep"],):
            with pytest.raises(Malformed):
                check_wire(content, ModelProto.DESCRIPTOR)


@pytest.mark.parametrize("module", [wire, runtime])
def test_the_examples_in_the_docstrings_run(module: ModuleType) -> None:
    done = doctest.testmod(module)
    assert done.attempted and not done.failed
