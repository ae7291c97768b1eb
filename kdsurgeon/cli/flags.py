"""Flags that several verbs share, each spelled once, and how the strings in them become numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdsurgeon.errors import UsageError
from kdsurgeon.recipe import DataRecipe

MAX_VALUES = 1 << 28
"""More values in one input than any classifier takes: rather a typing mistake."""

Arch = Annotated[
    str | None,
    typer.Option(help="architecture for a file of weights: timm/NAME, py:module:factory"),
]
TeacherArch = Annotated[
    str | None, typer.Option("--teacher-arch", help="architecture of a teacher file of weights")
]
StudentArch = Annotated[
    str | None, typer.Option("--student-arch", help="architecture of a student file of weights")
]


def _whole_paths(entries: list[str] | None) -> list[str] | None:
    """Python files as the user sees them from here, whatever folder is worked in later."""
    if not any(entry.startswith("py:") for entry in entries or ()):
        return entries
    from kdsurgeon.checkpoints import code_in

    return [code_in(entry) or entry for entry in entries or ()]


TrustCode = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-code",
        metavar="sha256:HASH|py:…",
        help="let this very file run code when loaded",
        callback=_whole_paths,
    ),
]
DataDir = Annotated[
    str | None,
    typer.Option(
        "--data-dir", help="a folder, an .npz, digits, or SOURCE:PLACE: hf, wds, torchvision"
    ),
]
InputSize = Annotated[
    str | None, typer.Option("--input-size", metavar="C,H,W", help="size of one input image")
]
Mean = Annotated[
    str | None, typer.Option("--mean", metavar="M,…", help="per channel, of images in 0..1")
]
Std = Annotated[
    str | None, typer.Option("--std", metavar="S,…", help="per channel, of images in 0..1")
]
MaxBadImages = Annotated[
    int | None,
    typer.Option("--max-bad-images", metavar="N", min=0, help="unreadable images to allow"),
]
Blocks = Annotated[
    str | None, typer.Option("--blocks", metavar="N|auto", help="how many boundaries to plan")
]
Pairs = Annotated[
    list[str] | None,
    typer.Option("--pair", metavar="TEACHER=STUDENT", help="name a boundary instead of searching"),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="1.5x", help="only the stones that a step of so much × plain KD allows"
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads")]
OutputFile = Annotated[Path | None, typer.Option("--output", "-o", help="where to write")]


def parse_budget(text: str | None) -> float | None:
    """``1.5x`` (or ``1.5``) as a number."""
    if text is None:
        return None
    try:
        ratio = float(text.removesuffix("x"))
    except ValueError:
        ratio = 0.0
    if not 1 <= ratio < 1e6:
        raise UsageError(
            f"--budget {text} is not a multiple of what plain distillation costs.",
            why="no step costs less than a step of plain distillation, which is 1x",
            fix="e.g. --budget 1.5x",
        )
    return ratio


def parse_size(text: str | None) -> tuple[int, int, int] | None:
    """``3,224,224`` (or ``3x224x224``) as numbers."""
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(
            f"--input-size {text} is not channels,height,width.", fix="e.g. --input-size 3,224,224"
        )
    channels, height, width = (int(part) for part in parts)
    if channels * height * width > MAX_VALUES:
        raise UsageError(
            f"--input-size {text} is {4 * channels * height * width:,} bytes for one image.",
            fix=f"at most {4 * MAX_VALUES:,} bytes",
        )
    return channels, height, width


def parse_numbers(text: str | None, flag: str) -> tuple[float, ...] | None:
    """``0.5,0.4,0.4`` as numbers."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{flag} {text} is not a list of numbers.", fix=f"e.g. {flag} 0.5,0.5,0.5"
        ) from error


def image_wishes(
    input_size: str | None, mean: str | None, std: str | None, max_bad_images: int | None
) -> DataRecipe:
    """What four flags say of the images; its ``model_fields_set`` names those that were given."""
    if (mean is None) is not (std is None):
        missing = "--std" if std is None else "--mean"
        raise UsageError(
            f"{missing} is missing: images are normalised with both.",
            fix=f"give {missing}, too, a number for each channel",
        )
    given = {
        "input_size": parse_size(input_size),
        "mean": parse_numbers(mean, "--mean"),
        "std": parse_numbers(std, "--std"),
        "max_bad_images": max_bad_images,
    }
    return DataRecipe(**{name: value for name, value in given.items() if value is not None})


def parse_pairs(pairs: list[str] | None) -> list[tuple[str, str]] | None:
    """``layer1=blocks.0`` as (teacher node, student node)."""
    if not pairs:
        return None
    found = []
    for pair in pairs:
        teacher, equals, student = (part.strip() for part in pair.partition("="))
        if not (teacher and equals and student):
            raise UsageError(
                f"--pair {pair} does not name two nodes.", fix="write --pair TEACHER=STUDENT"
            )
        found.append((teacher, student))
    return found


def parse_blocks(text: str | None) -> int | str:
    """``auto`` or a count."""
    if text in (None, "auto"):
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--blocks {text} is neither auto nor a count.", fix="e.g. --blocks 4")
    return int(text)
