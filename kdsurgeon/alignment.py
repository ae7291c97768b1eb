"""Pair the student's cut points with the teacher's, in order, by a shortest path.

A boundary pairs one cut point of each model; a chain of boundaries is a monotone path through the
grid of candidate pairs, and the cheapest chain is a shortest path in that grid. The last boundary
is fixed: it stands before both heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import log2
from typing import Literal

import networkx as nx

from kdsurgeon.errors import AlignmentError
from kdsurgeon.partitioning import CutPoint, Partition, cut, find_cut_points
from kdsurgeon.tracing import Trace

MAX_BLOCKS_WITHOUT_STAGES = 4  # isotropic networks: equal groups of compute


@dataclass(frozen=True)
class Boundary:
    """One cut point of each model, what the pair costs by term, and the next best pair."""

    teacher: CutPoint
    student: CutPoint
    evidence: dict[str, float]
    runner_up: RunnerUp | None = None

    @property
    def cost(self) -> float:
        return sum(self.evidence.values())


@dataclass(frozen=True)
class RunnerUp:
    """The pair that would stand here if the chosen one were forbidden, and what it would add."""

    teacher: CutPoint
    student: CutPoint
    extra_cost: float


@dataclass(frozen=True)
class Alignment:
    """Two partitions with equally many cuts, boundary by boundary."""

    teacher: Partition
    student: Partition
    boundaries: tuple[Boundary, ...]

    def __post_init__(self) -> None:
        assert len(self.boundaries) == len(self.teacher.cuts) == len(self.student.cuts)


def align(
    teacher: Trace,
    student: Trace,
    *,
    blocks: int | Literal["auto"] = "auto",
    pairs: Sequence[tuple[str, str]] | None = None,
) -> Alignment:
    """Cut both models at paired places.

    Args:
        blocks: how many boundaries (and stepping stones); ``"auto"`` is one per resolution stage,
            or four groups of equal compute where the resolution never changes; 0 pairs nothing.
        pairs: names of (teacher node, student node) to use instead of searching.

    Raises:
        AlignmentError: the models differ in classes, or share no usable boundary.
        PlanError: a hand-named pair is unknown, not a cut point, or out of order.
    """
    if teacher.num_classes != student.num_classes:
        raise AlignmentError(
            f"{teacher.name} has {teacher.num_classes} classes, "
            f"{student.name} has {student.num_classes}.",
            fix="build both for the same classes, e.g. --student-arch NAME,num_classes="
            f"{teacher.num_classes}",
        )
    if blocks == 0:
        return _cut_both(teacher, student, [])
    if pairs is not None:
        return _align_by_name(teacher, student, pairs)
    rows, columns = _candidates(teacher), _candidates(student)
    _check_kinds(teacher, student, rows, columns)
    count = _number_of_blocks(rows, columns, blocks)
    costs = _grid_of_costs(rows, columns, teacher, student, count)
    path = _cheapest_chain(costs, len(rows), len(columns), count)
    if path is None:
        raise AlignmentError(
            f"no {count} boundaries of {student.name} have a partner in {teacher.name}.",
            student=", ".join(map(str, columns)),
            teacher=", ".join(map(str, rows)),
            fix="ask for fewer with --blocks, or name them with --pair TEACHER=STUDENT",
        )
    boundaries = [
        Boundary(rows[i], columns[j], costs[i, j], _runner_up(costs, rows, columns, path, depth))
        for depth, (i, j) in enumerate(path)
    ]
    return _cut_both(teacher, student, boundaries)


def _align_by_name(teacher: Trace, student: Trace, pairs: Sequence[tuple[str, str]]) -> Alignment:
    by_name = [{point.name: point for point in find_cut_points(t)} for t in (teacher, student)]
    unknown = CutPoint("", (0,), "vector", 1.0, 0.0, False, False)
    boundaries = []
    for names in pairs:
        points = [
            known.get(name, replace(unknown, name=name))
            for known, name in zip(by_name, names, strict=True)
        ]
        boundaries.append(Boundary(points[0], points[1], {"by hand": 0.0}))
    return _cut_both(teacher, student, boundaries)


def _cut_both(teacher: Trace, student: Trace, boundaries: Sequence[Boundary]) -> Alignment:
    return Alignment(
        cut(teacher, tuple(boundary.teacher for boundary in boundaries)),
        cut(student, tuple(boundary.student for boundary in boundaries)),
        tuple(boundaries),
    )


def _candidates(trace: Trace) -> list[CutPoint]:
    """One cut point per residual junction (per layer where there are none), and the last one.

    Cut points with the same compute behind them are one choice; it is taken after the
    activation and before any pooling. A vector is a choice only where no map or token is left.
    """
    points = [point for point in find_cut_points(trace) if point.kind != "vector"]
    points = points or list(find_cut_points(trace))
    classes = []
    for _, members in groupby(points, key=lambda point: point.progress):
        first, *rest = members
        classes.append(([first] + [point for point in rest if point.shape == first.shape])[-1])
    classes = [point for point in classes if point.progress > 0]
    junctions = [point for point in classes[:-1] if point.is_junction]
    return (junctions or classes[:-1]) + classes[-1:]


def _number_of_blocks(
    rows: list[CutPoint], columns: list[CutPoint], asked: int | Literal["auto"]
) -> int:
    most = min(len(rows), len(columns))
    if asked != "auto":
        if not 1 <= asked <= most:
            raise AlignmentError(
                f"--blocks {asked} asks for {asked} boundaries; these two models have 1 to {most}.",
                fix=f"--blocks {most} or fewer",
            )
        return asked
    stages = min(len({point.shape[1:] for point in points}) for points in (rows, columns))
    return min(stages if stages > 1 else MAX_BLOCKS_WITHOUT_STAGES, most)


def _check_kinds(
    teacher: Trace, student: Trace, rows: list[CutPoint], columns: list[CutPoint]
) -> None:
    kinds = [{point.kind for point in points} for points in (rows, columns)]
    if not kinds[0] & kinds[1]:
        offered = [" and ".join(sorted(kind)) or "nothing" for kind in kinds]
        raise AlignmentError(
            f"no cut point of {student.name} is of a kind that {teacher.name} offers.",
            student=offered[1],
            teacher=offered[0],
            fix="train with plain distillation instead: --method kd",
        )


Costs = dict[tuple[int, int], dict[str, float]]


def _grid_of_costs(
    rows: list[CutPoint], columns: list[CutPoint], teacher: Trace, student: Trace, count: int
) -> Costs:
    """What every admissible pair costs, term by term; far resolutions only if nothing else fits."""
    ends = [_stage_ends(points) for points in (rows, columns)]
    for max_ratio in (1.0, 2.0, float("inf")):
        costs: Costs = {}
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                if row.kind != column.kind or _octaves(row, column) > max_ratio:
                    continue
                costs[i, j] = {
                    "resolution": 0.5 * _octaves(row, column),
                    "progress": abs(row.progress - column.progress),
                    "activation": 0.05 * (row.is_rectified != column.is_rectified),
                    "adapter": 0.1 * _adapter_share(row, column, columns),
                    "stage end": 0.25 * ((i not in ends[0]) + (j not in ends[1])),
                }
        if _cheapest_chain(costs, len(rows), len(columns), count):
            return costs
    return costs


def _stage_ends(points: list[CutPoint]) -> set[int]:
    """The last point at each resolution; every point where the resolution never changes."""
    last = {point.shape[1:]: index for index, point in enumerate(points)}
    return set(last.values()) if len(last) > 1 else set(range(len(points)))


def _octaves(row: CutPoint, column: CutPoint) -> float:
    """How many halvings lie between two resolutions (or token counts)."""
    sizes = [max(1, point.shape[-1 if point.kind == "map" else 0]) for point in (row, column)]
    return abs(log2(sizes[0] / sizes[1])) if row.kind != "vector" else 0.0


def _adapter_share(row: CutPoint, column: CutPoint, columns: list[CutPoint]) -> float:
    """Width of a channel map relative to the widest pair, a stand-in for its multiply-adds."""
    width = row.shape[0] * column.shape[0]
    return width / max(row.shape[0] * other.shape[0] for other in columns)


def _cheapest_chain(
    costs: Costs, num_rows: int, num_columns: int, count: int
) -> list[tuple[int, int]] | None:
    """The ``count`` pairs of least total cost, rising in both models, ending at the last pair.

    A node (taken, row, column) of the grid has edges that skip a row, skip a column, or take the
    pair; only taking costs. Dijkstra over at most count × rows × columns nodes.
    """
    last = (num_rows - 1, num_columns - 1)
    if last not in costs or count < 1:
        return None
    grid = nx.DiGraph()
    grid.add_node((0, 0, 0))
    for taken in range(count):
        for i in range(num_rows):
            for j in range(num_columns):
                here = (taken, i, j)
                if i < last[0]:
                    grid.add_edge(here, (taken, i + 1, j), cost=0.0)
                if j < last[1]:
                    grid.add_edge(here, (taken, i, j + 1), cost=0.0)
                may_take = (i, j) == last if taken == count - 1 else i < last[0] and j < last[1]
                if may_take and (i, j) in costs:
                    cost = sum(costs[i, j].values())
                    grid.add_edge(here, (taken + 1, i + 1, j + 1), cost=cost)
    goal = (count, num_rows, num_columns)
    try:
        steps = nx.dijkstra_path(grid, (0, 0, 0), goal, weight="cost")
    except (nx.NetworkXNoPath, nx.NodeNotFound):
        return None
    moves = pairwise(steps)
    return [(i, j) for (taken, i, j), (after, _, _) in moves if after > taken]


def _runner_up(
    costs: Costs,
    rows: list[CutPoint],
    columns: list[CutPoint],
    path: list[tuple[int, int]],
    depth: int,
) -> RunnerUp | None:
    without = {pair: terms for pair, terms in costs.items() if pair != path[depth]}
    other = _cheapest_chain(without, len(rows), len(columns), len(path))
    if other is None:
        return None
    extra = sum(sum(costs[pair].values()) for pair in other)
    extra -= sum(sum(costs[pair].values()) for pair in path)
    i, j = other[depth]
    return RunnerUp(rows[i], columns[j], extra)
