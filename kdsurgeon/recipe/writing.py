"""Write plain data as YAML 1.2 text, the same on every machine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kdsurgeon.recipe.words import Place, scalar_text, short


def write_yaml(data: Mapping[str, Any], comments: Mapping[Place, str] | None = None) -> str:
    """YAML text that :func:`read_yaml` reads back as equal data, the same on every machine.

    ``data`` holds dicts with text keys, lists or tuples (read back as lists), text, numbers,
    booleans and None, in the order in which they are written. ``comments`` maps places, such as
    ``("loss", "temperature")`` or ``("stones", 0)``, to what is written behind them.

    >>> data = {"loss": {"tau": 4.0}, "stones": [1, 2]}
    >>> print(write_yaml(data, comments={("loss", "tau"): "ours"}), end="")
    loss:
      tau: 4.0  # ours
    stones: [1, 2]
    """
    if not data:
        return "{}\n"
    return "".join(f"{line}\n" for line in _mapping_lines(data, (), comments or {}))


def _mapping_lines(
    data: Mapping[str, Any], place: Place, comments: Mapping[Place, str]
) -> Iterator[str]:
    for key, value in data.items():
        assert isinstance(key, str), f"the key {key!r} is not text"
        yield from _entry_lines(f"{_text(key)}:", value, (*place, key), comments)


def _entry_lines(
    head: str, value: Any, place: Place, comments: Mapping[Place, str]
) -> Iterator[str]:
    """``head`` and its value: on one line where it fits there, else indented below."""
    comment = f"  # {short(comments[place], 1_000)}" if place in comments else ""
    if isinstance(value, Mapping) and value:
        yield head + comment
        yield from (f"  {line}" for line in _mapping_lines(value, place, comments))
    elif isinstance(value, list | tuple) and any(_is_nested(item) for item in value):
        yield head + comment
        yield from (f"  {line}" for line in _list_lines(value, place, comments))
    else:
        yield f"{head} {_flow(value)}{comment}"


def _list_lines(items: Iterable[Any], place: Place, comments: Mapping[Place, str]) -> Iterator[str]:
    for index, item in enumerate(items):
        here = (*place, index)
        if isinstance(item, Mapping) and item and here not in comments:
            first, *rest = _mapping_lines(item, here, comments)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
        else:
            yield from _entry_lines("-", item, here, comments)


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple) and len(value) > 0


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return _text(value) if isinstance(value, str) else scalar_text(value)


def _text(text: str) -> str:
    """Plain where no reader of YAML 1.1 or 1.2 can take it for anything but this text."""
    plain = re.fullmatch(r"[A-Za-z_/][\w./+@-]*(:[\w./+@-]+)*", text, re.ASCII)
    if plain and len(text) < 200 and text.lower() not in _YAML_1_1_WORDS:
        return text
    return '"' + "".join(_escaped(sign) for sign in text) + '"'


_YAML_1_1_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _escaped(sign: str) -> str:
    if sign in '"\\':
        return f"\\{sign}"
    if sign.isprintable():
        return sign
    return f"\\u{ord(sign):04x}" if ord(sign) < 0x10000 else f"\\U{ord(sign):08x}"
