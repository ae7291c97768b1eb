"""What reconciling promises: a teacher answers on the student's images as on images of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import kdsurgeon
from kdsurgeon.checkpoints import ModelCard, load_model, model_hash, save_model
from kdsurgeon.cli import main
from kdsurgeon.data import ImageSpec, ReconciledTeacher, load
from kdsurgeon.demo import build
from kdsurgeon.errors import UsageError
from kdsurgeon.partitioning import find_cut_points
from kdsurgeon.tracing import trace

GIVEN = ImageSpec((8, 8), (0.31,), (0.37,))
OWN = ImageSpec((8, 8), (0.1,), (0.2,))


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return build("teacher").eval()


@pytest.fixture
def pixels():
    """On the 0..1 scale."""
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def normalised(pixels, spec):
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (spec.mean, spec.std))
    return (pixels - mean) / std


def exact(*tensors):
    # in float32 an input is rounded three times more, by 2**-24 of at most 5; the network is
    # Lipschitz with a constant far below 100
    return all((tensors[0] - other).abs().max() < 3 * 2**-24 * 5 * 100 for other in tensors[1:])


def test_logits_are_those_of_the_teacher_on_images_prepared_its_own_way(teacher, pixels):
    wrapped = ReconciledTeacher(teacher, GIVEN, OWN)
    expected = teacher(normalised(pixels, OWN))
    assert exact(expected, wrapped(normalised(pixels, GIVEN)))
    assert not exact(expected, teacher(normalised(pixels, GIVEN)))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(16, 16), (6, 6), (12, 8)])
def test_another_size_is_resized_to(teacher, pixels, size, interpolation):
    own = ImageSpec(size, (0.1,), (0.2,), interpolation)
    more = {} if interpolation == "nearest" else {"align_corners": False, "antialias": True}
    resized = functional.interpolate(pixels, size=size, mode=interpolation, **more)
    found = ReconciledTeacher(teacher, GIVEN, own)(normalised(pixels, GIVEN))
    assert exact(teacher(normalised(resized, own)), found)


def test_every_channel_has_numbers_of_its_own():
    given = ImageSpec((2, 2), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    own = ImageSpec((2, 2), (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
    images = torch.rand(4, 3, 2, 2)
    found = ReconciledTeacher(nn.Flatten(), given, own)(normalised(images, given))
    assert (found - normalised(images, own).flatten(1)).abs().max() < 1e-5  # values up to 2


def test_what_is_alike_is_left_as_it_is(teacher, pixels):
    wrapped = ReconciledTeacher(teacher, GIVEN, GIVEN)
    assert torch.equal(wrapped(pixels), teacher(pixels))
    assert torch.equal(ReconciledTeacher(teacher, GIVEN)(pixels), teacher(pixels))


def test_the_logits_of_chosen_classes_are_kept_in_their_order(teacher, pixels):
    wrapped = ReconciledTeacher(teacher, GIVEN, classes=[7, 0, 3])
    assert torch.equal(wrapped(pixels), teacher(pixels)[:, [7, 0, 3]])


def test_another_number_of_channels_is_refused(teacher):
    with pytest.raises(UsageError, match="the teacher sees 3 channels, the images have 1"):
        ReconciledTeacher(teacher, GIVEN, ImageSpec((8, 8), (0.1,) * 3, (0.2,) * 3))


def test_the_hash_of_a_teacher_knows_all_that_its_logits_depend_on(teacher):
    teachers = [
        teacher,
        ReconciledTeacher(teacher, GIVEN),
        ReconciledTeacher(teacher, OWN),
        ReconciledTeacher(teacher, GIVEN, OWN),
        ReconciledTeacher(teacher, GIVEN, ImageSpec((16, 16), (0.1,), (0.2,))),
        ReconciledTeacher(teacher, GIVEN, ImageSpec((16, 16), (0.1,), (0.2,), "nearest")),
        ReconciledTeacher(teacher, GIVEN, OWN, classes=[1, 2]),
        ReconciledTeacher(teacher, GIVEN, OWN, classes=[2, 1]),
    ]
    assert len({model_hash(each) for each in teachers}) == len(teachers)


def test_the_teacher_and_its_mode_stay_as_they_are(teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    for training in (True, False):
        teacher.train(training)
        wrapped = ReconciledTeacher(teacher, GIVEN, OWN, classes=[0, 1])
        assert (wrapped.training, teacher.training) == (training, training)
    assert {name.removeprefix("teacher.") for name in wrapped.state_dict()} == set(before)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


# ── in the graph ─────────────────────────────────────────────────────────────────────────────────


def test_the_cuts_inside_the_teacher_are_the_same_and_so_is_the_plan(teacher):
    student, images = build("student").eval(), torch.randn(2, 1, 8, 8)
    wrapped = ReconciledTeacher(teacher, GIVEN, OWN, classes=range(10))
    inside = [str(cut) for cut in find_cut_points(trace(teacher, images))]
    found = [str(cut).replace("teacher.", "") for cut in find_cut_points(trace(wrapped, images))]
    assert found == ["mul 1×8×8", "add 1×8×8", *inside, "head 10"]
    plain, plan = (kdsurgeon.partition(each, student, images) for each in (teacher, wrapped))
    names = [cut.name.replace("teacher.", "") for cut in plan.teacher.cuts]
    assert names == [cut.name for cut in plain.teacher.cuts]
    assert [cut.name for cut in plan.student.cuts] == [cut.name for cut in plain.student.cuts]


@pytest.mark.parametrize("size", [(8, 8), (16, 16)])
def test_the_training_graph_hands_out_the_logits_of_the_teachers_own_images(teacher, pixels, size):
    student = build("student").eval()
    own = ImageSpec(size, (0.1,), (0.2,))
    wrapped = ReconciledTeacher(teacher, GIVEN, own, classes=[4, 5, 6, 7, 8, 9, 0, 1, 2, 3])
    images = normalised(pixels, GIVEN)
    plan = kdsurgeon.partition(wrapped, student, images)
    logits = kdsurgeon.synthesize(plan)(images)
    theirs = normalised(
        functional.interpolate(pixels, size=size, mode="bilinear", antialias=True), own
    )
    assert exact(logits.teacher, teacher(theirs)[:, [4, 5, 6, 7, 8, 9, 0, 1, 2, 3]])
    assert torch.equal(logits.student, student(images))


# ── on the command line ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def trained(name: str, path, *, mean, std, classes=10) -> None:
    """A digits classifier that was trained for an epoch or two on images normalised its own way."""
    torch.manual_seed(0)
    model = build(name)
    split = load("digits", mean=mean, std=std)
    images, labels = split.train.samples(), torch.from_numpy(split.train.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for rows in torch.randperm(len(images)).split(32):
        optimizer.zero_grad()
        functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    card = ModelCard(f"demo/{name}", (1, 8, 8), classes, None, mean, std)
    save_model(model.eval(), path, card)


def test_a_run_on_other_normalisation_measures_the_teacher_on_its_own(workplace, capsys):
    trained("teacher", "teacher.safetensors", mean=(0.9,), std=(0.1,))
    command = ["distill", "teacher.safetensors", "demo/student", "--data-dir", "digits"]
    told = []
    for more in ([], ["--mean", "0.3", "--std", "0.4"]):
        assert main([*command, "--dry-run", "--epochs", "1", *more]) == 0
        told.append(capsys.readouterr().out)
    measured = [
        next(line for line in text.splitlines() if "accuracy" in line).split()[-1] for text in told
    ]
    assert measured[0] == measured[1]
    assert float(measured[0].rstrip("%")) > 50
    assert "sees the same images normalised with its mean 0.9 std 0.1" in told[1]
    assert "sees the same images" not in told[0]


def test_a_student_that_was_trained_on_its_own_normalisation_keeps_it(workplace, capsys):
    trained("teacher", "teacher.safetensors", mean=(0.9,), std=(0.1,))
    trained("student", "student.safetensors", mean=(0.2,), std=(0.5,))
    command = ["distill", "teacher.safetensors", "student.safetensors", "--data-dir", "digits"]
    assert main([*command, "--epochs", "1", "-o", "run"]) == 0
    assert "normalised with its mean 0.9 std 0.1" in capsys.readouterr().out
    card = load_model("run/student/last.safetensors").card
    assert (card.mean, card.std) == ((0.2,), (0.5,))
    assert main(["eval", "run"]) == 0


def test_a_student_of_fewer_classes_learns_them_from_the_teacher(workplace, capsys):
    trained("teacher", "teacher.safetensors", mean=(0.3,), std=(0.4,))
    workplace.joinpath("few.txt").write_text("7\n1\n4\n")
    command = ["distill", "teacher.safetensors", "demo/student", "--data-dir", "digits"]
    assert main([*command, "--classes", "few.txt", "--epochs", "1", "-o", "run"]) == 0
    assert "answers for 3 of its classes" in capsys.readouterr().out
    student = load_model("run/student/last.safetensors")
    assert student.card.class_names == ("7", "1", "4")
    with torch.no_grad():
        assert student.model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert main(["eval", "run"]) == 0
    workplace.joinpath("few.txt").write_text("7\n11\n")
    assert main([*command, "--classes", "few.txt", "--dry-run"]) == 4
    assert 'has no class "11"' in capsys.readouterr().err


def test_the_flags_of_data_reach_the_batches(workplace):
    from kdsurgeon.cli import inputs
    from kdsurgeon.recipe import RunConfig

    wishes = {"aa": "rand-m3", "reprob": 0.5, "cutout": 2, "augment": "crop-flip", "workers": 2}
    settings = RunConfig(
        teacher="a",
        student="b",
        data_dir="digits",
        data={**wishes, "scale": [0.5, 1.0], "input_size": [1, 8, 9], "data_device": "device"},
        device="cpu",
    )
    train, validation = inputs.batches(settings, inputs.load_data(settings, ModelCard()))
    assert train.augment == "crop-flip scale 0.5-1 rand-m3-n2 reprob 0.5 cutout 2"
    assert (train.workers, validation.workers, validation.augment) == (2, 2, "none")
    here = inputs.batches(
        settings.replace(data=settings.data.replace(data_device="cpu", workers=0)),
        inputs.load_data(settings, ModelCard()),
    )
    for (x, y), (a, b) in zip(train, here[0], strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


def test_a_run_with_every_flag_of_data_ends(workplace, capsys):
    trained("teacher", "teacher.safetensors", mean=(0.3,), std=(0.4,))
    command = ["distill", "teacher.safetensors", "demo/student", "--data-dir", "digits"]
    flags = "--augment crop-flip --scale 0.5,1 --reprob 0.2 --cutout 2 --workers 1 --crop-pct 0.9 "
    flags += "--interpolation bicubic --data-device cpu --epochs 1 --method kd -o run"
    assert main([*command, *flags.split()]) == 0
    assert main([*command, "--dry-run", "--aa", "rand"]) == 2
    assert "RandAugment needs images in 0..255" in capsys.readouterr().err
    for flag, text in (("--aa", "randy"), ("--reprob", "2"), ("--scale", "1,0.5"),
                       ("--interpolation", "lanczos"), ("--workers", "-1"),
                       ("--data-device", "gpu"), ("--crop-pct", "0")):  # fmt: skip
        assert main([*command, "--dry-run", flag, text]) == 2
        assert flag in capsys.readouterr().err


def test_data_of_the_size_of_the_students_file_is_loaded_again(workplace, capsys):
    trained("teacher", "teacher.safetensors", mean=(0.3,), std=(0.4,))
    torch.manual_seed(0)
    card = ModelCard("demo/student", (1, 12, 12), 10, None, (0.3,), (0.4,))
    save_model(build("student").eval(), "student.safetensors", card)
    command = ["distill", "teacher.safetensors", "student.safetensors", "--data-dir", "digits"]
    assert main([*command, "--epochs", "1", "-o", "run"]) == 0
    assert "resized from 12×12 to 8×8, bilinear" in capsys.readouterr().out
    assert load_model("run/student/last.safetensors").card.input_size == (1, 12, 12)
