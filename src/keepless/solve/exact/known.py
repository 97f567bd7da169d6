"""What exact solvers answer where their search does not: the planner's order, and a claim that its peak bears out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from keepless.cost import CostModel
from keepless.errors import SolverError
from keepless.ir import Certificate, Graph, Status
from keepless.solve.moments import Relaxation
from keepless.solve.planner import Planner
from keepless.solve.search import Search, Standing
from keepless.solve.solution import Solution, solution
from keepless.solve.tables import Tables


def captured_order(graph: Graph) -> list[int]:
    """Every op once, as captured."""
    return list(range(len(graph.ops)))


def known(
    graph: Graph, cost: CostModel, limit_nbytes: int, seed: int, search: Search, *, any_order: bool = False
) -> Solution:
    """The planner's solution: the fastest that it finds within the limit, or the lowest; within the search's clock.

    Arguments:
        any_order: also one whose first runs are in another order than the captured one, as on graphs without a LOSS op.
    """
    from keepless.solve.anytime import plan  # which hunts in small graphs itself

    within = search.inner()
    planner = Planner(graph, cost, keeps_order=not any_order)
    found = plan(planner, limit_nbytes, seed, within)
    search.is_cut_by_clock |= within.is_cut_by_clock
    return found


def cut_seconds(tables: Tables, limit_nbytes: int) -> float:
    """Seconds of replays that every order needs, from the LOSS op's moment (`moments`); 0 where there is none."""
    if tables.loss >= tables.num_ops:
        return 0.0
    return Relaxation(tables).bound(limit_nbytes, [tables.loss]).seconds


def settle(
    graph: Graph, cost: CostModel, order: Sequence[int], claim: Certificate, limit_nbytes: int, search: Search
) -> Solution:
    """The solution of an order, with a status that its peak bears out; told to the search.

    Arguments:
        claim: FEASIBLE becomes NOT_FOUND where the order does not fit, and TIME_LIMITED where the clock ended the
            search before.

    Raises:
        SolverError: a proof and the order contradict each other.
    """
    found = solution(graph, cost, list(order), claim)
    fits = found.peak <= limit_nbytes
    if (claim.status is Status.OPTIMAL and not fits) or (claim.status is Status.PROVEN_INFEASIBLE and fits):
        raise SolverError(
            f"The solver {claim.solver!r} says {claim.status.value!r} for {limit_nbytes} bytes, and the order has a "
            f"peak of {found.peak} bytes: its model of the graph is wrong. Use another solver, and report the graph."
        )
    status = claim.status
    if status is Status.FEASIBLE and not fits:
        status = Status.NOT_FOUND
    if status is Status.FEASIBLE and search.is_cut_by_clock:
        status = Status.TIME_LIMITED
    seconds = found.seconds if fits else float("inf")
    bound = min(claim.bound_seconds, seconds)  # sums in another order differ in their last digit
    search.report(Standing(claim.solver, seconds, found.peak, bound, search.spent))
    return replace(found, certificate=replace(claim, status=status, bound_seconds=bound))
