"""A run's page, and the record of its end that a later page is made from.

evaluation.json in the run folder holds what the last evaluation found: accuracy and agreement of
student, teacher and stones, and the counts of each class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdsurgeon.evaluation import ClassCounts, Report
from kdsurgeon.recipe import write_yaml
from kdsurgeon.runs import Run
from kdsurgeon.stones import Forecast, Plan
from kdsurgeon.stones.ladder import stone_cost
from kdsurgeon.views import Row, draw_plan, run_report
from kdsurgeon.views.drawing import NARROW

if TYPE_CHECKING:
    from kdsurgeon.cli.session import Session

EVALUATION = "evaluation.json"


def write_report(session: Session, forecast: Forecast, run: Run, final: Report | None) -> None:
    """report.html of a run that has ended, and evaluation.json where there is something in it."""
    if final is not None:
        run.write(EVALUATION, json.dumps(asdict(final), indent=1))
    run.write("report.html", report_page(session, forecast, run, final))


def report_page(
    session: Session,
    forecast: Forecast,
    run: Run,
    final: Report | None,
    exported: Sequence[Row] = (),
    exported_epoch: int | None = None,
) -> str:
    """The page of a run as its folder tells it.

    ``exported`` are files that were written of it, ``exported_epoch`` is the epoch of their
    weights, counted from 1.
    """
    record = _record(run.path)
    epochs = run.metrics()
    plan, names = session.plan, session.split.train.class_names
    accuracies = _accuracies(final, epochs, record.get("teacher_accuracy"))
    counts = final.classes if final and len(final.classes) == len(names) else ()
    return run_report(
        title=f"{session.teacher.name} → {session.student.name}, {session.settings.method}",
        config=write_yaml(session.settings.dump()),
        plan_svg=draw_plan(plan, forecast),
        narrow_plan_svg=draw_plan(plan, forecast, form=NARROW),
        epochs=epochs,
        final=final,
        teacher_accuracy=record.get("teacher_accuracy"),
        models=model_rows(plan, accuracies),
        exported=exported,
        exported_epoch=exported_epoch,
        classes=list(zip(names, counts, strict=False)),
        environment=environment_lines(record),
        notes=session.split.notes,
    )


def model_rows(plan: Plan, accuracies: Mapping[str, float | None]) -> list[Row]:
    """What teacher, student and the stones among ``accuracies`` cost, by their names."""
    costs = {"teacher": plan.teacher.cost, "student": plan.student.cost}
    for stone in plan.stones:
        if (name := f"stone {stone.depth}") in accuracies:
            costs[name] = stone_cost(plan, stone.depth)
    return [
        Row(name, accuracies.get(name), cost.parameters or None, cost.multiply_adds or None)
        for name, cost in costs.items()
    ]


def read_evaluation(folder: Path) -> Report | None:
    """What :func:`write_report` kept; None where there is none, or it cannot be read."""
    try:
        found = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        for name in ("stones", "stone_agreement"):
            found[name] = {int(depth): share for depth, share in found[name].items()}
        found["classes"] = tuple(ClassCounts(**counts) for counts in found["classes"])
        return Report(**found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def environment_lines(record: Mapping[str, Any]) -> dict[str, str]:
    """run.json as lines that people read; what it lacks is left out."""
    found: dict[str, str] = {}
    for name, value in record.items():
        if name in _ELSEWHERE:
            continue
        text = _TEXTS.get(name, _plain)(value)
        if text:
            found[name.replace("_", " ")] = text
    return found


def _accuracies(
    final: Report | None, epochs: Sequence[Mapping[str, Any]], teacher: float | None
) -> dict[str, float | None]:
    if final is None:
        return {"teacher": teacher, "student": epochs[-1].get("accuracy") if epochs else None}
    stones = {f"stone {depth}": share for depth, share in sorted(final.stones.items())}
    return {"teacher": final.teacher, "student": final.student, **stones}


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items() if each)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(_plain(each) for each in value)
    return "" if value is None else str(value)


def _git(value: Any) -> str:
    if not isinstance(value, Mapping):
        return ""
    return f"{value.get('commit')}{', with changes' if value.get('changed') else ''}"


def _command(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, Sequence) else ""


_ELSEWHERE = ("teacher_accuracy", "started_in", "resumes")
_TEXTS = {"git": _git, "command": _command}
