"""Does the forecast hold? Predicted against measured cost of a training step, stones on and off.

    python -m benchmarks.forecast

A step is the forward pass, the loss and the backward pass of one batch in float32, with all stones
and with none (plain distillation), taken in turns in one process; the ratio of the medians against
:func:`kdsurgeon.forecast`. One CPU thread, torch 2.13.0, 2026-11-21; raw lines in forecast.jsonl.

    teacher → student                 predicted  measured   off    with memory traffic
    demo                                  3.49      2.90   +20 %    +5 %
    resnet34 → resnet18                   2.22      1.99   +11 %    +4 %
    resnet50 → mobilenetv2_100            3.67      2.56   +43 %   +13 %
    vgg13_bn → vgg11_bn                   2.59      1.66   +57 %   +14 %
    resnet50 → resnet18                   2.41      2.17   +11 %    +5 %
    densenet121 → mobilenetv3_large       2.65      2.17   +22 %    +6 %
    vit_small → vit_tiny                  2.65      2.80    -5 %   -10 %
    convnext_tiny → resnet18              2.52      2.53     0 %    -6 %

Multiply-adds alone are off by more than 25 % where memory decides: depthwise convolutions, and a
teacher of 130 M weights at a batch of 4. Counting every activation as 48 multiply-adds and every
weight of a step as 64 more brings all eight within 14 %; the last column is a fit to these rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

from kdsurgeon import block_kd_loss, forecast, load_model, partition, synthesize
from kdsurgeon.stones import SteppingStones
from tests import bootstrap

PAIRS = (  # teacher, student, side of the images, batch
    ("demo/teacher", "demo/student", 8, 64),
    ("timm/resnet34", "timm/resnet18", 96, 8),
    ("timm/resnet50", "timm/mobilenetv2_100", 96, 8),
    ("timm/vgg13_bn", "timm/vgg11_bn", 64, 4),
    ("timm/resnet50", "timm/resnet18", 96, 8),
    ("timm/densenet121", "timm/mobilenetv3_large_100", 96, 8),
    ("timm/vit_small_patch16_224", "timm/vit_tiny_patch16_224", 224, 4),
    ("timm/convnext_tiny", "timm/resnet18", 96, 8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    bootstrap.prepare()  # for a torchvision without compiled operators
    for teacher, student, side, batch in PAIRS:
        row = {"teacher": teacher, "student": student, "side": side, "batch": batch}
        print(json.dumps(row | compare(teacher, student, side, batch, steps)), flush=True)


def compare(teacher: str, student: str, side: int, batch: int, steps: int) -> dict[str, float]:
    """The forecast ratio, the measured one, and how far the forecast is off."""
    torch.manual_seed(0)
    classes = {} if teacher.startswith("demo/") else {"num_classes": 100}
    models = [load_model(name, **classes).model for name in (teacher, student)]
    channels = 1 if teacher.startswith("demo/") else 3
    images = torch.randn(batch, channels, side, side)
    plan = partition(*models, images[:2])
    labels = torch.randint(0, plan.student.trace.num_classes, (batch,))
    kinds = [synthesize(plan, depths=()), synthesize(plan)]
    times: list[list[float]] = [[], []]
    for turn in range(steps + 1):
        for stones, found in zip(kinds, times, strict=True):
            seconds = step(stones, images, labels)
            if turn:  # the first is a warm-up
                found.append(seconds)
    plain, whole = map(statistics.median, times)
    predicted, measured = forecast(plan).ratio, whole / plain
    return {
        "stones": len(plan.stones),
        "predicted": round(predicted, 3),
        "measured": round(measured, 3),
        "off": round(predicted / measured - 1, 3),
        "plain_ms": round(1e3 * plain, 1),
    }


def step(stones: SteppingStones, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    stones.zero_grad(set_to_none=True)
    started = time.perf_counter()
    block_kd_loss(stones(images), labels).total.backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
