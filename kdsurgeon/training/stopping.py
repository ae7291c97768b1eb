"""Ask a run to end: after the step that it is in, or at once where it only waits for data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

T = TypeVar("T")


class StopWaiting(BaseException):
    """Ends a wait for data. No Exception: a data set that passes over its own may not catch it."""


class Stop:
    """Polled after every update and between batches of an evaluation; ends waits for data.

    ``ask`` may be called from a signal handler.

    >>> stop = Stop()
    >>> stop.ask()
    >>> stop()
    True
    """

    def __init__(self) -> None:
        self._asked = self._waits = False

    def __call__(self) -> bool:
        return self._asked

    def ask(self) -> None:
        """End the run. Raises :class:`StopWaiting` into a wait."""
        self._asked = True
        self._end_wait()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What may be ended at any point without loss."""
        self._waits = True
        try:
            if self._asked:  # between the last poll and here
                self._end_wait()
            yield
        finally:
            self._waits = False

    def _end_wait(self) -> None:
        if self._waits:
            self._waits = False
            raise StopWaiting


def waiting(stop: Callable[[], bool]) -> AbstractContextManager[None]:
    """``stop.waiting()``, where ``stop`` is more than a function."""
    return stop.waiting() if isinstance(stop, Stop) else nullcontext()


def until(stop: Callable[[], bool], batches: Iterable[T]) -> Iterator[T]:
    """The batches; raises :class:`StopWaiting` where ``stop`` asks for it between two of them, or
    while one is waited for.

    >>> list(until(lambda: False, "ab"))
    ['a', 'b']
    """
    source = iter(batches)
    while True:
        if stop():
            raise StopWaiting
        with waiting(stop):
            try:
                batch = next(source)
            except StopIteration:
                return
        yield batch
