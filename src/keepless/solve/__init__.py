"""Solvers: which ops run again, and when.

A solver's output is an order of op ids; drops, storage reuse, peak and seconds follow exactly from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from keepless.cost import CostModel, corrected
from keepless.errors import InfeasibleBudget, SolverError
from keepless.ir import Budget, Certificate, Graph, Program, Run, Status, Timeline, format_bytes
from keepless.machine import verify
from keepless.solve import flow
from keepless.solve.anytime import Keepless
from keepless.solve.anytime import plan as _plan
from keepless.solve.baselines import EveryK, KeepAll, RecomputeAll
from keepless.solve.classics import Dtr, Knapsack, MinCutByBytes, Revolve, Rotor, SqrtN
from keepless.solve.exact import Checkmate, Exhaustive, Intervals
from keepless.solve.floor import floor_bound as floor_bound
from keepless.solve.planner import SPACE, Planner
from keepless.solve.rechecking import Recheck as Recheck
from keepless.solve.rechecking import can_recheck as can_recheck
from keepless.solve.rechecking import recheck as recheck
from keepless.solve.search import Search as Search
from keepless.solve.search import Standing as Standing
from keepless.solve.solution import Solution as Solution
from keepless.solve.solution import Solver as Solver
from keepless.solve.solution import solution as _solution

SOLVERS: Mapping[str, Solver] = {
    "keep_all": KeepAll(),
    "recompute_all": RecomputeAll(),
    "every_k": EveryK(),
    "sqrt_n": SqrtN(),
    "revolve": Revolve(),
    "rotor": Rotor(),
    "dtr": Dtr(),
    "min_cut": MinCutByBytes(),
    "knapsack": Knapsack(),
    "keepless": Keepless(),
    "exhaustive": Exhaustive(),
    "checkmate": Checkmate(),
    "intervals": Intervals(),
}
"""Solvers by name. A new solver is one file and one line here."""


def named_solver(solver: str | Solver) -> Solver:
    """A solver by its name in `SOLVERS`; a solver is given back as it is.

    Raises:
        SolverError: there is no such solver, or the object cannot solve.
    """
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise SolverError(f"There is no solver {solver!r}. Solvers: {', '.join(sorted(SOLVERS))}.")
        return SOLVERS[solver]
    if not callable(getattr(solver, "solve", None)):
        raise SolverError(f"The solver is a {type(solver).__name__}, neither a name nor an object with a solve method.")
    return solver


def solve(
    graph: Graph,
    cost: CostModel,
    budget: Budget,
    solver: str | Solver = "keepless",
    seed: int = 0,
    search: Search | None = None,
) -> Solution:
    """A verified program within the budget.

    Arguments:
        budget: its device limit less the reserve bounds the peak.
        solver: a name in `SOLVERS`, or an object like those there.
        seed: of the solver.
        search: its limits; None for the solver's own.

    Raises:
        InfeasibleBudget: no order within the budget was found; says the smallest that was, and what is proven.
        SolverError: there is no such solver.
        ProgramError: the solver's program breaks a rule.
    """
    flow.load()
    chosen = named_solver(solver)
    limit = budget.device
    own = isinstance(chosen, Keepless)
    planner = Planner(graph, cost)
    found = _plan(planner, limit, seed, search) if own else chosen.solve(graph, cost, limit, seed, search)
    low = planner.smallest.peak if own else found.peak
    bound, where = floor_bound(graph, cost)
    # What is stated must be found again: the search for a lower limit may miss the peak that this one reached.
    found = found.stating(min(low, limit) if found.peak <= limit else low, bound)
    if found.peak > limit:
        raise _infeasible(graph, found, limit, where, found.certificate.solver)
    verify(graph, found.program, cost=cost, budget=budget)
    if search is not None:  # the last word is what is given, whichever search met it
        claim = found.certificate
        search.report(Standing(claim.solver, found.seconds, found.peak, claim.bound_seconds, search.spent))
    return found


def replan(
    graph: Graph,
    cost: CostModel,
    program: Program,
    measured: Timeline,
    budget: Budget,
    solver: str | Solver = "keepless",
    seed: int = 0,
    search: Search | None = None,
) -> tuple[CostModel, Solution]:
    """What a measured step teaches: the corrected cost model, and a verified program for it within the budget.

    Where the solver finds nothing faster, by the corrected costs, than the program that ran, that one stays.

    Arguments:
        cost: what the program was planned with.
        program: what ran.
        measured: its timeline; events may be missing (`keepless.cost.corrected`).
        budget, solver, seed, search: as in `solve`.

    Raises:
        InfeasibleBudget: no order within the budget was found, and the program that ran is none.
        SolverError, ProgramError: as `solve`.
    """
    better = corrected(graph, cost, program, measured)
    order = [instr.op for instr in program if isinstance(instr, Run)]
    ran = _solution(graph, better, order, Certificate("as it ran", Status.FEASIBLE))
    try:
        found = solve(graph, better, budget, solver, seed, search)
    except InfeasibleBudget as error:
        if ran.peak > budget.device:
            raise
        return better, ran.stating(ran.peak, error.bound)
    if ran.peak <= budget.device and ran.seconds < found.seconds:
        claim = replace(found.certificate, status=Status.FEASIBLE)
        found = replace(
            found, order=ran.order, seconds=ran.seconds, peak=ran.peak, program=ran.program, certificate=claim
        )
    return better, found


def smallest(graph: Graph, cost: CostModel) -> Solution:
    """The lowest peak that the planner finds."""
    low = Planner(graph, cost).smallest
    bound, where = floor_bound(graph, cost)
    status = Status.OPTIMAL if low.peak == bound else Status.FEASIBLE
    witness = f"bytes at {graph.where(graph.ops[where])}" if graph.ops else ""
    claim = Certificate("keepless", status, space=SPACE, bound_bytes=bound, witness=witness)
    found = _solution(graph, cost, low.order, claim)
    return found.stating(found.peak, bound)


def _infeasible(graph: Graph, found: Solution, limit: int, where: int, solver: str) -> InfeasibleBudget:
    blocking = graph.where(graph.ops[where]) if graph.ops else ""
    bound, low = found.smallest_bound, found.smallest_nbytes
    if not graph.ops:
        reason = f"the graph has no ops, and its inputs and pinned values are {format_bytes(bound)}"
    elif limit < bound:
        reason = f"op {blocking} needs {format_bytes(bound)} at once, whatever is recomputed"
    else:
        reason = f"every plan needs at least {format_bytes(bound)} at op {blocking}"
    return InfeasibleBudget(
        f"Budget {format_bytes(limit)} ({limit} bytes) is below the smallest peak that {solver!r} found, "
        f"{format_bytes(low)} ({low} bytes): {reason}. Raise the budget to {low} bytes, or use a smaller batch.",
        smallest_budget=low,
        bound=bound,
        blocking=blocking,
    )
