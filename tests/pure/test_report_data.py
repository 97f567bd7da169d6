"""Reports as data: the machine's own figures, the same again from JSON, and typed errors for whatever is no report."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import Checked, Grid, example, measured_of, plan_of, whole_report
from strategies import Case, cases

from keepless.errors import ReportError
from keepless.ir import Event, Timeline
from keepless.reporting.decisions import decisions
from keepless.reporting.page import ReportData, load_report, report_data, save_report
from keepless.reporting.page.build import MISSING
from keepless.reporting.page.codec import plain
from keepless.reporting.page.shrink import shrunk
from keepless.reporting.tables import verdict


@given(cases())
@settings(max_examples=40)
def test_any_plan_has_a_report_that_is_the_same_again_from_json(case: Case) -> None:
    """Whatever the program does and is called, its report goes through JSON unchanged, and sums are the machine's."""
    plan = plan_of(case.graph, case.program, case.cost)
    report = report_data(plan)
    assert ReportData.from_json(report.to_json()) == report
    assert report.verdict.predicted_peak == plan.predicted_peak == max([0, *report.timeline.predicted.peaks]) or (
        not plan.predicted.events
    )
    track = report.timeline.predicted
    for number, peak in enumerate(track.peaks):
        assert sum(column[number] for column in track.categories.values()) == peak


def test_figures_are_the_plans() -> None:
    """Verdict, decisions and metrics are those that the plan's other reports show."""
    plan = example()
    report = report_data(plan)
    assert report.verdict.line == verdict(plan)
    assert report.title == "Transformer"
    blocks = decisions(plan)
    for rows in (report.decisions.blocks, report.decisions.modules):
        assert sum(row.ways.get("kept", 0) for row in rows) == sum(block.kept_nbytes for block in blocks)
        assert sum(row.ways.get("recomputed", 0) for row in rows) == sum(block.recomputed_nbytes for block in blocks)
        assert sum(row.seconds for row in rows) == pytest.approx(sum(block.seconds for block in blocks))
    assert len(report.decisions.values) + report.decisions.num_hidden == sum(len(b.decisions) for b in blocks)
    assert sum(report.peak.categories.values()) == plan.predicted_peak
    assert sum(sum(row.values()) for row in report.peak.modules.values()) == plan.predicted_peak
    metrics = {one.name: one.value for one in report.metrics}
    assert metrics["parameters"] == 891_904
    assert metrics["parameters per GB"] == pytest.approx(891_904 / (plan.predicted_peak / 1e9))
    assert metrics["compute-memory ratio"] == pytest.approx(
        plan.overhead / (1 - plan.predicted_peak / plan.baseline_peak)
    )
    assert sum(end - begin for begin, end in report.timeline.replays) == pytest.approx(
        sum(block.seconds for block in blocks), rel=1e-5
    )


def test_what_was_not_asked_for_is_named_and_not_made_up() -> None:
    """A plan alone has no curve, no grid and no measured bytes, and its report says how to get each."""
    report = report_data(example())
    assert report.curve is None
    assert report.timeline.measured is None
    assert not report.grids
    assert not report.accuracy
    assert report.missing == MISSING
    assert not whole_report().missing
    told = report_data(example(), missing={"curve": "the engine has none"})
    assert told.missing["curve"] == "the engine has none"


def test_a_measured_timeline_is_set_beside_the_prediction() -> None:
    """Measured bytes stand where the instruction is predicted to run, with measured durations; errors are of them."""
    plan = example()
    report = report_data(plan, measured=measured_of(plan), checked=Checked(measured_peak=plan.predicted_peak + 1000))
    seen = report.timeline.measured
    assert seen is not None
    assert max(seen.peaks) == plan.predicted_peak + 1000
    assert set(seen.starts) <= {float(f"{event.start:.7g}") for event in plan.predicted.events}
    events = plan.predicted.events
    for index, duration in zip(seen.instructions, seen.durations, strict=True):
        assert duration == pytest.approx(1.1 * (events[index].end - events[index].start), rel=1e-5, abs=1e-9)
    rows = {row.name: row for row in report.accuracy}
    assert rows["peak of the step"].error == pytest.approx(plan.predicted_peak / (plan.predicted_peak + 1000) - 1)
    assert rows["seconds of the forward"].error == pytest.approx(1 / 1.1 - 1)
    assert rows["largest miss of one op"].measured == 1000
    assert plan.measured_peak is None  # the plan is as it was


def test_phases_of_a_plan_of_module_calls() -> None:
    """Where only phases were measured, each is a level, with its own seconds."""
    plan = example()
    names = ("forward", "loss", "backward")
    events = tuple(
        Event(-1, float(i), float(i + 1), 0.0, 10, 90_000_000 + i, label=name) for i, name in enumerate(names)
    )
    report = report_data(plan, measured=Timeline(events, {"device": 90_000_002}, "measured"))
    seen = report.timeline.measured
    assert seen is not None
    assert [report.timeline.places[place].op for place in seen.places] == ["the whole forward", "the whole backward"]
    assert seen.durations == (1.0, 1.0)
    assert max(seen.peaks) == 90_000_002


def test_what_is_not_of_the_plan_is_refused() -> None:
    """A timeline of a longer program, and fits= that is nothing of the kind, are typed errors."""
    plan = example()
    events = (Event(10**6, 0.0, 1.0, 0.0, 1, 1),)
    with pytest.raises(ReportError, match="another one"):
        report_data(plan, measured=Timeline(events, {"device": 1}, "measured"))
    with pytest.raises(ReportError, match="fits="):
        report_data(plan, fits=[object()])  # type: ignore[list-item]


def _paths(item: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a report's JSON, the first two of each list."""
    found = [path] if path else []
    pairs = item.items() if isinstance(item, dict) else enumerate(item[:2]) if isinstance(item, list) else ()
    for key, value in pairs:
        found += _paths(value, (*path, key))
    return found


WHOLE = whole_report(12).to_json()
PATHS = _paths(json.loads(WHOLE))
OTHERS: tuple[Any, ...] = (None, True, -1, 1.5, "text", [], {}, [[]], {"x": 1}, 10**25, "\x1b[31m", ["a"], "x" * 5000)


@given(st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_whatever_is_wrong_with_a_file_is_a_report_error(rng: random.Random) -> None:
    """A place of a report that is gone, is renamed or holds something else gives a report or a `ReportError`."""
    document = json.loads(WHOLE)
    path = rng.choice(PATHS)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    kind = rng.choice(["delete", "rename", "other", "other"])
    if kind == "other":
        inner[path[-1]] = copy.deepcopy(rng.choice(OTHERS))
    elif kind == "delete":
        del inner[path[-1]]
    elif isinstance(inner, dict):
        inner["unknown"] = inner.pop(path[-1])
    try:
        found = ReportData.from_json(json.dumps(document))
    except ReportError:
        return
    assert ReportData.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("verdict"), "report has no 'verdict'"),
        (lambda d: d["verdict"].update(budget="8 GiB"), "report.verdict.budget is a text, not a whole number"),
        (lambda d: d["verdict"].update(budget=1.5), "report.verdict.budget is a number, not a whole number"),
        (lambda d: d["timeline"]["predicted"]["peaks"].pop(), "columns are not of one length"),
        (lambda d: d["timeline"]["predicted"]["places"].__setitem__(0, 10**6), "place is not in the timeline's table"),
        (lambda d: d["curve"].update(knee=99), "report.curve. The curve's knee is none of its points"),
        (lambda d: d["decisions"]["blocks"][0].update(name="\x1b]0;x"), r"blocks\[0\].name is a text that is too long"),
        (lambda d: d.update(version=2), "has version '2'"),
        (lambda d: d.update(format="keepless-plan"), "no report of Keepless"),
        (lambda d: d.update(more=1), "has the key 'more', which is not known"),
    ],
)
def test_errors_name_the_place(change: Any, words: str) -> None:
    """What is wrong is named with its place in the file."""
    document = json.loads(WHOLE)
    change(document)
    with pytest.raises(ReportError, match=words):
        ReportData.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{", "[]", "nope", '{"format": "keepless-report", "version": NaN}', "[" * 10**5])
def test_what_is_no_json_is_a_report_error(text: str, tmp_path: Path) -> None:
    """Also as a file, whose name is in the error."""
    with pytest.raises(ReportError):
        ReportData.from_json(text)
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=r"a\.json"):
        load_report(path)


def test_reports_are_files(tmp_path: Path) -> None:
    """A report is saved as data and read again; a name of another kind is refused before anything is written."""
    report = whole_report()
    save_report(tmp_path / "a.json", report)
    assert load_report(tmp_path / "a.json") == report
    with pytest.raises(ReportError, match=r"\.html"):
        save_report(tmp_path / "a.txt", report)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_long_programs_and_many_values_are_thinned_and_counted() -> None:
    """The highest level of neighbours stays, so that the peak does; of values the largest stay."""
    plan = example()
    report = report_data(plan, most_levels=40, most_values=7)
    track = report.timeline.predicted
    assert len(track.starts) <= 40
    assert max(track.peaks) == plan.predicted_peak
    assert report.timeline.num_hidden > 0
    values = report.decisions.values
    assert len(values) == 7
    assert report.decisions.num_hidden == sum(len(block.decisions) for block in decisions(plan)) - 7
    whole = report_data(plan)
    smallest_shown = min(sum(row.ways.values()) for row in values)
    assert sum(sum(row.ways.values()) > smallest_shown for row in whole.decisions.values) <= 7


def test_shrinking_ends() -> None:
    """Each turn leaves less, counts what it left out, and keeps the peak."""
    plan = example()
    report = report_data(plan)
    made = report.decisions
    many = replace(made, values=made.values * 5, modules=made.modules * 9)
    report = replace(report, decisions=many)
    seen = 0
    while (smaller := shrunk(report)) is not report:
        assert len(smaller.to_json()) < len(report.to_json())
        report, seen = smaller, seen + 1
        assert max(report.timeline.predicted.peaks) == plan.predicted_peak
        assert ReportData.from_json(report.to_json()) == report
    assert seen > 4
    assert report.decisions.num_hidden + len(report.decisions.values) == len(many.values)
    assert any("left out of the table of modules" in note for note in report.notes)
    assert report.timeline.num_hidden > 0


def test_the_schema_is_known() -> None:
    """The names at the top of a report's JSON; a new one is a new version, or has a default here and in readers."""
    assert list(plain(whole_report())) == [field.name for field in fields(ReportData)]
    assert sorted(json.loads(WHOLE)) == [
        "accuracy",
        "bits",
        "curve",
        "decisions",
        "environment",
        "format",
        "grids",
        "metrics",
        "missing",
        "notes",
        "parts",
        "peak",
        "sizes",
        "steps",
        "timeline",
        "title",
        "verdict",
        "version",
    ]


def test_bits_that_differ_are_told() -> None:
    """A verification that found a difference is in the report with its names."""
    checked = Checked(equal=False, differences=("h.0.weight.grad",), measured_peak=5, tolerance=1e-5, deviation=2e-6)
    report = report_data(example(), checked=checked, fits=[Grid()])
    assert report.bits is not None
    assert not report.bits.equal
    assert report.bits.differences == ("h.0.weight.grad",)
    assert "2e-06 off" in report.bits.note
    assert replace(report, bits=None).bits is None
    assert report.grids[0].cells[3].state == "too large"
