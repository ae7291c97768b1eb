"""Where two models are cut, which stone starts at every boundary, and plan.yaml.

A plan is data: it can be read, edited by hand, diffed, and is checked against both models on load.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from kdsurgeon import similarity
from kdsurgeon.adapters import AdapterSpec, Operation, adapter_for
from kdsurgeon.adapters.choosing import check_limit
from kdsurgeon.alignment import Alignment, align, check_wishes
from kdsurgeon.checkpoints import write_whole
from kdsurgeon.errors import ConfigError, PlanError, TraceError, UsageError, nearest
from kdsurgeon.losses.formulas import halving_weights
from kdsurgeon.partitioning import CutPoint, Partition, fingerprint
from kdsurgeon.recipe import Document, read_yaml, write_yaml
from kdsurgeon.tracing import Inputs, Trace, trace, trace_whole

PLAN_VERSION = 2
_ANEW = "make a new plan: kdsurgeon partition TEACHER STUDENT -o plan.yaml"


@dataclass(frozen=True)
class Stone:
    """Student blocks up to ``depth``, adapters, teacher blocks after; ``weight`` in the loss.

    There is one adapter for each tensor of the teacher's cut.
    """

    depth: int
    adapters: tuple[AdapterSpec, ...]
    weight: float

    def __post_init__(self) -> None:
        _check_weight(self.depth, self.weight)

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
        count = len(self.stones)
        return f"Plan({count} stone{'' if count == 1 else 's'}: {names})"

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
            (linear CKA) counts in the alignment then. Of the example's shape, and 8 samples or more
            in all.

    Raises:
        UsageError: an argument that cannot be meant.
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
    check_wishes(blocks, pairs)
    capture = trace if blocks else _trace_somehow
    teacher_trace = capture(teacher, example, name=names[0])
    student_trace = capture(student, example, name=names[1])
    alignment = align(
        teacher_trace,
        student_trace,
        blocks=blocks,
        pairs=pairs,
        similarity=(
            None if probe is None else similarity.probe(teacher_trace, student_trace, probe)
        ),
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
    if max_adapter_parameters is not None and alignment.boundaries:
        pairs = [(pair.student, pair.teacher) for pair in alignment.boundaries]
        check_limit(pairs, max_adapter_parameters)
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


def check_depths(plan: Plan, depths: Collection[int], key: str = "loss.stones") -> None:
    """Raises :class:`PlanError` at the first depth that the plan has no stone of.

    ``key`` is the one of the recipe that asks for them.
    """
    known = [stone.depth for stone in plan.stones]
    for depth in depths:
        if depth not in known:
            raise PlanError(
                f"the plan has no stone of depth {depth}.",
                known=", ".join(map(str, known)) or "none",
                fix=f"change {key}, or plan more blocks with --blocks",
            )


def read_plan(path: str | Path, teacher: Trace, student: Trace) -> Plan:
    """A saved plan, possibly edited by hand, checked against these two models.

    Args:
        path: the file that :meth:`Plan.save` or ``kdsurgeon partition -o`` wrote.
        teacher, student: the models as :func:`kdsurgeon.trace` captures them on inputs of the
            shape that the plan was made for.

    Raises:
        ConfigError: no YAML file, or what it holds is not plain YAML.
        PlanError: made for other models, or a node, adapter or weight is wrong; says where.
    """
    for side, captured in (("teacher", teacher), ("student", student)):
        if not isinstance(captured, Trace):
            raise UsageError(
                f"the {side} to read a plan for is a {type(captured).__name__}, not a Trace.",
                fix="capture it first: kdsurgeon.trace(model, example)",
            )
    data = _read(Path(path))
    name = Path(path).name
    _check_plan_keys(name, data)
    for side, captured in (("teacher", teacher), ("student", student)):
        if data[side].get("graph") != fingerprint(captured):
            raise PlanError(
                f"{name} was made for another {side} than {captured.name}.",
                why="the graphs differ: other layers, or images of another size",
                fix=_ANEW,
            )
    entries = data["boundaries"]
    pairs = [
        (" + ".join(_names(entry["teacher"])), " + ".join(_names(entry["student"])))
        for entry in entries
    ]
    plan = plan_stones(align(teacher, student, pairs=pairs))
    stones = []
    for entry, stone in zip(entries, plan.stones, strict=True):
        weight = entry.get("weight", stone.weight)
        _check_weight(stone.depth, weight, f"{name}: ")
        stones.append(Stone(stone.depth, _edited(name, stone, entry), float(weight)))
    if not any(stone.weight for stone in stones):
        raise PlanError(
            f"{name}: every weight is 0, so that no stone would be trained.",
            fix="give a boundary a weight above 0, or leave the plan out for plain distillation: "
            "--method kd",
        )
    return Plan(plan.alignment, tuple(stones))


def _check_weight(depth: int, weight: Any, place: str = "") -> None:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight < 1e6:
        raise PlanError(
            f"{place}the weight of boundary {depth} is {weight!r}.",
            fix="give a number of 0 or more, below 1,000,000",
        )


def _read(path: Path) -> Document:
    """The YAML of a plan; what is wrong with it comes with a way out."""
    if path.is_dir():
        inner = path / "plan.yaml"
        raise PlanError(
            f"{path} is a folder, not a plan.",
            fix=f"name the file: {inner if inner.is_file() else 'FOLDER/plan.yaml'}",
        )
    try:
        return read_yaml(path)
    except ConfigError as error:
        fix = f"mend what is named above, or {_ANEW}"
        raise ConfigError(error.what, **{"fix": fix} | error.notes) from error


def _names(given: str | Sequence[str]) -> list[str]:
    """The tensors of a cut, from a list or from one text."""
    parts = [given] if isinstance(given, str) else given
    return [name.strip() for part in parts for name in part.split(" + ")]


def _edited(name: str, stone: Stone, entry: Mapping[str, Any]) -> tuple[AdapterSpec, ...]:
    """The stone's adapters with the operations and ranks that the file gives."""
    operations = _given(name, stone, entry, "adapter", [spec.operation for spec in stone.adapters])
    ranks = _given(name, stone, entry, "rank", [None for _ in stone.adapters])
    edited = []
    for own, operation, rank in zip(stone.adapters, operations, ranks, strict=True):
        _check_adapter(name, stone.depth, own, operation, rank)
        try:
            edited.append(replace(own, operation=operation, rank=rank))
        except PlanError as error:
            what = f"{name}: boundary {stone.depth}: {error.what}"
            raise PlanError(what, **error.notes) from error
    return tuple(edited)


def _given(
    name: str, stone: Stone, entry: Mapping[str, Any], key: str, own: list[Any]
) -> list[Any]:
    """What the file says under ``key`` for each adapter of the stone, in the stone's order."""
    if key not in entry:
        return own
    values = entry[key] if isinstance(entry[key], list) else [entry[key]]
    count = len(stone.adapters)
    if len(values) != count:
        raise PlanError(
            f"{name}: boundary {stone.depth} needs {count} adapter{'s' * (count != 1)}, one for "
            "each tensor of the teacher's cut.",
            where=f"{key}: {entry[key]!r}",
            fix=f"{key}: {_alone(own)}" if key == "adapter" else "leave the ranks out",
        )
    order = _names(entry["teacher"])
    return [values[order.index(spec.target.name)] for spec in stone.adapters]


def _check_adapter(name: str, depth: int, own: AdapterSpec, operation: Any, rank: Any) -> None:
    known = get_args(Operation)
    if operation not in known:
        empty, what = "the adapter is empty", f'no adapter is called "{operation}"'
        raise PlanError(
            f"{name}: boundary {depth}: {empty if operation is None else what}.",
            known=", ".join(known),
            fix=nearest(str(operation), known) or f"use {own.operation}, or leave the line out",
        )
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise PlanError(
            f"{name}: the rank of boundary {depth} is {rank!r}.",
            fix="give a whole number of 1 or more, or leave it out",
        )


_KEYS = ("plan", "teacher", "student", "boundaries")


def _check_plan_keys(name: str, data: Mapping[str, Any]) -> None:
    missing = [key for key in _KEYS if key not in data]
    unknown = [key for key in data if key not in (*_KEYS, "certificate")]
    if missing or unknown:
        meant = nearest(unknown[0], missing or _KEYS) if unknown else None
        raise PlanError(
            f"{name} is not a plan.",
            unknown=", ".join(unknown),
            missing=", ".join(missing),
            fix=meant or (_ANEW if missing else "leave out what is unknown"),
        )
    _check_version(name, data["plan"])
    entries = data["boundaries"]
    if not isinstance(entries, list) or not entries:
        raise PlanError(
            f"{name} lists no boundaries.",
            fix=f"write at least one below `boundaries:`, or {_ANEW}",
        )
    for depth, entry in enumerate(entries, start=1):
        _check_entry(f"{name}: boundary {depth}", entry)
        for side in ("teacher", "student"):
            names = entry[side] if isinstance(entry[side], list) else [entry[side]]
            if not names or not all(isinstance(each, str) for each in names):
                raise PlanError(
                    f"{name}: the {side} of boundary {depth} is {entry[side]!r}, not a name.",
                    fix=f'write it in quotes: "{entry[side]}"',
                )
    for side in ("teacher", "student"):
        if not isinstance(data[side], Mapping):
            raise PlanError(f"{name}: {side} must hold the hash of its graph.", fix=_ANEW)


def _check_version(name: str, version: Any) -> None:
    if version == PLAN_VERSION:
        return
    is_number = isinstance(version, int) and not isinstance(version, bool)
    if is_number:
        fix = _ANEW if version < PLAN_VERSION else f"update kdsurgeon, or {_ANEW}"
    else:
        fix = f"write plan: {PLAN_VERSION}"
    raise PlanError(f"{name} is a plan of version {version}; this reads {PLAN_VERSION}.", fix=fix)


def _check_entry(where: str, entry: Any) -> None:
    wanted, optional = ("teacher", "student"), ("adapter", "rank", "weight")
    found = entry if isinstance(entry, Mapping) else {}
    missing = [key for key in wanted if key not in found]
    unknown = [str(key) for key in found if key not in (*wanted, *optional)]
    if missing or unknown:
        meant = nearest(unknown[0], (*wanted, *optional)) if unknown else None
        raise PlanError(
            f"{where} must name teacher and student (adapter, rank and weight are optional), and "
            "nothing else.",
            unknown=", ".join(unknown),
            missing=", ".join(missing),
            fix=meant
            or (
                "leave out what is unknown"
                if unknown
                else "write `teacher: NODE` and `student: NODE`"
            ),
        )
