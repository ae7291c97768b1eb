"""The forms of an exported file: half precision, fixed and free sizes, pixels in, weights apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, parser
from torch import Tensor, nn

from kdsurgeon.data.sets import Fit
from kdsurgeon.errors import ModelFileError, NumericsError, UsageError
from kdsurgeon.exporting import Form, Preprocessing, accuracy, export, read_metadata
from kdsurgeon.exporting import external as outside
from kdsurgeon.exporting.gate import read_onnx
from kdsurgeon.exporting.half import LARGEST, halved
from kdsurgeon.exporting.preprocessing import other_sizes
from kdsurgeon.tracing import count_classes
from tests.exports.faults import CLASSES, Net, images
from tests.fuzz.layers import Attention


def run(path: Path, feed: Tensor) -> Tensor:
    """What plain ONNX Runtime, as a consumer uses it, makes of one input."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {given.name: feed.numpy()})[0])


def logits(net: nn.Module, given: Tensor) -> Tensor:
    with torch.no_grad():
        return net(given)


# half precision


def test_a_half_file_holds_float16_and_takes_and_gives_float32(tmp_path: Path) -> None:
    done = export(Net(), tmp_path / "x.onnx", images(2), samples=images(40), form=Form(half=True))
    model = onnx.load(done.path)
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert stored["inner.weight"] == TensorProto.FLOAT16
    assert TensorProto.FLOAT not in stored.values()
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    assert done.parity is not None and done.parity.precision == "fp16"
    assert done.parity.bound == 1e-2 * done.parity.scale
    assert 0 < done.parity.gap <= done.parity.bound
    assert read_metadata(done.path)["kdsurgeon.precision"] == "fp16"


def test_a_weight_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    net = Net()
    net.look.bias.data[0] = 1e5
    with pytest.raises(NumericsError, match=r"(?s)overflow|does not fit into float16") as caught:
        export(net, tmp_path / "x.onnx", images(2), form=Form(half=True))
    assert caught.value.exit_code == 5 and list(tmp_path.iterdir()) == []
    text = (
        '<ir_version: 10, opset_import: ["" : 18]> f (float[n] x) => (float[n] y) {y = Add(x, w)}'
    )
    model = parser.parse_model(text)
    weight = onnx.numpy_helper.from_array(np.float32([2 * LARGEST]), "w")
    model.graph.initializer.append(weight)
    with pytest.raises(NumericsError, match=r"(?s)does not fit into float16.*where: +w"):
        halved(model, {"w"})
    ends = {each.name: each for each in halved(model, set()).graph.initializer}["w"]
    assert onnx.numpy_helper.to_array(ends)[0] == np.float16(LARGEST)


def test_an_operator_without_float16_stays_between_two_casts() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
        f (float[1, 1, 4, 4] x) => (float[1, 1, 8, 8] y) {
            scales = Constant <value = float[4] {1.0, 1.0, 2.0, 2.0}> ()
            big = Resize <mode = "nearest"> (x, , scales)
            y = Relu (big)
        }"""
    model = parser.parse_model(text)
    half = halved(model, set())
    onnx.checker.check_model(half, full_check=True)
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(half.SerializeToString())
    found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    wanted = x.half().float().repeat_interleave(2, 2).repeat_interleave(2, 3).relu()
    assert torch.equal(found, wanted)


def test_a_graph_in_a_graph_is_not_halved() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
        f (float[1] x, bool c) => (float[1] y) {
            y = If (c) <then_branch = a () => (float[1] p) {p = Relu (x)},
                        else_branch = b () => (float[1] q) {q = Neg (x)}>
        }"""
    with pytest.raises(UsageError, match="If holds a graph of its own"):
        halved(parser.parse_model(text), set())


# fixed and free sizes


def test_a_static_file_takes_one_size_and_no_other(tmp_path: Path) -> None:
    net = Net()
    done = export(net, tmp_path / "x.onnx", images(2), samples=images(5), form=Form(batch=1))
    (given,) = onnx.load(done.path).graph.input
    assert [dim.dim_value for dim in given.type.tensor_type.shape.dim] == [1, 3, 8, 8]
    assert done.parity is not None and done.parity.batch_sizes == (1,)
    assert torch.allclose(run(done.path, images(1)), logits(net, images(1)), atol=1e-4)
    for feed in (images(2), torch.zeros(1, 3, 16, 8)):
        with pytest.raises(Exception, match="invalid dimensions"):
            run(done.path, feed)


def test_a_static_file_of_several_is_filled_up_for_the_last_ones(tmp_path: Path) -> None:
    done = export(Net(), tmp_path / "x.onnx", images(2), samples=images(7), form=Form(batch=4))
    labels = logits(Net(), images(7)).argmax(1)
    assert accuracy(done.path, images(7), labels) == 1.0


class Pooled(nn.Module):
    """Takes every size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.stem(x)).mean((2, 3)))


def test_a_file_of_free_size_is_proved_at_other_sizes(tmp_path: Path) -> None:
    net = Pooled()
    done = export(net, tmp_path / "x.onnx", images(2), form=Form(dynamic_size=True))
    assert done.parity is not None
    assert done.parity.sizes == ((3, 40, 40), (3, 4, 4), (3, 16, 8), (3, 8, 16))
    (given,) = onnx.load(done.path).graph.input
    names = [dim.dim_param for dim in given.type.tensor_type.shape.dim]
    assert (names[0], names[2], names[3]) == ("batch", "height", "width")
    wide = torch.randn(3, 3, 11, 29, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(run(done.path, wide), logits(net, wide), atol=1e-5)


def test_a_network_of_one_size_has_no_file_of_free_size(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(UsageError, match=r"with a free size|takes no size but"):
        export(net, tmp_path / "x.onnx", images(2), form=Form(dynamic_size=True))
    assert list(tmp_path.iterdir()) == []


class Square(Pooled):
    """Takes images of any size that are as high as they are wide."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        side = x.shape[2]
        return self.head(x.flatten(2).reshape(x.shape[0], 8, side, side).mean((2, 3)))


def test_a_network_of_one_aspect_has_no_file_of_free_height_and_width(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no image of another aspect") as caught:
        export(Square(), tmp_path / "x.onnx", images(2), form=Form(dynamic_size=True))
    assert "without --dynamic-size" in caught.value.notes["fix"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "a batch of 0 cannot be fixed"),
        ({"batch": 1, "dynamic_size": True}, "a free size and a fixed batch exclude"),
        ({"opset": 17}, "opset 17 cannot be written"),
    ],
)
def test_forms_that_contradict_themselves_are_refused(
    options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Form(**options)


# tokens, several inputs, several outputs


class Words(nn.Module):
    """Tokens and their mask in; a dict out, as transformers give it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.attention = nn.Embedding(40, 8), Attention(8, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.attention(self.table(input_ids)) * attention_mask[..., None]
        return {"features": x, "logits": self.head(x.sum(1) / attention_mask.sum(1)[:, None])}


def test_tokens_go_in_by_name_and_their_length_can_be_free(tmp_path: Path) -> None:
    net = Words().eval()
    ids = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert count_classes(net, batch) == 3
    done = export(net, tmp_path / "x.onnx", batch, form=Form(dynamic_size=True))
    session = onnxruntime.InferenceSession(str(done.path))
    assert [(each.name, each.shape) for each in session.get_inputs()] == [
        ("input_ids", ["batch", "sequence"]),
        ("attention_mask", ["batch", "sequence"]),
    ]
    assert [each.name for each in session.get_outputs()] == ["logits"]
    assert done.parity is not None and (10,) in done.parity.sizes
    apart = export(net, tmp_path / "apart.onnx", batch, form=Form(external=True))
    assert apart.data is not None and apart.data.stat().st_size >= net.table.weight.nbytes
    assert apart.parity is not None and apart.parity.agreement == 1


# probabilities


def test_softmax_gives_probabilities_and_says_so(tmp_path: Path) -> None:
    done = export(Net(), tmp_path / "x.onnx", images(2), form=Form(softmax=True))
    found = run(done.path, images(4))
    assert torch.allclose(found.sum(1), torch.ones(4)) and bool((found >= 0).all())
    assert torch.equal(found.argmax(1), logits(Net(), images(4)).argmax(1))
    (output,) = onnx.load(done.path).graph.output
    assert output.name == "probabilities"
    assert read_metadata(done.path)["kdsurgeon.output"] == "probabilities"


# pixels in


def identity(size: tuple[int, int, int]) -> onnx.ModelProto:
    shape = ", ".join(map(str, size))
    return parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 18]> f (float[batch, {shape}] input) '
        f"=> (float[batch, {shape}] logits) {{ logits = Identity (input) }}"
    )


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("size", [(1, 8, 8), (3, 20, 28)])
def test_the_file_makes_the_very_pixels_of_evaluation(
    size: tuple[int, int, int], crop_pct: float, interpolation: str
) -> None:
    channels, height, width = size
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    made = Preprocessing(size, mean, std, fit=Fit(crop_pct, interpolation))
    model = made.put_before(identity(size), batch=None)
    onnx.checker.check_model(model, full_check=True)
    same = torch.randint(0, 256, (2, height, width, channels), dtype=torch.uint8)
    for given in (same, *other_sizes(same, 0), *other_sizes(same, 1)):
        assert made.check(model, given) == 0.0


def test_other_pixels_are_refused() -> None:
    made = Preprocessing((1, 8, 8), (0.5,), (0.25,))
    model = Preprocessing((1, 8, 8), (0.5,), (0.2501,)).put_before(identity((1, 8, 8)), batch=None)
    with pytest.raises(NumericsError, match="makes other pixels of an image of 9×9"):
        made.check(model, torch.full((1, 9, 9, 1), 200, dtype=torch.uint8))


def test_a_file_with_its_preprocessing_answers_raw_images(tmp_path: Path) -> None:
    made = Preprocessing((3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    photos = torch.randint(0, 256, (30, 8, 8, 3), dtype=torch.uint8)
    labels = logits(Net(), made.pixels(photos)).argmax(1)
    done = export(
        Net(), tmp_path / "x.onnx", images(2), samples=photos, labels=labels,
        form=Form(preprocessing=made),
    )  # fmt: skip
    assert done.accuracy == 1.0
    assert done.parity is not None and len(done.parity.sizes) == 4
    large = torch.randint(0, 256, (3, 31, 17, 3), dtype=torch.uint8)
    wanted = logits(Net(), made.pixels(large))
    assert torch.allclose(run(done.path, large), wanted, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (images(2), "samples must be images, uint8"),
        (torch.zeros(2, 8, 8, 1, dtype=torch.uint8), r"uint8 \(n, height, width, 3\)"),
    ],
)
def test_what_is_no_image_cannot_prove_a_file_that_takes_images(
    samples: Tensor, message: str, tmp_path: Path
) -> None:
    made = Preprocessing((3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    with pytest.raises(UsageError, match=message):
        export(Net(), tmp_path / "x", images(2), samples=samples, form=Form(preprocessing=made))


def test_int8_is_not_made_of_other_forms(tmp_path: Path) -> None:
    for form in (Form(half=True), Form(batch=1)):
        with pytest.raises(UsageError, match="int8 is made of an fp32 file"):
            export(Net(), tmp_path / "x", images(2), calibration=images(4), form=form)


# weights in a file of their own


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(192, 64), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.flatten(1)).relu())


def test_weights_apart_lie_under_a_bare_name_that_their_content_gives(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    done = export(Wide(), here / "x.onnx", images(2), form=Form(external=True))
    assert done.data is not None and done.data.parent == here
    assert done.bytes == done.path.stat().st_size + done.data.stat().st_size
    model = onnx.load(done.path, load_external_data=False)
    *_, tensor = [each for each in model.graph.initializer if each.external_data]
    entries = {entry.key: entry.value for entry in tensor.external_data}
    assert int(entries["offset"]) > 0
    assert entries["location"] == done.data.name
    assert int(entries["offset"]) % outside.ALIGNMENT == 0
    assert int(entries["offset"]) + int(entries["length"]) == done.data.stat().st_size
    assert done.data.stat().st_nlink == 1
    wanted = logits(Wide(), images(3))
    assert torch.allclose(run(done.path, images(3)), wanted, atol=1e-5)
    moved = tmp_path / "moved"
    here.rename(moved)
    assert torch.allclose(run(moved / "x.onnx", images(3)), wanted, atol=1e-5)
    assert read_onnx(moved / "x.onnx").sha256 == done.sha256


def test_a_new_export_never_changes_the_weights_of_the_old_file(tmp_path: Path) -> None:
    first = export(Wide(), tmp_path / "x.onnx", images(2), form=Form(external=True))
    before = (tmp_path / "x.onnx").read_bytes()
    other = Wide()
    other.inner.weight.data *= 2
    second = export(other, tmp_path / "x.onnx", images(2), form=Form(external=True))
    assert first.data is not None and first.data != second.data
    (tmp_path / "x.onnx").write_bytes(before)  # as after a crash between the two renames
    assert torch.allclose(run(tmp_path / "x.onnx", images(3)), logits(Wide(), images(3)), atol=1e-5)


def test_a_damaged_data_file_is_refused(tmp_path: Path) -> None:
    done = export(Wide(), tmp_path / "x.onnx", images(2), form=Form(external=True))
    assert done.data is not None
    done.data.write_bytes(done.data.read_bytes()[:-1])
    with pytest.raises(ModelFileError):
        accuracy(done.path, images(1), torch.zeros(1))


def test_more_weights_than_one_file_holds_go_apart_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "MAX_BYTES", 10_000)
    assert export(Wide(), tmp_path / "x.onnx", images(2)).data is not None


def test_a_half_file_may_lie_apart_too(tmp_path: Path) -> None:
    done = export(Wide(), tmp_path / "x.onnx", images(2), form=Form(external=True, half=True))
    assert done.data is not None and done.data.stat().st_size == 2 * 192 * 64


# what ONNX Runtime fuses


class Transformer(nn.Module):
    def __init__(self, *, mask: bool = False, axes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(24, 24), nn.Linear(8, CLASSES)
        self.gelu, self.mask, self.axes = nn.GELU(), mask, axes

    def forward(self, x: Tensor) -> Tensor:
        x = self.gelu(self.stem(x.flatten(2)[..., :24].transpose(1, 2).flatten(1)[:, :24]))
        x = x.reshape(x.shape[0], 1, 3, 8)
        x = x[:, None] if self.axes == 5 else x
        seen = torch.ones(3, 3, dtype=torch.bool).tril() if self.mask else None
        x = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=seen)
        return self.head(x.flatten(1, -2).mean(1))


@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize("options", [{}, {"mask": True}, {"axes": 5}], ids=str)
def test_every_form_of_attention_is_written(
    options: dict[str, int], opset: int, tmp_path: Path
) -> None:
    if opset == 23 and options.get("axes") == 5:  # torch's own attention, which has four axes
        return
    done = export(Transformer(**options), tmp_path / "x.onnx", images(2), opset=opset)
    kinds = [node.op_type for node in onnx.load(done.path).graph.node]
    if opset < 23:
        assert kinds.count("Softmax") == 1 and "Attention" not in kinds
        assert kinds.count("MatMul") <= 3 and "Shape" not in kinds[kinds.index("MatMul") :]
    assert ("Gelu" in kinds) == (opset >= 20)


def test_onnx_runtime_fuses_what_is_written(tmp_path: Path) -> None:
    done = export(Transformer(), tmp_path / "x.onnx", images(2))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    onnxruntime.InferenceSession(str(done.path), options)
    kinds = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
    assert {"FusedMatMul"} <= set(kinds) and {"BiasGelu", "Gelu"} & set(kinds)
    assert "Erf" not in kinds


def test_the_metadata_are_text(tmp_path: Path) -> None:
    given = {"class_names": json.dumps(list("abcde")), "license": "MIT"}
    done = export(Net(), tmp_path / "x.onnx", images(2), metadata=given)
    assert read_metadata(done.path) == {**given, "kdsurgeon.verified": "true"}
