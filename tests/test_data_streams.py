"""What streaming promises: the same batches by all workers, on any device, by all ranks."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdsurgeon.data import Batches, Dataset, Pictures, load, parse_augmentation
from kdsurgeon.data import batches as batches_module
from kdsurgeon.data.pictures import pictures
from kdsurgeon.data.workers import produce
from kdsurgeon.errors import DataError, ResourceError, UsageError

EVERYTHING = parse_augmentation("crop-flip", aa="rand-m12-n3", reprob=0.5, cutout=3)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SHIFTED = parse_augmentation("shift-flip", aa="rand", reprob=0.5)


def png(seed: int, height: int = 9, width: int = 12) -> bytes:
    stream = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def streamed(count: int = 20, size: tuple[int, int, int] | None = (3, 8, 8)) -> Dataset:
    """Pictures of different shapes, decoded when they are asked for."""
    items = [png(seed, 9 + seed % 3, 12 + seed % 5) for seed in range(count)]
    images = pictures("made", items, [f"{i}.png" for i in range(count)], size)
    labels = np.arange(count) % 3
    return Dataset("made", images, labels, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3, images.ids)


def decoded(dataset: Dataset) -> Dataset:
    assert isinstance(dataset.images, Pictures)
    numbers = dataset.mean, dataset.std, dataset.ids
    return Dataset("made", dataset.images.decoded(), dataset.labels, ("a", "b", "c"), *numbers)


def served(batches: Batches, epoch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches.set_epoch(epoch)
    return list(batches)


def same(first: list, second: list) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def folder_of(root: Path, count: int = 8) -> Path:
    for part in ("train", "val"):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                seed = 100 * (part == "val") + 50 * (label == "b") + i
                (root / part / label / f"{i}.png").write_bytes(png(seed, 9 + i, 20 - i))
    return root


# ── workers ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("augment", [EVERYTHING, SHIFTED])
@pytest.mark.parametrize("kind", ["streamed", "decoded"])
def test_no_number_of_workers_changes_a_batch(augment, kind):
    data = streamed() if kind == "streamed" else decoded(streamed())
    alone = served(Batches(data, 6, shuffle=True, seed=3, augment=augment), 2)
    assert [len(y) for _, y in alone] == [6, 6, 6, 2]
    for workers in (1, 3):
        batches = Batches(data, 6, shuffle=True, seed=3, augment=augment, workers=workers)
        assert same(served(batches, 2), alone)
        batches.start_at(2)
        assert same(list(batches), alone[2:])
        batches.start_at(4)
        assert list(batches) == []
    assert not same(served(batches, 1), alone)


def test_workers_leave_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    served(Batches(streamed(), 6, shuffle=True, seed=0, augment=EVERYTHING, workers=2))
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_error_of_a_worker_is_the_error_of_the_run():
    data = streamed()
    assert isinstance(data.images, Pictures)
    items = data.images.items
    items[7] = items[7][:40]  # type: ignore[index]
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"the image 7\.png cannot be read") as caught:
            served(Batches(data, 5, shuffle=True, seed=0, workers=workers))
        assert "--max-bad-images N" in caught.value.notes["fix"]
        assert "Traceback" not in str(caught.value)


def _die(rows: np.ndarray) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_worker_that_dies_stops_the_run_with_a_way_out():
    with pytest.raises(ResourceError, match="a worker that reads images died") as caught:
        list(produce(_die, [np.arange(2)], 1))
    assert "--workers 0" in caught.value.notes["fix"]


def _told(rows: np.ndarray) -> torch.Tensor:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    return torch.from_numpy(rows)


def test_workers_outlive_the_signals_that_ask_the_run_to_stop():
    found = list(produce(_told, [np.arange(2), np.arange(3)], 1))
    assert [x.tolist() for x in found] == [[0, 1], [0, 1, 2]]


def test_a_process_that_leaves_a_pass_in_the_middle_ends():
    code = (
        "from kdsurgeon.data import Batches, load\n"
        "batches = Batches(load('digits').train, 9, shuffle=True, seed=0, workers=2)\n"
        "running = iter(batches); next(running); kept = [running]\n"
        "raise SystemExit(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=300, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (3, b"")


def _fail(rows: np.ndarray) -> torch.Tensor:
    raise RuntimeError("a fault of ours")


def test_a_fault_of_ours_in_a_worker_is_not_called_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="a fault of ours"):
        list(produce(_fail, [np.arange(2)], 1))


def test_pictures_go_to_a_process_that_shares_no_memory():
    data = streamed(4)
    again = pickle.loads(pickle.dumps(data.images))
    assert (again[np.arange(4)] == data.images[np.arange(4)]).all()


@pytest.mark.parametrize("workers", [-1, 257])
def test_a_number_of_workers_that_makes_no_sense_is_refused(workers):
    with pytest.raises(UsageError, match="cannot read images"):
        Batches(streamed(), 4, shuffle=True, seed=0, workers=workers)


# ── on the device ────────────────────────────────────────────────────────────────────────────────


HOW = ["none", "shift", "shift-flip", "crop-flip", EVERYTHING, SHIFTED]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augment", HOW, ids=str)
def test_images_on_the_device_are_augmented_to_the_same_bits(augment, device):
    data = decoded(streamed(40))
    there = Batches(data, 7, shuffle=True, seed=1, augment=augment, device=torch.device(device))
    here = Batches(data, 7, shuffle=True, seed=1, augment=augment)
    for epoch in range(2):
        found = served(there, epoch)
        assert {x.device.type for pair in found for x in pair} == {device}
        assert same([(x.cpu(), y.cpu()) for x, y in found], served(here, epoch))
    there.start_at(3)
    assert same([(x.cpu(), y.cpu()) for x, y in there], served(here, 1)[3:])


@pytest.mark.parametrize("channels", [1, 3])
def test_digits_on_the_device_are_shifted_to_the_same_bits(channels):
    split = load("digits", input_size=(channels, 10, 7))
    there, here = (
        Batches(split.train, 500, shuffle=True, seed=1, augment="shift-flip", device=device)
        for device in (torch.device("cpu"), None)
    )
    assert same(served(there), served(here))


def test_the_images_of_the_device_are_copied_from_pictures_and_never_changed():
    data = streamed(12)
    batches = Batches(data, 5, shuffle=False, seed=0, device=torch.device("cpu"))
    first = served(batches)
    for x, y in batches:
        x.zero_()
        y.zero_()
    assert same(served(batches), first)
    assert same(first, served(Batches(decoded(data), 5, shuffle=False, seed=0)))


def test_rand_augment_of_images_that_are_not_in_0_to_255_is_refused():
    augment = parse_augmentation("none", aa="rand")
    with pytest.raises(UsageError, match=r"needs images in 0\.\.255; the white of") as why:
        Batches(load("digits").train, 8, shuffle=True, seed=0, augment=augment)
    assert "--input-size" in why.value.notes["fix"]
    Batches(load("digits", input_size=(1, 9, 9)).train, 8, shuffle=True, seed=0, augment=augment)


def test_erased_places_are_the_mean_of_the_data():
    data = decoded(streamed())
    augment = parse_augmentation("none", cutout=8)
    plain = torch.cat([x for x, _ in Batches(data, 4, shuffle=False, seed=0)])
    batches = Batches(data, 4, shuffle=False, seed=0, augment=augment)
    found = torch.cat([x for x, _ in batches])
    assert (found[found != plain] == 0).all()
    assert (found == 0).any()
    assert batches.augment == "none cutout 8"


# ── ranks ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_parts_of_all_ranks_are_the_batch_of_one_process(world, workers):
    data = streamed(23)
    whole = Batches(data, 5, shuffle=True, seed=2, augment=EVERYTHING, workers=workers)
    ranks = [whole.shard(rank, world) for rank in range(world)]
    parts = [served(rank, 1) for rank in ranks]
    assert {len(part) for part in parts} == {len(whole)}
    for number, (x, y) in enumerate(served(whole, 1)):
        assert torch.equal(torch.cat([part[number][0] for part in parts]), x)
        assert torch.equal(torch.cat([part[number][1] for part in parts]), y)
        sizes = [len(part[number][1]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        ids = [name for rank in ranks for name in rank.sample_ids(number)]
        assert ids == whole.sample_ids(number)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_that_evaluate_see_every_sample_exactly_once(world):
    data = decoded(streamed(13))
    whole = Batches(data, 6, shuffle=False, seed=0)
    rows = [row for rank in range(world) for rows, _, _ in whole.shard(rank, world).with_rows()
            for row in rows.tolist()]  # fmt: skip
    assert sorted(rows) == list(range(13))
    assert all(len(y) for rank in range(world) for _, y in whole.shard(rank, world))


def test_a_shard_starts_where_it_is_told_and_leaves_the_whole_alone():
    whole = Batches(streamed(20), 6, shuffle=True, seed=0)
    part = whole.shard(1, 2)
    part.set_epoch(3)
    part.start_at(2)
    assert whole.epoch == 0
    assert len(list(part)) == 2
    assert len(list(whole)) == 4


def test_ranks_that_cannot_be_served_are_refused():
    whole = Batches(streamed(13), 6, shuffle=True, seed=0)
    with pytest.raises(UsageError, match="a batch of 1 images cannot be shared by 2 processes"):
        whole.shard(0, 2)
    Batches(streamed(13), 6, shuffle=True, seed=0, drop_last=True).shard(0, 2)
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(UsageError, match=f"there is no rank {rank} among {world}"):
            whole.shard(rank, world)


def test_samples_without_files_are_called_by_their_row():
    batches = Batches(load("digits").train, 3, shuffle=False, seed=0)
    assert batches.sample_ids(1) == ["digits/train[3]", "digits/train[4]", "digits/train[5]"]


# ── the order of shards ──────────────────────────────────────────────────────────────────────────


def grouped(groups: np.ndarray) -> Dataset:
    count = len(groups)
    items = [Image.new("L", (1, 1), 7)] * count
    images = Pictures("g", items, ("x",) * count, np.arange(count), (1, 1, 1), groups=groups)
    return Dataset("g", images, np.arange(count) % 2, ("a", "b"), (0.0,), (1.0,))


def test_samples_of_few_shards_are_served_together_each_once(monkeypatch):
    monkeypatch.setattr(batches_module, "WINDOW", 3)
    groups = np.repeat(np.arange(10), 7)
    batches = Batches(grouped(groups), 8, shuffle=True, seed=0)
    orders = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        order = batches.order()
        assert sorted(order.tolist()) == list(range(70))
        windows = [set(groups[order[first : first + 21]].tolist()) for first in (0, 21, 42, 63)]
        assert [len(window) for window in windows] == [3, 3, 3, 1]
        assert len(set().union(*windows)) == 10
        assert (np.diff(groups[order[:21]]) != 0).sum() > 6  # mixed, not one after the other
        orders.append(tuple(order.tolist()))
        assert order.tolist() == batches.order().tolist()
    assert len(set(orders)) == 3


def test_few_shards_are_mixed_as_if_there_were_none():
    groups = np.repeat(np.arange(4), 7)
    plain = Batches(decoded(streamed(28)), 8, shuffle=True, seed=6)
    assert Batches(grouped(groups), 8, shuffle=True, seed=6).order().tolist() == (
        plain.order().tolist()
    )


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────


def test_pictures_are_what_their_array_is():
    data = streamed(7)
    images, array = data.images, decoded(data).images
    assert (images.shape, images.dtype, images.nbytes) == (array.shape, array.dtype, array.nbytes)
    assert (images[np.array([5, 2])] == array[[5, 2]]).all()
    assert (images[1:6:2] == array[1:6:2]).all()
    assert (images[3] == array[3]).all()
    assert isinstance(images, Pictures)
    assert (images.take(np.array([6, 0]))[:] == array[[6, 0]]).all()
    assert images.take(np.array([6, 0])).ids == ("6.png", "0.png")


def test_pictures_of_one_size_keep_it_and_refuse_another():
    items = [png(seed) for seed in range(100)]
    found = pictures("p", items, list(map(str, range(100))), None)
    assert found.size == (9, 12, 3)
    items[1] = png(1, 5, 5)  # not among the 64 that are looked at
    with pytest.raises(DataError, match="the images differ in size") as caught:
        found[np.arange(3)]
    assert caught.value.notes["where"] == "9×12 (the first image), 5×5 (1)"
    with pytest.raises(DataError, match="the images differ in size"):
        pictures("p", [png(0), png(1, 5, 5)], ["a", "b"], None)


def test_gray_pictures_have_one_channel():
    gray = [Image.new("L", (4, 4), value) for value in (1, 200)]
    assert pictures("p", gray, ["a", "b"], None).size == (4, 4, 1)
    assert pictures("p", [*gray, Image.new("RGB", (4, 4), "red")], list("abc"), None).size[2] == 3


def test_a_crop_is_taken_from_the_whole_picture_not_from_the_fitted_one():
    image = Image.new("RGB", (60, 10), "red")
    image.paste("blue", (20, 0, 40, 10))  # all that a square fit would keep
    images = pictures("p", [image], ["a"], (3, 8, 8))
    assert (images[0] == (0, 0, 255)).all()
    data = Dataset("p", images, np.array([0]), ("a", "b"), (0.0,) * 3, (1.0,) * 3)
    batches = Batches(data, 1, shuffle=False, seed=0, augment="crop-flip")
    reds = [served(batches, epoch)[0][0][0, 0].max().item() for epoch in range(20)]
    assert max(reds) == 1.0


# ── folders ──────────────────────────────────────────────────────────────────────────────────────


def test_a_streamed_folder_holds_what_a_decoded_one_holds(tmp_path):
    folder = folder_of(tmp_path)
    wishes = {"input_size": (3, 6, 6), "crop_pct": 0.8, "interpolation": "bicubic"}
    near, far = load(folder, **wishes), load(folder, **wishes, stream=True)
    for a, b in ((near.train, far.train), (near.val, far.val)):
        assert isinstance(b.images, Pictures)
        assert (a.images == b.images[:]).all()
        assert (a.labels == b.labels).all()
        assert (a.ids, a.mean, a.std, a.class_names) == (b.ids, b.mean, b.std, b.class_names)
    assert any("decoded when they are needed" in note for note in far.notes)
    assert load(folder, **wishes, stream=True).fingerprint == far.fingerprint
    (folder / "train" / "a" / "0.png").write_bytes(png(900, 30, 30))
    assert load(folder, **wishes, stream=True).fingerprint != far.fingerprint


def test_a_damaged_image_of_a_stream_is_refused_by_name_or_left_out_by_name(tmp_path):
    folder = folder_of(tmp_path)
    bad = folder / "train" / "b" / "3.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    split = load(folder, input_size=(3, 6, 6), stream=True)
    with pytest.raises(DataError, match=r"the image train/b/3\.png cannot be read"):
        served(Batches(split.train, 4, shuffle=True, seed=0))
    allowed = load(folder, input_size=(3, 6, 6), stream=True, max_bad_images=1)
    assert [image.path for image in allowed.bad] == ["train/b/3.png"]
    assert allowed.bad == load(folder, input_size=(3, 6, 6), max_bad_images=1).bad
    assert len(allowed.train) == 15
    assert "train/b/3.png" not in (allowed.train.ids or ())
    assert sum(len(y) for _, y in Batches(allowed.train, 4, shuffle=True, seed=0)) == 15
    bad.with_name("4.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="2 of 32 images cannot be read"):
        load(folder, input_size=(3, 6, 6), stream=True, max_bad_images=1)


def test_images_to_validate_lose_a_margin_and_those_to_train_on_do_not(tmp_path):
    ring = Image.new("RGB", (20, 20), "red")
    ring.paste("blue", (5, 5, 15, 15))
    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            ring.save(tmp_path / part / label / "0.png")
    split = load(tmp_path, input_size=(3, 4, 4), crop_pct=0.5, interpolation="nearest")
    assert (split.val.images == (0, 0, 255)).all()
    assert (split.train.images[:, 0] == (255, 0, 0)).all()
    with pytest.raises(UsageError, match="crop_pct is 0"):
        load(tmp_path, crop_pct=0.0)
    with pytest.raises(UsageError, match='no interpolation is called "bilinaer"') as caught:
        load(tmp_path, interpolation="bilinaer")
    assert caught.value.notes["fix"] == 'did you mean "bilinear"?'
