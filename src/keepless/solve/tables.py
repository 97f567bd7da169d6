"""Graph and costs as arrays, and what an order of ops does to memory.

An order is a sequence of op ids; repeats are recomputation. An instance of a value begins where a producer runs and
dies at its last read before the next run of a producer (`keepless.passes.from_order`). For the order `0 1 0 2` of
`0 -> a, 1: a -> b, 2: a, b -> c` the instances are `a` over [0, 1], `b` over [1, 3], `a` over [2, 3], `c` at 3.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from keepless.cost import CostModel
from keepless.ir import Effect, Graph, Kind
from keepless.machine import reuse_pairs

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Lives:
    """Instances of values under an order, sorted by value, then start.

    Arguments:
        value: value id of each instance.
        start: position of the run that makes it.
        end: position of its last read (its start if nothing reads it; one past the order if it is pinned).
        profile: highest bytes on the device at each position.
        seconds: of the step.
        reads: `value * span + position` of every read, ascending, where `span` exceeds the order's length.
        span: see `reads`.
        start_nbytes: bytes before the first op.
    """

    value: Ints
    start: Ints
    end: Ints
    profile: Ints
    seconds: float
    reads: Ints
    span: int
    start_nbytes: int = 0

    @property
    def peak(self) -> int:
        """Highest bytes on the device."""
        return int(self.profile.max()) if len(self.profile) else self.start_nbytes

    def next_read(self, value: int, position: int) -> int:
        """The first position after `position` that reads the value; -1 if none does."""
        at = bisect_right(self._read_list, value * self.span + position)
        if at < len(self._read_list) and self._read_list[at] // self.span == value:
            return self._read_list[at] % self.span
        return -1

    def last_read(self, value: int, position: int) -> int:
        """The last position before `position` that reads the value; -1 if none does."""
        at = bisect_left(self._read_list, value * self.span + position) - 1
        if at >= 0 and self._read_list[at] // self.span == value:
            return self._read_list[at] % self.span
        return -1

    def instance(self, value: int, position: int) -> tuple[int, int]:
        """Start and end of the value's latest instance made before `position`; (-1, -1) if there is none."""
        at = bisect_left(self._key_list, value * self.span + position) - 1
        if at >= 0 and self._key_list[at] // self.span == value:
            return self._key_list[at] % self.span, self._end_list[at]
        return -1, -1

    # Scalar look-ups by bisection on lists are ten times faster than numpy's.
    @cached_property
    def _read_list(self) -> list[int]:
        listed: list[int] = self.reads.tolist()
        return listed

    @cached_property
    def _key_list(self) -> list[int]:
        listed: list[int] = (self.value * self.span + self.start).tolist()
        return listed

    @cached_property
    def _end_list(self) -> list[int]:
        listed: list[int] = self.end.tolist()
        return listed


def _csr(rows: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    counts = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts, np.fromiter((v for row in rows for v in row), np.int64, int(starts[-1]))


def _gather(starts: Ints, order: Ints) -> tuple[Ints, Ints]:
    """Positions of the rows of `order`, each as often as it has entries, and where these stand, in order."""
    begin = starts[order]
    counts = starts[order + 1] - begin
    ends = counts.cumsum()
    positions = np.arange(len(order)).repeat(counts)
    return positions, np.arange(len(positions)) + (begin - ends + counts)[positions]


class Tables:
    """What solvers read again and again.

    Static values (resident before and after the step) are left out of `reads`: they never move.
    """

    def __init__(self, graph: Graph, cost: CostModel) -> None:
        self.graph = graph
        self.cost = cost
        self.num_ops = len(graph.ops)
        self.static = graph.inputs & graph.pinned
        self.static_nbytes = graph.static_nbytes
        self.nbytes = np.array([v.nbytes for v in graph.values], np.int64)
        self.sizes = [v.nbytes for v in graph.values]
        self.seconds = np.array(cost.seconds, np.float64)
        # A static value is there already; an op that lists it as an output holds another copy while it runs.
        copies = [sum(self.sizes[v] for v in op.outputs if v in self.static) for op in graph.ops]
        self.scratch = np.array(cost.scratch, np.int64) + np.array(copies, np.int64)
        self.reads = [tuple(v for v in op.inputs if v not in self.static) for op in graph.ops]
        self.writes = [op.outputs for op in graph.ops]
        self.loss = self.num_ops if graph.loss_op is None else graph.loss_op
        self.producer = [row[0] if row else -1 for row in graph.producers]
        rng = {v.id for v in graph.values if v.kind is Kind.RNG}
        self.state = {op.id: v for op in graph.ops if Effect.RNG in op.effects for v in op.outputs if v in rng}
        self.consumers = graph.consumers
        self.makers = [tuple({p for v in row if (p := self.producer[v]) >= 0}) for row in self.reads]
        self.replayable = [self._may_replay(op.id) for op in graph.ops]
        self._pinned = np.array(sorted(graph.pinned - self.static), np.int64)
        self._given = np.array(sorted(graph.inputs - self.static), np.int64)
        self._start_nbytes = sum(self.sizes[v] for v in graph.inputs)
        states = set(self.state.values())
        for op_id, v in self.state.items():  # every run of an RNG op writes the state, kept or not
            self.scratch[op_id] += self.sizes[v]
        self._draws = np.zeros(self.num_ops, bool)
        self._state_nbytes = np.zeros(self.num_ops, np.int64)
        for op_id, v in self.state.items():
            self._draws[op_id], self._state_nbytes[op_id] = True, self.sizes[v]
        written = [tuple(v for v in row if v not in states and v not in self.static) for row in self.writes]
        self._event_starts, self._event_values = _csr([r + w for r, w in zip(self.reads, written, strict=True)])
        events = [(2,) * len(r) + (3,) * len(w) for r, w in zip(self.reads, written, strict=True)]
        self._event_keys = _csr(events)[1]  # at one position the read comes before the write
        pairs = [reuse_pairs(graph, op) for op in graph.ops]
        self._reuse_starts, self._reuse_out = _csr([[p[0] for p in row] for row in pairs])
        self._reuse_in = _csr([[p[1] for p in row] for row in pairs])[1]

    def priced(self, cost: CostModel) -> Tables:
        """The same arrays at other seconds; scratch is the same."""
        assert cost.scratch == self.cost.scratch
        other = copy(self)
        other.cost, other.seconds = cost, np.array(cost.seconds, np.float64)
        return other

    def _may_replay(self, op_id: int) -> bool:
        op = self.graph.ops[op_id]
        if not op.can_replay or op_id >= self.loss or not op.outputs:
            return False
        return not any(v in self.graph.pinned or len(self.graph.producers[v]) > 1 for v in op.outputs)

    @cached_property
    def base(self) -> Ints:
        """The order in which every op runs once."""
        return np.arange(self.num_ops, dtype=np.int64)

    def lives(self, order: Sequence[int] | Ints) -> Lives:
        """Instances, profile and seconds of an order: O(events log events), numpy.

        Storage reuse is counted where an op's input dies at it. Agrees with `keepless.passes.evaluate`.
        """
        runs = np.asarray(order, np.int64)
        num = len(runs)
        positions, index = _gather(self._event_starts, runs)
        # They sort by value, then position; writes are odd. Given values are written before all, pinned ones read last.
        width = 2 * num + 4
        keys = np.concatenate(
            [
                self._event_values[index] * width + (2 * positions + self._event_keys[index]),
                self._given * width + 1,
                self._pinned * width + (2 * num + 2),
            ]
        )
        keys.sort()
        value = keys // width
        where = keys - value * width
        position = (where >> 1) - 1
        is_write = (where & 1).astype(bool)
        first = is_write.nonzero()[0]
        scratch, seconds = self.scratch[runs], float(self.seconds[runs].sum())
        span = num + 2
        if not len(first):
            profile = self.static_nbytes + scratch
            return Lives(first, first, first, profile, seconds, first, span, self._start_nbytes)
        last = np.concatenate([first[1:], [len(keys)]]) - 1
        inst_value, start = value[first], np.maximum(position[first], 0)
        end = np.maximum(position[last], start)
        size = self.nbytes[inst_value]
        moves = np.bincount(start, size, span) - np.bincount(end + 1, size, span)
        profile = (self.static_nbytes + moves.cumsum()[:num]).astype(np.int64) + scratch
        if len(self._reuse_out):
            self._reuse(runs, num, profile, inst_value, start, end)
        if num:
            profile[0] = max(profile[0], self._start_nbytes)
        if self.state:
            profile += self._states(runs, num)
        is_read = ~is_write
        reads = value[is_read] * span + position[is_read]
        return Lives(inst_value, start, end, profile, seconds, reads, span, self._start_nbytes)

    def _reuse(self, runs: Ints, num: int, profile: Ints, value: Ints, start: Ints, end: Ints) -> None:
        """Take the bytes of inputs whose storage an output takes over from the profile."""
        pos, index = _gather(self._reuse_starts, runs)
        if not len(pos):
            return
        out, taken = self._reuse_out[index], self._reuse_in[index]
        span = num + 4
        wanted = out * span + pos
        starts = value * span + start
        at = np.minimum(starts.searchsorted(wanted), len(starts) - 1)
        kept = (starts[at] == wanted) & (end[at] > pos)
        ends = value * span + end
        ends.sort()  # one instance at most ends at a position
        key = taken * span + pos
        dies = ends[np.minimum(ends.searchsorted(key), len(ends) - 1)] == key
        # A run reuses for all the outputs that it keeps, or for none.
        alive = np.zeros(num, bool)
        alive[pos[kept & ~dies]] = True
        take = kept & ~alive[pos]
        profile -= np.bincount(pos[take], self.nbytes[taken[take]], num).astype(np.int64)

    def _states(self, runs: Ints, num: int) -> Ints:
        """Bytes of recorded generator states: from an op's first run to its last replay."""
        at = np.flatnonzero(self._draws[runs])
        if not len(at):
            return np.zeros(num, np.int64)
        ops = runs[at]
        begin, finish = np.full(self.num_ops, num, np.int64), np.full(self.num_ops, -1, np.int64)
        begin[ops[::-1]], finish[ops] = at[::-1], at  # of equal indices the last assignment stays
        drawn = np.flatnonzero(finish >= 0)
        size = self._state_nbytes[drawn]
        moves = np.bincount(begin[drawn] + 1, size, num + 2) - np.bincount(finish[drawn] + 1, size, num + 2)
        return np.cumsum(moves)[:num].astype(np.int64)
