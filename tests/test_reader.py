"""Where exactly the gate for model files draws its lines: just allowed, and just not."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
import torch
from torch import Tensor

from kdsurgeon.checkpoints import ModelCard, archive, disk, model_hash, pickles, reader, store
from kdsurgeon.checkpoints.archive import Record, read_records
from kdsurgeon.checkpoints.pickles import Storage, View
from kdsurgeon.errors import ModelFileError, ResourceError, UsageError

HASH = "0123456789abcdef" * 4


def packed(contents: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return stream.getvalue()


def opened(contents: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    raw = packed(contents, method)
    return reader.open_checkpoint(read_records(raw, "net.pt"), raw, "net.pt")


def test_the_pickle_of_an_archive_is_found_and_as_large_as_is_allowed(monkeypatch):
    contents = {"net/data.pkl": b"12345", "net/byteorder": b"little", "net/data/0": b""}
    assert opened(contents) == b"12345"
    monkeypatch.setattr(reader, "MAX_PICKLE", 5)
    assert opened(contents) == b"12345"
    monkeypatch.setattr(reader, "MAX_PICKLE", 4)
    with pytest.raises(ModelFileError, match=r"net\.pt: its pickle has 5 bytes; refused"):
        opened(contents)


LAYOUTS = {
    "two pickles": ({"net/data.pkl": b"1", "net/a/data.pkl": b"1"}, "2 data.pkl, 1 top folders"),
    "no pickle": ({"net/data/0": b"1"}, "0 data.pkl, 1 top folders"),
    "two tops": ({"net/data.pkl": b"1", "other/data/0": b"1"}, "1 data.pkl, 2 top folders"),
    "a deep pickle": ({"net/a/data.pkl": b"1"}, "1 data.pkl, 1 top folders"),
    "a bare pickle": ({"data.pkl": b"1"}, "1 data.pkl, 1 top folders"),
    "big-endian": ({"net/data.pkl": b"1", "net/byteorder": b"big"}, "on a big-endian machine"),
    "two orders": (
        {"net/data.pkl": b"1", "net/byteorder": b"little", "net/a/byteorder": b"little"},
        "on a big-endian machine",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_archive_of_another_layout_is_refused(name):
    contents, words = LAYOUTS[name]
    with pytest.raises(ModelFileError, match=words):
        opened(contents)


def test_a_packed_record_is_named_with_what_it_would_become():
    with pytest.raises(ModelFileError, match=r"would unpack from \d+ bytes to 2\.0 kB; refused"):
        opened({"net/data.pkl": bytes(2000)}, zipfile.ZIP_DEFLATED)


def test_a_damaged_record_is_found_before_it_is_used():
    raw = bytearray(packed({"net/data.pkl": b"12345"}))
    raw[raw.index(b"12345")] ^= 1
    with pytest.raises(ModelFileError, match="fails its checksum"):
        reader.open_checkpoint(read_records(bytes(raw), "net.pt"), bytes(raw), "net.pt")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_949, "999.9 kB"),
     (1_000_000, "1.0 MB"), (5 * 10**9, "5.0 GB"), (5 * 10**12, "5,000.0 GB")],
)  # fmt: skip
def test_amounts(size, text):
    assert reader._amount(size) == text


def test_more_records_allow_more_steps():
    record = Record("net/data/0", 0, 0, 0, 0, 0, 0)
    assert reader.max_steps(()) == 400_000
    assert reader.max_steps((record,) * 3) == 400_300
    assert reader.max_steps((record,) * 40_000) == reader.MAX_STEPS == 4_000_000


def view(count: int, key: str = "0", dtype: torch.dtype = torch.float32) -> View:
    return View(Storage(key, dtype, count), dtype, 0, (count,), (1,))


def test_a_storage_is_as_large_as_its_record_or_smaller():
    records = (Record("net/data/0", 0, 0, 0, 0, 8, 8),)
    reader.check_storages([view(2), view(2)], records, "net.pt")
    with pytest.raises(ModelFileError, match=r'needs 12 bytes of record "data/0", which has 8'):
        reader.check_storages([view(3)], records, "net.pt")
    with pytest.raises(ModelFileError, match=r'needs 4 bytes of record "data/1", which has 0'):
        reader.check_storages([view(1, "1")], records, "net.pt")
    with pytest.raises(ModelFileError, match="a tensor needs"):
        reader.check_storages([view(2), view(8, dtype=torch.uint8)], records, "net.pt")


@pytest.mark.parametrize(
    ("release", "loads"),
    [("2.9.1", False), ("2.10.0", True), ("2.11.0a0+git1", True), ("3.0", True)],
)  # fmt: skip
def test_a_torch_that_reads_safely_is_needed(release, loads, monkeypatch):
    stream = io.BytesIO()
    torch.save({"w": torch.ones(2)}, stream)
    monkeypatch.setattr(reader.torch, "__version__", release)
    if loads:
        assert reader._load(stream.getvalue(), "net.pt", safely=True)["w"].tolist() == [1, 1]
        return
    with pytest.raises(ModelFileError, match=r"torch 2\.9\.1 cannot read \.pt files safely"):
        reader._load(stream.getvalue(), "net.pt", safely=True)


@pytest.mark.parametrize("count", [11, 12, 64, 65])
def test_trust_is_a_hash_of_12_to_64_digits(count):
    digits = (HASH + HASH)[:count]
    if count in (12, 64):
        assert reader._trusted_hash(f"sha256:{digits.upper()}") == digits
        return
    with pytest.raises(UsageError, match="does not name a file"):
        reader._trusted_hash(f"sha256:{digits}")


def test_a_manifest_is_read_up_to_its_limit(tmp_path, monkeypatch):
    path, manifest = tmp_path / "net.pt", tmp_path / "net.pt.manifest.json"
    reader.check_manifest(path, HASH)  # there is none
    text = json.dumps({"sha256": HASH})
    manifest.write_text(text)
    monkeypatch.setattr(reader, "MAX_MANIFEST", len(text))
    reader.check_manifest(path, HASH)
    with pytest.raises(
        ModelFileError, match=f"expected sha256 .* {HASH[:12]}…, found: {'f' * 12}…"
    ):
        reader.check_manifest(path, "f" * 64)
    monkeypatch.setattr(reader, "MAX_MANIFEST", len(text) - 1)
    with pytest.raises(ModelFileError, match="is no manifest of kdsurgeon"):
        reader.check_manifest(path, HASH)


def nested(depth: int) -> object:
    """Weights in so many containers; the state itself is the first."""
    found: object = torch.ones(1)
    for level in range(depth):
        found = {f"{level}": found} if level % 2 == 0 else [found]
    return found


def test_containers_may_lie_sixteen_deep():
    assert [reader._depth(nested(depth)) for depth in (1, 2, 15)] == [2, 3, 16]
    assert reader._depth(nested(16)) == reader._depth(nested(40)) == reader.MAX_DEPTH + 1
    loop: list = []
    loop.append(loop)
    assert reader._depth(loop) < reader.MAX_DEPTH


def test_entries_that_mean_something_else_are_passed_over():
    card = reader.foreign_card({"arch": 7, "mean": [0.5], "std": "no", "num_classes": 3})
    assert card == ModelCard(mean=(0.5,), num_classes=3)
    short, long = torch.full((16,), 0.5), torch.full((17,), 0.5)
    assert reader.foreign_card({"mean": short}).mean == (0.5,) * 16
    assert reader.foreign_card({"mean": long}) == ModelCard()
    assert reader.foreign_card({"provenance": {"teacher": "x"}}) == ModelCard()
    assert reader.foreign_card({"crop_pct": 0.9, "interpolation": "bicubic"}) == ModelCard(
        crop_pct=0.9, interpolation="bicubic"
    )


@pytest.mark.parametrize(
    ("entry", "value"),
    [("crop_pct", 0.0), ("crop_pct", 1.1), ("crop_pct", "1"), ("interpolation", "lanczos")],
)
def test_a_card_cannot_say_how_no_image_is_resized(entry, value):
    with pytest.raises(UsageError, match=f"a model card cannot say {entry} = "):
        ModelCard(**{entry: value})


# Tensors


def check(tensors: dict[str, Tensor], size: int = 1 << 20, **flags: bool) -> None:
    reader.check_tensors(tensors, "net.pt", size, **{"allow_nonfinite": False, **flags})


def test_as_many_axes_and_tensors_as_are_allowed(monkeypatch):
    check({"w": torch.ones([1] * 64)})
    with pytest.raises(ModelFileError, match=r'"w" has 65 axes; refused'):
        check({"w": torch.ones([1] * 65)})
    monkeypatch.setattr(reader, "MAX_TENSORS", 2)
    check({"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(ModelFileError, match="holds 3 tensors; 2 are allowed"):
        check({name: torch.ones(1) for name in "abc"})
    with pytest.raises(ModelFileError, match="holds no tensors"):
        check({})


def test_tensors_may_hold_eight_times_the_size_of_their_file():
    weights = torch.ones(4).expand(8, 4).contiguous()  # 128 bytes
    check({"w": weights}, size=16)
    with pytest.raises(ModelFileError, match="would unpack from 15 bytes to 128 bytes; refused"):
        check({"w": weights}, size=15)


def test_only_plain_tensors_within_their_storage_are_taken():
    for tensor, words in (
        (torch.ones(2, 2).to_sparse(), r"is not a plain tensor \(sparse_coo, cpu\)"),
        (torch.ones(2, device="meta"), r"is not a plain tensor \(strided, meta\)"),
        (torch.ones(2).expand(3, 2), "is larger than its storage"),
    ):
        with pytest.raises(ModelFileError, match=f'"w" {words}'):
            check({"w": tensor})
    with pytest.raises(ModelFileError, match="of a tensor is not plain text"):
        check({"w\n": torch.ones(1)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex64]
)
def test_every_number_must_be_finite(dtype, value):
    good = torch.tensor([0.0, 2.0]).to(dtype)
    check({"w": good, "none": torch.ones(0), "count": torch.tensor(3), "is": torch.tensor(True)})
    bad = torch.tensor([0.0, value]).to(dtype)
    check({"w": bad}, allow_nonfinite=True)
    with pytest.raises(ModelFileError, match=r"holds NaN or infinite weights: w\."):
        check({"w": bad})


@pytest.mark.parametrize(("count", "shown"), [(3, r"a, b, c\."), (4, r"a, b, c \(\+1 more\)\.")])
def test_three_bad_weights_are_named(count, shown):
    with pytest.raises(ModelFileError, match=f"infinite weights: {shown}"):
        check({name: torch.tensor(float("nan")) for name in "abcd"[:count]})


@pytest.mark.parametrize(("count", "shown"), [(4, "a, b, c, d"), (6, "a, b, c, d (+2 more)")])
def test_four_objects_are_named(count, shown):
    refused = reader._refuse_objects("net.pt", list("abcdef"[:count]), HASH)
    assert refused.notes["needs"] == shown
    assert f"sha256:{HASH[:12]}" in refused.notes["fix"].splitlines()[-1]


def test_what_is_found_instead_of_weights_is_told():
    described = [
        reader._describe(value) for value in ({}, {"a": 1}, dict.fromkeys("abcde", 0), [1])
    ]
    assert described == [
        "a dict without weights (empty)",
        "a dict without weights ('a')",
        "a dict without weights ('a', 'b', 'c', 'd')",
        "a list",
    ]


@pytest.mark.parametrize(
    ("names", "bare"),
    [
        (["module.a", "module.b"], ["a", "b"]),
        (["_orig_mod.module.a"], ["a"]),
        (["module._orig_mod.a"], ["a"]),
        (["module.a", "b"], ["module.a", "b"]),
    ],
)
def test_prefixes_that_all_names_carry_are_left_out(names, bare):
    assert list(reader.strip_prefixes(dict.fromkeys(names, 0))) == bare


def test_a_legacy_file_that_is_trusted_is_loaded_with_its_objects(tmp_path):
    path = tmp_path / "old.pt"
    net = torch.nn.Linear(2, 3)
    torch.save({"model": net, "arch": "demo/student"}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelFileError, match=r"in the format of torch before 1\.6") as refused:
        reader.read_model(path)
    (trust,) = [word for word in refused.value.notes["fix"].split() if word.startswith("sha256:")]
    assert len(trust) == len("sha256:") + 12
    found = reader.read_model(path, trust=[trust])
    assert found.module is not None and torch.equal(found.tensors["weight"], net.weight)
    assert (found.key, found.card.arch) == ("model", "demo/student")


def test_weights_of_other_things_are_named_up_to_three(tmp_path):
    state = {name: torch.ones(1) for name in "ab"} | dict.fromkeys("vwxyz", 3)
    with pytest.raises(ModelFileError, match=r"among its weights: 'v', 'w', 'x'\."):
        reader._from_objects(state, tmp_path / "net.pt", HASH)
    deep = {"state_dict": {"a": torch.ones(1)}, "more": nested(16)}
    with pytest.raises(ModelFileError, match="nested deeper than allowed"):
        reader._from_objects(deep, tmp_path / "net.pt", HASH)
    assert reader._describe({"k" * 50: 1}) == f"a dict without weights ('{'k' * 39})"


def test_the_limits_are_those_that_are_promised():
    assert (pickles.MAX_PICKLE, pickles.MAX_STEPS, pickles.MAX_ITEMS) == (
        2**26,
        4 * 10**6,
        4 * 10**6,
    )
    assert (reader.MAX_DEPTH, reader.MAX_AXES, reader.MAX_OVERLAP) == (16, 64, 8)
    assert (reader.MAX_TENSORS, archive.MAX_RECORDS, reader.MAX_MANIFEST) == (
        10**5,
        2 * 10**5,
        2**20,
    )
    assert (store.MAX_HEADER, disk.BATCH) == (2**24, 2**20)


# Writing


@pytest.mark.parametrize(
    ("sizes", "batches"),
    [([1, 2], [3]), ([3, 8, 1], [3, 8, 1]), ([8, 8], [8, 8]), ([7, 1, 1], [8, 1]),
     ([9, 20], [9, 20]), ([4, 4, 4], [8, 4]), ([], [])],
)  # fmt: skip
def test_small_chunks_are_gathered_in_their_order(sizes, batches, monkeypatch):
    monkeypatch.setattr(disk, "BATCH", 8)
    chunks = [bytes([65 + index]) * size for index, size in enumerate(sizes)]
    found = [bytes(each) for each in disk._batched(list(chunks))]
    assert b"".join(found) == b"".join(chunks)
    assert list(map(len, found)) == batches


def test_what_a_full_disk_needs_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_space", lambda _: 38_000_000)
    error = OSError(28, "No space left on device")
    told = disk.cannot_write(tmp_path / "x", error, needs=101_500_000)
    assert isinstance(told, ResourceError)
    assert told.notes["room"] == "it needs 102 MB, 38 MB are free"
    assert "room" not in disk.cannot_write(tmp_path / "x", OSError(13, "no"), needs=1).notes
    nameless = disk.cannot_write(tmp_path / "x", OSError("odd"), needs=1).notes
    assert (nameless["why"], nameless.get("fix")) == ("odd", None)


@pytest.mark.parametrize(
    ("count", "text"),
    [(9_999_999, "10,000 kB"), (10_000_000, "10 MB"), (10_000_001, "11 MB"), (1, "1 kB")],
)
def test_bytes_in_words_are_rounded_up(count, text):
    assert disk.in_words(count) == text


def test_the_hash_of_a_model_is_of_its_modules_and_all_its_values():
    def net(width: int = 3) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.BatchNorm1d(width))

    one, moved, buffer = net(), net(), net()
    with torch.no_grad():
        moved[0].bias[0] += 1e-6
        buffer[1].running_mean[0] = 1e-6
    hashes = [model_hash(each) for each in (one, net(), moved, buffer, net(4))]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4
    renamed = torch.nn.Sequential(*net())
    renamed.weight = torch.nn.Parameter(torch.ones(1))
    assert model_hash(renamed) != hashes[0]
