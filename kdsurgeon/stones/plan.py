"""Where two models are cut, which stone starts at every boundary, and plan.yaml.

A plan is data: it can be read, edited by hand, diffed, and is checked against both models on load.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from kdsurgeon.adapters import AdapterSpec, adapter_for
from kdsurgeon.alignment import Alignment, align
from kdsurgeon.checkpoints import write_whole
from kdsurgeon.errors import PlanError, nearest
from kdsurgeon.losses.formulas import halving_weights
from kdsurgeon.partitioning import CutPoint, Partition, fingerprint
from kdsurgeon.recipe import read_yaml, write_yaml
from kdsurgeon.tracing import Trace, trace

PLAN_VERSION = 1


@dataclass(frozen=True)
class Stone:
    """Student blocks up to ``depth``, an adapter, teacher blocks after; ``weight`` in the loss."""

    depth: int
    adapter: AdapterSpec
    weight: float


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

    def to_yaml(self) -> str:
        """The plan as text: readable, diffable, editable, the same bytes for the same plan."""
        data: dict[str, Any] = {"plan": PLAN_VERSION}
        for side, partition in (("teacher", self.teacher), ("student", self.student)):
            data[side] = {"graph": fingerprint(partition.trace)}
        comments: dict[tuple[str | int, ...], str] = {}
        data["boundaries"] = []
        for index, (stone, pair) in enumerate(
            zip(self.stones, self.alignment.boundaries, strict=True)
        ):
            data["boundaries"].append(
                {
                    "teacher": pair.teacher.name,
                    "student": pair.student.name,
                    "adapter": stone.adapter.operation,
                    "weight": stone.weight,
                }
            )
            place = ("boundaries", index)
            comments[*place, "teacher"] = _what_it_is(pair.teacher)
            comments[*place, "student"] = _what_it_is(pair.student)
            comments[*place, "adapter"] = str(stone.adapter)
        return write_yaml(data, comments)

    def save(self, path: str | Path) -> None:
        """Write plan.yaml, whole or not at all."""
        write_whole(Path(path), [self.to_yaml().encode()])


def _what_it_is(point: CutPoint) -> str:
    return f"{'×'.join(map(str, point.shape))}, {point.progress:.0%} of its compute before it"


def partition(
    teacher: nn.Module,
    student: nn.Module,
    example: Tensor,
    *,
    blocks: int | Literal["auto"] = "auto",
    pairs: Sequence[tuple[str, str]] | None = None,
    names: tuple[str, str] = ("teacher", "student"),
) -> Plan:
    """Capture both models, cut them where they correspond, and plan a stone at every boundary.

    Args:
        teacher, student: any two classifiers of the same classes.
        example: one input batch (batch, channels, height, width) that both accept.
        blocks, pairs: see :func:`kdsurgeon.alignment.align`.

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
    teacher_trace = trace(teacher, example, name=names[0])
    student_trace = trace(student, example, name=names[1])
    return plan_stones(align(teacher_trace, student_trace, blocks=blocks, pairs=pairs))


def plan_stones(alignment: Alignment) -> Plan:
    """One stone for each boundary, weighted 2^-(n-i), with the adapter that its shapes need."""
    weights = halving_weights(len(alignment.boundaries))
    return Plan(
        alignment,
        tuple(
            Stone(depth, adapter_for(pair.student, pair.teacher), weight)
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
    pairs = [(entry["teacher"], entry["student"]) for entry in entries]
    plan = plan_stones(align(teacher, student, pairs=pairs))
    stones = []
    for entry, stone in zip(entries, plan.stones, strict=True):
        weight = entry.get("weight", stone.weight)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e6:
            raise PlanError(
                f"{name}: the weight of boundary {stone.depth} is {weight!r}.",
                fix="give a number of 0 or more",
            )
        adapter = replace(stone.adapter, operation=entry.get("adapter", stone.adapter.operation))
        stones.append(Stone(stone.depth, adapter, float(weight)))
    return Plan(plan.alignment, tuple(stones))


def _check_plan_keys(name: str, data: Any) -> None:
    wanted = {"plan", "teacher", "student", "boundaries"}
    if not isinstance(data, Mapping) or set(data) != wanted:
        raise PlanError(
            f"{name} is not a plan.", why=f"its keys must be {', '.join(sorted(wanted))}"
        )
    if data["plan"] != PLAN_VERSION:
        raise PlanError(f"{name} is a plan of version {data['plan']}; this reads {PLAN_VERSION}.")
    entries = data["boundaries"]
    if not isinstance(entries, list) or not entries:
        raise PlanError(f"{name} lists no boundaries.")
    for depth, entry in enumerate(entries, start=1):
        allowed = {"teacher", "student", "adapter", "weight"}
        if not isinstance(entry, Mapping) or not {"teacher", "student"} <= set(entry) <= allowed:
            unknown = sorted(set(entry) - allowed) if isinstance(entry, Mapping) else []
            raise PlanError(
                f"{name}: boundary {depth} must name teacher and student (adapter and weight "
                "are optional), and nothing else.",
                unknown=", ".join(map(str, unknown)),
                fix=nearest(str(unknown[0]), allowed) if unknown else None,
            )
        for side in ("teacher", "student"):
            if not isinstance(entry[side], str):
                raise PlanError(
                    f"{name}: the {side} of boundary {depth} is {entry[side]!r}, not a name.",
                    fix=f'write it in quotes: "{entry[side]}"',
                )
    for side in ("teacher", "student"):
        if not isinstance(data[side], Mapping):
            raise PlanError(f"{name}: {side} must hold the hash of its graph.")
