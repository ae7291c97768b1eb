import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from kdsurgeon.errors import TraceError
from kdsurgeon.tracing import BATCH, logits_of, trace
from kdsurgeon.tracing.values import call_leaf, tensors_in
from tests import models


@pytest.mark.parametrize("name", models.ALL)
def test_a_trace_computes_what_the_model_computes_at_another_batch_size(name):
    model = models.make(name).eval()
    captured = trace(model, models.images(2))
    assert torch.equal(captured.graph_module(models.images(5)), model(models.images(5)))


@pytest.mark.parametrize("name", models.ALL)
def test_a_training_trace_takes_the_same_step_as_the_model(name):
    kwargs = {"dropout": 0.3} if name == "residual" else {}
    model = models.make(name, **kwargs).train()
    twin = copy.deepcopy(model)
    graph = trace(twin, models.images(2), training=True).graph_module
    results = []
    for network in (model, graph):
        torch.manual_seed(3)
        logits = network(models.images(6))
        logits.square().mean().backward()
        results.append(logits)
    assert torch.equal(*results)
    for (path, own), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad), path
    for (path, own), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(own, other), path


def test_tracing_leaves_the_model_and_the_random_state_as_they_were():
    model = models.make("residual", dropout=0.5).train()
    model.stem.eval()
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    for training in (True, False):
        trace(model, models.images(2), training=training)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_node_knows_its_shape_and_carries_its_module_path():
    captured = trace(models.make("residual"), models.images(2))
    assert captured.nodes["layers.1.relu_1"].meta["val"].shape == (BATCH, 16, 8, 8)
    assert captured.nodes["layers.1.add"].meta["val"].dtype == torch.float32


class Branches(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class TurnsIntoNumbers(nn.Module):
    def forward(self, x):
        return x.flatten(1) * x.max().item()


class LoopsOverSamples(nn.Module):
    def forward(self, x):
        return torch.stack([sample.flatten() for sample in x])


class ReturnsWords(nn.Module):
    def forward(self, x):
        return {"words": "none"}


class ReturnsOneNumber(nn.Module):
    def forward(self, x):
        return x.mean()


class WritesThroughAView(nn.Module):
    """Nobody reads the writer's result; all read the memory, under other names."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.conv(x)
        rows = x[:, :, :4]
        x.flatten(1).mul_(0.5)
        mask = x.new_zeros(x.shape[2:])
        mask[2:4, 1:] = 1
        mask[:2].fill_(2)
        return self.head((x * mask).mean((2, 3)) + rows.sum((2, 3)))


class AssignsItems(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.conv(x)
        x[:, 0] = 1.0
        x[:, :, 1:3] *= 2
        return self.head(x.relu().mean((2, 3)))


class SizesAsNumbers(nn.Module):
    """The batch as a plain Python number, as a factor, and in a factory."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        batch, channels = int(x.shape[0]), len(x[0])
        x = x.reshape(batch * 4, channels, -1) + torch.zeros(batch * 4, 1, 1)
        ones = torch.ones(batch, channels * 16, dtype=x.dtype)
        return self.head(x.reshape(batch, 4, channels, 64).mean(1)[..., :16].flatten(1) * ones)


class KeepsACache(nn.Module):
    """A table that is computed from a weight once, and kept."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(768))
        self.cache = {}
        self.head = nn.Linear(768, 10)

    def forward(self, x):
        if not self.training and "table" not in self.cache:
            self.cache["table"] = self.table.tanh()
        table = self.table.tanh() if self.training else self.cache["table"]
        self.calls = x.shape
        return self.head(x.flatten(1) * table)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, image, mask=None, scale=1.0):
        x = self.conv(image)
        if mask is not None:
            x = x * mask[:, None, None, None]
        return {"features": x, "logits": self.head(x.mean((2, 3)) * scale)}


class StopsGradients(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(768, 10), nn.Linear(768, 10)

    def forward(self, x):
        x = x.flatten(1)
        with torch.no_grad():
            gate = self.first(x).sigmoid()
        return self.second(x) * gate


class Double(torch.autograd.Function):
    """Twice the value, and a gradient that is not its derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 5 * gradient


class HandWrittenGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(768, 10)

    def forward(self, x):
        return Double.apply(self.head(x.flatten(1)))


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class CallsScript(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(768, 10)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.function = torch.jit.script(swish)

    def forward(self, x):
        return self.function(self.head(x.flatten(1)))


class ReadsConstants(nn.Module):
    """Decides by the values of a table that no input touches."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.tensor([2, 3]))
        self.head = nn.Linear(768, 10)

    def forward(self, x):
        for value in self.table.tolist():
            x = x * value
        return self.head(x.flatten(1)) if self.table.sum() > 4 else x.flatten(1)


class UsesEveryOperator(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(768, 10)

    def forward(self, x):
        x = x.flatten(1)
        x = (2 - x) * 3 / (1 + x**2) + 2 ** -x.abs() - 1 / (2 + x.abs())
        x = x @ x.new_ones(768, 768) / 768 + (x // 1) % 2 + (~(x > 0) | (x < 1)).float()
        x = torch.where((x > 0) & (x < 1), x, -x)
        return self.head(+x + x.T.mT)


class AsksForItsDevice(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(768, 10)

    def forward(self, x):
        assert x.is_cpu and not x.is_meta and x.device.type == "cpu"
        shift = torch.arange(768, device=x.device) / 768
        return self.head(x.flatten(1) + shift.to("cpu"))


STRANGE = [
    WritesThroughAView, AssignsItems, SizesAsNumbers, KeepsACache, StopsGradients,
    HandWrittenGradient, CallsScript, ReadsConstants, UsesEveryOperator,
    AsksForItsDevice,
]  # fmt: skip


class CallsForeignCode(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy()).flatten(1)


class ListsModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(768, 10)]

    def forward(self, x):
        return self.layers[0](x.flatten(1))


class ClampsItsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(768, 10)

    def forward(self, x):
        with torch.no_grad():
            self.head.weight.clamp_(-1, 1)
        return self.head(x.flatten(1))


class PassesAGenerator(nn.Module):
    def forward(self, x):
        generator = torch.Generator().manual_seed(0)
        return x.flatten(1) + torch.randn(x[0].numel(), generator=generator, device="cpu")


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("class", nn.Linear(768, 10))

    def forward(self, x):
        return getattr(self, "class")(x.flatten(1))


_MEMORY = {}


class RemembersOutside(nn.Module):
    """A cache that the code keeps, not the model."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(768, 10)

    def forward(self, x):
        x = x.flatten(1)
        if x.shape[1] not in _MEMORY:
            _MEMORY[x.shape[1]] = torch.arange(x.shape[1]) / 768
        return self.head(x + _MEMORY[x.shape[1]])


def test_a_cache_of_the_code_holds_nothing_from_the_trace():
    _MEMORY.clear()
    model = RemembersOutside().eval()
    captured = trace(model, models.images(2))
    assert _MEMORY == {}
    assert torch.equal(model(models.images(3)), captured.graph_module(models.images(3)))


def test_a_compiled_model_is_traced_as_the_model_that_it_is():
    model = models.make("residual").eval()
    inner = nn.Sequential(
        torch.compile(models.make("chain"), backend="eager"), nn.Linear(10, 10)
    ).eval()
    model.compile(backend="eager")
    for network, plain in ((model, models.make("residual").eval()), (inner, None)):
        captured = trace(network, models.images(2))
        assert captured.rung == "fx"
        if plain is not None:
            result = captured.graph_module(models.images(3))
            assert torch.equal(result, plain(models.images(3)))


class WritesInPlace(nn.Module):
    """Every way of writing in place that keeps the tensor whole."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.act = nn.Hardswish(inplace=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.conv(x)
        shortcut = x
        x = self.act(x)
        x.add_(0.5)
        x *= 2
        x = nn.functional.relu(x, True)
        x = x + shortcut
        return self.head(x.relu_().mean((2, 3)))


def test_writes_in_place_are_kept_in_order():
    model = WritesInPlace().eval()
    captured = trace(model, models.images(2))
    assert torch.equal(captured.graph_module(models.images(3)), model(models.images(3)))


@pytest.mark.parametrize("net", STRANGE)
@pytest.mark.parametrize("training", [False, True])
def test_what_plain_tracing_gets_wrong_is_traced_right(net, training):
    """The same step as the model: logits, gradients and buffers, at another batch size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = net().train(training)
    graph = trace(model, models.images(2), training=training).graph_module
    results = []
    for run in (model, graph):
        logits = run(models.images(5))
        gradients = torch.autograd.grad(
            logits.square().sum(), list(model.parameters()), allow_unused=True
        )
        results.append([logits, *gradients])
    for own, other in zip(*results, strict=True):
        assert (own is None and other is None) or torch.equal(own, other)


class VectorizesItself(nn.Module):
    """Below torch functions: what only the program of torch.export shows."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(768)
        self.head = nn.Linear(768, 10)

    def forward(self, x):
        x = self.norm(x.flatten(1))
        scale = torch.vmap(lambda row: (row * 2).mean().exp())(x)
        return self.head(x * scale.unsqueeze(1))


class PicksExperts(nn.Module):
    """Reads a value inside of one small module only."""

    class Router(nn.Module):
        def forward(self, x):
            return x * int(x.detach().abs().sum() > 0)

    def __init__(self):
        super().__init__()
        self.router = self.Router()
        self.head = nn.Linear(768, 10)

    def forward(self, x):
        return self.head(self.router(x.flatten(1)))


@pytest.mark.parametrize("training", [False, True])
def test_what_torch_functions_do_not_show_is_traced_by_torch_export(training):
    model = VectorizesItself().train(training)
    twin = copy.deepcopy(model)
    captured = trace(model, models.images(2), training=training)
    assert captured.rung == "torch.export"
    assert "modules" in captured.lost[0]
    logits, wanted = captured.graph_module(models.images(5)), twin(models.images(5))
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-6)
    for (name, own), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(own, other, msg=name)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_recurrent_layers_have_the_shapes_that_running_them_gives(layer, first, both):
    model = layer(6, 5, num_layers=2, batch_first=first, bidirectional=both)
    sequence = torch.randn(3, 7, 6)
    real = model(sequence)
    made = call_leaf(model, (sequence,), {})[0]
    for wanted, got in zip(tensors_in(real), tensors_in(made), strict=True):
        assert wanted.shape == got.shape


def test_a_cache_is_neither_baked_in_nor_filled_nor_lost():
    model = KeepsACache().eval()
    kept = model(models.images(2)).detach()
    attributes = set(vars(model))
    captured = trace(model, models.images(2))
    assert "tanh" in captured.nodes
    assert set(model.cache) == {"table"}
    assert set(vars(model)) == attributes
    assert torch.equal(model(models.images(2)), kept)


def test_several_inputs_and_a_dict_of_outputs_are_captured():
    model = TwoInputs().eval()
    example = {"image": models.images(2), "mask": torch.ones(2)}
    captured = trace(model, example)
    assert captured.lost == ("outputs other than logits: features",)
    inputs = {"image": models.images(5), "mask": torch.arange(5.0)}
    assert torch.equal(captured.graph_module(*inputs.values()), logits_of(model, inputs))
    assert captured.takes == "3×16×16 (image), one number (mask)"


def test_what_forward_does_not_take_is_refused_by_name():
    with pytest.raises(TraceError, match="takes no input called masks") as caught:
        trace(TwoInputs(), {"image": models.images(2), "masks": torch.ones(2)}, name="net")
    assert "image, mask, scale" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message", "note"),
    [
        (Branches(), "branches on the values of a tensor", "test_tracing.py"),
        (TurnsIntoNumbers(), "turns into Python numbers the values", "test_tracing.py"),
        (LoopsOverSamples(), "loops over the samples of a batch", "test_tracing.py"),
        (ReturnsWords(), "does not return one tensor of logits", "a dict with the keys words"),
        (ReturnsOneNumber(), "does not return one tensor of logits", "() (one number)"),
        (CallsForeignCode(), "cannot be captured as a graph", "test_tracing.py"),
        (ListsModules(), "calls a Linear that it does not register", "test_tracing.py"),
        (ClampsItsWeight(), "overwrites its weight head.weight", "test_tracing.py"),
        (PassesAGenerator(), "passes a Generator to", "test_tracing.py"),
        (Keyword(), 'a module called "class"', "class"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "without a shape yet", "run the model"),
        (nn.ModuleDict({'a"]; print(1) #': nn.ReLU()}), "quotes or control characters", "print"),
        (nn.Conv2d(1, 4, 3), "does not accept an input of shape 3×16×16", "1 channels"),
    ],
)
def test_what_cannot_be_traced_is_named_with_its_line(model, message, note):
    with pytest.raises(TraceError, match=message) as caught:
        trace(model, models.images(2), name="net")
    assert note in str(caught.value)
    assert str(caught.value).startswith("net ")
    assert caught.value.exit_code == 2


def test_a_refusal_prints_nothing_of_its_own(capfd):
    with pytest.raises(TraceError):
        trace(Branches(), models.images(2))
    assert capfd.readouterr() == ("", "")


class ReturnsTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.auxiliary, self.head = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x):
        x = x.flatten(1)
        return self.auxiliary(x), self.head(x)


def test_a_guess_of_which_output_is_the_logits_and_weights_without_a_part_in_them_are_told():
    captured = trace(ReturnsTwo(), torch.zeros(2, 3, 4))
    assert captured.lost == (
        "outputs other than 0: 1",
        "a choice: 1 could be the logits as well as 0",
        "65 parameters, which the logits do not need, from head.weight on",
    )
