"""Processes that share out weights train as those that do not, and each holds its part only."""

from operator import attrgetter

import pytest
import torch
from torch import fx, nn

from kdsurgeon.cli import main
from kdsurgeon.errors import ConfigError, UsageError
from kdsurgeon.ranks import Ranks
from kdsurgeon.recipe import Recipe
from kdsurgeon.stones.programs import divide
from kdsurgeon.training.sharding import clip, total_norm
from tests import ranked, sharded
from tests.ranked import PLAIN, together
from tests.test_ranks import RANDOM, gap
from tests.torture import elastic

STEPS = {"opt": "sgd", "lr": 0.01, "grad_accum_steps": 2, "clip_grad": 0.1, "warmup_epochs": 0.5}
OFTEN = {"epochs": 2, **RANDOM, "optim": STEPS}
KINDS = {"PLAIN": (PLAIN,), "OFTEN": (OFTEN, {"maps": True})}
CASES = {
    f"{shard} {name}": ({**numbers, "shard": shard}, *kind)
    for name, (numbers, *kind) in KINDS.items()
    for shard in ("none", "teacher", "all")
}


def test_shared_out_or_not_a_run_comes_to_the_same():
    """Three processes; the last batch of the validation data is too small for all of them. The
    teacher's weights come back as they were, so no bit differs; what is trained is summed up in
    another order."""
    everyone = together(3, sharded.all_of, CASES)
    one = ranked.trained(Ranks.alone(), PLAIN)
    for name in KINDS:
        none, teacher, all_ = (everyone[0][f"{s} {name}"] for s in ("none", "teacher", "all"))
        assert gap(none["weights"], teacher["weights"]) == 0, name
        assert gap(none["weights"], all_["weights"]) < 1e-12, name
        assert none["accuracy"] == teacher["accuracy"] == all_["accuracy"], name
        assert none["losses"] == teacher["losses"], name
        for mine, theirs in zip(all_["losses"], none["losses"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-12), name
        for shard in ("none", "teacher", "all"):
            weights = [ranks[f"{shard} {name}"]["weights"] for ranks in everyone]
            assert gap(weights[0], weights[1]) == gap(weights[0], weights[2]) == 0, name
    assert gap(everyone[0]["all PLAIN"]["weights"], one["weights"]) < 1e-12
    assert everyone[0]["all PLAIN"]["buckets"] == everyone[0]["all PLAIN"]["by hand"] == []


def test_weights_that_are_overwritten_fetched_tied_and_folded_are_shared_out():
    """Student and teacher overwrite what they are given and read weights of their own; the teacher
    calls one layer twice, at both ends. The stones change from step to step."""
    first, second = together(2, sharded.odd_runs)
    for (share, merge), (weights, *logits) in first.items():
        alone, *same = first["none", merge]
        assert gap(weights, alone) == 0, (share, merge)  # sums of two have one order
        assert all(map(torch.equal, logits, same)), (share, merge)
        assert gap(weights, second[share, merge][0]) == 0, (share, merge)


def test_each_process_holds_its_part_and_little_more_while_it_computes():
    """Bytes of storages, the teacher's and its folded twins'. A tenth is for what lies between
    weights, so that each begins where its numbers may."""
    for found in together(2, sharded.measured):
        assert found["whole"] / 2 <= found["own"] <= 1.1 * found["whole"] / 2
        assert found["after"] == found["own"]
        assert len(found["portions"]) > 3 and found["gathered"] > 2 * len(found["portions"])
        largest = sorted(found["portions"])[-2:]
        assert found["own"] < found["peak"] <= found["own"] + sum(largest)
        assert found["same"]
        assert found["trained"] / 2 <= found["own trained"] <= 1.1 * found["trained"] / 2
        assert found["gradients"] == found["momenta"] <= found["own trained"]


def test_what_is_saved_is_whole_and_either_kind_of_run_goes_on_with_it(tmp_path):
    """Moments of AdamW, random stones, dropout, batch statistics. The gradient of a bias before
    batch normalisation is rounding, 1e-17, which AdamW divides by 1e-8."""
    numbers = {**RANDOM, "epochs": 2, "optim": {"lr": 0.01, "grad_accum_steps": 2}}
    (counts, states), (others, _) = together(2, sharded.histories, tmp_path, numbers)
    assert counts == others == [4, 4, 2, 2, 2, 2]
    wanted = states["none"]
    assert any(name.endswith("exp_avg_sq") for name in wanted)
    for name, state in states.items():
        assert state.keys() == wanted.keys(), name
        for key, value in state.items():
            assert type(value) is torch.Tensor and value.shape == wanted[key].shape, (name, key)
            assert torch.allclose(value, wanted[key], rtol=1e-9, atol=1e-9), (name, key)
    with pytest.raises(UsageError, match="shard was all, is none"):
        ranked.go(Ranks(0, 1), tmp_path / "all", {**numbers, "epochs": 3}, None, ("world-size",))
    more = {**numbers, "epochs": 3}
    allowed = ("shard", "world-size")
    assert ranked.go(Ranks.alone(), tmp_path / "all", more, None, allowed) == 2


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ({"shard": "teacher", "method": "ce"}, "--method ce"),
        ({"shard": "teacher", "torch_compile": True}, "--compile"),
        ({"shard": "teacher", "channels_last": True}, "--channels-last"),
        ({"shard": "teacher", "optim": {"auto_batch": True}}, "--auto-batch"),
        ({"shard": "teacher", "data": {"teacher_views": 2}}, "--teacher-views"),
        ({"shard": "all", "method": "kd"}, "--method kd"),
        ({"shard": "all", "optim": {"model_ema": True}}, "--model-ema"),
        ({"shard": "all", "optim": {"opt": "lamb"}}, "--opt lamb"),
        ({"shard": "all", "amp": True, "amp_dtype": "float16"}, "--amp-dtype float16"),
    ],
)
def test_what_does_not_go_together_is_refused(numbers, why):
    with pytest.raises(UsageError) as caught:
        ranked.ready(Ranks(0, 2), Recipe(**numbers))
    assert f"--shard {numbers['shard']} and {why} do not go together" in str(caught.value)
    assert "why:" in str(caught.value) and f"leave {why} out" in str(caught.value)


def test_one_process_shares_nothing_out():
    with pytest.raises(UsageError, match="this is one alone") as caught:
        ranked.ready(Ranks.alone(), Recipe(shard="all"))
    assert "torchrun --nproc-per-node N" in str(caught.value)
    with pytest.raises(ConfigError, match='did you mean "teacher"'):
        Recipe(shard="teachers")  # pyright: ignore[reportArgumentType]


def test_models_that_cannot_be_shared_out_are_refused():
    for text in together(2, sharded.tied_student):
        assert "a weight that two blocks of the student read" in text
        assert "student.units.0.mix.weight" in text and "--shard teacher" in text
    for text in together(2, sharded.other_teachers):
        assert "different teachers" in text


def test_what_the_command_line_shared_out_is_looked_at_alone(tmp_path, monkeypatch, capsys):
    more = ("--shard", "all", "--set", "optim.model_ema=false", "--epochs", "1")
    done = elastic.run(tmp_path / "one", *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("MB on each of 2 processes") == 1
    assert done.stdout.count("MB of weights on each process, by FSDP2") == 1
    monkeypatch.chdir(tmp_path / "one")
    code = [
        word for name in ("teacher", "student") for word in ("--trust-code", f"py:nets.py:{name}")
    ]
    assert main(["eval", "run", *code]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["teacher", "100.0", "%", "–"] in table
    assert all(line.split() in table for line in done.stdout.splitlines() if " stone " in line)


# ── the programs of a graph ──────────────────────────────────────────────────────────────────────


def test_a_divided_graph_computes_the_same_and_no_weight_leaves_a_program():
    torch.manual_seed(0)
    traced = fx.symbolic_trace(sharded.Odd(8, tied=True).eval())
    state = {
        str(node.target): attrgetter(str(node.target))(traced)
        for node in traced.graph.nodes
        if node.op in ("call_module", "get_attr")
    }
    seen = []

    def run(place, program):
        seen.append(place)
        outputs = next(iter(program.graph.find_nodes(op="output"))).all_input_nodes
        assert outputs and all(node.op != "get_attr" for node in outputs)
        return program

    names = {node: node.name.split("_")[0] for node in traced.graph.nodes}
    divided = divide(
        traced.graph, state, lambda node: None if names[node] == "stem" else names[node], run
    )
    images = torch.randn(3, 6)
    assert torch.equal(divided(images), traced(images))
    assert len(seen) > 3 and "stem" not in seen


def test_norms_and_clipping_of_plain_gradients_are_those_of_torch():
    layer = nn.Linear(3, 2)
    layer(torch.ones(3)).sum().backward()
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    wanted = torch.nn.utils.get_total_norm(gradients)
    assert torch.equal(total_norm(gradients), wanted)
    clip(layer.parameters(), 0.5, wanted)
    assert total_norm(gradients).item() == pytest.approx(0.5, rel=1e-5)


def test_a_copy_that_grafting_inserted_goes_with_the_node_that_overwrites_it():
    graph, seen = fx.Graph(), {}
    first = graph.call_module("first", (graph.placeholder("x"),))
    copied = graph.call_method("clone", (first,))
    graph.output(graph.call_module("second", (copied,)))

    def run(place, program):
        seen[place] = [node.op for node in program.graph.nodes]
        return program

    state = {"first": nn.ReLU(), "second": nn.ReLU(inplace=True)}
    divide(graph, state, lambda node: node.target if node.op == "call_module" else None, run)
    assert seen == {
        "first": ["placeholder", "call_module", "output"],
        "second": ["placeholder", "call_method", "call_module", "output"],
    }
