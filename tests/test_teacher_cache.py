"""The teacher's logits, asked for once: exact, replayable, refused where they are stale."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kdsurgeon.data import Batches, Dataset
from kdsurgeon.distillation import distill, prepare
from kdsurgeon.errors import DataError, ModelFileError, UsageError
from kdsurgeon.recipe import Recipe
from kdsurgeon.stones import TEACHER_LOGITS, partition, synthesize
from kdsurgeon.teacher_cache import cache_teacher
from tests import models


def data(count=24, *, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    labels = generator.integers(0, 10, count)
    names = tuple(map(str, range(10)))
    return Dataset("noise", images, labels, names, (0.5,) * 3, (0.25,) * 3)


def served(dataset=None, **kwargs):
    chosen = {"shuffle": True, "seed": 3, "augment": "shift-flip", "views": 2} | kwargs
    return Batches(dataset or data(), 5, **chosen)


def teacher(seed=1):
    return models.make("residual", seed=seed).eval()


@pytest.mark.parametrize("options", [{}, {"augment": "none", "views": None}])
def test_every_batch_carries_what_the_teacher_says_of_its_images(options):
    model, batches = teacher(), served(**options)
    taught = cache_teacher(model, batches)
    assert len(taught) == 5
    for epoch in range(5):
        taught.set_epoch(epoch)
        plain = copy.copy(batches)
        plain.set_epoch(epoch)
        for (inputs, labels), (images, same) in zip(taught, plain, strict=True):
            assert torch.equal(inputs["input"], images) and torch.equal(labels, same)
            with torch.no_grad():
                wanted = model(images)
            torch.testing.assert_close(inputs[TEACHER_LOGITS], wanted, rtol=1e-5, atol=1e-6)


def test_views_repeat_and_the_order_does_not():
    batches = served()
    epochs = []
    for epoch in range(4):
        batches.set_epoch(epoch)
        found = list(batches.with_rows())
        rows = np.concatenate([each for each, _, _ in found])
        images = torch.cat([each for _, each, _ in found])
        epochs.append((rows, images[torch.from_numpy(np.argsort(rows))]))
    assert torch.equal(epochs[0][1], epochs[2][1]) and torch.equal(epochs[1][1], epochs[3][1])
    assert not torch.equal(epochs[0][1], epochs[1][1])
    assert not np.array_equal(epochs[0][0], epochs[2][0])


def test_a_pass_may_begin_anywhere():
    taught = cache_teacher(teacher(), served())
    whole = list(taught)
    taught.start_at(3)
    for (some, _), (same, _) in zip(taught, whole[3:], strict=True):
        assert torch.equal(some[TEACHER_LOGITS], same[TEACHER_LOGITS])


def test_the_file_gives_back_every_bit_and_the_teacher_is_not_asked_again(tmp_path, monkeypatch):
    path = tmp_path / "teacher.safetensors"
    first = cache_teacher(teacher(), served(), path=path)
    monkeypatch.setattr("kdsurgeon.teacher_cache.logits_of", None)
    assert torch.equal(cache_teacher(teacher(), served(), path=path).table, first.table)
    other_batch = Batches(data(), 7, shuffle=False, seed=3, augment="shift-flip", views=2)
    assert torch.equal(cache_teacher(teacher(), other_batch, path=path).table, first.table)


@pytest.mark.parametrize(
    ("model", "batches", "reason"),
    [
        (teacher(2), served(), "teacher"),
        (teacher(), served(data(seed=1)), "data"),
        (teacher(), served(augment="shift"), "augmentation"),
        (teacher(), served(seed=4), "seed"),
        (teacher(), served(views=3), "views"),
        (teacher(), served(data(20)), "data"),
    ],
)
def test_a_stale_file_is_refused_by_what_differs(tmp_path, model, batches, reason):
    path = tmp_path / "teacher.safetensors"
    cache_teacher(teacher(), served(), path=path)
    before = path.read_bytes()
    with pytest.raises(DataError, match="of another run") as caught:
        cache_teacher(model, batches, path=path)
    assert reason in caught.value.notes["why"]
    assert path.read_bytes() == before


def test_without_augmentation_the_seed_does_not_matter(tmp_path):
    path = tmp_path / "teacher.safetensors"
    first = cache_teacher(teacher(), served(augment="none"), path=path)
    again = cache_teacher(teacher(), served(augment="none", seed=9), path=path)
    assert torch.equal(first.table, again.table)


def test_a_damaged_file_and_one_of_something_else_are_refused(tmp_path):
    path = tmp_path / "teacher.safetensors"
    cache_teacher(teacher(), served(), path=path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError):
        cache_teacher(teacher(), served(), path=path)
    from kdsurgeon.checkpoints import write_tensors

    write_tensors({"logits": torch.zeros(2, 24, 10)}, path)
    with pytest.raises(DataError, match="holds no logits of a teacher"):
        cache_teacher(teacher(), served(), path=path)


def test_endless_augmentation_cannot_be_asked_beforehand():
    with pytest.raises(UsageError, match="cannot be asked beforehand") as caught:
        cache_teacher(teacher(), served(views=None))
    assert "--teacher-views" in caught.value.notes["fix"]
    with pytest.raises(UsageError, match="0 views"):
        served(views=0)


@pytest.mark.parametrize("method", ["kd", "block-kd"])
def test_training_with_the_cache_is_training_with_the_teacher(method):
    ends = []
    for is_cached in (False, True):
        model, student = teacher(), models.make("inverted", seed=2)
        batches = cache_teacher(model, served()) if is_cached else served()
        recipe = Recipe(method=method, epochs=3, optim={"opt": "sgd", "lr": 0.01})
        losses = [
            epoch.losses["total"] for epoch in distill(model, student, batches, recipe=recipe)
        ]
        ends.append((losses, student.state_dict()))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    for one, other in zip(ends[0][1].values(), ends[1][1].values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_with_the_cache_the_teachers_front_is_never_run():
    plan = partition(teacher(), models.make("inverted", seed=2), models.images(2))
    stones = synthesize(plan)
    images = models.images(4)
    counts = []
    for inputs in (images, {"input": images, TEACHER_LOGITS: torch.zeros(4, 10)}):
        with FlopCounterMode(display=False) as counter:
            logits = stones(inputs)
        counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == 2 * 4 * plan.teacher.cost.multiply_adds
    assert torch.equal(logits.teacher, torch.zeros(4, 10))


def test_an_untaught_graph_is_planned_from_taught_batches():
    model = teacher()
    ready = prepare(
        model, models.make("chain"), cache_teacher(model, served()), recipe=Recipe(epochs=1)
    )
    assert ready.plan is not None and ready.depths
