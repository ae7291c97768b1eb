"""Verbs about runs: distill, eval, runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdsurgeon.cli import flags
from kdsurgeon.cli.console import out, say
from kdsurgeon.cli.outputs import Output, check_outputs
from kdsurgeon.errors import UsageError

if TYPE_CHECKING:
    from kdsurgeon.recipe import RunConfig

_KEYS = {
    "data_dir": "data_dir", "teacher_arch": "teacher_arch", "student_arch": "student_arch",
    "output": "output", "plan": "plan", "method": "method", "epochs": "epochs",
    "batch_size": "batch_size", "seed": "seed", "device": "device", "threads": "threads",
    "amp": "amp", "amp_dtype": "amp_dtype", "compile": "torch_compile",
    "channels_last": "channels_last", "deterministic": "deterministic",
    "sync_bn": "sync_bn", "shard": "shard",
    "checkpoint_every": "checkpoint_every", "keep_every": "keep_every",
    "model_ema": "optim.model_ema", "model_ema_decay": "optim.model_ema_decay",
    "skip_nan": "optim.skip_nan",
    "auto_batch": "optim.auto_batch", "auto_batch_norm": "optim.auto_batch_norm",
    "lr": "optim.lr", "opt": "optim.opt", "sched": "optim.sched", "momentum": "optim.momentum",
    "weight_decay": "optim.weight_decay", "warmup_epochs": "optim.warmup_epochs",
    "min_lr": "optim.min_lr", "clip_grad": "optim.clip_grad",
    "grad_accum_steps": "optim.grad_accum_steps", "decay_rate": "optim.decay_rate",
    "temperature": "loss.temperature", "kd_weight": "loss.kd_weight",
    "ce_weight": "loss.ce_weight", "cross_weight": "loss.cross_weight",
    "cross_start": "loss.cross_start", "distance": "loss.distance",
    "smoothing": "loss.label_smoothing",
    "augment": "data.augment", "val_split": "data.val_split", "aa": "data.aa",
    "reprob": "data.reprob", "cutout": "data.cutout", "crop_pct": "data.crop_pct",
    "interpolation": "data.interpolation", "classes": "data.classes", "workers": "data.workers",
    "data_device": "data.data_device",
    "max_bad_images": "data.max_bad_images", "teacher_views": "data.teacher_views",
    "teacher_cache": "teacher_cache", "fused": "loss.fused", "log_interval": "log_interval",
}  # fmt: skip


def distill(
    context: typer.Context,
    teacher: Annotated[str | None, typer.Argument(help="a model file or SOURCE/NAME")] = None,
    student: Annotated[str | None, typer.Argument(help="a model file or SOURCE/NAME")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="a run as YAML")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any key of the recipe")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with the run in this folder")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print plan, formula and forecast, and stop")
    ] = False,
    data_dir: flags.DataDir = None,
    teacher_arch: flags.TeacherArch = None,
    student_arch: flags.StudentArch = None,
    trust_code: flags.TrustCode = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="the run folder")] = None,
    plan: Annotated[str | None, typer.Option(help="a plan.yaml to follow")] = None,
    blocks: flags.Blocks = None,
    budget: flags.Budget = None,
    stones: Annotated[
        str | None,
        typer.Option(metavar="all|random|last-K|drop-first|1,3", help="stones to train"),
    ] = None,
    method: Annotated[str | None, typer.Option(help="block-kd, kd or ce")] = None,
    epochs: Annotated[int | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", "-b")] = None,
    lr: Annotated[float | None, typer.Option(help="peak learning rate")] = None,
    opt: Annotated[str | None, typer.Option(help="adamw, sgd, or timm's, as lamb")] = None,
    sched: Annotated[str | None, typer.Option(help="cosine, step, onecycle or constant")] = None,
    warmup_epochs: Annotated[float | None, typer.Option()] = None,
    min_lr: Annotated[float | None, typer.Option()] = None,
    decay_rate: Annotated[float | None, typer.Option(help="of --sched step")] = None,
    momentum: Annotated[float | None, typer.Option(help="of --opt sgd")] = None,
    weight_decay: Annotated[float | None, typer.Option()] = None,
    clip_grad: Annotated[float | None, typer.Option(help="largest gradient norm")] = None,
    grad_accum_steps: Annotated[int | None, typer.Option()] = None,
    temperature: Annotated[float | None, typer.Option(help="τ of the logit distance")] = None,
    ce_weight: Annotated[float | None, typer.Option(help="α, of the labels")] = None,
    kd_weight: Annotated[float | None, typer.Option(help="β, of the teacher")] = None,
    cross_weight: Annotated[float | None, typer.Option(help="γ, of the stones' ensemble")] = None,
    cross_start: Annotated[float | None, typer.Option(help="share of the run before γ")] = None,
    distance: Annotated[
        str | None, typer.Option(help="kl, dkd, dist, jsd, lskd or a plugin's")
    ] = None,
    fused: Annotated[
        bool | None, typer.Option("--fused/--no-fused", help="one kernel for the loss, on CUDA")
    ] = None,
    teacher_views: Annotated[
        int | None, typer.Option(help="augmentations an image has; the teacher is asked once")
    ] = None,
    teacher_cache: Annotated[
        str | None, typer.Option(metavar="FILE", help="keep the teacher's answers for other runs")
    ] = None,
    smoothing: Annotated[float | None, typer.Option(help="label smoothing")] = None,
    augment: Annotated[
        str | None, typer.Option(help="auto, none, shift, shift-flip, crop-flip")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="LEAST,MOST", help="share of the area that crop takes")
    ] = None,
    aa: Annotated[str | None, typer.Option(help="rand, rand-m9-n2: RandAugment")] = None,
    reprob: Annotated[float | None, typer.Option(help="random erasing: its probability")] = None,
    cutout: Annotated[int | None, typer.Option(help="side of a square to erase")] = None,
    crop_pct: Annotated[
        float | None, typer.Option(help="share of each side kept of images to validate")
    ] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="bilinear, bicubic or nearest, for resizing")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="FILE", help="classes to learn, one per line")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="processes that read images")] = None,
    data_device: Annotated[
        str | None, typer.Option(help="auto, cpu, device: where images are augmented")
    ] = None,
    val_split: Annotated[float | None, typer.Option(help="held out, without a split")] = None,
    max_bad_images: flags.MaxBadImages = None,
    mean: flags.Mean = None,
    std: flags.Std = None,
    input_size: flags.InputSize = None,
    track: Annotated[
        str | None, typer.Option(metavar="NAME,…|none", help="trackers, tensorboard by default")
    ] = None,
    log_interval: Annotated[
        int | None, typer.Option(help="batches between two lines, or two numbers to a tracker")
    ] = None,
    amp: Annotated[bool | None, typer.Option("--amp/--no-amp", help="mixed precision")] = None,
    amp_dtype: Annotated[str | None, typer.Option(help="bfloat16 or float16")] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile, where it can")
    ] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option("--channels-last/--no-channels-last", help="else where the model can"),
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic/--no-deterministic", help="the same bits, also on CUDA"),
    ] = None,
    sync_bn: Annotated[
        bool | None,
        typer.Option("--sync-bn/--no-sync-bn", help="batch norm over all processes, on CUDA"),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="none, teacher, all: weights shared out among processes")
    ] = None,
    model_ema: Annotated[
        bool | None, typer.Option("--model-ema/--no-model-ema", help="average the student, too")
    ] = None,
    model_ema_decay: Annotated[float | None, typer.Option(help="0.9998 by default")] = None,
    keep_every: Annotated[
        int | None, typer.Option(help="every Nth checkpoint stays, beside two and the best")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="updates between checkpoints, beside those of epochs")
    ] = None,
    skip_nan: Annotated[
        int | None, typer.Option(help="updates to leave out where a number is not finite")
    ] = None,
    auto_batch: Annotated[
        bool | None,
        typer.Option("--auto-batch/--no-auto-batch", help="out of memory: batches in parts"),
    ] = None,
    auto_batch_norm: Annotated[
        bool | None,
        typer.Option("--auto-batch-norm/--no-auto-batch-norm", help="also with batch norm"),
    ] = None,
    allow_change: Annotated[
        str | None,
        typer.Option(
            metavar="threads,…", help="of --resume: threads, torch, world-size, device, shard"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N, mps")] = None,
    threads: flags.Threads = None,
) -> None:
    """Train a student with the help of a teacher; everything goes to a run folder."""
    from kdsurgeon.recipe import parse_set, read_config

    given = {name: value for name, value in context.params.items() if value not in (None, [], ())}
    if budget is not None and stones is not None:
        raise UsageError(
            "--budget and --stones exclude each other.",
            why="each of them chooses the stones to train",
            fix="leave one out",
        )
    overrides: dict[str, Any] = {_KEYS[name]: given[name] for name in given if name in _KEYS}
    spelled = {_KEYS[name]: _spelling(name, given[name]) for name in given if name in _KEYS}
    for name, text in (("teacher", teacher), ("student", student)):
        if text is not None:
            overrides[name], spelled[name] = text, name.upper()
    for name, value in _parsed(blocks, budget, stones, mean, std, input_size, track).items():
        overrides[name], spelled[name] = value, f"--{name.rpartition('.')[2].replace('_', '-')}"
    if scale is not None:
        overrides["data.scale"] = list(flags.parse_numbers(scale, "--scale") or ())
        spelled["data.scale"] = f"--scale {scale}"
    for text in set_ or []:
        key, value = parse_set(text)
        overrides[key], spelled[key] = value, f"--set {text}"
    allowed = [name.strip() for name in (allow_change or "").split(",") if name.strip()]
    if resume is not None:
        _check_resume(given)
        from kdsurgeon.cli.session import resume_session
        from kdsurgeon.ranks import Ranks

        return resume_session(
            resume, trust_code or (), overrides, spelled=spelled, allow_change=allowed,
            ranks=Ranks.from_environment(),
        )  # fmt: skip
    if allowed:
        raise UsageError(
            "--allow-change is for a run that goes on.", fix="leave it out, or add --resume FOLDER"
        )
    settings = read_config(config, overrides, spelled=spelled)
    if config is not None:
        _check_code(settings, overrides, trust_code or (), config)
    if settings.plan is not None and settings.blocks != "auto":
        raise UsageError(
            f"a plan and {settings.blocks} blocks are both asked for.",
            fix="leave one out: the plan already says how many blocks there are",
        )
    if settings.output:
        _check_folder(Path(settings.output), settings, config)
    from kdsurgeon.cli.session import start_session
    from kdsurgeon.ranks import Ranks

    return start_session(
        settings, trust_code or (), dry_run=dry_run, ranks=Ranks.from_environment()
    )


def _check_code(
    settings: RunConfig, typed: Collection[str], trust: Sequence[str], config: Path
) -> None:
    """What the recipe alone names, and nobody typed, is asked for."""
    keys = ("teacher", "student", "teacher_arch", "student_arch")
    if any((getattr(settings, key) or "").startswith("py:") for key in keys if key not in typed):
        from kdsurgeon.cli.session import check_code

        untyped = settings.replace(**{key: "-" for key in keys if key in typed})
        check_code(untyped, trust, of=str(config))


def _check_resume(given: dict[str, Any]) -> None:
    """Settings are compared with those of the run; what names another run is refused here."""
    others = ("config", "dry_run", "output", "student", "teacher")
    wrong = [name for name in others if given.get(name)]
    if wrong:
        raise UsageError(
            f"--resume goes on with the run in its folder; it does not take "
            f"{', '.join(name.replace('_', '-') for name in wrong)}.",
            fix="start a new run with another --output to change settings; a run folder that was "
            "copied or moved is resumed where it is",
        )


def _check_folder(folder: Path, settings: RunConfig, config: Path | None) -> None:
    """Whether a run can be kept there without replacing what it is made from."""
    students = [folder / "student" / f"{name}.safetensors" for name in ("last", "best")]
    check_outputs(
        [
            Output("--output", folder, ""),
            Output("--output", folder / "plan.yaml", ".yaml"),
            *(Output("--output", student, ".safetensors") for student in students),
        ],
        [settings.teacher, settings.student, settings.teacher_arch, settings.student_arch,
         settings.data_dir, settings.plan, settings.teacher_cache, settings.data.classes,
         config],
    )  # fmt: skip


def _spelling(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    return flag if isinstance(value, bool) else f"{flag} {value}"


def _parsed(
    blocks: str | None,
    budget: str | None,
    stones: str | None,
    mean: str | None,
    std: str | None,
    input_size: str | None,
    track: str | None,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if track is not None:
        found["track"] = [] if track == "none" else [name.strip() for name in track.split(",")]
    if blocks is not None:
        found["blocks"] = flags.parse_blocks(blocks)
    if budget is not None:
        found["budget"] = flags.parse_budget(budget)
    if stones is not None:
        depths = stones.split(",")
        is_list = all(depth.strip().isdecimal() for depth in depths)
        found["loss.stones"] = [int(depth) for depth in depths] if is_list else stones
    if mean is not None:
        found["data.mean"] = list(flags.parse_numbers(mean, "--mean") or ())
    if std is not None:
        found["data.std"] = list(flags.parse_numbers(std, "--std") or ())
    if input_size is not None:
        found["data.input_size"] = list(flags.parse_size(input_size) or ())
    return found


def evaluate(
    target: Annotated[str, typer.Argument(help="a run folder, a model file or SOURCE/NAME")],
    data_dir: flags.DataDir = None,
    arch: flags.Arch = None,
    trust_code: flags.TrustCode = None,
    input_size: flags.InputSize = None,
    mean: flags.Mean = None,
    std: flags.Std = None,
    max_bad_images: flags.MaxBadImages = None,
) -> None:
    """Measure accuracy: of a run's student, teacher and every stone, or of one model."""
    wishes = flags.image_wishes(input_size, mean, std, max_bad_images)
    from kdsurgeon.cli.session import evaluate_model, evaluate_run

    if (Path(target) / "config.yaml").is_file():
        given = {"--data-dir": data_dir, "--arch": arch, "--input-size": input_size}
        given |= {"--mean": mean, "--std": std, "--max-bad-images": max_bad_images}
        if idle := [flag for flag, value in given.items() if value is not None]:
            raise UsageError(
                f"{target} is a run, which is measured on its own data: {idle[0]} changes nothing.",
                fix=f"leave it out, or name the student's file: {target}/student/best.safetensors",
            )
        evaluate_run(Path(target), trust_code or ())
    else:
        evaluate_model(target, arch, trust_code or (), data_dir, wishes)


def runs(
    folder: Annotated[Path, typer.Argument(help="a folder of run folders")] = Path("runs"),
) -> None:
    """Past runs in one table, with the settings in which they differ."""
    found = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if not found:
        raise UsageError(f"{folder} holds no run folders.", fix="name the folder of your runs")
    from rich.table import Table

    from kdsurgeon.recipe import read_config
    from kdsurgeon.runs import read_metrics

    settings = [dict(_flat(read_config(path / "config.yaml").dump())) for path in found]
    differing = [key for key in settings[0] if len({str(each[key]) for each in settings}) > 1]
    differing = [key for key in differing if key not in ("output", "epochs")]
    numbers = ("epochs", "best", "last", "teacher", "minutes")
    table = Table("run", *numbers, box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    counts = Counter((key, str(each[key])) for each in settings for key in differing)
    unlike = Table("run", "unlike most", box=None, pad_edge=False)
    unlike.columns[0].overflow = "fold"
    for path, given in zip(found, settings, strict=True):
        lines = read_metrics(path)
        scores = [line["accuracy"] for line in lines if line["accuracy"] is not None]
        table.add_row(
            path.name,
            f"{len(lines)}/{given['epochs']}",
            _percent(max(scores, default=None)),
            _percent(scores[-1] if scores else None),
            _percent(_teacher_accuracy(path)),
            f"{sum(line['seconds'] for line in lines) / 60:.1f}",
        )
        rare = [key for key in differing if 2 * counts[key, str(given[key])] <= len(found)]
        words = (f"{key.rpartition('.')[2]} {_short(given[key])}" for key in rare)
        unlike.add_row(path.name, ", ".join(words) or "–")
    out.print(table)
    if differing:
        say()
        out.print(unlike)
    say(f"{len(found)} run{'s' * (len(found) != 1)}; accuracy on held-out data")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def _short(value: Any) -> str:
    return "–" if value is None else str(value)


def _teacher_accuracy(folder: Path) -> float | None:
    """As the run measured it before its first step."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))["teacher_accuracy"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
