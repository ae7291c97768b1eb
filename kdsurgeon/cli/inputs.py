"""From strings to models, data and examples: what the verbs share below the flags."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdsurgeon import data, tracing
from kdsurgeon.checkpoints import Loaded, ModelCard, load_model, write_whole
from kdsurgeon.cli.console import say, warn
from kdsurgeon.data import Batches, Split
from kdsurgeon.errors import ResourceError, UsageError
from kdsurgeon.recipe import DataRecipe, RunConfig
from kdsurgeon.stones import Plan, partition, read_plan, within_budget
from kdsurgeon.tracing import trace

Size = tuple[int, int, int]
DEVICE_BYTES = 2 * 2**30  # decoded images up to this size are kept on the device

_IMAGES_ALONE = "the command line hands over images alone; other inputs are given in Python"


def load_pair(
    teacher: str,
    student: str,
    teacher_arch: str | None,
    student_arch: str | None,
    trust: Sequence[str],
    num_classes: int | None = None,
) -> tuple[Loaded, Loaded]:
    """Both models; a student named by architecture alone gets as many classes as the teacher."""
    first = load_model(teacher, arch=teacher_arch, trust=trust, flag="--teacher-arch")
    second = load_model(
        student,
        arch=student_arch,
        trust=trust,
        flag="--student-arch",
        num_classes=num_classes or first.card.num_classes,
    )
    return first, second


def example_for(
    models: Sequence[Loaded], size: Size | None, data_dir: str | None, max_bad_images: int = 0
) -> Tensor:
    """An input of the size that the flag, the data, a model file or timm's config names."""
    size = size or _size_of(models)
    if size is None and data_dir is not None:
        size = data.load(data_dir, max_bad_images=max_bad_images).train.input_size
    if size is None:
        raise UsageError(
            f"the input size of {models[0].name} is not known.",
            why="a file of weights does not say it",
            fix="--input-size C,H,W, or --data-dir with the images it will see",
        )
    return torch.zeros((2, *size))


def _size_of(models: Sequence[Loaded]) -> Size | None:
    for loaded in models:
        if loaded.card.input_size:
            channels, height, width = loaded.card.input_size
            return channels, height, width
        config = getattr(loaded.model, "pretrained_cfg", None) or {}
        if config.get("input_size"):
            channels, height, width = config["input_size"]
            return channels, height, width
    return None


@contextmanager
def handing_over_images() -> Iterator[None]:
    """Where a model refuses its input, add that there is nothing but images to give here."""
    try:
        yield
    except UsageError as error:
        fix = error.notes.get("fix", "")
        refusals = ("does not take an input of shape", "does not take 3 samples")
        if any(words in error.what for words in refusals) and "--input-size" not in fix:
            fix = fix and f"{fix}\n"
            fix += "give the size the model was made for: --input-size C,H,W"
        if "--input-size" not in fix:
            raise
        raise type(error)(error.what, **error.notes | {"fix": f"{fix}\n{_IMAGES_ALONE}"}) from error


def plan_for(
    teacher: Loaded,
    student: Loaded,
    example: Tensor,
    *,
    plan: Path | None,
    blocks: Any = "auto",
    pairs: list[tuple[str, str]] | None = None,
    max_adapter_parameters: int | None = None,
    probe: Sequence[Tensor] | None = None,
) -> Plan:
    """The saved plan, checked against these models, or a new one."""
    with handing_over_images():
        if plan is None:
            names = (teacher.name, student.name)
            found = partition(
                teacher.model,
                student.model,
                example,
                blocks=blocks,
                pairs=pairs,
                max_adapter_parameters=max_adapter_parameters,
                probe=probe,
                names=names,
            )
        else:
            found = read_plan(
                plan,
                trace(teacher.model, example, name=teacher.name),
                trace(student.model, example, name=student.name),
            )
    for loaded in (teacher, student):
        count_classes(loaded, example)
    return found


def probe_images(
    count: int, source: str, teacher: Loaded, example: Tensor, max_bad_images: int
) -> list[Tensor]:
    """``count`` training images as large as ``example``, normalised for the teacher, in batches."""
    channels, height, width = example.shape[1:]
    wishes = DataRecipe(input_size=(channels, height, width), max_bad_images=max_bad_images)
    split = load_data(data_settings(source, wishes), teacher.card)
    if count > len(split.train):
        raise UsageError(
            f"--probe {count:,} asks for more images than {source} has to train on.",
            fix=f"--probe {len(split.train)} or fewer",
        )
    found: list[Tensor] = []
    for images, _ in Batches(split.train, min(64, count), shuffle=True, seed=0):
        found.append(images[: count - sum(map(len, found))])
        if sum(map(len, found)) == count:
            break
    return found


def within(plan: Plan, budget: float, batch: int) -> Plan:
    """The plan with a weight for those stones only that the budget allows."""
    depths = within_budget(plan, budget, batch=batch)
    stones = tuple(
        stone if stone.depth in depths else replace(stone, weight=0.0) for stone in plan.stones
    )
    return replace(plan, stones=stones)


def warn_of(plan: Plan) -> None:
    """What the user may not have meant: a guess of the logits, idle weights, models swapped."""
    for side in (plan.teacher, plan.student):
        for lost in side.trace.lost:
            if not lost.startswith("outputs other than"):
                warn(f"{side.trace.name} loses {lost}")
    teacher, student = plan.teacher.cost, plan.student.cost
    if student.multiply_adds > teacher.multiply_adds or student.parameters > teacher.parameters:
        warn(
            f"{plan.student.trace.name} is larger than {plan.teacher.trace.name}: "
            f"{student.parameters:,} parameters against {teacher.parameters:,}. "
            "Did you swap the two?"
        )


def load_data(config: RunConfig, card: ModelCard) -> Split:
    """The data of a run, sized and normalised as asked, else as the card of a model says.

    Of the classes that a file names, where one is given.
    An automatic split does not depend on the run's seed: whoever trains a teacher with one seed
    and a student with another holds out the same images.
    """
    wishes = config.data
    split = data.load(
        config.data_dir,
        val_split=wishes.val_split,
        input_size=wishes.input_size or card.input_size,  # pyright: ignore[reportArgumentType]
        max_bad_images=wishes.max_bad_images,
        mean=wishes.mean or card.mean,
        std=wishes.std or card.std,
        crop_pct=wishes.crop_pct or card.crop_pct or 1.0,
        interpolation=wishes.interpolation or card.interpolation or "bilinear",
        stream=True if wishes.augment == "crop-flip" and wishes.data_device != "device" else None,
    )
    if wishes.classes is not None:
        split = data.select_classes(split, data.read_class_map(wishes.classes))
    for note in split.notes:
        say(note)
    if max(map(abs, wishes.mean or (0.0,))) > 1:
        warn("--mean above 1: it is that of images in 0..1; of images in 0..255, divide it by 255")
    for bad in split.bad:
        warn(f"left out {bad.path}: {bad.reason}")
    mean, std = (",".join(f"{v:.4g}" for v in each) for each in (split.train.mean, split.train.std))
    if wishes.mean:
        source = "as asked for"
    elif card.mean:
        source = "as the model's file says"
    else:
        own = tuple(split.train.mean) == data.IMAGENET_MEAN
        source = f"{'ImageNet' if own else 'measured'}, as the model's file does not say (--mean)"
    say(f"images   normalised with mean {mean} std {std}, {source}")
    return split


def data_settings(source: str, wishes: DataRecipe) -> RunConfig:
    """Settings for a verb that needs data and no recipe."""
    return RunConfig(teacher="none", student="none", data_dir=source, data=wishes)


def data_for(loaded: Loaded, settings: RunConfig) -> Split:
    """The data that ``settings`` name, once it is sure that the model can answer on it."""
    split = load_data(settings, loaded.card)
    classes = count_classes(loaded, torch.zeros((1, *split.train.input_size)))
    check_classes(loaded, classes, split)
    return split


def count_classes(loaded: Loaded, example: Tensor) -> int:
    """How many logits the model gives for each image, tried on three of them, in evaluation mode.

    Raises :class:`UsageError` when it fails or gives anything but one tensor of logits.
    """
    with handing_over_images():
        return tracing.count_classes(loaded.model, example, name=loaded.name)


def check_classes(model: Loaded, num_classes: int, split: Split) -> None:
    if num_classes != split.train.num_classes:
        raise UsageError(
            f"{model.name} has {num_classes} classes, {split.train.name} has "
            f"{split.train.num_classes}.",
            where=f"{model.source} and --data-dir",
            fix="use the data the model was made for, or a model with as many outputs",
        )
    names = model.card.class_names
    if names and tuple(names) != tuple(split.train.class_names):
        raise UsageError(
            f"{model.name} and {split.train.name} name their classes differently.",
            model=", ".join(names[:5]) + (" …" if len(names) > 5 else ""),
            data=", ".join(split.train.class_names[:5]) + (" …" if len(names) > 5 else ""),
            fix="rename the class folders to match the model's",
        )


def batches(config: RunConfig, split: Split) -> tuple[Batches, Batches]:
    """Training batches, shuffled and augmented, and validation batches, neither."""
    wishes = config.data
    name = split.train.default_augment if wishes.augment == "auto" else wishes.augment
    augment = data.parse_augmentation(
        name, aa=wishes.aa, reprob=wishes.reprob, cutout=wishes.cutout, scale=wishes.scale
    )
    device = _home(config, split)
    train = Batches(
        split.train,
        config.batch_size,
        shuffle=True,
        seed=config.seed,
        augment=augment,
        views=wishes.teacher_views and min(wishes.teacher_views, config.epochs),
        workers=_workers(wishes, split.train),
        device=device,
    )
    validation = Batches(
        split.val,
        config.batch_size,
        shuffle=False,
        seed=config.seed,
        workers=_workers(wishes, split.val),
        device=device,
    )
    return train, validation


def _home(config: RunConfig, split: Split) -> torch.device | None:
    """The device that the images live on; None where they wait in main memory or in their files."""
    device, asked = pick_device(config.device), config.data.data_device
    images = (split.train.images, split.val.images)
    is_small = sum(part.nbytes for part in images) <= DEVICE_BYTES
    is_decoded = all(isinstance(part, np.ndarray) for part in images)
    fits = device.type != "cpu" and is_small and is_decoded
    return device if asked == "device" or (asked == "auto" and fits) else None


def _workers(wishes: DataRecipe, part: data.Dataset) -> int:
    """As asked; else as many as there are cores, up to 8, where images have to be decoded."""
    if wishes.workers is not None:
        return wishes.workers
    return min(8, os.cpu_count() or 1) if isinstance(part.images, data.Pictures) else 0


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(f"there is no CUDA device for --device {name}.", fix="--device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ResourceError(f"there is no MPS device for --device {name}.", fix="--device cpu")
    return device


def check_threads(count: int) -> int:
    """``count``, or :class:`UsageError` where torch would crash for want of threads."""
    most = max(64, os.cpu_count() or 1)
    if not 1 <= count <= most:
        raise UsageError(
            f"--threads {count:,} is not a number of threads for this machine.",
            where=f"{os.cpu_count()} cores",
            fix=f"at most {most}; best is one for each core",
        )
    return count


def write_text(path: Path, text: str) -> None:
    """A file whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{path.parent} cannot be made: {error.strerror or error}.",
            fix="name a file in a folder that you may write to",
        ) from error
    write_whole(path, [text.encode()])
