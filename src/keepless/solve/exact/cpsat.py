"""CP-SAT on a retention model: one worker, work in its deterministic seconds. Imports OR-tools: import it late."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import ceil

from ortools.sat.python import cp_model

from keepless.passes import evaluate
from keepless.solve.exact.retention import Retention
from keepless.solve.search import Search, Standing
from keepless.solve.weave import strip


@dataclass(frozen=True)
class Answer:
    """What CP-SAT found: an order, seconds beyond one run of every op that are proven, and how it ended."""

    order: list[int] | None
    more_seconds: float
    is_optimal: bool
    witness: str


class _Telling(cp_model.CpSolverSolutionCallback):
    """Tells a search of each better order, and ends where the search was interrupted."""

    def __init__(self, model: Retention, search: Search) -> None:
        super().__init__()
        self._model, self._search = model, search
        self._base = float(model.tables.seconds.sum())

    def on_solution_callback(self) -> None:
        """Called by CP-SAT."""
        tables = self._model.tables
        found = evaluate(tables.graph, tables.cost, strip(tables, self._model.order(self)))
        bound = self._base + max(0.0, self.best_objective_bound) * self._model.cost_unit
        self._search.report(Standing("intervals", found.seconds, found.peak, bound, self._search.spent))
        if self._search.is_interrupted:
            self.stop_search()


def run_solver(model: Retention, work: int, seed: int, search: Search) -> Answer:
    """CP-SAT on the model, one worker, for so many hundredths of its deterministic seconds."""
    solver = cp_model.CpSolver()
    parameters = solver.parameters
    parameters.num_workers = 1
    parameters.random_seed = seed % 2**31
    parameters.max_deterministic_time = work / 100
    left = search.seconds_left
    if left != float("inf"):
        parameters.max_time_in_seconds = left
    begin = time.monotonic()
    status = solver.solve(model.model, _Telling(model, search))
    search.spent += ceil(100 * solver.response_proto.deterministic_time)
    has_order = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    is_over = status in (cp_model.OPTIMAL, cp_model.INFEASIBLE)
    if not is_over and time.monotonic() - begin >= left:
        search.is_cut_by_clock = True
    elif not is_over and search.work is not None:
        search.is_out_of_work = True
    bound = solver.best_objective_bound if has_order else 0.0
    return Answer(
        order=model.order(solver) if has_order else None,
        more_seconds=max(0.0, bound) * model.cost_unit,
        is_optimal=status == cp_model.OPTIMAL,
        witness=f"CP-SAT: {solver.status_name(status).lower()} after {solver.num_branches} branches",
    )
