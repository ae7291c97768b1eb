from dataclasses import replace

import networkx as nx
import pytest
import torch
from torch import fx, nn

from kdsurgeon.errors import PlanError
from kdsurgeon.layouts import describe_activations
from kdsurgeon.partitioning import (
    activations,
    cut,
    find_cut_points,
    fingerprint,
    primary_input,
    recut,
)
from kdsurgeon.stones import compose, partition, synthesize
from kdsurgeon.stones.surgery import context_inputs, graft
from kdsurgeon.tracing import trace
from tests import models


def captured(name, **kwargs):
    return trace(models.make(name), models.images(2), **kwargs)


@pytest.mark.parametrize("name", models.ALL)
def test_the_sweep_finds_what_dominance_finds(name):
    whole = captured(name)
    nodes = activations(whole)
    graph = nx.DiGraph()
    for node in nodes:
        graph.add_edges_from((other, node) for other in node.all_input_nodes if other in nodes)
    start = nodes[0]
    dominators = nx.immediate_dominators(graph, start)
    node, expected = dominators[whole.logits], []
    while node is not start:
        expected.append(node.meta["qualname"])
        node = dominators[node]
    found = [point.name for point in find_cut_points(whole) if point.width == 1]
    described = describe_activations(whole, [whole.nodes[name] for name in expected])
    has_batch_axis = {node.meta["qualname"] for node in described}
    assert found == [name for name in expected[::-1] if name in has_batch_axis]
    assert len(found) >= 3


def test_a_skip_connection_is_never_cut():
    names = {point.name for point in find_cut_points(captured("residual"))}
    assert "layers.1.conv1" not in names
    assert "layers.1.add" in names


@pytest.mark.parametrize("name", models.ALL)
@pytest.mark.parametrize("training", [False, True])
def test_blocks_recomposed_are_the_model(name, training):
    """METHOD 4.5: outputs, gradients and buffers, in both modes."""
    model, twin = models.make(name), models.make(name)
    model.train(training), twin.train(training)
    whole = trace(twin, models.images(2), training=training)
    points = find_cut_points(whole)
    rebuilt = compose(cut(whole, points))
    outputs = [network(models.images(5)) for network in (model, rebuilt)]
    assert torch.equal(*outputs)
    for logits in outputs:
        logits.square().mean().backward()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)
    for own, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(own, other)


def test_blocks_hold_every_node_once_and_all_of_the_cost():
    whole = captured("residual")
    points = find_cut_points(whole)
    partition = cut(whole, points)
    assert len(partition.blocks) == len(points) + 1
    nodes = [node for block in partition.blocks for node in block.nodes]
    assert len(nodes) == len(set(nodes)) == len(whole.graph_module.graph.nodes) - 2
    assert partition.cost.parameters == sum(p.numel() for p in whole.model.parameters())


def test_multiply_adds_are_those_counted_by_hand():
    partition = cut(captured("chain"), ())
    by_hand = 16 * 16 * 27 * 8 + 8 * 8 * 72 * 16 + 4 * 4 * 144 * 32 + 32 * 10
    assert partition.cost.multiply_adds == by_hand


@pytest.mark.parametrize(
    ("names", "message", "note"),
    [
        (["layers.0.relu_2"], "has no node layers.0.relu_2", "did you mean"),
        (["layers.1.conv1"], "cannot be cut at layers.1.conv1", "other tensors"),
        (
            ["layers.2.relu_1", "layers.0.relu_1"],
            "boundaries of model cross",
            "does not come after",
        ),
    ],
)
def test_a_wrong_cut_is_refused_by_name(names, message, note):
    whole = captured("residual")
    point = find_cut_points(whole)[0]
    with pytest.raises(PlanError, match=message) as caught:
        cut(whole, tuple(renamed(point, name) for name in names))
    assert note in str(caught.value)


def renamed(point, name):
    return replace(point, tensors=(replace(point.main, name=name),))


def test_the_fingerprint_depends_on_the_graph_and_not_on_weights_or_batch():
    one = trace(models.make("residual", seed=0), models.images(2))
    same = trace(models.make("residual", seed=1), models.images(3))
    other = trace(models.make("residual", width=12), models.images(2))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def test_a_cut_after_relu_is_known_to_be_rectified():
    by_name = {point.name: point for point in find_cut_points(captured("residual"))}
    assert by_name["layers.0.relu_1"].main.is_rectified
    assert not by_name["layers.0.add"].main.is_rectified
    linear = {point.name: point for point in find_cut_points(captured("inverted"))}
    assert not linear["units.1.7"].main.is_rectified


class DropsInTraining(nn.Module):
    """Writes into what dropout gives: one tensor in evaluation mode, another in training."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 10)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = self.stem(x)
        y = self.drop(x) if self.training else x
        y *= 2
        return self.head((y + x).relu().mean((2, 3)))


def test_what_only_training_mode_still_needs_is_carried_across_the_cut():
    torch.manual_seed(0)
    model = DropsInTraining()
    whole = trace(model, models.images(2))
    chosen = [point for point in find_cut_points(whole) if point.name == "mul"]
    in_training = recut(cut(whole, chosen), trace(model, models.images(2), training=True))
    assert in_training.carried == (("stem",),)
    results = []
    for run in (model.train(), compose(in_training)):
        torch.manual_seed(1)
        results.append(run(models.images(4)))
    assert torch.equal(*results)


class Scaled(nn.Module):
    """Three layers with the same scale, which is computed once, and pairs of samples inside."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.scale = nn.Parameter(torch.randn(8))
        self.weight = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, models.CLASSES)

    def forward(self, x):
        scale, pairs = self.scale.softmax(0), 2 * x.shape[0]
        x = self.stem(x).relu().mean((2, 3))
        for layer in self.layers:
            both = torch.stack([layer(x), -x], 1).reshape(pairs, 8) * scale
            x = x + both.reshape(x.shape[0], 2, 8).sum(1)
            x = nn.functional.layer_norm(x, (8,), self.weight)
        return self.head(x)


def test_what_needs_no_data_is_computed_once_for_all_blocks():
    whole = trace(Scaled(), models.images(2))
    partition = cut(whole, [p for p in find_cut_points(whole) if p.name.startswith("add")])
    assert len(partition.blocks) == 4
    rebuilt = compose(partition)
    computed = [node for node in rebuilt.graph.nodes if "softmax" in str(node.target)]
    assert len(computed) == 1
    assert torch.equal(rebuilt(models.images(5)), whole.model(models.images(5)))


def test_a_norm_behind_a_junction_whose_weight_is_a_parameter_belongs_to_it():
    points = find_cut_points(trace(Scaled(), models.images(2)))
    norms = [point.is_junction for point in points if point.name.startswith("layer_norm")]
    assert norms == [True] * 3


class _Filled(nn.Module):
    """Its head reads dtype and device of the first layer's tensor, and nothing else of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        early = torch.relu(self.first(x))
        late = torch.relu(self.second(early))
        return self.head(torch.cat([late, early.new_zeros(len(late), 2)], 1))


def test_a_tensor_of_which_only_the_type_is_read_is_not_computed_again():
    found = trace(_Filled().eval(), torch.randn(3, 4))
    (at,) = [each for each in find_cut_points(found) if each.name == "relu_1"]
    whole = cut(found, [at])
    graph = fx.Graph()
    boundary = {found.nodes["relu_1"]: graph.placeholder("late")}
    graft(graph, whole.blocks[1].nodes, boundary, {}, "tail.")
    assert not any("first" in str(node.target) for node in graph.nodes)
    x = torch.randn(5, 4)
    assert torch.equal(compose(whole)(x), found.model(x))


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, data, weight):
        return self.head(torch.relu(self.body(data)) * weight)


def test_blocks_after_a_cut_read_every_input_but_the_data():
    given = {"data": torch.randn(3, 4), "weight": torch.ones(3, 1)}
    found = trace(_Two().eval(), given)
    inputs = {node: node for node in found.placeholders}
    assert [str(node.target) for node in context_inputs(found, inputs)] == ["weight"]


def test_a_model_without_multiply_adds_has_passed_none_of_them():
    pooled = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    points = find_cut_points(trace(pooled.eval(), torch.randn(2, 3, 4, 4)))
    assert points and {point.progress for point in points} == {0.0}
    lone = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False), nn.ReLU())
    one = find_cut_points(trace(lone.eval(), torch.randn(2, 1, 1, 1)))
    assert one[-1].progress == 1.0


class _Unequal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(2, 3), nn.Sequential(nn.Linear(9, 30), nn.Linear(30, 3))

    def forward(self, little, much):
        return self.small(little) + self.large(much)


def test_of_two_inputs_that_with_most_compute_behind_it_is_the_data():
    given = {"little": torch.randn(3, 2), "much": torch.randn(3, 9)}
    assert str(primary_input(trace(_Unequal().eval(), given)).target) == "much"


def test_the_teachers_own_pass_gives_the_teachers_logits():
    teacher, student = models.make("residual"), models.make("chain")
    stones = synthesize(partition(teacher, student, models.images()), fold=False)
    wanted = teacher.eval()(models.images(3))
    assert torch.equal(stones.teacher_logits(models.images(3)), wanted)
