"""Checkmate: the fastest rematerialisation schedule as a mixed-integer program.

Jain, Jain, Nrusimha, Gholami, Abbeel, Keutzer, Stoica and Gonzalez 2020, "Checkmate: Breaking the Memory Wall with
Optimal Tensor Rematerialization", arXiv 1910.02653. `R[t,i]`: op i runs in stage t; `S[t,v]`: value v is there when
stage t begins; `FREE[t,v,k]`: v is forgotten right after op k ran in stage t; `U[t,k]`: bytes before op k in stage t.
Equations: (1b) inputs, (1c) what is kept was there, (8a-c) one base op per stage, (4-7) memory.

Beside the paper: S is per value and R per op, so that an op may have several outputs; ops that cost nothing share
the stage of the op behind them; FREE is bounded by each hazard alone rather than by their sum, a tighter relaxation;
scratch, storage reuse and generator states count as on the machine.

The program has some n^2 + n * edges variables; HiGHS solves it. Larger graphs are refused.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from keepless.cost import CostModel
from keepless.ir import Certificate, Graph, Status
from keepless.passes import evaluate
from keepless.solve.exact.known import captured_order, cut_seconds, settle
from keepless.solve.exact.stages import Rows, Stages, round_kept
from keepless.solve.floor import floor_bound
from keepless.solve.search import Search
from keepless.solve.solution import Solution
from keepless.solve.tables import Floats, Tables
from keepless.solve.weave import strip

_MARGINS = (0.0, 0.1, 0.2, 0.3, 0.5)
"""Shares of the limit that the rounded relaxation is solved without, one after the other."""
_SHARES = (0.5, 0.1, 0.25, 0.75, 0.9)
"""Above which a value of the relaxation counts as kept."""


@dataclass(frozen=True)
class Checkmate:
    """The MILP.

    Arguments:
        approximation: the relaxation, by the paper's two-phase rounding, in place of the MILP.
        most_ops: larger graphs are refused: the captured order is the answer.
        most_whole: where the search says no work, programs with more whole numbers are rounded relaxations: a node
            of a large program takes seconds, and its first node minutes.
        nodes: of the branch and bound, where the search says none.
        gap: relative, at which the search ends.
    """

    approximation: bool = False
    most_ops: int = 120
    most_whole: int = 400
    nodes: int = 100
    gap: float = 1e-6

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The fastest schedule within the limit."""
        begin = time.perf_counter()
        search = search or Search()
        order = captured_order(graph)
        least = float(sum(cost.seconds))
        bytes_bound, _ = floor_bound(graph, cost)
        status, witness, space = Status.FEASIBLE, "", "every op once"
        if evaluate(graph, cost, order).peak <= limit_nbytes:
            status, witness = Status.OPTIMAL, "every op runs once"
        elif limit_nbytes < bytes_bound:
            status, witness = Status.PROVEN_INFEASIBLE, f"one op needs {bytes_bound} bytes"
        elif len(graph.ops) > self.most_ops:
            witness = f"refused: {len(graph.ops)} ops, above {self.most_ops}"
        else:
            model = _Model(Tables(graph, cost), limit_nbytes)
            space = model.space
            found = self._search(model, search)
            status, witness = found.status, found.witness
            order = order if found.order is None else found.order
            least += found.more_seconds
        claim = Certificate("checkmate", status, space, least, bytes_bound, witness, time.perf_counter() - begin, seed)
        return settle(graph, cost, order, claim, limit_nbytes, search)

    def _search(self, model: _Model, search: Search) -> _Found:
        """The MILP's order, or the rounded relaxation's where that is asked for or the MILP ends without one."""
        found = _Found()
        if not self.approximation and (search.work is not None or sum(model.rows.is_whole) <= self.most_whole):
            found = self._branch(model, search)
        if found.order is None and not found.is_empty:
            found.order, relaxed = self._rounded(model, search)
            found.more_seconds = max(found.more_seconds, relaxed)
            found.witness = f"{found.witness}, then the rounded relaxation".removeprefix(", then the ")
        if not model.stages.is_whole_truth:
            found.more_seconds = 0.0
            found.status = Status.FEASIBLE
        found.more_seconds = max(found.more_seconds, cut_seconds(model.tables, model.limit))
        return found

    def _branch(self, model: _Model, search: Search) -> _Found:
        most = self.nodes if search.work is None else search.work
        result = model.optimise(0.0, {"node_limit": most, "mip_rel_gap": self.gap}, search)
        count = int(result.get("mip_node_count") or 0)
        search.spent += min(count, most)
        is_empty = result.status == 2
        found = _Found(
            witness=f"{count} nodes" + (", nothing fits in the space" if is_empty else ""), is_empty=is_empty
        )
        bound = result.get("mip_dual_bound")
        if bound is not None and np.isfinite(bound):
            found.more_seconds = max(0.0, float(bound)) * model.unit
        if result.x is None:
            return found
        order = model.order(result.x)
        if evaluate(model.tables.graph, model.tables.cost, order).peak <= model.limit:
            found.order = order
            found.status = Status.OPTIMAL if result.status == 0 else Status.FEASIBLE
        return found

    def _rounded(self, model: _Model, search: Search) -> tuple[list[int] | None, float]:
        """Two-phase rounding: the fastest order that fits of all thresholds at the first margin that has one, or None;
        and the relaxation's seconds."""
        least, graph, cost = 0.0, model.tables.graph, model.tables.cost
        for margin in _MARGINS:
            if not search.spend(0):
                break
            result = model.optimise(margin, {}, search, relaxed=True)
            if result.x is None:
                break
            if margin == 0.0:
                least = max(0.0, float(result.fun)) * model.unit
            orders = [
                strip(model.tables, model.stages.fill(round_kept(model.stages, model.kept, result.x, share)))
                for share in _SHARES
            ]
            costs = [(evaluate(graph, cost, order), order) for order in orders]
            fitting = [(found.seconds, order) for found, order in costs if found.peak <= model.limit]
            if fitting:
                return min(fitting)[1], least
        return None, least


@dataclass
class _Found:
    """What a search found: seconds beyond one run of every op are a bound, `is_empty` that the space has no plan."""

    order: list[int] | None = None
    status: Status = Status.FEASIBLE
    more_seconds: float = 0.0
    witness: str = ""
    is_empty: bool = False


class _Model:
    """The program for one limit: bytes in shares of what the limit leaves, seconds in shares of the step."""

    def __init__(self, tables: Tables, limit: int) -> None:
        self.tables, self.limit = tables, limit
        self.stages = stages = Stages(tables)
        self.rows = Rows()
        self.room = max(limit - tables.static_nbytes, 1)
        self.unit = float(tables.seconds.sum()) or 1.0
        self.one = self.rows.variable(1.0, 1.0)
        self.bytes_rows: list[int] = []
        self.runs: dict[tuple[int, int], int] = {}
        self.kept: dict[tuple[int, int], int] = {}
        self.space = (
            f"{stages.num} stages, each with one first run in the captured order (ops that cost nothing together) "
            "after recomputations of forward ops, once each and in the captured order"
        )
        for op_id in range(tables.num_ops):
            own = stages.stage_of[op_id]
            self.runs[own, op_id] = self.one
            price = float(tables.seconds[op_id]) / self.unit
            for t in range(own + 1, stages.again_until(op_id) + 1):
                self.runs[t, op_id] = self.rows.variable(0.0, 1.0, price, is_whole=True)
        for v in range(len(tables.sizes)):
            if v in tables.static:
                continue
            for t in range(stages.born(v), stages.last[v] + 1):
                is_end = t == stages.num
                self.kept[t, v] = self.rows.variable(float(is_end), 1.0, is_whole=not is_end)
        self._inputs()
        self._carried()
        for t in range(stages.num):
            self._memory(t)

    def _makers(self, t: int, value: int, before: int) -> list[tuple[int, float]]:
        """Terms of what may make the value in stage t before op `before`; generator states come from first runs."""
        tables = self.tables
        found = []
        for p in tables.graph.producers[value]:
            is_state = tables.state.get(p) == value
            if p < before and (t, p) in self.runs and not (is_state and t > self.stages.stage_of[p]):
                found.append((self.runs[t, p], -1.0))
        return found

    def _there(self, t: int, value: int) -> list[tuple[int, float]]:
        return [(self.kept[t, value], -1.0)] if (t, value) in self.kept else []

    def _inputs(self) -> None:
        """(1b): what a run reads is kept or was made before in its stage."""
        tables = self.tables
        for (t, op_id), run in self.runs.items():
            for v in tables.reads[op_id]:
                self.rows.add([(run, 1.0), *self._makers(t, v, op_id), *self._there(t, v)], -np.inf, 0.0)
            if t > self.stages.stage_of[op_id] and op_id in tables.state:
                self.rows.add([(run, 1.0), *self._there(t, tables.state[op_id])], -np.inf, 0.0)

    def _carried(self) -> None:
        """(1c): what is there when a stage begins was there before, or was made in the stage before."""
        graph = self.tables.graph
        for (t, v), kept in self.kept.items():
            if t > 0:
                made = self._makers(t - 1, v, self.tables.num_ops)
                self.rows.add([(kept, 1.0), *made, *self._there(t - 1, v)], -np.inf, 0.0)
            elif v not in graph.inputs:
                self.rows.add([(kept, 1.0)], 0.0, 0.0)

    def _memory(self, t: int) -> None:
        """Bytes at every run of stage t: U and FREE."""
        tables, rows, stages = self.tables, self.rows, self.stages
        here = sorted(p for s, p in self.runs if s == t)
        present = frozenset(here)
        bytes_of = [size / self.room for size in tables.sizes]
        resident = [(self.kept[s, v], bytes_of[v]) for s, v in self.kept if s == t]
        before = rows.variable(-np.inf, np.inf)
        rows.add([(before, -1.0), *resident], 0.0, 0.0)
        for op_id in here:
            run = self.runs[t, op_id]
            is_first = t == stages.stage_of[op_id]
            state = tables.state.get(op_id, -1)
            outs = [v for v in tables.writes[op_id] if v not in tables.static]
            makes = sum(bytes_of[v] for v in outs if v != state) + tables.scratch[op_id] / self.room
            fresh = [v for v in outs if v != state or is_first]
            moves = [(run, sum(bytes_of[v] for v in fresh))]
            touched = [*tables.reads[op_id], *fresh]
            if not is_first and state >= 0:
                touched.append(state)
            frees: dict[int, int] = {}
            for v in dict.fromkeys(touched):
                free = self._free(t, v, op_id, present)
                if free is not None and bytes_of[v]:
                    frees[v] = free
                    moves.append((free, -bytes_of[v]))
            taken = self._taken(t, op_id, frees, present)
            self.bytes_rows.append(len(rows.low))
            rows.add([(before, 1.0), (run, makes), *((q, -bytes_of[v]) for q, v in taken)], -np.inf, 1.0)
            after = rows.variable(-np.inf, np.inf)
            rows.add([(after, -1.0), (before, 1.0), *moves], 0.0, 0.0)
            before = after

    def _later(self, t: int, value: int, op_id: int, present: frozenset[int]) -> list[int]:
        """Columns of what still wants the value after op `op_id` ran in stage t."""
        found = [self.runs[t, j] for j in self.tables.consumers[value] if j > op_id and j in present]
        if (t + 1, value) in self.kept:
            found.append(self.kept[t + 1, value])
        return found

    def _free(self, t: int, value: int, op_id: int, present: frozenset[int]) -> int | None:
        """The column of "the value is forgotten right after this run"; None where it never is."""
        hazards = self._later(t, value, op_id, present)
        if self.one in hazards:
            return None
        free = self.rows.variable(0.0, 1.0)
        self.rows.add([(free, 1.0), (self.runs[t, op_id], -1.0)], -np.inf, 0.0)
        for hazard in dict.fromkeys(hazards):
            self.rows.add([(free, 1.0), (hazard, 1.0)], -np.inf, 1.0)
        return free

    def _taken(self, t: int, op_id: int, frees: dict[int, int], present: frozenset[int]) -> list[tuple[int, int]]:
        """(column, output) where the output is kept and takes the storage of an input that is forgotten here."""
        pairs = self.stages.pairs[op_id]
        if len(pairs) != 1 or pairs[0][1] not in frees or pairs[0][1] in self.tables.writes[op_id]:
            return []
        out, source = pairs[0]
        wants = self._later(t, out, op_id, present)
        if not wants or source not in self.tables.reads[op_id]:
            return []
        taken = self.rows.variable(0.0, 1.0)
        self.rows.add([(taken, 1.0), (frees[source], -1.0)], -np.inf, 0.0)
        self.rows.add([(taken, 1.0), *((want, -1.0) for want in wants)], -np.inf, 0.0)
        return [(taken, out)]

    def order(self, x: Floats) -> list[int]:
        """The order of the runs that are chosen, without those that nothing reads."""
        runs = sorted(key for key, column in self.runs.items() if x[column] > 0.5)
        return strip(self.tables, [op_id for _, op_id in runs])

    def optimise(
        self, margin: float, options: dict[str, float], search: Search, *, relaxed: bool = False
    ) -> OptimizeResult:
        """HiGHS's answer with this share of the room left free."""
        rows = self.rows
        high = np.array(rows.high)
        high[self.bytes_rows] = 1.0 - margin
        constraints = LinearConstraint(rows.matrix(), np.array(rows.low), high)
        whole = np.zeros(len(rows.price)) if relaxed else np.array(rows.is_whole)
        begin, left = time.monotonic(), search.seconds_left
        if np.isfinite(left):
            options = {**options, "time_limit": left}
        result = milp(
            np.array(rows.price),
            integrality=whole,
            bounds=Bounds(np.array(rows.lower), np.array(rows.upper)),
            constraints=constraints,
            options=options,
        )
        if result.status == 1 and time.monotonic() - begin >= left:
            search.is_cut_by_clock = True
        elif result.status == 1 and search.work is not None:
            search.is_out_of_work = True
        return result
