"""The verbs in one application, and the one place where errors become text and an exit code.

Nothing here imports torch: ``--help`` and every mistake in flags or recipe are answered without it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import click
import typer

from kdsurgeon import __version__
from kdsurgeon.cli import models, onnx, run
from kdsurgeon.cli.console import err, out
from kdsurgeon.errors import SurgeonError

app = typer.Typer(
    name="kdsurgeon",
    help="Knowledge distillation by graph surgery: two models in, a small verified ONNX file out.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
    epilog="Everywhere: --debug shows tracebacks, --json prints an error as one object, "
    "--no-plugins hides all but the built-in extensions.",
)

app.command("inspect")(models.inspect)
app.command("partition")(models.partition)
app.command("distill")(run.distill)
app.command("eval")(run.evaluate)
app.command("export")(onnx.export)
app.command("benchmark")(onnx.benchmark)
app.command("convert")(models.convert)
app.command("verify")(models.verify)
app.command("runs")(run.runs)
app.command("plugins")(models.plugins)


@app.command()
def doctor() -> None:
    """Check this installation: versions, devices, a twin short run, ONNX parity."""
    from kdsurgeon.cli.doctor import examine

    examine()


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder for everything that the demo writes")
    ] = Path("kdsurgeon-demo"),
    seed: Annotated[int, typer.Option(help="of weights, split, order and augmentation")] = 0,
) -> None:
    """All of it in about two minutes on a CPU, on real handwritten digits."""
    from kdsurgeon.cli.demo import play

    play(output, seed, lambda line: main(line, standalone=False))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        out.print(f"kdsurgeon {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str], *, standalone: bool = True) -> int:
    """Run one command line; its exit code. Errors are printed, or raised if not ``standalone``."""
    arguments, switches = _without_switches(arguments)
    if "--no-plugins" in switches:
        os.environ["KDSURGEON_NO_PLUGINS"] = "1"
    try:
        app(list(arguments), standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        out.print(error.format_message(), markup=False, highlight=False)
        return 2
    except click.ClickException as error:
        _report(_usage(error), switches)
        return 2
    except (KeyboardInterrupt, click.Abort):
        err.print("interrupted at once; what was saved before is intact.")
        return 128 + signal.SIGINT
    except SurgeonError as error:
        if not standalone:
            raise
        return _fail(error, switches)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not standalone:
            raise
        return _our_fault(error, switches)
    return 0


def _without_switches(arguments: Sequence[str]) -> tuple[list[str], set[str]]:
    """The switches that every verb has, wherever they stand."""
    known = {"--debug", "--json", "--no-plugins"}
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    found = {word.replace("_", "-") for word in arguments[:cut]} & known
    kept = [word for word in arguments[:cut] if word.replace("_", "-") not in known]
    return kept + list(arguments[cut:]), found


def _usage(error: click.ClickException) -> SurgeonError:
    where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
    failure = SurgeonError(
        error.format_message(), fix=f"{where or 'kdsurgeon'} --help lists what there is"
    )
    failure.exit_code = 2
    return failure


def _fail(error: SurgeonError, switches: set[str]) -> int:
    if "--debug" in switches:
        traceback.print_exception(error)
    _report(error, switches)
    return error.exit_code


def _our_fault(error: Exception, switches: set[str]) -> int:
    """A fault of ours: the traceback goes to a file, one line to the terminal."""
    if "--debug" in switches:
        traceback.print_exception(error)
    with tempfile.NamedTemporaryFile(
        "w", prefix="kdsurgeon-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exception(error, file=file)
    first = (str(error).splitlines() or [""])[0][:200]
    problem = SurgeonError(
        f"a fault of kdsurgeon: {type(error).__name__}: {first}",
        fix=f"please report it with {file.name}",
    )
    _report(problem, switches)
    return 1


def _report(error: SurgeonError, switches: set[str]) -> None:
    if "--json" in switches:
        found = {"error": error.what, "code": error.exit_code, **error.notes}
        print(json.dumps(found), file=sys.stderr)
        return
    err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
