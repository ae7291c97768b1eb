"""``export --int8``: how it is calibrated, and a few more epochs where rounding costs too much."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from kdsurgeon.cli.console import say
from kdsurgeon.cli.session import at_home, open_session
from kdsurgeon.data import Dataset
from kdsurgeon.distillation import distill
from kdsurgeon.errors import UsageError
from kdsurgeon.exporting import Int8, export, quantize
from kdsurgeon.exporting.int8 import MIN_AGREEMENT
from kdsurgeon.exporting.rounding import Rounded
from kdsurgeon.ranks import ALONE
from kdsurgeon.recipe import RunConfig
from kdsurgeon.stones import partition

MODES = ("static", "dynamic", "qat")
WORTH = 0.005  # accuracy: a smaller drop is not worth to train again
LEARNING_RATE = 0.05  # of the run's own


@dataclass(frozen=True)
class Int8Flags:
    """What the flags of ``export`` say of the int8 file, as they were given."""

    mode: str = "static"
    method: str = "min-max"
    images: int = 512
    budget: int = 4
    max_drop: float = 1.0  # points
    gate: bool = True
    epochs: int = 5

    def check(self, target: str) -> None:
        """Raises UsageError where a flag cannot be followed."""
        if self.mode not in MODES:
            raise UsageError(
                f"--int8-mode {self.mode} is not known.", fix=f"one of {', '.join(MODES)}"
            )
        if self.mode == "qat" and not (Path(target) / "config.yaml").is_file():
            raise UsageError(
                f"{target} is no run folder, so there is no teacher to train int8 with.",
                fix="name the folder of a run, or use --int8-mode static",
            )

    @property
    def options(self) -> dict[str, Any]:
        """As :func:`kdsurgeon.exporting.quantize` takes them."""
        return {
            "mode": "dynamic" if self.mode == "dynamic" else "static",
            "method": self.method,
            "budget": self.budget,
            "max_drop": self.max_drop / 100,
        }

    def spread(self, dataset: Dataset) -> Tensor:
        """As many calibration images as were asked for, spread evenly over the data set."""
        rows = torch.linspace(0, len(dataset) - 1, min(self.images, len(dataset)))
        return dataset.samples(rows.long().unique().numpy())


def train_rounded(
    fp32: Path,
    path: Path,
    student: nn.Module,
    target: str,
    flags: Int8Flags,
    trust: Sequence[str],
    calibration: Tensor,
    samples: Tensor,
    labels: Tensor,
    *,
    force: bool = False,
) -> Int8:
    """The int8 file of a run's student, trained for some epochs with rounding where that pays.

    It is made of ``fp32``, and written to ``path``.

    The student is first rounded as it is; a drop of at most half a point is kept so. Otherwise a
    copy trains on with rounding inside and the run's teacher, stones and data, and the file of the
    higher accuracy is kept. The fp32 file is that of the run's own student in any case.
    """
    given = {"calibration": calibration, "samples": samples, "labels": labels}
    fp32, path = fp32.absolute(), path.absolute()
    with TemporaryDirectory() as drafts:
        plain = quantize(fp32, Path(drafts) / "plain.onnx", **given, **flags.options, gate=False)
        say(f"int8     as the student is: {plain}")
        source, agreement = fp32, MIN_AGREEMENT
        if (plain.drop or 0.0) > WORTH:
            trained = Path(drafts) / "trained.onnx"
            twin = _trained(student, Path(target), flags, trust, calibration)
            export(twin, trained, samples[:2], samples=samples)
            again = quantize(
                trained, Path(drafts) / "again.onnx", **given, **flags.options, gate=False,
                reference=fp32,
            )  # fmt: skip
            say(f"int8     trained with rounding: {again}")
            if (again.accuracy or 0.0) > (plain.accuracy or 0.0):
                source, agreement = trained, 0.0  # it has learned, and may answer otherwise
        else:
            say("int8     loses no more than half a point, so nothing was trained again")
        return quantize(
            source, path, **given, **flags.options, gate=flags.gate, reference=fp32,
            min_agreement=agreement, force=force,
        )  # fmt: skip


def _trained(
    student: nn.Module, target: Path, flags: Int8Flags, trust: Sequence[str], calibration: Tensor
) -> nn.Module:
    """A copy of the student after some epochs with its rounding inside."""
    with at_home(target, trust) as (_, settings):
        short = short_recipe(settings, flags.epochs)
        session = open_session(short, trust, None, ALONE)  # planned anew below
        twin = session.student.model
        twin.load_state_dict(student.state_dict())
        device = next(twin.parameters()).device
        rounded = Rounded(twin, calibration.to(device))
        plan = partition(
            session.teacher.model, rounded, calibration[:2].to(device), blocks=settings.blocks
        )
        batches = session.train
        for epoch in distill(session.teacher.model, rounded, batches, plan=plan, recipe=short):
            rounded.calibrate(calibration)
            say(f"int8     epoch {epoch.number}/{epoch.epochs} loss {epoch.losses['total']:.3f}")
    return copy.deepcopy(twin).cpu()


def short_recipe(settings: RunConfig, epochs: int) -> RunConfig:
    """The run's recipe for a few last epochs: a small step, and adapters that fit from the start.

    Adapters drawn at random would pull a trained student away from what it has learned; fitted by
    least squares they do not.
    """
    return settings.replace(
        method="block-kd",
        epochs=epochs,
        loss=settings.loss.replace(adapter_init="least-squares"),
        optim=settings.optim.replace(
            lr=settings.optim.lr * LEARNING_RATE, warmup_epochs=min(0.5, epochs / 2)
        ),
    )
