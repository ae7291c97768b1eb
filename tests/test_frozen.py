"""The frozen teacher, folded and thinned out: the same function at less cost."""

import copy
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from kdsurgeon.losses import block_kd_loss
from kdsurgeon.stones import partition, rectifier, synthesize
from kdsurgeon.stones.frozen import FrozenConvolution, FrozenScale
from kdsurgeon.stones.rectifier import rectify
from tests import bootstrap, models
from tests.test_stones import PAIRS, planned


class Functional(nn.Module):
    """Normalises by a function, as timm does where activation and norm are one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.2)
        self.gain = nn.Parameter(torch.rand(8) + 0.5)
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        x = functional.conv2d(x, self.weight, padding=1, stride=2)
        x = functional.batch_norm(x, self.mean, self.var, self.gain, None, self.training, 0.1, 1e-3)
        return self.head(x.relu_().mean((2, 3)))


class PreActivation(nn.Module):
    """Normalises before it convolves, and adds what was not normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=4, bias=False) for _ in range(3)
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = x + convolution(torch.relu(norm(x)))
        return self.head(x.mean((2, 3)))


def modules_called(stones, prefix: str) -> list[nn.Module]:
    graph = next(iter(stones._graphs.values()))
    names = [str(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    return [graph.get_submodule(name) for name in names if name.startswith(prefix)]


def step(plan, **options) -> list[Tensor]:
    """Logits and every gradient of a step in float64."""
    stones = synthesize(plan, **options)
    torch.manual_seed(3)  # of the student's dropout
    logits = stones(models.images(5, dtype=torch.float64))
    stones.zero_grad()
    block_kd_loss(logits, models.labels(5), cross_weight=1.0).total.backward()
    found = [value.grad for value in stones.parameters() if value.grad is not None]
    return [logits.student.detach(), logits.stones.detach(), logits.teacher, *found]


def assert_same_step(plan) -> None:
    plain = step(plan, fold=False, merge=False)
    for merge in (False, True):
        folded = step(plan, merge=merge)
        for one, other in zip(folded, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_folding_changes_a_step_by_rounding_only(teacher, student):
    assert_same_step(planned(teacher, student, dtype=torch.float64))


@pytest.mark.parametrize("teacher", [Functional, PreActivation])
def test_normalisation_by_a_function_or_before_the_convolution_is_folded_too(teacher):
    torch.manual_seed(0)
    own = models.settled(teacher()).double()
    student = models.make("chain").double()
    plan = partition(own, student, models.images(2, dtype=torch.float64))
    assert_same_step(plan)
    stones = synthesize(plan)
    clean = next(iter(stones._graphs.values())).teacher.graph_module
    assert functional.batch_norm not in [node.target for node in clean.graph.nodes]
    called = [str(node.target) for node in clean.graph.nodes if node.op == "call_module"]
    kinds = {type(clean.get_submodule(name)) for name in called}
    assert nn.BatchNorm2d not in kinds
    assert (FrozenConvolution if teacher is Functional else FrozenScale) in kinds


@pytest.mark.parametrize("name", ["chain", "residual", "dense", "inverted", "tokens", "streams"])
def test_no_normalisation_and_no_thick_convolution_is_left_of_the_teacher(name):
    stones = synthesize(planned(name, "residual"))
    kinds = [type(module) for module in modules_called(stones, "tail.")]
    assert nn.BatchNorm2d not in kinds and nn.Conv2d not in kinds and nn.ReLU not in kinds
    assert FrozenConvolution in kinds or name == "tokens"  # which convolves before every stone
    clean = next(iter(stones._graphs.values())).teacher.graph_module
    called = [str(node.target) for node in clean.graph.nodes if node.op == "call_module"]
    kinds = [type(clean.get_submodule(target)) for target in called]
    assert nn.BatchNorm2d not in kinds and FrozenConvolution in kinds
    assert nn.BatchNorm2d in [type(module) for module in modules_called(stones, "student.")]


def test_a_boundary_between_convolution_and_normalisation_is_kept():
    teacher = models.settled(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                      nn.Linear(8 * 14 * 14, 10))
    ).double()  # fmt: skip
    plan = partition(
        teacher, copy.deepcopy(teacher), models.images(2, dtype=torch.float64), pairs=[("0", "0")]
    )
    assert_same_step(plan)
    assert FrozenScale in [type(module) for module in modules_called(synthesize(plan), "tail.")]


def test_a_teacher_of_few_bits_is_not_folded():
    plan = planned("residual", "residual", dtype=torch.bfloat16)
    assert nn.BatchNorm2d in [type(module) for module in modules_called(synthesize(plan), "tail.")]


def test_the_teacher_keeps_its_weights_and_nothing_new_is_saved():
    plan = planned("residual", "residual")
    before = copy.deepcopy(plan.teacher.trace.model.state_dict())
    stones, plain = synthesize(plan), synthesize(plan, fold=False)
    block_kd_loss(stones(models.images(4)), models.labels(4)).total.backward()
    for name, value in plan.teacher.trace.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert list(stones.state_dict()) == list(plain.state_dict())


# the two operators ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    "geometry", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "groups": 2}]
)
def test_a_frozen_convolution_passes_the_gradient_of_its_input(axes, geometry):
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    torch.manual_seed(0)
    thick = make(4, 6, 3, **geometry).double().requires_grad_(False)
    given = {name: getattr(thick, name) for name in ("stride", "padding", "dilation", "groups")}
    thin = FrozenConvolution(thick.weight, thick.bias, **given)
    first = torch.randn(2, 4, *(7,) * axes, dtype=torch.float64, requires_grad=True)
    second = first.detach().clone().requires_grad_()
    direction = torch.randn_like(thick(first))
    (thick(first) * direction).sum().backward()
    (thin(second) * direction).sum().backward()
    assert torch.equal(thick(first), thin(second))
    torch.testing.assert_close(first.grad, second.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x,
        lambda x: x[:, :3, :5],  # gaps in memory
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(1, 3),
        lambda x: x[:0],
    ],
)
def test_a_rectifier_that_keeps_bits_is_a_relu(arrange):
    torch.manual_seed(0)
    value = arrange(torch.randn(2, 5, 7, 3).round(decimals=0))  # many values are exactly 0
    one, other = value.detach().requires_grad_(), value.detach().requires_grad_()
    direction = torch.randn(value.shape)
    assert torch.equal(rectify(one), other.relu())
    (rectify(one) * direction).sum().backward()
    (other.relu() * direction).sum().backward()
    assert torch.equal(one.grad, other.grad)


def saved_bytes(run: Callable[[], Tensor], constants: Iterable[Tensor]) -> int:
    """What ``run`` keeps for its backward pass beside ``constants``; each memory once."""
    known = {value.untyped_storage().data_ptr() for value in constants}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        memory = value.untyped_storage()
        if memory.data_ptr() not in known:
            kept[memory.data_ptr()] = memory.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        assert run().requires_grad
    return sum(kept.values())


def test_a_folded_tail_of_resnet34_keeps_a_tenth_of_what_torch_keeps():
    bootstrap.prepare()
    import timm

    teacher, student = (
        timm.create_model(name, num_classes=10) for name in ("resnet34", "resnet18")
    )
    plan = partition(teacher, student, torch.zeros(2, 3, 64, 64))
    assert plan.alignment.boundaries[0].teacher.name.startswith("layer1")
    kept = {}
    for fold in (True, False):
        stones = synthesize(plan, depths=(1,), fold=fold)
        graph = stones._graphs[True, (1,), False]
        value = torch.randn(2, 64, 16, 16, requires_grad=True)
        boundary = {"adapters.1.0": value, "student.": torch.zeros(()), "teacher": torch.zeros(())}
        weights = [*graph.parameters(), *graph.buffers(), value]
        kept[fold] = saved_bytes(lambda g=graph, b=boundary: run_tail(g, b), weights)
    assert kept[False] >= 10 * kept[True] > 0, kept


def run_tail(graph: fx.GraphModule, given: Mapping[str, Tensor]) -> Tensor:
    """Run what is called ``tail.`` in a training graph on ``given`` for what stands before."""
    tail = Tail(graph)
    tail.given = given
    return tail.run(torch.zeros(2, 3, 64, 64))


class Tail(fx.Interpreter):
    """Runs the teacher's blocks only: what the student and the adapters give is given."""

    given: Mapping[str, Tensor]

    def run_node(self, n: fx.Node):
        if n.op == "output":
            return self.env[n.args[0][1]]
        name = n.meta.get("qualname", str(n.target))
        if n.op == "call_module" and n.target in self.given:
            return self.given[n.target]
        if str(name).startswith("student."):
            return self.given["student."]
        return super().run_node(n)


# the rectifier's kernels ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [1, 7, 8, 8191, 8193, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_for_cuda_packs_what_numpy_packs(count, dtype):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    values[::5] = 0.0
    wanted, bits = torch.ops.kdsurgeon.rectify(values)
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        import triton

        importlib.reload(triton.language.standard)
        importlib.reload(triton.language)
        rectifier.kernels.cache_clear()
        result, kept = rectifier.pack(values)
        gradient = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)
        passed = rectifier.unpack(gradient, kept)
        rectifier.kernels.cache_clear()
    assert torch.equal(result, wanted) and torch.equal(kept, bits)
    assert torch.equal(passed, gradient * (values > 0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_rectifier_says_beforehand_what_shapes_it_gives(dtype, layout):
    """For torch.compile, which plans without running it."""
    value = torch.randn(3, 5, 4, 4).to(dtype).contiguous(memory_format=layout)
    for x in (value, value[:, ::2]):  # the second has gaps
        for check in ("test_schema", "test_faketensor"):
            torch.library.opcheck(torch.ops.kdsurgeon.rectify, (x,), test_utils=check)
            _, kept = torch.ops.kdsurgeon.rectify(x)
            given = (torch.ones_like(x), kept, list(torch.relu(x).stride()))
            torch.library.opcheck(torch.ops.kdsurgeon.where_kept, given, test_utils=check)
