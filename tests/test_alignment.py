from itertools import combinations

import pytest
import torch

from kdsurgeon.alignment import _grid_of_costs, align, candidates
from kdsurgeon.errors import AlignmentError, PlanError, UsageError
from kdsurgeon.partitioning import find_cut_points
from kdsurgeon.tracing import trace
from tests import models


def pair(teacher, student, **kwargs):
    first = trace(models.make(teacher[0], **teacher[1]), models.images(2), name="teacher")
    second = trace(models.make(student[0], **student[1]), models.images(2), name="student")
    return align(first, second, **kwargs)


def names(alignment):
    return [(b.teacher.name, b.student.name) for b in alignment.boundaries]


def test_residual_stages_are_paired_end_to_end_as_the_literature_does_by_hand():
    """resnet20 against resnet8: one boundary after each stage."""
    found = pair(("residual", {"width": 16, "depth": 3}), ("residual", {"depth": 1}))
    assert names(found) == [
        ("layers.2.relu_1", "layers.0.relu_1"),
        ("layers.5.relu_1", "layers.1.relu_1"),
        ("layers.8.relu_1", "layers.2.relu_1"),
    ]


def test_a_chain_is_cut_after_activations_and_before_pools():
    found = pair(("chain", {"width": 16}), ("chain", {}))
    assert names(found) == [("2", "2"), ("6", "6"), ("10", "10")]


@pytest.mark.parametrize("student", models.ALL)
@pytest.mark.parametrize("teacher", models.ALL)
def test_every_pair_is_aligned_with_rising_boundaries(teacher, student):
    found = pair((teacher, {}), (student, {}))
    for side in (found.teacher, found.student):
        progress = [point.progress for point in side.cuts]
        assert progress == sorted(set(progress))
    assert len(found.boundaries) >= 1
    kinds = {side.kind for each in found.boundaries for side in (each.teacher, each.student)}
    assert kinds <= {"map", "tokens"}


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_as_many_boundaries_as_asked_for(blocks):
    teacher = ("residual", {"depth": 3})
    assert len(pair(teacher, ("residual", {"depth": 2}), blocks=blocks).boundaries) == blocks


def test_the_choice_is_the_best_of_all_chains():
    """Against trying every chain of two boundaries."""
    traces = [
        trace(models.make(name, depth=3), models.images(2), name=name)
        for name in ("residual", "residual")
    ]
    rows, columns = (candidates(each) for each in traces)
    costs = _grid_of_costs(rows, columns, 3, 1.0, {})
    last = (len(rows) - 1, len(columns) - 1)
    places = sorted({place[1:] for place in costs})
    chains = [
        sum(sum(costs[depth, *pair].values()) for depth, pair in enumerate((*chain, last)))
        for chain in combinations(places, 2)
        if chain[0][0] < chain[1][0] < last[0] and chain[0][1] < chain[1][1] < last[1]
    ]
    found = align(*traces, blocks=3)
    assert sum(boundary.cost for boundary in found.boundaries) == pytest.approx(min(chains))
    assert all(b.runner_up.extra_cost >= 0 for b in found.boundaries[:-1])


def test_evidence_says_what_a_boundary_costs_by_term():
    boundary = pair(("residual", {}), ("inverted", {})).boundaries[0]
    assert set(boundary.evidence) == {
        "resolution", "progress", "kind", "width", "activation", "adapter", "stage end", "balance",
    }  # fmt: skip
    assert boundary.cost == pytest.approx(sum(boundary.evidence.values()))


def test_hand_named_pairs_replace_the_search():
    by_hand = [("layers.0.relu_1", "units.1.7")]
    found = pair(("residual", {}), ("inverted", {}), pairs=by_hand)
    assert names(found) == by_hand


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"blocks": 9}, AlignmentError, "--blocks 9 asks for 9"),
        ({"pairs": [("layers.0.relu", "units.1.7")]}, PlanError, "cannot be cut at layers.0.relu"),
        ({"pairs": [("layer.0.relu_1", "units.1.7")]}, PlanError, "no node layer.0.relu_1"),
    ],
)
def test_what_cannot_be_done_is_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        pair(("residual", {}), ("inverted", {}), **kwargs)


def test_models_of_unequal_classes_are_refused_with_both_numbers():
    small = models.make("chain")
    small[-1] = torch.nn.Linear(32, 7)
    first = trace(models.make("chain"), models.images(2), name="big")
    second = trace(small, models.images(2), name="small")
    with pytest.raises(AlignmentError, match="big has 10 classes, small has 7"):
        align(first, second)


def flat(seed=0):
    """An MLP: no tensor in it has places."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(768, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
        )


def placed():
    """Its logits are the mean of a map: no vector before them."""
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 10, 1)
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


@pytest.mark.parametrize("name", models.ALL)
def test_a_network_without_places_meets_another_behind_its_pooling(name):
    first = trace(models.make(name), models.images(2), name="big")
    second = trace(flat(), models.images(2), name="flat")
    for pair in ((first, second), (second, first)):
        found = align(*pair)
        (boundary,) = found.boundaries
        assert boundary.teacher.kind == boundary.student.kind == "vector"
        assert "2" in (boundary.teacher.name, boundary.student.name)  # the ReLU of the flat one
        assert found.relaxed == ("no maps or tokens can be paired; vectors were allowed",)


def test_vectors_are_left_alone_where_maps_pair():
    found = pair(("chain", {}), ("residual", {}))
    assert found.relaxed == ()
    assert all(boundary.teacher.kind == "map" for boundary in found.boundaries)


def test_models_without_a_common_kind_of_tensor_are_refused():
    first = trace(placed(), models.images(2), name="big")
    second = trace(flat(), models.images(2), name="flat")
    with pytest.raises(AlignmentError, match="big and flat have no boundary in common") as caught:
        align(first, second)
    assert caught.value.notes["teacher"] == "map at its cut points"
    assert caught.value.notes["student"] == "vector at its cut points"
    assert "--method kd" in caught.value.notes["fix"]


class Streams(torch.nn.Module):
    """Two tensors are alive at every place but in front of the head."""

    def __init__(self, width=8):
        super().__init__()
        self.left = torch.nn.ModuleList(torch.nn.Conv2d(3, width, 3, 2, 1) for _ in range(1))
        self.right = torch.nn.Conv2d(3, width, 3, 2, 1)
        self.more = torch.nn.Conv2d(width, width, 3, 2, 1)
        self.last = torch.nn.Conv2d(width, width, 3, 2, 1)
        self.head = torch.nn.Linear(2 * width, 10)

    def forward(self, x):
        left, right = self.left[0](x).relu(), self.right(x).relu()
        left, right = self.more(left).relu(), self.last(right).relu()
        return self.head(torch.cat([left, right], 1).mean((2, 3)))


def test_the_tensors_of_a_wide_cut_are_named_in_any_order():
    first, second = (trace(Streams(width), models.images(2)) for width in (16, 4))
    wide = next(point for point in find_cut_points(first) if point.width == 2)
    there, back = " + ".join(wide.names), " +  ".join(reversed(wide.names))
    assert there != back
    found = [align(first, second, pairs=[(names, there)]) for names in (there, back)]
    for alignment in found:
        assert alignment.boundaries[0].teacher == wide
    with pytest.raises(PlanError, match="cannot be cut at"):
        align(first, second, pairs=[(f"{wide.names[0]} + {wide.names[0]}", there)])


@pytest.mark.parametrize(
    "pairs",
    [
        [("stem.0", "stem.0"), ("stem.0", "layers.0.relu_1")],
        [("stem.0", "stem.0"), ("layers.0.relu_1", "stem.0")],
    ],
)
def test_a_cut_point_given_twice_is_named(pairs):
    with pytest.raises(PlanError, match=r"stem\.0 of (teacher|student) is given twice"):
        pair(("residual", {}), ("residual", {}), pairs=pairs)


@pytest.mark.parametrize("blocks", ["2", "all", 1.0, None, True])
def test_a_number_of_blocks_of_another_type_is_refused(blocks):
    with pytest.raises(UsageError, match="blocks is ") as caught:
        pair(("residual", {}), ("residual", {}), blocks=blocks)
    assert "blocks=4" in caught.value.notes["fix"]


@pytest.mark.parametrize(
    "pairs",
    ["stem.2", "ab", ["stem.2"], ["ab"], [], {"a": "b"}, [("a",)], [("a", "b", "c")],
     [(("a", "b"), "c")], [1], 3],
)  # fmt: skip
def test_pairs_of_another_nesting_are_refused(pairs):
    with pytest.raises(UsageError, match="pairs must be a list of") as caught:
        pair(("residual", {}), ("residual", {}), pairs=pairs)
    assert caught.value.notes["given"] == repr(pairs)
    assert "pairs=[(" in caught.value.notes["fix"]
