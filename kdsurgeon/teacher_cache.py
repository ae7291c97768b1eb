"""Ask the teacher once: its logits for every view of every sample, kept for all epochs and runs.

A view is one augmentation of a sample. With ``views`` of them the augmentation repeats after so
many epochs, and every logit that training will ever need is known beforehand: the teacher's own
pass is not run again. Ours; the idea of stored, replayable crops is that of Shen and Xing 2022, "A
Fast Knowledge Distillation Framework" (arXiv 2112.01528).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kdsurgeon.checkpoints import model_hash, read_sealed, write_tensors
from kdsurgeon.data import Batches
from kdsurgeon.errors import DataError, UsageError
from kdsurgeon.stones import TEACHER_LOGITS
from kdsurgeon.tracing import in_mode, logits_of

FORMAT = 1
_KEY = "kdsurgeon.teacher_cache"


class TaughtBatches:
    """Batches whose inputs hold the teacher's logits beside the images.

    ``({"input": (B, C, H, W), "teacher_logits": (B, classes)}, labels)``, in the order and with the
    images of ``batches``; ``table`` is (views, samples, classes), ``teacher`` the hash of the model
    that was asked.
    """

    def __init__(self, batches: Batches, table: Tensor, teacher: str) -> None:
        self.batches, self.table, self.teacher = batches, table, teacher

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def start_at(self, batch: int) -> None:
        self.batches.start_at(batch)

    def least_part(self, world: int = 1) -> int:
        return self.batches.least_part(world)

    def roomier(self, world: int = 1) -> int:
        return self.batches.roomier(world)

    def rows(self, batch: int) -> np.ndarray:
        return self.batches.rows(batch)

    def sample_ids(self, batch: int) -> list[str]:
        return self.batches.sample_ids(batch)

    def shard(self, rank: int, world: int) -> TaughtBatches:
        return TaughtBatches(self.batches.shard(rank, world), self.table, self.teacher)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        known = self.table[self.batches.view]
        for rows, images, target in self.batches.with_rows():
            yield {"input": images, TEACHER_LOGITS: known[torch.from_numpy(rows)]}, target


def cache_teacher(
    teacher: nn.Module, batches: Batches, *, path: str | Path | None = None
) -> TaughtBatches:
    """The same batches with the teacher's logits, from ``path`` or computed now and kept there.

    Args:
        teacher: in evaluation mode while it is asked.
        batches: whose ``views`` say how many augmentations of each sample there are.
        path: a file, written whole or not at all; None keeps the logits in memory only.

    Raises:
        UsageError: the batches augment without end: they have no ``views``.
        DataError: the file holds the logits of another teacher, data or augmentation.

    >>> from kdsurgeon.data import load
    >>> batches = Batches(load("digits").train, 64, shuffle=True, seed=0, augment="shift", views=2)
    >>> teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    >>> inputs, labels = next(iter(cache_teacher(teacher, batches)))
    >>> inputs["input"].shape, inputs["teacher_logits"].shape
    (torch.Size([64, 1, 8, 8]), torch.Size([64, 10]))
    """
    if batches.views is None:
        raise UsageError(
            "the teacher cannot be asked beforehand: every epoch has images of its own.",
            why=f"the augmentation is {batches.augment}, without a number of views",
            fix="say how many views of each image there are (--teacher-views 10), or "
            "--augment none",
        )
    asked = model_hash(teacher)
    key = _key(asked, batches)
    file = None if path is None else Path(path)
    if file is not None and file.exists():
        return TaughtBatches(batches, _read(file, key, batches), asked)
    table = _ask(teacher, batches)
    if file is not None:
        write_tensors({"logits": table}, file, {_KEY: json.dumps(key, sort_keys=True)})
    return TaughtBatches(batches, table, asked)


def _ask(teacher: nn.Module, batches: Batches) -> Tensor:
    """(views, samples, classes), each view in one pass."""
    assert batches.views is not None
    device = next((weight.device for weight in teacher.parameters()), torch.device("cpu"))
    ordered = copy.copy(batches)
    ordered.shuffle, ordered.drop_last = False, False
    found = []
    with in_mode(teacher, training=False), torch.inference_mode():
        for view in range(batches.views):
            ordered.set_epoch(view)
            found.append(torch.cat([logits_of(teacher, x.to(device)).cpu() for x, _ in ordered]))
    return torch.stack(found).clone()


def _key(teacher: str, batches: Batches) -> dict[str, str | int]:
    """What the logits depend on, in the words of the refusal."""
    data = batches.dataset
    pixels = hashlib.sha256(repr((data.images.shape, data.mean, data.std, data.scale)).encode())
    for first in range(0, len(data), 4096):
        pixels.update(np.ascontiguousarray(data.images[first : first + 4096]).data)
    augmented = batches.augment != "none"
    return {
        "format": FORMAT,
        "teacher": teacher,
        "data": pixels.hexdigest(),
        "augmentation": batches.augment,
        "seed": batches.seed if augmented else 0,
        "views": batches.views or 0,
    }


def _read(path: Path, key: dict[str, str | int], batches: Batches) -> Tensor:
    tensors, metadata = read_sealed(path)
    try:
        found = json.loads(metadata.get(_KEY, "null"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or "logits" not in tensors:
        raise DataError(
            f"{path} holds no logits of a teacher.", fix="name another file for the cache"
        )
    other = [name for name, value in key.items() if found.get(name) != value]
    if other or tensors["logits"].shape[:2] != (batches.views, len(batches.dataset)):
        raise DataError(
            f"{path} holds the logits of another run.",
            why=f"not the same: {', '.join(other) or 'shape'}",
            fix="name another file for the cache, or delete this one",
        )
    return tensors["logits"]
