"""Export a student and time it: what the verbs of ``cli.onnx`` do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from kdsurgeon import __version__
from kdsurgeon.checkpoints import Loaded, ModelCard, load_model
from kdsurgeon.cli import inputs
from kdsurgeon.cli.console import out, say, warn
from kdsurgeon.cli.session import at_home
from kdsurgeon.data import Dataset, Split
from kdsurgeon.errors import UsageError
from kdsurgeon.evaluation import accuracy
from kdsurgeon.exporting import Exported, benchmark, read_metadata
from kdsurgeon.exporting import export as export_model
from kdsurgeon.recipe import DataRecipe, RunConfig

CALIBRATION_IMAGES = 512


def export_student(
    target: str,
    output: Path,
    *,
    arch: str | None,
    trust: Sequence[str],
    data_dir: str | None,
    calib_data: str | None,
    wishes: DataRecipe,
    last: bool,
    opset: int,
    int8: bool,
    int8_gate: bool,
    tolerance: float,
    check: bool,
    threads: int,
) -> None:
    """Write ONNX (and int8), print parity, accuracy, size and latency; a run keeps the figures."""
    inputs.check_threads(threads)
    if not 0 <= tolerance <= 1:
        raise UsageError(f"--tolerance {tolerance} is not between 0 and 1.", fix="1e-5 is usual")
    loaded, data = _student(target, arch, trust, data_dir, wishes, last)
    if int8 and data is None and calib_data is None:
        raise UsageError("int8 must be calibrated on images.", fix="--calib-data FOLDER, or digits")
    if calib_data is not None:
        calibration = _data(loaded, calib_data, wishes).train
    else:
        calibration = data.train if data else None
    example = (
        data.val.samples(slice(2))
        if data
        else inputs.example_for([loaded], wishes.input_size, calib_data)
    )
    with inputs.handing_over_images():
        exported = export_model(
            loaded.model,
            output,
            example,
            opset=opset,
            metadata=_metadata(loaded, data),
            samples=data.val.samples() if data else None,
            labels=torch.from_numpy(data.val.labels) if data else None,
            calibration=_spread(calibration) if int8 and calibration else None,
            int8_gate=int8_gate,
            tolerance=tolerance,
            verify=check,
        )
    score = None
    if data:
        score = accuracy(loaded.model, [(data.val.samples(), torch.from_numpy(data.val.labels))])
    figures = _announce(loaded, exported, example, score, threads)
    if (Path(target) / "config.yaml").is_file():
        record = Path(target) / "export" / f"{output.stem}.json"
        inputs.write_text(record, json.dumps(figures, indent=1))


def _student(
    target: str,
    arch: str | None,
    trust: Sequence[str],
    data_dir: str | None,
    wishes: DataRecipe,
    last: bool,
) -> tuple[Loaded, Split | None]:
    """The model to export, and the data it is proved on; a run brings both."""
    folder = Path(target)
    if not (folder / "config.yaml").is_file():
        loaded = load_model(target, arch=arch, trust=trust, flag="--arch")
        return loaded, _data(loaded, data_dir, wishes) if data_dir else None
    if data_dir and Path(data_dir).exists():
        data_dir = str(Path(data_dir).absolute())
    with at_home(folder) as (folder, settings):
        return _student_of_run(folder, settings, arch, trust, data_dir, wishes, last)


def _student_of_run(
    folder: Path,
    settings: RunConfig,
    arch: str | None,
    trust: Sequence[str],
    data_dir: str | None,
    wishes: DataRecipe,
    last: bool,
) -> tuple[Loaded, Split]:
    best, newest = (folder / "student" / f"{name}.safetensors" for name in ("best", "last"))
    if not newest.is_file():
        raise UsageError(f"{folder} has no student yet.", fix="let it train for an epoch")
    chosen = newest if last or not best.is_file() else best
    loaded = load_model(str(chosen), arch=arch or settings.student_arch, trust=trust, flag="--arch")
    say(f"student  {chosen}")
    if data_dir is None and wishes == DataRecipe():
        split = inputs.data_for(loaded, settings)  # held out as it was in training
    else:
        split = _data(loaded, data_dir or settings.data_dir, wishes)
    return replace(loaded, name=folder.name), split


def _data(loaded: Loaded, source: str, wishes: DataRecipe) -> Split:
    return inputs.data_for(loaded, inputs.data_settings(source, wishes))


def _spread(dataset: Dataset) -> Tensor:
    """At most 512 images, spread evenly over the data set."""
    rows = torch.linspace(0, len(dataset) - 1, min(CALIBRATION_IMAGES, len(dataset)))
    return dataset.samples(rows.long().unique().numpy())


def _metadata(loaded: Loaded, data: Split | None) -> dict[str, str]:
    card = loaded.card
    if data is not None:
        train = data.train
        card = replace(
            card, class_names=tuple(train.class_names), mean=train.mean, std=train.std,
            input_size=train.input_size,
        )  # fmt: skip
    found = {
        "kdsurgeon": __version__,
        "student": loaded.sha256 or loaded.source,
        **{f"provenance.{key}": value for key, value in card.provenance.items()},
    }
    for name in ("class_names", "mean", "std", "input_size"):
        value = getattr(card, name)
        if value is not None:
            found[name] = json.dumps(value)
    return found


def _announce(
    loaded: Loaded, done: Exported, example: Tensor, score: float | None, threads: int
) -> dict[str, dict[str, float | None]]:
    say(f"onnx     {done.path}, opset {done.opset}, dynamic batch, {done.bytes:,} bytes")
    if done.parity is not None:
        say(f"parity   {done.parity}")
    else:
        warn("the file was not compared with the model (--no-check); its metadata says so")
    if done.int8 is not None:
        say(f"int8     {done.int8.path}, {done.int8.bytes:,} bytes; {done.int8}")
    targets = {"PyTorch": loaded.model, "ONNX fp32": done.path}
    if done.int8 is not None:
        targets["ONNX int8"] = done.int8.path
    scores = {"PyTorch": score, "ONNX fp32": done.accuracy}
    scores["ONNX int8"] = done.int8.accuracy if done.int8 else None
    table = Table("", "accuracy", "size", "latency", "20 to 80 %", box=None, pad_edge=False)
    rows = benchmark(targets, example, threads=threads)
    for row in rows:
        right = scores[row.name]
        time = row.latency
        table.add_row(
            row.name,
            "–" if right is None else f"{right:.2%}",
            _size(row.bytes),
            f"{time.median_ms:.3f} ms",
            f"{time.p20:.3f} to {time.p80:.3f}",
        )
    out.print(table)
    say(f"one image, {threads} thread(s), CPU")
    if done.int8 is not None and done.int8.bytes >= done.bytes:
        say("int8 does not pay for so few weights: its scales take more room than it saves")
    return {
        row.name: {
            "accuracy": scores[row.name],
            "bytes": row.bytes,
            "latency_ms": row.latency.median_ms,
        }
        for row in rows
    }


def benchmark_models(
    models: Sequence[str],
    arch: str | None,
    trust: Sequence[str],
    size: inputs.Size | None,
    *,
    batch: int,
    threads: int,
) -> Table:
    """One row for each model: size, latency, and how much faster than the first."""
    inputs.check_threads(threads)
    targets = {}
    cards = []
    for source in models:
        if Path(source).suffix == ".onnx":
            recorded = read_metadata(source).get("input_size")
            shape = tuple(json.loads(recorded)) if recorded else None
            cards.append(
                Loaded(source, torch.nn.Identity(), ModelCard(input_size=shape), None, source)
            )
            targets[source] = Path(source)
        else:
            cards.append(load_model(source, arch=arch, trust=trust, flag="--arch"))
            targets[source] = cards[-1].model
    example = inputs.example_for(cards, size, None)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(example.shape, generator=generator)
    with inputs.handing_over_images():
        rows = benchmark(targets, images, batch=batch, threads=threads)
    table = Table(
        "model", "runtime", "size", "latency", "20 to 80 %", "speed", box=None, pad_edge=False
    )
    for row in rows:
        time, first = row.latency, rows[0].latency
        table.add_row(
            row.name,
            time.runtime,
            _size(row.bytes),
            f"{time.median_ms:.3f} ms",
            f"{time.p20:.3f} to {time.p80:.3f}",
            f"{first.median_ms / time.median_ms:.2f}×",
        )
    return table


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
