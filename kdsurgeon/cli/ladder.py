"""``export --stones``: the stepping stones of a run, as files between its student and teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from kdsurgeon.cli import inputs
from kdsurgeon.cli.console import out, quietly, say
from kdsurgeon.cli.forms import Exportee, FormFlags, metadata_of
from kdsurgeon.cli.outputs import Output
from kdsurgeon.cli.reporting import read_evaluation, report_page
from kdsurgeon.cli.session import Session, at_home, open_session
from kdsurgeon.errors import ModelFileError, SurgeonError, UsageError
from kdsurgeon.exporting import Form, accuracy, benchmark, export
from kdsurgeon.ranks import ALONE
from kdsurgeon.recipe import read_yaml
from kdsurgeon.runs import Checkpoint, Run, read_checkpoint
from kdsurgeon.stones import SteppingStones, forecast
from kdsurgeon.stones.ladder import num_parameters, stone_cost, stone_network
from kdsurgeon.views import Row, comparison_table


def stone_outputs(target: str, output: Path) -> list[Output]:
    """The files that ``export --stones`` may write, one for each boundary of the run's plan.

    Raises:
        UsageError: ``target`` is no run, or one without stones.
    """
    folder = Path(target)
    if not (folder / "config.yaml").is_file():
        raise UsageError(
            f"{target} is no run folder, so it has no stones.",
            fix="leave --stones out, or name the folder of a run with --method block-kd",
        )
    plan = folder / "plan.yaml"
    entries = read_yaml(plan).get("boundaries") if plan.is_file() else None
    if not isinstance(entries, list) or not entries:
        raise _without_stones(folder)
    return [
        Output("--stones", stone_path(output, depth), ".onnx", makes_parents=False)
        for depth in range(1, len(entries) + 1)
    ]


def _without_stones(folder: Path) -> UsageError:
    return UsageError(
        f"{folder} trained no stones.",
        fix="leave --stones out, or train with --method block-kd",
    )


def check_plain(flags: FormFlags) -> None:
    """Raises :class:`UsageError` for a form of file that would not compare with the stones'."""
    others = ("static", "dynamic_size", "softmax", "external", "embed_preprocessing")
    wrong = [f"--{name.replace('_', '-')}" for name in others if getattr(flags, name)]
    if wrong:
        raise UsageError(
            f"--stones writes files of the usual form, without {', '.join(wrong)}.",
            why="student, stones and teacher are measured side by side on the same images",
            fix="leave one of them out; --half and --opset hold for the stones, too",
        )


def stone_path(output: Path, depth: int) -> Path:
    """
    >>> stone_path(Path("out/student.onnx"), 2).as_posix()
    'out/student.stone2.onnx'
    """
    return output.with_suffix(f".stone{depth}{output.suffix}")


def export_stones(
    target: str,
    output: Path,
    *,
    trust: Sequence[str],
    last: bool,
    flags: FormFlags,
    tolerance: float | None,
    threads: int,
    int8: bool,
) -> None:
    """Write each stone beside the student's ``output``, proved as that is; print the ladder.

    Raises:
        UsageError: the run trained no stones, or keeps no checkpoint of its best epoch.
        SurgeonError: whatever export raises, with the stone's name; those before it are written.
    """
    shown, output = output, output.absolute()
    with at_home(Path(target), trust) as (folder, settings), Run.look(folder) as run:
        with quietly():  # the student's export has told of the data
            session = open_session(settings, trust, folder / "plan.yaml", ALONE)
        ready = session.prepare()
        if not isinstance(ready.model, SteppingStones) or not ready.model.depths:
            raise _without_stones(folder)
        checkpoint = _checkpoint(run, last=last)
        ready.load(checkpoint)
        ladder = _Ladder(session, folder, ready.model, flags, tolerance, shown.parent)
        rows = ladder.write(output, threads, int8=int8)
        out.print(comparison_table(rows))
        say(f"one image, {threads} thread(s), CPU, all in ONNX Runtime; accuracy of the files")
        record = folder / "export" / f"{output.stem}.stones.json"
        inputs.write_text(record, json.dumps([asdict(row) for row in rows], indent=1))
        cost = forecast(session.plan, ready.model.depths, batch=settings.batch_size)
        final, epoch = read_evaluation(folder), _epoch(checkpoint)
        page = report_page(session, cost, run, final, rows, epoch)
        inputs.write_text(record.with_name(f"{output.stem}.html"), page)
        say(f"report   {record.with_name(f'{output.stem}.html')}")


def _checkpoint(run: Run, *, last: bool) -> Checkpoint:
    """The one of the newest update, or of the best epoch, whose student is exported, too."""
    found, complaints = run.latest_checkpoint()
    if found is None:
        raise UsageError(f"{run.path} has no checkpoint yet.", fix="let it train for an epoch")
    if last:
        return found
    for path in sorted(run.path.glob("checkpoints/step-*"), reverse=True):
        try:
            candidate = read_checkpoint(path)
        except ModelFileError as error:
            complaints.append(error.what)
            continue
        if candidate.facts.get("is_best"):
            return candidate
    raise UsageError(
        f"{run.path} has no whole checkpoint of its best epoch.",
        why="\n".join(complaints) or None,
        fix="--last exports student and stones after the last epoch",
    )


def _epoch(checkpoint: Checkpoint) -> int:
    """The epoch, counted from 1, that its newest update was in."""
    training = checkpoint.state["training"]
    return training["epoch"] + (training["batch"] > 0)


class _Ladder:
    """Writes and measures every rung on the run's own validation images."""

    def __init__(
        self,
        session: Session,
        folder: Path,
        stones: SteppingStones,
        flags: FormFlags,
        tolerance: float | None,
        shown_in: Path,
    ) -> None:
        self.session, self.stones, self.folder = session, stones, folder
        self.flags, self.tolerance, self.shown_in = flags, tolerance, shown_in
        self.kept: list[Path] = []
        self.samples = session.split.val.samples()
        self.labels = torch.from_numpy(session.split.val.labels)

    def write(self, output: Path, threads: int, *, int8: bool) -> list[Row]:
        """From the student, the cheapest, to the teacher, whose own file is not kept."""
        plan = self.session.plan
        student, teacher = plan.student.cost, plan.teacher.cost
        files = {"student": output}
        self.kept = [output]
        scores: dict[str, float | None] = {"student": self._accuracy(output)}
        costs = {"student": (student.parameters, student.multiply_adds)}
        if int8:
            name, path = "student int8", output.with_suffix(".int8.onnx")
            self.kept.append(path)
            files[name], scores[name], costs[name] = path, self._accuracy(path), costs["student"]
        for depth in sorted(self.stones.depths, reverse=True):
            name = f"stone {depth}"
            network = stone_network(plan, self.stones, depth)
            files[name] = stone_path(output, depth)
            scores[name] = self._written(name, network, files[name])
            costs[name] = (num_parameters(network), stone_cost(plan, depth).multiply_adds)
        with TemporaryDirectory() as folder:
            files["teacher"] = Path(folder) / "teacher.onnx"
            scores["teacher"] = self._written("teacher", plan.teacher.trace.model, files["teacher"])
            costs["teacher"] = (teacher.parameters, teacher.multiply_adds)
            timed = benchmark(files, self.samples[:1], threads=threads)
        return [
            Row(row.name, scores[row.name], *costs[row.name], row.bytes, row.latency.median_ms)
            for row in timed
        ]

    def _accuracy(self, path: Path) -> float:
        return accuracy(path, self.samples, self.labels)

    def _written(self, name: str, network: nn.Module, path: Path) -> float | None:
        try:
            done = export(
                network,
                path,
                self.samples[:2],
                form=Form(opset=self.flags.opset, half=self.flags.half),
                metadata=self._metadata(name),
                samples=self.samples,
                labels=self.labels,
                tolerance=self.tolerance,
            )
        except SurgeonError as error:
            kept = {"kept": ", ".join(str(self.shown_in / each.name) for each in self.kept)}
            raise type(error)(f"{name}: {error.what}", **(error.notes | kept)) from error
        if name != "teacher":
            self.kept.append(path)
            say(f"{name:8} {self.shown_in / path.name}, {done.bytes:,} bytes; {done.parity}")
        return done.accuracy

    def _metadata(self, name: str) -> dict[str, str]:
        """What the student's file says, but for the student itself."""
        session = self.session
        loaded = replace(session.student, card=session.card)
        wishes = session.settings.data
        exportee, folder = Exportee(loaded, session.split, wishes), str(self.folder)
        found = metadata_of(exportee, self.flags, folder, self.samples[:1])
        del found["student"]
        return found | {"network": name}
