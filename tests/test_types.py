"""What one stage hands to the next does not change on the way."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import is_dataclass

import kdsurgeon

MUTABLE = {
    "Dropped": "filled by the opcodes that follow",
    "Keeper": "remembers what it saved last",
    "Portion": "counts its users, for as long as it is gathered",
    "Run": "holds a lock until it is closed",
    "SharedTeacher": "gathers and frees portions",
    "Together": "learns from other ranks who shares a batch",
    "TrainingState": "is where a run stands",
}
"""The records that change while they live, each with why."""


def records() -> Iterator[type]:
    for found in pkgutil.walk_packages(kdsurgeon.__path__, "kdsurgeon."):
        if found.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, type) and is_dataclass(value) and value.__module__ == found.name:
                yield value


def test_records_are_frozen_but_for_those_that_say_why():
    loose = {kind.__name__ for kind in records() if not kind.__dataclass_params__.frozen}
    assert loose == set(MUTABLE)
