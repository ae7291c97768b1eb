"""Verbs about models: inspect, partition, convert, verify, plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdsurgeon.cli import flags
from kdsurgeon.cli.console import out, say
from kdsurgeon.cli.outputs import Output, check_outputs
from kdsurgeon.errors import UsageError


def inspect(
    model: Annotated[str, typer.Argument(help="a model file or SOURCE/NAME")],
    arch: flags.Arch = None,
    trust_code: flags.TrustCode = None,
    data_dir: flags.DataDir = None,
    input_size: flags.InputSize = None,
    max_bad_images: flags.MaxBadImages = None,
    every: Annotated[
        bool, typer.Option("--all", help="every cut point, also where no boundary would be put")
    ] = False,
) -> None:
    """Show the cut points of a model, their shapes and costs, and how it was captured."""
    from kdsurgeon.checkpoints import load_model
    from kdsurgeon.cli.inputs import example_for, handing_over_images
    from kdsurgeon.tracing import trace
    from kdsurgeon.views import cut_points_table

    size = flags.parse_size(input_size)
    loaded = load_model(model, arch=arch, trust=trust_code or (), flag="--arch")
    example = example_for([loaded], size, data_dir, max_bad_images or 0)
    with handing_over_images():
        captured = trace(loaded.model, example, name=loaded.name)
    out.print(cut_points_table(captured, all=every))


def partition(
    teacher: Annotated[str, typer.Argument(help="a model file or SOURCE/NAME")],
    student: Annotated[str, typer.Argument(help="a model file or SOURCE/NAME")],
    teacher_arch: flags.TeacherArch = None,
    student_arch: flags.StudentArch = None,
    trust_code: flags.TrustCode = None,
    data_dir: flags.DataDir = None,
    input_size: flags.InputSize = None,
    max_bad_images: flags.MaxBadImages = None,
    blocks: flags.Blocks = None,
    pair: flags.Pairs = None,
    budget: flags.Budget = None,
    adapter_parameters: Annotated[
        int | None,
        typer.Option("--adapter-parameters", min=1, help="at most so many in a stone's adapters"),
    ] = None,
    probe: Annotated[
        int | None,
        typer.Option(
            "--probe", metavar="N", min=1, help="compare both models on N images of --data-dir"
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="check and show this plan instead of searching")
    ] = None,
    output: flags.OutputFile = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="draw both graphs side by side")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="the same as a page")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="why each boundary, and the runner-up")
    ] = False,
) -> None:
    """Align a teacher and a student: blocks, adapters, a forecast of what training costs."""
    size, pairs = flags.parse_size(input_size), flags.parse_pairs(pair)
    count, ratio = flags.parse_blocks(blocks), flags.parse_budget(budget)
    if sum(given is not None for given in (plan, pairs, blocks)) > 1:
        raise UsageError(
            "--plan, --pair and --blocks exclude each other.",
            fix="leave out --blocks: a plan and pairs already say how many there are",
        )
    if plan is not None and adapter_parameters is not None:
        raise UsageError(
            "--plan and --adapter-parameters exclude each other.",
            fix="the plan says how its adapters are made: edit adapter and rank there",
        )
    if probe is not None and (plan is not None or pairs is not None):
        raise UsageError(
            f"--probe does not go with {'--plan' if plan is not None else '--pair'}.",
            why="it helps to search for boundaries, and these are given",
            fix="leave out --probe",
        )
    if probe is not None and data_dir is None:
        raise UsageError(
            "--probe compares the models on images, and none are named.", fix="--data-dir DIR"
        )
    named = [("--output", output, ".yaml"), ("--svg", svg, ".svg"), ("--html", html, ".html")]
    check_outputs(
        [Output(flag, path, suffix) for flag, path, suffix in named if path],
        [teacher, student, teacher_arch, student_arch, data_dir, plan],
    )
    from kdsurgeon.cli.inputs import (
        example_for,
        load_pair,
        plan_for,
        probe_images,
        warn_of,
        within,
        write_text,
    )
    from kdsurgeon.recipe import Recipe
    from kdsurgeon.stones import certify, forecast
    from kdsurgeon.views import draw_plan, explain_table, plan_page, plan_table

    pair_of_models = load_pair(teacher, student, teacher_arch, student_arch, trust_code or ())
    example = example_for(pair_of_models, size, data_dir, max_bad_images or 0)
    found = plan_for(
        *pair_of_models,
        example,
        plan=plan,
        blocks=count,
        pairs=pairs,
        max_adapter_parameters=adapter_parameters,
        probe=probe_images(probe, data_dir, pair_of_models[0], example, max_bad_images or 0)
        if probe and data_dir
        else None,
    )
    if ratio is not None:
        found = within(found, ratio, Recipe().batch_size)
    warn_of(found)
    cost, proof = forecast(found), certify(found)
    out.print(plan_table(found, cost, proof))
    if explain:
        out.print(explain_table(found))
    if output:
        write_text(output, found.to_yaml(proof.as_dict()))
        say(f"plan     {output}")
    if svg:
        write_text(svg, draw_plan(found, cost))
        say(f"picture  {svg}")
    if html:
        write_text(html, plan_page(found, cost, proof))
        say(f"page     {html}")


def convert(
    file: Annotated[Path, typer.Argument(help="a foreign checkpoint")],
    output: Annotated[Path, typer.Argument(help="the .safetensors file to write")],
    drop_extra: Annotated[
        bool, typer.Option("--drop-extra", help="leave out whatever is not a tensor")
    ] = False,
) -> None:
    """Take the tensors out of a foreign checkpoint, running nothing in it."""
    check_outputs([Output("OUTPUT", output, ".safetensors", makes_parents=False)], [file])
    from kdsurgeon.checkpoints import convert as convert_file

    done = convert_file(file, output, drop_extra=drop_extra)
    say(str(done))


def verify(
    target: Annotated[Path, typer.Argument(help="a run, a folder with a manifest, a model file")],
) -> None:
    """Compare every file of a folder, or one file, with the size and sha256 that were written."""
    from kdsurgeon.checkpoints import verify_file
    from kdsurgeon.runs import verify as verify_folder
    from kdsurgeon.runs import verify_run

    if target.is_file():
        say(f"{target}: what was written, by {verify_file(target)}")
    elif (target / "config.yaml").is_file():
        for line in verify_run(target):
            say(line)
    else:
        say(f"{target}: {verify_folder(target)} files are what was written")


def plugins() -> None:
    """List what is installed, without importing any of it."""
    from rich.table import Table

    from kdsurgeon.plugins import KINDS, installed

    table = Table("kind", "name", "from", "distribution", box=None, pad_edge=False)
    for kind in KINDS:
        for plugin in installed(kind).values():
            table.add_row(
                kind, plugin.name, plugin.target, f"{plugin.distribution} {plugin.version}"
            )
    out.print(table)
