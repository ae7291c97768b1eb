"""Tables for a terminal: rich renderables that stay readable from 80 columns up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kdsurgeon.alignment import Boundary, candidates
from kdsurgeon.costs import Cost
from kdsurgeon.partitioning import CutPoint, cut, find_cut_points
from kdsurgeon.stones import Certificate, Forecast, Plan, Stone
from kdsurgeon.tracing import Trace
from kdsurgeon.views import units
from kdsurgeon.views.blocks import BlockFacts, describe_blocks, ends_of

_GAP = 3  # columns between two cells


class Accuracies(Protocol):
    """What :func:`accuracy_table` shows; :class:`kdsurgeon.evaluation.Report` is one."""

    @property
    def samples(self) -> int: ...
    @property
    def student(self) -> float: ...
    @property
    def teacher(self) -> float: ...
    @property
    def stones(self) -> Mapping[int, float]: ...
    @property
    def student_agreement(self) -> float: ...
    @property
    def stone_agreement(self) -> Mapping[int, float]: ...
    @property
    def lost(self) -> Mapping[str, float]: ...
    @property
    def weakest(self) -> str | None: ...


@dataclass(frozen=True)
class Row:
    """One model of a comparison; accuracy between 0 and 1, sizes in bytes; None where unknown."""

    name: str
    accuracy: float | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    file_bytes: int | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class _Name:
    """A node's name on one line, shortened in the middle where there is no room for it."""

    text: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(units.middle_cut(self.text, options.max_width), self.style, no_wrap=True)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(8, len(self.text)), len(self.text)).clamp(0, options.max_width)


@dataclass(frozen=True)
class _Sides:
    """Rows of four cells: a label, teacher, student and a number, or one text across all of them.

    Both sides get what their longest name needs, or else half of the room.
    """

    header: tuple[str, str, str, str]
    rows: tuple[tuple[Text, ...], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = [tuple(map(Text, self.header)), *(row for row in self.rows if len(row) == 4)]
        columns = zip(*whole, strict=True)
        first, left, right, last = (max(text.cell_len for text in column) for column in columns)
        room = max(2, options.max_width - first - last - 3 * _GAP)
        left = min(left, max(room // 2, room - right))
        widths = (first, left, min(right, room - left), last)
        yield _line(tuple(Text(text, "bold") for text in self.header), widths)
        yield Text("─" * (sum(widths) + 3 * _GAP), "dim")
        for row in self.rows:
            indented = Padding(row[0], (0, 0, 0, first + _GAP))
            yield _line(row, widths) if len(row) == 4 else indented


def _line(cells: tuple[Text, ...], widths: tuple[int, ...]) -> Text:
    """The cells side by side, the last at the right; each shortened in the middle to its width."""
    line = Text(no_wrap=True)
    for cell, width in zip(cells[:3], widths, strict=False):
        shown = Text(units.middle_cut(cell.plain, width), cell.style)
        shown.truncate(width, pad=True)
        line.append_text(shown).append(" " * _GAP)
    line.append(cells[3].plain.rjust(widths[3]))
    line.rstrip()
    return line


def cut_points_table(trace: Trace, *, all: bool = False) -> RenderableType:
    """The cut points of a model, from input to logits, under lines on the model itself.

    Those that boundaries are chosen from, or ``all``. A cut of several tensors has a line for each.
    """
    points = find_cut_points(trace)
    chosen = {*candidates(trace), *candidates(trace, pooled=True)}
    shown = [point for point in points if all or point in chosen]
    cost = cut(trace, ()).cost
    sizes = f"{', '.join(_sizes(cost))} for one input of {trace.takes}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cut point")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("compute\nbefore it", justify="right", no_wrap=True)
    if all:
        table.add_column("●", no_wrap=True)
    before = ""
    for point in shown:
        spent = units.compute(point.progress, 1)
        ends = ends_of(point)
        table.add_row(
            Group(*(_Name(f"{'+ ' * (i > 0)}{end.name}") for i, end in enumerate(ends))),
            "\n".join(end.layout for end in ends),
            "″" if spent == before else spent,
            *(["●" if point in chosen else ""] if all else []),
        )
        before = spent
    return Group(
        Text(units.printable(trace.name), "bold"),
        Text(sizes),
        Text(_how_many(trace, len(points), len(shown), all)),
        *(Text(f"lost in the trace: {units.printable(loss)}", "yellow") for loss in trace.lost),
        table,
    )


def _how_many(trace: Trace, number: int, shown: int, is_all: bool) -> str:
    text = f"traced by {trace.rung}; {number} cut point{'' if number == 1 else 's'}"
    if is_all:
        return f"{text}, ● boundaries are chosen from these"
    rest = ", the rest with --all" if shown < number else ""
    return f"{text}, boundaries from these {shown}{rest}"


def plan_table(
    plan: Plan, forecast: Forecast, certificate: Certificate | None = None
) -> RenderableType:
    """The aligned blocks with their adapters and stones, what a step costs, and the proof.

    Each block of both models: the tensor it ends at, its layout, and the block's share of its
    model's multiply-adds; then the adapters that lead from the student's to the teacher's tensors,
    and the weight of the stone there.
    """
    rows: list[tuple[Text, ...]] = []
    blocks = zip(describe_blocks(plan.teacher), describe_blocks(plan.student), strict=True)
    for (left, right), stone in zip(blocks, [*plan.stones, None], strict=True):
        weight = units.weight(stone.weight) if stone else ""
        cells = zip_longest(_block_lines(left), _block_lines(right), fillvalue=Text())
        rows += _labelled_rows(left.label, list(cells), weight)
        rows += [(Text(line),) for line in _adapter_lines(stone, right)]
        rows.append((Text(),))
    sizes = zip(_sizes(plan.teacher.cost), _sizes(plan.student.cost), strict=True)
    rows += _labelled_rows("all", [(Text(left), Text(right)) for left, right in sizes], "")
    header = ("block", *_sides(plan), "weight")
    legend = "each block: its last node, the shape there, its share of all multiply-adds"
    facts = _labelled(closing_lines(plan, forecast, certificate))
    return Group(Text(legend, "dim"), Text(), _Sides(header, tuple(rows)), Text(), facts)


def _sides(plan: Plan) -> tuple[str, str]:
    return (
        _side("teacher", plan.teacher.trace.name),
        _side("student", plan.student.trace.name),
    )


def _side(role: str, name: str) -> str:
    return role if name == role else f"{role} {units.printable(name)}"


def _labelled_rows(
    label: str, cells: Sequence[tuple[Text, Text]], number: str
) -> list[tuple[Text, ...]]:
    """The label and the number stand on the first line only."""
    return [
        (Text(label if index == 0 else ""), *pair, Text(number if index == 0 else ""))
        for index, pair in enumerate(cells)
    ]


def _block_lines(block: BlockFacts) -> list[Text]:
    lines = []
    for index, end in enumerate(block.ends):
        share = f" · {units.compute(block.share)}" if index == 0 else ""
        lines += [Text(f"{'+ ' * (index > 0)}{end.name}"), Text(f"{end.layout}{share}", "dim")]
    return lines


def _adapter_lines(stone: Stone | None, student: BlockFacts) -> list[str]:
    """Each adapter; where the student offers several tensors, with the one that it reads."""
    if stone is None:
        return []
    is_wide = len(student.ends) > 1
    return [
        f"← {spec}{f' of {units.printable(spec.source.name)}' if is_wide else ''}"
        for spec in stone.adapters
    ]


def _sizes(cost: Cost) -> tuple[str, str]:
    return (
        f"{units.count(cost.parameters)} parameters",
        f"{units.count(cost.multiply_adds)} multiply-adds",
    )


def _labelled(lines: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for label, text in lines.items():
        table.add_row(label, Text(text))
    return table


def closing_lines(
    plan: Plan, forecast: Forecast, certificate: Certificate | None
) -> dict[str, str]:
    """How much smaller the student is, what a step costs, and what the check of surgery found."""
    teacher, student = plan.teacher.cost, plan.student.cost
    kept = units.ratio(forecast.with_stones_bytes, forecast.distillation_bytes)
    lines = {
        "student": f"{units.ratio(teacher.parameters, student.parameters)} fewer parameters, "
        f"{units.ratio(teacher.multiply_adds, student.multiply_adds)} fewer multiply-adds",
        "forecast": f"one step: {forecast.time_ratio:.2f} × CPU time, {kept} activations of plain "
        f"distillation ({units.size(forecast.with_stones_bytes)} a sample)",
        "adapters": f"{units.count(forecast.adapter_parameters)} parameters, gone after training",
    }
    if len(forecast.depths) < len(plan.stones):
        lines["stones"] = _trained(plan, forecast)
    if certificate is None:
        return lines
    proof = certificate
    lines["check"] = (
        "rebuilt from blocks, largest gap: "
        f"teacher {units.gap(max(proof.teacher_evaluation, proof.teacher_training))}, "
        f"student {units.gap(max(proof.student_evaluation, proof.student_training))}"
    )
    if plan.stones:
        lines["tails"] = (
            f"largest gap: {units.gap(proof.splice)} on the teacher's own tensors, "
            f"{units.gap(proof.merged)} when merged"
        )
        lines["gradients"] = (
            f"of {_stones(proof.stones)} reach what comes before them, and nothing after"
            if proof.stones
            else "not checked: a logit is not finite"
        )
    return lines


def _trained(plan: Plan, forecast: Forecast) -> str:
    """Which stones a step has, where it has not all of them."""
    if forecast.depths:
        depths, verb = forecast.depths, "is" if len(forecast.depths) == 1 else "are"
        return f"{len(depths)} of {len(plan.stones)} {verb} trained: {', '.join(map(str, depths))}"
    why = "" if any(stone.weight > 0 for stone in plan.stones) else ": every weight is 0"
    return f"none of {len(plan.stones)} is trained{why}"


def _stones(number: int) -> str:
    return f"{number} stone{'' if number == 1 else 's'}"


def explain_table(plan: Plan) -> RenderableType:
    """Why each boundary is where it is: its cost by term, and the runner-up with what it adds.

    "at" is the share of the model's multiply-adds that is spent up to there. Terms of no cost are
    left out. Below stands what had to be given up to find any chain.
    """
    rows: list[tuple[Text, ...]] = []
    for depth, pair in enumerate(plan.alignment.boundaries, start=1):
        rows += _point_rows(str(depth), pair.teacher, pair.student, f"{pair.cost:.3f}")
        rows.append((Text(f"= {evidence_of(pair)}"),))
        other = pair.runner_up
        if other:
            rows += _point_rows("or", other.teacher, other.student, f"{other.extra_cost:+.3f}")
        else:
            rows.append((Text("no other pair fits here", "dim"),))
        rows.append((Text(),))
    header = ("", *_sides(plan), "cost")
    relaxed = [Text(f"relaxed: {wish}", "yellow") for wish in plan.alignment.relaxed]
    return Group(Text(), _Sides(header, tuple(rows)), *relaxed)


def _point_rows(
    label: str, teacher: CutPoint, student: CutPoint, number: str
) -> list[tuple[Text, ...]]:
    cells = zip_longest(_point_lines(teacher), _point_lines(student), fillvalue=Text())
    return _labelled_rows(label, list(cells), number)


def _point_lines(point: CutPoint) -> list[Text]:
    names, layouts = zip(*ends_of(point), strict=True)
    where = f"{' + '.join(layouts)} at {units.compute(point.progress)}"
    lines = [Text(f"{'+ ' * (index > 0)}{name}") for index, name in enumerate(names)]
    return [*lines, Text(where, "dim")]


def evidence_of(boundary: Boundary) -> str:
    """The terms of its cost, the largest first; those that cost nothing are left out."""
    terms = sorted(boundary.evidence.items(), key=lambda term: -term[1])
    shown = [f"{name} {value:.3f}" for name, value in terms if value >= 0.0005]
    if "by hand" in boundary.evidence:
        return "by hand"
    return " + ".join(shown) or "nothing against it"


def accuracy_table(report: Accuracies) -> RenderableType:
    """Accuracy and agreement with the teacher: teacher, student, and every stone by its depth."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"on {report.samples:,} samples")
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("agrees with teacher", justify="right", no_wrap=True)
    for name, accuracy, agreement in accuracy_rows(report):
        table.add_row(name, accuracy, agreement)
    finding = accuracy_finding(report)
    return Group(table, Text(finding)) if finding else table


def accuracy_finding(report: Accuracies) -> str | None:
    """Which part of the student loses most of what the teacher knows; None without stones."""
    if not report.lost:
        return None
    if report.weakest is None:
        return "no block of the student stands out: none loses more than chance would"
    points = 100 * report.lost[report.weakest]
    return f"most is lost in {report.weakest} of the student: {points:.1f} points of agreement"


def accuracy_rows(report: Accuracies) -> list[tuple[str, str, str]]:
    """The rows of :func:`accuracy_table` as text."""
    rows = [
        ("teacher", units.percent(report.teacher), units.UNKNOWN),
        ("student", units.percent(report.student), units.percent(report.student_agreement)),
    ]
    for depth, accuracy in sorted(report.stones.items()):
        agreement = units.percent(report.stone_agreement[depth])
        rows.append((f"stone {depth}", units.percent(accuracy), agreement))
    return rows


def comparison_table(rows: Sequence[Row]) -> RenderableType:
    """Models side by side, one per row, numbers right-aligned and a dash where one is unknown."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for header in ("accuracy", "parameters", "multiply-adds", "file", "latency"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(row.name),
            units.percent(row.accuracy),
            units.count(row.parameters),
            units.count(row.multiply_adds),
            units.size(row.file_bytes),
            units.milliseconds(row.latency_ms),
        )
    return table
