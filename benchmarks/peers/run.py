"""Keepless beside every peer, on the same work, in one run.

    python -m benchmarks.peers                       # all models, in an hour: make bench
    python -m benchmarks.peers --quick               # tiny models: does it all work? rows go to out/
    python -m benchmarks.peers --models gpt2 t5      # some models, in place of their rows of an earlier run
    python -m benchmarks.peers --resume              # models that have no rows yet
    python -m benchmarks.peers --minutes 90          # more time per model: what was left out is measured, too

Per model: the peak of whole AdamW steps of every contender, each in a process of its own, counted from before the model
exists; then bits of a seeded step beside plain eager's; then seconds, all contenders a step each per round, in an order
drawn per round, on one model and with one optimizer, ratios taken within the round; then ours with everything kept in
rounds of their own, each between two steps of plain. Ours is planned between its
smallest budget and everything kept, and at every peak that a peer reaches. A contender that is missing, refuses, fails
or is left out has a row that says why.

Rows: benchmarks/results/peers.csv. `python -m benchmarks.peers.pages` writes them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.common import RESULTS, Row, Table, read_rows
from benchmarks.peers import answers, nursery, race
from benchmarks.peers.models import FAMILIES

MINUTES, QUICK_MINUTES = 56.0, 6.5
LEAST = 0.5
"""A model has so much of an equal share at least, however long the others took."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="default: all")
    parser.add_argument("--quick", action="store_true", help="tiny models, few points; rows go to out/")
    parser.add_argument("--resume", action="store_true", help="leave out models that have their rows already")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help=f"for all models; default: {MINUTES:g}, quick: {QUICK_MINUTES:g}"
    )
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: as torch chooses")
    parser.add_argument("--seed", type=int, default=0, help="of weights, plans and the order of timed steps")
    parser.add_argument("--out", type=Path, help="folder of peers.csv; default: benchmarks/results")
    return parser.parse_args()


def share_of(left: float, models: int, equal: float) -> float:
    """Seconds of the next model, of those that are left for so many.

    What a model takes beyond its share, as what it began is ended, the others have less; each has some of an equal one.
    """
    return max(left / models, LEAST * equal)


def measure_models(
    names: list[str], sizes: race.Sizes, minutes: float, path: Path, seed: int, console: Console
) -> Table:
    """The rows of some models; they are on disk as soon as a model is done."""
    table = Table("cpu", seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="keepless-peers-") as folder,
        Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar,
    ):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # as many compile beside each other as peaks are measured
        os.environ["KEEPLESS_CACHE_DIR"] = str(Path(folder) / "costs")
        nursery.prepare()
        task = bar.add_task("starting", total=len(names))
        end = time.perf_counter() + 60.0 * minutes
        for number, name in enumerate(names):
            share = share_of(end - time.perf_counter(), len(names) - number, 60.0 * minutes / len(names))

            def tell(text: str, name: str = name) -> None:
                bar.update(task, description=f"{name}: {text}")

            try:
                race.Race(name, table, replace(sizes, seconds=share), seed, tell).run()
            except race.NoReference as error:  # the other models go on
                console.print(f"{error}", markup=False)
            table.write(path)
            race.forget_compiled()
            bar.advance(task)
    return table


def conclude(console: Console, text: str, rows: Sequence[Row], path: Path) -> None:
    """Prints what rows say; the exit status is 1 where a plan of ours was not exact or rose above its budget."""
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"rows: {path}")
    faults = answers.faults(rows)
    for fault in faults:
        console.print(f"FAULT: {fault}", markup=False)
    sys.exit(1 if faults else 0)


def main() -> None:
    """Runs the benchmark; the exit status is 1 where a plan of ours was not exact or rose above its budget."""
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    out: Path = args.out or (Path("out") if args.quick else RESULTS)
    path = out / "peers.csv"
    done = read_rows(path) if args.resume else []
    names = [name for name in args.models if not race.has_finished(done, name)]
    sizes = race.QUICK if args.quick else race.FULL
    minutes = args.minutes or (QUICK_MINUTES if args.quick else MINUTES * len(args.models) / len(FAMILIES))
    console = Console() if Console().is_terminal else Console(width=160)
    if names:
        measure_models(names, sizes, minutes, path, args.seed, console)
    rows = [row for row in read_rows(path) if row.model in args.models]
    conclude(console, answers.summary(rows), rows, path)


if __name__ == "__main__":
    main()
