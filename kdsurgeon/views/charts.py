"""Line charts as inline SVG: a few series over epochs, direct labels, no script.

The page that holds them brings the colours of dark pages.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kdsurgeon.views import palette

WIDTH, HEIGHT = 920, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 196, 16, 44
LABEL_PITCH = 17

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class _Axes:
    """Where values lie on the page."""

    first: float
    last: float
    ticks: tuple[float, ...]

    def x(self, epoch: float) -> float:
        if self.first == self.last:  # one epoch stands beside the labels
            return WIDTH - RIGHT
        return LEFT + (epoch - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    series: Mapping[str, Points],
    *,
    title: str,
    text: Callable[[float], str] = "{:g}".format,
    level: tuple[str, float] | None = None,
) -> str:
    """An SVG chart of values over epochs.

    Args:
        series: points (epoch, value) by name; None and what is not finite leave a gap.
        title: what the chart shows, for those who cannot see it.
        text: a value as it stands at the axis.
        level: a name and a value that is drawn as a dashed line from side to side.

    >>> chart = line_chart({"total": [(1, 2.0), (2, 1.0)]}, title="loss by epoch")
    >>> ET.fromstring(chart).find("{*}title").text
    'loss by epoch'
    """
    known = {name: [p for p in points if _is_number(p[1])] for name, points in series.items()}
    values = [float(value) for points in known.values() for _, value in points if value is not None]
    epochs = [epoch for points in series.values() for epoch, _ in points] or [1.0]
    values += [level[1]] if level else []
    axes = _Axes(min(epochs), max(epochs), _ticks(values or [0.0, 1.0]))
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {HEIGHT}",
            "width": str(WIDTH),
            "height": str(HEIGHT),
            "font-family": "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif",
            "font-size": "13",
            "class": "kdsurgeon",
            "role": "img",
        },
    )
    ET.SubElement(svg, "title").text = title
    _draw_axes(svg, axes, text)
    labels = []
    for index, (name, points) in enumerate(known.items()):
        hue = palette.hue(index)
        _draw_series(svg, series[name], axes, hue)
        if points:
            labels.append(
                (
                    axes.y(points[-1][1] or 0.0),
                    f"{name} {text(points[-1][1] or 0.0)}",
                    f"mark-{hue}",
                )
            )
    if level:
        _draw_level(svg, axes.y(level[1]))
        labels.append((axes.y(level[1]), f"{level[0]} {text(level[1])}", "ink"))
    _draw_labels(svg, labels)
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode")


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _ticks(values: Sequence[float]) -> tuple[float, ...]:
    """Two to seven round numbers that enclose the values.

    >>> _ticks([0.13, 0.92])
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


def _draw_axes(svg: ET.Element, axes: _Axes, text: Callable[[float], str]) -> None:
    for value in axes.ticks:
        y = axes.y(value)
        _line(svg, LEFT, y, WIDTH - RIGHT, y, "grid")
        _text(svg, text(value), LEFT - 8, y + 4.5, anchor="end")
    step = max(1, math.ceil((axes.last - axes.first + 1) / 10))
    for epoch in range(math.ceil(axes.first), math.floor(axes.last) + 1):
        if (epoch - math.ceil(axes.first)) % step == 0:
            _text(svg, str(epoch), axes.x(epoch), HEIGHT - BOTTOM + 18, anchor="middle")
    _text(svg, "epoch", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, anchor="middle")


def _draw_series(svg: ET.Element, points: Points, axes: _Axes, hue: str) -> None:
    """A line with a dot where it has room; broken where a value is missing."""
    pieces: list[list[str]] = [[]]
    for epoch, value in points:
        if value is None or not math.isfinite(value):
            pieces.append([])
            continue
        x, y = axes.x(epoch), axes.y(value)
        pieces[-1].append(f"{x:.1f},{y:.1f}")
        if len(points) <= 40:
            circle = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "2.6"}
            ET.SubElement(svg, "circle", circle | palette.painted(f"mark-{hue}"))
    style = palette.painted(f"wire-{hue}") | {"stroke-width": "2", "stroke-linejoin": "round"}
    for piece in pieces:
        if len(piece) > 1:
            ET.SubElement(svg, "polyline", {"points": " ".join(piece)} | style)


def _draw_level(svg: ET.Element, y: float) -> None:
    line = _line(svg, LEFT, y, WIDTH - RIGHT, y, "level")
    line.set("stroke-dasharray", "6 5")


def _draw_labels(svg: ET.Element, labels: list[tuple[float, str, str]]) -> None:
    """Each name at the end of its line; names that would overlap are pushed apart."""
    lowest = HEIGHT - BOTTOM - LABEL_PITCH * (len(labels) - 1)
    y = -math.inf
    for index, (wanted, name, role) in enumerate(sorted(labels)):
        y = max(y + LABEL_PITCH, min(wanted, lowest + index * LABEL_PITCH))
        _text(svg, name, WIDTH - RIGHT + 12, y + 4.5, role=role)


def _line(svg: ET.Element, x1: float, y1: float, x2: float, y2: float, role: str) -> ET.Element:
    places = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    attributes = {name: f"{value:.1f}" for name, value in places.items()}
    return ET.SubElement(svg, "line", attributes | palette.painted(role))


def _text(
    svg: ET.Element, text: str, x: float, y: float, *, anchor: str = "start", role: str = "ink"
) -> None:
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ET.SubElement(svg, "text", attributes | palette.painted(role)).text = text
