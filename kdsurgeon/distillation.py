"""The whole pipeline on one screen: plan, synthesize, train, evaluate, keep."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdsurgeon.checking import CheckedBatches, check_least_part, first_batch
from kdsurgeon.checkpoints import ModelCard, model_hash
from kdsurgeon.errors import NumericsError, PlanError, UsageError
from kdsurgeon.evaluation import accuracy, evaluate
from kdsurgeon.keeping import Keeper, load_weights, student_of
from kdsurgeon.losses import Losses, load_distance, task_loss
from kdsurgeon.objectives import objective
from kdsurgeon.ranks import ALONE, Ranks
from kdsurgeon.recipe import Recipe
from kdsurgeon.runs import Checkpoint, Run
from kdsurgeon.stones import (
    TEACHER_LOGITS,
    Plan,
    SteppingStones,
    chosen_depths,
    fit_adapters,
    partition,
    synthesize,
)
from kdsurgeon.teacher_cache import TaughtBatches
from kdsurgeon.tracing import Inputs, in_mode, logits_of, move
from kdsurgeon.training import (
    Batches,
    Epoch,
    Moment,
    Objective,
    Step,
    StopWaiting,
    Together,
    TrainingState,
    Trouble,
    check_batch_norm,
    check_optimizer,
    compiled,
    determinism,
    scatter,
    share,
    start,
    train,
    until,
)

T = TypeVar("T")


def distill(
    teacher: nn.Module,
    student: nn.Module,
    batches: Batches,
    *,
    plan: Plan | None = None,
    recipe: Recipe | None = None,
    validation: Batches | None = None,
) -> Iterator[Epoch]:
    """Train ``student`` in place with the help of ``teacher``, yielding after every epoch.

    Args:
        teacher, student: classifiers of the same classes; the teacher is not changed.
        batches: pairs of images (batch, channels, height, width) and class indices (batch,),
            iterated anew each epoch.
        plan: from :func:`partition`; made from the first batch when left out.
        recipe: every number of the run; :class:`Recipe` with its defaults when left out.
        validation: batches to measure accuracy on after every epoch.

    Raises:
        UsageError: models, plan and recipe do not fit together.
        NumericsError: the teacher is near chance on ``validation``, or a step is not finite.
    """
    _check_kind("plan", plan, Plan, "kdsurgeon.partition(teacher, student, example)")
    _check_kind("recipe", recipe, Recipe, "kdsurgeon.Recipe(epochs=30)")
    ready = prepare(
        teacher, student, batches, plan=plan, recipe=recipe or Recipe(), validation=validation
    )
    return ready.epochs()


def _check_kind(name: str, value: Any, kind: type, example: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise UsageError(
            f"the {name} is of type {type(value).__name__}, not a {kind.__name__}.",
            fix=f"make one: {example}",
        )


@dataclass(frozen=True)
class Distillation:
    """A run with everything decided and checked, one call away from its first step."""

    model: nn.Module
    objective: Objective
    plan: Plan | None
    batches: Batches
    recipe: Recipe
    validation: Batches | None
    teacher_accuracy: float | None
    notes: tuple[str, ...] = ()
    together: Together | None = None
    """with the other processes, where there are any; they all train the same model"""

    @property
    def ranks(self) -> Ranks:
        return ALONE if self.together is None else self.together.ranks

    @property
    def student(self) -> nn.Module:
        return student_of(self.model)

    @property
    def depths(self) -> tuple[int, ...]:
        return self.model.depths if isinstance(self.model, SteppingStones) else ()

    def part_of(self, batches: Batches) -> Iterable[tuple[Inputs, Tensor]]:
        """This rank's part of ``batches``, to run the model on: where the teacher is shared out,
        in as many steps as every other rank takes."""
        own = self.ranks.part_of(batches)
        return own if self.recipe.shard == "none" else self._in_step(own, self.model)

    def _in_step(
        self, own: Iterable[tuple[Inputs, Tensor]], runs: Callable[[Inputs], Any]
    ) -> Iterator[tuple[Inputs, Tensor]]:
        assert self.plan is not None  # without a teacher nothing is shared out
        few = move(_example(self.plan), next(self.model.parameters()).device)
        return self.ranks.in_step(own, lambda: runs(few))

    def load(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint's weights into student and adapters."""
        load_weights(self.model, checkpoint)

    def epochs(
        self,
        *,
        run: Run | None = None,
        card: ModelCard | None = None,
        stop: Callable[[], bool] = lambda: False,
        watch: Callable[[Step], None] = lambda _: None,
        report: Callable[[Trouble], None] = lambda _: None,
        allow_change: Collection[str] = (),
    ) -> Iterator[Epoch]:
        """Train, evaluate and keep, epoch by epoch; goes on from the run's newest checkpoint.

        Args:
            run: the folder to keep everything in; nothing is kept without one.
            stop: asked after every update and batch of evaluation; a
                :class:`kdsurgeon.training.Stop` also ends waits for data.
            watch, report: told about every update, and about those that failed.
            allow_change: what may be another than in the checkpoint: threads, torch, device.

        Raises:
            UsageError: something else changed since the checkpoint was saved; names it.
            NumericsError, ResourceError: as :func:`kdsurgeon.training.train`.
        """
        scatter(self.recipe.seed, self.ranks.rank)
        state = start(self.model, self.recipe, averaged=self.student)
        kept = None
        if run is not None:
            card = card or ModelCard()
            kept = Keeper(run, self.model, state, self.recipe, card, self.ranks)
            kept.begin(allow_change)

        def watched(step: Step) -> None:
            if kept is not None:
                kept.step(step)
            watch(step)

        def reported(trouble: Trouble) -> None:
            if kept is not None:
                kept.trouble(trouble)
            report(trouble)

        with determinism(self.recipe.deterministic):
            for epoch in train(
                self.model,
                self.objective,
                self.batches,
                self.recipe,
                state=state,
                stop=stop,
                watch=watched,
                finish=lambda epoch: self._measured(epoch, state, stop),
                report=reported,
                together=self.together,
            ):
                if kept is not None:
                    kept.epoch(epoch)
                yield epoch

    def _measured(self, epoch: Epoch, state: TrainingState, stop: Callable[[], bool]) -> Epoch:
        """With the accuracies on held-out data; not complete when it was stopped meanwhile."""
        if self.validation is None:
            return epoch
        ranks, ignored = self.ranks, self.recipe.loss.ignore_index
        student, runs = self._student_that_runs()
        own = partial(accuracy, student, ranks=ranks, ignored=ignored)
        try:
            found = replace(epoch, accuracy=self._on(self.validation, own, stop, runs))
            if state.average is not None:
                with state.average.in_place():
                    found = replace(found, ema_accuracy=self._on(self.validation, own, stop))
            if isinstance(self.model, SteppingStones) and self.depths:
                every = partial(evaluate, self.model, ranks=ranks, ignored=ignored)
                runs = self.model if self.model.shared is not None else None
                report = self._on(self.validation, every, stop, runs)
                found = replace(found, stones=_named(report.stones))
            return found
        except StopWaiting:
            return replace(epoch, is_complete=False)

    def _student_that_runs(self) -> tuple[nn.Module, Callable[[Inputs], Any] | None]:
        """The student, or what runs it where its weights are shared out."""
        if self.recipe.shard != "all":
            return self.student, None
        assert isinstance(self.model, SteppingStones)
        runs = self.model.student_logits
        return _Alone(self.model, runs), runs

    def _on(
        self,
        validation: Batches,
        measure: Callable[[Batches], T],
        stop: Callable[[], bool],
        runs: Callable[[Inputs], Any] | None = None,
    ) -> T:
        """What is measured; raises StopWaiting, on all ranks where one was asked to stop.

        ``runs`` is what the others wait for, where weights that it reads are shared out.
        """
        if self.ranks.world == 1:
            return measure(until(stop, validation))
        asked = []

        def part() -> Iterator[tuple[Inputs, Tensor]]:
            for batch in self.ranks.part_of(validation):
                yield batch
                if stop():
                    asked.append(True)
                    return

        found = measure(part() if runs is None else self._in_step(part(), runs))
        if any(self.ranks.all(bool(asked))):
            raise StopWaiting
        return found


def _named(shares: Mapping[int, float]) -> dict[str, float]:
    """By the names that losses have, too."""
    return {f"stone {depth}": share for depth, share in shares.items()}


def prepare(
    teacher: nn.Module,
    student: nn.Module,
    batches: Batches,
    *,
    plan: Plan | None = None,
    recipe: Recipe,
    validation: Batches | None = None,
    ranks: Ranks = ALONE,
    device: torch.device | None = None,
) -> Distillation:
    """Everything up to the first step of :func:`distill`; takes and raises the same.

    With several ``ranks``, each calls it on the whole ``batches`` and ``validation``, which must
    have ``shard(rank, world)``. Where the recipe shares out weights, each gives the whole models,
    on the CPU if they fit nowhere else, and the ``device`` that its part of them shall lie on; the
    teacher given can be run no more.
    """
    check_shard(recipe, ranks)
    check_optimizer(recipe.optim)
    example, target = first_batch(batches)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UsageError("no weight of the student requires a gradient: there is nothing to train.")
    example = _few(example, next(student.parameters()).device)
    if plan is None:
        blocks = "auto" if recipe.method == "block-kd" else 0
        plan = partition(teacher, student, example, blocks=blocks)
    classes = plan.student.trace.num_classes
    _check_taught(teacher, batches)
    batches = CheckedBatches(
        batches, classes, recipe.loss.ignore_index, one_size=recipe.method == "block-kd"
    )
    batches.check(target)
    measured = (
        None
        if validation is None or recipe.shard != "none"
        else check_teacher(
            teacher, validation, ranks, ignored=recipe.loss.ignore_index,
            teaches=recipe.method != "ce",
        )
    )  # fmt: skip
    one = _few(example, next(student.parameters()).device, 1)
    if recipe.method == "ce":
        check_batch_norm(student, recipe)
        check_least_part(student, lambda: logits_of(student, one), batches, ranks)
        return _alone(student, batches, recipe, validation, measured, ranks)
    for side, model in ((plan.teacher, teacher), (plan.student, student)):
        if side.trace.model is not model:
            raise PlanError(
                f"the plan holds another {side.trace.name} than the one given.",
                why="a plan trains the very objects it was made from",
                fix="make it from these two: kdsurgeon.partition(teacher, student, example)",
            )
    if target.is_floating_point():  # a distance that needs class indices says so here
        few = target.new_zeros(target.shape)
        load_distance(recipe.loss.distance)(few[None], few, target, recipe.loss.temperature)
    stones = synthesize(plan, depths=chosen_depths(plan, recipe), seed=recipe.seed)
    check_batch_norm(stones, recipe)
    check_least_part(stones, lambda: stones(one), batches, ranks)
    if recipe.loss.adapter_init == "least-squares" and stones.depths:
        present = next(student.parameters()).device
        fit_adapters(stones, plan, (_few(inputs, present, None) for inputs, _ in batches))
    if recipe.shard != "none":
        measured = _share_out(stones, plan, validation, recipe, ranks, device)
    make = partial(objective, plan=plan, recipe=recipe)
    loss, notes, together = _made(stones, make, batches, recipe, ranks)
    if stones.shared is not None:
        notes = (f"shared   teacher: {stones.shared}", *notes)
    if stones.units is not None:
        notes = (*notes, f"         student and adapters: {stones.units}")
    return Distillation(stones, loss, plan, batches, recipe, validation, measured, notes, together)


def check_shard(recipe: Recipe, ranks: Ranks) -> None:
    """Whether ``--shard`` can be done with these settings, by these processes.

    Raises:
        UsageError: it cannot; says why.
    """
    if recipe.shard == "none":
        return
    if ranks.world == 1:
        raise UsageError(
            f"--shard {recipe.shard} shares out weights among processes, and this is one alone.",
            fix="torchrun --nproc-per-node N -m kdsurgeon distill …, or --shard none",
        )
    reasons = {
        "--method ce": recipe.method == "ce" and "no teacher is asked",
        "--compile": recipe.torch_compile
        and "the program that is compiled reads weights that come and go",
        "--auto-batch": recipe.optim.auto_batch
        and "where one process does a batch again, the others would have to do so, too",
        "--channels-last": recipe.channels_last
        and "weights that are shared out keep the order in which they were read",
        "--teacher-views": recipe.data.teacher_views is not None
        and "the teacher is asked before it is shared out, so it must fit the device anyway",
    }
    if recipe.shard == "all":
        reasons |= {
            "--method kd": recipe.method == "kd" and "it runs the student in one piece",
            "--model-ema": recipe.optim.model_ema and "the average is kept whole",
            f"--opt {recipe.optim.opt}": recipe.optim.opt not in ("sgd", "adamw")
            and "what it computes of a whole weight was not tried on parts of one",
            "--amp-dtype float16": recipe.amp
            and recipe.amp_dtype == "float16"
            and "the loss would be scaled by what each process sees of the gradients",
        }
    for flag, why in reasons.items():
        if why:
            raise UsageError(
                f"--shard {recipe.shard} and {flag} do not go together.",
                why=why,
                fix=f"leave {flag} out, or --shard none",
            )


def _share_out(
    stones: SteppingStones,
    plan: Plan,
    validation: Batches | None,
    recipe: Recipe,
    ranks: Ranks,
    device: torch.device | None,
) -> float | None:
    """Leave on each rank its part of the teacher; what the teacher is worth, measured so."""
    device = device or next(stones.student.parameters()).device
    stones.share_teacher(ranks, device)
    if recipe.shard == "all":
        stones.share_student(ranks, device)
    else:
        stones.to(device)
    if validation is None:
        return None
    few = move(_example(plan), device)
    part = ranks.in_step(ranks.part_of(validation), lambda: stones.teacher_logits(few))
    alone = _Alone(stones, stones.teacher_logits)
    found = accuracy(alone, part, ranks, ignored=recipe.loss.ignore_index)
    _check_is_above_chance(found, plan.teacher.trace.num_classes)
    return found


class _Alone(nn.Module):
    """One model of a training graph, whose modes are those of the whole."""

    def __init__(self, stones: SteppingStones, runs: Callable[[Inputs], Tensor]) -> None:
        super().__init__()
        self.stones, self.runs = stones, runs

    def forward(self, inputs: Tensor | None = None, **named: Tensor) -> Tensor:
        return self.runs(named if inputs is None else inputs)


def _example(plan: Plan) -> dict[str, Tensor]:
    """A batch that both models take."""
    return plan.teacher.trace.inputs | plan.student.trace.inputs


def _made(
    model: nn.Module,
    make: Callable[[Any], Objective],
    batches: Batches,
    recipe: Recipe,
    ranks: Ranks,
) -> tuple[Objective, tuple[str, ...], Together | None]:
    """What ``make`` makes of the model, compiled where the recipe asks for it, what to say, and
    the model shared with the other ranks."""
    if not recipe.torch_compile and not recipe.sync_bn and ranks.world == 1:
        return make(model), (), None
    device = next(model.parameters()).device
    inputs, target = next(iter(ranks.part_of(batches)))
    inputs, target = move(inputs, device), target.to(device)

    def trial(candidate: nn.Module) -> Tensor:
        with torch.autocast(device.type, getattr(torch, recipe.amp_dtype), enabled=recipe.amp):
            return make(candidate)(inputs, target, Moment(0.0, 0)).total

    found, notes, together = model, (), None
    if recipe.torch_compile:
        found, note = compiled(model, trial)
        notes = (note,)
    if recipe.sync_bn:
        _synchronise(model, device)
    if ranks.world > 1:
        together = _shared(model, ranks, trial, found, recipe)
        found = together.module
    return make(found), notes, together


def _synchronise(model: nn.Module, device: torch.device) -> None:
    """Let batch normalisation count the batches of all processes, in the modules as they stand:
    the training graph calls these very objects."""
    if device.type != "cuda":
        raise UsageError(
            "--sync-bn needs CUDA.",
            why="torch's SyncBatchNorm has no code for other devices",
            fix="leave it out; the running statistics are averaged in any case",
        )
    for name, module in model.named_modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = nn.SyncBatchNorm
            vars(module)["process_group"] = None  # all of them
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UsageError(
                f"--sync-bn does not know how {type(module).__name__} normalises.",
                where=name,
                fix="leave it out, or give a model with torch's own batch normalisation",
            )


def _shared(
    model: nn.Module,
    ranks: Ranks,
    trial: Callable[[nn.Module], Tensor],
    runs: nn.Module,
    recipe: Recipe,
) -> Together:
    """Adapters are not in every step where stones are drawn or change over the run, and the last
    blocks of the student are not where its own logits count for nothing."""
    apart = list(model.adapters.parameters()) if isinstance(model, SteppingStones) else []
    has_logits = bool(recipe.loss.ce_weight or recipe.loss.kd_weight)
    buckets = has_logits and not recipe.optim.auto_batch
    model.train()
    sharded = recipe.shard == "all"
    return share(model, ranks, trial, runs=runs, apart=apart, buckets=buckets, is_sharded=sharded)


def _few(inputs: Inputs, device: torch.device, count: int | None = 2) -> Inputs:
    """The first samples, without the teacher's logits, which no model takes."""
    if isinstance(inputs, Tensor):
        return inputs[:count].to(device)
    few = {name: x[:count].to(device) for name, x in inputs.items() if name != TEACHER_LOGITS}
    return few["input"] if list(few) == ["input"] else few


def _check_taught(teacher: nn.Module, batches: Batches) -> None:
    if isinstance(batches, TaughtBatches) and batches.teacher != model_hash(teacher):
        raise UsageError(
            "the batches hold the answers of another teacher.",
            fix="ask this one: kdsurgeon.cache_teacher(teacher, batches)",
        )


def train_alone(
    model: nn.Module, batches: Batches, recipe: Recipe, *, validation: Batches | None = None
) -> Iterator[Epoch]:
    """Train ``model`` in place on labels only: what a teacher and every comparison start from."""
    return _alone(model, batches, recipe, validation, None, ALONE).epochs()


def _alone(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    validation: Batches | None,
    teacher_accuracy: float | None,
    ranks: Ranks,
) -> Distillation:
    def make(runner: nn.Module) -> Objective:
        def loss(inputs: Inputs, target: Tensor, _: Moment) -> Losses:
            return task_loss(
                logits_of(runner, inputs),
                target,
                label_smoothing=recipe.loss.label_smoothing,
                ignore_index=recipe.loss.ignore_index,
            )

        return loss

    loss, notes, together = _made(model, make, batches, recipe, ranks)
    return Distillation(
        model, loss, None, batches, recipe, validation, teacher_accuracy, notes, together
    )


def check_teacher(
    teacher: nn.Module,
    validation: Batches,
    ranks: Ranks = ALONE,
    *,
    ignored: int | None = None,
    teaches: bool = True,
) -> float:
    """The teacher's accuracy.

    Raises:
        NumericsError: it ``teaches`` and is near chance, so there is nothing to learn from it.
    """
    measured = accuracy(teacher, ranks.part_of(validation), ranks, ignored=ignored)
    inputs, _ = next(iter(validation))
    with in_mode(teacher, training=False), torch.inference_mode():
        few = _few(inputs, next(teacher.parameters()).device)
        classes = logits_of(teacher, few).shape[-1]
    if teaches:
        _check_is_above_chance(measured, classes)
    return measured


def _check_is_above_chance(measured: float, classes: int) -> None:
    if measured < 1.5 / classes:
        raise NumericsError(
            f"the teacher's accuracy is {measured:.1%}, near chance ({1 / classes:.1%}).",
            why="its weights are missing, its classes are in another order, or its images are "
            "normalised differently",
            fix="check the teacher file, the class names, and mean and std (--mean, --std)",
        )
