"""What export proves: random classifiers hold at every batch size; seeded faults are refused."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from kdsurgeon.errors import NumericsError, UsageError
from kdsurgeon.exporting import Form, Int8, export, parity
from kdsurgeon.exporting.converting import Conversion, Network, convert
from kdsurgeon.exporting.divergence import first_divergence
from kdsurgeon.exporting.samples import by_name
from tests.exports import faults, searching
from tests.exports.faults import FAULTS, Fault, Net, images, refusal, refused_int8

writing = import_module("kdsurgeon.exporting.onnx")


@pytest.mark.parametrize("seed", range(24))
def test_the_file_of_a_random_classifier_is_equal_at_six_batch_sizes(
    seed: int, tmp_path: Path
) -> None:
    found = searching.exported(seed, tmp_path)
    assert found.holds, found


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_refused_at_its_place_and_leaves_no_file(
    name: str, tmp_path: Path
) -> None:
    assert refusal(FAULTS[name], tmp_path)


def test_a_scale_of_zero_is_refused(tmp_path: Path) -> None:
    assert "scale that is zero" in (refused_int8(tmp_path) or "")


def test_without_a_fault_the_same_network_passes(tmp_path: Path) -> None:
    assert refusal(Fault(), tmp_path) is None
    for form in (Form(half=True), Form(batch=1), Form(preprocessing=faults.IMAGES)):
        assert refusal(Fault(form=form), tmp_path) is None


def test_enough_faults_are_tried() -> None:
    assert len(FAULTS) + 1 >= 20
    assert sum(fault.where is not None for fault in FAULTS.values()) >= 12


def test_a_gap_in_the_search_counts_as_a_failure() -> None:
    good = searching.Outcome(0, 1e-6, 0.5, searching.BATCH_SIZES)
    assert good.holds and good.relative == 1e-6
    assert not searching.Outcome(0, 2e-5, 1.5, searching.BATCH_SIZES).holds
    assert not searching.Outcome(0, 1e-6, 0.5, (1, 2)).holds
    assert not searching.Outcome(0, refusal="no").holds


# the first value that differs


def converted(net: nn.Module) -> tuple[Network, Conversion]:
    network = Network(net, ("input",))
    return network, convert(network, by_name(images(2)), 18)


def test_a_file_that_is_right_has_no_node_that_differs() -> None:
    network, found = converted(Net())
    said = first_divergence(network, found, found.proto, by_name(images(3)), 1e-5)
    assert said == (
        "no value differs when all are looked at: a fusion of ONNX Runtime, or the batch size"
    )


def test_the_first_of_several_wrong_nodes_is_named() -> None:
    network, found = converted(Net())
    wrong = copy.deepcopy(found.proto)
    faults.zeroed_bias(wrong)
    faults.transposed_weights(wrong)
    said = first_divergence(network, found, wrong, by_name(images(2)), 1e-5)
    assert said is not None and "node node_conv2d_2 (Conv) in module look" in said


def test_where_nothing_can_be_compared_nothing_is_said() -> None:
    network, found = converted(Net())
    samples = by_name(images(2))
    assert first_divergence(network, Conversion(found.proto), found.proto, samples, 1e-5) is None
    assert first_divergence(network, found, onnx.ModelProto(), samples, 1e-5) is None


# what else is proved


def test_a_gap_in_small_logits_is_not_excused_by_large_ones_elsewhere(tmp_path: Path) -> None:
    """At the edge this network's logits are thousands; a bound taken from there hides a fault."""

    class Steep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)[:, :4]
            return x + 1e3 * torch.relu(x.abs().amin(1, keepdim=True) - 2.9)

    done = export(Steep(), tmp_path / "x.onnx", images(2))
    wrong = onnx.load(done.path)
    wrong.graph.node[-1].output[0] = "nearly"
    shift = onnx.numpy_helper.from_array(torch.tensor(1e-4).numpy(), "shift")
    wrong.graph.initializer.append(shift)
    wrong.graph.node.append(onnx.helper.make_node("Add", ["nearly", "shift"], ["logits"]))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    with pytest.raises(NumericsError, match="does not compute what Steep computes"):
        parity(Steep(), tmp_path / "wrong.onnx", images(2))


def test_zeros_and_extremes_are_compared_too(tmp_path: Path) -> None:
    """Wrong only where an image is black: real and random samples never show it."""
    done = export(Net(), tmp_path / "x.onnx", images(2))
    assert done.parity is not None and done.parity.edges == 4
    wrong = onnx.load(done.path)
    wrong.graph.node[-1].output[0] = "right"
    for name, value in (("tiny", 1e-6), ("one", 1.0)):
        wrong.graph.initializer.append(
            onnx.numpy_helper.from_array(torch.tensor(value).numpy(), name)
        )
    for kind, given, made in (
        ("Abs", ["input"], "size"),
        ("ReduceMax", ["size"], "most"),
        ("Less", ["most", "tiny"], "black"),
        ("Where", ["black", "one", "most_zero"], "extra"),
        ("Add", ["right", "extra"], "logits"),
    ):
        keep = {"keepdims": 0} if kind == "ReduceMax" else {}
        wrong.graph.node.append(onnx.helper.make_node(kind, given, [made], **keep))
    wrong.graph.initializer.append(
        onnx.numpy_helper.from_array(torch.tensor(0.0).numpy(), "most_zero")
    )
    onnx.save(wrong, tmp_path / "wrong.onnx")
    # alone in a batch, a black image is given another answer
    with pytest.raises(NumericsError, match="does not compute what Net computes"):
        parity(Net(), tmp_path / "wrong.onnx", images(2))


def test_a_network_without_an_answer_at_the_edge_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return (x / x.std(1, keepdim=True))[:, :4]

    assert not Scaled()(torch.zeros(1, 3, 8, 8)).isfinite().all()
    done = export(Scaled(), tmp_path / "x.onnx", images(2))
    assert done.parity is not None and done.parity.gap <= done.parity.bound


def test_rounding_is_called_by_its_name(tmp_path: Path) -> None:
    """So ill-conditioned that float32 itself is off: no file in float32 could come close."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(192, 192)
            self.second = nn.Linear(192, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x.flatten(1))
            return self.second((x * 1e4 + 1e7) - 1e7)

    torch.manual_seed(0)
    network = Cancelling()
    with pytest.raises(NumericsError, match=r"rounding: in fp32 Cancelling is .* its own") as told:
        export(network, tmp_path / "x.onnx", images(2))
    assert list(tmp_path.iterdir()) == []
    fix = told.value.notes["fix"]
    assert fix.startswith("allow as much: --tolerance ")
    done = export(network, tmp_path / "x.onnx", images(2), tolerance=float(fix.split()[-1]))
    assert done.parity is not None and done.parity.gap > 0


# keeping what failed


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert_wrongly(network: Network, example: object, form: Form) -> Conversion:
        found = convert(network, example, form.opset, batch=form.batch)
        faults.missing_relu(found.proto)
        return found

    monkeypatch.setattr(writing, "_converted", convert_wrongly)


@pytest.mark.parametrize("external", [False, True])
def test_force_keeps_a_failed_file_under_a_name_that_says_so(
    external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    (tmp_path / "x.onnx").write_bytes(b"earlier")
    with pytest.raises(NumericsError, match=r"(?s)kept: .*x\.unproved\.onnx") as caught:
        export(Net(), tmp_path / "x.onnx", images(2), form=Form(external=external), force=True)
    assert caught.value.exit_code == 5
    left = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in left if not name.endswith(".data")] == ["x.onnx", "x.unproved.onnx"]
    assert (tmp_path / "x.onnx").read_bytes() == b"earlier"
    assert len(left) == 3 if external else len(left) == 2
    kept = onnx.load(tmp_path / "x.unproved.onnx")
    assert {entry.key: entry.value for entry in kept.metadata_props} == {
        "kdsurgeon.verified": "false"
    }
    monkeypatch.undo()
    with pytest.raises(NumericsError, match="does not compute what Net computes"):
        parity(Net(), tmp_path / "x.unproved.onnx", images(2))


def test_a_file_that_overflows_float16_is_kept_when_forced(tmp_path: Path) -> None:
    net = Net()
    net.stem.weight.data *= 1e4  # fits, and what it computes does not
    for force in (False, True):
        with pytest.raises(NumericsError, match="would overflow") as caught:
            export(net, tmp_path / "x.onnx", images(2), form=Form(half=True), force=force)
        assert ("kept" in caught.value.notes) is force
        left = [path.name for path in tmp_path.iterdir()]
        assert left == (["x.unproved.onnx"] if force else [])


def test_a_failed_int8_file_leaves_both_files_of_before(tmp_path: Path) -> None:
    def fails(fp32: Path) -> Int8:
        assert onnx.load(fp32).graph.node, "it is given the proved fp32 file"
        raise NumericsError("int8 lost too much.")

    names = ("x.onnx", "x.int8.onnx")
    for name in names:
        (tmp_path / name).write_bytes(b"earlier")
    with pytest.raises(NumericsError, match="int8 lost too much"):
        export(Net(), tmp_path / "x.onnx", images(2), make_int8=fails)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert [(tmp_path / name).read_bytes() for name in names] == [b"earlier"] * 2
    for form in (Form(half=True), Form(batch=1)):
        with pytest.raises(UsageError, match="int8 is made of an fp32 file"):
            export(Net(), tmp_path / "x.onnx", images(2), make_int8=fails, form=form)


def test_a_network_that_no_file_can_equal_is_told_what_to_do(tmp_path: Path) -> None:
    class Batchwise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)).flatten(1)[:, :4]

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :4] + torch.tensor(float("nan"))

    for network, words in ((Batchwise(), "running statistics"), (Broken(), "before training")):
        with pytest.raises(NumericsError) as caught:
            export(network, tmp_path / "x.onnx", images(2))
        assert words in caught.value.notes["fix"]


def test_without_force_a_failed_file_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    with pytest.raises(NumericsError) as caught:
        export(Net(), tmp_path / "x.onnx", images(2))
    assert "kept" not in caught.value.notes
    assert list(tmp_path.iterdir()) == []
