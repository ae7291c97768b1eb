"""Which stones a step trains: sets, one random stone, a schedule."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kdsurgeon.checkpoints import load_model
from kdsurgeon.errors import ConfigError
from kdsurgeon.losses import block_kd_loss
from kdsurgeon.objectives import formula, objective
from kdsurgeon.recipe import Recipe
from kdsurgeon.stones import (
    chosen_depths,
    forecast,
    forecast_of_run,
    partition,
    stones_at,
    synthesize,
)
from kdsurgeon.training import Moment
from tests import models

WEIGHTS = {1: 0.25, 2: 0.5, 3: 1.0}


def planned(dtype=torch.float32):
    pair = (models.make("residual", seed=1).to(dtype), models.make("residual", seed=2).to(dtype))
    return partition(*pair, models.images(2, dtype=dtype))


def test_every_stone_of_a_fixed_set_is_trained_with_its_weight_at_every_step():
    for wanted, depths in (("all", (1, 2, 3)), ("drop-first", (2, 3)), ((1, 3), (1, 3))):
        found = stones_at(planned(), Recipe(loss={"stones": wanted}), 0.7, 11)
        assert found == {depth: WEIGHTS[depth] for depth in depths}


def test_one_random_stone_is_drawn_by_its_weight_and_is_a_function_of_seed_and_step():
    plan, recipe = planned(), Recipe(loss={"stones": "random"}, seed=5)
    drawn = [stones_at(plan, recipe, 0.0, step) for step in range(3500)]
    assert all(list(each.values()) == [1.75] for each in drawn)
    counts = Counter(depth for each in drawn for depth in each)
    for depth, weight in WEIGHTS.items():  # 5 standard deviations of 3,500 draws are below 5 %
        assert counts[depth] / 3500 == pytest.approx(weight / 1.75, abs=0.05)
    assert drawn[17] == stones_at(plan, recipe, 0.9, 17)
    other = [stones_at(plan, recipe.replace(seed=6), 0.0, step) for step in range(50)]
    assert other != drawn[:50]


@pytest.mark.parametrize(
    "loss",
    [
        {"stones": "random"},
        {"stones": "drop-first"},
        {"stones": "all", "stone_schedule": ((0.25, "last-1"), (0.75, "random"))},
    ],
)
def test_the_forecast_of_a_run_is_the_mean_over_the_steps_that_it_takes(loss):
    plan, recipe, steps = planned(), Recipe(loss=loss), 4000
    found = forecast_of_run(plan, recipe)
    drawn = [tuple(stones_at(plan, recipe, n / steps, n)) for n in range(steps)]
    of_each = {depths: forecast(plan, depths) for depths in set(drawn)}
    taken = [of_each[depths] for depths in drawn]
    mean = sum(step.with_stones_time for step in taken) / steps
    # 4,000 draws of one of two tails: 5 standard deviations of the mean are below 4 % of the range
    spread = max(s.with_stones_time for s in taken) - min(s.with_stones_time for s in taken)
    assert found.with_stones_time == pytest.approx(mean, abs=0.04 * spread + 1e-6 * mean)
    assert found.with_stones_bytes == max(step.with_stones_bytes for step in taken)
    assert found.depths == chosen_depths(plan, recipe)


def test_the_forecast_of_a_run_without_stones_is_plain_distillation():
    for method in ("kd", "ce"):
        assert forecast_of_run(planned(), Recipe(method=method)).time_ratio == 1


def test_the_expected_gradient_of_one_random_stone_is_that_of_all_of_them():
    plan = planned(torch.float64)
    stones = synthesize(plan)
    images, labels = models.images(5, dtype=torch.float64), models.labels(5)

    def gradients(recipe, step):
        stones.zero_grad()
        with torch.random.fork_rng(devices=[]):
            objective(stones, plan, recipe)(images, labels, Moment(0.0, step)).total.backward()
        given = [torch.zeros_like(p) if p.grad is None else p.grad for p in stones.parameters()]
        return torch.cat([gradient.flatten() for gradient in given])

    random = Recipe(loss={"stones": "random"})
    one_of_each = {}
    for step in range(50):
        one_of_each.setdefault(next(iter(stones_at(plan, random, 0.0, step))), step)
    expected = sum(
        WEIGHTS[depth] / 1.75 * gradients(random, step) for depth, step in one_of_each.items()
    )
    torch.testing.assert_close(expected, gradients(Recipe(), 0), rtol=0, atol=1e-10)


def test_a_step_through_one_stone_runs_its_tail_only():
    plan = planned()
    stones = synthesize(plan)
    for depth in (1, 2, 3):
        with FlopCounterMode(display=False) as counter:
            logits = stones(models.images(2), (depth,))
            (logits.student.sum() + logits.stones.sum()).backward()
        assert logits.depths == (depth,) and len(logits.stones) == 1
        first = 16 * 16 * next(iter(plan.student.trace.model.stem)).weight.numel()
        assert counter.get_total_flops() / 4 == forecast(plan, (depth,)).with_stones - first


def test_a_schedule_changes_the_stones_over_the_run():
    plan = planned()
    recipe = Recipe(epochs=10, loss={"stone_schedule": [[0.5, "last-1"], [0.8, [1]]]})
    assert [tuple(stones_at(plan, recipe, at, 0)) for at in (0.0, 0.49, 0.5, 0.79, 0.8, 1.0)] == [
        (1, 2, 3), (1, 2, 3), (3,), (3,), (1,), (1,),
    ]  # fmt: skip
    assert chosen_depths(plan, recipe) == (1, 2, 3)
    assert "at first the stones all" in formula(plan, recipe)
    assert "from epoch 6, the stones last-1" in formula(plan, recipe)
    assert Recipe(**recipe.dump()) == recipe


def test_the_formula_says_that_one_stone_is_drawn():
    text = formula(planned(), Recipe(loss={"stones": "random"}))
    assert "0.25·CE(N1, y)" in text and "one N a step, drawn as often as its factor says" in text


@pytest.mark.parametrize(
    "schedule",
    ["last-1", [["last-1", 0.5]], [[0.0, "all"]], [[0.5, "all"], [0.5, "last-1"]], [[0.5, "some"]],
     [[1.0, "all"]], [[True, "all"]], [[0.5]], 3],
)  # fmt: skip
def test_a_schedule_that_is_none_is_refused(schedule):
    with pytest.raises(ConfigError, match=r"stone_schedule must be a list of"):
        Recipe(loss={"stone_schedule": schedule})


class CountsKernels(TorchDispatchMode):
    """Operations that compute: neither views nor memory that is only reserved."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        is_view = any(each.alias_info and not each.alias_info.is_write for each in returns)
        self.count += not is_view and "empty" not in str(func)
        return func(*args, **(kwargs or {}))


def test_a_step_of_resnet32x4_to_resnet8x4_dispatches_327_kernels_and_the_formulas_flops():
    teacher, student = (load_model(f"cifar/{name}").model for name in ("resnet32x4", "resnet8x4"))
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([3, 99])
    plan = partition(teacher, student, images)
    stones = synthesize(plan)

    def step():
        block_kd_loss(stones(images), labels).total.backward()

    step()  # gradients exist from here on, as in every later step
    stones.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as flops, CountsKernels() as kernels:
        step()
    assert kernels.count + 1 <= 327  # and one for the update of all weights
    first_layer = next(student.children()).weight.numel() * 32 * 32  # its input has no gradient
    assert flops.get_total_flops() == 2 * len(images) * (forecast(plan).with_stones - first_layer)
