"""Load a data set by what its source is: digits, a folder of class folders, an .npz file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from kdsurgeon.data.arrays import load_arrays
from kdsurgeon.data.folders import load_folder
from kdsurgeon.data.sets import Fit, Options, Size, Split
from kdsurgeon.data.sources import load_source
from kdsurgeon.data.words import shown
from kdsurgeon.errors import DataError, ResourceError, nearest
from kdsurgeon.plugins import installed

DIGITS = Path(__file__).parent.parent / "assets" / "digits.npz"


def load(
    source: str | os.PathLike[str],
    *,
    val_split: float | None = None,
    seed: int = 0,
    input_size: Size | None = None,
    max_bad_images: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float = 1.0,
    interpolation: str = "bilinear",
    stream: bool | None = None,
) -> Split:
    """The data set called ``source``, split into a training and a validation part.

    ``source`` is ``"digits"`` (UCI Optical Recognition of Handwritten Digits, 1,797 scans of 8×8,
    shipped with the package; ``./digits`` is a folder of that name), a folder, an ``.npz`` file, or
    ``SOURCE:PLACE`` for what a plugin reads, such as ``wds:shards/train-{000..099}.tar``,
    ``hf:FOLDER`` (a folder that Hugging Face's ``save_to_disk`` wrote is known as such, too) and
    ``torchvision/CIFAR10?root=FOLDER``.

    *Folder*: ``train/CLASS/…`` beside ``val/CLASS/…`` (also ``validation``, ``valid``, ``eval``; or
    ``test`` where there is none of these), or ``CLASS/…`` alone. Classes are the sorted folder
    names; folders below a class belong to it; hidden files are ignored; the first frame of an
    animation counts. Images are resized so that they cover ``input_size`` and cropped at its
    centre, in one bilinear step.

    *npz*: ``images`` and ``labels`` (or ``x``/``X`` and ``y``/``Y``), or parts named as Keras
    (``x_train``, ``y_train``, ``x_test``, …) or MedMNIST (``train_images``, ``train_labels``,
    ``val_images``, …) name them; optionally ``class_names``. Images are (N, H, W), (N, H, W, C) or
    (N, C, H, W) with C 1 or 3, integers in 0..255 or floats in 0..1 or 0..255.

    ``val_split`` is the share of each class that validates where the source has no parts of its
    own (by default 0.2; for digits 0.25, which is 450 images), drawn from ``seed``. ``input_size``
    is (C, H, W); None takes the images' own, which then must agree. At most ``max_bad_images``
    unreadable images are left out. ``mean`` and ``std`` (per channel, on the 0..1 scale) replace
    the defaults: ImageNet's for folders of three-channel images, else measured on the training
    part.

    Images that have to be resized are so by ``interpolation`` ("nearest", "bilinear", "bicubic");
    of those that validate the share ``crop_pct`` of each side is kept, in timm's sense. With
    ``stream`` image files are decoded when they are asked for (:class:`Batches` with workers), by
    default where decoded ones would take more than 16 GiB. A damaged one then stops the run by its
    name, unless ``max_bad_images`` is above 0: then all are decoded once to find them.

    Raises :class:`DataError` for a data set that cannot be used, :class:`UsageError` for arguments
    that cannot, :class:`ResourceError` when memory, disk or a permission is lacking.

    >>> split = load("digits")
    >>> len(split.train), len(split.val), split.train.input_size
    (1347, 450, (1, 8, 8))
    """
    if val_split is None:
        val_split = 0.25 if source == "digits" else 0.2
    options = Options(
        val_split,
        seed,
        _tuple(input_size),
        max_bad_images,
        _tuple(mean),
        _tuple(std),
        Fit(crop_pct, interpolation),
        stream,
    )
    try:
        if source == "digits":
            return load_arrays("digits", DIGITS, options, scale=16.0)
        path = Path(source)
        found = re.fullmatch(r"([\w.-]+)([:/])(.*)", str(source), re.DOTALL)
        is_named = found and (found[2] == ":" or not path.exists())
        if found and is_named and found[1] in installed("data"):
            return load_source(found[1], Path(found[3]), options)
        if path.is_dir():
            if is_saved_to_disk(path):
                return load_source("hf", path, options)
            return load_folder(path, options)
        if not path.exists():
            raise DataError(
                f"{shown(str(path))} does not exist.",
                why=f"a data set is a folder, an .npz file, digits, or one of {_sources()}",
                fix=nearest(str(source), ["digits"]),
            )
        return load_arrays(shown(path.name), path, options)
    except MemoryError as error:
        raise ResourceError(
            f"not enough memory to load {shown(str(source))}.",
            fix="choose a smaller --input-size, or fewer images",
        ) from error


def is_saved_to_disk(folder: Path) -> bool:
    """Whether Hugging Face's ``save_to_disk`` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _sources() -> str:
    return ", ".join(f"{name}:FOLDER" for name in installed("data")) or "an installed source"


def _tuple(values: Sequence | None) -> tuple | None:
    return None if values is None else tuple(values)
