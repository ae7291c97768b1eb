"""What sources promise: torchvision, Hugging Face and shards, each read to the pixel or refused."""

from __future__ import annotations

import builtins
import io
import json
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest
from kdsurgeon_plugins import arrow, shards
from PIL import Image

from kdsurgeon import plugins
from kdsurgeon.data import Batches, Pictures, load, read_class_map, select_classes
from kdsurgeon.errors import DataError, PluginError
from tests import bootstrap

bootstrap.prepare()


def pixels(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(seed: int, height: int = 8, width: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(stream, "PNG")
    return stream.getvalue()


def refusal(source: object, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load(str(source), **options)
    assert caught.value.exit_code == 4
    return str(caught.value)


# ── shards ───────────────────────────────────────────────────────────────────────────────────────


def tar(path: Path, members: Sequence[tuple[str, bytes]], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as file:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def samples(seeds: range, classes: int = 2) -> list[tuple[str, bytes]]:
    return [
        pair
        for seed in seeds
        for pair in (
            (f"{seed:04d}.png", png(seed)),
            (f"{seed:04d}.cls", b"%d\n" % (seed % classes)),
        )
    ]


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        tar(tmp_path / f"train-{number:03d}.tar", samples(range(5 * number, 5 * number + 5)))
    tar(tmp_path / "val-0.tar", samples(range(100, 104)))
    return tmp_path


@pytest.mark.parametrize("stream", [False, True])
def test_shards_are_read_to_the_pixel(folder, stream):
    source = f"wds:{folder}/train-{{000..002}}.tar?val=val-{{0..0}}.tar"
    split = load(source, stream=stream)
    assert isinstance(split.train.images, Pictures) == stream
    assert (split.train.images[:] == np.stack([pixels(seed) for seed in range(15)])).all()
    assert (split.val.images[:] == np.stack([pixels(seed) for seed in range(100, 104)])).all()
    assert split.train.labels.tolist() == [seed % 2 for seed in range(15)]
    assert split.train.class_names == ("0", "1")
    assert split.train.ids is not None
    assert split.train.ids[6] == "train-001.tar/0006.png"
    assert "the test part serves as the validation part." in split.notes


def test_a_folder_of_shards_stands_for_its_train_and_val(folder):
    split = load(f"wds:{folder}", stream=True)
    assert (len(split.train), len(split.val)) == (15, 4)
    (folder / "val-0.tar").rename(folder / "test-0.tar")
    assert len(load(f"wds:{folder}").val) == 4
    (folder / "test-0.tar").unlink()
    alone = load(f"wds:{folder}", stream=True, val_split=0.2)
    assert (len(alone.train), len(alone.val)) == (12, 3)
    assert isinstance(alone.val.images, Pictures)
    assert alone.val.ids == alone.val.images.ids


def test_classes_beside_the_shards_are_named(folder):
    (folder / "classes.txt").write_text("cat\ndog\n\nemu\n")
    split = load(f"wds:{folder}")
    assert split.train.class_names == ("cat", "dog", "emu")
    assert "classes without any image: emu." in split.notes
    (folder / "classes.txt").write_text("cat\n")
    assert "names 1 classes; the labels go up to 1" in refusal(f"wds:{folder}")


def test_shards_are_served_by_workers_and_window_by_window(folder):
    split = load(f"wds:{folder}", stream=True)
    assert isinstance(split.train.images, Pictures)
    assert split.train.images.groups is not None
    assert split.train.images.groups.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    alone, helped = (
        list(Batches(split.train, 4, shuffle=True, seed=0, augment="crop-flip", workers=workers))
        for workers in (0, 2)
    )
    assert all((a[0] == b[0]).all() for a, b in zip(alone, helped, strict=True))


def test_samples_in_folders_with_other_members_and_long_names_are_found(tmp_path):
    long = "x" * 150
    members = [
        (f"a/{long}.jpg.txt", b"caption"),
        (f"a/{long}.PNG", png(1)),
        (f"a/{long}.cls", b"1"),
        ("b/x.seg.png", png(2)),
        ("b/x.cls", b"0"),
        ("b/x.json", b"{}"),
    ]
    tar(tmp_path / "train-0.tar", members, format=tarfile.PAX_FORMAT)
    found = shards.read(f"{tmp_path}/train-{{0..0}}.tar")
    assert found.train_images.name_of(0) == f"train-0.tar/a/{long}.png"
    assert [found.train_images[0], found.train_images[1]] == [png(1), png(2)]
    assert found.train_labels.tolist() == [1, 0]


SAMPLE = [("a.png", png(0)), ("a.cls", b"0")]
BAD_SHARDS = [
    ([], "t-0.tar holds no sample"),
    ([("a.png", png(0))], "t-0.tar: the sample a has no class"),
    ([("a.cls", b"0")], "t-0.tar: the sample a has no image"),
    ([*SAMPLE, ("a.jpg", b"x")], "the sample a has 2 images"),
    ([("a.png", png(0)), ("a.cls", b"cat")], "the class of a is not a whole number"),
    ([("a.png", png(0)), ("a.cls", b"-1")], "the class of a is not a whole number"),
    ([("a.png", png(0)), ("a.cls", b"9" * 40)], "the class of a is not a whole number"),
    ([*SAMPLE, ("b.png", b""), ("b.cls", b"1")] * 2, "b.png"),
]


@pytest.mark.parametrize(("members", "message"), BAD_SHARDS, ids=[m for _, m in BAD_SHARDS])
def test_a_shard_that_is_no_data_is_refused_by_name(tmp_path, members, message):
    tar(tmp_path / "t-0.tar", members)
    assert message in refusal(f"wds:{tmp_path}/t-{{0..0}}.tar")


def test_a_shard_that_is_cut_off_anywhere_is_refused(tmp_path):
    path = tar(tmp_path / "t-0.tar", samples(range(4)))
    whole = path.read_bytes()
    with tarfile.open(path) as file:
        end = max(member.offset_data + member.size for member in file)
    for length in (0, 100, 512, 700, len(whole) // 2, end - 1, end + (-end) % 512):
        path.write_bytes(whole[:length])
        told = refusal(f"wds:{tmp_path}/t-{{0..0}}.tar")
        assert told.startswith(("t-0.tar is cut off", "t-0.tar: the sample", "t-0.tar holds no"))
    assert told.startswith("t-0.tar is cut off")  # between two samples, before the closing zeros
    tar(path, samples(range(4)))
    import gzip

    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "no plain tar file" in refusal(f"wds:{tmp_path}/t-{{0..0}}.tar")


def test_a_shard_that_shrinks_while_it_is_read_is_named(folder):
    split = load(f"wds:{folder}", stream=True)
    path = folder / "train-002.tar"
    path.write_bytes(path.read_bytes()[:1600])
    with pytest.raises(DataError, match=r"train-002\.tar/0014\.png cannot be read") as caught:
        split.train.images[14]
    assert "is cut off" in caught.value.notes["why"]


def test_a_damaged_member_is_named_or_left_out(tmp_path):
    members = [*samples(range(8)), ("x.png", png(50)[:60]), ("x.cls", b"1")]
    tar(tmp_path / "train-0.tar", members)
    tar(tmp_path / "val-0.tar", samples(range(10, 14)))
    for stream in (True, False):
        split = load(f"wds:{tmp_path}", input_size=(3, 8, 8), max_bad_images=1, stream=stream)
        assert [bad.path for bad in split.bad] == ["train-0.tar/x.png"]
        assert len(split.train) == 8
    assert "train-0.tar/x.png cannot be read" in refusal(f"wds:{tmp_path}", input_size=(3, 8, 8))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wds:{}/none", "the shard {}/none cannot be read"),
        ("wds:{}/x-{{5..3}}.tar", "does not count upwards"),
        ("wds:{}/x-{{0..999}}{{0..999}}{{0..999}}.tar", "stands for 1,000,000,000 shards"),
        ("wds:{}/train-{{000..003}}.tar", "train-003.tar cannot be read"),
        ("wds:{}/train-000.tar?test=val-0.tar", "?test=val-0.tar is not known of shards"),
        ("wds:{}?val=val-0.tar", "names a folder and ?val"),
        ("wds:{}/empty", "has no shards train*.tar"),
    ],
)
def test_a_pattern_that_names_no_shards_is_refused(folder, source, message):
    (folder / "empty").mkdir()
    assert message.format(folder) in refusal(source.format(folder))


def test_members_go_to_a_process_that_shares_no_memory(folder):
    images = shards.read(folder).train_images
    assert pickle.loads(pickle.dumps(images))[3] == images[3]


# ── Hugging Face ─────────────────────────────────────────────────────────────────────────────────

FEATURES = {"photo": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["cat", "dog"]}}


def saved(
    folder: Path,
    seeds: range,
    *,
    files: int = 1,
    features: dict | None = None,
    columns: dict | None = None,
) -> Path:
    """What ``Dataset.save_to_disk`` of datasets 5.2 writes, as far as it is read."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for name, part in zip(names, np.array_split(np.array(seeds), files), strict=True):
        table = pyarrow.table(
            columns
            or {
                "photo": [{"bytes": png(seed), "path": None} for seed in part.tolist()],
                "kind": [seed % 2 for seed in part.tolist()],
            }
        )
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]})
    )
    info = {"features": FEATURES if features is None else features}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def saved_dict(root: Path) -> Path:
    saved(root / "train", range(10), files=3)
    saved(root / "test", range(50, 54))
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return root


@pytest.mark.parametrize("prefix", ["", "hf:"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_dict_of_hugging_face_is_read_to_the_pixel(tmp_path, prefix, stream):
    split = load(f"{prefix}{saved_dict(tmp_path / 'd')}", stream=stream)
    assert (split.train.images[:] == np.stack([pixels(seed) for seed in range(10)])).all()
    assert (split.val.images[:] == np.stack([pixels(seed) for seed in range(50, 54)])).all()
    assert split.train.labels.tolist() == [seed % 2 for seed in range(10)]
    assert split.train.class_names == ("cat", "dog")
    assert split.train.ids is not None
    assert split.train.ids[3] == "train[3]"


def test_one_part_of_hugging_face_is_split(tmp_path):
    split = load(saved(tmp_path / "d", range(20), files=2))
    assert (len(split.train), len(split.val)) == (16, 4)
    assert "it has no test part: a share of each class validates." in split.notes


def test_columns_without_a_type_are_found_by_their_names(tmp_path):
    columns = {"image": [png(seed) for seed in range(6)], "label": [0, 1, 2] * 2}
    split = load(saved(tmp_path / "d", range(6), features={}, columns=columns), val_split=0.5)
    assert split.train.class_names == ("0", "1", "2")


def test_a_column_goes_to_a_process_that_shares_no_memory(tmp_path):
    images = arrow.read(saved_dict(tmp_path / "d")).train_images
    again = pickle.loads(pickle.dumps(images))
    assert [again[row] for row in range(10)] == [png(row) for row in range(10)]


def test_what_hugging_face_did_not_write_is_refused(tmp_path):
    assert "is not a folder" in refusal(f"hf:{tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    assert "state.json is missing or damaged" in refusal(f"hf:{tmp_path / 'empty'}")
    root = saved_dict(tmp_path / "d")
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["test"]}))
    assert "has no part called train" in refusal(root)
    (root / "dataset_dict.json").write_text("{")
    assert "dataset_dict.json is missing or damaged" in refusal(root)
    (root / "dataset_dict.json").write_text("[]")
    assert "holds no table of names" in refusal(root)


def test_damaged_or_missing_arrow_files_are_named(tmp_path):
    root = saved(tmp_path / "d", range(10), files=2)
    file = root / "data-00001-of-00002.arrow"
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], b"nonsense" * 20):
        file.write_bytes(content)
        assert "data-00001-of-00002.arrow is missing, cut off" in refusal(root)
    file.unlink()
    assert "data-00001-of-00002.arrow is missing, cut off" in refusal(root)
    (root / "state.json").write_text("{}")
    assert "names no data file" in refusal(root)


COLUMNS = [
    ({"image": [b"x"] * 4}, "has no column of type ClassLabel"),
    ({"label": [0, 1] * 2}, "has no column of type Image"),
    ({"image": [b"x"] * 4, "label": ["a", "b"] * 2}, "not whole numbers"),
    ({"image": [b"x"] * 4, "label": [0, 1, -1, -1]}, "2 samples have no label"),
    ({"image": [b"x"] * 4, "label": [0, 1, None, 1]}, "not whole numbers"),
    ({"image": [{"bytes": None, "path": "/etc/hosts"}] * 4, "label": [0, 1] * 2}, "holds no image"),
    ({"image": [], "label": pyarrow.array([], pyarrow.int64())}, "holds no sample"),
]


@pytest.mark.parametrize(("columns", "message"), COLUMNS, ids=[m for _, m in COLUMNS])
def test_columns_that_are_no_data_are_refused(tmp_path, columns, message):
    assert message in refusal(saved(tmp_path / "d", range(4), features={}, columns=columns))


def test_parts_that_name_their_classes_differently_are_refused(tmp_path):
    root = saved_dict(tmp_path / "d")
    info = json.loads((root / "test" / "dataset_info.json").read_text())
    info["features"]["kind"]["names"] = ["dog", "cat"]
    (root / "test" / "dataset_info.json").write_text(json.dumps(info))
    assert "train and test name the classes differently" in refusal(root)


@pytest.mark.parametrize(
    ("package", "message"),
    [("pyarrow", "are read with pyarrow"), ("torchvision", "needs torchvision")],
)
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, package, message):
    whole = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return whole(name, *rest)

    root = saved_dict(tmp_path / "d")
    monkeypatch.setattr(builtins, "__import__", without)
    source = root if package == "pyarrow" else f"torchvision/MNIST?root={root}"
    told = refusal(source)
    assert message in told
    assert "pip install" in told


# ── torchvision ──────────────────────────────────────────────────────────────────────────────────


def idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(head + array.tobytes())


def fashion(root: Path) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    labels = (np.arange(40) % 10).astype(np.uint8)
    for part, rows in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
        idx(root / f"FashionMNIST/raw/{part}-images-idx3-ubyte", images[rows])
        idx(root / f"FashionMNIST/raw/{part}-labels-idx1-ubyte", labels[rows])
    return images, labels


def test_arrays_of_torchvision_are_read_to_the_pixel(tmp_path):
    images, labels = fashion(tmp_path)
    split = load(f"torchvision/FashionMNIST?root={tmp_path}")
    assert (split.train.images[..., 0] == images[:30]).all()
    assert (split.val.images[..., 0] == images[30:]).all()
    assert split.val.labels.tolist() == labels[30:].tolist()
    assert split.train.class_names[:2] == ("T-shirt/top", "Trouser")
    assert load(f"torchvision:FashionMNIST?root={tmp_path}").fingerprint == split.fingerprint
    colour = load(f"torchvision/FashionMNIST?root={tmp_path}", input_size=(3, 14, 14))
    assert colour.train.input_size == (3, 14, 14)
    assert "images were resized from 28×28×1 to 14×14×3." in colour.notes


@pytest.mark.parametrize("stream", [False, True])
def test_files_of_torchvision_are_decoded_and_validated_on_its_own_part(tmp_path, stream):
    for part, first in (("train", 0), ("valid", 50), ("test", 90)):
        for label, name in enumerate(("AD", "AE")):
            folder = tmp_path / "country211" / part / name
            folder.mkdir(parents=True)
            for i in range(3):
                (folder / f"{i}.png").write_bytes(png(first + 10 * label + i))
    split = load(f"torchvision/Country211?root={tmp_path}", stream=stream)
    assert (split.train.images[:] == np.stack([pixels(s) for s in (0, 1, 2, 10, 11, 12)])).all()
    assert (split.val.images[:] == np.stack([pixels(s) for s in (50, 51, 52, 60, 61, 62)])).all()
    assert split.train.class_names == ("AD", "AE")


def test_a_set_of_torchvision_without_parts_is_split(tmp_path):
    for label in ("Forest", "River"):
        folder = tmp_path / "eurosat" / "2750" / label
        folder.mkdir(parents=True)
        for i in range(5):
            (folder / f"{i}.jpg").write_bytes(png(i))
    split = load(f"torchvision/EuroSAT?root={tmp_path}")
    assert (len(split.train), len(split.val)) == (8, 2)
    assert split.train.class_names == ("Forest", "River")


def test_what_torchvision_cannot_read_is_refused(tmp_path):
    assert "does not say where the files are" in refusal("torchvision/CIFAR10")
    assert "does not say where the files are" in refusal("torchvision/CIFAR10?root=")
    told = refusal(f"torchvision/CIFAR10?root={tmp_path / 'none'}")
    assert "the root" in told
    assert "is not a folder" in told
    told = refusal(f"torchvision/CIFAR10?root={tmp_path}")
    assert "torchvision/CIFAR10 cannot be read in" in told
    assert "download=True" in told
    told = refusal(f"torchvision/FashonMNIST?root={tmp_path}")
    assert "torchvision has no data set FashonMNIST" in told
    assert "FashionMNIST" in told
    fashion(tmp_path)
    path = tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    assert "cannot be read in" in refusal(f"torchvision/FashionMNIST?root={tmp_path}")


# ── what a plugin returns ────────────────────────────────────────────────────────────────────────

ARRAY = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
SIX = np.array([0, 1] * 3)


@pytest.fixture
def returns(monkeypatch):
    """Let the source ``wds`` be a plugin that returns this."""

    def plug(*found):
        monkeypatch.setattr(plugins, "load", lambda kind, name: lambda path: found)

    return plug


def test_a_plugin_may_leave_its_test_part_out(returns):
    returns(ARRAY, SIX, None, None, ("a", "b"))
    split = load("wds:x", val_split=0.3)
    assert (len(split.train), len(split.val)) == (4, 2)


def test_a_plugin_that_breaks_its_word_is_named(returns):
    for labels in (SIX[:3], SIX / 1, SIX[:, None]):
        returns(ARRAY, labels, None, None, ("a", "b"))
        with pytest.raises(PluginError, match='"wds" gave no label for each image'):
            load("wds:x")
    for labels in (SIX - 1, SIX + 1):
        returns(ARRAY, labels, None, None, ("a", "b"))
        with pytest.raises(DataError, match="the labels run from"):
            load("wds:x")
    returns(ARRAY, SIX, 3)
    with pytest.raises(PluginError, match='the data source "wds" failed on x'):
        load("wds:x")
    returns([], SIX[:0], None, None, ("a", "b"))
    with pytest.raises(DataError, match="a part has no images"):
        load("wds:x")


# ── classes ──────────────────────────────────────────────────────────────────────────────────────


def listed(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_chosen_classes_are_renumbered_in_the_order_of_the_list(tmp_path):
    split = load("digits")
    found = select_classes(split, read_class_map(listed(tmp_path / "c", "7\n\n3\n5\n")))
    assert found.train.class_names == ("7", "3", "5")
    for part, source in ((found.train, split.train), (found.val, split.val)):
        rows = np.flatnonzero(np.isin(source.labels, [7, 3, 5]))
        assert (part.images == source.images[rows]).all()
        digits = np.array([7, 3, 5])[part.labels]
        assert (digits == source.labels[rows]).all()
    assert found.source_classes == split.train.class_names
    assert found.fingerprint != split.fingerprint
    left = 1797 - len(found.train) - len(found.val)
    assert f"3 of 10 classes; images of other classes left out: {left:,}." in found.notes


def test_streamed_classes_are_chosen_without_decoding(folder):
    (folder / "classes.txt").write_text("cat\ndog\nemu\n")
    split = load(f"wds:{folder}", stream=True)
    found = select_classes(split, (("hound", "dog"), ("tiger", "cat")))
    assert isinstance(found.train.images, Pictures)
    assert found.train.class_names == ("dog", "cat")
    assert found.train.labels.tolist() == [1 - label for label in split.train.labels.tolist()]
    assert (found.train.images[4] == split.train.images[4]).all()


def test_a_line_may_name_the_teachers_class_and_the_datas(tmp_path):
    path = listed(tmp_path / "c", "n0123\tcat\n 7 \n")
    assert read_class_map(path) == (("n0123", "cat"), ("7", "7"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names 0 classes"),
        ("3\n", "names 1 classes"),
        ("3\n4\n3\n", "names the teacher's 3 more than once"),
        ("a\t3\nb\t3\n", "names the data's 3 more than once"),
        ("3\nthree\n", 'digits/train has no class "three"'),
        ("3\n10\n", 'digits/train has no class "10"'),
    ],
)
def test_a_list_that_names_no_classes_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        select_classes(load("digits"), read_class_map(listed(tmp_path / "c", text)))


def test_a_list_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_class_map(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_class_map(tmp_path / "bytes")
    assert caught.value.notes["why"] == "it is no text in UTF-8"
