"""A curve as plain text: one row per plan, with bars, and what named strategies reach.

::

        budget       peak       step    overhead   at least  replays
     19.94 MiB  19.86 MiB   82.10 ms    +33.9 %    +27.1 %      312  ##############################  smallest
     31.20 MiB  31.10 MiB   67.02 ms     +9.3 %     +8.8 %      104  ########                        knee
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

from keepless.ir import format_bytes
from keepless.reporting.decisions import format_seconds
from keepless.reporting.tables import format_percent
from keepless.solve.curve import Curve
from keepless.solve.front import Point

_DISTURBED = 0.05
"""Share of the seconds above which they are in doubt."""
_BAR = 30
"""Characters of the longest bar."""


def curve_text(curve: Curve, budget_of: Callable[[int], int] = int) -> str:
    """The curve as a table of text.

    Arguments:
        budget_of: the smallest budget for a peak, where budgets have a reserve.
    """
    rows = [("budget", "peak", "step", "overhead", "at least", "replays")]
    rows += [_row(curve, point, budget_of) for point in curve.points]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for index, point in enumerate(curve.points, start=1):
        lines[index] = f"{lines[index]}  {_bar(curve, point):<{_BAR}}  {_remark(curve, point)}".rstrip()
    lines.append(
        f"smallest budget found {format_bytes(budget_of(curve.smallest_nbytes))}; "
        f"no plan needs less than {format_bytes(curve.floor_nbytes)}, at {curve.blocking or 'no op'}"
    )
    if curve.cost.disturbed >= _DISTURBED:
        lines.append(
            f"other processes had the cores while ops were timed: {curve.cost.disturbed:.0%} of the step's seconds are "
            "too long; ask again when the machine is idle (bytes do not depend on it)"
        )
    if curve.is_ended_early:
        lines.append(
            f"the search was ended early, after {len(curve.bounds)} budgets: the curve is rougher than it can be, and "
            "another run may find other plans"
        )
    if curve.strategies:
        lines.append("named strategies, each at the smallest budget that it needs:")
    names = max((len(one.name) for one in curve.strategies), default=0)
    sizes = [format_bytes(budget_of(one.peak)) for one in curve.strategies]
    wide = max(map(len, sizes), default=0)
    for one, size in zip(curve.strategies, sizes, strict=True):
        here = format_percent(curve.overhead(one.seconds))
        lines.append(f"  {one.name:<{names}}  {size:>{wide}}  {here:>9}  {_beside(curve, one.peak)}".rstrip())
    return "\n".join(lines)


def _row(curve: Curve, point: Point, budget_of: Callable[[int], int]) -> tuple[str, str, str, str, str, str]:
    return (
        format_bytes(budget_of(point.peak)),
        format_bytes(point.peak),
        format_seconds(point.seconds),
        format_percent(curve.overhead(point.seconds)),
        format_percent(curve.overhead(point.bound_seconds)),
        str(point.num_replays),
    )


def _bar(curve: Curve, point: Point) -> str:
    longest = curve.overhead(curve.points[0].seconds)
    return "#" * round(_BAR * curve.overhead(point.seconds) / longest) if longest > 0 else ""


def _remark(curve: Curve, point: Point) -> str:
    marks = [
        name
        for name, is_it in (
            ("smallest", point is curve.points[0]),
            ("knee", point is curve.knee and len(curve.points) > 2),
            ("everything kept", point.peak == curve.baseline_peak and not point.num_replays),
        )
        if is_it
    ]
    solver = point.solution.certificate.solver
    if solver not in ("keepless", "keep_all"):
        marks.append(f"by {solver}")
    return ", ".join(marks)


def _beside(curve: Curve, peak: int) -> str:
    """What the curve reaches at a strategy's peak."""
    seconds = curve.seconds_at(peak)
    return f"(the curve there: {format_percent(curve.overhead(seconds))})" if isfinite(seconds) else ""
