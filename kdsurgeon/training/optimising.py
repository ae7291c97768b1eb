"""The optimiser, its learning rate over a run, and the moving average of what it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdsurgeon.errors import UsageError
from kdsurgeon.recipe import OptimRecipe, Recipe

ONE_CYCLE_WARM, ONE_CYCLE_FIRST = 0.3, 1 / 25
"""Share of the run in which onecycle rises where the recipe names no warm-up, and the share of lr
that it starts from: as in torch's OneCycleLR."""


def make_optimizer(model: nn.Module, recipe: OptimRecipe) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels only, as timm does, unless the recipe says all.

    Raises:
        UsageError: the optimiser is one of timm's, and timm is not installed.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    least = 0 if recipe.decay_norms else 2
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= least], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < least], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.opt == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    if recipe.opt == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return _of_timm(groups, recipe)


def check_optimizer(recipe: OptimRecipe) -> None:
    """Raises :class:`UsageError` where what makes the optimiser cannot be imported."""
    if recipe.opt not in ("sgd", "adamw"):
        _timm_factory(recipe.opt)


def _timm_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
    try:
        from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
    except (ImportError, RuntimeError) as error:  # the second: its torchvision is of another torch
        raise UsageError(
            f"the optimiser {name} comes with timm, which cannot be imported.",
            why=str(error),
            fix="pip install timm, and the torchvision that matches your torch, or choose --opt "
            "sgd or adamw",
        ) from error
    return create_optimizer_v2


def _of_timm(groups: list[dict[str, Any]], recipe: OptimRecipe) -> torch.optim.Optimizer:
    return _timm_factory(recipe.opt)(
        groups,  # pyright: ignore[reportArgumentType]
        opt=recipe.opt,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
    )


def learning_rate_at(recipe: Recipe, progress: float) -> float:
    """The learning rate at a fraction of the run: linear warm-up, then the schedule.

    ``onecycle`` (Smith and Topin 2017, arXiv 1708.07120) rises along half a cosine instead, and
    falls along half a cosine to ``min_lr``; ours: the momentum stays as it is.

    >>> recipe = Recipe(epochs=10)
    >>> learning_rate_at(recipe, 1.0) == recipe.optim.min_lr
    True
    """
    optim = recipe.optim
    warm = optim.warmup_epochs / recipe.epochs
    if optim.sched == "onecycle":
        warm = warm or ONE_CYCLE_WARM
        if progress < warm:
            return _between(optim.lr * ONE_CYCLE_FIRST, optim.lr, progress / warm)
    elif progress < warm:
        return optim.lr * max(progress / warm, 0.01)
    if optim.sched in ("cosine", "onecycle"):
        return _between(optim.lr, optim.min_lr, (progress - warm) / max(1 - warm, 1e-9))
    if optim.sched == "step":
        return optim.lr * optim.decay_rate ** sum(progress >= at for at in optim.decay_at)
    return optim.lr


def _between(first: float, last: float, share: float) -> float:
    """Half a cosine from one to the other."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


class Average:
    """The exponential moving average of a module's weights, after timm's ``ModelEmaV3``.

    Weights and floating-point buffers are averaged, other buffers are as they are now.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> average = Average(layer, decay=0.75)
    >>> before = layer.weight.item()
    >>> with torch.no_grad():
    ...     _ = layer.weight.add_(1.0)
    >>> average.update()
    >>> abs(average.tensors["weight"].item() - before - 0.25) < 1e-6
    True
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors = _copy(model)

    @torch.no_grad()
    def update(self) -> None:
        """Move by a share of 1 - ``decay`` to what the weights are now."""
        averaged, floating = [], []
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                averaged.append(self.tensors[name])
                floating.append(value)
            else:
                self.tensors[name].copy_(value)
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            averaged, floating, 1 - self.decay
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the averages for weights, for as long as the context lasts."""
        own = _copy(self.model)
        self.model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            self.model.load_state_dict(own)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
