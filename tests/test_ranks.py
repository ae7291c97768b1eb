"""Several processes train as one: the same weights, every sample once, one who writes and talks."""

import pytest
import torch

from kdsurgeon.errors import UsageError
from kdsurgeon.ranks import Ranks
from kdsurgeon.recipe import Recipe
from tests import ranked
from tests.ranked import PLAIN, all_of, together, trained
from tests.resuming import differing
from tests.torture import elastic

OPTIM = PLAIN["optim"]
RANDOM = {"loss": {"stones": "random", "cross_start": 0.5, "stone_warmup": 1.0}}
CASES = {
    "all stones": ({**PLAIN},),
    "random stones, two batches an update": (
        {"epochs": 4, **RANDOM, "optim": {**OPTIM, "grad_accum_steps": 2, "clip_grad": 0.1,
                                          "model_ema": True, "model_ema_decay": 0.5}},
    ),
    "a schedule of stones": (
        {**PLAIN, "loss": {"stones": "last-1", "stone_schedule": [[0.5, "all"]]}},
    ),
    "samples left out": ({**PLAIN, "loss": {"ignore_index": 2}},),
    "labels only": ({**PLAIN, "method": "ce"},),
    "no logits of the student": (
        {**PLAIN, "loss": {"ce_weight": 0.0, "kd_weight": 0.0, "cross_start": 0.0,
                           "cross_weight": 1.0}},
    ),
}  # fmt: skip
AUTO = {**PLAIN, "optim": {**OPTIM, "auto_batch": True}}
SKIP = {**PLAIN, "optim": {**OPTIM, "skip_nan": 1}}
STATEFUL = {
    "epochs": 2, **RANDOM,
    "optim": {"lr": 0.01, "grad_accum_steps": 2, "warmup_epochs": 0.5, "model_ema": True},
}  # fmt: skip


def gap(left, right):
    """The largest difference of any weight; nothing may be missing."""
    assert set(left) == set(right)
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.fixture(scope="module")
def alone():
    return all_of(Ranks.alone(), CASES)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_come_to_the_weights_of_one(world, alone):
    """G-row: 1e-6 in float64 after 20 steps; the sums differ in their last bits only."""
    everyone = together(world, all_of, CASES)
    for name, one in alone.items():
        for found in (ranks[name] for ranks in everyone):
            assert gap(found["weights"], one["weights"]) < 1e-12, name
            assert gap(found["weights"], everyone[0][name]["weights"]) == 0, name
            assert found["samples"] == one["samples"], name
            assert found["accuracy"] == one["accuracy"], name
            for mine, theirs in zip(found["losses"], one["losses"], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-12), name
        rows = [row for ranks in everyone for row in ranks[name]["evaluated"]]
        assert sorted(rows) == sorted(one["evaluated"]), name
        models = 2 if "random" in name else 1  # the student, and its moving average
        models += name != "labels only"  # and the stones, in one pass
        assert len(one["evaluated"]) == 16 * models * len(one["losses"])
    first = everyone[0]["all stones"]
    student = set(first["buckets"])
    assert all(name.startswith("student.") for name in student)
    assert "student.head.weight" in student and "student.idle.weight" not in student
    assert not any("teacher" in name for name in [*first["buckets"], *first["by hand"]])
    assert {*first["buckets"], *first["by hand"]} == set(first["weights"])
    assert everyone[0]["no logits of the student"]["buckets"] == []


def test_what_one_process_meets_all_decide_on():
    cases = {
        "plain": (AUTO,),
        "memory": (AUTO, {}, ranked.runs_out),
        "nan": (SKIP, {}, ranked.is_nan_once),
        "norm": (PLAIN, {"maps": True}),
    }
    one, (first, second) = trained(Ranks.alone(), AUTO), together(2, all_of, cases)
    for name in cases:
        assert gap(first[name]["weights"], second[name]["weights"]) == 0, name
        assert first[name]["losses"] == second[name]["losses"], name
    assert gap(first["plain"]["weights"], one["weights"]) < 1e-12
    assert gap(first["memory"]["weights"], one["weights"]) < 1e-12
    assert first["plain"]["buckets"] == []
    assert [len(each["memory"]["troubles"]) for each in (first, second)] == [1, 1]
    assert [each["nan"]["skipped"] for each in (first, second)] == [1, 1]
    assert len(first["nan"]["troubles"][0]) == ranked.BATCH  # the whole batch is named
    assert {"student.norm.running_mean", "student.norm.running_var"} < {
        *first["norm"]["statistics"]
    }
    assert first["norm"]["drawn"] != second["norm"]["drawn"]


def test_a_run_that_one_rank_stops_goes_on_bit_for_bit(tmp_path):
    """Three ranks, where the order of a sum matters to its last bit."""
    everyone = together(3, ranked.histories, tmp_path, STATEFUL)
    for counts, whole, halted in everyone:
        assert counts == [4, 1, 1, 2]
        assert differing(whole, halted) == []
    files = everyone[0][1]
    for name in ("random", "random-1", "random-2", "epoch_random-2"):
        assert any(key.startswith(f"{name}/") for key in files), name
    assert files["random/cpu"] != files["random-1/cpu"] != files["random-2/cpu"]
    more = {**STATEFUL, "epochs": 3}
    with pytest.raises(UsageError, match=r"world-size was 3, is 1") as caught:
        ranked.go(Ranks.alone(), tmp_path / "whole", more)
    assert "--allow-change world-size" in str(caught.value)
    assert ranked.go(Ranks.alone(), tmp_path / "whole", more, None, ("world-size",)) == 2
    # and back: the new ranks have no random numbers saved
    most = {**STATEFUL, "epochs": 4}
    assert together(2, ranked.go, tmp_path / "whole", most, None, ("world-size",)) == [2, 2]


def test_an_error_ends_all_processes_and_is_told_once():
    """(class, exit code, who was let to speak, the rank in the message) on each of them."""
    assert together(2, ranked.fails_on_one) == [
        ("ToldElsewhere", 4, [], None),
        ("DataError", 4, [1], "1"),
    ]
    assert together(2, ranked.fails_on_all) == [("UsageError", 2, [], None)] * 2
    assert together(2, ranked.fails_on_the_first) == [("DataError", 4, [], None)] * 2


def test_sync_bn_is_reached_in_student_and_adapters_and_refused_without_cuda():
    """That torch has no code for the CPU shows that its module is what the graph calls."""
    for said in together(2, ranked.synchronised):
        assert len(said) == 2 and all("SyncBatchNorm expected input" in text for text in said)
    with pytest.raises(UsageError, match="--sync-bn needs CUDA"):
        ranked.ready(Ranks.alone(), Recipe(**PLAIN, sync_bn=True), maps=True)


def test_what_torchrun_says_is_read_and_checked():
    said = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a",
            "MASTER_PORT": "1", "TORCHELASTIC_RESTART_COUNT": "3"}  # fmt: skip
    assert Ranks.from_environment(said) == Ranks(2, 4, 0, restarts=3)
    assert Ranks.from_environment({"RANK": "2"}) == Ranks.alone()
    for wrong in ({"RANK": "x"}, {"RANK": "4"}, {"MASTER_PORT": ""}, {"RANK": "-1"}):
        with pytest.raises(UsageError, match=r"rank|which of several"):
            Ranks.from_environment(said | wrong)


def test_a_device_is_never_shared(monkeypatch):
    two = Ranks(1, 2, 1)
    assert two.device("cpu", torch.device) == torch.device("cpu")
    for name, text in (("cuda:1", "one GPU for 2"), ("mps", "on mps"), ("cuda", "no GPU of its")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(UsageError, match=text):
            two.device(name, torch.device)


def test_batches_that_cannot_be_shared_out_are_refused():
    with pytest.raises(UsageError, match="of type list cannot be shared by 2"):
        Ranks(0, 2).part_of([(torch.zeros(1), torch.zeros(1))])


# ── torchrun itself ──────────────────────────────────────────────────────────────────────────────


def test_a_killed_rank_is_started_anew_and_the_run_ends_in_the_same_bits(tmp_path):
    """The short form of torture's ``elastic``: one of 20 kills."""
    whole = elastic.Whole(tmp_path)
    assert whole.problems(seed=0) == []
    assert whole.said.count("epoch 1/3") == whole.said.count("next     kdsurgeon export") == 1
    folder = tmp_path / "whole" / "run"
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_a_mistake_is_told_by_one_process(tmp_path):
    done = elastic.run(tmp_path / "wrong", "--device", "cuda:7")
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: ") == 1
    assert not (tmp_path / "wrong" / "run").exists()
