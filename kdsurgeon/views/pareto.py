"""What accuracy costs, as a picture: every rung from student to teacher, and the best of them.

A model is on the curve (Pareto's) when none that costs no more is better, and none that is as good
costs less.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from kdsurgeon.views import palette, units
from kdsurgeon.views.charts import (
    LETTER,
    WIDE,
    Axes,
    Frame,
    canvas,
    draw_rungs,
    draw_text,
    finished,
    round_ticks,
)

_HALF_LETTER = 8  # half of a label's height, and the gap around it
_FAR = 14  # from a dot to its name, beyond which a line joins them
_MARGIN = 36  # between a dot and the end of the axis
_SCALES = ((1, 2, 5), (1, 3), (1,))  # of each power of ten, ticks that are drawn


@dataclass(frozen=True)
class Rung:
    """One model: what it costs, in any unit, and its accuracy between 0 and 1."""

    name: str
    cost: float
    accuracy: float


def on_the_curve(rungs: Sequence[Rung]) -> tuple[Rung, ...]:
    """Those that no other beats, from the cheapest on.

    >>> names = on_the_curve([Rung("a", 1, 0.9), Rung("b", 2, 0.8), Rung("c", 3, 0.95)])
    >>> [rung.name for rung in names]
    ['a', 'c']
    """
    found: list[Rung] = []
    for rung in sorted(rungs, key=lambda rung: (rung.cost, -rung.accuracy)):
        is_twin = found and (rung.cost, rung.accuracy) == (found[-1].cost, found[-1].accuracy)
        if not found or is_twin or rung.accuracy > found[-1].accuracy:
            found.append(rung)
    return tuple(found)


def pareto_chart(
    rungs: Sequence[Rung],
    *,
    title: str,
    unit: str,
    text: Callable[[float], str],
    frame: Frame = WIDE,
) -> str:
    """An SVG chart of accuracy against cost, on a logarithmic axis; each model is named.

    Filled dots are on the curve. ``unit`` stands below the axis, ``text`` writes one of its ticks.

    >>> rungs = [Rung("student", 21_000, 0.94), Rung("teacher", 3_600_000, 0.98)]
    >>> chart = pareto_chart(rungs, title="", unit="multiply-adds", text=units.count)
    >>> len(ET.fromstring(chart).findall("{*}circle"))
    2
    """
    frame = replace(frame, right=frame.left // 2)
    costs = [rung.cost for rung in rungs]
    low, high = _around(min(costs), max(costs), frame)
    ticks = round_ticks([rung.accuracy for rung in rungs])
    axes = Axes(frame, math.log10(low), math.log10(high), ticks)
    svg = canvas(frame, title)
    draw_rungs(svg, axes, lambda share: f"{round(100 * share, 2):g} %")
    _draw_costs(svg, axes, _ticks(low, high, frame.most_ticks), text, unit)
    spots = {rung: (axes.x(math.log10(rung.cost)), axes.y(rung.accuracy)) for rung in rungs}
    best = on_the_curve(rungs)
    line = " ".join(f"{spots[rung][0]:.1f},{spots[rung][1]:.1f}" for rung in best)
    style = {"stroke-width": "2", "stroke-linejoin": "round"}
    if len(best) > 1:
        ET.SubElement(svg, "polyline", {"points": line} | palette.painted("level") | style)
    for rung, (x, y) in spots.items():
        kind = f"{'mark' if rung in best else 'port'}-{palette.hue_of(rung.name)}"
        place = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "5", "stroke-width": "2"}
        dot = ET.SubElement(svg, "circle", place | palette.painted(kind))
        facts = f"{rung.name}: {units.percent(rung.accuracy)}, {text(rung.cost)} {unit}"
        ET.SubElement(dot, "title").text = facts
    _draw_names(svg, spots, [spots[rung] for rung in best], frame)
    return finished(svg)


def _around(least: float, most: float, frame: Frame) -> tuple[float, float]:
    """The ends of the axis: with room for a name at both sides, and for a tick between."""
    width = frame.width - frame.left - frame.right
    span = max(math.log(most / least), 0.2)
    margin = math.exp(span * _MARGIN / (width - 2 * _MARGIN))
    return least / margin, most * margin


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between the two, as many as there is room for."""
    found: list[float] = []
    for factors in _SCALES:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in every if low <= value <= high]
        if len(found) <= most:
            break
    if len(found) >= 2:
        return found[:: math.ceil(len(found) / most)]
    return [value for value in round_ticks([low, high]) if low <= value <= high][:most]


def _draw_costs(
    svg: ET.Element, axes: Axes, ticks: Sequence[float], text: Callable[[float], str], unit: str
) -> None:
    frame = axes.frame
    bottom = frame.height - frame.bottom
    for value in ticks:
        x = axes.x(math.log10(value))
        ends = {"x1": f"{x:.1f}", "y1": str(frame.top), "x2": f"{x:.1f}", "y2": str(bottom)}
        ET.SubElement(svg, "line", ends | palette.painted("grid"))
        draw_text(svg, text(value), x, bottom + 18, anchor="middle")
    middle = (frame.left + frame.width - frame.right) / 2
    draw_text(svg, unit, middle, frame.height - 6, anchor="middle")


Spot = tuple[float, float]
Box = tuple[float, float, float, float]


def _draw_names(
    svg: ET.Element, spots: dict[Rung, Spot], curve: Sequence[Spot], frame: Frame
) -> None:
    """Each name beside its dot, where it covers no dot, name or line, as far as that goes."""
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots.values()]
    taken += [(x - 1.5, y - 1.5, x + 1.5, y + 1.5) for x, y in _along(curve)]
    ends_first = sorted(spots.items(), key=lambda item: item[0].name.startswith("stone"))
    for rung, spot in ends_first:
        name = units.middle_cut(rung.name, 22)
        boxes = _places(spot, LETTER * len(name))
        inside = [box for box in boxes if _is_inside(box, frame)] or boxes
        box = min(inside, key=lambda box: _cost(box, spot, taken))
        taken.append(box)
        _draw_lead(svg, spot, box, palette.hue_of(rung.name))
        draw_text(svg, name, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2 + 4.5, anchor="middle")


def _along(curve: Sequence[Spot]) -> Iterator[Spot]:
    """Points of a line, close enough that no letter fits between them."""
    for (x1, y1), (x2, y2) in pairwise(curve):
        count = max(1, round(max(abs(x2 - x1), abs(y2 - y1)) / 4))
        for index in range(count + 1):
            share = index / count
            yield x1 + share * (x2 - x1), y1 + share * (y2 - y1)


def _places(spot: Spot, width: float) -> list[Box]:
    """Around a dot, the best first; farther ones last."""
    (x, y), half, tall = spot, width / 2, _HALF_LETTER
    centres = []
    for gap in (9, 24, 40):
        side, away = half + gap, tall + gap - 3
        centres += [(side, 0), (0, -away), (0, away), (-side, 0)]
        centres += [(side, -away), (side, away), (-side, -away), (-side, away)]
    return [(x + a - half, y + b - tall, x + a + half, y + b + tall) for a, b in centres]


def _cost(box: Box, spot: Spot, taken: Sequence[Box]) -> float:
    """What it covers; far from its dot is as bad as just touched by a line."""
    return sum(_overlap(box, other) for other in taken) + 2 * math.dist(spot, _nearest(box, spot))


def _nearest(box: Box, spot: Spot) -> Spot:
    left, top, right, bottom = box
    return min(max(spot[0], left), right), min(max(spot[1], top), bottom)


def _draw_lead(svg: ET.Element, spot: Spot, box: Box, hue: str) -> None:
    """A thin line from a dot to its name, where that could not stand beside it."""
    end = _nearest(box, spot)
    if (away := math.dist(spot, end)) > _FAR:
        x, y = (place + 6 / away * (to - place) for place, to in zip(spot, end, strict=True))
        way = {"d": f"M {x:.1f} {y:.1f} L {end[0]:.1f} {end[1]:.1f}"}
        ET.SubElement(svg, "path", way | palette.painted(f"wire-{hue}"))


def _is_inside(box: Box, frame: Frame) -> bool:
    left, top, right, bottom = box
    # a name beside a dot on the lowest line reaches a little below it, to the ticks
    width, height = frame.width - 2, frame.height - frame.bottom + _HALF_LETTER
    return frame.left <= left and frame.top - 8 <= top and right <= width and bottom <= height


def _overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, down)
