"""Time models side by side, in PyTorch and in ONNX Runtime, so that their figures can be compared.

All targets are timed in one run, a few calls of each in turn, so that a machine that slows down
slows all of them down alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, nn

from kdsurgeon.errors import UsageError
from kdsurgeon.exporting.answers import resting
from kdsurgeon.exporting.form import PRECISION
from kdsurgeon.exporting.gate import read_onnx, session
from kdsurgeon.exporting.interface import fixed_batch
from kdsurgeon.exporting.memory import peak_of
from kdsurgeon.exporting.preprocessing import IMAGE
from kdsurgeon.exporting.staging import first_line

Target = nn.Module | str | os.PathLike[str]
Call = Callable[[], object]

WARM_UP = 10  # calls before anything is timed
TURN = 5  # timed calls of one target before the next; one more, untimed, refills the caches


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call on the CPU."""

    runtime: str  # "PyTorch", "compiled", "ONNX fp32", "OpenVINO int8", …
    batch: int
    threads: int
    median_ms: float
    p20: float  # milliseconds that 20 % of the calls stayed below
    p80: float
    p95: float
    runs: int  # timed calls

    def __str__(self) -> str:
        plural = "" if self.threads == 1 else "s"
        return (
            f"{self.runtime}: {self.median_ms:.3f} ms ({self.p20:.3f} to {self.p80:.3f}, "
            f"95 % below {self.p95:.3f}), batch {self.batch}, {self.threads} thread{plural}"
        )


@dataclass(frozen=True)
class Benchmark:
    """One row of a comparison."""

    name: str
    bytes: int  # of the file; of parameters and buffers for a PyTorch module
    latency: Latency
    memory: int | None = None
    """bytes by which the process grew to load the model and run it once; None where not measured"""


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
    threads: int | Sequence[int] = 1,
    batch: int | Sequence[int] = 1,
    compiled: bool = False,
    openvino: bool = False,
    memory: bool = False,
    runs: int = 100,
    seconds: float = 2.0,
) -> tuple[Benchmark, ...]:
    """Time several models on one input, and give their sizes, in the order they came.

    A target is a module (run eagerly in eval mode under ``inference_mode``; a copy on the CPU) or
    an ONNX file. ``compiled`` adds a row for each module through ``torch.compile``, ``openvino``
    one for each file in OpenVINO, which must be installed. ``example`` is (n, …), float32; its
    samples are repeated to fill ``batch``. Several ``threads`` or batch sizes give a row for each
    combination, all timed in turns. Each is called ``runs`` times, fewer when that takes more than
    about ``seconds``, after a warm-up. ``threads`` holds for all runtimes; torch's own setting is
    put back afterwards. ``memory`` measures how far the process grows with each row.

    Raises :class:`UsageError` when a model does not take the input or cannot be compiled, or when
    OpenVINO is not installed; :class:`ModelFileError` when a file is no ONNX model.
    """
    counts = _several(threads), _several(batch)
    _check_counts(*counts, runs, len(example))
    if openvino and not has_openvino():
        raise UsageError("OpenVINO is not installed.", fix="pip install openvino")
    found: dict[tuple[str, str, int, int], tuple[_Timed, int | None]] = {}
    with _torch_threads():
        for number in counts[0]:
            for size in counts[1]:
                inputs = example.detach().cpu()[torch.arange(size) % len(example)].contiguous()
                for name, target in targets.items():
                    given = _as_taken(target, inputs)
                    for runtime, make in _runtimes(target, compiled, openvino):
                        key = name, runtime, size, number
                        found[key] = _made(name, make, given, number, memory)
        times = _timed({key: timed for key, (timed, _) in found.items()}, runs, seconds)
    return tuple(
        Benchmark(key[0], _size(targets[key[0]]), _latency(*key[1:], times[key]), found[key][1])
        for key in sorted(found, key=lambda key: _place(key, targets))
    )


def has_openvino() -> bool:
    """Whether OpenVINO can be imported."""
    return find_spec("openvino") is not None


@dataclass(frozen=True)
class _Timed:
    """A call, and the number of torch's threads that it wants."""

    call: Call
    threads: int

    def __call__(self) -> object:
        return self.call()

    def get_ready(self) -> None:
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)


def _several(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(dict.fromkeys(value))


def _check_counts(threads: Sequence[int], batches: Sequence[int], runs: int, examples: int) -> None:
    given = {"threads": threads, "batch": batches, "runs": (runs,), "examples": (examples,)}
    for name, values in given.items():
        if min(values, default=0) < 1:
            raise UsageError(
                f"a benchmark needs {name} of at least 1; got {min(values, default=0)}."
            )


def _place(key: tuple[str, str, int, int], targets: Mapping[str, Target]) -> tuple[int, int, int]:
    """Batch and threads first, then the order the targets came in."""
    name, _, batch, threads = key
    return batch, threads, list(targets).index(name)


def _runtimes(
    target: Target, compiled: bool, openvino: bool
) -> Iterator[tuple[str, Callable[[Tensor, int], Call]]]:
    """What a target runs in, and how to make a call from an input and a number of threads."""
    if isinstance(target, nn.Module):
        yield "PyTorch", lambda inputs, threads: _eager(target, inputs)
        if compiled:
            yield "compiled", lambda inputs, threads: _compiled(target, inputs)
        return
    precision = _precision(target)
    yield f"ONNX {precision}", lambda inputs, threads: _onnx(target, inputs, threads)
    if openvino:
        yield f"OpenVINO {precision}", lambda inputs, threads: _openvino(target, inputs, threads)


def _as_taken(target: Target, inputs: Tensor) -> Tensor:
    """Random images, uint8 (n, h, w, C), for a file that makes its input (n, C, h, w) of them."""
    if isinstance(target, nn.Module) or inputs.dtype == torch.uint8 or inputs.ndim != 4:
        return inputs
    given = read_onnx(target).model.graph.input
    if not given or given[0].name != IMAGE:
        return inputs
    if given[0].type.tensor_type.elem_type != TensorProto.UINT8:
        return inputs
    count, channels, height, width = inputs.shape
    generator = torch.Generator().manual_seed(0)
    shape = (count, height, width, channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _eager(target: nn.Module, inputs: Tensor) -> Call:
    twin = resting(target)

    def call() -> object:
        with torch.inference_mode():
            return twin(inputs)

    return call


def _compiled(target: nn.Module, inputs: Tensor) -> Call:
    return _eager(torch.compile(resting(target), dynamic=False), inputs)  # pyright: ignore[reportArgumentType]


def _onnx(target: Target, inputs: Tensor, threads: int) -> Call:
    assert not isinstance(target, nn.Module)
    run = session(target, threads=threads, sample=inputs.shape[1:])
    only = fixed_batch(run)
    if only not in (None, len(inputs)):
        raise UsageError(
            f"{target} takes {only} sample{'s' * (only != 1)} at a time, not {len(inputs)}.",
            fix=f"--batch-size {only}, or export it without --static",
        )
    feed = {run.get_inputs()[0].name: inputs.numpy()}
    return lambda: run.run(None, feed)


def _openvino(target: Target, inputs: Tensor, threads: int) -> Call:
    """In fp32 as the file says: OpenVINO would take bfloat16 where the CPU has it."""
    import openvino  # pyright: ignore[reportMissingImports]

    assert not isinstance(target, nn.Module)
    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    content = read_onnx(target).whole().SerializeToString()
    model = openvino.Core().read_model(model=content, weights=b"")
    model.reshape(list(inputs.shape))
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(inputs.numpy()))
    return request.infer


def _made(
    name: str, make: Callable[[Tensor, int], Call], inputs: Tensor, threads: int, memory: bool
) -> tuple[_Timed, int | None]:
    """A call that has run once, and how much memory that took."""
    torch.set_num_threads(threads)

    def first() -> Call:
        call = make(inputs, threads)
        _tried(name, call, inputs)
        return call

    if memory:
        first()  # what a runtime takes once, for itself, is not the model's
    call, grown = peak_of(first) if memory else (first(), None)
    for _ in range(WARM_UP):
        call()
    return _Timed(call, threads), grown


def _tried(name: str, call: Call, inputs: Tensor) -> None:
    try:
        call()
    except Exception as error:
        what = name or "the model"
        if "BackendCompilerFailed" in type(error).__name__ or "Inductor" in type(error).__name__:
            raise UsageError(
                f"{what} cannot be compiled.",
                why=first_line(error),
                fix="torch.compile needs a C++ compiler; leave it out",
            ) from error
        raise UsageError(
            f"{what} does not take an input of shape {tuple(inputs.shape)}.", why=first_line(error)
        ) from error


Key = Any


def _timed(calls: Mapping[Key, _Timed], runs: int, seconds: float) -> dict[Key, list[float]]:
    """Seconds of each call, by target."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    waiting = list(calls)
    while waiting:
        for key in waiting:
            call = calls[key]
            call.get_ready()
            call()
            for _ in range(min(TURN, runs - len(times[key]))):
                start = perf_counter()
                call()
                times[key].append(perf_counter() - start)
        waiting = [key for key in waiting if len(times[key]) < runs and sum(times[key]) < seconds]
    return times


def _latency(runtime: str, batch: int, threads: int, times: list[float]) -> Latency:
    median, p20, p80, p95 = (float(x) for x in np.percentile(times, [50, 20, 80, 95]) * 1e3)
    return Latency(runtime, batch, threads, median, p20, p80, p95, len(times))


def _precision(target: Target) -> str:
    assert not isinstance(target, nn.Module)
    file = read_onnx(target)
    kinds = {node.op_type for node in file.model.graph.node}
    if kinds & {"DequantizeLinear", "DynamicQuantizeLinear"}:
        return "int8"
    return "fp16" if file.metadata.get(PRECISION) == "fp16" else "fp32"


def _size(target: Target) -> int:
    if isinstance(target, nn.Module):
        return sum(value.nbytes for value in (*target.parameters(), *target.buffers()))
    return read_onnx(target).size


@contextmanager
def _torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
