"""Dynamic tensor rematerialisation, replayed offline: evict greedily where memory runs out, make again on demand.

Kirisame, Lyubomirsky, Haan, Brennan, He, Roesch, Chen, Tatlock, "Dynamic Tensor Rematerialization", arXiv 2006.09616
(ICLR 2021). The ops run in the captured order. Where the next one does not fit, the resident value of least

    h(v) = cost / (bytes * staleness)

is evicted, where staleness is the time since its last use, and the cost is its producer's plus, in the form h_DTR^eq
(section 4.1 and appendix there), that of the evicted components next to it: connected sets of evicted values, kept in
a union-find, from which a value made again takes its own cost away. Values that the rest of the captured order does
not read are forgotten at once ("eager eviction"). What an op reads and is not there is made again first, recursively.

What results is an order; its exact profile is judged, and a few memory sizes around the limit are tried, since the
replay knows no storage reuse. Any graph will do, those without a backward, too. O(runs * residents) numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keepless.cost import CostModel
from keepless.ir import Graph
from keepless.solve.classics.trial import MOST_RUNS, Trial
from keepless.solve.search import Search
from keepless.solve.solution import Solution
from keepless.solve.tables import Ints, Tables

_SPACE = "greedy eviction by cost over bytes and staleness, any number of recomputations"
_LARGER, _SMALLER = (1.02, 1.05, 1.1, 1.2), (0.97, 0.9)
"""Memory sizes that are tried beside the limit: storage reuse makes room, generator states take some."""
_STEPS = 12
"""Of the bisection for the smallest size that can be replayed."""
_RUNS_PER_OP = 12
_TINY = 1e-12


@dataclass(frozen=True)
class Dtr:
    """Kirisame et al.'s eviction; of a few memory sizes the fastest order that fits, else the lowest."""

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The best order over memory sizes."""
        tables = Tables(graph, cost)
        trial = Trial("dtr", _SPACE, tables, limit_nbytes, search)
        if not trial.keeps_all:
            low, high = limit_nbytes, trial.peak
            works = _offer(tables, trial, limit_nbytes)
            for share in _LARGER:
                _offer(tables, trial, int(share * limit_nbytes))
            for share in _SMALLER if works else ():
                if not trial.fits:
                    _offer(tables, trial, int(share * limit_nbytes))
            for _ in range(_STEPS):
                if trial.fits or trial.is_over or high - low <= 1:
                    break
                middle = (low + high) // 2
                low, high = (low, middle) if _offer(tables, trial, middle) else (middle, high)
        return trial.answer(seed)


def _offer(tables: Tables, trial: Trial, limit: int) -> bool:
    order = replay(tables, limit, trial.search)
    return order is not None and trial.offer(order) is not None


def replay(tables: Tables, limit: int, search: Search | None = None) -> list[int] | None:
    """The order that results from running the captured order in `limit` bytes; None where memory or work runs out."""
    runtime = _Runtime(tables, limit, Search() if search is None else search)
    for op in range(tables.num_ops):
        if not runtime.perform(op):
            return None
    return runtime.order


class _Runtime:
    """What is resident, and what was evicted."""

    def __init__(self, tables: Tables, limit: int, search: Search) -> None:
        graph = tables.graph
        self.tables, self.limit, self.search = tables, limit, search
        self.order: list[int] = []
        self._most_runs = min(_RUNS_PER_OP * tables.num_ops + 1000, MOST_RUNS)
        num = len(tables.sizes)
        self._resident = np.zeros(num, bool)
        self._resident[list(graph.inputs)] = True
        self._locks = np.zeros(num, np.int64)
        self._used = np.zeros(num)
        self._now = 0.0
        self._nbytes = sum(tables.sizes[v] for v in graph.inputs)
        states = set(tables.state.values())
        self._keep = graph.pinned | states
        self._states = states
        self._moves = [v not in tables.static for v in range(num)]
        self._own = np.zeros(num)
        self._again = [False] * num
        for v, p in enumerate(tables.producer):
            if p >= 0 and tables.replayable[p] and v not in states and self._moves[v]:
                self._again[v] = True
                self._own[v] = tables.cost.seconds[p]
        self._size = np.maximum(tables.nbytes, 1).astype(np.float64)
        self._free = np.array(self._again, bool) & (tables.nbytes > 0)
        self._free[list(self._keep)] = False
        self._evicted: set[int] = set()
        self._done = bytearray(tables.num_ops)
        self._component = Components(num)
        self._uses = [0] * num
        self._expires: list[list[int]] = [[] for _ in range(tables.num_ops)]
        for op in range(tables.num_ops):
            for v in tables.reads[op]:
                self._uses[v] += 1
        for v, last in enumerate(_needed_until(tables)):
            if not self._again[v] and self._moves[v] and last >= 0:
                self._uses[v] += 1
                self._expires[last].append(v)

    def perform(self, op: int) -> bool:
        """Run the next op of the captured order, with what it needs; False where that cannot be."""
        if not self._gather(op):
            return False
        for v in (*self.tables.reads[op], *self._expires[op]):
            self._uses[v] -= 1
        self._done[op] = 1
        self._forget((*self.tables.reads[op], *self.tables.writes[op], *self._expires[op]))
        return True

    def _gather(self, op: int) -> bool:
        """Run an op after making again, depth first, what it reads and is not there."""
        tables = self.tables
        stack: list[tuple[int, bool]] = [(op, False)]
        locked: list[tuple[int, ...]] = []
        while stack:
            current, is_ready = stack.pop()
            absent = [v for v in tables.reads[current] if not self._resident[v]]
            if not is_ready:
                self._lock(tables.reads[current], 1)
                locked.append(tables.reads[current])
            if absent:
                makers = sorted({tables.producer[v] for v in absent})
                if any(p < 0 or not tables.replayable[p] for p in makers) or len(stack) > tables.num_ops:
                    return False
                stack.append((current, True))
                stack.append((makers[0], False))
                continue
            if not self._run(current):
                return False
            self._lock(locked.pop(), -1)
            if current != op:
                self._forget((*tables.reads[current], *tables.writes[current]))
        return True

    def _lock(self, values: Sequence[int], change: int) -> None:
        for v in values:
            self._locks[v] += change

    def _run(self, op: int) -> bool:
        tables = self.tables
        is_replay = bool(self._done[op])
        fresh = [v for v in tables.writes[op] if not self._resident[v] and self._moves[v]]
        if is_replay:
            fresh = [v for v in fresh if v not in self._states]
        need = sum(tables.sizes[v] for v in fresh) + int(tables.scratch[op])
        if not is_replay and op in tables.state:
            need -= tables.sizes[tables.state[op]]  # counted by `Tables.scratch`
        if not self._make_room(need, op) or len(self.order) >= self._most_runs:
            return False
        if len(self.order) % max(tables.num_ops, 256) == 0 and not self.search.spend(0):
            return False
        self.order.append(op)
        self._now += tables.cost.seconds[op]
        for v in fresh:
            self._resident[v] = True
            self._nbytes += tables.sizes[v]
            if v in self._evicted:
                self._evicted.discard(v)
                self._component.leave(v, float(self._own[v]))
        for v in (*tables.reads[op], *tables.writes[op]):
            self._used[v] = self._now
        return True

    def _forget(self, values: Sequence[int]) -> None:
        """Drop those that neither the rest of the captured order nor a waiting replay reads."""
        for v in values:
            wanted = self._uses[v] or self._locks[v] or v in self._keep
            if self._resident[v] and self._moves[v] and not wanted:
                self._drop(v)

    def _make_room(self, need: int, op: int) -> bool:
        if self._nbytes + need <= self.limit:
            return True
        can = self._resident & self._free & (self._locks == 0)
        for v in self.tables.writes[op]:
            can[v] = False
        pool = np.flatnonzero(can)
        while self._nbytes + need > self.limit:
            if not len(pool):
                return False
            at = self._least(pool)
            self._drop(int(pool[at]))
            pool = np.delete(pool, at)
        return True

    def _least(self, pool: Ints) -> int:
        """Index of the value of least h. The neighbourhood only adds: values are looked at by rising cost without."""
        weight = self._size[pool] * (self._now - self._used[pool] + _TINY)
        floor = (self._own[pool] + _TINY) / weight
        best, found = np.inf, 0
        for at in np.argsort(floor, kind="stable").tolist():
            if floor[at] >= best:
                break
            h = (self._own[pool[at]] + _TINY + self._around(int(pool[at]))) / weight[at]
            if h < best:
                best, found = h, at
        return found

    def _neighbours(self, v: int) -> set[int]:
        """Evicted values that v is made from, and that are made from v."""
        tables = self.tables
        near = [u for u in tables.reads[tables.producer[v]] if u in self._evicted]
        near += [w for c in tables.consumers[v] if self._done[c] for w in tables.writes[c] if w in self._evicted]
        return set(near)

    def _around(self, v: int) -> float:
        roots = {self._component.root(u) for u in self._neighbours(v)}
        return sum(self._component.cost[root] for root in sorted(roots))

    def _drop(self, v: int) -> None:
        self._resident[v] = False
        self._nbytes -= self.tables.sizes[v]
        if self._again[v]:
            near = self._neighbours(v)
            self._evicted.add(v)
            self._component.enter(v, float(self._own[v]))
            for u in sorted(near):
                self._component.join(v, u)


def _needed_until(tables: Tables) -> list[int]:
    """Per value, the last op of the captured order for which it may be read, runs again included; -1 for none."""
    until = [-1] * len(tables.sizes)
    for op in range(tables.num_ops - 1, -1, -1):
        last = max([op, *(until[v] for v in tables.writes[op])]) if tables.replayable[op] else op
        for v in tables.reads[op]:
            until[v] = max(until[v], last)
    return until


class Components:
    """Connected sets of evicted values with their costs; sets never split, as in the paper's approximation."""

    def __init__(self, num: int) -> None:
        self._parent = list(range(num))
        self._node = list(range(num))
        self.cost = [0.0] * num

    def root(self, v: int) -> int:
        """The set of an evicted value."""
        node = self._node[v]
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def enter(self, v: int, cost: float) -> None:
        """A set of its own for a value."""
        self._node[v] = len(self._parent)
        self._parent.append(self._node[v])
        self.cost.append(cost)

    def leave(self, v: int, cost: float) -> None:
        """Take a value's cost out of its set."""
        root = self.root(v)
        self.cost[root] = max(self.cost[root] - cost, 0.0)

    def join(self, v: int, u: int) -> None:
        """One set of two."""
        a, b = self.root(v), self.root(u)
        if a != b:
            self._parent[b] = a
            self.cost[a] += self.cost[b]
