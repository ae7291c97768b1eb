"""Small runs in several processes that talk over gloo, and what came out on each of them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdsurgeon.checkpoints import ModelCard
from kdsurgeon.data import Batches, Dataset
from kdsurgeon.distillation import Distillation, _synchronise, prepare
from kdsurgeon.errors import DataError, SurgeonError, UsageError
from kdsurgeon.ranks import Ranks
from kdsurgeon.recipe import Recipe
from kdsurgeon.runs import Run
from kdsurgeon.training import Moment
from tests.resuming import outcome

BATCH, COUNT, CLASSES = 8, 19, 4  # the last batch has 3 images
PLAIN = {"epochs": 2, "optim": {"lr": 0.05, "opt": "sgd", "warmup_epochs": 0.0}}


def together(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(ranks, *arguments)`` returns on each of ``world`` processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    with context.Pool(world) as pool:
        calls = [(work, rank, world, port, arguments) for rank in range(world)]
        found = pool.starmap_async(_joined, calls, chunksize=1).get(600)
        pool.close()
        pool.join()  # they end by themselves, so that what they did is measured
        return found


def _joined(work: Callable[..., Any], rank: int, world: int, port: int, arguments: Any) -> Any:
    torch.set_num_threads(1)
    os.environ.update(
        {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank),
         "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    )  # fmt: skip
    ranks = Ranks.from_environment()
    spoke: list[int] = []
    try:
        with ranks.joined(torch.device("cpu"), lambda: spoke.append(rank)):
            return work(ranks, *arguments)
    except SurgeonError as error:
        return type(error).__name__, error.exit_code, spoke, error.notes.get("rank")


class Double:
    """Batches in float64 that know what they served; one rank's part may go wrong."""

    def __init__(self, batches: Batches, fails: Callable[[int, int], None] | None = None) -> None:
        self.batches, self.fails = batches, fails
        self.served: list[int] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def shard(self, rank: int, world: int) -> Double:
        part = Double(self.batches.shard(rank, world), self.fails)
        part.served = self.served
        return part

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, (rows, images, labels) in enumerate(self.batches.with_rows()):
            self.served += rows.tolist()
            if self.fails is not None:
                self.fails(self.batches.rank, index)
            yield images.double(), labels


class Tokens(nn.Module):
    """Two residual blocks on patches, without batch statistics, and a layer that nothing uses."""

    def __init__(self, width: int, seed: int, dropout: float = 0.0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.patches = nn.Linear(16, width)
        self.first, self.second = (self._block(width) for _ in range(2))
        self.head = nn.Linear(width, CLASSES)
        self.idle = nn.Linear(width, 2)

    @staticmethod
    def _block(width: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        x = self.patches(x.flatten(1, 2))
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(x.mean(1))


class Maps(nn.Module):
    """Two convolutions with batch normalisation and dropout."""

    def __init__(self, width: int, seed: int, dropout: float = 0.0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 2, 1)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x))
        return self.head(self.drop(x.mean((2, 3))))


def dataset(count: int, labels: np.ndarray | None = None) -> Dataset:
    draw = np.random.default_rng(count)
    images = draw.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    labels = draw.integers(0, CLASSES, count) if labels is None else labels
    names = tuple(str(index) for index in range(CLASSES))
    return Dataset("noise", images, labels, names, mean=(0.5,), std=(0.25,))


def ready(
    ranks: Ranks,
    recipe: Recipe,
    *,
    maps: bool = False,
    fails: Callable[[int, int], None] | None = None,
) -> Distillation:
    """A distillation of float64 networks; every rank but the first has a student of its own."""
    kind = Maps if maps else Tokens
    teacher = kind(8, 0).double().eval()
    with torch.no_grad():
        teacher.head.weight.mul_(20)
        pixels = next(iter(Double(Batches(dataset(16), 16, shuffle=False, seed=0))))[0]
        teacher.head.bias.sub_(teacher(pixels).mean(0))
        answers = teacher(pixels).argmax(-1).numpy()
    train = Double(Batches(dataset(COUNT), BATCH, shuffle=True, seed=0, augment="shift"), fails)
    held_out = Double(Batches(dataset(16, answers), 5, shuffle=False, seed=0))
    student = kind(4, 1 + ranks.rank, dropout=0.3).double()
    return prepare(teacher, student, train, recipe=recipe, validation=held_out, ranks=ranks)


def trained(
    ranks: Ranks,
    numbers: dict[str, Any],
    kind: dict[str, Any] | None = None,
    change: Callable[[Ranks, Distillation], None] | None = None,
) -> dict[str, Any]:
    """What a run comes to: weights, buffers, averages, losses, what was evaluated."""
    made = ready(ranks, Recipe(**numbers), **kind or {})
    if change is not None:
        change(ranks, made)
    made.validation.served.clear()
    troubles: list[Any] = []
    epochs = list(made.epochs(report=lambda trouble: troubles.append(trouble.samples)))
    found = made.together
    return {
        "weights": {name: value.clone() for name, value in made.model.state_dict().items()},
        "losses": [epoch.losses for epoch in epochs],
        "accuracy": [epoch.accuracy for epoch in epochs],
        "samples": [epoch.samples for epoch in epochs],
        "skipped": epochs[-1].skipped,
        "troubles": troubles,
        "evaluated": list(made.validation.served),
        "buckets": [name for name, _ in found.in_buckets] if found else [],
        "by hand": [name for name, _ in found.by_hand] if found else [],
        "statistics": found.statistics if found else [],
        "drawn": torch.rand(1).item(),
    }


def all_of(ranks: Ranks, cases: dict[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """Several runs one after another, in one set of processes."""
    return {name: trained(ranks, *case) for name, case in cases.items()}


# what goes wrong on one of them ──────────────────────────────────────────────────────────────────


def runs_out(ranks: Ranks, made: Distillation) -> None:
    """The last rank has no memory for more than two images at once."""
    objective = made.objective

    def tight(images: Tensor, *rest: Any) -> Any:
        if ranks.rank == ranks.world - 1 and len(images) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("none left")
        return objective(images, *rest)

    object.__setattr__(made, "objective", tight)


def is_nan_once(ranks: Ranks, made: Distillation) -> None:
    """In its second batch the last rank meets a number that is none."""
    objective = made.objective

    def broken(images: Tensor, target: Tensor, moment: Any) -> Any:
        bad = moment.step == 1 and ranks.rank == ranks.world - 1 and torch.is_grad_enabled()
        return objective(images * float("nan") if bad else images, target, moment)

    object.__setattr__(made, "objective", broken)


def cannot_be_read(rank: int, batch: int) -> None:
    if (rank, batch) == (1, 2):
        raise DataError("image 7 is damaged.")


def fails_on_one(ranks: Ranks) -> Any:
    made = ready(ranks, Recipe(**PLAIN), fails=cannot_be_read)
    return [epoch.number for epoch in made.epochs()]


def fails_on_all(ranks: Ranks) -> Any:
    raise UsageError("nobody can do that.")


def fails_on_the_first(ranks: Ranks) -> Any:
    def write() -> None:
        raise DataError("full.")

    return ranks.first_does(write)


def synchronised(ranks: Ranks) -> list[str]:
    """What torch says where its SyncBatchNorm is reached on a CPU, by student and adapters."""
    made, said = ready(ranks, Recipe(**PLAIN), maps=True), []
    inputs, target = next(iter(made.batches))
    for part in (made.student, made.model.adapters):
        _synchronise(part, torch.device("cuda"))
        try:
            made.objective(inputs, target, Moment(0.0, 0))
        except ValueError as error:
            said.append(str(error))
        for module in part.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.__class__ = nn.BatchNorm2d
    return said


# a run folder ────────────────────────────────────────────────────────────────────────────────────


def go(
    ranks: Ranks,
    folder: Path,
    numbers: dict[str, Any],
    updates: int | None = None,
    allow: tuple[str, ...] = (),
) -> int:
    """Begin or go on with the run in ``folder``; rank 1 alone asks to stop after ``updates``."""
    made = ready(ranks, Recipe(**numbers), maps=True)
    is_new = ranks.first_does(lambda: not (folder / "config.yaml").exists())
    seen: list[int] = []
    run = Run(folder, None)
    if ranks.is_first:
        run = Run.create(folder) if is_new else Run.resume(folder)
        run.write("config.yaml", "x: 1\n")
    with run:
        asks = updates is not None and ranks.rank == min(1, ranks.world - 1)
        for _ in made.epochs(
            run=run,
            card=ModelCard(),
            stop=lambda: asks and len(seen) >= (updates or 0) - 1,
            watch=lambda step: seen.append(step.step),
            allow_change=allow,
        ):
            pass
    return len(seen)


def histories(ranks: Ranks, base: Path, numbers: dict[str, Any]) -> tuple[Any, ...]:
    """A whole run, and one that was stopped inside an epoch and then while it was evaluated: the
    updates of each part, and what they left."""
    counts = [go(ranks, base / "whole", numbers)]
    counts += [go(ranks, base / "halted", numbers, updates) for updates in (1, 2, None)]
    ranks.all(None)
    return counts, outcome(base / "whole"), outcome(base / "halted")
