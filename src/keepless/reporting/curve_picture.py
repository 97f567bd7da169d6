"""The picture of a curve: the step's time over the budget, its lower bound, and where there is no plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from keepless.ir import format_bytes
from keepless.reporting.tables import format_percent
from keepless.solve.curve import Curve
from keepless.solve.strategies import Strategy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _PALE, _CURVE, _KNEE, _BUDGET = "#222222", "#777777", "#0072B2", "#009E73", "#B00020"
_MARKS = ("s", "^", "D", "v", "P", "X", "<", ">", "*")
_COLOURS = ("#E69F00", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#004D7A")
_LEGEND: dict[str, Any] = {"ncols": 4, "frameon": False, "fontsize": 9, "handlelength": 1.6, "columnspacing": 1.6}
_STEPS = 200
"""Pieces in which the bound is drawn."""
_ROOM = 0.06
"""Share of the curve's width that is shown on either side."""


def draw_curve(
    curve: Curve,
    path: str | os.PathLike[str],
    *,
    budget_of: Callable[[int], int] = int,
    budget: int | None = None,
    title: str = "",
) -> None:
    """Draws a curve into a file; its name's end says the format (png, svg, pdf).

    Arguments:
        budget_of: the smallest budget for a peak, where budgets have a reserve.
        budget: in bytes, shown as a vertical line.
        title: above the picture; a default says where the knee is.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
        ValueError: the file name's end is no format that matplotlib knows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.6), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.255, 0.83, 0.615))
    left, right = _span(curve, budget_of, budget)
    unit, size = ("GiB", 2.0**30) if right >= 1.2 * 2**30 else ("MiB", 2.0**20)
    scale, word = (1.0, "seconds") if curve.baseline_seconds >= 1 else (1e3, "milliseconds")
    top = _highest(curve, right, budget_of)

    def x(nbytes: int) -> float:
        return budget_of(nbytes) / size

    axes.set_xlim(left / size, right / size)
    axes.set_ylim(*(scale * y for y in _heights(curve, top)))
    _shade(axes, curve, x)
    _lines(axes, curve, x, right / size, scale)
    _strategies(
        axes, [one for one in curve.strategies if one.seconds <= top and budget_of(one.peak) <= right], x, scale
    )
    _knee(axes, curve, x, scale, budget_of)
    if budget is not None:
        _budget(axes, budget, size)
    axes.set_xlabel(f"budget of the device, {unit}", color=_INK)
    axes.set_ylabel(f"step, {word} (predicted)", color=_INK)
    if curve.baseline_seconds:
        _overhead_axis(axes, curve, scale)
    axes.grid(color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)
    axes.tick_params(colors=_INK)
    figure.legend(*axes.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.075, 0.01), **_LEGEND)
    figure.text(0.085, 0.945, title or _title(curve, budget_of), fontsize=13, fontweight="bold", color=_INK)
    figure.text(0.085, 0.9, _subtitle(curve, budget_of), fontsize=9.5, color=_PALE)
    figure.savefig(os.fspath(path))


def _span(curve: Curve, budget_of: Callable[[int], int], budget: int | None) -> tuple[float, float]:
    first, last = min(curve.floor_nbytes, curve.points[0].peak), max(curve.baseline_peak, curve.points[-1].peak)
    low, high = float(budget_of(first)), float(budget_of(last))
    if budget is not None and budget < 2 * high:
        low, high = min(low, float(budget)), max(high, float(budget))
    room = _ROOM * (high - low) or 0.1 * high or 1.0
    return max(0.0, low - 1.5 * room), high + room


def _highest(curve: Curve, right: float, budget_of: Callable[[int], int]) -> float:
    """The longest step that is shown: the curve's, and strategies' that are at most half as much above it again."""
    first = curve.points[0].seconds
    most = first + 0.5 * (first - curve.points[-1].seconds)
    shown = [one.seconds for one in curve.strategies if one.seconds <= most and budget_of(one.peak) <= right]
    return max([first, *shown])


def _heights(curve: Curve, top: float) -> tuple[float, float]:
    low = curve.points[-1].seconds
    room = (top - low) or 0.1 * top or 1.0
    return low - 0.1 * room, top + 0.15 * room


def _shade(axes: Axes, curve: Curve, x: Callable[[int], float]) -> None:
    left = axes.get_xlim()[0]
    floor, first = x(curve.floor_nbytes), x(curve.points[0].peak)
    axes.axvspan(left, floor, color="#c9c9c9", alpha=0.75, linewidth=0, label="no plan exists (proven)", zorder=1)
    if first > floor:
        axes.axvspan(
            floor,
            first,
            facecolor="#f0f0f0",
            edgecolor="#c4c4c4",
            hatch="///",
            linewidth=0,
            label="none found",
            zorder=1,
        )


def _lines(axes: Axes, curve: Curve, x: Callable[[int], float], right: float, scale: float) -> None:
    stairs = sorted([*((p.peak, p.seconds) for p in curve.points), *((w.peak, w.seconds) for w in curve.between)])
    xs = [x(peak) for peak, _ in stairs]
    ys = [scale * curve.seconds_at(peak) for peak, _ in stairs]
    axes.step([*xs, right], [*ys, ys[-1]], where="post", color=_CURVE, linewidth=1.8, label="fastest found", zorder=4)
    axes.plot(
        [x(point.peak) for point in curve.points],
        [scale * point.seconds for point in curve.points],
        "o",
        color=_CURVE,
        markersize=5,
        zorder=5,
    )
    limits = _bound_limits(curve)
    axes.plot(
        [*map(x, limits), right],
        [scale * curve.bound_at(limit) for limit in [*limits, limits[-1]]],
        color=_INK,
        linewidth=1.3,
        linestyle="--",
        label="no plan of its kind is faster",
        zorder=3,
    )


def _bound_limits(curve: Curve) -> list[int]:
    """Limits from the floor to everything kept, close enough to draw the bound's bends."""
    first = min(curve.floor_nbytes, curve.points[0].peak)
    last = max(curve.baseline_peak, first + 1)
    return [first + (last - first) * step // _STEPS for step in range(_STEPS + 1)]


def _strategies(axes: Axes, shown: Sequence[Strategy], x: Callable[[int], float], scale: float) -> None:
    families: dict[str, list[Strategy]] = {}
    for one in shown:
        families.setdefault(one.name.partition("(")[0], []).append(one)
    for number, (family, members) in enumerate(families.items()):
        axes.plot(
            [x(one.peak) for one in members],
            [scale * one.seconds for one in members],
            _MARKS[number % len(_MARKS)],
            color=_COLOURS[number % len(_COLOURS)],
            markeredgecolor="white",
            markersize=8,
            label=f"{family}(k)" if "(" in members[0].name else family,
            zorder=6,
        )
        for one in members:
            axes.annotate(
                one.name.partition("(")[2].rstrip(")"),
                (x(one.peak), scale * one.seconds),
                xytext=(0, 6),
                ha="center",
                textcoords="offset points",
                fontsize=8.5,
                color=_INK,
                zorder=7,
            )


def _knee(axes: Axes, curve: Curve, x: Callable[[int], float], scale: float, budget_of: Callable[[int], int]) -> None:
    if len(curve.points) < 3:
        return
    knee = curve.knee
    axes.plot(
        [x(knee.peak)],
        [scale * knee.seconds],
        "o",
        markersize=14,
        markerfacecolor="none",
        markeredgecolor=_KNEE,
        markeredgewidth=2,
        label=f"knee: {format_bytes(budget_of(knee.peak))}, {format_percent(curve.overhead(knee.seconds))}",
        zorder=6,
    )


def _budget(axes: Axes, budget: int, size: float) -> None:
    left, right = axes.get_xlim()
    if not left <= budget / size <= right:
        return
    axes.axvline(budget / size, color=_BUDGET, linewidth=1.5, label=f"budget {format_bytes(budget)}", zorder=5)


def _overhead_axis(axes: Axes, curve: Curve, scale: float) -> None:
    from matplotlib.ticker import FuncFormatter

    beside: Any = axes.twinx()
    low, high = axes.get_ylim()
    beside.set_ylim(100 * curve.overhead(low / scale), 100 * curve.overhead(high / scale))
    beside.set_ylabel("over everything kept", color=_INK)
    beside.yaxis.set_major_formatter(FuncFormatter(lambda percent, _: f"{percent:+.0f} %"))
    beside.spines["top"].set_visible(False)
    beside.tick_params(colors=_INK)


def _title(curve: Curve, budget_of: Callable[[int], int]) -> str:
    if len(curve.points) == 1:
        return f"One plan: {format_bytes(budget_of(curve.points[0].peak))}"
    knee = curve.knee
    share = knee.peak / curve.baseline_peak if curve.baseline_peak else 1.0
    return f"At the knee {100 * share:.0f} % of the memory costs {format_percent(curve.overhead(knee.seconds))} of time"


def _subtitle(curve: Curve, budget_of: Callable[[int], int]) -> str:
    return (
        f"smallest budget found {format_bytes(budget_of(curve.smallest_nbytes))}, everything kept "
        f"{format_bytes(budget_of(curve.baseline_peak))}; no plan needs less than {format_bytes(curve.floor_nbytes)}"
    )
