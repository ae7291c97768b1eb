import copy
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from kdsurgeon.errors import ConfigError, NumericsError, ResourceError, UsageError
from kdsurgeon.losses import Losses, task_loss
from kdsurgeon.recipe import Recipe
from kdsurgeon.recipe.records import TIMM_OPTIMIZERS
from kdsurgeon.stones import partition, synthesize
from kdsurgeon.training import (
    Moment,
    Stop,
    StopWaiting,
    compiled,
    determinism,
    fastest_layout,
    learning_rate_at,
    start,
    train,
    until,
)
from tests import bootstrap, models


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
    for name, value in model.state_dict().items():  # the statistics of its forward pass, too
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
    once = schedule(sched="onecycle", min_lr=0.2)
    assert (once[0], once[3], once[10]) == (0.04, 1.0, 0.2)
    assert once[:4] == sorted(once[:4]) and once[3:] == sorted(once[3:], reverse=True)
    assert schedule(sched="onecycle", warmup_epochs=5)[5] == 1.0


# ── what people expect of an optimiser ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("opt", TIMM_OPTIMIZERS)
def test_an_optimiser_of_timm_goes_on_bit_for_bit(opt):
    assert bootstrap
    recipe = Recipe(epochs=2, optim={"opt": opt, "lr": 1e-3})
    torch.manual_seed(0)
    whole, halted = models.make("residual", dropout=0.3), models.make("residual", dropout=0.3)
    run(whole, recipe)
    torch.manual_seed(0)
    state, seen = start(halted, recipe), []
    run(halted, recipe, state=state, watch=seen.append, stop=lambda: len(seen) == 2)
    numbers = json.loads(json.dumps(state.numbers()))
    tensors = {
        file: {name: value.clone() for name, value in values.items()}
        for file, values in state.tensors().items()
    }
    torch.manual_seed(9)
    again = start(halted, recipe)
    again.restore(numbers, tensors)
    run(halted, recipe, state=again)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, halted.state_dict()[name]), name


def test_an_optimiser_of_timm_without_timm_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("kdsurgeon.recipe.records.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"opt lamb comes with timm, .* pip install timm"):
        Recipe(optim={"opt": "lamb"})


def test_the_average_is_that_of_all_updates():
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10), nn.BatchNorm1d(10))
    recipe = Recipe(epochs=2, optim={"model_ema": True, "model_ema_decay": 0.75})
    state, states = start(model, recipe), [copy.deepcopy(model.state_dict())]
    run(
        model, recipe, state=state, watch=lambda _: states.append(copy.deepcopy(model.state_dict()))
    )
    assert len(states) == 7
    for name, value in state.average.tensors.items():
        if not value.is_floating_point():
            assert torch.equal(value, states[-1][name])
            continue
        wanted = states[0][name].double()
        for each in states[1:]:
            wanted = 0.75 * wanted + 0.25 * each[name].double()
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)
    with state.average.in_place():
        assert torch.equal(model[1].weight, state.average.tensors["1.weight"])
    assert torch.equal(model[1].weight, states[-1]["1.weight"])


def test_a_short_last_accumulation_is_the_mean_of_its_own_batches():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    small = copy.deepcopy(plain)
    recipe = Recipe(epochs=1, optim={"opt": "sgd", "lr": 0.1, "sched": "constant"})
    run(plain, recipe, data=batches(1))
    run(small, recipe.replace(optim={**dict(recipe.optim), "grad_accum_steps": 4}), data=batches(1))
    assert torch.equal(plain[1].weight, small[1].weight)


# ── float16 and its scale ────────────────────────────────────────────────────────────────────────


def test_float16_scales_the_loss_and_keeps_the_weights_in_full_precision():
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    recipe = Recipe(epochs=2, amp=True, amp_dtype="float16")
    state = start(model, recipe)
    assert math.isfinite(run(model, recipe, state=state)[-1].losses["total"])
    assert state.numbers()["scaler"]["scale"] == 2.0**16
    assert state.numbers()["scaler"]["_growth_tracker"] == state.step == 6
    assert model[1].weight.dtype == torch.float32


def test_a_gradient_too_large_for_float16_halves_the_scale_and_takes_no_step():
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    recipe = Recipe(epochs=1, amp=True, amp_dtype="float16")
    state, before = start(model, recipe), copy.deepcopy(model.state_dict())

    def huge(images, target, _):  # 3 · 2^16 does not fit into float16
        return Losses(model(images).half().sum() * 3, {})

    list(train(model, huge, batches(1), recipe, state=state))
    assert (state.step, state.skipped, state.numbers()["scaler"]["scale"]) == (0, 0, 2.0**15)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ── numbers that are not finite ──────────────────────────────────────────────────────────────────


def breaks_at(model, *steps):
    calls = []

    def loss(images, target, moment):
        losses = task_loss(model(images), target)
        calls.append(moment.step)
        return replace(losses, total=losses.total * math.nan) if moment.step in steps else losses

    return loss


def test_updates_that_are_not_finite_are_skipped_and_counted_up_to_a_limit():
    recipe = Recipe(epochs=2, optim={"skip_nan": 2})
    model = models.make("chain")
    troubles, state = [], start(model, recipe)
    epochs = list(train(model, breaks_at(model, 1, 4), batches(), recipe, state=state,
                        report=troubles.append))  # fmt: skip
    assert [epoch.skipped for epoch in epochs] == [1, 2]
    assert (state.step, len(troubles)) == (4, 2)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    with pytest.raises(NumericsError, match="step 3: the loss is nan") as caught:
        list(train(model, breaks_at(model, 0, 1, 4), batches(), recipe))
    assert caught.value.notes["why"] == "2 updates were skipped before"


def test_what_was_skipped_leaves_no_trace():
    recipe = Recipe(epochs=1, optim={"skip_nan": 1, "sched": "constant"})
    first, second = models.make("residual"), models.make("residual")
    data = batches(3)
    list(train(first, breaks_at(first, 1), data, recipe))
    list(train(second, of(second), [data[0], data[2]], recipe))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


# ── memory ───────────────────────────────────────────────────────────────────────────────────────


def hungry(model, most):
    """An objective for which more than ``most`` samples at once are too many."""

    def loss(images, target, _):
        found = task_loss(model(images), target)
        if len(images) > most:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 2.00 GiB")
        return found

    return loss


def test_a_batch_that_does_not_fit_goes_through_in_parts_for_the_same_update():
    whole = nn.Sequential(nn.Flatten(), nn.Linear(768, 10)).double()
    parts = copy.deepcopy(whole)
    data = [(images.double(), target) for images, target in batches(3, size=7)]
    recipe = Recipe(epochs=2, channels_last=False,
                    optim={"grad_accum_steps": 2, "auto_batch": True})  # fmt: skip
    state, troubles = start(parts, recipe), []
    one = list(train(whole, of(whole), data, recipe))
    two = list(train(parts, hungry(parts, 2), data, recipe, state=state, report=troubles.append))
    assert state.splits == 4
    assert [trouble.what for trouble in troubles] == ["memory"] * 2
    torch.testing.assert_close(whole[1].weight, parts[1].weight, rtol=1e-12, atol=1e-14)
    assert two[-1].losses["total"] == pytest.approx(one[-1].losses["total"], rel=1e-12)
    assert [epoch.samples for epoch in two] == [21, 21]


def test_parts_of_a_batch_count_by_the_samples_that_count():
    whole = nn.Sequential(nn.Flatten(), nn.Linear(768, 10)).double()
    parts = copy.deepcopy(whole)
    data = [(models.images(8).double(), torch.tensor([1, -1, -1, -1, 2, 3, 4, 5]))]
    recipe = Recipe(epochs=1, channels_last=False, loss={"ignore_index": -1},
                    optim={"auto_batch": True})  # fmt: skip
    for model, most in ((whole, 8), (parts, 4)):

        def loss(images, target, _, model=model, most=most):
            if len(images) > most:
                raise torch.OutOfMemoryError("out of memory")
            return task_loss(model(images), target, ignore_index=-1)

        list(train(model, loss, data, recipe))
    torch.testing.assert_close(whole[1].weight, parts[1].weight, rtol=1e-12, atol=1e-14)


def test_without_being_asked_to_the_size_that_fits_is_named_and_nothing_changes():
    model = models.make("residual", dropout=0.3)
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    recipe = Recipe(epochs=1, channels_last=False)
    with pytest.raises(ResourceError, match="a batch of 8 does not fit") as caught:
        list(train(model, hungry(model, 3), batches(1), recipe))
    assert caught.value.exit_code == 6
    assert "--batch-size 2 and, for the same update, --grad-accum-steps 4" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("auto", [False, True])
def test_when_not_even_one_sample_fits_that_is_said(auto):
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    recipe = Recipe(epochs=1, channels_last=False, optim={"auto_batch": auto})
    with pytest.raises(ResourceError) as caught:
        list(train(model, hungry(model, 0), batches(1), recipe))
    assert "not even one sample fits" in str(caught.value)


def test_parts_are_refused_where_batch_normalisation_trains():
    recipe = Recipe(epochs=1, optim={"auto_batch": True})
    with pytest.raises(UsageError, match="change what batch normalisation computes") as caught:
        run(models.make("residual"), recipe)
    assert "--auto-batch-norm" in caught.value.notes["fix"]
    run(
        models.make("residual"),
        Recipe(optim={"auto_batch": True, "auto_batch_norm": True}, epochs=1),
    )


# ── stopping, layout, determinism, compile ───────────────────────────────────────────────────────


def test_a_stop_ends_a_wait_and_nothing_else():
    stop = Stop()
    assert list(until(stop, "ab")) == ["a", "b"]

    def asks():
        yield 1
        stop.ask()  # as a signal that comes while this one is waited for
        raise AssertionError

    found = []
    with pytest.raises(StopWaiting):
        found.extend(until(stop, asks()))
    assert stop()
    stop.ask()  # nothing waits: it is only noted


@pytest.mark.parametrize("wanted", [None, True, False])
def test_the_layout_of_images_is_the_one_asked_for(wanted):
    model, seen = models.make("chain"), []

    def loss(images, target, _):
        seen.append(images.is_contiguous(memory_format=torch.channels_last))
        return task_loss(model(images), target)

    list(train(model, loss, batches(1), Recipe(epochs=1, channels_last=wanted)))
    assert seen[-1] == (wanted is not False)


def test_determinism_lasts_as_long_as_its_context(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    with determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert before == (
        torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    )  # fmt: skip


def test_an_operation_that_is_never_the_same_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))

    def loss(images, target, moment):
        losses = task_loss(model(images), target)
        losses.total.register_hook(_complain)
        return losses

    with pytest.raises(UsageError, match="cannot be trained with --deterministic"):
        list(train(model, loss, batches(1), Recipe(epochs=1, channels_last=False)))


def _complain(_):
    raise RuntimeError("put_ does not have a deterministic implementation, but you set …")


def test_what_cannot_be_compiled_runs_as_it_is_and_says_why(monkeypatch):
    model = models.make("residual", dropout=0.3)
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def trial(candidate):
        candidate(models.images(4))
        raise ValueError("no compiler here\nmore")

    monkeypatch.setattr(torch, "compile", lambda module: module)
    found, note = compiled(model, trial)
    assert found is model
    assert note == "compile  not done, the graph runs as it is: ValueError: no compiler here"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_program_that_cannot_be_compiled_later_runs_as_it_is_from_there(monkeypatch):
    from torch._dynamo.exc import InternalTorchDynamoError

    stances, troubles, calls = [], [], []
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    model, plain = models.make("residual", dropout=0.3), models.make("residual", dropout=0.3)

    def fails_once(images, target, moment):
        losses = task_loss(model(images), target)
        calls.append(1)
        if len(calls) == 2:
            raise InternalTorchDynamoError("no symbol\nmore")
        return losses

    recipe = Recipe(epochs=1, channels_last=False)
    torch.manual_seed(0)
    list(train(model, fails_once, batches(), recipe, report=troubles.append))
    torch.manual_seed(0)
    list(train(plain, of(plain), batches(), recipe))
    assert stances == ["force_eager"]
    assert "could not be compiled: InternalTorchDynamoError: no symbol" in troubles[0].text
    assert torch.equal(model.head.weight, plain.head.weight)
