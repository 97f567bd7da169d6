"""How near the optimum are plans, and how soon? Captured steps at 12 budgets each, and plain DAGs beside the classics.

    python -m benchmarks.planner                      # everything: make bench-planner
    python -m benchmarks.planner --steps vit-l t5     # some captured steps, in place of their rows of an earlier run

Steps are captured and measured once (`benchmarks.graphs`). Budgets go from the smallest found to everything kept by
equal factors. Rows per budget: added time over everything kept, the certified gap, seconds to the first plan that fits
and to the last; the certificate is checked again from its witness. DAGs are random and layered, with realistic spreads
of bytes and seconds; budgets are 0.9 and 0.8 of the given order's peak. On the 4-layer GPT-2 a crude greedy over op
times (`benchmarks.crude`) stands beside the planner, at the same peak and at the same bytes for the backward.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks import crude, graphs
from benchmarks.common import RESULTS, Table
from keepless.cost import CostModel
from keepless.ir import Graph, Kind, Op, Phase, Value
from keepless.machine import simulate
from keepless.passes import evaluate
from keepless.solve import SOLVERS, Search, Standing, recheck
from keepless.solve.anytime import plan
from keepless.solve.planner import Planner
from keepless.solve.tables import Tables
from keepless.solve.weave import lazy_order

BUDGETS = 12
SIZES = (100, 250, 500, 1000)
SEEDS = 3
CRUDE = (0.1, 0.2, 0.47, 0.69, 0.84, 0.93)
"""Shares of the saved bytes that the crude greedy sheds."""
CLASSICS = ("every_k", "sqrt_n", "revolve", "rotor", "dtr", "knapsack")


def steps(table: Table, name: str, console: Console) -> None:
    """One captured step at all budgets."""
    graph, cost = graphs.load(name, console.print)
    kept = evaluate(graph, cost, range(len(graph.ops)))
    begin = time.perf_counter()
    planner = Planner(graph, cost)
    low = planner.smallest.peak
    table.add(name, "keepless", "ops", "count", len(graph.ops))
    table.add(name, "keepless", "smallest_over_kept", "ratio", low / kept.peak)
    table.add(name, "keepless", "smallest", "s", time.perf_counter() - begin)
    before = float("inf")
    for number in range(BUDGETS):
        limit = round(low * (kept.peak / low) ** (number / (BUDGETS - 1)))
        met: list[float] = []
        begin = time.perf_counter()

        def tell(standing: Standing, begin: float = begin, met: list[float] = met) -> None:
            if standing.seconds < float("inf"):
                met.append(time.perf_counter() - begin)

        found = plan(planner, limit, 0, Search(tell=tell))
        took = time.perf_counter() - begin
        claim = found.certificate
        contender = f"budget {number + 1} of {BUDGETS}"
        add = table.add
        add(name, contender, "budget_over_smallest", "ratio", limit / low)
        add(name, contender, "step_over_kept", "ratio", found.seconds / kept.seconds)
        add(name, contender, "bound_over_kept", "ratio", claim.bound_seconds / kept.seconds)
        add(name, contender, "gap", "ratio", found.seconds / claim.bound_seconds - 1)
        add(name, contender, "fits", "count", found.peak <= limit)
        add(name, contender, "certificate_holds", "count", recheck(graph, cost, limit, claim).holds)
        add(name, contender, "falls", "count", found.seconds <= before * (1 + 1e-9))
        add(name, contender, "first", "s", met[0] if met else took)
        add(name, contender, "solve", "s", took)
        before = found.seconds


def layered(num: int, seed: int) -> tuple[Graph, CostModel]:
    """A random layered DAG: ops read one to three values of the two layers before, some a much older one."""
    rng = random.Random(seed)
    width = max(3, int(num**0.5 / 1.5))
    ends = [0]
    while ends[-1] < num:
        ends.append(min(num, ends[-1] + rng.randint(1, width)))
    ops, values = [], []
    for number, (first, last) in enumerate(itertools.pairwise(ends)):
        near = range(ends[max(0, number - 2)], first)
        for op in range(first, last):
            inputs = set(rng.sample(near, min(len(near), rng.randint(1, 3))))
            if near and near[0] > 0 and rng.random() < 0.1:
                inputs.add(rng.randrange(near[0]))
            values.append(Value(op, f"v{op}", int(2 ** rng.uniform(10, 20)), Kind.ACTIVATION))
            ops.append(Op(op, "op", tuple(sorted(inputs)), (op,), Phase.FORWARD))
    cost = CostModel(tuple(1e-3 * 2 ** rng.uniform(-4, 4) for _ in ops), (0,) * num)
    return Graph(tuple(ops), tuple(values), frozenset(), frozenset(range(num - 3, num))), cost


def dags(table: Table, console: Console) -> None:
    """Plain DAGs at two budgets, every solver on the same ones."""
    for num in SIZES:
        for seed in range(SEEDS):
            graph, cost = layered(num, seed)
            given = evaluate(graph, cost, range(num))
            for share in (0.9, 0.8):
                name = f"dag {num} seed {seed} at {share}"
                console.print(name)
                for solver in ("keepless", *CLASSICS):
                    begin = time.perf_counter()
                    found = SOLVERS[solver].solve(graph, cost, int(share * given.peak))
                    table.add(name, solver, "solve", "s", time.perf_counter() - begin)
                    table.add(name, solver, "fits", "count", found.peak <= share * given.peak)
                    table.add(name, solver, "added", "ratio", found.seconds / given.seconds - 1)


def greedy(table: Table, name: str, console: Console) -> None:
    """The crude greedy's points on a captured step, and what the planner makes of the same peak and the same bytes."""
    console.print(f"{name}: crude greedy")
    graph, cost = graphs.load(name, console.print)
    tables = Tables(graph, cost)
    base, kept = sum(cost.seconds), tables.lives(tables.base).peak
    points, cuts = crude.crude_points(tables), crude.cut_points(tables)
    for share in CRUDE:
        point = crude.fastest(points, share)
        if point is None:
            console.print(f"the greedy sheds at most {max(p.shed for p in points):.1%}")
            return
        peak = tables.lives(lazy_order(tables, point.replays)).peak
        mine = SOLVERS["keepless"].solve(graph, cost, peak)
        by_bytes = crude.fastest(cuts, point.shed)
        assert by_bytes is not None
        subject, contender = f"{name} crude", f"shed {share:.0%}"
        table.add(subject, contender, "shed", "ratio", point.shed)
        table.add(subject, contender, "peak_over_kept", "ratio", peak / kept)
        table.add(subject, contender, "added_by_greedy", "ratio", point.added_seconds / base)
        table.add(subject, contender, "added_at_the_same_peak", "ratio", mine.seconds / base - 1)
        table.add(subject, contender, "added_at_the_same_bytes", "ratio", by_bytes.added_seconds / base)


def show_greedy(console: Console, table: Table, name: str) -> None:
    """The greedy beside the planner."""
    columns = ("shed", "peak_over_kept", "added_by_greedy", "added_at_the_same_peak", "added_at_the_same_bytes")
    shown = RichTable(*columns, title=f"{name}: crude greedy and planner")
    for contender in dict.fromkeys(row.contender for row in table.rows if row.model == f"{name} crude"):
        shown.add_row(*(f"{table.find(f'{name} crude', contender, column) or 0:.2%}" for column in columns))
    console.print(shown)


def simulation(table: Table) -> None:
    """Seconds to simulate a program of 10,000 runs."""
    graph, cost = layered(10_000, 0)
    found = SOLVERS["keep_all"].solve(graph, cost, 1 << 60)
    samples = []
    for _ in range(7):
        begin = time.perf_counter()
        simulate(graph, found.program, cost)
        samples.append(time.perf_counter() - begin)
    table.add("10,000 ops", "machine", "simulate", "s", samples)
    samples = []
    for _ in range(7):
        begin = time.perf_counter()
        evaluate(graph, cost, found.order)
        samples.append(time.perf_counter() - begin)
    table.add("10,000 ops", "machine", "evaluate", "s", samples)


def show(console: Console, table: Table, names: list[str]) -> None:
    """What matters per step, and how the solvers fare on the DAGs where they were measured."""
    shown = RichTable(
        "step", "ops", "smallest", "median gap", "worst gap >= 1.1x", "first s", "last s", "holds", "falls"
    )
    for name in names:
        rows = [row for row in table.rows if row.model == name]

        def column(metric: str, rows: list = rows) -> list[float]:  # type: ignore[type-arg]
            return [row.value for row in rows if row.metric == metric]

        gaps = [g for g, x in zip(column("gap"), column("budget_over_smallest"), strict=True) if x >= 1.1]
        shown.add_row(
            name,
            f"{column('ops')[0]:.0f}",
            f"{column('smallest_over_kept')[0]:.3f}",
            f"{sorted(gaps)[len(gaps) // 2]:.2%}" if gaps else "",
            f"{max(gaps):.2%}" if gaps else "",
            f"{max(column('first')):.1f}",
            f"{max(column('solve')):.1f}",
            "yes" if all(column("certificate_holds")) else "NO",
            "yes" if all(column("falls")) else "no",
        )
    console.print(shown)
    if any(row.model.startswith("dag ") for row in table.rows):
        show_dags(console, table)


def show_dags(console: Console, table: Table) -> None:
    """How the solvers fare on the DAGs."""
    shown = RichTable("DAGs", "solver", "fits", "added where it fits", "slowest s")
    for num in SIZES:
        for solver in ("keepless", *CLASSICS):
            rows = [r for r in table.rows if r.model.startswith(f"dag {num} ") and r.contender == solver]
            fits = {r.model for r in rows if r.metric == "fits" and r.value}
            added = [r.value for r in rows if r.metric == "added" and r.model in fits]
            seconds = max((r.value for r in rows if r.metric == "solve"), default=0.0)
            mean = f"{sum(added) / len(added):.2%}" if added else ""
            shown.add_row(str(num), solver, f"{len(fits)} of {SEEDS * 2}", mean, f"{seconds:.1f}")
    console.print(shown)


def main() -> None:
    """Runs the benchmark and writes its rows."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.planner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="*", default=list(graphs.STEPS), help="captured steps; default: all")
    parser.add_argument("--no-dags", action="store_true", help="captured steps only")
    args = parser.parse_args()
    console = Console() if Console().is_terminal else Console(width=120)
    table = Table("cpu", 0)
    for name in args.steps:
        console.print(name)
        steps(table, name, console)
        table.write(RESULTS / "planner.csv")
    if not args.no_dags:
        dags(table, console)
    greedy(table, "gpt2-4", console)
    simulation(table)
    table.write(RESULTS / "planner.csv")
    show(console, table, list(args.steps))
    show_greedy(console, table, "gpt2-4")


if __name__ == "__main__":
    main()
