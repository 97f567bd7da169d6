"""Which forward ops to run again, for given prices of memory: one minimum cut.

The order is fixed and each op may run twice. For a forward value v, `x_v` says that the backward has it and `y_p`
that its producer p runs again; v is kept where x_v and not y_p. The cost

    sum_v keep_price(v) * [x_v and not y_p]  +  sum_p (seconds(p) + live_price(p)) * y_p

with x_v = 1 for all values that the backward reads, and y_p = 1 only if x_u = 1 for all inputs u of p, is a cut in a
graph with edges source -> x_v (needed), x_v -> y_p (keep_price), y_p -> sink (seconds), y_p -> x_u (infinite). With
keep_price(v) = bytes(v) * (prices of the positions between v's last forward and first backward use) this is the
Lagrangian of the problem whose memory is bounded at each position: exact for its prices.

References: the cut with two nodes per value is that of PyTorch's min-cut partitioner (functorch, "Min-cut optimal(*)
recomputation", 2022), which knows one price; position prices are ours. Where many values share one price, all or
none of them are kept: the local search fills what is left.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from keepless.solve.flow import TOTAL, infinite, source_side
from keepless.solve.tables import Floats, Ints, Tables
from keepless.solve.weave import closure


class MinCut:
    """The cut's graph, built once per graph and set of values that are kept in any case."""

    def __init__(self, tables: Tables, fixed: Collection[int] = ()) -> None:
        self.tables = tables
        loss, num_ops = tables.loss, tables.num_ops
        fixed_ops = {tables.producer[v] for v in fixed}
        self.free = [p < loss and tables.replayable[p] and p not in fixed_ops for p in range(num_ops)]
        forward = [v for p in range(loss) for v in tables.writes[p] if tables.producer[v] == p]
        self.values = np.array(forward, np.int64)
        num = len(forward)
        node = {v: i for i, v in enumerate(forward)}
        self._source, self._sink, self._op0 = num + loss, num + loss + 1, num
        last_forward, first_backward = np.zeros(num, np.int64), np.full(num, num_ops, np.int64)
        needed = np.zeros(num, bool)
        for v, i in node.items():
            after = [c for c in tables.consumers[v] if c > loss]
            before = [c for c in tables.consumers[v] if c <= loss]
            last_forward[i] = before[-1] if before else tables.producer[v]
            if after:
                first_backward[i], needed[i] = after[0], True
        self._last_forward, self._first_backward, self.needed = last_forward, first_backward, needed
        rows: list[int] = []
        cols: list[int] = []
        for v, i in node.items():
            rows.append(i)
            cols.append(num + tables.producer[v] if self.free[tables.producer[v]] else self._sink)
        self._num_keep = num
        self._ops = np.array([p for p in range(loss) if self.free[p]], np.int64)
        rows.extend((self._op0 + self._ops).tolist())
        cols.extend([self._sink] * len(self._ops))
        for p in self._ops.tolist():
            for u in tables.reads[p]:
                if u in node:
                    rows.append(num + p)
                    cols.append(node[u])
        heads = np.flatnonzero(needed)
        rows.extend([self._source] * len(heads))
        cols.extend(heads.tolist())
        self._rows, self._cols = np.array(rows), np.array(cols)
        self._need = self._need_positions(node)

    def _need_positions(self, node: dict[int, int]) -> Ints:
        """For each value, the first position that needs it when everything free runs again."""
        tables = self.tables
        need = self._first_backward.copy()
        for v in reversed(self.values.tolist()):
            i = node[v]
            for c in tables.consumers[v]:
                if c < tables.loss and self.free[c]:
                    need[i] = min(need[i], *(int(need[node[w]]) for w in tables.writes[c] if w in node))
        return need

    def keep_bytes_weight(self, prices: Floats) -> Floats:
        """Price of keeping each value: bytes times the prices of the positions that it spans."""
        total = np.concatenate([[0.0], np.cumsum(prices)])
        # Something kept only for replays serves until its first use there.
        until = np.maximum(np.where(self.needed, self._first_backward, self._need), self._last_forward + 1)
        until = np.minimum(until, self.tables.num_ops)
        span = total[until] - total[np.minimum(self._last_forward + 1, until)]
        price: Floats = self.tables.nbytes[self.values] * span
        return price

    def live_price(self, prices: Floats) -> Floats:
        """Price per op of having its outputs between the first replay's need and their first own use."""
        total = np.concatenate([[0.0], np.cumsum(prices)])
        need = np.minimum(self._need, self._first_backward)
        span = np.where(self.needed, total[self._first_backward] - total[need], 0.0)
        per_op = np.zeros(self.tables.num_ops)
        producers = np.array([self.tables.producer[v] for v in self.values.tolist()], np.int64)
        np.add.at(per_op, producers, self.tables.nbytes[self.values] * span)
        return per_op

    def everything(self) -> set[int]:
        """The ops that run again when every value that may be forgotten is."""
        wanted = [self.tables.producer[v] for v in self.values[self.needed].tolist()]
        return set(closure(self.tables, [p for p in wanted if self.free[p]], lambda p: self.free[p]))

    def solve(self, prices: Floats) -> set[int]:
        """Ops that run again at these prices (seconds per byte, one per position of the base order)."""
        tables = self.tables
        if not len(self.values):
            return set()
        keep = self.keep_bytes_weight(prices)
        bound = float(tables.seconds[self._ops].sum()) * 4 + 1e-12
        again = (tables.seconds + np.minimum(self.live_price(prices), bound / 2))[self._ops]
        # A tiny cost breaks ties towards fewer replays, and keeps capacities positive.
        again = again + 1e-9 * (tables.seconds.sum() + 1e-12)
        keep = np.minimum(keep, bound)
        scale = TOTAL / max(float(keep.sum() + again.sum()), 1e-30)
        caps = infinite(len(self._rows))
        num = self._num_keep
        caps[:num] = np.minimum(keep * scale, TOTAL).astype(np.int32)
        caps[num : num + len(again)] = np.minimum(again * scale + 1, TOTAL).astype(np.int32)
        reached = source_side(self._rows, self._cols, caps, self._source, self._sink)
        ops = reached[(reached >= self._op0) & (reached < self._source)] - self._op0
        return {int(p) for p in ops}
