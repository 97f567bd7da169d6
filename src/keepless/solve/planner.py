"""The default planner: prices and minimum cuts for the broad choice, local search on exact profiles for the rest.

1. Cut the forward into segments, in families from coarse to fine (`segments`).
2. For each family find the prices of memory at which the minimum cut just fits (`lagrange`, `min_cut`).
3. Where nothing fits, evict over gaps at the peak (`gaps`); where memory is left, take replays out.

The smallest peak starts from the lowest order of step 1 and evicts until nothing helps. Ops keep the captured order
of their first runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from keepless.cost import CostModel
from keepless.ir import Certificate, Graph, Status
from keepless.solve.bound import seconds_bound
from keepless.solve.floor import floor_bound
from keepless.solve.gaps import Gaps
from keepless.solve.lagrange import Relaxation, Woven, base_profile
from keepless.solve.min_cut import MinCut
from keepless.solve.search import Search
from keepless.solve.segments import families, find_cuts
from keepless.solve.solution import Solution, solution
from keepless.solve.tables import Ints, Tables
from keepless.solve.weave import lazy_order

SPACE = "first runs in the captured order, backward ops once, any number of recomputations of forward ops"
_SMALLEST_STARTS = 3
_LOOSENINGS = (1.04, 1.12, 1.25, 1.5)
_BOUND_POSITIONS = 6
_WORK_OPS = 4_000_000
"""Work of one local search: evaluated orders times their ops."""


@dataclass(frozen=True)
class Planner:
    """One graph with its costs, prepared for any number of budgets."""

    graph: Graph
    cost: CostModel
    is_proxy: bool = False

    @cached_property
    def tables(self) -> Tables:
        """The graph as arrays."""
        return Tables(self.graph, self.cost)

    @cached_property
    def cuts(self) -> list[MinCut]:
        """One cut per family of values that are kept in any case."""
        return [MinCut(self.tables, kept) for kept in families(self.tables, find_cuts(self.tables))]

    @cached_property
    def seen(self) -> dict[frozenset[int], tuple[Woven, Ints]]:
        """Woven orders by their set of replays, shared by the searches for all limits."""
        return {}

    @cached_property
    def work(self) -> int:
        """Orders that one local search may evaluate."""
        return max(200, min(4000, _WORK_OPS // max(self.tables.num_ops, 1)))

    @cached_property
    def smallest(self) -> Woven:
        """The lowest order that was found.

        The search weighs ops by the bytes that they move, not by measured seconds, so that the smallest budget of a
        graph is the same in every run; replays that its peak does not need are then taken out by measured seconds.
        """
        if self.is_proxy:
            return self._lowest()
        low = Planner(self.graph, proxy_cost(self.graph, self.cost), is_proxy=True).smallest
        gaps = Gaps(self.tables, low.order, self.work)
        gaps.fill(low.peak)
        lives = self.tables.lives(gaps.order if gaps.peak <= low.peak else low.order)
        return Woven(gaps.order if gaps.peak <= low.peak else low.order, lives.seconds, lives.peak)

    def _lowest(self) -> Woven:
        tables = self.tables
        starts = []
        for cut in self.cuts:
            order = lazy_order(tables, cut.everything())
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
        found = self._relaxed(limit)
        best = self._refined(found, limit)
        if best.peak <= limit and len(best.order) == self.tables.num_ops:
            return best
        # Prices cannot express recomputation within recomputation: plans for more memory, evicted down, can be better.
        fits = 2 if self.tables.num_ops <= 6000 else 1
        for loosening in _LOOSENINGS[: fits if found.peak <= limit else fits + 2]:
            start = self._relaxed(int(limit * loosening))
            woven = self._refined(start, limit)
            best = woven if woven.beats(best, limit) else best
        if best.peak > limit or found.peak > limit:
            woven = self._refined(self.smallest, limit)
            best = woven if woven.beats(best, limit) else best
        return best

    def _relaxed(self, limit: int) -> Woven:
        return Relaxation(self.tables, limit, seen=self.seen).run(self.cuts)

    def _refined(self, start: Woven, limit: int) -> Woven:
        gaps = Gaps(self.tables, start.order, self.work)
        if gaps.evict(limit):
            gaps.fill(limit)
        return Woven(gaps.order, gaps.seconds, gaps.peak)


@dataclass(frozen=True)
class Keepless:
    """The planner as a solver."""

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The fastest order that was found within the limit."""
        return plan(Planner(graph, cost), limit_nbytes, seed)


def plan(planner: Planner, limit_nbytes: int, seed: int = 0) -> Solution:
    """The planner's solution for one limit."""
    begin = time.perf_counter()
    woven = planner.within(limit_nbytes)
    graph, cost = planner.graph, planner.cost
    bound, where = floor_bound(graph, cost)
    fastest, at = float(planner.tables.seconds.sum()), -1
    if woven.peak <= limit_nbytes and len(woven.order) > len(graph.ops):
        fastest, at = seconds_bound(planner.tables, limit_nbytes, _tight_positions(planner.tables, woven))
    if woven.peak <= limit_nbytes:
        status = Status.OPTIMAL if woven.seconds <= fastest * (1 + 1e-9) else Status.FEASIBLE
    else:
        status = Status.PROVEN_INFEASIBLE if limit_nbytes < bound else Status.NOT_FOUND
    moment = f"minimum cut at {graph.where(graph.ops[at])}" if at >= 0 else "every op runs once"
    certificate = Certificate(
        "keepless",
        status,
        space=SPACE,
        bound_seconds=fastest,
        bound_bytes=bound,
        witness=f"seconds: {moment}; bytes: {graph.where(graph.ops[where])}" if graph.ops else "",
        solve_seconds=time.perf_counter() - begin,
        seed=seed,
    )
    return solution(graph, cost, woven.order, certificate)


def _tight_positions(tables: Tables, woven: Woven) -> list[int]:
    """The LOSS op and the backward ops whose first runs see the most bytes."""
    order = np.array(woven.order, np.int64)
    profile = base_profile(tables, order, tables.lives(order).profile)
    top = [int(t) for t in np.argsort(-profile, kind="stable") if t > tables.loss]
    return [t for t in [tables.loss, *top[: _BOUND_POSITIONS - 1]] if t < tables.num_ops]


def proxy_cost(graph: Graph, cost: CostModel) -> CostModel:
    """The measured scratch, with seconds that depend on the graph alone: bytes moved, at 10 GB/s, and 5 us a call."""
    nbytes = [value.nbytes for value in graph.values]
    seconds = tuple(5e-6 + sum(nbytes[v] for v in (*op.inputs, *op.outputs)) / 1e10 for op in graph.ops)
    return CostModel(seconds, cost.scratch, cost.links, cost.origin)
