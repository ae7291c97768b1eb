"""Our own model files: safetensors with a card that describes the model and a seal over every byte.

safetensors has no checksum: one flipped bit in the weights loads silently. So two metadata entries
go with the tensors: ``kdsurgeon`` (JSON: the card, and which names share one tensor) and
``kdsurgeon.sha256``, the hash of the whole file with these 64 digits taken as zeros. The file is
laid out here, not by the library, whose metadata comes in random order: equal models must give
equal bytes. Any safetensors reader opens it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor, nn

from kdsurgeon.checkpoints.disk import read_once, write_whole
from kdsurgeon.errors import ModelFileError, UsageError

CARD_KEY = "kdsurgeon"
SEAL_KEY = "kdsurgeon.sha256"
BLANK = "0" * 64
MAX_TENSORS = 100_000
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
MAX_HEADER = 16 << 20  # bytes; 100,000 tensors need about 10 MB

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
}


@dataclass(frozen=True)
class ModelCard:
    """What a model file says of its model beside the weights; every field may be absent.

    ``input_size`` is (channels, height, width); ``mean`` and ``std`` hold one number per channel on
    the 0..1 scale; ``crop_pct`` and ``interpolation`` say how images are resized to be judged, in
    timm's words; ``provenance`` holds free strings, such as the hash of the teacher.

    >>> ModelCard(arch="demo/teacher", num_classes=10).num_classes
    10
    """

    arch: str | None = None
    input_size: tuple[int, ...] | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for problem in _card_problems(self):
            raise UsageError(f"a model card cannot say {problem}.")


def card_from(entries: Mapping[str, Any]) -> ModelCard:
    """The card that plain data (JSON, a checkpoint dict) describes; lists become tuples.

    Entries of other names are left alone. Raises :class:`UsageError` naming a malformed entry.
    """
    names = {item.name for item in fields(ModelCard)}
    known: dict[str, Any] = {
        name: value for name, value in entries.items() if name in names and value is not None
    }
    tuples: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in known.items()
    }
    return ModelCard(**tuples)


def _card_problems(card: ModelCard) -> Iterator[str]:
    if not (
        card.arch is None or (isinstance(card.arch, str) and card.arch and card.arch.isprintable())
    ):
        yield f"arch = {card.arch!r} (expected a model string)"
    if card.input_size is not None and not (
        _all(card.input_size, lambda size: _is_count(size)) and len(card.input_size) == 3
    ):
        yield f"input_size = {card.input_size!r} (expected channels, height, width)"
    if not (card.num_classes is None or _is_count(card.num_classes)):
        yield f"num_classes = {card.num_classes!r} (expected a count)"
    if not (card.class_names is None or _all(card.class_names, _is_name)):
        yield "class_names that are not plain text"
    if card.class_names is not None and len(card.class_names) != (
        card.num_classes or len(card.class_names)
    ):
        yield f"{card.num_classes} classes and {len(card.class_names)} class names"
    for name, numbers in (("mean", card.mean), ("std", card.std)):
        if not (numbers is None or _all(numbers, _is_finite)):
            yield f"{name} = {numbers!r} (expected finite numbers)"
    if card.std is not None and min(card.std, default=1) <= 0:
        yield f"std = {card.std!r} (expected positive numbers)"
    if card.crop_pct is not None and not (_is_finite(card.crop_pct) and 0 < card.crop_pct <= 1):
        yield f"crop_pct = {card.crop_pct!r} (expected a number above 0, at most 1)"
    if card.interpolation not in (None, *INTERPOLATIONS):
        yield f"interpolation = {card.interpolation!r} (expected {', '.join(INTERPOLATIONS)})"
    texts = (*card.provenance.keys(), *card.provenance.values())
    if not all(isinstance(text, str) for text in texts):
        yield "provenance that is not strings"


def _all(values: object, holds: Any) -> bool:
    return isinstance(values, tuple) and all(holds(value) for value in values)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def save_model(model: nn.Module, path: str | Path, card: ModelCard) -> str:
    """Write a model as one self-describing safetensors file; returns the file's sha256.

    The same weights and card give the same bytes. Tied weights are stored once. ``model`` is left
    as it is. Raises :class:`UsageError` for a state that is not dense tensors and
    :class:`ResourceError` when the folder cannot take the file.
    """
    return save_state(model.state_dict(), path, card)


def model_hash(model: nn.Module) -> str:
    """sha256 over the modules as they are printed, and every parameter and buffer by name."""
    digest = hashlib.sha256(repr(model).encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(_bytes_of(value.detach().cpu().contiguous()))
    return digest.hexdigest()


def save_state(state: Mapping[str, Any], path: str | Path, card: ModelCard) -> str:
    """:func:`save_model` for a state dict."""
    tensors, tied = _untie(state)
    described = {**asdict(card), "provenance": dict(card.provenance), "tied": tied}
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    return write_tensors(tensors, path, {CARD_KEY: text})


def _untie(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The distinct tensors of a state, and the names that repeat one of them."""
    distinct: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f'the state of the model holds "{name}", which is {type(value).__name__}, not a '
                "tensor.",
                fix="remove get_extra_state from that module, or save it on its own",
            )
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        distinct[name] = value
    return distinct, tied


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors as one sealed safetensors file, whole or not at all; returns its sha256.

    Raises :class:`UsageError` for a tensor that safetensors has no word for (sparse, quantized) and
    :class:`ResourceError` when the folder cannot take the file.
    """
    dense = {name: _dense(name, tensor) for name, tensor in tensors.items()}
    order = sorted(dense, key=lambda name: (-dense[name].dtype.itemsize, name))
    bodies = [_bytes_of(dense[name]) for name in order]
    blank = _header(dense, order, {**(metadata or {}), SEAL_KEY: BLANK})
    seal = _sha256([blank, *bodies])
    header = blank.replace(_seal_entry(BLANK), _seal_entry(seal))
    write_whole(Path(path), [header, *bodies])
    return _sha256([header, *bodies])


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file that :func:`write_tensors` wrote, after its seal was verified.

    Raises :class:`ModelFileError` when one bit differs from what was written.
    """
    return read_sealed(path)[0]


def read_sealed(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same with the metadata."""
    tensors, metadata = parse(read_once(Path(path)), str(path))
    if SEAL_KEY not in metadata:
        raise ModelFileError(f"{path} carries no seal; it was not written by kdsurgeon.")
    return tensors, metadata


def parse(raw: bytes, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file in memory, its seal verified where it has one."""
    length = int.from_bytes(raw[:8], "little")
    if length > MAX_HEADER:
        raise ModelFileError(f"{name} announces a header of {length:,} bytes; refused.")
    if raw.count(b'"data_offsets"', 8, 8 + length) > MAX_TENSORS:
        raise ModelFileError(f"{name} announces more than {MAX_TENSORS:,} tensors; refused.")
    _verify_seal(raw, raw[8 : 8 + length], name)
    try:
        tensors = parse_safetensors(raw)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise ModelFileError(
            f"{name} is damaged: its safetensors header does not fit its content.",
            why=str(error).splitlines()[0][:200],
            fix="copy or download it again",
        ) from error
    metadata = json.loads(raw[8 : 8 + length]).get("__metadata__") or {}
    if CARD_KEY in metadata and SEAL_KEY not in metadata:
        raise _broken_seal(name)
    return tensors, metadata


def unpack_card(
    tensors: dict[str, Tensor], metadata: Mapping[str, str], name: str
) -> tuple[dict[str, Tensor], ModelCard]:
    """The tensors under all their names (tied ones too), and the card; empty for foreign files."""
    if CARD_KEY not in metadata:
        return tensors, ModelCard()
    try:
        described = json.loads(metadata[CARD_KEY])
        tied = {again: tensors[first] for again, first in described.pop("tied", {}).items()}
        return {**tensors, **tied}, card_from(described)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, UsageError) as error:
        raise ModelFileError(
            f"{name} is damaged: its card cannot be read.", why=str(error)
        ) from error


def _verify_seal(raw: bytes, header: bytes, name: str) -> None:
    if f'"{SEAL_KEY}"'.encode() not in header:
        return
    before, found, after = header.partition(_seal_entry("")[:-1])
    seal = after[:64]
    if not found or len(seal) != 64:
        raise _broken_seal(name)
    start = 8 + len(before) + len(found)
    view = memoryview(raw)
    if _sha256([view[:start], BLANK.encode(), view[start + 64 :]]).encode() != seal:
        raise _broken_seal(name)


def _broken_seal(name: str) -> ModelFileError:
    return ModelFileError(
        f"{name} is damaged: its content is not what kdsurgeon wrote (sha256 differs).",
        fix="copy it again from where it was made",
    )


def _seal_entry(seal: str) -> bytes:
    return f'"{SEAL_KEY}":"{seal}"'.encode()


def _header(tensors: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.dtype.itemsize
        shape = list(tensor.shape)
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _dense(name: str, tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or tensor.dtype not in DTYPES or tensor.is_meta:
        kind = f"{tensor.layout}, {tensor.dtype}, {tensor.device}".replace("torch.", "")
        raise UsageError(f'the tensor "{name}" ({kind}) cannot be stored in safetensors.')
    if name == "__metadata__":
        raise UsageError('a tensor cannot be called "__metadata__" in safetensors.')
    return tensor.detach().cpu().contiguous()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _sha256(chunks: list[Any]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
