"""A graph prepared for planning: prices and minimum cuts for the broad choice, local search for the rest.

1. Cut the forward into segments, in families from coarse to fine (`segments`).
2. For each family find the prices of memory at which the minimum cut just fits (`lagrange`, `min_cut`).
3. Where nothing fits, evict over gaps at the peak (`gaps`); where memory is left, take replays out.

The smallest peak starts from the lowest order of step 1, and from binomial schedules, and evicts until nothing helps.
Ops keep the captured order of their first runs. `anytime` goes on from there: a bound, and better orders until the gap
is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest

from keepless.cost import CostModel
from keepless.ir import Graph
from keepless.solve.binomial import binomials
from keepless.solve.bound import best_bound, candidates
from keepless.solve.classics.rotor import Rotor
from keepless.solve.front import front_of
from keepless.solve.gaps import Gaps
from keepless.solve.lagrange import PriceSearch, Woven
from keepless.solve.min_cut import MinCut, Spans
from keepless.solve.moments import Bound, Relaxation
from keepless.solve.reorder import is_free, low_order, permuted
from keepless.solve.search import Search
from keepless.solve.segments import families, find_cuts
from keepless.solve.tables import Ints, Tables
from keepless.solve.weave import lazy_order

SPACE = "first runs in the captured order, backward ops once, any number of recomputations of forward ops"
_SMALLEST_STARTS = 3
_MOST_RUNS = 3
"""Runs of a binomial schedule, over the ops: beyond it a step would last a multiple."""
_NEAR = (1.0, 1.3, 1.55, 1.8)
"""Bytes above the static ones, over the limit's: schedules so near are evicted down to it."""
_LOOSENINGS = (1.12, 1.25, 1.04, 1.5, 1.2, 2.0)
"""Limits, over the one that is asked for, for which orders are found and then evicted down."""
_WORK_OPS = 4_000_000
"""Work of one local search: evaluated orders times their ops."""
_IMPROVE_OPS = 5_000_000
"""The same for the rounds after it."""
_ENOUGH = 0.005
_MOST_SEEN = 3_000_000
"""Op ids in the orders that searches share, about 60 bytes each; beyond it only the best orders stay."""
_HUGE = 10_000
"""Ops beyond which one start must do for the smallest peak."""
_LARGE = 3000
"""Ops beyond which twice the gap is enough."""


@dataclass(frozen=True)
class Planner:
    """One graph with its costs, prepared for any number of budgets.

    Arguments:
        graph: the step.
        cost: of its ops.
        is_proxy: the costs stand for others (see `smallest`).
        keeps_order: first runs in the graph's order, also where another would be allowed.
        first_runs: where the graph's ops are those of another graph in another order: their ids there.
        like: a planner of the same graph at other seconds, whose tables serve here, too.
    """

    graph: Graph
    cost: CostModel
    is_proxy: bool = False
    keeps_order: bool = False
    first_runs: tuple[int, ...] | None = None
    like: Planner | None = None

    @cached_property
    def tables(self) -> Tables:
        """The graph as arrays."""
        return Tables(self.graph, self.cost) if self.like is None else self.like.tables.priced(self.cost)

    @cached_property
    def families(self) -> list[tuple[int, ...]]:
        """Values that are kept in any case, from none to every narrow place."""
        return families(self.tables, find_cuts(self.tables))

    @cached_property
    def cuts(self) -> list[MinCut]:
        """One cut per family."""
        spans = Spans.of(self.tables)
        return [MinCut(self.tables, kept, spans) for kept in self.families]

    @cached_property
    def seen(self) -> dict[frozenset[int], tuple[Woven, Ints]]:
        """Woven orders by their set of replays, shared by the searches for all limits."""
        return {}

    def forget(self) -> None:
        """Of the orders that the searches share only those stay that no other beats, where there are too many."""
        if len(self.seen) * self.tables.num_ops > _MOST_SEEN:
            best = front_of(self.seen.items(), lambda item: (item[1][0].peak, item[1][0].seconds))
            self.seen.clear()
            self.seen.update(best)

    @cached_property
    def work(self) -> int:
        """Orders that one local search may evaluate."""
        return max(60, min(4000, _WORK_OPS // max(self.tables.num_ops, 1)))

    @cached_property
    def improvement_work(self) -> int:
        """Orders that the search for better ones may evaluate."""
        return max(60, min(10_000, _IMPROVE_OPS // max(self.tables.num_ops, 1)))

    @property
    def enough(self) -> float:
        """A certified gap at which an order is left as it is."""
        return _ENOUGH if self.tables.num_ops <= _LARGE else 2 * _ENOUGH

    @cached_property
    def relaxation(self) -> Relaxation:
        """What bounds rest on."""
        return Relaxation(self.tables)

    def bound(self, limit: int, orders: Sequence[Woven], known: Bound | None = None) -> Bound:
        """Seconds of recomputation that every order within the limit has, from the moments where these are tight.

        Arguments:
            limit: bytes.
            orders: the best one first: where it is tight depends on its own choices, so that others help.
            known: a bound for this limit, to go on from.
        """
        enough = orders[0].seconds / (1 + self.enough) - float(self.tables.seconds.sum())
        each = [candidates(self.tables, woven) for woven in orders]
        moments = dict.fromkeys(op for ops in zip_longest(*each) for op in ops if op is not None)
        return best_bound(self.relaxation, limit, list(moments), enough, known)

    @cached_property
    def is_free(self) -> bool:
        """Whether ops may run for the first time in any order that their inputs allow."""
        return not self.keeps_order and is_free(self.graph)

    @cached_property
    def reordered(self) -> Planner | None:
        """The planner of the same graph in an order of first runs with a lower peak, where ops may run in any order."""
        if self.is_proxy or not self.is_free:
            return None
        order = low_order(self.tables)
        if self.tables.lives(order).peak >= self.tables.lives(self.tables.base).peak:
            return None
        return Planner(*permuted(self.graph, self.cost, order), keeps_order=True, first_runs=tuple(order))

    def own(self, order: Sequence[int]) -> list[int]:
        """An order of this planner in the numbers of the graph that was asked about."""
        return list(order) if self.first_runs is None else [self.first_runs[op] for op in order]

    @cached_property
    def smallest(self) -> Woven:
        """The lowest order that was found, whatever its time; where first runs are free, over orders of these, too."""
        nested = self._over_first_runs("nested")
        return nested if nested.peak < self.evicted.peak else self.evicted

    @cached_property
    def evicted(self) -> Woven:
        """The lowest order that single replays lead to; where first runs are free, over orders of these, too."""
        return self._over_first_runs("_evicted")

    def low_for(self, limit: int) -> Woven:
        """Of the two low orders the one that a plan within the limit is to start from: the faster, where it fits."""
        return self.evicted if self.evicted.peak <= limit else self.smallest

    def _over_first_runs(self, name: str) -> Woven:
        low: Woven = getattr(self, name)
        if self.reordered is None:
            return low
        other: Woven = getattr(self.reordered, name)
        return Woven(self.reordered.own(other.order), other.seconds, other.peak) if other.peak < low.peak else low

    @cached_property
    def _proxy(self) -> Planner:
        """Of costs that weigh ops by the bytes that they move, not by measured seconds.

        So the smallest budget of a graph is the same in every run.
        """
        return Planner(self.graph, proxy_cost(self.graph, self.cost), is_proxy=True, keeps_order=True, like=self)

    @cached_property
    def _evicted(self) -> Woven:
        if not self.is_proxy:
            return self._cheaper(self._proxy._evicted)
        tables = self.tables
        starts = [Woven.judged(tables, lazy_order(tables, cut.everything())) for cut in self.cuts]
        starts.sort(key=lambda w: (w.peak, w.seconds))
        best = Woven.judged(tables, tables.base.tolist())
        for start in starts[: _SMALLEST_STARTS if tables.num_ops <= _HUGE else 1]:
            low = self.lower(start)
            if (low.peak, low.seconds) < (best.peak, best.seconds):
                best = low
        return self._filled(best)

    @cached_property
    def nested(self) -> Woven:
        """The lowest order that a binomial schedule leads to.

        Its recomputation within recomputation takes many replays at a time, which `evicted` does not find in deep nets.
        """
        if not self.is_proxy:
            return self._cheaper(self._proxy.nested)
        return self._filled(self.lower(self._binomials[0], work=self.work // 2))

    @cached_property
    def _binomials(self) -> list[Woven]:
        if not self.is_proxy:
            return [Woven.judged(self.tables, woven.order) for woven in self._proxy._binomials]
        return binomials(self.tables, _MOST_RUNS * self.tables.num_ops)

    @cached_property
    def by_bytes(self) -> Planner:
        """The planner of the same step at seconds that depend on the graph alone (`proxy_cost`).

        What it finds does not depend on what was measured: where the measured seconds lead to no plan, these may.
        """
        return replace(self, cost=proxy_cost(self.graph, self.cost), like=self)

    def _filled(self, low: Woven) -> Woven:
        gaps = Gaps(self.tables, low.order, self.work)
        gaps.fill(low.peak)
        return gaps.woven if (gaps.peak, gaps.woven.seconds) < (low.peak, low.seconds) else low

    def _cheaper(self, low: Woven) -> Woven:
        """The order without replays that its peak does not need, by measured seconds."""
        gaps = Gaps(self.tables, low.order, self.work)
        gaps.fill(low.peak)
        # An even lower peak would depend on the measured seconds.
        return gaps.woven if gaps.peak == low.peak else Woven.judged(self.tables, low.order)

    def lower(self, start: Woven, limit: int = 0, work: int = 0, search: Search | None = None) -> Woven:
        """Evict until nothing helps, or the limit is kept, the target falling in ever finer steps.

        Arguments:
            work: orders that may be evaluated; 0 for the usual number.
            search: counts what is evaluated, and may end it.
        """
        gaps = Gaps(self.tables, start.order, work or self.work, search=search)
        low = start
        for step in (0.04, 0.01, 0.002):
            while gaps.work > 0 and low.peak > limit and gaps.evict(max(limit, int(low.peak * (1 - step)))):
                low = gaps.woven
            if gaps.peak < low.peak:
                low = gaps.woven
        return low

    def firsts(self, limit: int, search: Search, tell: Callable[[Woven], None] | None = None) -> Iterator[Woven]:
        """First orders for the limit: by prices, then the lowest one with what there is room for taken out of it.

        Where neither fits, orders for more memory are evicted down.

        Arguments:
            limit: bytes.
            search: counts what is evaluated, and may end it.
            tell: called on the way with each order that fits and is the best so far.
        """
        relaxed = self._relaxed(limit, tell)
        fits = relaxed.peak <= limit
        low = self.low_for(limit)
        near = self._nested_near(limit, search) if self.evicted.peak > limit else []
        for start in [relaxed, *near, low] if fits else [low, *near, relaxed]:
            found = self._refined(start, limit, search)
            fits |= found.peak <= limit
            yield found
        for loosening in _LOOSENINGS:
            if fits or search.is_over:
                return
            found = self._refined(self._relaxed(int(limit * loosening)), limit, search)
            fits = found.peak <= limit
            yield found

    def _nested_near(self, limit: int, search: Search) -> list[Woven]:
        """Schedules of chains within the limit: rotor's, and the fastest binomial ones, evicted down to it where they
        are a little above."""
        static, is_huge = self.tables.static_nbytes, self.tables.num_ops > _HUGE
        found: dict[int, Woven] = {}
        for near in _NEAR[:2] if is_huge else _NEAR:
            within = [woven for woven in self._binomials if woven.peak <= static + near * (limit - static)]
            if within:
                best = min(within, key=lambda woven: woven.seconds)
                found.setdefault(id(best), best)
        lowered = [self.lower(start, limit, search=search) for start in found.values()]
        if is_huge or search.is_over:
            return lowered
        return [Woven.judged(self.tables, list(Rotor().solve(self.graph, self.cost, limit).order)), *lowered]

    def others(self, limit: int, search: Search) -> Iterator[Woven]:
        """More orders for the limit: plans for more memory, evicted down.

        Prices cannot express recomputation within recomputation: these can be better than the first.
        """
        size = self.tables.num_ops
        for loosening in _LOOSENINGS[: 6 if size <= 1500 else 3 if size <= 3000 else 1]:
            if search.is_over:
                return
            yield self._refined(self._relaxed(int(limit * loosening)), limit, search)

    def _relaxed(self, limit: int, tell: Callable[[Woven], None] | None = None) -> Woven:
        return PriceSearch(self.tables, limit, seen=self.seen, tell=tell).run(self.cuts)

    def _refined(self, start: Woven, limit: int, search: Search | None = None) -> Woven:
        gaps = Gaps(self.tables, start.order, self.work, search=search)
        if gaps.evict(limit):
            gaps.fill(limit)
        return gaps.woven


def proxy_cost(graph: Graph, cost: CostModel) -> CostModel:
    """The measured scratch, with seconds that depend on the graph alone: bytes moved, at 10 GB/s, and 5 us a call."""
    nbytes = [value.nbytes for value in graph.values]
    seconds = tuple(5e-6 + sum(nbytes[v] for v in (*op.inputs, *op.outputs)) / 1e10 for op in graph.ops)
    return CostModel(seconds, cost.scratch, cost.links, cost.origin)
