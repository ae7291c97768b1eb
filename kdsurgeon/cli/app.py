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

import typer
from typer.main import get_command

from kdsurgeon import __version__
from kdsurgeon.cli import models, onnx, run
from kdsurgeon.cli.console import complain, err, hush, out
from kdsurgeon.cli.outputs import Output, check_outputs
from kdsurgeon.cli.signals import terminable
from kdsurgeon.errors import ResourceError, SurgeonError, ToldElsewhere, UsageError, nearest

app = typer.Typer(
    name="kdsurgeon",
    help="Knowledge distillation by graph surgery: two models in, a small verified ONNX file out.",
    add_completion=False,
    rich_markup_mode=None,  # its tables cut long flags at 80 columns
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
    epilog="Everywhere: --debug shows tracebacks, --json prints an error as one object, "
    "--no-plugins hides all but the built-in extensions.",
)

app.command("inspect", short_help="Where a model can be cut, shapes and costs.")(models.inspect)
app.command(
    "partition", short_help="Align teacher and student, prove the surgery, write plan.yaml."
)(models.partition)
app.command("distill", short_help="Train a student with the help of a teacher.")(run.distill)
app.command("eval", short_help="Accuracy of a run, or of one model.")(run.evaluate)
app.command("export", short_help="Write a student as an ONNX file that is proved equal.")(
    onnx.export
)
app.command("benchmark", short_help="Latency, size and memory side by side.")(onnx.benchmark)
app.command("convert", short_help="Take the tensors out of a foreign checkpoint.")(models.convert)
app.command("verify", short_help="Compare files with what their manifest says.")(models.verify)
app.command("runs")(run.runs)
app.command("plugins")(models.plugins)


@app.command(short_help="Check this installation.")
def doctor() -> None:
    """Check this installation: versions, devices, a twin short run, ONNX parity."""
    from kdsurgeon.cli.doctor import examine

    examine()


@app.command(short_help="All of it in about a minute, on real handwritten digits.")
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder for everything that the demo writes")
    ] = Path("kdsurgeon-demo"),
    seed: Annotated[int, typer.Option(help="of weights, split, order and augmentation")] = 0,
) -> None:
    """All of it in about a minute on a CPU, on real handwritten digits."""
    check_outputs([Output("--output", output, "")], [])
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
    if os.environ.get("LOCAL_RANK") and os.environ.get("RANK", "0") != "0":
        hush()  # torchrun's first process talks for all
    arguments, switches = _without_switches(arguments)
    if "--no-plugins" in switches:
        os.environ["KDSURGEON_NO_PLUGINS"] = "1"
    if not standalone:
        _run(arguments)
        return 0
    try:
        with terminable():
            _run(arguments or ["--help"])
    except typer.Exit as stop:
        return stop.exit_code if arguments else UsageError.exit_code
    except (KeyboardInterrupt, typer.Abort) as stop:
        complain("interrupted at once; what was saved before is intact.")
        return getattr(stop, "exit_code", 128 + signal.SIGINT)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        return _fail(error, switches)
    return 0


def _run(arguments: Sequence[str]) -> None:
    """What ``app(arguments)`` does, without its own answers to Ctrl-C and closed pipes."""
    command = get_command(app)
    with command.make_context("kdsurgeon", list(arguments)) as context:
        command.invoke(context)


def _without_switches(arguments: Sequence[str]) -> tuple[list[str], set[str]]:
    """The switches that every verb has, wherever they stand."""
    known = {"--debug", "--json", "--no-plugins"}
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    found = {word.replace("_", "-") for word in arguments[:cut]} & known
    kept = [word for word in arguments[:cut] if word.replace("_", "-") not in known]
    return kept + list(arguments[cut:]), found


def _fail(error: Exception, switches: set[str]) -> int:
    """Print an error, whoever raised it, as one of ours; its exit code."""
    if isinstance(error, ToldElsewhere):
        return error.exit_code
    if "--debug" in switches:
        traceback.print_exception(error)
    ours = error if isinstance(error, SurgeonError) else _translated(error)
    _report(ours, switches)
    return ours.exit_code


def _translated(error: Exception) -> SurgeonError:
    """A mistake on the command line, a machine at its limits, or a fault of ours."""
    if isinstance(error, typer.TyperException):
        return _usage(error)
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        return ResourceError("there is not enough memory.", fix="a smaller batch, input or model")
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f"{error.filename}: "
        return ResourceError(f"{where}{error.strerror}.", fix="check path, permissions and disk")
    return _our_fault(error)


def _is_torch_out_of_memory(error: Exception) -> bool:
    words = ("can't allocate memory", "out of memory")  # on the CPU, on a GPU
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _usage(error: typer.TyperException) -> UsageError:
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "kdsurgeon"
    fix = f"{where} --help lists what there is"
    wrong = getattr(error, "option_name", None)
    if wrong is None or context is None:
        return UsageError(error.format_message(), fix=fix)
    known = [flag for parameter in context.command.params for flag in parameter.opts]
    meant = nearest(wrong, known) if wrong not in known else None
    return UsageError(error.message, fix=f"{meant}\n{fix}" if meant else fix)


def _our_fault(error: Exception) -> SurgeonError:
    """A fault of ours: the traceback goes to a file, one line to the terminal."""
    first = (str(error).splitlines() or [""])[0][:200]
    what = f"a fault of kdsurgeon: {type(error).__name__}: {first}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="kdsurgeon-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return SurgeonError(what, fix="please report it; --debug shows where it happened")
    return SurgeonError(what, fix=f"please report it with {file.name}")


def _report(error: SurgeonError, switches: set[str]) -> None:
    if err.quiet:
        return
    if "--json" in switches:
        found = {"error": error.what, "code": error.exit_code, **error.notes}
        print(json.dumps(found), file=sys.stderr)
        return
    complain(f"error: {error}")
