"""A plan as a picture: both graphs side by side, paired blocks in one colour.

Both columns hold equally many cards, and paired cards stand at one height, so that a boundary is a
straight way from the student's tensor through its adapter to the teacher's. Between wide columns
the adapters stand in the middle; on a narrow page they stand below the tensors that they join.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from textwrap import wrap

from kdsurgeon.adapters import AdapterSpec
from kdsurgeon.costs import Cost
from kdsurgeon.partitioning import Partition
from kdsurgeon.stones import Forecast, Plan, Stone
from kdsurgeon.views import palette, units
from kdsurgeon.views.blocks import BlockFacts, End, describe_blocks

LINE = 18  # from one line of text to the next
PAD = 14  # inside a card
STEP = 20  # from a card to its tensors, and from them to the next card
BAR = 6
BEND = 40  # beside an adapter: room for the line that leads there
TITLE, BODY, SMALL = 18, 14, 12.5  # font sizes in pixels
CHARACTER = 0.6  # width of an average character of sans-serif text, as a share of its size;
BOLD = 0.7  # on the safe side for the wider faces that a viewer may substitute
_TIED = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Form:
    """How wide a picture is, its margin, and the room between its columns, in pixels."""

    width: int
    margin: int
    between: int

    @property
    def column(self) -> int:
        return (self.width - 2 * self.margin - self.between) // 2

    @property
    def columns(self) -> tuple[int, int]:
        """Where the teacher's column begins, and the student's."""
        return self.margin, self.width - self.margin - self.column

    @property
    def is_narrow(self) -> bool:
        return self.between < 4 * BEND


WIDE = Form(width=1120, margin=24, between=324)
NARROW = Form(width=360, margin=10, between=12)


def draw_plan(plan: Plan, forecast: Forecast, *, form: Form = WIDE) -> str:
    """The plan as an SVG document: teacher left, student right, input on top.

    A card is a block; the bar in it is its share of the model's multiply-adds. Between two cards
    stand the tensors that the model is cut at, and between those of both models the adapters of the
    stepping stone that starts there. Dark where the reader prefers that. The same plan gives the
    same bytes.
    """
    svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg"})
    ET.SubElement(svg, "title").text = "Aligned blocks of teacher and student"
    ET.SubElement(svg, "style").text = palette.DARK
    page = _rectangle(svg, "page", 0, 0, form.width, 0)
    sides = (plan.teacher, plan.student)
    top = _headings(svg, plan, forecast, form)
    top = _terminals(svg, [f"input {side.trace.takes}" for side in sides], top, form)
    blocks = list(zip(*map(describe_blocks, sides), strict=True))
    for index, (pair, stone) in enumerate(zip(blocks, [*plan.stones, None], strict=True)):
        hue = palette.hue(index) if stone else palette.HEAD
        for x in form.columns:
            _flow(svg, _rail(x, form), top, top + STEP)
        top = _draw_cards(svg, pair, top + STEP, hue, form)
        if stone:
            top = _draw_boundary(svg, stone, pair, top, hue, form)
    for x in form.columns:
        _flow(svg, _rail(x, form), top, top + STEP)
    logits = [f"{facts.ends[0].layout} logits" for facts in blocks[-1]]
    height = _terminals(svg, logits, top + STEP, form) + form.margin
    page.set("height", str(height))
    svg.attrib |= {
        "viewBox": f"0 0 {form.width} {height}",
        "width": str(form.width),
        "height": str(height),
        "class": "kdsurgeon",
        "font-family": "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif",
        "role": "img",
    }
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode") + "\n"


# what stands above the graphs ────────────────────────────────────────────────────────────────────


def _headings(svg: ET.Element, plan: Plan, forecast: Forecast, form: Form) -> int:
    """Title, legend, and both models' names and sizes; returns how far down they reach."""
    number = len(plan.stones)
    stones = f"{number or 'no'} stepping stone{'' if number == 1 else 's'}"
    title = f"{stones}; a training step takes {forecast.time_ratio:.2f} × plain distillation"
    legend = (
        "Bar: share of the model's multiply-adds. Same colour: paired blocks. "
        "Arrow: an adapter feeds the student's tensor to the teacher's next block."
    )
    y, room = form.margin + TITLE, form.width - 2 * form.margin
    for line in _wrapped(title, room, TITLE, BOLD):
        _text(svg, line, form.margin, y, size=TITLE, weight="600")
        y += 24
    for line in _wrapped(legend, room, SMALL, CHARACTER):
        _text(svg, line, form.margin, y, size=SMALL, role="faint")
        y += LINE
    ends = [
        _draw_name(svg, role, side, x, y + 12, form)
        for role, side, x in zip(
            ("teacher", "student"), (plan.teacher, plan.student), form.columns, strict=True
        )
    ]
    return max(ends) + 4


def _draw_name(svg: ET.Element, role: str, side: Partition, x: int, y: int, form: Form) -> int:
    y += 10
    if side.trace.name != role:
        _text(svg, role, x, y, size=SMALL, role="faint")
        y += LINE + 1
    _name(svg, side.trace.name, x, y, form.column, size=BODY, weight="600")
    for line in _sizes(side.cost, form):
        y += LINE
        _text(svg, line, x, y, size=SMALL, role="faint")
    return y + 10


def _sizes(cost: Cost, form: Form) -> list[str]:
    sizes = [
        f"{units.count(cost.parameters)} parameters",
        f"{units.count(cost.multiply_adds)} multiply-adds",
    ]
    return sizes if form.is_narrow else [" · ".join(sizes)]


def _terminals(svg: ET.Element, texts: Sequence[str], top: int, form: Form) -> int:
    """What goes into both models, or comes out of them."""
    height = 28
    for text, x in zip(texts, form.columns, strict=True):
        room = form.column - 28
        width = min(form.column, 28 + round(len(text) * SMALL * CHARACTER))
        _rectangle(svg, "end", x, top, width, height, radius=height // 2)
        _name(svg, text, x + 14, top + 18, room, size=SMALL)
    return top + height


# blocks ──────────────────────────────────────────────────────────────────────────────────────────


def _draw_cards(svg: ET.Element, pair: Sequence[BlockFacts], top: int, hue: str, form: Form) -> int:
    room = form.column - 2 * PAD
    bodies = [
        (_sizes(facts.cost, form), _operation_lines(facts.operations, room)) for facts in pair
    ]
    lines = max(len(sizes) + len(operations) for sizes, operations in bodies)
    height = PAD + LINE + BAR + 4 + lines * LINE + PAD
    for facts, body, x in zip(pair, bodies, form.columns, strict=True):
        _draw_card(svg, facts, body, (x, top, form.column, height), hue)
    return top + height


def _draw_card(
    svg: ET.Element,
    facts: BlockFacts,
    body: tuple[list[str], list[str]],
    place: tuple[int, int, int, int],
    hue: str,
) -> None:
    x, top, width, height = place
    left, room, y = x + PAD, width - 2 * PAD, top + PAD + 10
    group = ET.SubElement(svg, "g", {"class": "block"})
    _rectangle(group, f"card-{hue}", x, top, width, height, radius=8)
    title = "head" if facts.label == "head" else f"block {facts.label}"
    _text(group, title, left, y, weight="600")
    of_compute = " of compute" if room > 200 else ""
    share = f"{units.compute(facts.share)}{of_compute}"
    _text(group, share, left + room, y, anchor="end", weight="600")
    _rectangle(group, f"rest-{hue}", left, y + 9, room, BAR, radius=BAR // 2)
    filled = round(room * facts.share)
    if filled:
        _rectangle(group, f"mark-{hue}", left, y + 9, filled, BAR, radius=BAR // 2)
    y += BAR + 12
    for lines, role in zip(body, ("ink", "faint"), strict=True):
        for line in lines:
            y += LINE
            _text(group, line, left, y - 1, size=13, role=role)
    everything = ", ".join(f"{count} {word}" for word, count in facts.operations)
    ends = " + ".join(end.name for end in facts.ends)
    ET.SubElement(group, "title").text = f"{title}, up to {ends}: {everything}"


def _operation_lines(operations: Sequence[tuple[str, int]], room: int) -> list[str]:
    """The operations in words on at most two lines; kinds that do not fit are counted."""
    # a number stays on the line of its word: textwrap does not break at no-break spaces
    width = int(room / (13 * CHARACTER))
    items = [f"{count} {word}".replace(" ", _TIED) for word, count in operations]
    for shown in range(len(items), 0, -1):
        left = len(items) - shown
        rest = f", {left} other{'s' if left > 1 else ''}".replace(f"{left} ", f"{left}{_TIED}")
        text = ", ".join(items[:shown]) + (rest if left else "")
        lines = wrap(text, width, break_long_words=False, break_on_hyphens=False)
        if len(lines) <= 2 and all(len(line) <= width for line in lines):
            return [line.replace(_TIED, " ") for line in lines]
    return [f"{len(items)} kinds"] if items else []


# boundaries ──────────────────────────────────────────────────────────────────────────────────────


def _draw_boundary(
    svg: ET.Element, stone: Stone, pair: Sequence[BlockFacts], top: int, hue: str, form: Form
) -> int:
    """The tensors of both cuts, and the adapters from the student's to the teacher's."""
    group = ET.SubElement(svg, "g", {"class": "boundary"})
    names = [" + ".join(end.name for end in facts.ends) for facts in pair]
    ET.SubElement(group, "title").text = f"boundary {stone.depth}: {names[1]} → {names[0]}"
    ends = [facts.ends for facts in pair]
    draw = _draw_below if form.is_narrow else _draw_between
    return draw(group, stone, ends, top, hue, form)


def _draw_between(
    group: ET.Element,
    stone: Stone,
    ends: Sequence[Sequence[End]],
    top: int,
    hue: str,
    form: Form,
) -> int:
    """Tensor beside tensor, every adapter at the height of the teacher's tensor it makes."""
    left, right = form.margin + form.column, form.columns[1]
    x, width = left + BEND, form.between - 2 * BEND
    labels = [_steps(spec, width - 20) for spec in stone.adapters]
    heights = [max(28, len(label) * LINE + 10) for label in labels]
    heights += [28] * (max(map(len, ends)) - len(heights))
    centres = [top + STEP + sum(heights[:i]) + 8 * i + h // 2 for i, h in enumerate(heights)]
    for column, tensors in zip(form.columns, ends, strict=True):
        _line(group, "flow", _rail(column, form), top, centres[0] - 14)
        for end, centre in zip(tensors, centres, strict=False):
            _draw_tensor(group, [end], column, centre - 14, hue, form)
        for above, below in pairwise(centres[: len(tensors)]):
            _line(group, "flow", _rail(column, form), above + 14, below - 14)
    bottom = centres[-1] + heights[-1] // 2
    for column, tensors in zip(form.columns, ends, strict=True):
        _line(group, "flow", _rail(column, form), centres[len(tensors) - 1] + 14, bottom)
    for spec, label, height, centre in zip(stone.adapters, labels, heights, centres, strict=False):
        start = centres[_source(spec, ends[1])]
        bend = right - BEND // 2
        path = f"M {right} {start} C {bend} {start} {bend} {centre} {x + width} {centre}"
        ET.SubElement(group, "path", {"d": path} | _wire(hue))
        ET.SubElement(group, "path", {"d": f"M {x} {centre} H {left + 10}"} | _wire(hue))
        tip = f"{left + 1},{centre} {left + 12},{centre - 5} {left + 12},{centre + 5}"
        ET.SubElement(group, "polygon", {"points": tip} | palette.painted(f"mark-{hue}"))
        _draw_label(group, label, (x, centre - height // 2, width, height), hue)
    y = centres[0] - heights[0] // 2 - 9
    _text(group, _stone(stone), form.width // 2, y, size=SMALL, anchor="middle", weight="600")
    return bottom


def _draw_below(
    group: ET.Element,
    stone: Stone,
    ends: Sequence[Sequence[End]],
    top: int,
    hue: str,
    form: Form,
) -> int:
    """All adapters in one label under the tensors that they join."""
    y = top + STEP // 2
    bottoms = []
    for column, tensors in zip(form.columns, ends, strict=True):
        _line(group, "flow", _rail(column, form), top, y)
        bottoms.append(_draw_tensor(group, tensors, column, y, hue, form))
    inset = form.margin + 26
    width = form.width - 2 * inset
    lines = [line for spec in stone.adapters for line in _steps(spec, width - 20)]
    label, height = max(bottoms) + STEP, (len(lines) + 1) * LINE + 10
    teacher, student = (x + form.column // 2 for x in form.columns)
    for x, start, end in ((teacher, label, bottoms[0]), (student, bottoms[1], label)):
        way = 1 if end > start else -1
        ET.SubElement(group, "path", {"d": f"M {x} {start} V {end - 8 * way}"} | _wire(hue))
        tip = f"{x},{end - way} {x - 5},{end - 11 * way} {x + 5},{end - 11 * way}"
        ET.SubElement(group, "polygon", {"points": tip} | palette.painted(f"mark-{hue}"))
    _draw_label(group, [_stone(stone), *lines], (inset, label, width, height), hue, titled=True)
    for column, bottom in zip(form.columns, bottoms, strict=True):
        _line(group, "flow", _rail(column, form), bottom, label + height)
    return label + height


def _stone(stone: Stone) -> str:
    return f"stone {stone.depth} · weight {units.weight(stone.weight)}"


def _steps(spec: AdapterSpec, room: int) -> list[str]:
    """What the adapter does, broken after a step rather than within one."""
    most = int(room / (SMALL * CHARACTER))
    steps = str(spec).split(", ")
    tied = [step.replace(" ", _TIED) if len(step) < most else step for step in steps]
    lines = _wrapped(", ".join(tied), room, SMALL, CHARACTER)
    return [line.replace(_TIED, " ") for line in lines]


def _source(spec: AdapterSpec, tensors: Sequence[End]) -> int:
    """Which of the student's tensors the adapter reads."""
    return [end.name for end in tensors].index(units.printable(spec.source.name))


def _draw_tensor(
    group: ET.Element, tensors: Sequence[End], x: int, top: int, hue: str, form: Form
) -> int:
    """Name and layout of tensors at a cut: on one line each where the column is wide."""
    lines = 2 * len(tensors) if form.is_narrow else len(tensors)
    height = lines * LINE + 10
    _rectangle(group, f"port-{hue}", x, top, form.column, height, radius=5)
    left, right, y = x + 10, x + form.column - 10, top + 18
    for end in tensors:
        if form.is_narrow:
            _name(group, end.name, left, y, right - left, size=SMALL, role="faint")
            y += LINE
            _text(group, end.layout, left, y, size=12)
        else:
            room = right - left - 12 - round(len(end.layout) * SMALL * BOLD)
            _name(group, end.name, left, y, room, size=SMALL)
            _text(group, end.layout, right, y, size=SMALL, anchor="end", weight="600")
        y += LINE
    return top + height


def _draw_label(
    group: ET.Element,
    lines: Sequence[str],
    place: tuple[int, int, int, int],
    hue: str,
    *,
    titled: bool = False,
) -> None:
    x, top, width, height = place
    box = ET.SubElement(group, "g", {"class": "adapter"})
    _rectangle(box, f"card-{hue}", x, top, width, height, radius=14)
    y = top + (height - len(lines) * LINE) // 2 + 13
    for number, line in enumerate(lines):
        weight = "600" if titled and number == 0 else "400"
        at = (x + width // 2, y + number * LINE)
        _text(box, line, *at, size=SMALL, anchor="middle", weight=weight)


def _rail(x: int, form: Form) -> int:
    """Where the flow of a column runs down: on a narrow page at its outer edge, past the labels."""
    inset = 12 if form.is_narrow else 30
    return (
        x + inset if x == form.margin else x + form.column - inset if form.is_narrow else x + inset
    )


# strokes and text ────────────────────────────────────────────────────────────────────────────────


def _line(parent: ET.Element, role: str, x: int, start: int, end: int) -> None:
    places = {"x1": x, "y1": start, "x2": x, "y2": end}
    attributes = {name: str(value) for name, value in places.items()}
    ET.SubElement(parent, "line", attributes | palette.painted(role) | {"stroke-width": "1.5"})


def _flow(svg: ET.Element, x: int, start: int, end: int) -> None:
    """A short arrow downwards."""
    _line(svg, "flow", x, start, end - 7)
    points = f"{x},{end - 1} {x - 4},{end - 9} {x + 4},{end - 9}"
    ET.SubElement(svg, "polygon", {"points": points} | palette.painted("flow"))


def _wire(hue: str) -> dict[str, str]:
    return palette.painted(f"wire-{hue}") | {"stroke-width": "2"}


def _rectangle(
    parent: ET.Element, role: str, x: int, y: int, width: int, height: int, *, radius: int = 0
) -> ET.Element:
    place = {"x": x, "y": y, "width": width, "height": height, "rx": radius}
    attributes = {name: str(value) for name, value in place.items()}
    return ET.SubElement(parent, "rect", attributes | palette.painted(role))


def _wrapped(text: str, room: int, size: float, wide: float) -> list[str]:
    """``text`` in lines of at most ``room`` pixels."""
    return wrap(text, int(room / (size * wide)), break_on_hyphens=False)


def _name(
    parent: ET.Element,
    name: str,
    x: int,
    y: int,
    room: int,
    *,
    size: float,
    weight: str = "400",
    role: str = "ink",
) -> None:
    """A name shortened to the room it has; then the whole name is its title."""
    wide = CHARACTER if weight == "400" else BOLD
    shown = units.middle_cut(name, int(room / (size * wide)))
    element = _text(parent, shown, x, y, size=size, weight=weight, role=role)
    if shown != name:
        ET.SubElement(element, "title").text = units.printable(name)


def _text(
    parent: ET.Element,
    text: str,
    x: int,
    y: int,
    *,
    size: float = BODY,
    role: str = "ink",
    weight: str = "400",
    anchor: str = "start",
) -> ET.Element:
    attributes = {"x": str(x), "y": str(y), "font-size": f"{size:g}"} | palette.painted(role)
    if weight != "400":
        attributes["font-weight"] = weight
    if anchor != "start":
        attributes["text-anchor"] = anchor
    element = ET.SubElement(parent, "text", attributes)
    element.text = text
    return element
