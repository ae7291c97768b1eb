"""What the CIFAR-100 bench promises: the published networks, data from official and packed files,
the published recipe."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import warnings
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from kdsurgeon_plugins import cifar, cifar_networks
from kdsurgeon_plugins.cifar_networks import NETWORKS, build
from PIL import Image
from torch import nn

from kdsurgeon import UsageError, certify, forecast, partition, trace
from kdsurgeon.costs import node_costs, total
from kdsurgeon.errors import SurgeonError
from kdsurgeon.recipe import read_config
from kdsurgeon.training import learning_rate_at

RECIPE = Path(__file__).parent.parent / "benchmarks" / "recipes" / "cifar100.yaml"

# ------------------------------------------------------------------------------------ networks

PUBLISHED = {  # millions of parameters and of multiply-adds, to the digits that are printed
    "resnet8x4": ("1.234", "177"),
    "resnet32x4": ("7.434", "1083"),
    "wrn_16_2": ("0.703", "101"),
    "vgg8": ("3.965", "96"),
    "mobilenetv2": ("0.813", "6.5"),
    "shufflenetv2": ("1.356", "44.5"),
}
EXACT = {  # parameters, multiply-adds of convolutions and matrix products
    "resnet8": (83_892, 12_507_392),
    "resnet20": (278_324, 40_818_944),
    "resnet32": (472_756, 69_130_496),
    "resnet56": (861_620, 125_753_600),
    "resnet110": (1_736_564, 253_155_584),
    "resnet8x4": (1_233_540, 177_071_104),
    "resnet32x4": (7_433_860, 1_083_040_768),
    "resnet50": (23_705_252, 1_298_014_208),
    "wrn_16_2": (703_284, 101_118_464),
    "wrn_40_1": (569_780, 83_286_272),
    "wrn_40_2": (2_255_156, 327_610_880),
    "vgg8": (3_965_028, 96_192_512),
    "vgg13": (9_462_180, 284_936_192),
    "mobilenetv2": (812_836, 6_523_648),
    "shufflenetv2": (1_355_528, 44_504_448),
}


def fresh(name: str, **options: int) -> nn.Module:
    torch.manual_seed(0)
    return build(name, **options)


def cost(network: nn.Module):
    return total(node_costs(trace(network, torch.zeros(2, 3, 32, 32))).values())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_has_exactly_these_parameters_and_multiply_adds(name):
    with torch.device("meta"):
        whole = cost(build(name))
    assert (whole.parameters, whole.multiply_adds) == EXACT[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_counts_are_the_published_ones_to_the_printed_digit(name):
    parameters, multiply_adds = PUBLISHED[name]
    digits = len(multiply_adds.partition(".")[2])
    assert f"{EXACT[name][0] / 1e6:.3f}" == parameters
    assert f"{EXACT[name][1] / 1e6:.{digits}f}" == multiply_adds


def test_vgg8_counts_by_hand():
    """3×3 convolutions on 32², 16², 8², 4², 4² and one linear layer; biases and BatchNorm add no
    multiply-adds."""
    widths, sides = (3, 64, 128, 256, 512, 512), (32, 16, 8, 4, 4)
    kernels = [9 * a * b for a, b in pairwise(widths)]
    products = sum(k * side**2 for k, side in zip(kernels, sides, strict=True)) + 512 * 100
    vectors = sum(widths[1:]) * 3 + 100  # bias, scale, shift; and the bias of the head
    assert EXACT["vgg8"] == (sum(kernels) + 512 * 100 + vectors, products)


@pytest.mark.parametrize(
    ("name", "weights", "layer", "shape"),
    [
        ("resnet8x4", 62, "layer1.0.downsample.0.weight", (64, 32, 1, 1)),
        ("resnet20", 128, "layer3.0.downsample.1.running_var", (64,)),
        ("resnet50", 320, "layer4.0.shortcut.0.weight", (2048, 1024, 1, 1)),
        ("wrn_16_2", 83, "block1.layer.0.convShortcut.weight", (32, 16, 1, 1)),
        ("wrn_40_1", 226, "block3.layer.5.conv2.weight", (64, 64, 3, 3)),
        ("vgg13", 72, "block4.3.weight", (512, 512, 3, 3)),
        ("mobilenetv2", 320, "blocks.6.0.conv.6.weight", (160, 480, 1, 1)),
        ("shufflenetv2", 338, "layer2.7.conv3.weight", (116, 116, 1, 1)),
    ],
)
def test_weights_are_called_as_in_the_published_checkpoints(name, weights, layer, shape):
    with torch.device("meta"):
        state = build(name).state_dict()
    assert len(state) == weights
    assert tuple(state[layer].shape) == shape


def test_the_names_of_a_small_network_are_all_of_the_published_ones():
    expected = ["conv1", "bn1"]
    for stage in (1, 2, 3):
        block = f"layer{stage}.0"
        expected += [f"{block}.{part}" for part in ("conv1", "bn1", "conv2", "bn2")]
        expected += [f"{block}.downsample.0", f"{block}.downsample.1"]
    layers = [name for name, part in build("resnet8x4").named_modules() if "weight" in dir(part)]
    assert layers == [*expected, "fc"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_logits_of_the_classes_asked_for(name):
    with torch.device("meta"):
        network = build(name, num_classes=7)
        logits = network.eval()(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 7)


def test_an_unknown_network_is_answered_with_near_names():
    with pytest.raises(UsageError, match="cifar has no model resnet8x5") as caught:
        build("resnet8x5")
    assert "resnet8x4" in caught.value.notes["near"]
    assert "wrn_16_2" in caught.value.notes["fix"]


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "vgg8", "mobilenetv2"])
def test_convolutions_are_drawn_with_the_variance_of_he(name):
    """The mean square of n normal numbers is off by sqrt(2 / n) of it; five of these are allowed,
    over the whole network 1/200 at the most."""
    ratios, count = 0.0, 0
    for module in fresh(name).modules():
        if isinstance(module, nn.Conv2d):
            variance = 2 / (module.out_channels * module.kernel_size[0] ** 2)
            ratios += module.weight.square().sum().item() / variance
            count += module.weight.numel()
            assert module.bias is None or not module.bias.any()
    assert abs(ratios / count - 1) < 5 * (2 / count) ** 0.5


def test_heads_start_as_published():
    assert not fresh("wrn_16_2").fc.bias.any()
    assert fresh("resnet20").fc.bias.any()
    for head in (fresh("vgg8").classifier, fresh("mobilenetv2").classifier[0]):
        assert not head.bias.any()
        assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_a_shuffle_unit_passes_one_half_and_takes_turns():
    maps = torch.randn(2, 8, 4, 4)
    out = cifar_networks.ShuffleUnit(8)(maps)
    assert torch.equal(out[:, ::2], maps[:, :4])
    assert out[:, 1::2].min() >= 0


@pytest.mark.parametrize(("width", "stride"), [(4, 1), (6, 1), (6, 2)])
def test_a_pre_activation_block_takes_its_shortcut_before_or_after_the_activation(width, stride):
    block, maps = cifar_networks.PreActivationBlock(4, width, stride), torch.randn(2, 4, 8, 8)
    active = block.bn1(maps).clamp(min=0)
    residue = block.conv2(block.bn2(block.conv1(active)).clamp(min=0))
    shortcut = maps if width == 4 else block.convShortcut(active)
    torch.testing.assert_close(block(maps), shortcut + residue)


def test_an_inverted_residual_adds_only_where_shapes_agree():
    maps = torch.randn(2, 8, 6, 6)
    for width, stride, is_residual in ((8, 1, True), (8, 2, False), (9, 1, False)):
        block = cifar_networks.InvertedResidual(8, width, stride, expansion=6).eval()
        expected = block.conv(maps) + (maps if is_residual else 0)
        assert torch.equal(block(maps), expected)


# ------------------------------------------------------------------------------------ pairs

BOUNDARIES = {  # with no flag: one per stage of the student
    ("resnet32x4", "resnet8x4"): [
        ("layer1.4.relu2", "layer1.0.relu2"),
        ("layer2.4.relu2", "layer2.0.relu2"),
        ("layer3.4.relu2", "layer3.0.relu2"),
    ],
    ("resnet56", "resnet20"): [
        ("layer1.8.relu2", "layer1.2.relu2"),
        ("layer2.8.relu2", "layer2.2.relu2"),
        ("layer3.8.relu2", "layer3.2.relu2"),
    ],
    ("wrn_40_2", "wrn_16_2"): [
        ("block2.layer.0.relu1", "block2.layer.0.relu1"),
        ("block3.layer.0.relu1", "block3.layer.0.relu1"),
        ("relu", "relu"),
    ],
    ("vgg13", "vgg8"): [
        ("block0.5", "block0.2"),
        ("block1.5", "block1.2"),
        ("block2.5", "block2.2"),
        ("block4.5", "block4.2"),
    ],
}


def planned(teacher: str, student: str, **options):
    return partition(fresh(teacher), fresh(student), torch.zeros(2, 3, 32, 32), **options)


@pytest.mark.parametrize("pair", BOUNDARIES, ids="-".join)
def test_alike_pairs_are_cut_at_the_ends_of_their_stages(pair):
    plan = planned(*pair)
    found = [(each.teacher.name, each.student.name) for each in plan.alignment.boundaries]
    assert found == BOUNDARIES[pair]


@pytest.mark.parametrize(
    "pair", [("resnet32x4", "shufflenetv2"), ("resnet50", "mobilenetv2")], ids="-".join
)
def test_unlike_pairs_meet_once_per_resolution_of_the_student(pair):
    plan = planned(*pair)
    sides = [each.student.shape[-1] for each in plan.alignment.boundaries]
    assert sides == sorted(set(sides), reverse=True)
    assert len(sides) >= 3


@pytest.mark.parametrize(
    ("pair", "stages", "ratios"),
    [
        (("resnet32x4", "resnet8x4"), None, (2.36, 1.46, 1.01)),
        (("resnet56", "resnet20"), None, (2.01, 1.34, 1.00)),
        (("vgg13", "vgg8"), 5, (3.35, 2.47, 1.02)),
    ],
    ids=["resnet32x4-resnet8x4", "resnet56-resnet20", "vgg13-vgg8"],
)
def test_the_forecast_is_what_these_stones_cost_by_hand(pair, stages, ratios):
    """All stones, all but the first, the last one: multiply-adds as multiples of plain KD."""
    pinned = [(f"block{i}.5", f"block{i}.2") for i in range(stages)] if stages else None
    plan = planned(*pair, pairs=pinned)
    last = len(plan.stones)
    chosen = (range(1, last + 1), range(2, last + 1), [last])
    assert tuple(round(forecast(plan, depths).ratio, 2) for depths in chosen) == ratios


@pytest.mark.parametrize("pair", [("resnet20", "resnet8"), ("vgg8", "mobilenetv2")], ids="-".join)
def test_a_pair_is_certified_without_a_gap(pair):
    proof = certify(planned(*pair))
    gaps = proof.as_dict()
    assert proof.stones == len(planned(*pair).stones) > 2
    assert gaps.pop("merged") < 1e-3  # of logits of order 1, in float32
    assert {gaps[name] for name in gaps if name != "stones"} == {0.0}


# ------------------------------------------------------------------------------------ files

FINE_NAMES = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge
bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout
tulip turtle wardrobe whale willow_tree wolf woman worm"""
COARSE_NAMES = """aquatic_mammals fish flowers food_containers fruit_and_vegetables
household_electrical_devices household_furniture insects large_carnivores
large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores
medium_mammals non-insect_invertebrates people reptiles small_mammals trees vehicles_1
vehicles_2"""
FINE, COARSE = FINE_NAMES.split(), COARSE_NAMES.split()


class Python2:
    """Writes as cPickle of Python 2 did: protocol 2, every text, list and dict in the memo."""

    def __init__(self) -> None:
        self.count = 0

    def put(self) -> bytes:
        self.count += 1
        small = self.count < 256
        return b"q" + bytes([self.count]) if small else b"r" + self.count.to_bytes(4, "little")

    def write(self, value: object) -> bytes:
        if isinstance(value, str):
            return b"U" + bytes([len(value)]) + value.encode() + self.put()
        if isinstance(value, int):
            return b"K" + bytes([value])
        if isinstance(value, list):
            head = b"]" + self.put()
            return head + b"(" + b"".join(map(self.write, value)) + b"e"
        if isinstance(value, np.ndarray):
            return self.array(value)
        assert isinstance(value, dict)
        head = b"}" + self.put()
        pairs = (part for pair in value.items() for part in pair)
        return head + b"(" + b"".join(map(self.write, pairs)) + b"u"

    def array(self, value: np.ndarray) -> bytes:
        order = "F" if value.flags.f_contiguous else "C"
        content = value.tobytes(order)
        made = b"cnumpy.core.multiarray\n_reconstruct\n" + self.put() + b"cnumpy\nndarray\n"
        made += self.put() + b"K\0\x85" + self.write("b") + b"\x87R" + self.put()
        shape = b"".join(b"M" + n.to_bytes(2, "little") for n in value.shape) + b"\x86"
        dtype = b"cnumpy\ndtype\n" + self.put() + self.write("u1") + b"K\0K\1\x87R" + self.put()
        dtype += b"(K\3" + self.write("|") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\0tb"
        flag = b"\x88" if order == "F" else b"\x89"
        data = b"T" + len(content).to_bytes(4, "little") + content
        return made + b"(K\1" + shape + dtype + flag + data + b"tb"


def pickled(value: object) -> bytes:
    return b"\x80\x02" + Python2().write(value) + b"."


META = pickled({"fine_label_names": FINE, "coarse_label_names": COARSE})


class Half:
    """``per_class`` images of every class, in an order that mixes the classes."""

    def __init__(self, per_class: int, seed: int) -> None:
        draws = np.random.default_rng(seed)
        self.labels = draws.permutation(np.repeat(np.arange(100), per_class))
        self.images = draws.integers(0, 256, (100 * per_class, 32, 32, 3), np.uint8)

    @property
    def rows(self) -> np.ndarray:
        """Red, green and blue planes, one after the other."""
        return self.images.transpose(0, 3, 1, 2).reshape(len(self.images), -1)

    def binary(self) -> bytes:
        records = np.concatenate([np.full((len(self.labels), 1), 7), self.labels[:, None]], axis=1)
        return np.concatenate([records, self.rows], axis=1).astype(np.uint8).tobytes()

    def pickled(self, *, order: str = "C") -> bytes:
        return pickled(
            {
                "filenames": [f"{number:05d}.png" for number in range(len(self.labels))],
                "batch_label": "training batch 1 of 1",
                "fine_labels": self.labels.tolist(),
                "coarse_labels": [7] * len(self.labels),
                "data": np.asarray(self.rows, order=order),
            }
        )

    def packed(self, **changes: object) -> dict[str, bytes]:
        """The entries of a part, by name; None as a change leaves a key of meta.json out."""
        images = np.concatenate([self.images[self.labels == label] for label in range(100)])
        per_class = len(images) // 100
        meta = {"per_class": per_class, "fine_names": FINE}
        meta |= {"sha256": hashlib.sha256(images.tobytes()).hexdigest()} | changes
        strips = images.reshape(100, per_class * 32, 32, 3)
        entries = {f"{label:02d}.webp": webp(strip) for label, strip in enumerate(strips)}
        return {"meta.json": json.dumps(meta).encode(), **entries}


def webp(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", lossless=True, method=0)
    return stream.getvalue()


def zipped(entries: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as part:
        for name, content in entries.items():
            part.writestr(name, content)
    return stream.getvalue()


TRAIN, TEST = Half(2, seed=1), Half(1, seed=2)


@pytest.fixture(scope="module")
def parts() -> dict[str, bytes]:
    return {"train": zipped(TRAIN.packed()), "test": zipped(TEST.packed())}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def python(folder: Path, **changes: bytes) -> Path:
    files = {"meta": META, "train": TRAIN.pickled(), "test": TEST.pickled()}
    return write(folder, files | changes)


def binary(folder: Path, **changes: bytes) -> Path:
    files = {"train.bin": TRAIN.binary(), "test.bin": TEST.binary()}
    files |= {"fine_label_names.txt": "\n".join(FINE).encode()}
    return write(folder, files | {name.replace("_bin", ".bin"): to for name, to in changes.items()})


def refusal(folder: Path) -> SurgeonError:
    with pytest.raises(cifar.DataError) as caught:
        cifar.read(folder)
    assert caught.value.exit_code == 4
    return caught.value


def test_the_pickles_made_here_are_written_as_the_official_ones():
    """The official ``meta`` has this checksum, as torchvision knows it."""
    assert hashlib.md5(META).hexdigest() == "7973b15100ade9c7d40fb424638fde48"


def test_the_pickles_made_here_say_to_python_what_they_say_to_the_reader():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy has moved what the official files name
        found = pickle.loads(TRAIN.pickled(), encoding="latin1")
    assert np.array_equal(found["data"], TRAIN.rows)
    assert found["fine_labels"] == TRAIN.labels.tolist()


@pytest.mark.parametrize("version", [python, binary])
@pytest.mark.parametrize("depth", ["here", "below"])
def test_official_files_come_as_they_are(tmp_path, version, depth):
    version(tmp_path / f"cifar-100-{version.__name__}")
    found = cifar.read(tmp_path / (f"cifar-100-{version.__name__}" if depth == "here" else ""))
    for half, images, labels in ((TRAIN, *found[:2]), (TEST, *found[2:4])):
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        assert np.array_equal(images, half.images)
        assert np.array_equal(labels, half.labels)
    assert found.class_names == tuple(FINE)


def test_an_array_in_fortran_order_is_read_in_its_order(tmp_path):
    found = cifar.read(python(tmp_path, train=TRAIN.pickled(order="F")))
    assert np.array_equal(found.train_images, TRAIN.images)


def test_a_pickle_written_item_by_item_is_read_alike(tmp_path):
    """cPickle ends a list whose last batch is one item so; a text seen before comes by number."""
    first, *rest = (b"U" + bytes([len(name)]) + name.encode() for name in FINE)
    listed = b"]" + first + b"q\x05a"
    listed += b"".join(item + b"r\0\1\0\0a" for item in rest)
    meta = b"\x80\x02}U\x10fine_label_names" + listed + b"s"
    meta += b"U\x05first" + b"h\x05s" + b"U\x04last" + b"j\0\1\0\0s."
    assert pickle.loads(meta)["first"] == "apple"
    assert cifar.read(python(tmp_path, meta=meta)).class_names == tuple(FINE)


@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_packed_parts_is_a_balanced_set(tmp_path, parts, count):
    write(tmp_path, {"cifar100-test.zip": parts["test"]})
    for number in range(count):
        write(tmp_path, {f"cifar100-train{number + 1}.zip": parts["train"]})
    found = cifar.read(tmp_path)
    sorted_images = TRAIN.images[np.argsort(TRAIN.labels, kind="stable")]
    assert np.array_equal(found.train_images, np.concatenate([sorted_images] * count))
    assert np.bincount(found.train_labels).tolist() == [2 * count] * 100
    assert np.array_equal(found.train_labels[:200], np.sort(TRAIN.labels))
    assert found.test_images.shape == (100, 32, 32, 3)
    assert found.class_names == tuple(FINE)


# ------------------------------------------------------------------------------------ refusals


def test_a_folder_of_something_else_says_what_to_give(tmp_path):
    assert "holds no CIFAR-100" in str(refusal(tmp_path))
    assert "is not a folder" in str(refusal(tmp_path / "gone"))
    assert "cifar-100-python" in refusal(tmp_path).notes["fix"]


@pytest.mark.parametrize(
    ("version", "name"),
    [(python, "train"), (python, "test"), (binary, "test.bin"), (binary, "fine_label_names.txt")],
)
def test_a_missing_file_is_named(tmp_path, version, name):
    (version(tmp_path) / name).unlink()
    assert f"{name} is missing" in str(refusal(tmp_path))


def test_missing_parts_are_named(tmp_path, parts):
    write(tmp_path, {"cifar100-test.zip": parts["test"]})
    assert "no part to train on" in str(refusal(tmp_path))
    write(tmp_path, {"cifar100-train1.zip": parts["train"]}).joinpath("cifar100-test.zip").unlink()
    assert "cifar100-test.zip is missing" in str(refusal(tmp_path))


@pytest.mark.parametrize("cut", [1, cifar.RECORD, 150 * cifar.RECORD])
def test_a_binary_file_that_is_cut_off_is_refused(tmp_path, cut):
    error = refusal(binary(tmp_path, train_bin=TRAIN.binary()[:-cut]))
    assert "not a multiple of 3,074" in str(error) if cut == 1 else "the classes have" in str(error)


def test_an_empty_binary_file_is_refused(tmp_path):
    assert "0 bytes" in str(refusal(binary(tmp_path, test_bin=b"")))


def test_a_label_of_no_class_is_refused(tmp_path):
    content = bytearray(TEST.binary())
    content[1] = 100
    error = refusal(binary(tmp_path, test_bin=bytes(content)))
    assert "run from" in str(error)
    assert "to 100" in str(error)


@pytest.mark.parametrize(
    "names", [FINE[:99], [*FINE[:99], "apple"], [*FINE[:99], "\x1b[31m"]], ids=str
)
def test_class_names_must_be_a_hundred_different_words(tmp_path, names):
    binary(tmp_path).joinpath("fine_label_names.txt").write_text(" ".join(names))
    assert "class name" in str(refusal(tmp_path))


def test_a_file_larger_than_any_official_one_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "MAX_BYTES", 1_000)
    assert "more than 1,000 bytes" in str(refusal(python(tmp_path)))


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R"
HOSTILE = {
    "global": (b"cos\nsystem\n(U\4truetR.", "it would import os.system"),
    "value": (b"}U\1xcos\nsystem\n(U\4truetRs.", "it would import os.system"),
    "inst": (b"(U\4trueios\nsystem\n.", "opcode INST"),
    "extension": (b"\x82\1.", "opcode EXT1"),
    "persistent": (b"U\1xQ.", "opcode BINPERSID"),
    "of protocol 4": (b"\x8c\2os\x8c\6system\x93.", "opcode SHORT_BINUNICODE"),
    "of python 3": (pickle.dumps({"fine_label_names": FINE}, protocol=2)[2:], "opcode BINUNICODE"),
    "other numpy": (b"cnumpy.core.multiarray\nscalar\n.", "import numpy.core.multiarray.scalar"),
    "objects": (b"cnumpy\ndtype\nU\2O8K\0K\1\x87R.", "it would call numpy dtype"),
    "array called": (b"cnumpy\nndarray\nK\1\x85R.", "it would call numpy ndarray"),
    "text called": (b"U\1xK\1\x85R.", "it would call something"),
    "array of texts": (ARRAY + b"(K\1K\1\x85U\2u1\x89T\1\0\0\0xtb.", "not one of bytes"),
    "array of two": (b"K\1(K\1K\1\x85K\1\x89T\1\0\0\0xtb.", "not one of bytes"),
    "state of a dict": (b"}}b.", "ValueError"),
    "no dict": (b"].", "it holds no dict"),
    "cut off": (b"}", "ValueError"),
    "empty": (b"", "ValueError"),
    "unknown memo": (b"h\7.", "KeyError"),
    "nothing to end": (b".", "IndexError"),
    "number as key": (b"}K\1K\2s.", "keys that are no texts"),
    "tuple as key": (b"}K\1\x85K\2s.", "keys that are no texts"),
    "key without value": (b"}(U\1xu.", "ValueError"),
    "list in a number": (b"K\1K\1a.", "it appends to int"),
    "list in a dict": (b"}K\1a.", "it appends to dict"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("name", ["meta", "train"])
def test_a_pickle_of_anything_else_is_refused_and_runs_nothing(tmp_path, monkeypatch, case, name):
    monkeypatch.setattr("os.system", lambda _: pytest.fail("it ran"))
    content, why = HOSTILE[case]
    error = refusal(python(tmp_path, **{name: b"\x80\2" + content}))
    assert f"{name} is not the file of this name in cifar-100-python" in str(error)
    assert why in error.notes["why"]


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("data", [1, 2], "not rows of 3,072 bytes"),
        ("data", np.zeros((200, 3071), np.uint8), "not rows of 3,072 bytes"),
        ("data", np.zeros((199, 3072), np.uint8), "200 labels for 199 images"),
        ("fine_labels", ["apple"], "not a list of whole numbers"),
        ("fine_labels", [0] * 200, "have 0 to 200 images"),
    ],
)
def test_a_pickle_with_other_content_is_refused(tmp_path, key, value, why):
    content = {"data": TRAIN.rows, "fine_labels": TRAIN.labels.tolist()} | {key: value}
    assert why in str(refusal(python(tmp_path, train=pickled(content))))


def test_mutants_of_a_pickle_are_read_or_refused(tmp_path):
    python(tmp_path)
    rng = random.Random(3)
    outcomes = set()
    for _ in range(300):
        mutant = bytearray(META)
        for _ in range(rng.randint(1, 3)):
            mutant[rng.randrange(len(mutant))] = rng.randrange(256)
        write(tmp_path, {"meta": bytes(mutant[: rng.choice([len(mutant), rng.randrange(1473)])])})
        try:
            outcomes.add(len(cifar.read(tmp_path).class_names))
        except cifar.DataError:
            outcomes.add("refused")
    assert outcomes == {100, "refused"}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ({"07.webp": None}, "07.webp"),
        ({"meta.json": None}, "meta.json"),
        ({"meta.json": b"{"}, "JSONDecodeError"),
        ({"meta.json": b"[]"}, "TypeError"),
        ({"meta.json": b"{}"}, "per_class"),
        ({"07.webp": b""}, "UnidentifiedImageError"),
        ({"07.webp": webp(np.zeros((64, 32, 3), np.uint8))}, "07.webp is 32×64, not 32×32"),
        ({"07.webp": webp(np.zeros((32, 32, 3), np.uint8))}, "sha256 differs"),
        ({"meta.json": json.dumps({"per_class": 1, "fine_names": FINE[1:]}).encode()}, "names"),
    ],
)
def test_a_damaged_part_is_refused_by_name(tmp_path, parts, damage, why):
    entries = {**TEST.packed(), **damage}
    kept = {name: content for name, content in entries.items() if content is not None}
    write(tmp_path, {"cifar100-train1.zip": parts["train"], "cifar100-test.zip": zipped(kept)})
    error = refusal(tmp_path)
    assert "cifar100-test.zip" in str(error)
    assert why in str(error)


@pytest.mark.parametrize("length", [0, 10, 40_000])
def test_a_part_that_is_cut_off_is_refused(tmp_path, parts, length):
    write(tmp_path, {"cifar100-train1.zip": parts["train"][:length]})
    write(tmp_path, {"cifar100-test.zip": parts["test"]})
    assert "cifar100-train1.zip is damaged" in str(refusal(tmp_path))


def test_parts_of_different_sets_are_not_joined(tmp_path, parts):
    other = TEST.packed(fine_names=[*FINE[1:], FINE[0]])
    write(tmp_path, {"cifar100-train1.zip": parts["train"], "cifar100-test.zip": zipped(other)})
    assert "name the classes differently" in str(refusal(tmp_path))
    write(tmp_path, {"cifar100-train2.zip": zipped(other), "cifar100-test.zip": parts["test"]})
    assert "name the classes differently" in str(refusal(tmp_path))


# ------------------------------------------------------------------------------------ recipe


def test_the_recipe_is_the_published_protocol():
    given = {"teacher": "teacher.pt", "student": "cifar/resnet8x4", "data_dir": "data"}
    recipe = read_config(RECIPE, given)
    assert (recipe.epochs, recipe.batch_size) == (240, 64)
    assert (recipe.optim.opt, recipe.optim.momentum) == ("sgd", 0.9)
    assert recipe.optim.weight_decay == 5e-4
    assert recipe.data.augment == "shift-flip"
    assert recipe.data.mean == (0.5071, 0.4867, 0.4408)
    assert recipe.data.std == (0.2675, 0.2565, 0.2761)
    assert recipe.loss.temperature == 4.0
    assert recipe.loss.cross_start == 200 / 240
    batches = 782  # of 64 in 50,000 images, the last one of 16
    rates = [
        learning_rate_at(recipe, (epoch * batches + batch) / (240 * batches))
        for epoch, batch in ((0, 0), (149, 781), (150, 0), (180, 0), (210, 0), (239, 781))
    ]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 5e-4, 5e-5, 5e-5])


@pytest.mark.parametrize("method", ["teacher", "ce", "kd", "dkd", "block-kd"])
def test_the_bench_runs_the_published_recipe_over_fewer_epochs(method):
    from argparse import Namespace

    from benchmarks.cifar100 import recipe_for

    given = Namespace(method=method, epochs=60, seed=3, amp=False, stones="drop-first")
    recipe = recipe_for("resnet8x4", given)
    assert (recipe.epochs, recipe.seed, recipe.optim.lr, recipe.optim.momentum) == (
        60,
        3,
        0.05,
        0.9,
    )
    assert recipe.optim.decay_at == (0.625, 0.75, 0.875) and recipe.optim.decay_norms
    assert recipe_for("mobilenetv2", given).optim.lr == 0.01
    weights = {"kd": (0.1, 0.9)}.get(method, (1.0, 1.0))
    assert (recipe.loss.ce_weight, recipe.loss.kd_weight) == weights
    assert recipe.loss.distance == ("dkd" if method == "dkd" else "kl")
    assert recipe.loss.stones == ("drop-first" if method == "block-kd" else "all")
