"""``benchmark``: models side by side, in one table that fits a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from kdsurgeon.checkpoints import Loaded, ModelCard, load_model
from kdsurgeon.cli import inputs
from kdsurgeon.cli.console import out, say
from kdsurgeon.errors import UsageError
from kdsurgeon.exporting import Benchmark, benchmark
from kdsurgeon.exporting.gate import read_onnx
from kdsurgeon.exporting.latency import has_openvino

Target = nn.Module | Path


def parse_counts(text: str, flag: str) -> tuple[int, ...]:
    """``1,32`` as numbers.

    >>> parse_counts("1,32", "--batch-size")
    (1, 32)
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1 or max(found) > 1 << 20:
        raise UsageError(
            f"{flag} {text} is not a list of counts.", fix=f"e.g. {flag} 1, or {flag} 1,2"
        )
    return found


def time_models(
    models: Sequence[str],
    arch: str | None,
    trust: Sequence[str],
    size: inputs.Size | None,
    *,
    batches: Sequence[int],
    threads: Sequence[int],
    compiled: bool,
    openvino: bool | None,
) -> None:
    """Time the models and print the table; ``openvino`` None takes it where it is installed."""
    for number in threads:
        inputs.check_threads(number)
    targets, images = _loaded(models, arch, trust, size)
    openvino = has_openvino() if openvino is None else openvino
    with inputs.handing_over_images():
        rows = benchmark(
            targets, images, batch=batches, threads=threads, compiled=compiled,
            openvino=openvino, memory=True,
        )  # fmt: skip
    combinations = dict.fromkeys((row.latency.batch, row.latency.threads) for row in rows)
    for batch, number in combinations:
        chosen = [r for r in rows if (r.latency.batch, r.latency.threads) == (batch, number)]
        say(f"batch {batch}, {number} thread{'s' if number > 1 else ''}, CPU")
        out.print(_table(chosen))
    say(
        "p95: 95 % of the calls stayed below; speed: against the first row; memory: to load and run"
    )


def _loaded(
    models: Sequence[str], arch: str | None, trust: Sequence[str], size: inputs.Size | None
) -> tuple[dict[str, Target], Tensor]:
    """What is timed by the name it was given, and what it is timed on."""
    targets: dict[str, Target] = {}
    cards = []
    for source in models:
        if Path(source).suffix == ".onnx":
            card = ModelCard(input_size=read_onnx(source).input_size)
            cards.append(Loaded(source, nn.Identity(), card, None, source))
            targets[source] = Path(source)
        else:
            cards.append(load_model(source, arch=arch, trust=trust, flag="--arch"))
            targets[source] = cards[-1].model
    example = inputs.example_for(cards, size, None)
    return targets, torch.randn(example.shape, generator=torch.Generator().manual_seed(0))


def _table(rows: Sequence[Benchmark]) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("model", overflow="fold", max_width=24)
    table.add_column("runtime", no_wrap=True)
    for name in ("size", "memory", "median", "p95 ms", "speed"):
        table.add_column(name, justify="right", no_wrap=True)
    first = rows[0].latency.median_ms
    for row in rows:
        found = row.latency
        table.add_row(
            row.name,
            found.runtime,
            size_in_words(row.bytes),
            "–" if row.memory is None else size_in_words(row.memory),
            f"{_figures(found.median_ms)} ms",
            _figures(found.p95),
            f"{first / found.median_ms:.2f}×",
        )
    return table


def size_in_words(count: int) -> str:
    """
    >>> size_in_words(1234), size_in_words(12_345_678)
    ('1.2 kB', '12.35 MB')
    """
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _figures(value: float) -> str:
    """Milliseconds, in four figures or so whatever the size."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
