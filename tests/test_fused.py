"""The fused loss against float64, kernel for kernel: on a GPU, or in Triton's interpreter."""

import importlib
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdsurgeon.errors import UsageError
from kdsurgeon.losses import Logits, block_kd_loss, fused
from kdsurgeon.losses.fused import WHOLE_ROW, can_fuse, fused_ce_kl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
SHORT, LONG = (3, 7, 10), (2, 2, WHOLE_ROW + 7)  # (sets, batch, classes): one for each kernel

# numpy speaks up where a GPU computes in silence: -inf - -inf and log 0 of lanes that are masked.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def triton():
    """Kernels that run here; torch may have imported Triton before, made for a GPU."""
    with mock.patch.dict(os.environ, INTERPRET):
        import triton

        if INTERPRET:
            importlib.reload(triton.language.standard)
            importlib.reload(triton.language)
        yield triton


class Case:
    """Seeded logits, and the arguments of the loss."""

    def __init__(
        self,
        shape,
        dtype=torch.float32,
        *,
        temperature=4.0,
        smoothing=0.0,
        scale=3.0,
        ignored=(),
        soft=False,
    ):
        sets, batch, classes = shape
        generator = torch.Generator().manual_seed(sum(shape))
        everyone = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        teacher = scale * torch.randn((batch, classes), generator=generator, dtype=torch.float64)
        self.everyone, self.teacher = everyone.to(DEVICE, dtype), teacher.to(DEVICE, dtype)
        target = torch.randint(0, classes, (batch,), generator=generator)
        target[list(ignored)] = -100
        if soft:
            target = torch.rand((batch, classes), generator=generator).softmax(-1)
        self.target = target.to(DEVICE)
        self.temperature, self.smoothing = temperature, smoothing
        self.ce_factors = [0.7 * 0.5**one for one in range(sets)]
        self.kd_factors = [1.3 * 0.5**one for one in range(sets)]

    def fused(self, everyone=None, **options):
        everyone = self.everyone if everyone is None else everyone
        return fused_ce_kl(
            everyone,
            self.teacher,
            self.target,
            self.temperature,
            ce_factors=self.ce_factors,
            kd_factors=self.kd_factors,
            label_smoothing=self.smoothing,
            **options,
        )

    def fused_with_gradient(self, incoming=1.0):
        """total, (ce, kd) as (2, sets), gradient"""
        everyone = self.everyone.clone().requires_grad_()
        loss = self.fused(everyone)
        (loss.total * incoming).backward()
        return loss.total.detach(), torch.stack([loss.ce, loss.kd]), everyone.grad

    def expected(self):
        """The same from the definitions in float64, probabilities and all, by autograd."""
        everyone = self.everyone.double().requires_grad_()
        wanted = torch.softmax(self.teacher.double() / self.temperature, -1)
        classes = everyone.shape[-1]
        if self.target.is_floating_point():
            kept, truth = torch.ones_like(wanted[:, 0]), self.target.double()
        else:
            kept = (self.target != -100).double()
            label = self.target.clamp(min=0)[:, None]
            truth = torch.zeros_like(wanted).scatter(-1, label, 1.0)
        truth = (1 - self.smoothing) * truth + self.smoothing / classes
        means = []
        for logits in everyone:
            ce = -(truth * torch.log_softmax(logits, -1)).sum(-1)
            given = torch.log_softmax(logits / self.temperature, -1)
            kd = self.temperature**2 * (torch.xlogy(wanted, wanted) - wanted * given).sum(-1)
            means.append(torch.stack([ce, kd]).mul(kept).sum(-1) / kept.sum().clamp(min=1))
        means = torch.stack(means, dim=1)
        total = (means * means.new_tensor([self.ce_factors, self.kd_factors])).sum()
        total.backward()
        return total.detach(), means.detach(), everyone.grad

    def bounds(self, gradient):
        """What rounding can do to each mean (2, 1) and to each number of the gradient.

        Let u = 2⁻²⁴ be the rounding of float32, R the largest distance of two logits of a row and
        n the roundings that a sum of C terms goes through: log₂ C in a tree, and the square root
        of the C / 512 that one lane adds up, as a random walk.
        CE: the shift by the largest logit rounds by R·u, and that is also the relative error of
        an exponential (2·u more for itself), so that of their sum is (R + n + 2)·u, and so is the
        absolute error of its logarithm. With the logit of the class, again R·u: (2R + n + 4)·u.
        KL: two such sums at R/τ, and Σ trust · (t - s)/τ with 4 roundings of at most 2R/τ in
        every term and n in the sum (n·R/τ·u). All times τ²: τ·(12 + n)·R·u + τ²·(2n + 8)·u.
        Gradient: a probability is an exponential by a sum, relative (2R + n + 6)·u; hot and cold
        and trust together weigh a + 2bτ over the rows kept. Storing it rounds once more; the
        interpreter cuts bfloat16 off instead of rounding it, so a whole unit is allowed. float16
        is stored twice (as that of one row, and divided), by at most 2⁻²⁴ each at its lower end.
        """
        u, temperature = 2.0**-24, self.temperature
        finite = torch.cat([self.everyone, self.teacher[None]]).double()
        finite = finite.masked_fill(finite.isinf(), 0.0)
        spread = (finite.amax(-1) - finite.amin(-1)).max().item()
        classes, batch = finite.shape[-1], finite.shape[1]
        n = torch.tensor(float(classes)).log2().item() + (classes / 512) ** 0.5
        ce = (2 * spread + n + 4) * u
        kd = (temperature * (12 + n) * spread + temperature**2 * (2 * n + 8)) * u
        soft = self.target.is_floating_point()
        kept = batch if soft else max(1, int((self.target != -100).sum()))
        factors = torch.tensor([self.ce_factors, self.kd_factors], dtype=torch.float64)
        weight = (factors[0] + 2 * temperature * factors[1]).max().item() / kept
        unit = torch.finfo(self.everyone.dtype).eps
        twice, smallest = (2, 2.0**-23) if self.everyone.dtype == torch.float16 else (1, 0.0)
        slope = twice * unit * gradient.abs() + (2 * spread + n + 6) * u * weight + smallest
        means = torch.tensor([[ce], [kd]], dtype=torch.float64, device=DEVICE)
        return means, slope, (factors.to(DEVICE) * means).sum()

    def check(self):
        total, means, gradient = self.fused_with_gradient()
        wanted_total, wanted_means, wanted_gradient = self.expected()
        of_means, of_gradient, of_total = self.bounds(wanted_gradient)
        # Summing the rows and the sets: log₂ of their number, of positive terms.
        of_rows = 16 * 2.0**-24
        assert ((means - wanted_means).abs() <= of_means + of_rows * wanted_means).all()
        assert (total - wanted_total).abs() <= of_total + of_rows * wanted_total
        assert ((gradient.double() - wanted_gradient).abs() <= of_gradient).all()
        assert gradient.dtype == self.everyone.dtype
        return means, gradient


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_value_and_gradient_are_those_of_float64(shape, dtype, temperature, smoothing):
    Case(shape, dtype, temperature=temperature, smoothing=smoothing).check()


@pytest.mark.parametrize(
    ("sets", "batch", "classes", "dtype", "temperature"),
    [
        (1, 1, 2, torch.float32, 1.0),
        (2, 64, 2, torch.bfloat16, 4.0),
        (5, 1, 3, torch.float32, 2.0),
        (4, 64, 10, torch.float16, 4.0),
        (5, 64, 100, torch.float32, 4.0),
        (3, 7, 100, torch.bfloat16, 1.0),
        (2, 7, 1000, torch.float32, 1.0),
        (4, 1, 1024, torch.bfloat16, 2.0),
        (3, 7, 1025, torch.float32, 4.0),
        (5, 2, 4099, torch.float16, 2.0),
        (1, 1, WHOLE_ROW, torch.float32, 2.0),
        (1, 1, WHOLE_ROW + 1, torch.float32, 2.0),
        (5, 2, 32768, torch.bfloat16, 2.0),
        (3, 1, 131072, torch.float32, 2.0),
        (1, 2, 131072, torch.float16, 1.0),
        (1, 1, 262144, torch.bfloat16, 4.0),
    ],
)
def test_every_shape_agrees_with_float64(sets, batch, classes, dtype, temperature):
    Case((sets, batch, classes), dtype, temperature=temperature).check()


def test_a_thousandth_of_an_error_would_be_noticed():
    case = Case(SHORT)
    total, means, gradient = case.expected()
    of_means, of_gradient, of_total = case.bounds(gradient)
    assert (of_means < 1e-4 * means).all()
    assert of_total < 1e-4 * total
    assert of_gradient.max() < 1e-3 * gradient.abs().max()


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_it_is_the_loss_of_the_formulas(shape):
    case = Case(shape)
    logits = Logits(case.everyone[0], case.everyone[1:], case.teacher, tuple(range(1, shape[0])))
    case.ce_factors = [1.0, *(0.5**one for one in range(shape[0] - 2, -1, -1))]
    case.kd_factors = [3.0 * factor for factor in case.ce_factors]
    expected = block_kd_loss(logits, case.target, kd_weight=3.0)
    loss = case.fused()
    torch.testing.assert_close(loss.total, expected.total, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.ce[0], expected.parts["ce student"], rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.kd[-1], expected.parts[f"kd stone {shape[0] - 1}"])


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_the_gradient_is_the_slope_of_the_value(shape):
    case = Case(shape, temperature=2.0)
    _, _, gradient = case.fused_with_gradient()
    direction = gradient / gradient.norm()
    step = 1e-2
    rise = case.fused(case.everyone + step * direction).total
    fall = case.fused(case.everyone - step * direction).total
    slope = (rise.double() - fall.double()).item() / (2 * step)
    # A total near 20 is known to 20 · 2⁻²³ twice over the step of 0.02, which is 5e-4; the third
    # derivative adds step² / 6 of something like the slope.
    assert slope == pytest.approx(gradient.norm().item(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_soft_targets_are_probabilities(shape):
    Case(shape, soft=True).check()
    Case(shape, soft=True, smoothing=0.1, temperature=1.0).check()


@pytest.mark.parametrize("shape", [(3, 7, 10), (2, 5, WHOLE_ROW + 7)])
def test_ignored_rows_are_left_out_of_both_means_and_get_no_gradient(shape):
    case = Case(shape, ignored=(1, 4))
    case.everyone[0, 1] = torch.nan  # whatever stands there
    case.teacher[4] = torch.inf
    loss, means, gradient = case.fused_with_gradient()
    assert gradient[:, [1, 4]].count_nonzero() == 0
    case.everyone[0, 1], case.teacher[4] = 0.0, 0.0
    again, same_means, same_gradient = case.fused_with_gradient()
    assert torch.equal(loss, again)
    assert torch.equal(means, same_means)
    assert torch.equal(gradient, same_gradient)
    case.check()


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_a_batch_that_is_ignored_altogether_costs_nothing(shape):
    total, means, gradient = Case(shape, ignored=range(shape[1])).fused_with_gradient()
    assert total == 0
    assert means.count_nonzero() == 0
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_without_ignored_rows_they_need_not_be_counted(shape):
    case = Case(shape)
    for one, other in zip(case.fused(ignore_index=None), case.fused(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_classes_masked_in_teacher_and_students_are_as_if_they_were_not_there(shape):
    case = Case(shape)
    case.target[:] = shape[-1] - 1
    masked = slice(0, 4 if shape is SHORT else 4100)  # more than the first tile
    case.everyone[..., masked] = case.teacher[..., masked] = -torch.inf
    _, means, gradient = case.fused_with_gradient()
    assert gradient[..., masked].count_nonzero() == 0
    rest = Case(shape)
    rest.everyone = case.everyone[..., masked.stop :]
    rest.teacher = case.teacher[..., masked.stop :]
    rest.target = case.target - masked.stop
    _, wanted_means, wanted_gradient = rest.expected()
    of_means, of_gradient, _ = rest.bounds(wanted_gradient)
    assert ((means - wanted_means).abs() <= of_means + 2.0**-20 * wanted_means).all()
    assert ((gradient[..., masked.stop :] - wanted_gradient).abs() <= of_gradient).all()


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_classes_masked_in_the_teacher_alone_are_trusted_with_nothing(shape):
    case = Case(shape)
    case.teacher[..., ::3] = -torch.inf
    case.check()


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_a_class_the_teacher_wants_and_the_student_cannot_give_is_infinitely_far(shape):
    case = Case(shape)
    case.everyone[1, 0, 5] = -torch.inf
    loss = case.fused()
    assert loss.kd.isinf().tolist() == [one == 1 for one in range(shape[0])]
    assert loss.ce.isfinite().all()


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_nan_logits_and_wrong_labels_show_in_the_loss(shape):
    case = Case(shape)
    case.everyone[1, 0, 5] = torch.nan
    loss, _, gradient = case.fused_with_gradient()
    assert loss.isnan()
    assert gradient[1, 0].isnan().all()
    case = Case(shape)
    case.target[0] = shape[-1]
    assert case.fused().ce.isnan().all()
    case.target[0] = -7
    assert case.fused().ce.isnan().all()


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_large_logits_neither_overflow_nor_lose_the_loss(shape):
    means, _ = Case(shape, scale=1e4).check()
    assert means.isfinite().all()


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_an_offset_common_to_a_row_costs_no_accuracy(shape):
    case = Case(shape)
    case.everyone, case.teacher = case.everyone + 1e4, case.teacher - 1e4
    case.check()  # the bounds know the spread of a row, not its offset


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_a_student_that_is_the_teacher_is_at_distance_zero(shape):
    case = Case(shape)
    case.everyone = case.teacher.expand(shape).contiguous()
    case.ce_factors = [0.0] * shape[0]
    _, means, gradient = case.fused_with_gradient()
    if shape is SHORT:  # both softmaxes go through the very same operations
        assert means[1].count_nonzero() == 0
        assert gradient.count_nonzero() == 0
    _, _, nothing = case.expected()
    of_means, of_gradient, _ = case.bounds(nothing)
    assert (means[1].abs() <= of_means[1]).all()
    assert (gradient.abs() <= of_gradient).all()


@pytest.mark.parametrize("shape", [SHORT, LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_give_the_same_bits(shape, dtype):
    case = Case(shape, dtype)
    expected = case.fused_with_gradient()
    sets, batch, classes = shape
    wide = torch.zeros((batch, sets, classes + 3), dtype=dtype, device=DEVICE)
    sliced = wide.transpose(0, 1)[..., 1:-2]
    across = torch.zeros((classes, sets, batch), dtype=dtype, device=DEVICE).permute(1, 2, 0)
    for logits in (sliced, across):
        logits.copy_(case.everyone)
        assert not logits.is_contiguous()
        leaf = logits.detach().requires_grad_()
        loss = case.fused(leaf)
        loss.total.backward()
        assert torch.equal(loss.total, expected[0])
        assert torch.equal(leaf.grad, expected[2])
    case.teacher = case.teacher.T.contiguous().T
    assert torch.equal(case.fused().total, expected[0])


def test_offsets_beyond_two_to_the_31_reach_their_logits():
    case = Case((3, 2, 10), torch.float16)
    room = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)  # touched in three places
    far = room.as_strided((3, 2, 10), (2**30, 16, 1))
    far.copy_(case.everyone)
    assert torch.equal(case.fused(far).kd, case.fused().kd)


def test_sets_side_by_side_or_one_after_the_other_give_the_same_bits(monkeypatch):
    case = Case(SHORT)
    expected = case.fused_with_gradient()
    monkeypatch.setattr(fused, "MANY_PROGRAMS", 1)
    for one, other in zip(case.fused_with_gradient(), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [SHORT, LONG, (4, 64, 100)])
def test_a_second_run_gives_the_same_bits(shape):
    case = Case(shape, torch.bfloat16)
    for one, other in zip(case.fused_with_gradient(), case.fused_with_gradient(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [SHORT, LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_place_the_gradient_takes_the_place_of_the_logits(shape, dtype):
    case = Case(shape, dtype)
    _, _, expected = case.fused_with_gradient(incoming=0.5)
    logits = case.everyone.clone().requires_grad_()
    everyone = logits * 1
    (case.fused(everyone, in_place=True).total * 0.5).backward()
    assert torch.equal(logits.grad, expected)
    assert torch.equal(everyone, expected)


def test_in_place_between_other_columns_touches_nothing_else():
    case = Case(SHORT)
    _, _, expected = case.fused_with_gradient(incoming=0.5)
    wide = torch.full((3, 7, 16), 9.0, device=DEVICE)
    wide[..., 2:12] = case.everyone
    everyone = wide.requires_grad_()[..., 2:12]
    (case.fused(everyone, in_place=True).total * 0.5).backward()
    assert torch.equal(everyone, expected)
    assert (wide[..., :2] == 9.0).all()
    assert (wide[..., 12:] == 9.0).all()


def test_whoever_needs_logits_that_were_overwritten_is_told():
    case = Case(SHORT)
    everyone = case.everyone.clone().requires_grad_() * 1
    other = everyone.square().sum()
    total = case.fused(everyone, in_place=True).total
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (total + other).backward()


def test_logits_that_share_their_place_are_not_overwritten():
    case = Case(SHORT)
    for everyone in (
        case.everyone[:1].expand(3, -1, -1),
        case.everyone.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        with pytest.raises(UsageError, match="cannot be written over these logits"):
            case.fused(everyone.requires_grad_(), in_place=True)


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_the_incoming_gradient_is_multiplied_in(shape):
    case = Case(shape)
    _, _, gradient = case.fused_with_gradient()
    _, _, halved = case.fused_with_gradient(incoming=-0.5)
    assert torch.equal(halved, -0.5 * gradient)


@pytest.mark.parametrize("shape", [(1, 64, 1000), (1, 2, WHOLE_ROW + 1)])
def test_a_loss_scale_saves_float16_gradients_that_a_mean_would_round_to_zero(shape):
    case = Case(shape, torch.float16, scale=1.0)
    _, _, gradient = case.fused_with_gradient(incoming=65536.0)
    _, _, expected = case.expected()
    expected *= 65536.0
    vanish = expected.abs().float() / 65536.0 < 2.0**-25  # to nearest float16: zero
    assert vanish.count_nonzero() > 0
    # Two roundings of 2⁻¹⁰, and what a one-row gradient loses at its lower end (2⁻²⁴), scaled.
    bound = 2.0**-9 * expected.abs() + 65536.0 / shape[1] * 2.0**-23
    assert ((gradient.double() - expected).abs() <= bound).all()


def test_a_gradient_is_given_away_once():
    case = Case(SHORT)
    total = case.fused(case.everyone.clone().requires_grad_()).total
    total.backward(retain_graph=True)
    with pytest.raises(UsageError, match="backward was called twice"):
        total.backward()


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_without_need_of_a_gradient_none_is_made(shape):
    case = Case(shape)
    loss = case.fused()
    assert not loss.total.requires_grad
    assert torch.equal(loss.total, case.fused_with_gradient()[0])
    everyone = case.everyone.clone()
    case.fused(everyone, in_place=True)
    with torch.no_grad():
        case.fused(everyone.requires_grad_(), in_place=True)
    assert torch.equal(everyone, case.everyone)


def test_the_parts_carry_no_gradient():
    case = Case(SHORT)
    loss = case.fused(case.everyone.clone().requires_grad_())
    assert [one.requires_grad for one in loss] == [True, False, False]


class Launches:
    """Stands in for the kernels: counts what would be launched and launches nothing."""

    def __init__(self):
        self.names = []

    def __call__(self):
        return tuple(self.counted(name) for name in ("whole rows", "tiled rows", "scale"))

    def counted(self, name):
        launches = self

        class Counted:
            def __getitem__(self, grid):
                launches.names.append(name)
                return lambda *arguments, **options: None

        return Counted()


@pytest.mark.parametrize(("classes", "kernel"), [(10, "whole rows"), (WHOLE_ROW + 1, "tiled rows")])
def test_one_launch_serves_any_number_of_stones(monkeypatch, classes, kernel):
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += not func.is_view
            return func(*args, **(kwargs or {}))

    operations = []
    for sets in (1, 2, 5, 12):
        case = Case((sets, 2, classes))
        everyone = case.everyone.clone().requires_grad_()
        case.fused()  # the factors are on the device now
        launches = Launches()
        monkeypatch.setattr(fused, "kernels", launches)
        Count.calls = 0
        with Count():
            case.fused(everyone).total.backward()
        monkeypatch.undo()
        assert launches.names == [kernel, "scale"]
        operations.append(Count.calls)
    # Forward: compare and sum for the rows kept, room for values and gradient, sum, weigh, sum.
    # Backward: the 1 that it starts from.
    assert operations == [8] * 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"everyone": lambda x: x.double()}, "float64 logits have no fused kernel"),
        ({"teacher": lambda x: x.double()}, "float64 logits have no fused kernel"),
        ({"everyone": lambda x: x[..., :-1]}, r"logits \(3, 7, 9\) and \(7, 10\) do not stack"),
        ({"everyone": lambda x: x[0]}, r"logits \(7, 10\) and \(7, 10\) do not stack"),
        ({"everyone": lambda x: x[:0]}, "the batch is empty"),
        ({"target": lambda x: x[:3]}, r"a target of shape \(3,\) has no fused kernel"),
        ({"target": lambda x: x.float()}, r"a target of shape \(7,\) has no fused kernel"),
    ],
)
def test_what_cannot_be_fused_is_refused_with_the_reason(change, reason):
    case = Case(SHORT)
    for name, altered in change.items():
        setattr(case, name, altered(getattr(case, name)))
    with pytest.raises(UsageError, match=reason):
        case.fused()


def test_the_caller_learns_why_to_fall_back(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        everyone, teacher = torch.empty(2, 3, 4, device="cuda"), torch.empty(3, 4, device="cuda")
        target = torch.empty(3, dtype=torch.long, device="cuda")
        assert can_fuse(everyone, teacher, target) is None
        assert can_fuse(everyone.double(), teacher, target) == (
            "float64 logits have no fused kernel"
        )
        assert can_fuse(everyone, teacher, target, torch.add) == (
            "the distance add has no fused kernel"
        )
        assert can_fuse(everyone, teacher, target.cpu()) == (
            "logits, teacher and target are on different devices"
        )
        monkeypatch.setattr(fused, "find_spec", lambda name: None)
        assert can_fuse(everyone, teacher, target) == "triton is not installed"
    case = Case(SHORT)
    with pytest.raises(UsageError, match=r"triton is not installed\.\n *fix: +use block_kd_loss"):
        case.fused()


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, with Triton compiling for a GPU."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=inherited | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_on_a_cpu_triton_is_never_imported():
    code = """
import sys, torch
from kdsurgeon.errors import UsageError
from kdsurgeon.losses import fused, linear
logits = torch.zeros(1, 2, 3), torch.zeros(2, 3), torch.tensor([0, 1])
print(fused.can_fuse(*logits))
try:
    fused.fused_ce_kl(*logits, 4.0, ce_factors=[1.0], kd_factors=[1.0])
except UsageError as error:
    print(error.what)
head = torch.nn.Linear(3, 3)
linear.linear_block_kd_loss(logits[1], head, logits[0], logits[1], head, logits[2])
print("triton" in sys.modules)
"""
    assert run(code).splitlines() == [
        "the logits are on the cpu; the fused loss needs a CUDA device",
        "The fused loss cannot take these: the logits are on the cpu.",
        "False",
    ]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kdsurgeon.losses import fused

POINTERS = {"target": "*i64", "divisor": "*i64", "factors": "*fp32", "values": "*fp32",
            "incoming": "*fp32", "everyone": "*bf16", "teacher": "*bf16", "gradient": "*bf16"}
FLOATS = {"temperature", "smoothing"}

def build(kernel, shape, warps, long):
    kinds = {}
    for name in kernel.arg_names:
        whole = "i64" if long and name.endswith(("_set", "_row", "count")) else "i32"
        kinds[name] = POINTERS.get(name, "fp32" if name in FLOATS else whole)
        if name in shape:
            kinds[name] = "constexpr"
    if shape.get("SOFT"):
        kinds["target"] = "*fp32"
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if kinds[name].startswith("*") or name.endswith(("_set", "_row", "classes"))
    }
    constants = {(kernel.arg_names.index(name),): value for name, value in shape.items()}
    source = ASTSource(kernel, kinds, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, len(made.asm["cubin"]) > 0)

whole, tiled, scale = fused.kernels()
for classes in (100, 8192, 100_000):
    kernel, grid, shape = fused._launch_of(4, 64, classes)
    warps = shape.pop("num_warps")
    plain = {"POWER": 4, "SOFT": False, "SMOOTH": False, "GRADIENT": True}
    build(kernel, shape | plain, warps, False)
    build(kernel, shape | {"POWER": 0, "SOFT": True, "SMOOTH": True, "GRADIENT": True}, warps, True)
build(scale, {"BLOCK": 4096, "DIVIDE": True}, 8, True)
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    # The interpreter forgives what the compiler does not: a variable that changes its type in a
    # loop, a global that is no constant.
    built = run(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert built == ["_whole_rows True"] * 4 + ["_tiled_rows True"] * 2 + ["_scale True"]


@pytest.mark.parametrize("options", [{}, {"cross_weight": 0.7}, {"ignore_index": 3}, {"soft": True},
                                     {"ce_weight": 0.0, "label_smoothing": 0.1}])  # fmt: skip
def test_the_objective_is_the_same_fused_and_stacked(options, monkeypatch):
    from kdsurgeon.losses import block_kd

    options = dict(options)
    case = Case((3, 9, 12), soft=options.pop("soft", False))
    reasons = [fused.can_fuse, lambda *_: None]
    found = []
    for reason in reasons:
        monkeypatch.setattr(block_kd, "can_fuse", reason if DEVICE == "cpu" else reasons[-1])
        everyone = case.everyone.clone().requires_grad_()
        logits = Logits(everyone[0], everyone[1:], case.teacher, depths=(1, 2))
        losses = block_kd_loss(logits, case.target, fused=len(found) > 0, **options)
        losses.total.backward()
        found.append((losses.total.detach(), losses.parts, everyone.grad))
    (total, parts, gradient), (other_total, other_parts, other_gradient) = found
    # sums of at most 12 classes and 9 rows, a handful of roundings of float32 each
    torch.testing.assert_close(total, other_total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-4, atol=1e-7)
    assert list(parts) == list(other_parts)
    for name, value in parts.items():
        torch.testing.assert_close(value, other_parts[name], rtol=1e-5, atol=1e-6)
