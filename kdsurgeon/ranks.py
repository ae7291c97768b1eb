"""One process among those that torchrun started for a run, and what they tell each other.

The environment is read once, by :meth:`Ranks.from_environment`; from there on the value is passed
in. What is small goes between the processes as objects over gloo, tensors over gloo or NCCL. An
error ends all of them: it is told by one process, and the others end with its exit code.
"""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    rendezvous,  # pyright: ignore[reportPrivateImportUsage]
)

from kdsurgeon.errors import ResourceError, SurgeonError, ToldElsewhere, UsageError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)
"""for a process that is late; one that has ended is noticed at once"""
HEARING = 5.0  # seconds in which the first process tells an error that all have
LEAVING = 3.0  # seconds in which all end, before torchrun would end them by a signal


@dataclass(frozen=True)
class Ranks:
    """This process is ``rank`` (from 0) of ``world``, and ``local_rank`` on its machine.

    ``restarts`` counts how often torchrun started all of them anew.

    >>> ranks = Ranks.alone()
    >>> ranks.world, ranks.is_first, ranks.all("here")
    (1, True, ['here'])
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    restarts: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(f"there is no rank {self.rank} among {self.world} processes.")

    @classmethod
    def alone(cls) -> Ranks:
        """One process."""
        return cls()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """What torchrun says; one process where nothing does.

        Raises:
            UsageError: a part of it is missing or no number.

        >>> Ranks.from_environment({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
        ...                         "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"})
        Ranks(rank=1, world=2, local_rank=1, restarts=0)
        """
        if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= set(environment):
            return cls()
        needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if not environment.get(name)]
        restarts = environment.get("TORCHELASTIC_RESTART_COUNT") or "0"
        try:
            if missing:
                raise ValueError(f"{', '.join(missing)} not set")
            numbers = [int(environment[name]) for name in needed[:3]]
            return cls(*numbers, restarts=int(restarts))
        except ValueError as error:
            raise UsageError(
                "the environment does not say which of several processes this is.",
                why=str(error),
                fix="start them with torchrun --nproc-per-node N -m kdsurgeon distill …",
            ) from error

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def device(self, name: str, pick: Callable[[str], torch.device]) -> torch.device:
        """What ``pick`` makes of ``--device``; a CUDA device of its own for each process.

        Raises:
            UsageError: they would share a device, or it is of a kind that cannot be shared out.
        """
        device = pick(name)
        if self.world == 1 or device.type == "cpu":
            return device
        if device.type != "cuda":
            raise UsageError(
                f"several processes cannot train on {device.type}.", fix="add --device cpu"
            )
        if device.index is not None:
            raise UsageError(
                f"--device {name} names one GPU for {self.world} processes.", fix="--device cuda"
            )
        if self.local_rank >= (count := torch.cuda.device_count()):
            raise UsageError(
                f"process {self.local_rank + 1} of this machine has no GPU of its own: "
                f"there {'is' if count == 1 else 'are'} {count}.",
                fix=f"torchrun --nproc-per-node {count} …, or --device cpu",
            )
        own = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(own)
        return own

    # what they tell each other ───────────────────────────────────────────────────────────────────

    def all(self, value: T) -> list[T]:
        """Everyone's value, by rank. All must ask at the same place of the run."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def first_does(self, action: Callable[[], T]) -> T:
        """What rank 0 gets from ``action``; the others wait until it is done.

        Raises:
            SurgeonError: rank 0 could not; the others raise the same.
        """
        if self.world == 1:
            return action()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = action()
            except SurgeonError as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        return told[0]

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over all ranks into each tensor, in as few messages as there are dtypes."""
        self._flat(tensors, lambda flat: (dist.all_reduce(flat), flat.div_(self.world)))

    @torch.no_grad()
    def as_first(self, tensors: Sequence[Tensor]) -> None:
        """Put what rank 0 has into each tensor."""
        self._flat(tensors, lambda flat: dist.broadcast(flat, src=0))

    def _flat(self, tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
        if self.world == 1:
            return
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            exchange(flat)
            for tensor, part in zip(same, flat.split([x.numel() for x in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def part_of(self, batches: Any) -> Any:
        """This rank's part of every batch: ``batches.shard(rank, world)``.

        Raises:
            UsageError: the batches cannot be shared out.
        """
        if self.world == 1:
            return batches
        if not hasattr(batches, "shard"):
            raise UsageError(
                f"batches of type {type(batches).__name__} cannot be shared by {self.world} "
                "processes.",
                fix="give kdsurgeon.Batches, or a method shard(rank, world)",
            )
        return batches.shard(self.rank, self.world)

    def in_step(self, batches: Iterable[T], idle: Callable[[], object]) -> Iterator[T]:
        """``batches``, in as many steps as any rank has: one that has no more of them is ``idle``
        meanwhile, which must ask the others for what they ask it for."""
        source = iter(batches)
        while True:
            batch = next(source, None)
            if not any(self.all(batch is not None)):
                return
            if batch is None:
                idle()
            else:
                yield batch

    # their beginning and their end ───────────────────────────────────────────────────────────────

    @contextmanager
    def joined(self, device: torch.device, speak: Callable[[], None]) -> Iterator[None]:
        """The processes can talk to each other inside; an error in one of them ends them all.

        Args:
            device: what they compute on: NCCL carries what lies on CUDA, gloo the rest.
            speak: called before an error leaves a process that is not the first and has to tell
                it itself, because only this process met it.

        Raises:
            ToldElsewhere: another process failed, and tells why.
            ResourceError: another process ended without a word.
        """
        if self.world == 1:
            yield
            return
        store, _, _ = next(iter(rendezvous("env://", timeout=PATIENCE)))
        # torchrun's store outlives the processes; what they left there is not for their successors
        store = PrefixStore(f"kdsurgeon {self.restarts}", store)
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("group", store),
                rank=self.rank,
                world_size=self.world,
                timeout=PATIENCE,
            )
            yield
        except Exception as error:
            atexit.register(self._leave, store)
            settled = self._settled(error, store, speak)
            if settled is error:
                raise
            raise settled from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def _settled(self, error: Exception, store: Store, speak: Callable[[], None]) -> Exception:
        """The error that leaves this process: its own, or that another one tells."""
        if is_lost(error):
            code = _heard(store, "failed", HEARING)
            if code is not None or not self.is_first:
                return ToldElsewhere(int(code or ResourceError.exit_code))
            return ResourceError(
                "another process of this run ended without a word.",
                why=str(error).splitlines()[0][:200],
                fix="what torchrun says below names it; --resume goes on from the last checkpoint",
            )
        store.compare_set("failed", "", str(getattr(error, "exit_code", 1)))
        if self.is_first:
            store.set("told", "yes")
        elif _heard(store, "told", HEARING) is None:
            speak()
            if isinstance(error, SurgeonError):
                error.notes["rank"] = str(self.rank)
        return error

    def _leave(self, store: Store) -> None:
        """End only when all have said what they had to and end, too, each with its exit code."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end = time.monotonic() + LEAVING
        try:
            store.add("left", 1)
            while store.add("left", 0) < self.world and time.monotonic() < end:
                time.sleep(0.02)
        except RuntimeError:  # the store itself is gone
            pass


ALONE = Ranks.alone()


def is_lost(error: BaseException) -> bool:
    """Whether it says that another process cannot be reached."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _heard(store: Store, key: str, seconds: float) -> str | None:
    """What another process left in the store, or None if nothing within so many seconds."""
    end = time.monotonic() + seconds
    while True:
        try:
            if store.check([key]):
                return store.get(key).decode()
        except RuntimeError:  # the store itself is gone
            return None
        if time.monotonic() > end:
            return None
        time.sleep(0.05)


def total(values: Iterable[Sequence[float]]) -> list[float]:
    """Numbers of all ranks added place by place, in the order of the ranks.

    >>> total([(1, 2), (3, 4)])
    [4, 6]
    """
    return [sum(column) for column in zip(*values, strict=True)]
