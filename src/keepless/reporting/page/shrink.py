"""Smaller reports: what there can be very much of, halved, and what is left out counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from keepless.reporting.page.data import DecisionRow, ReportData, Track

_FEW = 100
"""What has no more rows, or levels, stays whole."""


def shrunk(report: ReportData) -> ReportData:
    """The report with half of its single values, else of its modules, else of its timeline; itself if all are few."""
    made, line = report.decisions, report.timeline
    if len(made.values) > _FEW:
        values = _largest(made.values)
        hidden = made.num_hidden + len(made.values) - len(values)
        return replace(report, decisions=replace(made, values=values, num_hidden=hidden))
    if len(made.modules) > _FEW:
        modules = _largest(made.modules)
        note = f"{len(made.modules) - len(modules)} modules of few bytes are left out of the table of modules."
        return replace(report, decisions=replace(made, modules=modules), notes=(*report.notes, note))
    if len(line.predicted.starts) > _FEW:
        predicted, kept = _half(line.predicted), _half(line.kept)
        hidden = line.num_hidden + len(line.predicted.starts) - len(predicted.starts)
        measured = None if line.measured is None else _half(line.measured)
        line = replace(line, predicted=predicted, kept=kept, measured=measured, num_hidden=hidden)
        return replace(report, timeline=line)
    return report


def _largest(rows: Sequence[DecisionRow]) -> tuple[DecisionRow, ...]:
    """The half with most bytes, in the order in which it stands."""
    order = sorted(range(len(rows)), key=lambda i: (-sum(rows[i].ways.values()), i))[: len(rows) // 2]
    return tuple(rows[i] for i in sorted(order))


def _half(track: Track) -> Track:
    """The higher of each two neighbours, from where the first of them starts."""
    number = len(track.starts)
    chosen = [max(range(i, min(i + 2, number)), key=track.peaks.__getitem__) for i in range(0, number, 2)]
    return Track(
        starts=track.starts[::2],
        seconds=track.seconds,
        peaks=tuple(track.peaks[i] for i in chosen),
        categories={name: tuple(column[i] for i in chosen) for name, column in track.categories.items()},
        instructions=tuple(track.instructions[i] for i in chosen),
        places=tuple(track.places[i] for i in chosen),
        durations=tuple(track.durations[i] for i in chosen),
        replays=tuple(track.replays[i] for i in chosen),
    )
