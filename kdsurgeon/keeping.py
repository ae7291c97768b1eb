"""Keep a run in its folder, and go back to where it stood.

A checkpoint is taken only where nothing is half done: before the first update, after an update,
and after an epoch was evaluated. So whoever resumes does the same steps again, to the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdsurgeon.checkpoints import ModelCard, save_model
from kdsurgeon.errors import ModelFileError, NumericsError
from kdsurgeon.ranks import Ranks
from kdsurgeon.recipe import Recipe
from kdsurgeon.runs import Checkpoint, Run, read_checkpoint
from kdsurgeon.stones import SteppingStones
from kdsurgeon.training import (
    Epoch,
    Step,
    TrainingState,
    Trouble,
    all_like,
    changes,
    conditions,
    here,
    is_exact,
    whole_weights,
)

VERSION = 1
_RANDOM = ("random", "epoch_random")
"""Of rank 0; those of the others are called random-1, epoch_random-1, …"""


@dataclass
class Keeper:
    """Writes what a run must not lose; one for each time that it is started or resumed.

    Of several ``ranks`` each has one and calls it at the same places; rank 0 writes.
    """

    run: Run
    model: nn.Module
    state: TrainingState
    recipe: Recipe
    card: ModelCard
    ranks: Ranks = field(default_factory=Ranks.alone)
    _saved: int = -1  # the update after which a checkpoint was taken last

    @property
    def student(self) -> nn.Module:
        return student_of(self.model)

    def begin(self, allow_change: Collection[str] = ()) -> None:
        """Go on from the newest whole checkpoint; without one, take the first.

        Raises:
            UsageError: something changed that the bits of the run depend on.
            ModelFileError: the checkpoint lacks an item, or is that of another run.
        """
        self.run.keep_every = self.recipe.keep_every
        checkpoint = self._newest()
        if checkpoint is None:
            self.save()  # whether the disk can take it shows before the first step
            return
        changed = changes(saved_conditions(checkpoint), self._conditions(), allow_change)
        load_weights(self.model, checkpoint)
        self.state.restore(checkpoint.state["training"], self._own_tensors(checkpoint, changed))
        self._saved = self.state.step

        def note() -> None:
            self.run.rewind(checkpoint)
            self.run.log(f"resumed from {checkpoint.path.name}")
            for name, (before, now) in changed.items():
                self.run.log(f"changed: {name} was {before}, is {now}")

        self.ranks.first_does(note)
        if not is_exact(changed):
            self.save()  # from here on it is a run with these conditions

    def _newest(self) -> Checkpoint | None:
        """Rank 0 finds the newest whole checkpoint; the others read the same."""
        found: list[Checkpoint | None] = [None]

        def find() -> str | None:
            found[0], complaints = self.run.latest_checkpoint()
            for complaint in complaints:
                self.run.log(complaint)
            return found[0].path.name if found[0] else None

        name = self.ranks.first_does(find)
        if name is None or self.ranks.is_first:
            return found[0]
        return read_checkpoint(self.run.path / "checkpoints" / name)

    def _own_tensors(
        self, checkpoint: Checkpoint, changed: Collection[str]
    ) -> dict[str, dict[str, Tensor]]:
        """What the state is restored from: the random numbers of this rank, all of the rest."""
        known = self.state.tensors()
        tensors = {name: checkpoint.tensors[name] for name in known if name in checkpoint.tensors}
        for name in _RANDOM:
            saved = checkpoint.tensors.get(_of_rank(name, self.ranks.rank))
            if saved is None and "world-size" in changed:  # there was no such rank
                saved = known[name]
            if saved is None:  # restoring says so
                tensors.pop(name, None)
                continue
            if "device" in changed:  # its generators are not here
                saved = {k: v for k, v in saved.items() if not k.startswith("cuda.")}
            tensors[name] = saved
        return tensors

    def step(self, step: Step) -> None:
        """A checkpoint inside an epoch, where one is due."""
        every = self.recipe.checkpoint_every
        is_due = every is not None and step.step % every == 0 and step.step != self._saved
        if is_due and step.batch < step.batches:
            self.save()

    def epoch(self, epoch: Epoch) -> None:
        """Its line of metrics.jsonl, the best student so far, and a checkpoint after it."""
        self.save(best=self.ranks.first_does(lambda: self._note_epoch(epoch)))

    def _note_epoch(self, epoch: Epoch) -> bool:
        """Whether no epoch before was better."""
        is_best = False
        if epoch.is_complete:
            before = max((line["accuracy"] or 0.0 for line in self.run.metrics()), default=-1.0)
            is_best = (epoch.accuracy or 0.0) > before
            numbers: dict[str, Any] = {"epoch": epoch.number, **asdict(epoch)}
            for name in ("number", "is_complete"):
                del numbers[name]
            self.run.add_metrics(numbers)
            loss = epoch.losses.get("total", math.nan)  # not there where no sample counted
            self.run.log(f"epoch {epoch.number}/{epoch.epochs} loss {loss:.4f}")
        return is_best

    def trouble(self, trouble: Trouble) -> None:
        """A line in train.log; for numbers that are not finite, a file with the samples, too."""
        if not self.ranks.is_first:  # all have the same
            return
        self.run.log(trouble.text)
        if trouble.what in ("loss", "gradient"):
            found = asdict(trouble) | {"value": str(trouble.value)}
            self.run.write(f"nan-step-{trouble.step}.json", json.dumps(found, indent=1))

    def save(self, *, best: bool = False) -> None:
        """The student's files and a checkpoint.

        Raises:
            NumericsError: a weight is not finite; what was saved before stays.
        """
        _check_finite(self.model, self.state.step, self.ranks)
        now = self._conditions()
        own = self.state.tensors()
        everyone = self.ranks.all({name: own[name] for name in _RANDOM})
        random = {
            _of_rank(name, rank): values
            for rank, each in enumerate(everyone)
            for name, values in each.items()
        }
        with whole_weights(self.model):
            self.ranks.first_does(lambda: self._write(own | random, now, best=best))
        self._saved = self.state.step

    def _write(self, own: dict[str, dict[str, Tensor]], now: dict[str, Any], *, best: bool) -> None:
        self._save_student("last")
        if best:
            self._save_student("best")
        if self.state.average is not None:
            with self.state.average.in_place():
                self._save_student("ema")
        tensors = {"student": self.student.state_dict(), **own}
        if (adapters := _adapters(self.model)) is not None:
            tensors["adapters"] = adapters.state_dict()
        state = {
            "version": VERSION,
            "training": self.state.numbers(),
            "conditions": now,
        }
        self.run.save_checkpoint(self.state.step, tensors, state, best=best)

    def _save_student(self, name: str) -> None:
        path = self.run.path / "student" / f"{name}.safetensors"
        self.run.making_room(lambda: save_model(self.student, path, self.card), path.name)

    def _conditions(self) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        return conditions(self.recipe, device, self.ranks.world)


def _of_rank(name: str, rank: int) -> str:
    return f"{name}-{rank}" if rank else name


def saved_conditions(checkpoint: Checkpoint) -> dict[str, Any]:
    """Under which conditions a checkpoint was saved, for :func:`kdsurgeon.training.changes`."""
    if checkpoint.state.get("version") != VERSION:
        raise ModelFileError(
            f"{checkpoint.path} was saved by another version of kdsurgeon.",
            fix="go on with that version, or start a new run with another --output",
        )
    return checkpoint.state["conditions"]


def student_of(model: nn.Module) -> nn.Module:
    """The student in a training graph, or the model itself where it is trained alone."""
    return model.student if isinstance(model, SteppingStones) else model


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into student and adapters."""
    parts = {"student": student_of(model), "adapters": _adapters(model)}
    for name, part in parts.items():
        if part is None:
            continue
        try:
            found = checkpoint.tensors[name]
            if others := sorted(part.state_dict().keys() ^ found.keys()):  # torch forgives some
                raise KeyError(", ".join(others[:5]))
            part.load_state_dict(all_like(found, part.state_dict()))
        except (KeyError, RuntimeError) as error:
            raise ModelFileError(
                f"{checkpoint.path} holds other {name} weights than this run has.",
                why=str(error).splitlines()[0],
                fix="resume with the models that the run was started with",
            ) from error


def _adapters(model: nn.Module) -> nn.Module | None:
    return model.adapters if isinstance(model, SteppingStones) and model.depths else None


@torch.no_grad()
def _check_finite(model: nn.Module, step: int, ranks: Ranks) -> None:
    """Buffers may hold an infinity, as masks of attention do."""
    wrong = [name for name, value in model.named_parameters() if not _is_finite(value)]
    wrong += [name for name, value in model.named_buffers() if value.isnan().any()]
    wrong = list(dict.fromkeys(name for names in ranks.all(wrong) for name in names))
    if wrong:
        raise NumericsError(
            f"after step {step:,} the model holds weights that are not finite; nothing was saved.",
            where=", ".join(wrong[:5]) + (" …" if len(wrong) > 5 else ""),
            fix="lower --lr, or add --clip-grad 1.0, and go on from the checkpoint before"
            if step
            else "give a student whose weights are finite",
        )


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(here(value)).all())
