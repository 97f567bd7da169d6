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

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from keepless.solve.flow import TOTAL, infinite, source_side
from keepless.solve.tables import Floats, Ints, Tables
from keepless.solve.weave import closure


@dataclass(frozen=True)
class Spans:
    """What the cuts of one graph have in common: forward values, when they serve, and who reads them.

    Arguments:
        values: forward values, in the order in which they are made.
        node: the index in `values` of each value of the graph; -1 where it is none of them.
        maker: the op that makes each.
        last_forward: the last op up to the LOSS op that reads each; its maker where none does.
        first_backward: the first op after the LOSS op that reads each; the number of ops where none does.
        needed: whether one does.
        edges: (op, index of a value that it reads), of forward ops.
    """

    values: Ints
    node: Ints
    maker: Ints
    last_forward: Ints
    first_backward: Ints
    needed: npt.NDArray[np.bool_]
    edges: Ints

    @staticmethod
    def of(tables: Tables) -> Spans:
        """O(edges)."""
        loss, num_ops = tables.loss, tables.num_ops
        values = [v for p in range(loss) for v in tables.writes[p] if tables.producer[v] == p]
        node = np.full(len(tables.sizes), -1, np.int64)
        node[values] = np.arange(len(values))
        last_forward, first_backward = [], []
        for v in values:
            readers = tables.consumers[v]
            at = bisect_right(readers, loss)
            last_forward.append(readers[at - 1] if at else tables.producer[v])
            first_backward.append(readers[at] if at < len(readers) else num_ops)
        edges = [(p, node[u]) for p in range(loss) for u in tables.reads[p] if node[u] >= 0]
        first = np.array(first_backward, np.int64)
        return Spans(
            values=np.array(values, np.int64),
            node=node,
            maker=np.array([tables.producer[v] for v in values], np.int64),
            last_forward=np.array(last_forward, np.int64),
            first_backward=first,
            needed=first < num_ops,
            edges=np.array(edges, np.int64).reshape(-1, 2),
        )


class MinCut:
    """One cut per set of values that are kept in any case; its network is made once, when prices are first asked for.

    Arguments:
        fixed: values that are kept.
        spans: of the tables, where they are there already.
    """

    def __init__(self, tables: Tables, fixed: Collection[int] = (), spans: Spans | None = None) -> None:
        self.tables = tables
        self.spans = spans or Spans.of(tables)
        fixed_ops = {tables.producer[v] for v in fixed}
        self.free = [p < tables.loss and tables.replayable[p] and p not in fixed_ops for p in range(tables.num_ops)]
        self._ops = np.array([p for p in range(tables.loss) if self.free[p]], np.int64)
        num = len(self.spans.values)
        self._op0, self._source, self._sink = num, num + tables.loss, num + tables.loss + 1

    @cached_property
    def _edges(self) -> tuple[Ints, Ints]:
        """First the edges that keeping prices, then those of running again, then infinite ones."""
        spans, num = self.spans, len(self.spans.values)
        free = np.array(self.free[: self.tables.loss], bool)
        again = spans.edges[free[spans.edges[:, 0]]]
        heads = np.flatnonzero(spans.needed)
        rows = [np.arange(num), num + self._ops, num + again[:, 0], np.full(len(heads), self._source)]
        kept = np.where(free[spans.maker], num + spans.maker, self._sink)
        cols = [kept, np.full(len(self._ops), self._sink), again[:, 1], heads]
        return np.concatenate(rows), np.concatenate(cols)

    @cached_property
    def _need(self) -> Ints:
        """For each value, the first position that needs it when everything free runs again."""
        tables, spans = self.tables, self.spans
        need = spans.first_backward.tolist()
        first = [tables.num_ops] * tables.loss  # of what each op makes
        for i in range(len(need) - 1, -1, -1):
            v = int(spans.values[i])
            for c in tables.consumers[v]:
                if c < tables.loss and self.free[c] and first[c] < need[i]:
                    need[i] = first[c]
            maker = tables.producer[v]
            first[maker] = min(first[maker], need[i])
        return np.array(need, np.int64)

    def keep_bytes_weight(self, prices: Floats) -> Floats:
        """Price of keeping each value: bytes times the prices of the positions that it spans."""
        spans, total = self.spans, np.concatenate([[0.0], np.cumsum(prices)])
        # Something kept only for replays serves until its first use there.
        until = np.maximum(np.where(spans.needed, spans.first_backward, self._need), spans.last_forward + 1)
        until = np.minimum(until, self.tables.num_ops)
        span = total[until] - total[np.minimum(spans.last_forward + 1, until)]
        price: Floats = self.tables.nbytes[self.spans.values] * span
        return price

    def live_price(self, prices: Floats) -> Floats:
        """Price per op of having its outputs between the first replay's need and their first own use."""
        spans, total = self.spans, np.concatenate([[0.0], np.cumsum(prices)])
        need = np.minimum(self._need, spans.first_backward)
        span = np.where(spans.needed, total[spans.first_backward] - total[need], 0.0)
        per_op = np.zeros(self.tables.num_ops)
        np.add.at(per_op, spans.maker, self.tables.nbytes[self.spans.values] * span)
        return per_op

    def everything(self) -> set[int]:
        """The ops that run again when every value that may be forgotten is."""
        wanted = self.spans.maker[self.spans.needed].tolist()
        return set(closure(self.tables, [p for p in wanted if self.free[p]], lambda p: self.free[p]))

    def solve(self, prices: Floats) -> set[int]:
        """Ops that run again at these prices (seconds per byte, one per position of the base order)."""
        tables = self.tables
        if not len(self.spans.values):
            return set()
        keep = self.keep_bytes_weight(prices)
        bound = float(tables.seconds[self._ops].sum()) * 4 + 1e-12
        again = (tables.seconds + np.minimum(self.live_price(prices), bound / 2))[self._ops]
        # A tiny cost breaks ties towards fewer replays, and keeps capacities positive.
        again = again + 1e-9 * (tables.seconds.sum() + 1e-12)
        keep = np.minimum(keep, bound)
        scale = TOTAL / max(float(keep.sum() + again.sum()), 1e-30)
        rows, cols = self._edges
        caps = infinite(len(rows))
        num = len(keep)
        caps[:num] = np.minimum(keep * scale, TOTAL).astype(np.int32)
        caps[num : num + len(again)] = np.minimum(again * scale + 1, TOTAL).astype(np.int32)
        reached = source_side(rows, cols, caps, self._source, self._sink)
        ops = reached[(reached >= self._op0) & (reached < self._source)] - self._op0
        return {int(p) for p in ops}
