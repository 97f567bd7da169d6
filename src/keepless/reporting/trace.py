"""A timeline as a trace that https://ui.perfetto.dev and chrome://tracing load.

Chrome's Trace Event Format, as one JSON object: what runs is a complete event ("X") on the lane of its phase, replays
and copies on lanes of their own; bytes are counters ("C"): in all, by category, by module; peak and budget are marks
("i"). The predicted step and the measured one are two processes. Times are microseconds.

Source: "Trace Event Format", Google, 2016 (docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from keepless.ir import DEVICE, Copy, Event, Timeline, format_bytes
from keepless.machine import Plan
from keepless.reporting.account import op_at, where_at
from keepless.reporting.series import (
    PHASES,
    category_levels,
    columns,
    event_row,
    module_levels,
    residues,
    what_runs,
    write_json,
)

PREDICTED, MEASURED = 1, 2
_LANES = (*PHASES, "recompute", "copies")
MOST_MODULES = 24
"""Counters by module; the blocks that never hold much are one counter together."""

Row = dict[str, object]


def trace_dict(plan: Plan, measured: Timeline | None = None, *, modules: bool = True) -> dict[str, object]:
    """The trace, as JSON values.

    Arguments:
        measured: of this plan, shown as a second process.
        modules: with a counter per block of the model.
    """
    rows = [*_process(PREDICTED, "predicted"), *_ops(plan, plan.predicted, PREDICTED)]
    rows += _counters(plan, modules)
    rows += _marks(plan, plan.predicted, PREDICTED)
    if measured is not None:
        rows += [*_process(MEASURED, "measured"), *_ops(plan, measured, MEASURED), *_measured_counters(plan, measured)]
        rows += _marks(plan, measured, MEASURED)
    budget = plan.budget.limits[DEVICE]
    about = {
        "budget": budget,
        "predicted_peak": plan.predicted_peak,
        "measured_peak": None if measured is None else measured.peak,
        "engine": plan.engine,
        "model": str(plan.signature.get("model", "")),
    }
    return {"traceEvents": rows, "displayTimeUnit": "ms", "otherData": about}


def save_trace(path: str | os.PathLike[str], plan: Plan, measured: Timeline | None = None) -> None:
    """Writes the trace into a file, all of it or nothing.

    Raises:
        OSError: the file cannot be written.
    """
    write_json(path, trace_dict(plan, measured))


def _process(pid: int, name: str) -> Iterator[Row]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    for number, lane in enumerate(_LANES, start=1):
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": number, "args": {"name": lane}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": number, "args": {"sort_index": number}}


def _lane(plan: Plan, event: Event) -> str:
    if event.label:
        return event.label
    op = op_at(plan, event.index)
    if op is None:
        return "copies"
    return "recompute" if what_runs(plan, event.index) == "replay" else op.phase.value


def _ops(plan: Plan, timeline: Timeline, pid: int) -> Iterator[Row]:
    """What takes time; drops and the issue of copies do not."""
    for event in timeline.events:
        if event.end <= event.start and not event.label:
            continue
        op = op_at(plan, event.index)
        if op is None and not event.label and not isinstance(plan.program[event.index], Copy) and not event.stall:
            continue
        lane = _lane(plan, event)
        details = {k: v for k, v in event_row(plan, event).items() if k not in ("start", "end") and v not in ("", 0.0)}
        yield {
            "ph": "X",
            "name": event.label or (op.name if op is not None else what_runs(plan, event.index)),
            "cat": lane,
            "pid": pid,
            "tid": _LANES.index(lane) + 1,
            "ts": _us(event.start),
            "dur": _us(event.end - event.start),
            "args": details,
        }


def _counters(plan: Plan, modules: bool) -> Iterator[Row]:
    """Highest bytes between two times, so that no peak is lost in an instruction that takes no time."""
    events = plan.predicted.events
    totals = [{"bytes": event.peak} for event in events]
    yield from _counter("on the device", PREDICTED, events, totals)
    yield from _counter("by category", PREDICTED, events, list(category_levels(plan)))
    if modules:
        rows = list(module_levels(plan))
        names = list(columns(rows))
        shown = set(names if len(names) <= MOST_MODULES else names[: MOST_MODULES - 1])
        folded = []
        for row in rows:
            one = {name or "(model)": row.get(name, 0) for name in names if name in shown}
            if len(shown) < len(names):
                one["other blocks"] = sum(nbytes for name, nbytes in row.items() if name not in shown)
            folded.append(one)
        yield from _counter("by module", PREDICTED, events, folded)


def _counter(name: str, pid: int, events: Iterable[Event], rows: list[dict[str, int]]) -> Iterator[Row]:
    """One sample per event that takes time: of the highest instruction since the last one."""
    waiting: Mapping[str, int] | None = None
    last = 0.0
    for event, row in zip(events, rows, strict=True):
        last = event.end
        if waiting is None or sum(row.values()) > sum(waiting.values()):
            waiting = row
        if event.end > event.start:
            yield {"ph": "C", "name": name, "pid": pid, "ts": _us(event.start), "args": dict(waiting)}
            waiting = None
    if waiting is not None:
        yield {"ph": "C", "name": name, "pid": pid, "ts": _us(last), "args": dict(waiting)}


def _measured_counters(plan: Plan, measured: Timeline) -> Iterator[Row]:
    yield from _counter("on the device", MEASURED, measured.events, [{"bytes": e.peak} for e in measured.events])
    for event, residue in zip(measured.events, residues(plan, measured), strict=True):
        if residue is not None and op_at(plan, event.index) is not None:
            yield {"ph": "C", "name": "residue", "pid": MEASURED, "ts": _us(event.start), "args": {"bytes": residue}}


def _marks(plan: Plan, timeline: Timeline, pid: int) -> Iterator[Row]:
    """The peak, where it is, and the budget as a counter that does not move."""
    budget = plan.budget.limits[DEVICE]
    for when in (0.0, timeline.seconds):
        yield {"ph": "C", "name": "budget", "pid": pid, "ts": _us(when), "args": {"bytes": budget}}
    yield _mark(f"budget {format_bytes(budget)}", pid, 0.0, {"bytes": budget})
    if timeline.events:
        event = max(timeline.events, key=lambda one: (one.peak, -one.start))
        where = event.label or where_at(plan, event.index)
        details = {"bytes": event.peak, "instruction": event.index, "where": where}
        yield _mark(f"peak {format_bytes(event.peak)}: {where}", pid, event.start, details)


def _mark(name: str, pid: int, when: float, details: Mapping[str, object]) -> Row:
    return {"ph": "i", "s": "p", "name": name, "pid": pid, "tid": 1, "ts": _us(when), "args": dict(details)}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
