"""Share out a frozen teacher among processes: each holds an equal part of the bytes.

The teacher is divided at its cut points into portions. A portion's weights, folded ones included,
lie in one piece of memory, which is empty between its uses: before the portion runs, forward or
backward, all processes send each other their parts; afterwards the memory is given back. Ours, in
the way of ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054): torch's FSDP2 shards parameters of
modules that are called, and what the training graph reads are constants and layers.

What the backward pass keeps of a weight is a view of that memory, filled again when it is read.
Under autocast it is a rounded copy instead, which stays from the forward to the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from kdsurgeon.errors import UsageError
from kdsurgeon.partitioning import find_cut_points
from kdsurgeon.ranks import Ranks
from kdsurgeon.tracing import Trace, memory_of

PORTIONS = 16  # a portion holds at most this part of the teacher, or what lies between two cuts
_ALIGNED = 64  # bytes, as torch allocates on a CPU
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""The second became the first in torch 2.13."""


@dataclass
class Portion:
    """Weights that are gathered together: here ``own``, an equal part of their bytes.

    ``storage`` is what the tensors lie in; it holds no byte unless the portion is gathered.
    """

    own: Tensor
    storage: torch.UntypedStorage
    users: int = 0

    @torch.no_grad()
    def gather(self, ranks: Ranks) -> None:
        """Have all weights here, until as often freed as gathered; all ranks at the same place."""
        self.users += 1
        if self.users > 1 or not len(self.own):
            return
        self.storage.resize_(len(self.own) * ranks.world)
        _all_gather(_bytes_of(self.storage), self.own)

    def free(self) -> None:
        self.users = max(0, self.users - 1)
        if not self.users:
            self.storage.resize_(0)


@dataclass
class SharedTeacher:
    """The portions of a teacher, and which of them a node of its graph reads.

    ``rest`` holds what no graph reads: weights whose folded twins are read instead.
    """

    ranks: Ranks
    portions: list[Portion]
    rest: Portion
    place: dict[str, int]
    needs: dict[str, tuple[int, ...]]
    trace: Trace = field(repr=False)

    def __str__(self) -> str:
        here, largest = self.resident_bytes, max(len(each.own) for each in self.portions)
        return (
            f"{here / 1e6:.3g} MB on each of {self.ranks.world} processes, and "
            f"{largest * self.ranks.world / 1e6:.3g} MB more at most while one of its "
            f"{len(self.portions)} portions runs"
        )

    @property
    def resident_bytes(self) -> int:
        """What the teacher takes here at this moment."""
        each = [*self.portions, self.rest]
        return sum(len(portion.own) + portion.storage.nbytes() for portion in each)

    def free_all(self) -> None:
        """Also what an update that was broken off has left."""
        for portion in self.portions:
            portion.users = 0
            portion.free()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All of the teacher is here, for as long as the context lasts; on all ranks at once."""
        each = [*self.portions, self.rest]
        for portion in each:
            portion.gather(self.ranks)
        try:
            yield
        finally:
            for portion in each:
                portion.free()

    def program(self, program: fx.GraphModule, prefix: str) -> nn.Module:
        """What runs a program of the teacher's nodes, whose names begin with ``prefix``."""
        inner = [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]
        names = [name for node in inner if (name := _name(node, prefix))]
        needed = sorted({index for name in names for index in self.needs.get(name, ())})
        portions = [self.portions[index] for index in needed]
        return _Shared(program, portions, self.ranks, self._overwritten(program, names, prefix))

    def _overwritten(
        self, program: fx.GraphModule, names: Iterable[str], prefix: str
    ) -> frozenset[int]:
        """The positions of the inputs that the program overwrites."""
        nodes = self.trace.nodes
        writes = (target for name in names for target in nodes[name].meta.get("writes", ()))
        written = {memory_of(target) for target in writes}
        inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
        return frozenset(
            index
            for index, node in enumerate(inputs)
            if (name := _name(node, prefix)) in nodes and memory_of(nodes[name]) in written
        )


class _Shared(nn.Module):
    """A program and the portions that it reads, there while it runs, forward and backward."""

    def __init__(
        self,
        program: fx.GraphModule,
        portions: Sequence[Portion],
        ranks: Ranks,
        overwritten: frozenset[int],
    ) -> None:
        super().__init__()
        self.program, self.overwritten = program, overwritten
        self.portions, self.ranks = portions, ranks

    def gather(self) -> None:
        for portion in self.portions:
            portion.gather(self.ranks)

    def free(self) -> None:
        for portion in self.portions:
            portion.free()

    def forward(self, *values: Any) -> tuple[Any, ...]:
        given = list(values)
        places = [index for index, value in enumerate(values) if _needs_gradient(value)]
        if places:
            entered = _Enter.apply(self, *(values[index] for index in places))
            for index, value in zip(places, entered, strict=True):  # pyright: ignore[reportArgumentType]
                # torch refuses to overwrite what such a function returns
                given[index] = value.clone() if index in self.overwritten else value
        self.gather()
        try:
            found = list(self.program.forward(*given))
        finally:
            self.free()
        places = [index for index, value in enumerate(found) if _needs_gradient(value)]
        if places:
            left = _Leave.apply(self, *(found[index] for index in places))
            for index, value in zip(places, left, strict=True):  # pyright: ignore[reportArgumentType]
                found[index] = value
        return tuple(found)


def _needs_gradient(value: Any) -> bool:
    return torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad


class _Enter(torch.autograd.Function):
    """Tensors as they are; on the way back the weights may go, once their gradient is here."""

    @staticmethod
    def forward(ctx: Any, shared: _Shared, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.shared = shared
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.shared.free()
        return (None, *gradients)


class _Leave(torch.autograd.Function):
    """Tensors as they are; on the way back the weights come before their gradient goes on."""

    @staticmethod
    def forward(ctx: Any, shared: _Shared, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.shared = shared
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.shared.gather()
        return (None, *gradients)


# what each process holds ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Region:
    """Bytes of one storage that tensors lie in, which may overlap."""

    source: torch.UntypedStorage
    start: int
    end: int
    tensors: tuple[Tensor, ...]


def share_out(
    trace: Trace,
    graph: fx.Graph,
    state: dict[str, Any],
    ranks: Ranks,
    device: torch.device,
) -> SharedTeacher:
    """Leave an equal part of the teacher's bytes on ``device``; its tensors stay the same objects.

    Args:
        trace: of the teacher.
        graph: its own graph as it is run, with what it calls and fetches in ``state``.

    Raises:
        UsageError: a tensor is of a kind that has no plain bytes.
    """
    tensors = list(dict.fromkeys((*_tensors(state.values()), *_tensors([trace.model]))))
    regions = _regions(tensors)
    region_of = {id(tensor): region for region in regions for tensor in region.tensors}

    def read_by(node: fx.Node) -> list[_Region]:
        fetched = [other for other in node.all_input_nodes if other.op == "get_attr"]
        called = [node] if node.op == "call_module" else []
        found = _tensors(state[str(each.target)] for each in (*called, *fetched))
        return [region_of[id(tensor)] for tensor in found if id(tensor) in region_of]

    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    place = _places(trace, nodes, read_by)
    held: dict[_Region, int] = {}
    needs: dict[str, tuple[int, ...]] = {}
    for node in nodes:
        name = node.meta["qualname"]
        indices = [held.setdefault(region, place[name]) for region in read_by(node)]
        needs[name] = tuple(sorted({*needs.get(name, ()), *indices}))
    inner: list[list[_Region]] = [[] for _ in range(1 + max(place.values(), default=0))]
    rest: list[_Region] = []
    for region in regions:
        (inner[held[region]] if region in held else rest).append(region)
    portions = [_portion(each, ranks, device) for each in inner]
    return SharedTeacher(ranks, portions, _portion(rest, ranks, device), place, needs, trace)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, nn.Module):
            yield from value.parameters()
            yield from value.buffers()
        elif isinstance(value, Tensor):
            yield value


def _places(trace: Trace, nodes: Sequence[fx.Node], read_by: Any) -> dict[str, int]:
    """In which portion each node runs: pieces between cut points, as many as fit into one."""
    ends = {point.main.name for point in find_cut_points(trace) if point.width == 1}
    pieces: list[list[str]] = [[]]
    sizes = [0]
    seen: set[_Region] = set()
    for node in nodes:
        fresh = set(read_by(node)) - seen
        seen |= fresh
        sizes[-1] += sum(region.end - region.start for region in fresh)
        pieces[-1].append(node.meta["qualname"])
        if node.meta["qualname"] in ends:
            pieces.append([])
            sizes.append(0)
    most, index, held = sum(sizes) / PORTIONS, 0, 0
    place = {}
    for names, size in zip(pieces, sizes, strict=True):
        if held and held + size > most:
            index, held = index + 1, 0
        held += size
        place |= dict.fromkeys(names, index)
    return place


def _regions(tensors: Sequence[Tensor]) -> list[_Region]:
    """Tensors that overlap in memory stay together; a file may have put all into one storage."""
    spans: list[tuple[int, int, int, Tensor]] = []
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise UsageError(
                f"a teacher with weights of type {type(tensor).__name__} cannot be shared out.",
                fix="--shard none",
            )
        if tensor.numel():
            first = int(tensor.storage_offset())
            last = first + sum(
                (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
            )
            size = tensor.element_size()
            key = tensor.untyped_storage()._cdata
            spans.append((key, first * size, (last + 1) * size, tensor))
    spans.sort(key=lambda span: span[:3])
    groups: list[list[tuple[int, int, int, Tensor]]] = []
    end = -1
    for span in spans:
        if groups and groups[-1][0][0] == span[0] and span[1] < end:
            groups[-1].append(span)
            end = max(end, span[2])
        else:
            groups.append([span])
            end = span[2]
    order = {id(tensor): index for index, tensor in enumerate(tensors)}
    groups.sort(key=lambda group: min(order[id(span[3])] for span in group))  # on all ranks alike
    return [
        _Region(
            group[0][3].untyped_storage(),
            group[0][1],
            max(span[2] for span in group),
            tuple(span[3] for span in group),
        )
        for group in groups
    ]


@torch.no_grad()
def _portion(regions: Sequence[_Region], ranks: Ranks, device: torch.device) -> Portion:
    """Move the regions into one storage, keep this rank's part of it, and empty it."""
    sizes = [-(-(region.end - region.start) // _ALIGNED) * _ALIGNED for region in regions]
    # room in front, so that a region lies as its numbers need it, wherever it began before
    starts = [at + region.start % _ALIGNED for at, region in zip(
        accumulate([0, *(size + _ALIGNED for size in sizes)]), regions, strict=False)]  # fmt: skip
    total = sum(size + _ALIGNED for size in sizes)
    share = -(-total // ranks.world)
    storage = torch.zeros(share * ranks.world, dtype=torch.uint8, device=device).untyped_storage()
    whole = _bytes_of(storage)
    for region, start in zip(regions, starts, strict=True):
        length = region.end - region.start
        whole[start : start + length] = _bytes_of(region.source)[region.start : region.end]
        for tensor in region.tensors:
            size = tensor.element_size()
            offset = (start + tensor.storage_offset() * size - region.start) // size
            moved = torch.empty(0, dtype=tensor.dtype, device=device)
            tensor.data = moved.set_(storage, offset, tensor.shape, tensor.stride())  # pyright: ignore
    own = whole[ranks.rank * share : (ranks.rank + 1) * share].clone()
    storage.resize_(0)
    return Portion(own, storage)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore


def _name(node: fx.Node, prefix: str) -> str | None:
    """The teacher's own name of a node."""
    found = node.meta.get("qualname")
    return found[len(prefix) :] if found is not None and found.startswith(prefix) else None
