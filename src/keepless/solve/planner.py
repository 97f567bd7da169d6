"""The default planner: prices and minimum cuts for the broad choice, local search on exact profiles for the rest.

1. Cut the forward into segments, in families from coarse to fine (`segments`).
2. For each family find the prices of memory at which the minimum cut just fits (`lagrange`, `min_cut`).
3. Where nothing fits, evict over gaps at the peak (`gaps`); where memory is left, take replays out.

The smallest peak starts from the lowest order of step 1 and evicts until nothing helps. Ops keep the captured order
of their first runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from keepless.cost import CostModel
from keepless.ir import Certificate, Graph, Status
from keepless.solve.floor import floor_bound
from keepless.solve.gaps import Gaps
from keepless.solve.lagrange import Relaxation, Woven
from keepless.solve.min_cut import MinCut
from keepless.solve.segments import families, find_cuts
from keepless.solve.solution import Solution, solution
from keepless.solve.tables import Tables
from keepless.solve.weave import lazy_order

SPACE = "first runs in the captured order; any number of recomputations of forward ops"
_SMALLEST_STARTS = 3
_WORK_OPS = 4_000_000
"""Work of one local search: evaluated orders times their ops."""


@dataclass(frozen=True)
class Planner:
    """One graph with its costs, prepared for any number of budgets."""

    graph: Graph
    cost: CostModel

    @cached_property
    def tables(self) -> Tables:
        """The graph as arrays."""
        return Tables(self.graph, self.cost)

    @cached_property
    def families(self) -> Sequence[Sequence[int]]:
        """Sets of values that are kept in any case."""
        return families(self.tables, find_cuts(self.tables))

    @cached_property
    def work(self) -> int:
        """Orders that one local search may evaluate."""
        return max(200, min(4000, _WORK_OPS // max(self.tables.num_ops, 1)))

    @cached_property
    def smallest(self) -> Woven:
        """The lowest order that was found."""
        tables = self.tables
        starts = []
        for kept in self.families:
            order = lazy_order(tables, MinCut(tables, kept).everything())
            lives = tables.lives(order)
            starts.append(Woven(order, lives.seconds, lives.peak))
        starts.sort(key=lambda w: (w.peak, w.seconds))
        base = tables.lives(tables.base)
        best = Woven(tables.base.tolist(), base.seconds, base.peak)
        for start in starts[:_SMALLEST_STARTS]:
            low = self.lower(start)
            if (low.peak, low.seconds) < (best.peak, best.seconds):
                best = low
        return best

    def lower(self, start: Woven) -> Woven:
        """Evict until nothing helps, the target falling in ever finer steps."""
        gaps = Gaps(self.tables, start.order, self.work)
        low = start
        for step in (0.04, 0.01, 0.002):
            while gaps.work > 0 and low.peak > 0 and gaps.evict(int(low.peak * (1 - step))):
                low = Woven(gaps.order, gaps.seconds, gaps.peak)
            if gaps.peak < low.peak:
                low = Woven(gaps.order, gaps.seconds, gaps.peak)
        gaps.fill(low.peak)
        return Woven(gaps.order, gaps.seconds, gaps.peak) if gaps.peak <= low.peak else low

    def within(self, limit: int) -> Woven:
        """The fastest order that was found within the limit, or the lowest where none was."""
        relaxation = Relaxation(self.tables, limit)
        found = relaxation.run(self.families)
        candidates = [found] if found.peak <= limit else [found, self.smallest]
        best: Woven | None = None
        for start in candidates:
            gaps = Gaps(self.tables, start.order, self.work)
            if gaps.evict(limit):
                gaps.fill(limit)
            woven = Woven(gaps.order, gaps.seconds, gaps.peak)
            if woven.beats(best, limit):
                best = woven
        assert best is not None
        return best


@dataclass(frozen=True)
class Keepless:
    """The planner as a solver."""

    def solve(self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0) -> Solution:
        """The fastest order that was found within the limit."""
        return plan(Planner(graph, cost), limit_nbytes, seed)


def plan(planner: Planner, limit_nbytes: int, seed: int = 0) -> Solution:
    """The planner's solution for one limit."""
    begin = time.perf_counter()
    woven = planner.within(limit_nbytes)
    graph, cost = planner.graph, planner.cost
    bound, where = floor_bound(graph, cost)
    if woven.peak <= limit_nbytes:
        status = Status.OPTIMAL if len(woven.order) == len(graph.ops) else Status.FEASIBLE
    else:
        status = Status.PROVEN_INFEASIBLE if limit_nbytes < bound else Status.NOT_FOUND
    certificate = Certificate(
        "keepless",
        status,
        space=SPACE,
        bound_seconds=float(planner.tables.seconds.sum()),
        bound_bytes=bound,
        witness=f"every op runs once; bytes at {graph.where(graph.ops[where])}" if graph.ops else "",
        solve_seconds=time.perf_counter() - begin,
        seed=seed,
    )
    return solution(graph, cost, woven.order, certificate)
