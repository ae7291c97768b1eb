"""A run's page: what it says of classes, cost and environment, with and without newer records."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kdsurgeon import demo
from kdsurgeon.cli.reporting import environment_lines, model_rows, read_evaluation
from kdsurgeon.evaluation import ClassCounts, Report, evaluate
from kdsurgeon.stones import partition, synthesize
from kdsurgeon.views import Row, palette, run_report
from kdsurgeon.views.charts import LETTER, NARROW, WIDE, line_chart
from kdsurgeon.views.classes import MOST_GAINED, MOST_LOST, class_changes
from kdsurgeon.views.page import DARK, LIGHT
from kdsurgeon.views.pareto import Rung, on_the_curve, pareto_chart

SVG = "{http://www.w3.org/2000/svg}"
MODELS = (
    Row("teacher", 0.98, 887_000, 3_610_000),
    Row("student", 0.94, 3_730, 21_400),
    Row("stone 1", 0.96, 869_000, 2_440_000),
)


def an_epoch(number: int, **more: object) -> dict[str, object]:
    return {"epoch": number, "losses": {"total": 1.0}, "accuracy": 0.5, "seconds": 1.0, **more}


def words(page: str) -> str:
    return re.sub(r"<[^>]+>", " ", page).replace("&nbsp;", " ")


def charts(page: str) -> list[ET.Element]:
    found = re.findall(r'<div class="chart wide">(<svg.*?</svg>)', page, re.DOTALL)
    return [ET.fromstring(svg) for svg in found]


# ── classes ──────────────────────────────────────────────────────────────────────────────────────


class Small(nn.Module):
    """One convolution and a head: any answers will do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.head = nn.Linear(width, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(images)).mean((2, 3)))


@pytest.fixture(scope="module")
def measured() -> tuple[Report, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A report, and the labels and answers that it must follow from."""
    torch.manual_seed(0)
    teacher, student = Small(8).eval(), Small(4).eval()
    images = torch.randn(60, 1, 6, 6) + 4 * torch.randn(60, 1, 1, 1)
    with torch.inference_mode():  # every class is somebody's answer
        for model in (teacher, student):
            model.head.bias -= model(images).mean(0)
    labels = torch.randint(0, 3, (60,))
    labels[::7] = -1  # no class
    plan = partition(teacher, student, images[:2])
    report = evaluate(synthesize(plan), [(images[:40], labels[:40]), (images[40:], labels[40:])])
    with torch.inference_mode():
        return report, labels, teacher(images).argmax(1), student(images).argmax(1)


def test_each_class_is_counted_as_its_samples_say(measured):
    report, labels, teacher, student = measured
    assert len(report.classes) == 3
    for index, counts in enumerate(report.classes):
        own = labels == index
        assert counts.samples == int(own.sum()) > 0
        assert counts.teacher == int((teacher[own] == index).sum())
        assert counts.student == int((student[own] == index).sum())
        assert counts.lost == int(((teacher == index) & (student != index) & own).sum())
        assert counts.gained == int(((teacher != index) & (student == index) & own).sum())
    assert sum(counts.samples for counts in report.classes) == int((labels >= 0).sum()) < 60
    assert sum(counts.lost for counts in report.classes) > 0


def test_what_was_found_at_the_end_comes_back_from_its_record(measured, tmp_path):
    report = measured[0]
    assert read_evaluation(tmp_path) is None, "older runs have none"
    record = tmp_path / "evaluation.json"
    record.write_text(json.dumps(asdict(report)), encoding="utf-8")
    assert read_evaluation(tmp_path) == report
    record.write_text('{"samples": 3}', encoding="utf-8")
    assert read_evaluation(tmp_path) is None


def test_the_class_that_lost_most_stands_first_and_is_named():
    counts = [ClassCounts(10, 9, 9, 1), ClassCounts(20, 20, 12, 8), ClassCounts(40, 30, 34, 0)]
    page = class_changes([("cat", counts[0]), ("dog", counts[1]), ("owl", counts[2])])
    text = words(page)
    assert "The student loses most on dog: −40.0 points." in text
    assert "It gains most on owl: +10.0 points." in text
    assert "One sample is 10.0 points of the class that has fewest." in text
    assert re.findall(r"<tr><td>(\w+)</td>", page) == ["dog", "cat", "owl"]
    widths = [float(rect.attrib["width"]) for rect in bars(page)]
    assert widths == [58.0, 0.0, 14.5], "by the largest change"
    assert [float(bar.attrib["x"]) < 60 for bar in bars(page)] == [True, False, False]


def bars(page: str) -> list[ET.Element]:
    found = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    return [rect for svg in found for rect in svg.findall(f"{SVG}rect")]


def test_of_many_classes_those_that_changed_least_are_left_out():
    classes = [(f"class{n}", ClassCounts(100, 50, n, max(0, 50 - n))) for n in range(100)]
    page = class_changes(classes)
    shown = re.findall(r"<td>(class\d+)</td>", page)
    lost, gained = range(MOST_LOST), range(100 - MOST_GAINED, 100)
    assert shown == [f"class{n}" for n in (*lost, *gained)]
    assert "60 classes that change less are left out." in words(page)


def test_classes_without_samples_and_without_change_are_no_trouble():
    empty, same = ClassCounts(0, 0, 0, 0), ClassCounts(5, 4, 4, 1)
    assert "as accurate as its teacher on every class" in words(class_changes([("a", same)]))
    assert re.findall(r"<td>(\w)</td>", class_changes([("a", same), ("b", empty)])) == ["a"]
    assert "No class has a sample." in class_changes([("b", empty)])


# ── cost ─────────────────────────────────────────────────────────────────────────────────────────


RUNGS = st.lists(
    st.builds(Rung, st.text("ab", max_size=2), st.sampled_from([1.0, 2.0, 5.0, 40.0, 41.0]),
              st.sampled_from([0.1, 0.5, 0.9, 0.91])), min_size=1, max_size=8,
)  # fmt: skip


@given(RUNGS)
def test_on_the_curve_is_what_no_other_beats(rungs):
    best = on_the_curve(rungs)
    for rung in rungs:
        is_beaten = any(
            other.cost <= rung.cost
            and other.accuracy >= rung.accuracy
            and (other.cost, other.accuracy) != (rung.cost, rung.accuracy)
            for other in rungs
        )
        assert (rung in best) == (not is_beaten)


@pytest.mark.parametrize("frame", [WIDE, NARROW])
@given(rungs=RUNGS)
def test_every_model_is_drawn_and_named_inside_the_picture(frame, rungs):
    rungs = [Rung(f"model {n}", rung.cost, rung.accuracy) for n, rung in enumerate(rungs)]
    chart = ET.fromstring(pareto_chart(rungs, title="t", unit="ms", text=str, frame=frame))
    assert len(chart.findall(f"{SVG}circle")) == len(rungs)
    names = [text for text in chart.iter(f"{SVG}text") if (text.text or "").startswith("model")]
    assert sorted(name.text or "" for name in names) == sorted(rung.name for rung in rungs)
    for name in names:
        half = LETTER * len(name.text or "") / 2
        assert half <= float(name.attrib["x"]) <= frame.width - half
        assert 0 < float(name.attrib["y"]) < frame.height
    best = on_the_curve(rungs)
    filled = [c for c in chart.iter(f"{SVG}circle") if c.attrib["class"].startswith("mark")]
    assert len(filled) == len(best)
    line = chart.find(f"{SVG}polyline")
    assert (line is None) == (len(best) < 2)
    if line is not None:
        assert len(line.attrib["points"].split()) == len(best)


def test_names_of_rungs_far_apart_cover_no_dot_and_no_other_name():
    rungs = [Rung("student", 21_400, 0.94), Rung("stone 4", 32_100, 0.96)]
    rungs += [Rung("stone 1", 2_440_000, 0.95), Rung("teacher", 3_610_000, 0.98)]
    for frame in (WIDE, NARROW):
        chart = ET.fromstring(pareto_chart(rungs, title="", unit="", text=str, frame=frame))
        names = [t for t in chart.iter(f"{SVG}text") if t.text in {rung.name for rung in rungs}]
        boxes = [box(name) for name in names]
        dots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in chart.iter(f"{SVG}circle")]
        assert not any(one is not other and meet(one, other) for one in boxes for other in boxes)
        assert not any(meet(each, (x - 5, y - 5, x + 5, y + 5)) for each in boxes for x, y in dots)


def test_a_name_stands_beside_its_dot_or_a_line_leads_to_it():
    lone = [Rung("student", 399_000, 0.2125), Rung("stone 3", 565_000, 0.55)]
    lone += [Rung("stone 2", 973_000, 0.825), Rung("teacher", 1_490_000, 1.0)]
    crowd = [Rung(f"stone {n}", 1_000_000 + n, 0.5) for n in range(9)]
    for rungs, frame in product((lone, crowd), (WIDE, NARROW)):
        chart = ET.fromstring(pareto_chart(rungs, title="", unit="", text=str, frame=frame))
        dots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in chart.iter(f"{SVG}circle")]
        names = {t.text: box(t) for t in chart.iter(f"{SVG}text")}
        far = 0
        for rung, (x, y) in zip(rungs, dots, strict=True):
            left, top, right, bottom = names[rung.name]
            away = math.dist((x, y), (min(max(x, left), right), min(max(y, top), bottom)))
            far += away > 20
        assert far <= len(list(chart.iter(f"{SVG}path")))
        assert (far > 0) == (rungs is crowd)


def box(name: ET.Element) -> tuple[float, float, float, float]:
    x, y, half = float(name.attrib["x"]), float(name.attrib["y"]), LETTER * len(name.text or "") / 2
    return x - half, y - 12, x + half, y + 3


def meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_a_page_plots_accuracy_against_multiply_adds_and_measured_latency():
    final = Report(450, 0.94, 0.98, {1: 0.96}, 0.93, {1: 0.95})
    exported = [Row("student", 0.93, 1, 2, 20_000, 0.014), Row("teacher", 0.98, 1, 2, 3_000, 0.09)]
    page = run_report("run", config="", epochs=[], final=final, models=MODELS, exported=exported)
    titles = [chart.findtext(f"{SVG}title") or "" for chart in charts(page)]
    assert [title.split(" of")[0] for title in titles] == [
        "accuracy against multiply-adds", "accuracy against latency",
    ]  # fmt: skip
    text = " ".join(words(page).split())
    assert "teacher 98.0 % 3.61 M 887 k – student 94.0 % 21.4 k 3.73 k 93.0 %" in text
    assert "student 93.0 % 0.014 ms 20.0 kB" in text


def test_a_picture_speaks_of_a_line_only_where_it_has_one():
    bests = {"student": "The line joins", "teacher": "No other is as accurate as teacher"}
    for fast, finding in bests.items():
        exported = [
            Row("student", 0.9, latency_ms=0.1 if fast == "student" else 0.3),
            Row("teacher", 0.98, latency_ms=0.2),
        ]
        page = run_report("run", config="", epochs=[], exported=exported)
        (chart,) = charts(page)
        assert (chart.find(f"{SVG}polyline") is None) == ("The line joins" not in page)
        assert finding in page and "Hollow" not in page


def test_the_page_of_a_ladder_says_which_epoch_each_figure_is_of():
    epochs = [an_epoch(n, accuracy=1 - n / 10) for n in (1, 2, 3)]
    final = Report(450, 0.7, 0.98, {1: 0.8}, 0.7, {1: 0.8})
    exported = [Row("student", 0.9, latency_ms=0.1), Row("teacher", 0.98, latency_ms=0.2)]

    def told(epoch: int | None) -> str:
        known = {"final": final, "models": MODELS, "exported": exported, "exported_epoch": epoch}
        return words(run_report("run", config="", epochs=epochs, **known))

    for epoch in (1, 2, 3):
        assert "Measured after epoch 3, the last." in told(epoch)
        assert f"Student and stones are those of epoch {epoch}." in told(epoch)
        assert (f"The exported files are of epoch {epoch}, " in told(epoch)) == (epoch != 3)
    assert "90.0 % at best (epoch 1)" in told(1)
    assert "exported files are of epoch" not in told(None)
    assert "Student and stones are those" not in told(None)


def test_a_page_without_two_known_models_plots_no_curve():
    for models in ([], [MODELS[0]], [MODELS[0], Row("student", None, 1, 2)]):
        page = run_report("run", config="", epochs=[], models=models)
        assert charts(page) == [] and "What accuracy costs" not in page


def test_the_costs_of_a_run_are_those_of_its_plan():
    plan = partition(demo.build("teacher"), demo.build("student"), torch.zeros(2, 1, 8, 8))
    rows = {
        row.name: row for row in model_rows(plan, {"teacher": 0.9, "student": None, "stone 4": 0.8})
    }
    assert list(rows) == ["teacher", "student", "stone 4"]
    assert rows["teacher"].multiply_adds == plan.teacher.cost.multiply_adds
    assert rows["student"].parameters == 3_730 and rows["student"].accuracy is None
    assert rows["student"].multiply_adds < rows["stone 4"].multiply_adds


# ── curves ───────────────────────────────────────────────────────────────────────────────────────


def test_the_accuracy_of_every_stone_is_drawn_where_the_run_measured_it():
    old = [an_epoch(number) for number in (1, 2, 3)]
    new = [
        an_epoch(n, stones={"stone 1": 0.6, "stone 2": 0.7 if n > 1 else None}) for n in (1, 2, 3)
    ]
    for epochs, lines in ((old, 1), (new, 3), ([old[0], *new[1:]], 3)):
        accuracy, loss = charts(run_report("run", config="", epochs=epochs))
        assert accuracy.findtext(f"{SVG}title") == "accuracy by epoch"
        assert len(accuracy.findall(f"{SVG}polyline")) == lines
        assert loss.findtext(f"{SVG}title") == "total by epoch"
    page = run_report("run", config="", epochs=new)
    assert "stone 2 70 %" in [text.text for text in charts(page)[0].iter(f"{SVG}text")]
    assert page.count('<td class="number">60.0&nbsp;%</td>') == 3


def test_series_of_one_epoch_are_numbers_and_no_chart():
    losses = {"total": 0.0, "cross student": 0.25}
    page = run_report("run", config="", epochs=[an_epoch(1, losses=losses)], teacher_accuracy=0.9)
    assert charts(page) == []
    assert page.count("Of epoch 1 only: no curve yet.") == 3
    for name, value in (
        ("teacher", "90 %"),
        ("student", "50 %"),
        ("student", "0.25"),
        ("total", 0),
    ):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    late = [an_epoch(1), an_epoch(2, losses=losses)]
    titles = [
        chart.findtext(f"{SVG}title") for chart in charts(run_report("", config="", epochs=late))
    ]
    assert titles == ["accuracy by epoch", "total by epoch"]


def test_a_learner_has_one_colour_on_the_whole_page():
    names = ["student", *(f"stone {depth}" for depth in range(1, palette.NUM_HUES + 1))]
    losses = {f"ce {name}": 0.1 * n for n, name in enumerate(names)}
    stones = {name: 0.1 * n for n, name in enumerate(names) if n}
    epochs = [an_epoch(n, losses=losses, stones=stones) for n in (1, 2)]
    rows = [Row(name, 0.1 * n, 1, 2 + n) for n, name in enumerate(["teacher", *names], start=1)]
    page = run_report("run", config="", epochs=epochs, models=rows, teacher_accuracy=0.9)
    found: dict[str, set[str]] = {name: set() for name in ["teacher", *names]}
    costs, *curves = charts(page)
    for circle in costs.findall(f"{SVG}circle"):
        name = (circle.findtext(f"{SVG}title") or "").split(":")[0]
        found[name].add(circle.attrib["class"].split("-")[1])
    for text in (text for chart in curves for text in chart.iter(f"{SVG}text")):
        if text.attrib["class"].startswith("mark-"):
            name = (text.text or "").rsplit(" ", 2 if "%" in (text.text or "") else 1)[0]
            found[name].add(text.attrib["class"].split("-")[1])
    for depth in range(1, palette.NUM_HUES + 1):
        assert found[f"stone {depth}"] == {palette.hue(depth - 1)}, "as the plan's boundary"
    assert all(len(hues) == 1 for hues in found.values())
    assert len(set.union(*found.values())) == len(found), "no two share one"


@pytest.mark.parametrize("frame", [WIDE, NARROW])
def test_a_tick_leads_from_each_line_to_its_label_and_the_teacher_lies_on_top(frame):
    series = {"stone 1": 0.885, "stone 2": 1.0, "stone 3": 1.0, "student": 0.729}
    points = {name: [(1, 0.2), (3, value)] for name, value in series.items()}
    chart = ET.fromstring(
        line_chart(points, title="", text="{:g}".format, level=("teacher", 1.0), frame=frame)
    )
    drawn = list(chart)
    (level,) = chart.findall(f"{SVG}line[@stroke-dasharray]")
    lines = chart.findall(f"{SVG}polyline")
    assert len(lines) == 4 and all(drawn.index(line) < drawn.index(level) for line in lines)
    assert all(float(level.attrib["stroke-width"]) > float(w.attrib["stroke-width"]) for w in lines)
    ends = {line.attrib["class"]: float(line.attrib["points"].split(",")[-1]) for line in lines}
    ends[level.attrib["class"]] = float(level.attrib["y2"])
    labels = [t for t in chart.iter(f"{SVG}text") if t.attrib["class"].startswith("mark-")]
    ticks = {tick.attrib["class"]: tick.attrib["d"].split() for tick in chart.iter(f"{SVG}path")}
    assert (labels[0].text or "").startswith("teacher"), "of equals, the first"
    assert len(ticks) == len(labels) == 5
    for label in labels:
        wire = label.attrib["class"].replace("mark", "wire")
        _, start_x, start_y, _, end_x, end_y = ticks[wire]
        assert float(start_y) == ends[wire]
        assert float(end_y) == pytest.approx(float(label.attrib["y"]) - 4.5, abs=0.11)
        assert frame.width - frame.right < float(start_x) < float(end_x) < float(label.attrib["x"])


def test_a_moving_average_has_a_line_of_its_own():
    epochs = [an_epoch(number, ema_accuracy=0.4) for number in (1, 2)]
    accuracy, _ = charts(run_report("run", config="", epochs=epochs))
    assert "average 40 %" in [text.text for text in accuracy.iter(f"{SVG}text")]


def test_a_narrow_chart_keeps_its_letters_inside():
    series = {f"a loss with a long name {n}": [(1, 0.123), (30, 0.456)] for n in range(20)}
    chart = ET.fromstring(line_chart(series, title="loss", text="{:.3g}".format, frame=NARROW))
    assert float(chart.attrib["height"]) > NARROW.height, "it grows with its labels"
    for text in chart.iter(f"{SVG}text"):
        if text.attrib["text-anchor"] == "start":
            assert float(text.attrib["x"]) + LETTER * len(text.text or "") <= NARROW.width
        assert 0 < float(text.attrib["y"]) <= float(chart.attrib["height"])
    titles = {title.text for title in chart.iter(f"{SVG}title")}
    assert "a loss with a long name 7" in titles, "a shortened name keeps the whole one"


# ── environment, colours ─────────────────────────────────────────────────────────────────────────


def test_the_environment_is_told_in_words():
    record = {
        "command": ["kdsurgeon", "distill"], "packages": {"torch": "2.13.0", "onnx": None},
        "git": {"commit": "abc", "changed": True}, "cuda": None, "exact": True, "threads": 2,
        "teacher": {"source": "t.pt", "sha256": "12"}, "teacher_accuracy": 0.5,
    }  # fmt: skip
    assert environment_lines(record) == {
        "command": "kdsurgeon distill", "packages": "torch 2.13.0", "git": "abc, with changes",
        "exact": "yes", "threads": "2", "teacher": "source t.pt, sha256 12",
    }  # fmt: skip
    assert environment_lines({"git": None, "packages": 3}) == {"packages": "3"}
    page = run_report("run", config="", epochs=[], environment=environment_lines(record))
    assert "<dt>git</dt><dd>abc, with changes</dd>" in page


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_every_text_can_be_read_on_light_and_on_dark_pages():
    assert round(contrast("#000000", "#ffffff"), 1) == 21.0
    hues = [palette.hue(index) for index in range(palette.NUM_HUES)]
    for mode, colours in (("light", LIGHT), ("dark", DARK)):
        for name in ("ink", "faint", "better", "worse"):
            assert contrast(colours[name], colours["page"]) >= 4.5, (mode, name)
        assert contrast(colours["ink"], colours["soft"]) >= 4.5
        paints = {role: painted(role, mode) for role in ("ink", "faint")}
        for hue in (*hues, palette.HEAD):
            card = painted(f"card-{hue}", mode)
            assert contrast(painted(f"mark-{hue}", mode), colours["page"]) >= 4.5, (mode, hue)
            assert all(contrast(colour, card) >= 4.5 for colour in paints.values()), (mode, hue)


def painted(role: str, mode: str) -> str:
    if mode == "light":
        return palette.painted(role)["fill"]
    found = re.search(rf"\.kdsurgeon \.{role} {{ fill: (#\w+);", palette.DARK)
    assert found is not None
    return found[1]
