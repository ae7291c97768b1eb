"""Which stones a step trains through, and what each counts."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from kdsurgeon.data.batches import draw
from kdsurgeon.errors import PlanError
from kdsurgeon.recipe import Recipe
from kdsurgeon.stones.plan import Plan, Stone, check_depths

_USE = 3  # of the stream of random numbers: 0 to 2 are the augmentation's
_RANGE = 2**32


def chosen_depths(plan: Plan, recipe: Recipe) -> tuple[int, ...]:
    """Every stone that a recipe trains at some time: of ``loss.stones`` and of its schedule.

    Raises:
        PlanError: a stone that the plan lacks.
    """
    if recipe.method != "block-kd":
        return ()
    found = _stones_of(plan, recipe.loss.stones)
    for _, later in recipe.loss.stone_schedule:
        found += _stones_of(plan, later, "loss.stone_schedule")
    return tuple(sorted({stone.depth for stone in found}))


def stones_at(plan: Plan, recipe: Recipe, progress: float, step: int) -> dict[int, float]:
    """The stones that a step trains, by depth, and the weight of each in that step.

    One random stone is drawn with a chance of w_i / Σ w, a pure function of the recipe's seed and
    the step, and counts Σ w: the expected gradient of the stones' terms is that of all stones, and
    the dearest tails, which count least, are run least often (ours).

    Args:
        progress: 0 to 1 over the run, which the schedule goes by.
        step: the number of the batch, counted over the whole run.
    """
    if recipe.method != "block-kd":
        return {}
    wanted = recipe.loss.stones
    for begins, later in recipe.loss.stone_schedule:
        wanted = later if progress >= begins else wanted
    found = _stones_of(plan, wanted)
    if wanted != "random" or not found:
        return {stone.depth: stone.weight for stone in found}
    sums = list(accumulate(stone.weight for stone in found))
    drawn = int(draw(recipe.seed, step, np.zeros(1, np.int64), _USE, _RANGE)[0]) / _RANGE * sums[-1]
    stone = next(one for one, reached in zip(found, sums, strict=True) if drawn < reached)
    return {stone.depth: sums[-1]}


def parts_of_run(plan: Plan, recipe: Recipe) -> list[tuple[float, tuple[int, ...]]]:
    """The sets of stones that steps train through, and the share of the steps that each has.

    One random stone has the share of its chance; shares sum to 1.
    """
    if recipe.method != "block-kd":
        return [(1.0, ())]
    sections = [(0.0, recipe.loss.stones), *recipe.loss.stone_schedule]
    ends = [*(begins for begins, _ in sections[1:]), 1.0]
    parts: list[tuple[float, tuple[int, ...]]] = []
    for (begins, wanted), end in zip(sections, ends, strict=True):
        found = _stones_of(plan, wanted)
        sets = [tuple(stone.depth for stone in found)]
        chances = [1.0]
        if wanted == "random" and found:
            sets = [(stone.depth,) for stone in found]
            chances = [stone.weight / sum(each.weight for each in found) for stone in found]
        parts += [((end - begins) * p, each) for p, each in zip(chances, sets, strict=True)]
    return parts


def _stones_of(
    plan: Plan, wanted: str | tuple[int, ...], key: str = "loss.stones"
) -> tuple[Stone, ...]:
    """``all``, ``random``, ``last-K``, ``drop-first``: of those that the plan weighs; or depths."""
    known = tuple(stone for stone in plan.stones if stone.weight > 0)
    if wanted in ("all", "random"):
        return known
    if isinstance(wanted, str):
        least = 2 if wanted == "drop-first" else int(wanted.removeprefix("last-"))
        if least > (count := len(known)):
            fewer = f"last-{count}{' or fewer' * (count > 1)}" if count else "--method kd"
            raise PlanError(
                f"{key} is {wanted}, but the plan has {count} stone{'s' * (count != 1)} of a "
                "weight above 0.",
                fix=f"{fewer}, or plan more blocks with --blocks",
            )
        return known[1:] if wanted == "drop-first" else known[-least:]
    check_depths(plan, wanted, key)
    return tuple(stone for stone in plan.stones if stone.depth in wanted)
