"""Line charts as inline SVG: a few series over epochs, direct labels, no script.

The page that holds them brings the colours of dark pages. A chart has a wide form and a narrow one
for phones, whose letters stay as large.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kdsurgeon.views import palette, units

LABEL_PITCH = 17
LEADER = 24  # from the end of a line to its label
LETTER = 7.6  # wide, in the widest of the fonts that a browser may take

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Frame:
    """The size of a chart, and the margins around its axes."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    most_ticks: int  # along the horizontal axis


WIDE = Frame(920, 300, left=64, right=208, top=16, bottom=44, most_ticks=10)
NARROW = Frame(400, 280, left=52, right=148, top=12, bottom=44, most_ticks=5)


@dataclass(frozen=True)
class Axes:
    """Where values lie on the page."""

    frame: Frame
    first: float
    last: float
    ticks: tuple[float, ...]

    def x(self, value: float) -> float:
        frame = self.frame
        if self.first == self.last:  # one epoch stands beside the labels
            return frame.width - frame.right
        share = (value - self.first) / (self.last - self.first)
        return frame.left + share * (frame.width - frame.left - frame.right)

    def y(self, value: float) -> float:
        frame, (low, high) = self.frame, (self.ticks[0], self.ticks[-1])
        share = (value - low) / (high - low)
        return frame.height - frame.bottom - share * (frame.height - frame.top - frame.bottom)


def line_chart(
    series: Mapping[str, Points],
    *,
    title: str,
    text: Callable[[float], str] = "{:g}".format,
    level: tuple[str, float] | None = None,
    frame: Frame = WIDE,
) -> str:
    """An SVG chart of values over epochs.

    Args:
        series: points (epoch, value) by name, which chooses the colour; None and what is not
            finite leave a gap.
        title: what the chart shows, for those who cannot see it.
        text: a value as it stands at the axis.
        level: a name and a value that is drawn as a dashed line from side to side, on top.
        frame: :data:`WIDE`, or :data:`NARROW` for a phone; higher where the labels need it.

    >>> chart = line_chart({"total": [(1, 2.0), (2, 1.0)]}, title="loss by epoch")
    >>> ET.fromstring(chart).find("{*}title").text
    'loss by epoch'
    """
    known = {name: [p for p in points if _is_number(p[1])] for name, points in series.items()}
    values = [float(value) for points in known.values() for _, value in points if value is not None]
    epochs = [epoch for points in series.values() for epoch, _ in points] or [1.0]
    values += [level[1]] if level else []
    frame = _with_room(frame, len(series) + (level is not None))
    axes = Axes(frame, min(epochs), max(epochs), round_ticks(values or [0.0, 1.0]))
    svg = canvas(frame, title)
    draw_rungs(svg, axes, text)
    _draw_epochs(svg, axes)
    labels = [(axes.y(level[1]), level[0], text(level[1]))] if level else []
    for name, points in known.items():
        _draw_series(svg, name, series[name], axes)
        if points:
            last = points[-1][1] or 0.0
            labels.append((axes.y(last), name, text(last)))
    if level:
        line = draw_line(svg, axes, level[1], f"wire-{palette.hue_of(level[0])}")
        # wider than a line of a stone, so that it shows on one that it covers
        line.attrib |= {"stroke-width": "4", "stroke-dasharray": "8 8"}
    _draw_labels(svg, labels, frame)
    return finished(svg)


def canvas(frame: Frame, title: str) -> ET.Element:
    """An empty picture that says what it shows."""
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {frame.width} {frame.height}",
            "width": str(frame.width),
            "height": str(frame.height),
            "font-family": "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif",
            "font-size": "13",
            "class": "kdsurgeon",
            "role": "img",
        },
    )
    ET.SubElement(svg, "title").text = title
    return svg


def finished(svg: ET.Element) -> str:
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode")


def round_ticks(values: Sequence[float]) -> tuple[float, ...]:
    """Two to seven round numbers that enclose the values.

    >>> round_ticks([0.13, 0.92])
    (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """
    low, high = min(values), max(values)
    size = max(abs(low), abs(high)) or 1.0
    span = max(high - low if high - low > 1e-6 * size else size, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return tuple(float(f"{number * step:.10g}") for number in range(first, last + 1))


def draw_rungs(svg: ET.Element, axes: Axes, text: Callable[[float], str]) -> None:
    """The lines of the vertical axis with their values."""
    for value in axes.ticks:
        draw_line(svg, axes, value, "grid")
        draw_text(svg, text(value), axes.frame.left - 8, axes.y(value) + 4.5, anchor="end")


def draw_line(svg: ET.Element, axes: Axes, value: float, role: str) -> ET.Element:
    """A line at ``value`` from side to side."""
    frame, y = axes.frame, axes.y(value)
    places = {"x1": frame.left, "y1": y, "x2": frame.width - frame.right, "y2": y}
    attributes = {name: f"{value:.1f}" for name, value in places.items()}
    return ET.SubElement(svg, "line", attributes | palette.painted(role))


def draw_text(
    svg: ET.Element, text: str, x: float, y: float, *, anchor: str = "start", role: str = "ink"
) -> ET.Element:
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    element = ET.SubElement(svg, "text", attributes | palette.painted(role))
    element.text = text
    return element


def _with_room(frame: Frame, labels: int) -> Frame:
    needed = frame.top + frame.bottom + LABEL_PITCH * labels
    return frame if needed <= frame.height else replace(frame, height=needed)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _draw_epochs(svg: ET.Element, axes: Axes) -> None:
    frame = axes.frame
    step = max(1, math.ceil((axes.last - axes.first + 1) / frame.most_ticks))
    below = frame.height - frame.bottom + 18
    for epoch in range(math.ceil(axes.first), math.floor(axes.last) + 1):
        if (epoch - math.ceil(axes.first)) % step == 0:
            draw_text(svg, str(epoch), axes.x(epoch), below, anchor="middle")
    middle = (frame.left + frame.width - frame.right) / 2
    draw_text(svg, "epoch", middle, frame.height - 6, anchor="middle")


def _draw_series(svg: ET.Element, name: str, points: Points, axes: Axes) -> None:
    """A line with a dot where it has room; broken where a value is missing."""
    hue = palette.hue_of(name)
    pieces: list[list[str]] = [[]]
    for epoch, value in points:
        if value is None or not math.isfinite(value):
            pieces.append([])
            continue
        x, y = axes.x(epoch), axes.y(value)
        pieces[-1].append(f"{x:.1f},{y:.1f}")
        if len(points) <= 4 * axes.frame.most_ticks:
            circle = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "2.6"}
            ET.SubElement(svg, "circle", circle | palette.painted(f"mark-{hue}"))
    style = palette.painted(f"wire-{hue}") | {"stroke-width": "2", "stroke-linejoin": "round"}
    if name == "average" or palette.depth_of(name) > palette.NUM_HUES:  # another line has its hue
        style["stroke-dasharray"] = "4 3"
    for piece in pieces:
        if len(piece) > 1:
            ET.SubElement(svg, "polyline", {"points": " ".join(piece)} | style)


def _draw_labels(svg: ET.Element, labels: list[tuple[float, str, str]], frame: Frame) -> None:
    """Each name where a tick leads to from its line; names that would overlap are pushed apart."""
    lowest = frame.height - frame.bottom - LABEL_PITCH * (len(labels) - 1)
    end, y = frame.width - frame.right, -math.inf
    letters = int((frame.right - LEADER) / LETTER)
    for index, (wanted, name, value) in enumerate(sorted(labels, key=lambda label: label[0])):
        y = max(y + LABEL_PITCH, min(wanted, lowest + index * LABEL_PITCH))
        hue = palette.hue_of(name)
        tick = {"d": f"M {end + 5} {wanted:.1f} L {end + LEADER - 4} {y:.1f}"}
        ET.SubElement(svg, "path", tick | palette.painted(f"wire-{hue}"))
        shown = units.middle_cut(name, max(4, letters - len(value) - 1))
        label = draw_text(svg, f"{shown} {value}", end + LEADER, y + 4.5, role=f"mark-{hue}")
        if shown != name:
            ET.SubElement(label, "title").text = units.printable(name)
