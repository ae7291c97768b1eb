"""What is done to a training image, and the numbers drawn for it.

Everything is drawn here, on the CPU, as a pure function of (seed, epoch, row). The pixels are
worked on elsewhere, on any device, in whole numbers: so the same image comes out everywhere.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import numpy as np

from kdsurgeon.data import draws
from kdsurgeon.errors import UsageError, nearest

AUGMENTS = ("none", "shift", "shift-flip", "crop-flip")
SCALE = (0.08, 1.0)
TRIES = 10

# (share of the area, width over height), from - to
_CROP_RATIO = (3 / 4, 4 / 3)
_ERASE_SCALE, _ERASE_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


@dataclass(frozen=True)
class RandAugment:
    """``count`` operations on each image, of strength ``magnitude`` of 30.

    Cubuk et al. 2020, "RandAugment" (arXiv 1909.13719), table 6: 14 operations, identity among
    them, each as likely; strengths as torchvision has them.
    """

    count: int = 2
    magnitude: int = 9

    def __str__(self) -> str:
        return f"rand-m{self.magnitude}-n{self.count}"


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image, in this order.

    ``crop``: "shift" pads each side by an eighth with black and crops at random; "crop" takes a
    part of random area (a share within ``scale``) and aspect (3:4 to 4:3) and resizes it (Szegedy
    et al. 2015, arXiv 1409.4842, section 6; as torchvision's ``RandomResizedCrop``). ``flip``
    mirrors every second image. ``rand``: RandAugment. ``reprob``: with this probability a rectangle
    becomes the mean (Zhong et al. 2017, arXiv 1708.04896; numbers of timm). ``cutout``: a square of
    so many pixels becomes the mean, its centre anywhere (DeVries and Taylor 2017, arXiv
    1708.04552).

    >>> str(parse_augmentation("crop-flip", aa="rand-m7", reprob=0.25))
    'crop-flip rand-m7-n2 reprob 0.25'
    """

    crop: str = "none"
    flip: bool = False
    rand: RandAugment | None = None
    reprob: float = 0.0
    cutout: int = 0
    scale: tuple[float, float] = SCALE

    def __str__(self) -> str:
        parts = [self.crop + ("-flip" if self.flip else "")]
        if self.crop == "crop" and self.scale != SCALE:
            parts.append(f"scale {self.scale[0]:g}-{self.scale[1]:g}")
        if self.rand:
            parts.append(str(self.rand))
        if self.reprob:
            parts.append(f"reprob {self.reprob:g}")
        if self.cutout:
            parts.append(f"cutout {self.cutout}")
        return " ".join(parts)


def parse_augmentation(
    name: str,
    *,
    aa: str | None = None,
    reprob: float = 0.0,
    cutout: int = 0,
    scale: tuple[float, float] = SCALE,
) -> Augmentation:
    """The augmentation of these names; ``aa`` in timm's spelling: "rand", "rand-m9-n2".

    Raises :class:`UsageError` for a name that is not known or a number that makes no sense.
    """
    if name not in AUGMENTS:
        raise UsageError(f'no augmentation is called "{name}".', fix=nearest(name, AUGMENTS))
    if not 0 <= reprob <= 1 or cutout < 0:
        raise UsageError(
            f"reprob is {reprob}, cutout {cutout}.",
            why="a probability lies between 0 and 1, a side has 0 pixels or more",
        )
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UsageError(
            f"the scale {scale[0]:g} to {scale[1]:g} is not a range of shares of the image.",
            fix="two numbers above 0, at most 1, in rising order, such as 0.08 1.0",
        )
    crop, _, flip = name.partition("-")
    rand = None if aa is None else _parse_rand(aa)
    return replace(
        Augmentation(crop, flip == "flip", rand), reprob=reprob, cutout=cutout, scale=scale
    )


def _parse_rand(text: str) -> RandAugment:
    found = re.fullmatch(r"rand((?:-[mn]\d{1,2})*)", text)
    given = {part[0]: int(part[1:]) for part in found[1].split("-")[1:]} if found else {}
    rand = RandAugment(given.get("n", 2), given.get("m", 9))
    if not found or not (0 <= rand.magnitude <= 30 and 1 <= rand.count <= 16):
        raise UsageError(
            f'no automatic augmentation is called "{text}".',
            fix="rand, or rand-m9-n2: 1 to 16 operations of strength 0 to 30",
        )
    return rand


@dataclass(frozen=True)
class Draws:
    """The numbers of one batch: its rows at an epoch of a seed."""

    seed: int
    epoch: int
    rows: np.ndarray

    def integer(self, use: int, bound: int) -> np.ndarray:
        return draws.draw(self.seed, self.epoch, self.rows, use, bound)

    def share(self, use: int) -> np.ndarray:
        return draws.draw_share(self.seed, self.epoch, self.rows, use)


def crop_boxes(
    augmentation: Augmentation, drawn: Draws, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """int64 (B, 4): top, left, height, width of the part that each image is cropped to.

    Ten tries; then the largest centred part of an allowed aspect, as torchvision has it.
    """
    found = _boxes(
        drawn, draws.CROP_BOX, heights, widths, augmentation.scale, _CROP_RATIO, margin=0
    )
    high = np.minimum(heights, np.rint(widths / _CROP_RATIO[0])).astype(np.int64)
    wide = np.minimum(widths, np.rint(heights * _CROP_RATIO[1])).astype(np.int64)
    high, wide = np.maximum(high, 1), np.maximum(wide, 1)
    whole = np.stack([(heights - high) // 2, (widths - wide) // 2, high, wide], axis=1)
    return np.where(found[:, 2:3] > 0, found, whole)


def holes(augmentation: Augmentation, drawn: Draws, height: int, width: int) -> np.ndarray:
    """int64 (B, K, 4): top, left, height, width of what becomes the mean, clipped to the image.

    An image without a hole has one of no height.
    """
    found = []
    if augmentation.reprob:
        size = np.full(len(drawn.rows), height), np.full(len(drawn.rows), width)
        boxes = _boxes(drawn, draws.ERASE_BOX, *size, _ERASE_SCALE, _ERASE_RATIO, margin=1)
        boxes[drawn.share(draws.ERASE) >= augmentation.reprob] = 0
        found.append(boxes)
    if augmentation.cutout:
        side = augmentation.cutout
        edges = []
        for use, length in ((draws.CUT_DOWN, height), (draws.CUT_RIGHT, width)):
            first = drawn.integer(use, length) - side // 2
            low = np.maximum(first, 0)
            edges.append((low, np.minimum(first + side, length) - low))
        (top, high), (left, wide) = edges
        found.append(np.stack([top, left, high, wide], axis=1))
    return np.stack(found, axis=1) if found else np.zeros((len(drawn.rows), 0, 4), np.int64)


def _boxes(
    drawn: Draws,
    use: int,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    *,
    margin: int,
) -> np.ndarray:
    """The first of ten drawn boxes that is ``margin`` smaller than the image; else zeros."""
    boxes = np.zeros((len(drawn.rows), 4), dtype=np.int64)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for first in range(use, use + 4 * TRIES, 4):
        area = heights * widths * (scale[0] + (scale[1] - scale[0]) * drawn.share(first))
        aspect = np.exp(low + (high - low) * drawn.share(first + 1))
        tall = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        wide = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        fits = (tall > 0) & (wide > 0) & (tall <= heights - margin) & (wide <= widths - margin)
        top = (drawn.share(first + 2) * (heights - tall + 1)).astype(np.int64)
        left = (drawn.share(first + 3) * (widths - wide + 1)).astype(np.int64)
        box = np.stack([top, left, tall, wide], axis=1)
        boxes = np.where((fits & (boxes[:, 2] == 0))[:, None], box, boxes)
        if boxes[:, 2].all():
            break
    return boxes


def offsets(drawn: Draws, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where "shift" crops each padded image: rows down, columns right, from 0."""
    down, right = margins(height, width)
    return (
        drawn.integer(draws.DOWN, 2 * down + 1),
        drawn.integer(draws.RIGHT, 2 * right + 1),
    )


def margins(height: int, width: int) -> tuple[int, int]:
    """How many black rows and columns "shift" adds on each side."""
    return max(1, height // 8), max(1, width // 8)


def is_mirrored(drawn: Draws) -> np.ndarray:
    return drawn.integer(draws.MIRROR, 2) == 1
