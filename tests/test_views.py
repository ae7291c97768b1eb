"""Pictures and tables: nothing is cut off, nothing overlaps, and names are only ever text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import models
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType
from torch import Tensor, nn

from kdsurgeon import demo
from kdsurgeon.adapters import AdapterSpec
from kdsurgeon.alignment import candidates
from kdsurgeon.costs import Cost
from kdsurgeon.evaluation import Report
from kdsurgeon.layouts import Activation
from kdsurgeon.partitioning import Partition, cut, find_cut_points
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
from kdsurgeon.views.blocks import describe_blocks, layout
from kdsurgeon.views.charts import line_chart
from kdsurgeon.views.drawing import NARROW, WIDE, Form, _operation_lines
from kdsurgeon.views.units import middle_cut

GOLDEN = Path(__file__).parent / "golden"
EXACT = Certificate(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4)
SVG = "{http://www.w3.org/2000/svg}"
LONG_NAME = "feature_extraction_backbone_with_squeeze_and_excitation"
SMALL = torch.zeros(2, 1, 8, 8)
SOME_COST = Forecast(100, 349, 200.0, 610.0, 1_000, 1_790, 15_400, (1, 2, 3, 4))


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


class Streams(nn.Module):
    """CrossViT: two streams of other resolution that meet only before the logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, width, 3, 1, 1), nn.Conv2d(3, width, 2, 2)
        self.fines = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in range(3))
        self.coarses = nn.ModuleList(nn.Conv2d(width, width, 5, 1, 2) for _ in range(3))
        self.head = nn.Linear(2 * width, models.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        fine, coarse = self.fine(images), self.coarse(images)
        for one, other in zip(self.fines, self.coarses, strict=True):
            fine, coarse = one(fine), other(coarse)
        return self.head(torch.cat([fine.mean((2, 3)), coarse.mean((2, 3))], 1))


class Tokens(nn.Module):
    """ViT: a map cut into tokens behind a class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, models.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x[:, 0])


PAIRS = {
    "wide teacher": lambda: (Streams(8), models.make("residual")),
    "wide student": lambda: (models.make("residual"), Streams(8)),
    "wide both": lambda: (Streams(8), Streams(4)),
    "tokens": lambda: (Tokens(32), models.make("residual")),
    "to tokens": lambda: (models.make("residual"), Tokens(8)),
    "many tokens": lambda: (Tokens(1024), models.make("residual")),
}


@cache
def plan_of(pair: str) -> Plan:
    images = torch.zeros(2, 3, 64, 64) if pair == "many tokens" else models.images()
    return partition(*PAIRS[pair](), images, names=("source/teacher", "source/student"))


def every_plan() -> list[Plan]:
    return [demo_plan(), chain_plan(4, LONG_NAME), *map(plan_of, PAIRS)]


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
    report = Report(360, 0.95, 0.97, {1: 0.9, 2: 0.91}, 0.9, {1: 0.8, 2: 0.9})
    captured = trace(Chain([LONG_NAME], 4), torch.zeros(2, 1, 8, 8), name=f"source/{LONG_NAME}")
    streams = trace(Streams(8), models.images())
    return [
        *(
            cut_points_table(each, all=is_all)
            for each in (captured, streams)
            for is_all in (False, True)
        ),
        *(plan_table(each, SOME_COST, EXACT) for each in every_plan()),
        *(explain_table(each) for each in every_plan()),
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
def test_layouts_and_weights_survive_a_narrow_terminal_and_only_names_are_shortened(width):
    text = printed(plan_table(chain_plan(4, LONG_NAME * 2), SOME_COST), width)
    for block in describe_blocks(chain_plan(4).teacher):
        assert block.ends[0].layout in text
    assert "0.125\n" in text
    assert re.search(r"layers\S*…\S+[0-3]\b", text)


@pytest.mark.parametrize("pair", PAIRS)
def test_every_tensor_of_a_cut_and_every_adapter_stands_in_the_plan(pair):
    plan = plan_of(pair)
    text = printed(plan_table(plan, SOME_COST), 120)
    for whole in (plan.teacher, plan.student):
        for tensor in (each for point in whole.cuts for each in point.tensors):
            assert tensor.name in text.split() and layout(tensor) in text
    for stone in plan.stones:
        for spec in stone.adapters:
            assert f"← {spec}" in text


def test_an_adapter_says_which_of_several_tensors_it_reads():
    text = printed(plan_table(plan_of("wide student"), SOME_COST), 120)
    spec = plan_of("wide student").stones[0].adapters[0]
    assert f"← {spec} of {spec.source.name}\n" in text
    assert " of " not in "".join(
        line
        for line in printed(plan_table(demo_plan(), SOME_COST), 120).splitlines()
        if "←" in line
    )


def test_both_sides_share_the_room_that_their_names_need():
    names = ["u", LONG_NAME * 2]
    plan = partition(*(Chain([f"{name}{i}" for i in range(2)], 8) for name in names), SMALL)
    line = next(
        line for line in printed(plan_table(plan, SOME_COST), 100).splitlines() if "…" in line
    )
    assert "layers.u" in line and len(line.split()[2]) == 60


def test_a_long_name_stands_on_one_line_in_the_list_of_cut_points():
    captured = trace(Chain([LONG_NAME * 2], 4), SMALL)
    lines = printed(cut_points_table(captured), 80).splitlines()
    assert sum("4×8×8" in line for line in lines) == 1
    assert any(re.search(r"layers\.\S+…\S+excitation +4×8×8", line) for line in lines)


def test_the_list_of_cut_points_says_how_the_model_was_traced():
    captured = trace(demo.build("teacher"), torch.zeros(2, 1, 8, 8), name="demo/teacher")
    text = printed(cut_points_table(replace(captured, lost=("the hook on stem.0",))), 80)
    assert text.startswith(
        "demo/teacher\n887 k parameters, 3.61 M multiply-adds for one input of 1×8×8\n"
        "traced by fx; 18 cut points, boundaries from these 4, the rest with --all\n"
        "lost in the trace: the hook on stem.0\n"
    )
    assert re.search(r"stages\.0\.relu_1 +32×8×8 +33\.\d %\n", text)


def test_the_list_of_cut_points_shows_where_boundaries_may_stand_and_all_others_if_asked():
    captured = trace(models.make("residual"), models.images())
    may_stand = {*candidates(captured), *candidates(captured, pooled=True)}
    short, whole = (printed(cut_points_table(captured, all=is_all), 80) for is_all in (False, True))
    first = [
        {line.split()[0]: line for line in text.splitlines() if line} for text in (short, whole)
    ]
    for point in find_cut_points(captured):
        assert (point.names[0] in first[0]) == (point in may_stand)
        assert first[1][point.names[0]].endswith("●") == (point in may_stand)
    assert "--all" not in whole and "● boundaries are chosen from these" in whole


def test_a_model_with_many_cut_points_stays_readable():
    captured = trace(Chain([f"unit{index}" for index in range(150)], 2), SMALL)
    lines = printed(cut_points_table(captured), 80).splitlines()
    assert 20 < len(lines) < 45
    assert "traced by fx; 151 cut points, boundaries from these 32, the rest with --all" in lines
    assert len(printed(cut_points_table(captured, all=True), 80).splitlines()) > 150


def test_a_cut_of_several_tensors_has_a_line_for_each():
    captured = trace(Streams(8), models.images())
    wide = next(point for point in find_cut_points(captured) if point.width == 2)
    lines = [line.split() for line in printed(cut_points_table(captured), 80).splitlines()]
    at = next(index for index, words in enumerate(lines) if words[:1] == [wide.names[0]])
    assert lines[at][1] == layout(wide.main) and lines[at][-1] == "%"
    assert lines[at + 1] == ["+", wide.names[1], layout(wide.tensors[1])]


def test_tokens_show_their_grid_and_what_stands_before_it():
    text = printed(cut_points_table(trace(Tokens(8), models.images()), all=True), 80)
    assert "4×4+1 tokens × 8" in text
    inputs = {"ids": torch.zeros(2, 6, dtype=torch.long)}

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(9, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.head((x + self.layer(x)).mean(1))

    text = printed(cut_points_table(trace(Words(), inputs)), 80)
    assert "for one input of 6 (ids)" in text and "6 tokens × 8" in text


def test_names_that_look_like_markup_are_printed_as_they_are():
    text = printed(plan_table(chain_plan(1, "[red]"), SOME_COST), 100)
    assert "layers.[red]0" in text


def test_a_plan_that_was_not_checked_claims_no_check():
    assert "check" not in printed(plan_table(demo_plan(), SOME_COST), 100)
    proof = Certificate(0.0, 1e-3, 0.0, 0.0, 0.0, 1.2e-7, 4)
    text = printed(plan_table(demo_plan(), SOME_COST, proof), 100)
    assert "rebuilt from blocks, largest gap: teacher 1.0e-03, student 0\n" in text
    assert "0 on the teacher's own tensors, 1.2e-07 when merged\n" in text
    assert "of 4 stones reach what comes before them, and nothing after\n" in text


def test_gradients_that_could_not_be_checked_are_not_called_right():
    text = printed(plan_table(demo_plan(), SOME_COST, replace(EXACT, stones=0)), 100)
    assert "gradients   not checked: a logit is not finite\n" in text


def test_every_closing_line_fits_100_columns():
    for plan in every_plan():
        text = printed(plan_table(plan, forecast(plan), replace(EXACT, merged=1.2e-7)), 100)
        closing = text[text.index("\nstudent ") :].splitlines()[1:]
        labels = [line.split()[0] for line in closing]
        assert labels == ["student", "forecast", "adapters", "check", "tails", "gradients"]


def test_the_check_of_the_demo_pair_finds_its_blocks_exact():
    checked = certify(demo_plan())
    assert checked.teacher_training == checked.student_training == 0.0
    assert "teacher 0, student 0" in printed(plan_table(demo_plan(), SOME_COST, checked), 100)


def test_a_plan_without_stones_has_a_head_only_and_says_nothing_of_tails():
    teacher, student = demo.build("teacher"), demo.build("student")
    plan = partition(teacher, student, torch.zeros(2, 1, 8, 8), blocks=0)
    text = printed(plan_table(plan, forecast(plan), replace(EXACT, stones=0)), 100)
    assert "←" not in text and "tails" not in text and "gradients" not in text
    assert re.search(r"^head +head +head\n", text, re.MULTILINE)
    assert "no stepping stones" in draw_plan(plan, forecast(plan))


def test_every_boundary_is_explained_by_term_and_by_its_runner_up():
    for plan in every_plan():
        text = " ".join(printed(explain_table(plan), 120).split())
        for boundary in plan.alignment.boundaries:
            assert f"{boundary.cost:.3f}" in text
            for term, value in boundary.evidence.items():
                assert value < 0.0005 or f"{term} {value:.3f}" in text
            if boundary.runner_up:
                assert f" {boundary.runner_up.extra_cost:+.3f}" in text
                assert boundary.runner_up.student.names[0] in text
        alone = sum(pair.runner_up is None for pair in plan.alignment.boundaries)
        assert text.count("no other pair fits here") == alone


def test_terms_that_cost_nothing_are_left_out_and_the_largest_comes_first():
    text = printed(explain_table(demo_plan()), 80)
    assert "0.000" not in text.replace("+0.000", "")
    terms = [float(value) for value in re.findall(r" (0\.\d+)", text.split("= ")[1].split("\n")[0])]
    assert terms == sorted(terms, reverse=True)


def test_what_was_given_up_to_find_a_chain_is_said():
    plan = demo_plan()
    relaxed = replace(plan, alignment=replace(plan.alignment, relaxed=("any ratio was allowed",)))
    assert "relaxed: any ratio was allowed" in printed(explain_table(relaxed), 80)
    assert "<p>Relaxed: any ratio was allowed.</p>" in plan_page(relaxed, SOME_COST)
    assert "elaxed" not in printed(explain_table(plan), 80) + plan_page(plan, SOME_COST)


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


def boxes(group: ET.Element) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of the rectangles of a group."""
    found = []
    for rect in group.findall(f"{SVG}rect"):
        x, y, width, height = (float(rect.attrib[n]) for n in ("x", "y", "width", "height"))
        found.append((x, y, x + width, y + height))
    return found


Area = tuple[float, float, float, float]


def overlap(one: Area, other: Area) -> bool:
    return max(one[0], other[0]) < min(one[2], other[2]) and max(one[1], other[1]) < min(
        one[3], other[3]
    )


def contains(outer: Area, inner: Area) -> bool:
    return (
        outer[0] <= inner[0]
        and outer[1] <= inner[1]
        and inner[2] <= outer[2]
        and inner[3] <= outer[3]
    )


def numbers(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def extent(text: ET.Element) -> Area:
    """Where a line of text stands in a wide face, measured on names and shapes in DejaVu Sans."""
    size, x, y = (float(text.attrib[name]) for name in ("font-size", "x", "y"))
    width = len(text.text or "") * size * (0.64 if "font-weight" in text.attrib else 0.57)
    start = x - {"end": width, "middle": width / 2}.get(text.get("text-anchor", "start"), 0.0)
    return (start, y - size * 0.75, start + width, y + size * 0.2)


def way(path: ET.Element) -> list[tuple[float, float]]:
    """Points on a wire, its two ends left out: a straight line, or a curve of four points."""
    values = numbers(path.attrib["d"])
    if len(values) == 3:
        x, y, to = values
        is_level = "H" in path.attrib["d"]
        ends = [(x, y), (to, y)] if is_level else [(x, y), (x, to)]
        values = [*ends[0], *ends[0], *ends[1], *ends[1]]
    x0, y0, x1, y1, x2, y2, x3, y3 = values
    times = [index / 40 for index in range(1, 40)]
    shares = [((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3) for t in times]
    return [
        (a * x0 + b * x1 + c * x2 + d * x3, a * y0 + b * y1 + c * y2 + d * y3)
        for a, b, c, d in shares
    ]


def check_drawing(plan: Plan, form: Form) -> None:
    svg = ET.fromstring(draw_plan(plan, SOME_COST, form=form))
    page = (0.0, 0.0, float(svg.attrib["width"]), float(svg.attrib["height"]))
    cards = [boxes(group)[0] for group in groups(svg, "block")]
    ports = [box for group in groups(svg, "boundary") for box in boxes(group)]
    adapters = [box for group in groups(svg, "adapter") for box in boxes(group)]
    assert len(cards) == 2 * (len(plan.stones) + 1)
    all_boxes = [*cards, *ports, *adapters]
    for one, other in combinations(all_boxes, 2):
        assert not overlap(one, other)
    for box in all_boxes:
        assert contains(page, box)
    for text in svg.iter(f"{SVG}text"):
        assert float(text.attrib["font-size"]) >= 12
        assert contains(page, extent(text))
        inside = [box for box in all_boxes if overlap(box, extent(text))]
        assert len(inside) <= 1 and all(contains(box, extent(text)) for box in inside)
    for one, other in combinations([extent(text) for text in svg.iter(f"{SVG}text")], 2):
        assert not overlap(one, other)
    for path in svg.iter(f"{SVG}path"):
        for x, y in way(path):
            assert not any(box[0] < x < box[2] and box[1] < y < box[3] for box in all_boxes)


def groups(svg: ET.Element, kind: str) -> list[ET.Element]:
    return svg.findall(f".//{SVG}g[@class='{kind}']")


FORMS = pytest.mark.parametrize("form", [WIDE, NARROW], ids=["wide", "narrow"])


@FORMS
@pytest.mark.parametrize("count", range(1, 9))
def test_nothing_overlaps_and_every_boundary_is_drawn(count, form):
    check_drawing(chain_plan(count), form)


@FORMS
def test_nothing_overlaps_whatever_the_layouts_and_names(form):
    for plan in every_plan():
        check_drawing(plan, form)


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
def test_a_bar_is_as_long_as_the_blocks_share_whatever_the_shares(costs):
    plan = with_costs(chain_plan(len(costs[0]) - 1), *costs)
    svg = ET.fromstring(draw_plan(plan, SOME_COST))
    room = WIDE.column - 28
    bars = [boxes(group)[2:] for group in groups(svg, "block")]
    both = zip(*map(describe_blocks, (plan.teacher, plan.student)), strict=True)
    for bar, facts in zip(bars, (facts for pair in both for facts in pair), strict=True):
        length = bar[0][2] - bar[0][0] if bar else 0
        assert abs(length - facts.share * room) <= 0.5


def test_paired_blocks_share_a_colour_and_a_height_and_neighbours_do_not():
    svg = ET.fromstring(draw_plan(chain_plan(8), SOME_COST))
    cards = [group.find(f"{SVG}rect") for group in groups(svg, "block")]
    looks = [(c.get("fill"), c.get("y"), c.get("height")) for c in cards if c is not None]
    assert looks[::2] == looks[1::2]
    assert len({fill for fill, _, _ in looks}) == 9


@FORMS
def test_everything_has_a_colour_for_dark_pages(form):
    for plan in (chain_plan(8), plan_of("wide both")):
        svg = ET.fromstring(draw_plan(plan, SOME_COST, form=form))
        dark = svg.findtext(f"{SVG}style") or ""
        assert dark.startswith("@media screen and (prefers-color-scheme: dark)")
        for each in svg.iter():
            if "fill" in each.attrib or "stroke" in each.attrib:
                assert f".kdsurgeon .{each.attrib['class']} {{" in dark


@FORMS
@pytest.mark.parametrize("pair", [*PAIRS, "demo"])
def test_every_boundary_shows_its_adapters_its_stone_and_all_tensors(pair, form):
    plan = demo_plan() if pair == "demo" else plan_of(pair)
    svg = ET.fromstring(draw_plan(plan, SOME_COST, form=form))
    pairs = plan.alignment.boundaries
    for group, stone, ends in zip(groups(svg, "boundary"), plan.stones, pairs, strict=True):
        texts = list(group.iter(f"{SVG}text"))
        words = [text.text for text in texts]
        whole = [text.findtext(f"{SVG}title") or text.text for text in texts]
        assert f"stone {stone.depth} · weight {stone.weight:g}" in words
        for spec in stone.adapters:
            assert str(spec) in " ".join(word or "" for word in words)
        for tensor in (*ends.teacher.tensors, *ends.student.tensors):
            assert tensor.name in whole and layout(tensor) in words


@pytest.mark.parametrize("pair", PAIRS)
def test_every_adapter_is_wired_from_the_tensor_it_reads_to_the_one_it_makes(pair):
    plan = plan_of(pair)
    svg = ET.fromstring(draw_plan(plan, SOME_COST))
    for group, stone in zip(groups(svg, "boundary"), plan.stones, strict=True):
        at = {t.findtext(f"{SVG}title") or t.text: t for t in group.findall(f"{SVG}text")}
        wires = [numbers(path.attrib["d"]) for path in group.findall(f"{SVG}path")]
        for spec, start, end in zip(stone.adapters, wires[::2], wires[1::2], strict=True):
            for name, y in ((spec.source.name, start[1]), (spec.target.name, end[1])):
                same = [t for t in at.values() if (t.findtext(f"{SVG}title") or t.text) == name]
                assert any(abs(float(t.attrib["y"]) - y) <= 6 for t in same)


def map_of(channels, size):
    return Activation("x", (channels, size, size), "BCHW", (size, size), is_rectified=True)


@FORMS
def test_the_longest_adapters_fit_their_label(form):
    wide = AdapterSpec("resize", map_of(2048, 112), map_of(2048, 224), rank=512)
    tokens = Activation("x", (196, 1024), "BTC", (14, 14))
    deconv = AdapterSpec("resize", tokens, map_of(2048, 224), rank=64)
    plan = chain_plan(2)
    stones = [
        replace(s, adapters=(replace(a, source=replace(a.source, name=f"layers.unit{i}")),))
        for i, (s, a) in enumerate(zip(plan.stones, (wide, deconv), strict=True))
    ]
    check_drawing(replace(plan, stones=tuple(stones)), form)


def test_a_block_says_its_share_its_cost_and_its_operations():
    plan = demo_plan()
    svg = ET.fromstring(draw_plan(plan, forecast(plan)))
    words = [text.text for text in groups(svg, "block")[0].findall(f"{SVG}text")]
    assert words == [
        "block 1",
        "33 % of compute",
        "18.9 k parameters · 1.20 M multiply-adds",
        "3 conv, 3 BN, 3 ReLU, 1 add",
    ]
    assert "a training step takes 3.05 × plain distillation" in (svg.find(f"{SVG}text").text or "")


def test_operations_without_room_are_counted():
    plan = demo_plan()
    svg = ET.fromstring(draw_plan(plan, SOME_COST, form=NARROW))
    words = [text.text for text in groups(svg, "block")[0].findall(f"{SVG}text")]
    assert words[-2:] == ["3 conv, 3 BN,", "3 ReLU, 1 add"]
    facts = describe_blocks(plan.teacher)[0]
    assert "3 conv, 3 BN, 3 ReLU, 1 add" in (groups(svg, "block")[0].findtext(f"{SVG}title") or "")
    assert _operation_lines([*facts.operations, ("Hardswish", 1)], 134)[-1] == "3 ReLU, 2 others"


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
    assert "a��[2J" in words
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


def charts(page: str, form: str = "wide") -> list[ET.Element]:
    """The charts of a page in one of their two forms."""
    found = re.findall(rf'<div class="chart {form}">(<svg.*?</svg>)', page, re.DOTALL)
    return [ET.fromstring(svg) for svg in found]


def test_the_page_of_a_plan_holds_the_drawing_the_blocks_and_the_evidence():
    plan = demo_plan()
    page = plan_page(plan, forecast(plan), EXACT)
    assert draw_plan(plan, forecast(plan)) in page
    assert "largest gap: teacher 0, student 0" in page
    assert draw_plan(plan, forecast(plan), form=NARROW) in page
    for boundary in plan.alignment.boundaries:
        assert f"<td>{boundary.teacher.name}</td>" in page
        assert f"{boundary.cost:.3f}</td>" in page


def test_the_page_of_a_plan_names_every_tensor_of_a_wide_cut():
    plan = plan_of("wide teacher")
    page = plan_page(plan, SOME_COST)
    for point in plan.teacher.cuts:
        assert "<td>{}</td>".format("\n".join(point.names)) in page
        assert "<td>{}</td>".format("\n".join(map(layout, point.tensors))) in page


def test_pages_load_nothing_from_elsewhere():
    plan = demo_plan()
    svg = draw_plan(plan, SOME_COST)
    report = run_report("run", config="", epochs=[an_epoch(1, "total")], plan_svg=svg)
    for page in (plan_page(plan, SOME_COST), report):
        assert "default-src 'none'" in page
        rest = page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
        assert not re.search(r"http|//|<script|<link|@import|url\(|\bsrc=|href=", rest)


def test_a_report_draws_every_loss_and_the_accuracy_against_the_teachers():
    names = ("total", "ce student", "ce stone 1", "kd student", "kd stone 1")
    epochs = [an_epoch(n, *names, accuracy=n / 10) for n in range(1, 6)]
    final = Report(360, 0.5, 0.97, {1: 0.9}, 0.55, {1: 0.8})
    page = run_report("run", config="epochs: 5", epochs=epochs, final=final, teacher_accuracy=0.97)
    accuracy, *losses = charts(page)
    assert [len(chart.findall(f"{SVG}polyline")) for chart in losses] == [1, 2, 2]
    assert len(charts(page, "narrow")) == 4
    assert len(accuracy.findall(f"{SVG}polyline")) == 1
    level = accuracy.find(f"{SVG}line[@stroke-dasharray]")
    student = accuracy.find(f"{SVG}polyline")
    assert level is not None and student is not None and level.attrib["class"] == "wire-head"
    assert float(level.attrib["y1"]) < min(numbers(student.attrib["points"])[1::2])
    assert "<td>student</td>" in page and "epochs: 5" in page
    assert "accuracy 50.0 % after the last epoch, 50.0 % at best" in page
    assert page.count('<td class="number">700</td>') == 5, "images per second, from samples"


def test_a_report_of_a_run_that_has_not_begun_shows_its_configuration():
    page = run_report("run", config="epochs: 5", epochs=[])
    assert "0 epochs" in page and "epochs: 5" in page and not charts(page)


def test_a_report_without_held_out_data_has_no_chart_of_accuracy():
    page = run_report(
        "run", config="", epochs=[an_epoch(n, "total", accuracy=None) for n in (1, 2)]
    )
    assert len(charts(page)) == 1
    assert "2 epochs in 4 s" in page


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
