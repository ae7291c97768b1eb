"""Read the configuration of a run: a YAML file, under what the command line says."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from kdsurgeon.errors import ConfigError
from kdsurgeon.recipe.records import RunConfig
from kdsurgeon.recipe.refusals import explain, keys_of, needs_key, unknown
from kdsurgeon.recipe.words import short, shown
from kdsurgeon.recipe.yaml import Document, Problem, config_error, parse_value, read_document


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
    labels = {key: _flag(key, value) for key, value in overrides.items()} | dict(spelled or {})
    document, found = Document({}, "command line", {}), []
    if path is not None:
        document, found = read_document(path)
    values = {
        key: dict(value) if isinstance(value, dict) else value for key, value in document.items()
    }
    for key, text in _override(values, overrides):
        found.append(Problem(math.inf, f"{labels.pop(key)}: {text}"))
    lost = {problem.lost for problem in found}
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        for place, text in explain(RunConfig, error):
            flag = labels.get(".".join(map(str, place[:2]))) or labels.get(str(place[0]))
            where = flag or document.where(*place)
            line = math.inf if flag else document.line(*place)
            if place not in lost or flag:
                found.append(Problem(line, f"{where}: {text}"))
        raise config_error(found) from error
    if found:
        raise config_error(found)
    return config


def _flag(key: str, value: Any) -> str:
    return f"--set {key}={short(value) if isinstance(value, str) else shown(value)}"


def _override(values: dict[str, Any], overrides: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Put the overrides into ``values``; key and sentence of each that has no place there."""
    known = keys_of(RunConfig)
    for key, value in overrides.items():
        section, _, leaf = key.rpartition(".")
        if key not in known:
            yield key, unknown(RunConfig, tuple(key.split(".")), value)
        elif known[key] is not None:
            yield key, needs_key(key)
        elif isinstance(home := values.setdefault(section, {}) if section else values, dict):
            home[leaf] = value


def parse_set(text: str) -> tuple[str, Any]:
    """The dotted key and the value of one ``key=value``, the value read by the rules of YAML 1.2.

    Raises :class:`ConfigError` when there is no key, no ``=``, or the value is not YAML.

    >>> parse_set("optim.lr=1e-3"), parse_set("loss.stones=[1, 3]"), parse_set("device=cuda:0")
    (('optim.lr', 0.001), ('loss.stones', [1, 3]), ('device', 'cuda:0'))
    """
    key, equals, value = text.partition("=")
    flag = f"--set {short(text)}"
    if not equals or not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*", key.strip()):
        raise ConfigError(f"{flag}: this is not key=value.", fix="write --set optim.lr=0.05")
    parsed = parse_value(value, flag)
    if isinstance(parsed, dict):
        raise ConfigError(
            f"{flag}: the value reads as keys of its own.",
            fix="quote it if it is text, or set one key at a time: --set optim.lr=0.05",
        )
    return key.strip(), parsed
