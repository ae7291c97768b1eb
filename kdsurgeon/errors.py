"""Every error a user can meet, arranged by what they can do about it.

    SurgeonError            1  a fault of ours, unless a subclass says otherwise
    ├── UsageError          2  the command line, a recipe, or two things that do not fit together
    │   ├── ConfigError     2  a recipe or run file; lists every problem with its line
    │   ├── TraceError      2  a model that cannot be captured as a graph
    │   ├── AlignmentError  2  two models without a usable pair of cut points
    │   └── PlanError       2  a plan that does not belong to these models, or contradicts itself
    ├── ModelFileError      3  a model or checkpoint file: unsafe, damaged or of another kind
    ├── DataError           4  a data set
    ├── NumericsError       5  NaN, a parity gate, a quality gate
    ├── ResourceError       6  disk, memory, permission, device
    ├── PluginError         7  a plugin that fails to load
    ├── ToldElsewhere          another of several processes failed, and tells why (its code)
    └── Interrupted       130  stopped by a signal, after saving (143 for SIGTERM)

The number is the exit code of the command line. A message says what; its notes say where, why and
what to do: ``ModelFileError("teacher.pt is empty.", fix="copy it again")``.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SurgeonError(Exception):
    """What went wrong in one sentence, and labelled notes (``where``, ``why``, ``fix``, …)."""

    exit_code = 1

    def __init__(self, what: str, **notes: str | None) -> None:
        self.what = what
        self.notes = {label: note for label, note in notes.items() if note}
        super().__init__(what)

    def __str__(self) -> str:
        width = max((len(label) for label in self.notes), default=0) + 1
        lines = [self.what]
        for label, note in self.notes.items():
            first, *rest = note.splitlines()
            lines.append(f"  {label + ':':<{width}} {first}")
            lines.extend(" " * (width + 3) + line for line in rest)
        return "\n".join(lines)


class UsageError(SurgeonError):
    """The command line, a recipe, or two things that do not fit together."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe or run file; every problem at once, each with its place."""


class TraceError(UsageError):
    """A model that cannot be captured as a graph."""


class AlignmentError(UsageError):
    """Two models without a usable pair of cut points."""


class PlanError(UsageError):
    """A plan that does not belong to these models, or contradicts itself."""


class ModelFileError(SurgeonError):
    """A model or checkpoint file that is unsafe, damaged or of another kind."""

    exit_code = 3


class DataError(SurgeonError):
    """A data set that is empty, unreadable or of other classes than the models."""

    exit_code = 4


class NumericsError(SurgeonError):
    """A number that may not be: a NaN loss, a parity gap over its tolerance."""

    exit_code = 5


class ResourceError(SurgeonError):
    """Disk, memory, permission or device."""

    exit_code = 6


class PluginError(SurgeonError):
    """A plugin that fails to load; names its distribution."""

    exit_code = 7


class ToldElsewhere(SurgeonError):
    """Another of several processes failed, tells why, and this one ends with its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this run failed.")
        self.exit_code = exit_code


class Interrupted(SurgeonError):
    """Stopped by a signal, after saving."""

    exit_code = 130

    def __init__(self, what: str, *, exit_code: int = 130, **notes: str | None) -> None:
        super().__init__(what, **notes)
        self.exit_code = exit_code


def nearest(name: str, known: Iterable[str]) -> str | None:
    """``did you mean …?`` with the closest of ``known``, or None when nothing is close.

    >>> nearest("epoch", ["epochs", "seed"])
    'did you mean "epochs"?'
    """
    matches = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'did you mean "{matches[0]}"?' if matches else None
