"""What must stay as it is for a resumed run to come to the bits of an uninterrupted one."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kdsurgeon.errors import ResourceError, UsageError
from kdsurgeon.recipe import FREE_ON_RESUME, Recipe

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
MAY_BE_ALLOWED = ("threads", "torch", "world-size", "device", "shard")

_BEFORE = {"shard": "none"}  # what checkpoints of earlier versions do not say


def conditions(recipe: Recipe, device: torch.device, world_size: int = 1) -> dict[str, Any]:
    """The recipe, and what else the bits of a run depend on, as a checkpoint keeps them.

    >>> found = conditions(Recipe(), torch.device("cpu"))
    >>> found["world-size"], found["device"], found["recipe"]["epochs"]
    (1, 'cpu', 30)
    """
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "world-size": world_size,
        "device": device.type,
        "shard": "all" if recipe.shard == "all" else "none",  # the teacher's changes no bit
        "recipe": recipe.dump(),
    }


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], allow: Collection[str] = ()
) -> dict[str, list[Any]]:
    """By name, ``[before, now]`` of every condition that is another and may be.

    A number of the recipe may change where no bit depends on it; ``epochs`` may grow, which lets
    the schedule of a longer run go on from here; threads, torch, world-size, device and shard may
    where ``allow`` names them.

    Raises:
        UsageError: something else changed; names each with both values.

    >>> was, device = Recipe(epochs=2), torch.device("cpu")
    >>> changes(conditions(was, device), conditions(was.replace(epochs=4), device))
    {'epochs': [2, 4]}
    """
    unknown = sorted(set(allow) - set(MAY_BE_ALLOWED))
    if unknown:
        raise UsageError(
            f"--allow-change {','.join(unknown)} names nothing that may be allowed to change.",
            fix=f"choose from {', '.join(MAY_BE_ALLOWED)}",
        )
    found = {
        name: [before.get(name, _BEFORE.get(name)), now[name]]
        for name in MAY_BE_ALLOWED
        if before.get(name, _BEFORE.get(name)) != now[name]
    }
    refused = {name: both for name, both in found.items() if name not in allow}
    for key, both in _recipe_changes(before["recipe"], now["recipe"]):
        longer = key == "epochs" and both[1] > both[0]
        (found if longer or key in FREE_ON_RESUME else refused)[key] = both
    if refused:
        raise _refusal(refused)
    return found


def is_exact(changed: Collection[str]) -> bool:
    """Whether a run that goes on with these changes comes to the bits it would have come to."""
    return not {*MAY_BE_ALLOWED, "epochs"} & set(changed)


def _recipe_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, list[Any]]]:
    for key in sorted({*before, *now} - set(MAY_BE_ALLOWED)):  # those are compared as they are
        was, is_ = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_, dict):
            yield from _recipe_changes(was, is_, f"{prefix}{key}.")
        elif was != is_:
            yield f"{prefix}{key}", [was, is_]


def _refusal(refused: Mapping[str, list[Any]]) -> UsageError:
    listed = ", ".join(f"{name} was {was}, is {now}" for name, (was, now) in refused.items())
    can_be_allowed = [name for name in refused if name in MAY_BE_ALLOWED]
    fix = "put it back as it was, or start a new run with another --output"
    if "world-size" in refused:
        fix = f"torchrun --nproc-per-node {refused['world-size'][0]}, as the run was started"
    if can_be_allowed == list(refused):
        fix += f"\n--allow-change {','.join(can_be_allowed)} goes on, to other bits"
    return UsageError(f"a resumed run would not be the same: {listed}.", fix=fix)


def prepare_cublas() -> None:
    """Let CUDA's matrix products be reproducible; must come before anything runs on a GPU.

    Raises:
        ResourceError: CUDA has started without it.
    """
    if CUBLAS not in os.environ and torch.cuda.is_initialized():
        raise ResourceError(
            f"--deterministic comes too late: CUDA has started without {CUBLAS}.",
            fix=f"set it before Python starts: export {CUBLAS}=:4096:8",
        )
    os.environ.setdefault(CUBLAS, ":4096:8")


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Only operations that give the same bits again, for as long as the context lasts."""
    if not wanted:
        yield
        return
    prepare_cublas()
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[2:]
