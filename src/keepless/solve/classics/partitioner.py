"""What torch's partitioner does: one minimum cut by bytes, and a knapsack over what it saves.

"min_cut": functorch, "Min-cut optimal(*) recomputation (i.e. activation checkpointing) with AOTAutograd" (He, 2022),
`min_cut_rematerialization_partition` in torch: the cut of least saved bytes between the forward and what the backward
reads. A saved value costs bytes * 1.1 ** (ops to the backward), twice that if only fused kernels read it; running an
op again is free, unless it is banned. Three sets of bans, as there: ops outside an allowlist, reductions and what the
backward reads as it is; without the last; random and compute-intensive ops and reductions only. Heuristics that
serve a fusing compiler alone are left out.

"knapsack": torch's `activation_memory_budget` (`choose_saved_values_set`, `dp_knapsack`): of the ops whose outputs
the first cut saves those are chosen whose saving spares the most seconds within a capacity; the others may run again,
and one more cut follows. torch states the capacity as a share; here it is swept until the exact peak fits.

A cut is one maximum flow; the knapsack is O(items * slots) and answers every capacity at once. Each op runs again at
most once, right before the backward op that first needs it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from keepless.cost import CostModel
from keepless.ir import Effect, Graph
from keepless.solve.classics.operators import COMPUTE_INTENSIVE, FUSIBLE, base_name
from keepless.solve.classics.trial import Trial, turned
from keepless.solve.flow import TOTAL, infinite, source_side
from keepless.solve.search import Search
from keepless.solve.solution import Solution
from keepless.solve.tables import Floats, Ints, Tables
from keepless.solve.weave import closure, lazy_order

_SPACE = "each forward op runs again at most once, as one cut says"
_SLOTS = 2000
_CELLS = 20_000_000
_GRID = 24
_REFINEMENTS = 6
_BIAS, _FARTHEST = 1.1, 100
_REDUCTION = 4


@dataclass(frozen=True)
class MinCutByBytes:
    """torch's default cut and its two more aggressive ones; the fastest that fits, else the lowest."""

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The best of three cuts."""
        tables = Tables(graph, cost)
        trial = Trial("min_cut", _SPACE, tables, limit_nbytes, search)
        if not trial.keeps_all:
            cut = ByteCut(turned(tables))
            for banned in cut.bans:
                trial.offer(cut.order(cut.solve(banned)))
        return trial.answer(seed)


@dataclass(frozen=True)
class Knapsack:
    """torch's activation memory budget; of all capacities the fastest that fits, else the lowest."""

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The best order over capacities."""
        tables = Tables(graph, cost)
        trial = Trial("knapsack", _SPACE, tables, limit_nbytes, search)
        if not trial.keeps_all:
            cut = ByteCut(turned(tables))
            for banned in cut.bans:
                trial.offer(cut.order(cut.solve(banned)))
            for later_first in (False, True):
                _sweep(cut, trial, later_first)
        return trial.answer(seed)


class ByteCut:
    """The cut's graph: values and forward ops, built once. The nodes are those of `keepless.solve.min_cut`."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        loss = tables.loss
        states = set(tables.state.values())
        forward = [v for p in range(loss) for v in tables.writes[p] if v not in tables.static and v not in states]
        self.values = np.array(list(dict.fromkeys(forward)), np.int64)
        self._node = {v: i for i, v in enumerate(self.values.tolist())}
        num = len(self._node)
        self._op0, self._source, self._sink = num, num + loss, num + loss + 1
        self._fusible = [base_name(op.name) in FUSIBLE for op in tables.graph.ops]
        self.weights = self._priced()
        self._needed = [i for v, i in self._node.items() if self._readers(v, after=True)]
        pairs = [(num + p, self._node[u]) for p in range(loss) for u in tables.reads[p] if u in self._node]
        self._rows = np.array([*(r for r, _ in pairs), *([self._source] * len(self._needed))], np.int64)
        self._cols = np.array([*(c for _, c in pairs), *self._needed], np.int64)

    @cached_property
    def bans(self) -> tuple[frozenset[int], ...]:
        """The ops that may not run again: by default, more aggressively, most aggressively."""
        ops = self.tables.graph.ops
        random = {p for p in range(self.tables.loss) if Effect.RNG in ops[p].effects}
        heavy = {p for p in range(self.tables.loss) if base_name(ops[p].name) in COMPUTE_INTENSIVE}
        unlisted = {p for p in range(self.tables.loss) if not self._fusible[p]}
        reductions = {p for p in range(self.tables.loss) if self._is_reduction(p)}
        read = {p for p in range(self.tables.loss) if self._is_read_by_unfused(p)}
        return (
            frozenset(unlisted | random | reductions | read),
            frozenset(unlisted | random | reductions),
            frozenset(heavy | random | reductions),
        )

    def solve(self, banned: Collection[int]) -> set[int]:
        """Ops that run again where the fewest weighted bytes are saved."""
        if not len(self.values):
            return set()
        tables = self.tables
        num = len(self.values)
        makers = np.array([tables.producer[v] for v in self.values.tolist()], np.int64)
        free = np.array([tables.replayable[p] and p not in banned for p in makers.tolist()])
        rows = np.concatenate([np.arange(num), self._rows])
        cols = np.concatenate([np.where(free, self._op0 + makers, self._sink), self._cols])
        caps = infinite(len(rows))
        scale = TOTAL / max(float(self.weights.sum()), 1.0)
        caps[:num] = np.clip(self.weights * min(scale, 1.0), 1, TOTAL).astype(np.int32)
        reached = source_side(rows, cols, caps, self._source, self._sink)
        return {int(p) - self._op0 for p in reached if self._op0 <= p < self._source}

    def saved(self, replayed: Collection[int]) -> list[int]:
        """The values that are read after the forward, or for runs again, and not made again themselves."""
        tables = self.tables
        again = set(replayed)
        read = {v for v in self._node if self._readers(v, after=True)}
        read.update(u for p in again for u in tables.reads[p] if u in self._node)
        return sorted(v for v in read if tables.producer[v] not in again)

    def order(self, replayed: Collection[int]) -> list[int]:
        """The order in which these ops run again, as late as possible."""
        again = set(replayed)
        wanted = [p for p in again if any(self._readers(v, after=True) for v in self.tables.writes[p])]
        return lazy_order(self.tables, closure(self.tables, wanted, again.__contains__))

    def _readers(self, v: int, after: bool) -> list[int]:
        loss = self.tables.loss
        return [c for c in self.tables.consumers[v] if (c > loss if after else c < loss)]

    def _priced(self) -> Floats:
        """Weights of saving each value."""
        tables = self.tables
        distance = [_FARTHEST] * tables.num_ops
        weights = np.zeros(len(self.values))
        for p in range(tables.loss - 1, -1, -1):
            for v in tables.writes[p]:
                if self._readers(v, after=True):
                    distance[p] = 1
                for c in self._readers(v, after=False):
                    distance[p] = min(distance[p], distance[c] + 1)
        for v, i in self._node.items():
            p = tables.producer[v]
            fused = all(self._fuses(p, c) for c in tables.consumers[v])
            weights[i] = tables.sizes[v] * _BIAS ** distance[p] * (2 if fused else 1)
        return weights

    def _fuses(self, a: int, b: int) -> bool:
        return (self._fusible[a] and self._fusible[b]) or base_name(self.tables.graph.ops[b].name) == "cat"

    def _is_reduction(self, p: int) -> bool:
        tables = self.tables
        made = sum(tables.sizes[v] for v in tables.writes[p])
        return made * _REDUCTION < sum(tables.sizes[v] for v in tables.graph.ops[p].inputs)

    def _is_read_by_unfused(self, p: int) -> bool:
        return any(not self._fuses(p, c) for v in self.tables.writes[p] for c in self._readers(v, after=True))


def knapsack(nbytes: Ints, seconds: Floats, slots: int) -> tuple[list[int], list[list[int]]]:
    """The items to take for each capacity at which the best value changes, ascending.

    Arguments:
        nbytes: per item, from 1 on, in slots.
        seconds: per item, its value.
        slots: the largest capacity.

    Returns:
        The capacities, and for each the taken items.
    """
    best = np.zeros(slots + 1)
    taken = np.zeros((len(nbytes), slots + 1), bool)
    for item, (size, value) in enumerate(zip(nbytes.tolist(), seconds.tolist(), strict=True)):
        if size <= slots:
            other = best[: slots + 1 - size] + value
            better = other > best[size:]
            taken[item, size:] = better
            best[size:] = np.where(better, other, best[size:])
    capacities = np.flatnonzero(np.append(True, best[1:] > best[:-1])).tolist()
    chosen = []
    for capacity in capacities:
        left, items = capacity, []
        for item in range(len(nbytes) - 1, -1, -1):
            if taken[item, left]:
                items.append(item)
                left -= int(nbytes[item])
        chosen.append(items[::-1])
    return capacities, chosen


def _sweep(cut: ByteCut, trial: Trial, later_first: bool) -> None:
    """Capacities on a grid and between its points. Of equal items the knapsack takes the first, as torch's does; with
    `later_first` these are the last of the forward, so that what runs again does so late."""
    tables = cut.tables
    saved = cut.saved(cut.solve(cut.bans[0]))
    groups: dict[int, int] = {}
    for v in saved:
        p = tables.producer[v]
        if tables.replayable[p]:
            groups[p] = groups.get(p, 0) + tables.sizes[v]
    items = sorted(groups, key=lambda p: (-groups[p], -p if later_first else p))
    if not items:
        return
    slots = max(min(_SLOTS, _CELLS // len(items)), 1)
    unit = max(sum(groups.values()) / slots, 1.0)
    nbytes = np.maximum(np.ceil(np.array([groups[p] for p in items]) / unit), 1).astype(np.int64)
    seconds = np.array([tables.cost.seconds[p] for p in items])
    capacities, chosen = knapsack(nbytes, seconds, min(int(nbytes.sum()), 2 * slots))
    peaks: dict[int, int] = {}

    def peak(index: int) -> int | None:
        if index not in peaks:
            kept = {items[i] for i in chosen[index]}
            found = trial.offer(cut.order(cut.solve((cut.bans[2] - set(items)) | kept)))
            if found is None:
                return None
            peaks[index] = found
        return peaks[index]

    grid = sorted({int(i) for i in np.linspace(0, len(capacities) - 1, _GRID)})
    for index in grid:
        if peak(index) is None:
            return
    fitting = [i for i in grid if peaks[i] <= trial.limit]
    low = max(fitting) if fitting else min(grid, key=lambda i: (peaks[i], i))
    high = min((i for i in grid if i > low), default=low)
    for _ in range(_REFINEMENTS):
        middle = (low + high) // 2
        if middle in (low, high):
            return
        found = peak(middle)
        if found is None:
            return
        low, high = (middle, high) if found <= trial.limit else (low, middle)
