"""Do plans run in the order that their predictions say? Plans of one model, timed in turn.

    python -m benchmarks.order                        # three models, 7 minutes on 2 quiet cores: part of bench-planner
    python -m benchmarks.order --models gpt2 --rounds 15

A model's plans are the points of its curve, from the smallest budget to everything kept. They are applied to the same
model one after the other, in an order drawn per round, each twice a round: the two series of a plan differ by noise
alone, and the largest relative difference of their medians is the noise of the model's rows. Two plans are apart where
their predicted seconds differ by more than that; `pairs_in_order` of `pairs_apart` were measured the same way round.
Rank correlations (Spearman's rho, Kendall's tau-b) are over all plans, those too near to tell included.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as RichTable
from scipy import stats

import keepless
from benchmarks.common import RESULTS, Table

import zoo  # isort: skip  (found through benchmarks.common)

MODELS: dict[str, Callable[[], zoo.Workload]] = {
    "gpt2": lambda: zoo.gpt2(layers=4, width=256, heads=4, length=256, batch=8),
    "vit": lambda: zoo.build("vit", "large"),
    "unet3d": lambda: zoo.build("unet3d", "large"),
    "tiny": lambda: zoo.build("gpt2", "tiny"),
}
"""What --models takes; "tiny" is for tests."""
PLANS = 8
ROUNDS = 9
WHOLE = "all plans"
"""The contender of rows that are about a model's plans together."""


@dataclass(frozen=True)
class Agreement:
    """How well an order of predictions is met.

    Arguments:
        spearman, kendall: rank correlations over all plans; 1 is the same order.
        pairs_apart: pairs of plans whose predictions differ by more than the noise.
        pairs_in_order: those of them that were measured the same way round.
    """

    spearman: float
    kendall: float
    pairs_apart: int
    pairs_in_order: int


def agreement(predicted: Sequence[float], measured: Sequence[float], noise: float) -> Agreement:
    """Compares predicted and measured seconds of at least two plans.

    Arguments:
        noise: relative: pairs whose predictions differ by less are too near to tell.
    """
    apart = in_order = 0
    for (p, m), (q, n) in itertools.combinations(zip(predicted, measured, strict=True), 2):
        if max(p, q) > (1 + noise) * min(p, q):
            apart += 1
            in_order += (p < q) == (m < n) and m != n
    rho, tau = stats.spearmanr(predicted, measured), stats.kendalltau(predicted, measured)
    return Agreement(float(rho.statistic), float(tau.statistic), apart, in_order)


def noise_of(samples: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """The largest relative difference between the medians of two series of the same plan."""
    medians = [(statistics.median(a), statistics.median(b)) for a, b in samples]
    return max(max(pair) / min(pair) - 1 for pair in medians)


def run(name: str, table: Table, plans: int, rounds: int, seed: int) -> None:
    """One model's rows."""
    workload = MODELS[name]()
    batches = [workload.batch(number) for number in range(2)]
    workload = replace(workload, batch=lambda number: batches[number % len(batches)])
    trainer = zoo.Trainer(workload, "plain")
    loss = workload.loss
    loss_fn = None if loss is None else (lambda output, _: loss(output, batches[0][1]))
    curve = keepless.curve(
        workload.model,
        batches[0][0],
        optimizer=trainer.optimizer,
        loss_fn=loss_fn,
        release_outputs=True,
        points=plans,
        strategies=(),
        seed=seed,
    )
    points = curve.points
    made = [curve.plan(point.budget) for point in points]
    samples = timed(trainer, made, rounds, seed)
    kept = [a for pair in zip(*samples[-1], strict=True) for a in pair]
    medians = []
    for number, (plan, pair) in enumerate(zip(made, samples, strict=True), 1):
        contender = f"plan {number} of {len(made)}"
        seconds = [a for both in zip(*pair, strict=True) for a in both]
        medians.append(table.add(name, contender, "step", "s", seconds))
        over = [mine / theirs for mine, theirs in zip(seconds, kept, strict=True)]
        table.add(name, contender, "step_over_kept", "ratio", over)
        table.add(name, contender, "predicted_step", "s", plan.predicted_seconds)
        table.add(name, contender, "predicted_over_kept", "ratio", plan.predicted_seconds / made[-1].predicted_seconds)
        table.add(name, contender, "budget", "bytes", plan.budget.limits["device"])
        table.add(name, contender, "replays", "count", plan.num_replays)
    noise = noise_of(samples)
    found = agreement([plan.predicted_seconds for plan in made], medians, noise)
    table.add(name, WHOLE, "noise", "ratio", noise)
    table.add(name, WHOLE, "disturbed_costs", "ratio", made[0].cost.disturbed)
    table.add(name, WHOLE, "plans", "count", len(made))
    table.add(name, WHOLE, "spearman", "ratio", found.spearman)
    table.add(name, WHOLE, "kendall", "ratio", found.kendall)
    table.add(name, WHOLE, "pairs_apart", "count", found.pairs_apart)
    table.add(name, WHOLE, "pairs_in_order", "count", found.pairs_in_order)


def timed(
    trainer: zoo.Trainer, plans: Sequence[keepless.Plan], rounds: int, seed: int
) -> list[tuple[list[float], list[float]]]:
    """Seconds of whole steps under each plan, in two series; each plan runs twice a round, after a round to warm up."""
    rng = random.Random(seed)
    samples: list[tuple[list[float], list[float]]] = [([], []) for _ in plans]
    number = 0
    gc.collect()
    gc.disable()
    try:
        for round_number in range(rounds + 1):
            turns = [(index, series) for index in range(len(plans)) for series in (0, 1)]
            for index, series in rng.sample(turns, len(turns)):
                keepless.apply(trainer.workload.model, plans[index])
                start = time.perf_counter()
                trainer.step(number)
                seconds = time.perf_counter() - start
                number += 1
                if round_number:
                    samples[index][series].append(seconds)
            gc.collect()
    finally:
        gc.enable()
        keepless.remove(trainer.workload.model)
    return samples


def show(console: Console, table: Table, names: Sequence[str]) -> None:
    """A row per model, and what each plan took."""
    shown = RichTable("model", "plans", "predicted over kept", "measured over kept", "noise", "rho", "tau", "in order")
    for name in names:
        rows = [row for row in table.rows if row.model == name]
        by = {metric: [row.value for row in rows if row.metric == metric] for metric in {row.metric for row in rows}}
        shown.add_row(
            name,
            f"{by['plans'][0]:.0f}",
            " ".join(f"{value:.3f}" for value in by["predicted_over_kept"]),
            " ".join(f"{value:.3f}" for value in by["step_over_kept"]),
            f"{by['noise'][0]:.2%}",
            f"{by['spearman'][0]:.3f}",
            f"{by['kendall'][0]:.3f}",
            f"{by['pairs_in_order'][0]:.0f} of {by['pairs_apart'][0]:.0f}",
        )
        if by["disturbed_costs"][0] >= 0.05:
            console.print(f"{name}: ops were timed beside other processes; the predictions are doubtful")
    console.print(shown)


def main() -> None:
    """Runs the benchmark and writes its rows; a model's rows are on disk as soon as it is done."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.order", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=default, help="default: all but tiny")
    parser.add_argument("--plans", type=int, default=PLANS, help="of each model, at most")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds, each plan twice in each")
    parser.add_argument("--seed", type=int, default=0, help="of weights, plans and the order of timed steps")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of order.csv; default: benchmarks/results")
    args = parser.parse_args()
    console = Console() if Console().is_terminal else Console(width=160)
    table = Table("cpu", args.seed)
    for name in args.models:
        console.print(name)
        torch.manual_seed(args.seed)
        run(name, table, args.plans, args.rounds, args.seed)
        table.write(args.out / "order.csv")
    show(console, table, args.models)


if __name__ == "__main__":
    main()
