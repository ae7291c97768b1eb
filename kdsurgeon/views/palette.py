"""The colours of every picture by role, for light pages and for dark ones.

Light colours stand as attributes, so any viewer of SVG shows them; dark ones in a style sheet that
overrides them where the reader prefers dark pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Paint:
    """Fill and outline on a light page, then on a dark one."""

    fill: str
    stroke: str
    dark_fill: str
    dark_stroke: str


NUM_HUES = 8
HEAD = "head"  # the hue of what has no partner in colour: the teacher, both last blocks, a total
STUDENT = "student"
_HUES = {  # light fill, light outline, dark fill, dark outline; also told apart by their order
    "0": ("#dbeafe", "#1d4ed8", "#172a54", "#7aa8f8"),
    "1": ("#dcfce7", "#15803d", "#11331f", "#4ade80"),
    "2": ("#fef3c7", "#a16207", "#3a2a0c", "#fbbf24"),
    "3": ("#fce7f3", "#be185d", "#431430", "#f472b6"),
    "4": ("#ccfbf1", "#0f766e", "#0c3532", "#2dd4bf"),
    "5": ("#ffedd5", "#c2410c", "#431c0a", "#fb923c"),
    "6": ("#f3e8ff", "#7e22ce", "#331750", "#c084fc"),
    "7": ("#e2e8f0", "#374151", "#27303f", "#cbd5e1"),
    HEAD: ("#f3f4f6", "#6b7280", "#1f2937", "#9ca3af"),
}
_PAINTS = {
    "page": Paint("#ffffff", "none", "#0f141b", "none"),
    "ink": Paint("#111827", "none", "#e8ebf0", "none"),
    "faint": Paint("#4b5563", "none", "#a9b3c1", "none"),
    "flow": Paint("#6b7280", "#6b7280", "#8b95a5", "#8b95a5"),
    "end": Paint("#ffffff", "#9ca3af", "#0f141b", "#6b7280"),
    "grid": Paint("none", "#e5e7eb", "none", "#2b3442"),
    "level": Paint("none", "#374151", "none", "#cbd5e1"),
}
for _name, (_fill, _line, _dark_fill, _dark_line) in _HUES.items():
    _PAINTS[f"card-{_name}"] = Paint(_fill, _line, _dark_fill, _dark_line)
    _PAINTS[f"port-{_name}"] = Paint("#ffffff", _line, "#0f141b", _dark_line)
    _PAINTS[f"rest-{_name}"] = Paint("#ffffff", "none", "#0f141b", "none")
    _PAINTS[f"mark-{_name}"] = Paint(_line, "none", _dark_line, "none")
    _PAINTS[f"wire-{_name}"] = Paint("none", _line, "none", _dark_line)

_CHART_PAINTS = _PAINTS | {
    "mark-student": Paint("#111827", "none", "#f3f4f6", "none"),
    "wire-student": Paint("none", "#111827", "none", "#f3f4f6"),
    "worse": Paint("#b91c1c", "none", "#f87171", "none"),
    "better": Paint("#15803d", "none", "#4ade80", "none"),
    "port-student": Paint("#ffffff", "#111827", "#0f141b", "#f3f4f6"),
}


def _dark(paints: Mapping[str, Paint]) -> str:
    rules = (
        f".kdsurgeon .{role} {{ fill: {paint.dark_fill}; stroke: {paint.dark_stroke}; }}"
        for role, paint in paints.items()
    )
    return f"@media screen and (prefers-color-scheme: dark) {{ {' '.join(rules)} }}"


DARK = _dark(_PAINTS)  # of the drawing of a plan
DARK_CHARTS = _dark(_CHART_PAINTS)  # of a page: of that drawing and of the charts


def painted(role: str) -> dict[str, str]:
    """The attributes of an SVG element of this role.

    >>> painted("mark-head")
    {'class': 'mark-head', 'fill': '#6b7280'}
    """
    paint = _CHART_PAINTS[role]
    outline = {} if paint.stroke == "none" else {"stroke": paint.stroke}
    return {"class": role, "fill": paint.fill} | outline


def hue(index: int) -> str:
    """The name of the hue of the pair of blocks with this index."""
    return str(index % NUM_HUES)


def hue_of(name: str) -> str:
    """The name of the hue of a learner: of a stone that of the blocks before it in the plan.

    >>> hue_of("stone 1") == hue(0), hue_of("student int8"), hue_of("teacher")
    (True, 'student', 'head')
    """
    depth = depth_of(name)
    if depth:
        return hue(depth - 1)
    # "average" is the moving average of the student
    return STUDENT if name.split(" ")[0] in ("student", "average") else HEAD


def depth_of(name: str) -> int:
    """The depth of the stone with this name; 0 of any other learner.

    >>> depth_of("stone 3"), depth_of("student")
    (3, 0)
    """
    kind, _, depth = name.partition(" ")
    return int(depth) if kind == "stone" and depth.isdecimal() else 0
