"""A lower bound on the step's time under a limit: a linear relaxation over some moments of the backward.

A moment is the first run of an op t from the LOSS op on. At each moment k, for every forward value v and op p:

    R[v,k]  v is resident          Y[p,k]  p runs again after the moment          X[p,k]  ... before the next moment

with values in [0, 1]. What is read after the moment is resident or made after it, and so are the inputs of what is
made after it; the same between a moment and the next, and what is resident at the next was resident or made:

    R[v,k] + Y[p(v),k] >= 1            v is read after k        R[u,k] + Y[p(u),k] >= Y[p,k]     u is read by p
    R[v,k] + X[p(v),k] >= 1            v is read until k + 1    R[u,k] + X[p(u),k] >= X[p,k]
    R[v,k] + X[p(v),k] >= R[v,k+1]     sum_{j >= k} X[p,j] >= Y[p,k]
    sum_v bytes(v) R[v,k] <= limit - other bytes at k                                             (price of the moment)

Least seconds: sum of seconds(p) X[p,k]. "Other bytes" are there in any case: static values, what t reads and makes,
gradients that were made before t and are needed after it. With one moment this is the dual of the minimum cut of
`min_cut`; X without Y (Checkmate's constraints, Jain et al. 2020, arXiv 1910.02653, eq. 1 to 8, with stages from
moment to moment) is weak where fractions of a value can be made one after another, which Y forbids.

The bound is computed from the multipliers by weak duality, so it does not rest on a solver's tolerances. It holds for
every program that runs backward ops once and in the captured order; from the LOSS op's moment alone, for any order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from keepless.machine import reuse_pairs
from keepless.solve.tables import Floats, Ints, Tables

_MIB = float(2**20)
"""Bytes are counted in MiB: rows of one size keep the solver's tolerances meaningful."""


@dataclass(frozen=True)
class Bound:
    """A bound with what it rests on.

    Arguments:
        seconds: of recomputation: no program within the limit spends less.
        prices: of a byte at each moment (op id), in seconds: the multipliers of the memory rows. Moments without a
            price belong to it, too: they part the runs before them from the runs after.
    """

    seconds: float
    prices: Mapping[int, float]


@dataclass(frozen=True)
class Moment:
    """One moment's facts.

    Arguments:
        op: whose first run it is.
        other: bytes that are there in any case.
        here: values that count in `other`.
    """

    op: int
    other: int
    here: frozenset[int]


@dataclass(frozen=True)
class Network:
    """One moment as a cut: source, a node per forward value, a node per forward op, sink.

    Arguments:
        rows, cols: the edges: first those that `keep` prices, then those of `again`, then infinite ones.
        keep: bytes of each value; 0 for what counts already.
        again: seconds of each op that may run again.
    """

    rows: Ints
    cols: Ints
    keep: Floats
    again: Floats
    source: int
    sink: int


class Relaxation:
    """The linear program of a graph, for any moments and limit.

    `work` counts simplex iterations times rows of the last program, `work_done` of all.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.work = self.work_done = 0
        loss = tables.loss
        made = [v for p in range(loss) for v in tables.writes[p] if v not in tables.static]
        self.values = sorted(set(made))
        node = np.full(len(tables.sizes), -1, np.int64)
        node[self.values] = np.arange(len(self.values))
        self._node = node
        self._maker = np.array([tables.producer[v] for v in self.values], np.int64)
        self._can = np.array([tables.replayable[p] for p in range(loss)], bool)
        unneeded = _unneeded(tables)
        # Forward ops that the loss does not depend on may run for the first time after it, at no extra cost.
        self._seconds = np.array([0.0 if p in unneeded else float(tables.seconds[p]) for p in range(loss)])
        edges = [(p, node[u]) for p in range(loss) if self._can[p] for u in tables.reads[p] if node[u] >= 0]
        self._edges: Ints = np.array(edges, np.int64).reshape(-1, 2)
        self._last_read = {v: p for p in range(tables.num_ops) for v in tables.reads[p]}

    def moment(self, op: int) -> Moment:
        """What is there in any case when an op from the LOSS op on runs for the first time."""
        tables, graph = self.tables, self.tables.graph
        made = {v for p in range(tables.loss, op) for v in tables.writes[p]} - tables.static
        held = {v for v in made if self._last_read.get(v, -1) > op or v in graph.pinned}
        held |= {v for v in self.values if v in graph.pinned}
        here = held | set(tables.reads[op]) | {v for v in tables.writes[op] if v not in tables.static}
        taken = sum(tables.sizes[out] for out, _ in reuse_pairs(graph, graph.ops[op]))
        other = tables.static_nbytes + sum(tables.sizes[v] for v in here) - taken + tables.cost.scratch[op]
        return Moment(op, other, frozenset(here))

    def network(self, op: int) -> Network:
        """The cut of one moment: what is read after it is kept, or its producer runs again."""
        num, loss = len(self.values), self.tables.loss
        source, sink = num + loss, num + loss + 1
        ops = np.flatnonzero(self._can)
        head = self._read_between(op, self.tables.num_ops - 1)
        parts = [
            (np.arange(num), np.where(self._can[self._maker], num + self._maker, sink)),
            (num + ops, np.full(len(ops), sink)),
            (num + self._edges[:, 0], self._edges[:, 1]),
            (np.full(len(head), source), head),
        ]
        rows, cols = (np.concatenate(side) for side in zip(*parts, strict=True))
        keep = np.round(self._weights(self.moment(op)) * _MIB)
        return Network(rows, cols, keep, self._seconds[ops], source, sink)

    def bound(self, limit: int, ops: Sequence[int], prices: Mapping[int, float] | None = None) -> Bound:
        """The best bound of these moments; moments that the limit excludes in any case are left out.

        Arguments:
            limit: bytes.
            ops: from the LOSS op on, each once.
            prices: fixed prices of a byte per moment, instead of the best ones.
        """
        moments = [m for m in map(self.moment, sorted(ops)) if m.other <= limit]
        if not moments or not self.values:
            return Bound(0.0, {})
        rows = _Rows()
        num_values, num_ops = len(self.values), self.tables.loss
        width = num_values + 2 * num_ops
        cost = np.zeros(width * len(moments))
        upper = np.ones(width * len(moments))
        memory = []
        for k, moment in enumerate(moments):
            resident = k * width + np.arange(num_values)
            later = k * width + num_values + np.arange(num_ops)
            between = later + num_ops
            upper[later[~self._can]] = upper[between[~self._can]] = 0.0
            cost[between] = self._seconds
            until = moments[k + 1].op if k + 1 < len(moments) else self.tables.num_ops - 1
            for runs, last in ((later, self.tables.num_ops - 1), (between, until)):
                readers, read = self._edges[:, 0], self._edges[:, 1]
                rows.add([(runs[readers], 1), (resident[read], -1), (runs[self._maker[read]], -1)], 0.0)
                wanted = self._read_between(moment.op, last)
                rows.add([(resident[wanted], -1), (runs[self._maker[wanted]], -1)], -1.0)
            after = [(later, 1.0)] + [
                (j * width + num_values + num_ops + np.arange(num_ops), -1.0) for j in range(k, len(moments))
            ]
            rows.add([(index[self._can], sign) for index, sign in after], 0.0)
            if k + 1 < len(moments):
                rows.add([(resident + width, 1), (resident, -1), (between[self._maker], -1)], 0.0)
            weights = self._weights(moment)
            if prices is None:
                memory.append(rows.add_one(resident, weights, (limit - moment.other) / _MIB))
            else:
                cost[resident] += weights * prices.get(moment.op, 0.0) * _MIB
        seconds, multipliers, iterations = _solve(cost, rows, upper)
        self.work = iterations * rows.num
        self.work_done += self.work
        if prices is None:
            found = {m.op: float(multipliers[row]) / _MIB for m, row in zip(moments, memory, strict=True)}
            return Bound(max(seconds, 0.0), found)
        paid = sum(prices.get(m.op, 0.0) * (limit - m.other) for m in moments)
        return Bound(max(seconds - paid, 0.0), dict(prices))

    def _read_between(self, first: int, last: int) -> Ints:
        """Nodes of forward values that ops after `first` up to `last` read."""
        reads = {v for p in range(first + 1, last + 1) for v in self.tables.reads[p]}
        found = self._node[sorted(reads)] if reads else np.zeros(0, np.int64)
        return found[found >= 0]

    def _weights(self, moment: Moment) -> Floats:
        """MiB of each value; none for what counts already, or may be made by another op, too."""
        tables = self.tables
        return np.array(
            [
                0.0 if v in moment.here or len(tables.graph.producers[v]) > 1 else tables.sizes[v] / _MIB
                for v in self.values
            ]
        )


class _Rows:
    """Rows `sum of sign * x <= right side`, gathered as arrays."""

    def __init__(self) -> None:
        self.num = 0
        self._parts: list[tuple[Ints, Ints, Floats]] = []
        self._right: list[Floats] = []

    def add(self, terms: Sequence[tuple[Ints, float]], right: float) -> None:
        """As many rows as the terms' indices are long."""
        num = len(terms[0][0])
        ids = self.num + np.arange(num)
        self._parts.extend((ids, index, np.full(num, sign)) for index, sign in terms)
        self._right.append(np.full(num, right))
        self.num += num

    def add_one(self, index: Ints, weights: Floats, right: float) -> int:
        """One row over many columns; answers its number."""
        self._parts.append((np.full(len(index), self.num), index, weights))
        self._right.append(np.array([right]))
        self.num += 1
        return self.num - 1

    def matrix(self, width: int) -> tuple[csr_matrix, Floats]:
        """The rows' matrix and right sides."""
        row, column, value = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        return csr_matrix((value, (row, column)), shape=(self.num, width)), np.concatenate(self._right)


def _solve(cost: Floats, rows: _Rows, upper: Floats) -> tuple[float, Floats, int]:
    """A lower bound of the linear program by weak duality, the multipliers and the simplex iterations.

    0 and zeros where the solver gave none.
    """
    matrix, right = rows.matrix(len(cost))
    bounds = np.stack([np.zeros(len(cost)), upper], axis=1)
    unit = float(cost.sum()) / max(int(np.count_nonzero(cost)), 1) or 1.0  # the solver's tolerances are absolute
    found = linprog(cost / unit, A_ub=matrix, b_ub=right, bounds=bounds, method="highs-ds")
    if found.status != 0:
        return 0.0, np.zeros(rows.num), int(found.nit)
    multipliers: Floats = np.maximum(-found.ineqlin.marginals, 0.0) * unit
    reduced = cost + matrix.T @ multipliers
    return float(np.minimum(reduced, 0.0) @ upper - multipliers @ right), multipliers, int(found.nit)


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
