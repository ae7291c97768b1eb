"""Data sets of Hugging Face's ``datasets`` on disk, read from their Arrow files by pyarrow alone.

Images stay in the memory-mapped files and are decoded when they are asked for.
"""

# pyright: reportMissingImports=false
# pyarrow need not be installed.

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdsurgeon import DataError

_TRAIN, _TEST = ("train", "training"), ("validation", "valid", "val", "test")
_LABELS = ("label", "labels", "fine_label", "class")
_IMAGES = ("image", "img", "images")


class Saved(NamedTuple):
    """Training and validation part, the latter None twice where there is none."""

    train_images: "Column"
    train_labels: np.ndarray
    test_images: "Column | None"
    test_labels: np.ndarray | None
    class_names: tuple[str, ...]


class Column:
    """The images of one part by number, as bytes."""

    def __init__(self, paths: tuple[Path, ...], name: str, part: str) -> None:
        self.paths, self.name, self.part = paths, name, part
        self._open()

    def _open(self) -> None:
        tables = [_table(path) for path in self.paths]
        self.columns = [table.column(self.name) for table in tables]
        self.ends = np.cumsum([len(column) for column in self.columns])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> bytes:
        number = int(np.searchsorted(self.ends, row, side="right"))
        first = int(self.ends[number - 1]) if number else 0
        found = self.columns[number][row - first].as_py()
        if isinstance(found, dict):
            found = found.get("bytes")  # a path would lead out of the folder
        if not isinstance(found, bytes) or not found:
            raise DataError(f"{self.name_of(row)} holds no image, at most the path of one.")
        return found

    def name_of(self, row: int) -> str:
        return f"{self.part}[{row}]"

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "name": self.name, "part": self.part}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.paths, self.name, self.part = state["paths"], state["name"], state["part"]
        self._open()


def read(path: str | Path) -> Saved:
    """What ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote into the folder ``path``.

    The image column is the one of type Image (else called ``image``, ``img``), the labels are the
    column of type ClassLabel (else whole numbers called ``label``). Parts are ``train`` and
    ``validation`` (else ``test``); of one part alone a share of each class validates.

    Raises:
        DataError: pyarrow is not installed; the folder or a column is missing, or a file damaged.
    """
    folder = Path(path)
    parts = _parts(folder)
    train, train_labels, names = _part(*parts[0])
    if len(parts) == 1:
        return Saved(train, train_labels, None, None, names)
    test, test_labels, others = _part(*parts[1])
    if names != others:
        raise DataError(f"{folder}: {parts[0][0]} and {parts[1][0]} name the classes differently.")
    return Saved(train, train_labels, test, test_labels, names)


def _parts(folder: Path) -> list[tuple[str, Path]]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.", fix="give what save_to_disk wrote")
    if not (folder / "dataset_dict.json").is_file():
        return [(folder.name, folder)]
    splits = _json(folder / "dataset_dict.json").get("splits", [])
    found = [next((name for name in names if name in splits), None) for names in (_TRAIN, _TEST)]
    if found[0] is None:
        raise DataError(
            f"{folder} has no part called train.", where=", ".join(map(str, splits)) or "no part"
        )
    return [(name, folder / name) for name in found if name]


def _part(name: str, folder: Path) -> tuple[Column, np.ndarray, tuple[str, ...]]:
    files = _json(folder / "state.json").get("_data_files") or []
    paths = tuple(folder / str(file.get("filename")) for file in files if isinstance(file, dict))
    if not paths:
        raise DataError(f"{folder / 'state.json'} names no data file.", fix="save it again")
    features = _json(folder / "dataset_info.json").get("features") or {}
    tables = [_table(path) for path in paths]
    columns = set(tables[0].column_names)
    image = _column(folder, features, columns, "Image", _IMAGES)
    label = _column(folder, features, columns, "ClassLabel", _LABELS)
    labels = np.concatenate([table.column(label).to_numpy() for table in tables])
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"{folder}: the labels in {label} are {labels.dtype}, not whole numbers.",
            fix="store them as ClassLabel: dataset.class_encode_column",
        )
    if not len(labels):
        raise DataError(f"{folder} holds no sample.")
    names = features.get(label, {}).get("names") or range(int(labels.max()) + 1)
    if labels.min() < 0:
        count = int((labels < 0).sum())
        raise DataError(f"{folder}: {count:,} samples have no label ({label} is -1).")
    return Column(paths, image, name), labels.astype(np.int64), tuple(map(str, names))


def _column(
    folder: Path, features: dict[str, Any], columns: set[str], kind: str, usual: tuple[str, ...]
) -> str:
    """The column of that type, or of one of these names."""
    typed = [
        name
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == kind and name in columns
    ]
    found = [name for name in usual if name in (typed or columns)] or typed
    if len(found) >= 1:
        return found[0]
    raise DataError(
        f"{folder} has no column of type {kind}.",
        where=f"its columns: {', '.join(sorted(columns))}",
        fix=f"name one {usual[0]}: dataset.rename_column",
    )


def _table(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise DataError(
            "data sets of Hugging Face are read with pyarrow.",
            why=str(error),
            fix="pip install pyarrow",
        ) from error
    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path.name} is missing, cut off, or no Arrow file.",
            where=str(path.parent),
            why=str(error).splitlines()[0],
            fix="copy it again",
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is missing or damaged.",
            why=f"{type(error).__name__}: {error}",
            fix="give the folder that save_to_disk wrote",
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no table of names.", fix="save the data set again")
    return found
