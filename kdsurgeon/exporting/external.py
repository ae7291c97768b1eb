"""Put the weights of a model into a file beside it, as one of more than two gigabytes must.

The file's name holds the hash of its content. So a new export never changes the weights of an older
one under its feet: until the new model takes its name, the old one has its own, and a model never
reads weights that are not its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

MAX_BYTES = 2**31 - 2**20  # of weights: protobuf holds 2 GiB in one file
ALIGNMENT = 4096  # of each tensor, so that a runtime can map it into memory; ONNX advises a page
_SMALLEST = 1024  # bytes; smaller tensors stay, since shapes must be known while a model is read


def put_outside(model: onnx.ModelProto, part: Path) -> Path:
    """Move the large weights of ``model`` into a file beside ``part``; the file's path.

    The name is that of ``part``, 16 digits of the content's sha256, and ``.data``.
    """
    large = [tensor for tensor in model.graph.initializer if _size(tensor) >= _SMALLEST]
    digest = hashlib.sha256()
    for _, padding, raw in _layout(large):
        digest.update(padding)
        digest.update(raw)
    path = part.with_name(f"{part.name}.{digest.hexdigest()[:16]}.data")
    places = []
    with path.open("xb") as file:
        for offset, padding, raw in _layout(large):
            file.write(padding)
            file.write(raw)
            places.append((offset, len(raw)))
    for tensor, (offset, length) in zip(large, places, strict=True):
        kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        kept.data_location = TensorProto.EXTERNAL
        for key, value in (("location", path.name), ("offset", offset), ("length", length)):
            kept.external_data.add(key=key, value=str(value))
        tensor.CopyFrom(kept)
    return path


def _layout(tensors: list[TensorProto]) -> Iterator[tuple[int, bytes, bytes]]:
    """Where each tensor starts, what fills the gap before it, and its bytes."""
    end = 0
    for tensor in tensors:
        padding = -end % ALIGNMENT
        raw = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
        yield end + padding, bytes(padding), raw
        end += padding + len(raw)


def _size(tensor: TensorProto) -> int:
    return tensor.ByteSize()
