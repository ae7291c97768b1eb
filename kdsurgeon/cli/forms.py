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
from kdsurgeon.checkpoints import Loaded, ModelCard
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

    def check(self, *, int8: bool) -> None:
        """Raises :class:`UsageError` for a form that contradicts itself, before any work."""
        some = Preprocessing((1, 1, 1), (0.0,), (1.0,)) if self.embed_preprocessing else None
        form = Form(
            opset=self.opset, batch=1 if self.static else None, dynamic_size=self.dynamic_size,
            half=self.half, preprocessing=some,
        )  # fmt: skip
        if int8:
            form.check_int8()


@dataclass(frozen=True)
class Exportee:
    """A model to export, with the data it is proved on and how these images were wished for.

    ``calibration`` is the data of int8, which may be other.
    """

    loaded: Loaded
    data: Split | None
    wishes: DataRecipe
    calibration: Split | None = None

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


def metadata_of(
    exportee: Exportee, flags: FormFlags, target: str, example: Tensor
) -> dict[str, str]:
    """What a consumer needs beside the graph, and where the file comes from, as text.

    Images are told as the data treat them, those of calibration where there are no others, else as
    the flags and the model's file say; ``example`` (n, C, H, W) gives their size.
    """
    loaded, data = exportee.loaded, exportee.data
    card = _card(exportee, example)
    found = {
        "kdsurgeon": __version__,
        "layout": "NHWC uint8" if flags.embed_preprocessing else "NCHW float32",
        "student": loaded.sha256 or loaded.source,
        **{f"provenance.{key}": value for key, value in card.provenance.items()},
        **_hashes(Path(target)),
    }
    if flags.license:
        found["license"] = flags.license
    images = data or exportee.calibration
    if images is not None:
        found["scale"] = json.dumps(images.train.scale)
    elif flags.embed_preprocessing:
        found["scale"] = json.dumps(255.0)
    for name in ("class_names", "mean", "std", "input_size", "crop_pct", "interpolation"):
        value = getattr(card, name)
        if value is not None:
            found[name] = json.dumps(value)
    return found


def _card(exportee: Exportee, example: Tensor) -> ModelCard:
    """What is known of the images and classes; names of classes not from images of calibration."""
    card, wishes, fit = exportee.loaded.card, exportee.wishes, _fit(exportee)
    card = replace(card, crop_pct=fit.crop_pct, interpolation=fit.interpolation)
    size = tuple(example.shape[1:])
    images = exportee.data or exportee.calibration
    if images is None:
        mean, std = wishes.mean or card.mean, wishes.std or card.std
        channels, height, width = size
        whole = (1.0,) * channels
        Preprocessing((channels, height, width), tuple(mean or whole), tuple(std or whole))
        return replace(card, mean=mean, std=std, input_size=size)
    train = images.train
    names = tuple(train.class_names) if exportee.data else card.class_names
    return replace(
        card, class_names=names, mean=train.mean, std=train.std, input_size=train.input_size
    )


def _fit(exportee: Exportee) -> Fit:
    """How evaluation resizes images: as the data were, else as the model's file says."""
    card, images = exportee.loaded.card, exportee.data or exportee.calibration
    return images.fit if images else Fit(card.crop_pct or 1.0, card.interpolation or "bilinear")


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
    images = exportee.data or exportee.calibration
    if images is not None:
        mean, std, scale = images.train.mean, images.train.std, images.train.scale
    if not mean or not std:
        raise UsageError(
            f"how {exportee.loaded.name} wants its images normalised is not known.",
            why="the file of weights does not say it",
            fix="--data-dir with the images it was trained on, or --mean and --std",
        )
    return Preprocessing((channels, height, width), tuple(mean), tuple(std), scale, _fit(exportee))
