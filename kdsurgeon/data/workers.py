"""Make batches of pixels in other processes, in order; the result does not know of them.

Torch's own ``DataLoader`` runs the processes. Decisions a reader would otherwise undo:

* Each job is a whole batch, a pure function of its rows: so neither the number of workers nor
  where a pass starts changes anything.
* The loader gets a generator of its own, because it would draw a seed from the global one.
* Workers ignore SIGINT, and SIGTERM of anybody but their parent: a signal to the whole group lets
  the run finish its step. The parent's own, when it exits in the middle of a pass, ends them.
* An error of ours comes back as a value, because the loader would wrap it in its own text.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdsurgeon.errors import ResourceError, SurgeonError

MAX_WORKERS = 256


class _Jobs(Dataset):
    def __init__(self, make: Callable[[np.ndarray], Tensor]) -> None:
        self.make = make

    def __getitem__(self, rows: np.ndarray) -> Tensor | SurgeonError:
        try:
            return self.make(rows).contiguous()
        except SurgeonError as error:
            return error


def produce(
    make: Callable[[np.ndarray], Tensor], batches: Sequence[np.ndarray], workers: int
) -> Iterator[Tensor]:
    """``make(rows)`` for each of ``batches``, in their order, by so many processes; 0: here.

    Raises what ``make`` raises, and :class:`ResourceError` when a worker dies.
    """
    if not workers or not len(batches):
        yield from map(make, batches)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader = DataLoader(
            _Jobs(make),
            batch_size=None,
            sampler=batches,  # pyright: ignore[reportArgumentType]
            num_workers=min(workers, len(batches)),
            collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType]
            worker_init_fn=_begin,
            generator=torch.Generator(),
        )
        found = iter(loader)
    try:
        yield from map(_raised, found)
    except (RuntimeError, OSError) as error:
        if not str(error).startswith(("DataLoader worker", "unable to")):
            raise
        raise ResourceError(
            "a worker that reads images died or ran out of memory.",
            why=str(error).splitlines()[0],
            fix="use fewer workers (--workers 0: none), or give the machine more shared memory",
        ) from error
    finally:
        del found  # ends the workers now, though a traceback may keep this frame


def _raised(pixels: Tensor | SurgeonError) -> Tensor:
    if isinstance(pixels, SurgeonError):
        raise pixels
    return pixels


def _as_it_is(pixels: Tensor) -> Tensor:
    return pixels


def _begin(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    """End the process when its parent, and nobody else, sends SIGTERM."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
