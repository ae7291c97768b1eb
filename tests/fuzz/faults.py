"""Faults put into the surgery on purpose: the invariants are worth what they notice of these."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from kdsurgeon.stones import SteppingStones, surgery, training_graph
from kdsurgeon.tracing import capture
from tests.fuzz.generator import SUPPORTED, draw
from tests.fuzz.invariants import Subject, fails, violation
from tests.fuzz.programs import Program

# the cheap ones, and those that run the training graph; the others build on the same surgery
SEARCHED = ("I1", "I3", "I2", "I7", "I8", "I10")


def found(
    fault: str, kinds: frozenset[str] = SUPPORTED, *, within: int = 200
) -> tuple[Program, str] | None:
    """The first program with the invariant that notices ``fault`` in it; None if none does.

    What is violated without the fault as well does not count.
    """
    for seed in range(within):
        program = draw(seed, kinds)
        with FAULTS[fault]():
            subject = Subject(program)
            broken = next((name for name in SEARCHED if violation(subject, name)), None)
        if broken is not None and not fails(program, broken):
            return program, broken
    return None


@contextmanager
def _replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _changed_twins(change: Callable[[nn.Module], nn.Module]) -> AbstractContextManager[None]:
    """The teacher's twins as ``change`` leaves them."""

    def twins(*args: Any) -> dict[str, Any]:
        found = original(*args)
        return {
            name: change(value) if isinstance(value, nn.Module) else value
            for name, value in found.items()
        }

    original = training_graph.frozen_twins
    return _replaced((training_graph, "frozen_twins", twins))


def _changed_graft(change: Callable[..., Any]) -> AbstractContextManager[None]:
    def graft(*args: Any, **kwargs: Any) -> Any:
        return change(original, *args, **kwargs)

    original = surgery.graft
    return _replaced((surgery, "graft", graft), (training_graph, "graft", graft))


def a_block_ends_one_node_early() -> AbstractContextManager[None]:
    def short(graft: Any, graph: fx.Graph, nodes: tuple[fx.Node, ...], *rest: Any) -> Any:
        if len(nodes) < 2:
            return graft(graph, nodes, *rest)
        values = graft(graph, nodes[:-1], *rest)
        return values | {nodes[-1]: values.get(nodes[-2])}

    return _changed_graft(short)


def the_training_graph_is_that_of_evaluation() -> AbstractContextManager[None]:
    return _replaced((training_graph, "_in_mode", lambda whole, **_: whole))


def a_write_in_place_is_lost_on_later_readers() -> AbstractContextManager[None]:
    return _replaced((capture, "connect_writes", lambda _: None))


def tails_run_without_gradient() -> AbstractContextManager[None]:
    def numb(twin: nn.Module) -> nn.Module:
        twin.forward = torch.no_grad()(twin.forward)
        return twin

    return _changed_twins(numb)


def the_teacher_follows_the_students_mode() -> AbstractContextManager[None]:
    def train(self: SteppingStones, mode: bool = True) -> SteppingStones:
        original(self, mode)
        for module in self.teacher.modules:
            module.train(mode)
        return self

    original = SteppingStones.train
    return _replaced((SteppingStones, "train", train))


def the_student_runs_twice() -> AbstractContextManager[None]:
    def forward(self: SteppingStones, *args: Any) -> Any:
        original(self, *args)
        return original(self, *args)

    original = SteppingStones.forward
    return _replaced((SteppingStones, "forward", forward))


def a_stone_starts_from_the_boundary_before() -> AbstractContextManager[None]:
    def crossed(*args: Any, **kwargs: Any) -> fx.GraphModule:
        module = original(*args, **kwargs)
        nodes = module.graph.nodes
        adapters = [node for node in nodes if str(node.target).startswith("adapters.")]
        for before, node in pairwise(adapters):
            first, second = (each.all_input_nodes[0].meta["val"].shape for each in (before, node))
            if first == second:
                node.args = before.args
        module.recompile()
        return module

    original = training_graph._Synthesis.graph
    return _replaced((training_graph._Synthesis, "graph", crossed))


def a_boundary_is_overwritten() -> AbstractContextManager[None]:
    return _replaced((surgery, "memory_of", lambda _: object()))  # so nothing is cloned


def the_batch_of_the_example_is_frozen_in() -> AbstractContextManager[None]:
    return _replaced((surgery, "_number_of_samples", lambda _, factor, __: 2 * factor))


def the_student_is_cloned() -> AbstractContextManager[None]:
    own = training_graph.state_of
    return _replaced((training_graph, "state_of", lambda student: copy.deepcopy(own(student))))


def the_teacher_is_trained() -> AbstractContextManager[None]:
    return _replaced((training_graph, "frozen_twins", surgery.state_of))


def the_teachers_statistics_are_forgotten() -> AbstractContextManager[None]:
    def forgetful(twin: nn.Module) -> nn.Module:
        twin = copy.deepcopy(twin)
        for module in twin.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
        return twin

    return _changed_twins(forgetful)


FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    fault.__name__: fault
    for fault in (
        a_block_ends_one_node_early,
        the_training_graph_is_that_of_evaluation,
        a_write_in_place_is_lost_on_later_readers,
        tails_run_without_gradient,
        the_teacher_follows_the_students_mode,
        the_student_runs_twice,
        a_stone_starts_from_the_boundary_before,
        a_boundary_is_overwritten,
        the_batch_of_the_example_is_frozen_in,
        the_student_is_cloned,
        the_teacher_is_trained,
        the_teachers_statistics_are_forgotten,
    )
}
