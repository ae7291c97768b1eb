"""Say in a user's words what pydantic refuses, and which known key was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import islice
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from kdsurgeon.recipe.words import Place, dotted, shown
from kdsurgeon.recipe.yaml import MAX_PROBLEMS, resolve


@dataclass(frozen=True)
class Must:
    """What a field accepts, in words, and the texts among it that can be mistyped."""

    be: str
    choices: tuple[str, ...] = ()


def contradict(*found: tuple[str, str]) -> NoReturn:
    """Refuse a valid value for what stands beside it: (key below it or "", sentence) each."""
    text = "two values contradict each other"
    raise PydanticCustomError("contradiction", text, {"found": found})


def explain(kind: type[BaseModel], error: ValidationError) -> Iterator[tuple[Place, str]]:
    """The place and the sentence of every problem that pydantic found in a value for ``kind``."""
    for entry in islice(error.errors(include_url=False), MAX_PROBLEMS + 1):
        place: Place = entry["loc"]
        value = entry["input"]
        match entry["type"]:
            case "contradiction":
                for key, text in entry.get("ctx", {})["found"]:
                    where = (*place, key) if key else place
                    yield where, f"{dotted(where)}: {text}"
            case "extra_forbidden" | "invalid_key":
                yield place, unknown(kind, place, value)
                yield from _explain_misnamed(kind, place, value)
            case "missing" if isinstance(place[-1], str):
                yield place, f'"{dotted(place)}" is missing ({_description(kind, place)})'
            case "model_type" | "model_attributes_type":
                yield place, needs_key(dotted(place), value)
            case "missing":  # of a list that is too short
                yield place[:-1], _wrong(kind, place[:-1], value)
            case _:
                yield place, _wrong(kind, place, value)


def _explain_misnamed(
    kind: type[BaseModel], place: Place, value: Any
) -> Iterator[tuple[Place, str]]:
    """What is wrong inside a section whose name is mistyped, read as the section that was meant."""
    if not isinstance(value, dict):
        return
    meant = keys_of(kind).get(_suggestion(kind, place, value) or "")
    if meant is not None:
        try:
            meant.model_validate(value)
        except ValidationError as error:
            for inner, text in explain(meant, error):
                yield (*place, *inner), f'in "{dotted(place)}": {text}'


def _wrong(kind: type[BaseModel], place: Place, value: Any) -> str:
    field = _field(kind, place)
    must = next((rule for rule in field.metadata if isinstance(rule, Must)), None)
    if must is None:
        choices = tuple(get_args(field.annotation))
        assert get_origin(field.annotation) is Literal, f"{place} has no Must"
        names = [f'"{choice}"' for choice in choices]
        must = Must(" or ".join(filter(None, [", ".join(names[:-1]), names[-1]])), choices)
    hint = did_you_mean(value, must.choices)
    if isinstance(value, str) and not must.choices and isinstance(resolve(value), int | float):
        hint = "; remove the quotes"
    *key, last = place
    if isinstance(last, int):
        given = f"but item {last + 1} is {shown(value)}"
        return f"{dotted(tuple(key))} must be {must.be}, {given}{hint}"
    return f"{dotted(place)} must be {must.be}, not {shown(value)}{hint}"


def needs_key(key: str, value: Any = None) -> str:
    """What to say of a section that is given a value of its own."""
    given = "" if value is None else f", not {shown(value)}"
    return f'"{key}" is a section: write keys below it{given}'


def unknown(kind: type[BaseModel], place: Place, value: Any) -> str:
    """What to say of a key that ``kind`` does not have, and which one may be meant."""
    key = dotted(place)
    if len(place) == 1 and "." in key and key in keys_of(kind):
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


def _suggestion(kind: type[BaseModel], place: Place, value: Any) -> str | None:
    """The known key that ``place`` most resembles: the same section first, then any other."""
    *sections, name = (part for spelling in place for part in str(spelling).split("."))
    if len(name) > 60:
        return None
    spellings: dict[str, list[str]] = {}
    far: dict[str, float] = {}
    for key, section in keys_of(kind).items():
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


def did_you_mean(value: Any, choices: Iterable[str]) -> str:
    """``; did you mean "sgd"?``, or nothing where no choice is near to ``value``."""
    if not isinstance(value, str) or len(value) > 100:
        return ""
    near = _closest(value, {choice: [choice] for choice in choices})
    return f'; did you mean "{near}"?' if near else ""


def keys_of(kind: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Every dotted key below ``kind``; for a section its class, for a value None."""
    keys: dict[str, type[BaseModel] | None] = {}
    for name, field in kind.model_fields.items():
        keys[name] = section = _section(field)
        if section:
            keys |= {f"{name}.{key}": None for key in keys_of(section)}
    return keys


def _section(field: FieldInfo) -> type[BaseModel] | None:
    inner = field.annotation
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _field(kind: type[BaseModel], place: Place) -> FieldInfo:
    field = kind.model_fields[str(place[0])]
    section = _section(field)
    return _field(section, place[1:]) if section and len(place) > 1 else field


def _description(kind: type[BaseModel], place: Place) -> str:
    return " ".join((_field(kind, place).description or "it has no default").split())
