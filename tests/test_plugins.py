import math

import pytest
import torch

from kdsurgeon import plugins
from kdsurgeon.errors import UsageError
from kdsurgeon.losses import kl

STUDENT = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 0.0, -2.0], [0.5, 0.5, 2.0]], dtype=torch.float64)
TARGET = torch.tensor([0, 2])


def distance(name):
    return plugins.load("distances", name)


@pytest.mark.parametrize("name", ["kl", "dkd", "dist", "jsd", "lskd"])
def test_a_distance_is_zero_for_equal_logits_and_positive_else(name):
    d = distance(name)
    assert d(TEACHER, TEACHER, TARGET, 2.0).item() == pytest.approx(0.0, abs=1e-7)
    assert d(STUDENT, TEACHER, TARGET, 2.0).item() > 0


@pytest.mark.parametrize("name", ["kl", "dkd", "dist", "jsd", "lskd"])
def test_a_distance_of_a_stack_is_the_distances_one_by_one(name):
    d = distance(name)
    stack = torch.stack([STUDENT, TEACHER, -STUDENT])
    together = d(stack, TEACHER, TARGET, 3.0)
    alone = torch.stack([d(one, TEACHER, TARGET, 3.0) for one in stack])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("name", ["kl", "dkd", "dist", "jsd", "lskd"])
def test_a_distance_sends_its_gradient_into_the_student_only(name):
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    distance(name)(student, teacher, TARGET, 2.0).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(
        lambda s: distance(name)(s, TEACHER, TARGET, 2.0), (STUDENT.clone().requires_grad_(),)
    )


def test_dkd_with_equal_weights_per_part_is_the_decomposition_of_kl():
    """KL = TCKD + (1 - p_target) NCKD (Zhao et al., equation 5)."""
    from kdsurgeon_plugins import dkd

    wanted = TEACHER.softmax(-1)
    right = torch.nn.functional.one_hot(TARGET, 3).bool()
    binary = dkd._kl(dkd._right_and_rest(TEACHER, right), dkd._right_and_rest(STUDENT, right))
    others = dkd._kl(dkd._others(TEACHER, right), dkd._others(STUDENT, right))
    whole = (binary + (1 - wanted[right]) * others).mean()
    assert whole.item() == pytest.approx(kl(STUDENT, TEACHER, TARGET, 1.0).item())


def test_an_unknown_plugin_is_answered_with_the_nearest_name():
    with pytest.raises(UsageError, match='no distance is called "dkk"') as caught:
        plugins.load("distances", "dkk")
    assert caught.value.notes["fix"] == 'did you mean "dkd"?'


def test_listing_says_where_each_comes_from():
    found = plugins.installed("models")["demo"]
    assert (found.target, found.distribution) == ("kdsurgeon.demo:build", "kdsurgeon")


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_a_model_source_whose_library_is_missing_says_how_to_get_it(source, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, source, None)
    with pytest.raises(UsageError, match=f"{source}/resnet18 needs {source}") as caught:
        plugins.load("models", source)("resnet18")
    assert "pip install" in caught.value.notes["fix"]


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_a_model_source_builds_by_name_and_refuses_unknown_names(source, monkeypatch):
    import sys
    import types

    library = types.ModuleType(source)
    catalogue = types.SimpleNamespace(
        is_model=lambda name: name == "tiny",
        list_models=lambda *_: ["tiny"],
        create_model=lambda name, **kwargs: torch.nn.Linear(2, kwargs["num_classes"]),
        get_model=lambda name, **kwargs: torch.nn.Linear(2, kwargs["num_classes"]),
        __version__="0",
    )
    library.__dict__.update(vars(catalogue), models=catalogue)
    monkeypatch.setitem(sys.modules, source, library)
    build = plugins.load("models", source)
    assert build("tiny", num_classes=3).out_features == 3
    with pytest.raises(UsageError, match="no model tinny") as caught:
        build("tinny")
    assert caught.value.notes["near"] == "tiny"


def test_standardised_logits_ignore_offset_and_scale_and_equal_ones_have_a_gradient():
    d = distance("lskd")
    moved = d(7 * STUDENT - 3, TEACHER * 0.5 + 1, TARGET, 2.0).item()
    assert moved == pytest.approx(d(STUDENT, TEACHER, TARGET, 2.0).item(), rel=1e-9)
    flat = torch.zeros_like(STUDENT, requires_grad=True)
    d(flat, TEACHER, TARGET, 2.0).backward()
    assert flat.grad.isfinite().all()


def test_jsd_is_symmetric_and_at_most_ln_2():
    d = distance("jsd")
    there, back = d(STUDENT, TEACHER, TARGET, 1.0), d(TEACHER, STUDENT, TARGET, 1.0)
    assert there.item() == pytest.approx(back.item(), rel=1e-12)
    assert d(100 * STUDENT, -100 * STUDENT, TARGET, 1.0).item() == pytest.approx(math.log(2))


def test_dkd_refuses_soft_targets_and_the_others_take_them():
    shares = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(UsageError, match="dkd needs the right class"):
        distance("dkd")(STUDENT, TEACHER, shares, 2.0)
    for name in ("kl", "dist", "jsd", "lskd"):
        assert distance(name)(STUDENT, TEACHER, shares, 2.0).item() > 0
