import pytest
import torch

from kdsurgeon.adapters import AdapterSpec, adapter_for, build
from kdsurgeon.errors import PlanError
from kdsurgeon.partitioning import CutPoint


def point(shape, *, is_rectified=True):
    kind = {1: "vector", 2: "tokens", 3: "map"}[len(shape)]
    return CutPoint("node", shape, kind, 1.0, 0.5, is_rectified, True)


CASES = [
    ((8, 16, 16), (32, 16, 16), "conv"),
    ((8, 16, 16), (32, 8, 8), "downsample"),
    ((8, 7, 7), (32, 4, 4), "downsample"),
    ((8, 8, 8), (32, 16, 16), "upsample"),
    ((8, 8, 8), (32, 12, 12), "resize"),
    ((8, 24, 24), (32, 5, 5), "resize"),
    ((8, 8, 12), (32, 8, 6), "resize"),
    ((64,), (128,), "linear"),
    ((16, 64), (49, 128), "linear"),
    ((16, 64), (16, 128), "linear"),
]


@pytest.mark.parametrize(("source", "target", "operation"), CASES)
def test_an_adapter_carries_its_source_to_its_target_with_gradient(source, target, operation):
    spec = adapter_for(point(source), point(target))
    assert spec.operation == operation
    value = torch.randn(3, *source, requires_grad=True)
    carried = build(spec)(value)
    assert carried.shape == (3, *target)
    carried.sum().backward()
    assert value.grad.abs().sum() >= 0
    assert (carried >= 0).all(), "a reader that expects post-ReLU input never sees a negative"


def test_a_reader_before_its_activation_gets_negative_values_too():
    spec = adapter_for(point((8, 4, 4)), point((8, 4, 4), is_rectified=False))
    assert (build(spec)(torch.randn(3, 8, 4, 4)) < 0).any()


def test_identity_is_only_for_equal_shapes():
    value = torch.randn(2, 4, 3, 3)
    assert build(AdapterSpec("identity", (4, 3, 3), (4, 3, 3), False))(value) is value
    with pytest.raises(PlanError, match="identity cannot carry 4×3×3 to 8×3×3") as caught:
        AdapterSpec("identity", (4, 3, 3), (8, 3, 3), False)
    assert caught.value.notes["fix"] == "use conv"


def test_an_unknown_adapter_is_refused_with_the_nearest():
    with pytest.raises(PlanError, match='no adapter is called "upsampel"') as caught:
        AdapterSpec("upsampel", (4, 3, 3), (4, 6, 6), False)
    assert "upsample" in caught.value.notes["fix"]


def test_building_takes_nothing_from_the_random_state_and_repeats_by_seed():
    spec = adapter_for(point((8, 4, 4)), point((16, 4, 4)))
    before = torch.get_rng_state()
    first, same, other = (build(spec, seed=seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
