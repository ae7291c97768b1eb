"""A distillation as the command line runs it: announce, train with a display, keep, report."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdsurgeon import __version__
from kdsurgeon.checkpoints import Loaded, ModelCard, code_in, load_model
from kdsurgeon.cli import inputs, reconciling
from kdsurgeon.cli.console import hush, out, say, warn
from kdsurgeon.cli.live import display, duration
from kdsurgeon.cli.reporting import write_report
from kdsurgeon.cli.signals import interruptible
from kdsurgeon.data import Batches, Split
from kdsurgeon.distillation import Distillation, check_shard, prepare
from kdsurgeon.errors import (
    Interrupted,
    ModelFileError,
    NumericsError,
    ResourceError,
    SurgeonError,
    UsageError,
)
from kdsurgeon.evaluation import accuracy, evaluate
from kdsurgeon.keeping import saved_conditions
from kdsurgeon.objectives import formula, how_it_runs
from kdsurgeon.ranks import ALONE, Ranks
from kdsurgeon.recipe import DataRecipe, RunConfig, idle_settings, read_config, write_yaml
from kdsurgeon.runs import Checkpoint, Run, check_is_free, environment
from kdsurgeon.stones import (
    Certificate,
    Forecast,
    Plan,
    SteppingStones,
    certify,
    forecast_of_run,
)
from kdsurgeon.teacher_cache import TaughtBatches, cache_teacher
from kdsurgeon.tracing import move
from kdsurgeon.training import (
    Moment,
    Stop,
    changes,
    conditions,
    is_exact,
    learning_rate_at,
    prepare_cublas,
)
from kdsurgeon.views import accuracy_table, plan_table


@dataclass(frozen=True)
class Session:
    """Everything that a run's settings name, loaded and checked against each other."""

    settings: RunConfig
    teacher: Loaded
    student: Loaded
    split: Split
    train: Batches | TaughtBatches
    validation: Batches
    plan: Plan
    ranks: Ranks

    @property
    def card(self) -> ModelCard:
        """What the student's files will say of it."""
        data = self.split.train
        return ModelCard(
            arch=self.student.card.arch,
            input_size=data.input_size,
            num_classes=data.num_classes,
            class_names=tuple(data.class_names),
            mean=tuple(data.mean),
            std=tuple(data.std),
            crop_pct=self.split.fit.crop_pct,
            interpolation=self.split.fit.interpolation,
            provenance={
                "kdsurgeon": __version__,
                "teacher": self.teacher.sha256 or self.teacher.source,
                "plan": self.plan.hash,
                "recipe": self.settings.hash(),
                "data": self.split.fingerprint,
            },
        )

    def prepare(self) -> Distillation:
        """Ready for its first step; the teacher measured."""
        return prepare(
            self.teacher.model,
            self.student.model,
            self.train,
            plan=self.plan,
            recipe=self.settings,
            validation=self.validation,
            ranks=self.ranks,
            device=inputs.pick_device(self.settings.device),
        )


def open_session(
    settings: RunConfig, trust: Sequence[str], plan: Path | None, ranks: Ranks
) -> Session:
    """Load both models and the data, and plan; raises when anything does not fit.

    Models that will be shared out stay on the CPU until then.
    """
    if ranks.world == 1:  # who looks at a run alone has all of it
        settings = settings.replace(shard="none")
    if settings.threads:
        torch.set_num_threads(inputs.check_threads(settings.threads))
    torch.manual_seed(settings.seed)
    random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    device = inputs.pick_device(settings.device if settings.shard == "none" else "cpu")
    teacher = load_model(
        settings.teacher, arch=settings.teacher_arch, trust=trust, flag="--teacher-arch"
    )
    split = inputs.load_data(settings, reconciling.card_of(teacher))
    student = load_model(
        settings.student,
        arch=settings.student_arch,
        trust=trust,
        flag="--student-arch",
        num_classes=split.train.num_classes,
    )
    split = reconciling.as_student_sees(settings, student, split)
    teacher = reconciling.reconciled(teacher, settings, split)
    teacher.model.to(device)
    student.model.to(device)
    example = torch.zeros((2, *split.train.input_size), device=device)
    if settings.method == "block-kd":
        found = inputs.plan_for(teacher, student, example, plan=plan, blocks=settings.blocks)
        if settings.budget is not None:
            found = inputs.within(found, settings.budget, settings.batch_size)
    else:  # needs no cut
        found = inputs.plan_for(teacher, student, example, plan=None, blocks=0)
    inputs.check_classes(teacher, found.teacher.trace.num_classes, split)
    train, validation = inputs.batches(settings, split)
    asks_once = settings.data.teacher_views is not None or settings.teacher_cache is not None
    if asks_once and settings.method != "ce":
        train = _taught(teacher, train, settings.teacher_cache, ranks)
    return Session(settings, teacher, student, split, train, validation, found, ranks)


def _check_shard(settings: RunConfig, ranks: Ranks) -> None:
    check_shard(settings, ranks)
    if settings.shard != "none" and settings.teacher_cache is not None:
        raise UsageError(
            f"--shard {settings.shard} and --teacher-cache do not go together.",
            why="the teacher is asked before it is shared out, so it must fit the device anyway",
            fix="leave one of the two out",
        )


def _taught(teacher: Loaded, train: Batches, path: str | None, ranks: Ranks) -> TaughtBatches:
    """With the teacher's logits; rank 0 asks for them, if there is a file to read them from."""
    if ranks.world > 1 and path is not None:
        ranks.first_does(lambda: cache_teacher(teacher.model, train, path=path) and None)
    return cache_teacher(teacher.model, train, path=path)


@contextmanager
def _joined(settings: RunConfig, ranks: Ranks) -> Iterator[None]:
    """With the other processes of the run, where torchrun started several."""
    device = inputs.pick_device(settings.device)
    with warnings.catch_warnings(), ranks.joined(device, speak=lambda: hush(False)):
        # torch's remark on 1×1 kernels, whose gradients lie alike in either layout
        warnings.filterwarnings("ignore", "Grad strides do not match", UserWarning)
        ranks.device(settings.device, inputs.pick_device)
        yield


@contextmanager
def _held(ranks: Ranks, hold: Callable[[], Run], folder: Path) -> Iterator[Run]:
    """The run folder, which rank 0 holds and writes to; the others read from it."""
    held: list[Run] = []
    ranks.first_does(lambda: held.append(hold()))
    with held[0] if held else Run(folder, None) as run:
        yield run


def start_session(
    settings: RunConfig, trust: Sequence[str], *, dry_run: bool, ranks: Ranks = ALONE
) -> None:
    """A new run from its settings; by a process that torchrun started anew, the one it was in."""
    if settings.deterministic:
        prepare_cublas()
    with _joined(settings, ranks):
        _check_shard(settings, ranks)
        if ranks.restarts and _has_begun(settings, ranks):
            assert settings.output is not None
            return _go_on(Path(settings.output), trust, {}, {}, (), ranks)
        if settings.output:  # said before models and data are loaded
            output = settings.output
            ranks.first_does(lambda: check_is_free(output))
        return _start(settings, trust, dry_run, ranks)


def _has_begun(settings: RunConfig, ranks: Ranks) -> bool:
    """Whether the run was there before torchrun started its processes anew."""
    if settings.output is None:
        raise UsageError(
            "the processes were started anew, and nothing says which run they were in.",
            fix="name its folder when --max-restarts is given: --output FOLDER",
        )
    config = Path(settings.output) / "config.yaml"
    return ranks.first_does(config.is_file)


def _start(settings: RunConfig, trust: Sequence[str], dry_run: bool, ranks: Ranks) -> None:
    session = open_session(settings, trust, Path(settings.plan) if settings.plan else None, ranks)
    ready, proof = announce(session)
    if dry_run:
        _rehearse(ready)
        return
    named = Path(settings.output) if settings.output else _fresh_folder(session)
    folder = ranks.first_does(lambda: named)

    def record() -> None:
        run.write("plan.yaml", session.plan.to_yaml(proof.as_dict() if proof else None))
        run.write("run.json", json.dumps(_record(session, ready, run.path), indent=1))
        run.write("config.yaml", write_yaml(settings.dump()))

    with _held(ranks, lambda: Run.create(folder), folder) as run:
        ranks.first_does(record)
        try:
            _train(session, ready, run)
        except SurgeonError:
            if ranks.is_first and not any(run.path.glob("checkpoints/*")):
                run.withdraw()  # so that the mended command may take the same folder
            raise


def resume_session(
    folder: Path,
    trust: Sequence[str],
    overrides: Mapping[str, Any],
    *,
    spelled: Mapping[str, str],
    allow_change: Sequence[str],
    ranks: Ranks = ALONE,
) -> None:
    """Go on with the run in ``folder``, from its newest whole checkpoint.

    Raises :class:`UsageError` when a setting changed that the bits of the run depend on.
    """
    with at_home(Run.look(folder).path, trust) as (folder, _):
        settings = read_config(folder / "config.yaml", overrides, spelled=spelled)
        if settings.deterministic:
            prepare_cublas()
        with _joined(settings, ranks):
            _go_on(folder, trust, overrides, spelled, allow_change, ranks)


def _go_on(
    folder: Path,
    trust: Sequence[str],
    overrides: Mapping[str, Any],
    spelled: Mapping[str, str],
    allow_change: Sequence[str],
    ranks: Ranks,
) -> None:
    with (
        at_home(Run.look(folder).path) as (folder, before),
        _held(ranks, lambda: Run.resume(folder), folder) as run,
    ):
        checkpoint, complaints = run.latest_checkpoint()
        for complaint in complaints:
            warn(f"{complaint} An older one is used.")
        recorded = _recorded(folder / "run.json")
        settings = read_config(folder / "config.yaml", overrides, spelled=spelled)
        _check_shard(settings, ranks)
        wanted = settings.threads if "threads" in allow_change else recorded["threads"]
        threads = overrides.get("threads") or wanted
        if threads:  # another number gives other bits
            torch.set_num_threads(inputs.check_threads(threads))
        device = inputs.pick_device(settings.device)
        now = conditions(settings, device, ranks.world)
        was = (
            saved_conditions(checkpoint) if checkpoint else conditions(before, device, ranks.world)
        )
        changed = changes(was, now, allow_change)
        _tell_changes(changed, checkpoint, settings)
        session = open_session(settings, trust, folder / "plan.yaml", ranks)
        _check_same_files(session, recorded)
        if len(run.metrics()) >= settings.epochs:
            say(f"{folder} has finished its epochs before: nothing is left to train")
        ready, _ = announce(session)

        def record() -> None:
            if changed:
                run.write("config.yaml", write_yaml(settings.dump()))
            _record_resume(run, checkpoint, changed)

        ranks.first_does(record)
        _train(session, ready, run, allow_change)


def _tell_changes(
    changed: Mapping[str, list[Any]], checkpoint: Checkpoint | None, settings: RunConfig
) -> None:
    for name, (before, now) in changed.items():
        say(f"changed  {name}: was {before}, is {now}")
    if "epochs" in changed and checkpoint:
        before = settings.replace(epochs=changed["epochs"][0])
        done = checkpoint.state["training"]["epoch"]
        rates = [learning_rate_at(each, done / each.epochs) for each in (before, settings)]
        warn(
            f"the schedule is that of a run of {settings.epochs} epochs from here on: the learning "
            f"rate goes on at {rates[1]:.3g} instead of {rates[0]:.3g}."
        )
    if not is_exact(changed):
        warn("the run will not come to the bits that it would have come to; run.json says so.")


def _record_resume(
    run: Run, checkpoint: Checkpoint | None, changed: Mapping[str, list[Any]]
) -> None:
    """What is said in run.json of this resume, and whether the run is still the one it began as."""
    record = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    record.setdefault("resumes", []).append(
        {
            "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "from": checkpoint.path.name if checkpoint else None,
            "changed": changed,
        }
    )
    record["exact"] = bool(record.get("exact")) and is_exact(changed)
    record["threads"] = torch.get_num_threads()
    run.write("run.json", json.dumps(record, indent=1))


def announce(session: Session) -> tuple[Distillation, Certificate | None]:
    """Print sizes, plan, formula and forecast, and the teacher's measured accuracy.

    What comes back is ready to train, with the proof of the surgery where there is any.
    """
    settings, plan = session.settings, session.plan
    inputs.warn_of(plan)
    proof = None
    if settings.shard != "none":  # while all weights are here
        proof = _proof(session)
    ready = session.prepare()
    train, val = session.split.train, session.split.val
    counts = f"{len(train):,} training and {len(val):,} validation images"
    say(f"data     {settings.data_dir}: {counts}, {train.num_classes} classes")
    say(f"teacher  {session.teacher.source}: accuracy {ready.teacher_accuracy:.2%}")
    if settings.shard == "none":
        proof = _proof(session)
    if proof:
        out.print(plan_table(plan, _forecast(session), proof))
    say(formula(plan, settings))
    loss_code = how_it_runs(settings, next(session.student.model.parameters()).device)
    if loss_code:
        say(f"loss     {loss_code}")
    for note in ready.notes:
        say(note)
    idle = [f"{key} ({why})" for key, why in idle_settings(settings)]
    if idle:
        warn(f"nothing depends on {', '.join(idle)}.")
    say()
    return ready, proof


def _proof(session: Session) -> Certificate | None:
    """Of the surgery, where there is any; one process is enough."""
    return certify(session.plan) if session.plan.stones and session.ranks.is_first else None


def _forecast(session: Session) -> Forecast:
    return forecast_of_run(session.plan, session.settings, batch=session.settings.batch_size)


def _rehearse(ready: Distillation) -> None:
    """Three steps with everything but the update, for a forecast of the time."""
    device = next(ready.model.parameters()).device
    steps = list(islice(iter(ready.ranks.part_of(ready.batches)), 4))
    began = 0.0
    for index, (batch, target) in enumerate(steps):
        if index == 1 or len(steps) == 1:
            began = time.monotonic()
        losses = ready.objective(move(batch, device), target.to(device), Moment(1.0, index))
        losses.total.backward()
        ready.model.zero_grad()
    each = (time.monotonic() - began) / max(1, len(steps) - 1)
    count = ready.recipe.epochs * len(ready.batches)  # pyright: ignore[reportArgumentType]
    say(
        f"forecast {count:,} steps of {1000 * each:.0f} ms: about {duration(count * each)}, "
        "evaluation not counted"
    )
    say("dry run: nothing was written")


def _train(
    session: Session, ready: Distillation, run: Run, allow_change: Sequence[str] = ()
) -> None:
    settings, stop, ranks = session.settings, Stop(), session.ranks
    told = settings if ranks.is_first else settings.replace(track=())
    with interruptible(stop) as interrupt, display(told, run.path) as shown:
        epochs = ready.epochs(
            run=run,
            card=session.card,
            stop=stop,
            watch=shown.step,
            report=lambda trouble: warn(trouble.text),
            allow_change=allow_change,
        )
        try:
            for epoch in epochs:
                shown.epoch(epoch)
        except (NumericsError, ResourceError) as error:
            checkpoint, _ = run.latest_checkpoint()
            if checkpoint is not None:
                error.notes.setdefault("kept", str(checkpoint.path))
            raise
    number = max(ranks.all(int(interrupt.signal)))
    if number and ranks.first_does(lambda: len(run.metrics())) < settings.epochs:
        name = signal.Signals(number).name
        raise Interrupted(
            f"interrupted ({name}): everything is saved in {run.path}.",
            fix=f"go on: kdsurgeon distill --resume {shlex.quote(str(run.path))}"
            f"{_typed_again(settings.teacher, settings.teacher_arch, *_student(settings))}",
            exit_code=128 + number,
        )
    final = None
    if isinstance(ready.model, SteppingStones):
        final = evaluate(ready.model, ready.part_of(session.validation), ranks)
        out.print(accuracy_table(final))

    def end() -> None:
        write_report(session, _forecast(session), run, final)
        run.seal()

    ranks.first_does(end)
    lines = run.metrics()
    best = max(lines, key=lambda line: line["accuracy"])
    say(f"last     {run.path}/student/last.safetensors, accuracy {lines[-1]['accuracy']:.2%}")
    say(f"best     {run.path}/student/best.safetensors, accuracy {best['accuracy']:.2%},")
    say(f"         epoch {best['epoch']}, chosen on the images it is measured on")
    say(f"report   {run.path}/report.html")
    averages = [line["ema_accuracy"] for line in lines if line.get("ema_accuracy") is not None]
    if averages:
        say(f"average  {run.path}/student/ema.safetensors, accuracy {averages[-1]:.2%}")
    again = _typed_again(*_student(settings))
    say(f"next     kdsurgeon export {shlex.quote(str(run.path))} student.onnx{again}")


def _student(settings: RunConfig) -> tuple[str | None, ...]:
    return settings.student, settings.student_arch


def _typed_again(*specs: str | None) -> str:
    """The flags that let code run which a run names, as it was typed when the run began."""
    code = dict.fromkeys(spec for spec in specs if spec and code_in(spec))
    return "".join(f" --trust-code {shlex.quote(spec)}" for spec in code)


def evaluate_run(folder: Path, trust: Sequence[str]) -> None:
    """Student, teacher and every stone of a run on its validation data."""
    with at_home(folder, trust) as (folder, settings), Run.look(folder) as run:
        session = open_session(settings, trust, folder / "plan.yaml", ALONE)
        checkpoint, complaints = run.latest_checkpoint()
        for complaint in complaints:
            warn(complaint)
        if checkpoint is None:
            raise UsageError(f"{folder} has no checkpoint yet.", fix="let it train for an epoch")
        ready = session.prepare()
        ready.load(checkpoint)
        say(f"student  {_which(run, checkpoint)}")
        if isinstance(ready.model, SteppingStones):
            out.print(accuracy_table(evaluate(ready.model, session.validation)))
        else:
            say(f"student  accuracy {accuracy(ready.student, session.validation):.2%}")


def _which(run: Run, checkpoint: Checkpoint) -> str:
    """Of which update the measured weights are, and that an export takes others where it does."""
    lines = run.metrics()
    best = max(lines, key=lambda line: line["accuracy"] or 0.0, default=None)
    text = f"as of {checkpoint.path.name}, the newest checkpoint"
    if best is None or best is lines[-1]:
        return text
    return f"{text}; export takes that of epoch {best['epoch']}, the best, unless --last is given"


def evaluate_model(
    source: str, arch: str | None, trust: Sequence[str], data_dir: str | None, wishes: DataRecipe
) -> None:
    """One model on the validation part of a data set."""
    loaded = load_model(source, arch=arch, trust=trust, flag="--arch")
    if data_dir is None:
        raise UsageError("there is nothing to measure on.", fix="--data-dir FOLDER, or digits")
    settings = inputs.data_settings(data_dir, wishes)
    split = inputs.data_for(loaded, settings)
    _, validation = inputs.batches(settings, split)
    found = accuracy(loaded.model, validation)
    say(f"{source}: accuracy {found:.2%} on {len(split.val):,} images of {split.val.name}")


# ── what a session leaves and shows ──────────────────────────────────────────────────────────────


def _fresh_folder(session: Session) -> Path:
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
    return Path("runs") / f"{stamp}-{session.student.name}-{session.settings.method}"


def _record(session: Session, ready: Distillation, folder: Path) -> dict[str, Any]:
    return {
        **environment(["kdsurgeon", *sys.argv[1:]]),
        "teacher": {"source": session.teacher.source, "sha256": session.teacher.sha256},
        "student": {"source": session.student.source, "sha256": session.student.sha256},
        "teacher_accuracy": ready.teacher_accuracy,
        "data": session.split.fingerprint,
        "plan": session.plan.hash,
        "recipe": session.settings.hash(),
        "seed": session.settings.seed,
        "device": str(next(session.student.model.parameters()).device),
        "exact": _is_exact(session),
        "threads": torch.get_num_threads(),
        "processes": session.ranks.world,
        "started_in": os.path.relpath(Path.cwd(), folder),  # seen from the run folder
    }


def _is_exact(session: Session) -> bool:
    """Whether the same command comes to the same bits again, on this machine and versions."""
    settings = session.settings
    device = next(session.student.model.parameters()).device
    return (device.type == "cpu" or settings.deterministic) and not settings.torch_compile


def check_code(settings: RunConfig, trust: Sequence[str], *, of: str) -> None:
    """Raises :class:`ModelFileError` for code that a file names and the user did not.

    ``of`` is what the settings come from; ``trust`` holds what was typed, with whole paths.
    """
    named = (settings.teacher, settings.teacher_arch, settings.student, settings.student_arch)
    for code in dict.fromkeys(filter(None, (code_in(spec) for spec in named if spec))):
        if code not in trust:
            raise ModelFileError(
                f"{of} asks to run {code}; a file never names code.",
                fix=f"if you trust it, type it yourself: --trust-code {shlex.quote(code)}",
            )


@contextmanager
def at_home(folder: Path, trust: Sequence[str] | None = None) -> Iterator[tuple[Path, RunConfig]]:
    """Work where the run was started, so that the paths in its settings mean what they meant.

    Yields the absolute run folder and its settings. Where the teacher is not found there (the
    folder was moved), work where the user is. Code that its models need must be among ``trust``,
    unless that is None.

    Raises:
        ModelFileError: it is not.
    """
    folder = folder.absolute()
    settings = read_config(folder / "config.yaml")
    home = Path.cwd()
    try:
        recorded = json.loads((folder / "run.json").read_text(encoding="utf-8"))["started_in"]
        started_in = (folder / recorded).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        started_in = home
    if (started_in / settings.teacher).exists() or not (home / settings.teacher).exists():
        home = started_in if started_in.is_dir() else home
    with chdir(home):
        if trust is not None:
            check_code(settings, trust, of=str(folder))
        yield folder, settings


def _recorded(path: Path) -> dict[str, Any]:
    """What :func:`_record` gave when the run began."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            "teacher": found["teacher"]["sha256"],
            "student": found["student"]["sha256"],
            "data": found["data"],
            "plan": found["plan"],
            "threads": int(found["threads"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"{path} is missing or damaged; the run cannot be resumed.",
            why=f"{type(error).__name__}: {error}",
            fix="start a new run with another --output",
        ) from error


def _check_same_files(session: Session, recorded: dict[str, Any]) -> None:
    found = {
        "teacher": session.teacher.sha256,
        "student": session.student.sha256,
        "data": session.split.fingerprint,
        "plan": session.plan.hash,
    }
    for name, value in found.items():
        if recorded[name] != value:
            raise UsageError(
                f"the {name} of this run changed since it began.",
                before=str(recorded[name]),
                now=str(value),
                fix="put it back as it was, or start a new run with another --output",
            )
