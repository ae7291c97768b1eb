"""CIFAR-100 from its files: the official Python or binary version, or packed parts.

Nothing is run that a file says: the official pickles are read by a machine that knows the few
operations which such files need, and neither imports nor calls anything.
"""

import hashlib
import json
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from PIL import Image

from kdsurgeon import DataError

NUM_CLASSES = 100
SIDE = 32  # pixels
RECORD = 2 + 3 * SIDE * SIDE  # bytes of the binary version: coarse label, fine label, pixels
MAX_BYTES = 1 << 28  # of one file; the largest official one has 155,249,918


class Cifar100(NamedTuple):
    """uint8 images (N, 32, 32, 3), int64 fine labels (N,), names in the order of the labels."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]


def read(path: str | Path) -> Cifar100:
    """CIFAR-100 (Krizhevsky 2009), by what lies in the folder ``path`` or below its usual name.

    * ``cifar-100-python``: the pickles ``train``, ``test``, ``meta``.
    * ``cifar-100-binary``: ``train.bin``, ``test.bin``, ``fine_label_names.txt``.
    * packed parts: ``cifar100-test.zip`` and any number of ``cifar100-train….zip``, each with
      ``meta.json`` and a WebP strip ``00.webp`` … ``99.webp`` per class, lossless, the same number
      of images in each. They come sorted by class: shuffle.

    Raises:
        DataError: no such files, or one that is missing, damaged, or not balanced over the classes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for half in ("train", "test"):
    ...         records = b"".join(bytes([0, label]) + bytes(3072) for label in range(100))
    ...         _ = Path(folder, f"{half}.bin").write_bytes(records)
    ...     _ = Path(folder, "fine_label_names.txt").write_text(" ".join(map(str, range(100))))
    ...     read(folder).train_images.shape
    (100, 32, 32, 3)
    """
    folder = Path(path)
    for place in (folder, folder / "cifar-100-python", folder / "cifar-100-binary"):
        for pattern, reader in _READERS.items():
            if place.is_dir() and any(place.glob(pattern)):
                return reader(place)
    raise DataError(
        f"{folder} holds no CIFAR-100." if folder.is_dir() else f"{folder} is not a folder.",
        fix="give the unpacked cifar-100-python or cifar-100-binary, or the folder of the parts "
        "cifar100-test.zip, cifar100-train1.zip, …",
    )


@dataclass(frozen=True)
class _Half:
    """One of the two halves, training or test, as its file has it, checked."""

    where: str
    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        names, labels = self.class_names, self.labels
        if len(names) != NUM_CLASSES or len(set(names)) != NUM_CLASSES:
            raise DataError(f"{self.where}: the class names are not {NUM_CLASSES} different ones.")
        if not all(name and name.isprintable() for name in names):
            raise DataError(f"{self.where}: a class name is empty or cannot be printed.")
        if len(labels) != len(self.images) or not len(labels):
            raise DataError(
                f"{self.where}: {len(labels):,} labels for {len(self.images):,} images."
            )
        if labels.min() < 0 or labels.max() >= NUM_CLASSES:
            raise DataError(
                f"{self.where}: the labels run from {labels.min()} to {labels.max()}, "
                f"not from 0 to {NUM_CLASSES - 1}."
            )
        counts = np.bincount(labels, minlength=NUM_CLASSES)
        if counts.min() < counts.max():
            raise DataError(
                f"{self.where}: the classes have {counts.min():,} to {counts.max():,} images.",
                why="every class of CIFAR-100 has equally many; the file is cut off or edited",
                fix="copy it again",
            )


def _joined(train: _Half, test: _Half) -> Cifar100:
    if train.class_names != test.class_names:
        raise DataError(f"{train.where} and {test.where} name the classes differently.")
    return Cifar100(train.images, train.labels, test.images, test.labels, train.class_names)


def _content(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise DataError(f"{path.name} is missing.", where=str(path.parent), fix="copy it there")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} has more than {MAX_BYTES:,} bytes; no file of CIFAR-100 has.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read.", why=error.strerror) from error


def _pictures(rows: np.ndarray) -> np.ndarray:
    """(N, 3072) bytes, all of red first, then green, then blue, as images (N, 32, 32, 3)."""
    planes = rows.reshape(-1, 3, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


# the binary version ──────────────────────────────────────────────────────────────────────────────


def _read_binary(folder: Path) -> Cifar100:
    text = _content(folder / "fine_label_names.txt").decode("utf-8", "replace")
    names = tuple(text.split())
    return _joined(_binary(folder / "train.bin", names), _binary(folder / "test.bin", names))


def _binary(path: Path, names: tuple[str, ...]) -> _Half:
    raw = _content(path)
    if not raw or len(raw) % RECORD:
        raise DataError(
            f"{path.name} has {len(raw):,} bytes, not a multiple of {RECORD:,}.",
            where=str(path.parent),
            why=f"each of its records has {RECORD:,} bytes; it is cut off or another file",
            fix="copy or unpack it again",
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, RECORD)
    return _Half(path.name, _pictures(records[:, 2:]), records[:, 1].astype(np.int64), names)


# the Python version ──────────────────────────────────────────────────────────────────────────────


def _read_python(folder: Path) -> Cifar100:
    found = _unpickled(folder / "meta").get("fine_label_names")
    if not _is_list_of(found, str):
        raise _damaged(folder / "meta", "its fine_label_names are not a list of texts")
    names = tuple(found)
    return _joined(_pickled(folder / "train", names), _pickled(folder / "test", names))


def _pickled(path: Path, names: tuple[str, ...]) -> _Half:
    found = _unpickled(path)
    rows, labels = found.get("data"), found.get("fine_labels")
    if not isinstance(rows, np.ndarray) or rows.shape[1:] != (3 * SIDE * SIDE,):
        raise _damaged(path, "its data are not rows of 3,072 bytes")
    if not _is_list_of(labels, int):
        raise _damaged(path, "its fine_labels are not a list of whole numbers")
    return _Half(path.name, _pictures(rows), np.array(labels, dtype=np.int64), names)


def _is_list_of(value: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _unpickled(path: Path) -> dict[str, Any]:
    raw = _content(path)
    try:
        found = _PickleMachine(raw).run()
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}"[:200]) from error
    if not isinstance(found, dict):
        raise _damaged(path, "it holds no dict")
    return found


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"{path.name} is not the file of this name in cifar-100-python; it was not unpickled.",
        where=str(path.parent),
        why="".join(sign if sign.isprintable() else "?" for sign in why),
        fix="unpack the official archive again, or take its binary version",
    )


@dataclass(frozen=True)
class _Name:
    """Something that a pickle would import and that stays a name here."""

    text: str


_ARRAY, _BYTE = _Name("an array"), _Name("its number format")
_NAMES = frozenset({"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _PickleMachine:
    """The stack machine of pickle protocol 2, reduced to what Python 2 wrote into these files:
    numbers, texts, lists, tuples, dicts, and NumPy arrays of bytes.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """What the pickle describes; ValueError and its like where that is anything else."""
        for opcode, argument, place in pickletools.genops(self.raw):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument, place or 0)
        raise ValueError("it has no end")

    def step(self, opcode: str, argument: Any, place: int) -> None:
        stack = self.stack
        match opcode:
            case "SHORT_BINSTRING" | "BININT" | "BININT1" | "BININT2":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_CONSTANTS[opcode])
            case "BINSTRING":  # pixels: a window onto the file instead of a text
                start = place + 5
                stack.append(memoryview(self.raw)[start : start + len(argument)])
            case "PROTO":
                pass
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.last(int(opcode[-1]))))
            case "TUPLE":
                items = self.above_mark()
                self.stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                self.extend(self.last(1) if opcode == "APPEND" else self.above_mark())
            case "SETITEM" | "SETITEMS":
                self.fill(self.last(2) if opcode == "SETITEM" else self.above_mark())
            case "GLOBAL":
                stack.append(_named(argument))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_made(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                stack.append(_built(stack.pop(), state))
            case _:
                raise ValueError(f"opcode {opcode}, which these files do not have")

    def last(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError(f"it appends to {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def fill(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or not _is_list_of(items[::2], str):
            raise ValueError("it puts items into what is no dict, or under keys that are no texts")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _named(text: str) -> _Name:
    if text not in _NAMES:
        raise ValueError(f"it would import {text.replace(' ', '.')}")
    return _Name(text)


def _made(function: Any, arguments: Any) -> _Name:
    """A stand-in for what NumPy's constructor would return."""
    if function == _Name("numpy.core.multiarray _reconstruct"):
        return _ARRAY
    if function == _Name("numpy dtype") and isinstance(arguments, tuple) and arguments[0] == "u1":
        return _BYTE
    raise ValueError(f"it would call {getattr(function, 'text', 'something')} in another way")


def _built(target: Any, state: Any) -> Any:
    """An array from (version, shape, dtype, whether it is in Fortran order, bytes)."""
    if target is _BYTE:
        return target
    _, shape, dtype, is_fortran, content = state
    if target is not _ARRAY or dtype is not _BYTE:
        raise ValueError("an array that is not one of bytes")
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if is_fortran else "C")


# packed parts ────────────────────────────────────────────────────────────────────────────────────


def _read_packed(folder: Path) -> Cifar100:
    parts = sorted(folder.glob("cifar100-train*.zip"))
    if not parts:
        raise DataError(
            f"{folder} has no part to train on.", fix="copy cifar100-train1.zip, … beside the test"
        )
    train = [_packed(path) for path in parts]
    if len({half.class_names for half in train}) > 1:
        raise DataError(f"the training parts in {folder} name the classes differently.")
    return _joined(
        _Half(
            "cifar100-train*.zip",
            np.concatenate([half.images for half in train]),
            np.concatenate([half.labels for half in train]),
            train[0].class_names,
        ),
        _packed(folder / "cifar100-test.zip"),
    )


def _packed(path: Path) -> _Half:
    raw = _content(path)
    try:
        with zipfile.ZipFile(BytesIO(raw)) as part:
            meta = json.loads(_entry(part, "meta.json"))
            per_class, names = meta["per_class"], tuple(map(str, meta["fine_names"]))
            entries = [f"{label:02d}.webp" for label in range(NUM_CLASSES)]
            images = np.concatenate([_strip(part, entry, per_class) for entry in entries])
    except MemoryError:
        raise
    except Exception as error:  # zip, JSON and image decoders fail in a dozen ways
        raise DataError(
            f"{path.name} is damaged or not a part of CIFAR-100.",
            where=str(path.parent),
            why=f"{type(error).__name__}: {error}"[:200],
            fix="copy it again",
        ) from error
    if meta.get("sha256") not in (None, hashlib.sha256(images.data).hexdigest()):
        raise DataError(
            f"{path.name}: the pixels are not those that its meta.json announces.",
            why="their sha256 differs",
            fix="copy it again",
        )
    return _Half(path.name, images, np.repeat(np.arange(NUM_CLASSES), per_class), names)


def _entry(part: zipfile.ZipFile, name: str) -> bytes:
    if part.getinfo(name).file_size > MAX_BYTES:
        raise ValueError(f"{name} would unpack to more than {MAX_BYTES:,} bytes")
    return part.read(name)


def _strip(part: zipfile.ZipFile, entry: str, count: int) -> np.ndarray:
    """The images of one class, which lie one below the other."""
    image = Image.open(BytesIO(_entry(part, entry)), formats=["WEBP"])
    if image.size != (SIDE, SIDE * count):
        raise ValueError(f"{entry} is {image.width}×{image.height}, not {SIDE}×{SIDE * count}")
    return np.asarray(image.convert("RGB")).reshape(count, SIDE, SIDE, 3)


_READERS: dict[str, Callable[[Path], Cifar100]] = {
    "cifar100-*.zip": _read_packed,
    "meta": _read_python,
    "t*.bin": _read_binary,
}
"""How to read a folder, by what marks it."""
