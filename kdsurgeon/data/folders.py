"""Read a data set from a folder of class folders, one image per file."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np

from kdsurgeon.data.decoding import DecodedPart, File, decode_parts
from kdsurgeon.data.pictures import check_bad, is_streamed, of_files
from kdsurgeon.data.sets import (
    Options,
    Part,
    Split,
    check_classes,
    content_hash,
    finish,
    stratified,
)
from kdsurgeon.data.sources import finish_pictures
from kdsurgeon.data.words import listed, shown
from kdsurgeon.errors import DataError, ResourceError

SUFFIXES = frozenset(  # compared without case
    [".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"]
)
_TRAIN = ("train", "training")
_VAL = ("val", "valid", "validation", "eval", "evaluation")
_TEST = ("test", "testing")


def load_folder(folder: Path, options: Options) -> Split:
    """The data set in a folder: ``train`` and ``val`` of class folders, or class folders alone."""
    root = Path(os.path.realpath(folder))
    name = shown(root.name or str(root))
    places, notes = _places(name, root)
    found = []
    for place in places:
        files, more = _files(name, place, root)
        found.append(files)
        notes.extend(more)
    class_names = tuple(sorted({file.label for files in found for file in files}))
    if len(found) == 1:
        rows = stratified(name, _numbers(found[0], class_names), options)
        found = [[found[0][row] for row in part] for part in rows]
    in_train, in_val = (_numbers(files, class_names) for files in found)
    check_classes(name, in_train, in_val, class_names)
    if _is_streamed(found, options):
        return _streamed(name, found, class_names, options, notes)
    train, val = decode_parts(name, found, options.input_size, options.fits)
    bad = (*train.bad, *val.bad)
    check_bad(name, bad, sum(map(len, found)), options.max_bad_images)
    lost = sorted(set(class_names) - {fact.file.label for fact in train.facts})
    if lost:
        raise DataError(f"{name}: no training image of {listed(lost)} can be read.")
    if bad:
        notes.append(f"unreadable images left out: {len(bad):,}.")
    remarks = Counter(remark for fact in train.facts + val.facts for remark in fact.remarks)
    notes.extend(f"{what}: {count:,}." for what, count in sorted(remarks.items()))
    return finish(
        name,
        _numbered(train, class_names),
        _numbered(val, class_names),
        class_names,
        options,
        fingerprint=content_hash(_content(train, val), class_names),
        notes=notes,
        is_natural=True,
        bad=bad,
    )


def _is_streamed(found: Sequence[Sequence[File]], options: Options) -> bool:
    num_bytes = math.prod(options.input_size or (0,)) * sum(map(len, found))
    return is_streamed(options.stream, num_bytes)


def _streamed(
    name: str,
    found: Sequence[Sequence[File]],
    class_names: tuple[str, ...],
    options: Options,
    notes: list[str],
) -> Split:
    """The same data set, of which no image is decoded but when it is asked for."""
    halves = []
    for files, fit in zip(found, options.fits, strict=True):
        first = halves[0][0] if halves else None
        images = of_files(name, files, options.input_size, fit, first)
        halves.append((images, _numbers(files, class_names)))
    sizes = sorted(f"{f.id}\0{os.stat(f.path).st_size}\n" for part in found for f in part)  # noqa: PTH116
    fingerprint = content_hash((size.encode() for size in sizes), class_names)
    return finish_pictures(name, halves, class_names, options, fingerprint, notes)


def _places(name: str, root: Path) -> tuple[list[Path], list[str]]:
    """The folder of the training part, of the validation part if there is one, and notes."""
    folders = {shown(e.name): Path(e.path) for e in _entries(root, root) if _is_folder(e)}

    def called(names: Sequence[str]) -> list[str]:
        return [folder for folder in folders if folder.casefold() in names]

    def has_folders(folder: str) -> bool:
        return any(_is_folder(entry) for entry in _entries(folders[folder], root))

    train, val, test = called(_TRAIN), called(_VAL), called(_TEST)
    if not any(map(has_folders, train)):
        orphans = [folder for folder in val + test if has_folders(folder)]
        if orphans:
            raise DataError(f"{name} has a folder {orphans[0]}, but no folder train beside it.")
        return [root], []
    for same in (train, val, [] if val else test):
        if len(same) > 1:
            raise DataError(f"{name} has {listed(same)}, which name the same part; keep one.")
    chosen = train + (val or test)
    notes = []
    if not val and test:
        notes.append(f"{test[0]}/ serves as the validation part.")
    left_out = [folder for folder in folders if folder not in chosen]
    if left_out:
        notes.append(f"folders left out: {listed(left_out)}.")
    return [folders[folder] for folder in chosen], notes


def _files(name: str, place: Path, root: Path) -> tuple[list[File], list[str]]:
    """The images of every class folder in ``place``, sorted by path; and notes."""
    entries = _entries(place, root)
    classes = [entry for entry in entries if _is_folder(entry)]
    loose = [entry.path for entry in entries if not _is_folder(entry)]
    where = name if place == root else _below(str(place), root)
    if not classes:
        if any(map(_is_image, loose)):
            raise DataError(
                f"the images of {where} lie directly in it.",
                fix="put the images of each class into a folder of its own",
            )
        raise DataError(f"{where} has no class folders.", where=f"files in it: {len(loose)}")
    files, empty = [], []
    for entry in classes:
        paths = _walk(Path(entry.path), root)
        images = [path for path in paths if _is_image(path)]
        loose.extend(path for path in paths if not _is_image(path))
        label = shown(entry.name)
        if not images:
            empty.append(label)
        files.extend(File(path, _below(path, root), label) for path in images)
    if not files:
        raise DataError(
            f"{where} has no images.",
            where=f"class folders: {len(classes)}; other files: {len(loose)}",
            fix=f"images end in {' '.join(sorted(SUFFIXES))}",
        )
    if empty:
        raise DataError(
            f"{where} has class folders without an image: {listed(empty)}.",
            fix="add images or remove these folders",
        )
    if not loose:
        return files, []
    some = listed(_below(path, root) for path in sorted(loose))
    return files, [f"other files left out: {len(loose):,} ({some})."]


def _entries(folder: Path, root: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted, without hidden files; a link that leaves root is refused."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(
                (e for e in found if not e.name.startswith(".")), key=attrgetter("name")
            )
    except OSError as error:
        raise ResourceError(
            f"the folder {_below(str(folder), root)} cannot be read.", why=error.strerror
        ) from error
    for entry in entries:
        if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(root):
            raise DataError(
                f"{_below(entry.path, root)} is a link that leaves the data folder; refused.",
                fix="copy what it points to into the folder",
            )
    return entries


def _walk(folder: Path, root: Path) -> list[str]:
    """The files at and below ``folder``; a link that leads back to a folder above is refused."""
    files: list[str] = []
    stack = [(folder, frozenset[str]())]
    while stack:
        here, above = stack.pop()
        real = os.path.realpath(here)
        if real in above:
            raise DataError(
                f"{_below(str(here), root)} is a link to a folder that it lies in; refused."
            )
        for entry in _entries(here, root):
            if _is_folder(entry):
                stack.append((Path(entry.path), above | {real}))
            else:
                files.append(entry.path)
    return sorted(files)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path)  # noqa: PTH112  False, not an error, for a looping link


def _is_image(path: str) -> bool:
    return Path(path).suffix.lower() in SUFFIXES


def _below(path: str, root: Path) -> str:
    return shown(Path(path).relative_to(root).as_posix())


def _numbers(files: Iterable[File], class_names: Sequence[str]) -> np.ndarray:
    index = {name: number for number, name in enumerate(class_names)}
    return np.array([index[file.label] for file in files], dtype=np.int64)


def _numbered(part: DecodedPart, class_names: Sequence[str]) -> Part:
    files = [fact.file for fact in part.facts]
    digests, ids = tuple(fact.digest for fact in part.facts), tuple(file.id for file in files)
    return Part(part.images, _numbers(files, class_names), digests, ids)


def _content(*parts: DecodedPart) -> list[bytes]:
    """What the files hold, in an order that does not depend on the split."""
    facts = [fact for part in parts for fact in part.facts]
    return sorted(f"{f.file.id}\0{f.num_bytes}\0{f.digest.hex()}\n".encode() for f in facts)
