"""Interrupt a run wherever it can be interrupted, go on in a fresh process, and compare bytes.

``python -m tests.resuming FOLDER --updates 60`` is the long form of what ``test_resume`` does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdsurgeon.checkpoints import ModelCard
from kdsurgeon.data import Batches, Dataset
from kdsurgeon.distillation import Distillation, prepare
from kdsurgeon.recipe import Recipe
from kdsurgeon.runs import Run, read_checkpoint, read_metrics
from tests import models

BATCH, COUNT = 4, 10  # samples in a batch, batches in an epoch
ENDED = {f"state/{name}" for name in ("epoch", "batch", "samples", "sums", "counts")}
"""What moves on when an epoch was evaluated: one stopped before that still stands at its end."""
WALL_CLOCK = {"seconds", "samples_per_second"}
EVERYTHING = {
    "epochs": 2,
    "loss": {"stones": "random", "cross_start": 0.5, "stone_warmup": 1.0},
    "optim": {"lr": 0.01, "clip_grad": 1.0, "warmup_epochs": 0.5, "model_ema": True,
              "model_ema_decay": 0.9},
}  # fmt: skip
"""What has a state: random stones, moving average, moments; the student has dropout and batch
normalisation, the data every generator of random numbers."""


class Noisy:
    """Batches that can start nowhere and draw order and noise from the global generators."""

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = random.sample(range(COUNT), COUNT)
        for index in order:
            noise = torch.from_numpy(np.random.standard_normal((BATCH, 3, 16, 16))).float()
            shift = random.gauss(0, 1) + torch.rand(1)
            images = models.images(BATCH, seed=index) + 0.1 * noise + 0.1 * shift
            yield images, models.labels(BATCH, seed=index)


def augmented() -> Batches:
    """Shuffled, shifted and mirrored images, as the command line serves them."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (BATCH * COUNT - 1, 16, 16, 3), dtype=np.uint8)
    labels = draw.integers(0, models.CLASSES, len(images))
    names = tuple(str(index) for index in range(models.CLASSES))
    data = Dataset("noise", images, labels, names, mean=(0.5,) * 3, std=(0.25,) * 3)
    return Batches(data, BATCH, shuffle=True, seed=0, augment="shift-flip")


DATA: dict[str, Callable[[], Any]] = {"noisy": Noisy, "augmented": augmented}


def ready(recipe: Recipe, data: str) -> Distillation:
    """A run with everything that has a state."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    teacher = models.make("residual", seed=1, width=6)
    held_out = models.images(16, seed=77)
    with torch.no_grad():
        answers = teacher.eval()(held_out).argmax(-1)  # or it would be near chance
    return prepare(
        teacher,
        models.make("residual", seed=2, width=4, dropout=0.3),
        DATA[data](),
        recipe=recipe,
        validation=[(held_out[:8], answers[:8]), (held_out[8:], answers[8:])],
    )


def go(
    folder: Path,
    recipe: Recipe,
    data: str = "noisy",
    updates: int | None = None,
    threads: int = 1,
) -> int:
    """Begin or go on with the run in ``folder``; how many updates, at most ``updates``, it took."""
    torch.set_num_threads(threads)
    made = ready(recipe.replace(keep_every=1), data)
    is_new = not (folder / "config.yaml").exists()
    seen: list[int] = []
    if not is_new:  # whatever a fresh process begins with
        torch.manual_seed(9)
        random.seed(9)
        np.random.seed(9)
    with Run.create(folder) if is_new else Run.resume(folder) as run:
        run.write("config.yaml", "x: 1\n")
        stop = lambda: updates is not None and len(seen) >= updates  # noqa: E731
        for _ in made.epochs(
            run=run, card=ModelCard(), stop=stop, watch=lambda step: seen.append(step.step)
        ):
            pass
    return len(seen)


def fresh(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns in a process that has done nothing yet but ``tests.warm``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    with context.Pool(1) as pool:
        found = pool.apply(work, arguments)
        pool.close()
        pool.join()  # it ends by itself: what is terminated while it waits can hang
    return found


def state_of(folder: Path, update: int | None = None) -> dict[str, Any]:
    """Every tensor's bytes and every number that a checkpoint holds, the newest by default."""
    found = sorted((folder / "checkpoints").glob("step-*"))
    if update is not None:
        found = [folder / "checkpoints" / f"step-{update:06d}"]
    checkpoint = read_checkpoint(found[-1])
    bits = {
        f"{file}/{name}": (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
        for file, values in checkpoint.tensors.items()
        for name, value in values.items()
    }
    return bits | {f"state/{k}": v for k, v in checkpoint.state["training"].items()}


def outcome(folder: Path) -> dict[str, Any]:
    """What a finished run leaves: its last state, the student's files, the metrics."""
    files = {
        name: (folder / "student" / f"{name}.safetensors").read_bytes()
        for name in ("last", "best", "ema")
        if (folder / "student" / f"{name}.safetensors").exists()
    }
    lines = [
        {k: v for k, v in line.items() if k not in WALL_CLOCK} for line in read_metrics(folder)
    ]
    return state_of(folder) | files | {"metrics": json.dumps(lines)}


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """The names of what is not equal."""
    return sorted(name for name in {*left, *right} if left.get(name) != right.get(name))


def interrupted_everywhere(
    folder: Path, recipe: Recipe, data: str = "noisy", tell: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Stop a run after each of its updates, go on in a fresh process; what came out otherwise.

    The state is compared where it was stopped, and everything at the end.
    """
    whole = folder / "whole"
    count = fresh(go, whole, recipe.replace(checkpoint_every=1), data)
    wanted, found = outcome(whole), []
    for update in range(1, count):
        halted = folder / f"halted-{update}"
        assert fresh(go, halted, recipe, data, update) == update
        for name in differing(state_of(halted), state_of(whole, update)):
            if name not in ENDED or not _ends_an_epoch(recipe, update):
                found.append(f"stopped after {update}: {name}")
        assert fresh(go, halted, recipe, data) == count - update
        for name in differing(outcome(halted), wanted):
            found.append(f"gone on after {update}: {name}")
        tell(f"{update} of {count - 1}: {len(found)} differences")
    return found


def _ends_an_epoch(recipe: Recipe, update: int) -> bool:
    return update % -(-COUNT // recipe.optim.grad_accum_steps) == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--updates", type=int, default=60)
    given = parser.parse_args()
    found = []
    for data in DATA:
        for steps in (1, 2):
            epochs = -(-given.updates * steps // COUNT)
            optim = EVERYTHING["optim"] | {"grad_accum_steps": steps}
            recipe = Recipe(**EVERYTHING | {"epochs": epochs, "optim": optim})
            print(f"{data}, {steps} batches an update, {epochs} epochs", flush=True)
            place = given.folder / f"{data}-{steps}"
            found += interrupted_everywhere(
                place, recipe, data, lambda line: print(line, flush=True)
            )
    print("\n".join(found) or "0 differences")
    return len(found) > 0


if __name__ == "__main__":
    sys.exit(main())
