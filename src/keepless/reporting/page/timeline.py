"""The step over time for a report: bytes by category, with everything kept, and as measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from keepless.ir import Event, Run, Timeline
from keepless.machine import Plan
from keepless.reporting.account import CATEGORIES, op_at, phase_spans
from keepless.reporting.page.data import Place, TimelineData, Track
from keepless.reporting.picture import everything_kept
from keepless.reporting.series import category_levels, what_runs

MOST_LEVELS = 1600
"""Of one track: more than a screen has columns. Of longer programs the highest of neighbours are shown."""


class _Places:
    """A table of what runs, each once."""

    def __init__(self) -> None:
        self.numbers: dict[Place, int] = {}

    def of(self, place: Place) -> int:
        return self.numbers.setdefault(place, len(self.numbers))


def timeline_data(plan: Plan, measured: Timeline | None = None, most: int = MOST_LEVELS) -> TimelineData:
    """The timelines of a plan. O(edges of the program).

    Arguments:
        measured: of this plan's program.
        most: levels of one track.
    """
    places = _Places()
    events = plan.predicted.events
    predicted, hidden = _track(plan, places, events, list(category_levels(plan)), most)
    kept = everything_kept(plan)
    bare = [Event(-1, e.start, e.end, e.stall, e.resident, e.peak) for e in kept.events]
    seen = None if measured is None else _measured(plan, places, measured, most)
    return TimelineData(
        phases=dict(phase_spans(plan)),
        replays=tuple(_replays(plan)),
        places=tuple(places.numbers),
        predicted=predicted,
        kept=_track(plan, places, bare, None, most)[0],
        measured=seen,
        num_hidden=hidden,
    )


def _track(
    plan: Plan, places: _Places, events: Sequence[Event], levels: Sequence[Mapping[str, int]] | None, most: int
) -> tuple[Track, int]:
    """A track of events, and how many of those that take time are not in it.

    Of instructions that take no time the highest counts at the next one that does.
    """
    rows: list[tuple[float, int]] = []  # where a level starts, and the highest event since the last one
    highest = -1
    for number, event in enumerate(events):
        if highest < 0 or event.peak > events[highest].peak:
            highest = number
        if event.end > event.start:
            rows.append((event.start, highest))
            highest = -1
    if highest >= 0 and rows and events[highest].peak > events[rows[-1][1]].peak:
        rows[-1] = (rows[-1][0], highest)
    if not rows and events:
        rows = [(0.0, max(range(len(events)), key=lambda i: events[i].peak))]
    shown = _thinned(rows, events, most)
    numbers = [number for _, number in shown]
    used = [name for name in CATEGORIES if levels is not None and any(levels[n][name] for n in numbers)]
    track = Track(
        starts=tuple(_short(start) for start, _ in shown),
        seconds=_short(events[-1].end) if events else 0.0,
        peaks=tuple(events[n].peak for n in numbers),
        categories={} if levels is None else {name: tuple(levels[n][name] for n in numbers) for name in used},
        instructions=tuple(events[n].index for n in numbers),
        places=tuple(_place(plan, places, events[n]) for n in numbers),
        durations=tuple(_short(events[n].end - events[n].start) for n in numbers),
        replays=tuple(events[n].index >= 0 and what_runs(plan, events[n].index) == "replay" for n in numbers),
    )
    return track, len(rows) - len(shown)


def _thinned(rows: list[tuple[float, int]], events: Sequence[Event], most: int) -> list[tuple[float, int]]:
    """All rows, or the highest of each of `most` groups of neighbours, from where its group starts."""
    if len(rows) <= most:
        return rows
    size = -(-len(rows) // most)
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [(group[0][0], max(group, key=lambda row: events[row[1]].peak)[1]) for group in groups]


def _place(plan: Plan, places: _Places, event: Event) -> int:
    if event.label:
        return places.of(Place(f"the whole {event.label}", "", "", event.label))
    op = op_at(plan, event.index)
    if op is not None:
        return places.of(Place(op.name, op.module, op.source, op.phase.value))
    return places.of(Place(what_runs(plan, event.index), "", "", "")) if event.index >= 0 else -1


def _measured(plan: Plan, places: _Places, measured: Timeline, most: int) -> Track:
    """The measured events where they are predicted to run; their durations stay measured."""
    spans = phase_spans(plan)
    known = plan.predicted.events
    moved: list[Event] = []
    taken: dict[tuple[int, str], float] = {}
    for event in measured.events:
        if 0 <= event.index < len(known):
            span = known[event.index].start, known[event.index].end
        elif event.label in spans:
            span = spans[event.label]
        else:
            continue
        moved.append(replace(event, start=span[0], end=span[1]))
        taken[event.index, event.label] = _short(event.end - event.start)
    track, _ = _track(plan, places, moved, None, most)
    table = tuple(places.numbers)
    keys = ((i, table[p].phase if i < 0 <= p else "") for i, p in zip(track.instructions, track.places, strict=True))
    return replace(track, durations=tuple(taken[key] for key in keys))


def _replays(plan: Plan) -> Iterator[tuple[float, float]]:
    """Spans in which ops run again, those that touch in one."""
    begin = end = -1.0
    for instr, event in zip(plan.program, plan.predicted.events, strict=True):
        if not isinstance(instr, Run) or not instr.replay or event.end <= event.start:
            continue
        if begin >= 0 and event.start > end:
            yield _short(begin), _short(end)
            begin = -1.0
        begin, end = (event.start if begin < 0 else begin), event.end
    if begin >= 0:
        yield _short(begin), _short(end)


def _short(seconds: float) -> float:
    """Seven digits: files are shorter, and no screen shows more."""
    return float(f"{seconds:.7g}")
