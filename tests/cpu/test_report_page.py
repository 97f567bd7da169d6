"""The page in a real Chromium: it opens alone, answers to mouse, keys and touch, and looks as its screenshots do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import DOCS, FONTS, SHOTS, NoBrowserError, chromium, difference, letters_of, shoot

from keepless.machine import load_plan
from keepless.reporting.page import load_report, report_data, save_report

pytestmark = pytest.mark.slow
HOSTILE = "</script><script>alert(1)</script><!--\"'><img src=x onerror=alert(2)>{{data}}&amp; é"
WIDE = {"width": 1280, "height": 900}
SECTIONS = ["verdict", "step", "decisions", "curve", "peak", "fits", "accuracy", "metrics", "environment"]
REPORT = load_report(DOCS / "report-example.json")
TRACK = REPORT.timeline.predicted
PEAK = max(range(len(TRACK.peaks)), key=lambda i: (TRACK.peaks[i], -i))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        with chromium() as found:
            yield found
    except NoBrowserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("page") / "report.html"
    save_report(found, REPORT)
    return found


class Opened:
    """A page, all that it asked for, and all that went wrong in it."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": WIDE} | options))
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.wrong: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(f"dialog {dialog.message}"))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]")

    def number(self) -> int:
        """The instruction's level that is read."""
        return int(self.page.get_attribute("#timeline-picture", "aria-valuenow"))

    def names(self) -> list[str]:
        """First cells of the table of decisions."""
        return [str(name) for name in self.page.locator("#decisions-table tbody td.name").all_inner_texts()]


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Opened]:
    """The page, wide and light; nothing may be asked of a network or go wrong while a test uses it."""
    found = Opened(browser, path)
    yield found
    assert found.requests == [path.as_uri()]
    assert found.wrong == []
    found.context.close()


def _size(nbytes: int) -> str:
    from keepless.ir import format_bytes

    return format_bytes(nbytes)


def test_it_opens_alone_and_the_verdict_comes_first(opened: Opened) -> None:
    """All parts are there in order, and nothing was loaded beside the file itself."""
    page = opened.page
    assert page.locator("main > section").evaluate_all("(all) => all.map((one) => one.id)") == SECTIONS
    assert page.inner_text("#pill").endswith("fits the budget")
    assert page.inner_text("#verdict-line") == REPORT.verdict.line
    assert page.evaluate("performance.getEntriesByType('resource').length") == 0
    assert page.locator("#timeline-picture [data-category]").count() == len(TRACK.categories)
    for layer in ("budget", "measured", "kept", "replay"):
        assert page.locator(f"#timeline-picture [data-layer={layer}]").count() >= 1
    assert page.locator("#timeline-picture [data-phase]").count() == sum(
        end > begin for begin, end in REPORT.timeline.phases.values()
    )


@pytest.mark.parametrize("width", [1280, 768, 390, 320])
def test_no_width_scrolls_sideways(browser: Any, path: Path, width: int) -> None:
    """The page is as wide as its window, from a screen to a small phone; wide tables scroll by themselves."""
    found = Opened(browser, path, viewport={"width": width, "height": 800})
    for level in ("Blocks", "Modules", "Values"):
        found.page.get_by_role("button", name=level, exact=True).click()
        assert found.page.evaluate("document.documentElement.scrollWidth") <= width
    assert found.wrong == []
    found.context.close()


def test_the_mouse_names_what_runs(opened: Opened) -> None:
    """Over a point of the timeline its op, module, source line and bytes are read out."""
    box = opened.page.locator("#timeline-picture").bounding_box()
    whole = max(TRACK.seconds, REPORT.timeline.kept.seconds)
    for share in (0.1, 0.5, 0.85):
        x = 52 + share * (box["width"] - 62)
        opened.page.mouse.move(box["x"] + x, box["y"] + box["height"] / 2)
        number = opened.number()
        assert TRACK.starts[number] <= share * whole * 1.01
        assert number + 1 == len(TRACK.starts) or TRACK.starts[number + 1] >= share * whole * 0.99
        place = REPORT.timeline.places[TRACK.places[number]]
        text = opened.page.inner_text("#reading")
        for words in (place.op, place.module, place.source, f"instruction {TRACK.instructions[number]},"):
            assert words in text
        assert _size(TRACK.peaks[number]) in text
        for column in TRACK.categories.values():
            assert not column[number] or _size(column[number]) in text


def test_keys_go_through_the_timeline(opened: Opened) -> None:
    """Arrow keys go from instruction to instruction, P to the peak; + zooms in and Escape shows the whole step."""
    page = opened.page
    assert opened.number() == PEAK
    page.focus("#timeline-picture")
    whole = page.get_attribute("#timeline-picture [data-category=activations]", "d")
    for key, number in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("p", PEAK)):
        page.keyboard.press(key)
        assert opened.number() == number
    assert "the peak" in page.inner_text("#reading")
    place = REPORT.timeline.places[TRACK.places[PEAK]]
    assert place.op in page.get_attribute("#timeline-picture", "aria-valuetext")
    page.keyboard.press("+")
    assert page.get_attribute("#timeline-picture [data-category=activations]", "d") != whole
    page.keyboard.press("End")
    assert opened.number() == len(TRACK.starts) - 1
    page.keyboard.press("Escape")
    assert page.get_attribute("#timeline-picture [data-category=activations]", "d") == whole


def test_dragging_zooms_and_the_legend_hides(opened: Opened) -> None:
    """A span that is drawn over the picture fills it; a category whose name is pressed is gone, and comes again."""
    page = opened.page
    before = page.get_attribute("#timeline-picture [data-category=activations]", "d")
    box = page.locator("#timeline-picture").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 150)
    page.mouse.down()
    page.mouse.move(box["x"] + 420, box["y"] + 160, steps=3)
    page.mouse.up()
    assert page.get_attribute("#timeline-picture [data-category=activations]", "d") != before
    page.get_by_role("button", name="whole step").click()
    assert page.get_attribute("#timeline-picture [data-category=activations]", "d") == before
    for layer, name in (("[data-category=activations]", "activations"), ("[data-layer=measured]", "measured")):
        button = page.locator(".legend").first.get_by_role("button", name=name, exact=True)
        button.click()
        assert page.locator(f"#timeline-picture {layer}").count() == 0
        button.click()
        assert page.locator(f"#timeline-picture {layer}").count() == 1


def test_headings_sort(opened: Opened) -> None:
    """A heading sorts by its column, the largest first, then the smallest, then as the forward runs."""
    page, blocks = opened.page, REPORT.decisions.blocks
    given = [row.name or "(model)" for row in blocks]
    assert opened.names() == given
    for key in ("kept", "recomputed"):
        head = page.locator(f"#decisions-table th[data-key={key}]")
        order = sorted(blocks, key=lambda row: -row.ways.get(key, 0))
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        assert opened.names() == [row.name or "(model)" for row in order]
        head.get_by_role("button").press("Enter")
        assert head.get_attribute("aria-sort") == "ascending"
        assert opened.names() == [row.name or "(model)" for row in sorted(blocks, key=lambda row: row.ways.get(key, 0))]
        head.get_by_role("button").click()
        assert opened.names() == given
    page.locator("#decisions-table th[data-key=name]").get_by_role("button").click()
    assert opened.names()[0] == "(model)"


def test_words_and_ways_filter(opened: Opened) -> None:
    """Rows are those that hold every word, and bytes of the chosen way; how many is said, and their sum is below."""
    page, values = opened.page, REPORT.decisions.values
    page.get_by_role("button", name="Values", exact=True).click()
    page.fill("#filter", "apply_mask transformer.h")
    page.select_option("#way", "recomputed")
    rows = [
        row
        for row in values
        if "recomputed" in row.ways
        and all(word in f"{row.module} {row.op} {row.source} {row.reason}" for word in ("apply_mask", "transformer.h"))
    ]
    assert len(rows) > 2
    assert page.locator("#decisions-table tbody tr").count() == len(rows)
    assert page.inner_text("#decisions .count") == f"{len(rows)} of {len(values)} rows"
    assert _size(sum(row.ways["recomputed"] for row in rows)) in page.inner_text("#decisions-table tfoot")
    page.fill("#filter", "no such thing")
    assert page.locator("#decisions-table tbody tr").count() == 0


def test_keys_go_through_the_table(opened: Opened) -> None:
    """Arrows go from row to row, Enter shows what is in one, and Escape all blocks again."""
    page = opened.page
    page.locator("#decisions-table tbody tr").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    page.keyboard.press("ArrowUp")
    name = page.evaluate("document.activeElement.querySelector('td.name').textContent")
    assert name == (REPORT.decisions.blocks[-2].name or "(model)")
    page.keyboard.press("Enter")
    inside = [row.name for row in REPORT.decisions.modules if row.module == name]
    assert opened.names() == inside
    page.keyboard.press("Enter")
    values = [row for row in REPORT.decisions.values if row.module == inside[0]]
    assert page.locator("#decisions-table tbody tr").count() == len(values)
    page.keyboard.press("Escape")
    assert len(opened.names()) == len(REPORT.decisions.blocks)


def test_the_curve_names_its_points(opened: Opened) -> None:
    """Plans, strategies, knee and the chosen plan are marks that mouse and keys read out."""
    page, curve = opened.page, REPORT.curve
    assert curve is not None
    names = page.locator("#curve-picture .mark").evaluate_all("(all) => all.map((one) => one.dataset.name)")
    assert names.count("this plan") == names.count("knee") == 1
    assert len([name for name in names if name in ("on the curve", "knee", "smallest")]) == len(curve.points)
    assert set(names) & {one.name for one in curve.strategies}
    place = page.get_attribute("#curve-picture [data-name=knee]", "transform")
    x, y = map(float, place.removeprefix("translate(").removesuffix(")").split(","))
    page.locator("#curve-picture").scroll_into_view_if_needed()
    box = page.locator("#curve-picture").bounding_box()
    page.mouse.move(box["x"] + x, box["y"] + y)
    knee = curve.points[curve.knee]
    assert f"budget {_size(knee.budget)}" in page.inner_text("#curve-reading")
    page.locator("#curve-picture [tabindex='0']").focus()
    page.keyboard.press("Home")
    first = page.inner_text("#curve-reading")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#curve-reading") != first
    page.keyboard.press("End")
    assert "budget" in page.inner_text("#curve-reading")
    assert page.locator("#curve-picture [data-layer=infeasible]").count() == 1


def test_what_fits_is_a_grid(opened: Opened) -> None:
    """Each batch of each length is a cell with its answer in words."""
    (grid,) = REPORT.grids
    words = {"kept": "✓ all kept", "fits": "✓ recomputing", "too large": "✗ too large"}
    cells = {(cell.length, cell.batch): words[cell.state] for cell in grid.cells}
    text = opened.page.locator("#fits .fitgrid td").all_inner_texts()
    assert [one.split("\n")[0] for one in text] == [cells[n, b] for n in grid.lengths for b in grid.batches]
    assert set(cells.values()) == set(words.values())


def test_names_are_shown_as_they_are(browser: Any, tmp_path: Path) -> None:
    """Markup in a title, a module or a reason is text on the page: it is never run."""
    report = report_data(load_plan(DOCS / "examples" / "unfused.plan"), title=HOSTILE)
    row = replace(report.decisions.blocks[0], name=HOSTILE, reason=HOSTILE)
    places = tuple(replace(place, module=HOSTILE) for place in report.timeline.places)
    report = replace(
        report,
        decisions=replace(report.decisions, blocks=(row,)),
        timeline=replace(report.timeline, places=places),
        missing={"curve": HOSTILE},
    )
    save_report(tmp_path / "a.html", report)
    found = Opened(browser, tmp_path / "a.html")
    assert found.page.inner_text("h1") == HOSTILE
    assert found.names() == [HOSTILE]
    assert HOSTILE in found.page.inner_text("#reading")
    assert HOSTILE in found.page.inner_text("#missing")
    assert found.wrong == []
    found.context.close()


def test_colours_follow_the_system_and_the_switch(browser: Any, path: Path) -> None:
    """Dark where the system is dark; the switch goes to dark, to light, and back to the system's."""
    ground = "getComputedStyle(document.body).backgroundColor"
    found = Opened(browser, path, color_scheme="dark")
    dark = found.page.evaluate(ground)
    seen = []
    for _ in range(3):
        found.page.click("#theme")
        seen.append(found.page.evaluate(ground))
    light = seen[1]
    assert seen == [dark, light, dark]
    assert light != dark
    found.page.emulate_media(color_scheme="light")
    assert found.page.evaluate(ground) == light
    found.context.close()


def test_it_prints(browser: Any, path: Path) -> None:
    """On paper there are no controls, and rows beyond the screen are there."""
    found = Opened(browser, path, color_scheme="dark")
    found.page.emulate_media(media="print")
    assert not found.page.is_visible("#theme")
    assert not found.page.is_visible("#filter")
    assert found.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    colours = (
        "['--ink', '--ghost', '--fit'].map((name) => getComputedStyle(document.documentElement).getPropertyValue(name))"
    )
    printed = found.page.evaluate(colours)
    found.page.emulate_media(media="screen", color_scheme="light")
    assert printed == found.page.evaluate(colours)
    assert found.page.pdf()[:5] == b"%PDF-"
    found.context.close()


@pytest.mark.parametrize("name", list(SHOTS))
def test_it_looks_as_its_screenshot(browser: Any, tmp_path: Path, name: str) -> None:
    """The committed picture is what this page draws of the committed data, where the letters are the same."""
    image = pytest.importorskip("PIL.Image")
    reference = DOCS / f"{name}.png"
    assert reference.stat().st_size < 200_000
    save_report(tmp_path / "a.html", load_report(DOCS / "report-example.json"))
    data, letters = shoot(browser, tmp_path / "a.html", name)
    with image.open(reference) as known:
        assert known.size == SHOTS[name][:2]
        if known.text[FONTS] != letters:
            pytest.skip("other fonts than the reference's")
    assert difference(data, reference.read_bytes()) < 0.005
    others = [other for other in SHOTS if other != name]
    assert all(difference(data, (DOCS / f"{other}.png").read_bytes()) > 0.05 for other in others)


def test_a_changed_page_is_seen(browser: Any, tmp_path: Path) -> None:
    """A category more or less in the picture is more than the tolerance."""
    pytest.importorskip("PIL.Image")
    save_report(tmp_path / "a.html", load_report(DOCS / "report-example.json"))
    found = Opened(browser, tmp_path / "a.html", viewport={"width": 1280, "height": 1120}, color_scheme="light")
    if letters_of(found.page) != shoot(browser, tmp_path / "a.html", "report-light")[1]:
        pytest.skip("letters change between two pages")
    before = found.page.screenshot()
    found.page.locator(".legend").first.get_by_role("button", name="optimizer state").click()
    assert difference(before, found.page.screenshot()) > 0.005
    found.context.close()
