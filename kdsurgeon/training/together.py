"""Several processes take one update: each with its part of every batch, to the same weights.

DistributedDataParallel averages, while the backward pass still runs, the gradients of what every
step uses. What only some steps use (the adapters, where stones are drawn) is averaged afterwards,
so that nothing has to search the graph for it; so is everything where memory may run out on one
process and not on the others. The teacher is no part of the module, so nothing of it is sent.

Batch normalisation counts each process's part; its running statistics are averaged after every
update (timm does that after an epoch), so that all ranks hold the same.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdsurgeon.errors import DataError, UsageError
from kdsurgeon.losses import Losses
from kdsurgeon.ranks import Ranks, total
from kdsurgeon.training.updating import Batch, Before

Booked = tuple[Losses, int]
_KNOWN = inspect.signature(DistributedDataParallel).parameters
_OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers": False
}
"""The second became the first in torch 2.13."""


@dataclass
class Together:
    """What makes one update of those of all ranks; ``module`` is what the objective has to run.

    ``asked`` is whether any rank was asked to stop, as of the last update.
    """

    ranks: Ranks
    module: nn.Module
    by_hand: list[tuple[str, nn.Parameter]]
    in_buckets: list[tuple[str, nn.Parameter]]
    statistics: list[str]
    asked: bool = False
    _shares: dict[int, float] = field(default_factory=dict)

    def begin(self, group: Sequence[Batch], counted: Callable[[Tensor], int]) -> None:
        """Learn from the others which share of each batch of ``group`` is here.

        Raises:
            DataError: the ranks have not as many batches.
        """
        own = [counted(target) for _, target, _ in group]
        everyone = self.ranks.all(own)
        if len({len(counts) for counts in everyone}) > 1:
            raise DataError(
                "the processes do not see the same number of batches.",
                given=", ".join(f"rank {r}: {len(c)}" for r, c in enumerate(everyone)),
                fix="give every process a data set of the same length",
            )
        whole = total(everyone)
        self._shares = {
            moment.step: here / max(all_, 1)
            for (_, _, moment), here, all_ in zip(group, own, whole, strict=True)
        }
        self._last = group[-1][2].step if group else None

    def factor(self, step: int) -> float:
        """What the mean loss of this rank's part of a batch counts: the ranks' gradients are
        averaged, and parts may differ in length."""
        return self._shares[step] * self.ranks.world

    @contextmanager
    def passing(self, step: int, is_last_part: bool) -> Iterator[None]:
        """Around forward and backward; only the last of an update sends gradients."""
        module = self.module
        if not isinstance(module, DistributedDataParallel) or (is_last_part and step == self._last):
            yield
            return
        with module.no_sync():
            yield

    def losses(self, found: Sequence[Booked], stop: bool) -> list[Booked]:
        """Those of the whole batches from those of the parts; also whether anybody wants to stop.

        Everyone computes the same numbers in the same order, so all decide alike on them.
        """
        own = [self._shared(losses, share) for (losses, _), share in zip(
            found, self._shares.values(), strict=True)]  # fmt: skip
        sizes = [count for _, count in found]
        here = [parameter.grad is not None for _, parameter in self.by_hand]
        everyone = self.ranks.all((own, sizes, here, stop))
        self.asked = self.asked or any(stop for *_, stop in everyone)
        self._used = [any(column) for column in zip(*(here for _, _, here, _ in everyone),
                                                    strict=True)]  # fmt: skip
        counts = total([sizes for _, sizes, _, _ in everyone])
        return [
            (_added([parts[index] for parts, *_ in everyone]), int(count))
            for index, count in enumerate(counts)
        ]

    def average(self, model: nn.Module) -> None:
        """Make gradients and statistics the mean over all ranks.

        Raises:
            UsageError: a weight that DDP waits for had no part in this step.
        """
        for name, parameter in self.in_buckets:
            if parameter.grad is None:
                raise UsageError(
                    f"{name} had a part in the first step and has none in this one.",
                    why="a model that leaves out layers at random cannot be trained by several "
                    "processes",
                    fix="train it with one process, or turn that off in the model",
                )
        gradients = []
        for (_, parameter), used in zip(self.by_hand, self._used, strict=True):
            if used and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if used and parameter.grad is not None:
                gradients.append(parameter.grad)
        buffers = dict(model.named_buffers())
        self.ranks.average([*gradients, *(buffers[name] for name in self.statistics)])

    @staticmethod
    def _shared(losses: Losses, share: float) -> dict[str, float]:
        values = {"total": losses.total, **losses.parts}
        numbers = torch.stack([value.detach().double() for value in values.values()]).tolist()
        return {name: share * number for name, number in zip(values, numbers, strict=True)}


def share(
    model: nn.Module,
    ranks: Ranks,
    loss: Callable[[nn.Module], Tensor],
    *,
    runs: nn.Module | None = None,
    apart: Collection[nn.Parameter] = (),
    buckets: bool = True,
    is_sharded: bool = False,
) -> Together:
    """Let all ranks train ``model`` from the weights that rank 0 has.

    Args:
        loss: runs what it is given on this rank's part of a batch, to a scalar; asked three times,
            of which nothing stays.
        runs: what to run where it is another than ``model``: a program made of it.
        apart: weights that not every step uses.
        buckets: average during the backward pass; not where one rank may have to do it again.
        is_sharded: FSDP2 has shared out the weights already, and averages their gradients.
    """
    runs = model if runs is None else runs
    if not is_sharded:
        ranks.as_first([value for value in model.state_dict().values() if value.numel()])
    before = Before(model)
    before.remember()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    loss(runs).backward()
    moved = [
        name
        for name, value in model.named_buffers()
        if value.is_floating_point() and not torch.equal(value, buffers[name])
    ]
    statistics = sorted({name for names in ranks.all(moved) for name in names})
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and not is_sharded]
    used = ranks.all([parameter.grad is not None for _, parameter in trained])
    always = [all(column) and buckets for column in zip(*used, strict=True)]
    ids = {id(parameter) for parameter in apart}
    sent = [pair for pair, each in zip(trained, always, strict=True) if each]
    sent = [pair for pair in sent if id(pair[1]) not in ids]
    kept = {id(parameter) for _, parameter in sent}
    by_hand = [pair for pair in trained if id(pair[1]) not in kept]
    model.zero_grad()
    before.restore()
    if sent:
        runs = _wrapped(runs, [parameter for _, parameter in by_hand])
        with warnings.catch_warnings():  # torch says it once, of 1×1 kernels, which lie alike
            warnings.filterwarnings("ignore", "Grad strides do not match", UserWarning)
            for _ in range(2):  # DDP orders its buckets after the first: sums keep their order
                loss(runs).backward()
                model.zero_grad()
                before.restore()
    return Together(ranks, runs, by_hand, sent, statistics)


def _wrapped(runs: nn.Module, without: Sequence[nn.Parameter]) -> nn.Module:
    """It averages what requires a gradient when it is made."""
    for parameter in without:
        parameter.requires_grad_(False)
    try:
        return DistributedDataParallel(runs, **_OWN_BUFFERS)
    finally:
        for parameter in without:
            parameter.requires_grad_(True)


def _added(parts: Sequence[dict[str, float]]) -> Losses:
    """In the order of the ranks; one whose samples are all left out has a total only."""
    names = dict.fromkeys(name for each in parts for name in each)
    sums = {name: sum(each.get(name, 0.0) for each in parts) for name in names}
    found = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
    return Losses(found.pop("total"), found)
