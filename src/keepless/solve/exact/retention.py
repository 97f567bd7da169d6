"""The constraint model of `intervals`: runs, their stages, and the intervals over which their outputs are kept.

Imports OR-tools: import it late. For the ops `0 1 2 3` with `3` reading what `0` makes, two runs of op 0 give that
value two intervals: slots [0, e0] and [4 t, e1] of stage t; the read at slot 15 chooses one of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

from ortools.sat.python import cp_model

from keepless.solve.exact.stages import Stages
from keepless.solve.tables import Tables

_MOST_UNITS = 2**24
"""Of the limit, in the model; CP-SAT multiplies bytes by slots in 64 bits."""
_COST_UNITS = 10**8
"""Of the step's seconds, in the model."""


@dataclass(frozen=True)
class _Run:
    """One run of an op: slot `start`, stage `stage`; the first run has no variables."""

    op: int
    copy: int
    stage: cp_model.IntVar | int
    start: cp_model.LinearExprT
    active: cp_model.IntVar | None


class Retention:
    """The model for one limit.

    Arguments:
        copies: runs of one op at most, the first included.
        at_least: seconds of replays that every order needs, proven elsewhere; the search ends where it reaches them.

    Attributes:
        model: CP-SAT's.
        space: what it contains, in words.
        cost_unit: seconds per unit of the objective, which rounds each op down.
    """

    def __init__(self, tables: Tables, limit: int, copies: int, at_least: float = 0.0) -> None:
        self.tables, self.limit, self.copies = tables, limit, copies
        self.stages = Stages(tables, is_merging=False)
        self.model = cp_model.CpModel()
        self.num = max(tables.num_ops, 1)
        self.end = self.num * self.num
        self.cost_unit = (float(tables.seconds.sum()) or 1.0) / _COST_UNITS
        self._room = max(limit - tables.static_nbytes, 0)
        self._unit = self._byte_unit()
        rounding = "" if self._is_even else f", bytes rounded up to units of {self._unit}"
        self.space = (
            f"at most {copies} runs per forward op and one of every other op, first runs in the captured order; before "
            f"each base op every op runs again once at most, in the captured order{rounding}"
        )
        self._intervals: list[cp_model.IntervalVar] = []
        self._demands: list[int] = []
        self.runs = [self._runs(op_id) for op_id in range(tables.num_ops)]
        self.ends: dict[tuple[int, int], cp_model.IntVar] = {}
        self.chosen: dict[tuple[int, int, int, int], cp_model.IntVar] = {}
        self._taken: dict[tuple[int, int], list[cp_model.IntVar]] = defaultdict(list)
        self._keep_outputs()
        self._keep_inputs()
        for op_id in range(tables.num_ops):
            for run in self.runs[op_id]:
                self._read(run)
        for op_id in range(tables.num_ops):
            for run in self.runs[op_id]:
                self._take_over(run)
        self._lay_intervals()
        if self._intervals:
            self.model.add_cumulative(self._intervals, self._demands, self._room // self._unit)
        again = [(run.active, op_id) for op_id, row in enumerate(self.runs) for run in row if run.active is not None]
        total = sum(active * int(float(tables.seconds[op_id]) / self.cost_unit) for active, op_id in again)
        self.model.minimize(total)
        # Every run's units are rounded down, by less than one.
        units = int(at_least / self.cost_unit * (1 - 1e-9)) - len(again)
        if again and units > 0:
            self.model.add(total >= units)

    def _byte_unit(self) -> int:
        tables = self.tables
        moving = [size for v, size in enumerate(tables.sizes) if v not in tables.static]
        common = gcd(*moving, *(int(s) for s in tables.scratch)) or 1
        self._is_even = self._room // common <= _MOST_UNITS
        return common if self._is_even else -(-self._room // _MOST_UNITS)

    def _units(self, nbytes: int) -> int:
        return -(-nbytes // self._unit)

    def _runs(self, op_id: int) -> list[_Run]:
        """The first run, and the ones that may follow in later stages."""
        model = self.model
        rows = [_Run(op_id, 0, op_id, op_id * self.num + op_id, None)]
        until = self.stages.again_until(op_id)
        for copy in range(1, self.copies if until > op_id else 1):
            active = model.new_bool_var(f"again_{op_id}_{copy}")
            stage = model.new_int_var(op_id + 1, until, f"stage_{op_id}_{copy}")
            rows.append(_Run(op_id, copy, stage, stage * self.num + op_id, active))
            before = rows[-2]
            if before.active is not None:
                model.add_implication(active, before.active)
                model.add(stage > before.stage).only_enforce_if(active)
        return rows

    def _keep_outputs(self) -> None:
        """An end per run and output, not before the run; an earlier run's interval ends before the next run."""
        tables = self.tables
        for op_id, row in enumerate(self.runs):
            state = tables.state.get(op_id, -1)
            for v in tables.writes[op_id]:
                if v in tables.static or self.stages.last[v] < 0:
                    continue
                for run in row if v != state else row[:1]:
                    end = self.model.new_int_var(op_id * self.num + op_id, self.end, f"end_{v}_{run.copy}")
                    self.ends[v, run.copy] = end
                    self._when(run, end >= run.start)
                    if v in tables.graph.pinned:
                        self.model.add(end == self.end)
                if v == state:
                    for run in row[1:]:
                        self._when(run, self.ends[v, 0] >= run.start)
                    continue
                for before, run in pairwise(row):
                    self._when(run, self.ends[v, before.copy] < run.start)

    def _keep_inputs(self) -> None:
        graph = self.tables.graph
        for v in sorted(graph.inputs - self.tables.static):
            if self.stages.last[v] >= 0 and not graph.producers[v]:
                self.ends[v, 0] = self.model.new_int_var(0, self.end, f"end_{v}")

    def _when(self, run: _Run, bound: cp_model.BoundedLinearExpression | bool) -> None:
        added = self.model.add(bound)
        if run.active is not None:
            added.only_enforce_if(run.active)

    def _read(self, run: _Run) -> None:
        """Each read chooses a run before it whose interval reaches it."""
        tables, model = self.tables, self.model
        for v in tables.reads[run.op]:
            producer = tables.producer[v]
            makers = [] if producer < 0 else self.runs[producer]
            if len(makers) <= 1 or (v, 1) not in self.ends:
                self._when(run, self.ends[v, 0] >= run.start)
                continue
            choices = []
            for maker in makers:
                chosen = model.new_bool_var(f"read_{run.op}_{run.copy}_{v}_{maker.copy}")
                self.chosen[run.op, run.copy, v, maker.copy] = chosen
                choices.append(chosen)
                model.add(self.ends[v, maker.copy] >= run.start).only_enforce_if(chosen)
                if maker.active is not None:
                    model.add_implication(chosen, maker.active)
                    model.add(maker.stage <= run.stage).only_enforce_if(chosen)
            model.add(sum(choices) == (1 if run.active is None else run.active))

    def _take_over(self, run: _Run) -> None:
        """Where an output that is read takes over an input's storage, the input's interval ends one slot earlier."""
        tables, model = self.tables, self.model
        pairs = self.stages.pairs[run.op]
        if len(pairs) != 1 or pairs[0][1] in tables.writes[run.op] or pairs[0][1] not in tables.reads[run.op]:
            return
        out, source = pairs[0]
        if (out, run.copy) not in self.ends or tables.producer[source] < 0:
            return
        for maker in self.runs[tables.producer[source]]:
            if (source, maker.copy) not in self.ends:
                continue
            taken = model.new_bool_var(f"over_{run.op}_{run.copy}_{maker.copy}")
            model.add(self.ends[source, maker.copy] == run.start).only_enforce_if(taken)
            chosen = self.chosen.get((run.op, run.copy, source, maker.copy))
            if chosen is not None:
                model.add_implication(taken, chosen)
            elif run.active is not None:
                model.add_implication(taken, run.active)
            if out not in tables.graph.pinned:
                model.add_bool_or([*self._readers(out, run), ~taken])
            self._taken[source, maker.copy].append(taken)

    def _readers(self, value: int, run: _Run) -> list[cp_model.IntVar | bool]:
        """Literals of reads of this run's output."""
        found: list[cp_model.IntVar | bool] = []
        for user in self.tables.consumers[value]:
            for reader in self.runs[user]:
                if (value, 1) in self.ends:
                    found.append(self.chosen[user, reader.copy, value, run.copy])
                else:
                    found.append(True if reader.active is None else reader.active)
        return found

    def _lay_intervals(self) -> None:
        """Intervals of values and of what a run needs while it runs."""
        tables, model = self.tables, self.model
        maker = {v: self.runs[tables.producer[v]] for v, _ in self.ends if tables.producer[v] >= 0}
        for (v, copy), end in self.ends.items():
            demand = self._units(tables.sizes[v])
            if not demand:
                continue
            run = maker[v][copy] if v in maker else None
            begin: cp_model.LinearExprT = 0
            active = None
            if run is not None:
                begin, active = run.start, run.active
                if v == tables.state.get(run.op, -1):
                    begin = begin + 1
            stop: cp_model.LinearExprT = end + 1
            if (v, copy) in self._taken:
                stop = model.new_int_var(0, self.end + 1, f"stop_{v}_{copy}")
                model.add(stop == end + 1 - sum(self._taken[v, copy]))
            size = model.new_int_var(0, self.end + 1, f"size_{v}_{copy}")
            name = f"kept_{v}_{copy}"
            if active is None:
                self._intervals.append(model.new_interval_var(begin, size, stop, name))
            else:
                self._intervals.append(model.new_optional_interval_var(begin, size, stop, active, name))
            self._demands.append(demand)
        for op_id, row in enumerate(self.runs):
            state = tables.state.get(op_id, -1)
            loose = [
                v for v in tables.writes[op_id] if (v, 0) not in self.ends and v != state and v not in tables.static
            ]
            demand = self._units(int(tables.scratch[op_id]) + sum(tables.sizes[v] for v in loose))
            for run in row if demand else ():
                name = f"scratch_{op_id}_{run.copy}"
                if run.active is None:
                    self._intervals.append(model.new_fixed_size_interval_var(run.start, 1, name))
                else:
                    self._intervals.append(model.new_optional_fixed_size_interval_var(run.start, 1, run.active, name))
                self._demands.append(demand)

    def order(self, solution: cp_model.CpSolver | cp_model.CpSolverSolutionCallback) -> list[int]:
        """The order of a solution."""
        runs = [(run.op, run.op) for row in self.runs for run in row[:1]]
        for row in self.runs:
            for run in row[1:]:
                if run.active is not None and solution.boolean_value(run.active):
                    runs.append((solution.value(run.stage), run.op))
        return [op_id for _, op_id in sorted(runs)]

    def hint(self, order: Sequence[int]) -> None:
        """Start from an order, as far as the space contains it."""
        model, tables = self.model, self.tables
        seen: set[int] = set()
        placed: list[tuple[int, int]] = []
        waiting: list[int] = []
        for op_id in order:
            if op_id in seen:
                waiting.append(op_id)
                continue
            seen.add(op_id)
            placed.extend((op_id, p) for p in sorted(set(waiting)))
            placed.append((op_id, op_id))
            waiting = []
        copy = [-1] * tables.num_ops
        ends: dict[tuple[int, int], int] = {}
        for stage, op_id in placed:
            if copy[op_id] + 1 >= len(self.runs[op_id]):
                continue
            copy[op_id] += 1
            run, slot = self.runs[op_id][copy[op_id]], stage * self.num + op_id
            if run.active is not None and not isinstance(run.stage, int):
                model.add_hint(run.active, 1)
                model.add_hint(run.stage, stage)
            for v in tables.reads[op_id]:
                producer = tables.producer[v]
                current = 0 if producer < 0 or (v, 1) not in self.ends else copy[producer]
                ends[v, current] = slot
                for other in range(self.copies):
                    chosen = self.chosen.get((op_id, copy[op_id], v, other))
                    if chosen is not None:
                        model.add_hint(chosen, int(other == current))
            for v in tables.writes[op_id]:
                if (v, copy[op_id]) in self.ends:
                    ends[v, copy[op_id]] = slot
            if copy[op_id] and op_id in tables.state:
                ends[tables.state[op_id], 0] = slot
        for row in self.runs:
            for run in row[copy[row[0].op] + 1 :]:
                if run.active is not None:
                    model.add_hint(run.active, 0)
        for key, end in self.ends.items():
            if key in ends:
                model.add_hint(end, self.end if key[0] in tables.graph.pinned else ends[key])
