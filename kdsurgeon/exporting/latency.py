"""Time models side by side, in PyTorch and in ONNX Runtime, so that their figures can be compared.

All targets are timed in one run, a few calls of each in turn, so that a machine that slows down
slows all of them down alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from kdsurgeon.errors import UsageError
from kdsurgeon.exporting.parity import first_line, read, resting, session

Target = nn.Module | str | os.PathLike[str]

WARM_UP = 10  # calls before anything is timed
TURN = 5  # timed calls of one target before the next; one more, untimed, refills the caches


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call on the CPU."""

    runtime: str  # "PyTorch", "ONNX fp32" or "ONNX int8"
    batch: int
    threads: int
    median_ms: float
    p20: float  # milliseconds that 20 % of the calls stayed below
    p80: float
    runs: int  # timed calls

    def __str__(self) -> str:
        plural = "" if self.threads == 1 else "s"
        return (
            f"{self.runtime}: {self.median_ms:.3f} ms ({self.p20:.3f} to {self.p80:.3f}), "
            f"batch {self.batch}, {self.threads} thread{plural}"
        )


@dataclass(frozen=True)
class Benchmark:
    """One row of a comparison."""

    name: str
    bytes: int  # of the file; of parameters and buffers for a PyTorch module
    latency: Latency


def latency(
    target: Target,
    example: Tensor,
    *,
    threads: int = 1,
    batch: int = 1,
    runs: int = 100,
    seconds: float = 2.0,
) -> Latency:
    """Time one model; see :func:`benchmark`.

    >>> found = latency(nn.Linear(4, 2), torch.zeros(1, 4), runs=5)
    >>> found.runtime, found.batch, found.threads, found.runs
    ('PyTorch', 1, 1, 5)
    """
    rows = benchmark(
        {"": target}, example, threads=threads, batch=batch, runs=runs, seconds=seconds
    )
    return rows[0].latency


def benchmark(
    targets: Mapping[str, Target],
    example: Tensor,
    *,
    threads: int = 1,
    batch: int = 1,
    runs: int = 100,
    seconds: float = 2.0,
) -> tuple[Benchmark, ...]:
    """Time several models on one input, and give their sizes, in the order they came.

    A target is a module (run eagerly in eval mode under ``inference_mode``; a copy on the CPU) or
    an ONNX file. ``example`` is (n, …), float32; its samples are repeated to fill ``batch``. Each
    target is called ``runs`` times, fewer when that takes more than about ``seconds``, after a
    warm-up. ``threads`` holds for both runtimes; torch's own setting is put back afterwards.

    Raises :class:`UsageError` when a model does not take the input, :class:`ModelFileError` when a
    file is no ONNX model.
    """
    counts = {"threads": threads, "batch": batch, "runs": runs, "examples": len(example)}
    for name, value in counts.items():
        if value < 1:
            raise UsageError(f"a benchmark needs {name} of at least 1; got {value}.")
    inputs = example.detach().cpu()[torch.arange(batch) % len(example)].contiguous()
    with _torch_threads(threads), torch.inference_mode():
        calls = {name: _call(target, inputs, threads) for name, target in targets.items()}
        for name, call in calls.items():
            _warm_up(name, call, inputs)
        times = _timed(calls, runs, seconds)
    return tuple(
        Benchmark(name, _size(target), _latency(_runtime(target), batch, threads, times[name]))
        for name, target in targets.items()
    )


def _call(target: Target, inputs: Tensor, threads: int) -> Callable[[], object]:
    if isinstance(target, nn.Module):
        twin = resting(target)
        return lambda: twin(inputs)
    run = session(target, threads=threads)
    feed = {run.get_inputs()[0].name: inputs.numpy()}
    return lambda: run.run(None, feed)


def _warm_up(name: str, call: Callable[[], object], inputs: Tensor) -> None:
    try:
        for _ in range(WARM_UP):
            call()
    except Exception as error:
        raise UsageError(
            f"{name or 'the model'} does not take an input of shape {tuple(inputs.shape)}.",
            why=first_line(error),
        ) from error


def _timed(
    calls: Mapping[str, Callable[[], object]], runs: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each call, by target."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    waiting = list(calls)
    while waiting:
        for name in waiting:
            calls[name]()
            for _ in range(min(TURN, runs - len(times[name]))):
                start = perf_counter()
                calls[name]()
                times[name].append(perf_counter() - start)
        waiting = [
            name for name in waiting if len(times[name]) < runs and sum(times[name]) < seconds
        ]
    return times


def _latency(runtime: str, batch: int, threads: int, times: list[float]) -> Latency:
    p20, median, p80 = (float(value) for value in np.percentile(times, [20, 50, 80]) * 1e3)
    return Latency(runtime, batch, threads, median, p20, p80, len(times))


def _runtime(target: Target) -> str:
    if isinstance(target, nn.Module):
        return "PyTorch"
    nodes = onnx.load_model_from_string(read(Path(target))).graph.node
    is_int8 = any(node.op_type == "DequantizeLinear" for node in nodes)
    return "ONNX int8" if is_int8 else "ONNX fp32"


def _size(target: Target) -> int:
    if isinstance(target, nn.Module):
        return sum(value.nbytes for value in (*target.parameters(), *target.buffers()))
    return Path(target).stat().st_size


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
