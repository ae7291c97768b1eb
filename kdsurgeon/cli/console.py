"""Where text goes: results to standard output, errors and warnings to standard error."""

from rich.console import Console

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def warn(text: str) -> None:
    err.print(f"warning: {text}", markup=False, soft_wrap=True)


def say(text: str = "") -> None:
    """One line of plain text, never wrapped or coloured."""
    out.print(text, markup=False, soft_wrap=True)
