"""The whole curve in one go: the step's time for every budget, from the smallest peak to everything kept.

One `Planner` serves all limits: its cuts are made once, and an order that the search for one limit met is there for
all others. The limits are chosen where the curve is known least: the two ends first, then again and again the middle
of the widest rectangle between neighbours, bytes times seconds. A worked use::

    curve = trace_curve(graph, cost)
    curve.at(3 << 30)         # the fastest plan that was met within 3 GiB; nothing is solved again
    curve.knee.peak           # beyond these bytes more memory buys little
    curve.floor_nbytes        # no plan is below; between here and points[0].peak none was found

A plan for less memory is a plan for more, too, so that what is dominated is replaced by what dominates it: along
`Curve.points` peaks rise and seconds fall. A bound's price per byte gives a line that is below the time of every plan
at every limit (`front.Line`), so that the lines of all limits together bound the whole curve from below.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

from keepless.cost import CostModel
from keepless.errors import InfeasibleBudget, SolverError
from keepless.ir import Certificate, Graph, Status, format_bytes
from keepless.ir.budget import MAX_NBYTES
from keepless.solve.anytime import plan
from keepless.solve.bound import witness_text
from keepless.solve.floor import floor_bound
from keepless.solve.front import LESS, Line, Point, next_limit
from keepless.solve.lagrange import Woven
from keepless.solve.met import sort_out
from keepless.solve.moments import Bound
from keepless.solve.planner import SPACE, Planner
from keepless.solve.rechecking import FREE_SPACE
from keepless.solve.search import Search, Standing
from keepless.solve.solution import Solution, solution
from keepless.solve.strategies import Strategy, check_strategies, named_strategies

MAX_LIMITS = 200
"""Limits that one curve may be solved for."""


@dataclass(frozen=True)
class Curve:
    """The step's time for every limit of memory. Make one with `trace_curve`.

    Arguments:
        graph: the step.
        cost: what the predictions rest on.
        points: ascending in peak, falling in seconds; the first is the lowest peak met, the last the fastest step.
        bounds: one per limit that was solved for, ascending; each says something of all limits.
        strategies: what named solvers reach, whether it is on the curve or not.
        between: orders met on the way that are better than the points below them, ascending in peak.
        smallest_nbytes: the smallest peak that the planner finds again whenever it is asked.
        floor_nbytes: no program at all has a lower peak.
        floor_op: the op that sets this floor.
        baseline_peak, baseline_seconds: of the step with everything kept.
        seed: of the searches.
        is_ended_early: a clock or Ctrl-C ended it before all its limits were solved.
    """

    graph: Graph = field(repr=False)
    cost: CostModel = field(repr=False)
    points: tuple[Point, ...]
    bounds: tuple[Line, ...]
    strategies: tuple[Strategy, ...]
    between: tuple[Woven, ...] = field(repr=False)
    smallest_nbytes: int
    floor_nbytes: int
    floor_op: int
    baseline_peak: int
    baseline_seconds: float
    seed: int = 0
    is_ended_early: bool = False

    def at(self, limit_nbytes: int) -> Solution:
        """The fastest plan met whose peak is within the limit. Nothing is solved: O(log points), or O(edges) for an
        order between the points.

        Raises:
            InfeasibleBudget: no plan within the limit was met.
        """
        index = bisect_right(self._peaks, limit_nbytes) - 1
        if index < 0:
            raise self._infeasible(limit_nbytes)
        found = self.points[index].solution
        inner = bisect_right(self._between_peaks, limit_nbytes) - 1
        if inner >= 0 and self.between[inner].seconds < found.seconds * LESS:
            claim = Certificate("keepless", Status.FEASIBLE, space=SPACE, seed=self.seed)
            found = solution(self.graph, self.cost, self.between[inner].order, claim)
        bound, witness = self._bound(limit_nbytes)
        status = Status.TIME_LIMITED if self.is_ended_early else Status.FEASIBLE
        certificate = replace(
            found.certificate,
            status=Status.OPTIMAL if found.seconds * LESS <= bound else status,
            space=FREE_SPACE if self.graph.loss_op is None else SPACE,
            bound_seconds=bound,
            bound_bytes=self.floor_nbytes,
            witness=witness,
        )
        stated = min(self.smallest_nbytes, limit_nbytes)
        return replace(found, certificate=certificate).stating(stated, self.floor_nbytes)

    def seconds_at(self, limit_nbytes: int) -> float:
        """Of the step of `at(limit_nbytes)`; infinite where there is none."""
        index = bisect_right(self._peaks, limit_nbytes) - 1
        inner = bisect_right(self._between_peaks, limit_nbytes) - 1
        found = self.points[index].seconds if index >= 0 else float("inf")
        return min(found, self.between[inner].seconds) if inner >= 0 else found

    def bound_at(self, limit_nbytes: int) -> float:
        """No plan of the planner's space within this limit has a step of fewer seconds."""
        return self._bound(limit_nbytes)[0]

    @cached_property
    def knee(self) -> Point:
        """The point of the greatest distance to the chord between the ends, bytes and seconds scaled to [0, 1].

        Satopaa et al., Finding a "Kneedle" in a Haystack, 2011, section II, for a falling curve. Where no point is
        below the chord it is the last: memory buys time all the way.
        """
        first, last = self.points[0], self.points[-1]
        width, height = last.peak - first.peak, first.seconds - last.seconds

        def distance(point: Point) -> float:
            if not width or not height:
                return 0.0
            x, y = (point.peak - first.peak) / width, (point.seconds - last.seconds) / height
            return max(0.0, 1.0 - x - y)

        return max(self.points, key=lambda point: (distance(point), point.peak))

    @property
    def blocking(self) -> str:
        """The op that sets the floor, as people look for it."""
        return self.graph.where(self.graph.ops[self.floor_op]) if self.graph.ops else ""

    def overhead(self, seconds: float) -> float:
        """How much longer than with everything kept: 0.05 is five percent. 0 if the costs are all 0."""
        return seconds / self.baseline_seconds - 1 if self.baseline_seconds else 0.0

    def as_dict(self, budget_of: Callable[[int], int] | None = None) -> dict[str, object]:
        """Everything but the orders, as JSON values.

        Arguments:
            budget_of: the smallest budget for a peak, where budgets have a reserve; None for the peak itself.
        """
        of = budget_of or int
        return {
            "smallest_budget": of(self.smallest_nbytes),
            "floor": {"nbytes": self.floor_nbytes, "op": self.blocking},
            "baseline": {
                "budget": of(self.baseline_peak),
                "peak": self.baseline_peak,
                "seconds": self.baseline_seconds,
            },
            "points": [
                {
                    "budget": of(point.peak),
                    "limit": point.limit_nbytes,
                    "peak": point.peak,
                    "seconds": point.seconds,
                    "bound_seconds": point.bound_seconds,
                    "overhead": self.overhead(point.seconds),
                    "num_replays": point.num_replays,
                    "solver": point.solution.certificate.solver,
                }
                for point in self.points
            ],
            "knee": self.points.index(self.knee),
            "bounds": [
                {
                    "limit": line.limit_nbytes,
                    "seconds": self.bound_at(line.limit_nbytes),
                    "seconds_per_byte": line.price,
                }
                for line in self.bounds
            ],
            "strategies": [
                {"name": one.name, "budget": of(one.peak), "peak": one.peak, "seconds": one.seconds}
                for one in self.strategies
            ],
            "seed": self.seed,
            "ended_early": self.is_ended_early,
        }

    @cached_property
    def _peaks(self) -> list[int]:
        return [point.peak for point in self.points]

    @cached_property
    def _between_peaks(self) -> list[int]:
        return [woven.peak for woven in self.between]

    def _bound(self, limit_nbytes: int) -> tuple[float, str]:
        best = max(self.bounds, key=lambda line: line.at(limit_nbytes))
        base = sum(self.cost.seconds)
        if best.at(limit_nbytes) > base:
            return best.at(limit_nbytes), best.witness
        return base, witness_text(Bound(0.0, {}), self.floor_op)

    def _infeasible(self, limit: int) -> InfeasibleBudget:
        low = self.smallest_nbytes
        reason = "no plan exists" if limit < self.floor_nbytes else "none was found"
        return InfeasibleBudget(
            f"The limit {format_bytes(limit)} ({limit} bytes) is below the curve: {reason}. The smallest peak found is "
            f"{format_bytes(low)} ({low} bytes); no plan needs less than {format_bytes(self.floor_nbytes)} at op "
            f"{self.blocking}. Ask for {low} bytes or more, or use a smaller batch.",
            smallest_budget=low,
            bound=self.floor_nbytes,
            blocking=self.blocking,
        )


def trace_curve(
    graph: Graph,
    cost: CostModel,
    budgets: Iterable[int] | None = None,
    points: int = 12,
    seed: int = 0,
    search: Search | None = None,
    strategies: Sequence[str] | None = None,
) -> Curve:
    """Solves for some limits and gives the curve through them.

    Complexity: `points` searches of the planner, which share cuts and orders.

    Arguments:
        budgets: limits of the peak in bytes to solve for, the two ends beside them; those outside of the curve are
            left out. None: chosen where the curve is known least.
        points: how many limits, where they are chosen.
        seed: of the searches.
        search: `work` counts limits, and `tell` hears of each. The two ends are solved in any case; then Ctrl-C ends it
            with the points that there are, and a second one at once.
        strategies: names in `keepless.solve.SOLVERS` to show beside the curve; None for those that cost little.

    Raises:
        SolverError: `points` or a limit is out of range, or a strategy is unknown.
    """
    check_points(points)
    check_strategies(strategies)
    wanted = _checked(budgets)
    planner = Planner(graph, cost)
    tables = planner.tables
    search = search or Search()
    base = tables.lives(tables.base)
    solved: dict[int, Solution] = {}
    lines: dict[int, Line] = {}

    def solve_for(limit: int) -> None:
        inner = search.inner()
        inner.is_interrupted = search.is_interrupted
        solved[limit] = found = plan(planner, limit, seed, inner)
        search.is_cut_by_clock |= inner.is_cut_by_clock
        search.is_interrupted |= inner.is_interrupted
        lines[limit] = Line.of(tables, limit, found.certificate)
        search.report(Standing("curve", found.seconds, found.peak, found.certificate.bound_seconds, search.spent))

    for limit in sorted({base.peak, planner.smallest.peak}, reverse=True):
        search.spend()
        solve_for(limit)
    low, high = planner.smallest.peak, base.peak
    try:
        if wanted is None:
            while len(solved) < points and (middle := next_limit(solved)) is not None and search.spend():
                solve_for(middle)
        else:
            for limit in wanted:
                if low < limit < high and limit not in solved and search.spend():
                    solve_for(limit)
    except KeyboardInterrupt:
        if search.is_interrupted:
            raise
        search.interrupt()
    named = [] if search.is_interrupted else named_strategies(planner, strategies, (low, (low + high) // 2), seed)
    floor, where = floor_bound(graph, cost)
    without = Curve(
        graph=graph,
        cost=cost,
        points=(),
        bounds=tuple(lines[limit] for limit in sorted(lines)),
        strategies=tuple(one for one, _ in named),
        between=(),
        smallest_nbytes=low,
        floor_nbytes=floor,
        floor_op=where,
        baseline_peak=high,
        baseline_seconds=solved[high].seconds,
        seed=seed,
        is_ended_early=search.is_cut_by_clock or search.is_interrupted,
    )
    met = (woven for woven, _ in planner.seen.values())
    chosen, between = sort_out(graph, cost, solved, [found for _, found in named], met, seed)
    found_points = tuple(Point(limit, found, without.bound_at(found.peak)) for limit, found in chosen)
    return replace(without, points=found_points, between=between)


def check_points(points: object) -> None:
    """Refuses a number of points that no curve has.

    Raises:
        SolverError: it is not between 2 and MAX_LIMITS.
    """
    if isinstance(points, bool) or not isinstance(points, int) or not 2 <= points <= MAX_LIMITS:
        raise SolverError(f"A curve has 2 to {MAX_LIMITS} points, not {points!r}.")


def _checked(budgets: Iterable[int] | None) -> list[int] | None:
    if budgets is None:
        return None
    wanted = list(islice(budgets, MAX_LIMITS + 1))
    if len(wanted) > MAX_LIMITS:
        raise SolverError(f"A curve is solved for at most {MAX_LIMITS} limits. Ask for fewer.")
    for limit in wanted:
        if isinstance(limit, bool) or not isinstance(limit, int) or not 0 < limit <= MAX_NBYTES:
            raise SolverError(f"The limit {limit!r} is not a number of bytes between 1 and 2**60.")
    return sorted(set(wanted))
