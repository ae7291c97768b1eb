"""Learn some of the teacher's classes only: which, in which order, and what the data calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kdsurgeon.data.sets import Split, check_classes, content_hash
from kdsurgeon.data.words import listed, shown
from kdsurgeon.errors import DataError, nearest

MAX_BYTES = 2**22
ClassMap = tuple[tuple[str, str], ...]


def read_class_map(path: str | Path) -> ClassMap:
    """(the teacher's class, the data's class) for each class to learn, in the order of the student.

    One line each: a name or number that both have, or two of them with a tab between. Empty lines
    do not count.

    Raises:
        DataError: the file is missing, names fewer than two classes, or one of them twice.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} has more than {MAX_BYTES:,} bytes; it is no list of classes.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the list of classes {path} cannot be read.",
            why=getattr(error, "strerror", None) or "it is no text in UTF-8",
            fix="one class per line, in the order of the student: --classes FILE",
        ) from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    parts = [line.partition("\t") for line in lines]
    found = tuple((shown(left.strip()), shown((right or left).strip())) for left, _, right in parts)
    if len(found) < 2:
        raise DataError(f"{path} names {len(found)} classes; a classifier needs two or more.")
    for side, who in ((0, "the teacher's"), (1, "the data's")):
        names = [pair[side] for pair in found]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise DataError(f"{path} names {who} {listed(twice)} more than once.")
    return found


def numbers_of(names: Sequence[str], known: Sequence[str], where: str) -> list[int]:
    """The number of each class among ``known``, by its name or else as a number from 0.

    Raises:
        DataError: no such class.

    >>> numbers_of(["dog", "0"], ["cat", "dog"], "pets")
    [1, 0]
    """
    index = {name: number for number, name in enumerate(known)}
    found = []
    for name in names:
        number = index.get(name, int(name) if name.isdecimal() else -1)
        if not 0 <= number < len(known):
            raise DataError(
                f'{where} has no class "{name}".',
                where=f"its classes: {listed(known)}",
                fix=nearest(name, known),
            )
        found.append(number)
    return found


def select_classes(split: Split, class_map: ClassMap) -> Split:
    """The samples of these classes alone, numbered in their order.

    Raises:
        DataError: the data has no such class, or a part has no sample of them.
    """
    names = [name for _, name in class_map]
    source = split.train.class_names
    chosen = numbers_of(names, source, split.train.name)
    if len(set(chosen)) < len(chosen):
        raise DataError(f"the list of classes names a class of {split.train.name} twice.")
    number = np.full(len(source), -1, dtype=np.int64)
    number[chosen] = np.arange(len(chosen))
    wanted = tuple(source[each] for each in chosen)
    kept = [np.flatnonzero(number[part.labels] >= 0) for part in (split.train, split.val)]
    parts = (split.train, split.val)
    labels = [number[part.labels[rows]] for part, rows in zip(parts, kept, strict=True)]
    notes = check_classes(split.train.name, labels[0], labels[1], wanted)
    train, val = (part.select(rows, wanted, number) for part, rows in zip(parts, kept, strict=True))
    left_out = len(split.train) + len(split.val) - len(train) - len(val)
    said = (
        f"{len(wanted)} of {len(source)} classes; images of other classes left out: {left_out:,}."
    )
    return replace(
        split,
        train=train,
        val=val,
        fingerprint=content_hash([split.fingerprint.encode()], wanted),
        notes=(*split.notes, said, *notes),
        source_classes=source,
    )
