"""Everything that tracing a curve met, on one front: what becomes a point, and what stays an order between the points.

A limit's point is the fastest plan within it, whichever search met it: its own, one for another limit, or a named
strategy. Lowest and fastest plans are points in any case.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from keepless.cost import CostModel
from keepless.ir import Certificate, Graph, Status
from keepless.solve.front import front_of
from keepless.solve.lagrange import Woven
from keepless.solve.planner import SPACE
from keepless.solve.solution import Solution, solution

MOST_BETWEEN = 64
"""Orders between the points that a curve keeps."""


@dataclass(frozen=True)
class _Met:
    peak: int
    seconds: float
    found: Solution | Woven
    is_named: bool = False


def sort_out(
    graph: Graph,
    cost: CostModel,
    solved: Mapping[int, Solution],
    named: Sequence[Solution],
    orders: Iterable[Woven],
    seed: int,
) -> tuple[list[tuple[int, Solution]], tuple[Woven, ...]]:
    """Points as (limit, solution), ascending in peak and falling in seconds; and orders between them.

    Arguments:
        solved: by limit.
        named: solutions of named strategies; the limit of those that become points is their own peak.
        orders: that the searches met.
    """
    met = [_Met(s.peak, s.seconds, s) for limit, s in solved.items() if s.peak <= limit]
    met += [_Met(s.peak, s.seconds, s, is_named=True) for s in named]
    met += [_Met(woven.peak, woven.seconds, woven) for woven in orders]
    front = front_of(met, lambda one: (one.peak, one.seconds))
    peaks = [one.peak for one in front]
    limit_of: dict[int, int] = {}
    for limit in sorted(solved):
        limit_of.setdefault(bisect_right(peaks, limit) - 1, limit)
    limit_of.pop(-1, None)
    for index, one in enumerate(front):
        if one.is_named or index in (0, len(front) - 1):
            limit_of.setdefault(index, one.peak)
    claim = Certificate("keepless", Status.FEASIBLE, space=SPACE, seed=seed)
    points = []
    for index in sorted(limit_of):
        found = front[index].found
        whole = found if isinstance(found, Solution) else solution(graph, cost, found.order, claim)
        points.append((limit_of[index], whole))
    return points, _thinned([_woven(one.found) for index, one in enumerate(front) if index not in limit_of])


def _woven(found: Solution | Woven) -> Woven:
    return found if isinstance(found, Woven) else Woven.of(found)


def _thinned(orders: list[Woven]) -> tuple[Woven, ...]:
    """At most `MOST_BETWEEN` of the orders, evenly by number."""
    if len(orders) <= MOST_BETWEEN:
        return tuple(orders)
    return tuple(orders[i * (len(orders) - 1) // (MOST_BETWEEN - 1)] for i in range(MOST_BETWEEN))
