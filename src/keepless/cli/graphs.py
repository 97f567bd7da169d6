"""The commands for graphs in files: solve and check. Neither needs torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keepless.cli.searching import ended_by_ctrl_c, searching
from keepless.cli.session import Session, UsageError, check_target, read_budget, session
from keepless.cost import CostModel, GraphFile, read_graph
from keepless.errors import BudgetError, GraphError, InfeasibleBudget, PlanError, ProgramError
from keepless.files import write_whole
from keepless.ir import DEVICE, Budget, Graph, Program, Run, Status, Timeline, format_bytes, parse_bytes
from keepless.ir.budget import MAX_NBYTES
from keepless.ir.order_text import format_order, looks_like_program, parse_order
from keepless.ir.strict_json import read_bytes
from keepless.ir.text import format_program, parse_program
from keepless.machine import Baseline, Plan, load_plan, make_plan, simulate
from keepless.machine.planfile import check_work
from keepless.passes import Evaluation, evaluate, from_order, reuse_storage
from keepless.reporting.decisions import format_seconds
from keepless.reporting.tables import format_percent

if TYPE_CHECKING:
    from rich.table import Table

    from keepless.solve import Search, Solution

GraphArgument = Annotated[Path, typer.Argument(metavar="GRAPH", help="A graph in JSON (docs/graph-format.md).")]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", "-b", help='"8GiB" (2**30), "8GB" (10**9), bytes, or 0.8 of the given order\'s peak.'),
]
_CLOSE = 1 + 1e-6
"""What sums of seconds may differ by, for rounding."""
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command("solve")(solve_command)
    app.command("check")(check_command)


def solve_command(
    graph: GraphArgument,
    budget: BudgetOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the program to this file.")] = None,
    order: Annotated[Path | None, typer.Option(help="Write the order, one op id per line, to this file.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write a plan file, with the claims about it, to this file.")
    ] = None,
    solver: Annotated[str, typer.Option(help="A solver's name.")] = "keepless",
    seed: Annotated[int, typer.Option(help="Of the solver; the same one gives the same program.")] = 0,
    work_limit: Annotated[int | None, typer.Option(min=1, help="Units of the solver's work, at most.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds; the program then depends on the machine.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the fastest program for a graph within a budget. Ctrl-C ends the search with its best so far."""
    with session(as_json, debug) as current:
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
        limit = _limit(budget, given.peak)
        search = solvers.Search(work=work_limit, seconds=time_limit)
        try:
            with searching(search), ended_by_ctrl_c(search):
                found = solvers.solve(file.graph, file.cost, _budget(limit, file.cost), solver, seed, search)
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


def check_command(
    file: Annotated[Path, typer.Argument(metavar="GRAPH|PLAN", help="A graph in JSON, or a saved plan.")],
    program: Annotated[
        Path | None,
        typer.Argument(metavar="[PROGRAM|ORDER]", help="A program's text, or an order: one op id per line."),
    ] = None,
    budget: BudgetOption = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Verify a program, of any origin, against the rules of the machine, and say what it costs."""
    with session(as_json, debug) as current:
        if program is None:
            plan = _load(file)
            given = _given(plan.graph, plan.cost)
            limits = plan.budget if budget is None else _budget(_limit(budget, given.peak), plan.cost)
            if budget is not None:
                simulate(plan.graph, plan.program, plan.cost, budget=limits)
            _report(current, plan.graph, plan.program, plan.predicted, given, limits)
            _recheck(current, plan)
            return
        found = read_graph(file)
        given = _given(found.graph, found.cost)
        within = None if budget is None else _budget(_limit(budget, given.peak), found.cost)
        checked = _program(program, found)
        timeline = simulate(found.graph, checked, found.cost, budget=within)
        _report(current, found.graph, checked, timeline, given, within)


def _given(graph: Graph, cost: CostModel) -> Evaluation:
    """What the order of the graph costs."""
    return evaluate(graph, cost, list(range(len(graph.ops))))


def _limit(budget: str, given_peak: int) -> int:
    """Bytes that a budget on the command line means; a share is one of the given order's peak."""
    wanted = read_budget(budget)
    if isinstance(wanted, float):
        if not 0 < wanted <= 1:
            raise BudgetError(f"The budget {budget} is no share of the given order's peak: a share is in (0, 1].")
        return max(1, int(wanted * given_peak))
    return parse_bytes(wanted)


def _budget(limit: int, cost: CostModel) -> Budget:
    """The device's limit, and none on the other tiers that the graph's links reach."""
    tiers = {tier for lane in cost.links for tier in lane}
    return Budget({**dict.fromkeys(tiers, MAX_NBYTES), DEVICE: limit})


def _program(path: Path, file: GraphFile) -> Program:
    """The program in a file, or that of the order in it."""
    graph = file.graph
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except (UnicodeDecodeError, GraphError) as error:
        raise PlanError(f"The program file {str(path)!r} cannot be read. {error}") from error
    try:
        if looks_like_program(text, file.op_ids):
            program = parse_program(text)
        else:
            order = parse_order(text, graph, file.op_ids)
            check_work(graph, order)
            program = reuse_storage(graph, from_order(graph, order))
        check_work(graph, [instr.op for instr in program if isinstance(instr, Run)])
    except PlanError as error:
        raise PlanError(f"The program file {str(path)!r} cannot be used. {error}") from error
    return program


def _load(path: Path) -> Plan:
    """The plan in a file; where its program breaks a rule, the rule's error."""
    try:
        return load_plan(path)
    except PlanError as error:
        if isinstance(error.__cause__, ProgramError):
            raise error.__cause__ from None
        raise PlanError(
            f"{error}. To check a program, give a graph and the program: GRAPH.json PROGRAM.txt."
        ) from error


def _recheck(current: Session, plan: Plan) -> None:
    """Proves the plan's claims again from their witness.

    Raises:
        PlanError: more is claimed than the witness proves.
    """
    from keepless.solve import can_recheck, recheck

    claim = plan.certificate
    is_open = can_recheck(claim)
    current.answer["rechecked"] = is_open
    if not is_open:
        _check_by_its_own_program(plan)
        current.show(f"claims   of solver {claim.solver!r} have no witness that could be checked")
        return
    found = recheck(plan.graph, plan.cost, plan.budget.device, claim)
    current.answer |= {"proven_seconds": found.bound_seconds, "proven_bytes": found.bound_bytes}
    proven = f"no plan is faster than {found.bound_seconds:.6g} s, or needs less than {format_bytes(found.bound_bytes)}"
    if not found.holds:
        raise PlanError(
            f"The plan claims a bound of {claim.bound_seconds:.6g} s and {claim.bound_bytes} bytes; its witness proves "
            f"{found.bound_seconds:.6g} s and {found.bound_bytes} bytes."
        )
    _check_by_its_own_program(plan)
    if claim.status is Status.OPTIMAL and found.bound_seconds * _CLOSE < plan.predicted.seconds:
        raise PlanError(
            f"The plan claims to be optimal; its program takes {plan.predicted.seconds:.6g} s, and its witness proves "
            f"no more than that none is faster than {found.bound_seconds:.6g} s."
        )
    if 0 < plan.smallest_budget < found.bound_bytes:
        raise PlanError(
            f"The plan claims that {plan.smallest_budget} bytes are enough for some plan; every plan needs "
            f"{found.bound_bytes} bytes."
        )
    current.show(f"claims   hold: {proven} ({claim.space})")


def _check_by_its_own_program(plan: Plan) -> None:
    """Whether a plan's program is what its certificate says that there cannot be.

    Raises:
        PlanError: it is.
    """
    claim, seconds, peak = plan.certificate, plan.predicted.seconds, plan.predicted.peak
    if claim.bound_seconds > seconds * _CLOSE:
        raise PlanError(
            f"The plan claims that no plan is faster than {claim.bound_seconds:.6g} s, and its own program takes "
            f"{seconds:.6g} s."
        )
    least = max(claim.bound_bytes, plan.smallest_bound)
    if least > peak:
        raise PlanError(
            f"The plan claims that no plan needs less than {least} bytes, and its own program's peak is {peak} bytes."
        )
    if claim.status in (Status.PROVEN_INFEASIBLE, Status.NOT_FOUND):
        raise PlanError(
            f"The plan's status is {claim.status.value!r}, and its own program keeps the budget with {peak} bytes."
        )


def _plan(file: GraphFile, found: Solution, given: Evaluation, limit: int) -> Plan:
    return make_plan(
        file.graph,
        found.program,
        file.cost,
        _budget(limit, file.cost),
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
        **_added(found.seconds, given.seconds),
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
    current.show(
        _table(
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


def _report(
    current: Session, graph: Graph, program: Program, timeline: Timeline, given: Evaluation, budget: Budget | None
) -> None:
    """What a verified program costs; a budget as it was given, with its reserve."""
    limit, reserve = (None, 0) if budget is None else (budget.limits[DEVICE], budget.reserve)
    index = timeline.peak_index if timeline.events else -1
    instr = program[index] if index >= 0 else None
    op = graph.where(graph.ops[instr.op]) if isinstance(instr, Run) else ""
    if timeline.events and timeline.events[index].peak < timeline.peak:
        index, op = -1, ""  # what is there before the first instruction is the peak
    where = f"instruction {index}{', op ' + op if op else ''}" if index >= 0 else "the start"
    current.answer = {
        "verified": True,
        "budget": limit,
        "reserve": reserve,
        "peak": timeline.peak,
        "peak_instruction": index if index >= 0 else None,
        "peak_op": op or None,
        "seconds": timeline.seconds,
        "given": {"peak": given.peak, "seconds": given.seconds},
        **_added(timeline.seconds, given.seconds),
        "num_instructions": len(program),
        "num_replays": program.num_replays,
    }
    rows: list[tuple[str, int, float | None, int | None]] = [
        ("given order", given.peak, given.seconds, 0),
        ("program", timeline.peak, timeline.seconds, program.num_replays),
    ]
    rows += [] if limit is None else [("budget", limit, None, None)]
    rows += [("of it reserve", reserve, None, None)] if reserve else []
    fits = "" if limit is None else f", within the budget of {format_bytes(limit)} ({limit} bytes)"
    fits += f" less its reserve of {format_bytes(reserve)} ({reserve} bytes)" if reserve else ""
    current.show(
        _table(rows, given),
        f"peak     {timeline.peak} bytes at {where}",
        f"verified {len(program)} instructions keep rules R1 to {'R6' if limit is None else 'R7'}{fits}",
    )


def _added(seconds: float, given: float) -> dict[str, float]:
    return {"added_seconds": seconds - given, "overhead": seconds / given - 1 if given else 0.0}


def _table(rows: list[tuple[str, int, float | None, int | None]], given: Evaluation) -> Table:
    """Peak, seconds and replays of programs beside the given order."""
    from rich.table import Table

    table = Table(header_style="bold")
    table.add_column("")
    for name in ("peak", "of the given", "time", "added", "replays"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, peak, seconds, replays in rows:
        share = f"{100 * peak / given.peak:.1f} %" if given.peak else "-"
        added = "" if seconds is None else format_percent(_added(seconds, given.seconds)["overhead"])
        time = "" if seconds is None else format_seconds(seconds)
        table.add_row(name, format_bytes(peak), share, time, added, "" if replays is None else str(replays))
    return table
