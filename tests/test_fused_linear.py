"""The fused linear loss against whole logits, in float64 and in what models run in."""

import importlib
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kdsurgeon.errors import UsageError
from kdsurgeon.losses import fused, linear
from kdsurgeon.losses.linear import linear_block_kd_loss

# Where Triton's interpreter runs a kernel, numpy warns of lanes that are masked.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")

ROWS, CLASSES, STUDENT, TEACHER = 23, 301, 5, 7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case:
    """Seeded hidden states and heads, and the loss of both ways to compute it."""

    def __init__(self, stones=3, dtype=torch.float64, *, bias=True, ignored=(2, 3, 20)):
        generator = torch.Generator().manual_seed(stones)

        def hidden(*shape):
            made = torch.randn(shape, generator=generator, dtype=torch.float64)
            return made.to(DEVICE, dtype)

        self.student_hidden = hidden(ROWS, STUDENT).requires_grad_()
        self.stone_hidden = hidden(stones, ROWS, TEACHER).requires_grad_()
        self.teacher_hidden = hidden(ROWS, TEACHER)
        self.student_head = nn.Linear(STUDENT, CLASSES, bias, DEVICE, dtype)
        self.teacher_head = nn.Linear(TEACHER, CLASSES, bias, DEVICE, dtype)
        for head in (self.student_head, self.teacher_head):
            for parameter in head.parameters():
                parameter.data.copy_(hidden(*parameter.shape))
        target = torch.randint(0, CLASSES, (ROWS,), generator=generator)
        target[list(ignored)] = -100
        self.target = target.to(DEVICE)
        self.weights = [0.3 + 0.2 * one for one in range(stones)]
        self.terms = {"ce_weight": 0.7, "kd_weight": 1.3, "temperature": 3.0}

    def learned(self):
        return [self.student_hidden, self.stone_hidden, *self.student_head.parameters()]

    def loss(self, **options):
        return linear_block_kd_loss(
            self.student_hidden,
            self.student_head,
            self.stone_hidden,
            self.teacher_hidden,
            self.teacher_head,
            self.target,
            **{"weights": self.weights, **self.terms, **options},
        )

    def double(self):
        """The same numbers in float64."""
        case = Case(len(self.stone_hidden), bias=self.student_head.bias is not None)
        pairs = zip(
            [*case.learned(), case.teacher_hidden, *case.teacher_head.parameters()],
            [*self.learned(), self.teacher_hidden, *self.teacher_head.parameters()],
            strict=True,
        )
        for ours, theirs in pairs:
            ours.data.copy_(theirs)
        case.target = self.target
        return case

    def whole(self):
        """The total and the means (2, sets) from whole logits, from the definitions."""
        temperature = self.terms["temperature"]
        kept = self.target != -100
        wanted = torch.softmax(self.teacher_head(self.teacher_hidden)[kept] / temperature, -1)
        means = []
        for logits in (
            self.student_head(self.student_hidden),
            *(self.teacher_head(one) for one in self.stone_hidden),
        ):
            given = torch.log_softmax(logits[kept] / temperature, -1)
            apart = (torch.xlogy(wanted, wanted) - wanted * given).sum(-1).mean()
            task = functional.cross_entropy(logits, self.target)
            means.append(torch.stack([task, apart * temperature**2]))
        means = torch.stack(means, dim=1)
        factors = means.new_tensor([1.0, *self.weights])
        return (0.7 * means[0] * factors + 1.3 * means[1] * factors).sum(), means


def means_of(loss, stones):
    who = ["student", *(f"stone {depth}" for depth in range(1, stones + 1))]
    return torch.stack(
        [torch.stack([loss.parts[f"{kind} {one}"] for one in who]) for kind in ("ce", "kd")]
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stones", [0, 1, 3])
@pytest.mark.parametrize("chunk", [1, 4, 23, 1000])
def test_value_and_every_gradient_are_those_of_whole_logits(stones, chunk, bias):
    case = Case(stones, bias=bias)
    loss = case.loss(chunk=chunk)
    expected, means = case.whole()
    # Each number is a sum of at most a few thousand rounded products: 1e-16 · 1e4 · their size.
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(means_of(loss, stones), means, rtol=1e-10, atol=0)
    ours = torch.autograd.grad(2.5 * loss.total, case.learned())
    theirs = torch.autograd.grad(2.5 * expected, case.learned(), materialize_grads=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("slab", [1, 100, 301])
def test_the_weight_gradient_may_be_made_in_slabs(monkeypatch, slab):
    case = Case()
    (expected,) = torch.autograd.grad(case.whole()[0], [case.student_head.weight])
    monkeypatch.setattr(linear, "SLAB", slab)
    (gradient,) = torch.autograd.grad(case.loss(chunk=4).total, [case.student_head.weight])
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def relative(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        # Logits have the size of 2.5 (sums of 8 products) and are stored with one rounding, which
        # is the relative error of a probability: 2.5 · 2⁻⁸ = 0.01 for bfloat16. Gradients are made
        # of these and are themselves rounded once or twice more, by less: twice that.
        (torch.bfloat16, 2e-2),
        (torch.float16, 2.5e-3),  # 2⁻¹¹
        (torch.float32, 2e-6),  # 2⁻²⁴, and here the sums themselves round by as much
    ],
)
def test_lower_precision_stays_within_the_rounding_of_its_logits(
    monkeypatch, dtype, bound, interpreted
):
    case = Case(2, dtype)
    if interpreted and DEVICE == "cpu":
        make_the_kernels_run_here(monkeypatch)
    loss = case.loss(chunk=8)
    _, means = case.double().whole()
    assert relative(means_of(loss, 2), means) < bound
    assert loss.total.dtype == torch.float32
    double = case.double()
    theirs = torch.autograd.grad(double.whole()[0], double.learned())
    ours = torch.autograd.grad(loss.total, case.learned())
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        assert relative(one, other) < bound


def make_the_kernels_run_here(monkeypatch):
    """In Triton's interpreter, whoever imported Triton before, as if the CPU were a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    import triton

    importlib.reload(triton.language.standard)
    importlib.reload(triton.language)
    fused.kernels()
    monkeypatch.setattr(linear, "can_fuse", fused._misfit)


def test_with_the_kernel_and_without_it_is_the_same_loss(monkeypatch):
    case = Case(3, torch.float32)
    plain = case.loss(chunk=8)
    plain_gradients = torch.autograd.grad(plain.total, case.learned())
    make_the_kernels_run_here(monkeypatch)
    with mock.patch.object(linear, "rowwise_values", wraps=linear.rowwise_values) as launched:
        loss = case.loss(chunk=8)
    assert launched.call_count == 3  # chunks of 23 rows
    torch.testing.assert_close(loss.total, plain.total, rtol=1e-5, atol=0)
    for one, other in zip(
        torch.autograd.grad(loss.total, case.learned()), plain_gradients, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """The most numbers any operation returned in one tensor."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_are_never_whole(dtype):
    case, chunk = Case(3, dtype), 2
    with Largest() as largest:
        case.loss(chunk=chunk).total.backward()
    assert largest.numbers == (3 + 2) * chunk * CLASSES
    assert largest.numbers < ROWS * CLASSES / 2
    with Largest() as largest:
        case.whole()
    assert largest.numbers == ROWS * CLASSES


def test_the_teachers_head_stays_as_it_is():
    case = Case()
    case.loss().total.backward()
    assert all(parameter.grad is None for parameter in case.teacher_head.parameters())
    assert case.teacher_hidden.grad is None


def test_only_what_needs_a_gradient_gets_one():
    case = Case()
    case.student_head.requires_grad_(False)
    case.stone_hidden.requires_grad_(False)
    expected, _ = case.whole()
    (wanted,) = torch.autograd.grad(expected, [case.student_hidden])
    case.loss().total.backward()
    torch.testing.assert_close(case.student_hidden.grad, wanted, rtol=1e-10, atol=1e-12)
    assert case.student_head.weight.grad is None
    assert case.stone_hidden.grad is None
    with torch.no_grad(), mock.patch.object(linear, "_values", wraps=linear._values) as values:
        loss = Case().loss()
    assert [call.kwargs for call in values.mock_calls] == [{"slopes": False}]
    assert not loss.total.requires_grad
    torch.testing.assert_close(loss.total, expected.detach(), rtol=1e-10, atol=0)


def test_masked_classes_add_nothing():
    case = Case()
    for head in (case.student_head, case.teacher_head):
        head.bias.data[5:9] = -torch.inf
    case.target[(case.target >= 5) & (case.target < 9)] = 100
    loss = case.loss(chunk=4)
    loss.total.backward()
    rest = [one for one in range(CLASSES) if not 5 <= one < 9]
    smaller = Case()
    for ours, theirs in (
        (smaller.student_head, case.student_head),
        (smaller.teacher_head, case.teacher_head),
    ):
        ours.weight, ours.bias = (
            nn.Parameter(theirs.weight.data[rest]),
            nn.Parameter(theirs.bias.data[rest]),
        )
    smaller.target = case.target.where(case.target < 9, case.target - 4)
    expected, _ = smaller.whole()
    expected.backward()
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        case.student_head.weight.grad[rest],
        smaller.student_head.weight.grad,
        rtol=1e-10,
        atol=1e-12,
    )
    assert case.student_head.weight.grad[5:9].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_batch_that_is_ignored_altogether_costs_nothing(dtype):
    case = Case(2, dtype, ignored=range(ROWS))
    loss = case.loss(chunk=5)
    loss.total.backward()
    assert loss.total == 0
    assert all(value == 0 for value in loss.parts.values())
    assert all(one.grad.count_nonzero() == 0 for one in case.learned())


def test_autocast_decides_the_dtype_of_the_products():
    case = Case(1, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = case.loss()
    gradients = torch.autograd.grad(loss.total, case.learned())
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    expected, _ = case.double().whole()
    assert 1e-6 < relative(loss.total, expected) < 2e-2  # see the bounds of bfloat16 above


def test_parts_are_named_by_depth_and_weights_halve():
    case = Case(2)
    loss = case.loss(weights=None, depths=(2, 5))
    case.weights = [0.5, 1.0]
    torch.testing.assert_close(loss.total, case.whole()[0], rtol=1e-10, atol=0)
    who = ("student", "stone 2", "stone 5")
    assert list(loss.parts) == [f"{kind} {one}" for kind in ("ce", "kd") for one in who]
    assert not any(value.requires_grad for value in loss.parts.values())


def test_gradients_are_given_away_once():
    total = Case().loss().total
    total.backward(retain_graph=True)
    with pytest.raises(UsageError, match="backward was called twice"):
        total.backward()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("target", lambda x: x[None], r"target has the shape \(1, 23\), not \(23,\)"),
        ("student_hidden", lambda x: x[1:], r"student_hidden .* \(22, 5\), not \(23, 5\)"),
        ("stone_hidden", lambda x: x[..., 1:], r"stone_hidden .* \(3, 23, 6\), not \(3, 23, 7\)"),
        ("teacher_hidden", lambda x: x[None], r"teacher_hidden has the shape \(1, 23, 7\)"),
        ("teacher_head", lambda x: nn.Linear(7, 300), r"teacher_head.weight .* \(300, 7\)"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused_by_name(name, change, message):
    case = Case()
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(UsageError, match=message):
        case.loss()


def test_wrong_numbers_of_weights_are_refused():
    with pytest.raises(UsageError, match="2 weights and 3 depths for 3 stones"):
        Case().loss(weights=[1.0, 1.0])


def test_the_low_precision_product_of_a_gpu_has_the_signature_we_call():
    left, right = (torch.empty(2, 2, dtype=torch.bfloat16, device="meta") for _ in range(2))
    assert torch.mm(left.T, right, out_dtype=torch.float32).dtype == torch.float32
