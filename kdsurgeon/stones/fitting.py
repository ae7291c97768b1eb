"""Start every adapter at the least-squares map from the student's tensors to the teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdsurgeon.adapters import Adapter, Fit
from kdsurgeon.errors import DataError
from kdsurgeon.partitioning import tap
from kdsurgeon.stones.plan import Plan
from kdsurgeon.stones.training_graph import SteppingStones
from kdsurgeon.tracing import Inputs, in_mode, trace

SAMPLES = 512  # enough by the study of SN-Net (arXiv 2302.06586), which takes 100


@torch.no_grad()
def fit_adapters(
    stones: SteppingStones, plan: Plan, batches: Iterable[Inputs], *, samples: int = SAMPLES
) -> dict[int, tuple[float, ...]]:
    """Fit the adapters of ``stones`` in place; the share of variance each explains, by depth.

    One pass of both models over at most ``samples`` samples; the student in training mode, as it
    will feed the adapters, its statistics put back. A share below 0.02, on samples that the fit
    did not see, leaves an adapter as it was; identity adapters have nothing to fit.

    Raises:
        DataError: the batches hold fewer than ten samples.
        NumericsError: a tensor is not finite.
    """
    student, teacher = plan.student.trace, plan.teacher.trace
    training = trace(student.model, student.example, name=student.name, training=True)
    fits = {
        (stone.depth, index): Fit(adapter)
        for stone in plan.stones
        if stone.depth in stones.depths
        for index, adapter in enumerate(stones.adapters[str(stone.depth)])  # pyright: ignore[reportArgumentType]
        if isinstance(adapter, Adapter)
    }
    wanted = {place: plan.stones[place[0] - 1].adapters[place[1]] for place in fits}
    taps = (
        tap(training, {spec.source.name for spec in wanted.values()}),
        tap(teacher, {spec.target.name for spec in wanted.values()}),
    )
    seen = 0
    with in_mode(student.model, training=True), in_mode(teacher.model, training=False):
        for inputs in batches:
            with kept_buffers(student.model):
                (_, given), (_, expected) = (each.forward(*_values(inputs)) for each in taps)
            for place, fit in fits.items():
                spec = wanted[place]
                fit.add(given[spec.source.name], expected[spec.target.name])
            seen += len(_values(inputs)[0])
            if seen >= samples:
                break
    if fits and not seen:
        raise DataError("there is no sample to fit the adapters on.")
    shares = {place: fit.solve() for place, fit in fits.items()}
    return {
        depth: tuple(share for place, share in shares.items() if place[0] == depth)
        for depth in stones.depths
    }


def _values(inputs: Inputs) -> list[Tensor]:
    return [inputs] if isinstance(inputs, Tensor) else list(inputs.values())


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Whatever statistics move meanwhile are put back."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
