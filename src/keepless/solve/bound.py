"""A lower bound on the step's time under a limit: minimum cuts at single positions, and their Lagrangian dual.

Take the moment when op t runs for the first time. Whatever later ops read is then either resident or made after t;
the inputs of what is made after t are again resident or made after t. So the bytes resident at t and the seconds of
runs after t are a cut as in `min_cut`, whatever the plan does and however often it recomputes. With price l per byte,

    seconds >= sum of all ops' seconds + min over cuts (l * bytes + seconds again) - l * (limit - other bytes at t),

and the best l is found by a ternary search over a concave function. "Other bytes" are there in any case: static
values, what t itself reads and makes, gradients that were made before t and are needed after it.

For the LOSS op this holds for every program, in any order. For a backward op it holds where backward ops run once,
in the captured order.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from keepless.machine import reuse_pairs
from keepless.solve.tables import Tables

_INFINITE = 2**30
_TOTAL = 2**29
_STEPS = 18


def seconds_bound(tables: Tables, limit: int, positions: Iterable[int]) -> tuple[float, int]:
    """The best bound over the positions (op ids from the LOSS op on), and the position that gives it."""
    base = float(tables.seconds.sum())
    best, where = base, -1
    for t in positions:
        gain = _CutAt(tables, t).gain(limit)
        if base + gain > best:
            best, where = base + gain, t
    return best, where


class _CutAt:
    """The cut's graph at one position."""

    def __init__(self, tables: Tables, t: int) -> None:
        loss, num = tables.loss, tables.num_ops
        graph = tables.graph
        reads_t = set(tables.reads[t])
        forward = {v for p in range(loss) for v in tables.writes[p] if v not in tables.static}
        later = {v for p in range(t + 1, num) for v in tables.reads[p]}
        made = {v for p in range(loss, t) for v in tables.writes[p]} - tables.static
        held = {v for v in made if v in later or v in graph.pinned} | (graph.pinned & forward)
        taken = sum(tables.sizes[out] for out, _ in reuse_pairs(graph, graph.ops[t]))
        here = held | reads_t | {v for v in tables.writes[t] if v not in tables.static}
        self.other = tables.static_nbytes + sum(tables.sizes[v] for v in here) - taken + tables.cost.scratch[t]
        # Forward ops that the loss does not depend on may run for the first time after it, at no extra cost.
        free = _unneeded(tables)
        node = {v: i for i, v in enumerate(sorted(forward))}
        self.num_values = len(node)
        source, sink, op0 = len(node) + loss, len(node) + loss + 1, len(node)
        self.source, self.sink = source, sink
        rows, cols, keep, again = [], [], [], []
        for v, i in node.items():
            rows.append(i)
            cols.append(op0 + tables.producer[v] if tables.replayable[tables.producer[v]] else sink)
            # A value that another op can make too costs nothing: the bound stays true.
            free_value = v in here or len(graph.producers[v]) > 1
            keep.append(0 if free_value else tables.sizes[v])
        for p in range(loss):
            if tables.replayable[p]:
                rows.append(op0 + p)
                cols.append(sink)
                again.append(0.0 if p in free else float(tables.seconds[p]))
        for p in range(loss):
            if tables.replayable[p]:
                inner = [node[u] for u in tables.reads[p] if u in node]
                rows.extend([op0 + p] * len(inner))
                cols.extend(inner)
        heads = [node[v] for v in sorted(later & forward)]
        rows.extend([source] * len(heads))
        cols.extend(heads)
        self.rows, self.cols = np.array(rows, np.int64), np.array(cols, np.int64)
        self.keep, self.again = np.array(keep, np.float64), np.array(again, np.float64)

    def gain(self, limit: int) -> float:
        """Seconds that the limit costs at least."""
        slack = limit - self.other
        if slack < 0 or not self.keep.sum():
            return 0.0
        low, high, best = -9.0, 3.0, 0.0
        unit = float(self.again.sum() + 1e-12) / max(float(self.keep.sum()), 1.0)
        ratio = (5**0.5 - 1) / 2
        inner = [high - ratio * (high - low), low + ratio * (high - low)]
        values = [self._dual(unit * 10**x, slack) for x in inner]
        for _ in range(_STEPS):
            best = max(best, *values)
            if values[0] >= values[1]:
                high, inner[1], values[1] = inner[1], inner[0], values[0]
                inner[0] = high - ratio * (high - low)
                values[0] = self._dual(unit * 10 ** inner[0], slack)
            else:
                low, inner[0], values[0] = inner[0], inner[1], values[1]
                inner[1] = low + ratio * (high - low)
                values[1] = self._dual(unit * 10 ** inner[1], slack)
        return max(best, *values)

    def _dual(self, price: float, slack: int) -> float:
        keep = np.minimum(self.keep * price, self.again.sum())
        scale = _TOTAL / max(float(keep.sum() + self.again.sum()), 1e-30)
        caps = np.full(len(self.rows), _INFINITE, np.int32)
        caps[: len(keep)] = (keep * scale).astype(np.int32)
        caps[len(keep) : len(keep) + len(self.again)] = (self.again * scale).astype(np.int32)
        network = csr_matrix((caps, (self.rows, self.cols)), shape=(self.sink + 1, self.sink + 1))
        return float(maximum_flow(network, self.source, self.sink, method="dinic").flow_value / scale - price * slack)


def _unneeded(tables: Tables) -> set[int]:
    """Forward ops that the LOSS op does not depend on."""
    needed: set[int] = set()
    stack = [tables.loss] if tables.loss < tables.num_ops else []
    while stack:
        for v in tables.reads[stack.pop()]:
            p = tables.producer[v]
            if p >= 0 and p not in needed:
                needed.add(p)
                stack.append(p)
    return {p for p in range(tables.loss) if p not in needed}
