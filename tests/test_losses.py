import math
import re

import pytest
import torch
from torch.nn import functional

from kdsurgeon import plugins
from kdsurgeon.errors import PluginError, UsageError
from kdsurgeon.losses import Logits, block_kd_loss, kl, load_distance, task_loss
from kdsurgeon.losses.formulas import halving_weights


def random_logits(stones: int = 3, batch: int = 5, classes: int = 7) -> Logits:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((stones + 2, batch, classes), generator=generator, dtype=torch.float64)
    values.requires_grad_()
    return Logits(values[0], values[1:-1], values[-1], tuple(range(1, stones + 1)))


TARGET = torch.tensor([0, 6, 3, 3, 1])


def naive_kl(student, teacher, temperature):
    wanted = torch.softmax(teacher / temperature, -1)
    given = torch.softmax(student / temperature, -1)
    return temperature**2 * (wanted * (wanted / given).log()).sum(-1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_the_written_formula(temperature):
    logits = random_logits()
    ours = kl(logits.student, logits.teacher, TARGET, temperature)
    assert ours.item() == pytest.approx(
        naive_kl(logits.student, logits.teacher, temperature).item(), rel=1e-12
    )


def test_kl_sends_no_gradient_into_the_teacher():
    teacher = torch.randn(4, 3, requires_grad=True)
    student = torch.randn(4, 3, requires_grad=True)
    kl(student, teacher, TARGET[:4], 4.0).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_the_whole_loss_is_the_sum_written_out_stone_by_stone():
    logits = random_logits()
    loss = block_kd_loss(
        logits, TARGET, ce_weight=0.7, kd_weight=1.3, cross_weight=0.9, temperature=3.0
    )
    ensemble = logits.stones.mean(0).detach()
    expected = 0.7 * functional.cross_entropy(logits.student, TARGET)
    expected += 1.3 * naive_kl(logits.student, logits.teacher, 3.0)
    expected += 0.9 * naive_kl(logits.student, ensemble, 3.0)
    for weight, stone in zip((0.25, 0.5, 1.0), logits.stones, strict=True):
        expected += 0.7 * weight * functional.cross_entropy(stone, TARGET)
        expected += 1.3 * weight * naive_kl(stone, logits.teacher, 3.0)
        expected += 0.9 * naive_kl(stone, ensemble, 3.0)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)


def test_gradients_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn((3, 4, 5), generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn((4, 5), generator=generator, dtype=torch.float64)

    def total(values):
        logits = Logits(values[0], values[1:], teacher, (1, 2))
        return block_kd_loss(logits, TARGET[:4] % 5, temperature=2.0).total

    assert torch.autograd.gradcheck(total, (values,))


def test_the_ensemble_is_a_target_and_receives_no_gradient():
    logits = random_logits()
    (with_cross,) = torch.autograd.grad(
        block_kd_loss(logits, TARGET, ce_weight=0.0, kd_weight=0.0, cross_weight=1.0).total,
        logits.stones,
        retain_graph=True,
    )
    ensemble = logits.stones.mean(0).detach()
    (expected,) = torch.autograd.grad(
        sum(naive_kl(stone, ensemble, 4.0) for stone in logits.stones), logits.stones
    )
    torch.testing.assert_close(with_cross, expected)


def test_every_component_is_reported_by_name_and_depth():
    logits = random_logits(stones=2)
    logits = Logits(logits.student, logits.stones, logits.teacher, (2, 4))
    parts = block_kd_loss(logits, TARGET, cross_weight=1.0).parts
    assert sorted(parts) == sorted(
        f"{kind} {who}"
        for kind in ("ce", "kd", "cross")
        for who in ("student", "stone 2", "stone 4")
    )
    assert not any(value.requires_grad for value in parts.values())


def test_without_stones_it_is_plain_distillation():
    logits = random_logits(stones=0)
    loss = block_kd_loss(logits, TARGET, cross_weight=1.0)
    expected = functional.cross_entropy(logits.student, TARGET)
    expected = expected + naive_kl(logits.student, logits.teacher, 4.0)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert set(loss.parts) == {"ce student", "kd student"}


def test_label_smoothing_reaches_student_and_stones_alike():
    logits = random_logits(stones=1)
    loss = block_kd_loss(logits, TARGET, kd_weight=0.0, label_smoothing=0.1)
    expected = sum(
        functional.cross_entropy(one, TARGET, label_smoothing=0.1)
        for one in (logits.student, logits.stones[0])
    )
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)


def test_stone_weights_halve_from_the_last_to_the_first():
    assert halving_weights(4) == (0.125, 0.25, 0.5, 1.0)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (TARGET, {"weights": [1.0, 1.0]}, "2 weights for 3 stones"),
        (TARGET[:4], {}, r"the target is torch.int64 of shape \(4,\)"),
        (TARGET.int(), {}, "the target is torch.int32"),
        (TARGET[:, None], {}, r"of shape \(5, 1\)"),
        (torch.full((5, 6), 1 / 6), {}, r"of shape \(5, 6\)"),
        (TARGET, {"temperature": 0.0}, "a temperature of 0.0"),
        (TARGET, {"temperature": -4.0}, "a temperature of -4.0"),
        (TARGET, {"temperature": math.nan}, "a temperature of nan"),
        (TARGET, {"temperature": math.inf}, "a temperature of inf"),
        (TARGET, {"label_smoothing": 1.0}, "a label smoothing of 1.0"),
        (TARGET, {"label_smoothing": -0.1}, "a label smoothing of -0.1"),
    ],
)
def test_arguments_that_do_not_fit_the_logits_are_refused(target, options, message):
    with pytest.raises(UsageError, match=message):
        block_kd_loss(random_logits(), target, **options)


def test_logits_of_unequal_shapes_cannot_be_built():
    with pytest.raises(AssertionError):
        Logits(torch.zeros(2, 3), torch.zeros(1, 2, 4), torch.zeros(2, 3), (1,))


def test_the_task_loss_of_a_model_alone_is_cross_entropy():
    loss = task_loss(torch.zeros(3, 8), torch.tensor([0, 1, 2]))
    assert loss.total.item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("stones", [1, 4, 12])
def test_the_number_of_operations_does_not_depend_on_the_number_of_stones(stones):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += not func.is_view
            return func(*args, **(kwargs or {}))

    logits = random_logits(stones=stones)
    Count.calls = 0
    with Count():
        loss = block_kd_loss(logits, TARGET).total
        torch.autograd.grad(loss, [logits.student, logits.stones])
    assert Count.calls <= 44


DISTANCES = {
    "raises": (lambda s, t, y, tau: 1 / 0, "ZeroDivisionError"),
    "takes less": (lambda s, t: s.sum(), "TypeError"),
    "one number": (lambda s, t, y, tau: ((s - t) ** 2).mean(), r"it gave \(\), not \(2,\)"),
    "one a row": (lambda s, t, y, tau: ((s - t) ** 2).mean(-1), r"\(2, 3\), not \(2,\)"),
    "a float": (lambda s, t, y, tau: 0.5, "it gave float"),
    "no gradient": (lambda s, t, y, tau: ((s - t) ** 2).mean((-1, -2)).detach(), "no gradient"),
    "writes": (lambda s, t, y, tau: (s - t.mul_(2)).square().mean((-1, -2)), "writes into"),
}


@pytest.mark.parametrize("kind", DISTANCES)
def test_a_plugin_that_is_no_distance_is_refused_by_name_before_a_run(kind, monkeypatch):
    distance, why = DISTANCES[kind]
    monkeypatch.setattr(plugins, "load", lambda group, name: distance)
    with pytest.raises(PluginError, match='the distance "dkd" of kdsurgeon') as caught:
        load_distance("dkd")
    assert re.search(why, str(caught.value.notes["why"]))


def test_a_distance_that_fails_in_a_run_is_the_plugins_fault_but_for_memory(monkeypatch):
    def distance(student, teacher, target, temperature):
        if len(target) == 7:
            raise torch.OutOfMemoryError("of the device")
        if len(target) == 6:
            raise ValueError("my bug")
        return ((student - teacher) ** 2).mean((-1, -2))

    monkeypatch.setattr(plugins, "load", lambda group, name: distance)
    checked = load_distance("dkd")
    logits = torch.zeros(1, 6, 4)
    with pytest.raises(PluginError) as caught:
        checked(logits, logits[0], torch.zeros(6, dtype=torch.int64), 1.0)
    assert caught.value.notes["why"] == "ValueError: my bug"
    with pytest.raises(torch.OutOfMemoryError):
        checked(logits, logits[0], torch.zeros(7, dtype=torch.int64), 1.0)
