"""Send a run's numbers to where people look at them, by plugins of the kind ``trackers``.

What a run must not lose stands in its folder (metrics.jsonl); a tracker is a view of it. So one
that cannot be opened refuses the run, and one that fails later is left out, with a message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kdsurgeon import plugins
from kdsurgeon.errors import PluginError, SurgeonError


class Tracker(Protocol):
    """What ``open(folder, settings)`` of a plugin gives; the settings are plain values."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers by name, such as ``train/ce student``, after so many steps."""

    def close(self) -> None:
        """The run ends."""


class Trackers:
    """Several trackers as one.

    Raises:
        UsageError: no tracker of a name is installed.
        PluginError: one cannot be opened, often because its package is missing.

    >>> trackers = Trackers((), Path("run"), {}, warn=print)
    >>> trackers.log({"train/total": 1.5}, step=1)
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        settings: Mapping[str, Any],
        *,
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        try:
            for name in names:
                self._open[name] = _opened(name, folder, settings)
        except SurgeonError:
            self.close()
            raise

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers that are not finite, or None, are left out."""
        known = {k: v for k, v in numbers.items() if v is not None and math.isfinite(v)}
        self._each(lambda tracker: tracker.log(known, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open = {}

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except Exception as error:
                del self._open[name]
                self._warn(
                    f"the tracker {name} failed and is left out from here on: "
                    f"{type(error).__name__}: {error}"
                )


def _opened(name: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    opener = plugins.load("trackers", name)
    try:
        return opener(folder, settings)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"the tracker {name} cannot be opened.",
            why=f"{type(error).__name__}: {error}",
            fix=f"mend it, or leave it out: --track without {name}, or --track none",
        ) from error
