"""Change batches of images, uint8 (B, C, H, W), on any device.

All of it is arithmetic of whole numbers on numbers drawn beforehand, so a CPU, a worker and a GPU
make the very same image, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kdsurgeon.data import draws
from kdsurgeon.data.augmenting import Draws, RandAugment, margins

_ONE = 1024  # 1.0 in the fixed point of strengths
_FINE = 16  # bits after the point of coordinates


def shifted(images: Tensor, down: np.ndarray, right: np.ndarray) -> Tensor:
    """Each image padded with black by its :func:`margins` and cropped at (down, right)."""
    count, _, height, width = images.shape
    high, wide = margins(height, width)
    padded = functional.pad(images, (wide, wide, high, high))
    rows = _on(images, down)[:, None] + torch.arange(height, device=images.device)
    columns = _on(images, right)[:, None] + torch.arange(width, device=images.device)
    each = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def mirrored(images: Tensor, which: np.ndarray) -> Tensor:
    """Those images turned left to right that ``which`` (B,) says."""
    return torch.where(_on(images, which)[:, None, None, None], images.flip(-1), images)


def cropped(images: Tensor, boxes: np.ndarray) -> Tensor:
    """The part of each image in its box (top, left, height, width), at the size of the whole.

    Bilinear between the centres of the pixels of the part (half a pixel in from its edges); the
    exact sum, rounded half up.
    """
    _, channels, height, width = images.shape
    top, left, tall, wide = _on(images, boxes).unbind(1)
    above, below, down = _neighbours(top, tall, height)
    before, after, right = _neighbours(left, wide, width)
    values = images.to(torch.int32 if 4 * 255 * height * width < 2**31 else torch.int64)

    def rows(which: Tensor) -> Tensor:
        return values.gather(2, which[:, None, :, None].expand(-1, channels, -1, width))

    down = down[:, None, :, None].to(values.dtype)
    values = rows(above) * (2 * height - down) + rows(below) * down

    def columns(which: Tensor) -> Tensor:
        return values.gather(3, which[:, None, None, :].expand(-1, channels, height, -1))

    right = right[:, None, None, :].to(values.dtype)
    total = columns(before) * (2 * width - right) + columns(after) * right
    whole = 4 * height * width
    return ((total + whole // 2) // whole).to(torch.uint8)


def _neighbours(first: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of ``size`` places: the pixel before, the one after, and how far, of 2·size."""
    place = (2 * torch.arange(size, device=first.device) + 1) * length[:, None] - size
    last = length[:, None] - 1
    before = place.div(2 * size, rounding_mode="floor")
    low, high = before.clamp_min(0).minimum(last), (before + 1).clamp_min(0).minimum(last)
    return low + first[:, None], high + first[:, None], place - before * (2 * size)


def hollow(images: Tensor, boxes: np.ndarray) -> Tensor:
    """Normalised images with 0, their mean, in the boxes (B, K, 4)."""
    if not boxes.shape[1]:
        return images
    top, left, high, wide = _on(images, boxes).unbind(-1)  # each (B, K)
    y = torch.arange(images.shape[-2], device=images.device)
    x = torch.arange(images.shape[-1], device=images.device)
    in_rows = (y >= top[..., None]) & (y < (top + high)[..., None])  # (B, K, H)
    in_columns = (x >= left[..., None]) & (x < (left + wide)[..., None])
    holes = (in_rows[..., :, None] & in_columns[..., None, :]).any(1)
    return images.masked_fill(holes[:, None], 0.0)


def rand_augmented(images: Tensor, rand: RandAugment, drawn: Draws, fill: Tensor) -> Tensor:
    """RandAugment; ``fill`` (C,) uint8 is what comes in where an image was moved away."""
    for number in range(rand.count):
        chosen = drawn.integer(draws.OPERATION + number, len(OPERATIONS))
        signs = 1 - 2 * drawn.integer(draws.SIGN + number, 2)
        done = images.clone()
        for which, (_, operation) in enumerate(OPERATIONS):
            rows = np.flatnonzero(chosen == which)
            if len(rows):
                sign = _on(images, signs[rows])[:, None, None, None]
                index = _on(images, rows)
                done[index] = operation(images[index], rand.magnitude / 30, sign, fill)
        images = done
    return images


# ── the operations of RandAugment ────────────────────────────────────────────────────────────────
# Each takes images, a strength from 0 to 1, a sign (B, 1, 1, 1) for those that have a direction,
# and the fill. The strongest of each is torchvision's.


def _identity(images: Tensor, strength: float, sign: Tensor, fill: Tensor) -> Tensor:
    return images


def _autocontrast(images: Tensor, strength: float, sign: Tensor, fill: Tensor) -> Tensor:
    """Each channel stretched to 0 … 255; one of a single value stays."""
    values = images.to(torch.int32)
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    stretched = (values - low) * 255 // (high - low).clamp_min(1)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def _equalize(images: Tensor, strength: float, sign: Tensor, fill: Tensor) -> Tensor:
    """Each channel with an even histogram, as Pillow's ``ImageOps.equalize``."""
    values = images.flatten(2).to(torch.int64)
    counts = torch.zeros((*images.shape[:2], 256), dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    last = values.amax(2, keepdim=True)
    step = (values.shape[2] - counts.gather(2, last)) // 255
    table = (step // 2 + counts.cumsum(2) - counts) // step.clamp_min(1)
    even = table.clamp_max(255).gather(2, values)
    return torch.where(step > 0, even, values).to(torch.uint8).view_as(images)


def _posterize(images: Tensor, strength: float, sign: Tensor, fill: Tensor) -> Tensor:
    """Only the highest 8 to 4 bits."""
    return images & (0x100 - (1 << round(4 * strength)))


def _solarize(images: Tensor, strength: float, sign: Tensor, fill: Tensor) -> Tensor:
    """Inverted from a value on: 255, down to 0."""
    return torch.where(images >= round(255 * (1 - strength)), 255 - images, images)


def _color(images: Tensor, strength: float, sign: Tensor, fill: Tensor) -> Tensor:
    return _mixed(images, _luminance(images), strength, sign)


def _contrast(images: Tensor, strength: float, sign: Tensor, fill: Tensor) -> Tensor:
    gray = _luminance(images).to(torch.int64)
    pixels = images.shape[2] * images.shape[3]
    mean = (gray.sum((1, 2, 3), keepdim=True) + pixels // 2) // pixels
    return _mixed(images, mean.to(torch.int32), strength, sign)


def _brightness(images: Tensor, strength: float, sign: Tensor, fill: Tensor) -> Tensor:
    return _mixed(images, torch.zeros_like(images[:1, :1, :1, :1]), strength, sign)


def _sharpness(images: Tensor, strength: float, sign: Tensor, fill: Tensor) -> Tensor:
    """Away from, or towards, the mean of nine with five times the middle; edges as they are."""
    if min(images.shape[2:]) < 3:
        return images
    values = images.to(torch.int32)
    height, width = images.shape[2] - 2, images.shape[3] - 2
    total = 4 * values[:, :, 1:-1, 1:-1]
    for y in range(3):
        for x in range(3):
            total = total + values[:, :, y : y + height, x : x + width]
    smooth = values.clone()
    smooth[:, :, 1:-1, 1:-1] = (total + 6) // 13
    return _mixed(images, smooth, strength, sign)


def _luminance(images: Tensor) -> Tensor:
    """int32 (B, 1, H, W): ITU-R 601-2 luma, as Pillow's conversion to L."""
    values = images.to(torch.int32)
    if images.shape[1] == 1:
        return values
    red, green, blue = values.split(1, 1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _mixed(images: Tensor, other: Tensor, strength: float, sign: Tensor) -> Tensor:
    """``other`` + (1 ± 0.9·strength)·(images - ``other``), rounded half up, within 0 … 255."""
    share = _ONE + sign.to(torch.int32) * round(0.9 * _ONE * strength)
    values, other = images.to(torch.int32), other.to(torch.int32)
    mixed = (values * share + other * (_ONE - share) + _ONE // 2) >> 10
    return mixed.clamp(0, 255).to(torch.uint8)


def _shear(images: Tensor, strength: float, sign: Tensor, fill: Tensor, *, along_x: bool) -> Tensor:
    slope = sign * _fixed(0.3 * strength)
    zero, one = torch.zeros_like(slope), torch.full_like(slope, _fixed(1.0))
    ways = (one, slope, zero, one) if along_x else (one, zero, slope, one)
    return _moved(images, ways, (zero, zero), fill)


def _translate(
    images: Tensor, strength: float, sign: Tensor, fill: Tensor, *, along_x: bool
) -> Tensor:
    length = images.shape[3] if along_x else images.shape[2]
    by = sign * (int(150 / 331 * length * strength) << _FINE)
    zero, one = torch.zeros_like(by), torch.full_like(by, _fixed(1.0))
    return _moved(images, (one, zero, zero, one), (by, zero) if along_x else (zero, by), fill)


def _rotate(images: Tensor, strength: float, sign: Tensor, fill: Tensor) -> Tensor:
    angle = math.radians(30 * strength)
    cosine = torch.full_like(sign, _fixed(math.cos(angle)))
    sine = sign * _fixed(math.sin(angle))
    zero = torch.zeros_like(sign)
    return _moved(images, (cosine, sine, -sine, cosine), (zero, zero), fill)


def _moved(
    images: Tensor,
    ways: tuple[Tensor, Tensor, Tensor, Tensor],
    by: tuple[Tensor, Tensor],
    fill: Tensor,
) -> Tensor:
    """Each pixel from where ``ways`` (xx, xy, yx, yy, about the centre) and ``by`` (x, y) say.

    The nearest pixel; coordinates in fixed point.
    """
    count, channels, height, width = images.shape
    y = (2 * torch.arange(height, device=images.device) - (height - 1))[:, None]
    x = 2 * torch.arange(width, device=images.device) - (width - 1)
    xx, xy, yx, yy = (way[:, 0] for way in ways)  # (B, 1, 1)
    half = 1 << _FINE  # rounds; everything below counts in half pixels
    from_x = xx * x + xy * y + 2 * by[0][:, 0] + ((width - 1) << _FINE) + half >> _FINE + 1
    from_y = yx * x + yy * y + 2 * by[1][:, 0] + ((height - 1) << _FINE) + half >> _FINE + 1
    is_inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    place = from_y.clamp(0, height - 1) * width + from_x.clamp(0, width - 1)
    found = images.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, channels, -1))
    found = found.view(count, channels, height, width)
    return torch.where(is_inside[:, None], found, fill[:, None, None])


def _fixed(value: float) -> int:
    return round(value * (1 << _FINE))


def _on(images: Tensor, numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers).to(images.device, non_blocking=True)


Operation = Callable[[Tensor, float, Tensor, Tensor], Tensor]
OPERATIONS: tuple[tuple[str, Operation], ...] = (
    ("identity", _identity),
    ("autocontrast", _autocontrast),
    ("equalize", _equalize),
    ("rotate", _rotate),
    ("solarize", _solarize),
    ("color", _color),
    ("posterize", _posterize),
    ("contrast", _contrast),
    ("brightness", _brightness),
    ("sharpness", _sharpness),
    ("shear-x", partial(_shear, along_x=True)),
    ("shear-y", partial(_shear, along_x=False)),
    ("translate-x", partial(_translate, along_x=True)),
    ("translate-y", partial(_translate, along_x=False)),
)
