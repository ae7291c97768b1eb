"""What data promises: data sets in, refusals by name, batches as pure functions."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from kdsurgeon.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BadImage,
    Batches,
    Dataset,
    Split,
    decoding,
    load,
)
from kdsurgeon.data.batches import draw
from kdsurgeon.data.sets import moments
from kdsurgeon.errors import DataError, ResourceError, SurgeonError, UsageError

# ------------------------------------------------------------------------------------ builders


def picture(size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def class_folders(
    root: Path, *classes: str, count: int = 5, size: tuple[int, int] = (8, 8), mode: str = "RGB"
) -> Path:
    for number, name in enumerate(classes):
        for i in range(count):
            save(picture(size, mode, seed=100 * number + i), root / name / f"{i}.png")
    return root


def npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def dataset(images: np.ndarray, num_classes: int = 2) -> Dataset:
    channels = images.shape[3]
    labels = np.arange(len(images)) % num_classes
    names = tuple(map(str, range(num_classes)))
    return Dataset("made", images, labels, names, (0.0,) * channels, (1.0,) * channels)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def raw(x: torch.Tensor) -> np.ndarray:
    """Normalised pixels of ``dataset`` back as uint8."""
    return np.rint(x.numpy() * 255).astype(np.uint8)


def one_image(folder: Path, content: Image.Image | bytes, name: str, **options: object) -> Split:
    """A loaded folder whose class "a" trains on this image alone."""
    for part, label in (("train", "b"), ("val", "a"), ("val", "b")):
        save(picture(), folder / part / label / "0.png")
    path = folder / "train" / "a" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(content, path)
    return load(folder, **options)


# -------------------------------------------------------------------------------------- digits


def test_the_digits_are_1797_scans_of_which_450_validate():
    split = load("digits")
    assert (len(split.train), len(split.val)) == (1347, 450)
    labels = np.concatenate([split.train.labels, split.val.labels])
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert split.train.input_size == (1, 8, 8)
    assert split.train.class_names == tuple("0123456789")
    assert split.train.scale == 16
    assert split.train.images.max() == 16
    assert split.bad == ()


def test_every_digit_validates_in_proportion():
    split = load("digits")
    counts = np.bincount(split.train.labels) + np.bincount(split.val.labels)
    assert (abs(np.bincount(split.val.labels) - counts / 4) < 1).all()


def test_the_split_depends_on_the_seed_and_on_nothing_else():
    first, again, other = load("digits", seed=3), load("digits", seed=3), load("digits", seed=4)
    assert (first.val.images == again.val.images).all()
    assert (first.val.images != other.val.images).any()
    assert first.fingerprint == again.fingerprint == other.fingerprint


def test_the_default_split_of_the_digits_never_changes():
    digest = hashlib.sha256(load("digits").val.images.tobytes()).hexdigest()
    assert digest[:16] == "44d04397ad4e5fd4"


def test_the_training_part_is_normalised_to_mean_0_and_deviation_1():
    split = load("digits")
    x = split.train.samples().double()
    assert x.mean().item() == pytest.approx(0, abs=1e-6)
    assert x.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert (split.val.mean, split.val.std) == (split.train.mean, split.train.std)


def test_digits_can_be_read_at_the_size_and_channels_of_another_network():
    split = load("digits", input_size=(3, 16, 16))
    assert split.train.input_size == (3, 16, 16)
    assert split.train.scale == 255
    assert split.train.images.max() == 255
    assert (split.train.images[..., 0] == split.train.images[..., 2]).all()
    assert "images were resized from 8×8×1 to 16×16×3." in split.notes
    assert split.fingerprint == load("digits").fingerprint


def test_a_folder_called_digits_is_read_when_written_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "digits", "a", "b")
    assert load("./digits").train.class_names == ("a", "b")
    assert load("digits").train.num_classes == 10


# ------------------------------------------------------------------------------------- folders


def test_a_folder_with_train_and_val_keeps_its_parts(tmp_path):
    class_folders(tmp_path / "train", "cat", "dog", count=3)
    class_folders(tmp_path / "val", "cat", "dog", count=2)
    split = load(str(tmp_path))
    assert split.train.class_names == ("cat", "dog")
    assert split.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert split.val.ids == ("val/cat/0.png", "val/cat/1.png", "val/dog/0.png", "val/dog/1.png")
    assert split.train.name == f"{tmp_path.name}/train"


def test_images_are_read_pixel_by_pixel_in_the_order_of_their_ids(tmp_path):
    class_folders(tmp_path, "cat", "dog", count=4)
    split = load(tmp_path)
    for part in (split.train, split.val):
        assert part.ids is not None
        for pixels, name in zip(part.images, part.ids, strict=True):
            assert (pixels == np.asarray(Image.open(tmp_path / name))).all()


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "eval", "test", "testing"])
def test_other_names_of_the_validation_part_are_known(tmp_path, name):
    class_folders(tmp_path / "train", "a", "b", count=3)
    class_folders(tmp_path / name, "a", "b", count=1)
    split = load(tmp_path)
    assert len(split.val) == 2
    assert any("serves as the validation part" in note for note in split.notes) == (
        name.startswith("test")
    )


def test_a_test_folder_beside_val_is_left_out_and_said_so(tmp_path):
    for part in ("train", "val", "test"):
        class_folders(tmp_path / part, "a", "b", count=2)
    split = load(tmp_path)
    assert split.val.ids is not None
    assert split.val.ids[0].startswith("val/")
    assert "folders left out: test." in split.notes


def test_class_folders_alone_are_split_by_class(tmp_path):
    class_folders(tmp_path, "a", "b", "c", count=10)
    split = load(tmp_path, val_split=0.3)
    assert np.bincount(split.train.labels).tolist() == [7, 7, 7]
    assert np.bincount(split.val.labels).tolist() == [3, 3, 3]
    assert not set(split.train.ids or ()) & set(split.val.ids or ())


def test_a_train_folder_alone_is_split_too(tmp_path):
    class_folders(tmp_path / "train", "a", "b", count=5)
    split = load(tmp_path)
    assert (len(split.train), len(split.val)) == (8, 2)


def test_a_class_may_be_called_train(tmp_path):
    class_folders(tmp_path, "plane", "train", count=5)
    assert load(tmp_path).train.class_names == ("plane", "train")


def test_a_class_of_one_image_keeps_it_for_training(tmp_path):
    class_folders(tmp_path, "many", count=9)
    class_folders(tmp_path, "one", count=1)
    split = load(tmp_path, val_split=0.5)
    assert np.bincount(split.train.labels).tolist() == [4, 1]
    assert split.notes[0] == "classes without a validation image: one."


def test_images_in_folders_below_a_class_belong_to_it(tmp_path):
    class_folders(tmp_path, "a", "b", count=4)
    save(picture(), tmp_path / "a" / "more" / "deep" / "x.PNG")
    split = load(tmp_path)
    assert "a/more/deep/x.PNG" in {*(split.train.ids or ()), *(split.val.ids or ())}


def test_hidden_files_are_ignored_and_other_files_counted(tmp_path):
    class_folders(tmp_path, "a", "b", count=4)
    (tmp_path / "a" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "a" / "._0.png").write_bytes(b"x")
    (tmp_path / ".git").mkdir()
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / "b" / "Thumbs.db").write_bytes(b"x")
    split = load(tmp_path)
    assert split.notes == ("other files left out: 2 (b/Thumbs.db, readme.txt).",)
    assert split.train.class_names == ("a", "b")


def test_unicode_names_are_kept(tmp_path):
    class_folders(tmp_path, "Grüße", "漢字", "🐱 cat", count=3)
    assert load(tmp_path).train.class_names == ("Grüße", "漢字", "🐱 cat")


def test_names_that_a_terminal_would_obey_are_escaped(tmp_path):
    class_folders(tmp_path, "a\x1b[31m", os.fsdecode(b"caf\xe9"), count=3)
    assert load(tmp_path).train.class_names == ("a\\x1b[31m", "caf\\udce9")


def test_a_class_without_validation_images_is_noted(tmp_path):
    class_folders(tmp_path / "train", "a", "b", "c", count=2)
    class_folders(tmp_path / "val", "a", "b", count=1)
    assert "classes without a validation image: c." in load(tmp_path).notes


def test_images_that_stand_in_both_parts_are_counted(tmp_path):
    class_folders(tmp_path / "train", "a", "b", count=3)
    class_folders(tmp_path / "val", "a", "b", count=2)
    save(picture(seed=999), tmp_path / "val" / "a" / "new.png")
    assert "4 validation images are also in the training part." in load(tmp_path).notes


def test_a_link_inside_the_folder_is_followed(tmp_path):
    class_folders(tmp_path, "a", "b", count=4)
    (tmp_path / "b" / "again.png").symlink_to(tmp_path / "a" / "0.png")
    (tmp_path / "c").symlink_to(tmp_path / "a", target_is_directory=True)
    split = load(tmp_path)
    assert split.train.class_names == ("a", "b", "c")
    assert len(split.train) + len(split.val) == 13


def test_the_data_folder_itself_may_be_a_link(tmp_path):
    class_folders(tmp_path / "real", "a", "b", count=4)
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert len(load(tmp_path / "link").train) == 6


def test_the_fingerprint_changes_with_content_names_and_classes(tmp_path):
    def fingerprint() -> str:
        return load(tmp_path, seed=len(seen)).fingerprint

    seen: list[str] = []
    class_folders(tmp_path, "a", "b", count=4)
    seen += [fingerprint()]
    (tmp_path / "readme.txt").write_text("no part of the data")
    assert fingerprint() == seen[0]
    save(picture(seed=77), tmp_path / "a" / "0.png")
    seen += [fingerprint()]
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "00.png")
    seen += [fingerprint()]
    (tmp_path / "b").rename(tmp_path / "c")
    seen += [fingerprint()]
    assert len(set(seen)) == 4


# ------------------------------------------------------------------------- size and normalisation


def test_images_are_resized_to_cover_the_target_and_cropped_at_its_centre(tmp_path):
    image = Image.new("RGB", (30, 10), "red")
    ImageDraw.Draw(image).rectangle((10, 0, 19, 9), fill="blue")
    split = one_image(tmp_path, image, "wide.png", input_size=(3, 5, 5))
    assert split.train.images.shape == (2, 5, 5, 3)
    assert (split.train.images[0, :, 1:4] == (0, 0, 255)).all()


@pytest.mark.parametrize("size", [(64, 64), (64, 48), (45, 80), (20, 30)])
def test_fitting_in_one_step_is_resizing_and_then_cropping(size):
    ramp = np.add.outer(np.arange(size[1]), np.arange(size[0])).astype(np.uint8)
    image = Image.fromarray(ramp)
    scale = max(32 / size[0], 32 / size[1])
    large = image.resize(
        (round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BILINEAR
    )
    left, top = (large.width - 32) // 2, (large.height - 32) // 2
    expected = np.asarray(large.crop((left, top, left + 32, top + 32))).astype(int)
    row = np.empty((32, 32, 1), np.uint8)
    decoding.fit_into(row, image)
    assert abs(row[..., 0].astype(int) - expected).max() <= 2


def test_an_elongated_image_costs_no_memory(tmp_path):
    split = one_image(tmp_path, picture((20_000, 1)), "thin.png", input_size=(3, 224, 224))
    assert split.train.images.shape == (2, 224, 224, 3)


def test_images_of_different_sizes_ask_for_an_input_size(tmp_path):
    with pytest.raises(DataError, match="the images differ in size") as caught:
        one_image(tmp_path, picture((9, 6)), "odd.png")
    assert "--input-size" in caught.value.notes["fix"]
    assert "6×9" in str(caught.value)
    assert "8×8" in str(caught.value)


def test_gray_images_have_one_channel_unless_three_are_asked_for(tmp_path):
    class_folders(tmp_path, "a", "b", mode="L")
    split = load(tmp_path)
    assert split.train.input_size == (1, 8, 8)
    in_colour = load(tmp_path, input_size=(3, 8, 8)).train.images
    assert in_colour.shape[3] == 3
    assert (in_colour == split.train.images).all()


def test_one_colour_image_makes_all_of_them_colour(tmp_path):
    class_folders(tmp_path, "a", "b", mode="L")
    save(picture(), tmp_path / "b" / "colour.png")
    assert load(tmp_path).train.input_size == (3, 8, 8)
    assert load(tmp_path, input_size=(1, 8, 8)).train.input_size == (1, 8, 8)


def test_colour_folders_are_normalised_as_imagenet_and_gray_ones_as_measured(tmp_path):
    colour = load(class_folders(tmp_path / "colour", "a", "b")).train
    assert (colour.mean, colour.std) == (IMAGENET_MEAN, IMAGENET_STD)
    gray = load(class_folders(tmp_path / "gray", "a", "b", mode="L")).train
    assert gray.mean == pytest.approx((gray.images.mean() / 255,))
    assert gray.std == pytest.approx((gray.images.std() / 255,))


def test_only_folders_of_colour_images_are_mirrored_by_default(tmp_path):
    assert load("digits", input_size=(3, 8, 8)).train.default_augment == "shift"
    colour = load(class_folders(tmp_path / "colour", "a", "b"))
    assert colour.train.default_augment == "shift-flip"
    gray = load(class_folders(tmp_path / "gray", "a", "b", mode="L"))
    assert gray.train.default_augment == "shift"


def test_the_callers_normalisation_wins(tmp_path):
    class_folders(tmp_path, "a", "b")
    split = load(tmp_path, mean=[0.1, 0.2, 0.3], std=[1, 2, 3])
    assert (split.val.mean, split.val.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    only_mean = load(tmp_path, mean=[0.0, 0.2, 0.3])
    assert (only_mean.val.mean, only_mean.val.std) == ((0.0, 0.2, 0.3), IMAGENET_STD)


def test_normalising_is_scaling_subtracting_the_mean_and_dividing_by_the_deviation():
    images = noise(4, 5, 6, 3)
    made = Dataset("x", images, np.array([0, 1, 0, 1]), ("a", "b"), IMAGENET_MEAN, IMAGENET_STD)
    expected = (images / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    x = made.samples(slice(1, 3))
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert x.numpy() == pytest.approx(expected[1:3].transpose(0, 3, 1, 2), abs=1e-6)


def test_moments_are_those_of_numpy_in_more_than_one_step():
    images = noise(30_000, 8, 8, 3)
    images[20_000:] //= 2  # so that a step left out shows
    measured = moments(images, 255)
    assert measured[0] == pytest.approx((images / 255).mean(axis=(0, 1, 2)))
    assert measured[1] == pytest.approx((images / 255).std(axis=(0, 1, 2)))


# --------------------------------------------------------------------------------- image modes


def palette() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


def transparent_palette() -> bytes:
    return encoded(palette(), transparency=b"\x00\x80")


def seen_through() -> bytes:
    image = Image.new("RGBA", (8, 8), (9, 9, 9, 99))
    return encoded(image, "WEBP", lossless=True, exact=True)


def turned() -> bytes:
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[274] = 6  # shown turned clockwise: then the right half is white
    return encoded(image, exif=exif)


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("#0a141e", "white", "red")]
    exact = {"lossless": True} if kind == "WEBP" else {}
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **exact)


def deep(mode: str) -> Image.Image:
    values = np.full((8, 8), 257 * 200 + 100, dtype={"I;16": "<u2", "I;16B": ">u2"}[mode])
    return Image.frombytes(mode, (8, 8), values.tobytes())


def half_white(image: np.ndarray) -> bool:
    return bool((image[:, 4:] == 255).all() and (image[:, :4] == 0).all())


ALPHA = "images whose alpha channel was dropped: 1."
FRAMES = "images of several frames, of which the first was taken: 1."
SIXTEEN = "images reduced from 16 bits to 8: 1."
MODES = [
    ("L.png", Image.new("L", (8, 8), 40), (40, 40, 40), None),
    ("LA.png", Image.new("LA", (8, 8), (40, 0)), (40, 40, 40), ALPHA),
    ("P.png", palette(), (10, 20, 30), None),
    ("P-alpha.png", transparent_palette(), (10, 20, 30), ALPHA),
    ("RGBA.png", Image.new("RGBA", (8, 8), (10, 20, 30, 0)), (10, 20, 30), ALPHA),
    ("RGBA.webp", seen_through(), (9, 9, 9), ALPHA),
    ("CMYK.tif", Image.new("CMYK", (8, 8), (255, 0, 0, 0)), (0, 255, 255),
     "images converted from CMYK: 1."),
    ("1.png", Image.new("1", (8, 8), 1), (255, 255, 255), None),
    ("I16.png", deep("I;16"), (200, 200, 200), SIXTEEN),
    ("I16.tiff", deep("I;16"), (200, 200, 200), SIXTEEN),
    ("I16B.tif", deep("I;16B"), (200, 200, 200), SIXTEEN),
    ("I16.pgm", b"P5 8 8 65535\n" + struct.pack(">H", 257 * 200) * 64, (200, 200, 200), SIXTEEN),
    ("RGB.ppm", Image.new("RGB", (8, 8), (1, 2, 3)), (1, 2, 3), None),
    ("RGB.bmp", Image.new("RGB", (8, 8), (1, 2, 3)), (1, 2, 3), None),
    ("RGB.jpg", Image.new("RGB", (8, 8), (128, 128, 128)), (128, 128, 128), None),
    ("RGB.png", encoded(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3)),
     (1, 2, 3), ALPHA),
    ("animated.gif", animation("GIF"), (10, 20, 30), FRAMES),
    ("animated.png", animation("PNG"), (10, 20, 30), FRAMES),
    ("animated.webp", animation("WEBP"), (10, 20, 30), FRAMES),
    ("pages.tif", animation("TIFF"), (10, 20, 30), FRAMES),
    ("still.gif", encoded(palette(), "GIF"), (10, 20, 30), None),
    ("png-called.jpg", encoded(Image.new("RGB", (8, 8), (1, 2, 3))), (1, 2, 3), None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "pixel", "note"), MODES, ids=[m[0] for m in MODES])
def test_every_kind_of_image_becomes_eight_bit_rgb(tmp_path, name, content, pixel, note):
    split = one_image(tmp_path, content, name, input_size=(3, 8, 8))
    assert (split.train.images[0] == pixel).all()
    assert [line for line in split.notes if "images" in line and "validation" not in line] == (
        [note] if note else []
    )


@pytest.mark.parametrize(("name", "content", "pixel", "note"), MODES, ids=[m[0] for m in MODES])
def test_every_kind_of_image_becomes_gray_when_asked(tmp_path, name, content, pixel, note):
    split = one_image(tmp_path, content, name, input_size=(1, 8, 8))
    expected = np.dot(pixel, (0.299, 0.587, 0.114))
    assert abs(split.train.images[0].astype(float) - expected).max() <= 1


def test_exif_orientation_turns_the_image_upright(tmp_path):
    split = one_image(tmp_path, turned(), "turned.jpg")
    assert half_white(split.train.images[0])
    assert "images turned upright by EXIF orientation: 1." in split.notes


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone_as_pillow_undoes_it(tmp_path, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[274] = orientation
    content = encoded(picture((8, 8), seed=5), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    split = one_image(tmp_path, content, "turned.png")
    assert (split.train.images[0] == np.asarray(expected)).all()


def test_damaged_exif_data_does_not_cost_the_image(tmp_path):
    content = encoded(Image.new("RGB", (8, 8), "white"), "PNG", exif=b"no TIFF header")
    split = one_image(tmp_path, content, "x.png")
    assert (split.train.images[0] == 255).all()
    assert "images with damaged EXIF data, taken as upright: 1." in split.notes


# ---------------------------------------------------------------------------------- bad images


def bomb() -> bytes:
    """A PNG whose header announces 30,000 × 30,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def small_bomb() -> bytes:
    """Above Pillow's limit, but not twice, where Pillow itself only warns."""
    return bomb().replace(struct.pack(">II", 30_000, 30_000), struct.pack(">II", 10_000, 10_000), 1)


def with_right_crc(png: bytes) -> bytes:
    return png[:29] + struct.pack(">I", zlib.crc32(png[12:29])) + png[33:]


BAD = [
    ("empty.png", b"", "empty, 0 bytes"),
    ("page.jpg", b"<!DOCTYPE html><html></html>", 'begins "<!DOCTYPE html><html></h"'),
    ("pointer.png", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
    ("cut.jpg", encoded(picture((64, 64)), "JPEG")[:-900], "truncated"),
    ("cut.png", encoded(picture((64, 64)))[:-2000], "truncated|broken"),
    ("bomb.png", with_right_crc(bomb()), "more than 89,478,485 pixels"),
    ("limit.png", with_right_crc(small_bomb()), "10,000×10,000, more than 89,478,485 pixels"),
    ("float.tif", Image.new("F", (8, 8), 0.5), "32 bits per pixel"),
    ("int.tif", Image.new("I", (8, 8), 7), "32 bits per pixel"),
    ("icon.png", encoded(picture((16, 16)), "ICO"), "not a readable image"),
    ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a readable image"),
]


@pytest.mark.parametrize(("name", "content", "reason"), BAD, ids=[b[0] for b in BAD])
def test_a_bad_image_stops_the_load_and_is_named_with_its_reason(tmp_path, name, content, reason):
    if not isinstance(content, bytes):
        content = encoded(content, "TIFF")
    with pytest.raises(DataError, match="1 of 4 images cannot be read") as caught:
        one_image(tmp_path, content, name, input_size=(3, 8, 8))
    assert caught.value.exit_code == 4
    where = caught.value.notes["where"]
    assert where.startswith(f"train/a/{name}: ")
    assert re.search(reason, where), where
    assert caught.value.notes["fix"].endswith("--max-bad-images 1")


def test_a_header_with_a_wrong_checksum_is_a_bad_image(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        one_image(tmp_path, small_bomb(), "x.png")


def test_bad_images_within_the_limit_are_left_out_by_name(tmp_path):
    class_folders(tmp_path / "train", "a", "b", count=4)
    class_folders(tmp_path / "val", "a", "b", count=2)
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"nonsense")
    (tmp_path / "val" / "b" / "0.png").write_bytes(b"")
    split = load(tmp_path, max_bad_images=2)
    assert split.bad == (
        BadImage("train/a/1.png", 'not a readable image; it begins "nonsense"'),
        BadImage("val/b/0.png", "empty, 0 bytes"),
    )
    assert "unreadable images left out: 2." in split.notes
    assert split.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert split.train.ids is not None
    for pixels, name in zip(split.train.images, split.train.ids, strict=True):
        assert (pixels == np.asarray(Image.open(tmp_path / name))).all()
    with pytest.raises(DataError, match=r"2 of 12 images cannot be read") as caught:
        load(tmp_path, max_bad_images=1)
    assert "--max-bad-images 2" in caught.value.notes["fix"]


def test_the_other_images_keep_their_part_when_one_is_bad(tmp_path):
    class_folders(tmp_path, "a", "b", count=10)
    before = load(tmp_path)
    (tmp_path / "a" / "3.png").write_bytes(b"nonsense")
    after = load(tmp_path, max_bad_images=1)
    assert set(before.train.ids or ()) - {"a/3.png"} == set(after.train.ids or ()) - {"a/3.png"}
    assert before.fingerprint != after.fingerprint


def test_many_bad_images_are_counted_and_the_first_few_shown(tmp_path):
    class_folders(tmp_path, "a", "b", count=10)
    for i in range(8):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="8 of 20 images") as caught:
        load(tmp_path, max_bad_images=7)
    lines = caught.value.notes["where"].splitlines()
    assert len(lines) == 6
    assert lines[-1] == "… and 3 more"


def test_a_first_image_that_is_bad_does_not_set_the_size(tmp_path):
    class_folders(tmp_path, "a", "b", count=5, size=(7, 5))
    (tmp_path / "a" / "0.png").write_bytes(b"nonsense")
    assert load(tmp_path, max_bad_images=1).train.input_size == (3, 5, 7)


def test_a_dangling_link_and_a_pipe_are_bad_images(tmp_path):
    class_folders(tmp_path, "a", "b", count=5)
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    bad = load(tmp_path, max_bad_images=2).bad
    assert {image.path: image.reason for image in bad} == {
        "a/gone.png": "No such file or directory",
        "b/pipe.png": "not a regular file",
    }


def test_a_file_too_large_to_be_an_image_is_not_read(tmp_path):
    class_folders(tmp_path, "a", "b", count=5)
    with (tmp_path / "a" / "huge.png").open("wb") as file:
        file.truncate(decoding.MAX_FILE_BYTES + 1)
    (bad,) = load(tmp_path, max_bad_images=1).bad
    assert bad == BadImage("a/huge.png", "268,435,457 bytes, more than 268,435,456")


def test_images_that_are_all_bad_cannot_be_allowed(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(DataError, match="4 of 4 images cannot be read") as caught:
        load(tmp_path, max_bad_images=99)
    assert caught.value.notes["fix"] == "repair or remove them"


def test_a_class_whose_images_are_all_bad_is_named(tmp_path):
    class_folders(tmp_path / "train", "a", "b", count=1)
    class_folders(tmp_path / "val", "a", "b", count=1)
    (tmp_path / "train" / "b" / "0.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="no training image of b can be read"):
        load(tmp_path, max_bad_images=1)


def test_a_validation_part_whose_images_are_all_bad_is_empty(tmp_path):
    class_folders(tmp_path / "train", "a", "b", count=2)
    class_folders(tmp_path / "val", "a", count=1)
    (tmp_path / "val" / "a" / "0.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="the validation part is empty"):
        load(tmp_path, max_bad_images=1)


def test_mangled_images_never_end_in_a_foreign_exception(tmp_path):
    generator = np.random.default_rng(0)
    sources = [
        encoded(picture((16, 16)), kind) for kind in ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF")
    ]
    class_folders(tmp_path, "a", "b", count=1, size=(16, 16))
    for number in range(240):
        content = bytearray(sources[number % 6])
        for place in generator.integers(0, len(content), 4):
            content[place] ^= 1 << generator.integers(8)
        (tmp_path / "a" / f"{number}.png").write_bytes(content[: generator.integers(1, 4000)])
    split = load(tmp_path, max_bad_images=300, input_size=(3, 16, 16))
    assert len(split.bad) + len(split.train) + len(split.val) == 242 - 1
    assert len(split.bad) > 50
    assert all(image.reason.isprintable() for image in split.bad)


# ------------------------------------------------------------------------------ folders refused


def put_file(root: Path) -> None:
    (root / "a").mkdir()
    (root / "a" / "readme.txt").write_text("x")


def link_outside(root: Path) -> None:
    class_folders(root, "a", "b")
    outside = save(picture(), root.parent / f"{root.name}-outside" / "secret.png")
    (root / "a" / "link.png").symlink_to(outside)


def link_folder_outside(root: Path) -> None:
    class_folders(root, "a", "b")
    (root / "c").symlink_to(root.parent, target_is_directory=True)


def link_upwards(root: Path) -> None:
    class_folders(root, "a", "b")
    (root / "a" / "loop").symlink_to(root / "a", target_is_directory=True)


def val_without_train(root: Path) -> None:
    class_folders(root / "val", "a", "b")


def foreign_class(root: Path) -> None:
    class_folders(root / "train", "cat", "dog")
    class_folders(root / "val", "cat", "cow")


def empty_class(root: Path) -> None:
    class_folders(root, "a", "b")
    (root / "c").mkdir()


def empty_val(root: Path) -> None:
    class_folders(root / "train", "a", "b")
    (root / "val" / "a").mkdir(parents=True)


def two_vals(root: Path) -> None:
    for part in ("train", "val", "validation"):
        class_folders(root / part, "a", "b")


def black(root: Path) -> None:
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        save(Image.new("L", (8, 8)), root / name)


FOLDERS: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: None, "data has no class folders"),
    (lambda root: (root / "readme.txt").write_text("x"), "data has no class folders"),
    (lambda root: (root / "a").mkdir(), "data has no images"),
    (put_file, "data has no images"),
    (lambda root: save(picture(), root / "0.png"), "the images of data lie directly in it"),
    (lambda root: class_folders(root, "cat"), "there is one class only, cat"),
    (lambda root: class_folders(root, "a", "b", count=1), "no image can be spared for validation"),
    (empty_class, "data has class folders without an image: c"),
    (empty_val, "val has no images"),
    (foreign_class, "has classes without training images: cow"),
    (val_without_train, "data has a folder val, but no folder train beside it"),
    (two_vals, "data has val, validation, which name the same part"),
    (link_outside, "a/link.png is a link that leaves the data folder"),
    (link_folder_outside, "c is a link that leaves the data folder"),
    (link_upwards, "a/loop is a link to a folder that it lies in"),
    (black, "all training pixels of channel 0 are equal"),
]


@pytest.mark.parametrize(("build", "message"), FOLDERS, ids=[message for _, message in FOLDERS])
def test_a_folder_that_is_no_data_set_is_refused(tmp_path, build, message):
    root = tmp_path / "data"
    root.mkdir()
    build(root)
    with pytest.raises(DataError, match=message) as caught:
        load(root)
    assert caught.value.exit_code == 4


def test_a_folder_that_may_not_be_read_is_a_matter_of_permission(tmp_path, monkeypatch):
    def refuse(folder: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    class_folders(tmp_path, "a", "b")
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ResourceError, match="cannot be read") as caught:
        load(tmp_path)
    assert caught.value.exit_code == 6
    assert caught.value.notes["why"] == "Permission denied"


def test_a_missing_source_is_refused_and_digits_suggested(tmp_path):
    with pytest.raises(DataError, match=r"digts does not exist\.") as caught:
        load("digts")
    assert caught.value.notes["fix"] == 'did you mean "digits"?'
    assert caught.value.exit_code == 4
    with pytest.raises(DataError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


# ------------------------------------------------------------------------------ memory and disk


def test_large_folders_are_decoded_into_a_file_without_a_name(tmp_path, monkeypatch):
    class_folders(tmp_path / "data", "a", "b", count=6)
    (tmp_path / "data" / "a" / "0.png").write_bytes(b"nonsense")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    expected = load(tmp_path / "data", max_bad_images=1)
    monkeypatch.setattr(decoding, "RAM_BYTES", 100)
    split = load(tmp_path / "data", max_bad_images=1)
    assert isinstance(split.train.images, np.memmap)
    assert (split.train.images == expected.train.images).all()
    assert not list((tmp_path / "tmp").iterdir())
    x, _ = next(iter(Batches(split.train, 4, shuffle=True, seed=0)))
    y, _ = next(iter(Batches(expected.train, 4, shuffle=True, seed=0)))
    assert torch.equal(x, y)


def test_a_full_disk_is_noticed_before_anything_is_decoded(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class_folders(tmp_path, "a", "b")
    monkeypatch.setattr(decoding, "RAM_BYTES", 100)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="do not fit into the temporary folder") as caught:
        load(tmp_path)
    assert caught.value.exit_code == 6
    assert caught.value.notes["why"] == "No space left on device"


def test_a_lack_of_memory_is_said_so(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError

    class_folders(tmp_path, "a", "b")
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "allocate", fail)
        with pytest.raises(ResourceError, match="not enough memory to load"):
            load(tmp_path)
    monkeypatch.setattr(decoding, "_open", fail)
    with pytest.raises(ResourceError, match=r"not enough memory to decode a/\d.png"):
        load(tmp_path)


def test_running_out_of_file_handles_is_no_fault_of_an_image(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    class_folders(tmp_path, "a", "b")
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(ResourceError, match="the system ran out of files or memory"):
        load(tmp_path)


# ----------------------------------------------------------------------------------------- npz

LABELS = np.arange(20) % 2


def test_arrays_of_images_and_labels_are_split_by_class(tmp_path):
    images = noise(20, 6, 5, 3)
    split = load(npz(tmp_path / "x.npz", images=images, labels=LABELS))
    assert (len(split.train), len(split.val)) == (16, 4)
    assert np.bincount(split.val.labels).tolist() == [2, 2]
    assert split.train.input_size == (3, 6, 5)
    assert split.train.class_names == ("0", "1")
    assert split.train.ids is None
    rows = {pixels.tobytes(): label for pixels, label in zip(images, LABELS, strict=True)}
    for part in (split.train, split.val):
        assert [rows[pixels.tobytes()] for pixels in part.images] == part.labels.tolist()


@pytest.mark.parametrize("keys", [("x", "y"), ("X", "y"), ("X", "Y"), ("x_train", "y_train")])
def test_other_names_of_images_and_labels_are_known(tmp_path, keys):
    arrays = dict(zip(keys, (noise(20, 6, 6), LABELS), strict=True))
    assert len(load(npz(tmp_path / "x.npz", **arrays)).val) == 4


def test_parts_named_as_keras_names_them_are_kept(tmp_path):
    split = load(
        npz(
            tmp_path / "mnist.npz",
            x_train=noise(20, 6, 6),
            y_train=LABELS.astype(np.uint8),
            x_test=noise(4, 6, 6),
            y_test=LABELS[:4].astype(np.uint8),
        )
    )
    assert (len(split.train), len(split.val)) == (20, 4)
    assert split.notes == (
        '"x_test" serves as the validation part.',
        "4 validation images are also in the training part.",
    )


def test_parts_named_as_medmnist_names_them_are_kept(tmp_path):
    parts = {}
    for part, count in (("train", 20), ("val", 6), ("test", 4)):
        parts[f"{part}_images"] = noise(count, 6, 6, 3)
        parts[f"{part}_labels"] = LABELS[:count, None]
    split = load(npz(tmp_path / "x.npz", **parts))
    assert (len(split.train), len(split.val)) == (20, 6)
    assert '"test_images" was left out.' in split.notes


def test_every_layout_and_range_reads_as_the_same_images(tmp_path):
    images = noise(20, 6, 5, 3)
    first = images.transpose(0, 3, 1, 2)
    variants = [
        images,
        first,
        images.astype(np.int64),
        images.astype(np.float32),
        images / 255,
        (first / 255).astype(">f4"),
        np.asfortranarray(images),
        (images - 0.4).clip(0),
    ]
    splits = [
        load(npz(tmp_path / f"{i}.npz", images=variant, labels=LABELS))
        for i, variant in enumerate(variants)
    ]
    for split in splits:
        assert (split.train.images == splits[0].train.images).all()
        assert split.fingerprint == splits[0].fingerprint
    gray = load(npz(tmp_path / "gray.npz", images=noise(20, 1, 6, 5), labels=LABELS))
    assert gray.train.input_size == (1, 6, 5)


def test_an_input_size_settles_a_layout_that_can_be_read_in_two_ways(tmp_path):
    path = npz(tmp_path / "x.npz", images=noise(20, 3, 6, 1), labels=LABELS)
    with pytest.raises(DataError, match=r"the layout of images, 20×3×6×1, can be read in two ways"):
        load(path)
    assert load(path, input_size=(3, 6, 1)).train.images.shape[1:] == (6, 1, 3)
    assert load(path, input_size=(1, 3, 6)).train.images.shape[1:] == (3, 6, 1)


def test_class_names_are_read_from_the_file(tmp_path):
    arrays = {"images": noise(20, 6, 6), "labels": LABELS}
    names = load(npz(tmp_path / "x.npz", class_names=["ja", "nein"], **arrays)).train.class_names
    assert names == ("ja", "nein")
    split = load(npz(tmp_path / "y.npz", class_names=[b"ja", b"nein", b"nie"], **arrays))
    assert split.train.class_names == ("ja", "nein", "nie")
    assert split.notes == ("classes without any image: nie.",)


def test_arrays_are_resized_as_files_are(tmp_path):
    path = npz(tmp_path / "x.npz", images=noise(20, 6, 8, 3), labels=LABELS)
    split = load(path, input_size=(1, 4, 4))
    own = load(path)
    expected = np.empty((4, 4, 1), np.uint8)
    decoding.fit_into(expected, Image.fromarray(own.train.images[0]).convert("L"))
    assert (split.train.images[0] == expected).all()


IMAGES = noise(20, 6, 6)
ARRAYS: list[tuple[dict[str, object], str]] = [
    ({}, "has no images with labels"),
    ({"images": IMAGES}, "has no images with labels"),
    ({"pictures": IMAGES, "labels": LABELS}, "has no images with labels"),
    ({"images": IMAGES, "labels": LABELS[:7]}, "labels has 7 labels for 20 images"),
    ({"images": IMAGES, "labels": LABELS * 0}, "there is one class only, 0"),
    ({"images": IMAGES, "labels": LABELS * 2}, "the labels go up to 2, but 2 of them occur"),
    ({"images": IMAGES, "labels": LABELS + 1}, "the labels go up to 2, but 2 of them occur"),
    ({"images": IMAGES, "labels": LABELS * 2**60}, "the labels go up to 1152921504606846976"),
    ({"images": IMAGES, "labels": LABELS - 1}, "runs from -1 to 0, not from 0 to K-1"),
    ({"images": IMAGES, "labels": LABELS / 1}, "float64 of shape 20, not one integer per image"),
    ({"images": IMAGES, "labels": np.eye(20, dtype=int)}, "int64 of shape 20×20, not one integer"),
    ({"images": IMAGES, "labels": 3}, "not one integer per image"),
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, "images is empty"),
    ({"images": IMAGES[0], "labels": LABELS[:6]}, "layout of images, 6×6, is not that of images"),
    ({"images": noise(20, 6, 6, 4), "labels": LABELS}, "20×6×6×4, is not that of images"),
    ({"images": 3, "labels": 3}, "the layout of images, one number, is not that of images"),
    ({"images": IMAGES > 9, "labels": LABELS}, "images is bool of shape 20×6×6, not numbers"),
    ({"images": IMAGES * 1j, "labels": LABELS}, "images is complex128"),
    ({"images": IMAGES - 1000.5, "labels": LABELS}, "images runs from -1000.5 to"),
    ({"images": IMAGES.astype(int) * 257, "labels": LABELS}, "images runs from .* to 6"),
    (
        {"images": np.full((20, 6, 6), np.nan), "labels": LABELS},
        "images has values that are not finite",
    ),
    ({"images": IMAGES * 0, "labels": LABELS}, "all training pixels of channel 0 are equal"),
    (
        {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:, 1:], "y_test": LABELS},
        "x_train is uint8 of shape 20×6×6, but x_test is uint8 of shape 20×5×6",
    ),
    (
        {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES, "y_test": LABELS + 1},
        "the validation part has classes without training images: 2",
    ),
    (
        {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:0], "y_test": LABELS[:0]},
        "x_test is empty",
    ),
    ({"images": IMAGES, "labels": LABELS, "class_names": ["a"]}, "class_names has 1"),
    ({"images": IMAGES, "labels": LABELS, "class_names": ["a", "a"]}, "class_names repeats a name"),
    ({"images": IMAGES, "labels": LABELS, "class_names": [1, 2]}, "not a list of texts"),
    ({"images": IMAGES[:2], "labels": LABELS[:2]}, "no image can be spared for validation"),
]


@pytest.mark.parametrize(("arrays", "message"), ARRAYS, ids=[message for _, message in ARRAYS])
def test_arrays_that_are_no_data_set_are_refused(tmp_path, arrays, message):
    path = npz(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith("x.npz")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz") as caught:
        load(path)
    assert caught.value.exit_code == 4


def test_an_npz_of_objects_is_refused_unread(tmp_path):
    path = npz(tmp_path / "x.npz", images=np.array([None]), labels=LABELS)
    with pytest.raises(DataError, match=r"x\.npz"):
        load(path)


# ----------------------------------------------------------------------------------- arguments

ARGUMENTS: list[tuple[dict[str, object], str]] = [
    ({"val_split": 0.0}, "val_split is 0.0; it must lie between 0 and 1"),
    ({"val_split": 1.0}, "val_split is 1.0"),
    ({"val_split": float("nan")}, "val_split is nan"),
    ({"seed": -1}, "the seed is -1"),
    ({"input_size": (2, 8, 8)}, "is not channels"),
    ({"input_size": (8, 8)}, "is not channels"),
    ({"input_size": (3, 0, 8)}, "is not channels"),
    ({"input_size": (3, 10_000, 10_000)}, "more than 89,478,485 pixels"),
    ({"max_bad_images": -1}, "max_bad_images is -1"),
    ({"mean": (0.1, 0.2)}, "mean has 2 numbers; the images of digits have 1 channel"),
    ({"std": (0.1, 0.2, 0.3)}, "std has 3 numbers"),
    ({"mean": (float("nan"),)}, "mean is .*; it must be finite"),
    ({"std": (0.0,)}, "std is .*; it must be finite and above 0"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=[m for _, m in ARGUMENTS])
def test_an_argument_that_makes_no_sense_is_a_usage_error(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        load("digits", **arguments)
    assert caught.value.exit_code == 2


TWO = np.zeros((2, 4, 4, 1), np.uint8)
ONES = np.array([0, 1])
DATASETS: list[tuple[tuple[object, ...], str]] = [
    ((TWO[0], ONES, ("a", "b"), (0.0,), (1.0,)), "not uint8"),
    ((TWO / 1, ONES, ("a", "b"), (0.0,), (1.0,)), "not uint8"),
    ((TWO[:0], ONES[:0], ("a", "b"), (0.0,), (1.0,)), "not uint8"),
    ((TWO, ONES[:1], ("a", "b"), (0.0,), (1.0,)), "not int64"),
    ((TWO, ONES / 1, ("a", "b"), (0.0,), (1.0,)), "not int64"),
    ((TWO, ONES + 1, ("a", "b"), (0.0,), (1.0,)), "labels run from 1 to 2"),
    ((TWO, ONES, ("a", "b"), (0.0, 0.0), (1.0,)), "need 1 numbers each"),
    ((TWO, ONES, ("a", "b"), (0.0,), (0.0,)), "above 0"),
]


@pytest.mark.parametrize(("fields", "message"), DATASETS)
def test_a_dataset_that_contradicts_itself_cannot_be_built(fields, message):
    with pytest.raises(DataError, match=message):
        Dataset("made", *fields)


# ------------------------------------------------------------------------------------- batches


def epoch(batches: Batches, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole epoch in the order served."""
    batches.set_epoch(number)
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


def test_an_epoch_serves_every_image_once_with_its_label():
    split = load("digits")
    batches = Batches(split.train, 64, shuffle=True, seed=0)
    x, y = epoch(batches)
    order = batches.order()
    assert sorted(order.tolist()) == list(range(1347))
    assert torch.equal(x, split.train.samples(order))
    assert y.tolist() == split.train.labels[order].tolist()
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert batches.rows(2).tolist() == order[128:192].tolist()


def test_without_shuffling_the_order_is_that_of_the_data():
    made = dataset(noise(10, 4, 4, 1))
    _, y = epoch(Batches(made, 3, shuffle=False, seed=0), 5)
    assert y.tolist() == made.labels.tolist()


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    made = dataset(noise(100, 4, 4, 1))

    def order(seed: int, number: int) -> list[int]:
        batches = Batches(made, 7, shuffle=True, seed=seed)
        batches.set_epoch(number)
        return batches.order().tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, number)) for seed in range(4) for number in range(4)}) == 16


def test_order_and_augmentation_never_change():
    batches = Batches(load("digits").train, 64, shuffle=True, seed=1, augment="shift-flip")
    batches.set_epoch(2)
    assert batches.order()[:6].tolist() == [969, 641, 287, 1162, 876, 1175]
    rows = np.arange(6)
    assert draw(1, 2, rows, 0, 9).tolist() == [4, 0, 2, 0, 7, 1]


def test_augmentation_does_not_depend_on_the_batch_or_on_the_place_in_it():
    made = dataset(noise(50, 8, 8, 3))
    wide = Batches(made, 50, shuffle=True, seed=3, augment="shift-flip")
    narrow = Batches(made, 7, shuffle=True, seed=3, augment="shift-flip")
    sorted_ = Batches(made, 9, shuffle=False, seed=3, augment="shift-flip")
    x, _ = epoch(wide, 4)
    assert torch.equal(x, epoch(narrow, 4)[0])
    assert torch.equal(x, epoch(sorted_, 4)[0][torch.from_numpy(wide.order())])
    assert not torch.equal(epoch(sorted_, 4)[0], epoch(sorted_, 5)[0])


def test_augmentation_does_not_depend_on_the_global_random_state():
    batches = Batches(load("digits").train, 64, shuffle=True, seed=0, augment="shift-flip")
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    x, _ = epoch(batches)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(x, epoch(batches)[0])


@pytest.mark.parametrize("augment", ["none", "shift", "shift-flip"])
def test_augmented_images_equal_those_of_a_slow_twin(augment):
    made = dataset(noise(40, 16, 8, 3))
    x, _ = epoch(Batches(made, 6, shuffle=False, seed=5, augment=augment), 3)
    rows = np.arange(40)
    down, right = draw(5, 3, rows, 0, 5), draw(5, 3, rows, 1, 3)
    mirrored = draw(5, 3, rows, 2, 2)
    for row in rows:
        expected = made.images[row]
        if augment != "none":
            padded = np.pad(expected, ((2, 2), (1, 1), (0, 0)))
            expected = padded[down[row] : down[row] + 16, right[row] : right[row] + 8]
        if augment == "shift-flip" and mirrored[row]:
            expected = expected[:, ::-1]
        assert (raw(x[row]) == expected.transpose(2, 0, 1)).all()


def test_shifted_images_are_padded_with_black_before_normalisation():
    white = np.full((200, 8, 8, 1), 255, np.uint8)
    made = Dataset("white", white, np.arange(200) % 2, ("a", "b"), (0.5,), (0.25,))
    x, _ = epoch(Batches(made, 200, shuffle=False, seed=0, augment="shift"))
    assert set(x.unique().tolist()) == {-2.0, 2.0}


def test_every_shift_is_equally_frequent_and_every_second_image_mirrored():
    rows = np.arange(90_000)
    for use, bound in ((0, 9), (1, 9), (2, 2)):
        counts = np.bincount(draw(0, 0, rows, use, bound), minlength=bound)
        assert len(counts) == bound
        expected = len(rows) / bound
        assert ((counts - expected) ** 2 / expected).sum() < 30  # chi square, p < 0.001
    pairs = draw(0, 0, rows, 0, 3) * 3 + draw(0, 0, rows, 1, 3)
    assert abs(np.bincount(pairs) - 10_000).max() < 500


def test_seeds_and_epochs_do_not_stand_in_for_each_other():
    rows = np.arange(64)
    draws = {
        draw(seed, number, rows, use, 2**31).tobytes()
        for seed in range(6)
        for number in range(6)
        for use in range(3)
    }
    assert len(draws) == 108
    assert not (draw(0, 0, rows[1:], 0, 2**31) == draw(0, 1, rows[:-1], 0, 2**31)).any()


def test_a_pass_can_start_at_any_batch_and_only_that_pass():
    made = dataset(noise(20, 4, 4, 1))
    batches = Batches(made, 6, shuffle=True, seed=0, augment="shift")
    whole = [x for x, _ in batches]
    batches.start_at(2)
    rest = [x for x, _ in batches]
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[2:], strict=True))
    assert len(list(batches)) == len(batches) == 4
    batches.start_at(4)
    assert list(batches) == []
    with pytest.raises(UsageError, match="an epoch has 4 batches; it cannot start at 5"):
        batches.start_at(5)


def test_a_pass_keeps_its_epoch_when_the_next_is_set_meanwhile():
    batches = Batches(dataset(noise(20, 8, 8, 1)), 5, shuffle=True, seed=0, augment="shift")
    expected = [x for x, _ in batches]
    running = iter(batches)
    batches.set_epoch(1)
    assert all(torch.equal(a, b[0]) for a, b in zip(expected, running, strict=True))


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [6, 6, 6, 2]), (True, [6, 6, 6])])
def test_the_last_batch_is_short_or_left_out(drop_last, sizes):
    made = dataset(noise(20, 4, 4, 1))
    batches = Batches(made, 6, shuffle=True, seed=0, drop_last=drop_last)
    assert [len(y) for _, y in batches] == sizes
    assert len(batches) == len(sizes)


BATCHES: list[tuple[dict[str, object], str]] = [
    ({"batch_size": 0}, "a batch size of 0 makes no batch of 20 images"),
    ({"batch_size": 21, "drop_last": True}, "a batch size of 21 makes no batch"),
    ({"batch_size": 4, "augment": "shifted"}, 'no augmentation is called "shifted"'),
    ({"batch_size": 4, "seed": -3}, "the seed is -3"),
]


@pytest.mark.parametrize(("arguments", "message"), BATCHES, ids=[m for _, m in BATCHES])
def test_batches_that_cannot_be_made_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        Batches(dataset(noise(20, 4, 4, 1)), **{"shuffle": True, "seed": 0, **arguments})
    assert caught.value.exit_code == 2


def test_changing_a_batch_changes_no_data():
    made = dataset(noise(4, 4, 4, 1))
    before = made.images.copy(), made.labels.copy()
    for x, y in Batches(made, 4, shuffle=False, seed=0):
        x.zero_()
        y.zero_()
    assert (made.images == before[0]).all()
    assert (made.labels == before[1]).all()


def test_every_refusal_prints_what_where_and_how_to_mend_it(tmp_path):
    class_folders(tmp_path / "data", "a", "b", count=4)
    (tmp_path / "data" / "a" / "0.png").write_bytes(b"")
    with pytest.raises(SurgeonError) as caught:
        load(tmp_path / "data")
    assert str(caught.value) == (
        "data: 1 of 8 images cannot be read.\n"
        "  where: a/0.png: empty, 0 bytes\n"
        "  fix:   repair or remove them, or leave them out: --max-bad-images 1"
    )
