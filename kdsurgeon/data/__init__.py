"""Data sets in: digits, a folder of class folders or an .npz, served in batches.

Every image is decoded once, into one uint8 array; what happens per epoch is array arithmetic.
Nothing is replaced and nothing is dropped in silence: an unreadable image is an error, or is left
out by a list (``Split.bad``); everything else worth knowing stands in ``Split.notes``.
"""

from kdsurgeon.data.batches import Batches
from kdsurgeon.data.loading import load
from kdsurgeon.data.sets import IMAGENET_MEAN, IMAGENET_STD, BadImage, Dataset, Split

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BadImage",
    "Batches",
    "Dataset",
    "Split",
    "load",
]
