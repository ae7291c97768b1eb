"""Pages in headless Chromium: no script error, no request, no sideways scrolling, text to read.

Set KDSURGEON_SCREENSHOTS to a folder to keep the pictures.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from PIL import Image

from kdsurgeon.cli import main
from kdsurgeon.cli.reporting import read_evaluation
from kdsurgeon.evaluation import ClassCounts, Report
from kdsurgeon.views import Row, run_report
from kdsurgeon.views.page import DARK, LIGHT
from tests.browser import Browser, find_browser

SCREENS = [(1280, False), (1280, True), (390, False), (390, True)]
LEAST_LETTER = 9.0  # pixels, on any screen
PAGES = ("run", "plan", "crowded", "bare")

# The contrast (WCAG 2.2) and the size of each visible text: of HTML against the background that is
# painted behind it, of charts against the page. Boxes of the plan's drawing have colours of their
# own, which tests of the palette compare.
TEXTS = """(() => {
  const part = c => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = numbers(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    const area = node.getBoundingClientRect(), style = getComputedStyle(node);
    if (!text || !area.width || !area.height || node.closest("title, style")) continue;
    const svg = node.closest("svg");
    let size = parseFloat(style.fontSize);
    if (svg) size *= svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    const ink = numbers(svg ? style.fill : style.color);
    const [high, low] = [luminance(ink), luminance(behind(node))].sort((a, b) => b - a);
    const isDrawing = svg && !svg.closest(".chart");
    found.push([text.slice(0, 40), isDrawing ? 21 : (high + 0.05) / (low + 0.05), size]);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        reason = "there is no chromium, chromium-browser or google-chrome"
        if os.environ.get("KDSURGEON_NEEDS_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    with Browser(program, tmp_path_factory.mktemp("browser") / "profile") as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(digit_models, tmp_path_factory):
    """A page of each kind: of a run and a plan as the verbs write them, and two hard ones."""
    folder = tmp_path_factory.mktemp("pages")
    pair = [str(digit_models / f"{name}.pt") for name in ("teacher", "student")]
    run = ["distill", *pair, "--data-dir", "digits", "--epochs", "2", "--track", "none"]
    assert main([*run, "-o", str(folder / "run")]) == 0
    (folder / "run" / "report.html").rename(folder / "run.html")
    plan = folder / "plan.html"
    assert main(["partition", *pair, "--html", str(plan), "-o", str(folder / "plan.yaml")]) == 0
    (folder / "crowded.html").write_text(crowded(), encoding="utf-8")
    bare = run_report("run", config="", epochs=[])
    (folder / "bare.html").write_text(bare, encoding="utf-8")
    return folder


def crowded() -> str:
    """A page of many epochs, stones and classes, with names that are long or mean harm."""
    stones = [f"stone {depth}" for depth in range(1, 13)]
    names = [f"{kind} {part}" for kind in ("ce", "kd") for part in ("student", *stones)]
    epochs = [
        {
            "epoch": n,
            "losses": {name: 1 / n + index / 50 for index, name in enumerate(names)},
            "accuracy": 1 - 0.9 / n,
            "stones": {name: 1 - 0.8 / n - index / 90 for index, name in enumerate(stones)},
            "learning_rate": 0.1 / n,
            "seconds": 123.4,
            "samples": 1_281_167,
        }
        for n in range(1, 121)
    ]
    shares = {depth: 0.7 + depth / 100 for depth in range(1, 13)}
    rows = [Row("student", 0.7, 11_700_000, 1_800_000_000, 46_800_000, 9.2)]
    rows += [
        Row(f"stone {d}", share, 10**7 * (20 - d), 10**9 * (20 - d), 10**8, 31.0 - 2 * d)
        for d, share in shares.items()
    ]
    rows.append(Row("teacher", 0.79, 60_200_000, 11_500_000_000, 240_000_000, 40.0))
    long = "a_class_whose_name_goes_on_and_on_without_any_place_to_break_it_" * 3
    classes = [(f"{long}{n}", ClassCounts(50, 40, n % 50, 3)) for n in range(1000)]
    return run_report(
        f"{'teacher_of_great_length' * 6} → <script>alert(1)</script>, block-kd",
        config="key: " + "value" * 60,
        epochs=epochs,
        final=Report(50_000, 0.7, 0.79, shares, 0.8, shares),
        teacher_accuracy=0.79,
        models=rows,
        exported=rows,
        classes=classes,
        environment={"command": "kdsurgeon distill " + "/a/path" * 40, "data": "0123456789" * 12},
        notes=["A note with a_word_" + "that_is_long_" * 20],
    )


def kept(tmp_path: Path, name: str) -> Path:
    folder = Path(os.environ.get("KDSURGEON_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


@pytest.mark.parametrize(("width", "dark"), SCREENS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_quiet_and_readable(browser, pages, name, width, dark, tmp_path):
    url = (pages / f"{name}.html").as_uri()
    browser.open(url, width=width, dark=dark)
    assert browser.complaints() == []
    assert browser.requests() == [url]
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.documentElement.scrollWidth") <= width
    texts = browser.value(TEXTS)
    assert len(texts) >= 4
    assert [text for text in texts if text[1] < 4.5] == []
    assert [text for text in texts if text[2] < LEAST_LETTER] == []
    picture = kept(tmp_path, f"{name}-{width}-{'dark' if dark else 'light'}.png")
    browser.screenshot(picture)
    with Image.open(picture) as taken:
        height = browser.value("document.documentElement.scrollHeight")
        assert taken.size == (width, max(height, 900))
        page = (DARK if dark else LIGHT)["page"]
        corner = "#{:02x}{:02x}{:02x}".format(*taken.convert("RGB").getpixel((2, 2)))
        assert corner == page
        assert len(taken.convert("RGB").getcolors(1 << 24)) > 20, "there is something on it"


@pytest.mark.parametrize("name", PAGES)
def test_on_paper_a_page_is_light_and_nothing_is_cut_off(browser, pages, name, tmp_path):
    browser.open((pages / f"{name}.html").as_uri(), width=794, dark=True)
    browser.printed(kept(tmp_path, f"{name}.pdf"))
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.ask("Emulation.setEmulatedMedia", media="print", features=[dark])
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    boxes = browser.value(
        "[...document.querySelectorAll('.box')].map(b => [b.scrollHeight, b.clientHeight])"
    )
    assert all(whole <= shown for whole, shown in boxes)
    dark_ink = "[...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill)"
    assert "rgb(232, 235, 240)" not in browser.value(dark_ink)
    assert re.match(rb"%PDF-", kept(tmp_path, f"{name}.pdf").read_bytes())


def test_what_scrolls_in_its_own_box_can_be_reached_by_keyboard(browser, pages):
    browser.open((pages / "crowded.html").as_uri(), width=390)
    found = browser.value(
        "[...document.querySelectorAll('.box')].filter(b => b.scrollWidth > b.clientWidth)"
        ".map(b => [b.tabIndex, b.getAttribute('aria-label'), b.getBoundingClientRect().width])"
    )
    assert len(found) >= 3
    assert all(index == 0 and name and width <= 390 for index, name, width in found)


def test_a_table_that_scrolls_shows_it_and_keeps_its_first_column(browser, pages):
    browser.open((pages / "crowded.html").as_uri(), width=390)
    found = browser.value(
        "[...document.querySelectorAll('.box')].filter(b => b.scrollWidth > b.clientWidth + 60 &&"
        " b.querySelector('.pinned')).map(b => { b.scrollLeft = 50; const cell ="
        " b.querySelector('tbody td'); return [b.scrollLeft, cell.getBoundingClientRect().left -"
        " b.getBoundingClientRect().left, getComputedStyle(b).backgroundImage]; })"
    )
    assert len(found) >= 2
    for moved, place, background in found:
        assert moved == 50 and place == 0
        assert background.count("linear-gradient") == 4


def test_the_check_sees_what_it_looks_for(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<p style="color: #999">grey</p><p style="font-size: 7px">small</p><script>nope()</script>'
        '<img src="http://127.0.0.1:9/x.png"><div style="width: 2000px">wide</div>',
        encoding="utf-8",
    )
    browser.open(page.as_uri(), width=390)
    assert any("nope" in text for text in browser.complaints())
    assert "http://127.0.0.1:9/x.png" in browser.requests()
    assert browser.value("document.documentElement.scrollWidth") > 390
    texts = {text: (contrast, size) for text, contrast, size in browser.value(TEXTS)}
    assert texts["grey"][0] < 4.5 < texts["wide"][0] and texts["small"][1] < LEAST_LETTER


def test_the_policy_of_a_page_forbids_scripts_and_requests(browser, pages, tmp_path):
    harm = '<script>document.title = "harmed"</script><img src="http://127.0.0.1:9/x.png">'
    text = (pages / "bare.html").read_text(encoding="utf-8").replace("</body>", f"{harm}</body>")
    page = tmp_path / "harmed.html"
    page.write_text(text, encoding="utf-8")
    browser.open(page.as_uri(), width=390)
    assert browser.value("document.title") == "run"
    assert sum("Content Security Policy" in text for text in browser.complaints()) == 2


def test_a_run_keeps_its_last_evaluation_for_later_pages(pages):
    found = read_evaluation(pages / "run")
    assert found is not None and found.samples == 450
    text = (pages / "run.html").read_text(encoding="utf-8")
    for heading in ("By class, against the teacher", "What accuracy costs", "Environment"):
        assert f"<h2>{heading}</h2>" in text
    assert text.count("<td>stone&nbsp;1</td>") == 1
