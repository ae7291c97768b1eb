"""Read a data set that an installed plugin knows how to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdsurgeon import plugins
from kdsurgeon.data.arrays import finish_arrays, hashed
from kdsurgeon.data.pictures import (
    Pictures,
    check_bad,
    is_streamed,
    pictures,
    without_damaged,
)
from kdsurgeon.data.sets import (
    BadImage,
    Fit,
    Options,
    Part,
    Split,
    check_classes,
    content_hash,
    finish,
    stratified,
)
from kdsurgeon.data.words import by
from kdsurgeon.errors import DataError, PluginError, SurgeonError


def load_source(name: str, path: Path, options: Options) -> Split:
    """The data set that the plugin ``name`` reads at ``path``; its test part validates.

    Raises :class:`PluginError` when the plugin fails, or returns what is no data set.
    """
    plugin = plugins.load("data", name)
    try:
        train_images, train_labels, test_images, test_labels, class_names = plugin(path)
    except (SurgeonError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(
            f'the data source "{name}" failed on {path}.', why=f"{type(error).__name__}: {error}"
        ) from error
    classes = tuple(map(str, class_names))
    found = [(train_images, _labels(name, train_labels, train_images, classes))]
    notes = []
    if test_images is None:
        notes.append("it has no test part: a share of each class validates.")
    else:
        notes.append("the test part serves as the validation part.")
        found.append((test_images, _labels(name, test_labels, test_images, classes)))
    if isinstance(train_images, np.ndarray):
        images, labels = zip(*found, strict=True)
        return finish_arrays(name, images, labels, classes, options, notes, 255.0)
    return _of_pictures(name, found, classes, options, notes)


def _labels(name: str, labels: Any, images: Any, class_names: Sequence[str]) -> np.ndarray:
    numbers = np.asarray(labels)
    if numbers.ndim != 1 or numbers.dtype.kind not in "ui" or len(numbers) != len(images):
        raise PluginError(
            f'the data source "{name}" gave no label for each image.',
            why=f"labels {numbers.dtype} of shape {by(numbers.shape)} for {len(images):,} images",
        )
    if not len(numbers):
        raise DataError(f"{name}: a part has no images.", fix="check the path")
    if numbers.min() < 0 or numbers.max() >= len(class_names):
        raise DataError(
            f"{name}: the labels run from {numbers.min()} to {numbers.max()}, but there are "
            f"{len(class_names)} class names."
        )
    return numbers.astype(np.int64)


def _of_pictures(
    name: str,
    found: Sequence[tuple[Any, np.ndarray]],
    class_names: tuple[str, ...],
    options: Options,
    notes: list[str],
) -> Split:
    halves: list[tuple[Pictures, np.ndarray]] = []
    for (items, labels), fit in zip(found, options.fits, strict=False):
        first = halves[0][0] if halves else None
        halves.append((_named(name, items, options, fit, first), labels))
    fingerprint = content_hash(_names_and_labels(halves), class_names)
    if len(halves) == 1:
        (whole, labels), (_, fit) = halves[0], options.fits
        train_rows, val_rows = stratified(name, labels, options)
        halves = [
            (whole.take(train_rows), labels[train_rows]),
            (whole.take(val_rows).fitted(fit), labels[val_rows]),
        ]
    check_classes(name, halves[0][1], halves[1][1], class_names)
    return finish_pictures(name, halves, class_names, options, fingerprint, notes)


def _named(name: str, items: Any, options: Options, fit: Fit, like: Pictures | None) -> Pictures:
    """The images with what messages call them, and the shards that they lie in, where known."""
    name_of = getattr(items, "name_of", None)
    ids = [name_of(row) if name_of else f"{name}[{row}]" for row in range(len(items))]
    groups = getattr(items, "groups", None)
    return pictures(name, items, ids, options.input_size, fit, groups, like)


def finish_pictures(
    name: str,
    halves: Sequence[tuple[Pictures, np.ndarray]],
    class_names: tuple[str, ...],
    options: Options,
    fingerprint: str,
    notes: list[str],
) -> Split:
    """Both parts as data sets: left where they are if that was asked or they are many."""
    bad: list[BadImage] = []
    if options.max_bad_images:
        total = sum(len(labels) for _, labels in halves)
        checked = [without_damaged(*half) for half in halves]
        bad = [image for _, _, some in checked for image in some]
        check_bad(name, bad, total, options.max_bad_images)
        halves = [(images, labels) for images, labels, _ in checked]
        check_classes(name, halves[0][1], halves[1][1], class_names)
        if bad:
            notes.append(f"unreadable images left out: {len(bad):,}.")
    if is_streamed(options.stream, sum(images.nbytes for images, _ in halves)):
        notes.append("images are decoded when they are needed; the fingerprint is of their names.")
        parts = [Part(images, labels, (), images.ids) for images, labels in halves]
    else:
        parts = []
        for images, labels in halves:
            part = hashed(images.decoded(), labels)
            parts.append(Part(part.images, labels, part.digests, images.ids))
    return finish(
        name,
        parts[0],
        parts[1],
        class_names,
        options,
        fingerprint=fingerprint,
        notes=notes,
        is_natural=True,
        bad=tuple(bad),
    )


def _names_and_labels(halves: Sequence[tuple[Pictures, np.ndarray]]) -> Iterator[bytes]:
    for images, labels in halves:
        yield f"{by(images.shape)}\n".encode()
        yield "\0".join(images.ids).encode("utf-8", "backslashreplace")
        yield labels.astype("<i8").tobytes()
