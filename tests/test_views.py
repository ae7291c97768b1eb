"""Pictures and tables: nothing is cut off, nothing overlaps, and names are only ever text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType
from torch import Tensor, nn

from kdsurgeon import demo
from kdsurgeon.adapters import AdapterSpec
from kdsurgeon.costs import Cost
from kdsurgeon.evaluation import Report
from kdsurgeon.layouts import Activation
from kdsurgeon.partitioning import Partition, cut
from kdsurgeon.stones import Certificate, Forecast, Plan, certify, forecast, partition
from kdsurgeon.tracing import trace
from kdsurgeon.views import (
    Row,
    accuracy_table,
    comparison_table,
    cut_points_table,
    draw_plan,
    explain_table,
    plan_page,
    plan_table,
    run_report,
)
from kdsurgeon.views.blocks import describe_blocks
from kdsurgeon.views.charts import line_chart
from kdsurgeon.views.drawing import WIDTH
from kdsurgeon.views.units import middle_cut

GOLDEN = Path(__file__).parent / "golden"
EXACT = Certificate(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4)
SVG = "{http://www.w3.org/2000/svg}"
LONG_NAME = "feature_extraction_backbone_with_squeeze_and_excitation"
SOME_COST = Forecast(100, 349, 1_000, 1_790, 15_400, (1, 2, 3, 4))


class Chain(nn.Module):
    """Convolutions in a row, all of one width and resolution, under names of any kind."""

    def __init__(self, names: list[str], width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for index, name in enumerate(names):
            self.layers.add_module(name, nn.Conv2d(1 if index == 0 else width, width, 3, 1, 1))
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean((2, 3)))


@cache
def demo_plan(blocks: int | None = None) -> Plan:
    teacher, student = demo.build("teacher"), demo.build("student")
    return partition(teacher, student, torch.zeros(2, 1, 8, 8), blocks=blocks or "auto")


@cache
def chain_plan(count: int, prefix: str = "unit") -> Plan:
    names = [f"{prefix}{index}" for index in range(count)]
    pairs = [(f"layers.{name}", f"layers.{name}") for name in names]
    example = torch.zeros(2, 1, 8, 8)
    return partition(Chain(names, 8), Chain(names, 4), example, pairs=pairs)


def with_costs(plan: Plan, teacher: list[int], student: list[int]) -> Plan:
    """The same plan, as if its blocks cost this many multiply-adds."""

    def recosted(whole: Partition, costs: list[int]) -> Partition:
        pairs = zip(whole.blocks, costs, strict=True)
        return replace(whole, blocks=tuple(replace(b, cost=Cost(c, c, c)) for b, c in pairs))

    both = (recosted(plan.teacher, teacher), recosted(plan.student, student))
    return replace(plan, alignment=replace(plan.alignment, teacher=both[0], student=both[1]))


def named(plan: Plan, name: str) -> Plan:
    """The same plan, as if the teacher were called this."""
    teacher = replace(plan.teacher, trace=replace(plan.teacher.trace, name=name))
    return replace(plan, alignment=replace(plan.alignment, teacher=teacher))


def printed(renderable: RenderableType, width: int) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def every_table() -> list[RenderableType]:
    plan, long = demo_plan(), chain_plan(4, LONG_NAME)
    report = Report(360, 0.95, 0.97, {1: 0.9, 2: 0.91}, 0.9, {1: 0.8, 2: 0.9})
    captured = trace(Chain([LONG_NAME], 4), torch.zeros(2, 1, 8, 8), name=f"source/{LONG_NAME}")
    return [
        cut_points_table(captured),
        plan_table(plan, SOME_COST, EXACT),
        plan_table(long, SOME_COST, EXACT),
        explain_table(plan),
        explain_table(long),
        accuracy_table(report),
        comparison_table([Row("teacher", 0.978, 887_000, 3_610_000, 3_600_000, 12.34)]),
    ]


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def test_the_plan_of_the_demo_pair_is_printed_as_the_golden_text():
    plan = demo_plan()
    golden = (GOLDEN / "plan_demo.txt").read_text(encoding="utf-8")
    assert printed(plan_table(plan, forecast(plan), EXACT), 100) == golden


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_line_of_a_table_is_longer_than_the_terminal(width):
    for table in every_table():
        lines = printed(table, width).splitlines()
        assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_numbers_and_shapes_survive_a_narrow_terminal_and_only_names_are_shortened(width):
    plan = chain_plan(4, LONG_NAME)
    text = printed(plan_table(plan, SOME_COST), width)
    for block in describe_blocks(plan.teacher):
        assert "×".join(map(str, block.shape)) in text
    assert "0.125" in text
    assert re.search(r"layers\S*…\S+[0-3]\b", text)


def test_a_long_name_stands_on_one_line_in_the_list_of_cut_points():
    captured = trace(Chain([LONG_NAME * 2], 4), torch.zeros(2, 1, 8, 8))
    lines = printed(cut_points_table(captured), 80).splitlines()
    assert sum("4×8×8" in line for line in lines) == 1
    assert any(re.search(r"layers\.\S+…\S+excitation +4×8×8", line) for line in lines)


def test_the_list_of_cut_points_shows_every_one_and_how_the_model_was_traced():
    captured = trace(demo.build("teacher"), torch.zeros(2, 1, 8, 8), name="demo/teacher")
    lost = replace(captured, lost=("the hook on stem.0",))
    text = printed(cut_points_table(lost), 80)
    assert "demo/teacher  887 k parameters, 3.61 M multiply-adds for one 1×8×8 input" in text
    assert "traced by fx, 18 cut points" in text
    assert "lost in the trace: the hook on stem.0" in text
    assert re.search(r"stages\.0\.relu_1 +32×8×8 +map +8×8 +33\.\d % +●", text)
    assert re.search(r"flatten +192 +vector +– +99\.9 % +●\n", text)


def test_names_that_look_like_markup_are_printed_as_they_are():
    text = printed(plan_table(chain_plan(1, "[red]"), SOME_COST), 100)
    assert "layers.[red]0" in text


def test_a_plan_that_was_not_checked_claims_no_check():
    assert "check" not in printed(plan_table(demo_plan(), SOME_COST), 100)
    assert "merged tails 1.2e-07" in printed(
        plan_table(demo_plan(), SOME_COST, Certificate(0.0, 0.0, 0.0, 0.0, 0.0, 1.2e-7, 4)), 100
    )


def test_the_check_of_the_demo_pair_finds_its_blocks_exact():
    checked = certify(demo_plan())
    assert checked.teacher_training == checked.student_training == 0.0
    assert "teacher 0, student 0" in printed(plan_table(demo_plan(), SOME_COST, checked), 100)


def test_every_boundary_is_explained_by_term_and_by_its_runner_up():
    plan = demo_plan()
    text = printed(explain_table(plan), 120)
    for boundary in plan.alignment.boundaries:
        assert f"cost {boundary.cost:>11.3f}" in text
        for term in boundary.evidence:
            assert term in text
        if boundary.runner_up:
            assert f"{boundary.runner_up.extra_cost:+.3f}" in text
            assert boundary.runner_up.student.name in text
    assert text.count("none") == sum(b.runner_up is None for b in plan.alignment.boundaries)


def test_a_boundary_that_was_named_by_hand_says_so():
    assert "by hand" in printed(explain_table(chain_plan(2)), 80)


def test_every_stone_has_its_accuracy_and_agreement():
    report = Report(360, 0.95, 0.97, {2: 0.91, 1: 0.9}, 0.945, {1: 0.805, 2: 0.902})
    rows = [line.split() for line in printed(accuracy_table(report), 80).splitlines()]
    assert ["teacher", "97.0", "%", "–"] in rows
    assert ["student", "95.0", "%", "94.5", "%"] in rows
    assert rows.index(["stone", "1", "90.0", "%", "80.5", "%"]) < rows.index(
        ["stone", "2", "91.0", "%", "90.2", "%"]
    )


def test_a_comparison_has_units_and_a_dash_for_what_is_unknown():
    rows = [Row("teacher", 0.9778, 887_000, 3_612_000, 3_600_000, 0.2123), Row("int8")]
    text = printed(comparison_table(rows), 80)
    assert re.search(r"teacher +97\.8 % +887 k +3\.61 M +3\.60 MB +0\.21 ms\n", text)
    assert re.search(r"int8( +–){5}\n", text)
    ends = {len(line) for line in text.splitlines() if "teacher" in line or "int8" in line}
    assert len(ends) == 1, "numbers are right-aligned"


@given(st.text(max_size=60), st.integers(0, 60))
def test_a_shortened_name_fits_and_keeps_both_ends(name, width):
    short = middle_cut(name, width)
    assert len(short) <= width
    if len(name) <= width:
        assert len(short) == len(name)
    elif width > 2:
        assert "…" in short
        assert short.isprintable()


# ── the drawing ──────────────────────────────────────────────────────────────────────────────────


def boxes(svg: ET.Element, kind: str) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of the rectangle in every group of this class."""
    found = []
    for rect in svg.findall(f".//{SVG}g[@class='{kind}']/{SVG}rect"):
        x, y, width, height = (float(rect.attrib[n]) for n in ("x", "y", "width", "height"))
        found.append((x, y, x + width, y + height))
    return found


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return max(one[0], other[0]) < min(one[2], other[2]) and max(one[1], other[1]) < min(
        one[3], other[3]
    )


def numbers(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def curve(points: list[float]) -> list[tuple[float, float]]:
    """41 points on the cubic Bézier curve of four control points."""
    x0, y0, x1, y1, x2, y2, x3, y3 = points
    times = [index / 40 for index in range(41)]
    shares = [((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3) for t in times]
    return [
        (a * x0 + b * x1 + c * x2 + d * x3, a * y0 + b * y1 + c * y2 + d * y3)
        for a, b, c, d in shares
    ]


def check_drawing(plan: Plan) -> None:
    svg = ET.fromstring(draw_plan(plan, SOME_COST))
    height = float(svg.attrib["height"])
    blocks, labels = boxes(svg, "block"), boxes(svg, "boundary")
    assert len(blocks) == 2 * (len(plan.stones) + 1)
    assert len(labels) == len(plan.stones)
    for one, other in combinations([*blocks, *labels], 2):
        assert not overlap(one, other)
    for left, top, right, bottom in [*blocks, *labels]:
        assert left >= 0 and top >= 0 and right <= WIDTH and bottom <= height
    for group, (_, top, _, bottom) in zip(
        svg.findall(f".//{SVG}g[@class='block']"), blocks, strict=True
    ):
        lines = [float(text.attrib["y"]) for text in group.findall(f"{SVG}text")]
        assert top + 12 < min(lines) and max(lines) < bottom - 4
    paths = [
        numbers(group.findall(f"{SVG}path")[0].attrib["d"])
        for group in svg.findall(f".//{SVG}g[@class='boundary']")
    ]
    for above, below in pairwise(paths):  # the same x on every path, so only y can collide
        for side in (slice(0, 8), slice(8, 16)):
            for (x, y), (same_x, lower) in zip(curve(above[side]), curve(below[side]), strict=True):
                assert x == same_x
                assert lower - y > 40
    for path in paths:
        for x, y in [*curve(path[:8])[:-1], *curve(path[8:])[1:]]:
            assert not any(box[0] < x < box[2] and box[1] < y < box[3] for box in labels + blocks)


@pytest.mark.parametrize("count", range(1, 9))
def test_nothing_overlaps_and_every_boundary_is_drawn(count):
    check_drawing(chain_plan(count))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8).flatmap(
        lambda count: st.tuples(
            *[
                st.lists(st.integers(0, 10**9), min_size=count + 1, max_size=count + 1)
                for _ in range(2)
            ]
        )
    )
)
@example(([0, 0], [1, 0]))
@example(([1000, *[0] * 8], [*[0] * 8, 1000]))  # the worst slant
def test_nothing_overlaps_whatever_the_shares(costs):
    check_drawing(with_costs(chain_plan(len(costs[0]) - 1), *costs))


def test_a_block_with_more_compute_is_drawn_taller():
    plan = with_costs(chain_plan(2), [70, 20, 10], [10, 20, 70])
    svg = ET.fromstring(draw_plan(plan, SOME_COST))
    heights = [bottom - top for _, top, _, bottom in boxes(svg, "block")]
    teacher, student = heights[:3], heights[3:]
    assert teacher[0] > teacher[1] > teacher[2]
    assert student == teacher[::-1]


def test_paired_blocks_share_a_colour_and_neighbours_do_not():
    svg = ET.fromstring(draw_plan(chain_plan(8), SOME_COST))
    fills = [rect.attrib["fill"] for rect in svg.findall(f".//{SVG}g[@class='block']/{SVG}rect")]
    assert fills[:9] == fills[9:]
    assert len(set(fills)) == 9


def test_every_boundary_shows_its_adapter_its_stone_and_both_tensors():
    plan = demo_plan()
    svg = ET.fromstring(draw_plan(plan, forecast(plan)))
    groups = svg.findall(f".//{SVG}g[@class='boundary']")
    for group, stone, pair in zip(groups, plan.stones, plan.alignment.boundaries, strict=True):
        words = [text.text for text in group.findall(f"{SVG}text")]
        assert str(stone) in words
        assert f"stone {stone.depth} · weight {stone.weight:g}" in words
        for point in (pair.teacher, pair.student):
            assert {point.name, "×".join(map(str, point.shape))} <= set(words)


def map_of(channels, size):
    return Activation("x", (channels, size, size), "BCHW", (size, size), is_rectified=True)


def test_the_longest_adapters_fit_their_label():
    wide = AdapterSpec("resize", map_of(2048, 112), map_of(2048, 224))
    deconv = AdapterSpec("upsample", map_of(1024, 112), map_of(2048, 224))
    plan = chain_plan(2)
    stones = [replace(s, adapters=(a,)) for s, a in zip(plan.stones, (wide, deconv), strict=True)]
    svg = ET.fromstring(draw_plan(replace(plan, stones=tuple(stones)), SOME_COST))
    groups = svg.findall(f".//{SVG}g[@class='boundary']")
    for group, (left, top, right, bottom) in zip(groups, boxes(svg, "boundary"), strict=True):
        lines = [t for t in group.findall(f"{SVG}text") if t.get("text-anchor") == "middle"]
        assert len(lines) > 1
        for line in lines:
            assert len(line.text or "") * float(line.attrib["font-size"]) * 0.6 <= right - left
            assert top < float(line.attrib["y"]) < bottom - 4


def test_a_block_says_its_share_its_cost_and_its_operations():
    plan = demo_plan()
    svg = ET.fromstring(draw_plan(plan, forecast(plan)))
    words = [text.text for text in svg.findall(f".//{SVG}g[@class='block']/{SVG}text")]
    assert words[:4] == [
        "block 1",
        "33 % of compute",
        "18.9 k parameters · 1.20 M multiply-adds",
        "3 conv, 3 BN, 3 ReLU, 1 add",
    ]
    assert "one training step costs 3.49 × plain distillation" in (
        svg.find(f"{SVG}text").text or ""
    )


def test_every_line_of_text_is_legible_and_within_the_page():
    plan = chain_plan(8, LONG_NAME)
    svg = ET.fromstring(draw_plan(plan, SOME_COST))
    for text in svg.iter(f"{SVG}text"):
        size, x = float(text.attrib["font-size"]), float(text.attrib["x"])
        assert size >= 12
        extent = len(text.text or "") * size * 0.55
        start = {"end": x - extent, "middle": x - extent / 2}.get(
            text.attrib.get("text-anchor", "start"), x
        )
        assert start >= 0 and start + extent <= WIDTH


def test_a_shortened_name_carries_the_whole_name_as_its_title():
    svg = ET.fromstring(draw_plan(chain_plan(1, LONG_NAME), SOME_COST))
    titles = [title.text for title in svg.findall(f".//{SVG}text/{SVG}title")]
    assert f"layers.{LONG_NAME}0" in titles


HOSTILE = "<script>&'</svg>"  # no double quote: torch.fx itself cannot write such a name


def test_names_cannot_become_markup():
    plan = named(chain_plan(2, HOSTILE), f'"{HOSTILE}"')
    svg = draw_plan(plan, SOME_COST)
    assert "<script" not in svg
    words = [text.text or "" for text in ET.fromstring(svg).iter(f"{SVG}text")]
    assert f"layers.{HOSTILE}0" in words
    for page in (
        plan_page(plan, SOME_COST, EXACT),
        run_report(HOSTILE, config=HOSTILE, epochs=[an_epoch(1, HOSTILE)], notes=[HOSTILE]),
    ):
        assert "<script" not in page
        assert "&lt;script&gt;&amp;" in page


def test_control_characters_in_names_leave_the_drawing_well_formed():
    plan = named(chain_plan(1), "a\x00\x1b[2J")
    words = [text.text for text in ET.fromstring(draw_plan(plan, SOME_COST)).iter(f"{SVG}text")]
    assert "teacher: a��[2J" in words
    assert "a��[2J" in printed(plan_table(plan, SOME_COST), 80)
    assert "\x1b" not in plan_page(plan, SOME_COST)


def test_the_same_plan_gives_the_same_bytes():
    again = partition(demo.build("teacher"), demo.build("student"), torch.zeros(4, 1, 8, 8))
    assert draw_plan(again, forecast(again)) == draw_plan(demo_plan(), forecast(demo_plan()))


def test_the_drawing_of_the_demo_pair_is_the_golden_one():
    plan = demo_plan()
    golden = (GOLDEN / "plan_demo.svg").read_text(encoding="utf-8")
    assert draw_plan(plan, forecast(plan)) == golden


def test_operations_are_counted_in_words_and_bookkeeping_is_left_out():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(4, 8, 3, groups=2)
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
            self.drop = nn.Dropout()
            self.act = nn.Hardswish()
            self.head = nn.Linear(8, 3)

        def forward(self, images: Tensor) -> Tensor:
            x = self.act(self.depthwise(self.grouped(images)))
            x = self.drop(torch.cat([x, x * 2], 1)[:, :8])
            return self.head(nn.functional.adaptive_avg_pool2d(x, 1).view(x.shape[0], -1))

    captured = trace(Mixed(), torch.zeros(2, 4, 8, 8))
    (block,) = describe_blocks(cut(captured, ()))
    assert dict(block.operations) == {
        "grouped conv": 1,
        "depthwise conv": 1,
        "Hardswish": 1,
        "multiply": 1,
        "concat": 1,
        "avg pool": 1,
        "view": 1,
        "linear": 1,
    }


# ── pages ────────────────────────────────────────────────────────────────────────────────────────


def an_epoch(number: int, *names: str, accuracy: float | None = 0.5) -> dict[str, object]:
    return {
        "epoch": number,
        "losses": dict.fromkeys(names, 1.0 / number),
        "learning_rate": 0.01,
        "accuracy": accuracy,
        "seconds": 2.0,
        "samples": 1400,
    }


def charts(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_of_a_plan_holds_the_drawing_the_blocks_and_the_evidence():
    plan = demo_plan()
    page = plan_page(plan, forecast(plan), EXACT)
    assert draw_plan(plan, forecast(plan)) in page
    assert "largest gap: teacher 0, student 0" in page
    for boundary in plan.alignment.boundaries:
        assert f"<td>{boundary.teacher.name}</td>" in page
        assert f"{boundary.cost:.3f}</td>" in page


def test_pages_load_nothing_from_elsewhere():
    plan = demo_plan()
    svg = draw_plan(plan, SOME_COST)
    report = run_report("run", config="", epochs=[an_epoch(1, "total")], plan_svg=svg)
    for page in (plan_page(plan, SOME_COST), report):
        rest = page.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"http|//|<script|<link|@import|url\(|\bsrc=|href=", rest)


def test_a_report_draws_every_loss_and_the_accuracy_against_the_teachers():
    names = ("total", "ce student", "ce stone 1", "kd student", "kd stone 1")
    epochs = [an_epoch(n, *names, accuracy=n / 10) for n in range(1, 6)]
    final = Report(360, 0.5, 0.97, {1: 0.9}, 0.55, {1: 0.8})
    page = run_report("run", config="epochs: 5", epochs=epochs, final=final, teacher_accuracy=0.97)
    *losses, accuracy = charts(page)
    assert [len(chart.findall(f"{SVG}polyline")) for chart in losses] == [1, 2, 2]
    assert len(accuracy.findall(f"{SVG}polyline")) == 1
    level = accuracy.find(f"{SVG}line[@class='level']")
    student = accuracy.find(f"{SVG}polyline")
    assert level is not None and student is not None and "stroke-dasharray" in level.attrib
    assert float(level.attrib["y1"]) < min(numbers(student.attrib["points"])[1::2])
    assert "<td>student</td>" in page and "epochs: 5" in page
    assert "accuracy 50.0 % after the last epoch, 50.0 % at best" in page
    assert page.count('<td class="number">700</td>') == 5, "images per second, from samples"


def test_a_report_of_a_run_that_has_not_begun_shows_its_configuration():
    page = run_report("run", config="epochs: 5", epochs=[])
    assert "0 epochs" in page and "epochs: 5" in page and not charts(page)


def test_a_report_without_held_out_data_has_no_chart_of_accuracy():
    page = run_report("run", config="", epochs=[an_epoch(1, "total", accuracy=None)])
    assert len(charts(page)) == 1
    assert "1 epoch in 2 s" in page


def test_a_chart_breaks_its_line_where_a_value_is_missing_or_not_finite():
    points = [(1, 3.0), (2, 2.0), (3, math.nan), (4, 2.0), (5, None), (6, 1.0), (7, 1.0)]
    chart = ET.fromstring(line_chart({"total": points}, title="loss"))
    assert len(chart.findall(f"{SVG}polyline")) == 2
    assert len(chart.findall(f"{SVG}circle")) == 5


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
@example([5e-324])
@example([1e6, 1e6 + 1e-9])
def test_a_chart_keeps_its_lines_inside_and_its_labels_apart(values):
    series = {f"part {index}": [(1, value), (2, value)] for index, value in enumerate(values)}
    chart = ET.fromstring(line_chart(series, title="loss"))
    height = float(chart.attrib["height"])
    for line in chart.findall(f"{SVG}polyline"):
        assert all(0 <= y <= height for y in numbers(line.attrib["points"])[1::2])
    labels = [t for t in chart.iter(f"{SVG}text") if (t.text or "").startswith("part ")]
    heights = sorted(float(label.attrib["y"]) for label in labels)
    assert len(labels) == len(values) and heights[-1] <= height
    assert all(lower - upper >= 16 for upper, lower in pairwise(heights))
