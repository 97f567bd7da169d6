"""What `solve` and `check` have in common: budgets of graphs, and programs beside the given order."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keepless.cli import completing
from keepless.cli.session import read_budget
from keepless.cost import CostModel
from keepless.errors import BudgetError
from keepless.ir import DEVICE, Budget, Graph, format_bytes, parse_bytes
from keepless.ir.budget import MAX_NBYTES
from keepless.passes import Evaluation, evaluate
from keepless.reporting.decisions import format_seconds
from keepless.reporting.tables import format_percent

if TYPE_CHECKING:
    from rich.table import Table

GraphArgument = Annotated[
    Path,
    typer.Argument(
        metavar="GRAPH", help="A graph in JSON (docs/graph-format.md).", autocompletion=completing.plan_files
    ),
]
GraphBudget = Annotated[
    str | None,
    typer.Option("--budget", "-b", help='"8GiB" (2**30), "8GB" (10**9), bytes, or 0.8 of the given order\'s peak.'),
]


def given_of(graph: Graph, cost: CostModel) -> Evaluation:
    """What the order of the graph costs."""
    return evaluate(graph, cost, list(range(len(graph.ops))))


def limit_of(budget: str, given_peak: int) -> int:
    """Bytes that a budget on the command line means; a share is one of the given order's peak."""
    wanted = read_budget(budget)
    if isinstance(wanted, float):
        if not 0 < wanted <= 1:
            raise BudgetError(f"The budget {budget} is no share of the given order's peak: a share is in (0, 1].")
        return max(1, int(wanted * given_peak))
    return parse_bytes(wanted)


def budget_of(limit: int, cost: CostModel) -> Budget:
    """The device's limit, and none on the other tiers that the graph's links reach."""
    tiers = {tier for lane in cost.links for tier in lane}
    return Budget({**dict.fromkeys(tiers, MAX_NBYTES), DEVICE: limit})


def added_of(seconds: float, given: float) -> dict[str, float]:
    """Seconds over the given order's, and as a share of these."""
    return {"added_seconds": seconds - given, "overhead": seconds / given - 1 if given else 0.0}


def table_of(rows: list[tuple[str, int, float | None, int | None]], given: Evaluation) -> Table:
    """Peak, seconds and replays of programs beside the given order."""
    from rich.table import Table

    table = Table(header_style="bold")
    table.add_column("")
    for name in ("peak", "of the given", "time", "added", "replays"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, peak, seconds, replays in rows:
        share = f"{100 * peak / given.peak:.1f} %" if given.peak else "-"
        added = "" if seconds is None else format_percent(added_of(seconds, given.seconds)["overhead"])
        time = "" if seconds is None else format_seconds(seconds)
        table.add_row(name, format_bytes(peak), share, time, added, "" if replays is None else str(replays))
    return table
