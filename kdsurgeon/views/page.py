"""The frame of every page: one file without scripts or links, for every screen and for paper.

Its own security policy forbids a browser to run or to fetch anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from kdsurgeon.views import palette, units

LIGHT = {
    "page": "#ffffff", "ink": "#111827", "faint": "#4b5563", "line": "#d8dce3", "soft": "#f3f4f6",
    "shade": "#a3aab6",
    "better": "#15803d", "worse": "#b91c1c",
}  # fmt: skip
DARK = {
    "page": "#0f141b", "ink": "#e8ebf0", "faint": "#a9b3c1", "line": "#2b3442", "soft": "#1a212c",
    "shade": "#5b6779",
    "better": "#4ade80", "worse": "#f87171",
}  # fmt: skip
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def _fade(colour: str, side: str, width: int, moves: str) -> str:
    """A band at one side of a box, from ``colour`` to nothing."""
    way, place = {"left": ("right", "0 0"), "right": ("left", "100% 0")}[side]
    return f"linear-gradient(to {way}, {colour}, transparent) {place} / {width}px 100% {moves}"


# A shadow at each side beyond which there is more: covers that move with the content lie on it
# where there is not.
_SCROLL_HINT = "background: {}; background-repeat: no-repeat;".format(
    ", ".join(
        [
            _fade("var(--page) 50%", "left", 44, "local"),
            _fade("var(--page) 50%", "right", 44, "local"),
            _fade("var(--shade)", "left", 18, "scroll"),
            _fade("var(--shade)", "right", 18, "scroll"),
        ]
    )
)
_STYLE = f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: var(--ink);
       background: var(--page); max-width: 1120px; margin: 2rem auto; padding: 0 24px; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0 0 .8rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-top: .5rem;
     border-top: 1px solid var(--line); }}
h3 {{ font-size: .95rem; margin: 1.2rem 0 .3rem; }}
p {{ margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }}
.faint {{ color: var(--faint); }} p.faint {{ font-size: 13px; }}
svg {{ max-width: 100%; height: auto; display: block; }} td svg {{ max-width: none; }}
.wide {{ margin: 0 -24px; }} .wide svg {{ width: 100%; }}
.chart.wide {{ margin: 0; }} .chart.wide svg {{ width: auto; }}
.drawing svg {{ min-width: 900px; }}
.narrow, .paper {{ display: none; }}
.box {{ overflow: auto; max-height: 32rem; {_SCROLL_HINT} }}
.box:focus-visible {{ outline: 2px solid var(--faint); outline-offset: 2px; }}
table {{ border-collapse: separate; border-spacing: 0; font-size: 13px;
        font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top;
         white-space: pre-line; }}
th {{ font-weight: 600; white-space: normal; position: sticky; top: 0; background: var(--page);
     box-shadow: inset 0 -2px var(--line); vertical-align: bottom; }}
.pinned tr > :first-child {{ position: sticky; left: 0; background: var(--page); }}
.pinned th:first-child {{ z-index: 1; }}
td {{ border-bottom: 1px solid var(--line); }}
tr > :last-child {{ padding-right: 4px; }}
.number {{ text-align: right; }} td span {{ white-space: nowrap; }}
.better {{ color: var(--better); }} .worse {{ color: var(--worse); }}
pre {{ background: var(--soft); padding: .9rem 1rem; border-radius: 6px; font-size: 13px;
      margin: .5rem 0; }}
dl {{ display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1.2rem;
     margin: .5rem 0; }}
dt {{ color: var(--faint); }} dd {{ margin: 0; overflow-wrap: anywhere; }}
@media screen and (max-width: 860px) {{
  body {{ margin: 1rem auto; padding: 0 .9rem; }} h1 {{ font-size: 1.2rem; }}
  .wide {{ display: none; }} .narrow {{ display: block; }}
  .narrow svg {{ width: 100%; max-width: 520px; margin: 0 auto; }}
  th, td {{ padding-right: .55rem; }}
}}
@media screen and (max-width: 480px) {{
  table {{ font-size: 12px; }} th, td {{ padding-right: .45rem; }}
  dl {{ grid-template-columns: minmax(0, 1fr); gap: 0; }} dd {{ margin: 0 0 .4rem; }}
}}
{palette.DARK_CHARTS}
@media print {{
  body {{ font-size: 10pt; max-width: none; margin: 0; padding: 0; }}
  .wide {{ margin: 0; }} .drawing svg {{ min-width: 0; }}
  .box {{ overflow: visible; max-height: none; background: none; }}
  table {{ font-size: 7.5pt; }} th, td {{ padding-right: .5rem; }} th {{ position: static; }}
  pre {{ white-space: pre-wrap; font-size: 8pt; }}
  .screen {{ display: none; }} .paper {{ display: block; }}
  h1, h2, h3 {{ break-after: avoid; }} svg, tr, dd {{ break-inside: avoid; }}
}}
"""


def page(title: str, *parts: str) -> str:
    """A whole HTML page. ``parts`` are put in as they are; the title is only ever text."""
    title = escape(units.printable(title))
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    body = "\n".join((f"<h1>{title}</h1>", *parts))
    return f"{head}{body}\n</body>\n</html>\n"


def section(heading: str, *parts: str) -> str:
    """A heading and what stands below it."""
    return "\n".join((f"<section>\n<h2>{escape(heading)}</h2>", *parts, "</section>"))


def paragraph(text: str, *, kind: str = "") -> str:
    """One of text; ``kind`` is a class of the style sheet."""
    named = f' class="{kind}"' if kind else ""
    return f"<p{named}>{escape(units.printable(text))}</p>"


def both(wide: str, narrow: str, *, kind: str = "") -> str:
    """One picture in its form for wide pages and in that for phones."""
    kind = f"{kind} " if kind else ""
    return f'<div class="{kind}wide">{wide}</div>\n<div class="{kind}narrow">{narrow}</div>'


def box(inner: str, name: str) -> str:
    """What may be wider than a phone, or long: it scrolls in itself, also by the keyboard."""
    return f'<div class="box" tabindex="0" role="region" aria-label="{escape(name)}">{inner}</div>'


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int, name: str = "table"
) -> str:
    """An HTML table whose first ``words`` columns hold text and all others numbers."""

    def line(tag: str, cells: Iterable[str]) -> str:
        kinds = ("" if index < words else ' class="number"' for index in range(len(header)))
        inner = (f"<{tag}{k}>{c}</{tag}>" for k, c in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    body = "\n".join(line("td", map(tied, row)) for row in rows)
    head = line("th", map(_heading, header))
    inner = f'<table class="pinned">\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>'
    return box(inner, name)


def _heading(cell: str) -> str:
    """It breaks where a column is narrow, but not before a number.

    >>> _heading("ce stone 1")
    'ce stone&nbsp;1'
    """
    return re.sub(r" (?=\d)", "&nbsp;", escape(cell))


def tied(cell: str) -> str:
    """A cell that breaks after a comma and before a plus only, not between a word and its number.

    >>> tied("progress 0.1 + kind 0.2").split(" ")
    ['progress&nbsp;0.1', '+&nbsp;kind&nbsp;0.2']
    """
    text = escape(cell).replace(" ", "&nbsp;")
    return text.replace(",&nbsp;", ", ").replace("&nbsp;+", " +")


def facts(pairs: Mapping[str, str]) -> str:
    """Names with what they stand for."""
    lines = (
        f"<dt>{escape(units.printable(name))}</dt><dd>{escape(units.printable(text))}</dd>"
        for name, text in pairs.items()
    )
    return f"<dl>{''.join(lines)}</dl>"
