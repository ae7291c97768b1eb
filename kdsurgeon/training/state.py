"""Everything beside the weights that a run needs to go on exactly where it stopped.

Numbers go to JSON, which keeps a float's every bit, tensors to safetensors. What is saved names
every item, and what comes back must hold each of them: a run that lost one would go on, wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdsurgeon.errors import ModelFileError, UsageError
from kdsurgeon.recipe import Recipe
from kdsurgeon.training.optimising import Average, make_optimizer
from kdsurgeon.training.randomness import RandomState
from kdsurgeon.training.sharding import is_shared, like, whole

_POSITION = ("epoch", "batch", "step", "samples", "skipped", "splits", "sums", "counts")
_GROUP = "group "
Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass
class TrainingState:
    """Where a run stands, and what its optimiser, loss scaler and average remember.

    ``batch`` counts those of the epoch that are done with, ``step`` the updates of the run;
    ``splits`` says in how many parts a batch goes through the model, for want of memory.
    """

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None = None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0
    skipped: int = 0
    splits: int = 1
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    epoch_random: RandomState = field(default_factory=RandomState.now)
    """when the epoch's batches were asked for: a loader draws its order then"""

    def next_epoch(self) -> None:
        """Stand before the first batch of the next epoch."""
        self.epoch, self.batch, self.samples = self.epoch + 1, 0, 0
        self.sums, self.counts = {}, {}

    def means(self) -> dict[str, float]:
        """Over the batches in which a loss was there: the ensemble's begins inside an epoch."""
        return {name: value / self.counts[name] for name, value in self.sums.items()}

    def numbers(self) -> dict[str, Any]:
        """The position, and what optimiser and scaler remember in plain numbers."""
        tensors, plain = self._optimizer_state()
        found = {name: getattr(self, name) for name in _POSITION}
        return found | {
            "groups": [_plain(group) for group in self.optimizer.param_groups],
            "optimizer": {"tensors": sorted(tensors), "numbers": plain},
            "options": [sorted(_plain(group)) for group in self.optimizer.param_groups],
            "scaler": self.scaler.state_dict(),
        }

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """By file: the optimiser's tensors, every random state, and the average if there is one.

        What is shared out is whole on rank 0 and empty elsewhere; all ranks must ask for it.
        """
        found = {
            "optimizer": {name: whole(x) for name, x in self._optimizer_state()[0].items()},
            "random": RandomState.now().tensors(),
            "epoch_random": self.epoch_random.tensors(),
        }
        return found if self.average is None else found | {"ema": dict(self.average.tensors)}

    def _optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = {}, {}
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                kind = tensors if isinstance(value, Tensor) else numbers
                kind[f"{index}.{name}"] = value
        for index, group in enumerate(self.optimizer.param_groups):  # some count steps here
            counted = {k: v for k, v in group.items() if isinstance(v, Tensor)}
            tensors |= {f"{_GROUP}{index}.{name}": value for name, value in counted.items()}
        try:
            json.dumps(numbers)
        except TypeError as error:
            raise UsageError(
                f"{type(self.optimizer).__name__} cannot be saved without a pickle.",
                why=f"it remembers more than tensors and numbers: {error}",
                fix="choose another --opt",
            ) from error
        return tensors, numbers

    def restore(self, numbers: Mapping[str, Any], tensors: Tensors) -> None:
        """Go back to what :meth:`numbers` and :meth:`tensors` gave.

        Raises:
            ModelFileError: an item is missing, or does not belong to this run; nothing is half
                restored, as the run cannot go on.
        """
        try:
            self._restore(numbers, tensors)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise _incomplete(f"{type(error).__name__}: {error}") from error

    def _restore(self, numbers: Mapping[str, Any], tensors: Tensors) -> None:
        _check_names("the state", numbers, self.numbers())
        _check_names("the files", tensors, self.tensors())
        for name in _POSITION:
            setattr(self, name, numbers[name])
        self.scaler.load_state_dict(dict(numbers["scaler"]))
        self._restore_optimizer(numbers, tensors["optimizer"])
        if self.average is not None:
            _check_names("the average", tensors["ema"], self.average.tensors)
            for name, value in self.average.tensors.items():
                value.copy_(tensors["ema"][name])
        self.epoch_random = RandomState.of(tensors["epoch_random"])
        RandomState.of(tensors["random"]).set()

    def _restore_optimizer(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        _check_names("the optimiser's state", tensors, numbers["optimizer"]["tensors"])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        saved = self.optimizer.state_dict()
        saved["state"] = {}
        for key, value in {**tensors, **numbers["optimizer"]["numbers"]}.items():
            index, name = key.removeprefix(_GROUP).split(".", 1)
            if key.startswith(_GROUP):
                saved["param_groups"][int(index)][name] = value
                continue
            if isinstance(value, Tensor) and value.shape == parameters[int(index)].shape:
                value = like(value, parameters[int(index)])
            saved["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(saved)
        for index, parameter in enumerate(parameters):
            own = self.optimizer.state.get(parameter, {})
            for name, value in own.items():
                if isinstance(value, Tensor):
                    own[name] = _as_saved(tensors[f"{index}.{name}"], value, parameter)
        known = zip(self.optimizer.param_groups, numbers["groups"], numbers["options"], strict=True)
        for group, values, names in known:
            _check_names("a group of parameters", values, {*names, *_plain(group)})
            for name, value in values.items():
                group[name] = tuple(value) if isinstance(value, list) else value


def start(model: nn.Module, recipe: Recipe, *, averaged: nn.Module | None = None) -> TrainingState:
    """The state of a run that has not begun; ``averaged`` is the part of ``model`` whose moving
    average is kept where the recipe asks for one, all of it by default."""
    optim = recipe.optim
    device = next(model.parameters()).device
    scales = recipe.amp and recipe.amp_dtype == "float16"
    return TrainingState(
        make_optimizer(model, optim),
        torch.amp.GradScaler(device.type, enabled=scales),
        Average(averaged or model, optim.model_ema_decay) if optim.model_ema else None,
    )


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group, some of which count its steps. The weights have their own place;
    what JSON does not know, a dtype, is the recipe's."""
    known = (bool, int, float, str, tuple, type(None))
    return {
        name: value
        for name, value in group.items()
        if name != "params" and isinstance(value, known)
    }


def _as_saved(saved: Tensor, loaded: Tensor, parameter: Tensor) -> Tensor:
    """``saved`` in its own precision, where it was loaded to, laid out as its weight is."""
    if saved.shape != parameter.shape or not saved.ndim:
        return saved.to(loaded.device)
    if is_shared(parameter):
        return like(saved, parameter)
    return torch.empty_like(parameter, dtype=saved.dtype, device=loaded.device).copy_(saved)


def _check_names(what: str, found: Any, wanted: Any) -> None:
    if set(found) != set(wanted):
        other = ", ".join(sorted(set(found) ^ set(wanted)))
        raise _incomplete(f"{what} has other items than it should have: {other}")


def _incomplete(why: str) -> ModelFileError:
    return ModelFileError(
        "the state in the checkpoint is not that of this run.",
        why=why,
        fix="resume with the version and the recipe that saved it, or start a new run",
    )
