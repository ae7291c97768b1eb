"""Open a foreign ONNX file for the first time in a process of its own, which may come to harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np

from kdsurgeon.checkpoints.pickles import printable
from kdsurgeon.errors import ModelFileError
from kdsurgeon.exporting import runtime

SECONDS = 60  # that opening a file and running one sample of it may take


SPARE_MEMORY = 4 << 30  # bytes that it may take beside 4 × its size


def try_out(
    name: str,
    content: bytes,
    outside: Mapping[str, np.ndarray],
    sample: Sequence[int] | None,
) -> None:
    """Open a foreign model, and run one sample, in a process that may come to harm.

    ``sample`` is the shape of one, without the batch axis, where the model leaves it free. Raises
    :class:`ModelFileError` when ONNX Runtime cannot do it within the limits above.
    """
    size = len(content) + sum(value.nbytes for value in outside.values())
    order = {
        "size": len(content),
        "tensors": [
            {"name": key, "type": value.dtype.str, "shape": value.shape, "size": value.nbytes}
            for key, value in outside.items()
        ],
        "shape": None if sample is None else list(sample),
        "memory": SPARE_MEMORY + 4 * size,
        "seconds": SECONDS,
    }
    start = time.monotonic()
    code, said = _child([json.dumps(order).encode() + b"\n", content, *outside.values()])
    if not said and time.monotonic() - start >= SECONDS:
        raise ModelFileError(
            f"{name} took more than {SECONDS} s for one sample; stopped.",
            why="it is made to run without end, or by far too large",
        )
    if not said:
        raise ModelFileError(
            f"{name} is not a model that ONNX Runtime can run.",
            why=f"it ended the process that tried it out (code {code})",
            fix="copy it again",
        )
    report = json.loads(said)
    why = report.get("why", "")
    if not report["loaded"]:
        raise cannot_run(name, why)
    if why and (report["is_sure"] or "alloc" in why or "memory" in why):
        raise ModelFileError(f"{name} cannot run one sample.", why=_first_line(why))


def _child(parts: Sequence[bytes | np.ndarray]) -> tuple[int, str]:
    """How the trial program ended, and what it said; Python's own search path is handed on."""
    paths = os.pathsep.join(place for place in sys.path if place)
    child = subprocess.Popen(
        [sys.executable, "-P", runtime.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert child.stdin is not None and child.stdout is not None
    timer = threading.Timer(SECONDS, child.kill)
    timer.start()
    said = b""
    try:
        with child, suppress(BrokenPipeError):  # it ended before it had read all
            for part in parts:
                child.stdin.write(part)
            child.stdin.close()
            said = child.stdout.read()
    finally:
        child.kill()
        timer.cancel()
    return child.returncode, said.decode(errors="replace")


def cannot_run(name: str, why: str) -> ModelFileError:
    return ModelFileError(f"{name} is not a model that ONNX Runtime can run.", why=_first_line(why))


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[0]) if lines else "it does not say why"
