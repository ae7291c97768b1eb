import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from kdsurgeon.errors import ModelFileError, ResourceError, UsageError
from kdsurgeon.runs import Run, environment, read_checkpoint, verify

TENSORS = {"student": {"weight": torch.arange(6.0)}, "optimizer": {"rng": torch.ones(3).byte()}}


def save(run, *steps):
    for step in steps:
        values = {"student": {"weight": torch.full((6,), float(step))}}
        run.save_checkpoint(step, values, {"training": {"step": step}})


@pytest.fixture
def run(tmp_path):
    with Run.create(tmp_path / "run") as made:
        made.write("config.yaml", "epochs: 1\n")
        yield made


def test_a_checkpoint_comes_back_as_it_was(run):
    path = run.save_checkpoint(12, TENSORS, {"training": {"step": 12}})
    assert path.name == "step-000012"
    files = ["MANIFEST.json", "optimizer.safetensors", "state.json", "student.safetensors"]
    assert sorted(file.name for file in path.iterdir()) == files
    found, complaints = run.latest_checkpoint()
    assert complaints == []
    assert found.state == {"training": {"step": 12}}
    for name, values in TENSORS.items():
        assert all(torch.equal(values[key], found.tensors[name][key]) for key in values)


def test_the_newest_two_checkpoints_are_kept(run):
    save(run, 1, 2, 3)
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000003",
    ]


def test_saving_the_same_step_again_replaces_it(run):
    save(run, 1, 1)
    assert run.latest_checkpoint()[0].state["training"]["step"] == 1


def damage_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


DAMAGES = {
    "a flipped bit": lambda p: damage_byte(p / "student.safetensors"),
    "a shorter file": lambda p: (p / "state.json").write_text("{}"),
    "a missing file": lambda p: (p / "student.safetensors").unlink(),
    "one file too many": lambda p: (p / "extra.safetensors").write_bytes(b"x"),
    "no manifest": lambda p: (p / "MANIFEST.json").unlink(),
    "a broken manifest": lambda p: (p / "MANIFEST.json").write_text("["),
    "an empty manifest": lambda p: (p / "MANIFEST.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(run, damage):
    save(run, 1, 2)
    DAMAGES[damage](run.path / "checkpoints" / "step-000002")
    found, complaints = run.latest_checkpoint()
    assert found.state["training"]["step"] == 1
    assert len(complaints) == 1
    assert "step-000002 is damaged" in complaints[0]


def test_when_none_is_whole_nothing_is_trained_from_scratch(run):
    save(run, 1, 2)
    for path in (run.path / "checkpoints").iterdir():
        damage_byte(path / "student.safetensors")
    with pytest.raises(ModelFileError, match="no checkpoint that is whole") as caught:
        run.latest_checkpoint()
    assert caught.value.exit_code == 3


def test_a_run_without_checkpoints_has_none(run):
    assert run.latest_checkpoint() == (None, [])


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_trace(run, monkeypatch):
    save(run, 1)
    monkeypatch.setattr(Path, "rename", _no_space)
    with pytest.raises(ResourceError, match="cannot be written: No space left") as caught:
        save(run, 2)
    assert caught.value.exit_code == 6
    assert "MB are free" in str(caught.value)
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step-000001"]
    assert run.latest_checkpoint()[0].state["training"]["step"] == 1


def _no_space(*_):
    raise OSError(28, "No space left on device")


def test_leftovers_of_a_killed_writer_are_removed_at_the_next_start(run):
    leftover = run.path / "checkpoints" / ".tmp-999-step-000007"
    leftover.mkdir()
    run.close()
    with Run.resume(run.path):
        assert not leftover.exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(run):
    run.close()
    with pytest.raises(UsageError, match="already holds a run") as caught:
        Run.create(run.path)
    assert "--resume" in str(caught.value)


def test_a_folder_without_a_run_is_not_resumed(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        Run.resume(tmp_path)
    assert list(tmp_path.iterdir()) == []


def hold(path, ready, done):
    with Run.resume(path):
        ready.set()
        done.wait(30)


def test_a_folder_in_use_is_refused_and_free_again_afterwards(run):
    run.close()
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(run.path, ready, done))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(ResourceError, match="is in use by another run") as caught:
        Run.resume(run.path)
    assert str(holder.pid) in str(caught.value)
    done.set()
    holder.join()
    Run.resume(run.path).close()


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        Run.create(tmp_path / "file" / "run")


def test_metrics_are_appended_line_by_line(run):
    run.add_metrics({"epoch": 1})
    run.add_metrics({"epoch": 2})
    assert run.metrics() == [{"epoch": 1}, {"epoch": 2}]


def test_the_log_carries_the_time(run):
    run.log("hello")
    line = (run.path / "train.log").read_text()
    assert line.endswith(" hello\n")
    assert line[:2] == "20"


@pytest.mark.parametrize("byte", range(0, 4000, 97))
def test_verify_notices_a_change_of_any_byte(run, byte):
    path = run.save_checkpoint(1, TENSORS, {"training": {"numbers": list(range(50))}})
    assert verify(path) == 3
    files = [path / "student.safetensors", path / "optimizer.safetensors", path / "state.json"]
    raw = b"".join(file.read_bytes() for file in files)
    position = byte % len(raw)
    for file in files:
        size = file.stat().st_size
        if position < size:
            content = bytearray(file.read_bytes())
            content[position] ^= 0x10
            file.write_bytes(content)
            break
        position -= size
    with pytest.raises(ModelFileError, match="is changed"):
        read_checkpoint(path)


def test_the_record_names_versions_and_command_but_no_host_or_user():
    record = environment(["kdsurgeon", "distill"])
    assert record["command"] == ["kdsurgeon", "distill"]
    assert record["packages"]["torch"] == torch.__version__
    assert not {"host", "user", "cwd"} & set(record)
    json.dumps(record)
