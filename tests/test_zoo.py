"""A sample of the acceptance zoo, and that its gates and its pool see what is wrong."""

import operator
import os
import random
import signal
import time
from functools import cache

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from kdsurgeon.alignment import align
from kdsurgeon.partitioning import activations, cut, find_cut_points
from kdsurgeon.stones import partition, plan_stones, synthesize
from kdsurgeon.stones.surgery import block_sources, graft
from kdsurgeon.tracing import trace
from tests.models import chain, images
from tests.zoo import gates, models
from tests.zoo.pool import Limits, run

CLASSES = 1000


def _pairs() -> list[tuple[str, str]]:
    """Forty pairs by seed: ten teachers with four students each."""
    draw = random.Random(0)
    students = draw.sample(models.listed("students"), 4)
    return [
        (one, other) for one in draw.sample(models.listed("teachers"), 10) for other in students
    ]


@pytest.mark.parametrize("name", models.listed("sample"))
def test_a_model_is_captured_and_has_three_cut_points(name):
    model, example = models.full_size(name)
    assert len(find_cut_points(trace(model, example, name=name))) >= 3


@pytest.mark.parametrize("name", models.listed("light"))
def test_the_graph_equals_the_model_in_both_modes_and_leaves_it_as_it_was(name):
    torch.manual_seed(0)
    model, example = models.real(name)
    with gates.LeftAsItWas(model.eval()):
        captured = trace(model, example, name=name)
    gates.evaluates_alike(model, captured, example)
    gates.trains_alike(model, example)
    assert gates.splices_alike(model, captured, example) > 0


@cache
def _traced(name, size):
    model, example = models.full_size(name, size, num_classes=CLASSES)
    return trace(model, example, name=name)


@pytest.mark.parametrize(("teacher", "student"), _pairs())
def test_a_pair_is_planned_with_no_flag(teacher, student):
    size = models.common_size(teacher, student)
    assert plan_stones(align(_traced(teacher, size), _traced(student, size))).stones


# Three faults that are silent: each on a model that shows it.


def test_a_mask_that_is_written_through_views_is_not_lost():
    """torchvision's Swin: a backward slice drops the writes, and the logits are wrong."""
    torch.manual_seed(0)
    model, example = models.real("torchvision/swin_t", 64)
    captured = trace(model.eval(), example)
    writes = [node for node in captured.graph_module.graph.nodes if node.meta.get("writes")]
    assert any(node.target is operator.setitem for node in writes)
    gates.evaluates_alike(model, captured, example)
    assert gates.splices_alike(model, captured, example) > 10


@pytest.mark.parametrize("name", ["torchvision/shufflenet_v2_x0_5", "timm/pvt_v2_b0"])
def test_a_tail_reads_no_size_from_before_its_cut(name):
    """Sizes of tensors before the cut would run the whole front again, right but wasteful."""
    captured = trace(*models.real(name, 64), name=name)
    points = find_cut_points(captured)
    whole = cut(captured, points)
    before: set[fx.Node] = set()
    for block, sources in zip(whole.blocks, block_sources(whole), strict=True):
        graph = fx.Graph()
        given = {node: graph.placeholder(node.name) for node in sources}
        made = graft(graph, block.nodes, given, {}, "")
        assert not before & set(made)
        before |= {node for node in block.nodes if node in set(activations(captured))}
    assert len(points) > 20


def test_outputs_beside_the_logits_pin_no_layer():
    """XLNet returns the memories of all layers: cut with them, only two places are left."""
    model, example = models.real("hf/XLNetForSequenceClassification")
    captured = trace(model.eval(), example)
    assert "mems" in captured.lost[0]
    assert len(find_cut_points(captured)) >= 15


class Forgetful(nn.Module):
    """Drops by a function, so that its evaluation graph is wrong in training."""

    def __init__(self):
        super().__init__()
        self.body = chain(4)

    def forward(self, images):
        return functional.dropout(self.body(images), 0.5, training=self.training)


def test_the_gates_see_another_model():
    captured = trace(chain(4), images(2))
    with pytest.raises(gates.Gap, match="batch of 2: gap"):
        gates.evaluates_alike(chain(4).eval(), captured, images(2))


def test_the_gates_see_a_graph_of_the_wrong_mode(monkeypatch):
    monkeypatch.setattr(gates, "trace", lambda model, example, training: trace(model, example))
    with pytest.raises(gates.Gap, match="logits: gap"):
        gates.trains_alike(Forgetful(), images(2))


def test_the_gates_see_a_model_that_differs_from_itself():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.calls = chain(4), 0

        def forward(self, images):
            self.calls += 1
            return self.body(images) * self.calls

    with pytest.raises(gates.Gap, match="differs from itself"):
        gates.trains_alike(Moody(), images(2))


@pytest.mark.parametrize(
    "place", ["weights", "buffers", "modes", "hooks", "attributes", "random state"]
)
def test_the_gates_see_a_changed_model(place):
    model = chain(4)
    model.cache = {}
    changes = {
        "weights": lambda: model[0].weight.data.add_(1.0),
        "buffers": lambda: model[1].running_mean.add_(1.0),
        "modes": lambda: model[2].eval(),
        "hooks": lambda: model[2].register_forward_hook(print),
        "attributes": lambda: model.cache.update(table=torch.ones(2)),
        "random state": lambda: torch.rand(1),
    }
    with pytest.raises(gates.Gap, match=f"changed the model's {place}"), gates.LeftAsItWas(model):
        changes[place]()


def test_the_gates_see_a_stone_that_reaches_past_its_boundary(monkeypatch):
    plan = partition(chain(8), chain(4), images(2))
    gates.stones_learn_where_they_should(plan, images(3))

    def reversed_stones(plan):
        stones = synthesize(plan)
        forward = stones.forward

        def call(batch):
            found = forward(batch)
            return type(found)(found.student, found.stones.flip(0), found.teacher, found.depths)

        stones.forward = call
        return stones

    monkeypatch.setattr(gates, "synthesize", reversed_stones)
    with pytest.raises(gates.Gap, match="stone 1 sends gradient past its boundary"):
        gates.stones_learn_where_they_should(plan, images(3))


def _misbehave(name, record):
    record["seen"] = True
    match name:
        case "raises":
            raise ValueError("two\nlines")
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hangs":
            time.sleep(60)
        case "grows":
            bytearray(4 * 2**30)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_pool_records_what_goes_wrong_and_goes_on():
    names = ["raises", "dies", "hangs", "grows", "works"]
    found = {record["name"]: record for record in run(names, _misbehave, Limits(2, 2), jobs=5)}
    assert found["raises"]["error"] == "ValueError: two | lines"
    assert found["dies"]["error"] == f"the process died: exit code {-signal.SIGKILL}"
    assert found["hangs"]["error"] == "time limit of 2 s"
    assert found["grows"]["error"] == "MemoryError: MemoryError"
    assert "error" not in found["works"]
    assert found["works"]["seen"]
