"""Models in and out: the one place where files become tensors and model strings become modules.

Loading a model file elsewhere (``torch.load`` and its like) is forbidden by a test. What a file is
is decided by its content; what would run code is refused unopened.
"""

from kdsurgeon.checkpoints.arrays import read_arrays
from kdsurgeon.checkpoints.conversion import Conversion, convert
from kdsurgeon.checkpoints.disk import write_whole
from kdsurgeon.checkpoints.models import Loaded, is_file, load_model
from kdsurgeon.checkpoints.reader import ModelFile, read_model, verify_file
from kdsurgeon.checkpoints.specs import build, code_in
from kdsurgeon.checkpoints.store import (
    INTERPOLATIONS,
    ModelCard,
    model_hash,
    read_sealed,
    read_tensors,
    save_model,
    write_tensors,
)

__all__ = [
    "INTERPOLATIONS",
    "Conversion",
    "Loaded",
    "ModelCard",
    "ModelFile",
    "build",
    "code_in",
    "convert",
    "is_file",
    "load_model",
    "model_hash",
    "read_arrays",
    "read_model",
    "read_sealed",
    "read_tensors",
    "save_model",
    "verify_file",
    "write_tensors",
    "write_whole",
]
