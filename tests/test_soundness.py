"""Where the gate for ONNX graphs draws its lines: what is just allowed, and what just not."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.defs import onnx_opset_version

from kdsurgeon.errors import ModelFileError, ResourceError
from kdsurgeon.exporting import beside, gate, soundness, trial
from kdsurgeon.exporting.soundness import check_model, check_tensor, num_bytes

HEX = "0123456789abcdef"


def model(*nodes: NodeProto, tensors: tuple[TensorProto, ...] = ()) -> ModelProto:
    """A graph of one input and one output with further nodes that nobody reads."""
    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")
    )
    body = [helper.make_node("Relu", ["x"], ["y"]), *nodes]
    graph = helper.make_graph(body, "g", [given], [made], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def numbers(*values: float, name: str = "s", kind: type = np.int64) -> TensorProto:
    return numpy_helper.from_array(np.array(values, kind), name)


def told(change: Callable[[ModelProto], object], *nodes: NodeProto, **given: object) -> str:
    """The refusal of a model after a change; nothing where it is let through."""
    made = model(*nodes, **given)  # type: ignore[arg-type]
    change(made)
    try:
        check_model(made, "x.onnx")
    except ModelFileError as error:
        return f"{error.what} {error.notes.get('why', '')} {error.notes.get('where', '')}"
    return ""


def nothing(_: ModelProto) -> None:
    pass


def node(kind: str, *inputs: str, **attributes: object) -> NodeProto:
    return helper.make_node(kind, list(inputs), ["big"], name="its name", **attributes)


def sized(kind: str, place: int, *values: float, type: type = np.int64) -> str:
    inputs = ["x"] * place + ["s"]
    return told(nothing, node(kind, *inputs), tensors=(numbers(*values, kind=type),))


def test_a_plain_graph_passes():
    assert told(nothing) == ""


# Versions and parts of a model


@pytest.mark.parametrize(
    ("version", "passes"),
    [(2, False), (3, True), (onnx.IR_VERSION, True), (onnx.IR_VERSION + 1, False)],
)
def test_formats_that_are_read(version, passes):
    text = told(lambda m: setattr(m, "ir_version", version))
    assert text.startswith("" if passes else f"x.onnx is of ONNX format {version}; 3 to ")
    assert bool(text) is not passes


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
@pytest.mark.parametrize(
    ("version", "passes"),
    [(6, False), (7, True), (onnx_opset_version(), True), (onnx_opset_version() + 1, False)],
)
def test_operator_sets_that_are_read(domain, version, passes):
    def change(made: ModelProto) -> None:
        made.opset_import[0].domain, made.opset_import[0].version = domain, version

    text = told(change)
    assert bool(text) is not passes
    assert text.startswith("" if passes else f"x.onnx needs opset {version}; 7 to ")


@pytest.mark.parametrize("version", [1, 100])
def test_sets_of_other_makers_may_have_any_version(version):
    extra = helper.make_opsetid("com.microsoft", version)
    assert told(lambda m: m.opset_import.append(extra)) == ""


PARTS: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "no sets": (lambda m: m.ClearField("opset_import"), "its operator sets are not named"),
    "only a foreign set": (
        lambda m: setattr(m.opset_import[0], "domain", "ai.onnx.ml"),
        "its operator sets are not named",
    ),
    "a set twice": (
        lambda m: m.opset_import.append(helper.make_opsetid("", 18)),
        "its operator sets are not named",
    ),
    "functions": (lambda m: m.functions.add(), "x.onnx brings functions of its own; refused."),
    "training": (lambda m: m.training_info.add(), "x.onnx brings a training graph; refused."),
    "options": (lambda m: m.metadata_props.add(key="ort_config"), "sets options of the runtime"),
    "no nodes": (lambda m: m.graph.ClearField("node"), "it holds no graph"),
    "no input": (lambda m: m.graph.ClearField("input"), "must have one input; it has none"),
    "no output": (lambda m: m.graph.ClearField("output"), "must have one output; it has none"),
    "a sparse weight": (lambda m: m.graph.sparse_initializer.add(), "holds sparse tensors"),
    "an input of no type": (
        lambda m: m.graph.input[0].type.tensor_type.ClearField("elem_type"),
        'x.onnx: "x" is no tensor of a known type.',
    ),
    "an output of no tensor": (
        lambda m: m.graph.output[0].type.Clear(), 'x.onnx: "y" is no tensor of a known type.'
    ),
    "two weights of a name": (
        lambda m: m.graph.initializer.extend([numbers(1), numbers(2)]), "two tensors of one name"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_a_classifier_has_not_are_named(name):
    change, words = PARTS[name]
    assert words in told(change)


def test_weights_may_be_listed_among_the_inputs():
    def change(made: ModelProto) -> None:
        made.graph.initializer.append(numbers(1.0))
        made.graph.input.append(onnx.ValueInfoProto(name="s"))  # of no type, which is the weight's

    assert told(change) == ""

    def alone(made: ModelProto) -> None:
        change(made)
        del made.graph.input[0]

    assert "must have one input" in told(alone)


@pytest.mark.parametrize(
    ("domain", "kind", "passes"),
    [
        ("", "Anything", True),
        ("ai.onnx", "Relu", True),
        ("ai.onnx.ml", "Scaler", True),
        ("com.microsoft", "QGemm", True),
        ("com.microsoft", "EPContext", False),
        ("com.example", "Relu", False),
    ],
)
def test_operators_are_known_by_maker_and_name(domain, kind, passes):
    text = told(nothing, helper.make_node(kind, ["x"], ["z"], domain=domain))
    assert bool(text) is not passes
    assert passes or f"operators outside of the standard: {domain} {kind}" in text


def branches(depth: int, inside: GraphProto | None = None) -> NodeProto:
    graph = inside or helper.make_graph([helper.make_node("Relu", ["x"], ["z"])], "leaf", [], [])
    for level in range(depth - 1):
        inner = helper.make_node("If", ["x"], ["z"], then_branch=graph)
        graph = helper.make_graph([inner], f"level {level}", [], [])
    return helper.make_node("If", ["x"], ["z"], then_branch=graph)


def test_graphs_may_lie_eight_deep_in_one_another():
    assert told(nothing, branches(8)) == ""
    assert "nests graphs more than 8 deep" in told(nothing, branches(9))


def test_graphs_of_either_kind_of_attribute_are_looked_into():
    foreign = helper.make_node("Own", ["x"], ["z"], domain="com.example")
    leaf = helper.make_graph([foreign], "leaf", [], [])
    assert "com.example Own" in told(nothing, branches(2, leaf))
    listed = helper.make_node("If", ["x"], ["z"])
    listed.attribute.add(name="all", type=onnx.AttributeProto.GRAPHS).graphs.append(leaf)
    assert "com.example Own" in told(nothing, listed)


def test_tensors_of_either_kind_of_attribute_are_looked_into():
    short = numbers(1.0, 2.0)
    short.dims[0] = 3
    alone = helper.make_node("Constant", [], ["z"], value=short)
    assert "of 3 (int64) holds" in told(nothing, alone)
    listed = helper.make_node("Constant", [], ["z"])
    listed.attribute.add(name="all", type=onnx.AttributeProto.TENSORS).tensors.append(short)
    assert "of 3 (int64) holds" in told(nothing, listed)
    sparse = helper.make_node("Constant", [], ["z"])
    sparse.attribute.add(name="all", type=onnx.AttributeProto.SPARSE_TENSORS).sparse_tensors.add()
    assert "holds sparse tensors" in told(nothing, sparse)


# Sizes


@pytest.mark.parametrize("name", soundness._STEPS)
@pytest.mark.parametrize("sign", [1, -1])
def test_steps_are_small(name, sign):
    most = 1 << 16
    assert told(nothing, node("Conv", "x", **{name: [1, sign * most]})) == ""
    text = told(nothing, node("Conv", "x", **{name: [1, sign * (most + 1)]}))
    assert "asks Conv for an absurd size; refused." in text and "its name" in text


@pytest.mark.parametrize("name", soundness._WHOLE)
def test_sizes_in_attributes_are_bounded_by_their_product(name):
    assert told(nothing, node("Own", "x", **{name: [1 << 14, 1 << 14]})) == ""
    text = told(nothing, node("Own", "x", **{name: [1 << 14, (1 << 14) + 1]}))
    assert "asks Own for an absurd size" in text and f"{name} [16384, 16385" in text


def test_one_number_is_a_size_and_a_step_too():
    assert told(nothing, node("Own", "x", sample_size=1 << 28)) == ""
    assert "absurd" in told(nothing, node("Own", "x", sample_size=(1 << 28) + 1))
    assert "absurd" in told(nothing, node("Own", "x", scales=[1.0, 65537.0]))
    assert told(nothing, node("Own", "x", axis=1 << 40)) == ""


@pytest.mark.parametrize(
    ("kind", "place"), [(k, p) for k, places in soundness._SIZES.items() for p in places]
)
def test_sizes_in_inputs_are_bounded(kind, place):
    assert sized(kind, place, 1 << 28) == ""
    assert f"asks {kind} for an absurd size" in sized(kind, place, (1 << 28) + 1)
    if kind != "Pad":
        assert f"asks {kind} for an absurd size" in sized(kind, place, 1 << 14, (1 << 14) + 1)
    assert sized("Relu", place, 1 << 60) == ""


def test_each_padding_counts_by_itself_and_without_its_sign():
    assert sized("Pad", 1, 1 << 28, 1 << 28) == ""
    assert "absurd" in sized("Pad", 1, 0, -(1 << 28) - 1)


def test_sizes_known_elsewhere_count_as_one():
    assert sized("Reshape", 1, 0, -1, 1 << 28) == ""
    assert "absurd" in sized("Resize", 2, 0.5, float(1 << 29), type=np.float32)
    assert "absurd" in sized("Resize", 2, float("nan"), 1.0, type=np.float32)


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.int64, np.float32, np.float64])
def test_sizes_of_every_type_are_read(kind):
    many = (2**14, 2**14, 2) if kind == np.int16 else (2**29,)
    assert "absurd" in sized("ConstantOfShape", 0, *many, type=kind)


@pytest.mark.parametrize(
    ("given", "passes"),
    [
        ((0, 1 << 28, 1), True),
        ((0, (1 << 28) + 1, 1), False),
        ((0, -(1 << 28) - 1, -1), False),
        ((0, (1 << 28) + 1, 2), True),
        ((5, 5 + (1 << 28), 1), True),
        ((0, 1, 0), False),
    ],
)
def test_ranges_are_bounded_by_their_steps(given, passes):
    tensors = tuple(
        numpy_helper.from_array(np.array(value), name)
        for name, value in zip("abc", given, strict=True)
    )
    text = told(nothing, node("Range", "a", "b", "c"), tensors=tensors)
    assert bool(text) is not passes
    assert told(nothing, node("Range", "a", "b", "x"), tensors=tensors) == ""


CONSTANTS: dict[str, dict[str, object]] = {
    "a tensor": {"value": numbers((1 << 28) + 1)},
    "one number": {"value_int": (1 << 28) + 1},
    "one float": {"value_float": float(1 << 29)},
    "numbers": {"value_ints": [1 << 14, (1 << 14) + 1]},
    "floats": {"value_floats": [float(1 << 29)]},
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_sizes_that_a_constant_gives_are_read(name):
    constant = helper.make_node("Constant", [], ["s"], **CONSTANTS[name])
    made = model(constant, node("ConstantOfShape", "s"))
    with pytest.raises(ModelFileError, match="asks ConstantOfShape for an absurd size"):
        check_model(made, "x.onnx")
    constant.op_type = "Identity"
    check_model(model(constant, node("ConstantOfShape", "s")), "x.onnx")


@pytest.mark.parametrize(("count", "is_read"), [(64, True), (65, False)])
def test_only_short_constants_are_sizes(count, is_read):
    values = (3,) * count
    assert bool(sized("ConstantOfShape", 0, *values)) is is_read
    constant = helper.make_node("Constant", [], ["s"], value_ints=list(values))
    text = told(nothing, constant, node("ConstantOfShape", "s"))
    assert bool(text) is is_read


def test_a_constant_in_another_file_or_of_another_type_says_no_size():
    far = numbers((1 << 28) + 1)
    far.ClearField("raw_data")
    far.data_location = TensorProto.EXTERNAL
    far.external_data.add(key="location", value="w.bin")
    assert told(nothing, node("ConstantOfShape", "s"), tensors=(far,)) == ""
    assert soundness._numbers(far) == ()
    assert soundness._numbers(numbers(1, kind=np.uint8)) == ()


@pytest.mark.parametrize("kind", ["input", "output", "value_info"])
def test_shapes_that_values_are_said_to_have_are_bounded(kind):
    def change(*sizes: int) -> Callable[[ModelProto], object]:
        value = helper.make_tensor_value_info("v", TensorProto.FLOAT, sizes)
        return lambda m: getattr(m.graph, kind).append(value)

    assert told(change(*[1] * 64)) == ""
    assert 'the shape of "v" is not one' in told(change(*[1] * 65))
    assert told(change(1 << 20, 1 << 20)) == ""
    assert '"v" is said to be 1048577×1048576; refused.' in told(change((1 << 20) + 1, 1 << 20))
    assert told(change(0, 1 << 40)) == ""
    assert "is said to be 0×" in told(change(0, (1 << 40) + 1)), "0 may stand for any size"
    assert 'the shape of "v" is not one' in told(change(-1))


# Tensors


@pytest.mark.parametrize("code", sorted(soundness.BITS))
def test_numbers_of_every_type_take_as_many_bytes_as_they_should(code):
    name = TensorProto.DataType.Name(code)
    said = re.search(r"\d+", name)  # the first number in a name is its bits
    bits = int(said[0]) if said else {"FLOAT": 32, "DOUBLE": 64, "BOOL": 8}[name]
    for count in (0, 1, 3, 8):
        tensor = TensorProto(name="w", data_type=code, dims=[count])
        assert num_bytes(tensor) == -(-count * bits // 8)
        tensor.raw_data = bytes(num_bytes(tensor))
        check_tensor(tensor, "x.onnx")
        tensor.raw_data += b"\0"
        with pytest.raises(ModelFileError, match=r'tensor "w" of .* holds .* in raw_data'):
            check_tensor(tensor, "x.onnx")


FIELDS = {
    "FLOAT": ("float_data", 6), "COMPLEX64": ("float_data", 12), "DOUBLE": ("double_data", 6),
    "COMPLEX128": ("double_data", 12), "INT64": ("int64_data", 6), "UINT32": ("uint64_data", 6),
    "UINT64": ("uint64_data", 6), "INT32": ("int32_data", 6), "FLOAT16": ("int32_data", 6),
    "BFLOAT16": ("int32_data", 6), "INT8": ("int32_data", 6), "BOOL": ("int32_data", 6),
    "INT16": ("int32_data", 6), "UINT16": ("int32_data", 6), "INT4": ("int32_data", 3),
    "UINT4": ("int32_data", 3), "STRING": ("string_data", 6),
}  # fmt: skip


@pytest.mark.parametrize("kind", FIELDS)
def test_a_tensor_holds_its_numbers_in_the_field_of_its_type(kind):
    field, entries = FIELDS[kind]
    tensor = TensorProto(name="w", data_type=TensorProto.DataType.Value(kind), dims=[2, 3])
    value = b"" if kind == "STRING" else 0
    with pytest.raises(ModelFileError, match=rf"of 2×3 \({kind.lower()}\) holds nothing"):
        check_tensor(tensor, "x.onnx")
    getattr(tensor, field).extend([value] * entries)
    check_tensor(tensor, "x.onnx")
    getattr(tensor, field).append(value)
    with pytest.raises(ModelFileError, match=rf"holds {entries + 1} in {field}"):
        check_tensor(tensor, "x.onnx")
    del getattr(tensor, field)[-1]
    other = "double_data" if field != "double_data" else "float_data"
    getattr(tensor, other).append(0)
    with pytest.raises(ModelFileError, match="is damaged"):
        check_tensor(tensor, "x.onnx")


def test_three_numbers_of_four_bits_take_two_entries():
    tensor = TensorProto(name="w", data_type=TensorProto.INT4, dims=[3], int32_data=[0, 0])
    check_tensor(tensor, "x.onnx")


def test_a_tensor_of_no_type_a_part_and_one_elsewhere_are_refused():
    with pytest.raises(ModelFileError, match="is of no known type"):
        check_tensor(TensorProto(name="w", data_type=0), "x.onnx")
    part = numbers(1)
    part.segment.begin = 0
    with pytest.raises(ModelFileError, match="is only a part of one"):
        check_tensor(part, "x.onnx")
    far = TensorProto(name="w", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    check_tensor(far, "x.onnx", may_be_elsewhere=True)
    with pytest.raises(ModelFileError, match="must not lie in another file"):
        check_tensor(far, "x.onnx")
    near = numbers(1)
    near.external_data.add(key="location", value="w.bin")
    with pytest.raises(ModelFileError, match="must not lie in another file"):
        check_tensor(near, "x.onnx", may_be_elsewhere=True)


def test_only_weights_of_the_graph_itself_may_lie_elsewhere():
    far = TensorProto(name="w", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    assert told(lambda m: m.graph.initializer.append(far)) == ""
    leaf = helper.make_graph([helper.make_node("Relu", ["x"], ["z"])], "leaf", [], [], [far])
    assert "must not lie in another file" in told(nothing, branches(1, leaf))


# Files beside a model


def linked(**entries: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.mark.parametrize(
    ("entries", "offset"),
    [
        ({}, 0),
        ({"offset": "0", "length": "8"}, 0),
        ({"offset": "1234567890123456789", "checksum": "x"}, 1234567890123456789),
    ],
)
def test_a_place_is_a_bare_name_and_two_numbers(entries, offset):
    assert beside._place(linked(location="w.bin", **entries), "x.onnx") == ("w.bin", offset)


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"offset": "12345678901234567890"}, "offset and length are no numbers"),
        ({"length": "9"}, "takes 8 bytes, not 9"),
        ({"length": "0"}, "takes 8 bytes, not 0"),
        ({"basepath": "x"}, "its place is not told"),
    ],
)
def test_a_place_that_says_more_or_less_is_refused(entries, why):
    with pytest.raises(ModelFileError) as refused:
        beside._place(linked(location="w.bin", **entries), "x.onnx")
    assert why in refused.value.what + refused.value.notes.get("why", "")


@pytest.mark.parametrize(
    ("name", "is_bare"),
    [
        ("w" * 255, True), ("w" * 256, False), ("é" * 127, True), ("é" * 128, False),
        ("a..b", True), ("..", False), (".", False), ("", False), ("a/b", False), ("a:b", False),
        ("a\nb", False), (".hidden", True), ("a b", True), ("a*", False), ("a|b", False),
    ],
)  # fmt: skip
def test_bare_names(name, is_bare):
    assert beside._is_bare(name) is is_bare


def test_a_file_may_be_as_large_as_is_allowed(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"12345")
    with beside.opened(path, "x.onnx") as file:
        assert beside.read(file, "x.onnx", 5) == b"12345"
        with pytest.raises(ModelFileError, match="has 5 bytes; an ONNX file has at most 4"):
            beside.read(file, "x.onnx", 4)


def test_weights_that_end_with_their_file_are_read_and_one_byte_more_is_not(tmp_path):
    (tmp_path / "w.bin").write_bytes(np.arange(3, dtype="<f4").tobytes())
    made = model(tensors=(linked(location="w.bin", offset="4"),))
    found = beside.weights_outside(made, tmp_path / "x.onnx")
    assert found["w"].tolist() == [1.0, 2.0]
    made = model(tensors=(linked(location="w.bin", offset="5"),))
    with pytest.raises(ModelFileError, match=r"lies at 5 of w\.bin, which ends before"):
        beside.weights_outside(made, tmp_path / "x.onnx")


def test_weights_may_be_as_many_as_are_allowed(tmp_path, monkeypatch):
    (tmp_path / "w.bin").write_bytes(bytes(8))
    made = model(tensors=(linked(location="w.bin"), numbers(1)))
    monkeypatch.setattr(beside, "MAX_DATA", 8)
    assert list(beside.weights_outside(made, tmp_path / "x.onnx")) == ["w"]
    monkeypatch.setattr(beside, "MAX_DATA", 7)
    with pytest.raises(ModelFileError, match="claims 8 bytes of weights in other files; 7 are"):
        beside.weights_outside(made, tmp_path / "x.onnx")


def test_tensors_may_not_share_what_their_file_has_not(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(16))
    other = linked(location="w.bin", offset="8")
    other.name = "v"
    third = linked(location="w.bin")
    third.name = "u"
    made = model(tensors=(linked(location="w.bin"), other))
    assert sorted(beside.weights_outside(made, tmp_path / "x.onnx")) == ["v", "w"]
    made.graph.initializer.append(third)
    with pytest.raises(ModelFileError, match=r"do not fit into w\.bin, which has 16 bytes"):
        beside.weights_outside(made, tmp_path / "x.onnx")


@pytest.mark.skipif(not hasattr(os, "link"), reason="no hard links here")
def test_what_was_opened_is_looked_at_once_more(tmp_path, monkeypatch):
    path = tmp_path / "w.bin"
    path.write_bytes(bytes(8))
    plain = os.lstat(path)
    os.link(path, tmp_path / "other name")
    monkeypatch.setattr(beside.os, "lstat", lambda _: plain)  # as it was a moment before
    with pytest.raises(ModelFileError) as refused:
        beside.opened(path, "x.onnx", is_beside=True)
    assert "it is a hard link" in refused.value.notes["why"]
    beside.opened(path, "x.onnx").close()
    assert stat.S_ISREG(plain.st_mode)


# The trial, told what its process said


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("", "it ended the process that tried it out (code -9)"),
        ('{"loaded": false, "why": "one\\n two"}', "one"),
        ('{"loaded": false, "why": " \\n"}', "it does not say why"),
        ('{"loaded": true, "is_sure": true, "why": "\\n\\tbad shape"}', "bad shape"),
        ('{"loaded": true, "is_sure": false, "why": "bad_alloc"}', "bad_alloc"),
        ('{"loaded": true, "is_sure": false, "why": "out of memory"}', "out of memory"),
    ],
)
def test_what_a_trial_finds_is_told(said, words, monkeypatch):
    monkeypatch.setattr(trial, "_child", lambda parts: (-9, said))
    with pytest.raises(ModelFileError) as refused:
        trial.try_out("x.onnx", b"content", {}, None)
    assert refused.value.notes["why"] == words


@pytest.mark.parametrize(
    "said",
    [
        '{"loaded": true}',
        '{"loaded": true, "is_sure": true, "why": ""}',
        '{"loaded": true, "is_sure": false, "why": "the sample is of another shape"}',
    ],
)
def test_a_sample_that_was_a_guess_proves_nothing(said, monkeypatch):
    monkeypatch.setattr(trial, "_child", lambda parts: (0, said))
    trial.try_out("x.onnx", b"content", {}, None)


def test_a_trial_is_told_all_of_the_file_and_its_limits(monkeypatch):
    given = []

    def child(parts):
        given.extend(parts)
        return 0, '{"loaded": true}'

    monkeypatch.setattr(trial, "_child", child)
    weights = {"w": np.ones((2, 3), np.float32)}
    trial.try_out("x.onnx", b"content", weights, (1, 4))
    order = json.loads(given[0])
    assert given[0].endswith(b"\n") and given[1] == b"content" and given[2] is weights["w"]
    assert order["tensors"] == [{"name": "w", "type": "<f4", "shape": [2, 3], "size": 24}]
    assert (order["size"], order["shape"], order["seconds"]) == (7, [1, 4], 60)
    assert order["memory"] == (4 << 30) + 4 * (7 + 24)


def test_a_trial_that_took_its_time_is_told_as_that(monkeypatch):
    monkeypatch.setattr(trial, "_child", lambda parts: (-9, ""))
    monkeypatch.setattr(trial, "SECONDS", 0)
    with pytest.raises(ModelFileError, match=r"took more than 0 s for one sample; stopped\."):
        trial.try_out("x.onnx", b"content", {}, None)


# The door


def file(**known: object) -> gate.OnnxFile:
    made = model()
    for key, value in known.items():
        made.metadata_props.add(key=key, value=str(value))
    return gate.OnnxFile(Path("x.onnx"), made.SerializeToString(), made, {}, HEX)


@pytest.mark.parametrize(
    ("recorded", "size"),
    [
        ("[3, 224, 224]", (3, 224, 224)),
        ("[1,8,8]", (1, 8, 8)),
        (f"[1, 1, {(1 << 26) // 1000}]", (1, 1, 67108)),
        ("[1, 8192, 8192]", (1, 8192, 8192)),
    ],
)
def test_a_recorded_size_is_read(recorded, size):
    assert file(input_size=recorded).input_size == size


@pytest.mark.parametrize(
    "recorded", ["[1, 8192, 8193]", "[0, 8, 8]", "[8, 8]", "[1, 8, 1000000000]"]
)
def test_a_recorded_size_beyond_the_bounds_is_refused(recorded):
    with pytest.raises(ModelFileError, match="records an input size that is none"):
        _ = file(input_size=recorded).input_size


def test_a_file_and_its_weights_are_put_together_up_to_the_bound(monkeypatch):
    made = model(tensors=(linked(location="w.bin"), numbers(1)))
    content, weights = made.SerializeToString(), {"w": np.array([1.0, 2.0], np.float32)}
    found = gate.OnnxFile(Path("x.onnx"), content, made, weights, HEX)
    assert found.size == len(content) + 8
    monkeypatch.setattr(gate, "MAX_FILE", found.size)
    tensor, other = found.whole().graph.initializer
    assert numpy_helper.to_array(tensor).tolist() == [1.0, 2.0]
    assert not tensor.external_data and tensor.data_location == TensorProto.DEFAULT
    assert numpy_helper.to_array(other).tolist() == [1]
    assert made.graph.initializer[0].external_data, "the file's own model is left as it is"
    monkeypatch.setattr(gate, "MAX_FILE", found.size - 1)
    with pytest.raises(ResourceError, match="is too large for one piece"):
        found.whole()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"PK\3\4" + bytes(60), "it "),
        (bytes(64), ""),
    ],
)
def test_what_is_no_onnx_file_is_told_for_what_it_looks_like(content, why, tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="is not an ONNX file") as refused:
        gate.read_onnx(path)
    assert refused.value.notes["why"].startswith(why)
    looks = re.match(r"it (is|looks like|was|holds)", refused.value.notes["why"])
    assert bool(looks) is bool(why)


def test_the_hash_is_of_the_model_and_all_its_weights(tmp_path):
    made = model(tensors=(linked(location="w.bin"),))
    (tmp_path / "x.onnx").write_bytes(made.SerializeToString())
    hashes = set()
    for values in ([1.0, 2.0], [1.0, 2.5]):
        (tmp_path / "w.bin").write_bytes(np.array(values, "<f4").tobytes())
        hashes.add(gate.read_onnx(tmp_path / "x.onnx").sha256)
    assert len(hashes) == 2


@pytest.mark.parametrize(("asked", "given"), [({}, 3), ({"threads": 0}, 3), ({"threads": 2}, 2)])
def test_as_many_threads_as_torch_has_are_used_unless_told(asked, given, tmp_path, monkeypatch):
    path = tmp_path / "x.onnx"
    path.write_bytes(model().SerializeToString())
    gate.vouch(path)
    monkeypatch.setattr(gate.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(gate.runtime, "open_session", lambda content, outside, threads: threads)
    assert gate.session(path, **asked) == given


def test_the_limits_are_those_that_are_promised():
    assert (gate.MAX_FILE, beside.MAX_DATA) == (2**31 - 1, 16 * 2**30)
    assert (trial.SECONDS, trial.SPARE_MEMORY) == (60, 4 * 2**30)
    assert (soundness.MAX_ELEMENTS, soundness.MAX_SAID) == (2**28, 2**40)
