import copy

import pytest
import torch
from torch import nn

from kdsurgeon.errors import TraceError
from kdsurgeon.tracing import trace
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
    assert captured.nodes["layers.1.relu_1"].meta["val"].shape == (2, 16, 8, 8)
    assert captured.nodes["layers.1.add"].meta["val"].dtype == torch.float32


class Branches(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class ReturnsDict(nn.Module):
    def forward(self, x):
        return {"logits": x.flatten(1), "aux": x}


class ReturnsMap(nn.Module):
    def forward(self, x):
        return x * 2


class WritesThroughAView(nn.Module):
    def forward(self, x):
        x = x * 2
        x.flatten(1).mul_(0.5)
        return x.flatten(1)


class AssignsItems(nn.Module):
    def forward(self, x):
        x = x * 2
        x[:, 0] = 1.0
        return x.flatten(1)


class CallsForeignCode(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy()).flatten(1)


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
        x = nn.functional.relu(x, inplace=True)
        x.add_(0.5)
        x *= 2
        x = x + shortcut
        return self.head(x.relu_().mean((2, 3)))


def test_writes_in_place_are_kept_in_order():
    model = WritesInPlace().eval()
    captured = trace(model, models.images(2))
    assert torch.equal(captured.graph_module(models.images(3)), model(models.images(3)))


@pytest.mark.parametrize(
    ("model", "message", "note"),
    [
        (Branches(), "branches on the values of a tensor", "test_tracing.py"),
        (ReturnsDict(), "does not return one tensor of logits", "keys logits, aux"),
        (ReturnsMap(), "does not return one tensor of logits", "shape 2×3×16×16"),
        (WritesThroughAView(), "overwrites a tensor through a view", "mul_1 writes what mul holds"),
        (AssignsItems(), "does not support item assignment", "test_tracing.py"),
        (CallsForeignCode(), "cannot be captured as a graph", "test_tracing.py"),
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
