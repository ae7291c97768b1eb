import errno
import json
import multiprocessing
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kdsurgeon import runs
from kdsurgeon.errors import ModelFileError, ResourceError, UsageError
from kdsurgeon.runs import Run, environment, read_checkpoint, verify, verify_run

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


def test_a_step_is_replaced_where_a_killed_process_left_its_predecessor(run):
    save(run, 1)
    path = run.path / "checkpoints" / "step-000001"
    shutil.copytree(path, path.with_name("step-000001.old"))
    values = {"student": {"weight": torch.zeros(6)}}
    run.save_checkpoint(1, values, {"training": {"step": 1, "again": True}})
    assert names(run) == ["step-000001"]
    assert run.latest_checkpoint()[0].state["training"]["again"]


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


def test_a_worker_that_outlives_its_run_does_not_hold_it(tmp_path):
    held, woken = os.pipe()
    there, begun = os.pipe()
    run = Run.create(tmp_path / "run")
    run.write("config.yaml", "")
    worker = os.fork()
    if worker == 0:  # as one that reads images: it waits, and ends some seconds after its run
        os.close(woken)
        os.write(begun, b"!")
        os.read(held, 1)
        os._exit(0)
    try:
        os.read(there, 1)
        os.close(run._lock)  # as a killed process closes it
        with Run.resume(tmp_path / "run") as again:
            assert again.path == run.path
    finally:
        for descriptor in (woken, held, there, begun):
            os.close(descriptor)
        os.waitpid(worker, 0)
        run._lock = None


def test_a_worker_closes_no_file_but_the_lock(tmp_path):
    run = Run.create(tmp_path / "run")
    os.close(run._lock)
    with (tmp_path / "other").open("w") as other:
        assert other.fileno() == run._lock, "the number is in use again"
        worker = os.fork()
        if worker == 0:
            try:
                os.write(other.fileno(), b"open")
            finally:
                os._exit(0)
        os.waitpid(worker, 0)
        run._lock = None
    assert (tmp_path / "other").read_text() == "open"


def test_a_folder_in_use_is_refused_and_free_again_afterwards(run):
    run.close()
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(run.path, ready, done))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(ResourceError, match="is in use by another run") as caught:
        Run.resume(run.path)
    assert caught.value.notes["where"] == f"process {holder.pid}"
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


FAULTS = {
    errno.EIO: (ModelFileError, "cannot be read"),
    errno.EACCES: (ResourceError, "may not be read: Permission denied"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=errno.errorcode.get)
def test_verify_names_the_file_that_the_disk_does_not_give(run, monkeypatch, fault):
    path = run.save_checkpoint(1, TENSORS, {})

    def failing(*_):
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(runs.hashlib, "file_digest", failing)
    kind, told = FAULTS[fault]
    with pytest.raises(kind, match=rf"step-000001/optimizer\.safetensors {told}"):
        verify(path)


def test_the_record_names_versions_and_command_but_no_host_or_user():
    record = environment(["kdsurgeon", "distill"])
    assert record["command"] == ["kdsurgeon", "distill"]
    assert record["packages"]["torch"] == torch.__version__
    assert not {"host", "user", "cwd"} & set(record)
    json.dumps(record)


def test_the_record_names_the_commit_around_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment([])["git"] is None

    def git(*command):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(["git", *who, *command], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    assert environment([])["git"] is None  # no commit yet
    file = tmp_path / "train.py"
    file.write_text("one")
    git("add", ".")
    git("commit", "-qm", "first")
    wanted = git("rev-parse", "HEAD")
    assert environment([])["git"] == {"commit": wanted, "changed": False}
    file.write_text("two")
    assert environment([])["git"] == {"commit": wanted, "changed": True}


def test_the_record_says_which_packages_are_missing(monkeypatch):
    monkeypatch.setattr(runs, "_RECORDED_PACKAGES", ("torch", "a-package-that-is-not-there"))
    packages = environment([])["packages"]
    assert packages == {"torch": torch.__version__, "a-package-that-is-not-there": None}


def test_checkpoints_are_ordered_by_their_number_not_their_name(run):
    save(run, 999_999, 1_000_000)
    assert run.latest_checkpoint()[0].state["training"]["step"] == 1_000_000


def test_older_checkpoints_make_room_for_a_file_once(run):
    save(run, 1, 2)
    calls = []

    def full(times):
        def write():
            calls.append(1)
            if len(calls) <= times:
                raise ResourceError("no room.") from OSError(errno.ENOSPC, "full")

        return write

    run.making_room(full(1), "last.safetensors")
    assert len(calls) == 2 and names(run) == ["step-000002"]
    assert "step-000001 made room for last.safetensors" in (run.path / "train.log").read_text()
    calls.clear()
    with pytest.raises(ResourceError, match="no room"):
        run.making_room(full(1), "last.safetensors")  # nothing is left to give up
    assert len(calls) == 1 and names(run) == ["step-000002"]


def test_a_run_that_could_not_begin_leaves_what_it_did_not_write(run):
    (run.path / "config.yaml").write_text("epochs: 1")
    (run.path / "notes.txt").write_text("mine")
    run.withdraw()
    assert [path.name for path in run.path.iterdir()] == ["notes.txt"]


def names(run):
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


def test_the_best_and_every_nth_checkpoint_stay_beside_the_newest_two(run):
    run.keep_every = 3
    for step in range(9):  # the third after the first is that of step 3
        values = {"student": {"weight": torch.full((6,), float(step))}}
        run.save_checkpoint(step, values, {}, best=step in (1, 4))
    assert names(run) == [f"step-{step:06d}" for step in (3, 4, 6, 7, 8)]


def test_which_is_every_nth_does_not_depend_on_where_the_run_was_resumed(run):
    run.keep_every = 3
    save(run, 0, 1, 2)
    run.close()
    with Run.resume(run.path) as again:
        again.keep_every = 3
        again.latest_checkpoint()
        save(again, 3, 4, 5, 6)
        assert "step-000003" in names(again)


def test_a_checkpoint_that_may_not_be_read_is_not_removed(run, monkeypatch):
    save(run, 1, 2)
    read = Path.read_bytes

    def refusing(path):
        return forbidden() if "step-000001" in str(path) else read(path)

    monkeypatch.setattr(Path, "read_bytes", refusing)
    save(run, 3, 4)
    assert names(run) == ["step-000001", "step-000003", "step-000004"]


def test_a_checkpoint_whose_manifest_is_damaged_makes_way_for_new_ones(run):
    save(run, 1, 2)
    damage_byte(run.path / "checkpoints" / "step-000001" / "MANIFEST.json")
    save(run, 3)
    assert names(run) == ["step-000002", "step-000003"]


def test_a_checkpoint_that_cannot_be_removed_is_told_in_the_log_and_the_run_goes_on(
    run, monkeypatch
):
    save(run, 1, 2)
    monkeypatch.setattr(shutil, "rmtree", forbidden)
    save(run, 3)
    log = (run.path / "train.log").read_text()
    assert "step-000001 could not be removed: Operation not permitted" in log
    assert run.latest_checkpoint()[0].state["training"]["step"] == 3


def test_the_checkpoint_that_a_run_went_on_from_stays(run):
    save(run, 1, 2)
    run.close()
    with Run.resume(run.path) as again:
        assert again.latest_checkpoint()[0].state["training"]["step"] == 2
        save(again, 3, 4, 5, 6)
        assert names(again) == ["step-000002", "step-000005", "step-000006"]


def test_damaged_ones_that_a_run_went_back_before_make_way_for_new_ones(run):
    save(run, 1, 2)
    damage_byte(run.path / "checkpoints" / "step-000002" / "student.safetensors")
    run.close()
    with Run.resume(run.path) as again:
        assert again.latest_checkpoint()[0].state["training"]["step"] == 1
        values = {"student": {"weight": torch.zeros(6)}}
        again.save_checkpoint(1, values, {"training": {"step": 1, "again": True}})
        assert names(again) == ["step-000001"]


def test_a_checkpoint_under_another_step_is_not_believed(run):
    path = run.save_checkpoint(1, TENSORS, {})
    path.rename(path.with_name("step-000009"))
    found = path.with_name("step-000009")
    with pytest.raises(ModelFileError, match="is that of another folder"):
        read_checkpoint(found)


def test_a_manifest_of_another_version_is_named(run):
    path = run.save_checkpoint(1, TENSORS, {}) / "MANIFEST.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 9'))
    with pytest.raises(ModelFileError, match="is of version 9; this kdsurgeon reads 2"):
        verify(path.parent)


def test_every_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with Run.create(tmp_path / "run") as run:
            run.add_metrics({"epoch": 1})
            path = run.save_checkpoint(1, TENSORS, {})
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert modes == {0o640}
    assert path.stat().st_mode & 0o777 == 0o750
    assert (run.path / "metrics.jsonl").stat().st_mode & 0o777 == 0o640


def test_leftovers_of_every_kind_are_removed_at_the_next_start(run):
    leftovers = [".config.yaml.77.tmp", "student/.last.safetensors.77.tmp"]
    leftovers += ["checkpoints/.tmp-77-old-step-000001"]
    for name in leftovers[:2]:
        (run.path / name).write_bytes(b"half")
    (run.path / leftovers[2]).mkdir()
    run.close()
    with Run.resume(run.path):
        assert [name for name in leftovers if (run.path / name).exists()] == []


def test_a_leftover_that_cannot_be_removed_is_named_and_the_folder_set_free(run, monkeypatch):
    (run.path / ".config.yaml.77.tmp").write_bytes(b"half")
    run.close()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", forbidden)
        with pytest.raises(ResourceError, match="cannot be written: Operation not permitted"):
            Run.resume(run.path)
    Run.resume(run.path).close()


def test_a_folder_with_checkpoints_and_without_settings_is_not_begun_anew(run):
    save(run, 1)
    (run.path / "config.yaml").unlink()
    run.close()
    with pytest.raises(UsageError, match=r"holds checkpoints of a run without its config\.yaml"):
        Run.create(run.path)


def test_what_does_not_come_back_from_the_disk_is_not_published_in_silence(run, monkeypatch):
    save(run, 1)
    monkeypatch.setattr(runs, "_publish", rotting)
    with pytest.raises(ResourceError, match="does not hold what was written to it") as caught:
        save(run, 2, 3)
    assert "checkpoint before is used" in str(caught.value)
    assert run.latest_checkpoint()[0].state["training"]["step"] == 1


def rotting(draft, final):
    draft.rename(final)
    damage_byte(final / "student.safetensors")


def test_a_run_without_room_for_its_checkpoints_ends_before_its_first_step(run, monkeypatch):
    monkeypatch.setattr(runs, "free_space", lambda _: 1000)
    with pytest.raises(ResourceError, match="has too little room for a run") as caught:
        save(run, 0)
    assert caught.value.exit_code == 6
    assert "and 3 must fit; 1 kB are free" in str(caught.value)
    assert run.latest_checkpoint()[0].state["training"]["step"] == 0


def test_a_run_that_is_under_way_is_told_of_little_room_in_its_log(run, monkeypatch):
    save(run, 0)
    monkeypatch.setattr(runs, "free_space", lambda _: 1000)
    save(run, 1)
    assert "too little room: a checkpoint takes" in (run.path / "train.log").read_text()


def test_a_full_disk_gives_up_old_checkpoints_once_and_says_so(run, monkeypatch):
    save(run, 1, 2, 3)
    calls = []

    def full_once(draft, final):
        calls.append(final.name)
        if len(calls) == 1:
            _no_space()
        publish(draft, final)

    publish = runs._publish
    monkeypatch.setattr(runs, "_publish", full_once)
    save(run, 4)
    assert calls == ["step-000004"] * 2
    assert names(run) == ["step-000003", "step-000004"]
    log = (run.path / "train.log").read_text()
    assert "disk full: step-000002 made room for step-000004" in log


def test_a_full_disk_is_told_with_file_need_and_room(run, monkeypatch):
    save(run, 1)
    monkeypatch.setattr(runs, "_publish", _no_space)
    with pytest.raises(ResourceError, match="step-000002 cannot be written: No space") as caught:
        save(run, 2)
    notes = caught.value.notes
    assert re.fullmatch(r"the weights alone take 1 kB, [\d,]+ [kM]B are free", notes["room"])
    assert notes["kept"] == "step-000001 is intact"


def test_an_unreadable_checkpoint_is_not_taken_for_a_damaged_one(run, monkeypatch):
    save(run, 1, 2)

    def refused(path):
        raise ResourceError(f"{path} could not be read.") from OSError(13, "Permission denied")

    monkeypatch.setattr(runs, "read_once", refused)
    with pytest.raises(ResourceError, match="may not be read: Permission denied"):
        run.latest_checkpoint()


def test_a_checkpoint_that_does_not_fit_into_memory_is_not_taken_for_a_damaged_one(
    run, monkeypatch
):
    save(run, 1, 2)

    def too_large(path):
        raise ResourceError(f"{path} does not fit into memory.") from MemoryError()

    monkeypatch.setattr(runs, "read_once", too_large)
    with pytest.raises(ResourceError, match=r"step-000002.* does not fit into memory"):
        run.latest_checkpoint()


def test_a_medium_that_fails_is_damage(run, monkeypatch):
    save(run, 1, 2)
    read = runs.read_once

    def failing(path):
        if path.parent.name == "step-000002":
            raise ResourceError(f"{path} could not be read.") from OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(runs, "read_once", failing)
    found, complaints = run.latest_checkpoint()
    assert found.state["training"]["step"] == 1
    assert "cannot be read" in complaints[0]


def test_metrics_go_back_to_the_checkpoint(run):
    run.add_metrics({"epoch": 1})
    save(run, 1)
    run.add_metrics({"epoch": 2})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "los')
    run.rewind(run.latest_checkpoint()[0])
    assert run.metrics() == [{"epoch": 1}]
    run.add_metrics({"epoch": 2})
    assert run.metrics() == [{"epoch": 1}, {"epoch": 2}]


def test_a_checkpoint_that_heals_after_the_run_went_back_does_not_come_again(run):
    run.add_metrics({"epoch": 1})
    save(run, 1)
    run.add_metrics({"epoch": 2})
    save(run, 2)
    state = run.path / "checkpoints" / "step-000002" / "state.json"
    whole = state.read_bytes()
    state.write_bytes(b"")
    before, (complaint,) = run.latest_checkpoint()
    assert "step-000002 is damaged" in complaint
    run.rewind(before)
    if state.parent.exists():
        state.write_bytes(whole)
    found, complaints = run.latest_checkpoint()
    assert (found.path, complaints) == (before.path, [])
    run.rewind(found)


@pytest.mark.parametrize("left", ["", '{"epoch": 7}\n', '{"epo'])
def test_metrics_that_do_not_reach_the_checkpoint_are_damaged(run, left):
    run.add_metrics({"epoch": 1})
    save(run, 1)
    (run.path / "metrics.jsonl").write_text(left)
    with pytest.raises(ModelFileError, match=r"metrics\.jsonl is damaged: it is not what it was"):
        run.rewind(run.latest_checkpoint()[0])


def test_metrics_that_cannot_be_read_stop_the_run(run):
    save(run, 1)
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(ModelFileError, match=r"metrics\.jsonl cannot be read") as caught:
        run.rewind(run.latest_checkpoint()[0])
    assert caught.value.notes["why"] == "Is a directory"


def test_an_ended_run_is_sealed_and_going_on_with_it_breaks_the_seal(run):
    save(run, 1)
    run.seal()
    assert verify(run.path) == 4  # config.yaml and a checkpoint of three files
    (run.path / "export").mkdir()
    (run.path / "export" / "student.json").write_text("{}")
    assert verify_run(run.path)[-1].endswith("all 4 files are as they were when the run ended")
    (run.path / "model.sig").touch()
    with pytest.raises(ModelFileError, match=r"model\.sig is unlisted") as caught:
        verify_run(run.path)
    assert caught.value.notes["fix"] == "move it out of the folder"
    (run.path / "model.sig").unlink()
    (run.path / "config.yaml").write_text("epochs: 2\n")
    with pytest.raises(ModelFileError, match=r"config\.yaml is changed") as caught:
        verify_run(run.path)
    assert caught.value.notes["fix"].startswith("copy the folder again from where it was made")
    run.close()
    with Run.resume(run.path) as again:
        assert (
            run.path / "MANIFEST.json"
        ).exists()  # what is refused before it goes on changes nothing
        again.log("resumed")
        assert "has not ended" in verify_run(run.path)[-1]


@pytest.mark.parametrize("facts", [{"kind": "run", "step": 1}, {"kind": "checkpoint", "step": 2}])
def test_the_manifest_of_another_folder_is_no_checkpoints(run, facts):
    save(run, 1)
    path = run.path / "checkpoints" / "step-000001"
    assert read_checkpoint(path).facts["kind"] == "checkpoint"
    known = json.loads((path / "MANIFEST.json").read_bytes())
    (path / "MANIFEST.json").write_bytes(runs._manifest(facts, known["files"]))
    with pytest.raises(ModelFileError, match="is that of another folder"):
        read_checkpoint(path)
    others = {name: each for name, each in known["files"].items() if name != "state.json"}
    right = {"kind": "checkpoint", "step": 1}
    (path / "MANIFEST.json").write_bytes(runs._manifest(right, others))
    with pytest.raises(ModelFileError, match="is that of another folder"):
        read_checkpoint(path)


def test_a_link_that_leads_nowhere_is_a_missing_file(run):
    save(run, 1)
    run.seal()
    (run.path / "config.yaml").unlink()
    (run.path / "config.yaml").symlink_to("nowhere")
    with pytest.raises(ModelFileError, match=r"config\.yaml is missing"):
        verify(run.path)


def test_a_line_of_metrics_that_is_no_json_is_named(run):
    (run.path / "metrics.jsonl").write_text('{"epoch": 1}\nnot JSON\n')
    with pytest.raises(ModelFileError, match=r"metrics\.jsonl is damaged") as caught:
        run.metrics()
    assert "remove the lines" in caught.value.notes["fix"]


def test_a_seal_that_cannot_be_broken_stops_the_run(run, monkeypatch):
    save(run, 1)
    run.seal()

    monkeypatch.setattr(Path, "unlink", forbidden)
    with pytest.raises(ResourceError, match="cannot be written: Operation not permitted"):
        run.add_metrics({"epoch": 2})
    assert not (run.path / "metrics.jsonl").exists()


def forbidden(*_, **__):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_disk_that_locks_nothing_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(runs.fcntl, "flock", refuse)
    with pytest.raises(ResourceError, match="cannot be locked: No locks available") as caught:
        Run.create(tmp_path / "run")
    assert "another disk" in caught.value.notes["fix"]


def test_a_folder_whose_lock_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "ftruncate", _no_space)
    with pytest.raises(ResourceError, match=r"\.lock cannot be written: No space left") as caught:
        Run.create(tmp_path / "run")
    assert "are free there" in caught.value.notes["room"]
    monkeypatch.undo()
    Run.create(tmp_path / "run").close()
