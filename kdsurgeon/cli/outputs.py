"""Refuse, before any work, an output that would destroy what it was made from.

Writing is by renaming, so that a wrong name costs the whole file that had it. What a disk says
later (full, read-only) is not asked here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from kdsurgeon.errors import UsageError

MODEL_SUFFIXES = (".pt", ".pth", ".pt2", ".bin", ".ckpt", ".safetensors", ".onnx")


@dataclass(frozen=True)
class Output:
    """What a flag or argument names to be written; ``suffix`` is its own, empty for a folder.

    ``makes_parents`` says that missing folders above it are made.
    """

    flag: str
    path: Path
    suffix: str
    makes_parents: bool = True

    @property
    def is_folder(self) -> bool:
        return not self.suffix


def check_outputs(outputs: Iterable[Output], reads: Iterable[str | Path | None]) -> None:
    """Whether all ``outputs`` can be written beside all that the command ``reads``.

    ``reads`` are model strings, files and folders, as the user gave them. Raises
    :class:`UsageError` for an output that is one of them (also by another spelling or a link), has
    the name of a model file, is of another kind than what is there, or lies in no folder; and for
    two outputs of one name.
    """
    outputs = list(outputs)
    inputs = [Path(text) for given in reads if given for text in _files_in(str(given))]
    for output in outputs:
        _check_input(output, inputs)
        _check_suffix(output)
        _check_place(output)
    for one, other in combinations(outputs, 2):
        if _is_same(one.path, other.path):
            raise UsageError(
                f"{one.flag} and {other.flag} both name {other.path}.",
                fix="give each a name of its own",
            )


def check_onnx(path: Path) -> None:
    """Raises :class:`UsageError` for a file that would not be told to be an ONNX file."""
    if path.suffix != ".onnx":
        raise UsageError(
            f"{path} does not end in .onnx; export writes an ONNX file.",
            fix=f"give the file a name that ends in .onnx, e.g. {path.stem}.onnx",
        )


def check_single(source: str) -> None:
    """Raises :class:`UsageError` for a folder of runs in place of one model."""
    folder = Path(source)
    runs = sorted(file.parent for file in folder.glob("*/config.yaml")) if folder.is_dir() else []
    if runs:
        raise UsageError(
            f"{source} is a folder of runs, not a model.",
            fix=f"name one, e.g. {runs[0]}",
        )


def _files_in(text: str) -> list[str]:
    """The paths that an argument may mean: itself, or what follows the name of a source.

    >>> _files_in("py:nets.py:Net,width=8")
    ['py:nets.py:Net,width=8', 'nets.py:Net', 'nets.py']
    """
    head, _, _ = text.partition(",")
    _, _, inner = head.partition(":")
    return [found for found in (text, inner, inner.rpartition(":")[0]) if found]


def _check_input(output: Output, inputs: Iterable[Path]) -> None:
    for path in inputs:
        if path.exists() and _is_same(path, output.path):
            raise UsageError(
                f"{output.path} is read by this command; {output.flag} would replace it.",
                fix=f"name another {output.flag}",
            )


def _check_suffix(output: Output) -> None:
    suffix = output.path.suffix.lower()
    if suffix in MODEL_SUFFIXES and suffix != output.suffix:
        better = output.path.with_suffix(output.suffix)
        raise UsageError(
            f"{output.path} is the name of a model file; {output.flag} writes something else.",
            fix=f"call it {better}",
        )


def _check_place(output: Output) -> None:
    path, kind = output.path, "folder" if output.is_folder else "file"
    if path.exists() and not (path.is_dir() if output.is_folder else path.is_file()):
        what = "a folder" if path.is_dir() else "a file" if path.is_file() else "not a regular file"
        raise UsageError(
            f"{path} is {what}; {output.flag} writes a {kind}.", fix=f"name another {kind}"
        )
    above = next((parent for parent in path.parents if parent.exists()), Path())
    if not above.is_dir():
        raise UsageError(
            f"{path} cannot be written: {above} is not a folder.", fix="name another folder"
        )
    if above != path.parent and not output.makes_parents:
        raise UsageError(
            f"{path} cannot be written: there is no folder {path.parent}.", fix="make it first"
        )


def _is_same(one: Path, other: Path) -> bool:
    """Whether two names lead to one place, which need not exist."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()
