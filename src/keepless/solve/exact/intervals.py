"""Retention intervals: at most C runs per op, each output resident over one interval per run; solved by CP-SAT.

Bartan, Li, Teague, Lott and Dilkina 2023, "Moccasin: Efficient Tensor Rematerialization for Neural Networks",
arXiv 2304.14463. A run of op j in stage t (before base op t) takes slot `t * n + j`, so that the runs of a stage keep
the captured order and no two share a slot (the paper's staged events). Per run: whether it happens, its stage, and
where each output's interval ends. Each read chooses one interval that covers it; one cumulative constraint keeps the
bytes of all intervals within the limit at every slot.

Beside the paper: several outputs per op, scratch and generator states as intervals of their own, and an input's
interval that ends one slot earlier where an output takes over its storage.

O(C n + C^2 edges) variables. The search starts from the planner's order and never answers a worse one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from keepless.cost import CostModel
from keepless.errors import SolverError
from keepless.ir import Certificate, Graph, Status
from keepless.passes import evaluate
from keepless.solve.exact.known import captured_order, known, settle
from keepless.solve.floor import floor_bound
from keepless.solve.search import Search
from keepless.solve.solution import Solution
from keepless.solve.tables import Tables
from keepless.solve.weave import strip


@dataclass(frozen=True)
class Intervals:
    """The CP-SAT model of retention intervals.

    Arguments:
        copies: runs of one op, the first included: the paper's C.
        most_ops: larger graphs are not searched.
        work: hundredths of CP-SAT's deterministic seconds, where the search says none.
    """

    copies: int = 2
    most_ops: int = 1200
    work: int = 50

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The fastest order within the limit that CP-SAT or the planner found.

        Raises:
            SolverError: OR-tools is not installed.
        """
        begin = time.perf_counter()
        search = search or Search()
        need_solver()
        least = float(sum(cost.seconds))
        bytes_bound, _ = floor_bound(graph, cost)
        order: Sequence[int] = captured_order(graph)
        status, witness, space = Status.FEASIBLE, "", f"at most {self.copies} runs per op"
        if evaluate(graph, cost, order).peak <= limit_nbytes:
            status, witness = Status.OPTIMAL, "every op runs once"
        else:
            planned = known(graph, cost, limit_nbytes, seed, search)
            order = planned.order
            if limit_nbytes < bytes_bound:
                status, witness = Status.PROVEN_INFEASIBLE, f"one op needs {bytes_bound} bytes"
            elif len(graph.ops) > self.most_ops:
                witness = f"not searched: {len(graph.ops)} ops, above {self.most_ops}"
            elif search.work is None or search.work > 0:
                found = self._search(graph, cost, limit_nbytes, planned, search)
                order, status, space, witness = found.order, found.status, found.space, found.witness
                least += found.more_seconds
            else:
                witness = "not searched: no work is allowed"
        claim = Certificate("intervals", status, space, least, bytes_bound, witness, time.perf_counter() - begin, seed)
        return settle(graph, cost, order, claim, limit_nbytes, search)

    def _search(self, graph: Graph, cost: CostModel, limit: int, planned: Solution, search: Search) -> _Found:
        """The better of CP-SAT's order and the planner's, and the better bound."""
        from keepless.solve.exact.cpsat import run_solver
        from keepless.solve.exact.retention import Retention

        tables = Tables(graph, cost)
        # The planner's bound holds in its own space, which contains this one.
        at_least = max(0.0, planned.certificate.bound_seconds - float(tables.seconds.sum()))
        model = Retention(tables, limit, max(self.copies, 1), at_least)
        model.hint(planned.order)
        work = self.work if search.work is None else search.work - search.spent
        answer = run_solver(model, work, planned.certificate.seed, search)
        found = _Found(planned.order, Status.FEASIBLE, model.space, at_least, answer.witness)
        best = evaluate(graph, cost, planned.order)
        if answer.order is not None:
            order = strip(tables, answer.order)
            mine = evaluate(graph, cost, order)
            is_slower = best.peak <= limit and best.seconds < mine.seconds * (1 - 1e-9)
            if mine.peak <= limit and not is_slower:
                found.order, best = order, mine
                if answer.is_optimal and model.stages.is_whole_truth:
                    found.status = Status.OPTIMAL
        # A planner's order outside the space may be faster than all inside: the space's bound is then not its bound.
        is_bound = float(tables.seconds.sum()) + answer.more_seconds <= best.seconds * (1 + 1e-9)
        if model.stages.is_whole_truth and is_bound:
            found.more_seconds = max(at_least, answer.more_seconds)
        return found


@dataclass
class _Found:
    """What a search found; the seconds beyond one run of every op are a bound in the space."""

    order: Sequence[int]
    status: Status
    space: str
    more_seconds: float
    witness: str


def need_solver() -> None:
    """Look for OR-tools.

    Raises:
        SolverError: it is not installed.
    """
    if find_spec("ortools") is None:
        raise SolverError(
            "The solver 'intervals' needs OR-tools, which is not installed. Install it with "
            '`pip install "keepless[solvers]"`, or use the solver "keepless".'
        )
