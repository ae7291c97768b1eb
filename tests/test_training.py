import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from kdsurgeon.errors import NumericsError
from kdsurgeon.losses import Losses, task_loss
from kdsurgeon.recipe import Recipe
from kdsurgeon.stones import partition, synthesize
from kdsurgeon.training import Moment, fastest_layout, learning_rate_at, start, train
from tests import models


def batches(count=3, size=8):
    return [(models.images(size, seed=i), models.labels(size, seed=i)) for i in range(count)]


def of(model):
    """Cross-entropy of what ``model`` makes of the images."""
    return lambda images, target, _: task_loss(model(images), target)


def first_logit(stones):
    return lambda images, *_: Losses(stones(images).student[0, 0], {})


def run(model, recipe, **kwargs):
    return list(train(model, of(model), kwargs.pop("data", batches()), recipe, **kwargs))


def test_an_epoch_reports_steps_samples_and_mean_losses():
    epochs = run(models.make("chain"), Recipe(epochs=2))
    assert [(e.number, e.steps, e.samples, e.is_complete) for e in epochs] == [
        (1, 3, 24, True),
        (2, 3, 24, True),
    ]
    assert epochs[1].losses["total"] < epochs[0].losses["total"]
    assert set(epochs[0].losses) == {"total", "ce student"}


def test_a_loss_that_begins_inside_an_epoch_is_averaged_over_its_own_steps():
    model = models.make("chain")

    def late(images, target, moment):
        losses = task_loss(model(images), target)
        parts = losses.parts | ({"late": torch.tensor(6.0)} if moment.progress > 0.5 else {})
        return replace(losses, parts=parts)

    (epoch,) = train(model, late, batches(4), Recipe(epochs=1))
    assert epoch.losses["late"] == 6.0


def test_training_learns_what_can_be_learnt():
    model = models.make("residual")
    data = [(models.images(32), models.labels(32))]
    last = run(model, Recipe(epochs=30, optim={"lr": 1e-2}), data=data)[-1]
    assert last.losses["total"] < 0.05


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_stopped_run_goes_on_bit_for_bit(opt, stop_after):
    recipe = Recipe(epochs=3, optim={"opt": opt, "lr": 0.01, "sched": "cosine"})
    whole, halted = models.make("residual", dropout=0.3), models.make("residual", dropout=0.3)
    torch.manual_seed(0)
    uninterrupted = run(whole, recipe)

    torch.manual_seed(0)
    state, steps = start(halted, recipe), []
    first = run(
        halted, recipe, state=state, watch=steps.append, stop=lambda: len(steps) >= stop_after
    )
    numbers, tensors = copy.deepcopy(state.numbers()), copy.deepcopy(state.tensors())
    torch.manual_seed(99)
    resumed_model = models.make("residual", dropout=0.3)
    resumed_model.load_state_dict(halted.state_dict())
    fresh = start(resumed_model, recipe)
    fresh.restore(numbers, tensors)
    rest = run(resumed_model, recipe, state=fresh)

    complete = [e for e in first if e.is_complete] + rest
    assert [e.losses for e in complete] == [e.losses for e in uninterrupted]
    for own, other in zip(
        whole.state_dict().values(), resumed_model.state_dict().values(), strict=True
    ):
        assert torch.equal(own, other)


def test_a_stop_inside_an_epoch_yields_it_incomplete():
    epochs = run(models.make("chain"), Recipe(epochs=2), stop=lambda: True)
    assert [(e.steps, e.is_complete) for e in epochs] == [(1, False)]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_names_the_step(where):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = models.make("chain")
            self.calls = 0

        def forward(self, x):
            self.calls += self.training
            logits = self.inner(x)
            if self.calls == 3:
                # sqrt has an infinite slope at 0: a finite loss with a gradient that is not
                return logits * math.nan if where == "loss" else logits + (logits * 0).sqrt()
            return logits

    model = Breaks()
    seen = []

    def watch(step):
        seen.append(copy.deepcopy(model.state_dict()))

    with pytest.raises(
        NumericsError, match=f"step 3: the {where} is nan before the update"
    ) as caught:
        run(model, Recipe(epochs=1), watch=watch)
    assert caught.value.exit_code == 5
    assert caught.value.notes["where"] == "epoch 1, batch 3"
    for name, value in model.named_parameters():
        assert torch.equal(value, seen[-1][name])


def test_looking_for_the_layout_draws_nothing_and_moves_no_statistics():
    student = models.make("chain")
    student.insert(3, nn.Dropout(0.5, inplace=True))
    stones = synthesize(partition(models.make("chain"), student, models.images(2)))
    for model in (student, stones):
        model.train()
        state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        found = fastest_layout(
            model,
            of(model) if model is student else first_logit(model),
            models.images(),
            models.labels(),
            Moment(0.0, 0),
        )
        assert found == torch.channels_last
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(module.training for module in student.modules())


def test_batches_that_can_start_anywhere_are_not_made_to_be_skipped():
    made = []

    class Data(list):
        start = 0

        def start_at(self, batch):
            self.start = batch

        def __iter__(self):
            for pair in list.__iter__(self[self.start :]):
                made.append(pair)
                yield pair

    model = models.make("chain")
    state = start(model, Recipe(epochs=1))
    state.batch = 3
    run(model, Recipe(epochs=1), data=Data(batches(4)), state=state)
    assert len(made) == 1


def test_accumulated_gradients_take_the_step_of_the_whole_batch():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    small = copy.deepcopy(plain)
    images, target = models.images(16), models.labels(16)
    run(plain, Recipe(epochs=1, optim={"opt": "sgd", "lr": 0.1}), data=[(images, target)])
    halves = list(zip(images.split(8), target.split(8), strict=True))
    recipe = Recipe(
        epochs=1, optim={"opt": "sgd", "lr": 0.1, "grad_accum_steps": 2, "sched": "constant"}
    )
    run(small, recipe, data=halves)
    torch.testing.assert_close(plain[1].weight, small[1].weight)


def test_clipping_bounds_the_step():
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    before = model[1].weight.clone()
    recipe = Recipe(
        epochs=1,
        optim={"opt": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "clip_grad": 1e-3},
    )
    run(model, recipe, data=batches(1))
    assert (model[1].weight - before).norm() <= 1e-3 * 1.01


def test_weight_decay_spares_biases_and_norms():
    optimizer = start(models.make("chain"), Recipe(optim={"weight_decay": 0.1})).optimizer
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.1) for p in group["params"])


def test_the_order_of_data_is_asked_for_epoch_by_epoch():
    class Data(list):
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs = (*self.epochs, epoch)

    data = Data(batches(1))
    run(models.make("chain"), Recipe(epochs=3), data=data)
    assert data.epochs == (0, 1, 2)


def test_mixed_precision_trains_and_keeps_the_weights_in_full_precision():
    model = models.make("chain")
    epochs = run(model, Recipe(epochs=1, amp=True))
    assert math.isfinite(epochs[0].losses["total"])
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def schedule(**optim):
    recipe = Recipe(epochs=10, optim={"lr": 1.0, **optim})
    return [round(learning_rate_at(recipe, i / 10), 3) for i in range(11)]


def test_schedules_are_those_of_their_names():
    assert schedule(sched="constant") == [1.0] * 11
    assert schedule(sched="step", decay_at=[0.5, 0.8])[3:] == [
        1.0,
        1.0,
        0.1,
        0.1,
        0.1,
        0.01,
        0.01,
        0.01,
    ]
    cosine = schedule(sched="cosine", min_lr=0.1)
    assert (cosine[0], cosine[5], cosine[10]) == (1.0, 0.55, 0.1)
    warm = schedule(sched="constant", warmup_epochs=4)
    assert warm[:6] == [0.01, 0.25, 0.5, 0.75, 1.0, 1.0]
