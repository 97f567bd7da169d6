"""The page as text: it is whole, needs nothing else, is small, and no name can break out of where it stands."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from dataclasses import replace
from pathlib import Path

from reports import example, whole_report

from keepless.reporting.page import ReportData, report_data, report_page, save_report
from keepless.reporting.page.data import DecisionRow
from keepless.reporting.page.html import MAX_PAGE_NBYTES

HOSTILE = "</script><script>alert(1)</script><!--\"'><img src=x onerror=alert(2)>{{data}}&amp; é"


def _data_of(page: str) -> ReportData:
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return ReportData.from_json(found[1])


def test_the_page_holds_the_report() -> None:
    """The data in the page is the report, and its verdict is there as text."""
    report = whole_report()
    page = report_page(report)
    assert _data_of(page) == report
    assert html.escape(report.verdict.line) in page
    assert page.startswith("<!doctype html>")


def test_the_page_needs_nothing_else() -> None:
    """No address of anything: the browser is told to load nothing, and to run this script and style by their hashes."""
    page = report_page(whole_report())
    assert set(re.findall(r"\w+://[^\s\"'<)]*", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|srcset|action|@import|url)\s*[=(]\s*[\"']?(?!#)[a-z/]", page.split("<script>")[0])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src 'none';")
    for tag in ("style", "script"):
        found = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]


def test_names_cannot_break_out() -> None:
    """A title, a module and a source that hold markup stand in the page as data and as escaped text only."""
    report = report_data(example(), title=HOSTILE)
    row = replace(report.decisions.blocks[0], name=HOSTILE, reason=HOSTILE)
    places = tuple(replace(place, source=HOSTILE, module=HOSTILE) for place in report.timeline.places)
    report = replace(
        report,
        decisions=replace(report.decisions, blocks=(row,)),
        timeline=replace(report.timeline, places=places),
        verdict=replace(report.verdict, line=HOSTILE),
    )
    page = report_page(report)
    clean = report_page(report_data(example()))
    for tag in ("<script", "</script", "<img", "<!--", "alert(1)</"):
        assert page.lower().count(tag) == clean.lower().count(tag)
    assert _data_of(page) == report


def test_the_page_is_small() -> None:
    """A report of a very large step loses its smallest rows until the page is under 2 MB, and says how many."""
    report = report_data(example())
    row = replace(report.decisions.values[0], name="a.long.name.of.a.module." * 3)
    rows: tuple[DecisionRow, ...] = tuple(replace(row, ways={"kept": i + 1}) for i in range(20_000))
    many = replace(report, decisions=replace(report.decisions, values=rows))
    page = report_page(many)
    assert len(page.encode()) <= MAX_PAGE_NBYTES == 2_000_000
    shown = _data_of(page).decisions
    assert len(shown.values) + shown.num_hidden == 20_000
    assert shown.values[-1].ways == {"kept": 20_000}


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    """The file is the page, in UTF-8."""
    report = report_data(example(), title="Größe")
    save_report(tmp_path / "a.html", report)
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == report_page(report)
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
