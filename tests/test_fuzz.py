"""A short form of ``make fuzz``: 1,000 random classifiers, faults that must be noticed."""

from __future__ import annotations

from functools import partial

import pytest

from tests.fuzz.faults import FAULTS, found
from tests.fuzz.generator import SUPPORTED, draw, runs
from tests.fuzz.invariants import INVARIANTS, Subject, check, fails
from tests.fuzz.programs import runnable
from tests.fuzz.searching import main, same_under_every_hash_seed
from tests.fuzz.shrinking import shrink

BLOCK = 100
IN_TURN = [name for name in INVARIANTS if name != "I1"]


@pytest.mark.parametrize("first", range(0, 10 * BLOCK, BLOCK))
def test_on_a_hundred_random_classifiers_every_invariant_holds(first):
    found = []
    for seed in range(first, first + BLOCK):
        found += check(draw(seed), ("I1", IN_TURN[seed % len(IN_TURN)]))[0]
    assert [(each.program.seed, each.invariant, each.message) for each in found] == []


def test_the_random_classifiers_hold_every_kind_of_step_and_enough_cuts():
    programs = [draw(seed) for seed in range(300)]
    assert set().union(*(program.kinds for program in programs)) >= SUPPORTED - {"aliases"}
    assert max(len(program.steps) for program in programs) <= 24
    assert sum(len(Subject(program).chosen) for program in programs[:50]) >= 4 * 50


def test_a_seed_draws_the_same_program_every_time():
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_surgery_is_noticed_within_200_graphs(fault):
    assert found(fault) is not None


@pytest.mark.parametrize(
    "fault", ["a_block_ends_one_node_early", "a_write_in_place_is_lost_on_later_readers"]
)
def test_a_failing_program_shrinks_to_the_few_steps_that_it_takes(fault):
    program, invariant = found(fault)  # pyright: ignore[reportGeneralTypeIssues]
    with FAULTS[fault]():
        small = shrink(program, partial(fails, name=invariant))
        assert fails(small, invariant)
    assert len(small.steps) <= 6
    assert runs(small)
    assert not fails(small, invariant)


def test_a_printed_program_runs_and_computes_what_was_checked(capsys):
    program = draw(5)
    exec(runnable(program), {"__name__": "printed"})
    assert str(Subject(program).logits[0, 0].item())[:5] in capsys.readouterr().out


def test_a_replay_of_a_sound_program_prints_it_and_ends_well(capsys):
    assert main(["--replay", "3", "--invariants", "I1,I3"]) == 0
    assert capsys.readouterr().out.startswith("class Net(nn.Module):")


def test_a_replay_of_a_violation_prints_the_invariant_and_a_smaller_program(capsys):
    with FAULTS["the_student_is_cloned"]():
        assert main(["--replay", "0", "--invariants", "I2"]) == 1
    out = capsys.readouterr().out
    assert "seed 0 violates I2: the student's " in out
    assert "model = settled(Net().eval(), seed=0)" in out


def test_a_search_ends_with_its_figures(capsys):
    assert main(["--count", "3", "--invariants", "I1,I4"]) == 0
    graphs, stones, violations, _ = capsys.readouterr().out.split(", ")
    assert (graphs, violations) == ("3 graphs", "0 violations")
    assert int(stones.split()[0]) >= 3


def test_plans_are_the_same_under_every_hash_seed():
    assert same_under_every_hash_seed(0, 5)
