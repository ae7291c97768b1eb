"""What is asked of a plan from Python, and what is said of wishes that cannot be meant."""

import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from kdsurgeon.adapters.choosing import check_limit
from kdsurgeon.cli.flags import parse_pairs
from kdsurgeon.errors import ConfigError, PlanError, UsageError
from kdsurgeon.similarity import MIN_SAMPLES
from kdsurgeon.stones import certify, forecast, partition, plan_stones, read_plan, within_budget
from kdsurgeon.stones.plan import Plan, check_depths
from kdsurgeon.tracing import trace
from kdsurgeon.views import plan_table
from tests import models


@pytest.fixture(scope="module")
def plan():
    return planned()


def planned(**kwargs):
    pair = models.make("residual", width=16, seed=1), models.make("residual", seed=2)
    return partition(*pair, models.images(2), **kwargs)


def weighted(plan, *weights):
    pairs = zip(plan.stones, weights, strict=True)
    stones = tuple(replace(stone, weight=weight) for stone, weight in pairs)
    return Plan(plan.alignment, stones)


# wishes ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wish", [{"blocks": "2"}, {"blocks": None}, {"pairs": "stem"}])
def test_a_wish_of_another_type_is_refused_before_anything_is_captured(wish):
    with pytest.raises(UsageError, match=f"{next(iter(wish))} (is|must be) ") as caught:
        partition(None, None, None, **wish)
    assert caught.value.exit_code == 2
    assert caught.value.notes["fix"]


def test_blanks_around_a_named_pair_do_not_count():
    assert parse_pairs(["a = b", " a + b=c "]) == [("a", "b"), ("a + b", "c")]
    with pytest.raises(UsageError, match="does not name two nodes"):
        parse_pairs(["a = "])


@pytest.mark.parametrize(
    ("probe", "what"),
    [
        ([], "the probe holds 0 samples, too few"),
        ([models.images(1)], "the probe holds 1 sample, too few"),
        ([models.images(4), models.images(3)], "the probe holds 7 samples, too few"),
        (models.images(16), "the probe must be a list of batches"),
        (3, "the probe must be a list of batches"),
        ([(models.images(16), models.labels(16))], "batch 1 of the probe is not like the example"),
        ([{"image": models.images(16)}], "batch 1 of the probe is not like the example"),
        ([models.images(16), models.images(16)[0]], "batch 2 of the probe has another shape"),
        ([models.images(16)[:, :1]], "batch 1 of the probe has another shape"),
        ([models.images(16)[..., :8]], "batch 1 of the probe has another shape"),
        (
            [models.images(16).double()],
            "batch 1 of the probe is of float64, the example of float32",
        ),
        ([models.images(16) / 0], "batch 1 of the probe has values that are not finite"),
        ([models.images(16) * float("nan")], "batch 1 of the probe has values that are not finite"),
    ],
)
def test_a_probe_that_says_nothing_is_refused(probe, what):
    with pytest.raises(UsageError, match=f"^{what}") as caught:
        planned(probe=probe)
    assert caught.value.notes["fix"]


def test_a_probe_may_be_read_once_and_be_as_small_as_its_bound():
    batches = [models.images(MIN_SAMPLES // 2, seed=seed) for seed in (1, 2)]
    listed, drawn = planned(probe=batches), planned(probe=iter(batches))
    assert listed.to_yaml() == drawn.to_yaml()
    for one, other in zip(listed.alignment.boundaries, drawn.alignment.boundaries, strict=True):
        assert one.evidence["dissimilarity"] == other.evidence["dissimilarity"]


class Both(torch.nn.Module):
    """Reads an image and two numbers of its own."""

    def __init__(self, width):
        super().__init__()
        self.look = torch.nn.Sequential(
            *models.conv(3, width, stride=2), *models.conv(width, width)
        )
        self.head = torch.nn.Linear(width + 2, models.CLASSES)

    def forward(self, image, facts):
        return self.head(torch.cat([self.look(image).mean((2, 3)), facts], 1))


def test_the_inputs_of_a_probe_are_told_apart_by_name():
    example = {"image": models.images(2), "facts": torch.zeros(2, 2)}
    image, facts = models.images(9), torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    found = [
        partition(Both(8), Both(4), example, probe=[probe])
        for probe in ({"image": image, "facts": facts}, {"facts": facts, "image": image})
    ]
    assert len(found[0].stones) == len(found[1].stones) > 0
    with pytest.raises(UsageError, match="not like the example") as caught:
        partition(Both(8), Both(4), example, probe=[{"image": image}])
    assert caught.value.notes["wanted"] == "tensors by name: image, facts"


# budgets and forecasts ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ratio", [float("nan"), "1.5x", "1.5", None, True, 0.5, 0, -1])
def test_a_budget_that_is_no_multiple_is_refused(plan, ratio):
    with pytest.raises(UsageError, match="is not a multiple of what plain distillation") as caught:
        within_budget(plan, ratio)
    assert repr(ratio) in caught.value.what


def test_a_budget_without_a_limit_allows_every_stone(plan):
    assert within_budget(plan, float("inf")) == (1, 2, 3)


def test_a_budget_chooses_among_the_stones_that_have_a_weight(plan):
    assert within_budget(weighted(plan, 0.5, 0.5, 0.0), 1e6) == (1, 2)
    least = forecast(plan, (2,)).time_ratio
    with pytest.raises(PlanError, match="no stone fits a budget") as caught:
        within_budget(weighted(plan, 0.5, 0.5, 0.0), 1.0)
    assert f"needs {least:.2f} ×" in caught.value.notes["why"]
    with pytest.raises(PlanError, match="the plan has no stone to train") as caught:
        within_budget(weighted(plan, 0.0, 0.0, 0.0), 1.5)
    assert caught.value.notes["why"] == "every weight is 0"
    with pytest.raises(PlanError, match="the plan has no stone to train") as caught:
        within_budget(planned(blocks=0), 1.5)
    assert caught.value.notes["why"] == "it has no boundaries"


@pytest.mark.parametrize("depths", [(9,), (1, 9), (0,), ("1",)])
def test_a_depth_that_the_plan_lacks_is_not_forecast(plan, depths):
    for ask in (forecast, check_depths):
        with pytest.raises(PlanError, match=f"no stone of depth {depths[-1]}") as caught:
            ask(plan, depths)
        assert caught.value.notes["known"] == "1, 2, 3"


# adapters ────────────────────────────────────────────────────────────────────────────────────────


def test_the_limit_that_a_refusal_names_suffices_for_every_boundary():
    with pytest.raises(PlanError, match="has as few as 10 parameters") as caught:
        planned(max_adapter_parameters=10)
    assert "from the student's layers.2.relu_1 to the teacher's layers.2.relu_1" in str(
        caught.value
    )
    assert "enough for every boundary" in caught.value.notes["fix"]
    most = int(re.search(r"allow (\d+) or more", caught.value.notes["fix"])[1])
    assert len(planned(max_adapter_parameters=most).stones) == 3
    with pytest.raises(PlanError, match=f"has as few as {most - 1} parameters"):
        planned(max_adapter_parameters=most - 1)


def test_a_limit_for_one_boundary_says_nothing_of_others(plan):
    pair = plan.alignment.boundaries[0]
    with pytest.raises(PlanError) as caught:
        check_limit([(pair.student, pair.teacher)], 1)
    assert "every boundary" not in caught.value.notes["fix"]


@pytest.mark.parametrize("limit", ["100", 1.5, True])
def test_a_limit_of_another_type_is_refused(plan, limit):
    with pytest.raises(UsageError, match=f"max_adapter_parameters is {limit!r}"):
        plan_stones(plan.alignment, max_adapter_parameters=limit)


# what is shown ───────────────────────────────────────────────────────────────────────────────────


def shown(plan, depths=None):
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(plan_table(plan, forecast(plan, depths), certify(plan)))
    return capture.get()


def test_the_table_says_which_stones_are_trained_where_it_is_not_all(plan):
    assert "\nstones " not in shown(plan)
    assert "\nstones      2 of 3 are trained: 2, 3" in shown(weighted(plan, 0.0, 0.5, 1.0))
    assert "\nstones      1 of 3 is trained: 1" in shown(plan, (1,))
    nothing = shown(weighted(plan, 0.0, 0.0, 0.0))
    assert "\nstones      none of 3 is trained: every weight is 0" in nothing
    assert "\nstones      none of 3 is trained\n" in re.sub(" +\n", "\n", shown(plan, ()))


def test_one_stone_is_not_called_many():
    plan = planned(blocks=1)
    assert "of 1 stone reach" in shown(plan)
    assert repr(plan).startswith("Plan(1 stone: ")


# reading ─────────────────────────────────────────────────────────────────────────────────────────


class Streams(torch.nn.Module):
    """Two tensors are alive at every place but in front of the head."""

    def __init__(self, width):
        super().__init__()
        self.left = torch.nn.Conv2d(3, width, 3, 2, 1)
        self.right = torch.nn.Conv2d(3, width, 3, 2, 1)
        self.more = torch.nn.Conv2d(width, width, 3, 2, 1)
        self.last = torch.nn.Conv2d(width, width, 3, 2, 1)
        self.head = torch.nn.Linear(2 * width, models.CLASSES)

    def forward(self, x):
        left, right = self.left(x).relu(), self.right(x).relu()
        left, right = self.more(left).relu(), self.last(right).relu()
        return self.head(torch.cat([left, right], 1).mean((2, 3)))


def test_the_tensors_of_a_boundary_are_listed_in_any_order_with_their_adapters(tmp_path):
    wide = ["relu_1 + relu", "relu_1 + relu"]
    plan = partition(Streams(8), Streams(4), models.images(2), pairs=[wide])
    first, second = plan.stones[0].adapters
    edited = (replace(first, rank=2), replace(second, operation="resize"))
    plan = Plan(plan.alignment, (replace(plan.stones[0], adapters=edited),))
    traces = plan.teacher.trace, plan.student.trace
    path = tmp_path / "plan.yaml"
    text = plan.to_yaml()
    turned = re.sub(r"\[(\S+), (\S+)\]", r"[\2, \1]", text)
    assert turned.count("[relu, relu_1]") == 2
    for written in (text, turned, turned.replace("[relu, relu_1]", "relu + relu_1")):
        path.write_text(written)
        assert read_plan(path, *traces).to_yaml() == text


def test_only_a_captured_model_has_a_plan_read_for_it(plan, tmp_path):
    plan.save(tmp_path / "plan.yaml")
    model = plan.student.trace.model
    with pytest.raises(UsageError, match="is a Residual, not a Trace") as caught:
        read_plan(tmp_path / "plan.yaml", plan.teacher.trace, model)
    assert "kdsurgeon.trace(model, example)" in caught.value.notes["fix"]
    again = trace(model, models.images(5), name="another name")
    read = read_plan(tmp_path / "plan.yaml", plan.teacher.trace, again)
    assert read.hash == plan.hash


def test_a_file_that_is_no_plan_comes_with_a_way_out(plan, tmp_path):
    traces = plan.teacher.trace, plan.student.trace
    (tmp_path / "plan.yaml").write_text("plan: 2\nplan: 2\n")
    with pytest.raises(ConfigError, match="given twice") as caught:
        read_plan(tmp_path / "plan.yaml", *traces)
    assert "make a new plan" in caught.value.notes["fix"]
    with pytest.raises(PlanError, match="is a folder, not a plan") as caught:
        read_plan(tmp_path, *traces)
    assert caught.value.notes["fix"] == f"name the file: {tmp_path / 'plan.yaml'}"
    with pytest.raises(ConfigError, match="does not exist") as caught:
        read_plan(tmp_path / "absent.yaml", *traces)
    assert caught.value.notes["fix"] == "check the path of the YAML file"
