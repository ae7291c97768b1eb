"""Class by class: where the student falls behind its teacher, and where it is ahead."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html import escape
from typing import Protocol

from kdsurgeon.views import palette, units
from kdsurgeon.views.page import box, paragraph

MOST_LOST, MOST_GAINED = 30, 10  # classes that are shown
LONGEST_NAME = 36  # letters
_WIDTH, _HEIGHT = 120, 14  # of a bar's picture


class Counts(Protocol):
    """Samples of one class; :class:`kdsurgeon.evaluation.ClassCounts` is one."""

    @property
    def samples(self) -> int: ...
    @property
    def teacher(self) -> int: ...
    @property
    def student(self) -> int: ...
    @property
    def lost(self) -> int: ...
    @property
    def gained(self) -> int: ...


Class = tuple[str, Counts]


def class_changes(classes: Sequence[Class]) -> str:
    """The classes with samples as a table with bars, those that lose most first; a finding above.

    Of many, :data:`MOST_LOST` and :data:`MOST_GAINED` are shown.
    """
    known = sorted(
        ((name, counts) for name, counts in classes if counts.samples), key=lambda c: _change(c[1])
    )
    if not known:
        return paragraph("No class has a sample.")
    shown = known
    if len(known) > MOST_LOST + MOST_GAINED:
        shown = known[:MOST_LOST] + known[-MOST_GAINED:]
    header = ("class", "samples", "teacher", "student", "change", "", "lost", "gained")
    numbers = (False, True, True, True, True, False, True, True)
    head = "".join(_cell("th", escape(text), n) for text, n in zip(header, numbers, strict=True))
    scale = max(abs(_change(counts)) for _, counts in shown) or 1.0
    body = "\n".join(_row(name, counts, scale, numbers) for name, counts in shown)
    inner = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return "\n".join(
        [
            *(paragraph(text) for text in _findings(known, len(known) - len(shown))),
            box(inner, "changes by class"),
        ]
    )


def _change(counts: Counts) -> float:
    """Of the class's accuracy, from teacher to student."""
    return (counts.student - counts.teacher) / counts.samples


def _findings(known: Sequence[Class], left_out: int) -> list[str]:
    (worst, most), (best, gain) = (
        (units.middle_cut(name, LONGEST_NAME), counts) for name, counts in (known[0], known[-1])
    )
    parts = []
    if _change(most) < 0:
        parts.append(f"The student loses most on {worst}: {_points(_change(most))} points.")
    if _change(gain) > 0:
        parts.append(f"It gains most on {best}: {_points(_change(gain))} points.")
    if not parts:
        parts.append("The student is as accurate as its teacher on every class.")
    fewest = min(counts.samples for _, counts in known)
    parts.append(f"One sample is {100 / fewest:.1f} points of the class that has fewest.")
    found = [" ".join(parts)]
    found.append(
        "Lost are samples that only the teacher gets right, gained those that only the student "
        "does." + (f" {left_out} classes that change less are left out." if left_out else "")
    )
    return found


def _points(change: float) -> str:
    return "0.0" if round(100 * change, 1) == 0 else f"{100 * change:+.1f}".replace("-", "−")


def _row(name: str, counts: Counts, scale: float, numbers: Sequence[bool]) -> str:
    change = _change(counts)
    kind = "worse" if change < 0 else "better" if change > 0 else "faint"
    cells = (
        _name(name),
        f"{counts.samples:,}",
        units.percent(counts.teacher / counts.samples),
        units.percent(counts.student / counts.samples),
        f'<span class="{kind}">{_points(change)}</span>',
        _bar(change, scale),
        f"{counts.lost:,}",
        f"{counts.gained:,}",
    )
    pairs = zip(cells, numbers, strict=True)
    return f"<tr>{''.join(_cell('td', text, is_number) for text, is_number in pairs)}</tr>"


def _name(name: str) -> str:
    shown, whole = units.middle_cut(name, LONGEST_NAME), units.printable(name)
    return (
        escape(whole) if shown == whole else f'<span title="{escape(whole)}">{escape(shown)}</span>'
    )


def _cell(tag: str, inner: str, is_number: bool) -> str:
    kind = ' class="number"' if is_number else ""
    return f"<{tag}{kind}>{inner}</{tag}>"


def _bar(change: float, scale: float) -> str:
    """To the left of the middle where the class got worse, to the right where it got better."""
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {_WIDTH} {_HEIGHT}",
            "width": str(_WIDTH),
            "height": str(_HEIGHT),
            "class": "kdsurgeon",
            "aria-hidden": "true",
        },
    )
    middle = _WIDTH / 2
    length = abs(change) / scale * (middle - 2)
    kind = "worse" if change < 0 else "better"
    place = {"x": f"{middle - length if change < 0 else middle:.1f}", "width": f"{length:.1f}"}
    ET.SubElement(svg, "rect", place | {"y": "3", "height": "8"} | palette.painted(kind))
    ends = {"x1": f"{middle}", "x2": f"{middle}", "y1": "0", "y2": f"{_HEIGHT}"}
    ET.SubElement(svg, "line", ends | palette.painted("flow"))
    return ET.tostring(svg, encoding="unicode")
