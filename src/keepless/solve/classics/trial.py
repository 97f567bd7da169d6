"""What the classic planners share: candidates judged by their exact profile, the best of them as the answer.

A planner makes orders and `offer`s them; `answer` gives the fastest that fits, or the lowest where none does. The
captured order is always among them. Each offered order is one unit of the search's work.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import numpy as np

from keepless.ir import Certificate, Status
from keepless.solve.search import Search, Standing
from keepless.solve.solution import Solution, solution
from keepless.solve.tables import Tables

MOST_RUNS = 600_000
"""Longest order that a classic planner writes: a program of a few seconds' verification. A thousand equal steps with
room for their first state alone take half a million runs."""


class Trial:
    """The candidates for one limit.

    Arguments:
        name: the solver's.
        space: what it searches, in words.
    """

    def __init__(self, name: str, space: str, tables: Tables, limit: int, search: Search | None) -> None:
        self.tables = tables
        self.limit = limit
        self.search = Search() if search is None else search
        self._name, self._space = name, space
        self._begin = time.perf_counter()
        self._bound = float(tables.seconds.sum())
        lives = tables.lives(tables.base)
        self._order: list[int] = tables.base.tolist()
        self.seconds, self.peak = lives.seconds, lives.peak

    @property
    def fits(self) -> bool:
        """Whether something fits so far."""
        return self.peak <= self.limit

    @property
    def keeps_all(self) -> bool:
        """Whether the captured order fits: no order is faster."""
        return self.fits and len(self._order) == self.tables.num_ops

    @property
    def is_over(self) -> bool:
        """Whether the search has reached one of its limits."""
        return self.search.is_over

    def offer(self, order: Sequence[int]) -> int | None:
        """The exact peak of an order, which is kept if it is the best so far; None where the search is over."""
        if not self.search.spend():
            return None
        lives = self.tables.lives(np.asarray(order, np.int64))
        mine = (max(lives.peak - self.limit, 0), lives.seconds, lives.peak)
        if mine < (max(self.peak - self.limit, 0), self.seconds, self.peak):
            self._order, self.seconds, self.peak = list(order), lives.seconds, lives.peak
            told = lives.seconds if self.fits else float("inf")
            self.search.report(Standing(self._name, told, self.peak, self._bound, self.search.spent))
        return lives.peak

    def sweep(self, num: int, order_of: Callable[[int], Sequence[int] | None], extra: int = 4) -> None:
        """Offer orders from a family whose peak grows, and whose seconds fall, with its index.

        Bisects for the largest index that fits, and then tries the next `extra` ones, since growth is only nearly so.

        Arguments:
            num: indices are 0 to num - 1; index 0 has the lowest peak.
            order_of: gives the order; None where it cannot be written, which counts as one that does not fit, below
                all that can.
        """
        low, high, seen = 0, num - 1, -1
        first_order = 0
        while low <= high:
            middle = (low + high) // 2
            order = order_of(middle)
            if order is None:
                low = first_order = middle + 1
                continue
            peak = self.offer(order)
            if peak is None:
                return
            if peak <= self.limit:
                low, seen = middle + 1, middle
            else:
                high = middle - 1
        start = seen + 1 if seen >= 0 else first_order
        for index in range(start, min(start + extra, num)):
            order = order_of(index)
            if order is not None and self.offer(order) is None:
                return

    def answer(self, seed: int) -> Solution:
        """The best candidate with the solver's claim."""
        if self.search.is_cut_by_clock:
            status = Status.TIME_LIMITED
        elif not self.fits:
            status = Status.NOT_FOUND
        else:
            status = Status.OPTIMAL if len(self._order) == self.tables.num_ops else Status.FEASIBLE
        certificate = Certificate(
            self._name,
            status,
            space=self._space,
            bound_seconds=self._bound,
            witness="every op runs once",
            solve_seconds=time.perf_counter() - self._begin,
            seed=seed,
        )
        return solution(self.tables.graph, self.tables.cost, self._order, certificate)


def turned(tables: Tables) -> Tables:
    """The tables with `loss` at the step's turning point.

    That is the LOSS op. A graph without one turns where the most bytes are alive when nothing is recomputed: the ops
    before play the forward, those from there on the backward. O(edges).
    """
    if tables.graph.loss_op is not None or not tables.num_ops:
        return tables
    lives = tables.lives(tables.base)
    found = copy.copy(tables)
    found.loss = int(lives.profile.argmax())
    return found
