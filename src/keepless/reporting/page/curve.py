"""A curve for a report: points, stairs, bound and strategies, all over budgets."""

from __future__ import annotations

from collections.abc import Callable

from keepless.machine import Plan
from keepless.reporting.page.data import CurveData, CurvePoint, NamedStrategy
from keepless.solve.curve import Curve

_LINE = 80
"""Pieces in which the bound is drawn."""
_MOST_STAIRS = 400


def curve_data(curve: Curve, plan: Plan, budget_of: Callable[[int], int] = int) -> CurveData:
    """A curve over budgets.

    Arguments:
        plan: the report's. Its overhead says where it is: its costs may have been measured at another time.
        budget_of: the smallest budget for a peak, where budgets have a reserve.
    """
    met = sorted({*(point.peak for point in curve.points), *(woven.peak for woven in curve.between)})
    met = met[:: -(-len(met) // _MOST_STAIRS)]
    first = min(curve.floor_nbytes, curve.points[0].peak)
    last = max(curve.baseline_peak, curve.points[-1].peak, first + 1)
    limits = [first + (last - first) * step // _LINE for step in range(_LINE + 1)]
    return CurveData(
        points=tuple(
            CurvePoint(
                budget=budget_of(point.peak),
                peak=point.peak,
                seconds=point.seconds,
                bound_seconds=point.bound_seconds,
                overhead=curve.overhead(point.seconds),
                num_replays=point.num_replays,
                solver=point.solution.certificate.solver,
            )
            for point in curve.points
        ),
        knee=curve.points.index(curve.knee),
        stairs=tuple((budget_of(peak), curve.seconds_at(peak)) for peak in met),
        bound=tuple((budget_of(limit), curve.bound_at(limit)) for limit in limits),
        strategies=tuple(
            NamedStrategy(one.name, budget_of(one.peak), one.seconds, curve.overhead(one.seconds))
            for one in curve.strategies
        ),
        smallest_budget=budget_of(curve.smallest_nbytes),
        floor=curve.floor_nbytes,
        floor_op=curve.blocking,
        baseline_budget=budget_of(curve.baseline_peak),
        baseline_seconds=curve.baseline_seconds,
        chosen=(plan.budget.limits["device"], curve.baseline_seconds * (1 + plan.overhead)),
        is_ended_early=curve.is_ended_early,
    )
