"""The form of an exported file as flags say it, and what the file says of itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdsurgeon import __version__
from kdsurgeon.checkpoints import Loaded
from kdsurgeon.data import Fit, Split
from kdsurgeon.errors import UsageError
from kdsurgeon.exporting import Form, Preprocessing
from kdsurgeon.recipe import DataRecipe

_HASHED = {"plan": "plan.yaml", "run": "run.json"}


@dataclass(frozen=True)
class FormFlags:
    """What the flags of ``export`` say of the file's form, as they were given."""

    opset: int = 18
    static: bool = False
    dynamic_size: bool = False
    half: bool = False
    softmax: bool = False
    external: bool = False
    embed_preprocessing: bool = False
    license: str | None = None


@dataclass(frozen=True)
class Exportee:
    """A model to export, with the data it is proved on and how these images were wished for."""

    loaded: Loaded
    data: Split | None
    wishes: DataRecipe

    def example(self, size: Tensor) -> Tensor:
        """Two samples of the data, or zeros like ``size``."""
        return self.data.val.samples(slice(2)) if self.data else size


def form_of(flags: FormFlags, exportee: Exportee, example: Tensor) -> Form:
    """The form that the flags ask for; :class:`UsageError` where they contradict each other."""
    return Form(
        opset=flags.opset,
        batch=1 if flags.static else None,
        dynamic_size=flags.dynamic_size,
        half=flags.half,
        softmax=flags.softmax,
        external=flags.external,
        preprocessing=_preprocessing(exportee, example) if flags.embed_preprocessing else None,
    )


def samples_for(form: Form, data: Split | None) -> Tensor | None:
    """The validation images as the file takes them."""
    if data is None:
        return None
    if form.preprocessing is None:
        return data.val.samples()
    return torch.from_numpy(np.ascontiguousarray(data.val.images[:]))


def metadata_of(exportee: Exportee, flags: FormFlags, target: str) -> dict[str, str]:
    """What a consumer needs beside the graph, and where the file comes from, as text."""
    loaded, data = exportee.loaded, exportee.data
    card = loaded.card
    found = {
        "kdsurgeon": __version__,
        "layout": "NHWC uint8" if flags.embed_preprocessing else "NCHW float32",
        "student": loaded.sha256 or loaded.source,
        **{f"provenance.{key}": value for key, value in card.provenance.items()},
        **_hashes(Path(target)),
    }
    if flags.license:
        found["license"] = flags.license
    if data is not None:
        train = data.train
        found["scale"] = json.dumps(train.scale)
        card = replace(
            card, class_names=tuple(train.class_names), mean=train.mean, std=train.std,
            input_size=train.input_size,
        )  # fmt: skip
    for name in ("class_names", "mean", "std", "input_size"):
        value = getattr(card, name)
        if value is not None:
            found[name] = json.dumps(value)
    return found


def _hashes(folder: Path) -> dict[str, str]:
    """The sha256 of a run's plan and of its manifest, where there are such files."""
    return {
        name: hashlib.sha256((folder / file).read_bytes()).hexdigest()
        for name, file in _HASHED.items()
        if (folder / file).is_file()
    }


def _preprocessing(exportee: Exportee, example: Tensor) -> Preprocessing:
    """As evaluation treats the images: mean and std of the data, else of the model's file."""
    channels, height, width = example.shape[1:]
    wishes, card, scale = exportee.wishes, exportee.loaded.card, 255.0
    mean, std = wishes.mean or card.mean, wishes.std or card.std
    if exportee.data is not None:
        train = exportee.data.train
        mean, std, scale = train.mean, train.std, train.scale
    if not mean or not std:
        raise UsageError(
            f"how {exportee.loaded.name} wants its images normalised is not known.",
            why="the file of weights does not say it",
            fix="--data-dir with the images it was trained on, or --mean and --std",
        )
    fit = Fit(wishes.crop_pct or 1.0, wishes.interpolation or "bilinear")
    return Preprocessing((channels, height, width), tuple(mean), tuple(std), scale, fit)
