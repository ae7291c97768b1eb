"""What models cost, side by side: who is timed when, and what is left as it was."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdsurgeon.errors import UsageError
from kdsurgeon.exporting import benchmark, export, latency
from kdsurgeon.exporting.latency import TURN, Latency
from kdsurgeon.exporting.memory import peak_of

latency_module = import_module("kdsurgeon.exporting.latency")
memory_module = import_module("kdsurgeon.exporting.memory")

SIZE = (3, 8, 8)


def network() -> nn.Sequential:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    return nn.Sequential(*layers)


def images(count: int) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An fp32 file and its int8 twin."""
    path = tmp_path_factory.mktemp("files") / "student.onnx"
    done = export(network(), path, images(2), calibration=images(16), int8_gate=False)
    assert done.int8 is not None
    return path, done.int8.path


def timed(call, threads: int = 1):
    return latency_module._Timed(call, threads)


def test_a_benchmark_puts_every_runtime_side_by_side(files: tuple[Path, Path]) -> None:
    student, before = network(), torch.get_num_threads()
    rows = benchmark(
        {"student": student, "fp32": files[0], "int8": str(files[1])},
        images(2),
        threads=2,
        batch=3,
        runs=11,
    )
    assert [row.name for row in rows] == ["student", "fp32", "int8"]
    assert [row.latency.runtime for row in rows] == ["PyTorch", "ONNX fp32", "ONNX int8"]
    assert [row.bytes for row in rows][1:] == [path.stat().st_size for path in files]
    assert rows[0].bytes == sum(value.nbytes for value in student.state_dict().values())
    for row in rows:
        found = row.latency
        assert (found.batch, found.threads, found.runs) == (3, 2, 11)
        assert 0 < found.p20 <= found.median_ms <= found.p80 <= found.p95
        assert row.memory is None
    assert torch.get_num_threads() == before


def test_every_combination_of_batch_and_threads_is_a_row_in_that_order(
    files: tuple[Path, Path],
) -> None:
    rows = benchmark(
        {"a": network(), "b": files[0]}, images(2), threads=(1, 2), batch=[4, 1], runs=2
    )
    found = [(row.latency.batch, row.latency.threads, row.name) for row in rows]
    assert found == [(b, t, n) for b in (1, 4) for t in (1, 2) for n in ("a", "b")]


def test_a_module_runs_with_the_threads_and_the_batch_of_its_row() -> None:
    seen: list[tuple[int, int]] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert torch.is_inference_mode_enabled() and not self.training
            Spy.calls.append((torch.get_num_threads(), len(x)))
            return x.flatten(1)

        calls = seen

    benchmark({"spy": Spy()}, images(2), threads=(1, 2), batch=(1, 5), runs=2)
    assert set(seen) == {(1, 1), (1, 5), (2, 1), (2, 5)}


def test_a_compiled_module_is_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compile(module: nn.Module, **_: object) -> nn.Module:
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile)
    student = network()
    rows = benchmark({"student": student}, images(1), compiled=True, runs=2)
    assert [row.latency.runtime for row in rows] == ["PyTorch", "compiled"]
    assert len(compiled) == 1 and compiled[0] is not student and not compiled[0].training


def test_a_module_that_cannot_be_compiled_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class InductorError(RuntimeError):
        pass

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise InductorError("no compiler found")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: Broken())
    with pytest.raises(UsageError, match=r"(?s)student cannot be compiled.*no compiler found"):
        benchmark({"student": network()}, images(1), compiled=True)


def test_openvino_is_asked_for_only_where_it_is_installed(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_module, "has_openvino", lambda: False)
    with pytest.raises(UsageError, match=r"(?s)OpenVINO is not installed.*pip install openvino"):
        benchmark({"a": files[0]}, images(1), openvino=True)
    monkeypatch.setattr(latency_module, "has_openvino", lambda: True)
    monkeypatch.setattr(latency_module, "_openvino", lambda *_: lambda: None)
    rows = benchmark(
        {"m": network(), "a": files[0], "b": files[1]}, images(1), openvino=True, runs=2
    )
    assert [row.latency.runtime for row in rows] == [
        "PyTorch", "ONNX fp32", "OpenVINO fp32", "ONNX int8", "OpenVINO int8"
    ]  # fmt: skip


def test_targets_take_turns() -> None:
    calls: list[str] = []
    named = {name: timed(lambda name=name: calls.append(name)) for name in "ab"}
    times = latency_module._timed(named, 7, 60.0)
    assert "".join(calls) == "a" * 6 + "b" * 6 + "a" * 3 + "b" * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 7, "b": 7}


def test_a_slow_target_is_called_fewer_times() -> None:
    times = latency_module._timed({"slow": timed(lambda: None)}, 1000, 0.0)
    assert len(times["slow"]) == TURN


def test_the_marks_are_those_of_the_times() -> None:
    times = [0.001 * n for n in range(1, 101)]
    found = latency_module._latency("PyTorch", 1, 1, times)
    wanted = np.percentile(times, [50, 20, 80, 95]) * 1e3
    assert (found.median_ms, found.p20, found.p80, found.p95) == pytest.approx(tuple(wanted))
    assert found.runs == 100


def test_timing_leaves_the_model_in_its_mode() -> None:
    model = network().train()
    tracked = model[1].running_mean.clone()
    latency(model, images(1), runs=1)
    assert model.training and torch.equal(model[1].running_mean, tracked)


def test_threads_are_put_back_after_a_failure() -> None:
    before = torch.get_num_threads()
    with pytest.raises(UsageError, match=r"student does not take an input of shape \(1, 1, 8, 8\)"):
        benchmark({"student": network()}, torch.zeros(1, 1, 8, 8), threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("option", ["threads", "batch", "runs"])
def test_a_benchmark_of_nothing_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match=f"needs {option} of at least 1; got 0"):
        latency(network(), images(1), **{option: 0})
    with pytest.raises(UsageError, match="needs threads of at least 1; got 0"):
        benchmark({"a": network()}, images(1), threads=())


def test_a_latency_prints_as_one_line() -> None:
    line = Latency("ONNX fp32", 1, 1, 0.12345, 0.1, 0.2, 0.3, 50)
    assert str(line) == (
        "ONNX fp32: 0.123 ms (0.100 to 0.200, 95 % below 0.300), batch 1, 1 thread"
    )


# Memory


def test_the_memory_of_a_model_grows_with_what_it_computes() -> None:
    class Hungry(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(len(x) << 22).view(len(x), -1)[:, :5] + 1  # 16 MB a sample

    small, large = (
        benchmark({"a": Hungry()}, images(1), batch=size, runs=1, memory=True)[0].memory
        for size in (1, 8)
    )
    assert small is not None and large is not None
    # the kernel counts in steps of some 256 kB
    assert 15 << 20 <= small < 48 << 20
    assert 127 << 20 <= large < 160 << 20


def test_where_the_system_keeps_no_account_the_memory_is_not_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory_module, "CLEAR", tmp_path / "absent" / "clear_refs")
    assert peak_of(lambda: 7) == (7, None)
