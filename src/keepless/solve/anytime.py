"""The default solver: a first order at once, its bound, then better orders until the gap is small or the work is done.

Ctrl-C, a clock or a limit of work end it at any time with the best order so far. Work is counted in evaluated orders.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from keepless.cost import CostModel
from keepless.ir import Certificate, Graph, Status
from keepless.solve.bound import witness_text
from keepless.solve.classics import Dtr, Revolve, Rotor, SqrtN
from keepless.solve.classics.alike import steps_are_alike
from keepless.solve.exact.hunt import MOST_STATES, hunted
from keepless.solve.floor import floor_bound
from keepless.solve.improve import improve
from keepless.solve.lagrange import Woven, better
from keepless.solve.moments import Bound
from keepless.solve.planner import SPACE, Planner
from keepless.solve.rechecking import EXHAUSTIVE, FREE_SPACE
from keepless.solve.search import Search, Standing
from keepless.solve.solution import Solution, Solver, solution

NAME = "keepless"
_RUN_WORK = 1600
"""Evaluated orders that make another run of improvement worth its start."""
_RUNS = (2, 6)
"""Runs of improvement at least and at most."""
_BOUND_ORDERS = 2
"""First orders whose tight moments a bound may rest on beside those of the best one."""
_CLASSICS: tuple[Solver, ...] = (Revolve(), Rotor(), Dtr(), SqrtN())
"""Their orders are starts, too: on chains some of them are optimal."""
_CLASSICS_OPS = 4000
"""Ops beyond which they take too long."""
_SMALL_OPS = 1500
"""Ops beyond which the slowest of them, rotor, is left out, and the others wait for a gap that is large."""
_HUGE_OPS = 10_000
"""Ops beyond which the work lasts for so few orders that nothing follows the first ones but where the gap is large."""
_FAR = 0.03
"""A certified gap that is large."""
_LITTLE = 1.03
"""Smallest peak that was found, over the limit: where more is missing, other seconds lead to nothing either."""
_ON_CHAINS: tuple[Solver, ...] = (Revolve(), Rotor())
_LONG_CHAIN_OPS = 150
"""Ops beyond which these settle a chain of equal steps: its orders are long, and searching on takes minutes in vain."""


@dataclass(frozen=True)
class Keepless:
    """The planner as a solver."""

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The fastest order that was found within the limit."""
        return plan(Planner(graph, cost), limit_nbytes, seed, search)


def plan(planner: Planner, limit_nbytes: int, seed: int = 0, search: Search | None = None) -> Solution:
    """The planner's solution for one limit.

    Where ops may run in any order, an order of first runs with a lower peak is planned for first: a plan that needs no
    recomputation there is optimal.
    """
    found = _planned(planner, limit_nbytes, seed, search or Search())
    planner.forget()
    return found


def _planned(planner: Planner, limit_nbytes: int, seed: int, search: Search) -> Solution:
    course = _Course(planner, limit_nbytes, seed, search)
    other = planner.reordered if course.best.peak > limit_nbytes else None
    if other is None:
        return course.run()
    there = _Course(other, limit_nbytes, seed, course.search).run()
    if there.peak <= limit_nbytes and len(there.order) == len(planner.graph.ops):
        return _renumbered(planner, other, there, limit_nbytes)
    here = course.run()
    if here.certificate.status is Status.OPTIMAL:
        return here
    fits = [s for s in (there, here) if s.peak <= limit_nbytes]
    chosen = min(fits or (there, here), key=lambda s: (s.seconds, s.peak) if fits else (s.peak, s.seconds))
    return _renumbered(planner, other, there, limit_nbytes) if chosen is there else here


def _renumbered(planner: Planner, other: Planner, found: Solution, limit_nbytes: int) -> Solution:
    """The solution of the reordered graph as one of the graph that was asked about."""
    claim = replace(found.certificate, space=FREE_SPACE)
    if len(found.order) > len(planner.graph.ops) and claim.status is Status.OPTIMAL:  # of that order alone
        least, floor = float(sum(planner.cost.seconds)), floor_bound(planner.graph, planner.cost)[1]
        claim = replace(claim, status=Status.FEASIBLE, bound_seconds=least, witness=witness_text(Bound(0.0, {}), floor))
    if claim.status is Status.PROVEN_INFEASIBLE and claim.bound_bytes <= limit_nbytes:
        claim = replace(claim, status=Status.NOT_FOUND)
    return solution(planner.graph, planner.cost, other.own(found.order), claim)


@dataclass
class _Course:
    """One search on its way."""

    planner: Planner
    limit: int
    seed: int
    search: Search
    bound: Bound = field(default_factory=lambda: Bound(0.0, {}))
    proven: str = ""
    is_last: bool = True
    """Whether other seconds may be tried where these lead to nothing that fits."""

    def __post_init__(self) -> None:
        self._begin = time.perf_counter()
        tables = self.planner.tables
        self.base = float(tables.seconds.sum())
        self.best = Woven.judged(tables, tables.base.tolist())
        self._tried: list[Woven] = []
        self._pool: list[Woven] = []
        self._floor = floor_bound(self.planner.graph, self.planner.cost)

    @property
    def fastest(self) -> float:
        """No order within the limit is faster."""
        least = self.base + self.bound.seconds
        if self.best.peak > self.limit:
            return least
        return self.best.seconds if self.proven else min(least, self.best.seconds)

    @property
    def is_enough(self) -> bool:
        """Whether the best order need not become better."""
        return self.best.seconds <= self.fastest * (1 + self.planner.enough)

    @property
    def _is_far(self) -> bool:
        return self.best.seconds > self.fastest * (1 + _FAR)

    def run(self) -> Solution:
        """The whole search. Ctrl-C ends it with its best so far: at once if nothing fits yet or it came twice."""
        try:
            if self._is_settled():
                return self._solution()
            self._first()
            if self.best.peak <= self.limit and len(self.best.order) > self.planner.tables.num_ops:
                self._improve()
            if len(self.best.order) > self.planner.tables.num_ops or self.best.peak > self.limit:
                self._exhaust()
        except KeyboardInterrupt:
            if self.search.is_interrupted or self.best.peak > self.limit:
                raise
            self.search.interrupt()
        return self._solution()

    def _is_settled(self) -> bool:
        """Whether the graph is a long chain of equal steps, and a schedule for these fits."""
        planner = self.planner
        is_long = _LONG_CHAIN_OPS < planner.tables.num_ops <= _CLASSICS_OPS
        if not is_long or self.best.peak <= self.limit or not steps_are_alike(planner.tables):
            return False
        for solver in _ON_CHAINS:
            if not self.search.is_over:
                self._take(Woven.of(solver.solve(planner.graph, planner.cost, self.limit, self.seed)))
        if self.best.peak <= self.limit:
            self._certify()
        return self.best.peak <= self.limit

    def _take(self, woven: Woven) -> None:
        if woven.beats(self.best, self.limit):
            self.best = woven
            self._tell()

    def _tell(self) -> None:
        seconds = self.best.seconds if self.best.peak <= self.limit else float("inf")
        self.search.report(Standing(NAME, seconds, self.best.peak, self.fastest, self.search.spent))

    def _first(self) -> None:
        if self.best.peak > self.limit:
            for woven in self.planner.firsts(self.limit, self.search, self._take):
                self._pool.append(woven)
                self._take(woven)
        if self.best.peak > self.limit:
            for woven in self._classics():
                self.best = better(woven, self.best, self.limit)
        if self.is_last and self.best.peak > self.limit:
            self._first_by_bytes()
        self._tell()

    def _first_by_bytes(self) -> None:
        """Where nothing fits, and little is missing, seconds that depend on the graph alone may lead to what does.

        So whether there is a plan for a budget does not depend on how long ops took where it was asked.
        """
        if self.search.is_over or self._floor[0] > self.limit or self.planner.smallest.peak > _LITTLE * self.limit:
            return
        course = _Course(self.planner.by_bytes, self.limit, self.seed, self.search, is_last=False)
        course._first()
        self._take(Woven.judged(self.planner.tables, course.best.order))

    def _improve(self) -> None:
        self._certify()
        if self.planner.tables.num_ops > _HUGE_OPS and not self._is_far:
            return
        pool = [self.best, *self._pool]
        if not self.is_enough:
            for woven in chain(self.planner.others(self.limit, self.search), self._more_classics()):
                pool.append(woven)
                self._take(woven)
                if self.is_enough:
                    break
        starts = self._starts(pool)
        for number, woven in enumerate(starts):
            if not self.is_enough:
                improve(
                    self.planner.tables,
                    woven,
                    self.limit,
                    work=self.planner.improvement_work // len(starts),
                    seed=self.seed + number,
                    enough=self.fastest * (1 + self.planner.enough),
                    search=self.search,
                    tell=self._take,
                )
        if not self.is_enough and not self.search.is_over:
            self._certify()

    def _starts(self, pool: list[Woven]) -> list[Woven]:
        """Orders to improve: the fastest two, or, where the work lasts for more, the fastest and the lowest many times.

        From the lowest order, which is far from the limit, each seed takes another way.
        """
        fitting = sorted({w.seconds: w for w in pool if w.peak <= self.limit}.items())
        runs = min(max(self.planner.improvement_work // _RUN_WORK, _RUNS[0]), _RUNS[1])
        low = self.planner.low_for(self.limit)
        if low.peak > self.limit or runs == _RUNS[0]:
            return [woven for _, woven in fitting[: _RUNS[0]]]
        return [fitting[0][1], *[low] * (runs - 1)]

    def _exhaust(self) -> None:
        """Small graphs are searched until nothing could be faster."""
        planner = self.planner
        if self.search.is_over or self._floor[0] > self.limit:
            return
        own = self.search.inner()
        if self.search.work is not None:
            own.work = min(MOST_STATES, self.search.work - self.search.spent)
        found = hunted(planner.graph, planner.cost, self.limit, any_order=planner.is_free, search=own)
        self.search.spend(own.spent)
        self.search.is_out_of_work |= own.is_out_of_work and own.spent < MOST_STATES
        if found.order is not None:
            self._take(Woven.judged(planner.tables, found.order))
        if found.is_over:
            self.proven = f"{EXHAUSTIVE} {found.states} states, all that could be faster"
            self._tell()

    def _classics(self) -> Iterator[Woven]:
        """The classics' orders that fit; each classic solves once per search."""
        planner = self.planner
        if planner.tables.num_ops > _CLASSICS_OPS:
            return
        is_small = planner.tables.num_ops <= _SMALL_OPS
        for number, solver in enumerate(s for s in _CLASSICS if is_small or not isinstance(s, Rotor)):
            if self.search.is_over:
                return
            if number == len(self._tried):
                self._tried.append(Woven.of(solver.solve(planner.graph, planner.cost, self.limit, self.seed)))
            if self._tried[number].peak <= self.limit:
                yield self._tried[number]

    def _more_classics(self) -> Iterator[Woven]:
        """The classics' orders, where there is one or much may be missing: on larger graphs they take seconds."""
        is_small = self.planner.tables.num_ops <= _SMALL_OPS
        if is_small or self._tried or self._is_far:
            yield from self._classics()

    def _certify(self) -> None:
        orders = [self.best]
        if self.bound.prices:  # the first bound is for the best order alone: often that is enough
            orders += [woven for woven in self._pool[:_BOUND_ORDERS] if woven is not self.best]
        found = self.planner.bound(self.limit, orders, self.bound)
        if found.seconds > self.bound.seconds:
            self.bound = found
            self._tell()

    def _status(self, floor: int) -> Status:
        if self.best.peak > self.limit:
            return Status.PROVEN_INFEASIBLE if self.proven or self.limit < floor else Status.NOT_FOUND
        if self.proven:
            return Status.OPTIMAL
        if self.best.seconds <= self.fastest * (1 + 1e-9):
            return Status.OPTIMAL
        is_cut = self.search.is_cut_by_clock or self.search.is_interrupted
        return Status.TIME_LIMITED if is_cut else Status.FEASIBLE

    def _solution(self) -> Solution:
        graph, cost = self.planner.graph, self.planner.cost
        floor, where = self._floor
        certificate = Certificate(
            NAME,
            self._status(floor),
            space=FREE_SPACE if self.planner.is_free else SPACE,
            bound_seconds=self.fastest,
            bound_bytes=floor,
            witness=self.proven or witness_text(self.bound, where),
            solve_seconds=time.perf_counter() - self._begin,
            seed=self.seed,
        )
        return solution(graph, cost, self.best.order, certificate)
