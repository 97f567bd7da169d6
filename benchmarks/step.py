"""How high does a training step rise and how long does it take, beside plain eager and torch's checkpointing?

    python -m benchmarks.step                      # everything, 15 minutes on 2 quiet cores: make bench-more
    python -m benchmarks.step --quick              # small models, few rounds: does it work? under 3 minutes
    python -m benchmarks.step --models demo tiny   # some models only, in place of their rows of an earlier run;
                                                   # --no-planning leaves benchmarks/planning.py out

Peaks come from fresh processes (the deciding meter), one per contender, the first step included, counted from before
the model exists. Times come from one process: all contenders take a step each per round, in an order drawn per round,
and ratios to plain are taken within the round. Every contender starts from the same weights; "equal" is 1 where its
losses and parameters after the metered steps are those of plain, bit for bit.

Contenders: plain; checkpoint (torch.utils.checkpoint, non-reentrant, on every block); keep_all (the engine,
everything kept); keepless at the peak that checkpoint reaches, at 0.54 of plain's peak, and at its smallest budget.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

import keepless
from benchmarks import planning
from benchmarks.common import RESULTS, Table
from keepless import InfeasibleBudget, Plan
from keepless.measure import PeakMeasurement, interposer, measure_peak

import zoo  # isort: skip  (found through benchmarks.common)

MODELS = {
    "demo": ("gpt2", "large"),
    "tiny": ("gpt2", "tiny"),
    "bert": ("bert", "large"),
    "vit": ("vit", "large"),
    "llama": ("llama", "large"),
    "resnet50": ("resnet50", "large"),
    "unet3d": ("unet3d", "large"),
}
"""What --models takes: a builder and a size of the zoo. "demo" is the model of `make demo`, GPT-2 of the zoo."""

SHARE = 0.54
"""Of plain's peak: a budget at which keepless should cost next to nothing."""
METERED_STEPS = 2
"""The first, and one in which the optimizer's state is there from the start."""
ROUND_SECONDS = {"demo": 60.0, "tiny": 15.0}
"""Timed rounds of a model go on for this long; 25 seconds for the others."""

Tell = Callable[[str], None]


class Bench:
    """One model's contenders."""

    def __init__(self, key: str, table: Table, args: argparse.Namespace, folder: Path, tell: Tell) -> None:
        self.key = key
        self.name, self.size = MODELS[key]
        if args.quick and self.size == "large":
            self.size = "small"
        self.table, self.args, self.folder, self.tell = table, args, folder, tell
        self.plans: dict[str, Plan] = {}
        self.peaks: dict[str, PeakMeasurement] = {}

    def run(self) -> None:
        """Peaks, plans, times."""
        for contender in ("plain", "checkpoint"):
            self.measure(contender)
        self.make_plans()
        for contender in self.plans:
            self.measure(contender)
        self.race()

    def measure(self, contender: str) -> None:
        """A contender's peak in a fresh process."""
        plan = self.plans.get(contender)
        path = self.folder / f"{self.key}-{contender.replace(' ', '-')}.plan"
        if plan is not None:
            plan.save(path)
        arguments: dict[str, Any] = {"name": self.name, "size": self.size, "device": self.args.device}
        arguments |= {"contender": contender} if plan is None else {"contender": "keepless", "plan_path": str(path)}
        self.tell(f"{self.key}: peak of {contender}")
        found = measure_peak("zoo:target", arguments, device=self.args.device, steps=METERED_STEPS)
        self.peaks[contender] = found
        add, plain = self.table.add, self.peaks["plain"]
        add(self.key, contender, "peak", "bytes", found.peak)
        add(self.key, contender, "peak_over_plain", "ratio", found.peak / plain.peak)
        for metric in ("losses", "state"):
            add(self.key, contender, f"equal_{metric}", "count", found.result[metric] == plain.result[metric])
        if plan is None:
            return
        add(self.key, contender, "budget", "bytes", plan.budget.limits["device"])
        add(self.key, contender, "predicted_peak", "bytes", plan.predicted_peak)
        add(self.key, contender, "peak_prediction_error", "ratio", plan.predicted_peak / found.peak - 1)
        add(self.key, contender, "static", "bytes", found.result["static_nbytes"])
        add(self.key, contender, "replays", "count", plan.num_replays)
        if self.key == "demo" and self.args.device == "cpu" and interposer.available() is None:
            self.tell(f"{self.key}: peak of {contender}, second meter")
            second = measure_peak("zoo:target", arguments, method="interposer", steps=METERED_STEPS)
            rise = second.peaks[-1] - second.starts[-1]
            add(self.key, contender, "peak_by_interposer", "bytes", found.starts[-1] + rise)

    def make_plans(self) -> None:
        """Plans for the budgets that plain and checkpoint set."""
        self.tell(f"{self.key}: planning")
        workload = zoo.build(self.name, self.size).to(self.args.device)
        optimizer = torch.optim.AdamW(workload.model.parameters())
        options: dict[str, Any] = {"optimizer": optimizer, "release_outputs": True, "seed": self.args.seed}
        kept = workload.plan(zoo.PLENTY, **options)
        self.plans["keep_all"] = kept
        table = self.table
        table.add(self.key, "keepless", "smallest_budget", "bytes", kept.smallest_budget)
        table.add(self.key, "keepless", "smallest_bound", "bytes", kept.smallest_bound)
        if self.key == "tiny":
            return
        plain, checkpoint = self.peaks["plain"].peak, self.peaks["checkpoint"].peak
        budgets = {
            "keepless at checkpoint's peak": checkpoint,
            f"keepless at {SHARE} of plain": int(SHARE * plain),
            "keepless at smallest": kept.smallest_budget,
        }
        for contender, budget in budgets.items():
            self.tell(f"{self.key}: planning {contender}")
            with contextlib.suppress(InfeasibleBudget):  # the row is missing; smallest_budget says why
                self.plans[contender] = workload.plan(budget, **options)

    def race(self) -> None:
        """Times of whole steps, interleaved."""
        self.tell(f"{self.key}: warming up")
        trainers = {contender: self.trainer(contender) for contender in ("plain", "checkpoint", *self.plans)}
        samples: dict[str, list[float]] = {contender: [] for contender in trainers}
        for trainer in trainers.values():
            self.timed(trainer, 0)
        gc.collect()
        gc.freeze()
        gc.disable()
        rng = random.Random(self.args.seed)
        limit = 3.0 if self.args.quick else ROUND_SECONDS.get(self.key, 25.0)
        start, number = time.perf_counter(), 0
        while number < 3 or time.perf_counter() - start < limit:
            number += 1
            self.tell(f"{self.key}: round {number}")
            for contender in rng.sample(list(trainers), len(trainers)):
                samples[contender].append(self.timed(trainers[contender], number))
            if self.key != "tiny":
                gc.collect()
        gc.enable()
        gc.unfreeze()
        for contender, seconds in samples.items():
            ratios = [mine / plain for mine, plain in zip(seconds, samples["plain"], strict=True)]
            median = self.table.add(self.key, contender, "step", "s", seconds)
            self.table.add(self.key, contender, "step_over_plain", "ratio", ratios)
            plan = self.plans.get(contender)
            if plan is not None:
                predicted = plan.predicted_seconds
                self.table.add(self.key, contender, "predicted_step", "s", predicted)
                self.table.add(self.key, contender, "step_prediction_error", "ratio", predicted / median - 1)
            if contender == "keepless at checkpoint's peak":
                over = [mine / theirs for mine, theirs in zip(seconds, samples["checkpoint"], strict=True)]
                self.table.add(self.key, contender, "step_over_checkpoint", "ratio", over)

    def trainer(self, contender: str) -> zoo.Trainer:
        """A contender with a model of its own; its batches are made beforehand."""
        workload = zoo.build(self.name, self.size).to(self.args.device)
        batches = [workload.batch(number) for number in range(2)]
        workload = replace(workload, batch=lambda number: batches[number % len(batches)])
        plan = self.plans.get(contender)
        if plan is None:
            return zoo.Trainer(workload, contender)
        path = self.folder / f"{self.key}-{contender.replace(' ', '-')}.plan"
        return zoo.Trainer(workload, "keepless", plan=keepless.load(path))

    def timed(self, trainer: zoo.Trainer, number: int) -> float:
        """Seconds of one whole step."""
        on_cuda = self.args.device != "cpu"
        if on_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        trainer.step(number)
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def show(console: Console, table: Table, keys: list[str]) -> None:
    """The rows that matter, as a table."""
    columns = ("model", "contender", "peak MiB", "of plain", "predicted", "step ms", "of plain (p20 to p80)", "equal")
    shown = RichTable(*columns, title="Whole training steps")
    for key in keys:
        for contender in dict.fromkeys(row.contender for row in table.rows if row.model == key):
            peak = table.find(key, contender, "peak")
            if peak is None:
                continue
            error = table.find(key, contender, "peak_prediction_error")
            step = table.find(key, contender, "step")
            ratio = next(
                r for r in table.rows if (r.model, r.contender, r.metric) == (key, contender, "step_over_plain")
            )
            equal = [table.find(key, contender, f"equal_{what}") for what in ("losses", "state")]
            shown.add_row(
                key,
                contender,
                f"{peak / 2**20:.1f}",
                f"{table.find(key, contender, 'peak_over_plain'):.3f}",
                "" if error is None else f"{error:+.2%}",
                f"{1000 * (step or 0):.1f}",
                f"{ratio.p50:.3f} ({ratio.p20:.3f} to {ratio.p80:.3f})",
                "yes" if all(equal) else "losses" if equal[0] else "no",
            )
    console.print(shown)


def show_planning(console: Console, table: Table) -> None:
    """Planning seconds, as a table."""
    shown = RichTable("model", "cache", *planning.STAGES, "measure and solve", title="Planning, seconds")
    for model, cache in dict.fromkeys((r.model, r.contender) for r in table.rows if r.metric == "measure_and_solve"):
        metrics = (*planning.STAGES, "measure_and_solve")
        shown.add_row(model, cache, *(f"{table.find(model, cache, metric):.2f}" for metric in metrics))
    console.print(shown)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small models, few rounds; results go to out/")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--no-planning", action="store_true", help="leave out the seconds of planning")
    parser.add_argument("--no-steps", action="store_true", help="only the seconds of planning")
    parser.add_argument("--device", default="cpu", help='"cpu" (default) or "cuda"')
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: as torch chooses")
    parser.add_argument("--seed", type=int, default=0, help="of the solver and of the order of timed steps")
    parser.add_argument("--out", type=Path, help="folder of step.csv and planning.csv; default: benchmarks/results")
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark and writes its rows; a model's rows are on disk as soon as it is done."""
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    out: Path = args.out or (Path("out") if args.quick else RESULTS)
    suffix = "" if args.device == "cpu" else f"-{torch.device(args.device).type}"
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    keys = [] if args.no_steps else list(args.models)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    steps, plans = Table(args.device, args.seed), Table(args.device, args.seed)
    with tempfile.TemporaryDirectory(prefix="keepless-bench-") as folder, Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=len(keys) + (not args.no_planning))

        def tell(text: str) -> None:
            bar.update(task, description=text)

        for key in keys:
            Bench(key, steps, args, Path(folder), tell).run()
            steps.write(out / f"step{suffix}.csv")
            bar.advance(task)
        if not args.no_planning:
            planning.run(plans, planning.TINY if args.quick else planning.MODELS, args.device, tell)
            plans.write(out / f"planning{suffix}.csv")
            bar.advance(task)
    if keys:
        show(console, steps, keys)
    if not args.no_planning:
        show_planning(console, plans)
    console.print(f"rows: {out}")


if __name__ == "__main__":
    main()
