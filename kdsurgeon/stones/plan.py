"""Where two models are cut, which stone starts at every boundary, and plan.yaml.

A plan is data: it can be read, edited by hand, diffed, and is checked against both models on load.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from kdsurgeon import similarity
from kdsurgeon.adapters import AdapterSpec, adapter_for
from kdsurgeon.alignment import Alignment, align
from kdsurgeon.checkpoints import write_whole
from kdsurgeon.errors import PlanError, TraceError, nearest
from kdsurgeon.losses.formulas import halving_weights
from kdsurgeon.partitioning import CutPoint, Partition, fingerprint
from kdsurgeon.recipe import read_yaml, write_yaml
from kdsurgeon.tracing import Inputs, Trace, trace, trace_whole

PLAN_VERSION = 2


@dataclass(frozen=True)
class Stone:
    """Student blocks up to ``depth``, adapters, teacher blocks after; ``weight`` in the loss.

    There is one adapter for each tensor of the teacher's cut.
    """

    depth: int
    adapters: tuple[AdapterSpec, ...]
    weight: float

    def __str__(self) -> str:
        return "; ".join(map(str, self.adapters))


@dataclass(frozen=True)
class Plan:
    """Where both models are cut, and the stone that starts at every boundary."""

    alignment: Alignment
    stones: tuple[Stone, ...]

    def __post_init__(self) -> None:
        assert [stone.depth for stone in self.stones] == list(range(1, len(self.stones) + 1))
        assert len(self.stones) == len(self.alignment.boundaries)

    def __repr__(self) -> str:
        pairs = self.alignment.boundaries
        names = ", ".join(f"{pair.teacher.name} ← {pair.student.name}" for pair in pairs)
        return f"Plan({len(self.stones)} stones: {names})"

    @property
    def teacher(self) -> Partition:
        return self.alignment.teacher

    @property
    def student(self) -> Partition:
        return self.alignment.student

    @property
    def hash(self) -> str:
        """sha256 of what :meth:`to_yaml` writes."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()

    def to_yaml(self, proof: Mapping[str, Any] | None = None) -> str:
        """The plan as text: readable, diffable, editable, the same bytes for the same plan.

        ``proof`` is kept under its own heading; who reads the plan checks it anew.
        """
        data: dict[str, Any] = {"plan": PLAN_VERSION}
        for side, whole in (("teacher", self.teacher), ("student", self.student)):
            data[side] = {"graph": fingerprint(whole.trace)}
        comments: dict[tuple[str | int, ...], str] = {}
        data["boundaries"] = []
        for index, (stone, pair) in enumerate(
            zip(self.stones, self.alignment.boundaries, strict=True)
        ):
            data["boundaries"].append(_entry(stone, pair.teacher, pair.student))
            place = ("boundaries", index)
            comments[*place, "teacher"] = _what_it_is(pair.teacher)
            comments[*place, "student"] = _what_it_is(pair.student)
            comments[*place, "adapter"] = str(stone)
        if proof:
            data["certificate"] = dict(proof)
        return write_yaml(data, comments)

    def save(self, path: str | Path, proof: Mapping[str, Any] | None = None) -> None:
        """Write plan.yaml, whole or not at all."""
        write_whole(Path(path), [self.to_yaml(proof).encode()])


def _entry(stone: Stone, teacher: CutPoint, student: CutPoint) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "teacher": _alone(teacher.names),
        "student": _alone(student.names),
        "adapter": _alone([spec.operation for spec in stone.adapters]),
    }
    if any(spec.rank for spec in stone.adapters):
        entry["rank"] = _alone([spec.rank for spec in stone.adapters])
    return entry | {"weight": stone.weight}


def _alone(items: Sequence[Any]) -> Any:
    """The one item, or all of a wide cut as a list."""
    return items[0] if len(items) == 1 else list(items)


def _what_it_is(point: CutPoint) -> str:
    shapes = " + ".join("×".join(map(str, tensor.shape)) for tensor in point.tensors)
    return f"{shapes}, {point.progress:.0%} of its compute before it"


def partition(
    teacher: nn.Module,
    student: nn.Module,
    example: Inputs,
    *,
    blocks: int | Literal["auto"] = "auto",
    pairs: Sequence[tuple[str, str]] | None = None,
    max_adapter_parameters: int | None = None,
    probe: Sequence[Inputs] | None = None,
    names: tuple[str, str] = ("teacher", "student"),
) -> Plan:
    """Capture both models, cut them where they correspond, and plan a stone at every boundary.

    Args:
        teacher, student: any two classifiers of the same classes.
        example: one input batch that both accept: images (batch, channels, height, width), or
            several tensors by the name of their parameter of ``forward``.
        blocks, pairs: see :func:`kdsurgeon.alignment.align`.
        max_adapter_parameters: of the adapters of one stone; larger ones are factorised.
        probe: batches of inputs on which the two models are compared; how alike they see them
            (linear CKA) counts in the alignment then.

    Raises:
        TraceError, AlignmentError, PlanError.

    >>> import torch
    >>> def net(width):
    ...     return nn.Sequential(
    ...         nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    ...         nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
    ...         nn.Flatten(), nn.Linear(width, 10))
    >>> plan = partition(net(16), net(4), torch.zeros(2, 1, 8, 8))
    >>> [(pair.teacher.name, pair.student.name) for pair in plan.alignment.boundaries]
    [('1', '1'), ('4', '4')]
    """
    capture = trace if blocks else _trace_somehow
    teacher_trace = capture(teacher, example, name=names[0])
    student_trace = capture(student, example, name=names[1])
    alignment = align(
        teacher_trace,
        student_trace,
        blocks=blocks,
        pairs=pairs,
        similarity=similarity.probe(teacher_trace, student_trace, probe) if probe else None,
    )
    return plan_stones(alignment, max_adapter_parameters=max_adapter_parameters)


def _trace_somehow(model: nn.Module, example: Inputs, *, name: str) -> Trace:
    """A graph for plain distillation, which needs no look inside."""
    try:
        return trace(model, example, name=name)
    except TraceError:
        return trace_whole(model, example, name=name)


def plan_stones(alignment: Alignment, *, max_adapter_parameters: int | None = None) -> Plan:
    """One stone for each boundary, weighted 2^-(n-i), with the adapters that its shapes need."""
    weights = halving_weights(len(alignment.boundaries))
    return Plan(
        alignment,
        tuple(
            Stone(
                depth,
                adapter_for(pair.student, pair.teacher, max_parameters=max_adapter_parameters),
                weight,
            )
            for depth, (pair, weight) in enumerate(
                zip(alignment.boundaries, weights, strict=True), start=1
            )
        ),
    )


def read_plan(path: str | Path, teacher: Trace, student: Trace) -> Plan:
    """A saved plan, possibly edited by hand, checked against these two models.

    Raises:
        PlanError: made for other models, or a node, adapter or weight is wrong; says where.
    """
    data = read_yaml(path)
    name = Path(path).name
    _check_plan_keys(name, data)
    for side, captured in (("teacher", teacher), ("student", student)):
        if data[side].get("graph") != fingerprint(captured):
            raise PlanError(
                f"{name} was made for another {side} than {captured.name}.",
                why="the graphs differ: other layers, or images of another size",
                fix="make a new plan: kdsurgeon partition TEACHER STUDENT -o plan.yaml",
            )
    entries = data["boundaries"]
    pairs = [(_joined(entry["teacher"]), _joined(entry["student"])) for entry in entries]
    plan = plan_stones(align(teacher, student, pairs=pairs))
    stones = []
    for entry, stone in zip(entries, plan.stones, strict=True):
        weight = entry.get("weight", stone.weight)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
            raise PlanError(
                f"{name}: the weight of boundary {stone.depth} is {weight!r}.",
                fix="give a number of 0 or more",
            )
        stones.append(Stone(stone.depth, _edited(name, stone, entry), float(weight)))
    return Plan(plan.alignment, tuple(stones))


def _joined(names: str | Sequence[str]) -> str:
    return names if isinstance(names, str) else " + ".join(names)


def _edited(name: str, stone: Stone, entry: Mapping[str, Any]) -> tuple[AdapterSpec, ...]:
    """The stone's adapters with the operations and ranks that the file gives."""
    given: list[list[Any]] = []
    for key, own in (
        ("adapter", [spec.operation for spec in stone.adapters]),
        ("rank", [None for _ in stone.adapters]),
    ):
        value = entry.get(key, own)
        values = value if isinstance(value, list) else [value]
        if len(values) != len(stone.adapters):
            raise PlanError(
                f"{name}: boundary {stone.depth} needs {len(stone.adapters)} adapters, one for "
                "each tensor of the teacher's cut.",
                where=f"{key}: {value!r}",
            )
        given.append(values)
    for rank in given[1]:
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise PlanError(
                f"{name}: the rank of boundary {stone.depth} is {rank!r}.",
                fix="give a whole number of 1 or more, or leave it out",
            )
    return tuple(
        replace(spec, operation=operation, rank=rank)
        for spec, operation, rank in zip(stone.adapters, *given, strict=True)
    )


def _check_plan_keys(name: str, data: Any) -> None:
    wanted = {"plan", "teacher", "student", "boundaries"}
    if not isinstance(data, Mapping) or set(data) - {"certificate"} != wanted:
        raise PlanError(
            f"{name} is not a plan.", why=f"its keys must be {', '.join(sorted(wanted))}"
        )
    if data["plan"] != PLAN_VERSION:
        raise PlanError(f"{name} is a plan of version {data['plan']}; this reads {PLAN_VERSION}.")
    entries = data["boundaries"]
    if not isinstance(entries, list) or not entries:
        raise PlanError(f"{name} lists no boundaries.")
    for depth, entry in enumerate(entries, start=1):
        allowed = {"teacher", "student", "adapter", "rank", "weight"}
        if not isinstance(entry, Mapping) or not {"teacher", "student"} <= set(entry) <= allowed:
            unknown = sorted(set(entry) - allowed) if isinstance(entry, Mapping) else []
            raise PlanError(
                f"{name}: boundary {depth} must name teacher and student (adapter, rank and weight "
                "are optional), and nothing else.",
                unknown=", ".join(map(str, unknown)),
                fix=nearest(str(unknown[0]), allowed) if unknown else None,
            )
        for side in ("teacher", "student"):
            names = entry[side] if isinstance(entry[side], list) else [entry[side]]
            if not names or not all(isinstance(each, str) for each in names):
                raise PlanError(
                    f"{name}: the {side} of boundary {depth} is {entry[side]!r}, not a name.",
                    fix=f'write it in quotes: "{entry[side]}"',
                )
    for side in ("teacher", "student"):
        if not isinstance(data[side], Mapping):
            raise PlanError(f"{name}: {side} must hold the hash of its graph.")
