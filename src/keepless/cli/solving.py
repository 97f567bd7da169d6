"""The command `solve`: the fastest program for a graph in a file, within a budget. Needs no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keepless.cli import completing
from keepless.cli.graph_answers import GraphArgument, GraphBudget, added_of, budget_of, limit_of, table_of
from keepless.cli.options import Debug, Json, Quiet
from keepless.cli.searching import ended_by_ctrl_c, searching
from keepless.cli.session import Session, UsageError, check_target, session
from keepless.cost import GraphFile, read_graph
from keepless.errors import InfeasibleBudget
from keepless.files import write_whole
from keepless.ir import Status, format_bytes
from keepless.ir.order_text import format_order
from keepless.ir.text import format_program
from keepless.machine import Baseline, Plan, make_plan
from keepless.passes import Evaluation, evaluate
from keepless.reporting.decisions import format_seconds

if TYPE_CHECKING:
    from keepless.solve import Search, Solution


def solve_command(
    graph: GraphArgument,
    budget: GraphBudget = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the program to this file.")] = None,
    order: Annotated[Path | None, typer.Option(help="Write the order, one op id per line, to this file.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write a plan file, with the claims about it, to this file.")
    ] = None,
    solver: Annotated[str, typer.Option(help="A solver's name.", autocompletion=completing.solvers)] = "keepless",
    seed: Annotated[int, typer.Option(help="Of the solver; the same one gives the same program.")] = 0,
    work_limit: Annotated[int | None, typer.Option(min=1, help="Units of the solver's work, at most.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds; the program then depends on the machine.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the fastest program for a graph within a budget. Ctrl-C ends the search with its best so far."""
    with session(as_json, debug, quiet) as current:
        from keepless import solve as solvers  # scipy with it: commands that solve nothing start sooner

        if time_limit is not None and not (math.isfinite(time_limit) and time_limit > 0):
            raise UsageError(f"--time-limit {time_limit} is not a number of seconds above 0.")
        solvers.named_solver(solver)
        for target in (output, order, save):
            check_target(target, graph)
        if budget is None:
            raise UsageError("A budget is needed: --budget 8GiB, or --budget 0.8 of the given order's peak.")
        file = read_graph(graph)
        given = evaluate(file.graph, file.cost, list(range(len(file.graph.ops))))
        limit = limit_of(budget, given.peak)
        search = solvers.Search(work=work_limit, seconds=time_limit)
        try:
            with searching(search), ended_by_ctrl_c(search):
                found = solvers.solve(file.graph, file.cost, budget_of(limit, file.cost), solver, seed, search)
        except InfeasibleBudget as error:
            if search.ending:
                error.args = (f"{error} The search was {search.ending}; a longer one may find less.",)
            raise
        if output is not None:
            write_whole(output, format_program(found.program).encode())
        if order is not None:
            write_whole(order, format_order(found.order, file.op_ids).encode())
        if save is not None:
            _plan(file, found, given, limit).save(save)
        _describe(current, found, given, limit, search)
        for name, path in (("program", output), ("order", order), ("plan", save)):
            current.answer[f"{name}_file"] = None if path is None else str(path)
            if path is not None:
                current.show(f"{name:<9}{path}")


def _plan(file: GraphFile, found: Solution, given: Evaluation, limit: int) -> Plan:
    return make_plan(
        file.graph,
        found.program,
        file.cost,
        budget_of(limit, file.cost),
        found.certificate,
        baseline=Baseline(given.peak, given.seconds),
        smallest_budget=found.smallest_nbytes,
        smallest_bound=found.smallest_bound,
    )


def _describe(current: Session, found: Solution, given: Evaluation, limit: int, search: Search) -> None:
    claim = found.certificate
    gap = found.seconds / claim.bound_seconds - 1 if claim.bound_seconds > 0 else None
    replays = found.program.num_replays
    current.answer = {
        "solver": claim.solver,
        "status": claim.status.value,
        "budget": limit,
        "given": {"peak": given.peak, "seconds": given.seconds},
        "plan": {"peak": found.peak, "seconds": found.seconds, "num_replays": replays},
        **added_of(found.seconds, given.seconds),
        "bound_seconds": claim.bound_seconds,
        "gap": gap,
        "space": claim.space,
        "witness": claim.witness,
        "smallest_peak": found.smallest_nbytes,
        "smallest_bound": found.smallest_bound,
        "solve_seconds": claim.solve_seconds,
        "seed": claim.seed,
        "work": search.spent,
        "interrupted": search.is_interrupted,
        "time_limited": search.is_cut_by_clock,
        "work_limited": search.is_out_of_work,
    }
    bound = "none proven"
    if gap is not None:
        among = f" (among programs with {claim.space})" if claim.space else ""
        bound = f"{format_seconds(claim.bound_seconds)}: the plan is at most {max(gap, 0.0):.2%} slower{among}"
    ended = f", {search.ending}" if search.ending and claim.status is not Status.OPTIMAL else ""
    current.tell(
        table_of(
            [
                ("given order", given.peak, given.seconds, 0),
                ("plan", found.peak, found.seconds, replays),
                ("budget", limit, None, None),
            ],
            given,
        ),
        f"bound    {bound}",
        f"status   {claim.status.value}{ended} (solver {claim.solver}, {claim.solve_seconds:.2f} s)",
        f"smallest peak found {format_bytes(found.smallest_nbytes)} ({found.smallest_nbytes} bytes); no program needs "
        f"less than {format_bytes(found.smallest_bound)} ({found.smallest_bound} bytes)",
    )
