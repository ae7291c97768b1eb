"""Say what a file is by its content, never by its suffix, and refuse what is no model."""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Iterable
from pathlib import Path

from kdsurgeon.errors import ModelFileError

LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

_SAVE = (
    "load it yourself where you trust it, torch.save(model.state_dict(), …), "
    "and name the architecture: --teacher-arch SPEC"
)
_AGAIN = "copy or download it again"

# kind -> what it is, why it was not opened, what to do
REFUSED: dict[str, tuple[str, str | None, str]] = {
    "TorchScript": (
        "is a TorchScript archive; it was not opened.",
        "loading it can run code, and what it holds can be neither cut nor trained",
        _SAVE,
    ),
    "pt2": (
        "is a torch.export archive (.pt2); it was not opened.",
        "loading it can run code, and what it holds can be neither cut nor trained",
        _SAVE,
    ),
    "pickle": (
        "is a bare pickle, not a torch.save file; it was not loaded.",
        "loading a pickle runs code chosen by whoever made it",
        "torch.save the state_dict where you trust the file",
    ),
    "joblib": (
        "is a joblib file (a pickle); it was not loaded.",
        "loading it runs code chosen by whoever made it",
        "torch.save the state_dict where you trust the file",
    ),
    "tar": (
        "is a tar archive, the format of torch before 0.4, or a bundle; it was not opened.",
        None,
        "unpack the bundle, or save the state_dict anew with a current torch",
    ),
    "ONNX": (
        "is an ONNX model; it holds no PyTorch module to cut and train.",
        None,
        "give the PyTorch weights it was exported from",
    ),
    "npz": ("is an .npz archive of arrays, not a model.", None, "data sets go to --data-dir"),
    "npy": ("is a .npy array, not a model.", None, "data sets go to --data-dir"),
    "HDF5": (
        "is an HDF5 file (Keras?), not a PyTorch model.",
        None,
        "export the weights to safetensors",
    ),
    "Keras": (
        "is a Keras archive, not a PyTorch model.",
        None,
        "export the weights to safetensors",
    ),
    "GGUF": ("is a GGUF file, not a PyTorch model.", None, "export the weights to safetensors"),
    "TFLite": ("is a TensorFlow Lite model, not a PyTorch one.", None, "give the PyTorch weights"),
    "compressed": ("is a compressed file; it was not opened.", None, "unpack it first"),
    "zip": (
        "is a zip archive, but no model lies in it.",
        None,
        "unpack it and give the model file",
    ),
    "web page": (
        "is a web page, not a model file.",
        "a download link often leads to a login or a preview",
        "download the file itself",
    ),
    "text": ("is text, not a model file.", None, "code goes as py:FILE.py:factory"),
    "other": (
        "is no model file that kdsurgeon reads (safetensors, or .pt with a state dict).",
        "it is cut off at the start, or of another program",
        _AGAIN,
    ),
}

_MAGIC = (
    (b"PK\3\4", "zip"),
    (b"PK\5\6", "zip"),
    (LEGACY_START, "legacy"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"\x93NUMPY", "npy"),
    (b"GGUF", "GGUF"),
    (b"\x1f\x8b", "compressed"),
    (b"BZh", "compressed"),
    (b"\xfd7zXZ", "compressed"),
    (b"\x28\xb5\x2f\xfd", "compressed"),
    (b"7z\xbc\xaf", "compressed"),
)


def kind_of(raw: bytes, name: str) -> str:
    """What the bytes are: ``safetensors``, ``zip``, ``legacy``, or a key of :data:`REFUSED`.

    Raises :class:`ModelFileError` for an empty file and for a Git LFS pointer.
    """
    if not raw:
        raise ModelFileError(f"{name} is empty.", fix=_AGAIN)
    if raw.startswith(b"version https://git-lfs"):
        raise ModelFileError(
            f'{name} is {len(raw)} bytes of text, "version https://git-lfs…": '
            "this is a Git LFS pointer.",
            fix="fetch the file itself: git lfs pull",
        )
    for magic, kind in _MAGIC:
        if raw.startswith(magic):
            return kind
    if raw[257:262] == b"ustar":
        return "tar"
    if raw[4:8] == b"TFL3":
        return "TFLite"
    if raw[8:9] == b"{" and (raw[8:10] == b'{"' or raw[5:8] == b"\0\0\0"):
        return "safetensors"
    return _kind_of_rest(raw)


def _kind_of_rest(raw: bytes) -> str:
    head = raw[:4096]
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "web page"
    if _is_pickle(raw):
        return "joblib" if b"joblib.numpy_pickle" in raw[: 1 << 20] else "pickle"
    if raw[0] == 8 and len(raw) > 4 and raw[1] < 32 and raw[2] in b"\x12\x1a\x22\x28\x3a\x42":
        return "ONNX"
    if raw[0] == 0x78 and raw[1:2] in (b"\x01", b"\x5e", b"\x9c", b"\xda"):
        return "joblib"
    return "text" if all(byte >= 32 or byte in b"\t\r\n" for byte in head) else "other"


def _is_pickle(raw: bytes) -> bool:
    """Whether the bytes start as a pickle, or read as one of the oldest kind that names code."""
    named = False
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(raw))):
            if opcode.name in ("GLOBAL", "INST"):
                named = named or re.fullmatch(r"[\w.]+ [\w.]+", str(argument)) is not None
            if step > 1000:
                break
    except Exception:  # pickletools raises whatever the bytes make it raise; it runs nothing
        pass
    return named or raw[0] == 0x80


def kind_of_zip(names: Iterable[str]) -> str:
    """What a zip is by the names of its records: ``checkpoint`` or a key of :data:`REFUSED`."""
    names = list(names)
    inner = [name.partition("/")[2] or name for name in names]
    if any(n.startswith("code/") or n in ("constants.pkl", "model.json") for n in inner):
        return "TorchScript"
    marks = ("archive_format", "archive_version", "serialized_exported_program.json")
    if any(n in marks or n.startswith("models/") for n in inner):
        return "pt2"
    if any(n.rpartition("/")[2] == "data.pkl" for n in names):
        return "checkpoint"
    if names and all(n.endswith(".npy") for n in names):
        return "npz"
    if "model.weights.h5" in names:
        return "Keras"
    return "zip"


def refuse(kind: str, name: str) -> ModelFileError:
    """The refusal of one kind of file, with the reason and the way out."""
    what, why, fix = REFUSED[kind]
    return ModelFileError(f"{name} {what}", why=why, fix=fix)


def refuse_folder(path: Path) -> ModelFileError:
    """The refusal of a folder, by what lies in it."""
    entries = sorted(entry.name for entry in path.iterdir())
    models = [entry for entry in entries if entry.endswith((".safetensors", ".pt", ".pth", ".bin"))]
    if ".metadata" in entries:
        return ModelFileError(
            f"{path} is a distributed checkpoint (DCP); it was not opened.",
            why="its .metadata is a pickle, and loading it runs code chosen by whoever made it",
            fix="torch.distributed.checkpoint.format_utils.dcp_to_torch_save, where you trust it",
        )
    if "config.json" in entries and any(entry.endswith(".py") for entry in entries):
        return ModelFileError(
            f"{path} is a model folder that brings its own code; it was not opened.",
            why="loading it would run that code",
            fix="give the weights file, and py:file.py:factory for the architecture",
        )
    fix = f"give one file: {path / models[0]}" if models else "give a model file"
    return ModelFileError(f"{path} is a folder, not a model file.", fix=fix)
