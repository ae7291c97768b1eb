"""Read YAML 1.2 into plain data that knows its lines, refusing what is not plain.

Built from ruamel.yaml's parser events by the core schema of YAML 1.2, and not by a loader: loaders
resolve more than that schema knows (``1_000``, ``2026-01-01``, ``12:30``), follow aliases, and
forget the lines that an error has to name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
from kdsurgeon.recipe.words import Place, dotted, short, shown

MAX_BYTES = 1 << 20
MAX_NODES = 10_000
MAX_DEPTH = 32
MAX_PROBLEMS = 100
MAX_DIGITS = 1_000  # below Python's own limit on reading integers


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
    document, found = read_document(path)
    if found:
        raise config_error(found)
    return document


def parse_yaml(text: str, source: str = "text") -> Document:
    """The data of YAML 1.2 text, by the rules of :func:`read_yaml`; errors call it ``source``.

    >>> parse_yaml("lr: 1e-3 # per update")
    {'lr': 0.001}
    """
    document, found = _parse(text, source)
    if found:
        raise config_error(found)
    return document


def parse_value(text: str, source: str) -> Any:
    """One value of YAML 1.2, of any kind, by the same rules; errors call it ``source``.

    >>> parse_value("[1, 3]", "--set")
    [1, 3]
    """
    builder = _Builder(text, source, numbered=False)
    value = builder.document()
    if builder.problems:
        raise config_error(builder.problems)
    return value


@dataclass(frozen=True)
class Problem:
    """One sentence on what is wrong, place included; infinity stands behind all lines."""

    line: float
    text: str
    lost: Place | None = None  # the value that could not be read at all


def config_error(problems: Iterable[Problem]) -> ConfigError:
    """One error for all of them, in the order of the file."""
    ordered = sorted(problems, key=lambda problem: problem.line)
    texts = list(dict.fromkeys(problem.text for problem in ordered))
    more = [f"… and more than {MAX_PROBLEMS} in all"] if len(texts) > MAX_PROBLEMS else []
    return ConfigError("\n".join(texts[:MAX_PROBLEMS] + more))


def read_document(path: str | os.PathLike[str]) -> tuple[Document, list[Problem]]:
    """As :func:`read_yaml`, but with what is wrong in the text as a list."""
    name = short(os.fspath(path), 200)
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
    _check_size(raw, name)
    try:
        return _parse(raw.decode("utf-8-sig"), name)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}:{line}: not UTF-8 text (byte {error.start:,}).", fix="save it as UTF-8"
        ) from error


def _parse(text: str, source: str) -> tuple[Document, list[Problem]]:
    _check_size(text, source)
    builder = _Builder(text, source)
    data = builder.document()
    if data is None and not builder.problems:
        raise ConfigError(f"{source} is empty.", fix="write `key: value` lines")
    if not isinstance(data, dict):
        if not builder.problems:
            raise ConfigError(f"{source}:1: the top level must be `key: value` lines.")
        data = {}
    return Document(data, source, builder.lines), builder.problems


def _check_size(content: str | bytes, source: str) -> None:
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{source} is larger than 1 MiB; a YAML file of ours never is.")


class _Builder:
    """Plain data from YAML events, the line of each key, and everything that is refused."""

    def __init__(self, text: str, source: str, *, numbered: bool = True) -> None:
        self.source = source
        self.numbered = numbered
        self.lines: dict[Place, int] = {}
        self.problems: list[Problem] = []
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
        line = _line(event)
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
            key = self._node(event, (*place, -1))
            if isinstance(key, str) and key not in data:
                self.lines[*place, key] = _line(event)
                data[key] = self._node(next(self._events), (*place, key))
            else:
                self._refuse_key(event, (*place, key))
                self._node(next(self._events), (*place, -1))
        return data

    def _refuse_key(self, event: Event, place: tuple[Any, ...]) -> None:
        if isinstance(place[-1], str):
            first = f" (first on line {self.lines[place]})" if self.numbered else ""
            self._refuse(event, f'the key "{dotted(place)}" is given twice{first}')
        elif not isinstance(event, AliasEvent):  # which is refused already
            self._refuse(event, f"this key must be text, not {shown(place[-1])}")

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
        return resolve(text) if event.style is None else text

    def _refuse(self, event: Event, what: str, lost: Place | None = None) -> None:
        line = _line(event)
        self.problems.append(Problem(line, f"{self._where(line)}: {what}", lost))

    def _where(self, line: int) -> str:
        return f"{self.source}:{line}" if self.numbered else self.source


def _line(event: Event) -> int:
    return event.start_mark.line + 1


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


def resolve(text: str) -> Any:
    """A plain scalar by the core schema of YAML 1.2.2, section 10.3.2.

    >>> [resolve(text) for text in ("1e-3", "010", "0o10", "yes", "1_000", "~")]
    [0.001, 10, 8, 'yes', '1_000', None]
    """
    if len(text) > MAX_DIGITS:
        return text
    return next((read(text) for form, read in _CORE if form.fullmatch(text)), text)
