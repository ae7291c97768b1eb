"""Verbs about what is deployed: export and benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdsurgeon.cli import flags
from kdsurgeon.cli.console import out, say
from kdsurgeon.cli.outputs import Output, check_outputs


def export(
    target: Annotated[str, typer.Argument(help="a run folder, a model file or SOURCE/NAME")],
    output: Annotated[Path, typer.Argument(help="the .onnx file to write")],
    arch: flags.Arch = None,
    trust_code: flags.TrustCode = None,
    data_dir: flags.DataDir = None,
    calib_data: Annotated[
        str | None, typer.Option("--calib-data", help="calibrate int8 on this data instead")
    ] = None,
    input_size: flags.InputSize = None,
    mean: flags.Mean = None,
    std: flags.Std = None,
    last: Annotated[
        bool, typer.Option("--last", help="a run's student after the last epoch, not its best")
    ] = False,
    opset: Annotated[int, typer.Option(help="ONNX operator set, 18 to 24")] = 18,
    int8: Annotated[bool, typer.Option("--int8", help="write NAME.int8.onnx, too")] = False,
    int8_gate: Annotated[
        bool, typer.Option("--int8-gate/--no-int8-gate", help="refuse int8 that loses too much")
    ] = True,
    tolerance: Annotated[float, typer.Option(help="largest gap, relative to the logits")] = 1e-5,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="prove the file equal to the model")
    ] = True,
    threads: flags.Threads = 1,
) -> None:
    """Write the student as ONNX, prove it equal, measure accuracy, size and latency."""
    wishes = flags.image_wishes(input_size, mean, std)
    outputs = [Output("OUTPUT", output, ".onnx", makes_parents=False)]
    if int8:
        beside = output.with_suffix(".int8.onnx")
        outputs.append(Output("--int8", beside, ".onnx", makes_parents=False))
    check_outputs(outputs, [target, arch, data_dir, calib_data])
    from kdsurgeon.cli.deploy import export_student

    export_student(
        target,
        output,
        arch=arch,
        trust=trust_code or (),
        data_dir=data_dir,
        calib_data=calib_data,
        wishes=wishes,
        last=last,
        opset=opset,
        int8=int8,
        int8_gate=int8_gate,
        tolerance=tolerance,
        check=check,
        threads=threads or 1,
    )


def benchmark(
    models: Annotated[list[str], typer.Argument(help="model files, SOURCE/NAME, or .onnx files")],
    arch: flags.Arch = None,
    trust_code: flags.TrustCode = None,
    input_size: flags.InputSize = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 1,
    threads: flags.Threads = 1,
) -> None:
    """Latency and size side by side, in PyTorch and in ONNX Runtime."""
    size = flags.parse_size(input_size)
    from kdsurgeon.cli.deploy import benchmark_models

    table = benchmark_models(
        models, arch, trust_code or (), size, batch=batch_size, threads=threads or 1
    )
    out.print(table)
    say(f"batch {batch_size}, {threads} thread(s), CPU; median and 20 to 80 % of the calls")
