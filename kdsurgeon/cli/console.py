"""Where text goes: results to standard output, errors and warnings to standard error."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


class _Console(Console):
    """rich's own answer to a closed pipe is to exit with 1, the code of our faults."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


out = _Console(highlight=False, emoji=False)
err = _Console(stderr=True, highlight=False, emoji=False)


def hush(is_quiet: bool = True) -> None:
    """Print nothing: one of several processes talks for all."""
    out.quiet = err.quiet = is_quiet


@contextmanager
def quietly() -> Iterator[None]:
    """Say nothing meanwhile: it has all been said before."""
    hush()
    try:
        yield
    finally:
        hush(False)


def warn(text: str) -> None:
    complain(f"warning: {text}")


def complain(text: str) -> None:
    """Lines to standard error, as they are but for what would steer the terminal."""
    err.print(_printable(text), markup=False, highlight=False, soft_wrap=True)


def say(text: str = "") -> None:
    """One line of plain text, never wrapped or coloured."""
    out.print(_printable(text), markup=False, soft_wrap=True)


def _printable(text: str) -> str:
    """``text``, which may quote a hostile file, with control characters spelled out.

    >>> _printable("a\\x1b[2J\\nb")
    'a\\\\x1b[2J\\nb'
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
