"""Does a step rise as high, and take as long, as its plan said? Over models, budgets, engines, optimizers and modes.

    python -m benchmarks.fidelity                          # a pairwise covering set, an hour on 2 quiet cores
    python -m benchmarks.fidelity --first 12               # the first runs of it
    python -m benchmarks.fidelity --only model=bert engine=graph
    python -m benchmarks.fidelity --full                   # every combination: days; rows are kept as they come

A run that has its row in benchmarks/results/fidelity.csv is not done again (`--again` does). For each run:

1. `keepless.plan` for a budget: the smallest that is found, the middle between that and everything kept, 0.54 of what
   everything kept needs, or that. What it predicts rests on single ops (engines "blocks" and "eager": on trial steps in
   which everything is recomputed).
2. The deciding meter: three steps in a fresh process, the first one included, with the real optimizer stepping. With
   accumulation a step is two batches, into gradients that are zeroed in place.
3. Seconds of steps in this process: from the forward's start to the optimizer's end, one batch each, medians.
4. `keepless.land`, and 2 (where another program came of it) and 3 once more.

Combinations that an engine refuses have a row with the reason. The exit status is 1 where a step rose above its budget.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import gc
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import keepless
from benchmarks import fidelity_figures, pairwise, sized
from benchmarks.common import RESULTS, commit
from benchmarks.fidelity_figures import DONE, FAILED, INFEASIBLE, REFUSED, Measured, read
from keepless.errors import InfeasibleBudget, KeeplessError
from keepless.measure import describe_device, measure_peak

from checkpoint_models import Case  # isort: skip  (found through benchmarks.sized)

FACTORS: dict[str, tuple[str, ...]] = {
    "model": tuple(sized.MODELS),
    "engine": ("graph", "blocks", "eager"),
    "budget_level": ("smallest", "mid", "0.54", "kept"),
    "optimizer": ("sgd", "adamw for-loop", "adamw foreach", "adafactor", "adamw fused"),
    "accumulation": ("off", "on"),
    "dtype": ("fp32", "bf16"),
}
METERED_STEPS = 3
SHARE = 0.54
PLENTY = 1 << 40
MOST_MORE = 1.1
"""A smallest budget that turns out too small is raised to what the error asks for, up to so many times itself."""
MOST_TIMED, LEAST_TIMED, TIMED_SECONDS = 15, 5, 2.0


def is_needed(pair: pairwise.Pair) -> bool:
    """Fused AdamW meets every level but the models one by one, which would ask for as many runs more as there are
    models."""
    return not (pair[0][0] == "model" and pair[1] == ("optimizer", "adamw fused"))


def combinations(full: bool, seed: int) -> list[pairwise.Run]:
    """The runs."""
    if not full:
        return pairwise.covering(FACTORS, seed, is_needed)
    return [dict(zip(FACTORS, levels, strict=True)) for levels in itertools.product(*FACTORS.values())]


def make_optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """One of the levels."""
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(params, lr=1e-3, momentum=0.9)
    if name == "adafactor":
        return torch.optim.Adafactor(params, lr=1e-3)
    form = name.removeprefix("adamw ")
    return torch.optim.AdamW(params, lr=1e-4, foreach=form == "foreach", fused=form == "fused")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Some of the models print."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


class Loop:
    """A training loop as people write it."""

    def __init__(self, run: pairwise.Run, plan: keepless.Plan | None) -> None:
        self.case = sized.build(run["model"])
        self.model = self.case.model
        self.optimizer = make_optimizer(run["optimizer"], self.model)
        self.accumulates, self.is_bf16 = run["accumulation"] == "on", run["dtype"] == "bf16"
        self.number = 0
        if plan is not None:
            keepless.apply(self.model, plan, background=False)
        sized.seed(1)

    def autocast(self) -> Any:
        """The mode of forward and loss."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16)

    def forward_backward(self, batch: Any) -> None:
        """All outputs are held through the backward, as `outputs = model(...)` does."""
        outputs: list[Any] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            outputs.append(self.model(*args, **kwargs))
            return outputs[-1]

        with self.autocast():
            loss = self.case.loss(call, batch)[1]  # type: ignore[arg-type]
        loss.backward()
        outputs.clear()

    def step(self) -> None:
        """One step; with accumulation two batches."""
        self.optimizer.zero_grad(set_to_none=not self.accumulates)
        for _ in range(2 if self.accumulates else 1):
            batch = self.case.batch(self.number)
            self.number += 1
            self.forward_backward(batch)
            del batch
        self.optimizer.step()

    def timed(self) -> float:
        """Seconds of a step of one batch, without what makes the batch and zeroes gradients."""
        self.optimizer.zero_grad(set_to_none=not self.accumulates)
        batch = self.case.batch(0)
        start = time.perf_counter()
        self.forward_backward(batch)
        self.optimizer.step()
        return time.perf_counter() - start


def target(run: pairwise.Run, plan_path: str) -> Callable[[], None]:
    """A target of the meter."""
    loop = Loop(run, keepless.load(plan_path) if plan_path else None)

    def step() -> None:
        with silent():
            loop.step()

    return step


def step_seconds(run: pairwise.Run, plan: keepless.Plan) -> float:
    """The median of some steps after two that are not counted."""
    loop = Loop(run, plan)
    samples: list[float] = []
    with silent():
        loop.step()
        loop.timed()
        gc.collect()
        gc.disable()
        try:
            while len(samples) < LEAST_TIMED or (sum(samples) < TIMED_SECONDS and len(samples) < MOST_TIMED):
                samples.append(loop.timed())
        finally:
            gc.enable()
    return statistics.median(samples)


@dataclass
class Ends:
    """What a model, engine and mode can do, whatever the budget."""

    smallest: int
    kept: int

    def budget(self, level: str) -> int:
        """Bytes of a level."""
        middle = (self.smallest + self.kept) // 2
        levels = {"smallest": self.smallest, "mid": middle, "0.54": int(SHARE * self.kept), "kept": self.kept}
        return levels[level]


def measured(run: pairwise.Run, seed: int) -> Measured:
    """One run's row."""
    facts = describe_device("cpu")
    row = Measured(
        **run,
        status=DONE,
        load=os.getloadavg()[0],
        device=str(facts["name"]),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        keepless=commit(),
        seed=seed,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
    )
    start = time.perf_counter()
    try:
        row = _measured(run, row, seed)
    except _NotPlanned as error:
        row = error.row
    except InfeasibleBudget as error:
        row = replace(row, status=INFEASIBLE, reason=f"a batch of another kind needs more: {_line(error)}")
    except Exception as error:  # a run that fails is a row that says so, not the end of the other runs
        reason = f"{type(error).__name__}: {_line(error)}"
        if plain_fails(run):
            row = replace(row, status=REFUSED, reason=f"plain eager fails, too: {reason}")
        else:
            print(traceback.format_exc(), file=sys.stderr)
            row = replace(row, status=FAILED, reason=reason)
    return replace(row, run_seconds=time.perf_counter() - start)


def plain_fails(run: pairwise.Run) -> bool:
    """Whether a model cannot train in this mode, whoever runs it."""
    try:
        with silent():
            Loop(run, None).step()
    except Exception:
        return True
    return False


class _NotPlanned(Exception):
    """There is no plan for a combination.

    Arguments:
        row: that says why.
    """

    def __init__(self, row: Measured) -> None:
        super().__init__(row.reason)
        self.row = row


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-195:]}"


def _measured(run: pairwise.Run, row: Measured, seed: int) -> Measured:
    case = sized.build(run["model"])
    optimizer = make_optimizer(run["optimizer"], case.model)
    call, loss_fn = sized.call_of(case), sized.loss_fn_of(case)
    options: dict[str, Any] = {
        "optimizer": optimizer,
        "loss_fn": loss_fn,
        "accumulate": run["accumulation"] == "on",
        "engine": run["engine"],
        "seed": seed,
    }
    try:
        with silent(), torch.autocast("cpu", torch.bfloat16, enabled=run["dtype"] == "bf16"):
            plan, stated = _planned(case, call, run["budget_level"], options)
    except InfeasibleBudget as error:
        raise _NotPlanned(replace(row, status=INFEASIBLE, reason=_line(error), budget=error.smallest_budget)) from error
    except KeeplessError as error:
        reason = f"{type(error).__name__}: {_line(error)}"
        raise _NotPlanned(replace(row, status=REFUSED, reason=reason)) from error
    budget = plan.budget.limits["device"]
    row = replace(
        row,
        reason="" if budget == stated else f"the smallest budget was stated as {stated} bytes, {budget - stated} less",
        budget=budget,
        predicted=plan.predicted_peak,
        predicted_seconds=plan.predicted_seconds,
        replays=plan.num_replays,
        disturbed=plan.cost.disturbed,
    )
    peaks = _peaks(run, plan)
    row = replace(row, measured=max(peaks), steps=len(peaks), steps_above=sum(peak > budget for peak in peaks))
    row = replace(row, measured_seconds=step_seconds(run, plan))
    with silent(), torch.autocast("cpu", torch.bfloat16, enabled=run["dtype"] == "bf16"):
        landed = keepless.land(case.model, call, plan)
    if landed.program.instrs != plan.program.instrs:
        peaks = _peaks(run, landed)
    return replace(
        row,
        landed_predicted=landed.predicted_peak,
        landed_measured=max(peaks),
        landed_steps_above=sum(peak > budget for peak in peaks),
        rounds=len(landed.landing),
        landed_predicted_seconds=landed.predicted_seconds,
        landed_measured_seconds=step_seconds(run, landed),
    )


def _planned(case: Case, call: Any, level: str, options: dict[str, Any]) -> tuple[keepless.Plan, int]:
    """The plan for a level of the budget, and that budget as it was stated: a smallest one may turn out too small."""
    everything = keepless.plan(case.model, call, PLENTY, **options)
    budget = stated = Ends(everything.smallest_budget, everything.baseline_peak).budget(level)
    while True:
        try:
            return keepless.plan(case.model, call, budget, **options), stated
        except InfeasibleBudget as error:
            if level != "smallest" or not budget < error.smallest_budget < MOST_MORE * stated:
                raise
            budget = error.smallest_budget


def _peaks(run: pairwise.Run, plan: keepless.Plan) -> tuple[int, ...]:
    with tempfile.TemporaryDirectory(prefix="keepless-fidelity-") as folder:
        path = str(Path(folder) / "step.plan")
        plan.save(path)
        arguments = {"run": run, "plan_path": path}
        return measure_peak("benchmarks.fidelity:target", arguments, steps=METERED_STEPS).peaks


def write(path: Path, rows: list[Measured]) -> None:
    """All rows, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    with open(fresh, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measured)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in vars(row).items()})
    os.replace(fresh, path)


def _chosen(words: list[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for word in words:
        name, _, level = word.partition("=")
        if level not in FACTORS.get(name, ()):
            raise SystemExit(f"--only {word!r}: factors and levels are {FACTORS}")
        found.setdefault(name, set()).add(level)
    return found


def main() -> None:
    """Does the runs that are missing."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="every combination, not only a covering set")
    parser.add_argument("--only", nargs="+", default=[], metavar="FACTOR=LEVEL", help="runs with one of these levels")
    parser.add_argument("--first", type=int, default=0, help="end after so many runs that were missing")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no run after so many minutes")
    parser.add_argument("--again", action="store_true", help="do runs that have a row, too")
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: as torch chooses")
    parser.add_argument("--seed", type=int, default=0, help="of the covering set and of plans")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of fidelity.csv")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console() if Console().is_terminal else Console(width=200)
    path: Path = args.out / "fidelity.csv"
    only = _chosen(args.only)
    wanted = [
        run for run in combinations(args.full, args.seed) if all(run[name] in levels for name, levels in only.items())
    ]
    rows = {row.key: row for row in read(path)}
    missing = [run for run in wanted if args.again or tuple(run.values()) not in rows]
    missing = missing[: args.first] if args.first else missing
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="keepless-fidelity-") as folder:
        os.environ["KEEPLESS_CACHE_DIR"] = folder
        for number, run in enumerate(missing, start=1):
            if args.minutes and time.perf_counter() - start > 60 * args.minutes:
                break
            row = measured(run, args.seed)
            rows[row.key] = row
            write(path, list(rows.values()))
            console.print(f"{number}/{len(missing)} {row}", markup=False, soft_wrap=True)
    found = [rows[tuple(run.values())] for run in wanted if tuple(run.values()) in rows]
    console.print(fidelity_figures.table(found), markup=False)
    console.print("\n".join(fidelity_figures.misses(found)), markup=False, soft_wrap=True)
    sys.exit(1 if any(row.steps_above or row.landed_steps_above for row in found) else 0)


if __name__ == "__main__":
    main()
