"""Timelines as JSON and as traces: they hold the plan's bytes, and follow the Trace Event Format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from strategies import Case, cases
from test_report import AGAIN, COST, model, plan_of

from keepless.ir import Event, Timeline
from keepless.machine import Plan
from keepless.passes import from_order, reuse_storage
from keepless.reporting.series import category_levels, columns, module_levels, save_timeline, timeline_dict
from keepless.reporting.trace import MEASURED, MOST_MODULES, PREDICTED, save_trace, trace_dict


@pytest.fixture
def plan() -> Plan:
    graph = model()
    return plan_of(graph, reuse_storage(graph, from_order(graph, AGAIN)), COST)


def check_trace(trace: dict[str, Any]) -> None:
    """What a reader of the Trace Event Format relies on."""
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row in trace["traceEvents"]:
        assert row["ph"] in ("M", "X", "C", "i")
        assert isinstance(row["name"], str)
        assert isinstance(row["pid"], int)
        assert isinstance(row["args"], dict)
        if row["ph"] == "M":
            assert row["name"] in ("process_name", "thread_name", "thread_sort_index")
            continue
        assert row["ts"] >= 0
        if row["ph"] == "X":
            lanes.setdefault((row["pid"], row["tid"]), []).append((row["ts"], row["ts"] + row["dur"]))
        if row["ph"] == "C":
            assert all(isinstance(value, int) for value in row["args"].values())
        if row["ph"] == "i":
            assert row["s"] in ("g", "p", "t")
    for spans in lanes.values():
        for (_, end), (begin, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
            assert begin >= end - 0.002  # microseconds are rounded to three places


def counters(trace: dict[str, Any], name: str, pid: int = PREDICTED) -> list[dict[str, int]]:
    rows = trace["traceEvents"]
    return [row["args"] for row in rows if row["ph"] == "C" and row["name"] == name and row["pid"] == pid]


@given(cases())
@settings(max_examples=60, deadline=None)
def test_series_sum_to_the_machines_bytes(case: Case) -> None:
    """By module and by category, at every instruction of any program; the trace keeps the peak."""
    plan = plan_of(case.graph, case.program, case.cost)
    peaks = [event.peak for event in plan.predicted.events]
    assert [sum(row.values()) for row in module_levels(plan)] == peaks
    assert [sum(row.values()) for row in category_levels(plan)] == peaks
    found = json.loads(json.dumps(timeline_dict(plan), allow_nan=False))
    for table in ("categories", "modules"):
        series = found["predicted"][table].values()
        assert [sum(column) for column in zip(*series, strict=True)] == peaks or not any(peaks)
    trace = json.loads(json.dumps(trace_dict(plan), allow_nan=False))
    check_trace(trace)
    if peaks:
        for name in ("on the device", "by category", "by module"):
            assert max(sum(args.values()) for args in counters(trace, name)) == max(peaks)


def test_a_trace_names_ops_lanes_peak_and_budget(plan: Plan) -> None:
    """Replays have a lane of their own; peak and budget are marked."""
    trace = trace_dict(plan)
    rows: list[dict[str, Any]] = trace["traceEvents"]  # type: ignore[assignment]
    lanes = {row["tid"]: row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    ran = [row for row in rows if row["ph"] == "X"]
    assert {lanes[row["tid"]] for row in ran} == {"forward", "backward", "optimizer", "recompute"}
    again = [row for row in ran if lanes[row["tid"]] == "recompute"]
    assert [row["name"] for row in again] == ["aten.relu.default", "aten.relu.default"]
    assert again[0]["args"]["module"] == "model.h.1"
    assert sum(row["dur"] for row in ran) == pytest.approx(1e6 * plan.predicted_seconds)
    (peak,) = [row for row in rows if row["ph"] == "i" and row["name"].startswith("peak")]
    assert peak["args"]["bytes"] == plan.predicted_peak
    assert peak["args"]["instruction"] == plan.predicted.peak_index
    assert [args["bytes"] for args in counters(trace, "budget")] == [plan.budget.limits["device"]] * 2


def test_a_measured_timeline_is_a_process_of_its_own(plan: Plan, tmp_path: Path) -> None:
    """With its residues; phases where no instruction is known; files are whole JSON."""
    events = tuple(replace(event, peak=event.peak + 3) for event in plan.predicted.events)
    measured = Timeline(events, {"device": plan.predicted_peak + 3}, "measured")
    trace = trace_dict(plan, measured)
    check_trace(trace)
    assert {args["bytes"] for args in counters(trace, "residue", MEASURED)} == {3}
    found = timeline_dict(plan, measured)
    assert set(found["measured"]["residues"]) == {3}  # type: ignore[index,call-overload]
    phases = [Event(-1, i, i + 1.0, 0.0, 5, 9, name) for i, name in enumerate(("forward", "loss", "backward"))]
    coarse = Timeline(tuple(phases), {"device": 9}, "measured")
    check_trace(trace_dict(plan, coarse))
    assert timeline_dict(plan, coarse)["measured"]["residues"] == [None] * 3  # type: ignore[index,call-overload]
    save_trace(tmp_path / "a.json", plan, measured)
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(trace))
    save_timeline(tmp_path / "b.json", plan, measured)
    read = json.loads((tmp_path / "b.json").read_text())
    assert (read["format"], read["version"]) == ("keepless-timeline", 1)
    assert read["predicted"]["events"][0] == {
        "instruction": 0, "start": 0.0, "end": 0.4, "stall": 0.0, "resident": 170, "peak": 170,
        "phase": "forward", "op": "aten.mm.default", "module": "model.h.0.lin", "source": "model.py:1", "what": "run",
    }  # fmt: skip


def test_many_blocks_are_counted_together(plan: Plan) -> None:
    """Counters beyond a number are one, and nothing is lost."""
    graph = plan.graph
    ops = [replace(op, module=f"b{op.id}.x.{op.id}") for op in graph.ops]
    plan.signature["state_by_block"] = {f"s.{i}": 1 for i in range(40)}
    many = replace(plan, graph=replace(graph, ops=tuple(ops)))
    assert len(columns(list(module_levels(many)))) > MOST_MODULES
    rows = counters(trace_dict(many), "by module")
    assert {len(args) for args in rows} == {MOST_MODULES}
    assert max(sum(args.values()) for args in rows) == plan.predicted_peak
    assert counters(trace_dict(many, modules=False), "by module") == []


def test_a_measured_line_is_drawn(plan: Plan, tmp_path: Path) -> None:
    """Over the predicted bytes, of instructions and of phases."""
    pytest.importorskip("matplotlib")
    from keepless.reporting.picture import draw

    events = tuple(replace(e, start=2 * e.start, end=2 * e.end, peak=e.peak + 90) for e in plan.predicted.events)
    draw(plan, tmp_path / "plain.svg")
    draw(plan, tmp_path / "both.svg", measured=Timeline(events, {"device": plan.predicted_peak + 90}, "measured"))
    plain, both = ((tmp_path / name).read_text() for name in ("plain.svg", "both.svg"))
    assert "#5b2a86" in both
    assert "#5b2a86" not in plain
