"""A plan as a picture: both graphs side by side, paired blocks in one colour.

Both columns hold equally many boxes, each with the same least height and a share of the same room
to grow, so the boundaries of both run down in the same order and connectors never cross. The slant
of a connector stays in the gutters beside its label, so no label is ever crossed either.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from textwrap import wrap

from kdsurgeon.costs import Cost
from kdsurgeon.partitioning import Partition
from kdsurgeon.stones import Forecast, Plan, Stone
from kdsurgeon.views import units
from kdsurgeon.views.blocks import BlockFacts, describe_blocks

MARGIN = 28
COLUMN = 350
GUTTER = 64
LABEL = 236
TEACHER_X = MARGIN
LABEL_X = TEACHER_X + COLUMN + GUTTER
STUDENT_X = LABEL_X + LABEL + GUTTER
WIDTH = STUDENT_X + COLUMN + MARGIN

TOP = 126  # below the title, the legend and the models' names
INPUT_HEIGHT = 30
GAP = 52  # between two boxes: the name and shape of what flows there
LEAST_HEIGHT = 94  # four lines of text
LINE = 18
ROOM = 90  # height per block that is given out by share of compute

TITLE, BODY, SMALL = 19, 14, 12.5  # font sizes in pixels
CHARACTER = 0.58  # width of an average character of sans-serif text, as a share of its size;
BOLD = 0.66  # on the safe side for the wider faces that a viewer may substitute
RAIL = 30  # how far inside a column the flow runs down

COLOURS = (  # fill, outline; told apart in grey and by colour-blind readers through their order
    ("#dbeafe", "#2563eb"),
    ("#dcfce7", "#15803d"),
    ("#fef3c7", "#b45309"),
    ("#fce7f3", "#be185d"),
    ("#e0e7ff", "#4338ca"),
    ("#ccfbf1", "#0f766e"),
    ("#ffedd5", "#c2410c"),
    ("#f3e8ff", "#7e22ce"),
)
HEAD_COLOUR = ("#e5e7eb", "#4b5563")
_TIED = "\N{NO-BREAK SPACE}"
INK, FAINT = "#111827", "#4b5563"


@dataclass(frozen=True)
class _Box:
    """A block with its place on the page."""

    facts: BlockFacts
    x: int
    y: int
    height: int
    colour: tuple[str, str]

    @property
    def bottom(self) -> int:
        return self.y + self.height

    @property
    def boundary(self) -> int:
        """The height of the line on which the block's result leaves it."""
        return self.bottom + GAP // 2


def draw_plan(plan: Plan, forecast: Forecast) -> str:
    """The plan as an SVG document: teacher left, student right, input on top.

    A box is a block; its height grows with its share of the model's multiply-adds. Every boundary
    is drawn as a line through the adapter and the weight of the stepping stone that starts there.
    The same plan gives the same bytes.
    """
    columns = [
        _stack(describe_blocks(partition), x)
        for partition, x in ((plan.teacher, TEACHER_X), (plan.student, STUDENT_X))
    ]
    height = columns[0][-1].bottom + GAP + INPUT_HEIGHT + MARGIN
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {height}",
            "width": str(WIDTH),
            "height": str(height),
            "font-family": "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif",
            "font-size": str(BODY),
            "fill": INK,
            "role": "img",
        },
    )
    ET.SubElement(svg, "title").text = "Aligned blocks of teacher and student"
    _rectangle(svg, 0, 0, WIDTH, height, ("#ffffff", "none"))
    _headings(svg, plan, forecast)
    for partition, column in zip((plan.teacher, plan.student), columns, strict=True):
        _draw_column(svg, partition, column)
    for stone, left, right in zip(plan.stones, *(column[:-1] for column in columns), strict=True):
        _draw_boundary(svg, stone, left, right)
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode") + "\n"


def _stack(blocks: Sequence[BlockFacts], x: int) -> list[_Box]:
    """The blocks as boxes from top to bottom; stacks of as many blocks end at the same height."""
    room = ROOM * len(blocks)
    shares = [facts.share for facts in blocks]
    if not any(shares):  # a model without convolutions and matrix products
        shares = [1 / len(blocks)] * len(blocks)
    boxes = []
    top, passed = TOP + INPUT_HEIGHT + GAP, 0.0
    for index, (facts, share) in enumerate(zip(blocks, shares, strict=True)):
        is_head = index == len(blocks) - 1
        before, passed = passed, passed + share
        height = LEAST_HEIGHT + round(room * passed) - round(room * before)
        colour = HEAD_COLOUR if is_head else COLOURS[index % len(COLOURS)]
        boxes.append(_Box(facts, x, top, height, colour))
        top += height + GAP
    return boxes


def _headings(svg: ET.Element, plan: Plan, forecast: Forecast) -> None:
    stones = f"{len(plan.stones)} stepping stone{'s' if len(plan.stones) > 1 else ''}"
    title = f"{stones}; one training step costs {forecast.ratio:.2f} × plain distillation"
    _text(svg, title, MARGIN, 36, size=TITLE, weight="600")
    legend = (
        "Height: share of the model's multiply-adds. Same colour: paired blocks. "
        "Arrow: an adapter carries the student's tensor into the teacher's next block."
    )
    _text(svg, legend, MARGIN, 60, size=SMALL, fill=FAINT)
    for role, partition, x in (
        ("teacher", plan.teacher, TEACHER_X),
        ("student", plan.student, STUDENT_X),
    ):
        name = partition.trace.name
        heading = role if name == role else f"{role}: {name}"
        _name(svg, heading, x, TOP - 36, COLUMN, size=16, weight="600")
        _text(svg, _sizes(partition.cost), x, TOP - 17, size=SMALL, fill=FAINT)


def _draw_column(svg: ET.Element, partition: Partition, column: Sequence[_Box]) -> None:
    rail = column[0].x + RAIL
    _terminal(svg, f"input {partition.trace.takes}", column[0].x, TOP)
    _flow(svg, rail, TOP + INPUT_HEIGHT, column[0].y)
    for box in column:
        _draw_block(svg, box)
    for box, following in pairwise(column):
        _flow(svg, rail, box.bottom, following.y)
    last = column[-1]
    _flow(svg, rail, last.bottom, last.bottom + GAP)
    _terminal(svg, f"{units.shape(last.facts.shape)} logits", last.x, last.bottom + GAP)


def _draw_block(svg: ET.Element, box: _Box) -> None:
    group = ET.SubElement(svg, "g", {"class": "block"})
    _rectangle(group, box.x, box.y, COLUMN, box.height, box.colour, radius=8)
    facts = box.facts
    operations = _operation_lines(facts.operations, (box.height - 22) // LINE - 2)
    y = box.y + (box.height - (2 + len(operations)) * LINE) // 2 + 14
    left, right = box.x + 16, box.x + COLUMN - 16
    title = "head" if facts.label == "head" else f"block {facts.label}"
    _text(group, title, left, y, weight="600")
    share = f"{units.compute(facts.share)} of compute"
    _text(group, share, right, y, anchor="end", weight="600")
    _text(group, _sizes(facts.cost), left, y + LINE)
    for number, line in enumerate(operations, start=2):
        _text(group, line, left, y + number * LINE, fill=FAINT)
    everything = ", ".join(f"{count} {word}" for word, count in facts.operations)
    ET.SubElement(group, "title").text = f"{title}, up to {facts.end}: {everything}"


def _sizes(cost: Cost) -> str:
    parameters, multiply_adds = units.count(cost.parameters), units.count(cost.multiply_adds)
    return f"{parameters} parameters · {multiply_adds} multiply-adds"


def _operation_lines(operations: Sequence[tuple[str, int]], most: int) -> list[str]:
    """The operations in words on at most ``most`` lines; kinds that do not fit are counted."""
    # a number stays on the line of its word: textwrap does not break at no-break spaces
    width = int((COLUMN - 32) / (BODY * CHARACTER))
    items = [f"{count} {word}".replace(" ", _TIED) for word, count in operations]
    for shown in range(len(items), 0, -1):
        left = len(items) - shown
        text = ", ".join(items[:shown]) + (f", {left} more kinds" if left else "")
        lines = wrap(text, width, break_long_words=False, break_on_hyphens=False)
        if len(lines) <= most and all(len(line) <= width for line in lines):
            return [line.replace(_TIED, " ") for line in lines]
    return [f"{len(items)} kinds of operations"] if items else []


def _draw_boundary(svg: ET.Element, stone: Stone, teacher: _Box, student: _Box) -> None:
    """Across both columns, and from the student through the label into the teacher."""
    outline = teacher.colour[1]
    group = ET.SubElement(svg, "g", {"class": "boundary"})
    ET.SubElement(
        group, "title"
    ).text = f"boundary {stone.depth}: {student.facts.end} → {teacher.facts.end}"
    for box in (teacher, student):
        _draw_cut(group, box, outline)
    left, right = TEACHER_X + COLUMN, STUDENT_X
    start, end = student.boundary, teacher.boundary
    middle, bend = (start + end) // 2, GUTTER // 2
    path = (
        f"M {right} {start} C {right - bend} {start} {right - bend} {middle} "
        f"{right - GUTTER} {middle} L {left + GUTTER} {middle} "
        f"C {left + bend} {middle} {left + bend} {end} {left + 10} {end}"
    )
    ET.SubElement(group, "path", {"d": path, "fill": "none"} | _stroke(outline, 2))
    tip = f"{left},{end} {left + 11},{end - 5} {left + 11},{end + 5}"
    ET.SubElement(group, "polygon", {"points": tip, "fill": outline})
    _draw_label(group, stone, middle, outline)


def _draw_cut(group: ET.Element, box: _Box, outline: str) -> None:
    """A dashed line where the model is cut; on it the last node's name and its shape."""
    y, right = box.boundary, box.x + COLUMN
    line = {"x1": str(box.x), "y1": str(y), "x2": str(right), "y2": str(y)}
    ET.SubElement(group, "line", line | _stroke(outline, 1.5) | {"stroke-dasharray": "5 4"})
    shape = units.shape(box.facts.shape)
    _text(group, shape, right - 4, y - 7, size=SMALL, anchor="end", weight="600")
    left = box.x + RAIL + 12
    room = right - 16 - round(len(shape) * SMALL * BOLD) - left
    _name(group, box.facts.end, left, y - 7, room, size=SMALL)


def _draw_label(group: ET.Element, stone: Stone, middle: int, outline: str) -> None:
    lines = _wrapped(str(stone), LABEL - 24)
    height = (len(lines) + 1) * LINE + 12
    top = middle - height // 2
    _rectangle(group, LABEL_X, top, LABEL, height, ("#ffffff", outline), radius=18)
    centre = LABEL_X + LABEL // 2
    for number, line in enumerate(lines):
        _text(group, line, centre, top + 19 + number * LINE, size=SMALL, anchor="middle")
    text = f"stone {stone.depth} · weight {units.weight(stone.weight)}"
    y = top + 19 + len(lines) * LINE
    _text(group, text, centre, y, size=SMALL, anchor="middle", weight="600")


def _wrapped(text: str, width: int) -> list[str]:
    """``text`` on one line, or on two: parted at its comma, or else near its middle."""
    if len(text) * SMALL * CHARACTER <= width:
        return [text]
    if ", " in text:
        first, rest = text.split(", ", 1)
        return [f"{first},", rest]
    breaks = [index for index, character in enumerate(text) if character == " "]
    middle = min(breaks, key=lambda index: abs(index - len(text) / 2))
    return [text[:middle], text[middle + 1 :]]


def _terminal(svg: ET.Element, text: str, x: int, y: int) -> None:
    """What goes into a model, or comes out of it."""
    _rectangle(svg, x, y, 168, INPUT_HEIGHT, ("#ffffff", "#9ca3af"), radius=INPUT_HEIGHT // 2)
    _text(svg, text, x + 18, y + 20, size=SMALL)


def _flow(svg: ET.Element, x: int, start: int, end: int) -> None:
    """A short arrow downwards."""
    line = {"x1": str(x), "y1": str(start), "x2": str(x), "y2": str(end - 7)}
    ET.SubElement(svg, "line", line | _stroke("#6b7280", 1.5))
    points = f"{x},{end - 1} {x - 4},{end - 9} {x + 4},{end - 9}"
    ET.SubElement(svg, "polygon", {"points": points, "fill": "#6b7280"})


def _rectangle(
    parent: ET.Element,
    x: int,
    y: int,
    width: int,
    height: int,
    colour: tuple[str, str],
    *,
    radius: int = 0,
) -> None:
    place = {"x": x, "y": y, "width": width, "height": height, "rx": radius}
    attributes = {name: str(value) for name, value in place.items()}
    fill, stroke = colour
    ET.SubElement(parent, "rect", attributes | {"fill": fill, "stroke": stroke})


def _stroke(colour: str, width: float) -> dict[str, str]:
    return {"stroke": colour, "stroke-width": f"{width:g}"}


def _name(
    parent: ET.Element, name: str, x: int, y: int, room: int, *, size: float, weight: str = "400"
) -> None:
    """A name shortened to the room it has; then the whole name is its title."""
    wide = CHARACTER if weight == "400" else BOLD
    shown = units.middle_cut(name, int(room / (size * wide)))
    element = _text(parent, shown, x, y, size=size, weight=weight)
    if shown != name:
        ET.SubElement(element, "title").text = units.printable(name)


def _text(
    parent: ET.Element,
    text: str,
    x: int,
    y: int,
    *,
    size: float = BODY,
    fill: str = INK,
    weight: str = "400",
    anchor: str = "start",
) -> ET.Element:
    attributes = {"x": str(x), "y": str(y), "font-size": f"{size:g}", "fill": fill}
    if weight != "400":
        attributes["font-weight"] = weight
    if anchor != "start":
        attributes["text-anchor"] = anchor
    element = ET.SubElement(parent, "text", attributes)
    element.text = text
    return element
