"""The picture of a plan: bytes on the device over the step, with everything kept and under the plan."""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from keepless.ir import DEVICE, Event, Run, Timeline, format_bytes
from keepless.machine import Plan, simulate
from keepless.passes import from_order, reuse_storage
from keepless.reporting.account import CATEGORIES, holdings, phase_spans, where_at
from keepless.reporting.tables import format_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "parameters": "#0072B2",
    "buffers": "#004D7A",
    "optimizer state": "#56B4E9",
    "gradients": "#009E73",
    "inputs": "#999999",
    "outside": "#666666",
    "outputs": "#CC79A7",
    "activations": "#E69F00",
    "generator states": "#F0E442",
    "scratch": "#D55E00",
}
"""Okabe and Ito's palette, which colour-blind people tell apart, with two greys and a darker blue."""

_BUDGET = "#B00020"
_INK = "#222222"
_PALE = "#777777"
_MEASURED = "#5B2A86"
_VISIBLE = 0.004
"""A category below this share of the highest bytes is left out of the legend."""
MAX_POINTS = 4000
"""More columns than a picture has pixels; longer programs are thinned, peaks kept."""


@dataclass(frozen=True)
class Curve:
    """Bytes over time, as steps: `levels[i]` holds from `starts[i]` to `starts[i + 1]`, the last one to `seconds`."""

    starts: tuple[float, ...]
    levels: tuple[int, ...]
    seconds: float

    def at(self, second: float) -> int:
        """Bytes at a time."""
        return self.levels[max(0, bisect_right(self.starts, second) - 1)] if self.levels else 0


def curve_of(timeline: Timeline) -> Curve:
    """The highest bytes over the timeline, one step per event that takes time."""
    starts: list[float] = []
    levels: list[int] = []
    waiting = 0
    for event in timeline.events:
        waiting = max(waiting, event.peak)
        if event.end > event.start:
            starts.append(event.start)
            levels.append(waiting)
            waiting = 0
    if levels and waiting:
        levels[-1] = max(levels[-1], waiting)
    return Curve(tuple(starts), tuple(levels), timeline.seconds)


def everything_kept(plan: Plan) -> Timeline:
    """The predicted timeline of the plan's step with everything kept."""
    graph = plan.graph
    return simulate(graph, reuse_storage(graph, from_order(graph, range(len(graph.ops)))), plan.cost)


def picture_dict(plan: Plan) -> dict[str, object]:
    """What the picture shows, as JSON values."""
    before, after = curve_of(everything_kept(plan)), curve_of(plan.predicted)
    return {
        "budget": plan.budget.limits[DEVICE],
        "peak": plan.predicted_peak,
        "phases": {name: list(span) for name, span in phase_spans(plan).items()},
        "before": {"seconds": before.seconds, "starts": list(before.starts), "bytes": list(before.levels)},
        "after": {"seconds": after.seconds, "starts": list(after.starts), "bytes": list(after.levels)},
    }


def draw(
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    note: str = "",
    measured: Timeline | None = None,
) -> None:
    """Draws the plan's step into a file; its name's end says the format (png, svg, pdf).

    Arguments:
        measured: a measured timeline of the plan, drawn as a line over the predicted bytes, each instruction's where
            it is predicted to run.
        title: above the picture; a default says what the plan reaches.
        note: small, below it.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.075, 0.175, 0.9, 0.655))
    before = curve_of(everything_kept(plan))
    unit, divisor = _unit(max(plan.baseline_peak, plan.predicted_peak, max(before.levels, default=0)))
    _fill(axes, plan, divisor)
    _outline(axes, before, divisor)
    _bands(axes, plan)
    _limits(axes, plan, before, divisor)
    _marks(axes, plan, before, divisor)
    if measured is not None:
        _overlay(axes, plan, measured, divisor)
    axes.set_xlabel("seconds of the step (predicted)", color=_INK)
    axes.set_ylabel(f"on the device, {unit}", color=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.text(0.075, 0.945, title or _title(plan), fontsize=14, fontweight="bold", color=_INK)
    figure.text(0.075, 0.907, _subtitle(plan), fontsize=10, color=_PALE)
    figure.text(0.075, 0.872, at_peaks(plan, measured), fontsize=9, color=_PALE)
    if note:
        figure.text(0.975, 0.015, note, fontsize=8, color=_PALE, ha="right")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1],
        labels[::-1],
        loc="lower left",
        bbox_to_anchor=(0.068, 0.02),
        ncols=8,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.4,
    )
    figure.savefig(os.fspath(path))


def _unit(nbytes: int) -> tuple[str, float]:
    for unit, size in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if nbytes >= 1.2 * size:
            return unit, size
    return "bytes", 1.0


def _fill(axes: Axes, plan: Plan, divisor: float) -> None:
    """The plan's bytes, stacked by category."""
    starts: list[float] = []
    stacks: dict[str, list[int]] = {name: [] for name in CATEGORIES}
    waiting: dict[str, int] | None = None
    events = plan.predicted.events
    for held in holdings(plan.graph, plan.program, plan.predicted):
        event = events[held.index]
        now = dict(held.nbytes)
        if waiting is None or sum(now.values()) > sum(waiting.values()):
            waiting = now
        if event.end > event.start:
            starts.append(event.start)
            for name, column in stacks.items():
                column.append(waiting[name])
            waiting = None
    if not starts:
        return
    keep = _thin([sum(column[i] for column in stacks.values()) for i in range(len(starts))])
    x = [starts[i] for i in keep] + [plan.predicted_seconds]
    base = [0.0] * len(x)
    highest = max(1, plan.predicted_peak)
    for name, column in stacks.items():
        level = [column[i] / divisor for i in keep]
        top = [b + v for b, v in zip(base, [*level, level[-1]], strict=True)]
        if max(column):
            label = name if max(column) >= _VISIBLE * highest else None
            axes.fill_between(
                x, base, top, step="post", color=COLOURS[name], linewidth=0, label=label, alpha=0.92, zorder=2
            )
        base = top
    axes.step(x, base, where="post", color=_INK, linewidth=0.9, zorder=3)


def _thin(levels: list[int]) -> list[int]:
    """Indices to draw: all, or the highest of each of MAX_POINTS groups."""
    if len(levels) <= MAX_POINTS:
        return list(range(len(levels)))
    size = -(-len(levels) // MAX_POINTS)
    groups = [range(i, min(i + size, len(levels))) for i in range(0, len(levels), size)]
    return [max(group, key=levels.__getitem__) for group in groups]


def _outline(axes: Axes, curve: Curve, divisor: float) -> None:
    if curve.levels:
        keep = _thin(list(curve.levels))
        x = [curve.starts[i] for i in keep] + [curve.seconds]
        y = [curve.levels[i] / divisor for i in keep]
        axes.fill_between(x, [*y, y[-1]], step="post", color="#efefef", linewidth=0, alpha=0.7, zorder=1)
        axes.step(x, [*y, y[-1]], where="post", color=_PALE, linewidth=1.6, zorder=4)


def _bands(axes: Axes, plan: Plan) -> None:
    """Names of the phases along the top, and a strip of the replays below the axis."""
    spans = phase_spans(plan)
    whole = plan.predicted_seconds or 1.0
    trans = axes.get_xaxis_transform()
    for number, (name, (begin, end)) in enumerate(spans.items()):
        if number and begin > 0:
            axes.axvline(begin, color="#bbbbbb", linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
        if end - begin > 0.05 * whole:
            axes.text((begin + end) / 2, 1.015, name, transform=trans, ha="center", fontsize=9, color=_PALE)
        elif end - begin > 0.004 * whole:
            last = end > 0.95 * whole
            axes.text(
                end if last else begin,
                1.015,
                name,
                transform=trans,
                ha="right" if last else "left",
                fontsize=9,
                color=_PALE,
            )
    strips = [
        (event.start, event.end - event.start)
        for instr, event in zip(plan.program, plan.predicted.events, strict=True)
        if isinstance(instr, Run) and instr.replay
    ]
    if strips:
        axes.broken_barh(strips, (0.0, 0.02), transform=trans, color=_INK, zorder=6, label="recomputing")


def _limits(axes: Axes, plan: Plan, before: Curve, divisor: float) -> None:
    budget = plan.budget.limits[DEVICE]
    highest = max(plan.predicted_peak, max(before.levels, default=0))
    show_budget = budget <= 1.25 * highest
    axes.set_xlim(0, max(plan.predicted_seconds, before.seconds) * 1.001 or 1)
    axes.set_ylim(0, 1.12 * max(highest, budget if show_budget else 0) / divisor or 1)
    if show_budget:
        axes.axhline(budget / divisor, color=_BUDGET, linewidth=1.5, linestyle="--", zorder=5)


def _marks(axes: Axes, plan: Plan, before: Curve, divisor: float) -> None:
    """Budget, peaks, and the line of everything kept, named where they stand."""
    budget = plan.budget.limits[DEVICE]
    right = axes.get_xlim()[1]
    box: dict[str, Any] = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.88}
    if budget / divisor <= axes.get_ylim()[1]:
        axes.annotate(
            f"budget {format_bytes(budget)}",
            (right, budget / divisor),
            xytext=(-4, 5),
            ha="right",
            textcoords="offset points",
            color=_BUDGET,
            fontsize=10,
            fontweight="bold",
            zorder=7,
            bbox=box,
        )
    if before.levels:
        top = max(before.levels)
        when = before.starts[before.levels.index(top)]
        axes.annotate(
            f"everything kept: {format_bytes(top)}",
            (when, top / divisor),
            xytext=(10, 4),
            color="#555555",
            textcoords="offset points",
            fontsize=10,
            zorder=7,
            bbox=box,
        )
    if plan.predicted.events:
        event = plan.predicted.events[plan.predicted.peak_index]
        text = f"peak {format_bytes(plan.predicted_peak)}"
        axes.plot([event.start], [plan.predicted_peak / divisor], "o", color=_INK, markersize=5, zorder=8)
        beside = event.start > 0.3 * right
        axes.annotate(
            text,
            (event.start, plan.predicted_peak / divisor),
            xytext=(-8 if beside else 8, 10),
            color=_INK,
            ha="right" if beside else "left",
            textcoords="offset points",
            fontsize=10,
            fontweight="bold",
            zorder=8,
            bbox=box,
        )


def _overlay(axes: Axes, plan: Plan, measured: Timeline, divisor: float) -> None:
    """The measured bytes as a line, each instruction's where it is predicted to run, and their peak."""
    spans = phase_spans(plan)
    events: list[Event] = []
    for event in measured.events:
        if 0 <= event.index < len(plan.predicted.events):
            known = plan.predicted.events[event.index]
            events.append(replace(event, start=known.start, end=known.end))
        elif event.label in spans:
            events.append(replace(event, start=spans[event.label][0], end=spans[event.label][1]))
    curve = curve_of(Timeline(tuple(events)))
    if not curve.levels:
        return
    keep = _thin(list(curve.levels))
    x = [curve.starts[i] for i in keep] + [curve.seconds]
    y = [curve.levels[i] / divisor for i in keep]
    axes.step(x, [*y, y[-1]], where="post", color=_MEASURED, linewidth=1.3, linestyle=(0, (4, 1.5)), zorder=7)
    axes.plot([], [], color=_MEASURED, linewidth=1.3, linestyle=(0, (4, 1.5)), label="measured")
    event = max(events, key=lambda one: (one.peak, -one.start))
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.12 * event.peak / divisor))
    axes.plot([event.start], [event.peak / divisor], "D", color=_MEASURED, markersize=4, zorder=9)


def at_peaks(plan: Plan, measured: Timeline | None) -> str:
    """The ops at the predicted and at the measured peak, in words."""
    words = []
    if plan.predicted.events:
        words.append(f"peak at {where_at(plan, plan.predicted.peak_index)}")
    if measured is not None and measured.events:
        event = max(measured.events, key=lambda one: (one.peak, -one.start))
        same = event.index == plan.predicted.peak_index
        place = "the same op" if same else event.label or where_at(plan, event.index)
        words.append(f"measured {format_bytes(event.peak)} at {place}")
    return "; ".join(words)


def _title(plan: Plan) -> str:
    share = plan.predicted_peak / plan.baseline_peak if plan.baseline_peak else 1.0
    return f"{100 * share:.0f} % of the memory, {format_percent(plan.overhead)} time, the same gradients bit for bit"


def _subtitle(plan: Plan) -> str:
    parts = [
        f"{format_bytes(plan.kept_nbytes)} kept for the backward",
        f"{format_bytes(plan.recomputed_nbytes)} made again by {plan.num_replays} replays",
        f"predicted peak {format_bytes(plan.predicted_peak)}",
    ]
    if plan.measured_peak:
        parts.append(f"measured {format_bytes(plan.measured_peak)}")
    return ", ".join(parts)
