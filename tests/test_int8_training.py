"""Training with int8's rounding inside: the twin computes what the file computes, and learns."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from kdsurgeon import Recipe, distill, partition
from kdsurgeon.cli.int8 import Int8Flags, short_recipe
from kdsurgeon.errors import UsageError
from kdsurgeon.exporting import export
from kdsurgeon.exporting.rounding import Rounded, round_to
from kdsurgeon.recipe import LossRecipe, OptimRecipe, RunConfig
from tests.models import CLASSES, images, make, settled


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return settled(make("residual", seed=1)).eval()


def root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def test_the_twin_computes_what_the_int8_file_computes(student: nn.Module, tmp_path: Path) -> None:
    samples, calibration = images(32, seed=1), images(64, seed=2)
    done = export(student, tmp_path / "x.onnx", samples, calibration=calibration, int8_gate=False)
    assert done.int8 is not None
    run = onnxruntime.InferenceSession(done.int8.path, providers=["CPUExecutionProvider"])
    file = torch.from_numpy(run.run(None, {"input": samples.numpy()})[0])
    with torch.no_grad():
        plain, twin = student(samples), Rounded(student, calibration)(samples)
    lost = root_mean_square(file - plain)
    assert 0 < root_mean_square(twin - file) < 0.5 * lost
    assert 0.5 * lost < root_mean_square(twin - plain) < 2 * lost


def test_the_twin_trains_the_students_own_weights(student: nn.Module) -> None:
    own = copy.deepcopy(student)
    names = set(own.state_dict())
    twin = Rounded(own, images(8))
    assert {id(each) for each in twin.parameters()} == {id(each) for each in own.parameters()}
    twin(images(4)).square().sum().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in own.parameters())
    assert set(own.state_dict()) == names
    make("residual").load_state_dict(own.state_dict(), strict=True)


def test_statistics_and_mode_of_the_student_stay_as_they_were(student: nn.Module) -> None:
    own = copy.deepcopy(student).train()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    twin = Rounded(own, images(8))
    assert own.training
    twin.train()
    first, second = twin(images(4)), twin(images(4))
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


def test_ranges_follow_the_weights_only_when_they_are_calibrated_again() -> None:
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, CLASSES))
    twin = Rounded(own, images(8))
    scales = [each.scale.item() for each in twin.activations.values()]
    with torch.no_grad():
        own[0].weight *= 2
        own[0].bias *= 2
    twin(images(8))
    assert [each.scale.item() for each in twin.activations.values()] == scales
    twin.calibrate(images(8))
    found = [each.scale.item() for each in twin.activations.values()]
    assert found[0] == scales[0] and found[1] == pytest.approx(2 * scales[1], rel=1e-5)
    assert len(found) == 2  # the input, and what the ReLU leaves; the logits stay as they are


def test_rounding_is_that_of_the_onnx_operators() -> None:
    values = torch.linspace(-3, 3, 601)
    scale, zero = torch.tensor(0.02), torch.tensor(100.0)
    steps = np.clip(np.rint(values.numpy() / np.float32(0.02)) + 100, 0, 255)
    wanted = torch.from_numpy((steps - 100) * np.float32(0.02)).float()
    assert torch.allclose(round_to(values, scale, zero, 0, 255), wanted, atol=1e-6)


def test_the_gradient_passes_where_nothing_is_cut_off() -> None:
    values = torch.tensor([-0.3, 0.0, 0.9, 2.4, 2.6], requires_grad=True)
    round_to(values, torch.tensor(1.0), torch.tensor(0.0), 0, 2).sum().backward()
    assert values.grad is not None
    # -0.3 and 2.4 are nearest to the first and the last step; only 2.6 lies beyond
    assert values.grad.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_block_kd_goes_through_the_twin_as_through_the_student(student: nn.Module) -> None:
    teacher, own = settled(make("residual", seed=2, width=12)), copy.deepcopy(student)
    twin = Rounded(own, images(8))
    plan = partition(teacher, twin, images(2))
    assert len(plan.stones) == len(partition(teacher, own, images(2)).stones) > 0
    generator = torch.Generator().manual_seed(0)
    batches = [(images(8, seed=n), torch.randint(0, CLASSES, (8,), generator=generator))
               for n in range(4)]  # fmt: skip
    before = copy.deepcopy(own.state_dict())
    recipe = Recipe(epochs=1, optim=OptimRecipe(lr=1e-2))
    (epoch,) = distill(teacher, twin, batches, plan=plan, recipe=recipe)
    assert np.isfinite(epoch.losses["total"])
    moved = {
        name for name, value in own.state_dict().items() if not torch.equal(value, before[name])
    }
    assert {name for name, _ in own.named_parameters()} <= moved
    assert not any("running" in name for name in moved)


def test_a_student_without_layers_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3 * 16 * 16, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.weight

    with pytest.raises(UsageError, match="holds no layer whose weights could be rounded"):
        Rounded(Bare(), images(4))
    with pytest.raises(UsageError, match="needs calibration images"):
        Rounded(Bare(), images(0))


# The flags


def test_the_last_epochs_take_small_steps_from_fitted_adapters() -> None:
    settings = RunConfig(
        teacher="t.pt", student="s.pt", data_dir="digits", epochs=100, method="kd",
        optim=OptimRecipe(lr=0.2, warmup_epochs=5.0), loss=LossRecipe(temperature=2.0),
    )  # fmt: skip
    short = short_recipe(settings, 4)
    assert (short.method, short.epochs, short.optim.lr) == ("block-kd", 4, pytest.approx(0.01))
    assert short.loss.adapter_init == "least-squares" and short.loss.temperature == 2.0
    assert short.optim.warmup_epochs == 0.5


def test_flags_that_cannot_be_followed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--int8-mode fast is not known"):
        Int8Flags(mode="fast").check("student.pt")
    with pytest.raises(UsageError, match=r"(?s)student.pt is no run folder.*--int8-mode static"):
        Int8Flags(mode="qat").check("student.pt")
    (tmp_path / "config.yaml").touch()
    Int8Flags(mode="qat").check(str(tmp_path))
    wanted = {"mode": "static", "method": "entropy", "budget": 4, "max_drop": 0.005}
    assert Int8Flags(mode="qat", method="entropy", max_drop=0.5).options == wanted
