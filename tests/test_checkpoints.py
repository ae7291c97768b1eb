"""Models in and out: what is read, what is refused in which words, what is written and how."""

from __future__ import annotations

import argparse
import collections
import doctest
import errno
import hashlib
import json
import os
import pathlib
import stat
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdsurgeon import plugins
from kdsurgeon.checkpoints import (
    Loaded,
    ModelCard,
    archive,
    arrays,
    build,
    conversion,
    convert,
    disk,
    is_file,
    load_model,
    model_hash,
    pickles,
    read_arrays,
    read_model,
    read_tensors,
    reader,
    save_model,
    specs,
    store,
    write_tensors,
)
from kdsurgeon.errors import (
    DataError,
    ModelFileError,
    PluginError,
    ResourceError,
    SurgeonError,
    UsageError,
)

CARD = ModelCard(
    arch="test/small,width=3",
    input_size=(1, 8, 8),
    num_classes=4,
    class_names=("a", "b", "c", "é"),
    mean=(0.5,),
    std=(0.25,),
    provenance={"teacher": "sha256:0123"},
)


class Small(nn.Module):
    """A network with a buffer that is saved and one that is not."""

    def __init__(self, width: int = 3, num_classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width * 36, num_classes)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).flatten(1)) * self.scale


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight


class WithExtra(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {"x": 1}


class Gone:
    """A class that is pickled, and then no longer there."""


def small(seed: int = 1, **options: int) -> Small:
    torch.manual_seed(seed)
    model = Small(**options)
    model(torch.randn(4, 1, 8, 8))
    return model.eval()


def crash(name: str, **_: object) -> nn.Module:
    if name == "unknown":
        raise UsageError("test has no model unknown.", fix="test/small")
    raise RuntimeError("boom")


class FakeEntry:
    """An installed entry point, as importlib.metadata describes one."""

    def __init__(self, name: str, made: Callable[..., object]) -> None:
        self.name, self.made, self.value = name, made, "tests:made"
        self.dist = SimpleNamespace(name="kdsurgeon-test", version="1.0")

    def load(self) -> Callable[..., object]:
        return self.made


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model sources ``test`` (which has ``small`` and ``tied``) and ``crash``."""

    def make(name: str, **options: int) -> nn.Module:
        return {"small": Small, "tied": Tied, "list": list}[name](**options)

    entries = {"test": FakeEntry("test", make), "crash": FakeEntry("crash", crash)}
    monkeypatch.setattr(plugins, "_entries", lambda kind: entries if kind == "models" else {})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def refusal(call: Callable[..., object], *arguments: object, **options: object) -> SurgeonError:
    with pytest.raises(SurgeonError) as info:
        call(*arguments, **options)
    return info.value


# --- our own files ------------------------------------------------------------------------------


def test_a_saved_model_comes_back_bit_for_bit_with_its_card(folder: Path) -> None:
    model = small()
    digest = save_model(model, "student.safetensors", CARD)
    found = read_model("student.safetensors")
    assert equal(found.tensors, model.state_dict())
    assert found.card == CARD
    assert found.sha256 == digest
    assert digest == hashlib.sha256(Path("student.safetensors").read_bytes()).hexdigest()


def test_a_saved_model_loads_without_any_flag(folder: Path) -> None:
    model = small()
    save_model(model, "student.safetensors", CARD)
    loaded = load_model("student.safetensors")
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(loaded.model(x), model(x))
    assert loaded.name == "student"
    assert loaded.card == CARD
    assert not loaded.model.training


def test_any_safetensors_reader_opens_our_files(folder: Path) -> None:
    from safetensors.torch import load_file

    model = small()
    save_model(model, "student.safetensors", CARD)
    assert equal(load_file("student.safetensors"), model.state_dict())


def test_the_same_model_gives_the_same_bytes_in_another_process(folder: Path) -> None:
    save_model(small(), "here.safetensors", CARD)
    code = (
        "import sys, json; sys.path[:] = json.loads(sys.argv[1]); import test_checkpoints as t; "
        "t.save_model(t.small(), 'there.safetensors', t.CARD)"
    )
    path = json.dumps([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, path], check=True, env=environment)
    assert Path("here.safetensors").read_bytes() == Path("there.safetensors").read_bytes()


def test_tied_weights_are_stored_once_and_come_back_under_both_names(folder: Path) -> None:
    model = Tied()
    save_model(model, "tied.safetensors", ModelCard(arch="test/tied"))
    found = read_model("tied.safetensors")
    assert equal(found.tensors, model.state_dict())
    assert Path("tied.safetensors").stat().st_size < 64 + 32 + 1024
    loaded = load_model("tied.safetensors").model
    assert loaded.get_parameter("second.weight") is loaded.get_parameter("first.weight")


def test_saving_leaves_the_model_as_it_was(folder: Path) -> None:
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_model(model, "m.safetensors", CARD)
    assert model.training
    assert equal(before, model.state_dict())


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8),
        *(torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16),
    ],
)
def test_tensors_of_every_type_and_shape_come_back(folder: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    tensors = {
        "plain": (torch.rand(3, 5) * 9).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
        "transposed": (torch.rand(3, 5) * 9).to(dtype).T,
    }
    write_tensors(tensors, "t.safetensors", {"step": "3"})
    found = read_tensors("t.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and found[name].shape == tensor.shape
        assert found[name].reshape(-1).tolist() == tensor.reshape(-1).tolist()


@pytest.mark.parametrize("sizes", [(1, 400_000), (400_000, 1), (200_000, 200_000, 1)])
def test_tensors_larger_and_smaller_than_what_is_written_at_once_come_back(
    folder: Path, sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(3)
    tensors = {str(n): torch.rand(size) for n, size in enumerate(sizes)}
    write_tensors(tensors, "t.safetensors")
    assert equal(read_tensors("t.safetensors"), tensors)


def test_the_permissions_of_a_written_file_follow_the_umask(folder: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            write_tensors({"a": torch.ones(1)}, "m.safetensors")
        finally:
            os.umask(before)
        assert stat.S_IMODE(Path("m.safetensors").stat().st_mode) == mode


def test_one_flipped_bit_in_the_weights_is_noticed(folder: Path) -> None:
    save_model(small(), "m.safetensors", CARD)
    raw = bytearray(Path("m.safetensors").read_bytes())
    raw[-5] ^= 4
    Path("m.safetensors").write_bytes(bytes(raw))
    error = refusal(read_model, "m.safetensors")
    assert isinstance(error, ModelFileError) and error.exit_code == 3
    assert "m.safetensors is damaged: its content is not what kdsurgeon wrote" in str(error)
    assert "copy it again" in str(error)


def test_a_file_without_a_seal_is_no_run_checkpoint(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, "foreign.safetensors")
    assert read_model("foreign.safetensors").card == ModelCard()
    assert "carries no seal" in refusal(read_tensors, "foreign.safetensors").what


def test_a_folder_is_no_file_of_tensors_or_arrays(folder: Path) -> None:
    for read, kind in ((read_tensors, ModelFileError), (read_arrays, DataError)):
        error = refusal(read, ".")
        assert type(error) is kind and error.what == ". is a folder, not a model file."


def test_a_full_or_unwritable_folder_is_named_and_nothing_is_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("m.safetensors").write_bytes(b"before")
    error = refusal(write_tensors, {"a": torch.ones(1)}, "absent/m.safetensors")
    assert isinstance(error, ResourceError) and error.exit_code == 6
    assert "absent/m.safetensors could not be written" in error.what
    assert error.notes["fix"] == "make the folder first"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    error = refusal(write_tensors, {"a": torch.ones(1)}, "m.safetensors")
    assert error.notes.pop("room").startswith("it needs 1 kB, ")
    assert error.notes == {"why": "No space left on device", "fix": "free some space on that disk"}
    assert [file.name for file in folder.iterdir()] == ["m.safetensors"]
    assert Path("m.safetensors").read_bytes() == b"before"


def test_a_line_that_cannot_be_added_names_its_file(folder: Path) -> None:
    error = refusal(disk.append, Path("absent/train.log"), "epoch 1\n")
    assert isinstance(error, ResourceError) and error.notes["fix"] == "make the folder first"
    assert error.what == "absent/train.log could not be written."


def test_an_interrupted_writing_leaves_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    Path("m.safetensors").write_bytes(b"before")
    monkeypatch.setattr(disk.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_tensors({"a": torch.ones(1)}, "m.safetensors")
    assert [file.name for file in folder.iterdir()] == ["m.safetensors"]
    assert Path("m.safetensors").read_bytes() == b"before"


def test_a_draft_that_an_earlier_process_left_is_no_hindrance(folder: Path) -> None:
    Path(f".m.safetensors.{os.getpid()}.tmp").write_bytes(bytes(9999))
    write_tensors({"a": torch.ones(1)}, "m.safetensors")
    assert [file.name for file in folder.iterdir()] == ["m.safetensors"]
    assert read_tensors("m.safetensors")["a"].item() == 1


@pytest.mark.parametrize(
    ("name", "fault"), [("open", errno.EACCES), ("fsync", errno.EINVAL), ("fsync", errno.ENOTSUP)]
)
def test_a_file_system_that_flushes_no_folder_is_written_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: int
) -> None:
    fail_on_folders(monkeypatch, name, fault)
    write_tensors({"a": torch.ones(1)}, "m.safetensors")
    assert read_tensors("m.safetensors")["a"].item() == 1


@pytest.mark.parametrize("name", ["open", "fsync"])
def test_a_folder_that_fails_to_be_flushed_is_not_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fail_on_folders(monkeypatch, name, errno.EIO)
    error = refusal(write_tensors, {"a": torch.ones(1)}, "m.safetensors")
    assert isinstance(error, ResourceError) and error.notes["why"] == os.strerror(errno.EIO)


def fail_on_folders(monkeypatch: pytest.MonkeyPatch, name: str, fault: int) -> None:
    call = getattr(os, name)

    def failing(target: Any, *rest: int) -> int:
        is_open = isinstance(target, int)
        if stat.S_ISDIR(os.fstat(target).st_mode) if is_open else Path(target).is_dir():
            raise OSError(fault, os.strerror(fault))
        return call(target, *rest)

    monkeypatch.setattr(disk.os, name, failing)


def test_a_path_that_is_a_folder_cannot_be_written(folder: Path) -> None:
    Path("m.safetensors").mkdir()
    error = refusal(write_tensors, {"a": torch.ones(1)}, "m.safetensors")
    assert isinstance(error, ResourceError)
    assert [file.name for file in folder.iterdir()] == ["m.safetensors"]


def test_a_state_that_safetensors_has_no_word_for_is_refused(folder: Path) -> None:
    error = refusal(write_tensors, {"a": torch.eye(3).to_sparse()}, "m.safetensors")
    assert isinstance(error, UsageError) and 'the tensor "a" (sparse_coo' in error.what
    error = refusal(save_model, WithExtra(), "m.safetensors", CARD)
    assert isinstance(error, UsageError) and '"_extra_state", which is dict' in error.what
    error = refusal(write_tensors, {"__metadata__": torch.ones(1)}, "m.safetensors")
    assert isinstance(error, UsageError) and 'cannot be called "__metadata__"' in error.what


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"input_size": (8, 8)}, "input_size = (8, 8) (expected channels, height, width)"),
        ({"input_size": (1, 8, True)}, "input_size"),
        ({"num_classes": 0}, "num_classes = 0 (expected a count)"),
        ({"num_classes": True}, "num_classes"),
        ({"num_classes": 3, "class_names": ("a",)}, "3 classes and 1 class names"),
        ({"class_names": (1, 2)}, "class_names that are not plain text"),
        ({"mean": (float("nan"),)}, "mean"),
        ({"std": (0.0,)}, "std = (0.0,) (expected positive numbers)"),
        ({"arch": ""}, "arch"),
        ({"provenance": {"a": 1}}, "provenance"),
    ],
)
def test_a_card_that_cannot_be_true_is_not_made(entries: dict, words: str) -> None:
    error = refusal(ModelCard, **entries)
    assert isinstance(error, UsageError) and words in error.what


# --- foreign files ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "model_ema", None])
def test_a_state_dict_is_found_bare_or_under_its_usual_keys(folder: Path, key: str | None) -> None:
    state = small().state_dict()
    torch.save(state if key is None else {key: state, "epoch": 3, "best": 0.5}, "teacher.bin")
    found = read_model("teacher.bin")
    assert equal(found.tensors, dict(state))
    assert (found.format, found.key, found.module) == ("state dict", key, None)


def test_plain_weights_are_preferred_over_averaged_ones(folder: Path) -> None:
    plain, averaged = small(1).state_dict(), small(2).state_dict()
    torch.save({"state_dict_ema": averaged, "state_dict": plain}, "t.pt")
    assert read_model("t.pt").key == "state_dict"
    assert equal(read_model("t.pt").tensors, dict(plain))


def test_wrappers_prefixes_are_taken_off_where_all_names_carry_them(folder: Path) -> None:
    state = small().state_dict()
    torch.save({f"module._orig_mod.{k}": v for k, v in state.items()}, "wrapped.pt")
    assert equal(read_model("wrapped.pt").tensors, dict(state))
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, "mixed.pt")
    assert set(read_model("mixed.pt").tensors) == {"module.a", "b"}


def test_a_checkpoint_with_optimizer_and_scheduler_is_read(folder: Path) -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    content |= {"scheduler": schedule.state_dict(), "size": torch.Size([1]), "type": torch.float16}
    torch.save(content, "t.pt")
    assert equal(read_model("t.pt").tensors, dict(model.state_dict()))


def test_a_checkpoint_dict_may_describe_itself(folder: Path) -> None:
    content = {"state_dict": small().state_dict(), "arch": "test/small", "input_size": (1, 8, 8)}
    content |= {"num_classes": 4, "mean": [0.5], "std": torch.tensor([0.5]), "class_names": 3}
    torch.save(content, "t.pt")
    loaded = load_model("t.pt")
    assert loaded.card == ModelCard("test/small", (1, 8, 8), 4, None, (0.5,), (0.5,))
    assert isinstance(loaded.model, Small)


def test_parameters_come_back_as_plain_tensors(folder: Path) -> None:
    torch.save({"w": nn.Parameter(torch.ones(2)), "odd": torch.ones(2).to(torch.uint16)}, "p.pt")
    found = read_model("p.pt").tensors
    assert type(found["w"]) is Tensor and not found["w"].requires_grad
    assert found["odd"].dtype == torch.uint16


def test_the_content_decides_and_not_the_suffix(folder: Path) -> None:
    save_model(small(), "m.safetensors", CARD)
    Path("m.safetensors").rename("m.pt")
    torch.save(small().state_dict(), "n.safetensors")
    assert read_model("m.pt").format == "safetensors"
    assert read_model("n.safetensors").format == "state dict"


def folder_with(*names: str) -> Path:
    path = Path("given")
    path.mkdir()
    for name in names:
        (path / name).write_bytes(b"{}")
    return path


def test_a_missing_file_says_so(folder: Path) -> None:
    for path in ("absent.pt", "absent/teacher.pt"):
        error = refusal(load_model, path)
        assert isinstance(error, ModelFileError) and error.exit_code == 3
        assert error.what == f"{path} does not exist."


@pytest.mark.parametrize(
    ("names", "words", "fix"),
    [
        ((), "given is a folder, not a model file.", "give a model file"),
        (("m.pt",), "given is a folder, not a model file.", "give one file: given/m.pt"),
        ((".metadata", "__0_0.distcp"), "given is a distributed checkpoint (DCP)", "dcp_to_torch"),
        (("config.json", "modeling.py"), "brings its own code", "py:file.py:factory"),
    ],
)
def test_a_folder_is_refused_by_what_lies_in_it(
    folder: Path, names: tuple[str, ...], words: str, fix: str
) -> None:
    folder_with(*names)
    error = refusal(read_model, "given")
    assert isinstance(error, ModelFileError) and words in error.what and fix in error.notes["fix"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "m.pt is empty."),
        (b"version https://git-lfs.github.com/spec/v1\noid", "this is a Git LFS pointer."),
        (b"<!doctype html><html>", "is a web page, not a model file."),
        (b"just a note", "is text, not a model file."),
        (b"\x80\x04K\x01.", "is a bare pickle"),
        (b"cos\nsystem\n(S'true'\ntR.", "is a bare pickle"),
        (b"\x80\x04\x8c\x17joblib.numpy_pickle", "is a joblib file"),
        (b"\x78\x9c" + bytes(20), "is a joblib file"),
        (bytes(257) + b"ustar" + bytes(200), "is a tar archive"),
        (b"\x08\x07\x12\x07pytorch\x1a\x03abc", "is an ONNX model"),
        (b"\x93NUMPY\x01\x00", "is a .npy array"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"GGUF\x03", "is a GGUF file"),
        (b"\x1c\0\0\0TFL3", "is a TensorFlow Lite model"),
        (b"\x1f\x8b\x08", "is a compressed file"),
        (bytes(64), "is no model file that kdsurgeon reads"),
        (b"PK\3\4 and then" + bytes(40), "is damaged: it does not end as a zip archive does"),
        (b"PK\3\4", "is damaged: it is cut off"),
    ],
)
def test_what_is_no_model_is_named(folder: Path, content: bytes, words: str) -> None:
    Path("m.pt").write_bytes(content)
    error = refusal(read_model, "m.pt")
    assert isinstance(error, ModelFileError) and error.exit_code == 3
    assert words in error.what
    assert error.notes["fix"]


def test_a_truncated_checkpoint_is_damaged(folder: Path) -> None:
    torch.save(small().state_dict(), "t.pt")
    raw = Path("t.pt").read_bytes()
    Path("t.pt").write_bytes(raw[: len(raw) // 2])
    assert "t.pt is damaged: it does not end as a zip archive" in refusal(read_model, "t.pt").what


def test_a_damaged_weight_is_named_with_its_record_and_place(folder: Path) -> None:
    torch.save(small().state_dict(), "t.pt")
    raw = bytearray(Path("t.pt").read_bytes())
    record = next(r for r in archive.read_records(bytes(raw), "t") if r.name == "t/data/0")
    raw[record.start + 2] ^= 1
    Path("t.pt").write_bytes(bytes(raw))
    words = f'record "t/data/0" fails its checksum (byte {record.start:,})'
    assert words in refusal(read_model, "t.pt").what


def test_a_packed_checkpoint_says_what_it_would_unpack_to(folder: Path) -> None:
    with zipfile.ZipFile("s.pt", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("s/data.pkl", b"\x80\x02}.")
        made.writestr("s/data/0", bytes(2_000_000))
    error = refusal(read_model, "s.pt")
    assert 's.pt: record "s/data.pkl" would unpack from' in error.what and "refused" in error.what


def test_a_torchscript_archive_is_refused_unopened_even_when_trusted(folder: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, its files are still about
        torch.jit.script(nn.Linear(2, 2)).save("script.pt")
    digest = hashlib.sha256(Path("script.pt").read_bytes()).hexdigest()
    for trust in ((), (f"sha256:{digest}",)):
        error = refusal(read_model, "script.pt", trust=trust)
        assert error.what == "script.pt is a TorchScript archive; it was not opened."
        assert "can be neither cut nor trained" in error.notes["why"]
        assert "torch.save(model.state_dict(), …)" in error.notes["fix"]


def test_an_exported_program_is_refused_unopened(folder: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), "net.pt2")
    Path("net.pt2").rename("net.pt")
    words = "net.pt is a torch.export archive (.pt2); it was not opened."
    assert refusal(read_model, "net.pt").what == words


def test_a_pickled_module_is_refused_with_its_names_and_both_ways_out(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "teacher.pt")
    digest = hashlib.sha256(Path("teacher.pt").read_bytes()).hexdigest()
    error = refusal(read_model, "teacher.pt")
    assert isinstance(error, ModelFileError) and error.exit_code == 3
    text = str(error)
    assert "teacher.pt holds Python objects, not only tensors; it was not loaded." in text
    assert "torch.nn.modules.container.Sequential" in text
    assert "kdsurgeon convert teacher.pt teacher.safetensors --drop-extra" in text
    assert "--teacher-arch" in text
    assert f"--trust-code sha256:{digest[:12]}" in text


def test_a_trusted_module_is_loaded_from_the_bytes_that_were_hashed(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    torch.save({"model": model, "num_classes": 2}, "teacher.pt")
    digest = hashlib.sha256(Path("teacher.pt").read_bytes()).hexdigest()
    for trust in (f"sha256:{digest[:12]}", f"sha256:{digest}", digest[:20].upper()):
        found = read_model("teacher.pt", trust=["sha256:" + "0" * 12, trust])
        assert isinstance(found.module, nn.Sequential)
        assert (found.key, found.card.num_classes) == ("model", 2)
    loaded = load_model("teacher.pt", trust=[f"sha256:{digest[:12]}"])
    assert torch.equal(loaded.model[0].weight, model[0].weight)  # type: ignore[index]
    assert not loaded.model.training


def test_trust_is_bound_to_one_file(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), "good.pt")
    torch.save(nn.Sequential(nn.Linear(2, 2)), "swapped.pt")
    digest = hashlib.sha256(Path("good.pt").read_bytes()).hexdigest()
    read_model("good.pt", trust=[f"sha256:{digest}"])
    assert "Python objects" in refusal(read_model, "swapped.pt", trust=[f"sha256:{digest}"]).what


@pytest.mark.parametrize("entry", ["yes", "sha256:", "sha256:abc", "a" * 11, "sha256:" + "g" * 12])
def test_a_bare_yes_or_a_short_hash_is_no_trust(folder: Path, entry: str) -> None:
    torch.save(small().state_dict(), "t.pt")
    error = refusal(read_model, "t.pt", trust=[entry])
    assert isinstance(error, UsageError) and error.exit_code == 2
    assert "at least 12 hex digits" in error.notes["fix"]


def test_a_trusted_pickle_that_torch_cannot_load_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": Gone()}, "t.pt")
    monkeypatch.delattr(sys.modules[__name__], "Gone")
    digest = hashlib.sha256(Path("t.pt").read_bytes()).hexdigest()
    error = refusal(read_model, "t.pt", trust=[f"sha256:{digest}"])
    assert isinstance(error, ModelFileError) and "could not be loaded by torch" in error.what


def test_an_old_torch_does_not_read_pt_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(small().state_dict(), "t.pt")
    save_model(small(), "m.safetensors", CARD)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    error = refusal(read_model, "t.pt")
    assert "torch 2.9.1+cpu cannot read .pt files safely (CVE-2026-24747)" in error.what
    assert "convert the file to .safetensors" in error.notes["fix"]
    assert read_model("m.safetensors").card == CARD


def test_the_format_of_old_torch_is_refused_with_the_way_out(folder: Path) -> None:
    torch.save(small().state_dict(), "old.pth", _use_new_zipfile_serialization=False)
    error = refusal(read_model, "old.pth")
    assert "old.pth is in the format of torch before 1.6" in error.what
    assert "kdsurgeon convert old.pth old.safetensors" in error.notes["fix"]
    digest = hashlib.sha256(Path("old.pth").read_bytes()).hexdigest()
    assert equal(read_model("old.pth", trust=[digest]).tensors, dict(small().state_dict()))


def test_weights_that_are_not_finite_need_permission(folder: Path) -> None:
    tensors = {f"w{n}": torch.tensor([1.0, bad]) for n, bad in enumerate([float("inf")] * 4)}
    torch.save({**tensors, "fine": torch.ones(2)}, "t.pt")
    error = refusal(read_model, "t.pt")
    assert error.what == "t.pt holds NaN or infinite weights: w0, w1, w2 (+1 more)."
    assert error.notes["fix"] == "use an earlier checkpoint"
    assert len(read_model("t.pt", allow_nonfinite=True).tensors) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_a_nan_is_found_in_every_type(folder: Path, dtype: torch.dtype) -> None:
    torch.save({"w": torch.tensor([1.0, float("nan")]).to(dtype)}, "t.pt")
    assert "NaN" in refusal(read_model, "t.pt").what


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3}, "holds a dict without weights ('epoch'), not a state dict."),
        ({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "without weights ('a', 'b', 'c', 'd'), not"),
        (torch.ones(2), "holds a Tensor, not a state dict"),
        ({"state_dict": {"w": torch.ones(1), "n": 3}}, "more than tensors among its weights: 'n'."),
        ({"w": torch.ones(1), 5: torch.ones(1)}, "more than tensors among its weights: 5."),
        ({"w": torch.eye(2).to_sparse()}, "holds Python objects"),
    ],
)
def test_a_checkpoint_without_a_state_dict_says_what_it_holds(
    folder: Path, content: object, words: str
) -> None:
    torch.save(content, "t.pt")
    assert words in refusal(read_model, "t.pt").what


@pytest.mark.parametrize("depth", [15, 16])
def test_containers_may_lie_so_deep_in_each_other_and_no_deeper(folder: Path, depth: int) -> None:
    more: object = 1
    for _ in range(depth - 1):
        more = [more]
    torch.save({"state_dict": {"w": torch.ones(1)}, "more": more}, "t.pt")
    if depth == 15:
        assert read_model("t.pt").tensors.keys() == {"w"}
    else:
        assert "nested deeper than allowed" in refusal(read_model, "t.pt").what


def test_a_file_cannot_write_to_the_terminal_through_a_message(folder: Path) -> None:
    torch.save({"w\x1b[2J": torch.tensor(float("nan"))}, "t.pt")
    assert "the name 'w\\x1b[2J' of a tensor is not plain text." in refusal(read_model, "t.pt").what
    Path("p.pt").write_bytes(b"\x80\x02cos\nsys\x1b[2Jtem\n.")
    assert "\x1b" not in str(refusal(read_model, "p.pt"))
    torch.save({"w": Gone()}, "g.pt")
    raw = Path("g.pt").read_bytes().replace(b"test_checkpoints", b"test_\x1bheckpoints")
    Path("g.pt").write_bytes(raw)
    assert "\x1b" not in str(refusal(read_model, "g.pt"))


def test_tensors_that_lie_over_one_another_do_not_multiply_memory(folder: Path) -> None:
    whole = torch.zeros(4096)
    torch.save({f"w{n}": whole[n:] for n in range(20)}, "t.pt")
    error = refusal(read_model, "t.pt")
    assert "would unpack from" in error.what and "over one another" in error.notes["why"]


def test_an_unreadable_file_is_a_matter_of_permission(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    Path("t.pt").write_bytes(b"x")
    monkeypatch.setattr(disk.os, "open", denied)
    error = refusal(read_model, "t.pt")
    assert isinstance(error, ResourceError) and error.exit_code == 6
    assert error.what == "t.pt could not be read."


def test_a_file_larger_than_the_memory_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    torch.save(small().state_dict(), "t.pt")
    monkeypatch.setattr(torch, "load", full)
    assert isinstance(refusal(read_model, "t.pt"), ResourceError)
    monkeypatch.setattr(disk, "open", full, raising=False)
    error = refusal(read_model, "t.pt")
    assert isinstance(error, ResourceError) and error.exit_code == 6
    assert error.what == "t.pt does not fit into memory."


def test_a_trusted_file_still_holds_plain_tensors_alone(folder: Path) -> None:
    def refused(tensor: Tensor) -> str:
        torch.save({"state_dict": {"w": tensor}, "more": Gone()}, "t.pt")
        digest = hashlib.sha256(Path("t.pt").read_bytes()).hexdigest()
        return refusal(read_model, "t.pt", trust=[digest]).what

    assert refused(torch.eye(2).to_sparse()) == 't.pt: "w" is not a plain tensor (sparse_coo, cpu).'
    assert refused(torch.ones(1).expand(9)) == 't.pt: "w" is larger than its storage.'


def test_a_tensor_whose_numbers_are_stored_conjugated_is_refused(folder: Path) -> None:
    torch.save({"w": torch.ones(2, dtype=torch.complex64).conj()}, "t.pt")
    assert refusal(read_model, "t.pt").notes["why"] == "a tensor with conjugate or negative bits"


def test_a_checkpoint_may_name_the_device_it_was_trained_on(folder: Path) -> None:
    content = {"state_dict": small().state_dict(), "device": torch.device("cuda", 0)}
    torch.save(content, "t.pt")
    assert equal(read_model("t.pt").tensors, dict(small().state_dict()))


def test_a_file_with_too_many_tensors_or_too_long_a_pickle_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.ones(1), "b": torch.ones(1)}, "t.pt")
    monkeypatch.setattr(reader, "MAX_TENSORS", 1)
    assert refusal(read_model, "t.pt").what == "t.pt holds 2 tensors; 1 are allowed."
    monkeypatch.setattr(pickles, "MAX_TENSORS", 1)
    assert refusal(read_model, "t.pt").notes["why"] == "it holds more than 1 tensors"
    monkeypatch.setattr(pickles, "MAX_ITEMS", 3)
    assert refusal(read_model, "t.pt").notes["why"] == "it holds too many items"
    monkeypatch.setattr(reader, "MAX_PICKLE", 100)
    assert refusal(read_model, "t.pt").what.startswith("t.pt: its pickle has ")


# --- weights and architecture -------------------------------------------------------------------


def test_weights_without_an_architecture_name_the_flag(folder: Path) -> None:
    torch.save(small().state_dict(), "s.pt")
    error = refusal(load_model, "s.pt", flag="--student-arch")
    assert isinstance(error, UsageError) and error.exit_code == 2
    assert error.what == "s.pt holds weights only; the architecture is missing."
    assert "--student-arch timm/resnet18" in error.notes["fix"]


def test_weights_that_do_not_fit_show_the_first_names_that_differ(folder: Path) -> None:
    state = dict(small().state_dict())
    for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias"):
        state[f"old.{name}"] = state.pop(name)
    torch.save(state, "s.pt")
    error = refusal(load_model, "s.pt", arch="test/small,num_classes=7")
    assert isinstance(error, ModelFileError) and error.exit_code == 3
    assert error.what == (
        'the weights of s.pt do not fit "test/small,num_classes=7": '
        "4 missing, 4 unexpected, 2 of another shape."
    )
    assert error.notes["missing"] == "conv.weight, conv.bias, norm.weight, … 1 more"
    assert error.notes["unexpected"].startswith("old.conv.weight, old.conv.bias")
    assert error.notes["shapes"].splitlines() == [
        "head.weight 4x108 in the file, 7x108 in test/small,num_classes=7",
        "head.bias 4 in the file, 7 in test/small,num_classes=7",
    ]
    assert "--teacher-arch" in error.notes["fix"]


def test_weights_from_before_batch_counters_still_load(folder: Path) -> None:
    state = {k: v for k, v in small().state_dict().items() if not k.endswith("batches_tracked")}
    torch.save(state, "s.pt")
    assert isinstance(load_model("s.pt", arch="test/small").model, Small)


def test_an_architecture_typed_by_the_user_wins_over_that_of_the_file(folder: Path) -> None:
    save_model(small(), "m.safetensors", CARD)
    loaded = load_model("m.safetensors", arch="test/small")
    assert loaded.card.arch == "test/small"
    assert loaded.card.class_names == CARD.class_names


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("py:os:system", "asks to run 'py:os:system'; a weight file never names code."),
        ("resnet18", 'says it is a "resnet18", but not of which library.'),
        ("test/small,checkpoint_path=x", "leads outside of it"),
        ("test/small,weights=IMAGENET", "leads outside of it"),
        ("test/../../x", "leads outside of it"),
        ("test/hf-hub:someone/x", "leads outside of it"),
        ("test/small,width='a/b'", "leads outside of it"),
        ("test/small,width", "names an architecture that cannot be read"),
    ],
)
def test_an_architecture_inside_a_file_never_leads_to_code(
    folder: Path, arch: str, words: str
) -> None:
    save_model(small(), "m.safetensors", ModelCard(arch=arch))
    error = refusal(load_model, "m.safetensors", flag="--student-arch")
    assert isinstance(error, ModelFileError) and error.exit_code == 3
    assert words in error.what
    if arch.startswith("py:"):
        assert f"--student-arch '{arch}'" in error.notes["fix"]


def test_pretrained_weights_are_not_fetched_for_a_file_that_has_its_own(folder: Path) -> None:
    card = ModelCard(arch="test/small,pretrained=true,width=3")
    save_model(small(), "m.safetensors", card)
    assert load_model("m.safetensors").card.arch == "test/small,width=3"


def test_the_class_count_of_a_file_reaches_the_factory(folder: Path) -> None:
    card = ModelCard(arch="test/small", num_classes=9)
    save_model(small(num_classes=9), "m.safetensors", card)
    assert load_model("m.safetensors", num_classes=4).card.num_classes == 9


def test_a_damaged_card_is_a_damaged_file(folder: Path) -> None:
    for text in ("{", "[]", '{"num_classes": 0}', '{"tied": {"a": "absent"}}', "[" * 100_000):
        write_tensors({"w": torch.ones(1)}, "m.safetensors", {store.CARD_KEY: text})
        assert (
            "m.safetensors is damaged: its card cannot be read"
            in refusal(read_model, "m.safetensors").what
        )


# --- model strings ------------------------------------------------------------------------------


def test_a_model_string_builds_the_model(folder: Path) -> None:
    loaded = load_model("test/small,width=5", num_classes=7)
    assert isinstance(loaded, Loaded) and isinstance(loaded.model, Small)
    assert loaded.model.head.out_features == 7 and loaded.model.conv.out_channels == 5
    assert (loaded.name, loaded.sha256, loaded.card.num_classes) == ("small", None, 7)
    assert not loaded.model.training


def test_a_factory_that_tells_no_arguments_is_given_none(folder: Path) -> None:
    code = "import functools\nfrom torch import nn\nbuild = functools.partial(max, [nn.ReLU()])\n"
    (folder / "silent.py").write_text(code)
    assert isinstance(build("py:silent.py:build", num_classes=7), nn.ReLU)


def test_a_refusal_by_a_factory_reaches_the_user_unchanged(folder: Path) -> None:
    code = "from kdsurgeon.errors import UsageError\ndef build(): raise UsageError('too deep.')\n"
    (folder / "refusing.py").write_text(code)
    assert str(refusal(build, "py:refusing.py:build")) == "too deep."


def test_a_file_of_the_user_may_clear_the_import_path_itself(folder: Path) -> None:
    before = list(sys.path)
    code = "import sys\nfrom torch import nn\nsys.path.pop(0)\nbuild = nn.ReLU\n"
    (folder / "clearing.py").write_text(code)
    assert isinstance(build("py:clearing.py:build"), nn.ReLU)
    assert sys.path == before


def test_the_class_count_of_the_string_is_kept(folder: Path) -> None:
    model = build("test/small,num_classes=3", num_classes=7)
    assert isinstance(model, Small) and model.head.out_features == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("3", 3), ("-3", -3), ("0.5", 0.5), ("1e-3", 1e-3), (".5", 0.5), ("5.", 5.0)),
        *(("true", True), ("False", False), ("null", None), ("~", None), ("relu", "relu")),
        *(("'true'", "true"), ('"a,b"', "a,b"), ("010", 10), ("1_000", "1_000"), ("''", "")),
        *(("1e", "1e"), ("0x10", "0x10"), ("a=b", "a=b"), ("tRUE", "tRUE")),
    ],
)
def test_arguments_are_plain_scalars(text: str, value: object) -> None:
    found = specs.parse(f"test/small,x={text},y=1").arguments
    assert found == {"x": value, "y": 1}
    assert type(found["x"]) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("resnet50", '"resnet50" is neither a file nor a model string.'),
        ("hf-hub:org/name", "is neither a file nor a model string."),
        ("test/", "is neither a file nor a model string."),
        ("test/small,width", '"width" in "test/small,width" is not key=value.'),
        ("test/small,wi dth=3", "is not key=value"),
        ("test/small,width=3,width=4", "gives width twice"),
        ("test/small,", "has an open quote or a comma too many"),
        ("test/small,,a=1", "has an open quote or a comma too many"),
        ("test/small,a='x", "has an open quote or a comma too many"),
        ("", "has an open quote or a comma too many"),
        ("py:module", '"py:module" names no factory.'),
        ("py::factory", "names no factory"),
        ("py:module:not a name", "names no factory"),
        ("tset/small", 'no model is called "tset".'),
        ("test/list", '"test/list" made list, not a torch.nn.Module.'),
        ("crash/unknown", "test has no model unknown."),
        ("py:absent_module_xyz:f", 'needs the module "absent_module_xyz", which is not installed.'),
        ("py:absent.py:f", "absent.py does not exist."),
        ("py:user.py:bulid", '"user.py" has no factory "bulid".'),
        ("py:user.py:number", "names int, which cannot be called."),
        ("py:user.py:text", "made str, not a torch.nn.Module."),
        ("py:user.py:fail", 'the factory of "py:user.py:fail" failed.'),
        ("py:user.py:build,depth=3", "failed."),
        ("py:broken.py:build", 'importing "broken.py" failed.'),
        ("py:leaving.py:build", 'importing "leaving.py" failed.'),
        ("py:needy.py:build", 'needs the module "absent_module_xyz"'),
    ],
)
def test_a_model_string_that_leads_nowhere_says_where_it_broke(
    folder: Path, text: str, words: str
) -> None:
    write_user_files(folder)
    error = refusal(build, text)
    assert isinstance(error, UsageError) and error.exit_code == 2
    assert words in error.what


def write_user_files(folder: Path) -> None:
    user = "from torch import nn\nfrom sibling import width\nnumber = 3\nready = nn.ReLU()\n"
    user += "def build(size=2): return nn.Linear(size, width)\n"
    user += "def text(): return 'x'\ndef fail(): raise ValueError('no')\n"
    (folder / "user.py").write_text(user)
    (folder / "sibling.py").write_text("width = 3\n")
    (folder / "broken.py").write_text("def build(:\n")
    (folder / "leaving.py").write_text("raise SystemExit(3)\n")
    (folder / "needy.py").write_text("import absent_module_xyz\n")


def test_nearest_names_are_offered(folder: Path) -> None:
    write_user_files(folder)
    assert refusal(build, "tset/small").notes["fix"] == 'did you mean "test"?'
    error = refusal(build, "py:user.py:bulid")
    assert error.notes["fix"] == 'did you mean "build"?'
    assert "fail" in error.notes["offers"]


def test_a_plugin_that_crashes_is_named(folder: Path) -> None:
    error = refusal(build, "crash/anything")
    assert isinstance(error, PluginError) and error.exit_code == 7
    assert error.what == 'the model source "crash" failed on "crash/anything".'
    assert error.notes["why"] == "RuntimeError: boom"


def test_a_factory_in_a_file_or_module_of_the_user_is_called(folder: Path) -> None:
    write_user_files(folder)
    before = list(sys.path)
    made = build("py:user.py:build,size=5", num_classes=7)
    assert isinstance(made, nn.Linear) and made.in_features == 5
    assert isinstance(build("py:user:ready"), nn.ReLU)
    assert sys.path == before
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "far.py").write_text("from torch.nn import Identity\n")
    assert isinstance(build(f"py:{folder}/elsewhere/far.py:Identity"), nn.Identity)
    for name in ("user", "sibling"):
        sys.modules.pop(name, None)


def test_files_and_model_strings_are_told_apart(folder: Path) -> None:
    torch.save(small().state_dict(), "plain")
    (folder / "test").mkdir()
    expected = {"plain": True, "absent.pt": True, "x/absent.safetensors": True, "test": True}
    expected |= {"test/small": False, "py:user.py:build": False, "tset/small": False, "x": False}
    assert {source: is_file(source) for source in expected} == expected


# --- convert ------------------------------------------------------------------------------------


def objects() -> dict[str, object]:
    return {
        "state_dict": small().state_dict(),
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("x")),
        "best": np.float64(0.5),
        "seen": {1, 2},
        "counts": collections.defaultdict(list, a=[1]),
        "array": np.ones(3),
        "number": complex(1, 2),
    }


def test_convert_takes_the_tensors_and_leaves_the_rest(folder: Path) -> None:
    torch.save(objects(), "t.pt")
    error = refusal(convert, "t.pt", "t.safetensors")
    assert isinstance(error, ModelFileError) and "argparse.Namespace" in error.notes["needs"]
    assert "--drop-extra" in error.notes["fix"]
    assert not Path("t.safetensors").exists()
    done = convert("t.pt", "t.safetensors", drop_extra=True)
    found = read_model("t.safetensors")
    assert equal(found.tensors, dict(small().state_dict()))
    assert (done.key, done.num_tensors) == ("state_dict", len(found.tensors))
    assert done.sha256 == found.sha256
    assert "argparse.Namespace" in done.dropped
    assert 'tensors of t.pt under "state_dict"' in str(done) and "left out: " in str(done)
    assert sorted(p.name for p in folder.iterdir()) == [
        "t.pt",
        "t.safetensors",
        "t.safetensors.manifest.json",
    ]


def test_convert_takes_the_state_dict_out_of_a_pickled_module(folder: Path) -> None:
    model = small()
    torch.save({"epoch": 1, "net": model}, "m.pt")
    done = convert("m.pt", "m.safetensors", drop_extra=True)
    assert done.key == "net"
    assert equal(read_model("m.safetensors").tensors, dict(model.state_dict()))
    loaded = load_model("m.safetensors", arch="test/small")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.model(x), model(x))


def test_convert_reads_the_oldest_and_the_newest_pickles(folder: Path) -> None:
    state = small().state_dict()
    torch.save(state, "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": state, "extra": objects()}, "new.pt", pickle_protocol=5)
    save_model(small(), "own.safetensors", CARD)
    for name, drop in (("old.pt", False), ("new.pt", True), ("own.safetensors", False)):
        convert(name, "out.safetensors", drop_extra=drop)
        assert equal(read_model("out.safetensors").tensors, dict(state)), name
    assert read_model("out.safetensors").card.class_names == CARD.class_names


def test_convert_keeps_views_transposed_and_shared(folder: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"whole": base, "turned": base.T, "row": base[1], "step": base[:, ::2]}
    torch.save({**state, "none": torch.empty(0)}, "v.pt")
    convert("v.pt", "v.safetensors")
    found = read_model("v.safetensors").tensors
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_manifest_holds_the_converted_file_to_its_hash(folder: Path) -> None:
    torch.save(small().state_dict(), "t.pt")
    done = convert("t.pt", "t.safetensors")
    manifest = json.loads(done.manifest.read_text())
    assert manifest["sha256"] == done.sha256
    assert manifest["source"] == {"file": "t.pt", "sha256": done.source_sha256}
    assert str(done).startswith(f"t.safetensors: {manifest['num_tensors']} tensors of t.pt\n")
    assert "left out" not in str(done)
    save_model(small(2), "t.safetensors", CARD)
    error = refusal(read_model, "t.safetensors")
    assert error.what == "t.safetensors is not the file that its manifest describes."
    assert f"manifest.json: {done.sha256[:12]}…" in error.notes["fix"]
    done.manifest.write_text("[")
    assert "is no manifest of kdsurgeon" in refusal(read_model, "t.safetensors").what


def test_convert_refuses_what_reading_refuses(folder: Path) -> None:
    Path("text.pt").write_text("hello")
    torch.save({"epoch": 1}, "empty.pt")
    cases = [
        ("text.pt", ModelFileError, "is text, not a model file."),
        ("empty.pt", ModelFileError, "holds no state dict; its entries are 'epoch'."),
        ("absent.pt", ModelFileError, "absent.pt does not exist."),
        (".", ModelFileError, "is a folder"),
    ]
    for name, kind, words in cases:
        error = refusal(convert, name, "out.safetensors")
        assert type(error) is kind and words in error.what
    error = refusal(convert, "text.pt", "out.pt")
    assert isinstance(error, UsageError) and "should end in .safetensors" in error.what
    assert sorted(p.name for p in folder.iterdir()) == ["empty.pt", "text.pt"]


def test_convert_into_a_folder_that_is_not_there_is_a_matter_of_disk(folder: Path) -> None:
    torch.save(small().state_dict(), "t.pt")
    error = refusal(convert, "t.pt", "absent/t.safetensors")
    assert isinstance(error, ResourceError) and error.exit_code == 6


def test_convert_is_stopped_when_it_takes_too_long(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(small().state_dict(), "t.pt")
    monkeypatch.setattr(conversion, "SECONDS", 0.01)
    error = refusal(convert, "t.pt", "t.safetensors")
    assert isinstance(error, ResourceError) and "stopped" in error.what


def test_a_child_that_dies_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(small().state_dict(), "t.pt")
    monkeypatch.setattr(conversion, "_BOOT", "import os; os.kill(os.getpid(), 9)")
    error = refusal(convert, "t.pt", "t.safetensors")
    assert isinstance(error, ModelFileError) and "ended its process (code -9)" in error.what
    assert [p.name for p in folder.iterdir()] == ["t.pt"]


def test_convert_says_why_its_process_does_not_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    torch.save(small().state_dict(), "t.pt")
    monkeypatch.setattr(conversion.subprocess, "run", full)
    error = refusal(convert, "t.pt", "t.safetensors")
    assert isinstance(error, ResourceError) and error.what == "t.pt could not be read."
    assert error.notes["why"] == "Cannot allocate memory"


def test_convert_is_refused_more_memory_than_a_file_of_that_size_needs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.zeros(15 << 20)}, "t.pt")
    less = "; child.__globals__['SPARE_MEMORY'] = -160 << 20; child("
    monkeypatch.setattr(conversion, "_BOOT", conversion._BOOT.replace("; child(", less))
    error = refusal(convert, "t.pt", "t.safetensors")
    assert isinstance(error, ResourceError) and error.what == "t.pt needs too much memory."
    assert [p.name for p in folder.iterdir()] == ["t.pt"]


def taken(name: str, *, drop: bool = False) -> dict[str, Tensor]:
    """The tensors that ``convert`` takes out of a file, in this process and not in its own."""
    conversion._convert(Path(name).read_bytes(), name, Path("taken.safetensors"), drop)
    return read_model("taken.safetensors").tensors


class Keyed:
    """Is made anew from a keyword, for which pickle has an opcode of its own."""

    def __new__(cls, *, width: int) -> Keyed:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"width": 3}


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_convert_passes_over_whatever_pickle_can_write(folder: Path, protocol: int) -> None:
    pair, five = ([],), ([], 1, 2, 3, 4)
    pair[0].append(pair)
    five[0].append(five)
    extra = {"in themselves": [pair, five], "sets": [{1, 2}, frozenset({3})], "long": 1 << 3000}
    extra |= {"bytes": [b"a", b"b" * 300, bytearray(b"c")], "texts": ["d", "e" * 300], "is": True}
    content = {"extra": extra, "keyed": Keyed(width=3), **objects()}  # the weights behind those
    torch.save(content, "t.pt", pickle_protocol=protocol)
    assert equal(taken("t.pt", drop=True), dict(small().state_dict()))


@pytest.mark.parametrize("protocol", [2, 5])
def test_convert_leaves_out_what_a_module_does_not_save(folder: Path, protocol: int) -> None:
    model = nn.Sequential(small(), nn.Linear(2, 2, bias=False))
    model.add_module("removed", None)
    torch.save(model, "m.pt", pickle_protocol=protocol)
    assert equal(taken("m.pt", drop=True), dict(model.state_dict()))


def test_convert_names_what_lies_among_the_weights(folder: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2), "n": 3, 5: torch.ones(1)}}, "t.pt")
    error = refusal(taken, "t.pt")
    assert error.what == "t.pt holds more than tensors among its weights: ['n', 5]."
    assert error.notes["fix"] == "leave them out: --drop-extra"
    assert taken("t.pt", drop=True).keys() == {"w"}
    torch.save({"state_dict": {5: torch.ones(1)}}, "t.pt")
    assert refusal(taken, "t.pt", drop=True).what == "t.pt holds no tensors."


def test_convert_takes_no_more_memory_where_tensors_share_one_storage(folder: Path) -> None:
    whole = torch.arange(1e6)
    torch.save({f"w{n:02}": part for n, part in enumerate(whole.chunk(100))}, "t.pt")
    tracemalloc.start()
    try:
        found = taken("t.pt")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert torch.equal(torch.cat([found[name] for name in sorted(found)]), whole)
    assert peak < 8 * whole.nbytes


def _big_endian(raw: bytes) -> bytes:
    place = raw.index(b"little_endian") + 15  # behind the word and where it is kept
    return raw[:place] + b"\x89" + raw[place + 1 :]


def _another_count(raw: bytes) -> bytes:
    return raw[:-12] + (3).to_bytes(8, "little") + raw[-4:]


LEGACY = {
    "big-endian": (_big_endian, "old.pt was written on a big-endian machine"),
    "another count": (_another_count, "its storages are not those it describes"),
    "cut off": (lambda raw: raw[:-1], "old.pt is damaged: it is cut off."),
    "followed": (lambda raw: raw + b"x", "old.pt is damaged: it is cut off."),
}


@pytest.mark.parametrize("name", LEGACY)
def test_convert_refuses_a_damaged_file_of_old_torch(folder: Path, name: str) -> None:
    damage, words = LEGACY[name]
    torch.save({"w": torch.ones(1)}, "old.pt", _use_new_zipfile_serialization=False)
    raw = Path("old.pt").read_bytes()
    assert damage(raw) != raw
    Path("old.pt").write_bytes(damage(raw))
    assert words in refusal(taken, "old.pt").what


# --- arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back_as_numpy_wrote_them(folder: Path, save: Callable[..., None]) -> None:
    made = {
        "images": np.arange(48, dtype=np.uint8).reshape(3, 4, 4),
        "labels": np.array([1, 2, 3]),
        "names": np.array(["a", "bé"]),
        "turned": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar": np.float32(2),
        "empty": np.zeros((0, 4)),
    }
    save("d.npz", **made)
    found = read_arrays("d.npz")
    assert found.keys() == made.keys()
    for name, array in made.items():
        assert np.array_equal(found[name], array) and found[name].dtype == np.asarray(array).dtype
    found["images"][0] = 0  # a caller may write into what it got


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not a zip", "d.npz is not an .npz archive."),
        (b"", "d.npz is not an .npz archive."),
        (b"PK\3\4 cut off", "d.npz is damaged"),
    ],
)
def test_what_is_no_array_archive_is_a_data_error(folder: Path, content: bytes, words: str) -> None:
    Path("d.npz").write_bytes(content)
    error = refusal(read_arrays, "d.npz")
    assert isinstance(error, DataError) and error.exit_code == 4
    assert words in error.what


def test_arrays_that_are_damaged_or_no_arrays_are_named(folder: Path) -> None:
    def refused(name: str, content: bytes) -> str:
        with zipfile.ZipFile("d.npz", "w") as made:
            made.writestr(name, content)
        return refusal(read_arrays, "d.npz").what

    assert 'holds "readme.txt", which is no numpy array' in refused("readme.txt", b"x")
    assert "its header is not a numpy header" in refused("a.npy", b"x" * 200)
    header = (
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999,)}"
    )
    assert "does not fit its content" in refused("a.npy", header.ljust(127) + b"\n" + bytes(64))
    assert isinstance(refusal(read_arrays, "absent.npz"), DataError)


@pytest.mark.parametrize(
    ("kind", "shape", "size"),
    [
        *(("<f8", "(-1, -1)", 8), ("<f8", "(0, -1)", 0), ("<f8", "(True, 1)", 8)),
        *(("<f8", f"(0, {1 << 70})", 0), ("<f8", f"(0, {1 << 62}, 4)", 0)),
        *(("<f8", f"({'0,' * 65})", 0), ("<U0", "(10,)", 0)),
    ],
)
def test_an_array_of_an_impossible_shape_is_damaged(
    folder: Path, kind: str, shape: str, size: int
) -> None:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".ljust(255) + "\n"
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    with zipfile.ZipFile("d.npz", "w") as made:
        made.writestr("a.npy", start + header.encode() + bytes(size))
    error = refusal(read_arrays, "d.npz")
    assert isinstance(error, DataError) and "does not fit its content" in error.what


def test_arrays_packed_wrongly_or_by_another_program_are_damaged(folder: Path) -> None:
    np.savez_compressed("d.npz", a=np.arange(99))
    raw = Path("d.npz").read_bytes()
    [record] = archive.read_records(raw, "d.npz")
    spoilt = raw[: record.start] + b"\xff" * record.packed + raw[record.start + record.packed :]
    Path("d.npz").write_bytes(spoilt)
    words = 'd.npz is damaged: record "a.npy": it does not unpack.'
    assert refusal(read_arrays, "d.npz").what == words
    with zipfile.ZipFile("d.npz", "w", zipfile.ZIP_LZMA) as made:
        made.writestr("a.npy", b"x")
    assert "it is packed in a way numpy never uses" in refusal(read_arrays, "d.npz").what


def test_the_examples_in_the_docstrings_hold() -> None:
    for module in (arrays, specs, store):
        found = doctest.testmod(module)
        assert found.attempted > 0 and found.failed == 0


def test_the_hash_of_a_model_tells_its_names_apart():
    class Two(nn.Module):
        def __init__(self, *names):
            super().__init__()
            for value, name in enumerate(names):
                self.register_buffer(name, torch.full((2,), float(value)))

    assert model_hash(Two("a", "b")) == model_hash(Two("a", "b"))
    assert len({model_hash(Two(*names)) for names in (("a", "b"), ("a", "c"), ("b", "a"))}) == 3


def test_the_hash_of_a_model_is_that_of_its_tensors():
    assert model_hash(WithExtra()) == hashlib.sha256(b"WithExtra()").hexdigest()


def test_a_header_too_long_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "long.safetensors"
    file.write_bytes((10**9).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelFileError, match="announces a header of 1,000,000,000 bytes"):
        read_tensors(file)
