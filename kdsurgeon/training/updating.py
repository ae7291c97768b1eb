"""Take one update from a group of batches, or leave everything as it was before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdsurgeon.errors import NumericsError, ResourceError, UsageError
from kdsurgeon.losses import Losses
from kdsurgeon.recipe import Recipe
from kdsurgeon.tracing import Inputs, move
from kdsurgeon.training.layout import arranged, fastest_layout
from kdsurgeon.training.randomness import RandomState
from kdsurgeon.training.records import Moment, Objective, Trouble
from kdsurgeon.training.sharding import clip, total_norm
from kdsurgeon.training.state import TrainingState
from kdsurgeon.training.stopping import StopWaiting

if TYPE_CHECKING:
    from kdsurgeon.training.together import Together

Batch = tuple[Inputs, Tensor, Moment]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Updater:
    """Turns groups of batches into updates of a model; ``report`` hears of those that fail."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        recipe: Recipe,
        state: TrainingState,
        report: Callable[[Trouble], None],
        samples: Callable[[int, int], Sequence[str | int]],
        together: Together | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model, self.objective, self.recipe, self.state = model, objective, recipe, state
        self.report, self.samples = report, samples
        self.together, self.stop = together, stop
        self.device = next(model.parameters()).device
        self.layout = _wanted_layout(recipe)
        self._before = Before(model)
        check_batch_norm(model, recipe)

    def take(self, group: Iterable[Batch], size: int) -> None:
        """One update from the mean gradient of up to ``size`` batches; moves the position on.

        Raises:
            NumericsError: a loss or the gradient is not finite, once too often.
            ResourceError: a batch does not fit into the memory of the device.
            StopWaiting: while waiting for a batch, if that was asked for.
            In all three cases model, optimiser and random state are as before the first batch.
        """
        self._before.remember()
        held: list[Batch] = []
        try:
            if self.together is not None:
                group = list(group)
                self.together.begin(group, self._counted)
            found = self._gradient_of_all(group, held, size)
        except StopWaiting:
            self._undo()
            raise
        if found:
            if self.together is not None:
                found = self.together.losses(found, self.stop())
                self.together.average(self.model)
            self._update(found, held)
            self.state.batch += len(found)

    def _gradient_of_all(
        self, group: Iterable[Batch], held: list[Batch], size: int
    ) -> list[tuple[Losses, int]]:
        """The losses of each batch, their gradient left in the model; again, where memory ran out
        in smaller parts, and where a program could not be compiled without compiling."""
        source = iter(group)
        while True:
            found, text = [], ""
            try:
                for batch in _held(source, held):
                    found.append(self._gradient(batch, size))
            except torch.OutOfMemoryError as error:
                text = _first_line(error)
            except Exception as error:
                if "more than 1 value per channel" in str(error):
                    raise UsageError(
                        "batch normalisation cannot learn from a batch of one image.",
                        why="so many are left over at the end of an epoch, or for one process",
                        fix="another --batch-size",
                    ) from error
                self._go_on_without_compiling(error)  # raises what has nothing to do with it
                continue
            count = len(held[-1][1]) if held else 0
            if self.together is not None and self.recipe.optim.auto_batch:
                everyone = self.together.ranks.all((text, count))
                text = next((theirs for theirs, _ in everyone if theirs), "")
                count = max(theirs for _, theirs in everyone)
            if not text:
                return found
            self._undo()  # out of the except clause, which holds on to the activations
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._use_smaller_parts(held[-1], count, size, text)

    def _gradient(self, batch: Batch, size: int) -> tuple[Losses, int]:
        """Add a ``size``-th of the batch's gradient; its losses, and how many samples it has."""
        inputs, target, moment = batch
        inputs, target = move(inputs, self.device), target.to(self.device)
        if self.layout is None:
            self.layout = fastest_layout(self.model, self.objective, inputs, target, moment)
        inputs = arranged(inputs, self.layout)
        found: list[tuple[Losses, float]] = []
        parts = list(self._parts(inputs, target))
        counts = 1.0 if self.together is None else self.together.factor(moment.step)
        for index, (few, labels, share) in enumerate(parts):
            dtype = _DTYPES[self.recipe.amp_dtype]
            with self._passing(moment, is_last=index == len(parts) - 1):
                with torch.autocast(self.device.type, dtype, enabled=self.recipe.amp):
                    losses = self.objective(few, labels, moment)
                factor = share / size * counts
                total = losses.total if factor == 1 else losses.total * factor
                self._backward(total)
            found.append((Losses(losses.total.detach(), losses.parts), share))
        return _mean(found), len(target)

    def _passing(self, moment: Moment, *, is_last: bool) -> AbstractContextManager[None]:
        if self.together is None:
            return nullcontext()
        return self.together.passing(moment.step, is_last)

    def _backward(self, total: Tensor) -> None:
        try:
            self.state.scaler.scale(total).backward()
        except RuntimeError as error:
            if "deterministic implementation" not in str(error):
                raise
            raise UsageError(
                "the model cannot be trained with --deterministic.",
                why=_first_line(error),
                fix="leave --deterministic out, or train on the CPU: --device cpu",
            ) from error

    def _parts(self, inputs: Inputs, target: Tensor) -> Iterator[tuple[Inputs, Tensor, float]]:
        """The batch in as many parts as memory asks for, each with its share of the samples that
        count."""
        if self.state.splits == 1:
            yield inputs, target, 1.0
            return
        whole = self._counted(target)
        length = -(-len(target) // self.state.splits)
        for first in range(0, len(target), length):
            part = slice(first, first + length)
            few = inputs[part] if isinstance(inputs, Tensor) else {
                name: value[part] for name, value in inputs.items()
            }  # fmt: skip
            yield few, target[part], self._counted(target[part]) / max(whole, 1)

    def _counted(self, target: Tensor) -> int:
        ignored = self.recipe.loss.ignore_index
        if ignored is None or target.is_floating_point():
            return len(target)
        return int((target != ignored).sum())

    # the update ──────────────────────────────────────────────────────────────────────────────────

    def _update(self, found: list[tuple[Losses, int]], held: list[Batch]) -> None:
        state, optim = self.state, self.recipe.optim
        state.scaler.unscale_(state.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = total_norm(gradients)
        numbers = _numbers([losses for losses, _ in found])
        for index, each in enumerate(numbers):
            if not math.isfinite(each["total"]):
                return self._leave_out("loss", each["total"], index, held)
        booked = list(zip(numbers, (samples for _, samples in found), strict=True))
        if not torch.isfinite(norm):
            if state.scaler.is_enabled() and state.scaler.get_scale() > 1:
                state.scaler.update()  # float16 overflowed: its scale is halved, as it should be
                state.optimizer.zero_grad()
                return self._book(booked)
            return self._leave_out("gradient", norm.item(), len(found) - 1, held)
        if optim.clip_grad is not None:
            clip(self.model.parameters(), optim.clip_grad, norm)
        self._step()
        return self._book(booked)

    def _step(self) -> None:
        state = self.state
        try:
            state.scaler.step(state.optimizer)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                "the optimiser's own state does not fit into the memory of the device.",
                why=_first_line(error),
                fix="an optimiser that remembers less, such as --opt sgd, or a smaller model",
            ) from error
        except (RuntimeError, OverflowError) as error:  # a rate that float32 cannot hold
            raise NumericsError(
                f"step {state.step + 1:,}: the update failed.", why=str(error), fix="lower --lr"
            ) from error
        state.scaler.update()
        state.optimizer.zero_grad()
        state.step += 1
        if state.average is not None:
            state.average.update()

    def _book(self, found: list[tuple[dict[str, float], int]]) -> None:
        state = self.state
        for numbers, samples in found:
            state.samples += samples
            if numbers == {"total": 0.0}:  # no sample of this batch counts, so no mean does
                continue
            for name, value in numbers.items():
                state.sums[name] = state.sums.get(name, 0.0) + value
                state.counts[name] = state.counts.get(name, 0) + 1

    def _undo(self) -> None:
        self.state.optimizer.zero_grad()
        self._before.restore()

    def _go_on_without_compiling(self, error: Exception) -> None:
        """A batch of another size is compiled anew, and that may fail where the first did not."""
        homes = {each.__module__ for each in type(error).__mro__}
        if "torch._dynamo.exc" not in homes:
            raise error
        self._undo()
        torch.compiler.set_stance("force_eager")
        text = f"the graph runs as it is from here, it could not be compiled: {_first_line(error)}"
        state = self.state
        self.report(
            Trouble("compile", None, state.step + 1, state.epoch + 1, state.batch + 1, (), text)
        )

    # what can go wrong ───────────────────────────────────────────────────────────────────────────

    def _leave_out(self, what: str, value: float, index: int, held: list[Batch]) -> None:
        """Skip the update where the recipe allows one more; stop otherwise."""
        state = self.state
        self._undo()
        step, batch = state.step + 1, state.batch + index + 1
        first, last = (batch - 1, batch) if what == "loss" else (state.batch, batch)
        trouble = Trouble(
            what,
            value,
            step,
            state.epoch + 1,
            batch,
            self.samples(first, last),
            f"step {step:,}: the {what} is {value} before the update; no weight was changed "
            f"(epoch {state.epoch + 1}, batch {batch}).",
        )
        self.report(trouble)
        if state.skipped < self.recipe.optim.skip_nan:
            state.skipped += 1
            return
        raise NumericsError(
            trouble.text,
            where=f"epoch {trouble.epoch}, batch {trouble.batch}",
            why=None if not state.skipped else f"{state.skipped:,} updates were skipped before",
            fix="lower --lr, raise --temperature, or add --clip-grad 1.0; --skip-nan 10 leaves out "
            "up to ten such updates",
        )

    def _use_smaller_parts(self, batch: Batch, count: int, size: int, error: str) -> None:
        """Halve what goes through the model at once, or say how much would fit; ``count`` is the
        largest part of a batch that any process has."""
        state = self.state
        if self.recipe.optim.auto_batch and state.splits < count:
            state.splits = min(2 * state.splits, count)
            text = f"out of memory: batches of {count} go through in {state.splits} parts from here"
            self.report(
                Trouble("memory", None, state.step + 1, state.epoch + 1, state.batch + 1, (), text)
            )
            return
        if self.recipe.optim.auto_batch:
            raise ResourceError(
                "not even one sample fits into the memory of the device.", why=error
            )
        if self.together is not None:  # the others could not take part in trying
            raise ResourceError(
                f"this process's {count} images of a batch do not fit into the memory of the "
                "device.",
                why=error,
                fix="--auto-batch, a smaller --batch-size, or more processes",
            )
        fits = self._largest_that_fits(batch, size)
        steps = self.recipe.optim.grad_accum_steps
        if fits:
            steps *= -(-count // fits)
            fix = f"--auto-batch, or a batch that fits (tried): --batch-size {fits} and, for the "
            fix += f"same update, --grad-accum-steps {steps}"
        else:
            fix = "a smaller model or input: not even one sample fits"
        raise ResourceError(
            f"a batch of {count} does not fit into the memory of the device.", why=error, fix=fix
        )

    def _largest_that_fits(self, batch: Batch, size: int) -> int:
        """Tried by halves, forward and backward; 0 where not even one sample does."""
        splits, count = self.state.splits, len(batch[1])
        try:
            while self.state.splits < count:
                self.state.splits = min(2 * self.state.splits, count)
                try:
                    self._gradient(batch, size)
                    return -(-count // self.state.splits)
                except torch.OutOfMemoryError:
                    pass
                except ValueError:  # batch normalisation of a single value
                    return 0
                self._undo()
            return 0
        finally:
            self.state.splits = splits
            self._undo()


class Before:
    """What a forward pass changes beside gradients: buffers, and the generators' states."""

    def __init__(self, model: nn.Module) -> None:
        self._places: list[tuple[MutableMapping[str, Any], str]] = [
            (module._buffers, name)
            for module in model.modules()
            for name, value in module._buffers.items()
            if value is not None
        ]

    @torch.no_grad()
    def remember(self) -> None:
        self._live = [store[name] for store, name in self._places]
        self._copies = [value.clone() for value in self._live]
        self._random = RandomState.now()

    @torch.no_grad()
    def restore(self) -> None:
        for (store, name), own, copy in zip(self._places, self._live, self._copies, strict=True):
            own.copy_(copy)
            store[name] = own
        self._random.set()


def _held(source: Iterator[Batch], held: list[Batch]) -> Iterator[Batch]:
    """Those that were asked for before, then the rest, which are held on to as well."""
    yield from tuple(held)
    for batch in source:
        held.append(batch)
        yield batch


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _mean(found: list[tuple[Losses, float]]) -> Losses:
    """Of the parts of one batch, each by its share."""
    if len(found) == 1:
        return found[0][0]
    total = torch.stack([losses.total * share for losses, share in found]).sum()
    names = {name for losses, _ in found for name in losses.parts}
    parts = {
        name: torch.stack([losses.parts[name] * share for losses, share in found
                           if name in losses.parts]).sum()
        for name in sorted(names)
    }  # fmt: skip
    return Losses(total, parts)


def _numbers(found: Sequence[Losses]) -> list[dict[str, float]]:
    """Of every batch, by name; read from the device at once, as each reading waits for it."""
    named = [{"total": losses.total, **losses.parts} for losses in found]
    dtype = found[0].total.dtype
    values = [value.detach().to(dtype) for each in named for value in each.values()]
    numbers = iter(torch.stack(values).tolist())
    return [{name: next(numbers) for name in each} for each in named]


def _wanted_layout(recipe: Recipe) -> torch.memory_format | None:
    if recipe.channels_last is None:
        return None
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


def check_batch_norm(model: nn.Module, recipe: Recipe) -> None:
    """Raises :class:`UsageError` where smaller parts of a batch would change what it computes."""
    if not recipe.optim.auto_batch or recipe.optim.auto_batch_norm:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UsageError(
                "--auto-batch would change what batch normalisation computes.",
                where=name,
                why="its statistics would be those of smaller parts of a batch, wherever memory "
                "happens to run out",
                fix="add --auto-batch-norm to accept that, or choose a smaller --batch-size",
            )
