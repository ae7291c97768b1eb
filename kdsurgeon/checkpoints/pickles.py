"""Read what a pickle says without doing what it asks.

:func:`list_globals` names everything a pickle would import. :func:`interpret` is a pickle machine
that builds plain data only: it knows the few constructors of a state dict, imports nothing, calls
nothing that the file names, and bounds its own work. Strict, it is the gate in front of
``torch.load``; with ``drop=True`` it is the reader of ``kdsurgeon convert``, and what it does not
know becomes a :class:`Dropped`.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from kdsurgeon.checkpoints.store import MAX_TENSORS
from kdsurgeon.errors import ModelFileError

MAX_PICKLE = 64 << 20
MAX_STEPS = 4_000_000
MAX_ITEMS = 4_000_000

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_DTYPES = {f"torch.{name}" for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
_REBUILDERS = {
    f"torch._utils._rebuild_{kind}"
    for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")
}
ALLOWED = frozenset(
    _DTYPES
    | _REBUILDERS
    | {f"torch.{name}" for name in STORAGES}
    | {"torch.storage.UntypedStorage", "torch.Size", "torch.device"}
    | {"collections.OrderedDict", "collections.Counter"}
)


@dataclass(frozen=True)
class Global:
    """Something that a pickle names and would import."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A run of numbers that lies outside of the pickle, by key."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class View:
    """A tensor as a pickle describes it: a window onto a storage, in elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        """One behind the last element that is touched; 0 for an empty tensor."""
        if 0 in self.size:
            return 0
        steps = zip(self.size, self.stride, strict=True)
        return self.offset + sum((size - 1) * stride for size, stride in steps) + 1


@dataclass(eq=False)
class Dropped:
    """An object that was not made; ``state`` is what would have been its attributes."""

    name: str
    state: Any = None
    items: list[Any] = field(default_factory=list)


def list_globals(stream: io.BytesIO, *, max_steps: int = MAX_STEPS) -> list[str]:
    """Every name that the pickle at ``stream`` would import, in order of appearance.

    A name that is put together at run time is listed as ``?``. A pickle that breaks off is listed
    up to there.
    """
    found: dict[str, None] = {}
    texts: list[str] = []
    memo: dict[int, str] = {}
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if step > max_steps:
                break
            match opcode.name:
                case "GLOBAL" | "INST":
                    found[str(argument).replace(" ", ".", 1)] = None
                case "STACK_GLOBAL":
                    found[".".join(texts[-2:]) if len(texts) > 1 else "?"] = None
                case "EXT1" | "EXT2" | "EXT4":
                    found[f"copyreg extension {argument}"] = None
                case "PUT" | "BINPUT" | "LONG_BINPUT" if texts:
                    memo[int(argument or 0)] = texts[-1]
                case "MEMOIZE":
                    memo[len(memo)] = texts[-1] if texts else "?"
                case "GET" | "BINGET" | "LONG_BINGET":
                    texts.append(memo.get(int(argument or 0), "?"))
                case _ if isinstance(argument, str):
                    texts.append(argument)
    except Exception:  # pickletools raises whatever the bytes make it raise; it runs nothing
        pass
    return [printable(name) for name in found]


def interpret(
    stream: io.BytesIO, name: str, *, drop: bool = False, max_steps: int = MAX_STEPS
) -> Any:
    """The plain data that the pickle at ``stream`` describes; the stream is left behind it.

    Tensors come as :class:`View`. Raises :class:`ModelFileError` for anything that a state dict
    does not need; with ``drop`` unknown objects become :class:`Dropped` instead.
    """
    try:
        return _Machine(name, drop).run(stream, max_steps)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        raise _malformed(name, f"{type(error).__name__}: {error}") from error


def printable(text: str) -> str:
    """Words of a file, fit for a terminal: no control characters, not too many."""
    return "".join(c if c.isprintable() else "?" for c in text[:160])


def _malformed(name: str, why: str) -> ModelFileError:
    return ModelFileError(
        f"{name} is damaged or made to harm: its pickle is not one of a state dict.",
        why=printable(why),
        fix="copy it again, save the state_dict anew with a current torch, or take its tensors:\n"
        "  kdsurgeon convert FILE out.safetensors --drop-extra",
    )


class _Machine:
    """The stack machine of the pickle format, reduced to data."""

    def __init__(self, name: str, drop: bool) -> None:
        self.name, self.drop = name, drop
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.num_tensors = 0
        self.num_items = 0

    def run(self, stream: io.BytesIO, max_steps: int) -> Any:
        start = stream.tell()
        for step, (opcode, argument, place) in enumerate(pickletools.genops(stream)):
            if step > max_steps or (place or 0) - start > MAX_PICKLE:
                raise self._refuse("it is too long")
            if opcode.name != "STOP":
                self.step(opcode.name, argument)
        return self.stack.pop()

    def step(self, opcode: str, argument: Any) -> None:
        stack, memo = self.stack, self.memo
        match opcode:
            case "PROTO":
                if argument != 2 and not self.drop:
                    raise self._refuse(f"pickle protocol {argument}; torch.save writes 2")
            case "FRAME" if self.drop:
                pass
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "GLOBAL":
                stack.append(self.named(argument.replace(" ", ".", 1)))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                if len(stack) < count:
                    raise self._refuse(f"it takes {count} from a stack of {len(stack)}")
                self.stack[-count:] = [self.sized(tuple(stack[-count:]), count)]
            case "TUPLE":
                items = self.above_mark()
                self.stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                self.extend(stack[-1], [item])
            case "APPENDS":
                items = self.above_mark()
                self.extend(self.stack[-1], items)
            case "SETITEM":
                pair = stack[-2:]
                del stack[-2:]
                self.fill(stack[-1], pair)
            case "SETITEMS":
                items = self.above_mark()
                self.fill(self.stack[-1], items)
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(self.call(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                self.build(stack[-1], state)
            case _ if self.drop:
                self.step_dropping(opcode, argument)
            case _:
                raise self._refuse(f"opcode {opcode}")

    def step_dropping(self, opcode: str, argument: Any) -> None:
        """The opcodes of other protocols and of general objects; 0 has no word for a tensor."""
        stack = self.stack
        match opcode:
            case "INT" | "LONG" | "LONG4" | "BINUNICODE8" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "EMPTY_SET":
                stack.append(Dropped("builtins.set"))
            case "FROZENSET":
                items = self.above_mark()
                self.stack.append(Dropped("builtins.frozenset", items=items))
            case "ADDITEMS":
                items = self.above_mark()
                self.extend(self.stack[-1], items)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.above_mark()
            case "STACK_GLOBAL":
                module, attribute = stack[-2:]
                stack[-2:] = [self.named(f"{module}.{attribute}")]
            case "NEWOBJ":
                arguments = stack.pop()
                stack.append(self.call(stack.pop(), arguments))
            case "NEWOBJ_EX":
                del stack[-1]
                arguments = stack.pop()
                stack.append(self.call(stack.pop(), arguments))
            case "OBJ":
                items = self.above_mark()
                self.stack.append(Dropped(items[0].name))
            case _:
                raise self._refuse(f"opcode {opcode}")

    def above_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return self.sized(items, len(items))

    def sized(self, value: Any, count: int) -> Any:
        self.num_items += count
        if self.num_items > MAX_ITEMS:
            raise self._refuse("it holds too many items")
        return value

    def named(self, name: str) -> Global:
        if name not in ALLOWED and not self.drop:
            raise self._refuse(f"it names {name}")
        return Global(name)

    def extend(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, list | Dropped):
            place = target if isinstance(target, list) else target.items
            place.extend(self.sized(items, len(items)))
        else:
            raise self._refuse(f"it appends to {type(target).__name__}")

    def fill(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict | Dropped) or len(items) % 2:
            raise self._refuse(f"it puts items into {type(target).__name__}")
        self.sized(items, len(items))
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str | int | float | None):
                if isinstance(target, dict):
                    target[key] = value
            elif not self.drop:
                raise self._refuse(f"a {type(key).__name__} as a key")

    def build(self, target: Any, state: Any) -> None:
        if isinstance(target, Dropped):
            target.state = state
        elif not isinstance(target, dict) or not isinstance(state, dict):
            raise self._refuse(f"it changes {type(target).__name__}")

    def storage(self, identity: Any) -> Storage:
        """A persistent id of torch.save: ("storage", type, key, place, count)."""
        word, kind, key, _, count, *_ = identity
        self.num_tensors += 1
        if self.num_tensors > MAX_TENSORS:
            raise self._refuse(f"it holds more than {MAX_TENSORS:,} tensors")
        if word != "storage" or not isinstance(key, str) or not _is_size(count):
            raise self._refuse("a storage is not described as torch.save does")
        label = kind.name.removeprefix("torch.")
        if label == "storage.UntypedStorage":
            return Storage(key, torch.uint8, count)
        if label not in STORAGES:
            raise self._refuse(f"a storage of type {kind.name}")
        return Storage(key, STORAGES[label], count)

    def call(self, function: Any, arguments: Any) -> Any:
        """What a known constructor would return; nothing is called that the file names."""
        named = function.name if isinstance(function, Global) else "?"
        if not isinstance(arguments, tuple) or not (self.drop or named in self.makers):
            raise self._refuse(f"it calls {named}")
        if named in self.makers:
            return self.makers[named](self, *arguments)
        return Dropped(named, items=list(self.sized(arguments, len(arguments))))

    def mapping(self, items: Any = ()) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        pairs = items.items() if isinstance(items, dict) else items
        flat = [part for key, value in pairs for part in (key, value)]
        self.fill(made, flat)
        return made

    def numbers(self, items: Any = ()) -> tuple[int, ...]:
        if not isinstance(items, tuple | list) or not all(map(_is_size, items)):
            raise self._refuse("a shape that is not one")
        return self.sized(tuple(items), len(items))

    def view(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        _: Any = 0,
        __: Any = 0,
        bits: Any = 0,
    ) -> View:
        return self.window(storage, storage.dtype, offset, size, stride, bits)

    def view_of(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        _: Any,
        __: Any,
        dtype: Any,
        bits: Any = 0,
    ) -> View:
        if not isinstance(dtype, Global) or dtype.name not in _DTYPES:
            raise self._refuse("a tensor without a type")
        number = getattr(torch, dtype.name.removeprefix("torch."))
        return self.window(storage, number, offset, size, stride, bits)

    def window(
        self, storage: Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any, bits: Any
    ) -> View:
        if bits:
            raise self._refuse("a tensor with conjugate or negative bits")
        size, stride = self.numbers(size), self.numbers(stride)
        if not _is_size(offset) or len(size) != len(stride) or len(size) > 64:
            raise self._refuse("a tensor whose shape and strides disagree")
        window = View(storage, dtype, offset, size, stride)
        room = storage.count * storage.dtype.itemsize
        if max(math.prod(size), window.end) * dtype.itemsize > room:
            raise self._refuse(f"a tensor of shape {size} that lies outside of its storage")
        return window

    def parameter(self, data: Any, *_: Any) -> View:
        if not isinstance(data, View):
            raise self._refuse("a parameter that is not a tensor")
        return data

    def device(self, *parts: Any) -> str:
        if not all(isinstance(part, str | int) for part in parts):
            raise self._refuse("a device that is not one")
        return ":".join(map(str, parts))

    makers: ClassVar[dict[str, Callable[..., Any]]] = {
        "collections.OrderedDict": mapping,
        "collections.Counter": mapping,
        "torch.Size": numbers,
        "torch.device": device,
        "torch._utils._rebuild_tensor": view,
        "torch._utils._rebuild_tensor_v2": view,
        "torch._utils._rebuild_tensor_v3": view_of,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
    }

    def _refuse(self, why: str) -> ModelFileError:
        return _malformed(self.name, why)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def storages_in(value: Any) -> Iterator[Storage]:
    """Every storage that plain data refers to, once per view."""
    for part in walk(value):
        if isinstance(part, View):
            yield part.storage


def walk(value: Any) -> Iterator[Any]:
    """Every part of plain data once, however often it is shared or contained in itself."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, dict):
            waiting.extend(part.values())
        elif isinstance(part, list | tuple):
            waiting.extend(part)
        elif isinstance(part, Dropped):
            waiting.extend([part.state, *part.items])
