"""Let one batch of images serve a teacher and a student that were made for different ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kdsurgeon.checkpoints import INTERPOLATIONS, Loaded, ModelCard
from kdsurgeon.cli import inputs
from kdsurgeon.cli.console import say
from kdsurgeon.data import ImageSpec, ReconciledTeacher, Split
from kdsurgeon.data.classes import numbers_of, read_class_map
from kdsurgeon.errors import UsageError
from kdsurgeon.recipe import RunConfig


def card_of(loaded: Loaded) -> ModelCard:
    """What is known of a model: by its file, else by its own config if its weights came with it."""
    config = _own_config(loaded)
    card, known = loaded.card, config.get("interpolation")
    return replace(
        card,
        input_size=card.input_size or config.get("input_size"),
        mean=card.mean or config.get("mean"),
        std=card.std or config.get("std"),
        crop_pct=card.crop_pct or config.get("crop_pct"),
        interpolation=card.interpolation or (known if known in INTERPOLATIONS else None),
    )


def _own_config(loaded: Loaded) -> dict:
    """timm's ``pretrained_cfg``, which is true of the weights only if they were loaded with it."""
    is_pretrained = loaded.sha256 is None and "pretrained=true" in loaded.source.casefold()
    config = getattr(loaded.model, "pretrained_cfg", None) if is_pretrained else None
    return dict(config or {})


def as_student_sees(settings: RunConfig, student: Loaded, split: Split) -> Split:
    """The data as the student was trained on it, where its file says so and nobody else does."""
    card = card_of(student)
    size = card.input_size
    if settings.data.input_size is None and size and tuple(size) != split.train.input_size:
        wishes = settings.data.replace(input_size=tuple(size))
        settings = settings.replace(data=wishes)
        split = inputs.load_data(settings, card)
    if settings.data.mean or not (card.mean and card.std):
        return split
    if len(card.mean) != len(split.train.mean):
        raise UsageError(
            f"{student.name} sees {len(card.mean)} channels, the images have "
            f"{len(split.train.mean)}.",
            fix=f"--input-size {len(card.mean)},H,W converts them",
        )
    return split.normalised_by(card.mean, card.std)


def reconciled(teacher: Loaded, settings: RunConfig, split: Split) -> Loaded:
    """The teacher in front of the student's images and classes; itself where they are its own."""
    data = split.train
    given = ImageSpec(data.input_size[1:], data.mean, data.std)
    card = card_of(teacher)
    size = tuple(card.input_size or data.input_size)[1:]
    own = ImageSpec(
        (size[0], size[1]),
        card.mean or data.mean,
        card.std or data.std,
        settings.data.interpolation or card.interpolation or "bilinear",
    )
    kept = _kept_classes(teacher, settings, split, own)
    is_same = (own.size, own.mean, own.std) == (given.size, given.mean, given.std)
    if is_same and kept is None:
        return teacher
    for line in _what_is_done(teacher, given, own, kept):
        say(line)
    model = ReconciledTeacher(teacher.model, given, own, classes=kept)
    known = replace(
        teacher.card,
        input_size=data.input_size,
        num_classes=data.num_classes,
        class_names=data.class_names if kept is not None else teacher.card.class_names,
        mean=data.mean,
        std=data.std,
    )
    return replace(teacher, model=model, card=known)


def _kept_classes(
    teacher: Loaded, settings: RunConfig, split: Split, own: ImageSpec
) -> Sequence[int] | None:
    """Which of the teacher's logits belong to the classes of the student; None: all."""
    if settings.data.classes is None:
        return None
    names = [name for name, _ in read_class_map(settings.data.classes)]
    device = next((weight.device for weight in teacher.model.parameters()), torch.device("cpu"))
    example = torch.zeros((1, len(own.mean), *own.size), device=device)
    count = inputs.count_classes(teacher, example)
    source = split.source_classes or split.train.class_names
    known = teacher.card.class_names or (source if len(source) == count else map(str, range(count)))
    found = numbers_of(names, tuple(known), teacher.name)
    if len(set(found)) < len(found):
        raise UsageError(f"{settings.data.classes} names a class of {teacher.name} twice.")
    return found


def _what_is_done(
    teacher: Loaded, given: ImageSpec, own: ImageSpec, kept: Sequence[int] | None
) -> list[str]:
    lines = []
    if (own.mean, own.std) != (given.mean, given.std):
        mean, std = (",".join(f"{v:.4g}" for v in each) for each in (own.mean, own.std))
        lines.append(f"teacher  sees the same images normalised with its mean {mean} std {std}")
    if own.size != given.size:
        sizes = [f"{height}×{width}" for height, width in (given.size, own.size)]
        lines.append(
            f"teacher  sees the same images resized from {sizes[0]} to {sizes[1]}, "
            f"{own.interpolation}"
        )
    if kept is not None:
        lines.append(f"teacher  answers for {len(kept)} of its classes, the student's")
    return lines
