"""Small runs in several processes that share out weights, and what came out on each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from kdsurgeon.checkpoints.store import read_tensors
from kdsurgeon.errors import UsageError
from kdsurgeon.losses import block_kd_loss
from kdsurgeon.ranks import Ranks
from kdsurgeon.runs import Run
from kdsurgeon.stones import Plan, partition, synthesize
from kdsurgeon.stones.sharding import Portion
from kdsurgeon.training import here
from tests import ranked

CPU = torch.device("cpu")


def whole(values: dict[str, Any]) -> dict[str, Tensor]:
    """Weights with all of their parts."""
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in values.items()
    }


def all_of(ranks: Ranks, cases: dict[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """Several runs one after another, in one set of processes."""
    found = {name: ranked.trained(ranks, *case) for name, case in cases.items()}
    for each in found.values():
        each["weights"] = whole(each["weights"])
    return found


class Unit(nn.Module):
    """Overwrites what it is given, reads a weight of its own, and a layer that may be another's."""

    def __init__(self, width: int, mix: nn.Module) -> None:
        super().__init__()
        self.act, self.mix = nn.Hardswish(inplace=True), mix
        self.norm = nn.BatchNorm1d(width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        return x + torch.relu_(self.norm(self.mix(x))) * self.scale


class Odd(nn.Module):
    """Three units, the outer two with one layer in common where it is ``tied``."""

    def __init__(self, width: int, *, tied: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        mixes = [nn.Linear(width, width) for _ in range(3)]
        mixes[2] = mixes[0] if tied else mixes[2]
        self.units = nn.Sequential(*(Unit(width, mix) for mix in mixes))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(self.stem(x)))


def odd_plan(*, student_tied: bool = False, seed: int = 0) -> Plan:
    torch.manual_seed(seed)
    teacher = Odd(32, tied=True).double().eval()
    torch.manual_seed(1)
    student = Odd(8, tied=student_tied).double()
    return partition(teacher, student, torch.zeros(2, 6).double(), blocks=3)


def odd_steps(
    ranks: Ranks, share: str, *, merge: bool = True
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights after three steps on the same batch everywhere, and logits of both models."""
    plan = odd_plan()
    stones = synthesize(plan, merge=merge)
    if share != "none":
        stones.share_teacher(ranks, CPU)
    if share == "all":
        stones.share_student(ranks, CPU)
    optimizer = torch.optim.AdamW(stones.parameters(), lr=0.01)
    images = torch.randn(6, 6, generator=torch.Generator().manual_seed(5)).double()
    for depths in (None, stones.depths[:1], stones.depths[1:]):
        losses = block_kd_loss(stones(images, depths), torch.arange(6) % 4)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    stones.eval()
    with torch.inference_mode():
        logits = stones.student_logits(images).clone(), stones.teacher_logits(images).clone()
    return whole({k: v.detach().clone() for k, v in stones.state_dict().items()}), *logits


def odd_runs(ranks: Ranks) -> dict[tuple[str, bool], Any]:
    """By what is shared out and whether tails run as one batch."""
    return {
        (share, merge): odd_steps(ranks, share, merge=merge)
        for share in ("none", "teacher", "all")
        for merge in (True, False)
    }


def tied_student(ranks: Ranks) -> str:
    stones = synthesize(odd_plan(student_tied=True))
    stones.share_teacher(ranks, CPU)
    try:
        stones.share_student(ranks, CPU)
    except UsageError as error:
        return str(error)
    return ""


def other_teachers(ranks: Ranks) -> str:
    try:
        synthesize(odd_plan(seed=ranks.rank)).share_teacher(ranks, CPU)
    except UsageError as error:
        return str(error)
    return ""


# bytes ───────────────────────────────────────────────────────────────────────────────────────────


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages that they lie in, each counted once."""
    storages = {each.untyped_storage()._cdata: each.untyped_storage() for each in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _state(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def measured(ranks: Ranks) -> dict[str, Any]:
    """Bytes of a teacher, its folded twins with it, and of what is trained: whole, and shared out
    between two steps and at worst within one; and whether the weights come back."""
    plan = odd_plan()
    teacher = plan.teacher.trace.model
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    stones = synthesize(plan)

    def tensors() -> list[Tensor]:
        found = list(_state(teacher))
        for twin in stones.teacher.by_target.values():
            found += [twin] if isinstance(twin, Tensor) else _state(twin)
        return found

    found: dict[str, Any] = {"whole": _bytes(tensors())}
    shared = stones.share_teacher(ranks, CPU)
    own = [*shared.portions, shared.rest]

    def resident() -> int:
        return _bytes([*tensors(), *(portion.own for portion in own)])

    found["own"], peaks = resident(), [0]
    found["portions"] = [len(each.own) * ranks.world for each in shared.portions]
    gather = Portion.gather

    def watched(portion: Portion, ranks: Ranks) -> None:
        gather(portion, ranks)
        peaks.append(resident())

    found["trained"] = _bytes(stones.parameters())
    stones.share_student(ranks, CPU)
    optimizer = torch.optim.SGD(stones.parameters(), lr=0.01, momentum=0.9)
    with patch.object(Portion, "gather", watched):
        stones(torch.ones(4, 6).double()).stones.square().sum().backward()
    found["peak"], found["gathered"], found["after"] = max(peaks), len(peaks) - 1, resident()
    weights = list(stones.parameters())
    found["own trained"] = _bytes(map(here, weights))
    found["gradients"] = sum(here(each.grad).nbytes for each in weights if each.grad is not None)
    optimizer.step()
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    found["momenta"] = sum(here(each).nbytes for each in momenta)
    with shared.whole():
        found["same"] = all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    return found


# a run folder ────────────────────────────────────────────────────────────────────────────────────


def histories(ranks: Ranks, base: Path, numbers: dict[str, Any]) -> tuple[Any, ...]:
    """A run shared out, the same not, one that is shared out until its second update only, and one
    from there on only: how many updates each part took, and the last states."""
    shared = {**numbers, "shard": "all"}
    counts = [ranked.go(ranks, base / "all", shared), ranked.go(ranks, base / "none", numbers)]
    for name, first, then in (("out", shared, numbers), ("in", numbers, shared)):
        counts.append(ranked.go(ranks, base / name, first, 2))
        counts.append(ranked.go(ranks, base / name, then, None, ("shard",)))
    ranks.all(None)
    return counts, {name: last_state(base / name) for name in ("all", "none", "out", "in")}


def last_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of a run's last checkpoint, by file and name, and of its student's file."""
    checkpoint, complaints = Run(folder, None).latest_checkpoint()
    assert checkpoint is not None and not complaints
    found = {
        f"{file}/{name}": value
        for file, tensors in checkpoint.tensors.items()
        for name, value in tensors.items()
    }
    return found | read_tensors(folder / "student" / "last.safetensors")
