"""The one door through which an ONNX file comes in: read once, checked, tried out, then opened.

Weights in other files are taken only from files that lie beside the model, under a bare name, and
under no other name. What was read is what runs: ONNX Runtime is given bytes and opens no file.

read_onnx(path)     the file after every check that needs no runtime
session(path)       ONNX Runtime on it, after a trial in a process of its own
vouch(path)         no trial for what this process has written itself
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from onnx import ModelProto

from kdsurgeon.checkpoints.kinds import REFUSED, kind_of
from kdsurgeon.checkpoints.pickles import printable
from kdsurgeon.errors import ModelFileError, ResourceError
from kdsurgeon.exporting import runtime
from kdsurgeon.exporting.beside import opened, read, weights_outside
from kdsurgeon.exporting.soundness import check_model
from kdsurgeon.exporting.trial import cannot_run, try_out
from kdsurgeon.exporting.wire import Malformed, check_wire

MAX_FILE = 2**31 - 1  # bytes of one protobuf message
MAX_INPUT = 1 << 26  # numbers in one sample


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file after every check, and the weights that lie beside it; all is in memory."""

    path: Path
    content: bytes
    model: ModelProto  # what ``content`` says; outside weights are described, not held
    outside: Mapping[str, np.ndarray]  # by the name of the tensor
    sha256: str  # of all of it

    @property
    def size(self) -> int:
        """Bytes on disk that are used: the model and the weights beside it."""
        return len(self.content) + sum(value.nbytes for value in self.outside.values())

    @property
    def metadata(self) -> dict[str, str]:
        """What the model says of itself."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    @property
    def input_size(self) -> tuple[int, int, int] | None:
        """Channels, height and width, where kdsurgeon recorded them; else None.

        Raises :class:`ModelFileError` when what is recorded is no size.
        """
        recorded = self.metadata.get("input_size")
        if recorded is None:
            return None
        found = re.fullmatch(r"\[(\d{1,6}), ?(\d{1,6}), ?(\d{1,6})\]", recorded, re.ASCII)
        sizes = [int(size) for size in found.groups()] if found else []
        if not sizes or not 0 < math.prod(sizes) <= MAX_INPUT:
            raise ModelFileError(
                f"{self.path.name} records an input size that is none: {printable(recorded)[:40]}."
            )
        channels, height, width = sizes
        return channels, height, width

    def whole(self) -> ModelProto:
        """A copy of the model that holds all weights itself.

        Raises :class:`ResourceError` when that is more than one model may hold.
        """
        if self.size > MAX_FILE:
            raise ResourceError(
                f"{self.path.name} with its weights is too large for one piece.",
                why=f"it has {self.size:,} bytes, and one message of protobuf holds {MAX_FILE:,}",
                fix="leave out --int8 and OpenVINO, which take it as one; --half halves it",
            )
        model = ModelProto()
        model.CopyFrom(self.model)
        for tensor in model.graph.initializer:
            if tensor.name in self.outside:
                tensor.raw_data = self.outside[tensor.name].tobytes()
                tensor.ClearField("data_location")
                del tensor.external_data[:]
        return model


def read_onnx(path: str | os.PathLike[str]) -> OnnxFile:
    """Read an ONNX file and the weights beside it; every reading of an .onnx file starts here.

    Raises :class:`ModelFileError` when it is damaged, made to harm, no ONNX model, or takes weights
    from anywhere but a file of its own folder, and :class:`ResourceError` when a file may not be
    read or does not fit into memory.
    """
    path = Path(path)
    with opened(path, path.name) as file:
        content = read(file, path.name, MAX_FILE)
    model = _parsed(content, path.name)
    check_model(model, path.name)
    outside = weights_outside(model, path)
    digest = hashlib.sha256(content)
    for value in outside.values():
        digest.update(value.reshape(-1).view(np.uint8).data)
    return OnnxFile(path, content, model, outside, digest.hexdigest())


def session(
    path: str | os.PathLike[str], *, threads: int = 0, sample: Sequence[int] | None = None
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU; ``threads`` 0 means as many as torch uses.

    A file that this process did not write is first opened, and run on one sample, in a process of
    its own with limits on memory and time; ``sample`` is the shape of one, without the batch axis,
    where the model leaves it free. Raises as :func:`read_onnx` does, and :class:`ModelFileError`
    when ONNX Runtime cannot run the model within these limits.
    """
    file = read_onnx(path)
    if file.sha256 not in _known:
        try_out(file.path.name, file.content, file.outside, sample)
        _known.add(file.sha256)
    try:
        return runtime.open_session(file.content, file.outside, threads or torch.get_num_threads())
    except Exception as error:  # the runtime's own kinds
        raise cannot_run(file.path.name, str(error)) from error


def vouch(path: str | os.PathLike[str]) -> OnnxFile:
    """Read a file that this process has written itself; opening it then needs no trial."""
    file = read_onnx(path)
    _known.add(file.sha256)
    return file


_known: set[str] = set()  # hashes of files that were written here, or went through a trial


def _parsed(content: bytes, name: str) -> ModelProto:
    if not content:
        raise ModelFileError(f"{name} is not an ONNX file.", why="it is empty", fix="copy it again")
    try:
        check_wire(content, ModelProto.DESCRIPTOR)
        return onnx.load_model_from_string(content)
    except (Malformed, DecodeError) as error:
        kind = kind_of(content, name)
        why = str(error) if kind in ("ONNX", "other") else f"it {_described(kind)}"
        raise ModelFileError(
            f"{name} is not an ONNX file.", why=why, fix="copy it again"
        ) from error


def _described(kind: str) -> str:
    return REFUSED[kind][0].rstrip(".") if kind in REFUSED else f"looks like {kind}"
