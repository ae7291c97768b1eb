"""Quantities as people read them: three significant digits, a unit, a dash for what is unknown."""

from __future__ import annotations

from collections.abc import Sequence

UNKNOWN = "–"


def count(number: float | None) -> str:
    """A number of parameters or multiply-adds.

    >>> count(3954), count(887_000), count(999_960), count(17), count(None)
    ('3.95 k', '887 k', '1.00 M', '17', '–')
    """
    return _scaled(number, ("", " k", " M", " G", " T", " P"))


def size(number: float | None) -> str:
    """A number of bytes, in powers of ten.

    >>> size(3_600_000), size(512)
    ('3.60 MB', '512 B')
    """
    return _scaled(number, (" B", " kB", " MB", " GB", " TB", " PB"))


def milliseconds(number: float | None) -> str:
    """A latency.

    >>> milliseconds(0.0142), milliseconds(0.2123), milliseconds(12.34)
    ('0.014 ms', '0.21 ms', '12.3 ms')
    """
    if number is None:
        return UNKNOWN
    return f"{number:.{3 if number < 0.1 else 2 if number < 10 else 1}f} ms"


def duration(seconds: float) -> str:
    """How long something took.

    >>> duration(42.3), duration(75), duration(7384)
    ('42 s', '1 min 15 s', '2 h 3 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def percent(share: float | None, digits: int = 1) -> str:
    """A share between 0 and 1.

    >>> percent(0.9777), percent(0.25, 0)
    ('97.8 %', '25 %')
    """
    return UNKNOWN if share is None else f"{100 * share:.{digits}f} %"


def compute(share: float, digits: int = 0) -> str:
    """A share of compute; neither rounded down to nothing nor up to everything.

    >>> compute(0.124), compute(0.001), compute(0.999), compute(1.0), compute(0.9999, 1)
    ('12 %', '<1 %', '>99 %', '100 %', '>99.9 %')
    """
    least = 0.01 / 10**digits
    if 0 < share < least / 2:
        return f"<{percent(least, digits)}"
    return (
        f">{percent(1 - least, digits)}" if 1 - least / 2 <= share < 1 else percent(share, digits)
    )


def ratio(teacher: float, student: float) -> str:
    """How many times smaller the student is.

    >>> ratio(887_000, 3954), ratio(10, 4), ratio(1, 0)
    ('224 ×', '2.50 ×', '–')
    """
    return f"{_three_digits(teacher / student)} ×" if student else UNKNOWN


def weight(number: float) -> str:
    """A weight in a loss.

    >>> weight(1.0), weight(0.0078125)
    ('1', '0.00781')
    """
    return f"{number:.3g}"


def gap(number: float) -> str:
    """A largest absolute difference; 0 only where it is exactly that.

    >>> gap(0.0), gap(2.384e-7)
    ('0', '2.4e-07')
    """
    return f"{number:.1e}" if number else "0"


def shape(sizes: Sequence[int]) -> str:
    """A tensor's shape without its batch.

    >>> shape((32, 8, 8))
    '32×8×8'
    """
    return "×".join(map(str, sizes))


def printable(name: str) -> str:
    """``name`` with a sign in place of each character that no page or terminal may hold.

    >>> printable("layer\\x1b[2J")
    'layer�[2J'
    """
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name)


def middle_cut(name: str, width: int) -> str:
    """``name`` in at most ``width`` characters, shortened in the middle.

    Its end says more than its beginning (which layer of the block), so it keeps the larger part.

    >>> middle_cut("features.stage3.unit12.relu_2", 17)
    'feature…12.relu_2'
    """
    name = printable(name)
    if len(name) <= width:
        return name
    if width < 2:
        return "…"[:width]
    tail = width * 9 // 17 if width > 16 else width // 2
    return name[: width - 1 - tail] + "…" + name[len(name) - tail :]


def _scaled(number: float | None, names: Sequence[str]) -> str:
    if number is None:
        return UNKNOWN
    steps = 0
    while float(f"{number:.3g}") >= 1000 and steps < len(names) - 1:
        number, steps = number / 1000, steps + 1
    return (_three_digits(number) if steps else f"{number:g}") + names[steps]


def _three_digits(number: float) -> str:
    if number >= 99.95:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"
