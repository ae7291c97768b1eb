"""A short form of ``make torture``: each part finds nothing, and each fault put in is found."""

from __future__ import annotations

import pytest

from tests.torture.parts import PARTS, main, notices, search
from tests.torture.power import FAULTS

SHORT = {"mutants": 2_000, "kills": 200, "full": 50, "verify": 1_000, "soak": 200}
TRIED = {  # at least; what is left out above has no number to choose, everything is tried
    "mutants": 2_000,
    "kills": 200,
    "faults": 1_000,
    "power": 500,
    "fallback": 60,
    "full": 100,
    "verify": 1_000,
    "soak": 200,
}
ENOUGH = {"mutants": 200, "kills": 100, "faults": 2_000, "fallback": 60, "full": 50}


@pytest.mark.parametrize("name", [name for name in PARTS if name != "elastic"])  # see test_ranks.py
def test_nothing_is_lost_and_nothing_is_silent(name):
    tried, problems = search(name, SHORT.get(name, 0), seed=0)
    assert problems == []
    assert tried >= TRIED[name]


@pytest.mark.parametrize(
    "name, fault", [(name, fault) for name, part in PARTS.items() for fault in part.controls]
)
def test_a_fault_in_the_product_is_noticed(name, fault):
    assert notices(name, fault, ENOUGH.get(name, 100))


def test_the_power_cut_is_tried_on_faults_of_flushing_order_and_place():
    assert len(FAULTS) >= 5


def test_what_is_printed_replays_what_was_tried(capsys):
    assert main(["mutants", "--count", "20", "--seed", "7"]) == 0
    row, name, tried, *_ = capsys.readouterr().out.split()
    assert (row, name, tried) == ("G3", "mutants", "20")


def test_several_processes_try_as_much_as_one(capsys):
    assert main(["verify", "--count", "30", "--seed", "7", "--jobs", "2"]) == 0
    assert capsys.readouterr().out.split()[:3] == ["G24", "verify", "30"]
