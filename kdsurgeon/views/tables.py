"""Tables for a terminal: rich renderables that stay readable from 80 columns up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kdsurgeon.alignment import Boundary
from kdsurgeon.partitioning import CutPoint, cut, find_cut_points
from kdsurgeon.stones import Certificate, Forecast, Plan
from kdsurgeon.tracing import Trace
from kdsurgeon.views import units
from kdsurgeon.views.blocks import BlockFacts, describe_blocks


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


def cut_points_table(trace: Trace) -> RenderableType:
    """Every cut point of a model, from input to logits, under a line on the model itself."""
    points = find_cut_points(trace)
    cost = cut(trace, ()).cost
    title = (
        f"{units.printable(trace.name)}  {units.count(cost.parameters)} parameters, "
        f"{units.count(cost.multiply_adds)} multiply-adds for one {trace.takes} input"
    )
    lines = [
        Text(title, "bold"),
        Text(f"traced by {trace.rung}, {len(points)} cut points; ● branches have just met"),
        *(Text(f"lost in the trace: {loss}", "yellow") for loss in trace.lost),
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cut point")
    for header in ("shape", "kind", "grid", "compute before it"):
        table.add_column(header, justify="left" if header == "kind" else "right", no_wrap=True)
    table.add_column("●", justify="center", no_wrap=True)
    for point in points:
        table.add_row(
            _Name(point.name),
            " + ".join(units.shape(tensor.shape) for tensor in point.tensors),
            point.kind,
            _grid(point),
            units.percent(point.progress),
            "●" if point.is_junction else "",
        )
    return Group(*lines, table)


def _grid(point: CutPoint) -> str:
    """Height and width of what the positions stand for, and how many tokens stand before them."""
    if point.main.grid is None:
        return units.UNKNOWN
    return units.shape(point.main.grid) + (f" + {point.main.prefix}" if point.main.prefix else "")


def plan_table(
    plan: Plan, forecast: Forecast, certificate: Certificate | None = None
) -> RenderableType:
    """The aligned blocks with their adapters and stones, what a step costs, and the proof.

    Each row is a block of both models: the node it ends at, that node's shape, and the block's
    share of its model's multiply-adds; then the adapter and the weight of the stone there.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    table.add_column("block", no_wrap=True)
    table.add_column(_side("teacher", plan.teacher.trace.name))
    table.add_column("adapter")
    table.add_column(_side("student", plan.student.trace.name))
    table.add_column("stone\nweight", justify="right", no_wrap=True)
    teacher, student = describe_blocks(plan.teacher), describe_blocks(plan.student)
    for left, right, stone in zip(teacher, student, [*plan.stones, None], strict=True):
        table.add_row(
            left.label,
            _block_cell(left),
            Text(f"← {stone}") if stone else "",
            _block_cell(right),
            units.weight(stone.weight) if stone else "",
        )
    legend = "each block: its last node, that node's shape, its share of the model's multiply-adds"
    lines = _labelled(closing_lines(forecast, certificate))
    return Group(Text(legend, "dim"), table, _sizes(plan), "", lines)


def _side(role: str, name: str) -> RenderableType:
    return role if name == role else Group(Text(role), _Name(name))


def _block_cell(block: BlockFacts) -> Group:
    where = f"{units.shape(block.shape)} · {units.compute(block.share)}"
    return Group(_Name(block.end), Text(where, "dim", no_wrap=True))


def _sizes(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    table.add_row("", "teacher", "student", "ratio", style="dim")
    for row in size_rows(plan):
        table.add_row(*row)
    return table


def _labelled(lines: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for label, text in lines.items():
        table.add_row(label, Text(text))
    return table


def size_rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Parameters and multiply-adds of teacher and student, and how many times fewer they are."""
    teacher, student = plan.teacher.cost, plan.student.cost
    return [
        (label, units.count(left), units.count(right), units.ratio(left, right))
        for label, left, right in (
            ("parameters", teacher.parameters, student.parameters),
            ("multiply-adds", teacher.multiply_adds, student.multiply_adds),
        )
    ]


def closing_lines(forecast: Forecast, certificate: Certificate | None) -> dict[str, str]:
    """What a training step costs with the stones, and what the check of the surgery found."""
    added = units.count(forecast.adapter_parameters)
    lines = {
        "forecast": f"one step costs {forecast.ratio:.2f} × plain distillation and keeps "
        f"{forecast.memory_ratio:.2f} × its activations "
        f"({units.size(forecast.with_stones_bytes)} a sample); "
        f"{added} adapter parameters while training"
    }
    if certificate is not None:
        proof = certificate
        lines["check"] = (
            "rebuilt from blocks, largest gap: "
            f"teacher {units.gap(max(proof.teacher_evaluation, proof.teacher_training))}, "
            f"student {units.gap(max(proof.student_evaluation, proof.student_training))} "
            "(evaluation; a training step with its gradients); "
            f"tails on the teacher's own tensors {units.gap(proof.splice)}; "
            f"merged tails {units.gap(proof.merged)}; "
            f"gradients of {proof.stones} stones right"
        )
    return lines


def explain_table(plan: Plan) -> RenderableType:
    """Why each boundary is where it is: its cost by term, and the runner-up with what it adds.

    "at" is the share of the model's multiply-adds that is spent up to there.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    table.add_column("boundary", no_wrap=True)
    table.add_column("chosen\nteacher, then student")
    table.add_column("evidence", no_wrap=True)
    table.add_column("runner-up\nteacher, then student")
    table.add_column("adds", justify="right", no_wrap=True)
    for depth, boundary in enumerate(plan.alignment.boundaries, start=1):
        other = boundary.runner_up
        table.add_row(
            str(depth),
            _pair_cell(boundary.teacher, boundary.student),
            _evidence(boundary),
            _pair_cell(other.teacher, other.student) if other else Text("none", "dim"),
            f"{other.extra_cost:+.3f}" if other else "",
        )
    return table


def _pair_cell(teacher: CutPoint, student: CutPoint) -> Group:
    lines: list[RenderableType] = []
    for point in (teacher, student):
        where = f"{units.shape(point.shape)} at {units.compute(point.progress)}"
        lines += [_Name(point.name), Text(where, "dim", no_wrap=True)]
    return Group(*lines)


def _evidence(boundary: Boundary) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    for term, value in boundary.evidence.items():
        grid.add_row(term, f"{value:.3f}", style="" if value else "dim")
    grid.add_row("cost", f"{boundary.cost:.3f}", style="bold")
    return grid


def accuracy_table(report: Accuracies) -> RenderableType:
    """Accuracy and agreement with the teacher: teacher, student, and every stone by its depth."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"on {report.samples:,} samples")
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("agrees with teacher", justify="right", no_wrap=True)
    for name, accuracy, agreement in accuracy_rows(report):
        table.add_row(name, accuracy, agreement)
    return table


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
