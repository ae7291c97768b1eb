"""An interrupted run goes on as if nothing had been; what could break that is noticed."""

import copy
import json
import math
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from kdsurgeon.cli import main, signals
from kdsurgeon.errors import ModelFileError, NumericsError, UsageError
from kdsurgeon.evaluation import accuracy
from kdsurgeon.keeping import Keeper, load_weights
from kdsurgeon.recipe import Recipe
from kdsurgeon.runs import Run, read_checkpoint
from kdsurgeon.training import RandomState, Stop, TrainingState, conditions, start
from kdsurgeon.training.exactness import changes, is_exact
from tests.resuming import (
    EVERYTHING,
    augmented,
    differing,
    fresh,
    go,
    interrupted_everywhere,
    outcome,
    ready,
    state_of,
)


def everything(steps=1, **changed):
    optim = EVERYTHING["optim"] | {"grad_accum_steps": steps}
    return Recipe(**EVERYTHING | {"optim": optim} | changed)


# ── G11: resume is exact ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("data", "steps"), [("noisy", 1), ("augmented", 2)])
def test_a_run_that_stops_after_any_update_goes_on_bit_for_bit(data, steps, tmp_path):
    assert interrupted_everywhere(tmp_path, everything(steps), data) == []


def test_three_stops_in_one_epoch_change_nothing(tmp_path):
    recipe = everything()
    go(tmp_path / "whole", recipe)
    counts = [fresh(go, tmp_path / "halted", recipe, "noisy", count) for count in (2, 3, 1, None)]
    assert counts == [2, 3, 1, 14]
    assert differing(outcome(tmp_path / "whole"), outcome(tmp_path / "halted")) == []


@pytest.mark.parametrize("waits", [True, False])
def test_a_stop_in_an_accumulation_takes_effect_where_nothing_is_half_done(waits, tmp_path):
    """After its update; or before it, where the run is not to wait for data either."""
    recipe, stop, seen = everything(2), Stop(), []
    made = ready(recipe, "noisy")
    objective = made.objective

    def asked(*batch):
        seen.append(1)
        if len(seen) == 6:  # one looked for the layout; the first of two of the third update
            stop.ask()
        return objective(*batch)

    object.__setattr__(made, "objective", asked)
    with Run.create(tmp_path / "run") as run:
        epochs = list(made.epochs(run=run, stop=(lambda: stop()) if waits else stop))
        run.write("config.yaml", "x: 1\n")
    assert [(epoch.steps, epoch.is_complete) for epoch in epochs] == [(6 if waits else 4, False)]
    go(tmp_path / "run", recipe)
    go(tmp_path / "whole", recipe)
    assert differing(outcome(tmp_path / "run"), outcome(tmp_path / "whole")) == []


class Dies(BaseException):
    """As kill -9 does it: nothing is tidied up."""


@pytest.mark.parametrize("at", [1, 2, 3])  # the first half, the second half, the second epoch's
def test_a_run_killed_while_it_is_evaluated_goes_on_bit_for_bit(at, tmp_path):
    recipe = everything(checkpoint_every=4)
    go(tmp_path / "whole", recipe)
    calls = []

    def measured(*given, **named):
        calls.append(1)
        if len(calls) == at + 1:  # the teacher's is the first
            raise Dies
        return accuracy(*given, **named)

    with patch("kdsurgeon.distillation.accuracy", measured), pytest.raises(Dies):
        go(tmp_path / "killed", recipe)
    assert state_of(tmp_path / "killed")["state/step"] == (8 if at < 3 else 16)
    assert fresh(go, tmp_path / "killed", recipe) == 20 - (8 if at < 3 else 16)
    assert differing(outcome(tmp_path / "whole"), outcome(tmp_path / "killed")) == []


def test_every_generator_of_random_numbers_comes_back():
    def drawn():
        return (
            random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(),
            torch.rand(1).item(),
        )  # fmt: skip

    drawn()  # a normal number is kept back by two of them
    before = RandomState.now().tensors()
    first = drawn()
    RandomState.of(before).set()
    assert drawn() == first
    assert all(
        value.dtype in (torch.int64, torch.float64, torch.uint8) for value in before.values()
    )
    with pytest.raises(ModelFileError, match="other generators"):
        RandomState.of(before | {"cuda.0": before["cpu"]})


# ── G12: every item of the state is needed ───────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run at one go with a checkpoint after every update."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    go(folder, everything(checkpoint_every=1))
    return folder


def items(checkpoint):
    """(where, name) of everything in a checkpoint's state."""
    numbers = checkpoint.state["training"]
    yield from (("numbers", name) for name in numbers)
    yield from (("groups", name) for name in numbers["groups"][0])
    for file in ("optimizer", "random", "epoch_random", "ema"):
        yield "files", file
        yield from ((file, name) for name in list(checkpoint.tensors[file])[:5])


def test_a_state_that_lacks_an_item_is_refused(whole):
    path = whole / "checkpoints" / "step-000007"
    made = ready(everything(), "noisy")
    tried = list(items(read_checkpoint(path)))
    assert len(tried) > 40
    for where, name in tried:
        checkpoint = read_checkpoint(path)
        numbers = checkpoint.state["training"]
        files = {k: v for k, v in checkpoint.tensors.items() if k not in ("student", "adapters")}
        places = {"numbers": numbers, "groups": numbers["groups"][0], "files": files, **files}
        del places[where][name]
        with pytest.raises(ModelFileError, match=r"not that of this run|other generators"):
            start(made.model, made.recipe, averaged=made.student).restore(numbers, files)
    saved = read_checkpoint(path).tensors
    for part, name in ((p, name) for p in ("student", "adapters") for name in saved[p]):
        checkpoint = read_checkpoint(path)
        del checkpoint.tensors[part][name]
        with pytest.raises(ModelFileError, match=f"other {part} weights"):
            load_weights(made.model, checkpoint)


def forget_moments(name):
    def forget(keeper):
        for values in keeper.state.optimizer.state.values():
            values[name].zero_()

    return forget


def forget_number(name):
    def forget(keeper):
        fresh_state = start(keeper.model, keeper.recipe)
        setattr(keeper.state, name, getattr(fresh_state, name))

    return forget


def forget_generator(name):
    def forget(keeper):
        now = RandomState.now()
        other = {"python": random.Random(1).getstate(), "cpu": torch.Generator().get_state(),
                 "numpy": np.random.RandomState(1).get_state(legacy=True)}[name]  # fmt: skip
        RandomState(**{**vars(now), name: other}).set()

    return forget


def forget_weights(kind):
    def forget(keeper):
        anew = ready(keeper.recipe, "noisy")
        random_state = RandomState.now()
        if kind == "adapters":
            keeper.model.adapters.load_state_dict(anew.model.adapters.state_dict())
        else:
            own = dict(getattr(anew.student, f"named_{kind}")())
            keeper.student.load_state_dict(own, strict=False)
        random_state.set()

    return forget


def forget_average(keeper):
    keeper.state.average.tensors = {k: v.clone() for k, v in keeper.student.state_dict().items()}


FORGOTTEN = {
    **{name: forget_number(name) for name in ("epoch", "batch", "step", "samples", "sums",
                                              "counts", "skipped", "epoch_random")},
    **{name: forget_moments(name) for name in ("exp_avg", "exp_avg_sq", "step of adamw")},
    **{f"random of {name}": forget_generator(name) for name in ("python", "numpy", "cpu")},
    **{name: forget_weights(name) for name in ("parameters", "buffers", "adapters")},
    "average": forget_average,
    "metrics": lambda keeper: keeper.run.write("metrics.jsonl", ""),
}  # fmt: skip
FORGOTTEN["step of adamw"] = forget_moments("step")


@pytest.mark.parametrize("item", [None, *FORGOTTEN])
def test_a_run_that_forgets_an_item_is_noticed(item, whole, tmp_path):
    """The comparison of the tests above has teeth: without a fault it finds nothing, with any it
    does."""
    recipe = everything(checkpoint_every=1)
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    for path in (folder / "checkpoints").iterdir():
        if path.name > "step-000013":
            shutil.rmtree(path)
    begin = Keeper.begin

    def forgetful(keeper, allow_change):
        begin(keeper, allow_change)
        if item == "skipped":
            keeper.state.skipped = 1
        elif item is not None:
            random_state = RandomState.now()
            if not item.startswith("random"):
                FORGOTTEN[item](keeper)
                random_state.set()
            else:
                FORGOTTEN[item](keeper)

    with patch.object(Keeper, "begin", forgetful):
        try:
            go(folder, recipe)
            found = differing(outcome(folder), outcome(whole))
        except (ModelFileError, NumericsError, KeyError) as error:  # as well
            found = [str(error)]
    assert bool(found) == (item is not None), found


# ── what may change ──────────────────────────────────────────────────────────────────────────────


def conditions_of(**changed):
    return conditions(Recipe(epochs=4).replace(**changed), torch.device("cpu"))


@pytest.mark.parametrize(
    ("changed", "exact"),
    [
        ({}, True),
        ({"checkpoint_every": 5}, True),
        ({"optim": {"skip_nan": 3}}, True),
        ({"epochs": 9}, False),
    ],
)
def test_some_settings_may_change(changed, exact):
    found = changes(conditions_of(), conditions_of(**changed))
    assert len(found) == len(changed)
    assert is_exact(found) == exact


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"epochs": 3}, "epochs was 4, is 3"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"loss": {"temperature": 2.0}}, "loss.temperature was 4.0, is 2.0"),
        ({"batch_size": 8, "amp": True}, "amp was False, is True, batch_size was 64, is 8"),
    ],
)
def test_others_are_refused_by_name(changed, named):
    with pytest.raises(UsageError, match=f"would not be the same: {named}"):
        changes(conditions_of(), conditions_of(**changed))


@pytest.mark.parametrize("name", ["threads", "torch", "world-size", "device"])
def test_another_machine_is_refused_unless_it_is_allowed(name):
    other = conditions_of() | {name: "another"}
    with pytest.raises(UsageError, match=f"the same: {name} was") as caught:
        changes(conditions_of(), other)
    assert f"--allow-change {name}" in caught.value.notes["fix"]
    assert is_exact(found := changes(conditions_of(), other, [name])) is False
    assert list(found) == [name]


def test_a_change_of_conditions_begins_with_a_checkpoint_of_its_own(tmp_path):
    recipe = Recipe(method="ce", epochs=1)
    go(tmp_path / "run", recipe, updates=3)
    with pytest.raises(UsageError, match="threads was 1, is 2"):
        go(tmp_path / "run", recipe, threads=2)
    torch.set_num_threads(1)
    assert go(tmp_path / "run", recipe.replace(epochs=2)) == 17
    assert "changed: epochs was 1, is 2" in (tmp_path / "run" / "train.log").read_text()


# ── G13: signals ─────────────────────────────────────────────────────────────────────────────────


LINE = ("distill", "teacher.pt", "student.pt", "--data-dir", "digits", "-b", "256",
        "--method", "kd", "--track", "none", "-o", "run")  # fmt: skip
CALIBRATED = ("--method", "block-kd", "--set", "loss.adapter_init=least-squares")
PHASES = {
    "load": ("kdsurgeon.cli.session.load_model", ()),
    "calibrate": ("kdsurgeon.distillation.fit_adapters", CALIBRATED),
    "train": ("kdsurgeon.training.updating.Updater._step", ()),
    "eval": ("kdsurgeon.evaluation.logits_of", ()),
    "save": ("kdsurgeon.runs.Run._write", ()),
    "prune": ("kdsurgeon.runs.Run._prune", ()),
    "export": ("kdsurgeon.exporting.onnx.torch.onnx.export", ()),
    "data wait": ("kdsurgeon.training.loop._rest_of_epoch", ()),
}
TRAINS = ("train", "eval", "save", "prune", "data wait")


def signalled(folder, phase, number, twice=False):
    """The exit code of a command that is sent a signal inside ``phase``, and seconds until then."""
    os.chdir(folder)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    name, more = PHASES[phase]
    sent, calls = [], []
    own = pkgutil.resolve_name(name)

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    def slow(source):
        yield next(source)
        threading.Timer(0.1, send).start()
        time.sleep(60)

    def sends(*given, **options):
        calls.append(1)
        if phase == "data wait":
            return slow(own(*given, **options))
        if len(calls) == (8 if phase == "eval" else 2 if phase in TRAINS else 1):
            send()
            if twice:
                threading.Timer(0.1, send).start()
                time.sleep(60)
        return own(*given, **options)

    line = (*LINE, *more)
    if phase == "export":
        line = ("export", "student.pt", "student.onnx")
    with patch(name, sends):
        code = main(line)
    return code, time.monotonic() - sent[-1]


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_ends_every_phase_with_its_code_and_nothing_lost(phase, digit_models, tmp_path):
    shutil.copytree(digit_models, tmp_path, dirs_exist_ok=True)
    number = signal.SIGTERM if list(PHASES).index(phase) % 2 else signal.SIGINT
    code, seconds = fresh(signalled, tmp_path, phase, number)
    assert code == 128 + number
    assert seconds < 20  # two of an idle machine, and it is not idle
    assert list(tmp_path.rglob(".tmp*")) + list(tmp_path.rglob("*.onnx")) == []
    if phase in TRAINS:
        with Run.resume(tmp_path / "run") as run:
            checkpoint, complaints = run.latest_checkpoint()
        assert checkpoint is not None and complaints == []
    else:
        assert not (tmp_path / "run").exists()


class SendsWhenDeleted:
    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        for _ in range(1000):  # the handler runs in here, and Python drops what it raises
            pass


@pytest.mark.parametrize("number", signals.NUMBERS)
def test_a_signal_that_comes_while_an_object_is_deleted_is_not_lost(number):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with signals.terminable(), pytest.raises(KeyboardInterrupt) as caught:
            SendsWhenDeleted(number)
            time.sleep(30)
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(caught.value, signals.Terminated) == (number == signal.SIGTERM)


@pytest.mark.parametrize("number", signals.NUMBERS)
def test_a_stop_that_is_asked_for_while_an_object_is_deleted_is_seen_at_the_next_poll(number):
    stop = Stop()
    with signals.terminable(), signals.interruptible(stop) as interrupt, stop.waiting():
        SendsWhenDeleted(number)
    assert stop() and interrupt.signal == number


def test_a_second_signal_ends_at_once(digit_models, tmp_path):
    shutil.copytree(digit_models, tmp_path, dirs_exist_ok=True)
    code, seconds = fresh(signalled, tmp_path, "train", signal.SIGINT, True)
    assert code == 130
    assert seconds < 10


def test_a_run_whose_reader_has_seen_enough_ends_without_a_traceback(digit_models, tmp_path):
    command = f"{sys.executable} -m kdsurgeon {' '.join(LINE)} | head -n 1"
    shutil.copytree(digit_models, tmp_path, dirs_exist_ok=True)
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


# ── G15: no step with a number that is not finite ────────────────────────────────────────────────


def poison(made, where, at):
    """Let a number become NaN or infinite in the ``at``-th batch."""
    calls, objective = [], made.objective

    def poisoned(*batch):
        calls.append(1)
        if len(calls) != at:
            return objective(*batch)
        if where == "weight":
            with torch.no_grad():
                next(made.student.parameters())[0].fill_(math.inf)
        if where == "teacher logits":
            given = made.plan.teacher.trace.model.head.bias
            with torch.no_grad():
                given[0] = math.nan
        losses = objective(*batch)
        factor = {"loss": math.inf, "gradient": 1.0}.get(where, 1.0)
        total = losses.total * factor
        if where == "gradient":
            total = total + (losses.total * 0).sqrt()  # 0 with an infinite slope
        return replace(losses, total=total)

    object.__setattr__(made, "objective", poisoned)


@pytest.mark.parametrize("where", ["loss", "gradient", "weight", "teacher logits"])
def test_a_number_that_is_not_finite_changes_nothing_and_saves_nothing(where, tmp_path):
    made = ready(everything(2, checkpoint_every=1), "augmented")
    poison(made, where, 7)  # in the middle of the third update; the layout asks once
    states = []
    with Run.create(tmp_path / "run") as run, pytest.raises(NumericsError) as caught:
        for _ in made.epochs(
            run=run, watch=lambda _: states.append(copy.deepcopy(made.model.state_dict()))
        ):
            pass
    assert caught.value.exit_code == 5
    assert len(states) == 2  # no third update
    poisoned = next(iter(states[-1]))
    for name, value in made.model.state_dict().items():
        if where != "weight" or name != poisoned:
            assert torch.equal(value, states[-1][name]), name
    assert state_of(tmp_path / "run")["state/step"] == 2
    file = json.loads((tmp_path / "run" / "nan-step-3.json").read_text())
    first = 5 if where != "gradient" else 4
    known = augmented()
    assert file["samples"] == [
        name for batch in range(first, 6) for name in known.sample_ids(batch)
    ]


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    made = ready(Recipe(method="ce", epochs=1), "noisy")
    spare = next(made.student.parameters())
    with Run.create(tmp_path / "run") as run:
        keeper = Keeper(run, made.model, start(made.model, made.recipe), made.recipe, None)
        with torch.no_grad():
            spare[0].fill_(math.nan)
        with pytest.raises(NumericsError, match="not finite; nothing was saved"):
            keeper.begin()
        assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


# ── G23: reproducible ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_seed_in_two_processes_gives_the_same_bytes(threads, tmp_path):
    for seed in range(3):
        for name in ("one", "two"):
            recipe = everything(epochs=1, seed=seed)
            fresh(go, tmp_path / f"{name}-{seed}", recipe, "augmented", None, threads)
        assert differing(outcome(tmp_path / f"one-{seed}"), outcome(tmp_path / f"two-{seed}")) == []
    assert differing(outcome(tmp_path / "one-0"), outcome(tmp_path / "one-1")) != []


def test_a_state_says_what_it_keeps():
    """A new thing that changes during training needs an entry: this list is looked at then."""
    assert list(TrainingState.__dataclass_fields__) == [
        "optimizer", "scaler", "average", "epoch", "batch", "step", "samples", "skipped",
        "splits", "sums", "counts", "epoch_random",
    ]  # fmt: skip
