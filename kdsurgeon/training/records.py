"""What training takes and tells: batches, an objective, where a run stands, what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kdsurgeon.losses import Losses
from kdsurgeon.tracing import Inputs


@dataclass(frozen=True)
class Moment:
    """Where in a run a batch stands: ``progress`` from 0 to 1, ``step`` counts batches from 0."""

    progress: float
    step: int


Batches = Iterable[tuple[Inputs, Tensor]]
Objective = Callable[[Inputs, Tensor, Moment], Losses]
"""``objective(inputs, target, moment)`` runs the model; the rest of training knows no model."""


@dataclass(frozen=True)
class Epoch:
    """What one pass over the batches came to.

    ``losses`` are means over the batches by name; ``skipped`` counts the updates that were left
    out since the run began because a number was not finite. ``accuracy`` is the student's on
    held-out data, ``ema_accuracy`` that of its moving average, ``stones`` that of "stone 1" and so
    on; they are filled in by who has such data. An epoch that was stopped, in training or in
    evaluation, has ``is_complete`` False.
    """

    number: int
    epochs: int
    steps: int
    samples: int
    losses: dict[str, float]
    learning_rate: float
    seconds: float
    is_complete: bool = True
    accuracy: float | None = None
    ema_accuracy: float | None = None
    stones: dict[str, float] = field(default_factory=dict)
    skipped: int = 0

    @property
    def samples_per_second(self) -> float:
        return self.samples / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Step:
    """Where a run stands after one update; handed to whoever watches.

    Nothing is half done at that moment, so a state that is saved then can be resumed exactly.
    """

    epoch: int
    batch: int
    batches: int
    step: int
    losses: dict[str, float]
    samples_per_second: float


@dataclass(frozen=True)
class Trouble:
    """An update that did not go as planned; nothing of it has changed the model.

    ``what`` is "loss", "gradient", "memory" or "compile"; epoch, batch and step count from 1.
    ``samples`` are the names or rows of the batches' samples, where the batches know them.
    """

    what: str
    value: float | None
    step: int
    epoch: int
    batch: int
    samples: Sequence[str | int]
    text: str
