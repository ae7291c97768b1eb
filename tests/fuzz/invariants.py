"""What must hold of every cut and every stepping stone of every model, I1 to I12.

Each invariant is a function of a :class:`Subject` that raises :class:`Violation`. Any other
exception is one, too: whatever plain torch trains must be cut or refused, and nothing here is to be
refused but what I12 makes for that purpose.
"""

from __future__ import annotations

import hashlib
import operator
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdsurgeon import stones as surgery
from kdsurgeon.adapters import AdapterSpec
from kdsurgeon.alignment import Boundary, align
from kdsurgeon.errors import TraceError, UsageError
from kdsurgeon.losses import Logits
from kdsurgeon.partitioning import (
    Block,
    CutPoint,
    Partition,
    activations,
    cut,
    find_cut_points,
    recut,
)
from kdsurgeon.stones import Plan, SteppingStones, Stone
from kdsurgeon.tracing import Trace, trace
from tests.fuzz.generator import logits_of
from tests.fuzz.programs import Program, Step, build, inputs, renamed, source

MOST_STONES = 6  # of one plan: tails run one by one take time with the square of their number


class Violation(AssertionError):
    """An invariant that does not hold, in one sentence."""


@dataclass(frozen=True)
class Subject:
    """A program, its surgery, and what plain torch makes of it, each made when asked for."""

    program: Program

    def fresh(self) -> nn.Module:
        """The same model again, with memory of its own."""
        return build(self.program)

    def batch(self, count: int) -> Any:
        """Inputs as kdsurgeon takes them: a tensor, or a dict by parameter name."""
        program = self.program
        given = inputs(count, seed=program.seed, has_hint=program.has_hint)
        return given if program.has_hint else given["image"]

    @cached_property
    def model(self) -> nn.Module:
        return self.fresh()

    @cached_property
    def trace(self) -> Trace:
        return trace(self.model, self.batch(2), name="student")

    @cached_property
    def cuts(self) -> tuple[CutPoint, ...]:
        return find_cut_points(self.trace)

    @cached_property
    def chosen(self) -> tuple[CutPoint, ...]:
        """The cuts at which stones start; all where there are few."""
        count = min(MOST_STONES, len(self.cuts))
        kept = set(random.Random(self.program.seed).sample(range(len(self.cuts)), count))
        return tuple(point for index, point in enumerate(self.cuts) if index in kept)

    @cached_property
    def logits(self) -> Tensor:
        """What plain torch computes in evaluation mode."""
        with torch.no_grad():
            return logits_of(feed(self.fresh(), self.batch(3)))

    @cached_property
    def plan(self) -> Plan:
        """The model onto a copy of itself, a stone at every chosen cut."""
        return planned(self, trace(self.fresh(), self.batch(2), name="teacher"), self.trace)

    @cached_property
    def twin_stones(self) -> SteppingStones:
        """Onto a copy of itself, the student's tensors handed over as they are."""
        pairs = self.plan.alignment.boundaries
        stones = tuple(map(_without_adapters, self.plan.stones, pairs))
        return surgery.synthesize(replace(self.plan, stones=stones), merge=False, fold=False)

    @cached_property
    def adapted_stones(self) -> SteppingStones:
        """As :func:`kdsurgeon.synthesize` makes them of the plan."""
        return settled_stones(self.plan)

    @cached_property
    def train_step(self) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor | None]]:
        """Logits, buffers and gradients of a seeded step of plain torch."""
        model = self.fresh().train()
        return step(model, lambda: logits_of(feed(model, self.batch(3))))


class InDouble(Subject):
    """The same program in float64."""

    def fresh(self) -> nn.Module:
        return super().fresh().double()

    def batch(self, count: int) -> Any:
        given = super().batch(count)
        if isinstance(given, Tensor):
            return given.double()
        return {k: v.double() if v.is_floating_point() else v for k, v in given.items()}


def feed(module: nn.Module, batch: Any) -> Any:
    # not by calling it: torch.fx prints to standard error when a graph module raises
    return module.forward(**batch) if isinstance(batch, dict) else module.forward(batch)


def planned(subject: Subject, teacher: Trace, student: Trace) -> Plan:
    """A stone at every chosen cut, in both models at the same."""
    pairs = [(point.name, point.name) for point in subject.chosen]
    return surgery.plan_stones(align(teacher, student, pairs=pairs))


def _without_adapters(stone: Stone, pair: Boundary) -> Stone:
    same = (AdapterSpec("identity", tensor, tensor) for tensor in pair.teacher.tensors)
    return replace(stone, adapters=tuple(same))


def settled_stones(plan: Plan) -> SteppingStones:
    """The stones of a plan, with statistics and weights in the adapters' BatchNorms that matter."""
    stones = surgery.synthesize(plan)
    generator = torch.Generator().manual_seed(1)
    for module in stones.adapters.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value in (module.running_mean, module.running_var, module.weight, module.bias):
                assert value is not None
                value.data.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.5)
    return stones


@contextmanager
def kept(model: SteppingStones) -> Iterator[SteppingStones]:
    """Whatever a step changes in ``model`` is put back."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        yield model
    finally:
        model.load_state_dict(before)
        model.zero_grad()
        model.eval()


def step(
    model: nn.Module, run: Callable[[], Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor | None]]:
    """Logits, buffers and gradients of ``model`` after one step with seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = run()
    score(logits).backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    return logits.detach(), dict(model.named_buffers()), gradients


def score(logits: Tensor) -> Tensor:
    """One number that reads every logit with a weight of its own."""
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum()


def same(what: str, actual: Tensor | None, expected: Tensor | None) -> None:
    """Raise unless both hold the same bits."""
    if actual is None or expected is None:
        if actual is not expected:
            side = "missing" if actual is None else "there, but plain torch has none"
            raise Violation(f"{what} is {side}")
    elif actual.shape != expected.shape:
        raise Violation(f"{what} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    elif not torch.equal(actual, expected):
        raise Violation(f"{what} differs by {(actual - expected).abs().max():.3g}")


def close(what: str, actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Raise unless both agree to ``relative`` · max(1, max |y|)."""
    bound = relative * max(1.0, expected.abs().max().item())
    if actual.shape != expected.shape or (actual - expected).abs().max() > bound:
        gap = (actual - expected).abs().max() if actual.shape == expected.shape else float("inf")
        raise Violation(f"{what} differs by {gap:.3g}, more than {bound:.3g}")


# the twelve ──────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def i1_blocks_in_order_are_the_model(subject: Subject) -> None:
    for cuts in (subject.cuts, subject.chosen[:1]):
        rebuilt = surgery.compose(cut(subject.trace, cuts))
        logits = feed(rebuilt, subject.batch(3))
        same(f"the logits rebuilt at {len(cuts)} cuts", logits, subject.logits)


def i2_a_training_step_is_that_of_the_model(subject: Subject) -> None:
    expected = subject.train_step
    model = subject.fresh()
    captured = trace(model, subject.batch(2), name="student", training=True)
    rebuilt = surgery.compose(recut(cut(subject.trace, subject.cuts), captured))
    model.train()
    _same_step("rebuilt model", step(model, lambda: feed(rebuilt, subject.batch(3))), expected)
    with kept(subject.adapted_stones) as stones:
        stones.train()
        own = step(subject.model, lambda: stones(subject.batch(3)).student)
        _same_step("student", own, expected)


def i3_a_twin_teacher_agrees_at_every_stone(subject: Subject) -> None:
    expected, stones = subject.fresh().requires_grad_(False), subject.twin_stones.eval()
    # torch multiplies by a weight that is trained in another order than by one that is not
    with _frozen(stones.student), torch.no_grad():
        wanted = logits_of(feed(expected, subject.batch(3)))
        logits = feed_stones(stones, subject.batch(3))
        same("the teacher's logits", logits.teacher, wanted)
        same("the student's logits", logits.student, wanted)
        for depth, stone in zip(logits.depths, logits.stones, strict=True):
            same(f"the logits of stone {depth}", stone, wanted)
    try:
        _stone_gradients_are_the_models(subject)
    except Violation:  # unless it is float32 that is too coarse, as behind a row of attentions
        _stone_gradients_are_the_models(InDouble(subject.program), bound=1e-12)


def i4_cuts_telescope(subject: Subject) -> None:
    if len(subject.cuts) < 2:
        return
    first, last = subject.chosen[0], subject.chosen[-1]
    both = _names(cut(subject.trace, (first, last)))
    front, back = (_names(cut(subject.trace, (point,))) for point in (first, last))
    every = _names(cut(subject.trace, subject.cuts))
    if front != (both[0], both[1] + both[2]) or back != (both[0] + both[1], both[2]):
        raise Violation(f"cutting at {first.name} and {last.name} in turn gives other parts")
    if sum(every, ()) != sum(both, ()):
        raise Violation("cutting everywhere gives other nodes")
    with torch.no_grad():
        for point in (first, last):
            rebuilt = surgery.compose(cut(subject.trace, (point,)))
            same(f"the logits rebuilt at {point.name}", feed(rebuilt, subject.batch(3)),
                 subject.logits)  # fmt: skip


def i5_names_and_order_do_not_matter(subject: Subject) -> None:
    model = build(subject.program, text=renamed(source(subject.program)))
    other = trace(model, subject.batch(2), name="student")
    cuts = find_cut_points(other)
    if [point.name for point in cuts] != [renamed(point.name) for point in subject.cuts]:
        raise Violation("with other names of layers other cuts are found")
    permuted = replace(subject, program=reordered(subject.program))
    # the compute of a second input counts from where it stands in the program
    seen = [
        _described(each.cuts, progress=not subject.program.has_hint) for each in (permuted, subject)
    ]
    if seen[0] != seen[1]:
        raise Violation("with independent steps in another order other cuts are found")
    plan, again = (
        surgery.plan_stones(align(each, each)).to_yaml() for each in (subject.trace, other)
    )
    if _without_graphs(renamed(plan)) != _without_graphs(again):
        raise Violation("with other names of layers another plan is made")


def i6_what_does_nothing_changes_nothing(subject: Subject) -> None:
    wider = replace(subject, program=with_idle_step(subject.program))
    found, expected = _described(wider.cuts), _described(subject.cuts)
    added = [each for each in found if each[0].name.startswith("m99")]
    if [each for each in found if each not in added] != expected or len(added) > 1:
        raise Violation("an idle layer moves the cuts")
    same("the logits with an idle layer", wider.logits, subject.logits)
    i1_blocks_in_order_are_the_model(wider)


def i7_running_a_stone_leaves_no_trace(subject: Subject) -> None:
    stones, batch = subject.twin_stones, subject.batch(3)
    teacher = subject.plan.teacher.trace.model
    before, student = _state(teacher), _state(stones.student, training=False)
    given = {name: (value, value.clone(), value._version) for name, value in _named(batch)}
    with _watched(stones) as seen:
        logits = feed_stones(stones.eval(), batch)
        score(logits.stones).backward()
        if _state(stones.student, training=False) != student:
            raise Violation("a pass in evaluation mode changes the student")
        with kept(stones):
            feed_stones(stones.train(), batch)
    if _state(teacher) != before:
        raise Violation("running the stones changes the teacher")
    if any(value.grad is not None for value in teacher.parameters()):
        raise Violation("the teacher receives a gradient")
    for name, (value, copy, version) in [*given.items(), *seen]:
        same(f"{name} after the run", value.detach(), copy)
        if value._version != version:
            raise Violation(f"{name} is written to")


def i8_weights_are_shared_and_the_teachers_are_left_alone(subject: Subject) -> None:
    stones = subject.adapted_stones.eval()
    student = {value.data_ptr() for value in stones.student.parameters()}
    adapters = {value.data_ptr() for value in stones.adapters.parameters()}
    trained = {value.data_ptr() for value in stones.parameters()}
    if trained != student | adapters:
        raise Violation("the optimiser holds other weights than those of student and adapters")
    whole = cut(subject.trace, subject.cuts)
    rebuilt = surgery.compose(whole)
    parts = {id(value): value for block in whole.blocks for value in weights(subject.trace, block)}
    if set(parts) != {id(value) for value in rebuilt.parameters()}:
        raise Violation("the rebuilt model holds other weights than its parts")
    if not set(parts) <= {id(value) for value in subject.model.parameters()}:
        raise Violation("a part holds weights that are not the model's")
    logits = feed_stones(stones, subject.batch(3))
    score(logits.stones).backward()
    reached = [value.grad is not None for value in stones.adapters.parameters()]
    stones.zero_grad()
    if not all(reached):
        raise Violation("a stone sends no gradient to its adapter")


def i9_a_saved_plan_is_the_plan(subject: Subject) -> None:
    if not subject.chosen:
        return
    models = subject.plan.teacher.trace.model, subject.model
    again = [trace(each, subject.batch(2), name="again") for each in models]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.yaml"
        subject.plan.save(path)
        read = surgery.read_plan(path, *again)
    if read.to_yaml() != subject.plan.to_yaml():
        raise Violation("a plan read back is written as other bytes")
    if planned(subject, *again).to_yaml() != subject.plan.to_yaml():
        raise Violation("planning twice gives other bytes")
    with torch.no_grad():
        first = feed_stones(subject.adapted_stones.eval(), subject.batch(3))
        second = feed_stones(settled_stones(read).eval(), subject.batch(3))
    same("the stones of a plan read back", second.stones, first.stones)


@torch.no_grad()
def i10_samples_do_not_meet(subject: Subject) -> None:
    for stones in (subject.twin_stones.eval(), subject.adapted_stones.eval()):
        whole = feed_stones(stones, subject.batch(3))
        for index in range(3):
            alone = feed_stones(stones, one(subject.batch(3), index))
            close(f"sample {index} of the student", alone.student[0], whole.student[index])
            close(f"sample {index} of the teacher", alone.teacher[0], whole.teacher[index])
            if len(whole.stones):
                what = f"sample {index} of the stones"
                close(what, alone.stones[:, 0], whole.stones[:, index])


@torch.no_grad()
def i11_a_folded_adapter_is_the_adapter(subject: Subject) -> None:
    if not subject.chosen:
        return
    stones = subject.adapted_stones.eval()
    before = feed_stones(stones, subject.batch(3)).stones
    with _folded(stones.adapters):
        close("stones with folded adapters", feed_stones(stones, subject.batch(3)).stones, before)


def i12_what_cannot_be_cut_is_refused_by_name(subject: Subject) -> None:
    chance = random.Random(subject.program.seed)
    _refused_branch(subject, chance)
    known = {point.name for point in subject.cuts}
    inside = [
        name
        for name, node in subject.trace.nodes.items()
        if name not in known and isinstance(node.meta.get("val"), Tensor) and node.op != "get_attr"
    ]
    _refused_pairs(subject, [chance.choice(inside)])
    if len(subject.cuts) > 1:
        _refused_pairs(subject, [subject.cuts[1].name, subject.cuts[0].name])


Invariant = Callable[[Subject], None]
INVARIANTS: dict[str, Invariant] = {
    function.__name__.split("_")[0].upper(): function
    for function in (
        i1_blocks_in_order_are_the_model,
        i2_a_training_step_is_that_of_the_model,
        i3_a_twin_teacher_agrees_at_every_stone,
        i4_cuts_telescope,
        i5_names_and_order_do_not_matter,
        i6_what_does_nothing_changes_nothing,
        i7_running_a_stone_leaves_no_trace,
        i8_weights_are_shared_and_the_teachers_are_left_alone,
        i9_a_saved_plan_is_the_plan,
        i10_samples_do_not_meet,
        i11_a_folded_adapter_is_the_adapter,
        i12_what_cannot_be_cut_is_refused_by_name,
    )
}


@dataclass(frozen=True)
class Finding:
    """An invariant that a program violates."""

    invariant: str
    program: Program
    message: str


def check(program: Program, names: Sequence[str] = tuple(INVARIANTS)) -> tuple[list[Finding], int]:
    """What ``program`` violates of the invariants ``names``, and how many stones were tried."""
    subject = Subject(program)
    found = [
        Finding(name, program, message)
        for name in names
        if (message := violation(subject, name)) is not None
    ]
    return found, len(subject.__dict__.get("chosen", ()))


def violation(subject: Subject, name: str) -> str | None:
    """What invariant ``name`` says against the subject; a crash speaks for itself."""
    try:
        INVARIANTS[name](subject)
    except Violation as error:
        return str(error)
    except Exception as error:  # a fuzzer reports whatever breaks
        return f"{type(error).__name__}: {error}"
    return None


def fails(program: Program, name: str) -> bool:
    """Whether ``program`` violates invariant ``name``."""
    return violation(Subject(program), name) is not None


def digest(program: Program) -> str:
    """sha256 of the cuts and the plan of ``program`` onto a copy of itself."""
    subject = Subject(program)
    text = repr(subject.cuts) + subject.plan.to_yaml()
    return hashlib.sha256(text.encode()).hexdigest()


# what they are made of ───────────────────────────────────────────────────────────────────────────


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    flags = [(value, value.requires_grad) for value in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for value, flag in flags:
            value.requires_grad_(flag)


def feed_stones(stones: SteppingStones, batch: Any) -> Logits:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return stones(batch)


def _same_step(who: str, actual: tuple[Any, Any, Any], expected: tuple[Any, Any, Any]) -> None:
    same(f"the {who}'s logits in training", actual[0], expected[0])
    for what, ours, theirs in zip(("buffer", "gradient"), actual[1:], expected[1:], strict=True):
        for name, value in theirs.items():
            same(f"the {who}'s {what} {name}", ours[name], value)


def _stone_gradients_are_the_models(subject: Subject, bound: float = 1e-5) -> None:
    """A stone onto a twin reaches the weights before its boundary as the model's own tail does."""
    if not subject.chosen:
        return
    expected = subject.fresh()
    score(logits_of(feed(expected, subject.batch(3)))).backward()
    stones, student = subject.twin_stones.eval(), subject.plan.student
    logits = feed_stones(stones, subject.batch(3))
    index = subject.program.seed % len(subject.chosen)
    stones.zero_grad()
    score(logits.stones[index]).backward()
    before, after = (
        {id(value) for block in blocks for value in weights(student.trace, block)}
        for blocks in (student.blocks[: index + 1], student.blocks[index + 1 :])
    )
    for name, value in stones.student.named_parameters():
        wanted = expected.get_parameter(name).grad
        if id(value) in before - after and wanted is not None:
            if value.grad is None:
                raise Violation(f"stone {index + 1} sends no gradient to {name}")
            close(f"the gradient of stone {index + 1} in {name}", value.grad, wanted, bound)
        if id(value) in after - before and value.grad is not None and value.grad.any():
            raise Violation(f"stone {index + 1} sends a gradient past its boundary, to {name}")
    stones.zero_grad()


def weights(captured: Trace, block: Block) -> list[nn.Parameter]:
    """The parameters that a block computes with, itself or through the context that it reads."""
    data, seen = set(activations(captured)), set[fx.Node]()
    waiting = [node for node in block.nodes if node in data]
    found: list[nn.Parameter] = []
    while waiting:
        node = waiting.pop()
        seen.add(node)
        waiting += [each for each in node.all_input_nodes if each not in data | seen]
        if node.op in ("call_module", "get_attr"):
            own = operator.attrgetter(str(node.target))(captured.graph_module)
            if isinstance(own, nn.Module):
                found += own.parameters()
            elif isinstance(own, nn.Parameter):
                found.append(own)
    return found


def _names(whole: Partition) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(node.meta["qualname"] for node in block.nodes) for block in whole.blocks)


def _described(cuts: Sequence[CutPoint], *, progress: bool = True) -> list[tuple[Any, ...]]:
    """Cuts of one tensor, without what depends on the order in which steps were written down.

    Which tensors live side by side depends on it, so that cuts of several are left out.
    """

    def plain(text: str) -> str:
        return re.sub(r"_\d+\b", "", text)

    return [
        (
            replace(point.main, name=plain(point.name)),
            round(point.progress, 9) if progress else None,
            point.is_junction,
        )
        for point in cuts
        if point.width == 1
    ]


def _without_graphs(text: str) -> str:
    return re.sub(r"graph: .*", "", text)


def _named(batch: Any) -> list[tuple[str, Tensor]]:
    return list(batch.items()) if isinstance(batch, dict) else [("image", batch)]


def one(batch: Any, index: int) -> Any:
    parts = {name: value[index : index + 1] for name, value in _named(batch)}
    return parts if isinstance(batch, dict) else parts["image"]


def _state(model: nn.Module, *, training: bool = True) -> list[Any]:
    """Everything about a model that running it must not change, comparable with ``==``."""
    values: list[Any] = [
        (name, value.data_ptr(), value._version, value.requires_grad, value.detach().tolist(),
         training and value.grad is not None)
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    ]  # fmt: skip
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        values.append((name, training and module.training, [list(each) for each in hooks]))
    return values


@contextmanager
def _watched(stones: SteppingStones) -> Iterator[list[tuple[str, tuple[Tensor, Tensor, int]]]]:
    """What the adapters read, with a copy of it as it was then."""
    seen: list[tuple[str, tuple[Tensor, Tensor, int]]] = []

    def note(depth: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            for value in args:
                what = f"what stone {depth} starts from"
                seen.append((what, (value, value.detach().clone(), value._version)))

        return hook

    handles = [
        adapter.register_forward_pre_hook(note(depth))
        for depth, group in stones.adapters.items()
        for adapter in group.children()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _folded(adapters: nn.Module) -> Iterator[None]:
    """Every convolution that a BatchNorm follows, with that norm folded into it."""
    undo: list[tuple[nn.Sequential, int, nn.Module]] = []
    for chain in [each for each in adapters.modules() if isinstance(each, nn.Sequential)]:
        for index in range(len(chain) - 1):
            conv, norm = chain[index], chain[index + 1]
            if isinstance(conv, nn.modules.conv._ConvNd) and isinstance(norm, nn.BatchNorm2d):
                transposed = isinstance(conv, nn.ConvTranspose2d)
                undo += [(chain, index, conv), (chain, index + 1, norm)]
                chain[index] = fuse_conv_bn_eval(conv, norm, transpose=transposed)
                chain[index + 1] = nn.Identity()
    try:
        yield
    finally:
        for chain, index, module in undo:
            chain[index] = module


# programs made of programs ───────────────────────────────────────────────────────────────────────


def with_idle_step(program: Program) -> Program:
    """``program`` with an Identity, or a Dropout in evaluation mode, after one of its values."""
    chance = random.Random(program.seed)
    shared = _memory(program)
    written = {shared[step.reads[0]] for step in program.steps if _writes(step)}
    tensors = [
        index
        for index, step in enumerate(program.steps[:-1])
        if step.kind not in ("chunk", "sizes") and shared[step.out] not in written
    ]
    if not tensors:
        return program
    index = chance.choice(tensors)
    read = program.steps[index].out
    idle = Step(chance.choice(("identity", "dropout")), "v99", (read,), layer="m99")
    later = [
        replace(step, reads=tuple("v99" if name == read else name for name in step.reads))
        for step in program.steps[index + 1 :]
    ]
    return replace(program, steps=(*program.steps[: index + 1], idle, *later))


def reordered(program: Program) -> Program:
    """``program`` with its steps in another order that computes the same."""
    chance, shared = random.Random(program.seed), _memory(program)
    waits: dict[int, set[int]] = {}
    for index, step in enumerate(program.steps):
        touched = {shared[name] for name in (*step.reads, step.out)}
        waits[index] = {
            other
            for other, earlier in enumerate(program.steps[:index])
            if earlier.out in step.reads
            or ((_writes(step) or _writes(earlier))
                and touched & {shared[name] for name in (*earlier.reads, earlier.out)})
        }  # fmt: skip
    order: list[int] = []
    while len(order) < len(program.steps):
        ready = [i for i in waits if i not in order and waits[i] <= set(order)]
        others = [i for i in ready if i != len(program.steps) - 1]  # the logits stay the last
        order.append(chance.choice(others or ready))
    return replace(program, steps=tuple(program.steps[index] for index in order))


def _writes(step: Step) -> bool:
    return step.kind.endswith("in_place")


def _memory(program: Program) -> dict[str, str]:
    """For every value a value that may lie in the same memory; the same one for all that do."""
    found = {"image": "image", "hint": "hint"}
    making = ("conv", "linear", "norm", "cat", "add", "multiply", "gelu", "relu", "attention")
    for step in program.steps:
        is_new = step.kind in making or step.kind.startswith(("batch_norm", "layer_norm", "conv"))
        found[step.out] = step.out if is_new else found[step.reads[0]]
    return found


# refusals ────────────────────────────────────────────────────────────────────────────────────────


def _refused_branch(subject: Subject, chance: random.Random) -> None:
    """A branch on values is refused with its line."""
    steps = list(subject.program.steps)
    kinds = ("chunk", "sizes")
    places = [index for index, step in enumerate(steps[:-1]) if step.kind not in kinds]
    index = chance.choice(places)
    steps.insert(index + 1, Step("branch", "v99", (steps[index].out,)))
    steps[-1] = replace(steps[-1], reads=("v99",)) if index == len(steps) - 3 else steps[-1]
    program = replace(subject.program, steps=tuple(steps))
    lines = source(program).splitlines()
    number = next(i for i, line in enumerate(lines, start=1) if line.strip().startswith("if "))
    try:
        trace(build(program), subject.batch(2), name="student")
    except TraceError as error:
        place = f"program_{program.seed}.py:"
        if place not in str(error) or error.exit_code != 2:
            raise Violation(f"a branch on line {number} is refused without its place") from error
        return
    raise Violation("a branch on the values of a tensor is captured")


def _refused_pairs(subject: Subject, names: list[str]) -> None:
    """Places that cannot be cut, or not in this order, are refused with the name."""
    try:
        align(subject.trace, subject.trace, pairs=[(name, name) for name in names])
    except UsageError as error:
        if names[-1] not in str(error) or error.exit_code != 2:
            raise Violation(f"{names[-1]} is refused without its name") from error
        return
    raise Violation(f"a cut at {', '.join(names)} is not refused")
