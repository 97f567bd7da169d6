"""Has a ratio moved? A small fixed part of the benchmark beside its committed rows.

    python -m benchmarks.peers.check             # two models, three contenders: make bench-check
    python -m benchmarks.peers.check --commit    # these rows are the ones to compare with from now on

Seconds differ between machines, ratios within a round hardly. A ratio has moved where its median is further from the
committed one than the noise of both: the sum of their spreads, p80 - p20. Peaks have no noise; they may differ by
`PEAK_TOLERANCE`. The exit status is 1 where something is worse, 2 where nothing is committed.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.common import RESULTS, Row, Table, read_rows
from benchmarks.peers import contenders, models, nursery
from benchmarks.peers.ours import PLENTY, Planned, Planner
from benchmarks.peers.steps import Stand
from benchmarks.peers.ways import Way

ROUNDS = 25
CHECKPOINT, KEPT, SAME = "checkpoint every block", "graph, all kept", "graph at checkpoint's peak"
PEAK_TOLERANCE = 0.005
FILE = "check.csv"


@dataclass(frozen=True)
class Moved:
    """A ratio that is not what it was.

    Arguments:
        tolerance: what noise explains.
        is_worse: higher; all ratios are of seconds or bytes.
    """

    model: str
    contender: str
    metric: str
    before: float
    now: float
    tolerance: float

    @property
    def is_worse(self) -> bool:
        """Whether it is higher."""
        return self.now > self.before


def tolerance(before: Row, now: Row) -> float:
    """The noise of both."""
    if before.metric.startswith("peak"):
        return PEAK_TOLERANCE * before.value
    return (before.p80 - before.p20) + (now.p80 - now.p20)


def moved(before: Sequence[Row], now: Sequence[Row]) -> list[Moved]:
    """Ratios that differ by more than their noise; a ratio that is gone counts as infinite."""
    found = {(row.model, row.contender, row.metric): row for row in now}
    changes = []
    for row in before:
        if row.unit != "ratio":
            continue
        other = found.get((row.model, row.contender, row.metric))
        if other is None:
            changes.append(Moved(row.model, row.contender, row.metric, row.p50, float("inf"), 0.0))
        elif abs(other.p50 - row.p50) > tolerance(row, other):
            names = (row.model, row.contender, row.metric)
            changes.append(Moved(*names, row.p50, other.p50, tolerance(row, other)))
    return changes


def measure(name: str, size: str, table: Table, rounds: int, seed: int, folder: Path) -> None:
    """One model's rows: peaks and steps over plain's, and ours over checkpoint's at the same peak."""
    stand = Stand(models.build(name, size, seed))
    planner = Planner(stand.subject, stand.optimizer, seed)

    def peak(contender: str, path: str = "") -> int:
        arguments = {"model": name, "size": size, "contender": contender, "plan_path": path, "seed": seed}
        return max(nursery.measure("benchmarks.peers.steps:target", arguments, steps=2, timeout=300.0).peaks)

    peaks = {contender: peak(contender) for contender in (contenders.PLAIN, CHECKPOINT)}
    _, kept = planner.plan("graph", PLENTY)
    _, same = planner.smallest("graph", max(peaks[CHECKPOINT], kept.smallest_budget))
    ways: dict[str, Way] = {c: contenders.find(c).make(stand.subject) for c in (contenders.PLAIN, CHECKPOINT)}
    for number, (contender, plan) in enumerate({KEPT: kept, SAME: same}.items()):
        path = folder / f"{name}-{number}.plan"
        plan.save(path)
        peaks[contender] = peak(contender, str(path))
        ways[contender] = Planned(stand.subject, plan)
    samples: dict[str, list[float]] = {contender: [] for contender in ways}
    draw = random.Random(seed)
    for way in ways.values():
        stand.timed(way, 0)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for contender in draw.sample(list(ways), len(ways)):
                samples[contender].append(stand.timed(ways[contender], number)[1])
            gc.collect()
    finally:
        gc.enable()
    for contender in ways:
        if contender == contenders.PLAIN:
            continue
        table.add(name, contender, "peak_over_plain", "ratio", peaks[contender] / peaks[contenders.PLAIN])
        table.add(name, contender, "step_over_plain", "ratio", _over(samples[contender], samples[contenders.PLAIN]))
    table.add(name, SAME, "step_over_checkpoint", "ratio", _over(samples[SAME], samples[CHECKPOINT]))


def _over(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def show(console: Console, changes: Sequence[Moved], count: int) -> None:
    """What moved."""
    if not changes:
        console.print(f"{count} ratios are where they were, within their noise.")
        return
    shown = RichTable("model", "contender", "ratio", "committed", "now", "tolerance", "", title="Moved")
    for change in changes:
        numbers = (f"{value:.3f}" for value in (change.before, change.now, change.tolerance))
        shown.add_row(change.model, change.contender, change.metric, *numbers, "WORSE" if change.is_worse else "better")
    console.print(shown)


def main() -> None:
    """Compares, or commits."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", action="store_true", help="write the rows that later ones are compared with")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds")
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: as torch chooses")
    parser.add_argument("--seed", type=int, default=0, help="of weights, plans and the order of timed steps")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of {FILE}")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console() if Console().is_terminal else Console(width=140)
    path: Path = args.out / FILE
    before = read_rows(path)
    if not before and not args.commit:
        console.print(f"There is no {path} to compare with: --commit writes it.")
        sys.exit(2)
    nursery.prepare()
    table = Table("cpu", args.seed)
    with tempfile.TemporaryDirectory(prefix="keepless-check-") as folder:
        for name in models.SMALL:
            console.print(name)
            measure(name, "small", table, args.rounds, args.seed, Path(folder))
    if args.commit:
        table.write(path)
        console.print(f"rows: {path}")
        return
    changes = moved(before, table.rows)
    show(console, changes, len(before))
    sys.exit(1 if any(change.is_worse for change in changes) else 0)


if __name__ == "__main__":
    main()
