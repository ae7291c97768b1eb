"""Data sets of torchvision by name, from files that are there: ``torchvision/CIFAR10?root=DIR``."""

from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdsurgeon import DataError

_LABELS = ("targets", "_labels", "labels", "_targets", "y")
_VAL = ("val", "valid", "validation", "test")


class Parts(NamedTuple):
    """Training and validation part, the latter None twice where there is none."""

    train_images: Any
    train_labels: np.ndarray
    test_images: Any
    test_labels: np.ndarray | None
    class_names: tuple[str, ...]


class Opened:
    """The images of a data set of torchvision by number, opened when asked for."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        return self.dataset[row][0]

    def name_of(self, row: int) -> str:
        return f"{self.name}[{row}]"


def read(path: str | Path) -> Parts:
    """``NAME?root=DIR``: a classification data set of torchvision, as it lies in the folder DIR.

    Nothing is downloaded. Where NAME has no part to validate on, a share of each class does.

    Raises:
        DataError: torchvision is not installed, knows no such set, or finds it damaged or absent.
    """
    name, _, query = str(path).partition("?")
    if not query.startswith("root=") or len(query) == len("root="):
        raise DataError(
            f"torchvision/{path} does not say where the files are.",
            fix=f"torchvision/{name}?root=FOLDER",
        )
    root = Path(query.removeprefix("root="))
    if not root.is_dir():
        raise DataError(f"the root {root} of torchvision/{name} is not a folder.")
    kind = _class(name)
    train, test = _both(kind, name, root)
    images, labels = _images(train, f"{name}/train"), _labels(train, name)
    names = _class_names(train, labels)
    if test is None:
        return Parts(images, labels, None, None, names)
    return Parts(images, labels, _images(test, f"{name}/test"), _labels(test, name), names)


def _class(name: str) -> Any:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"torchvision/{name} needs torchvision.",
            why=str(error),
            fix="pip install the torchvision that matches your torch",
        ) from error
    if name not in datasets.__all__ or not isinstance(getattr(datasets, name), type):
        raise DataError(
            f"torchvision has no data set {name}.",
            near=", ".join(get_close_matches(name, datasets.__all__)),
            fix="torchvision.datasets lists them",
        )
    return getattr(datasets, name)


def _both(kind: Any, name: str, root: Path) -> tuple[Any, Any]:
    """The training part and the one to validate on, or None, by how this class calls them."""
    known = signature(kind).parameters
    try:
        if "train" in known:
            return kind(root, train=True), kind(root, train=False)
        if "split" not in known:
            return kind(root), None
        train = kind(root, split="trainval" if known["split"].default == "trainval" else "train")
        for split in _VAL:
            with suppress(ValueError):  # it knows no part of this name
                return train, kind(root, split=split)
        return train, None
    except Exception as error:
        raise DataError(
            f"torchvision/{name} cannot be read in {root}.",
            why=f"{type(error).__name__}: {error}".splitlines()[0],
            fix=f"put its files there: torchvision.datasets.{name}({str(root)!r}, download=True)",
        ) from error


def _images(dataset: Any, name: str) -> Any:
    """The array that the data set keeps, or its images as they are asked for."""
    pixels = getattr(dataset, "data", None)
    if pixels is not None and hasattr(pixels, "shape"):
        pixels = np.asarray(pixels)
        if pixels.dtype == np.uint8 and pixels.ndim == 3:
            return pixels[..., None]
        if pixels.dtype == np.uint8 and pixels.ndim == 4:
            return pixels if pixels.shape[3] in (1, 3) else pixels.transpose(0, 2, 3, 1).copy()
    return Opened(dataset, name)


def _labels(dataset: Any, name: str) -> np.ndarray:
    for attribute in _LABELS:
        found = getattr(dataset, attribute, None)
        if isinstance(found, Sequence) or hasattr(found, "shape"):
            numbers = np.asarray(found)
            if numbers.ndim == 1 and numbers.dtype.kind in "iu" and len(numbers) == len(dataset):
                return numbers.astype(np.int64)
    found = [dataset[row][1] for row in range(len(dataset))]
    if not all(isinstance(label, int) for label in found):
        raise DataError(f"torchvision/{name} has no class for each image; it is no classification.")
    return np.array(found, dtype=np.int64)


def _class_names(dataset: Any, labels: np.ndarray) -> tuple[str, ...]:
    count = int(labels.max()) + 1
    names = getattr(dataset, "classes", None) or ()
    names = tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in names)
    return names if len(names) >= count else tuple(map(str, range(count)))
