"""Self-contained pages without scripts or links: a plan, and a run with its curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from kdsurgeon.stones import Certificate, Forecast, Plan
from kdsurgeon.views import palette, units
from kdsurgeon.views.blocks import BlockFacts, describe_blocks
from kdsurgeon.views.charts import line_chart
from kdsurgeon.views.drawing import NARROW, draw_plan
from kdsurgeon.views.tables import (
    Accuracies,
    accuracy_finding,
    accuracy_rows,
    closing_lines,
    evidence_of,
)

_STYLE = (
    """
:root { color-scheme: light dark; --page: #fff; --ink: #111827; --faint: #4b5563; --line: #d8dce3;
        --soft: #f3f4f6; }
@media (prefers-color-scheme: dark) { :root { --page: #0f141b; --ink: #e8ebf0; --faint: #a9b3c1;
        --line: #2b3442; --soft: #1a212c; } }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: var(--ink);
       background: var(--page); max-width: 1120px; margin: 2rem auto; padding: 0 24px; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
svg { max-width: 100%; height: auto; display: block; }
.wide { margin: 0 -24px; } .wide svg { width: 100%; }
.narrow { display: none; }
.table, .drawing { overflow-x: auto; }
.drawing svg { min-width: 800px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top;
         white-space: pre-line; }
th { border-bottom: 2px solid var(--line); font-weight: 600; }
td { border-bottom: 1px solid var(--line); }
.number { text-align: right; }
pre { background: var(--soft); padding: .9rem 1rem; border-radius: 6px; overflow-x: auto;
      font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: .5rem 0; }
dt { color: var(--faint); } dd { margin: 0; }
@media (max-width: 860px) {
  body { margin: 1rem auto; padding: 0 .9rem; } h1 { font-size: 1.2rem; }
  .wide { display: none; } .narrow { display: block; }
  .narrow svg { width: 100%; max-width: 520px; margin: 0 auto; }
}
"""
    + palette.DARK
)


def plan_page(plan: Plan, forecast: Forecast, certificate: Certificate | None = None) -> str:
    """A page with the drawing of a plan, its blocks, and why each boundary is where it is."""
    title = f"{plan.teacher.trace.name} → {plan.student.trace.name}"
    return _page(
        title,
        _facts(closing_lines(plan, forecast, certificate)),
        f'<div class="wide">{draw_plan(plan, forecast)}</div>',
        f'<div class="narrow">{draw_plan(plan, forecast, form=NARROW)}</div>',
        "<h2>Blocks</h2>",
        _blocks(plan),
        "<h2>Why these boundaries</h2>",
        _evidence(plan),
        *(f"<p>Relaxed: {escape(wish)}.</p>" for wish in plan.alignment.relaxed),
    )


def run_report(
    title: str,
    *,
    config: str,
    epochs: Sequence[Mapping[str, Any]],
    plan_svg: str | None = None,
    final: Accuracies | None = None,
    teacher_accuracy: float | None = None,
    notes: Sequence[str] = (),
) -> str:
    """A page on one run.

    Args:
        config: the run's configuration as text.
        epochs: one mapping per epoch with epoch, losses (a mapping), learning_rate, accuracy,
            seconds and samples or samples_per_second; whatever is missing is left blank.
        plan_svg: what :func:`draw_plan` gave; it is put in as it is.
        final: accuracies at the end.
        teacher_accuracy: between 0 and 1; a dashed line in the chart of accuracy.
        notes: sentences to show under the title, such as how the data was split.
    """
    parts = [_summary(epochs, teacher_accuracy)]
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    if epochs:
        parts += _curves(epochs, teacher_accuracy)
    if final is not None:
        header = (f"on {final.samples:,} samples", "accuracy", "agrees with teacher")
        parts += ["<h2>At the end</h2>", _table(header, accuracy_rows(final), words=1)]
        parts += [f"<p>{escape(text)}.</p>" for text in [accuracy_finding(final)] if text]
    if plan_svg is not None:
        parts += ["<h2>Plan</h2>", f'<div class="drawing">{plan_svg}</div>']
    if epochs:
        parts += ["<h2>Epochs</h2>", _epochs(epochs)]
    parts += ["<h2>Configuration</h2>", f"<pre>{escape(config)}</pre>"]
    return _page(title, *parts)


def _summary(epochs: Sequence[Mapping[str, Any]], teacher_accuracy: float | None) -> str:
    facts = {}
    if teacher_accuracy is not None:
        facts["teacher"] = f"accuracy {units.percent(teacher_accuracy)}"
    measured = [line["accuracy"] for line in epochs if line.get("accuracy") is not None]
    if measured:
        last, best = units.percent(measured[-1]), units.percent(max(measured))
        facts["student"] = f"accuracy {last} after the last epoch, {best} at best"
    seconds = units.duration(sum(line.get("seconds") or 0.0 for line in epochs))
    number = "1 epoch" if len(epochs) == 1 else f"{len(epochs)} epochs"
    return _facts(facts | {"training": f"{number} in {seconds}"})


_HEADINGS = {
    "total": "Loss, weighted sum",
    "ce": "Cross-entropy with the labels",
    "kd": "Distance to the teacher",
    "cross": "Distance to the mean of the stones",
}


def _curves(epochs: Sequence[Mapping[str, Any]], teacher_accuracy: float | None) -> Iterable[str]:
    names = list(dict.fromkeys(name for line in epochs for name in line.get("losses", {})))
    for kind in dict.fromkeys(name.split(" ")[0] for name in names):
        losses = {
            name.removeprefix(f"{kind} "): [
                (line["epoch"], line.get("losses", {}).get(name)) for line in epochs
            ]
            for name in names
            if name.split(" ")[0] == kind
        }
        heading = _HEADINGS.get(kind) or kind
        yield f"<h2>{escape(heading)}</h2>"
        yield line_chart(losses, title=f"{kind} by epoch", text="{:.3g}".format)
    accuracy = [(line["epoch"], line.get("accuracy")) for line in epochs]
    if any(value is not None for _, value in accuracy):
        level = None if teacher_accuracy is None else ("teacher", teacher_accuracy)
        yield "<h2>Accuracy on held-out data</h2>"
        yield line_chart(
            {"student": accuracy}, title="accuracy per epoch", text=_tick_percent, level=level
        )


def _tick_percent(share: float) -> str:
    return f"{round(100 * share, 2):g} %"


def _epochs(epochs: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for line in epochs for name in line.get("losses", {})))
    header = ("epoch", *names, "accuracy", "learning rate", "seconds", "images/s")
    rows = []
    for line in epochs:
        losses = line.get("losses", {})
        rows.append(
            (
                str(line["epoch"]),
                *(_number(losses.get(name), ".4f") for name in names),
                units.percent(line.get("accuracy")),
                _number(line.get("learning_rate"), ".3g"),
                _number(line.get("seconds"), ".1f"),
                _number(_speed(line), ",.0f"),
            )
        )
    return _table(header, rows, words=0)


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
    return _table(header, rows, words=8)


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
    return _table(header, rows, words=5)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int) -> str:
    """An HTML table whose first ``words`` columns hold text and all others numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = ["" if index < words else ' class="number"' for index in range(len(cells))]
        inner = (f"<{tag}{k}>{_tied(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    head = line("th", header)
    return (
        f'<div class="table"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table></div>"
    )


def _tied(cell: str) -> str:
    """A cell that breaks after a comma and before a plus only, not between a word and its number.

    >>> _tied("progress 0.1 + kind 0.2").split(" ")
    ['progress&nbsp;0.1', '+&nbsp;kind&nbsp;0.2']
    """
    text = escape(cell).replace(" ", "&nbsp;")
    return text.replace(",&nbsp;", ", ").replace("&nbsp;+", " +")


def _facts(facts: Mapping[str, str]) -> str:
    lines = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{''.join(lines)}</dl>"


def _page(title: str, *parts: str) -> str:
    title = units.printable(title)
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    body = "\n".join((f"<h1>{escape(title)}</h1>", *parts))
    return f"{head}{body}\n</body>\n</html>\n"
