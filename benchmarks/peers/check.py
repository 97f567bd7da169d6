"""Has a ratio moved? A small fixed part of the benchmark beside its committed rows.

    python -m benchmarks.peers.check             # two models, three contenders: make bench-check
    python -m benchmarks.peers.check --commit    # these rows are the ones to compare with from now on

Rounds are timed until the noise of every ratio is small enough to tell `LOOSE`, or their end is reached.
Seconds differ between machines, ratios within a round less. A ratio has moved where its median is further from the
committed one than the noise of both explains: `ERRORS` standard errors of the two medians, and `DRIFT`, by which those
of quiet runs of one version differed. Peaks have no noise; they may differ by `PEAK_TOLERANCE`. The exit status is 1
where something is worse, or a plan of ours is not exact or rises above its budget; 2 where nothing is committed, or the
noise hides what is less than `LOOSE`.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.common import RESULTS, Row, Table, read_rows
from benchmarks.peers import contenders, models, nursery
from benchmarks.peers.ours import PLENTY, Planned, Planner
from benchmarks.peers.steps import Stand, compare
from benchmarks.peers.ways import Way

CHECKPOINT, KEPT, SAME = "checkpoint every block", "graph, all kept", "graph at checkpoint's peak"
PEAK_TOLERANCE, DRIFT, LOOSE, ERRORS = 0.005, 0.05, 0.1, 3.0
"""Two quiet runs of one version, minutes apart, differed by 6 and 9 % in two of eight ratios, of which their errors
explain 3 and 6: each run measures ops anew, and may plan otherwise."""
QUIET = (LOOSE - DRIFT) / ERRORS / math.sqrt(2)
"""The standard error of a ratio's median, as a share, with which two runs can tell `LOOSE` from noise."""
ROUNDS = 25, 200
"""So many at least, and more until every ratio is so quiet; at most so many."""
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
    """How far a ratio may be from the committed one."""
    if before.metric.startswith("peak"):
        return PEAK_TOLERANCE * before.value
    return ERRORS * math.hypot(error_of_median(before), error_of_median(now)) + DRIFT * before.p50


def error_of_median(row: Row) -> float:
    """Its standard error."""
    return _error(row.p20, row.p80, row.n)


def _error(p20: float, p80: float, n: int) -> float:
    """Of a median of normal samples: 1.2533 of the mean's, and p80 - p20 is 1.6832 deviations."""
    return 1.2533 * (p80 - p20) / 1.6832 / math.sqrt(n)


def is_quiet(samples: Sequence[float]) -> bool:
    """Whether a ratio's median is known well enough."""
    p20, p50, p80 = (float(q) for q in np.quantile(samples, (0.2, 0.5, 0.8)))
    return _error(p20, p80, len(samples)) <= QUIET * p50


def hidden(before: Sequence[Row], now: Sequence[Row]) -> list[str]:
    """Ratios whose noise is so large that little can be said of them."""
    found = {(row.model, row.contender, row.metric): row for row in now}
    pairs = [(row, found.get((row.model, row.contender, row.metric))) for row in before if row.unit == "ratio"]
    return [
        f"{row.model}, {row.contender}: {row.metric}"
        for row, other in pairs
        if other is not None and tolerance(row, other) > LOOSE * row.p50
    ]


def faults(rows: Sequence[Row]) -> list[str]:
    """What must not be, whatever is committed."""
    wrong = {"exact": "its bits are not plain eager's", "within_budget": "its peak is above its budget"}
    return [
        f"{row.model}, {row.contender}: {wrong[row.metric]}" for row in rows if row.metric in wrong and not row.value
    ]


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


def measure(name: str, size: str, table: Table, rounds: tuple[int, int], seed: int, folder: Path) -> None:
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
    reference = stand.result(ways[contenders.PLAIN])
    for number, (contender, plan) in enumerate({KEPT: kept, SAME: same}.items()):
        path = folder / f"{name}-{number}.plan"
        plan.save(path)
        peaks[contender] = peak(contender, str(path))
        ways[contender] = Planned(stand.subject, plan)
        table.add(name, contender, "exact", "count", compare(stand.result(ways[contender]), reference).is_equal)
        table.add(name, contender, "within_budget", "count", peaks[contender] <= plan.budget.limits["device"])
    stand.reset()
    samples: dict[str, list[float]] = {contender: [] for contender in ways}
    draw = random.Random(seed)
    for way in ways.values():
        stand.timed(way, 0)
    gc.collect()
    gc.disable()
    try:
        least, most = rounds
        for number in range(most):
            if number >= least and all(map(is_quiet, _ratios(samples).values())):
                break
            for contender in draw.sample(list(ways), len(ways)):
                samples[contender].append(stand.timed(ways[contender], number)[1])
            gc.collect()
    finally:
        gc.enable()
    for contender in ways:
        if contender != contenders.PLAIN:
            table.add(name, contender, "peak_over_plain", "ratio", peaks[contender] / peaks[contenders.PLAIN])
    for (contender, metric), values in _ratios(samples).items():
        table.add(name, contender, metric, "ratio", values)


def _ratios(samples: Mapping[str, Sequence[float]]) -> dict[tuple[str, str], list[float]]:
    """Contender and metric -> ratios within rounds."""
    plain = samples[contenders.PLAIN]
    found = {(c, "step_over_plain"): _over(its, plain) for c, its in samples.items() if c != contenders.PLAIN}
    return found | {(SAME, "step_over_checkpoint"): _over(samples[SAME], samples[CHECKPOINT])}


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
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds; default: until ratios are quiet enough")
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: as torch chooses")
    parser.add_argument("--seed", type=int, default=0, help="of weights, plans and the order of timed steps")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of {FILE}")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console() if Console().is_terminal else Console(width=140)
    rounds = (args.rounds, args.rounds) if args.rounds else ROUNDS
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
            measure(name, "small", table, rounds, args.seed, Path(folder))
    wrong = faults(table.rows)
    if args.commit and not wrong:
        table.write(path)
        console.print(f"rows: {path}")
        return
    changes, unclear = moved(before, table.rows), hidden(before, table.rows)
    show(console, changes, sum(row.unit == "ratio" for row in before))
    for text in unclear:
        console.print(f"too noisy to tell less than {LOOSE:.0%}: {text}", markup=False)
    for text in wrong:
        console.print(f"FAULT: {text}", markup=False)
    sys.exit(1 if wrong or any(change.is_worse for change in changes) else 2 if unclear else 0)


if __name__ == "__main__":
    main()
