"""What the pickle machine builds and what it refuses, opcode by opcode, written by hand."""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Callable

import pytest
import torch

from kdsurgeon.checkpoints import pickles
from kdsurgeon.checkpoints.pickles import Dropped, Storage, View, interpret, list_globals
from kdsurgeon.errors import ModelFileError

MARK, END = b"(", b"."


def text(word: str) -> bytes:
    return b"X" + struct.pack("<L", len(word.encode())) + word.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<l", value)


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def tupled(*parts: bytes) -> bytes:
    return MARK + b"".join(parts) + b"t"


def listed(*parts: bytes) -> bytes:
    return b"]" + MARK + b"".join(parts) + b"e"


def called(name: str, *arguments: bytes) -> bytes:
    return named(name) + tupled(*arguments) + b"R"


def storage(count: int = 6, kind: str = "torch.FloatStorage", key: str = "0") -> bytes:
    parts = text("storage"), named(kind), text(key), text("cpu"), number(count)
    return tupled(*parts) + b"Q"


def shape(*sizes: int) -> bytes:
    return tupled(*map(number, sizes))


def tensor(stored: bytes, offset: bytes, size: bytes, stride: bytes, *more: bytes) -> bytes:
    return called("torch._utils._rebuild_tensor_v2", stored, offset, size, stride, *more)


def typed(dtype: bytes, stored: bytes, size: bytes, stride: bytes) -> bytes:
    given = stored, number(0), size, stride, b"\x89", b"}", dtype
    return called("torch._utils._rebuild_tensor_v3", *given)


def read(body: bytes, **flags: bool | int) -> object:
    return interpret(io.BytesIO(b"\x80\x02" + body + END), "net.pt", **flags)


def view(*size: int, count: int = 6, offset: int = 0, stride: tuple[int, ...] = ()) -> View:
    return View(Storage("0", torch.float32, count), torch.float32, offset, size, stride)


POINT = number(0), b")", b")"
UNTYPED = "torch.storage.UntypedStorage"
PLAIN = {
    "none": (b"N", None),
    "true": (b"\x88", True),
    "false": (b"\x89", False),
    "numbers": (listed(number(-3), b"K\x07", b"M\x01\x02"), [-3, 7, 513]),
    "a long": (b"\x8a\x02\x00\x01", 256),
    "a float": (b"G" + struct.pack(">d", 0.5), 0.5),
    "text": (text("né"), "né"),
    "nothing": (b")", ()),
    "one": (number(1) + b"\x85", (1,)),
    "two": (number(1) + number(2) + b"\x86", (1, 2)),
    "three of four": (listed(*map(number, (0, 1, 2)), number(3) + b"\x87"), [0, (1, 2, 3)]),
    "appended": (b"]" + number(1) + b"a" + number(2) + b"a", [1, 2]),
    "an entry": (b"}" + text("a") + number(1) + b"s", {"a": 1}),
    "entries": (b"}" + MARK + text("a") + number(1) + number(2) + b"Nu", {"a": 1, 2: None}),
    "remembered": (b"]q\x05" + MARK + b"h\x05e", "itself"),
    "remembered far": (b"]" + text("a") + b"r\1\0\0\0a" + b"j\1\0\0\0a", ["a", "a"]),
    "ordered": (called("collections.OrderedDict"), {}),
    "pairs": (
        called("collections.OrderedDict", listed(listed(text("a"), number(1)))),
        {"a": 1},
    ),
    "counted": (called("collections.Counter", b"}" + text("a") + number(2) + b"s"), {"a": 2}),
    "built": (called("collections.OrderedDict") + b"}" + text("v") + number(1) + b"sb", {}),
    "a size": (called("torch.Size", listed(number(2), number(0))), (2, 0)),
    "no size": (called("torch.Size"), ()),
    "a device": (called("torch.device", text("cuda"), number(1)), "cuda:1"),
    "whole": (tensor(storage(), number(0), shape(2, 3), shape(3, 1)), view(2, 3, stride=(3, 1))),
    "the end": (tensor(storage(), number(4), shape(2), shape(1)), view(2, offset=4, stride=(1,))),
    "empty": (tensor(storage(0), number(0), shape(0), shape(1)), view(0, count=0, stride=(1,))),
    "a point": (tensor(storage(1), number(0), b")", b")"), view(count=1)),
    "repeated": (
        tensor(storage(2), number(0), shape(2, 1), shape(1, 0)),
        view(2, 1, count=2, stride=(1, 0)),
    ),
    "a parameter": (
        called("torch._utils._rebuild_parameter", tensor(storage(1), *POINT), b"\x88", b"}"),
        view(count=1),
    ),
    "64 axes": (
        tensor(storage(1), number(0), shape(*[1] * 64), shape(*[1] * 64)),
        view(*[1] * 64, count=1, stride=(1,) * 64),
    ),
    "of bytes": (
        typed(named("torch.float16"), storage(6, UNTYPED), shape(3), shape(1)),
        View(Storage("0", torch.uint8, 6), torch.float16, 0, (3,), (1,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_plain_data_is_built_as_it_is_described(name):
    body, wanted = PLAIN[name]
    found = read(body)
    if wanted == "itself":
        assert found[0] is found
        return
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize("kind", [*pickles.STORAGES, "storage.UntypedStorage"])
def test_storages_of_every_type_are_known(kind):
    body = tensor(storage(2, f"torch.{kind}"), number(1), b")", b")")
    assert read(body).dtype == pickles.STORAGES.get(kind, torch.uint8)


REFUSED = {
    "a name": (named("os.system"), "it names os.system"),
    "an opcode": (b"\x8f", "opcode EMPTY_SET"),
    "a call of nothing": (number(1) + b")R", r"it calls \?"),
    "a call of a type": (named("torch.float32") + b")R", "it calls torch.float32"),
    "no arguments": (named("torch.Size") + b"]R", "it calls torch.Size"),
    "an item of a dict": (b"}" + number(1) + b"a", "it appends to dict"),
    "an entry of a list": (b"]" + number(1) + number(2) + b"s", "it puts items into list"),
    "half an entry": (b"}" + MARK + text("a") + b"u", "it puts items into dict"),
    "a tuple as a key": (b"}" + b")" + number(1) + b"s", "a tuple as a key"),
    "state of a list": (b"]" + b"}b", "it changes list"),
    "state that is a list": (b"}]b", "it changes dict"),
    "no storage": (tupled(*[text("x")] * 5) + b"Q", "a storage is not described as torch.save"),
    "a number as a key": (
        tupled(text("storage"), named("torch.FloatStorage"), *map(number, (0, 0, 1))) + b"Q",
        "a storage is not described as torch.save",
    ),
    "a storage of -1": (storage(-1), "a storage is not described as torch.save"),
    "a storage of a dtype": (storage(1, "torch.float32"), "a storage of type torch.float32"),
    "text as a shape": (called("torch.Size", text("ab")), "a shape that is not one"),
    "a negative shape": (called("torch.Size", listed(number(-1))), "a shape that is not one"),
    "a truth as a size": (called("torch.Size", listed(b"\x88")), "a shape that is not one"),
    "a device of a list": (called("torch.device", b"]"), "a device that is not one"),
    "other strides": (
        tensor(storage(), number(0), shape(2), shape(1, 1)), "shape and strides disagree"
    ),
    "an offset of text": (tensor(storage(), text("0"), shape(2), shape(1)), "strides disagree"),
    "65 axes": (
        tensor(storage(1), number(0), shape(*[1] * 65), shape(*[1] * 65)), "strides disagree"
    ),
    "one beyond": (tensor(storage(), number(5), shape(2), shape(1)), "outside of its storage"),
    "one too many": (tensor(storage(), number(0), shape(7), shape(0)), "outside of its storage"),
    "a stride too far": (tensor(storage(), number(0), shape(2), shape(6)), "outside of its stor"),
    "wider numbers": (
        typed(named("torch.float64"), storage(6), shape(4), shape(1)), "outside of its storage"
    ),
    "conjugate": (
        tensor(storage(), *POINT, b"\x89", b"}", b"}" + text("conj") + b"\x88s"),
        "a tensor with conjugate or negative bits",
    ),
    "no type": (typed(text("torch.float32"), storage(), b")", b")"), "a tensor without a type"),
    "another type": (
        typed(named("torch.Size"), storage(), b")", b")"), "a tensor without a type"
    ),
    "a parameter of text": (
        called("torch._utils._rebuild_parameter", text("x")), "a parameter that is not a tensor"
    ),
    "two of none": (b"\x86", "it takes 2 from a stack of 0"),
    "three of two": (number(1) + number(2) + b"\x87", "it takes 3 from a stack of 2"),
    "an unknown memory": (b"h\x05", "KeyError"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_state_dict_does_not_need_is_refused(name):
    body, words = REFUSED[name]
    with pytest.raises(ModelFileError, match="is damaged or made to harm") as refused:
        read(body)
    assert re.search(words, refused.value.notes["why"]), refused.value.notes["why"]


def test_another_protocol_is_refused_unless_objects_are_dropped():
    raw = b"\x80\x04" + number(1) + END
    with pytest.raises(ModelFileError) as refused:
        interpret(io.BytesIO(raw), "net.pt")
    assert refused.value.notes["why"] == "pickle protocol 4; torch.save writes 2"
    assert interpret(io.BytesIO(raw), "net.pt", drop=True) == 1


LIMITS: dict[str, tuple[str, Callable[[int], bytes], str]] = {
    "items of lists": ("MAX_ITEMS", lambda n: listed(*[b"N"] * n), "it holds too many items"),
    "items of calls": (
        "MAX_ITEMS", lambda n: called("torch.device", *[number(1)] * n), "too many items"
    ),
    "entries": (
        "MAX_ITEMS", lambda n: b"}" + MARK + (text("a") + b"N") * n + b"u", "too many items"
    ),
    "tensors": (
        "MAX_TENSORS", lambda n: tupled(*[tensor(storage(), *POINT)] * n), "more than 6 tensors"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_as_much_as_is_allowed_is_read_and_no_more(name, monkeypatch):
    limit, made, words = LIMITS[name]
    often = {"items of lists": 2, "entries": 4}.get(name, 1)  # above their mark, and where they go
    monkeypatch.setattr(pickles, limit, 6 * often)
    assert read(made(6)) is not None
    with pytest.raises(ModelFileError) as refused:
        read(made(7))
    assert words in refused.value.notes["why"]


def test_a_pickle_of_as_many_steps_or_bytes_as_are_allowed_is_read(monkeypatch):
    body = listed(number(1), number(2))  # PROTO, ], (, J, J, e, STOP
    assert read(body, max_steps=6) == [1, 2]
    with pytest.raises(ModelFileError) as refused:
        read(body, max_steps=5)
    assert refused.value.notes["why"] == "it is too long"
    stream = io.BytesIO(b"ahead" + b"\x80\x02" + body + END)
    stream.seek(5)
    monkeypatch.setattr(pickles, "MAX_PICKLE", 2 + len(body))
    assert interpret(stream, "net.pt") == [1, 2]
    monkeypatch.setattr(pickles, "MAX_PICKLE", 1 + len(body))
    with pytest.raises(ModelFileError) as refused:
        read(body)
    assert refused.value.notes["why"] == "it is too long"


# Objects that are dropped


def test_objects_that_are_not_made_keep_what_they_held():
    found = read(
        called("os.system", text("true")) + b"}" + text("a") + number(1) + b"sb", drop=True
    )
    assert isinstance(found, Dropped)
    assert (found.name, found.items, found.state) == ("os.system", ["true"], {"a": 1})


DROPPED = {
    "a set": (b"\x8f" + MARK + number(1) + b"\x90", ("builtins.set", [1])),
    "a frozen set": (MARK + number(1) + b"\x91", ("builtins.frozenset", [1])),
    "made anew": (named("a.B") + tupled(number(1)) + b"\x81", ("a.B", [1])),
    "from keywords": (named("a.B") + tupled(number(1)) + b"}\x92", ("a.B", [1])),
    "old": (MARK + named("a.B") + number(1) + b"o", ("a.B", [])),
    "a name of two": (text("a") + text("B") + b"\x93" + b")\x81", ("a.B", [])),
    "appended": (named("a.B") + b")\x81" + number(1) + b"a", ("a.B", [1])),
    "keyed": (named("a.B") + b")\x81" + b")" + number(1) + b"s", ("a.B", [])),
}


@pytest.mark.parametrize("name", DROPPED)
def test_every_way_to_make_an_object_drops_it(name):
    body, wanted = DROPPED[name]
    found = read(body, drop=True)
    assert isinstance(found, Dropped)
    assert (found.name, found.items) == wanted
    with pytest.raises(ModelFileError):
        read(body)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        {"a": b"bytes", "b": [1, 2 ** 40, -(2 ** 70), 0.5], "c": ("x" * 300, "y" * 70_000)},
        {"d": b"z" * 300, 3: None, 0.5: True, None: False},
    ],
)  # fmt: skip
def test_plain_pickles_of_every_protocol_are_read(value, protocol):
    raw = pickle.dumps(value, protocol=protocol)
    found = interpret(io.BytesIO(raw), "net.pt", drop=True)
    if protocol == 2:  # bytes are made by a call there
        found = {k: (value[k] if isinstance(v, Dropped) else v) for k, v in found.items()}
    assert found == value


def test_what_is_popped_is_gone():
    assert read(number(1) + number(2) + b"0", drop=True) == 1
    assert read(number(1) + MARK + number(2) + b"1", drop=True) == 1
    with pytest.raises(ModelFileError, match="damaged or made to harm"):
        read(number(1) + number(2) + b"0")


def test_a_list_of_a_dropped_key_is_left_out():
    assert read(b"}" + b")" + number(1) + b"s" + text("a") + number(2) + b"s", drop=True) == {
        "a": 2
    }


# Names


NAMES = {
    "two": (named("a.b") + named("c.d"), ["a.b", "c.d"]),
    "once": (named("a.b") + named("a.b"), ["a.b"]),
    "a space in it": (b"ca\nb c\n", ["a.b c"]),
    "an instance": (MARK + b"ia\nb\n", ["a.b"]),
    "on the stack": (text("x") + text("a") + text("b") + b"\x93", ["a.b"]),
    "from nothing": (b"\x93", ["?"]),
    "from one": (text("a") + b"\x93", ["?"]),
    "an extension": (b"\x82\x07", ["copyreg extension 7"]),
    "a long extension": (b"\x84\x07\0\0\0", ["copyreg extension 7"]),
    "remembered": (
        text("a") + b"q\x03" + text("b") + b"q\x04" + text("c") + b"h\x03h\x04\x93", ["a.b"],
    ),
    "remembered in turn": (
        text("a") + b"\x94" + text("b") + b"\x94" + text("c") + b"h\x00h\x01\x93", ["a.b"],
    ),
    "remembered as text": (text("a") + b"p3\n" + text("b") + b"p4\ng3\ng4\n\x93", ["a.b"]),
    "remembered from nothing": (b"]\x94" + text("a") + b"h\x00\x93", ["a.?"]),
    "never remembered": (text("a") + b"h\x09\x93", ["a.?"]),
    "broken off": (named("a.b") + b"X\xff", ["a.b"]),
    "control signs": (b"ca\x1b\nb\n", ["a?.b"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_listed(name):
    body, wanted = NAMES[name]
    assert list_globals(io.BytesIO(b"\x80\x02" + body + END)) == wanted


def test_names_are_listed_up_to_the_limit_of_steps():
    body = b"\x80\x02" + named("a.b") + named("c.d") + END
    assert list_globals(io.BytesIO(body), max_steps=1) == ["a.b"]
    assert list_globals(io.BytesIO(body), max_steps=2) == ["a.b", "c.d"]


# Parts


def test_a_storage_is_named_once_for_every_view():
    shared = read(listed(tensor(storage(), *POINT), tensor(storage(3, key="1"), *POINT)))
    assert sorted(each.key for each in pickles.storages_in(shared)) == ["0", "1"]
    inside = [Dropped("a.B", state={"x": shared[0]}, items=[(shared[1],)])]
    assert sorted(each.key for each in pickles.storages_in(inside)) == ["0", "1"]


def test_data_that_contains_itself_is_walked_once():
    loop: list = [1]
    loop.append(loop)
    assert [each for each in pickles.walk(loop) if isinstance(each, int)] == [1]


def test_words_of_a_file_are_fit_for_a_terminal():
    assert pickles.printable("a\x1bb" + "x" * 200) == "a?b" + "x" * 157
