"""The model of a step in stages: which ops run again before which base op, and what is kept between stages.

Stage t ends with the first run of base op t (of a group of ops where some cost nothing), and before it any forward
ops may run again, once each, in the captured order. For a forward `0 1`, loss `2` and backward `3 4`, the runs
`R[0,0] R[1,1] R[2,2] R[3,3] R[4,0] R[4,4]` are the order `0 1 2 3 0 4`.

`Rows` collects the rows of a mixed-integer program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_array

from keepless.machine import reuse_pairs
from keepless.solve.tables import Floats, Tables


@dataclass
class Rows:
    """Variables and rows `low <= sum of coefficients <= high`, as they are added."""

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    price: list[float] = field(default_factory=list)
    is_whole: list[int] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    _row: list[int] = field(default_factory=list)
    _column: list[int] = field(default_factory=list)
    _factor: list[float] = field(default_factory=list)

    def variable(self, lower: float, upper: float, price: float = 0.0, *, is_whole: bool = False) -> int:
        """A new variable's column."""
        self.lower.append(lower)
        self.upper.append(upper)
        self.price.append(price)
        self.is_whole.append(int(is_whole))
        return len(self.price) - 1

    def add(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        """A new row over (column, factor) terms."""
        row = len(self.low)
        self.low.append(low)
        self.high.append(high)
        for column, factor in terms:
            self._row.append(row)
            self._column.append(column)
            self._factor.append(factor)

    def matrix(self) -> csr_array:
        """All rows."""
        shape = (len(self.low), len(self.price))
        return csr_array((np.array(self._factor), (np.array(self._row), np.array(self._column))), shape=shape)


class Stages:
    """When ops may run and when values may be kept, from graph and costs alone.

    Arguments:
        is_merging: ops that cost nothing share the stage of the op behind them.

    Attributes:
        stage_of: per op, the stage of its first run.
        members: per stage, the base ops that first run in it.
        last: per value, the last stage in which something may read it; the number of stages if it is pinned; -1 if
            nothing does.
        is_whole_truth: every order of the space has the bytes here that the machine counts for it.
    """

    def __init__(self, tables: Tables, *, is_merging: bool = True) -> None:
        self.tables = tables
        graph = tables.graph
        self.members: list[list[int]] = []
        open_group: list[int] = []
        for op_id in range(tables.num_ops):
            open_group.append(op_id)
            if not is_merging or tables.seconds[op_id] > 0 or op_id == tables.num_ops - 1:
                self.members.append(open_group)
                open_group = []
        self.num = len(self.members)
        self.stage_of = [t for t, group in enumerate(self.members) for _ in group]
        self.pairs = [reuse_pairs(graph, op) for op in graph.ops]
        self.last = self._last()
        self.is_whole_truth = (
            all(len(row) <= 1 for row in graph.producers)
            and not any(graph.producers[v] for v in graph.inputs)
            and all(len(pairs) <= 1 for pairs in self.pairs)
            and not any(v in tables.static for pairs in self.pairs for pair in pairs for v in pair)
        )

    def _last(self) -> list[int]:
        tables = self.tables
        last = [-1] * len(tables.sizes)
        for v in tables.graph.pinned - tables.static:
            last[v] = self.num
        for op_id in range(tables.num_ops - 1, -1, -1):
            until = self.stage_of[op_id]
            if tables.replayable[op_id]:
                until = max(until, max(min(last[v], self.num - 1) for v in tables.writes[op_id]))
                state = tables.state.get(op_id, -1)
                if state >= 0 and until > self.stage_of[op_id]:
                    last[state] = max(last[state], until)
            for v in tables.reads[op_id]:
                last[v] = max(last[v], until)
        return last

    def again_until(self, op_id: int) -> int:
        """The last stage in which a run of the op may serve; its own stage if it may not run again."""
        tables = self.tables
        if not tables.replayable[op_id]:
            return self.stage_of[op_id]
        state = tables.state.get(op_id, -1)
        until = max((min(self.last[v], self.num - 1) for v in tables.writes[op_id] if v != state), default=-1)
        return max(until, self.stage_of[op_id])

    def born(self, value: int) -> int:
        """The first stage at whose begin the value may be there."""
        producers = self.tables.graph.producers[value]
        if value in self.tables.graph.inputs:
            return 0
        return self.stage_of[producers[0]] + 1 if producers else self.num + 1

    def fill(self, kept: Sequence[set[int]]) -> list[int]:
        """The order with the fewest runs for which these values are there at the begin of each stage.

        The second phase of the two-phase rounding (Jain et al. 2020): runs that the kept values want.

        Arguments:
            kept: per stage, value ids; one more entry for the end.
        """
        tables = self.tables
        order: list[int] = []
        for t, group in enumerate(self.members):
            runs = set(group)
            wanted = [v for p in group for v in tables.reads[p]]
            # What is kept from here and is not there must be made in this stage.
            wanted += sorted(kept[t + 1] - kept[t])
            while wanted:
                v = wanted.pop()
                p = tables.producer[v]
                if v in kept[t] or p < 0 or p in runs or not tables.replayable[p] or self.stage_of[p] >= t:
                    continue
                runs.add(p)
                wanted.extend(tables.reads[p])
            order.extend(sorted(runs))
        return order


def round_kept(stages: Stages, columns: dict[tuple[int, int], int], x: Floats, share: float) -> list[set[int]]:
    """Per stage, the values that are kept to more than this share."""
    kept: list[set[int]] = [set() for _ in range(stages.num + 1)]
    for (t, v), column in columns.items():
        if x[column] > share:
            kept[t].add(v)
    return kept
