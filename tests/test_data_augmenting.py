"""What augmentation promises: drawn as a pure function, worked in whole numbers, as its sources."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from kdsurgeon.data import Augmentation, parse_augmentation, pixels
from kdsurgeon.data.augmenting import Draws, RandAugment, crop_boxes, holes
from kdsurgeon.data.draws import OPERATION, SIGN, draw
from kdsurgeon.errors import UsageError

FILL = torch.tensor([7, 8, 9], dtype=torch.uint8)
NAMES = [name for name, _ in pixels.OPERATIONS]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return torch.from_numpy(pixels)


def drawn(count: int, seed: int = 0) -> Draws:
    return Draws(seed, 0, np.arange(count))


def sizes(count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(count, height), np.full(count, width)


def apply(name: str, images: torch.Tensor, strength: float, sign: int = 1) -> torch.Tensor:
    operation = dict(pixels.OPERATIONS)[name]
    signs = torch.full((len(images), 1, 1, 1), sign)
    return operation(images, strength, signs, FILL[: images.shape[1]])


def as_image(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_image(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ── names ────────────────────────────────────────────────────────────────────────────────────────


def test_an_augmentation_says_everything_that_changes_an_image():
    every = parse_augmentation(
        "crop-flip", aa="rand-n3-m7", reprob=0.25, cutout=4, scale=(0.5, 1.0)
    )
    assert every == Augmentation("crop", True, RandAugment(3, 7), 0.25, 4, (0.5, 1.0))
    assert str(every) == "crop-flip scale 0.5-1 rand-m7-n3 reprob 0.25 cutout 4"
    assert [str(parse_augmentation(name)) for name in ("none", "shift", "shift-flip")] == [
        "none",
        "shift",
        "shift-flip",
    ]
    assert parse_augmentation("none", aa="rand").rand == RandAugment(2, 9)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"name": "crop-flop"}, 'no augmentation is called "crop-flop"'),
        ({"aa": "rand-m31"}, 'no automatic augmentation is called "rand-m31"'),
        ({"aa": "rand-n0"}, "no automatic augmentation"),
        ({"aa": "rand-n17"}, "no automatic augmentation"),
        ({"aa": "augmix-m3"}, "no automatic augmentation"),
        ({"reprob": 1.5}, "reprob is 1.5"),
        ({"reprob": float("nan")}, "reprob is nan"),
        ({"cutout": -1}, "cutout -1"),
        ({"scale": (0.0, 1.0)}, "is not a range of shares"),
        ({"scale": (0.5, 0.4)}, "is not a range of shares"),
        ({"scale": (0.5, 1.1)}, "is not a range of shares"),
    ],
)
def test_what_makes_no_augmentation_is_refused(wishes, message):
    with pytest.raises(UsageError, match=message):
        parse_augmentation(**{"name": "none", **wishes})


# ── what is drawn ────────────────────────────────────────────────────────────────────────────────


def test_crop_boxes_lie_inside_and_have_area_and_aspect_as_asked():
    how = parse_augmentation("crop-flip")
    boxes = crop_boxes(how, drawn(20_000), *sizes(20_000, 64, 48))
    top, left, high, wide = boxes.T
    assert min(top.min(), left.min()) >= 0
    assert (top + high).max() <= 64
    assert (left + wide).max() <= 48
    # a side is rounded by half a pixel at most
    assert ((high + 0.5) * (wide + 0.5) >= 0.08 * 64 * 48).all()
    assert ((wide + 0.5) / (high - 0.5) >= 3 / 4).all()
    assert ((wide - 0.5) / (high + 0.5) <= 4 / 3).all()
    assert (boxes == crop_boxes(how, drawn(20_000), *sizes(20_000, 64, 48))).all()
    assert len(np.unique(boxes, axis=0)) > 15_000


def test_the_area_of_crops_is_spread_evenly():
    how = parse_augmentation("crop-flip", scale=(0.1, 0.5))  # fits at every aspect: no second try
    boxes = crop_boxes(how, drawn(50_000), *sizes(50_000, 1000, 1000))
    share = boxes[:, 2] * boxes[:, 3] / 1e6
    counts, _ = np.histogram(share, bins=8, range=(0.1, 0.5))
    assert ((counts - 6250) ** 2 / 6250).sum() < 24.3  # chi square of 7 degrees, p < 0.001


def test_an_image_that_no_box_fits_is_cropped_at_its_centre():
    how = parse_augmentation("crop-flip", scale=(1.0, 1.0))  # the whole area: too long a side
    boxes = crop_boxes(how, drawn(50), *sizes(50, 100, 10))
    assert {tuple(box) for box in boxes.tolist()} == {(43, 0, 13, 10)}  # 3 : 4


def test_each_image_of_its_own_size_gets_the_box_that_it_gets_alone():
    how, heights, widths = (
        parse_augmentation("crop-flip"),
        np.array([9, 40, 7]),
        np.array([30, 8, 7]),
    )
    together = crop_boxes(how, Draws(3, 1, np.array([5, 2, 8])), heights, widths)
    for index, row in enumerate((5, 2, 8)):
        one = slice(index, index + 1)
        alone = crop_boxes(how, Draws(3, 1, np.array([row])), heights[one], widths[one])
        assert (together[index] == alone[0]).all()


def test_holes_erase_as_often_as_asked_and_lie_inside():
    boxes = holes(parse_augmentation("none", reprob=0.3), drawn(20_000), 32, 32)[:, 0]
    erased = boxes[:, 2] > 0
    # ten tries always find a box; 4.9 standard errors of a share
    assert abs(erased.mean() - 0.3) < 4.9 * math.sqrt(0.3 * 0.7 / 20_000)
    top, left, high, wide = boxes[erased].T
    assert (top + high).max() <= 32
    assert (left + wide).max() <= 32
    assert min(top.min(), left.min()) >= 0
    assert ((high + 0.5) * (wide + 0.5) >= 0.02 * 32 * 32).all()
    assert ((high - 0.5) * (wide - 0.5) <= 32 * 32 / 3).all()


def test_the_centre_of_a_cutout_is_anywhere_and_its_square_is_clipped():
    boxes = holes(parse_augmentation("none", cutout=8), drawn(50_000), 32, 32)[:, 0]
    assert boxes.shape == (50_000, 4)
    top, left, high, wide = boxes.T
    assert (top.min(), left.min(), (top + high).max(), (left + wide).max()) == (0, 0, 32, 32)
    assert (high.min(), high.max(), wide.min(), wide.max()) == (4, 8, 4, 8)
    # 25 of the 32 places of a centre leave the square whole, along each side
    assert abs((high == 8).mean() - 25 / 32) < 4.9 * math.sqrt(25 / 32 * 7 / 32 / 50_000)


def test_hollow_images_are_0_in_their_holes_and_untouched_elsewhere():
    how = parse_augmentation("none", reprob=1.0, cutout=3)
    boxes = holes(how, drawn(40), 9, 7)
    images = noise(40, 3, 9, 7).float() + 1
    expected = images.clone()
    for image, each in zip(expected, boxes.tolist(), strict=True):
        for top, left, high, wide in each:
            image[:, top : top + high, left : left + wide] = 0
    assert torch.equal(pixels.hollow(images, boxes), expected)
    assert (expected == 0).any()


# ── pixels ───────────────────────────────────────────────────────────────────────────────────────


def test_a_crop_is_the_exact_bilinear_sum_of_a_slow_twin():
    images = noise(6, 2, 7, 5)
    boxes = crop_boxes(parse_augmentation("crop-flip"), drawn(6), *sizes(6, 7, 5))
    found = pixels.cropped(images, boxes)
    for image, (top, left, high, wide), result in zip(images, boxes.tolist(), found, strict=True):
        part = image[:, top : top + high, left : left + wide].tolist()
        for channel in range(2):
            for y in range(7):
                for x in range(5):
                    at_y = Fraction((2 * y + 1) * high, 14) - Fraction(1, 2)
                    at_x = Fraction((2 * x + 1) * wide, 10) - Fraction(1, 2)
                    y0, x0 = math.floor(at_y), math.floor(at_x)
                    total = Fraction(0)
                    for dy, share_y in ((0, 1 - (at_y - y0)), (1, at_y - y0)):
                        for dx, share_x in ((0, 1 - (at_x - x0)), (1, at_x - x0)):
                            row = min(max(y0 + dy, 0), high - 1)
                            column = min(max(x0 + dx, 0), wide - 1)
                            total += share_y * share_x * part[channel][row][column]
                    assert result[channel, y, x] == math.floor(total + Fraction(1, 2))


def test_a_crop_of_everything_changes_nothing():
    images = noise(3, 3, 8, 6)
    assert torch.equal(pixels.cropped(images, np.array([[0, 0, 8, 6]] * 3)), images)


def test_mirroring_and_shifting_are_indexing():
    images = noise(3, 1, 16, 8)
    assert torch.equal(
        pixels.mirrored(images, np.array([True, False, True])),
        torch.stack([images[0].flip(-1), images[1], images[2].flip(-1)]),
    )
    found = pixels.shifted(images, np.array([0, 2, 4]), np.array([2, 1, 0]))
    assert torch.equal(found[1], images[1])
    assert torch.equal(found[0, :, 2:, :-1], images[0, :, :-2, 1:])
    assert (found[0, :, :2] == 0).all()
    assert (found[0, :, :, -1] == 0).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["noise", "dark", "flat"])
def test_operations_on_tones_equal_pillows(kind, seed):
    images = noise(4, 3, 21, 30, seed=seed)
    if kind == "dark":
        images = images // 5 + 20
    if kind == "flat":
        images = images * 0 + 90
    for found, one in zip(apply("equalize", images, 0.3), images, strict=True):
        assert torch.equal(found, from_image(ImageOps.equalize(as_image(one))))
    for strength in (0.0, 0.3, 1.0):
        for found, one in zip(apply("solarize", images, strength), images, strict=True):
            expected = ImageOps.solarize(as_image(one), round(255 * (1 - strength)))
            assert torch.equal(found, from_image(expected))
        for found, one in zip(apply("posterize", images, strength), images, strict=True):
            expected = ImageOps.posterize(as_image(one), 8 - round(4 * strength))
            assert torch.equal(found, from_image(expected))
    for found, one in zip(apply("autocontrast", images, 0.3), images, strict=True):
        expected = from_image(ImageOps.autocontrast(as_image(one)))
        assert (found.int() - expected.int()).abs().max() <= 1  # it rounds in floating point


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("name", "pillows"),
    [
        ("color", ImageEnhance.Color),
        ("contrast", ImageEnhance.Contrast),
        ("brightness", ImageEnhance.Brightness),
        ("sharpness", ImageEnhance.Sharpness),
    ],
)
def test_enhancements_equal_pillows_to_one_level(name, pillows, strength, sign):
    images = noise(3, 3, 12, 17)
    found = apply(name, images, strength, sign)
    for result, one in zip(found, images, strict=True):
        expected = from_image(pillows(as_image(one)).enhance(1 + sign * 0.9 * strength))
        # Pillow cuts off where this rounds, and smoothes with one rounding more
        assert (result.int() - expected.int()).abs().max() <= (2 if name == "sharpness" else 1)
    if strength == 0:
        assert torch.equal(found, images)


@pytest.mark.parametrize("name", ["rotate", "shear-x", "shear-y", "translate-x", "translate-y"])
@pytest.mark.parametrize("sign", [1, -1])
def test_movements_take_the_nearest_pixel_and_fill_the_rest(name, sign):
    height, width, strength = 13, 18, 0.7
    images = noise(2, 3, height, width)
    angle = math.radians(30 * strength) * sign
    xx, xy, yx, yy, by_x, by_y = {
        "rotate": (math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle), 0, 0),
        "shear-x": (1, sign * 0.3 * strength, 0, 1, 0, 0),
        "shear-y": (1, 0, sign * 0.3 * strength, 1, 0, 0),
        "translate-x": (1, 0, 0, 1, sign * int(150 / 331 * width * strength), 0),
        "translate-y": (1, 0, 0, 1, 0, sign * int(150 / 331 * height * strength)),
    }[name]
    found = apply(name, images, strength, sign)
    filled = 0
    for y in range(height):
        for x in range(width):
            from_middle = (x - (width - 1) / 2, y - (height - 1) / 2)
            at_x = xx * from_middle[0] + xy * from_middle[1] + by_x + (width - 1) / 2
            at_y = yx * from_middle[0] + yy * from_middle[1] + by_y + (height - 1) / 2
            if min(abs(at_x % 1 - 0.5), abs(at_y % 1 - 0.5)) < 1e-3:
                continue  # between two pixels
            source_x, source_y = math.floor(at_x + 0.5), math.floor(at_y + 0.5)
            inside = 0 <= source_x < width and 0 <= source_y < height
            expected = images[:, :, source_y, source_x] if inside else FILL.expand(2, 3)
            assert torch.equal(found[:, :, y, x], expected)
            filled += not inside
    assert filled > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 1, 6, 5), (2, 3, 1, 1), (1, 3, 2, 9)])
def test_every_operation_takes_gray_and_tiny_images(name, shape):
    images = noise(*shape)
    before = images.clone()
    found = apply(name, images, 1.0)
    assert (found.shape, found.dtype) == (images.shape, torch.uint8)
    assert torch.equal(images, before)


def test_rand_augment_applies_the_operations_that_are_drawn_one_after_the_other():
    images, rand = noise(60, 3, 10, 10), RandAugment(2, 12)
    rows = np.arange(60)
    found = pixels.rand_augmented(images, rand, Draws(4, 2, rows), FILL)
    seen = set()
    for row in rows.tolist():
        one = images[row : row + 1]
        for number in range(2):
            name = NAMES[draw(4, 2, rows, OPERATION + number, len(NAMES))[row]]
            sign = 1 - 2 * int(draw(4, 2, rows, SIGN + number, 2)[row])
            one = apply(name, one, 12 / 30, sign)
            seen.add(name)
        assert torch.equal(found[row : row + 1], one)
    assert seen == set(NAMES)
    assert len(NAMES) == 14
