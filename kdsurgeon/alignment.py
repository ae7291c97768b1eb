"""Pair the student's cut points with the teacher's, in order, by a shortest path.

A boundary pairs one cut point of each model; a chain of boundaries is a monotone path through the
grid of candidate pairs, and the cheapest chain is a shortest path in that grid. The last boundary
is fixed: it stands before both heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import inf, log2
from typing import Any, Literal

import networkx as nx

from kdsurgeon.errors import AlignmentError, PlanError, UsageError
from kdsurgeon.layouts import Activation
from kdsurgeon.partitioning import CutPoint, Partition, cut, find_cut_points
from kdsurgeon.tracing import Trace, describe

MAX_BLOCKS_WITHOUT_STAGES = 4  # isotropic networks: equal groups of compute
MAX_CANDIDATES = 32  # of one model, evenly spread over its compute
_OCTAVES = (1.0, 2.0, inf)  # how far resolutions may lie apart, relaxed in this order

Similarity = Mapping[tuple[str, str], float]


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
    """Two partitions with equally many cuts, boundary by boundary.

    ``relaxed`` says which wish had to be given up to find any chain.
    """

    teacher: Partition
    student: Partition
    boundaries: tuple[Boundary, ...]
    relaxed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.boundaries) == len(self.teacher.cuts) == len(self.student.cuts)


def align(
    teacher: Trace,
    student: Trace,
    *,
    blocks: int | Literal["auto"] = "auto",
    pairs: Sequence[tuple[str, str]] | None = None,
    similarity: Callable[[Sequence[CutPoint], Sequence[CutPoint]], Similarity] | None = None,
) -> Alignment:
    """Cut both models at paired places.

    Args:
        blocks: how many boundaries (and stepping stones); ``"auto"`` is one per resolution stage,
            or four groups of equal compute where the resolution never changes; 0 pairs nothing.
        pairs: names of (teacher cut point, student cut point) to use instead of searching; the
            tensors of a wide cut point are joined by " + ", in any order.
        similarity: how alike the candidates of both models are, from 0 to 1, by name; such as
            :func:`kdsurgeon.similarity.probe` measures.

    Raises:
        UsageError: ``blocks`` or ``pairs`` is of another type.
        AlignmentError: the models differ in classes, or share no usable boundary.
        PlanError: a hand-named pair is unknown, not a cut point, given twice, or out of order.
    """
    check_wishes(blocks, pairs)
    for each in (teacher, student):
        _check_logits(each)
    if teacher.num_classes == 1:
        raise AlignmentError(
            f"{teacher.name} has one logit, and one class alone teaches nothing.",
            why="a softmax over one logit is always 1",
            fix="give it two classes: two logits, no and yes",
        )
    if teacher.num_classes != student.num_classes:
        raise AlignmentError(
            f"{teacher.name} has {teacher.num_classes} classes, "
            f"{student.name} has {student.num_classes}.",
            fix="build both for the same classes, e.g. --student-arch NAME,num_classes="
            f"{teacher.num_classes}; a model that returns features needs its classifier",
        )
    if blocks == 0:
        return _cut_both(teacher, student, [])
    if pairs is not None:
        return _align_by_name(teacher, student, pairs)
    rows, columns, relaxed = _offers(teacher, student)
    alike = similarity(rows, columns) if similarity else {}
    count = _number_of_blocks(rows, columns, blocks)
    while True:
        found = _search(rows, columns, count, alike)
        if found is not None or blocks != "auto" or count == 1:
            break
        count -= 1
    if found is None:
        raise AlignmentError(
            f"no {count} boundaries of {student.name} have a partner in {teacher.name}.",
            student=", ".join(map(str, columns)),
            teacher=", ".join(map(str, rows)),
            fix="ask for fewer with --blocks, name them with --pair TEACHER=STUDENT, or train with "
            "plain distillation: --method kd",
        )
    costs, path, octaves = found
    boundaries = [
        Boundary(
            rows[i], columns[j], costs[depth, i, j], _runner_up(costs, rows, columns, path, depth)
        )
        for depth, (i, j) in enumerate(path)
    ]
    relaxed += () if octaves == _OCTAVES[0] else (_relaxation(octaves),)
    return _cut_both(teacher, student, boundaries, relaxed)


def check_wishes(blocks: Any, pairs: Any) -> None:
    """Raises :class:`UsageError` where these are not what :func:`align` takes.

    >>> check_wishes(2, [("layer1", "blocks.0")])
    >>> check_wishes("2", None)
    Traceback (most recent call last):
    kdsurgeon.errors.UsageError: blocks is '2'.
      fix: give "auto" or a whole number: blocks=4; 0 plans no boundary
    """
    if blocks != "auto" and (isinstance(blocks, bool) or not isinstance(blocks, int)):
        raise UsageError(
            f"blocks is {blocks!r}.",
            fix='give "auto" or a whole number: blocks=4; 0 plans no boundary',
        )
    if pairs is None:
        return
    is_list = isinstance(pairs, list | tuple) and bool(pairs)
    if not is_list or not all(map(_is_pair, pairs)):
        raise UsageError(
            "pairs must be a list of (teacher cut point, student cut point), each a name.",
            given=repr(pairs)[:80],
            fix='e.g. pairs=[("layer1", "blocks.0"), ("a + b", "pool")]',
        )


def _is_pair(pair: Any) -> bool:
    is_two = isinstance(pair, list | tuple) and len(pair) == 2
    return is_two and all(isinstance(name, str) for name in pair)


def _offers(
    teacher: Trace, student: Trace
) -> tuple[list[CutPoint], list[CutPoint], tuple[str, ...]]:
    """What may stand at a boundary of either, and the wish that was given up for it.

    A network without places, such as an MLP, meets another behind that one's pooling only.
    """
    pooled = _has_pooled_head(teacher) and _has_pooled_head(student)
    rows, columns = (candidates(each, pooled=pooled) for each in (teacher, student))
    if _can_end(rows, columns):
        return rows, columns, ()
    flat_rows, flat_columns = (_vectors(each) for each in (teacher, student))
    if _can_end(flat_rows, flat_columns):
        return flat_rows, flat_columns, ("no maps or tokens can be paired; vectors were allowed",)
    raise _nothing_in_common(teacher, student, rows, columns)


def _check_logits(trace: Trace) -> None:
    value = trace.logits.meta["val"]
    if value.ndim != 2 or not value.is_floating_point():
        raise AlignmentError(
            f"{trace.name} does not return one tensor of logits (batch, classes).",
            returned=describe(value),
            fix="wrap it in a module whose forward returns the logits alone",
        )


def _relaxation(octaves: float) -> str:
    far = "any ratio" if octaves == inf else f"a ratio of {2**octaves:g}"
    return f"too few pairs lie within a ratio of 2 in resolution; {far} was allowed"


def _align_by_name(teacher: Trace, student: Trace, pairs: Sequence[tuple[str, str]]) -> Alignment:
    rows = _points_by_name(teacher, [name for name, _ in pairs])
    columns = _points_by_name(student, [name for _, name in pairs])
    boundaries = [
        Boundary(row, column, {"by hand": 0.0}) for row, column in zip(rows, columns, strict=True)
    ]
    return _cut_both(teacher, student, boundaries)


def _points_by_name(trace: Trace, names: Iterable[str]) -> list[CutPoint]:
    """The cut points of these names, their tensors in any order."""
    known = {frozenset(point.names): point for point in find_cut_points(trace)}
    found: list[CutPoint] = []
    for name in names:
        parts = [part.strip() for part in name.split(" + ")]
        point = known.get(frozenset(parts)) if len({*parts}) == len(parts) else None
        if point is not None and point in found:
            raise PlanError(
                f"{point.name} of {trace.name} is given twice.",
                why="every boundary cuts a model at a place of its own",
                fix="leave one of the two out, or name another cut point",
            )
        found.append(point or _unknown(parts))
    return found


def _unknown(parts: Sequence[str]) -> CutPoint:
    """A cut point that the partition will refuse by name."""
    return CutPoint(tuple(Activation(part, (1,), "BC") for part in parts), 0.0, False)


def _cut_both(
    teacher: Trace,
    student: Trace,
    boundaries: Sequence[Boundary],
    relaxed: tuple[str, ...] = (),
) -> Alignment:
    return Alignment(
        cut(teacher, tuple(boundary.teacher for boundary in boundaries)),
        cut(student, tuple(boundary.student for boundary in boundaries)),
        tuple(boundaries),
        relaxed,
    )


def candidates(trace: Trace, *, pooled: bool = False) -> list[CutPoint]:
    """One cut point per residual junction (per layer where there are none), and the last one.

    Cut points with the same compute behind them are one choice; it is taken after the activation
    and before any pooling. What follows the last mixing of positions is the head: single positions
    are a choice only if ``pooled`` maps are asked for, or where no map or tokens are left.
    """
    found = _unclassified(trace)
    least = 1 if pooled else 2
    return _choices([point for point in found if _has_positions(point, least)] or found)


def _vectors(trace: Trace) -> list[CutPoint]:
    """As :func:`candidates`, of what has no places: an MLP, or what follows a pooling."""
    found = _unclassified(trace)
    return _choices([p for p in found if all(each.kind == "vector" for each in p.tensors)])


def _choices(points: list[CutPoint]) -> list[CutPoint]:
    upright = [point for point in points if not _is_stretched(point)]
    points = upright if len(upright) > MAX_BLOCKS_WITHOUT_STAGES else points
    classes: list[CutPoint] = []
    for progress, members in groupby(points, key=lambda point: point.progress):
        first, *rest = members
        alike = [point for point in rest if point.main.positions >= first.main.positions]
        if progress > 0:
            classes.append([first, *alike][-1])
    classes = classes or points[-1:]
    last = [_end_of_trunk(classes)] if classes else []
    inner = [point for point in classes if last and point.progress < last[0].progress]
    junctions = [point for point in inner if point.is_junction]
    return _thinned(_unit_ends(junctions) or inner, MAX_CANDIDATES - 1) + last


def _unclassified(trace: Trace) -> list[CutPoint]:
    return [point for point in find_cut_points(trace) if not _is_classified(point, trace)]


def _is_classified(point: CutPoint, trace: Trace) -> bool:
    """Whether nothing is left to compute and these are logits already, of several heads perhaps."""
    return point.progress >= 1 and point.main.shape[-1] == trace.num_classes


def _has_positions(point: CutPoint, least: int) -> bool:
    return all(each.kind != "vector" and each.positions >= least for each in point.tensors)


def _is_stretched(point: CutPoint) -> bool:
    """Whether rows and columns of a map are rather windows and what is in them."""
    height, width = point.main.grid or (1, 1)
    return point.kind == "map" and max(height, width) > 4 * min(height, width)


def _end_of_trunk(points: list[CutPoint]) -> CutPoint:
    """The last point; where that has several tensors, the last one nearby that has fewest."""
    near = [point for point in points if point.progress >= 0.9 * points[-1].progress]
    fewest = min(point.width for point in near)
    return [point for point in near if point.width == fewest][-1]


def _has_pooled_head(trace: Trace) -> bool:
    """Whether layers follow on a map of one position: pairable with another such head only."""
    spatial = [point for point in find_cut_points(trace) if point.main.positions > 1]
    end = spatial[-1].progress if spatial else 0.0
    maps = [point for point in find_cut_points(trace) if point.kind == "map"]
    return any(point.main.positions == 1 and point.progress > end for point in maps)


def _unit_ends(points: list[CutPoint]) -> list[CutPoint]:
    """Of the junctions in one module (attention, then MLP) the last."""
    last = {_unit(point): point for point in points}
    return [point for point in points if last[_unit(point)] is point]


def _unit(point: CutPoint) -> tuple[str, int, int]:
    scope = point.main.name.rpartition(".")[0]
    return (scope or point.main.name, point.main.channels, point.main.positions)


def _thinned(points: list[CutPoint], most: int) -> list[CutPoint]:
    """At most so many, evenly spread over the compute; the last of every resolution stays."""
    if len(points) <= most:
        return points
    ends = _stage_ends(points)
    kept = set(sorted(ends)[-most:])
    for step in range(most):
        if len(kept) == most:
            break
        wanted = (step + 1) / (most + 1)
        free = [index for index in range(len(points)) if index not in kept]
        kept.add(min(free, key=lambda index: abs(points[index].progress - wanted)))
    return [point for index, point in enumerate(points) if index in kept]


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
    stages = [len({_resolution(point) for point in points}) for points in (rows, columns)]
    fewest = min(stages) if min(stages) > 1 else MAX_BLOCKS_WITHOUT_STAGES
    return min(fewest, most)


def _can_end(rows: list[CutPoint], columns: list[CutPoint]) -> bool:
    """Whether the two last ones pair, as those of every chain do."""
    return bool(rows and columns) and _can_pair(rows[-1], columns[-1])


def _nothing_in_common(
    teacher: Trace, student: Trace, rows: list[CutPoint], columns: list[CutPoint]
) -> AlignmentError:
    offered = [sorted({point.main.kind for point in points}) for points in (rows, columns)]
    teacher_offers, student_offers = (
        f"{' and '.join(kinds)} at its cut points" if kinds else "it has no cut point"
        for kinds in offered
    )
    return AlignmentError(
        f"{teacher.name} and {student.name} have no boundary in common.",
        teacher=teacher_offers,
        student=student_offers,
        why="a vector cannot stand for many positions, nor they for it" if all(offered) else None,
        fix="train with plain distillation instead: --method kd",
    )


def _can_pair(row: CutPoint, column: CutPoint) -> bool:
    return all(_source_for(each, column) is not None for each in row.tensors)


def _source_for(target: Activation, column: CutPoint) -> Activation | None:
    """The student's tensor that an adapter would read for ``target``: of the nearest resolution."""
    fitting = [source for source in column.tensors if _is_bridged(target, source)]
    return min(fitting, key=lambda source: _octaves(target, source), default=None)


def _is_bridged(target: Activation, source: Activation) -> bool:
    """Whether an adapter exists: one vector cannot stand for many positions."""
    return (target.kind == "vector") == (source.kind == "vector")


Costs = dict[tuple[int, int, int], dict[str, float]]
Path = list[tuple[int, int]]


def _search(
    rows: list[CutPoint], columns: list[CutPoint], count: int, alike: Similarity
) -> tuple[Costs, Path, float] | None:
    """The cheapest chain; resolutions far apart only if nothing else fits."""
    for octaves in _OCTAVES:
        costs = _grid_of_costs(rows, columns, count, octaves, alike)
        path = _cheapest_chain(costs, len(rows), len(columns), count)
        if path is not None:
            return costs, path, octaves
    return None


def _grid_of_costs(
    rows: list[CutPoint], columns: list[CutPoint], count: int, max_octaves: float, alike: Similarity
) -> Costs:
    """What every admissible pair costs as boundary of each depth, term by term."""
    ends = [_stage_ends(points) for points in (rows, columns)]
    have_stages = all(
        len({_resolution(point) for point in points}) > 1 for points in (rows, columns)
    )
    costs: Costs = {}
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if not _can_pair(row, column):
                continue
            far = _distance(row, column)
            is_last = (i, j) == (len(rows) - 1, len(columns) - 1)
            if far > max_octaves and not is_last:
                continue
            terms = {
                "resolution": 0.5 * far,
                "progress": abs(row.progress - column.progress),
                "kind": _kind_cost(row.main, column.main),
                "width": 0.1 * (row.width + column.width - 2),
                "activation": 0.05 * (row.main.is_rectified != column.main.is_rectified),
                "adapter": 0.1 * _adapter_share(row, column, columns),
                "stage end": 0.25 * ((i not in ends[0]) + (j not in ends[1])) * have_stages,
            }
            if alike:
                terms["dissimilarity"] = 0.5 * (1 - alike[row.name, column.name])
            for depth in range(count):
                balance = abs((row.progress + column.progress) / 2 - (depth + 1) / count)
                costs[depth, i, j] = terms | {"balance": 0.0 if have_stages else 0.5 * balance}
    return costs


def _kind_cost(target: Activation, source: Activation) -> float:
    """Dear where tokens of unknown order stand for a map."""
    if target.kind == source.kind:
        return 0.0
    return 0.25 if target.grid and source.grid else 0.75


def _stage_ends(points: list[CutPoint]) -> set[int]:
    """The last point at each resolution; every point where the resolution never changes."""
    last = {_resolution(point): index for index, point in enumerate(points)}
    return set(last.values()) if len(last) > 1 else set(range(len(points)))


def _resolution(point: CutPoint) -> tuple[int, ...]:
    return point.main.grid or (point.main.positions,)


def _distance(row: CutPoint, column: CutPoint) -> float:
    """How many halvings of the resolution lie between the teacher's tensors and the student's."""
    pairs = [(target, _source_for(target, column)) for target in row.tensors]
    return sum(_octaves(target, source) for target, source in pairs if source) / len(pairs)


def _octaves(target: Activation, source: Activation) -> float:
    """Halvings of the side of a grid, or of the length of a sequence."""
    if target.grid and source.grid:
        areas = [each.grid[0] * each.grid[1] for each in (target, source) if each.grid]
        return abs(log2(areas[0] / areas[1])) / 2
    return abs(log2(target.positions / source.positions))


def _adapter_share(row: CutPoint, column: CutPoint, columns: list[CutPoint]) -> float:
    """Width of a channel map relative to the widest pair, a stand-in for its multiply-adds."""
    return column.main.channels / max(other.main.channels for other in columns)


def _cheapest_chain(costs: Costs, num_rows: int, num_columns: int, count: int) -> Path | None:
    """The ``count`` pairs of least total cost, rising in both models, ending at the last pair.

    A node (taken, row, column) of the grid has edges that skip a row, skip a column, or take the
    pair; only taking costs. Dijkstra over at most count × rows × columns nodes.
    """
    last = (num_rows - 1, num_columns - 1)
    if (count - 1, *last) not in costs:
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
                if may_take and here in costs:
                    cost = sum(costs[here].values())
                    grid.add_edge(here, (taken + 1, i + 1, j + 1), cost=cost)
    goal = (count, num_rows, num_columns)
    try:
        steps = nx.dijkstra_path(grid, (0, 0, 0), goal, weight="cost")
    except (nx.NetworkXNoPath, nx.NodeNotFound):
        return None
    moves = pairwise(steps)
    return [(i, j) for (taken, i, j), (after, _, _) in moves if after > taken]


def _runner_up(
    costs: Costs, rows: list[CutPoint], columns: list[CutPoint], path: Path, depth: int
) -> RunnerUp | None:
    """The best chain without the chosen pair, and its pair at this depth."""
    without = {place: terms for place, terms in costs.items() if place[1:] != path[depth]}
    other = _cheapest_chain(without, len(rows), len(columns), len(path))
    if other is None:
        return None
    extra = _total(costs, other) - _total(costs, path)
    i, j = other[depth]
    return RunnerUp(rows[i], columns[j], extra)


def _total(costs: Costs, path: Path) -> float:
    return sum(sum(costs[depth, i, j].values()) for depth, (i, j) in enumerate(path))
