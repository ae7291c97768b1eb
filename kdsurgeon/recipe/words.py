"""How values and places read in a sentence: on one printable line, as YAML spells them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

Place = tuple[str | int, ...]


def dotted(place: Place) -> str:
    """``loss.stones`` for the place ``("loss", "stones")``."""
    return short(".".join(map(str, place)), 80)


def shown(value: Any) -> str:
    """Any value, text in quotes.

    >>> shown("kd"), shown([1, None, "x"]), shown({"lr": 0.1})
    ('"kd"', '[1, null, "x"]', 'keys of its own')
    """
    if isinstance(value, Mapping):
        return "keys of its own"
    if isinstance(value, str):
        return json.dumps(short(value), ensure_ascii=False)
    if isinstance(value, list | tuple):
        return short("[" + ", ".join(map(shown, value[:20])) + "]")
    if isinstance(value, int) and value.bit_length() > 1_000:  # Python refuses to write the longest
        return f"a whole number of {value.bit_length():,} bits"
    if value is None or isinstance(value, int | float):
        return short(scalar_text(value))
    return short(repr(value))


def short(text: str, width: int = 60) -> str:
    """One printable line of at most ``width`` signs."""
    line = "".join(sign if sign.isprintable() else "\ufffd" for sign in text)
    return line if len(line) <= width else line[: width - 1] + "…"


def scalar_text(value: Any) -> str:
    """A number, boolean or None as plain YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    assert isinstance(value, int | float), f"YAML cannot hold {type(value).__name__}"
    return repr(value)
