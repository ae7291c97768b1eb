"""Verbs about what is deployed: export and benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdsurgeon.cli import flags
from kdsurgeon.cli.outputs import Output, check_onnx, check_outputs
from kdsurgeon.errors import UsageError

NEEDS = {
    "int8_mode": "--int8",
    "int8_gate": "--int8",
    "int8_budget": "--int8",
    "calib_data": "--int8",
    "calib_method": "--int8",
    "calib_images": "--int8",
    "max_drop": "--int8",
    "qat_epochs": "--int8-mode qat",
}
"""Options of ``export`` that say nothing without another one."""


def export(
    target: Annotated[str, typer.Argument(help="a run folder, a model file or SOURCE/NAME")],
    output: Annotated[Path, typer.Argument(help="the .onnx file to write")],
    context: typer.Context,
    arch: flags.Arch = None,
    trust_code: flags.TrustCode = None,
    data_dir: flags.DataDir = None,
    calib_data: Annotated[
        str | None, typer.Option("--calib-data", help="calibrate int8 on this data instead")
    ] = None,
    input_size: flags.InputSize = None,
    mean: flags.Mean = None,
    std: flags.Std = None,
    max_bad_images: flags.MaxBadImages = None,
    last: Annotated[
        bool, typer.Option("--last", help="a run's student after the last epoch, not its best")
    ] = False,
    opset: Annotated[int, typer.Option(help="ONNX operator set, 18 to 24")] = 18,
    int8: Annotated[bool, typer.Option("--int8", help="write NAME.int8.onnx, too")] = False,
    int8_gate: Annotated[
        bool, typer.Option("--int8-gate/--no-int8-gate", help="refuse int8 that loses too much")
    ] = True,
    int8_mode: Annotated[
        str,
        typer.Option(
            "--int8-mode", metavar="static|dynamic|qat", help="dynamic for transformers; qat trains"
        ),
    ] = "static",
    calib_method: Annotated[
        str,
        typer.Option(
            "--calib-method", metavar="min-max|entropy|percentile", help="how ranges are found"
        ),
    ] = "min-max",
    calib_images: Annotated[
        int, typer.Option("--calib-images", min=1, help="how many images set the ranges")
    ] = 512,
    int8_budget: Annotated[
        int, typer.Option("--int8-budget", min=0, help="nodes that may stay in fp32 if need be")
    ] = 4,
    max_drop: Annotated[
        float, typer.Option("--max-drop", min=0, max=100, help="points that int8 may lose")
    ] = 1.0,
    qat_epochs: Annotated[
        int, typer.Option("--qat-epochs", min=1, help="epochs of --int8-mode qat")
    ] = 5,
    stones: Annotated[
        bool, typer.Option("--stones", help="a run's stepping stones, too: NAME.stone1.onnx …")
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", help="float16 weights and arithmetic; float32 in and out")
    ] = False,
    static: Annotated[
        bool, typer.Option("--static", help="every size fixed, one image at a time, for an NPU")
    ] = False,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="height and width free, too")
    ] = False,
    softmax: Annotated[bool, typer.Option("--softmax", help="probabilities, not logits")] = False,
    embed_preprocessing: Annotated[
        bool,
        typer.Option("--embed-preprocessing", help="take uint8 images NHWC; resize and normalise"),
    ] = False,
    external: Annotated[
        bool, typer.Option("--external", help="weights in a file of their own; above 2 GB always")
    ] = False,
    license_name: Annotated[
        str | None, typer.Option("--license", metavar="TEXT", help="stored in the file's metadata")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="largest gap, relative to the logits: 1e-5, with --half 1e-2"),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="keep a file that fails, as NAME.unproved.onnx"),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="prove the file equal to the model")
    ] = True,
    threads: flags.Threads = 1,
) -> None:
    """Write the student as ONNX, prove it equal, measure accuracy, size and latency."""
    wishes = flags.image_wishes(input_size, mean, std, max_bad_images)
    outputs = [Output("OUTPUT", output, ".onnx", makes_parents=False)]
    reads = [target, arch, data_dir, calib_data]
    check_outputs(outputs, reads)
    check_onnx(output)
    _check_needs(context)
    further = [("--int8", ".int8.onnx", int8), ("--force", ".unproved.onnx", force)]
    further.append(("--force", ".int8.unproved.onnx", int8 and force))
    outputs += [
        Output(flag, output.with_suffix(suffix), ".onnx", makes_parents=False)
        for flag, suffix, is_written in further
        if is_written
    ]
    if stones:
        from kdsurgeon.cli.forms import FormFlags
        from kdsurgeon.cli.ladder import check_plain, stone_outputs

        check_plain(
            FormFlags(opset, static, dynamic_size, half, softmax, external, embed_preprocessing)
        )
        outputs += stone_outputs(target, output)
    check_outputs(outputs, reads)
    from kdsurgeon.cli.deploy import export_student
    from kdsurgeon.cli.forms import FormFlags
    from kdsurgeon.cli.int8 import Int8Flags

    wanted = None
    if int8:
        wanted = Int8Flags(
            int8_mode, calib_method, calib_images, int8_budget, max_drop, int8_gate, qat_epochs
        )
        wanted.check(target)

    export_student(
        target,
        output,
        arch=arch,
        trust=trust_code or (),
        data_dir=data_dir,
        calib_data=calib_data,
        wishes=wishes,
        last=last,
        flags=FormFlags(
            opset, static, dynamic_size, half, softmax, external, embed_preprocessing, license_name
        ),
        int8=wanted,
        tolerance=tolerance,
        check=check,
        force=force,
        threads=threads or 1,
    )
    if stones:
        from kdsurgeon.cli.ladder import export_stones

        export_stones(
            target, output, trust=trust_code or (), last=last, tolerance=tolerance,
            flags=FormFlags(opset, half=half, license=license_name),
            threads=threads or 1, int8=int8,
        )  # fmt: skip


def _check_needs(context: typer.Context) -> None:
    """Raises :class:`UsageError` for an option that was given and would be ignored."""
    given = context.params
    has = {"--int8": given["int8"], "--int8-mode qat": given["int8_mode"] == "qat"}
    for name, needed in NEEDS.items():
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or has[needed]:
            continue
        flag = "--" + name.replace("_", "-")
        flag = "--int8-gate/--no-int8-gate" if name == "int8_gate" else flag
        raise UsageError(f"{flag} needs {needed}.", fix=f"add {needed}, or leave {flag} out")


def benchmark(
    models: Annotated[list[str], typer.Argument(help="model files, SOURCE/NAME, or .onnx files")],
    arch: flags.Arch = None,
    trust_code: flags.TrustCode = None,
    input_size: flags.InputSize = None,
    batch_size: Annotated[
        str, typer.Option("--batch-size", "-b", metavar="N,…", help="samples per call")
    ] = "1",
    threads: Annotated[
        str, typer.Option("--threads", metavar="N,…", help="CPU threads, e.g. 1,2")
    ] = "1",
    compiled: Annotated[
        bool, typer.Option("--compile", help="PyTorch models through torch.compile, too")
    ] = False,
    openvino: Annotated[
        bool | None,
        typer.Option("--openvino/--no-openvino", help=".onnx files in OpenVINO, if installed"),
    ] = None,
) -> None:
    """Latency, size and memory side by side, in PyTorch and in ONNX Runtime."""
    size = flags.parse_size(input_size)
    from kdsurgeon.cli.timing import parse_counts, time_models

    time_models(
        models,
        arch,
        trust_code or (),
        size,
        batches=parse_counts(batch_size, "--batch-size"),
        threads=parse_counts(threads, "--threads"),
        compiled=compiled,
        openvino=openvino,
    )
