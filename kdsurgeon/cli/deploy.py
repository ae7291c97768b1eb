"""Export a student and time it: what the verbs of ``cli.onnx`` do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from kdsurgeon.checkpoints import Loaded, code_in, load_model
from kdsurgeon.cli import inputs
from kdsurgeon.cli.console import out, say, warn
from kdsurgeon.cli.forms import Exportee, FormFlags, form_of, metadata_of, samples_for
from kdsurgeon.cli.int8 import Int8Flags, train_rounded
from kdsurgeon.cli.outputs import check_single
from kdsurgeon.cli.session import at_home
from kdsurgeon.data import Split
from kdsurgeon.errors import UsageError
from kdsurgeon.evaluation import accuracy
from kdsurgeon.exporting import Exported, Form, benchmark
from kdsurgeon.exporting import export as export_model
from kdsurgeon.recipe import DataRecipe, RunConfig


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
    flags: FormFlags,
    int8: Int8Flags | None,
    tolerance: float | None,
    check: bool,
    force: bool,
    threads: int,
) -> None:
    """Write ONNX (and int8), print parity, accuracy, size and latency; a run keeps the figures."""
    inputs.check_threads(threads)
    if tolerance is not None and not 0 <= tolerance <= 1:
        raise UsageError(f"--tolerance {tolerance} is not between 0 and 1.", fix="1e-5 is usual")
    flags.check(int8=int8 is not None)
    _check_run(target, last)
    exportee = _student(target, arch, trust, data_dir, wishes, last)
    loaded, data = exportee.loaded, exportee.data
    if int8 and data is None and calib_data is None:
        raise UsageError("int8 must be calibrated on images.", fix="--calib-data FOLDER, or digits")
    images = None
    if int8 is not None:
        source = data if calib_data is None else _images(loaded, calib_data, exportee.wishes)
        images = int8.spread(source.train) if source else None
        exportee = replace(exportee, calibration=source)
    example = (
        data.val.samples(slice(2))
        if data
        else inputs.example_for([loaded], wishes.input_size, calib_data, wishes.max_bad_images)
    )
    form = form_of(flags, exportee, example)
    calibration, make_int8 = images, None
    if int8 is not None and int8.mode == "qat" and data and images is not None:
        calibration, labels = None, torch.from_numpy(data.val.labels)
        make_int8 = partial(
            train_rounded, path=output.with_suffix(".int8.onnx"), student=loaded.model,
            target=target, flags=int8, trust=trust, calibration=images,
            samples=data.val.samples(), labels=labels, force=force,
        )  # fmt: skip
    with inputs.handing_over_images():
        exported = export_model(
            loaded.model,
            output,
            example,
            form=form,
            metadata=metadata_of(exportee, flags, target, example),
            samples=samples_for(form, data),
            labels=torch.from_numpy(data.val.labels) if data else None,
            calibration=calibration,
            int8_gate=int8 is None or int8.gate,
            int8_options=int8.options if int8 else None,
            make_int8=make_int8,
            tolerance=tolerance,
            verify=check,
            force=force,
        )
    score = None
    if data:
        score = accuracy(loaded.model, [(data.val.samples(), torch.from_numpy(data.val.labels))])
    figures = _announce(loaded, exported, form, example, score, threads)
    if (Path(target) / "config.yaml").is_file():
        record = Path(target) / "export" / f"{output.stem}.json"
        inputs.write_text(record, json.dumps(figures, indent=1))


def _check_run(target: str, last: bool) -> None:
    """Raises :class:`UsageError` for a folder of runs, and for ``last`` of what is no run."""
    folder = Path(target)
    if (folder / "config.yaml").is_file():
        return
    check_single(target)
    if last:
        raise UsageError(
            f"--last needs a run folder; {target} is none.",
            fix="leave --last out, or name the folder of a run",
        )


def _student(
    target: str,
    arch: str | None,
    trust: Sequence[str],
    data_dir: str | None,
    wishes: DataRecipe,
    last: bool,
) -> Exportee:
    """The model to export, and the data it is proved on; a run brings both."""
    folder = Path(target)
    if (folder / "config.yaml").is_file():
        arch = arch and _seen_from_here(arch)
        exportee = _student_of_run(folder, arch, trust, wishes, last, with_data=data_dir is None)
    else:
        loaded = load_model(target, arch=arch, trust=trust, flag="--arch")
        exportee = Exportee(loaded, None, wishes)
    if data_dir is None:
        return exportee
    return replace(exportee, data=_data(exportee.loaded, data_dir, exportee.wishes))


def _seen_from_here(arch: str) -> str:
    """A Python file by its whole path, where there is one; else it is looked for with the run."""
    code = code_in(arch)
    return code if code and Path(code[3:].partition(".py:")[0] + ".py").is_file() else arch


def _student_of_run(
    folder: Path,
    arch: str | None,
    trust: Sequence[str],
    wishes: DataRecipe,
    last: bool,
    *,
    with_data: bool,
) -> Exportee:
    """A run's student; images are as they were in training, but for what ``wishes`` name."""
    with at_home(folder) as (folder, settings):
        best, newest = (folder / "student" / f"{name}.safetensors" for name in ("best", "last"))
        if not newest.is_file():
            raise UsageError(f"{folder} has no student yet.", fix="let it train for an epoch")
        chosen = newest if last or not best.is_file() else best
        arch = arch or _own_arch(settings, trust)
        loaded = load_model(str(chosen), arch=arch, trust=trust, flag="--arch")
        say(f"student  {chosen}")
        given = {name: getattr(wishes, name) for name in wishes.model_fields_set}
        if settings.data.classes is not None:  # said where the run was started
            given["classes"] = str(Path(settings.data.classes).absolute())
        wishes = settings.data.replace(**given)
        data = _data(loaded, settings.data_dir, wishes) if with_data else None
    return Exportee(replace(loaded, name=folder.name), data, wishes)


def _own_arch(settings: RunConfig, trust: Sequence[str]) -> str | None:
    """The architecture that the run names, where the student's file does not or may not."""
    own = settings.student_arch or settings.student
    code = code_in(own)
    return own if (settings.student_arch and not code) or code in trust else None


def _images(loaded: Loaded, source: str, wishes: DataRecipe) -> Split:
    """Images to set ranges by, of whatever classes, that the model takes."""
    settings = inputs.data_settings(source, wishes.replace(classes=None))
    split = inputs.load_data(settings, loaded.card)
    inputs.count_classes(loaded, torch.zeros((1, *split.train.input_size)))
    return split


def _data(loaded: Loaded, source: str, wishes: DataRecipe) -> Split:
    return inputs.data_for(loaded, inputs.data_settings(source, wishes))


def _announce(
    loaded: Loaded, done: Exported, form: Form, example: Tensor, score: float | None, threads: int
) -> dict[str, dict[str, float | None]]:
    _describe(done, form)
    name = f"ONNX {form.precision}"
    targets: dict[str, torch.nn.Module | Path] = {"PyTorch": loaded.model, name: done.path}
    if done.int8 is not None:
        targets["ONNX int8"] = done.int8.path
    scores = {"PyTorch": score, name: done.accuracy}
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
    times = {row.name: row.latency.median_ms for row in rows}
    if done.int8 is not None and times["ONNX int8"] >= times[name]:
        say("int8 is no faster here: so small a network spends its time between its nodes")
    return {
        row.name: {
            "accuracy": scores[row.name],
            "bytes": row.bytes,
            "latency_ms": row.latency.median_ms,
        }
        for row in rows
    }


def _describe(done: Exported, form: Form) -> None:
    """What was written, and what was measured on it."""
    batch = "dynamic batch" if form.batch is None else f"batch {form.batch}"
    size = ", dynamic size" if form.dynamic_size else ""
    say(f"onnx     {done.path}, opset {done.opset}, {batch}{size}, {done.bytes:,} bytes")
    if done.data is not None:
        say(f"weights  {done.data}; the two files belong together")
    if done.parity is not None:
        say(f"parity   {done.parity}")
    else:
        warn("the file was not compared with the model (--no-check); its metadata says so")
    if done.int8 is not None:
        say(f"int8     {done.int8.path}, {done.int8.bytes:,} bytes; {done.int8}")
        if done.int8.accuracy is None:
            judged = f"agreement on {done.int8.samples} samples"
            say(f"int8     accuracy was not judged, for want of --data-dir: {judged} only")
        return
    beside = done.path.with_suffix(".int8.onnx")
    if beside.is_file():
        say(f"int8     {beside} is of an earlier export: --int8 writes it anew")


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
