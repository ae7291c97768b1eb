"""The heads and the loss in one step, a chunk of rows at a time: whole logits never exist.

For language models: (stones + 2) · rows · vocabulary logits are far larger than the model. Every
stone ends in the frozen head of the teacher, so their logits are one product with one weight, and
that weight has no gradient. Ours; chunking after Hsu et al., arXiv 2410.10989.

The gradient is made in forward, chunk by chunk: of the hidden states of student and stones, and of
the student's head, which is summed over the chunks in float32. So logits take
(stones + 2) · chunk · classes numbers at a time, and backward only multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kdsurgeon.errors import UsageError
from kdsurgeon.losses.formulas import Losses, halving_weights
from kdsurgeon.losses.fused import can_fuse, on_device, rowwise_values

SLAB = 16384  # classes whose weight gradient is made at a time, or that gradient would exist twice


def linear_block_kd_loss(
    student_hidden: Tensor,
    student_head: nn.Linear,
    stone_hidden: Tensor,
    teacher_hidden: Tensor,
    teacher_head: nn.Linear,
    target: Tensor,
    *,
    weights: Sequence[float] | None = None,
    depths: Sequence[int] | None = None,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    temperature: float = 4.0,
    ignore_index: int = -100,
    chunk: int = 2048,
) -> Losses:
    """``block_kd_loss`` from hidden states; without L_cross, and with KL as distance.

    CE and KL are means over the rows that are not ignored, and 0 when every row is. The gradient
    flows into ``student_hidden``, ``student_head`` and ``stone_hidden``, never into the teacher.
    All products run in the dtype of autocast, or else in that of ``student_hidden``.

    Args:
        student_hidden: what the student's head reads, (rows, width).
        stone_hidden: what the teacher's head reads for each stone, (stones, rows, teacher width).
        teacher_hidden: (rows, teacher width).
        target: class indices (rows,).
        weights: one w_i for each stone, 2^-(n-i) when left out.
        depths: of the stones, for the names of the parts; 1, 2, … when left out.
        chunk: rows whose logits exist at the same time.

    Raises:
        UsageError: shapes that do not fit together, or a second backward through one loss.

    >>> student, teacher = nn.Linear(2, 5), nn.Linear(3, 5)
    >>> hidden, target = torch.zeros(4, 2), torch.tensor([0, 1, 2, 3])
    >>> stones, wanted = torch.zeros(1, 4, 3), torch.zeros(4, 3)
    >>> loss = linear_block_kd_loss(hidden, student, stones, wanted, teacher, target, chunk=2)
    >>> sorted(loss.parts)
    ['ce stone 1', 'ce student', 'kd stone 1', 'kd student']
    """
    _check_shapes(student_hidden, student_head, stone_hidden, teacher_hidden, teacher_head, target)
    count = len(stone_hidden)
    weights = halving_weights(count) if weights is None else weights
    depths = range(1, count + 1) if depths is None else depths
    if not len(weights) == len(depths) == count:
        raise UsageError(f"{len(weights)} weights and {len(depths)} depths for {count} stones.")
    terms = _Terms(
        ce_factors=tuple(ce_weight * factor for factor in (1.0, *weights)),
        kd_factors=tuple(kd_weight * factor for factor in (1.0, *weights)),
        temperature=temperature,
        ignore_index=ignore_index,
        chunk=max(1, min(chunk, len(target))),
        learning=torch.is_grad_enabled(),  # autograd.Function does not look
    )
    device, dtype = student_hidden.device.type, student_hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        total, means = _LinearLoss.apply(
            student_hidden.to(dtype),
            student_head.weight,
            student_head.bias,
            stone_hidden.to(dtype),
            teacher_hidden.to(dtype),
            teacher_head.weight,
            teacher_head.bias,
            target,
            terms,
        )  # pyright: ignore[reportGeneralTypeIssues]
    names = ["student", *(f"stone {depth}" for depth in depths)]
    parts = {
        f"{kind} {name}": mean
        for kind, row in zip(("ce", "kd"), means, strict=True)
        for name, mean in zip(names, row, strict=True)
    }
    return Losses(total, parts)


def _check_shapes(
    student_hidden: Tensor,
    student_head: nn.Linear,
    stone_hidden: Tensor,
    teacher_hidden: Tensor,
    teacher_head: nn.Linear,
    target: Tensor,
) -> None:
    rows, width = target.numel(), teacher_head.in_features
    wanted = {
        "target": (target, (rows,)),
        "student_hidden": (student_hidden, (rows, student_head.in_features)),
        "stone_hidden": (stone_hidden, (len(stone_hidden), rows, width)),
        "teacher_hidden": (teacher_hidden, (rows, width)),
        "teacher_head.weight": (teacher_head.weight, (student_head.out_features, width)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise UsageError(
                f"{name} has the shape {tuple(tensor.shape)}, not {shape}.",
                why="target and hidden states must have the same rows, the heads the same classes",
                fix="flatten batch and tokens into one axis of rows",
            )


@dataclass(frozen=True)
class _Terms:
    """Everything about the loss that is no tensor."""

    ce_factors: tuple[float, ...]
    kd_factors: tuple[float, ...]
    temperature: float
    ignore_index: int
    chunk: int
    learning: bool

    def factors(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(2, sets)"""
        return on_device((*self.ce_factors, *self.kd_factors), device, dtype).view(2, -1)


@dataclass(frozen=True)
class _Hidden:
    student: Tensor
    stones: Tensor
    teacher: Tensor

    def rows(self, part: slice) -> _Hidden:
        return _Hidden(self.student[part], self.stones[:, part], self.teacher[part])


@dataclass(frozen=True)
class _Heads:
    student: Tensor
    student_bias: Tensor | None
    teacher: Tensor
    teacher_bias: Tensor | None

    def room(self, sets: int, chunk: int) -> Tensor:
        """For the logits of a chunk: all sets and, last, the teacher."""
        return self.student.new_empty((sets + 1) * chunk * len(self.student))

    def logits(self, hidden: _Hidden, room: Tensor) -> tuple[Tensor, Tensor]:
        """(sets, rows, classes) of student and stones, (rows, classes) of the teacher, in room."""
        (rows, _), sets, classes = hidden.student.shape, 1 + len(hidden.stones), len(self.student)
        logits = room[: (sets + 1) * rows * classes].view(-1, classes)
        torch.mm(hidden.student, self.student.T, out=logits[:rows])
        torch.mm(hidden.stones.flatten(0, 1), self.teacher.T, out=logits[rows:-rows])
        torch.mm(hidden.teacher, self.teacher.T, out=logits[-rows:])
        if self.student_bias is not None:
            logits[:rows] += self.student_bias
        if self.teacher_bias is not None:
            logits[rows:] += self.teacher_bias
        logits = logits.view(sets + 1, rows, classes)
        return logits[:-1], logits[-1]


@dataclass(frozen=True)
class _Gradients:
    """Sums over the chunks, of those that are needed."""

    student_hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    stone_hidden: Tensor | None

    @property
    def needed(self) -> bool:
        return any(one is not None for one in self.each())

    def each(self) -> tuple[Tensor | None, ...]:
        return self.student_hidden, self.weight, self.bias, self.stone_hidden

    def add(self, slopes: Tensor, hidden: _Hidden, heads: _Heads, part: slice) -> None:
        """``slopes`` are the gradient of the logits of these rows, (sets, rows, classes)."""
        if self.student_hidden is not None:
            torch.mm(slopes[0], heads.student, out=self.student_hidden[part])
        if self.weight is not None:
            for slab, slope in zip(
                self.weight.split(SLAB), slopes[0].split(SLAB, dim=-1), strict=True
            ):
                slab += _product(slope.T, hidden.student, slab.dtype)
        if self.bias is not None:
            self.bias.add_(slopes[0].sum(0, dtype=self.bias.dtype))
        if self.stone_hidden is not None:
            gradient = torch.mm(slopes[1:].flatten(0, 1), heads.teacher)
            self.stone_hidden[:, part] = gradient.view_as(hidden.stones)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, not rounded to the dtype of its factors: chunks are still to be added."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


class _LinearLoss(torch.autograd.Function):
    """The gradients are made with the value and wait in ``ctx``, without their common factor."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        stone_hidden: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        target: Tensor,
        terms: _Terms,
    ) -> tuple[Tensor, Tensor]:
        dtype = student_hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        learned = (student_hidden, student_weight, student_bias, stone_hidden)
        gradients = _Gradients(
            *(
                torch.zeros_like(one, dtype=kind)
                if terms.learning and needed and one is not None
                else None
                for one, needed, kind in zip(
                    learned, ctx.needs_input_grad[:4], (dtype, wide, wide, dtype), strict=True
                )
            )
        )
        hidden = _Hidden(student_hidden, stone_hidden, teacher_hidden)
        heads = _Heads(
            student_weight.to(dtype), student_bias, teacher_weight.to(dtype), teacher_bias
        )
        room = heads.room(1 + len(stone_hidden), terms.chunk)
        sums = student_hidden.new_zeros((2, 1 + len(stone_hidden)), dtype=wide)
        for start in range(0, len(target), terms.chunk):
            part = slice(start, start + terms.chunk)
            rows = hidden.rows(part)
            everyone, teacher = heads.logits(rows, room)
            values = _values(everyone, teacher, target[part], terms, slopes=gradients.needed)
            sums += values.sum(-1)
            gradients.add(everyone, rows, heads, part)
        kept = (target != terms.ignore_index).sum().clamp(min=1).to(wide)
        means = sums / kept
        ctx.gradients, ctx.kept = gradients, kept
        ctx.dtypes = [None if one is None else one.dtype for one in learned]
        ctx.mark_non_differentiable(means)
        ctx.set_materialize_grads(False)
        return (terms.factors(means.device, wide) * means).sum(), means

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        incoming = grad_outputs[0]
        if incoming is None:
            return (None,) * 9
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise UsageError(
                "backward was called twice on one linear loss.",
                why="its gradients exist once and have been given away",
                fix="compute the loss again",
            )
        # One axis, for torch rounds a number without axes to float16 first, where 65536 is inf.
        factor = (incoming / ctx.kept).reshape(1)
        scaled = (
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(gradients.each(), ctx.dtypes, strict=True)
        )
        return *scaled, *(None,) * 5


def _values(
    everyone: Tensor, teacher: Tensor, target: Tensor, terms: _Terms, *, slopes: bool
) -> Tensor:
    """CE and τ² KL of each row, (2, sets, rows); with slopes, the gradient overwrites everyone."""
    if can_fuse(everyone, teacher, target) is not None:
        return _plain_values(everyone, teacher, target, terms, slopes=slopes)
    return rowwise_values(
        everyone,
        teacher,
        target,
        terms.temperature,
        factors=terms.factors(everyone.device, torch.float32),
        divisor=on_device((1.0,), everyone.device),
        ignore_index=terms.ignore_index,
        gradient=everyone if slopes else None,
    )


def _plain_values(
    everyone: Tensor, teacher: Tensor, target: Tensor, terms: _Terms, *, slopes: bool
) -> Tensor:
    """The same without a kernel, one set after the other to keep what it needs beside small."""
    temperature = terms.temperature
    kept = target != terms.ignore_index
    column = target.where(kept, 0)[:, None]
    wanted = functional.log_softmax(_at_least_float32(teacher) / temperature, dim=-1)
    trust = wanted.exp()
    values = []
    for logits, task, distill in zip(everyone, terms.ce_factors, terms.kd_factors, strict=True):
        given = _at_least_float32(logits)
        hot = functional.log_softmax(given, dim=-1)
        cold = functional.log_softmax(given / temperature, dim=-1)
        apart = (trust * (wanted - cold)).where(trust > 0, 0).sum(-1) * temperature**2
        values.append(torch.stack([-hot.gather(-1, column)[:, 0], apart]).where(kept, 0))
        if slopes:
            slope = task * hot.exp_().scatter_add_(-1, column, -torch.ones_like(hot[:, :1]))
            slope += distill * temperature * cold.exp_().sub_(trust)
            logits.copy_(slope.where(kept[:, None], 0))
    return torch.stack(values, dim=1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
