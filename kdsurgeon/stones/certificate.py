"""Prove that a surgery is right before anything is trained on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from kdsurgeon.checkpoints import model_hash
from kdsurgeon.errors import PlanError
from kdsurgeon.partitioning import Partition, recut
from kdsurgeon.stones.fitting import kept_buffers
from kdsurgeon.stones.plan import Plan
from kdsurgeon.stones.surgery import Walk, block_sources, compose, context_inputs, graft
from kdsurgeon.stones.training_graph import synthesize
from kdsurgeon.tracing import Inputs, in_mode, logits_of, trace, unchanged

SAMPLES = 3  # neither the example's batch nor one that hides a fixed size


@dataclass(frozen=True)
class Certificate:
    """What was compared, and the largest absolute difference found in each; most must be 0.

    ``*_evaluation``: logits of the model and of its blocks one after the other. ``*_training``: a
    step with the same seed: logits, every gradient, every buffer. ``splice``: the teacher's tails
    fed with its own tensors, against its logits. ``merged``: stones with merged tails against
    stones one by one, rounding allowed. ``stones`` had their gradients checked: none to the
    student's later blocks, some to its earlier ones and to the adapters.
    """

    teacher_evaluation: float
    teacher_training: float
    student_evaluation: float
    student_training: float
    splice: float
    merged: float
    stones: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def certify(plan: Plan) -> Certificate:
    """Recompose both models from their blocks, run every stone forward and backward, compare.

    On random input, in evaluation and in training mode, in the models' own precision. Both models
    are left as they were, bit for bit.

    Raises:
        PlanError: a recomposed model differs from the original, or a stone's gradients go where
            they must not; names it.
    """
    state = [model_hash(side.trace.model) for side in (plan.teacher, plan.student)]
    gaps = [gap for side in (plan.teacher, plan.student) for gap in _model_gaps(side)]
    splice, merged, checked = 0.0, 0.0, 0
    if plan.stones:
        splice = _splice_gap(plan.teacher)
        _refuse(plan.teacher, splice, "its tails are fed with its own tensors")
        merged = _merged_gap(plan)
        checked = _check_gradients(plan)
    for side, before in zip((plan.teacher, plan.student), state, strict=True):
        assert model_hash(side.trace.model) == before, f"certifying changed {side.trace.name}"
    return Certificate(*gaps, splice=splice, merged=merged, stones=checked)


def random_inputs(whole: Partition) -> Inputs:
    """:data:`SAMPLES` samples: noise for floating-point inputs, the example's own otherwise."""
    example = whole.trace.example
    if isinstance(example, Tensor):
        return _random_like(example, 0)
    return {name: _random_like(value, seed) for seed, (name, value) in enumerate(example.items())}


def _random_like(example: Tensor, seed: int) -> Tensor:
    if example.ndim == 0:
        return example
    if not example.is_floating_point():
        return example[torch.arange(SAMPLES, device=example.device) % len(example)]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((SAMPLES, *example.shape[1:]), generator=generator).to(example)


def _copied(inputs: Inputs) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.clone()
    return {name: value.clone() for name, value in inputs.items()}


def _run_graph(graph: fx.GraphModule, inputs: Inputs) -> Tensor:
    values = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
    return graph.forward(*values)


# the models against their blocks ─────────────────────────────────────────────────────────────────


def _model_gaps(whole: Partition) -> tuple[float, float]:
    evaluation = _evaluation_gap(whole)
    _refuse(whole, evaluation, "it is rebuilt from its blocks")
    training = _training_gap(whole)
    _refuse(whole, training, "it takes a training step rebuilt from its blocks")
    return evaluation, training


@torch.no_grad()
def _evaluation_gap(whole: Partition) -> float:
    model, inputs = whole.trace.model, random_inputs(whole)
    with in_mode(model, training=False), unchanged(model):
        with _runs(whole, "on random input"):
            logits = logits_of(model, _copied(inputs))
        with _runs(whole, "rebuilt from its blocks"):
            return _gap(logits, _run_graph(compose(whole), _copied(inputs)))


def _training_gap(whole: Partition) -> float:
    """Of one step with the same seed; the model's own buffers are put back."""
    model, inputs = whole.trace.model, random_inputs(whole)
    captured = trace(model, whole.trace.example, name=whole.trace.name, training=True)
    rebuilt = compose(recut(whole, captured))
    with in_mode(model, training=True):
        with _runs(whole, "for a training step of its own"):
            own = _step(lambda: logits_of(model, _copied(inputs)), model)
        with _runs(whole, "for a training step rebuilt from its blocks"):
            other = _step(lambda: _run_graph(rebuilt, _copied(inputs)), model)
    return max(_gap(one, two) for one, two in zip(own, other, strict=True))


@contextmanager
def _runs(whole: Partition, how: str) -> Iterator[None]:
    """Whatever torch says against running the model so, as one of our errors."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise PlanError(
            f"{whole.trace.name} cannot be run {how}.",
            why=f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}",
            fix="mend its forward; plain distillation (--method kd) needs no cutting",
        ) from error


def _step(run: Callable[[], Tensor], model: nn.Module) -> list[Tensor]:
    """Logits, gradients and buffers of two steps in a row; nothing of it stays."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    rng = torch.random.fork_rng(devices=[])
    with unchanged(model), kept_buffers(model), rng, torch.enable_grad():
        torch.manual_seed(0)
        with torch.no_grad():
            first = run()  # shows what the second call finds otherwise: counters, tensors kept
        logits = run()
        loss = logits.square().mean()
        is_trained = bool(weights) and loss.requires_grad
        gradients = torch.autograd.grad(loss, weights, allow_unused=True) if is_trained else ()
        empty = torch.zeros(0)
        found = [empty if gradient is None else gradient for gradient in gradients]
        return [first, logits.detach(), *found, *(buffer.clone() for buffer in model.buffers())]


def _gap(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    same = (one == other) | (one.isnan() & other.isnan())
    if same.all():
        return 0.0
    gap = (one.double() - other.double()).abs()[~same].max().item()
    return gap if gap == gap else float("inf")


def _refuse(whole: Partition, gap: float, when: str) -> None:
    if gap > 0:
        raise PlanError(
            f"{whole.trace.name} differs by {gap:.2e} when {when}.",
            where=f"cut at {', '.join(point.name for point in whole.cuts)}" if whole.cuts else None,
            why="its forward keeps state between calls, draws random numbers outside of torch, "
            "depends on the size of the batch, switches autocast on, or computes blocks again for "
            "the backward pass (gradient checkpointing)",
            fix="cut it elsewhere with --pair TEACHER=STUDENT, or train with --method kd",
        )


# the stones ──────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def _splice_gap(teacher: Partition) -> float:
    """METHOD 4.1 without a second model: every tail, fed with the teacher's own tensors."""
    whole = teacher.trace
    graph = fx.Graph()
    inputs = {node: graph.placeholder(str(node.target)) for node in whole.placeholders}
    walk = Walk(teacher, inputs)
    context = context_inputs(whole, inputs)
    ends = [*block_sources(teacher)[1:], [whole.logits]]
    tails: list[list[fx.Node]] = []
    for depth, sources in enumerate(block_sources(teacher)):
        if depth > 0:
            tails.append([walk.values[node] for node in sources])
        for index, tensors in enumerate(tails):
            boundary = dict(zip(sources, tensors, strict=True)) | context
            values = graft(graph, teacher.blocks[depth].nodes, boundary, {}, "") | boundary
            tails[index] = [values[node] for node in ends[depth]]
        walk.step(graph, depth, "")
    graph.output((walk.values[whole.logits], [tensors[0] for tensors in tails]))
    graph.lint()
    spliced = fx.GraphModule(whole.graph_module, graph)
    with in_mode(whole.model, training=False):
        logits, others = _run_graph(spliced, random_inputs(teacher))  # pyright: ignore
    return max(_gap(logits, other) for other in others)


@torch.no_grad()
def _merged_gap(plan: Plan) -> float:
    inputs = random_inputs(plan.student)
    merged, looped = synthesize(plan).eval(), synthesize(plan, merge=False, fold=False).eval()
    return _gap(merged(_copied(inputs)).stones, looped(_copied(inputs)).stones)


def _check_gradients(plan: Plan) -> int:
    """METHOD 4.2: a stone teaches its adapter and the student up to its depth, nothing after.

    Returns how many stones were checked: none where a weight is not finite, as 0 × NaN is not 0.
    """
    student = plan.student.trace.model
    stones = synthesize(plan)
    later = _first_block_of_weights(plan.student)
    weights = [weight for weight in student.parameters() if weight.requires_grad]
    with kept_buffers(student), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        with _runs(plan.student, "with its stones"):
            logits = stones(_copied(random_inputs(plan.student)))
        if not logits.stones.isfinite().all():
            return 0
        direction = torch.randn_like(logits.student)
        for index, depth in enumerate(logits.depths):
            own = list(stones.adapters[str(depth)].parameters())
            found = torch.autograd.grad(
                (logits.stones[index] * direction).sum(),
                [*weights, *own],
                retain_graph=True,
                allow_unused=True,
            )
            moved = [gradient is not None and bool(gradient.any()) for gradient in found]
            _check_reach(plan, depth, weights, moved, later, own_moved=moved[len(weights) :])
    return len(plan.stones)


def _check_reach(
    plan: Plan,
    depth: int,
    weights: Sequence[Tensor],
    moved: list[bool],
    later: Mapping[int, int],
    *,
    own_moved: list[bool],
) -> None:
    name = plan.student.trace.name
    blocks = [later.get(id(weight), 0) for weight in weights]
    reached = [block for block, is_moved in zip(blocks, moved, strict=False) if is_moved]
    if any(block >= depth for block in reached):
        raise PlanError(
            f"stone {depth} trains blocks of {name} that come after it.",
            fix="this is a fault of ours: please report the two models",
        )
    has_weights = any(block < depth for block in blocks)
    if (has_weights and not reached) or (own_moved and not any(own_moved)):
        raise PlanError(
            f"stone {depth} teaches {name} nothing: no gradient comes back from the teacher.",
            why="the teacher's tail does not read what the adapter gives, or stops gradients",
            fix="cut elsewhere with --pair TEACHER=STUDENT, or with fewer --blocks",
        )


def _first_block_of_weights(student: Partition) -> dict[int, int]:
    """For every weight, by identity, the first block that reads it, counted from 0."""
    found: dict[int, int] = {}
    for index, block in enumerate(student.blocks):
        for node in block.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            owner: Any = student.trace.graph_module
            for part in str(node.target).split("."):
                owner = getattr(owner, part)
            for weight in owner.parameters() if isinstance(owner, nn.Module) else [owner]:
                found.setdefault(id(weight), index)
    return found
