"""The objective of a recipe: as what training minimises, and as the formula that is printed."""

from __future__ import annotations

import torch
from torch import Tensor

from kdsurgeon.losses import Losses, block_kd_loss, can_fuse, load_distance
from kdsurgeon.recipe import Recipe
from kdsurgeon.stones import Plan, SteppingStones, chosen_depths, stones_at
from kdsurgeon.tracing import Inputs
from kdsurgeon.training import Moment, Objective


def objective(stones: SteppingStones, plan: Plan, recipe: Recipe) -> Objective:
    """The recipe's loss of a batch, through the stones that are trained at that moment."""
    numbers, distance = recipe.loss, load_distance(recipe.loss.distance)

    def loss(inputs: Inputs, target: Tensor, moment: Moment) -> Losses:
        weights = stones_at(plan, recipe, moment.progress, moment.step)
        epochs = moment.progress * recipe.epochs
        warm = min(1.0, epochs / numbers.stone_warmup) if numbers.stone_warmup else 1.0
        return block_kd_loss(
            stones(inputs, tuple(weights)),
            target,
            weights=[weight * warm for weight in weights.values()],
            ce_weight=numbers.ce_weight,
            kd_weight=numbers.kd_weight,
            cross_weight=numbers.cross_weight if moment.progress >= numbers.cross_start else 0.0,
            temperature=numbers.temperature,
            label_smoothing=numbers.label_smoothing,
            ignore_index=numbers.ignore_index,
            distance=distance,
            fused=numbers.fused,
        )

    return loss


def how_it_runs(recipe: Recipe, device: torch.device) -> str | None:
    """Which code computes the loss, and why not the fused kernel; None where there is no choice."""
    if device.type != "cuda" or recipe.method == "ce":
        return None
    if not recipe.loss.fused:
        return "operations of torch, as asked for"
    chosen = load_distance(recipe.loss.distance)
    few = torch.zeros(1, 1, 2, device=device)
    reason = can_fuse(few, few[0], torch.zeros(1, dtype=torch.int64, device=device), chosen)
    return f"operations of torch: {reason}" if reason else "one kernel for all terms"


def formula(plan: Plan, recipe: Recipe) -> str:
    """The objective with its numbers, as it is printed before a run."""
    numbers, depths = recipe.loss, chosen_depths(plan, recipe)
    if recipe.method == "ce":
        return "L = CE(S, y)"
    weights = {stone.depth: stone.weight for stone in plan.stones}
    stones = [(depth, f"{weights[depth]:g}") for depth in depths]
    name, tau = numbers.distance.upper(), f"{numbers.temperature:g}"
    ce = " + ".join(["CE(S, y)", *(f"{w}·CE(N{i}, y)" for i, w in stones)])
    kd = " + ".join([f"{name}(S, T)", *(f"{w}·{name}(N{i}, T)" for i, w in stones)])
    lines = [f"L = {numbers.ce_weight:g}·[{ce}]", f"  + {numbers.kd_weight:g}·[{kd}]"]
    if numbers.cross_weight and stones and numbers.cross_start < 1:
        cross = " + ".join([f"{name}(S, E)", *(f"{name}(N{i}, E)" for i, _ in stones)])
        begins = int(numbers.cross_start * recipe.epochs) + 1
        mean = "the N of the step" if numbers.stones == "random" else "mean of N"
        lines.append(f"  + {numbers.cross_weight:g}·[{cross}] from epoch {begins}, E = {mean}")
    lines.append(f"  τ = {tau}; S student, T teacher, N stepping stones")
    sets = [(0.0, numbers.stones), *numbers.stone_schedule] if stones else []
    for begins, stone_set in sets:
        when = f"from epoch {int(begins * recipe.epochs) + 1}, " if begins else ""
        if stone_set == "random":
            lines.append(f"  {when}one N a step, drawn as often as its factor says")
        elif len(sets) > 1:
            lines.append(f"  {when or 'at first '}the stones {_set_in_words(stone_set)}")
    return "\n".join(lines)


def _set_in_words(stones: str | tuple[int, ...]) -> str:
    return stones if isinstance(stones, str) else ", ".join(map(str, stones))
