"""Self-contained pages without scripts or links: a plan, and a run with its curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from kdsurgeon.stones import Certificate, Forecast, Plan
from kdsurgeon.views import units
from kdsurgeon.views.blocks import BlockFacts, describe_blocks
from kdsurgeon.views.charts import NARROW as NARROW_CHART
from kdsurgeon.views.charts import WIDE as WIDE_CHART
from kdsurgeon.views.charts import Frame, Points, line_chart
from kdsurgeon.views.classes import Class, class_changes
from kdsurgeon.views.drawing import NARROW, draw_plan
from kdsurgeon.views.page import both, box, facts, page, paragraph, section, table
from kdsurgeon.views.pareto import Rung, on_the_curve, pareto_chart
from kdsurgeon.views.tables import (
    Accuracies,
    Row,
    accuracy_finding,
    accuracy_rows,
    closing_lines,
    evidence_of,
)


def plan_page(plan: Plan, forecast: Forecast, certificate: Certificate | None = None) -> str:
    """A page with the drawing of a plan, its blocks, and why each boundary is where it is."""
    return page(
        f"{plan.teacher.trace.name} → {plan.student.trace.name}",
        facts(closing_lines(plan, forecast, certificate)),
        both(draw_plan(plan, forecast), draw_plan(plan, forecast, form=NARROW)),
        section("Blocks", _blocks(plan)),
        section(
            "Why these boundaries",
            _evidence(plan),
            *(paragraph(f"Relaxed: {wish}.") for wish in plan.alignment.relaxed),
        ),
    )


def run_report(
    title: str,
    *,
    config: str,
    epochs: Sequence[Mapping[str, Any]],
    plan_svg: str | None = None,
    narrow_plan_svg: str | None = None,
    final: Accuracies | None = None,
    teacher_accuracy: float | None = None,
    models: Sequence[Row] = (),
    exported: Sequence[Row] = (),
    exported_epoch: int | None = None,
    classes: Sequence[Class] = (),
    environment: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """A page on one run; every part but the configuration is left out where it is not known.

    Args:
        config: the run's configuration as text.
        epochs: one mapping per epoch with epoch, losses (a mapping), learning_rate, accuracy,
            stones (accuracy by stone), seconds and samples or samples_per_second; whatever is
            missing is left blank.
        plan_svg, narrow_plan_svg: what :func:`draw_plan` gave, for wide pages and for phones; they
            are put in as they are.
        final: accuracies at the end.
        teacher_accuracy: between 0 and 1; a dashed line in the chart of accuracy.
        models: what teacher, student and stones cost and reach at the end of the run.
        exported: the same of files that were written and measured: a ladder with latencies.
        exported_epoch: the epoch that the weights in these files are of, counted from 1.
        classes: name and counts of each class at the end.
        environment: what the run was made with, by name.
        notes: sentences to show under the title, such as how the data was split.
    """
    parts = [_summary(epochs, teacher_accuracy), *map(paragraph, notes)]
    if final is not None or models:
        when = _when(epochs, exported_epoch)
        parts.append(section("At the end", *_closing(final, models), *when))
    written = _written(exported, exported_epoch)
    if pictures := [*_pareto(models, "multiply_adds"), *written]:
        parts.append(section("What accuracy costs", *pictures))
    if epochs:
        parts += _curves(epochs, teacher_accuracy)
    if classes:
        parts.append(section("By class, against the teacher", class_changes(classes)))
    if plan_svg is not None:
        parts.append(section("Plan", _plan(plan_svg, narrow_plan_svg)))
    if epochs:
        parts.append(section("Epochs", *_epochs(epochs)))
    parts.append(section("Configuration", box(f"<pre>{escape(config)}</pre>", "configuration")))
    if environment:
        parts.append(section("Environment", facts(environment)))
    return page(title, *parts)


def _plan(wide: str, narrow: str | None) -> str:
    return both(wide, narrow) if narrow else f'<div class="drawing">{box(wide, "plan")}</div>'


def _summary(epochs: Sequence[Mapping[str, Any]], teacher_accuracy: float | None) -> str:
    found = {}
    if teacher_accuracy is not None:
        found["teacher"] = f"accuracy {units.percent(teacher_accuracy)}"
    measured = [line["accuracy"] for line in epochs if line.get("accuracy") is not None]
    if measured:
        last, best = units.percent(measured[-1]), units.percent(max(measured))
        first = next(line for line in epochs if line.get("accuracy") == max(measured))
        found["student"] = (
            f"accuracy {last} after the last epoch, {best} at best (epoch {first['epoch']})"
        )
    seconds = units.duration(sum(line.get("seconds") or 0.0 for line in epochs))
    number = "1 epoch" if len(epochs) == 1 else f"{len(epochs)} epochs"
    return facts(found | {"training": f"{number} in {seconds}"})


def _closing(final: Accuracies | None, models: Sequence[Row]) -> Iterable[str]:
    """One row for each model: what it reaches and costs first, which a phone still shows."""
    costs = {row.name: row for row in models}
    if final is None:
        header = ("", "accuracy")
        rows = [(row.name, units.percent(row.accuracy)) for row in models]
    else:
        header = (f"on {final.samples:,} samples", "accuracy", "agrees with teacher")
        rows = accuracy_rows(final)
    if models:
        header = (*header[:2], "multiply-adds", "parameters", *header[2:])
        rows = [(*row[:2], *_cost_cells(costs.get(row[0])), *row[2:]) for row in rows]
    yield table(header, rows, words=1, name="closing figures")
    if final is not None and (text := accuracy_finding(final)):
        yield paragraph(f"{text[0].upper()}{text[1:]}.")


def _when(epochs: Sequence[Mapping[str, Any]], exported_epoch: int | None) -> Iterable[str]:
    """Which epoch the closing figures are of, and which the files, where both are shown."""
    if not epochs:
        return
    last = epochs[-1]["epoch"]
    text = f"Measured after epoch {last}, the last."
    if exported_epoch not in (None, last):
        text += f" The exported files are of epoch {exported_epoch}, so they reach other figures."
    yield paragraph(text, kind="faint")


def _cost_cells(row: Row | None) -> tuple[str, str]:
    if row is None:
        return units.UNKNOWN, units.UNKNOWN
    return units.count(row.multiply_adds), units.count(row.parameters)


_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "multiply_adds": ("multiply-adds of one sample", lambda number: _short(units.count(number))),
    "latency_ms": ("latency of one sample, in milliseconds", "{:g}".format),
}


def _short(number: str) -> str:
    """Without the digits that a tick does not need.

    >>> _short("20.0 k"), _short("1.00 M"), _short("1.05 M")
    ('20 k', '1 M', '1.05 M')
    """
    return re.sub(r"\.0+ ", " ", number)


def _pareto(models: Sequence[Row], cost: str) -> Iterable[str]:
    """The picture of accuracy against one cost, where it is known of two models or more."""
    unit, text = _COSTS[cost]
    known = [(row, getattr(row, cost)) for row in models if row.accuracy is not None]
    rungs = [Rung(row.name, spent, row.accuracy) for row, spent in known if spent and row.accuracy]
    if len(rungs) < 2:
        return
    title = f"accuracy against {unit}"

    def draw(frame: Frame) -> str:
        return pareto_chart(rungs, title=title, unit=unit, text=text, frame=frame)

    yield both(draw(WIDE_CHART), draw(NARROW_CHART), kind="chart")
    best = on_the_curve(rungs)
    if len(best) > 1:
        finding = "The line joins what no other beats: none that costs no more is as accurate."
        finding += " Hollow dots lie off it." if len(best) < len(rungs) else ""
    else:
        finding = f"No other is as accurate as {next(iter(best)).name}, and none costs less."
    yield paragraph(finding, kind="faint")


def _written(exported: Sequence[Row], epoch: int | None) -> Iterable[str]:
    """The picture and the table of the exported files."""
    pictures = list(_pareto(exported, "latency_ms"))
    if not pictures:
        return
    yield "<h3>Measured on the exported files</h3>"
    if epoch is not None:
        yield paragraph(f"Student and stones are those of epoch {epoch}.")
    yield from pictures
    yield _ladder(exported)


def _ladder(exported: Sequence[Row]) -> str:
    header = ("file", "accuracy", "latency", "size", "multiply-adds", "parameters")
    rows = [
        (
            row.name,
            units.percent(row.accuracy),
            units.milliseconds(row.latency_ms),
            units.size(row.file_bytes),
            units.count(row.multiply_adds),
            units.count(row.parameters),
        )
        for row in exported
    ]
    return table(header, rows, words=1, name="exported files")


_HEADINGS = {
    "total": "Loss, weighted sum",
    "ce": "Cross-entropy with the labels",
    "kd": "Distance to the teacher",
    "cross": "Distance to the mean of the stones",
}


def _curves(epochs: Sequence[Mapping[str, Any]], teacher_accuracy: float | None) -> Iterable[str]:
    accuracies = _accuracies(epochs)
    if accuracies:
        level = None if teacher_accuracy is None else ("teacher", teacher_accuracy)
        yield _curve("Accuracy on held-out data", accuracies, "accuracy", _tick_percent, level)
    names = list(dict.fromkeys(name for line in epochs for name in line.get("losses", {})))
    for kind in dict.fromkeys(name.split(" ")[0] for name in names):
        losses = {
            name.removeprefix(f"{kind} "): [
                (line["epoch"], line.get("losses", {}).get(name)) for line in epochs
            ]
            for name in names
            if name.split(" ")[0] == kind
        }
        yield _curve(_HEADINGS.get(kind) or kind, losses, kind, "{:.3g}".format)


def _accuracies(epochs: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Of the student and, where the run measured them, its average and every stone."""
    found: dict[str, Points] = {
        "student": [(line["epoch"], line.get("accuracy")) for line in epochs]
    }
    found["average"] = [(line["epoch"], line.get("ema_accuracy")) for line in epochs]
    for name in dict.fromkeys(name for line in epochs for name in line.get("stones") or {}):
        found[name] = [(line["epoch"], (line.get("stones") or {}).get(name)) for line in epochs]
    return {
        name: points
        for name, points in found.items()
        if any(value is not None for _, value in points)
    }


def _curve(
    heading: str,
    series: Mapping[str, Points],
    what: str,
    text: Callable[[float], str],
    level: tuple[str, float] | None = None,
) -> str:
    known = {name: [p for p in points if p[1] is not None] for name, points in series.items()}
    if all(len(points) < 2 for points in known.values()):
        return section(heading, *_points(known, text, level))

    def draw(frame: Frame) -> str:
        return line_chart(series, title=f"{what} by epoch", text=text, level=level, frame=frame)

    return section(heading, both(draw(WIDE_CHART), draw(NARROW_CHART), kind="chart"))


def _points(
    series: Mapping[str, Points], text: Callable[[float], str], level: tuple[str, float] | None
) -> Iterable[str]:
    """Series of one epoch each, which are no curves: the numbers themselves."""
    epochs = sorted({f"{epoch:g}" for points in series.values() for epoch, _ in points})
    if len(epochs) == 1:
        yield paragraph(f"Of epoch {epochs[0]} only: no curve yet.", kind="faint")
    values = dict([level] if level else [])
    values |= {
        name: value for name, points in series.items() for _, value in points if value is not None
    }
    yield facts({name: text(value) for name, value in values.items()})


def _tick_percent(share: float) -> str:
    return f"{round(100 * share, 2):g} %"


def _epochs(epochs: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """What each epoch reached; then its losses, which are too many for paper."""
    stones = list(dict.fromkeys(name for line in epochs for name in line.get("stones") or {}))
    header = ("epoch", "accuracy", *stones, "learning rate", "seconds", "images/s")
    rows = [
        (
            str(line["epoch"]),
            units.percent(line.get("accuracy")),
            *(units.percent((line.get("stones") or {}).get(name)) for name in stones),
            _number(line.get("learning_rate"), ".3g"),
            _number(line.get("seconds"), ".1f"),
            _number(_speed(line), ",.0f"),
        )
        for line in epochs
    ]
    yield table(header, rows, words=0, name="epochs")
    names = list(dict.fromkeys(name for line in epochs for name in line.get("losses", {})))
    losses = [
        (str(line["epoch"]), *(_number(line.get("losses", {}).get(name), ".4f") for name in names))
        for line in epochs
    ]
    shown = table(("epoch", *names), losses, words=0, name="losses")
    yield f'<div class="screen"><h3>Losses</h3>{shown}</div>'
    yield paragraph("The losses of every epoch stand in metrics.jsonl.", kind="paper")


def _speed(line: Mapping[str, Any]) -> float | None:
    if line.get("samples_per_second") is not None:
        return line["samples_per_second"]
    samples, seconds = line.get("samples"), line.get("seconds")
    return samples / seconds if samples and seconds else None


def _number(value: float | None, form: str) -> str:
    return units.UNKNOWN if value is None else format(value, form)


def _blocks(plan: Plan) -> str:
    header = ("block", "teacher ends at", "shape", "compute", "student ends at", "shape", "compute")
    header += ("adapter", "weight")
    sides = (describe_blocks(partition) for partition in (plan.teacher, plan.student))
    rows = []
    for left, right, stone in zip(*sides, [*plan.stones, None], strict=True):
        rows.append(
            (
                left.label,
                *_block_cells(left),
                *_block_cells(right),
                "\n".join(map(str, stone.adapters)) if stone else "",
                units.weight(stone.weight) if stone else "",
            )
        )
    return table(header, rows, words=8, name="blocks")


def _block_cells(block: BlockFacts) -> tuple[str, str, str]:
    names, layouts = zip(*block.ends, strict=True)
    return "\n".join(names), "\n".join(layouts), units.compute(block.share)


def _evidence(plan: Plan) -> str:
    header = ("boundary", "cost", "of it", "next best: teacher", "student", "adds")
    rows = []
    for depth, pair in enumerate(plan.alignment.boundaries, start=1):
        other = pair.runner_up
        rows.append(
            (
                str(depth),
                f"{pair.cost:.3f}",
                evidence_of(pair),
                "\n".join(other.teacher.names) if other else "none",
                "\n".join(other.student.names) if other else "",
                f"{other.extra_cost:+.3f}" if other else "",
            )
        )
    return table(header, rows, words=5, name="evidence")
