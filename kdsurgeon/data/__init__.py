"""Data sets in: digits, a folder of class folders, an .npz or what a plugin reads, in batches.

Images are decoded once, into one uint8 array, and what happens per epoch is array arithmetic; or,
where they are many, whenever they are asked for, by workers.
Nothing is replaced and nothing is dropped in silence: an unreadable image is an error, or is left
out by a list (``Split.bad``); everything else worth knowing stands in ``Split.notes``.
"""

from kdsurgeon.data.augmenting import Augmentation, parse_augmentation
from kdsurgeon.data.batches import Batches
from kdsurgeon.data.classes import read_class_map, select_classes
from kdsurgeon.data.loading import load
from kdsurgeon.data.pictures import Pictures
from kdsurgeon.data.reconciling import ImageSpec, ReconciledTeacher
from kdsurgeon.data.sets import IMAGENET_MEAN, IMAGENET_STD, BadImage, Dataset, Fit, Split

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augmentation",
    "BadImage",
    "Batches",
    "Dataset",
    "Fit",
    "ImageSpec",
    "Pictures",
    "ReconciledTeacher",
    "Split",
    "load",
    "parse_augmentation",
    "read_class_map",
    "select_classes",
]
