"""The block engine beside the graph engine, on models that both can run.

    python -m benchmarks.engines                        # four models, 8 minutes on 2 quiet cores
    python -m benchmarks.engines --models gpt2 --rounds 25

Both engines plan for the same budgets in bytes: one that keeps everything ("kept"), the larger of their two smallest
budgets and 2 % ("tight"), and the middle between that and everything kept ("mid"). Seconds are of a forward and
backward: the optimizer's step is the same code for all. All contenders take one step each per round, in one process,
in an order drawn per round; ratios are taken within the round. Peaks are those of a forward and backward with all that
stands before it, and "equal_to_plain" is 1 where the loss and all gradients of a seeded step are those of plain eager,
bit for bit. Torch's non-reentrant checkpoint around every block is there for its peak and its seconds.

The exit status is 0 if all bits are equal and no planned peak is above its budget, else 1.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as RichTable

import keepless
from benchmarks.common import RESULTS, Row, Table
from keepless.control.parts.block_plans import Known
from keepless.errors import InfeasibleBudget
from keepless.measure.steps import increments

import zoo  # isort: skip  (found through benchmarks.common)

MODELS: dict[str, Callable[[], zoo.Workload]] = {
    "gpt2": lambda: zoo.gpt2(layers=4, width=256, heads=4, length=256, batch=4),
    "llama": lambda: zoo.llama(layers=4, width=256, heads=4, length=256, batch=2),
    "vit": lambda: zoo.vit(layers=4, width=192, heads=3, image=96, patch=8, batch=8),
    "unet3d": lambda: zoo.unet3d(width=16, volume=32, batch=1, levels=3),
    "tiny": lambda: zoo.build("gpt2", "tiny"),
}
"""What --models takes; "tiny" is for tests."""
ENGINES = ("graph", "blocks")
BUDGETS = ("kept", "mid", "tight")
ROUNDS = 15
ABOVE_SMALLEST = 1.02
ALIKE = 0.05
"""Figures that are further apart than this are marked in the table."""


class Contender:
    """A way to run one model's step, with a model of its own."""

    def __init__(self, name: str, workload: zoo.Workload, plan: keepless.Plan | None = None) -> None:
        self.name, self.workload, self.plan = name, workload, plan
        self.batch = workload.batch(0)
        if plan is not None:
            keepless.apply(workload.model, plan)

    def forward_backward(self) -> torch.Tensor:
        """On batch 0; gradients stay."""
        inputs, targets = self.batch
        loss = self.workload.loss_of(self.workload.forward(inputs), targets)
        loss.backward()
        return loss.detach()

    def timed(self) -> float:
        """Seconds of a forward and backward."""
        self.workload.model.zero_grad()
        start = time.perf_counter()
        self.forward_backward()
        return time.perf_counter() - start

    def peak(self) -> int:
        """Highest bytes of a forward and backward, with parameters, buffers and the batch."""
        model = self.workload.model
        model.zero_grad()
        standing: list[object] = [*model.parameters(), *model.buffers()]
        standing += torch.utils._pytree.tree_leaves(self.batch)
        resident = sum(t.nbytes for t in standing if isinstance(t, torch.Tensor))
        return resident + increments(self.forward_backward, torch.device("cpu"))

    def bits(self) -> str:
        """A hash of a seeded step's loss and gradients."""
        self.workload.model.zero_grad()
        torch.manual_seed(3)
        loss = self.forward_backward()
        grads = {n: p.grad for n, p in self.workload.model.named_parameters() if p.grad is not None}
        return zoo.digest_all({"loss": zoo.digest(loss), **{name: zoo.digest(grad) for name, grad in grads.items()}})


def made(name: str, seed: int) -> zoo.Workload:
    """The model, with the same weights each time."""
    torch.manual_seed(seed)
    return MODELS[name]()


class Plans:
    """Plans of one model by both engines."""

    def __init__(self, name: str, seed: int, table: Table) -> None:
        self.name, self.seed, self.table = name, seed, table
        self.workload = made(name, seed)
        self.plans: dict[str, keepless.Plan] = {}

    def make(self) -> dict[str, keepless.Plan]:
        """For each budget, a plan by each engine."""
        self.at("kept", 1 << 40)
        ends = [self.plans[f"{engine}, kept"] for engine in ENGINES]
        tight = int(ABOVE_SMALLEST * max(plan.smallest_budget for plan in ends))
        for _ in range(3):  # a step that was measured above its budget says which one it needs
            try:
                self.at("tight", tight)
                break
            except InfeasibleBudget as error:
                tight = int(ABOVE_SMALLEST * max(tight, error.smallest_budget))
        self.at("mid", (tight + min(plan.baseline_peak for plan in ends)) // 2)
        return {f"{engine}, {budget}": self.plans[f"{engine}, {budget}"] for budget in BUDGETS for engine in ENGINES}

    def at(self, budget: str, nbytes: int) -> None:
        """Both engines' plans for a budget."""
        seconds = {}
        for engine in ENGINES:
            start = time.perf_counter()
            plan = self.workload.plan(nbytes, engine=engine, release_outputs=True, seed=self.seed)
            seconds[engine] = time.perf_counter() - start
            self.plans[f"{engine}, {budget}"] = plan
        for engine in ENGINES:
            self.table.add(self.name, f"{engine}, {budget}", "budget", "bytes", nbytes)
            self.table.add(self.name, f"{engine}, {budget}", "planning", "s", seconds[engine])
            known = self.plans[f"{engine}, {budget}"].capture  # the traces of another model come on top when it runs
            traced = known.library.traced if isinstance(known, Known) else 1
            self.table.add(self.name, f"{engine}, {budget}", "traces", "count", traced)


def describe(table: Table, name: str, one: Contender) -> None:
    """What a plan says of itself."""
    plan = one.plan
    assert plan is not None
    add = table.add
    add(name, one.name, "smallest_budget", "bytes", plan.smallest_budget)
    add(name, one.name, "predicted_peak", "bytes", plan.predicted_peak)
    add(name, one.name, "predicted_overhead", "ratio", plan.overhead)
    bound = plan.certificate.bound_seconds
    add(name, one.name, "gap", "ratio", max(0.0, plan.predicted_seconds / bound - 1) if bound else 0.0)
    add(name, one.name, "replays", "count", plan.num_replays)
    segments, failed = plan.signature.get("segments", ()), plan.signature.get("reasons", ())
    assert isinstance(segments, list | tuple)
    assert isinstance(failed, list | tuple)
    add(name, one.name, "captured_calls", "count", len(segments) if isinstance(plan.capture, Known) else 1)
    add(name, one.name, "calls_not_captured", "count", len(failed))


def run(name: str, table: Table, rounds: int, seed: int) -> bool:
    """One model's rows; whether all bits are equal and all peaks within their budgets."""
    table.add(name, "machine", "load_before", "count", os.getloadavg()[0])
    plans = Plans(name, seed, table).make()
    every = made(name, seed)
    every.checkpoint_blocks()
    found = [Contender("plain", made(name, seed)), Contender("checkpoint every block", every)]
    found += [Contender(contender, made(name, seed), plan) for contender, plan in plans.items()]
    sound = True
    plain_bits = found[0].bits()
    peaks = {}
    for one in found:
        one.timed()
        equal = one.bits() == plain_bits
        peak = peaks[one.name] = one.peak()
        table.add(name, one.name, "equal_to_plain", "count", equal)
        table.add(name, one.name, "peak", "bytes", peak)
        table.add(name, one.name, "peak_over_plain", "ratio", peak / peaks["plain"])
        sound = sound and equal
        if one.plan is not None:
            describe(table, name, one)
            table.add(name, one.name, "predicted_over_measured", "ratio", one.plan.predicted_peak / peak)
            sound = sound and peak <= one.plan.budget.limits["device"]
    samples: dict[str, list[float]] = {one.name: [] for one in found}
    draw = random.Random(seed)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + 1):
            for one in draw.sample(found, len(found)):
                seconds = one.timed()
                if number:
                    samples[one.name].append(seconds)
            gc.collect()
    finally:
        gc.enable()
    for one in found:
        mine = samples[one.name]
        table.add(name, one.name, "step", "s", mine)
        table.add(name, one.name, "step_over_plain", "ratio", _over(mine, samples["plain"]))
    for budget in BUDGETS:
        graph, blocks = (f"{engine}, {budget}" for engine in ENGINES)
        table.add(name, blocks, "step_over_graph", "ratio", _over(samples[blocks], samples[graph]))
        table.add(name, blocks, "peak_over_graph", "ratio", peaks[blocks] / peaks[graph])
    smallest = [plans[f"{engine}, kept"].smallest_budget for engine in ENGINES]
    table.add(name, "blocks, kept", "smallest_budget_over_graph", "ratio", smallest[1] / smallest[0])
    table.add(name, "machine", "load_after", "count", os.getloadavg()[0])
    return sound


def _over(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def show(console: Console, table: Table, names: Sequence[str]) -> None:
    """A row per model and contender; then one per model and budget, blocks over graph."""
    columns = ("model", "contender", "equal", "budget MiB", "predicted", "peak MiB", "step ms", "of plain", "replays")
    shown = RichTable(*columns, "calls", "traces", "planning s", "smallest MiB")
    ratios = RichTable("model", "budget", "step", "p20 to p80", "peak", title="blocks over graph")
    for row in table.rows:
        if row.model not in names:
            continue
        value = partial(_text, table, row)
        if row.metric == "step":
            shown.add_row(
                row.model,
                row.contender,
                "yes" if table.find(row.model, row.contender, "equal_to_plain") else "NO",
                "" if row.contender.endswith("kept") else value("budget", 2**-20),
                value("predicted_peak", 2**-20),
                value("peak", 2**-20),
                value("step", 1e3),
                value("step_over_plain", digits=3),
                value("replays", digits=0),
                value("captured_calls", digits=0),
                value("traces", digits=0),
                value("planning"),
                value("smallest_budget", 2**-20),
            )
        if row.metric == "step_over_graph":
            peak = table.find(row.model, row.contender, "peak_over_graph") or 0.0
            ratios.add_row(
                row.model,
                row.contender.removeprefix("blocks, "),
                _marked(row.value),
                f"{row.p20:.3f} to {row.p80:.3f}",
                _marked(peak),
            )
    console.print(shown)
    console.print(ratios)


def _text(table: Table, row: Row, metric: str, scale: float = 1.0, digits: int = 1) -> str:
    """Another figure of the same contender."""
    found = table.find(row.model, row.contender, metric)
    return "" if found is None else f"{found * scale:.{digits}f}"


def section(rows: Sequence[Row]) -> str:
    """The table in docs/module-plans.md: peaks and seconds of both engines, as ratios."""
    found = {(row.model, row.contender, row.metric): row.value for row in rows}
    lines = [
        "| model | budget | graph's step over plain | blocks' | blocks over graph: step | peak | smallest budget |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(row.model for row in rows):
        for budget in BUDGETS:
            graph, blocks = (f"{engine}, {budget}" for engine in ENGINES)
            smallest = found.get((model, blocks, "smallest_budget_over_graph"))
            cells = [
                model,
                budget if budget == "kept" else f"{budget}, {found[model, graph, 'budget'] / 2**20:.1f} MiB",
                f"{found[model, graph, 'step_over_plain']:.2f}",
                f"{found[model, blocks, 'step_over_plain']:.2f}",
                f"{found[model, blocks, 'step_over_graph']:.3f}",
                f"{found[model, blocks, 'peak_over_graph']:.3f}",
                "" if smallest is None else f"{smallest:.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _marked(ratio: float) -> str:
    return f"{ratio:.3f}" + (" *" if abs(ratio - 1) > ALIKE else "")


def main() -> None:
    """Runs the benchmark and writes its rows; a model's rows are on disk as soon as it is done."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.engines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=default, help="default: all but tiny")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds")
    parser.add_argument("--seed", type=int, default=0, help="of weights, plans and the order of timed steps")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of engines.csv; default: benchmarks/results")
    args = parser.parse_args()
    console = Console() if Console().is_terminal else Console(width=160)
    table = Table("cpu", args.seed)
    sound = True
    for name in args.models:
        console.print(name)
        sound = run(name, table, args.rounds, args.seed) and sound
        table.write(args.out / "engines.csv")
    show(console, table, args.models)
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
