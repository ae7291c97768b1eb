"""The one door through which a model file comes in: hashed, judged by content, gated, checked."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdsurgeon.checkpoints.archive import STORED, Record, check_crc, read_records
from kdsurgeon.checkpoints.disk import read_once
from kdsurgeon.checkpoints.kinds import kind_of, kind_of_zip, refuse, refuse_folder
from kdsurgeon.checkpoints.pickles import (
    ALLOWED,
    MAX_PICKLE,
    MAX_STEPS,
    Storage,
    interpret,
    list_globals,
    printable,
    storages_in,
)
from kdsurgeon.checkpoints.specs import importable_from
from kdsurgeon.checkpoints.store import (
    MAX_TENSORS,
    SEAL_KEY,
    ModelCard,
    card_from,
    parse,
    unpack_card,
)
from kdsurgeon.errors import ModelFileError, ResourceError, UsageError

MAX_DEPTH = 16
MAX_AXES = 64
MAX_MANIFEST = 1 << 20
MAX_OVERLAP = 8  # the tensors of a file may together hold this many times its size
STATE_KEYS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
)
PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class ModelFile:
    """A model file after every check: its tensors by name, and what it says of itself.

    ``key`` is the entry of a checkpoint dict that the tensors were taken from, or None; ``module``
    is set only for a pickled module whose file was trusted by hash.
    """

    path: Path
    format: str
    sha256: str
    tensors: dict[str, Tensor]
    card: ModelCard
    module: nn.Module | None = None
    key: str | None = None


def read_model(
    path: str | Path, *, trust: Sequence[str] = (), allow_nonfinite: bool = False
) -> ModelFile:
    """Read one model file; nothing in it is run unless ``trust`` names its very hash.

    ``trust`` holds entries ``sha256:HEX`` with at least 12 digits (those that name code, ``py:…``,
    are not for files of weights). The file is opened once; what is hashed is what is checked and
    loaded. Raises :class:`ModelFileError` for a file that is
    unsafe, damaged or no model, :class:`ResourceError` when it cannot be read, and
    :class:`UsageError` for a ``trust`` entry that is no hash.
    """
    hashes = [_trusted_hash(entry) for entry in trust if not entry.startswith("py:")]
    path = Path(path)
    if path.is_dir():
        raise refuse_folder(path)
    raw = read_once(path)
    sha256 = hashlib.sha256(raw).hexdigest()
    check_manifest(path, sha256)
    is_trusted = any(sha256.startswith(digits) for digits in hashes)
    found = _content(raw, path, sha256, is_trusted)
    check_tensors(found.tensors, str(path), len(raw), allow_nonfinite=allow_nonfinite)
    return found


def manifest_of(path: Path) -> Path:
    """Where the manifest of a model file lies, if it has one: beside it."""
    return path.with_name(path.name + ".manifest.json")


def check_manifest(path: Path, sha256: str) -> None:
    """Raise :class:`ModelFileError` when a manifest beside the file names another hash."""
    manifest = manifest_of(path)
    if not manifest.is_file():
        return
    try:
        expected = json.loads(read_once(manifest)[:MAX_MANIFEST])["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(
            f"{manifest} is no manifest of kdsurgeon.", fix="remove it, or copy it again"
        ) from error
    if expected != sha256:
        raise ModelFileError(
            f"{path} is not the file that its manifest describes.",
            fix=f"copy it again; expected sha256 from {manifest.name}: "
            f"{printable(str(expected))[:12]}…, found: {sha256[:12]}…",
        )


def verify_file(path: Path) -> str:
    """What a model file agrees with: the manifest beside it, or the seal inside of it.

    Raises:
        ModelFileError: it does not agree, or has neither.
    """
    raw = read_once(path)
    if manifest_of(path).is_file():
        check_manifest(path, hashlib.sha256(raw).hexdigest())
        return manifest_of(path).name
    if kind_of(raw, str(path)) == "safetensors" and SEAL_KEY in parse(raw, str(path))[1]:
        return "its own seal"
    raise ModelFileError(
        f"{path} has no manifest beside it and no seal of kdsurgeon.",
        fix="name a run, a checkpoint, or a file that kdsurgeon wrote; `kdsurgeon convert` gives "
        "the tensors of another one a manifest",
    )


def _trusted_hash(entry: str) -> str:
    digits = entry.removeprefix("sha256:").lower()
    if not re.fullmatch(r"[0-9a-f]{12,64}", digits):
        raise UsageError(
            f"--trust-code {entry} does not name a file.",
            why="trust is given to one file by its hash, never by a bare yes",
            fix="--trust-code sha256:<at least 12 hex digits>, as the refusal prints them",
        )
    return digits


def _content(raw: bytes, path: Path, sha256: str, is_trusted: bool) -> ModelFile:
    name = str(path)
    kind = kind_of(raw, name)
    if kind == "safetensors":
        tensors, card = unpack_card(*parse(raw, name), name)
        return ModelFile(path, kind, sha256, tensors, card)
    if kind == "zip":
        records = read_records(raw, name)
        kind = kind_of_zip(record.name for record in records)
        if kind == "checkpoint":
            pickle = open_checkpoint(records, raw, name)
            steps = max_steps(records)
            found = list_globals(io.BytesIO(pickle), max_steps=steps)
            unknown = [entry for entry in found if entry not in ALLOWED]
            if unknown and not is_trusted:
                raise _refuse_objects(name, unknown, sha256)
            if not unknown:
                gated = interpret(io.BytesIO(pickle), name, max_steps=steps)
                check_storages(gated, records, name)
                if next(storages_in(gated), None) is None:
                    raise _no_state(gated, name)
            return _from_objects(_load(raw, name, safely=not unknown), path, sha256)
    if kind == "legacy":
        if not is_trusted:
            raise _refuse_legacy(name, sha256)
        return _from_objects(_load(raw, name, safely=False), path, sha256)
    raise refuse(kind, name)


def open_checkpoint(records: tuple[Record, ...], raw: bytes, name: str) -> bytes:
    """The pickle of a torch.save archive whose records are stored plainly, whole and undamaged."""
    for record in records:
        if record.method != STORED:
            raise ModelFileError(
                f'{name}: record "{record.name}" would unpack from {_amount(record.packed)} to '
                f"{_amount(record.size)}; refused.",
                why="torch.save packs nothing; this archive was packed by another program",
                fix="save it anew with torch.save",
            )
        check_crc(record, raw, name)
    pickles = [record for record in records if record.name.rpartition("/")[2] == "data.pkl"]
    roots = {record.name.partition("/")[0] for record in records}
    if len(pickles) != 1 or len(roots) != 1 or pickles[0].name.count("/") != 1:
        raise ModelFileError(
            f"{name} is not laid out as torch.save does: {len(pickles)} data.pkl, "
            f"{len(roots)} top folders.",
            fix="save it anew with torch.save",
        )
    if pickles[0].size > MAX_PICKLE:
        raise ModelFileError(f"{name}: its pickle has {_amount(pickles[0].size)}; refused.")
    orders = [bytes(r.body(raw)) for r in records if r.name.endswith("/byteorder")]
    if orders not in ([], [b"little"]):
        raise ModelFileError(f"{name} was written on a big-endian machine; it cannot be read here.")
    return bytes(pickles[0].body(raw))


def max_steps(records: tuple[Record, ...]) -> int:
    """How many opcodes a pickle may have beside so many records: a tensor takes about 40."""
    return min(MAX_STEPS, 400_000 + 100 * len(records))


def check_storages(content: Any, records: tuple[Record, ...], name: str) -> None:
    """Raise :class:`ModelFileError` unless every storage fits the record that holds it."""
    sizes = {record.name.partition("/")[2]: record.size for record in records}
    kinds: dict[str, Storage] = {}
    for storage in storages_in(content):
        size = sizes.get(f"data/{storage.key}")
        needed = storage.count * storage.dtype.itemsize
        if size is None or needed > size or kinds.setdefault(storage.key, storage) != storage:
            raise ModelFileError(
                f"{name} is damaged: a tensor needs {needed:,} bytes of record "
                f'"data/{storage.key}", which has {size or 0:,}.',
                fix="copy or download it again",
            )


def _load(raw: bytes, name: str, *, safely: bool) -> Any:
    """What torch makes of the bytes; ``safely`` after the gate, else after trust by hash."""
    release = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if release < (2, 10):
        raise ModelFileError(
            f"torch {torch.__version__} cannot read .pt files safely (CVE-2026-24747); "
            "need 2.10 or newer.",
            fix="update torch, or convert the file to .safetensors elsewhere",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with nullcontext() if safely else importable_from(Path.cwd()):
                return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=safely)
        except ModuleNotFoundError as error:
            raise ModelFileError(
                f'{name} needs the module "{error.name}", which is not found.',
                fix="run from the folder that holds it, or install it",
            ) from error
        except MemoryError as error:
            raise ResourceError(f"{name} does not fit into memory.") from error
        except Exception as error:  # torch fails in about ten ways on damaged files
            raise ModelFileError(
                f"{name} could not be loaded by torch {torch.__version__}.",
                why=f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:200],
                fix="copy it again, or save it anew with a current torch",
            ) from error


def _from_objects(content: Any, path: Path, sha256: str) -> ModelFile:
    """Tensors and card out of what torch.load returned."""
    name = str(path)
    state, key = _find_state(content)
    if isinstance(state, nn.Module):
        card = foreign_card(content) if key else ModelCard()
        tensors = {k: v.detach() for k, v in state.state_dict().items() if isinstance(v, Tensor)}
        return ModelFile(path, "pickled module, trusted", sha256, tensors, card, state, key)
    if state is None:
        raise _no_state(content, name)
    strangers = [k for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if strangers or _depth(content) > MAX_DEPTH:
        raise ModelFileError(
            f"{name} holds more than tensors among its weights: "
            f"{', '.join(map(repr, strangers[:3])) or 'nested deeper than allowed'}.",
            fix='save model.state_dict() on its own or under "state_dict"',
        )
    card = foreign_card(content) if key else ModelCard()
    tensors = {label: tensor.detach() for label, tensor in strip_prefixes(state).items()}
    return ModelFile(path, "state dict", sha256, tensors, card, key=key)


def _no_state(content: Any, name: str) -> ModelFileError:
    return ModelFileError(
        f"{name} holds {_describe(content)}, not a state dict.",
        fix='save model.state_dict(), bare or under "state_dict"',
    )


def _find_state(content: Any) -> tuple[Any, str | None]:
    """The state dict (or trusted module) of a checkpoint, and the key it lies under."""
    if isinstance(content, nn.Module):
        return content, None
    if not isinstance(content, Mapping):
        return None, None
    for key in STATE_KEYS:
        value = content.get(key)
        if isinstance(value, nn.Module) or _has_tensors(value):
            return value, key
    return (content, None) if _has_tensors(content) else (None, None)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def strip_prefixes(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state without ``module.`` and ``_orig_mod.``, where every name carries them."""
    state = dict(state)
    while state:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def foreign_card(content: Mapping[str, Any]) -> ModelCard:
    """The card of a checkpoint dict; entries that mean something else are passed over."""
    card = ModelCard()
    for name in (item.name for item in fields(ModelCard) if item.name != "provenance"):
        value = content.get(name)
        value = value.tolist() if isinstance(value, Tensor) and value.numel() <= 16 else value
        try:
            card = card_from({**vars(card), name: value})
        except UsageError:
            continue
    return card


def _depth(value: Any) -> int:
    """How deep containers lie in each other; at most one more than allowed."""
    level, depth, seen = [value], 0, set()
    while level and depth <= MAX_DEPTH:
        inner = [v for v in level if isinstance(v, Mapping | list | tuple) and id(v) not in seen]
        seen.update(map(id, inner))
        level = [p for v in inner for p in (v.values() if isinstance(v, Mapping) else v)]
        depth += 1
    return depth


def check_tensors(
    tensors: Mapping[str, Tensor], name: str, file_size: int, *, allow_nonfinite: bool
) -> None:
    """Raise :class:`ModelFileError` unless all are dense CPU tensors within reason, and finite."""
    if not tensors:
        raise ModelFileError(f"{name} holds no tensors.", fix="save model.state_dict()")
    if len(tensors) > MAX_TENSORS:
        raise ModelFileError(f"{name} holds {len(tensors):,} tensors; {MAX_TENSORS:,} are allowed.")
    for key, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            kind = f"{tensor.layout}, {tensor.device}".replace("torch.", "")
            raise ModelFileError(f'{name}: "{key}" is not a plain tensor ({kind}).')
        if not key.isprintable():
            raise ModelFileError(f"{name}: the name {key[:80]!r} of a tensor is not plain text.")
        if tensor.dim() > MAX_AXES:
            raise ModelFileError(f'{name}: "{key}" has {tensor.dim():,} axes; refused.')
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ModelFileError(f'{name}: "{key}" is larger than its storage.')
    total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if total > MAX_OVERLAP * file_size:
        raise ModelFileError(
            f"{name} would unpack from {_amount(file_size)} to {_amount(total)}; refused.",
            why="its tensors lie over one another",
        )
    if not allow_nonfinite:
        _check_finite(tensors, name)


def _check_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    bad = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
    if bad:
        more = f" (+{len(bad) - 3} more)" if len(bad) > 3 else ""
        raise ModelFileError(
            f"{name} holds NaN or infinite weights: {', '.join(bad[:3])}{more}.",
            why="a model with such weights answers with NaN",
            fix="use an earlier checkpoint",
        )


def _is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; without a copy of large tensors."""
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    plain = plain.detach() if plain.itemsize > 1 else plain.detach().float()
    return all(math.isfinite(bound.item()) for bound in torch.aminmax(plain))


def _refuse_objects(name: str, unknown: list[str], sha256: str) -> ModelFileError:
    more = f" (+{len(unknown) - 4} more)" if len(unknown) > 4 else ""
    target = str(Path(name).with_suffix(".safetensors"))
    return ModelFileError(
        f"{name} holds Python objects, not only tensors; it was not loaded.",
        needs=", ".join(unknown[:4]) + more,
        why="loading such a file runs code chosen by whoever made it.",
        fix="take only its tensors, running nothing, and name the architecture:\n"
        f"  kdsurgeon convert {name} {target} --drop-extra\n"
        f"  kdsurgeon partition {target} … --teacher-arch timm/resnet50\n"
        "or, if you made this file yourself:\n"
        f"  --trust-code sha256:{sha256[:12]}",
    )


def _refuse_legacy(name: str, sha256: str) -> ModelFileError:
    target = str(Path(name).with_suffix(".safetensors"))
    return ModelFileError(
        f"{name} is in the format of torch before 1.6, a bare pickle; it was not loaded.",
        why="loading such a file can run code chosen by whoever made it.",
        fix="take only its tensors, running nothing:\n"
        f"  kdsurgeon convert {name} {target}\n"
        "or, if you made this file yourself:\n"
        f"  --trust-code sha256:{sha256[:12]}",
    )


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        keys = ", ".join(repr(key)[:40] for key in list(content)[:4])
        return f"a dict without weights ({keys or 'empty'})"
    return f"a {type(content).__name__}"


def _amount(size: int) -> str:
    """A number of bytes as people say it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:,.1f} {unit}" if unit != "bytes" else f"{size} bytes"
        size = size / 1000  # type: ignore[assignment]
    raise AssertionError(size)
