"""How much memory a piece of work takes at its peak, where the system says so (Linux)."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(work: Callable[[], T]) -> tuple[T, int | None]:
    """What ``work`` returns, and by how many bytes the process grew at most meanwhile.

    What was free before is given back to the system first, so that it is counted when it is taken
    again. None where the system has no such account.

    >>> kept, grown = peak_of(lambda: bytearray(64 << 20))
    >>> grown is None or 60 << 20 < grown < 80 << 20
    True
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR.write_text("5")  # sets the peak to what is used now
        before = _kilobytes("VmRSS")
    except (OSError, ValueError):
        return work(), None
    result = work()
    return result, max(0, _kilobytes("VmHWM") - before) << 10


def _kilobytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise ValueError(f"no {field}")
