"""Train a graph: batches and a loss in, one Epoch per iteration out.

Knows no surgery and no files. An update that is not finite changes nothing; a stop that was asked
for takes effect after the update, so that what is saved can be resumed exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any

from torch import Tensor, nn

from kdsurgeon.errors import UsageError
from kdsurgeon.recipe import Recipe
from kdsurgeon.tracing import Inputs
from kdsurgeon.training.optimising import learning_rate_at
from kdsurgeon.training.randomness import RandomState
from kdsurgeon.training.records import Batches, Epoch, Moment, Objective, Step, Trouble
from kdsurgeon.training.state import TrainingState, start
from kdsurgeon.training.stopping import StopWaiting, waiting
from kdsurgeon.training.together import Together
from kdsurgeon.training.updating import Batch, Updater


def train(
    model: nn.Module,
    objective: Objective,
    batches: Batches,
    recipe: Recipe,
    *,
    state: TrainingState | None = None,
    stop: Callable[[], bool] = lambda: False,
    watch: Callable[[Step], None] = lambda _: None,
    finish: Callable[[Epoch], Epoch] = lambda epoch: epoch,
    report: Callable[[Trouble], None] = lambda _: None,
    together: Together | None = None,
) -> Iterator[Epoch]:
    """Train ``model`` in place, yielding after every epoch.

    Args:
        model: all its parameters are trained.
        objective: what is minimised; runs ``model``.
        batches: pairs of inputs, a tensor (batch, …) or several by name, and targets, iterated
            anew each epoch; ``set_epoch(epoch)`` is called before, where it exists, and
            ``start_at(batch)``. Others are read up to there, with the generators of random numbers
            as they were when the epoch began.
        state: go on from here; begin at the beginning when left out.
        stop: asked after every update; True ends the epoch there, incomplete.
        watch: told about every update, while nothing is half done.
        finish: what else belongs to an epoch, such as its evaluation; where it gives the epoch
            back with ``is_complete`` False, the run ends, and does it again when it goes on.
        report: told about every update that could not be taken as it was.
        together: with other processes, of which each runs this on its part of ``batches``, which
            are the whole ones here, too.

    Raises:
        NumericsError: loss or gradient is not finite; names the step; the step is not taken.
        ResourceError: a batch does not fit into memory; names the size that does.
    """
    state = start(model, recipe) if state is None else state
    count = _count(batches)
    names, whole = _names_of(batches), batches
    updater = Updater(model, objective, recipe, state, report, names, together, stop)
    if together is not None:
        batches, stop = together.ranks.part_of(whole), lambda: together.asked
    while state.epoch < recipe.epochs:
        if batches is not whole and hasattr(whole, "set_epoch"):
            whole.set_epoch(state.epoch)  # pyright: ignore[reportAttributeAccessIssue]
        began, seen = time.monotonic(), state.samples
        stopped = False
        model.train()
        try:
            for group, size in _groups(batches, recipe, state, count, stop):
                before = state.batch
                updater.take(group, size)
                if state.batch == before:  # fewer batches than they said
                    break
                speed = (state.samples - seen) / max(time.monotonic() - began, 1e-9)
                watch(Step(state.epoch, state.batch, count, state.step, state.means(), speed))
                if stop() and state.batch < count:
                    stopped = True
                    break
        except StopWaiting:
            stopped = True
            if not state.batch:
                state.epoch_random.set()  # the order is drawn again
        epoch = _epoch(state, recipe, count, began, is_complete=not stopped)
        if not stopped:
            epoch = finish(epoch)
        if epoch.is_complete:
            state.next_epoch()
        yield epoch
        if stop() or not epoch.is_complete:
            return


def _groups(
    batches: Batches,
    recipe: Recipe,
    state: TrainingState,
    count: int,
    stop: Callable[[], bool],
) -> Iterator[tuple[Iterator[Batch], int]]:
    """What makes up one update each: batches as they come, and how many they should be."""
    source = _rest_of_epoch(batches, state, stop)
    while state.batch < count:
        steps = recipe.optim.grad_accum_steps
        size = min(steps - state.batch % steps, count - state.batch)
        yield _group(source, size, recipe, state, count, stop), size


def _group(
    source: Iterator[tuple[Inputs, Tensor]],
    size: int,
    recipe: Recipe,
    state: TrainingState,
    count: int,
    stop: Callable[[], bool],
) -> Iterator[Batch]:
    first = state.epoch * count + state.batch
    for step in range(first, first + size):
        with waiting(stop):
            pair = next(source, None)
        if pair is None:
            return
        moment = Moment(step / (recipe.epochs * count), step)
        rate = learning_rate_at(recipe, moment.progress)
        for parameters in state.optimizer.param_groups:
            parameters["lr"] = rate
        yield *pair, moment


def _count(batches: Batches) -> int:
    """Batches in an epoch; the schedule needs to know it before the first step."""
    count = len(batches) if isinstance(batches, Sized) else 0
    if not count:
        raise UsageError(
            "the batches have no length, or there are none.",
            fix="give a list or a DataLoader over a dataset with a length",
        )
    return count


def _rest_of_epoch(
    batches: Batches, state: TrainingState, stop: Callable[[], bool]
) -> Iterator[tuple[Inputs, Tensor]]:
    """From where the run stands; batches that can start there are not made to be skipped."""
    source: Any = batches
    if hasattr(source, "set_epoch"):
        source.set_epoch(state.epoch)
    if not state.batch:
        state.epoch_random = RandomState.now()
    if hasattr(source, "start_at"):
        source.start_at(state.batch)
        return iter(source)
    here = RandomState.now()
    state.epoch_random.set()  # in which the order is drawn
    rest = iter(source)
    if state.batch:
        try:
            with waiting(stop):
                for _ in islice(rest, state.batch):
                    pass
        finally:
            here.set()
    return rest


def _names_of(batches: Batches) -> Callable[[int, int], Sequence[str | int]]:
    """The samples of a range of batches of the current epoch, as far as the batches know them."""
    source: Any = batches
    known = getattr(source, "sample_ids", None) or getattr(source, "rows", None)

    def names(first: int, last: int) -> Sequence[str | int]:
        if known is None:
            return ()
        found = (name for batch in range(first, last) for name in known(batch))
        return tuple(name if isinstance(name, str) else int(name) for name in found)

    return names


def _epoch(
    state: TrainingState, recipe: Recipe, count: int, began: float, *, is_complete: bool
) -> Epoch:
    last = max(0, state.epoch * count + state.batch - 1)
    return Epoch(
        number=state.epoch + 1,
        epochs=recipe.epochs,
        steps=state.batch,
        samples=state.samples,
        losses=state.means(),
        learning_rate=learning_rate_at(recipe, last / (recipe.epochs * count)),
        seconds=time.monotonic() - began,
        is_complete=is_complete,
        skipped=state.skipped,
    )
