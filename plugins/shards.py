"""WebDataset shards: plain tar files whose members are samples, for sets that outgrow a machine.

The members' places are indexed once, from the tar headers; images are read where they lie, when
they are asked for. Nothing else is kept in memory, and no index is written.
"""

import re
import tarfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from kdsurgeon import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")
MAX_LABEL_BYTES = 32
_TOO_MANY = 1_000_000  # names that a pattern may stand for


class Shards(NamedTuple):
    """Training and validation part, the latter None twice where there is none."""

    train_images: "Members"
    train_labels: np.ndarray
    test_images: "Members | None"
    test_labels: np.ndarray | None
    class_names: tuple[str, ...]


class Members:
    """The images of some shards by number, read from their places.

    ``groups`` numbers the shard of each, so that those of few shards are served together.
    """

    def __init__(
        self, paths: tuple[Path, ...], groups: np.ndarray, places: np.ndarray, keys: list[str]
    ) -> None:
        self.paths, self.groups, self.places, self.keys = paths, groups, places, keys

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> bytes:
        first, length = self.places[row].tolist()
        with self.paths[self.groups[row]].open("rb") as file:
            file.seek(first)
            content = file.read(length)
        if len(content) < length:
            raise DataError(f"{self.name_of(row)} is cut off.")
        return content

    def name_of(self, row: int) -> str:
        return f"{self.paths[self.groups[row]].name}/{self.keys[row]}"


def read(path: str | Path) -> Shards:
    """The shards that a pattern names: ``DIR/train-{000..099}.tar?val=val-{00..04}.tar``.

    A sample is all members of one name up to the first dot, in a row: an image (``.jpg``, ``.png``,
    …) and its class as a whole number in ``.cls``. A folder alone stands for ``train*.tar`` and
    ``val*.tar`` (else ``test*.tar``) in it; without a validation pattern a share of each class
    validates. ``classes.txt`` beside the shards, one name per line, names the classes.

    Raises:
        DataError: no such shard, one that is empty, cut off or no tar file, or a sample without
            image or class.

    >>> import io, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with tarfile.open(Path(folder, "train-0.tar"), "w") as tar:
    ...         for name, content in (("a.png", b"PNG"), ("a.cls", b"1")):
    ...             member = tarfile.TarInfo(name)
    ...             member.size = len(content)
    ...             tar.addfile(member, io.BytesIO(content))
    ...     found = read(f"{folder}/train-{{0..0}}.tar")
    ...     found.train_images[0], found.train_labels.tolist(), found.class_names
    (b'PNG', [1], ('0', '1'))
    """
    train, val = _named(str(path))
    train_images, train_labels = _indexed(train)
    val_images, val_labels = _indexed(val) if val else (None, None)
    top = max(int(labels.max()) for labels in (train_labels, val_labels) if labels is not None)
    names = _class_names(train[0].parent / "classes.txt", top)
    return Shards(train_images, train_labels, val_images, val_labels, names)


def expanded(pattern: str) -> list[str]:
    """Every name that a pattern stands for: ``{000..099}`` counts, ``{a,b}`` lists.

    >>> expanded("{a,b}-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    """
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[piece] if at % 2 == 0 else _choices(piece, pattern) for at, piece in
               enumerate(pieces)]  # fmt: skip
    count = int(np.prod([len(each) for each in choices], dtype=np.float64))
    if count > _TOO_MANY:
        raise DataError(f"{pattern} stands for {count:,} shards.", fix="name fewer")
    return ["".join(each) for each in product(*choices)]


def _choices(text: str, pattern: str) -> list[str]:
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not found:
        return text.split(",")
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + _TOO_MANY:
        raise DataError(f"{{{text}}} in {pattern} does not count upwards.")
    return [str(number).zfill(len(found[1])) for number in range(first, last + 1)]


def _named(text: str) -> tuple[list[Path], list[Path]]:
    pattern, question, query = text.partition("?")
    folder = Path(pattern)
    if folder.is_dir():
        if question:
            raise DataError(
                f"{text} names a folder and ?{query}.", fix="name the training shards: DIR/train-…"
            )
        parts = {name: sorted(folder.glob(f"{name}*.tar")) for name in ("train", "val", "test")}
        if not parts["train"]:
            raise DataError(
                f"{folder} has no shards train*.tar.",
                fix=f"name them: wds:{folder}/NAME-{{000..099}}.tar",
            )
        return parts["train"], parts["val"] or parts["test"]
    if question and not query.startswith("val="):
        raise DataError(
            f"?{query} is not known of shards.", fix="?val=PATTERN names those that validate"
        )
    val = [_beside(folder, name) for name in expanded(query[4:])] if question else []
    return [Path(name) for name in expanded(pattern)], val


def _beside(shard: Path, name: str) -> Path:
    """A validation shard, in the folder of the training shards unless it names its own."""
    return Path(name) if "/" in name else shard.parent / name


class _Sample(NamedTuple):
    key: str
    place: tuple[int, int]
    label: int


def _indexed(paths: list[Path]) -> tuple[Members, np.ndarray]:
    """Where every image of these shards lies, and its class."""
    keys: list[str] = []
    places, labels, groups = [], [], []
    for number, path in enumerate(paths):
        before = len(keys)
        for sample in _samples(path):
            keys.append(sample.key)
            places.append(sample.place)
            labels.append(sample.label)
        if len(keys) == before:
            raise DataError(f"{path.name} holds no sample.", where=str(path.parent))
        groups.extend([number] * (len(keys) - before))
    members = Members(tuple(paths), np.array(groups), np.array(places, dtype=np.int64), keys)
    return members, np.array(labels, dtype=np.int64)


def _samples(path: Path) -> Iterator[_Sample]:
    """Each sample of a shard: neighbours of one name up to the first dot of the file name."""
    key, found = "", dict[str, tuple[int, int]]()
    try:
        size = path.stat().st_size
        with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                folder, slash, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                if not member.isfile() or not stem:
                    continue
                if folder + slash + stem != key:
                    if key:
                        yield _sample(path, key, found, raw)
                    key, found = folder + slash + stem, {}
                found[ending.lower()] = (member.offset_data, member.size)
                # else every header of the shard would stay in memory
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
            if key:
                yield _sample(path, key, found, raw)
            _check_end(tar.offset, size)
    except tarfile.TarError as error:
        raise DataError(
            f"{path.name} is cut off, or no plain tar file.",
            where=str(path.parent),
            why=str(error),
            fix="copy it again; shards are not compressed",
        ) from error
    except OSError as error:
        raise DataError(
            f"the shard {path} cannot be read.",
            why=error.strerror or str(error),
            fix="check the pattern: wds:DIR/train-{000..099}.tar",
        ) from error


def _check_end(end: int, size: int) -> None:
    """A whole tar file ends in blocks of zeros; one cut between two members does not."""
    if end >= size:
        raise tarfile.ReadError("it has no end")


def _sample(path: Path, key: str, found: dict[str, tuple[int, int]], raw: BinaryIO) -> _Sample:
    images = [ending for ending in found if ending.rpartition(".")[2] in IMAGES]
    if len(images) != 1:
        what = f"{len(images)} images" if images else "no image"
        raise DataError(
            f"{path.name}: the sample {key} has {what}.",
            where=", ".join(f".{ending}" for ending in sorted(found)),
            fix=f"one of {' '.join(f'.{ending}' for ending in IMAGES)} in each",
        )
    if "cls" not in found:
        raise DataError(
            f"{path.name}: the sample {key} has no class.",
            where=", ".join(f".{ending}" for ending in sorted(found)),
            fix=f"add {key}.cls with its number, from 0",
        )
    first, length = found["cls"]
    here = raw.tell()
    raw.seek(first)
    text = raw.read(min(length, MAX_LABEL_BYTES)).decode("ascii", "replace").strip()
    raw.seek(here)
    if not re.fullmatch(r"\d{1,9}", text):
        raise DataError(
            f"{path.name}: the class of {key} is not a whole number of 0 or more.",
            where="".join(sign if sign.isprintable() else "?" for sign in text[:40]),
        )
    return _Sample(f"{key}.{images[0]}", found[images[0]], int(text))


def _class_names(path: Path, top: int) -> tuple[str, ...]:
    if not path.is_file():
        return tuple(map(str, range(top + 1)))
    names = path.read_text(encoding="utf-8", errors="replace").split("\n")
    names = [name.strip() for name in names if name.strip()]
    if len(names) <= top or len(set(names)) < len(names):
        raise DataError(
            f"{path} names {len(names)} classes; the labels go up to {top}.",
            why="one name per line, each another",
        )
    return tuple(names)
