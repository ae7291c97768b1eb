import json
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from kdsurgeon import plugins
from kdsurgeon.cli import main
from kdsurgeon.cli.live import losses_table
from kdsurgeon.errors import ConfigError, PluginError
from kdsurgeon.recipe import RunConfig
from kdsurgeon.tracking import Trackers


class Notebook:
    def __init__(self, folder, settings):
        self.folder, self.settings, self.lines, self.is_closed = folder, settings, [], False

    def log(self, numbers, step):
        self.lines.append((step, dict(numbers)))

    def close(self):
        self.is_closed = True


class Broken(Notebook):
    def log(self, numbers, step):
        raise OSError("no network")


def opened(monkeypatch, *kinds):
    """Trackers of these classes, the objects that were made, and what was warned of."""
    made, said = [], []

    def load(kind, name):
        assert kind == "trackers"
        return lambda *given: made.append(kinds[int(name)](*given)) or made[-1]

    monkeypatch.setattr(plugins, "load", load)
    names = [str(index) for index in range(len(kinds))]
    return Trackers(names, Path("run"), {"epochs": 3}, warn=said.append), made, said


def test_every_tracker_is_told_the_finite_numbers(monkeypatch):
    trackers, made, said = opened(monkeypatch, Notebook, Notebook)
    trackers.log({"train/total": 1.5, "nan": float("nan"), "none": None}, 7)
    trackers.close()
    for tracker in made:
        assert tracker.lines == [(7, {"train/total": 1.5})]
        assert (tracker.folder, tracker.settings) == (Path("run"), {"epochs": 3})
        assert tracker.is_closed
    assert said == []


def test_a_tracker_that_fails_is_left_out_with_one_warning_and_the_others_go_on(monkeypatch):
    trackers, made, said = opened(monkeypatch, Broken, Notebook)
    trackers.log({"a": 1.0}, 1)
    trackers.log({"a": 2.0}, 2)
    assert [step for step, _ in made[1].lines] == [1, 2]
    assert len(said) == 1 and "OSError: no network" in said[0]


def test_a_tracker_that_cannot_be_opened_is_refused_and_the_ones_before_are_closed(monkeypatch):
    made = []

    def load(kind, name):
        def opener(*given):
            if name == "missing":
                raise ImportError("No module named 'wandb'")
            return made.append(Notebook(*given)) or made[-1]

        return opener

    monkeypatch.setattr(plugins, "load", load)
    with pytest.raises(PluginError, match="the tracker missing cannot be opened") as caught:
        Trackers(["one", "missing"], Path("run"), {}, warn=print)
    assert "wandb" in str(caught.value.notes["why"]) and made[0].is_closed


def events(folder: Path):
    """(step, name, value) of every number in TensorBoard's event files, oldest file first."""
    for file in sorted(folder.iterdir()):
        raw = file.read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            event = Event.FromString(raw[12 : 12 + length])
            raw = raw[16 + length :]
            for value in event.summary.value:
                yield event.step, value.tag, value.simple_value


def test_tensorboard_gets_the_numbers_by_step(tmp_path):
    trackers = Trackers(["tensorboard"], tmp_path, {}, warn=pytest.fail)
    trackers.log({"train/ce student": 0.5}, 50)
    trackers.log({"accuracy/student": 0.25}, 60)
    trackers.close()
    assert list(events(tmp_path / "tensorboard")) == [
        (50, "train/ce_student", 0.5),
        (60, "accuracy/student", 0.25),
    ]


def test_a_tracker_that_is_not_installed_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r'no tracker is called "tensorbord".*tensorboard'):
        RunConfig(teacher="t.pt", student="s.pt", data_dir="digits", track=("tensorbord",))


def test_the_live_table_has_a_column_for_each_stone_and_the_last_accuracies():
    losses = {"total": 3.0, "ce student": 1.0, "kd student": 2.0, "ce stone 10": 4.0}
    losses |= {"ce stone 2": 5.0, "cross student": 0.5}
    table = losses_table(losses, {"student": 0.5, "stone 2": 0.25})
    assert [column.header for column in table.columns] == ["", "student", "stone 2", "stone 10"]
    rows = list(zip(*(column.cells for column in table.columns[:3]), strict=True))
    assert rows[:2] == [("ce", "1.000", "5.000"), ("kd", "2.000", "–")]
    assert rows[2:] == [
        ("cross", "0.500", "–"),
        ("accuracy", "50.00%", "25.00%"),
        ("total", "3.000", ""),
    ]


def test_a_run_tells_tensorboard_and_prints_a_line_every_so_many_batches(
    tmp_path, digit_models, capsys
):
    teacher, student = digit_models / "teacher.pt", digit_models / "student.pt"
    line = ["distill", teacher, student, "--data-dir", "digits", "--epochs", "2", "-b", "256"]
    assert main([str(x) for x in [*line, "--log-interval", "4", "-o", tmp_path / "run"]]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [text.split("  ")[1] for text in printed if text.startswith("  step ")] == [
        "step 4 of 12",
        "step 8 of 12",
        "step 12 of 12",
    ]
    told = list(events(tmp_path / "run" / "tensorboard"))
    assert {step for step, name, _ in told if name == "train/total"} == {4, 8, 12}
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    wanted = [(6 * (1 + i), json.loads(text)["accuracy"]) for i, text in enumerate(metrics)]
    found = [(step, value) for step, name, value in told if name == "accuracy/student"]
    assert found == [(step, pytest.approx(value, abs=1e-6)) for step, value in wanted]


def test_no_tracker_leaves_nothing_in_the_run_folder(tmp_path, digit_models):
    teacher, student = digit_models / "teacher.pt", digit_models / "student.pt"
    line = ["distill", teacher, student, "--data-dir", "digits", "--epochs", "1", "-b", "512"]
    assert main([str(x) for x in [*line, "--track", "none", "-o", tmp_path / "run"]]) == 0
    assert not (tmp_path / "run" / "tensorboard").exists()
