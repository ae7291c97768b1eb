"""Cross-entropy and KL of all stones in one kernel, with the gradient already in hand.

One Triton launch reads the stacked logits and the teacher's and writes a value for each row and the
gradient, so that the loss costs about one pass over memory however many stones there are. Ours;
the formulas are those of ``formulas.py``, the online softmax is Milakov and Gimelshein 2018.

* Rows up to ``WHOLE_ROW`` classes stay on the chip and are read once. Longer rows are read twice
  in tiles: once for the sums of the softmaxes, once for the gradient.
* Arithmetic is float32. Every row is written by one program and nothing is added atomically, so
  that two runs agree bit for bit.
* Nothing here waits for the device: counts, factors and the incoming gradient are read by the
  kernels from device memory.
* Triton is imported by the first launch and no earlier: it takes time and may not be installed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdsurgeon.errors import UsageError
from kdsurgeon.losses.formulas import Distance, kl

WHOLE_ROW = 8192  # classes; twice as many no longer fit the registers of a program
MANY_PROGRAMS = 512  # fill a device of about 130 multiprocessors
_FUSIBLE = (torch.float32, torch.bfloat16, torch.float16)
_NO_LABEL = -(2**31)  # stands for "no row is ignored"

# triton.language once kernels() has run: Triton looks the name up here when it compiles a kernel.
# pyright: reportInvalidTypeForm=false
tl: Any = None


def can_fuse(
    everyone: Tensor, teacher: Tensor, target: Tensor, distance: Distance = kl
) -> str | None:
    """Why ``fused_ce_kl`` cannot take these, in a few words for the user; None when it can.

    >>> can_fuse(torch.zeros(1, 2, 3), torch.zeros(2, 3), torch.tensor([0, 1]))
    'the logits are on the cpu; the fused loss needs a CUDA device'
    """
    if everyone.device.type != "cuda":
        return f"the logits are on the {everyone.device.type}; the fused loss needs a CUDA device"
    if distance is not kl:
        return f"the distance {getattr(distance, '__name__', distance)} has no fused kernel"
    return _misfit(everyone, teacher, target)


def _misfit(everyone: Tensor, teacher: Tensor, target: Tensor) -> str | None:
    """What the kernels cannot do with these tensors, on a device or in Triton's interpreter."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if everyone.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the logits are on the cpu"
    for logits in (everyone, teacher):
        if logits.dtype not in _FUSIBLE:
            return f"{str(logits.dtype).removeprefix('torch.')} logits have no fused kernel"
    if everyone.ndim != 3 or everyone.shape[1:] != teacher.shape:
        return f"logits {tuple(everyone.shape)} and {tuple(teacher.shape)} do not stack"
    if not everyone.numel():
        return "the batch is empty"
    soft = target.is_floating_point()
    if target.shape != (teacher.shape if soft else teacher.shape[:1]):
        return f"a target of shape {tuple(target.shape)} has no fused kernel"
    if not everyone.device == teacher.device == target.device:
        return "logits, teacher and target are on different devices"
    return None


class FusedLoss(NamedTuple):
    """``total`` carries the gradient; ``ce`` and ``kd`` are (sets,), unweighted and detached."""

    total: Tensor
    ce: Tensor
    kd: Tensor


def fused_ce_kl(
    everyone: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float,
    *,
    ce_factors: Sequence[float],
    kd_factors: Sequence[float],
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    in_place: bool = False,
) -> FusedLoss:
    """``Σ ce_factors · CE + Σ kd_factors · τ² KL`` of all sets against one teacher.

    CE is ``functional.cross_entropy`` and KL is ``formulas.kl``; both are means over the rows that
    are not ignored, and 0 when every row is. Classes masked with -inf in teacher and student, or
    in the teacher alone, add nothing to KL. A class index outside the logits makes its row NaN.

    Args:
        everyone: logits (sets, batch, classes) of student and stones, float32, bfloat16 or
            float16, with any strides; copied once unless the classes of a row lie side by side.
        teacher: logits (batch, classes).
        target: class indices (batch,), or probabilities (batch, classes).
        ce_factors: one for each set, as ``kd_factors``. Give the same numbers at every step, or
            each new list costs a transfer to the device.
        ignore_index: None says that no row is ignored, and saves counting them.
        in_place: the gradient may overwrite ``everyone``, which is lost.

    Raises:
        UsageError: these tensors have no kernel (ask ``can_fuse`` first), or backward is called
            twice: the gradient exists once and has been given away.

    >>> everyone, teacher, target = torch.zeros(2, 1, 3), torch.zeros(1, 3), torch.tensor([0])
    >>> factors = {"ce_factors": (1.0, 0.5), "kd_factors": (1.0, 0.5)}
    >>> if can_fuse(everyone, teacher, target) is None:
    ...     loss = fused_ce_kl(everyone, teacher, target, 4.0, **factors)
    """
    reason = _misfit(everyone, teacher, target)
    if reason:
        raise UsageError(f"The fused loss cannot take these: {reason}.", fix="use block_kd_loss")
    if in_place and not _can_be_overwritten(everyone):
        raise UsageError(
            "The gradient cannot be written over these logits.",
            why="their classes are not side by side, or several logits share one place",
            fix="leave out in_place",
        )
    assert len(ce_factors) == len(kd_factors) == len(everyone)
    factors = on_device((*ce_factors, *kd_factors), everyone.device).view(2, -1)
    if not torch.is_grad_enabled():  # autograd.Function does not look
        everyone = everyone.detach()
    total, means = _Fused.apply(
        everyone, teacher, target, temperature, factors, label_smoothing, ignore_index, in_place
    )  # pyright: ignore[reportGeneralTypeIssues]
    return FusedLoss(total, means[0], means[1])


def _can_be_overwritten(logits: Tensor) -> bool:
    """Every row in one piece, and no two logits in one place (as after ``expand``)."""
    reach = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach = max(reach, stride * size)
    return logits.shape[-1] == 1 or logits.stride(-1) == 1


@lru_cache(maxsize=64)
def on_device(
    numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Kept from step to step: a transfer would wait for the device, and break a captured graph."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def num_kept(target: Tensor, ignore_index: int | None) -> Tensor:
    """How many rows are not ignored, on the device of ``target``."""
    if ignore_index is None or target.is_floating_point():
        return on_device((float(len(target)),), target.device)
    return (target != ignore_index).sum()


class _Fused(torch.autograd.Function):
    """The gradient is made together with the value and waits in ``ctx.gradient``."""

    @staticmethod
    def forward(
        ctx: Any,
        everyone: Tensor,
        teacher: Tensor,
        target: Tensor,
        temperature: float,
        factors: Tensor,
        label_smoothing: float,
        ignore_index: int | None,
        in_place: bool,
    ) -> tuple[Tensor, Tensor]:
        kept = num_kept(target, ignore_index)
        # A float16 gradient divided by the batch would round to 0, long before a loss scale can
        # save it. So it is kept as that of one row, and divided when the scale comes in.
        late = everyone.dtype == torch.float16
        divisor = on_device((1.0,), everyone.device) if late else kept
        gradient = _room_for_gradient(ctx, everyone, in_place)
        values = rowwise_values(
            everyone,
            teacher,
            target,
            temperature,
            factors=factors,
            divisor=divisor,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            gradient=gradient,
        )
        means = values.sum(-1)
        if late:
            means = means / kept.clamp(min=1)
        ctx.gradient, ctx.divisor = gradient, kept if late else None
        ctx.mark_non_differentiable(means)
        ctx.set_materialize_grads(False)
        return (factors * means).sum(), means

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        incoming = grad_outputs[0]
        if incoming is None:
            return (None,) * 8
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise UsageError(
                "backward was called twice on one fused loss.",
                why="its gradient exists once and has been given away",
                fix="compute the loss again, or use block_kd_loss",
            )
        rescale(gradient, incoming, ctx.divisor)
        return gradient, *(None,) * 7


def _room_for_gradient(ctx: Any, everyone: Tensor, in_place: bool) -> Tensor | None:
    if not ctx.needs_input_grad[0]:
        return None
    if in_place:
        # Whoever saved these logits for a backward of their own is told, not served gradients.
        torch.autograd.graph.increment_version(everyone)
        return everyone.detach()
    return torch.empty(everyone.shape, dtype=everyone.dtype, device=everyone.device)


def rowwise_values(
    everyone: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float,
    *,
    factors: Tensor,
    divisor: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    gradient: Tensor | None = None,
) -> Tensor:
    """One launch: CE and τ² KL of each row, divided by ``divisor``, (2, sets, batch) in float32.

    Args:
        factors: float32 (2, sets), what CE and KL count in the gradient.
        divisor: one number on the device; below 1 it counts as 1.
        gradient: (sets, batch, classes), written if given; may be ``everyone`` itself.
    """
    sets, batch, classes = everyone.shape
    everyone, teacher = _in_rows(everyone.detach()), _in_rows(teacher.detach())
    soft = target.is_floating_point()
    target = _in_rows(target) if soft else target
    values = torch.empty((2, sets, batch), dtype=torch.float32, device=everyone.device)
    written = values if gradient is None else gradient
    kernel, grid, shape = _launch_of(sets, batch, classes)
    with torch.cuda.device_of(everyone):
        kernel[grid](
            everyone,
            teacher,
            target,
            factors,
            divisor,
            values,
            written,
            everyone.stride(0),
            everyone.stride(1),
            teacher.stride(0),
            target.stride(0),
            written.stride(0),
            written.stride(1),
            sets,
            batch,
            classes,
            float(temperature),
            float(label_smoothing),
            _NO_LABEL if ignore_index is None else ignore_index,
            POWER=int(temperature) if temperature in (1, 2, 4) else 0,
            SOFT=soft,
            SMOOTH=label_smoothing != 0,
            GRADIENT=gradient is not None,
            enable_fp_fusion=True,  # said aloud: Triton 3.9 warns that its default will change
            **shape,
        )
    return values


def _in_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _launch_of(sets: int, batch: int, classes: int) -> tuple[Any, tuple[int, int], dict[str, int]]:
    """Kernel, grid and tile for a shape; the figures are estimates for an H100-like device."""
    whole, tiled, _ = kernels()
    block = max(16, _power_of_two(classes))
    if classes <= WHOLE_ROW:
        rows = max(1, 512 // block)
        programs = -(-batch // rows)
        warps = min(16, max(4, rows * block // 256))
        # Too few rows to fill the device: let the sets run side by side and share the teacher's
        # row through the cache.
        beside = sets if programs < MANY_PROGRAMS else 1
        return whole, (programs, beside), {"ROWS": rows, "BLOCK": block, "num_warps": warps}
    # Three stages keep two tiles of every load under way: four warps alone cannot hide the memory.
    group = min(4, _power_of_two(sets))
    shape = {"GROUP": group, "STAGES": 3, "BLOCK": 2048 // group, "num_warps": 4}
    return tiled, (batch, -(-sets // group)), shape


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def rescale(gradient: Tensor, incoming: Tensor, divisor: Tensor | None = None) -> None:
    """Multiply by ``incoming / divisor`` in place; where that is 1 the kernel leaves at once.

    To ask on the host whether it is 1 would be to wait for the device.
    """
    if not gradient.is_contiguous():
        factor = incoming if divisor is None else incoming / divisor.clamp(min=1)
        # One axis, for torch rounds a number without axes to float16 first, where 65536 is inf.
        gradient.mul_(factor.reshape(1))
        return
    scale, block = kernels()[2], 4096
    grid = (min(1024, -(-gradient.numel() // block)),)
    with torch.cuda.device_of(gradient):
        scale[grid](
            gradient,
            incoming,
            incoming if divisor is None else divisor,
            gradient.numel(),
            BLOCK=block,
            DIVIDE=divisor is not None,
            num_warps=8,
            enable_fp_fusion=True,
        )


@cache
def kernels() -> tuple[Any, Any, Any]:
    """The Triton kernels for whole rows, for tiled rows and for rescaling.

    With ``TRITON_INTERPRET=1`` in the environment they run, slowly, on a CPU.
    """
    global tl
    import triton
    import triton.language

    tl = triton.language
    # A last batch of another length must not compile the kernel again.
    varying = {"do_not_specialize": ["sets", "batch", "ignored"]}
    return (
        triton.jit(_whole_rows, **varying),
        triton.jit(_tiled_rows, **varying),
        triton.jit(_scale),
    )


# The kernels. `shifted` is a logit less the largest of its row. `hot` is exp(shifted), `cold` is
# exp(shifted / τ): where τ is 1, 2 or 4 (POWER), hot is a power of cold and costs no second
# exponential. `trust` is the teacher's cold softmax. Of -inf - -inf only the masked half is used.


def _whole_rows(
    everyone,
    teacher,
    target,
    factors,
    divisor,
    values,
    gradient,
    everyone_set,
    everyone_row,
    teacher_row,
    target_row,
    gradient_set,
    gradient_row,
    sets,
    batch,
    classes,
    temperature,
    smoothing,
    ignored,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """A program holds ROWS whole rows; it reads the teacher's once and then walks the sets."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < batch
    rows = rows.to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = exists[:, None] & (columns < classes)
    share = 1.0 / tl.maximum(tl.load(divisor).to(tl.float32), 1.0)
    cooling = 1.0 / temperature

    if SOFT:
        counted = exists
        mass = tl.full((ROWS,), 1.0, tl.float32)
        wanted = tl.load(target + rows[:, None] * target_row + columns, mask=inside, other=0.0)
        wanted = wanted.to(tl.float32)
    else:
        label = tl.load(target + rows * target_row, mask=exists, other=0)
        counted = exists & (label != ignored)
        mass = tl.where((label >= 0) & (label < classes), 1.0, float("nan"))
        wanted = (columns == label.to(tl.int32)[:, None]).to(tl.float32)
    if SMOOTH:
        wanted = tl.where(inside, wanted * (1.0 - smoothing) + smoothing / classes, 0.0)
    if SOFT:
        mass = tl.sum(wanted, 1)

    theirs = tl.load(
        teacher + rows[:, None] * teacher_row + columns, mask=inside, other=float("-inf")
    ).to(tl.float32)
    theirs = (theirs - tl.max(theirs, 1)[:, None]) * cooling
    trust = tl.exp(theirs)
    trust_sum = tl.sum(trust, 1)
    trust = trust / trust_sum[:, None]

    for one in range(tl.program_id(1), sets, tl.num_programs(1)):
        place = tl.cast(one, tl.int64)
        shifted = tl.load(
            everyone + place * everyone_set + rows[:, None] * everyone_row + columns,
            mask=inside,
            other=float("-inf"),
        ).to(tl.float32)
        shifted = shifted - tl.max(shifted, 1)[:, None]
        cold = tl.exp(shifted * cooling)
        if POWER == 1:
            hot = cold
        elif POWER == 2:
            hot = cold * cold
        elif POWER == 4:
            hot = cold * cold
            hot = hot * hot
        else:
            hot = tl.exp(shifted)
        hot_sum = tl.sum(hot, 1)
        cold_sum = tl.sum(cold, 1)

        task = mass * tl.log(hot_sum) - tl.sum(tl.where(wanted > 0, wanted * shifted, 0.0), 1)
        apart = tl.sum(tl.where(trust > 0, trust * (theirs - shifted * cooling), 0.0), 1)
        apart = (apart - tl.log(trust_sum) + tl.log(cold_sum)) * temperature * temperature
        spot = values + place * batch + rows
        tl.store(spot, tl.where(counted, task * share, 0.0), mask=exists)
        spot += tl.cast(sets, tl.int64) * batch
        tl.store(spot, tl.where(counted, apart * share, 0.0), mask=exists)

        if GRADIENT:
            task_factor = tl.load(factors + one) * share
            apart_factor = tl.load(factors + sets + one) * share * temperature
            slope = task_factor * (hot * (mass / hot_sum)[:, None] - wanted)
            slope += apart_factor * (cold / cold_sum[:, None] - trust)
            tl.debug_barrier()  # in place: every thread has read the row before one writes to it
            tl.store(
                gradient + place * gradient_set + rows[:, None] * gradient_row + columns,
                tl.where(counted[:, None], slope, 0.0),
                mask=inside,
            )


def _tiled_rows(
    everyone,
    teacher,
    target,
    factors,
    divisor,
    values,
    gradient,
    everyone_set,
    everyone_row,
    teacher_row,
    target_row,
    gradient_set,
    gradient_row,
    sets,
    batch,
    classes,
    temperature,
    smoothing,
    ignored,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """A program walks one row of GROUP sets and of the teacher, twice.

    The sums stay spread over the lanes of a tile until the walk ends; only the largest logit is
    shared at every tile. KL sums trust · (teacher - student), each less an anchor of its own: an
    offset common to a row would else cost its own rounding error. The anchor is the largest logit
    of the first tile, near enough and known at once.
    """
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    real = which < sets
    place = which.to(tl.int64)
    columns = tl.arange(0, BLOCK)
    given_at = everyone + place[:, None] * everyone_set + row * everyone_row + columns[None, :]
    their_at = teacher + row * teacher_row + columns
    slope_at = gradient + place[:, None] * gradient_set + row * gradient_row + columns[None, :]
    task_at = values + place * batch + row
    apart_at = task_at + tl.cast(sets, tl.int64) * batch
    share = 1.0 / tl.maximum(tl.load(divisor).to(tl.float32), 1.0)
    cooling = 1.0 / temperature

    mass = 1.0
    label = 0
    if not SOFT:
        index = tl.load(target + row * target_row)
        if index == ignored:
            tl.store(task_at, tl.full((GROUP,), 0.0, tl.float32), mask=real)
            tl.store(apart_at, tl.full((GROUP,), 0.0, tl.float32), mask=real)
            if GRADIENT:
                for start in range(0, classes, BLOCK):
                    inside = real[:, None] & (start + columns < classes)[None, :]
                    nothing = tl.full((GROUP, BLOCK), 0.0, tl.float32)
                    tl.store(slope_at + start, nothing, mask=inside)
            return
        mass = tl.where((index >= 0) & (index < classes), 1.0, float("nan"))
        label = index.to(tl.int32)

    inside = columns < classes
    theirs = tl.load(their_at, mask=inside, other=float("-inf")).to(tl.float32)
    their_anchor = tl.max(theirs, 0)
    their_anchor = tl.where(their_anchor == float("-inf"), 0.0, their_anchor)
    given = tl.load(given_at, mask=real[:, None] & inside[None, :], other=float("-inf"))
    given = given.to(tl.float32)
    anchor = tl.max(given, 1)
    anchor = tl.where(anchor == float("-inf"), 0.0, anchor)

    their_top = tl.max(theirs, 0)
    top = tl.full((GROUP,), float("-inf"), tl.float32)
    trust_lanes = tl.full((BLOCK,), 0.0, tl.float32)
    mass_lanes = tl.full((BLOCK,), 0.0, tl.float32)
    hot_lanes = tl.full((GROUP, BLOCK), 0.0, tl.float32)
    cold_lanes = tl.full((GROUP, BLOCK), 0.0, tl.float32)
    apart_lanes = tl.full((GROUP, BLOCK), 0.0, tl.float32)
    match_lanes = tl.full((GROUP, BLOCK), 0.0, tl.float32)
    for start in tl.range(0, classes, BLOCK, num_stages=STAGES):
        inside = start + columns < classes
        theirs = tl.load(their_at + start, mask=inside, other=float("-inf")).to(tl.float32)
        given = tl.load(
            given_at + start, mask=real[:, None] & inside[None, :], other=float("-inf")
        ).to(tl.float32)
        higher = tl.maximum(their_top, tl.max(theirs, 0))
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp((their_top - floor) * cooling)
        trust = tl.exp((theirs - floor) * cooling)
        trust_lanes = trust_lanes * fade + trust
        gap = (theirs - their_anchor)[None, :] - (given - anchor[:, None])
        gap = tl.where((trust > 0)[None, :], trust[None, :] * gap, 0.0)
        apart_lanes = apart_lanes * fade + gap
        their_top = higher

        higher = tl.maximum(top, tl.max(given, 1))
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp((top - floor) * cooling)
        shifted = given - floor[:, None]
        cold = tl.exp(shifted * cooling)
        cold_lanes = cold_lanes * fade[:, None] + cold
        if POWER == 1:
            hot = cold
        elif POWER == 2:
            hot = cold * cold
        elif POWER == 4:
            hot = cold * cold
            hot = hot * hot
        else:
            hot = tl.exp(shifted)
        hot_lanes = hot_lanes * tl.exp(top - floor)[:, None] + hot
        top = higher

        if SOFT or SMOOTH:
            if SOFT:
                wanted = tl.load(
                    target + row * target_row + start + columns, mask=inside, other=0.0
                ).to(tl.float32)
            else:
                wanted = (start + columns == label).to(tl.float32)
            if SMOOTH:
                wanted = tl.where(inside, wanted * (1.0 - smoothing) + smoothing / classes, 0.0)
            if SOFT:
                mass_lanes += wanted
            match = wanted[None, :] * (given - anchor[:, None])
            match_lanes += tl.where((wanted > 0)[None, :], match, 0.0)

    if SOFT:
        mass = tl.sum(mass_lanes, 0)
    if SOFT or SMOOTH:
        match = tl.sum(match_lanes, 1)
    else:
        column = tl.minimum(tl.maximum(label, 0), classes - 1)  # mass is NaN where this moves it
        match = tl.load(
            everyone + place * everyone_set + row * everyone_row + column, mask=real, other=0.0
        )
        match = match.to(tl.float32) - anchor
    trust_sum = tl.sum(trust_lanes, 0)
    hot_sum = tl.sum(hot_lanes, 1)
    cold_sum = tl.sum(cold_lanes, 1)
    task = mass * (tl.log(hot_sum) + (top - anchor)) - match
    apart = tl.sum(apart_lanes, 1) / trust_sum + ((their_anchor - their_top) - (anchor - top))
    apart = apart * cooling - tl.log(trust_sum) + tl.log(cold_sum)
    # A label that is no class makes `mass` NaN; KL does not depend on it.
    tl.store(task_at, task * share, mask=real)
    tl.store(apart_at, apart * (temperature * temperature * share), mask=real)

    if GRADIENT:
        task_factor = tl.load(factors + which, mask=real, other=0.0) * share
        apart_factor = tl.load(factors + sets + which, mask=real, other=0.0) * share * temperature
        hot_factor = task_factor * mass / hot_sum
        cold_factor = apart_factor / cold_sum
        trust_factor = apart_factor / trust_sum
        tl.debug_barrier()  # in place: every thread has read the row before one writes to it
        for start in tl.range(0, classes, BLOCK, num_stages=STAGES):
            inside = start + columns < classes
            both = real[:, None] & inside[None, :]
            theirs = tl.load(their_at + start, mask=inside, other=float("-inf")).to(tl.float32)
            given = tl.load(given_at + start, mask=both, other=float("-inf")).to(tl.float32)
            trust = tl.exp((theirs - their_top) * cooling)
            shifted = given - top[:, None]
            cold = tl.exp(shifted * cooling)
            if POWER == 1:
                hot = cold
            elif POWER == 2:
                hot = cold * cold
            elif POWER == 4:
                hot = cold * cold
                hot = hot * hot
            else:
                hot = tl.exp(shifted)
            if SOFT:
                wanted = tl.load(
                    target + row * target_row + start + columns, mask=inside, other=0.0
                ).to(tl.float32)
            else:
                wanted = (start + columns == label).to(tl.float32)
            if SMOOTH:
                wanted = tl.where(inside, wanted * (1.0 - smoothing) + smoothing / classes, 0.0)
            slope = hot * hot_factor[:, None] - task_factor[:, None] * wanted[None, :]
            slope += cold * cold_factor[:, None] - trust[None, :] * trust_factor[:, None]
            tl.store(slope_at + start, slope, mask=both)


def _scale(gradient, incoming, divisor, count, BLOCK: tl.constexpr, DIVIDE: tl.constexpr):
    factor = tl.load(incoming).to(tl.float32)
    if DIVIDE:
        factor = factor / tl.maximum(tl.load(divisor).to(tl.float32), 1.0)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, count, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            old = tl.load(gradient + at, mask=at < count, other=0.0)
            tl.store(gradient + at, old.to(tl.float32) * factor, mask=at < count)
