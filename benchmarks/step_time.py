"""What a step of Block-KD costs against a step of plain distillation, every way of running it.

    python -m benchmarks.step_time --steps 9

Forward pass, loss, backward pass and SGD update of one batch; all rows of a pair are taken in turns
in one process, and each is quoted as the ratio of its median to that of plain distillation. One
random stone is the mean over the stones, by their chances. Targets: all stones ≤ 2.3, one random
stone ≤ 1.45, one random stone with cached logits ≤ 0.95, merged tails never more than 3 % slower
than looped ones. One CPU thread of two shared ones, batch 64 and 8, torch 2.13.0, 2026-11-21, four
steps each; raw lines in step_time.jsonl. On a GPU: not measured.

    way                                            R32x4→R8x4  R34→R18 (96 px)
    plain distillation                                 1.00        1.00
    all stones                                         2.29        1.92
    all stones, tails looped                           2.30        2.35
    all stones, teacher not folded                     2.37        2.01
    one random stone                                   1.25        1.20
    one random stone, drawn evenly                     1.43        1.38
    all stones, cached logits                          1.67        1.65
    one random stone, cached logits                    0.61        0.85
    one random stone, drawn evenly, cached logits      0.79        1.02

Plain distillation is ours, with the folded teacher: against it multiply-adds alone give
2.36 and 2.22 for all stones. One random stone is drawn by its weight unless it says evenly; drawn
evenly it costs what multiply-adds say (1.45 and 1.30), and with cached logits more than
plain distillation on the second pair.
"""

from __future__ import annotations

import argparse
import json
import operator
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kdsurgeon import Plan, block_kd_loss, forecast, load_model, partition, synthesize
from kdsurgeon.stones import TEACHER_LOGITS, SteppingStones
from kdsurgeon.tracing import Inputs
from tests import bootstrap

PAIRS = (  # teacher, student, side of the images, batch
    ("cifar/resnet32x4", "cifar/resnet8x4", 32, 64),
    ("timm/resnet34", "timm/resnet18", 96, 8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bootstrap.prepare()  # for a torchvision without compiled operators
    for pair in PAIRS:
        for row in measure(*pair, torch.device(given.device), given.steps):
            print(json.dumps(row), flush=True)


def measure(teacher: str, student: str, side: int, batch: int, device: torch.device, steps: int):
    """A row for every way of running a step, ratios against plain distillation."""
    torch.manual_seed(0)
    models = [load_model(name, num_classes=100).model.to(device) for name in (teacher, student)]
    plan = partition(*models, torch.zeros(2, 3, side, side, device=device))
    images = torch.randn(batch, 3, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 100, (batch,), device=device)
    ways = ways_to_run(plan, images, labels)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(steps + 1):
        for name, run in ways.items():
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            if turn:  # the first is a warm-up
                times[name].append(time.perf_counter() - started)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    weights = [stone.weight for stone in plan.stones]
    for cached in ("", ", cached logits"):
        alone = [seconds[f"stone {stone.depth} alone{cached}"] for stone in plan.stones]
        chances = [weight / sum(weights) for weight in weights]
        seconds[f"one random stone{cached}"] = sum(map(operator.mul, chances, alone))
        seconds[f"one random stone, drawn evenly{cached}"] = statistics.mean(alone)
    predicted = forecast(plan, batch=batch).time_ratio
    for name, each in seconds.items():
        yield {
            "pair": f"{teacher} → {student}",
            "device": str(device),
            "way": name,
            "ms": round(1e3 * each, 1),
            "ratio": round(each / seconds["plain distillation"], 3),
            **({"forecast": round(predicted, 3)} if name == "all stones" else {}),
        }


def ways_to_run(plan: Plan, images: Tensor, labels: Tensor) -> dict[str, Callable[[], None]]:
    """A step for each row."""
    merged, looped = synthesize(plan), synthesize(plan, merge=False)
    unfolded = synthesize(plan, fold=False)
    known = {"input": images, TEACHER_LOGITS: torch.randn(len(images), 100, device=images.device)}

    def step(stones: SteppingStones, inputs: Inputs, depths: tuple[int, ...]) -> Callable[[], None]:
        optimizer = torch.optim.SGD(stones.parameters(), lr=1e-3, momentum=0.9, foreach=True)

        def run() -> None:
            optimizer.zero_grad()
            block_kd_loss(stones(inputs, depths), labels).total.backward()
            optimizer.step()

        return run

    every = merged.depths
    return {
        "plain distillation": step(merged, images, ()),
        "plain distillation, cached logits": step(merged, known, ()),
        "all stones": step(merged, images, every),
        "all stones, tails looped": step(looped, images, every),
        "all stones, teacher not folded": step(unfolded, images, every),
        "all stones, cached logits": step(merged, known, every),
        **{f"stone {depth} alone": step(merged, images, (depth,)) for depth in every},
        **{f"stone {depth} alone, cached logits": step(merged, known, (depth,)) for depth in every},
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
