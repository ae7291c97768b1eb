"""Draw random classifiers: motifs of real networks, put together in random order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch

from tests.fuzz.programs import (
    CLASSES,
    HINT,
    IMAGE,
    KINDS,
    Program,
    Step,
    build,
    inputs,
    without_dead_steps,
)

# beside the kinds of steps: what a program returns, a second input, and writes to shared memory
FORMS = frozenset({"dict", "tuple", "hint", "aliases"})
HOSTILE = frozenset({"branch"})  # to be refused
SUPPORTED = (frozenset(KINDS) | FORMS) - HOSTILE

_FRESH = frozenset(
    {
        "conv", "conv_block", "linear", "tied", "batch_norm", "batch_norm_1d", "layer_norm",
        "gelu", "add", "multiply", "gate", "cat", "max_pool", "avg_pool", "squeeze_excite",
        "attention", "position", "position_table", "relu", "relu_function",
    }
)  # fmt: skip
_VIEWING = frozenset(
    {
        "identity", "dropout", "dropout_function", "drop_path", "chunk", "item", "channels",
        "flatten", "flatten_by_sizes", "unflatten", "unflatten_by_sizes", "drop_first", "to_nhwc",
        "to_nchw", "first_token",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """What a step makes: a map, nhwc map, tokens or vector; ``size`` is its height or length."""

    name: str
    kind: str
    width: int
    size: int = 1
    has_class_token: bool = False
    is_rectified: bool = False


@dataclass
class _Draft:
    """A program being written."""

    random: random.Random
    kinds: frozenset[str]
    steps: list[Step] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    own_memory: set[str] = field(default_factory=set)  # nothing else looks at what these hold

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def pick(self, names: Iterable[str]) -> str | None:
        known = [name for name in names if name in self.kinds]
        return self.random.choice(known) if known else None

    def emit(
        self,
        operation: str,
        like: Value,
        /,
        *reads: str,
        numbers: tuple[int, ...] = (),
        layer: str | None = None,
        **changes: object,
    ) -> Value:
        """Write a step that reads ``like`` and makes such a value, but for ``changes``."""
        index = len(self.steps)
        own = f"m{index:02d}" if KINDS[operation].make else ""
        step = Step(operation, f"v{index:02d}", (like.name, *reads), numbers, layer or own)
        self.steps.append(step)
        if operation in _FRESH:
            self.own_memory.add(step.out)
        elif operation in _VIEWING:
            self.own_memory.discard(like.name)
        elif operation.endswith("in_place") and like.name in self.own_memory:
            self.own_memory.add(step.out)
        changes = {"is_rectified": False, **changes}
        value = replace(like, name=step.out, **changes)  # pyright: ignore[reportArgumentType]
        self.values.append(value)
        return value

    def may_write(self, value: Value) -> bool:
        return value.name in self.own_memory or "aliases" in self.kinds


Motif = Callable[[_Draft, Value], Value]


def draw(seed: int, kinds: frozenset[str] = SUPPORTED) -> Program:
    """The random classifier of ``seed``, out of steps of these kinds.

    Programs that torch itself cannot train (a write over what a gradient still needs) are drawn
    again.
    """
    for attempt in range(100):
        program = _draw(random.Random(seed * 1000 + attempt), seed, kinds)
        if len(program.steps) <= 24 and runs(program):
            return program
    raise AssertionError(f"no program of seed {seed} can be trained")


def runs(program: Program) -> bool:
    """Whether plain torch runs the program forward and backward in both modes."""
    try:
        model = build(program)
        batch = inputs(2, seed=program.seed, has_hint=program.has_hint)
        for training in (True, False):
            logits = logits_of(model.train(training)(**batch))
            logits.square().sum().backward()
        if any(value._version for value in batch.values()):
            return False  # a classifier does not write to its images
    except (RuntimeError, IndexError, ValueError, TypeError, NameError):
        return False
    return logits.shape == (2, CLASSES) and bool(logits.isfinite().all())


def logits_of(output: object) -> torch.Tensor:
    """The logits in what a model returns."""
    if isinstance(output, dict):
        return output["logits"]
    return output[0] if isinstance(output, tuple) else output  # pyright: ignore[reportReturnType]


def _draw(chance: random.Random, seed: int, kinds: frozenset[str]) -> Program:
    draft = _Draft(chance, kinds)
    image = Value("image", "map", IMAGE[0], IMAGE[1])
    value = _conv(draft, image, width=chance.choice((4, 6, 8)))
    has_hint = "hint" in kinds and draft.chance(0.2)
    for _ in range(chance.randint(1, 5)):
        if len(draft.steps) > 15:
            break
        if has_hint and draft.chance(0.5):
            value = _read_hint(draft, value)
        value = _motif(draft, value)
    value = _to_vector(draft, value)
    if draft.chance(0.3):
        value = chance.choice(VECTOR_MOTIFS)(draft, value)
    draft.emit("linear", value, numbers=(value.width, CLASSES))
    returns = "tensor"
    if draft.chance(0.15):
        returns = draft.pick(("dict", "tuple")) or returns
    program = Program(seed, tuple(draft.steps), returns, has_hint)
    if draft.chance(0.95):
        program = without_dead_steps(program)
    uses_hint = any("hint" in step.reads for step in program.steps)
    return replace(program, has_hint=uses_hint)


def _motif(draft: _Draft, value: Value) -> Value:
    motifs = {"map": MAP_MOTIFS, "tokens": TOKEN_MOTIFS, "vector": VECTOR_MOTIFS}[value.kind]
    return draft.random.choice(motifs)(draft, value)


# single steps ────────────────────────────────────────────────────────────────────────────────────


def _conv(draft: _Draft, x: Value, *, width: int | None = None, stride: int = 1) -> Value:
    width = width or draft.random.choice((4, 6, 8))
    if draft.chance(0.2):
        return draft.emit(
            "conv_block", x, numbers=(x.width, width, stride), width=width,
            size=(x.size - 1) // stride + 1, is_rectified=True,
        )  # fmt: skip
    groups = 2 if x.width % 2 == 0 and width % 2 == 0 and draft.chance(0.25) else 1
    kernel = 3 if stride == 2 else draft.random.choice((1, 3))
    numbers = (x.width, width, kernel, stride, groups)
    size = (x.size - 1) // stride + 1
    return draft.emit("conv", x, numbers=numbers, width=width, size=size)


def _norm(draft: _Draft, x: Value) -> Value:
    kind = {"map": "batch_norm", "vector": "batch_norm_1d"}.get(x.kind, "layer_norm")
    return draft.emit(kind, x, numbers=(x.width,))


def _activate(draft: _Draft, x: Value) -> Value:
    if x.is_rectified:
        return draft.emit("gelu", x)
    kinds = ["relu", "relu_function", "gelu"]
    if draft.may_write(x):
        kinds += ["relu_in_place", "relu_function_in_place", "relu_method_in_place"] * 2
    kind = draft.pick(kinds) or "gelu"
    return draft.emit(kind, x, is_rectified=kind != "gelu")


def _drop(draft: _Draft, x: Value) -> Value:
    kind = draft.pick(("dropout", "dropout_function", "drop_path", "identity"))
    return draft.emit(kind, x, is_rectified=x.is_rectified) if kind else x


def _join(draft: _Draft, x: Value, y: Value) -> Value:
    """``x`` and ``y``, alike, added or multiplied; sometimes into the memory of ``x``."""
    kinds = ["add", "add", "multiply"]
    if draft.may_write(x) and x.name != y.name:
        kinds += ["add_in_place", "add_in_place", "add_method_in_place", "multiply_in_place"]
    return draft.emit(draft.pick(kinds) or "add", x, y.name)


def _again(draft: _Draft, x: Value) -> Value:
    """A layer that stands somewhere already, called once more."""
    same = [
        step
        for step in draft.steps
        if (step.kind == "conv" and x.kind == "map" and step.numbers[:2] == (x.width, x.width)
            and step.numbers[3] == 1)
        or (step.kind == "linear" and x.kind == "tokens" and step.numbers == (x.width, x.width))
        or (step.kind in ("batch_norm", "layer_norm", "batch_norm_1d")
            and step.numbers == (x.width,)
            and step.kind == {"map": "batch_norm", "tokens": "layer_norm"}.get(x.kind))
    ]  # fmt: skip
    if not same:
        return _conv(draft, x, width=x.width) if x.kind == "map" else _norm(draft, x)
    chosen = draft.random.choice(same)
    kind = "tied" if chosen.kind == "linear" and "tied" in draft.kinds else chosen.kind
    return draft.emit(kind, x, numbers=chosen.numbers, layer=chosen.layer)


# motifs of maps ──────────────────────────────────────────────────────────────────────────────────


def _plain(draft: _Draft, x: Value) -> Value:
    stride = 2 if x.size > 2 and draft.chance(0.3) else 1
    y = _conv(draft, x, stride=stride)
    if draft.chance(0.6):
        y = _norm(draft, y)
    return _activate(draft, y)


def _residual(draft: _Draft, x: Value) -> Value:
    y = _conv(draft, x, width=x.width)
    if draft.chance(0.6):
        y = _norm(draft, y)
    if draft.chance(0.6):
        y = _activate(draft, y)
    if draft.chance(0.4):
        y = _drop(draft, y)
    y = _join(draft, y, x)
    return _activate(draft, y) if draft.chance(0.5) else y


def _old_name(draft: _Draft, x: Value) -> Value:
    """A value read by its old name after it was written to."""
    y = _conv(draft, x)
    z = _activate(draft, y)
    return _join(draft, _conv(draft, z, width=y.width), y)


def _dense(draft: _Draft, x: Value) -> Value:
    y = _activate(draft, _conv(draft, x, width=4))
    return draft.emit("cat", x, y.name, numbers=(1,), width=x.width + y.width)


def _split(draft: _Draft, x: Value) -> Value:
    half = x.width // 2
    if draft.chance(0.5) or "chunk" not in draft.kinds:
        parts = [
            draft.emit("channels", x, numbers=(half * i, half * (i + 1)), width=half)
            for i in range(2)
        ]
    else:
        both = draft.emit("chunk", x, numbers=(1,), kind="tuple")
        draft.values.pop()
        parts = [draft.emit("item", both, numbers=(i,), kind="map", width=half) for i in range(2)]
    first = _conv(draft, parts[0], width=half)
    reads = (parts[1], first) if draft.chance(0.5) else (first, parts[1])
    return draft.emit("cat", reads[0], reads[1].name, numbers=(1,), width=2 * half)


def _branches(draft: _Draft, x: Value) -> Value:
    y, z = _conv(draft, x, width=6), _conv(draft, x, width=6)
    if draft.chance(0.4):
        y = _activate(draft, y)
    if draft.chance(0.4):
        z = _norm(draft, z)
    return _join(draft, y, z)


def _long_skip(draft: _Draft, x: Value) -> Value:
    alike = [
        y for y in draft.values[:-1]
        if (y.kind, y.width, y.size, y.has_class_token)
        == (x.kind, x.width, x.size, x.has_class_token)
    ]  # fmt: skip
    return _join(draft, x, draft.random.choice(alike)) if alike else _motif(draft, x)


def _pool(draft: _Draft, x: Value) -> Value:
    if x.size < 4:
        return _residual(draft, x)
    kind = draft.pick(("max_pool", "avg_pool"))
    changes = {"size": x.size // 2, "is_rectified": x.is_rectified}
    return draft.emit(kind, x, **changes) if kind else _plain(draft, x)


def _gate(draft: _Draft, x: Value) -> Value:
    if draft.chance(0.5):
        return draft.emit("squeeze_excite", x, numbers=(x.width,))
    y = draft.emit("mean_of_map", x, kind="vector", size=1)
    y = draft.emit("linear", y, numbers=(x.width, x.width))
    return draft.emit("gate", x, y.name)


def _nhwc(draft: _Draft, x: Value) -> Value:
    y = draft.emit("to_nhwc", x, kind="nhwc")
    y = draft.emit("layer_norm", y, numbers=(x.width,))
    y = draft.emit("gelu", draft.emit("linear", y, numbers=(x.width, x.width)))
    y = draft.emit("to_nchw", y, kind="map")
    return _join(draft, y, x) if draft.chance(0.5) else y


def _repeat(draft: _Draft, x: Value) -> Value:
    y = _again(draft, x)
    y = _activate(draft, y)
    return _again(draft, y) if draft.chance(0.5) else y


def _write(draft: _Draft, x: Value) -> Value:
    kind = draft.pick(("item_assignment", "view_write"))
    return draft.emit(kind, x) if kind else _motif(draft, x)


def _mix(draft: _Draft, x: Value) -> Value:
    """A section of tokens, and back to the map; the sizes may be read from the map before it."""
    if x.width % 2 or x.size > 4:
        return _pool(draft, x)
    sizes = draft.emit("sizes", x, kind="sizes").name if "sizes" in draft.kinds else None
    tokens = _flatten(draft, x, sizes)
    for _ in range(draft.random.randint(1, 2)):
        tokens = draft.random.choice((_attend, _feed_forward))(draft, tokens)
    if draft.chance(0.4):
        return tokens
    if tokens.has_class_token:
        tokens = draft.emit("drop_first", tokens, has_class_token=False, size=tokens.size - 1)
    if sizes and draft.chance(0.5):
        return draft.emit("unflatten_by_sizes", tokens, sizes, kind="map", size=x.size)
    return draft.emit("unflatten", tokens, numbers=(x.size,), kind="map", size=x.size)


def _flatten(draft: _Draft, x: Value, sizes: str | None) -> Value:
    changes = {"kind": "tokens", "size": x.size**2}
    if sizes and draft.chance(0.5):
        tokens = draft.emit("flatten_by_sizes", x, sizes, **changes)
    else:
        tokens = draft.emit("flatten", x, **changes)
    if "class_token" in draft.kinds and draft.chance(0.4):
        tokens = draft.emit(
            "class_token", tokens, numbers=(x.width,), has_class_token=True, size=tokens.size + 1
        )
    if draft.chance(0.4) and (kind := draft.pick(("position", "position_table"))):
        tokens = draft.emit(kind, tokens, numbers=(x.width, tokens.size))
    return tokens


# motifs of tokens and vectors ────────────────────────────────────────────────────────────────────


def _attend(draft: _Draft, x: Value) -> Value:
    y = _norm(draft, x) if draft.chance(0.7) else x
    y = draft.emit(draft.pick(("attention", "multi_head")) or "identity", y, numbers=(x.width,))
    if draft.chance(0.3):
        y = _drop(draft, y)
    return _join(draft, y, x)


def _feed_forward(draft: _Draft, x: Value) -> Value:
    y = _norm(draft, x) if draft.chance(0.5) else x
    y = draft.emit("linear", y, numbers=(x.width, x.width))
    y = _activate(draft, y)
    if draft.chance(0.5):
        y = _again(draft, y)
    return _join(draft, y, x)


def _widen(draft: _Draft, x: Value) -> Value:
    width = draft.random.choice((4, 8))
    y = draft.emit("linear", x, numbers=(x.width, width), width=width)
    return _activate(draft, y)


def _vector_residual(draft: _Draft, x: Value) -> Value:
    y = draft.emit("linear", x, numbers=(x.width, x.width))
    return _join(draft, _activate(draft, _norm(draft, y)), x)


def _to_vector(draft: _Draft, x: Value) -> Value:
    changes = {"kind": "vector", "size": 1, "has_class_token": False}
    if x.kind == "map":
        return draft.emit("mean_of_map", x, **changes, is_rectified=x.is_rectified)
    if x.kind == "tokens":
        kind = "first_token" if x.has_class_token and draft.chance(0.7) else "mean_of_tokens"
        return draft.emit(kind, x, **changes)
    return x


def _read_hint(draft: _Draft, x: Value) -> Value:
    """The second input, as a mask of samples or a gate of channels."""
    hint = Value("hint", "vector", HINT)
    mask = {"map": "mask_map", "tokens": "mask_tokens"}.get(x.kind)
    if mask in draft.kinds and draft.chance(0.5):
        return draft.emit(mask, x, hint.name)
    y = draft.emit("linear", hint, numbers=(HINT, x.width), width=x.width)
    return draft.emit("gate", x, y.name) if x.kind == "map" else x


MAP_MOTIFS: tuple[Motif, ...] = (
    _plain, _plain, _residual, _residual, _residual, _old_name, _dense, _split, _branches,
    _long_skip, _pool, _gate, _nhwc, _repeat, _write, _mix, _mix, _mix,
)  # fmt: skip
TOKEN_MOTIFS: tuple[Motif, ...] = (_attend, _feed_forward, _widen, _long_skip)
VECTOR_MOTIFS: tuple[Motif, ...] = (_widen, _vector_residual)
