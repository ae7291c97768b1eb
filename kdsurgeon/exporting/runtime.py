"""Open an ONNX model in ONNX Runtime from memory; as a program, try one out under limits.

    python -P runtime.py < order

The order is one line of JSON, then the bytes of the model and of its outside tensors. The program
imports nothing of kdsurgeon or torch, so it starts in a third of a second, and prints one line of
JSON. What ends it (memory, time, a crash of the runtime) ends no one else.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnxruntime

_KINDS = {
    "tensor(float)": "f4",
    "tensor(float16)": "f2",
    "tensor(uint8)": "u1",
    "tensor(int32)": "i4",
    "tensor(int64)": "i8",
    "tensor(bool)": "?",
}


def open_session(
    content: bytes, tensors: Mapping[str, np.ndarray], threads: int
) -> onnxruntime.InferenceSession:
    """A session on the CPU of a model in memory; ``tensors`` stand for its outside weights.

    Nothing is read from any file. Raises whatever ONNX Runtime raises.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Waiting threads that keep a core busy would slow down whatever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Not .ort, which needs no parser that we know: the bytes alone would decide.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if tensors:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in tensors.values()]
        options.add_external_initializers(list(tensors), values)
    found = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    weakref.finalize(found, tuple, (options, *tensors.values()))  # it reads them where they are
    return found


def sample_shape(
    declared: list[int | str | None], shape: tuple[int, ...] | None
) -> list[int] | None:
    """The shape of one sample that the model takes; None when it is not known.

    ``shape`` is that of one sample without the batch axis, as the caller will give it.

    >>> sample_shape(["batch", 3, "h", "w"], (3, 8, 8)), sample_shape(["batch", 3], None)
    ([1, 3, 8, 8], [1, 3])
    >>> sample_shape(["batch", "h"], None), sample_shape(["batch", 4], (5,))
    (None, None)
    """
    if not declared:
        return None
    first = declared[0] if isinstance(declared[0], int) else 1
    if shape is None:
        rest = [size for size in declared[1:] if isinstance(size, int)]
        return [first, *rest] if len(rest) == len(declared) - 1 else None
    fits = len(shape) == len(declared) - 1 and all(
        not isinstance(size, int) or size == given
        for size, given in zip(declared[1:], shape, strict=True)
    )
    return [first, *shape] if fits else None


def main() -> None:
    """Read an order, limit this process, open the model and run one sample; report.

    ``loaded`` and ``ran`` say how far it came, ``why`` what stopped it, and ``is_sure`` that the
    sample was of the shape that the model itself declares.
    """
    stream = sys.stdin.buffer
    order = json.loads(stream.readline())
    content = stream.read(order["size"])
    tensors = {entry["name"]: _tensor(stream, entry) for entry in order["tensors"]}
    _limit(order["memory"], order["seconds"])
    report: dict[str, Any] = {"loaded": False, "ran": False, "is_sure": False}
    try:
        run = open_session(content, tensors, 1)
        report["loaded"] = True
        given = run.get_inputs()
        report["is_sure"] = all(sample_shape(value.shape, None) is not None for value in given)
        report["ran"] = _run(run, order["shape"])
    except MemoryError:
        report["why"] = "it takes too much memory"
    except Exception as error:  # the runtime's own kinds
        report["why"] = str(error)[:2000]
    sys.stdout.write(json.dumps(report))


def _tensor(stream: BinaryIO, entry: dict[str, Any]) -> np.ndarray:
    raw = stream.read(entry["size"])
    return np.frombuffer(raw, np.dtype(entry["type"])).reshape(entry["shape"])


def _run(run: onnxruntime.InferenceSession, shape: list[int] | None) -> bool:
    """Whether one sample went through; False when it is not known what to give.

    Images are noise, the first of the inputs is of ``shape``, and numbers that stand for tokens or
    choices are 0.
    """
    feed = {}
    for place, given in enumerate(run.get_inputs()):
        rest = None if shape is None or place else tuple(shape)
        found = sample_shape(given.shape, rest)
        if found is None or given.type not in _KINDS:
            return False
        noise = np.random.default_rng(0).standard_normal(found, np.float32)
        kind = np.dtype(_KINDS[given.type])
        feed[given.name] = noise.astype(kind) if kind.kind == "f" else np.zeros(found, kind)
    run.run(None, feed)
    return True


def _limit(memory: int, seconds: int) -> None:
    """This process may take so many more bytes and so many seconds of a core."""
    with suppress(ImportError, ValueError, OSError):  # other systems limit differently, or not
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
