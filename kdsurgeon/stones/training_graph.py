"""Synthesize the one graph that training sees.

It runs the student once, the teacher once without gradient, and the tails of all stones together:
entering a teacher block, the running tensors of every shallower stone are concatenated along the
batch. That is exact because the frozen teacher treats samples one by one. Ours, where the paper's
text was not available: the teacher's BatchNorm stays in evaluation mode, its dropout off.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from kdsurgeon import adapters
from kdsurgeon.checkpoints import model_hash
from kdsurgeon.errors import PlanError, UsageError
from kdsurgeon.losses import Logits
from kdsurgeon.partitioning import Partition, activations, cut, recut
from kdsurgeon.ranks import Ranks
from kdsurgeon.stones.frozen import simplify
from kdsurgeon.stones.plan import Plan, Stone, check_depths
from kdsurgeon.stones.programs import divide
from kdsurgeon.stones.sharding import SharedTeacher, share_out
from kdsurgeon.stones.surgery import (
    Values,
    Walk,
    block_sources,
    context_inputs,
    frozen_twins,
    graft,
    root_of,
    state_of,
)
from kdsurgeon.stones.units import Units
from kdsurgeon.tracing import BATCH, Inputs, Trace, memory_of, trace, trace_whole

TEACHER_LOGITS = "teacher_logits"  # an input beside those of the models: what the teacher gave


class SteppingStones(nn.Module):
    """A batch in, :class:`Logits` of student, stones and teacher out.

    The batch is a tensor, or tensors by the name of their parameter where the models were captured
    so. The parameters are those of the student and the adapters: hand them to an optimiser. The
    teacher is a frozen twin that shares the teacher's storage, stays in evaluation mode whatever
    the caller does, and receives no gradient. In evaluation mode the evaluation graph runs.
    """

    def __init__(
        self, plan: Plan, depths: tuple[int, ...], *, merge: bool, fold: bool, seed: int
    ) -> None:
        super().__init__()
        self.student = plan.student.trace.model
        self.adapters = nn.ModuleDict(
            {
                str(stone.depth): nn.ModuleList(
                    adapters.build(spec, seed=seed * 1000 + stone.depth * 10 + index)
                    for index, spec in enumerate(stone.adapters)
                )
                for stone in plan.stones
                if stone.depth in depths
            }
        )
        self.adapters.to(_device(self.student), _dtype(self.student))
        self.depths = depths
        self.teacher = _Hidden(frozen_twins(plan.teacher.trace))
        self._synthesis = _Synthesis(plan, self, merge=merge, fold=fold)
        self._graphs = {
            (mode, depths, False): self._synthesis.graph(mode, depths, False)
            for mode in (True, False)
        }
        self.train()

    def forward(self, inputs: Inputs, depths: Sequence[int] | None = None) -> Logits:
        """The logits of all stones, or of those of ``depths`` only.

        Where ``inputs`` holds "teacher_logits" (batch, classes), the teacher's own pass is not run.
        """
        is_cached = not isinstance(inputs, Tensor) and TEACHER_LOGITS in inputs
        chosen = self.depths if depths is None else tuple(sorted(depths))
        graph = self._graph(chosen, is_cached)
        names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
        given = {names[0]: inputs} if isinstance(inputs, Tensor) else inputs
        missing = [name for name in names if name not in given]
        if missing:
            raise UsageError(
                f"the batch lacks the input {missing[0]}.",
                given=", ".join(given),
                fix=f"give what both models were captured with: {', '.join(names)}",
            )
        values = [given[name] for name in names]
        if self.shared is not None:
            self.shared.free_all()
        # not by calling it: torch.fx prints to standard error when a graph module raises
        student, stones, teacher = graph.forward(*values)
        return Logits(student, stones, teacher, chosen)

    @property
    def shared(self) -> SharedTeacher | None:
        """How the teacher is shared out among the processes, where it is."""
        return self._synthesis.shared

    @property
    def units(self) -> Units | None:
        """How student and adapters are shared out, where they are."""
        return self._synthesis.units

    def share_teacher(self, ranks: Ranks, device: torch.device) -> SharedTeacher:
        """Leave on this rank, on ``device``, an equal part of the teacher's weights only.

        They come together, a portion at a time, while the graph runs, which all ranks have to do
        at the same places from here on. The teacher's own module can be run no more, except where
        ``shared.whole()`` holds. All ranks must have the same teacher.

        Raises:
            UsageError: they have not, or a tensor of it has no plain bytes.
        """
        self._graphs.clear()
        return self._synthesis.share_teacher(ranks, device)

    def share_student(self, ranks: Ranks, device: torch.device) -> None:
        """Leave on this rank, on ``device``, a part of each weight of student and adapters only.

        They become tensors of torch's DTensor, and so do their gradients and what an optimiser
        that is made from now on remembers. All ranks have to run the graph at the same places, and
        none can run the student's own module. What rank 0 has is what all begin with.

        Raises:
            UsageError: FSDP2 cannot share out a weight; names it.
        """
        ranks.as_first([value for value in self.state_dict().values() if value.numel()])
        self._graphs.clear()
        self._synthesis.share_student(self, ranks, device)

    def student_logits(self, inputs: Inputs) -> Tensor:
        """Those of the student alone, in evaluation mode, by its blocks in the graph."""
        names = list(self._synthesis.plan.student.trace.inputs)
        given = {names[0]: inputs} if isinstance(inputs, Tensor) else inputs
        return self._synthesis.student_alone.forward(*(given[name] for name in names))

    @torch.no_grad()
    def teacher_logits(self, inputs: Inputs) -> Tensor:
        """Those of the teacher alone, as its own pass in the graph gives them."""
        names = list(self._synthesis.plan.teacher.trace.inputs)
        given = {names[0]: inputs} if isinstance(inputs, Tensor) else inputs
        return _join(self._synthesis.clean(*(given[name] for name in names)))

    def _graph(self, depths: tuple[int, ...], is_cached: bool) -> fx.GraphModule:
        key = self.training, depths, is_cached
        if key not in self._graphs:
            for depth in depths:
                if depth not in self.depths:
                    raise UsageError(
                        f"there is no stone of depth {depth}.",
                        known=", ".join(map(str, self.depths)) or "none",
                        fix="give synthesize the depths that the steps will use",
                    )
            self._graphs[key] = self._synthesis.graph(*key)
            self.train(self.training)
        return self._graphs[key]

    def train(self, mode: bool = True) -> SteppingStones:
        super().train(mode)
        for module in self.teacher.modules:
            module.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SteppingStones:
        super()._apply(fn, recurse)
        if self.shared is None:
            for module in self.teacher.modules:
                module._apply(fn)
        return self


@dataclass(frozen=True)
class _Hidden:
    """Teacher modules by their name in the graph, kept out of the module tree."""

    by_target: dict[str, Any]

    @property
    def modules(self) -> list[nn.Module]:
        return [value for value in self.by_target.values() if isinstance(value, nn.Module)]


class _CleanPass(nn.Module):
    """The teacher's own logits, without gradient; inputs that it overwrites stay as they are."""

    def __init__(self, graph_module: fx.GraphModule, written: Collection[int]) -> None:
        super().__init__()
        self.graph_module, self.written = graph_module, written

    def forward(self, *inputs: Tensor) -> Tensor:
        own = [x.clone() if index in self.written else x for index, x in enumerate(inputs)]
        with torch.no_grad(), _aside(own):
            return self.graph_module.forward(*own)


@contextmanager
def _aside(inputs: Sequence[Tensor]) -> Iterator[None]:
    """On CUDA, beside what the student computes meanwhile: on a stream of its own."""
    device = inputs[0].device
    if device.type == "cuda":  # pragma: no cover - needs CUDA
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield
        for value in inputs:  # their memory must not be used again before this stream has read it
            value.record_stream(stream)
    else:
        yield


def _join(logits: Tensor) -> Tensor:
    """From here on the teacher's logits may be read."""
    if logits.device.type == "cuda":  # pragma: no cover - needs CUDA
        current = torch.cuda.current_stream(logits.device)
        current.wait_stream(_side_stream(logits.device))
        logits.record_stream(current)
    return logits


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:  # pragma: no cover - needs CUDA
    return torch.cuda.Stream(device)


def synthesize(
    plan: Plan,
    *,
    depths: Sequence[int] | None = None,
    merge: bool | None = None,
    fold: bool = True,
    seed: int = 0,
) -> SteppingStones:
    """The training graph of a plan.

    Args:
        depths: which stones to build, all by default; none gives plain distillation.
        merge: run all tails as one batch (the default wherever that is exact) or one by one.
        fold: let the teacher's batch normalisation be part of its convolutions, and keep for the
            backward pass only what a frozen network needs. Changes its logits by rounding.
        seed: of the adapters' initial weights.

    Raises:
        PlanError: a depth that the plan lacks, or ``merge=True`` for a teacher whose tail mixes
            the samples of a batch.

    >>> from kdsurgeon.stones import partition
    >>> def net(width):
    ...     return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
    ...                          nn.Flatten(), nn.Linear(width, 10))
    >>> stones = synthesize(partition(net(16), net(4), torch.zeros(2, 1, 8, 8)))
    >>> logits = stones(torch.zeros(5, 1, 8, 8))
    >>> logits.student.shape, logits.stones.shape
    (torch.Size([5, 10]), torch.Size([1, 5, 10]))
    """
    every = [stone.depth for stone in plan.stones]
    chosen = tuple(every if depths is None else sorted(set(depths)))
    check_depths(plan, chosen)
    _check_are_two(plan)
    _check_precision(plan)
    mixing = _mixes_samples(plan.teacher)
    if merge and mixing:
        raise PlanError(
            f"the tails of {plan.teacher.trace.name} cannot be merged.",
            where=mixing,
            why="this module computes with statistics of the batch",
            fix="leave merge out; the tails then run one by one",
        )
    merged = not mixing if merge is None else merge
    return SteppingStones(plan, chosen, merge=merged, fold=fold, seed=seed)


def _check_are_two(plan: Plan) -> None:
    teacher, student = plan.teacher.trace.model, plan.student.trace.model
    shared = {id(parameter) for parameter in teacher.parameters()}
    for name, parameter in student.named_parameters():
        if id(parameter) in shared:
            raise PlanError(
                "teacher and student share weights, so that training one changes the other.",
                where=name,
                fix="give the student weights of its own: copy.deepcopy(model)",
            )


def _check_precision(plan: Plan) -> None:
    teacher, student = (_dtype(side.trace.model) for side in (plan.teacher, plan.student))
    if teacher != student:
        raise PlanError(
            f"{plan.teacher.trace.name} computes in {teacher}, {plan.student.trace.name} in "
            f"{student}.".replace("torch.", ""),
            fix="convert one of them, e.g. model.float(); --amp computes faster from float32",
        )


class _Synthesis:
    """Makes the training graphs of one set of stones; they share everything but their nodes."""

    def __init__(self, plan: Plan, stones: SteppingStones, *, merge: bool, fold: bool) -> None:
        self.plan, self.merge, self.fold = plan, merge, fold
        self.teacher_state = stones.teacher.by_target
        self.adapters = {
            f"adapters.{depth}.{index}": adapter
            for depth, group in stones.adapters.items()
            for index, adapter in enumerate(group)  # pyright: ignore[reportArgumentType]
        }
        self.shared: SharedTeacher | None = None
        self.units: Units | None = None
        self.device: torch.device | None = None  # where another than that of the plan
        self.clean = self._clean_pass()
        self._students: dict[bool | None, Partition] = {}

    def graph(self, training: bool, depths: tuple[int, ...], is_cached: bool) -> fx.GraphModule:
        student, teacher = self._student(training, depths), self.plan.teacher
        graph = fx.Graph()
        inputs = _placeholders(graph, (student.trace, teacher.trace))
        clean = (
            graph.placeholder(TEACHER_LOGITS)
            if is_cached
            else graph.call_module("teacher", tuple(inputs[name] for name in teacher.trace.inputs))
        )
        walk = Walk(student, _given(student.trace, inputs))
        context = context_inputs(teacher.trace, _given(teacher.trace, inputs))
        ends = [*block_sources(teacher)[1:], [teacher.trace.logits]]
        tails: list[_Tail] = []
        for depth, sources in enumerate(block_sources(teacher)):
            if depth in depths:
                stone = self.plan.stones[depth - 1]
                tails.append(_Tail(_adapted(graph, stone, walk.at(depth)), 1))
            if self.merge and len(tails) > 1:
                tails = [_merged(graph, tails)]
            for index, tail in enumerate(tails):
                boundary = dict(zip(sources, tail.tensors, strict=True)) | context
                values = graft(graph, teacher.blocks[depth].nodes, boundary, {}, "tail.") | boundary
                tails[index] = _Tail([values[node] for node in ends[depth]], tail.count)
            if depth < len(student.blocks):  # one alone, where no stone reads from inside
                walk.step(graph, depth, "student.")
        if not is_cached:
            clean = graph.call_function(_join, (clean,))
        graph.output((walk.values[student.trace.logits], _stack(graph, tails, clean), clean))
        if self.fold:
            simplify(graph, self.teacher_state, "tail.")
        graph.lint()
        state = {"teacher": self.clean} | self.adapters
        state |= {f"tail.{target}": twin for target, twin in self.teacher_state.items()}
        state |= {f"student.{target}": own for target, own in state_of(student.trace).items()}
        return self._program(graph, state, "tail.", student)

    @cached_property
    def student_alone(self) -> fx.GraphModule:
        """The student in evaluation mode, rebuilt from its blocks."""
        student = self._student(False, (1,))
        graph = fx.Graph()
        walk = Walk(student, _given(student.trace, _placeholders(graph, (student.trace,))))
        for depth in range(len(student.blocks)):
            walk.step(graph, depth, "student.")
        graph.output(walk.values[student.trace.logits])
        state = {f"student.{target}": own for target, own in state_of(student.trace).items()}
        return self._program(graph, state, "tail.", student)

    def share_student(self, stones: SteppingStones, ranks: Ranks, device: torch.device) -> None:
        read: dict[Hashable, list[nn.Parameter]] = {}
        for depth, group in stones.adapters.items():
            read["adapters", depth] = list(group.parameters())
        for training in (True, False):
            student = self._student(training, (1,))
            state = state_of(student.trace)
            for index, block in enumerate(student.blocks):
                names = {str(n.target) for n in block.nodes if n.op in ("call_module", "get_attr")}
                read.setdefault(("student", index), []).extend(
                    each for name in names for each in _parameters_of(state[name])
                )
        self.units = Units(stones, read, ranks, device)

    def share_teacher(self, ranks: Ranks, device: torch.device) -> SharedTeacher:
        whole = self.plan.teacher.trace
        graph = self.clean.graph_module.graph
        hashes = ranks.all(model_hash(whole.model))
        if len(set(hashes)) > 1:
            raise UsageError(
                "the processes have different teachers, of which no whole one can be made.",
                given=", ".join(f"rank {rank}: {each}" for rank, each in enumerate(hashes)),
                fix="give all of them the same teacher file",
            )
        self.shared = share_out(whole, graph, self.teacher_state, ranks, device)
        self._move(device)
        return self.shared

    def _move(self, device: torch.device) -> None:
        self.device = device
        for given in (self.plan.teacher.trace.example, self.plan.student.trace.example):
            for value in [given] if isinstance(given, Tensor) else given.values():
                value.data = value.data.to(device)  # graphs of other stones are made from it later
        self.clean = self._clean_pass()

    def _program(
        self,
        graph: fx.Graph,
        state: dict[str, Any],
        prefix: str,
        student: Partition | None = None,
    ) -> fx.GraphModule:
        """What runs ``graph``, in which names that begin with ``prefix`` are the teacher's, and
        those that begin with "student." those of ``student``."""
        shared, units = self.shared, self.units
        if shared is None:
            return fx.GraphModule(root_of(state), graph)
        _relocate(graph, state, self.device or torch.device("cpu"))
        places: dict[str, Hashable] = {f"{prefix}{name}": at for name, at in shared.place.items()}
        if units is not None and student is not None:
            blocks = ((n, at) for at, block in enumerate(student.blocks) for n in block.nodes)
            places |= {f"student.{n.meta['qualname']}": ("student", at) for n, at in blocks}

        def place(node: fx.Node) -> Hashable:
            if units is not None and str(node.target).startswith("adapters."):
                return "adapters", str(node.target).split(".")[1]
            return places.get(node.meta.get("qualname", ""))

        def run(at: Hashable, program: fx.GraphModule) -> nn.Module:
            if units is None or isinstance(at, int):
                return shared.program(program, prefix)
            return units.program(at, program)

        return divide(graph, state, place, run)

    def _student(self, training: bool, depths: tuple[int, ...]) -> Partition:
        """Its graph in that mode; where no stone reads from inside, it is called as it is."""
        by_blocks = bool(depths) or self.units is not None
        key = training if by_blocks else None
        if key not in self._students:
            own = self.plan.student
            self._students[key] = _in_mode(own, training=training) if by_blocks else _as_it_is(own)
        return self._students[key]

    def _clean_pass(self) -> _CleanPass:
        graph = copy.deepcopy(self.plan.teacher.trace.graph_module.graph)
        if self.fold:
            simplify(graph, self.teacher_state)
        program = self._program(graph, self.teacher_state, "")
        return _CleanPass(program, _written_inputs(self.plan.teacher.trace))


def _relocate(graph: fx.Graph, state: dict[str, Any], device: torch.device) -> None:
    """Let a graph that was traced elsewhere make its tensors on ``device``, and find them there."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph.nodes:
        node.args = map_aggregate(node.args, moved)
        node.kwargs = map_aggregate(node.kwargs, moved)
    for value in state.values():
        if isinstance(value, Tensor) and value.device != device:  # pragma: no cover - needs CUDA
            value.data = value.data.to(device)


def _written_inputs(whole: Trace) -> frozenset[int]:
    """The positions of the inputs that a model overwrites; of one called as a whole, all."""
    targets = (each for node in whole.nodes.values() for each in node.meta.get("writes", ()))
    written = {memory_of(target) for target in targets}
    return frozenset(
        index
        for index, node in enumerate(whole.placeholders)
        if whole.rung == "whole" or memory_of(node) in written
    )


def _parameters_of(value: Any) -> list[nn.Parameter]:
    if isinstance(value, nn.Module):
        return list(value.parameters())
    return [value] if isinstance(value, nn.Parameter) else []


@dataclass(frozen=True)
class _Tail:
    """Tensors on their way to the logits, and how many stones stand in their batch."""

    tensors: list[fx.Node]
    count: int


def _placeholders(graph: fx.Graph, traces: Sequence[Trace]) -> dict[str, fx.Node]:
    """One for every input that any of the models takes."""
    names = dict.fromkeys(name for captured in traces for name in captured.inputs)
    return {name: graph.placeholder(name) for name in names}


def _given(captured: Trace, inputs: dict[str, fx.Node]) -> Values:
    return {node: inputs[str(node.target)] for node in captured.placeholders}


def _adapted(graph: fx.Graph, stone: Stone, read: dict[str, fx.Node]) -> list[fx.Node]:
    """What the stone's adapters make of the student's boundary: all that the teacher's needs."""
    return [
        graph.call_module(f"adapters.{stone.depth}.{index}", (read[spec.source.name],))
        for index, spec in enumerate(stone.adapters)
    ]


def _merged(graph: fx.Graph, tails: list[_Tail]) -> _Tail:
    """All tails as one, their samples behind each other."""
    tensors = [
        graph.call_function(torch.cat, (list(each),))
        for each in zip(*(tail.tensors for tail in tails), strict=True)
    ]
    return _Tail(tensors, sum(tail.count for tail in tails))


def _stack(graph: fx.Graph, tails: list[_Tail], clean: fx.Node) -> fx.Node:
    """(stones, batch, classes) from the tensors that arrived at the logits."""
    if not tails:
        return graph.call_function(
            operator.getitem, (graph.call_method("unsqueeze", (clean, 0)), slice(0))
        )
    stacked = [
        graph.call_method("unflatten", (tail.tensors[0], 0, (tail.count, -1))) for tail in tails
    ]
    return stacked[0] if len(stacked) == 1 else graph.call_function(torch.cat, (stacked,))


def _as_it_is(whole: Partition) -> Partition:
    own = whole.trace
    return cut(trace_whole(own.model, own.example, name=own.name), ())


def _in_mode(whole: Partition, *, training: bool) -> Partition:
    """The same cuts in the graph of the other mode, found by name."""
    if not training or whole.trace.rung == "whole":
        return whole
    captured = trace(whole.trace.model, whole.trace.example, name=whole.trace.name, training=True)
    return recut(whole, captured)


def _mixes_samples(teacher: Partition) -> str | None:
    """The first place in the teacher's tails where one sample's value depends on its batch.

    Context made from an input belongs to one batch, so it counts, too.
    """
    whole = teacher.trace
    context = context_inputs(whole, {node: node for node in whole.placeholders})
    tails = dict.fromkeys(node for block in teacher.blocks[1:] for node in block.nodes)
    for node in whole.graph_module.graph.nodes:
        if node.op == "call_module" and node in tails:
            own = whole.graph_module.get_submodule(str(node.target))
            if isinstance(own, nn.modules.batchnorm._BatchNorm) and own.running_mean is None:
                return node.meta["qualname"]
        if node.op != "placeholder" and any(other in context for other in node.all_input_nodes):
            if "batch" in node.meta:
                continue
            context[node] = node
    data = set(activations(whole))
    for node in (each for each in tails if each in data):
        for other in node.all_input_nodes:
            if other in context and other not in data and _has_batch(other):
                return node.meta["qualname"]
    return None


def _has_batch(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(size % BATCH == 0 for size in value.shape if size)


def _dtype(model: nn.Module) -> torch.dtype:
    floating = (value.dtype for value in model.parameters() if value.is_floating_point())
    return next(floating, torch.float32)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
