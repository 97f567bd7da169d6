"""The command `check`: a program of any origin against the rules of the machine, and its claims. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keepless.cli import completing
from keepless.cli.graph_answers import GraphBudget, added_of, budget_of, given_of, limit_of, table_of
from keepless.cli.options import Debug, Json, Quiet
from keepless.cli.session import Session, session
from keepless.cost import GraphFile, read_graph
from keepless.errors import GraphError, PlanError, ProgramError
from keepless.ir import DEVICE, Budget, Graph, Program, Run, Status, Timeline, format_bytes
from keepless.ir.order_text import looks_like_program, parse_order
from keepless.ir.strict_json import read_bytes
from keepless.ir.text import parse_program
from keepless.machine import Plan, load_plan, simulate
from keepless.machine.planfile import check_work
from keepless.passes import Evaluation, from_order, reuse_storage

_CLOSE = 1 + 1e-6
"""What sums of seconds may differ by, for rounding."""


def check_command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="GRAPH|PLAN", help="A graph in JSON, or a saved plan.", autocompletion=completing.plan_files
        ),
    ],
    program: Annotated[
        Path | None,
        typer.Argument(metavar="[PROGRAM|ORDER]", help="A program's text, or an order: one op id per line."),
    ] = None,
    budget: GraphBudget = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Verify a program, of any origin, against the rules of the machine, and say what it costs."""
    with session(as_json, debug, quiet) as current:
        if program is None:
            plan = _load(file)
            given = given_of(plan.graph, plan.cost)
            limits = plan.budget if budget is None else budget_of(limit_of(budget, given.peak), plan.cost)
            if budget is not None:
                simulate(plan.graph, plan.program, plan.cost, budget=limits)
            _report(current, plan.graph, plan.program, plan.predicted, given, limits)
            _recheck(current, plan)
            return
        found = read_graph(file)
        given = given_of(found.graph, found.cost)
        within = None if budget is None else budget_of(limit_of(budget, given.peak), found.cost)
        checked = _program(program, found)
        timeline = simulate(found.graph, checked, found.cost, budget=within)
        _report(current, found.graph, checked, timeline, given, within)


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
        **added_of(timeline.seconds, given.seconds),
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
    current.tell(
        table_of(rows, given),
        f"peak     {timeline.peak} bytes at {where}",
        f"verified {len(program)} instructions keep rules R1 to {'R6' if limit is None else 'R7'}{fits}",
    )
