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
from kdsurgeon.cli.outputs import check_single
from kdsurgeon.errors import UsageError
from kdsurgeon.exporting import Benchmark, benchmark
from kdsurgeon.exporting.gate import read_onnx
from kdsurgeon.exporting.latency import has_openvino

Target = nn.Module | Path
WIDTH = 24  # characters of a name in the table


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
    if compiled and not any(isinstance(target, nn.Module) for target in targets.values()):
        raise UsageError(
            "--compile needs a PyTorch model; these are .onnx files.",
            fix="name the student, too, or leave --compile out",
        )
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
        _check_no_run(source)
        if Path(source).suffix == ".onnx":
            card = ModelCard(input_size=read_onnx(source).input_size)
            cards.append(Loaded(source, nn.Identity(), card, None, source))
            targets[source] = Path(source)
        else:
            cards.append(load_model(source, arch=arch, trust=trust, flag="--arch"))
            targets[source] = cards[-1].model
    try:
        example = inputs.example_for(cards, size, None)
    except UsageError as error:  # it speaks of data, and there is none here
        raise UsageError(
            error.what, why=error.notes.get("why"), fix="--input-size C,H,W"
        ) from error
    return targets, torch.randn(example.shape, generator=torch.Generator().manual_seed(0))


def _check_no_run(source: str) -> None:
    if (Path(source) / "config.yaml").is_file():
        raise UsageError(
            f"{source} is a run; benchmark times models.",
            fix=f"name its student: {Path(source) / 'student' / 'best.safetensors'}",
        )
    check_single(source)


def shortened(names: Sequence[str]) -> dict[str, str]:
    """What names longer than a column are called there: as much of their end as fits.

    Two that would be called alike keep their whole names.

    >>> shortened(["a.onnx", "runs/a/student/best.safetensors"])
    {'a.onnx': 'a.onnx', 'runs/a/student/best.safetensors': '…tudent/best.safetensors'}
    """
    found = {name: name if len(name) <= WIDTH else f"…{name[1 - WIDTH :]}" for name in names}
    short = list(found.values())
    return {name: name if short.count(found[name]) > 1 else found[name] for name in found}


def _table(rows: Sequence[Benchmark]) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("model", overflow="fold", max_width=WIDTH)
    table.add_column("runtime", no_wrap=True)
    for name in ("size", "memory", "median", "p95 ms", "speed"):
        table.add_column(name, justify="right", no_wrap=True)
    first = rows[0].latency.median_ms
    called = shortened(list(dict.fromkeys(row.name for row in rows)))
    for row in rows:
        found = row.latency
        table.add_row(
            called[row.name],
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
