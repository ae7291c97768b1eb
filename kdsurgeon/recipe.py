"""Hold every number of a run in frozen, validated records, and read them from YAML 1.2.

Nothing is coerced: ``"3"`` is not 3, 3.0 is not a whole number, ``true`` is not 1. YAML is built
here from ruamel.yaml's parser events by the core schema of YAML 1.2, and not by a loader: loaders
resolve more than that schema knows (``1_000``, ``2026-01-01``, ``12:30``), follow aliases, and
forget the lines that an error has to name. This module must not import torch: a wrong
configuration is answered before torch could have been loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, cast, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ValidationInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from kdsurgeon.errors import ConfigError, ResourceError
from kdsurgeon.plugins import installed

MAX_BYTES = 1 << 20
MAX_NODES = 10_000
MAX_DEPTH = 32
MAX_PROBLEMS = 100
MAX_DIGITS = 1_000  # below Python's own limit on reading integers

Place = tuple[str | int, ...]


# What a value may be. ``Must`` is the half sentence that an error finishes: "… must be <this>".


@dataclass(frozen=True)
class Must:
    """What a field accepts, in words, and the texts among it that can be mistyped."""

    be: str
    choices: tuple[str, ...] = ()


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _some_as_tuple(value: Any) -> Any:
    if isinstance(value, list | tuple) and not value:
        raise ValueError
    return _as_tuple(value)


def _known_distance(name: Any) -> Any:
    if isinstance(name, str) and name != "kl" and name not in (known := installed("distances")):
        names = sorted({"kl", *known})
        _contradict(("", f'no distance is called "{name}"{_hint(name, names)}'))
    return name


def _known_stones(value: Any) -> Any:
    if isinstance(value, str):
        if not re.fullmatch(r"all|drop-first|last-[1-9][0-9]{0,3}", value):
            raise ValueError
        return value
    depths = _as_tuple(value)
    if not (isinstance(depths, tuple) and depths and all(type(depth) is int for depth in depths)):
        raise ValueError
    if not 1 <= depths[0] <= depths[-1] <= 9_999:
        raise ValueError
    return _rising(depths)


def _rising(numbers: tuple[float, ...]) -> tuple[float, ...]:
    if any(low >= high for low, high in pairwise(numbers)):
        raise ValueError
    return numbers


def _auto_or_count(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and 1 <= value <= 1_000_000):
        raise ValueError
    return value


Positive = Annotated[float, Field(gt=0), Must("a number above 0")]
NotNegative = Annotated[
    float,
    Field(ge=0),
    BeforeValidator(lambda value: 0.0 if type(value) is float and value == 0 else value),  # no -0.0
    Must("a number of 0 or more"),
]
Share = Annotated[float, Field(ge=0, le=1), Must("a number from 0 to 1")]
Below1 = Annotated[float, Field(ge=0, lt=1), Must("a number from 0 to below 1")]
Inside01 = Annotated[float, Field(gt=0, lt=1), Must("a number above 0 and below 1")]
Count = Annotated[int, Field(ge=1, le=1_000_000), Must("a whole number from 1 to 1,000,000")]
Tolerance = Annotated[int, Field(ge=0, le=1_000_000), Must("a whole number from 0 to 1,000,000")]
Seed = Annotated[int, Field(ge=0, lt=2**32), Must("a whole number from 0 to 4,294,967,295")]
Switch = Annotated[bool, Must("true or false")]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$"), Must("text on one line, not empty")]
OptionalText = Annotated[Text | None, Must("text on one line, not empty, or null")]
Distance = Annotated[Text, BeforeValidator(_known_distance)]
Blocks = Annotated[
    int | Literal["auto"],
    BeforeValidator(_auto_or_count),
    Must('"auto" or a whole number from 1 to 1,000,000', ("auto",)),
]
Stones = Annotated[
    str | tuple[int, ...],
    BeforeValidator(_known_stones),
    Must(
        '"all", "last-K" (K of 1 or more), "drop-first", or a list of depths of 1 or more'
        " in rising order, such as [1, 3]",
        ("all", "last-1", "last-2", "last-3", "drop-first"),
    ),
]
Shares = Annotated[
    tuple[Inside01, ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_rising),
    Must("a list of numbers above 0 and below 1 in rising order"),
]
Mean = Annotated[
    tuple[float, ...] | None,
    BeforeValidator(_some_as_tuple),
    Must("a list of numbers, one per channel, or null"),
]
Std = Annotated[
    tuple[Positive, ...] | None,
    BeforeValidator(_some_as_tuple),
    Must("a list of numbers above 0, one per channel, or null"),
]
InputSize = Annotated[
    tuple[Count, Count, Count] | None,
    BeforeValidator(_as_tuple),
    Must("a list of three whole numbers (channels, height, width), or null"),
]
Device = Annotated[
    str,
    Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$"),
    Must('"auto", "cpu", "cuda", "cuda:N" or "mps"', ("auto", "cpu", "cuda", "cuda:0", "mps")),
]


class Section(BaseModel):
    """What all parts of a recipe share: frozen, strict, no unknown key, errors as ConfigError."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            found = _explain(type(self), error)
            raise ConfigError(
                "\n".join(f"{type(self).__name__}: {text}" for _, text in found)
            ) from error

    # pydantic's own mark: without it a section inside a recipe would be built by the method above,
    # and its ConfigError would hide the problems of the other sections.
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    def dump(self) -> dict[str, Any]:
        """Every key with its value as plain dicts, lists and scalars, for :func:`write_yaml`."""
        return self.model_dump(mode="json")

    def replace(self, **changes: Any) -> Self:
        """The same with other values, validated again; sections as records or dicts.

        >>> Recipe(epochs=3).replace(method="kd").epochs
        3
        """
        return type(self)(**{**dict(self), **changes})

    def hash(self) -> str:
        """The sha256 of the canonical dump, as 64 hexadecimal digits: equal for equal values.

        >>> Recipe(epochs=3).hash() == Recipe(epochs=3, seed=0).hash() != Recipe(epochs=4).hash()
        True
        """
        canonical = json.dumps(self.dump(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class LossRecipe(Section):
    """The weights of L = α·L_task + β·L_distill + γ·L_cross and what goes into its terms.

    Yu et al. 2024, arXiv 2411.01547, for the terms; each field says whether its number is theirs.
    """

    ce_weight: NotNegative = 1.0
    """α, factor of the cross-entropy terms, no unit; ours"""
    kd_weight: NotNegative = 1.0
    """β, factor of the terms against the teacher, no unit; ours"""
    cross_weight: NotNegative = 1.0
    """γ, factor of the terms against the mean of the stones, no unit; ours"""
    cross_start: Share = 200 / 240
    """share of the run after which γ applies, 0 at once, 1 never; epoch 200 of 240 in
    Yu et al. 2024, arXiv 2411.01547"""
    temperature: Positive = 4.0
    """τ, divides the logits, no unit; ours: 4 suits CIFAR, 1 ImageNet"""
    distance: Distance = "kl"
    """the logit distance d, by plugin name; kl is that of Yu et al. 2024, arXiv 2411.01547"""
    stones: Stones = "all"
    """the stepping stones trained through, by depth; all in Yu et al. 2024, arXiv 2411.01547,
    the smaller sets are ours"""
    stone_warmup: NotNegative = 0.0
    """epochs over which the weights of the stones rise linearly from 0; ours"""
    label_smoothing: Below1 = 0.0
    """share of the label spread over all classes, no unit; ours"""

    @field_validator("cross_weight")
    @classmethod
    def _some_weight(cls, value: float, info: ValidationInfo) -> float:
        if value == info.data.get("ce_weight") == info.data.get("kd_weight") == 0:
            text = "ce_weight, kd_weight and cross_weight are all 0: nothing to learn from"
            _contradict(("", text))
        return value


class OptimRecipe(Section):
    """The optimiser of student and adapters and its learning rate over the run."""

    opt: Literal["sgd", "adamw"] = "adamw"
    """the optimiser; ours"""
    lr: Positive = 1e-3
    """highest learning rate, per update; ours, for adamw (CIFAR protocol with sgd: 0.05)"""
    momentum: Below1 = 0.9
    """momentum of sgd, without Nesterov, no unit; CIFAR protocol of RepDistiller"""
    weight_decay: NotNegative = 0.01
    """weight decay, per update; ours, for adamw (CIFAR protocol with sgd: 0.0005)"""
    sched: Literal["cosine", "step", "constant"] = "cosine"
    """course of the learning rate after the warm-up; ours"""
    decay_at: Shares = (150 / 240, 180 / 240, 210 / 240)
    """shares of the run after which sched step multiplies lr by decay_rate; epochs 150, 180 and 210
    of 240 in the CIFAR protocol of RepDistiller"""
    decay_rate: Annotated[float, Field(gt=0, le=1), Must("a number above 0, at most 1")] = 0.1
    """factor of lr at each decay_at, no unit; CIFAR protocol of RepDistiller"""
    warmup_epochs: NotNegative = 0.0
    """epochs over which lr rises linearly to its highest value; ours"""
    min_lr: NotNegative = 0.0
    """lowest learning rate, per update; ours"""
    clip_grad: Annotated[Positive | None, Must("a number above 0, or null")] = None
    """largest norm of the gradient, null for no clipping; ours"""
    grad_accum_steps: Count = 1
    """batches summed into one update; ours"""

    @field_validator("min_lr")
    @classmethod
    def _below_lr(cls, value: float, info: ValidationInfo) -> float:
        if value > info.data.get("lr", math.inf):
            _contradict(("", f"min_lr ({value}) is above lr ({info.data['lr']})"))
        return value


class DataRecipe(Section):
    """What happens to the images before a model sees them."""

    augment: Literal["auto", "none", "shift", "shift-flip"] = "auto"
    """random changes of training images: shift moves by a few pixels, flip mirrors left and right,
    auto lets the data set choose; ours"""
    val_split: Annotated[Inside01 | None, Must("a number above 0 and below 1, or null")] = None
    """share of the images held out where the data has no split of its own; null: 0.2, and 0.25 of
    the digits; ours"""
    max_bad_images: Tolerance = 0
    """unreadable images that are left out, by name, before the run refuses; ours"""
    mean: Mean = None
    """subtracted per channel, pixels in 0 … 1; null: as the teacher was trained, or measured"""
    std: Std = Field(default=None, validate_default=True)
    """divides per channel, pixels in 0 … 1; null: as the teacher was trained, or measured"""
    input_size: InputSize = None
    """channels, height and width in pixels, as timm has them; null: as teacher or data have them"""

    @field_validator("std")
    @classmethod
    def _fits_mean(cls, std: Std, info: ValidationInfo) -> Std:
        if "mean" in info.data and len(info.data["mean"] or ()) != len(std or ()):
            text = "mean and std must have the same number of channels, or both be null"
            _contradict(("", text))
        return std


class Recipe(Section):
    """Every number of a run that does not name a file.

    Sections may be given as records or as dicts. Raises :class:`ConfigError` with every problem.

    >>> Recipe(epochs=3, loss={"temperature": 2.0}).loss.temperature
    2.0
    >>> Recipe(epoch=3)
    Traceback (most recent call last):
    kdsurgeon.errors.ConfigError: Recipe: unknown key "epoch"; did you mean "epochs"?
    """

    method: Literal["ce", "kd", "block-kd"] = "block-kd"
    """ce: labels only; kd: the logits of the teacher, too; block-kd: and the stepping stones of
    Yu et al. 2024, arXiv 2411.01547"""
    epochs: Count = 30
    """passes over the training images; ours (240 in Yu et al. 2024, arXiv 2411.01547)"""
    batch_size: Count = 64
    """images in a batch; CIFAR protocol of RepDistiller"""
    seed: Seed = 0
    """the one seed of new weights, order and augmentation; ours"""
    device: Device = "auto"
    """where to compute, in torch's words; ours"""
    threads: Annotated[Count | None, Must("a whole number from 1 to 1,000,000, or null")] = None
    """CPU threads, null: as torch chooses; the last bits of every result depend on it; ours"""
    amp: Switch = False
    """compute in mixed precision (autocast); ours"""
    amp_dtype: Literal["bfloat16"] = "bfloat16"
    """number format under amp; ours: it needs no loss scaling"""
    loss: LossRecipe = LossRecipe()
    """the loss"""
    optim: OptimRecipe = OptimRecipe()
    """the optimiser"""
    data: DataRecipe = DataRecipe()
    """the data"""

    @field_validator("loss")
    @classmethod
    def _loss_fits(cls, loss: LossRecipe, info: ValidationInfo) -> LossRecipe:
        found = list(_loss_contradictions(loss, info.data.get("method"), info.data.get("epochs")))
        return loss if not found else _contradict(*found)

    @field_validator("optim")
    @classmethod
    def _optim_fits(cls, optim: OptimRecipe, info: ValidationInfo) -> OptimRecipe:
        epochs = info.data.get("epochs", math.inf)
        if optim.warmup_epochs >= epochs:
            text = f"warmup_epochs ({optim.warmup_epochs}) leaves nothing of {epochs} epochs"
            _contradict(("warmup_epochs", text))
        return optim


def _loss_contradictions(
    loss: LossRecipe, method: str | None, epochs: int | None
) -> Iterator[tuple[str, str]]:
    """(key, sentence) of what ``loss`` has against the other values; None for one that is wrong."""
    if loss.stone_warmup > (epochs or math.inf):
        yield "stone_warmup", f"stone_warmup ({loss.stone_warmup}) is above epochs ({epochs})"
    if method == "ce" and loss.ce_weight == 0:
        yield "ce_weight", "ce_weight is 0: method ce has nothing to learn from"
    if method == "kd" and loss.ce_weight == loss.kd_weight == 0:
        yield "kd_weight", "ce_weight and kd_weight are 0: method kd has nothing to learn from"
    if method == "block-kd" and loss.ce_weight == loss.kd_weight == 0 < loss.cross_start:
        why = "ce_weight and kd_weight are 0, so nothing is learned before cross_start"
        yield "cross_start", f"{why}; set cross_start to 0"


class RunConfig(Recipe):
    """A recipe and what it is applied to: all that ``kdsurgeon distill`` needs to know."""

    teacher: Text
    """the teacher: a model file or SOURCE/NAME"""
    student: Text
    """the student: a model file or SOURCE/NAME"""
    teacher_arch: OptionalText = None
    """architecture SOURCE/NAME for a teacher file that holds only tensors"""
    student_arch: OptionalText = None
    """architecture SOURCE/NAME for a student file that holds only tensors"""
    data_dir: Text
    """the data: a folder, an .npz file, or digits"""
    output: OptionalText = None
    """the run folder, null: a new one is named"""
    plan: OptionalText = None
    """a plan file to follow, null: plan afresh"""
    blocks: Blocks = "auto"
    """blocks to cut both models into; ours"""


def read_config(
    path: str | os.PathLike[str] | None,
    overrides: Mapping[str, Any] | None = None,
    *,
    spelled: Mapping[str, str] | None = None,
) -> RunConfig:
    """The configuration of a run: defaults, under a YAML file, under flags.

    ``path`` is the file or None. ``overrides`` maps dotted keys (``"optim.lr"``) to values, which
    win over the file. ``spelled`` says for a dotted key how the user wrote it, for errors; without
    it that is ``--set key=value``.

    Raises one :class:`ConfigError` that lists every problem, each with file and line or flag, and
    :class:`ResourceError` where the file may not be read.

    >>> given = {"teacher": "t.pt", "student": "s.pt", "data_dir": "digits", "loss.temperature": 2}
    >>> read_config(None, given).loss.temperature
    2.0
    """
    overrides = overrides or {}
    labels = {key: f"--set {key}={_plain(value)}" for key, value in overrides.items()}
    labels |= spelled or {}
    document, found = (Document({}, "command line", {}), []) if path is None else _read(path)
    values = {
        key: dict(value) if isinstance(value, dict) else value for key, value in document.items()
    }
    for key, text in _override(values, overrides):
        found.append(_Problem(math.inf, f"{labels.pop(key)}: {text}"))
    lost = {problem.lost for problem in found}
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        for place, text in _explain(RunConfig, error):
            flag = labels.get(".".join(map(str, place[:2]))) or labels.get(str(place[0]))
            where = flag or document.where(*place)
            line = math.inf if flag else document.line(*place)
            if place not in lost or flag:
                found.append(_Problem(line, f"{where}: {text}"))
        raise _error(found) from error
    if found:
        raise _error(found)
    return config


def _override(values: dict[str, Any], overrides: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Put the overrides into ``values``; key and sentence of each that has no place there."""
    known = _keys(RunConfig)
    for key, value in overrides.items():
        section, _, leaf = key.rpartition(".")
        if key not in known:
            yield key, _unknown(RunConfig, tuple(key.split(".")), value)
        elif known[key] is not None:
            yield key, _needs_key(key)
        elif isinstance(home := values.setdefault(section, {}) if section else values, dict):
            home[leaf] = value


def parse_set(text: str) -> tuple[str, Any]:
    """The dotted key and the value of one ``key=value``, the value read by the rules of YAML 1.2.

    Raises :class:`ConfigError` when there is no key, no ``=``, or the value is not YAML.

    >>> parse_set("optim.lr=1e-3"), parse_set("loss.stones=[1, 3]"), parse_set("device=cuda:0")
    (('optim.lr', 0.001), ('loss.stones', [1, 3]), ('device', 'cuda:0'))
    """
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*", key.strip()):
        raise ConfigError(
            f"--set {_short(text)}: this is not key=value.", fix="write --set optim.lr=0.05"
        )
    builder = _Builder(value, f"--set {_short(text)}", numbered=False)
    parsed = builder.document()
    if builder.problems:
        raise _error(builder.problems)
    if isinstance(parsed, dict):
        raise ConfigError(
            f"--set {_short(text)}: the value reads as keys of its own.",
            fix="quote it if it is text, or set one key at a time: --set optim.lr=0.05",
        )
    return key.strip(), parsed


# From pydantic's errors to ours.


@dataclass(frozen=True)
class _Problem:
    line: float
    text: str
    lost: Place | None = None  # the value that could not be read at all


def _error(problems: Iterable[_Problem]) -> ConfigError:
    """One error for all of them, in the order of the file."""
    ordered = sorted(problems, key=lambda problem: problem.line)
    texts = list(dict.fromkeys(problem.text for problem in ordered))
    more = [f"… and more than {MAX_PROBLEMS} in all"] if len(texts) > MAX_PROBLEMS else []
    return ConfigError("\n".join(texts[:MAX_PROBLEMS] + more))


def _contradict(*found: tuple[str, str]) -> NoReturn:
    """Refuse a valid value for what stands beside it: (key below it or "", sentence) each."""
    text = "two values contradict each other"
    raise PydanticCustomError("contradiction", text, {"found": found})


def _explain(kind: type[Section], error: ValidationError) -> Iterator[tuple[Place, str]]:
    """The place and the sentence of every problem that pydantic found in a value for ``kind``."""
    for entry in islice(error.errors(include_url=False), MAX_PROBLEMS + 1):
        place: Place = entry["loc"]
        value = entry["input"]
        match entry["type"]:
            case "contradiction":
                for key, text in entry.get("ctx", {})["found"]:
                    where = (*place, key) if key else place
                    yield where, f"{_dotted(where)}: {text}"
            case "extra_forbidden" | "invalid_key":
                yield place, _unknown(kind, place, value)
                yield from _explain_misnamed(kind, place, value)
            case "missing" if isinstance(place[-1], str):
                yield place, f'"{_dotted(place)}" is missing ({_description(kind, place)})'
            case "model_type" | "model_attributes_type":
                yield place, _needs_key(_dotted(place), value)
            case "missing":  # of a list that is too short
                yield place[:-1], _wrong(kind, place[:-1], value)
            case _:
                yield place, _wrong(kind, place, value)


def _explain_misnamed(kind: type[Section], place: Place, value: Any) -> Iterator[tuple[Place, str]]:
    """What is wrong inside a section whose name is mistyped, read as the section that was meant."""
    if not isinstance(value, dict):
        return
    meant = _keys(kind).get(_suggestion(kind, place, value) or "")
    if meant is not None:
        try:
            meant.model_validate(value)
        except ValidationError as error:
            for inner, text in _explain(meant, error):
                yield (*place, *inner), f'in "{_dotted(place)}": {text}'


def _wrong(kind: type[Section], place: Place, value: Any) -> str:
    field = _field(kind, place)
    must = next((rule for rule in field.metadata if isinstance(rule, Must)), None)
    if must is None:
        choices = tuple(get_args(field.annotation))
        assert get_origin(field.annotation) is Literal, f"{place} has no Must"
        names = [f'"{choice}"' for choice in choices]
        must = Must(" or ".join(filter(None, [", ".join(names[:-1]), names[-1]])), choices)
    hint = _hint(value, must.choices)
    if isinstance(value, str) and not must.choices and isinstance(_resolve(value), int | float):
        hint = "; remove the quotes"
    *key, last = place
    if isinstance(last, int):
        given = f"but item {last + 1} is {_shown(value)}"
        return f"{_dotted(tuple(key))} must be {must.be}, {given}{hint}"
    return f"{_dotted(place)} must be {must.be}, not {_shown(value)}{hint}"


def _needs_key(key: str, value: Any = None) -> str:
    given = "" if value is None else f", not {_shown(value)}"
    return f'"{key}" is a section: write keys below it{given}'


def _unknown(kind: type[Section], place: Place, value: Any) -> str:
    key = _dotted(place)
    if len(place) == 1 and "." in key and key in _keys(kind):
        section, _, leaf = key.partition(".")
        return f'unknown key "{key}"; write "{leaf}:" indented below "{section}:"'
    near = _suggestion(kind, place, value)
    return f'unknown key "{key}"' + (f'; did you mean "{near}"?' if near else "")


# Names that other programs and papers give to our keys.
_SYNONYMS = {
    "learning_rate": "lr",
    "optimizer": "optim",
    "optimiser": "optim",
    "scheduler": "sched",
    "wd": "weight_decay",
    "milestones": "decay_at",
    "decay_milestones": "decay_at",
    "clip": "clip_grad",
    "warmup": "warmup_epochs",
    "alpha": "ce_weight",
    "beta": "kd_weight",
    "gamma": "cross_weight",
    "tau": "temperature",
    "smoothing": "label_smoothing",
    "dataset": "data_dir",
}


def _suggestion(kind: type[Section], place: Place, value: Any) -> str | None:
    """The known key that ``place`` most resembles: the same section first, then any other."""
    *sections, name = (part for spelling in place for part in str(spelling).split("."))
    if len(name) > 60:
        return None
    spellings: dict[str, list[str]] = {}
    far: dict[str, float] = {}
    for key, section in _keys(kind).items():
        home, _, leaf = key.rpartition(".")
        if isinstance(value, dict) and section is None:
            continue
        spellings[key] = [leaf, *(word for word, meant in _SYNONYMS.items() if meant == leaf)]
        far[key] = 0.5 * (home != ".".join(sections)) + 0.6 * (
            section is not None and not isinstance(value, dict)
        )
    return _closest(name, spellings, far)


def _closest(
    name: str, spellings: Mapping[str, Iterable[str]], far: Mapping[str, float] | None = None
) -> str | None:
    """The key with the spelling nearest to ``name``: two edits at most, or a ratio of 0.6."""
    given = name.lower().replace("-", "_")
    best: tuple[float, str] | None = None
    for key, words in spellings.items():
        for word in words:
            meant = word.lower().replace("-", "_")
            edits = _edits(given, meant)
            is_near = edits <= 2 and edits < max(len(given), len(meant))
            if is_near or SequenceMatcher(None, given, meant).ratio() >= 0.6:
                score = (edits + (far or {}).get(key, 0.0), key)
                best = score if best is None else min(best, score)
    return best[1] if best else None


def _edits(left: str, right: str) -> int:
    """Letters to insert, drop, replace or swap with a neighbour (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, last, row = row, before, [i]
        for j, b in enumerate(right, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and b == left[i - 2]:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def _hint(value: Any, choices: Iterable[str]) -> str:
    if not isinstance(value, str) or len(value) > 100:
        return ""
    near = _closest(value, {choice: [choice] for choice in choices})
    return f'; did you mean "{near}"?' if near else ""


def _keys(kind: type[Section]) -> dict[str, type[Section] | None]:
    """Every dotted key below ``kind``; for a section its class, for a value None."""
    keys: dict[str, type[Section] | None] = {}
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            keys[name] = inner
            keys |= {f"{name}.{key}": None for key in _keys(inner)}
        else:
            keys[name] = None
    return keys


def _field(kind: type[Section], place: Place) -> FieldInfo:
    field = kind.model_fields[str(place[0])]
    inner = field.annotation
    if len(place) > 1 and isinstance(inner, type) and issubclass(inner, Section):
        return _field(inner, place[1:])
    return field


def _description(kind: type[Section], place: Place) -> str:
    return " ".join((_field(kind, place).description or "it has no default").split())


def _dotted(place: Place) -> str:
    return _short(".".join(map(str, place)), 80)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "keys of its own"
    if isinstance(value, str):
        return json.dumps(_short(value), ensure_ascii=False)
    return _short(_plain(value))


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return _short(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(item) for item in value[:20]) + "]"
    if isinstance(value, int) and value.bit_length() > MAX_DIGITS:
        return f"a whole number of {value.bit_length():,} bits"
    return _scalar_text(value) if value is None or isinstance(value, int | float) else repr(value)


def _short(text: str, width: int = 60) -> str:
    """One printable line of at most ``width`` signs."""
    line = "".join(sign if sign.isprintable() else "\ufffd" for sign in text)
    return line if len(line) <= width else line[: width - 1] + "…"


# YAML in.


class Document(dict[str, Any]):
    """The data of one YAML file, a plain dict, that also knows where each key stands."""

    def __init__(self, data: Mapping[str, Any], source: str, lines: Mapping[Place, int]) -> None:
        super().__init__(data)
        self.source = source
        self.lines = lines

    def line(self, *place: str | int) -> float:
        """The line of this key or list item, or of what encloses it; infinity for the file itself.

        >>> parse_yaml("loss:\\n  stones: [1, 2]", "run.yaml").line("loss", "stones", 1)
        2
        """
        for end in range(len(place), 0, -1):
            if place[:end] in self.lines:
                return self.lines[place[:end]]
        return math.inf

    def where(self, *place: str | int) -> str:
        """``run.yaml:14``, or ``run.yaml`` for what stands nowhere in it."""
        line = self.line(*place)
        return self.source if line == math.inf else f"{self.source}:{line}"


def read_yaml(path: str | os.PathLike[str]) -> Document:
    """The data of a YAML 1.2 file whose top level is keys.

    At most 1 MiB, 10,000 nodes, 32 levels; no anchors, aliases, tags, directives, second document,
    key twice, or key that is not text. Plain scalars follow the core schema: ``1e-3`` is a number,
    ``yes``, ``1_000`` and ``2026-01-01`` are text.

    Raises :class:`ConfigError` with every problem and its line, and :class:`ResourceError` where
    the file may not be read.
    """
    document, found = _read(path)
    if found:
        raise _error(found)
    return document


def parse_yaml(text: str, source: str = "text") -> Document:
    """The data of YAML 1.2 text, by the rules of :func:`read_yaml`; errors call it ``source``.

    >>> parse_yaml("lr: 1e-3 # per update")
    {'lr': 0.001}
    """
    document, found = _parse(text, source)
    if found:
        raise _error(found)
    return document


def _read(path: str | os.PathLike[str]) -> tuple[Document, list[_Problem]]:
    name = _short(os.fspath(path), 200)
    try:
        file = Path(path)
        if file.is_dir():
            raise ConfigError(f"{name} is a folder, not a YAML file.")
        if not file.exists():
            raise ConfigError(f"{name} does not exist.", fix="check the path of the YAML file")
        if not file.is_file():
            raise ConfigError(f"{name} is not a regular file.")
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ResourceError(f"{name} cannot be read.", why=why) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{name} is larger than 1 MiB; a YAML file of ours never is.")
    try:
        return _parse(raw.decode("utf-8-sig"), name)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}:{line}: not UTF-8 text (byte {error.start:,}).", fix="save it as UTF-8"
        ) from error


def _parse(text: str, source: str) -> tuple[Document, list[_Problem]]:
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{source} is larger than 1 MiB; a YAML file of ours never is.")
    builder = _Builder(text, source)
    data = builder.document()
    if data is None and not builder.problems:
        raise ConfigError(f"{source} is empty.", fix="write `key: value` lines")
    if not isinstance(data, dict):
        if not builder.problems:
            raise ConfigError(f"{source}:1: the top level must be `key: value` lines.")
        data = {}
    return Document(data, source, builder.lines), builder.problems


class _Builder:
    """Plain data from YAML events, the line of each key, and everything that is refused."""

    def __init__(self, text: str, source: str, *, numbered: bool = True) -> None:
        self.source = source
        self.numbered = numbered
        self.lines: dict[Place, int] = {}
        self.problems: list[_Problem] = []
        self._events = self._parse(text)
        self._nodes = 0

    def document(self) -> Any:
        """The one document in the text; None when it is empty."""
        data, documents = None, 0
        for event in self._events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if event.version not in (None, (1, 2)) or event.tags:
                    self._refuse(event, "a %YAML or %TAG directive: YAML is read as 1.2, no tags")
                if documents > 1:
                    self._refuse(event, "a second document begins here: one file, one document")
                    break
                data = self._node(next(self._events), ())
        return data

    def _parse(self, text: str) -> Iterator[Event]:
        try:
            yield from YAML(typ="safe", pure=True, plug_ins=[]).parse(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise self._not_yaml(mark.line + 1 if mark else 1, error.problem) from error
        except (YAMLError, ValueError, OverflowError) as error:
            at = getattr(error, "position", 0) or 0
            reason = getattr(error, "reason", None) or "an escape that names no character"
            raise self._not_yaml(text.count("\n", 0, at) + 1, reason) from error

    def _not_yaml(self, line: int, problem: str | None) -> ConfigError:
        return ConfigError(f"{self._where(line)}: not valid YAML: {problem or 'unreadable'}.")

    def _node(self, event: Event, place: Place) -> Any:
        line = event.start_mark.line + 1
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise ConfigError(f"{self._where(line)}: more than {MAX_NODES:,} values.")
        if len(place) > MAX_DEPTH:
            raise ConfigError(f"{self._where(line)}: more than {MAX_DEPTH} levels deep.")
        if place:
            self.lines.setdefault(place, line)
        assert isinstance(event, NodeEvent), event
        if isinstance(event, AliasEvent):
            return self._refuse(event, f'the alias "*{event.anchor}": write the value out', place)
        if event.anchor is not None:
            self._refuse(
                event, f'the anchor "&{event.anchor}": write the value out where it is used'
            )
        if tag := getattr(event, "ctag", None):
            self._refuse(event, f'the tag "{tag}": values are plain YAML, without tags')
        if isinstance(event, MappingStartEvent):
            return self._mapping(place)
        if isinstance(event, SequenceStartEvent):
            return self._sequence(place)
        assert isinstance(event, ScalarEvent), event
        return self._scalar(event, place)

    def _mapping(self, place: Place) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for event in self._events:
            if isinstance(event, MappingEndEvent):
                break
            line = event.start_mark.line + 1
            key = self._node(event, (*place, -1))
            if not isinstance(key, str):
                if not isinstance(event, AliasEvent):
                    self._refuse(event, f"this key must be text, not {_shown(key)}")
                self._node(next(self._events), (*place, -1))
                continue
            if key in data:
                first = f" (first on line {self.lines[*place, key]})" if self.numbered else ""
                self._refuse(event, f'the key "{_dotted((*place, key))}" is given twice{first}')
                self._node(next(self._events), (*place, -1))
                continue
            self.lines[*place, key] = line
            data[key] = self._node(next(self._events), (*place, key))
        return data

    def _sequence(self, place: Place) -> list[Any]:
        data: list[Any] = []
        for event in self._events:
            if isinstance(event, SequenceEndEvent):
                break
            data.append(self._node(event, (*place, len(data))))
        return data

    def _scalar(self, event: ScalarEvent, place: Place) -> Any:
        text = cast(str, event.value)
        if any("\ud800" <= sign <= "\udfff" for sign in text):
            why = "a surrogate is not a character; write the character itself"
            return self._refuse(event, why, place)
        return _resolve(text) if event.style is None else text

    def _refuse(self, event: Event, what: str, lost: Place | None = None) -> None:
        line = event.start_mark.line + 1
        self.problems.append(_Problem(line, f"{self._where(line)}: {what}", lost))

    def _where(self, line: int) -> str:
        return f"{self.source}:{line}" if self.numbered else self.source


_CORE = (
    (re.compile(r"null|Null|NULL|~|"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: float(text.replace(".", ""))),
    (re.compile(r"\.(nan|NaN|NAN)"), lambda text: math.nan),
)


def _resolve(text: str) -> Any:
    """A plain scalar by the core schema of YAML 1.2.2, section 10.3.2.

    >>> [_resolve(text) for text in ("1e-3", "010", "0o10", "yes", "1_000", "~")]
    [0.001, 10, 8, 'yes', '1_000', None]
    """
    if len(text) > MAX_DIGITS:
        return text
    return next((read(text) for form, read in _CORE if form.fullmatch(text)), text)


# YAML out.


def write_yaml(data: Mapping[str, Any], comments: Mapping[Place, str] | None = None) -> str:
    """YAML text that :func:`read_yaml` reads back as equal data, the same on every machine.

    ``data`` holds dicts with text keys, lists or tuples (read back as lists), text, numbers,
    booleans and None, in the order in which they are written. ``comments`` maps places, such as
    ``("loss", "temperature")`` or ``("stones", 0)``, to what is written behind them.

    >>> data = {"loss": {"tau": 4.0}, "stones": [1, 2]}
    >>> print(write_yaml(data, comments={("loss", "tau"): "ours"}), end="")
    loss:
      tau: 4.0  # ours
    stones: [1, 2]
    """
    if not data:
        return "{}\n"
    return "".join(f"{line}\n" for line in _mapping_lines(data, (), comments or {}))


def _mapping_lines(
    data: Mapping[str, Any], place: Place, comments: Mapping[Place, str]
) -> Iterator[str]:
    for key, value in data.items():
        assert isinstance(key, str), f"the key {key!r} is not text"
        yield from _entry_lines(f"{_text(key)}:", value, (*place, key), comments)


def _entry_lines(
    head: str, value: Any, place: Place, comments: Mapping[Place, str]
) -> Iterator[str]:
    """``head`` and its value: on one line where it fits there, else indented below."""
    comment = f"  # {_short(comments[place], 1_000)}" if place in comments else ""
    if isinstance(value, Mapping) and value:
        yield head + comment
        yield from (f"  {line}" for line in _mapping_lines(value, place, comments))
    elif isinstance(value, list | tuple) and any(_is_nested(item) for item in value):
        yield head + comment
        yield from (f"  {line}" for line in _list_lines(value, place, comments))
    else:
        yield f"{head} {_flow(value)}{comment}"


def _list_lines(items: Iterable[Any], place: Place, comments: Mapping[Place, str]) -> Iterator[str]:
    for index, item in enumerate(items):
        here = (*place, index)
        if isinstance(item, Mapping) and item and here not in comments:
            first, *rest = _mapping_lines(item, here, comments)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
        else:
            yield from _entry_lines("-", item, here, comments)


def _is_nested(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple) and len(value) > 0


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return _text(value) if isinstance(value, str) else _scalar_text(value)


def _scalar_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    assert isinstance(value, int | float), f"YAML cannot hold {type(value).__name__}"
    return repr(value)


def _text(text: str) -> str:
    """Plain where no reader of YAML 1.1 or 1.2 can take it for anything but this text."""
    plain = re.fullmatch(r"[A-Za-z_/][\w./+@-]*(:[\w./+@-]+)*", text, re.ASCII)
    if plain and len(text) < 200 and text.lower() not in _YAML_1_1_WORDS:
        return text
    return '"' + "".join(_escaped(sign) for sign in text) + '"'


_YAML_1_1_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _escaped(sign: str) -> str:
    if sign in '"\\':
        return f"\\{sign}"
    if sign.isprintable():
        return sign
    return f"\\u{ord(sign):04x}" if ord(sign) < 0x10000 else f"\\U{ord(sign):08x}"
