"""Ctrl-C and SIGTERM: training ends after its step and is saved, anything else ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdsurgeon.training import Stop

NUMBERS = (signal.SIGINT, signal.SIGTERM)
AGAIN_AFTER = 0.05  # seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing needs to be brought to an end."""

    exit_code = 128 + signal.SIGTERM


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


class Interrupt:
    """The signal that asked for a stop, or 0. A second one ends at once, a third by force."""

    def __init__(self, stop: Stop) -> None:
        self.signal, self._stop = 0, stop

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.signal = number
        self._stop.ask()


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated`, so that drafts are removed and the exit code is 143."""
    with _handled((signal.SIGTERM,), _terminate), _unswallowed():
        yield


@contextmanager
def _unswallowed() -> Iterator[None]:
    """Python drops what a signal raises while an object is deleted: the signal comes once more."""
    before = sys.unraisablehook

    def told(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            is_term = issubclass(dropped.exc_type, Terminated)
            _send_later(signal.SIGTERM if is_term else signal.SIGINT)
        elif dropped.exc_type.__name__ != "StopWaiting":  # whoever polls will see it
            before(dropped)

    sys.unraisablehook = told
    try:
        yield
    finally:
        sys.unraisablehook = before


def _send_later(number: signal.Signals) -> None:
    """To this process, when the deletion is over."""
    timer = threading.Timer(AGAIN_AFTER, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


@contextmanager
def interruptible(stop: Stop) -> Iterator[Interrupt]:
    """Both signals ask ``stop`` to end what runs inside."""
    interrupt = Interrupt(stop)
    with _handled(NUMBERS, interrupt):
        yield interrupt


@contextmanager
def _handled(
    numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], Any]
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python allows it nowhere else
        yield
        return
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)
