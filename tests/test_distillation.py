import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import kdsurgeon
from kdsurgeon.checking import check_least_part
from kdsurgeon.data import Batches, load
from kdsurgeon.demo import build
from kdsurgeon.distillation import check_teacher, distill, prepare, train_alone
from kdsurgeon.errors import DataError, NumericsError, PlanError, TraceError, UsageError
from kdsurgeon.evaluation import Report, accuracy, evaluate
from kdsurgeon.objectives import formula
from kdsurgeon.ranks import Ranks
from kdsurgeon.recipe import Recipe
from kdsurgeon.runs import Run
from kdsurgeon.stones import chosen_depths, partition, synthesize
from kdsurgeon.teacher_cache import cache_teacher
from kdsurgeon.views import accuracy_finding
from tests import models
from tests.test_stones import with_identity_adapters


def batches(count=3, size=8):
    return [(models.images(size, seed=i), models.labels(size, seed=i)) for i in range(count)]


def plan():
    return partition(
        models.make("residual", seed=1), models.make("inverted", seed=2), models.images(2)
    )


def losses(epochs):
    return [epoch.losses["total"] for epoch in epochs]


def test_distilling_needs_two_models_and_batches():
    teacher, student = models.make("residual", seed=1), models.make("inverted", seed=2)
    before = copy.deepcopy(student.state_dict())
    epochs = list(distill(teacher, student, batches(), recipe=Recipe(epochs=2)))
    assert [epoch.number for epoch in epochs] == [1, 2]
    assert any(not torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert "ce stone 3" in epochs[0].losses


def test_a_loop_of_ones_own_needs_two_lines():
    stones = kdsurgeon.synthesize(plan())
    optimizer = torch.optim.SGD(stones.parameters(), lr=0.01)
    totals = []
    for _ in range(5):
        for x, y in batches(1):
            loss = kdsurgeon.block_kd_loss(stones(x), y).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            totals.append(loss.item())
    assert totals[-1] < totals[0]


def test_a_model_alone_learns_from_labels_only():
    model = models.make("chain")
    epochs = list(
        train_alone(model, batches(), Recipe(method="ce", epochs=2), validation=batches(1))
    )
    assert set(epochs[0].losses) == {"total", "ce student"}
    assert epochs[-1].accuracy == accuracy(model, batches(1))


@pytest.mark.parametrize("method", ["ce", "kd", "block-kd"])
def test_an_interrupted_run_ends_in_the_bits_of_an_uninterrupted_one(tmp_path, method):
    recipe = Recipe(method=method, epochs=3)

    def ready():
        chosen = plan()
        return prepare(
            chosen.teacher.trace.model,
            chosen.student.trace.model,
            batches(),
            plan=chosen,
            recipe=recipe,
            validation=None,
        )

    torch.manual_seed(0)
    with Run.create(tmp_path / "whole") as run:
        list(ready().epochs(run=run))
    torch.manual_seed(0)
    seen = []
    with Run.create(tmp_path / "halted") as run:
        (tmp_path / "halted" / "config.yaml").write_text("")
        list(ready().epochs(run=run, watch=seen.append, stop=lambda: len(seen) >= 4))
    torch.manual_seed(7)
    with Run.resume(tmp_path / "halted") as run:
        list(ready().epochs(run=run))
    files = [tmp_path / name / "student" / "last.safetensors" for name in ("whole", "halted")]
    assert files[0].read_bytes() == files[1].read_bytes()
    metrics = [
        [
            {
                k: v
                for k, v in json.loads(line).items()
                if k not in ("seconds", "samples_per_second")
            }
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "halted")
    ]
    assert metrics[0] == metrics[1]
    assert [line["epoch"] for line in metrics[0]] == [1, 2, 3]


def test_the_best_student_is_the_one_with_the_highest_accuracy(tmp_path):
    chosen = plan()
    validation = batches(1)
    ready = prepare(
        chosen.teacher.trace.model,
        chosen.student.trace.model,
        batches(),
        plan=chosen,
        recipe=Recipe(epochs=4),
    )
    ready = copy.copy(ready)
    object.__setattr__(ready, "validation", validation)
    scores = []
    with Run.create(tmp_path / "run") as run:
        for epoch in ready.epochs(run=run):
            scores.append(epoch.accuracy)
    best = models.make("inverted")
    best.load_state_dict(load_file(tmp_path / "run" / "student" / "best.safetensors"))
    assert accuracy(best, validation) == max(scores)


class Flattens(torch.nn.Module):
    """A view that joins channels and positions, as in the first VGGs."""

    def __init__(self, width=4):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, width, 3, 2, 1)
        self.head = torch.nn.Linear(width * 64, models.CLASSES)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        return self.head(x.view(x.size(0), -1))


@pytest.mark.parametrize("method", ["ce", "kd", "block-kd"])
def test_a_model_that_joins_channels_and_positions_by_view_is_trained(method, capfd):
    recipe = Recipe(method=method, epochs=1)
    assert len(list(distill(Flattens(8), Flattens(4), batches(), recipe=recipe))) == 1
    assert capfd.readouterr().err == ""


def test_a_teacher_that_is_the_student_is_refused():
    model = models.make("residual")
    with pytest.raises(PlanError, match="share weights"):
        distill(model, model, batches())


def test_a_student_without_trainable_weights_is_refused():
    student = models.make("inverted").requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to train"):
        distill(models.make("residual"), student, batches())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "hold nothing"),
        ([{"image": models.images(), "label": models.labels()}], "hold a dict"),
        ([(models.images().numpy(), models.labels().numpy())], "hold a tuple"),
        ([(models.images(), models.labels().int())], "labels of torch.int32"),
        ([(models.images().byte(), models.labels())], "images of torch.uint8"),
        ([(models.images(), torch.eye(10)[models.labels()].long())], "with 2 axes"),
        ([(models.images(), models.labels() + 10)], "the models have 10 classes"),
        ([(models.images(), models.labels() - 10)], "the models have 10 classes"),
    ],
)
def test_batches_of_another_kind_are_refused_in_words(data, message):
    with pytest.raises(UsageError, match=message):
        distill(models.make("residual"), models.make("inverted"), data)


def test_a_plan_made_from_other_objects_is_refused():
    chosen = plan()
    with pytest.raises(PlanError, match="another student than the one given"):
        prepare(
            chosen.teacher.trace.model,
            copy.deepcopy(chosen.student.trace.model),
            batches(),
            plan=chosen,
            recipe=Recipe(),
        )


def test_a_teacher_near_chance_is_refused_with_likely_causes():
    with pytest.raises(NumericsError, match="near chance") as caught:
        check_teacher(_Constant(), [(models.images(100), models.labels(100))])
    assert "normalised differently" in str(caught.value)
    assert caught.value.exit_code == 5


class _Constant(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(models.CLASSES))

    def forward(self, x):
        return self.bias.expand(len(x), -1)


@pytest.mark.parametrize(
    ("method", "stones", "depths"),
    [
        ("block-kd", "all", (1, 2, 3)),
        ("block-kd", "drop-first", (2, 3)),
        ("block-kd", "last-2", (2, 3)),
        ("block-kd", [1, 3], (1, 3)),
        ("kd", "all", ()),
    ],
)
def test_a_recipe_chooses_its_stones(method, stones, depths):
    recipe = Recipe(method=method, loss={"stones": stones})
    assert chosen_depths(plan(), recipe) == depths


def test_more_stones_than_the_plan_has_are_refused():
    with pytest.raises(PlanError, match="last-9, but the plan has 3"):
        chosen_depths(plan(), Recipe(loss={"stones": "last-9"}))
    with pytest.raises(PlanError, match="no stone of depth 9"):
        teacher, student = models.make("residual", seed=1), models.make("inverted", seed=2)
        prepare(teacher, student, batches(), recipe=Recipe(loss={"stones": [9]}))


def test_the_formula_is_printed_with_its_numbers():
    text = formula(plan(), Recipe(epochs=240, loss={"kd_weight": 0.5, "stones": "last-2"}))
    assert text == (
        "L = 1·[CE(S, y) + 0.5·CE(N2, y) + 1·CE(N3, y)]\n"
        "  + 0.5·[KL(S, T) + 0.5·KL(N2, T) + 1·KL(N3, T)]\n"
        "  + 1·[KL(S, E) + KL(N2, E) + KL(N3, E)] from epoch 201, E = mean of N\n"
        "  τ = 4; S student, T teacher, N stepping stones"
    )


def test_the_ensemble_term_begins_when_the_recipe_says():
    chosen = plan()
    recipe = Recipe(epochs=4, loss={"cross_start": 0.5})
    ready = prepare(
        chosen.teacher.trace.model,
        chosen.student.trace.model,
        batches(),
        plan=chosen,
        recipe=recipe,
    )
    has_cross = ["cross student" in epoch.losses for epoch in ready.epochs()]
    assert has_cross == [False, False, True, True]


def test_evaluation_measures_student_teacher_and_every_stone_like_each_alone():
    chosen = plan()
    stones = synthesize(chosen, depths=(1, 3))
    data = batches(4)
    report = evaluate(stones, data)
    assert stones.training
    assert report.samples == 32
    assert report.teacher == accuracy(chosen.teacher.trace.model, data)
    assert report.student == accuracy(chosen.student.trace.model, data)
    assert set(report.stones) == set(report.stone_agreement) == {1, 3}


def test_every_epoch_tells_the_accuracy_of_student_and_stones():
    chosen, data = plan(), batches(2)
    teacher, student = (side.trace.model for side in (chosen.teacher, chosen.student))
    recipe = Recipe(epochs=2, loss={"stones": (1, 3)})
    made = prepare(teacher, student, data, plan=chosen, recipe=recipe, validation=batches(3))
    for epoch in made.epochs():
        report = evaluate(made.model, batches(3))
        assert epoch.accuracy == report.student
        assert epoch.stones == {f"stone {at}": share for at, share in report.stones.items()}
        assert list(epoch.stones) == ["stone 1", "stone 3"]


def test_samples_of_the_ignored_label_count_in_no_accuracy_of_a_stone():
    stones, (images, labels) = synthesize(plan()), batches(1)[0]
    with_ignored = torch.where(torch.arange(len(labels)) < 3, -1, labels)
    assert evaluate(stones, [(images, with_ignored)], ignored=-1) == evaluate(
        stones, [(images[3:], labels[3:])]
    )


def test_a_student_that_is_the_teacher_agrees_with_it():
    teacher = models.make("residual")
    stones = synthesize(partition(teacher, copy.deepcopy(teacher), models.images(2)))
    assert evaluate(stones, batches()).student_agreement == 1.0


@pytest.mark.parametrize("crippled", [0, 1, 2])
def test_the_block_of_the_student_that_loses_most_is_named(crippled):
    data = [(models.images(64, seed=seed), models.labels(64, seed=seed)) for seed in range(4)]
    teacher = models.make("residual").eval()
    with torch.no_grad():  # an untrained network says one class, whatever it sees
        teacher.head.bias -= teacher(data[0][0]).mean(0)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for weight in student.layers[crippled].parameters():
            weight.mul_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    chosen = with_identity_adapters(partition(teacher, student, models.images(2)))
    assert [pair.student.name for pair in chosen.alignment.boundaries][crippled].startswith(
        f"layers.{crippled}"
    )
    report = evaluate(synthesize(chosen), data)
    assert report.weakest == f"block {crippled + 1}"
    assert sum(report.lost.values()) == pytest.approx(1 - report.student_agreement)
    assert f"most is lost in block {crippled + 1}" in accuracy_finding(report)


def test_where_nothing_is_lost_no_block_is_named():
    teacher = models.make("residual")
    stones = synthesize(
        with_identity_adapters(partition(teacher, copy.deepcopy(teacher), models.images(2)))
    )
    report = evaluate(stones, batches())
    assert report.weakest is None and "no block" in accuracy_finding(report)
    assert accuracy_finding(evaluate(synthesize(plan(), depths=()), batches())) is None


def test_nothing_to_evaluate_on_is_an_error():
    for measure in (
        lambda: accuracy(models.make("chain"), []),
        lambda: evaluate(synthesize(plan()), []),
    ):
        with pytest.raises(DataError, match="no sample"):
            measure()


class Wanders(nn.Module):
    """Decides by what it sees, so that no graph can hold it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(768, 10)

    def forward(self, x):
        x = x.flatten(1)
        logits = self.head(x if x.mean() > 0 else -x)
        return {"logits": logits, "mean": x.mean()}


def test_models_that_no_graph_can_hold_still_have_plain_distillation():
    teacher, student = Wanders(), Wanders()
    before = copy.deepcopy(student.state_dict())
    kept = copy.deepcopy(teacher.state_dict())
    epochs = list(distill(teacher, student, batches(), recipe=Recipe(method="kd", epochs=1)))
    assert len(epochs) == 1
    assert not torch.equal(student.head.weight, before["head.weight"])
    assert all(torch.equal(value, kept[key]) for key, value in teacher.state_dict().items())
    with pytest.raises(TraceError, match="branches on the values"):
        distill(teacher, student, batches(), recipe=Recipe(epochs=1))


class Patient(nn.Module):
    """Looks at an image and at two numbers."""

    def __init__(self, width):
        super().__init__()
        self.body = models.chain(width)
        self.facts = nn.Linear(2, models.CLASSES)

    def forward(self, image, facts):
        return self.body(image) + self.facts(facts)


@pytest.mark.parametrize("method", ["ce", "kd", "block-kd"])
def test_batches_of_several_inputs_are_trained_on(method):
    data = [
        ({"image": models.images(8, seed=seed), "facts": torch.randn(8, 2)}, models.labels(8))
        for seed in range(3)
    ]
    student = Patient(4)
    before = copy.deepcopy(student.state_dict())
    recipe = Recipe(method=method, epochs=2, optim={"lr": 1e-2})
    epochs = list(distill(Patient(8), student, data, recipe=recipe))
    assert [epoch.samples for epoch in epochs] == [24, 24]
    assert epochs[1].losses["total"] < epochs[0].losses["total"]
    changed = [
        name for name, value in student.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert "facts.weight" in changed


def test_shares_of_all_classes_are_targets_and_ignored_samples_do_not_count():
    images, labels = models.images(6), models.labels(6)
    shares = torch.nn.functional.one_hot(labels, models.CLASSES).float()
    losses = []
    for data in ([(images, labels)], [(images, shares)]):
        student = models.make("chain", seed=2)
        (epoch,) = distill(models.make("chain", seed=1), student, data, recipe=Recipe(epochs=1))
        losses.append(epoch.losses["total"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    logits = kdsurgeon.Logits(
        torch.randn(6, 10), torch.randn(2, 6, 10), torch.randn(6, 10), depths=(1, 2)
    )
    some = kdsurgeon.Logits(
        logits.student[:4], logits.stones[:, :4], logits.teacher[:4], depths=(1, 2)
    )
    ignored = torch.cat([labels[:4], torch.tensor([-1, -1])])
    options = {"cross_weight": 1.0, "ignore_index": -1}
    whole, part = (
        kdsurgeon.block_kd_loss(each, target, **options)
        for each, target in ((logits, ignored), (some, labels[:4]))
    )
    assert whole.total.item() == pytest.approx(part.total.item(), rel=1e-6)
    nothing = kdsurgeon.block_kd_loss(logits, torch.full((6,), -1), **options)
    assert nothing.total.item() == 0.0 and nothing.parts == {}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.full((6, 10), 0.2), "shares of 10 classes"),
        (torch.full((6, 7), 1 / 7), "shares of 7 classes; the models have 10"),
        (torch.tensor([0, 1, 2, 3, 4, 10]), "a label is 10"),
        (torch.tensor([0, 1, 2, 3, 4, -1]), "a label is -1"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_the_first_step(target, message):
    pair = models.make("chain", seed=1), models.make("chain", seed=2)
    with pytest.raises(UsageError, match=message):
        prepare(*pair, [(models.images(6), target)], recipe=Recipe(epochs=1))


@pytest.mark.parametrize("method", ["ce", "kd", "block-kd"])
def test_a_run_does_not_count_samples_of_the_ignored_label(method):
    images, labels = models.images(6), models.labels(6)
    recipe = Recipe(method=method, epochs=1, loss={"ignore_index": -1})
    totals = []
    for other in (labels, torch.cat([labels[:4], torch.tensor([-1, -1])])):
        pair = models.make("chain", seed=1), models.make("chain", seed=2)
        (epoch,) = distill(*pair, [(images, other)], recipe=recipe)
        totals.append(epoch.losses["total"])
    assert all(map(math.isfinite, totals)) and totals[0] != totals[1]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 0, 99]), "a label is 99"),
        (torch.tensor([0, 1, 2, 3, 0, -100]), "a label is -100"),
        (torch.full((6, 3), 1 / 3), "the labels are shares of 3 classes"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_whatever_batch_they_come(second, message):
    pair = models.make("chain", seed=1), models.make("chain", seed=2)
    batches = [(models.images(6), models.labels(6)), (models.images(6), second)]
    with pytest.raises(UsageError, match=message):
        list(distill(*pair, batches, recipe=Recipe(epochs=1)))


def test_a_batch_of_another_size_is_refused_with_both_sizes():
    pair = models.make("residual", seed=1), models.make("residual", seed=2)
    batches = [(models.images(6), models.labels(6)), (models.images(6)[..., :6], models.labels(6))]
    with pytest.raises(UsageError, match="another size") as caught:
        list(distill(*pair, batches, recipe=Recipe(epochs=1)))
    assert caught.value.notes["first"] != caught.value.notes["now"]


def test_answers_of_another_teacher_are_refused():
    digits = load("digits")
    batches = Batches(digits.train, 256, shuffle=True, seed=0)
    torch.manual_seed(0)
    other, teacher, student = build("teacher"), build("teacher"), build("student")
    taught = cache_teacher(other, batches)
    with pytest.raises(UsageError, match="of another teacher"):
        prepare(teacher, student, taught, recipe=Recipe(epochs=1))
    prepare(other, student, taught, recipe=Recipe(epochs=1))


@pytest.mark.parametrize("method", ["block-kd", "kd", "ce"])
def test_a_batch_of_which_no_sample_counts_is_in_no_mean(method):
    recipe = Recipe(method=method, epochs=1, loss={"ignore_index": -1})
    images, labels = batches(1)[0]
    nothing = (images, torch.full_like(labels, -1))

    def losses(*data):
        chosen = plan()
        models = (side.trace.model.eval() for side in (chosen.teacher, chosen.student))
        (epoch,) = distill(*models, list(data), plan=chosen, recipe=recipe)
        return epoch.losses

    assert losses((images, labels), nothing) == losses((images, labels))
    assert losses(nothing, nothing) == {}


def test_held_out_samples_of_the_ignored_label_do_not_count():
    model = nn.Flatten()
    images = torch.eye(4).reshape(4, 1, 2, 2)
    for ignored in (-1, 0):  # a class, too
        target = torch.tensor([ignored, 1, 3, ignored])
        assert accuracy(model, [(images, target)], ignored=ignored) == 0.5


def test_the_diagnosis_does_not_blame_a_block_whose_loss_a_deeper_stone_shows_not_to_be_one():
    report = Report(
        samples=1000, student=0.9, teacher=1.0, stones={1: 0.6, 2: 0.5, 3: 0.97},
        student_agreement=0.9, stone_agreement={1: 0.6, 2: 0.5, 3: 0.97},
    )  # fmt: skip
    assert report.lost == pytest.approx(
        {"block 1": 0.03, "block 2": 0.0, "block 3": 0.0, "the rest": 0.07}
    )
    assert report.weakest == "the rest"


def normalising(spatial):
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1)]
    end = [nn.BatchNorm2d(4)] if not spatial else []
    return nn.Sequential(*layers, *end, nn.Flatten(), nn.Linear(4, 10))


@pytest.mark.parametrize(("size", "world", "advice"), [(673, 1, 674), (64, 2, 65), (1341, 4, 1347)])
def test_a_process_that_would_get_one_image_is_found_before_training(size, world, advice):
    served = Batches(load("digits").train, size, shuffle=True, seed=0)
    model = normalising(spatial=False)
    one = torch.zeros(1, 1, 8, 8)
    with pytest.raises(UsageError, match="leaves a process one image") as caught:
        check_least_part(model, lambda: model(one), served, Ranks(0, world))
    assert caught.value.notes["fix"] == f"--batch-size {advice}, for example"
    assert caught.value.notes.get("given") == (f"{world} processes" if world > 1 else None)
    better = Batches(served.dataset, advice, shuffle=True, seed=0)
    check_least_part(model, lambda: model(one), better, Ranks(0, world))
    assert all(
        len(part) > 1
        for rank in range(world)
        for part in [better.shard(rank, world).rows(len(better) - 1)]
    )


def test_a_model_that_can_learn_from_one_image_is_asked_and_left_as_it_was():
    served = Batches(load("digits").train, 673, shuffle=True, seed=0)
    model, one, asked = normalising(spatial=True).eval(), torch.ones(1, 1, 8, 8), []
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def run():
        asked.append(model.training)
        model(one)

    check_least_part(model, run, served, Ranks.alone())
    assert asked == [True]
    assert not model.training
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
