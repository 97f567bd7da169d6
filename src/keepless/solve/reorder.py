"""Orders of first runs with a low peak, for graphs whose ops may run in any order (no phases, no effects).

List schedules first: of the ops that may run, the one that adds the fewest bytes, forward or from the end backward.
Then local moves at the peak: an op whose outputs only wait there runs later, right before its first reader; the last
readers of what waits there run earlier, right after their inputs are made. Every order is judged by its exact profile.

Minimum peak over orders is NP-hard already for graphs of depth three (Sethi, "Complete register allocation problems",
1975), so nothing is proven here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from keepless.cost import CostModel
from keepless.ir import Graph
from keepless.solve.tables import Ints, Lives, Tables

_MOVED = 12
"""Values at the peak whose makers and readers are looked at per step."""
_WORK_OPS = 2_000_000


def is_free(graph: Graph) -> bool:
    """Whether ops may run in any order: a plain DAG."""
    return bool(graph.ops) and graph.loss_op is None and not any(op.effects for op in graph.ops)


def low_order(tables: Tables) -> list[int]:
    """An order of first runs with a low peak; the graph's own where none is lower."""
    num = tables.num_ops
    starts = [tables.base.tolist(), _listed(tables), _listed_backward(tables)]
    ranked = sorted(((tables.lives(order).peak, number) for number, order in enumerate(starts)))
    best: tuple[int, list[int]] | None = None
    for _, number in ranked[:2]:
        moves = _Moves(tables, starts[number], max(50, min(2000, _WORK_OPS // max(num, 1))))
        while moves.step():
            pass
        if best is None or moves.lives.peak < best[0]:
            best = (moves.lives.peak, moves.order)
    return best[1] if best is not None else starts[0]


def permuted(graph: Graph, cost: CostModel, order: Sequence[int]) -> tuple[Graph, CostModel]:
    """The same graph with its ops listed, and numbered, in another order."""
    ops = tuple(replace(graph.ops[op], id=number) for number, op in enumerate(order))
    seconds = tuple(cost.seconds[op] for op in order)
    scratch = tuple(cost.scratch[op] for op in order)
    return replace(graph, ops=ops), replace(cost, seconds=seconds, scratch=scratch)


def _listed(tables: Tables) -> list[int]:
    """Always the op that adds the fewest bytes, of those whose inputs are there; the graph's order where equal."""
    consumers, sizes, pinned = tables.consumers, tables.sizes, tables.graph.pinned
    readers = [len(set(row)) for row in consumers]
    missing = [len(makers) for makers in tables.makers]
    ready = {op for op in range(tables.num_ops) if not missing[op]}
    order: list[int] = []

    def growth(op: int) -> int:
        made = sum(sizes[v] for v in tables.writes[op] if readers[v] or v in pinned)
        return made - sum(sizes[v] for v in tables.reads[op] if readers[v] == 1 and v not in pinned)

    while ready:
        op = min(ready, key=lambda candidate: (growth(candidate), candidate))
        ready.remove(op)
        order.append(op)
        for v in tables.reads[op]:
            readers[v] -= 1
        for after in {c for v in tables.writes[op] for c in consumers[v]}:
            missing[after] -= 1
            if not missing[after]:
                ready.add(after)
    return order


def _listed_backward(tables: Tables) -> list[int]:
    """From the end: always the op before which the fewest bytes more are alive, of those whose readers are placed."""
    sizes, pinned = tables.sizes, tables.graph.pinned
    waiting = [len({c for v in row for c in tables.consumers[v]}) for row in tables.writes]
    alive = set(pinned)
    ready = {op for op in range(tables.num_ops) if not waiting[op]}
    order: list[int] = []

    def growth(op: int) -> int:
        return sum(sizes[v] for v in tables.reads[op] if v not in alive) - sum(
            sizes[v] for v in tables.writes[op] if v in alive
        )

    while ready:
        op = min(ready, key=lambda candidate: (growth(candidate), -candidate))
        ready.remove(op)
        order.append(op)
        alive.difference_update(tables.writes[op])
        alive.update(tables.reads[op])
        for before in tables.makers[op]:
            waiting[before] -= 1
            if not waiting[before]:
                ready.add(before)
    order.reverse()
    return order


@dataclass
class _Moves:
    """One order under improvement."""

    tables: Tables
    order: list[int]
    work: int

    def __post_init__(self) -> None:
        self.lives = self.tables.lives(self.order)

    def step(self) -> bool:
        """The best move at the peak; False where none lowers it or the work is done."""
        now = self._score(self.lives)
        best: tuple[tuple[int, float], list[int], Lives] | None = None
        for order in self._moved():
            if self.work <= 0:
                return False
            self.work -= 1
            lives = self.tables.lives(order)
            score = self._score(lives)
            if score < now and (best is None or score < best[0]):
                best = (score, order, lives)
        if best is None:
            return False
        self.order, self.lives = best[1], best[2]
        return True

    def _score(self, lives: Lives) -> tuple[int, float]:
        """The peak, then how much of the step is near it."""
        near = np.maximum(lives.profile - 0.9 * self.lives.peak, 0.0)
        return lives.peak, float((near * near).sum())

    def _moved(self) -> Iterator[list[int]]:
        tables, lives = self.tables, self.lives
        top = int(lives.profile.argmax())
        at = np.full(tables.num_ops, -1, np.int64)
        at[self.order] = np.arange(len(self.order))
        spans = np.flatnonzero((lives.start < top) & (lives.end > top))
        waiting = sorted(lives.value[spans].tolist(), key=lambda v: (-tables.sizes[v], v))[:_MOVED]
        for v in waiting:
            later = self._later(v, top, at)
            if later is not None:
                yield later
            earlier = self._earlier(v, top, at)
            if earlier is not None:
                yield earlier

    def _later(self, v: int, top: int, at: Ints) -> list[int] | None:
        """The maker of a value that waits at the top runs right before its first reader."""
        op = self.tables.producer[v]
        if op < 0:
            return None
        readers = {int(at[c]) for w in self.tables.writes[op] for c in self.tables.consumers[w]}
        first = min(readers, default=len(self.order))
        return _shifted(self.order, int(at[op]), first - 1) if first > top else None

    def _earlier(self, v: int, top: int, at: Ints) -> list[int] | None:
        """The last readers of a value that waits at the top run, with all that they need, before it."""
        wanted = {c for c in self.tables.consumers[v] if at[c] > top}
        stack = list(wanted)
        while stack:
            for p in self.tables.makers[stack.pop()]:
                if at[p] >= top and p not in wanted:
                    wanted.add(p)
                    stack.append(p)
        if not wanted or len(wanted) > 32 or self.order[top] in wanted:
            return None
        moved = [op for op in self.order if op in wanted]
        rest = [op for op in self.order if op not in wanted]
        return [*rest[:top], *moved, *rest[top:]]


def _shifted(order: list[int], source: int, target: int) -> list[int]:
    """The order with the entry at `source` moved later, to `target`."""
    return [*order[:source], *order[source + 1 : target + 1], order[source], *order[target + 1 :]]
