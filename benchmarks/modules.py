"""Plans of module calls beside checkpointing every block, and beside plans of single ops.

    python -m benchmarks.modules                        # four models, 6 minutes on 2 quiet cores
    python -m benchmarks.modules --models gpt2 --rounds 15

For each model torch's non-reentrant checkpoint goes around every block first, and its peak over forward and backward is
measured. `keepless.plan` then gets that peak as its budget, with either engine, and the smallest budget of the eager
engine. Whole AdamW steps are timed in turn, in an order drawn per round.
Every contender's first step is compared with plain eager's: loss and gradients, bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as RichTable

import keepless
from benchmarks.common import RESULTS, Table
from keepless.errors import InfeasibleBudget
from keepless.measure.steps import increments

import zoo  # isort: skip  (found through benchmarks.common)

MODELS: dict[str, Callable[[], zoo.Workload]] = {
    "gpt2": lambda: zoo.gpt2(layers=4, width=256, heads=4, length=256, batch=8),
    "vit": lambda: zoo.build("vit", "large"),
    "resnet50": lambda: zoo.build("resnet50", "large"),
    "unet3d": lambda: zoo.build("unet3d", "large"),
    "tiny": lambda: zoo.build("gpt2", "tiny"),
}
"""What --models takes; "tiny" is for tests."""
ROUNDS = 7
PUT_IN: weakref.WeakKeyDictionary[torch.nn.Module, Contender] = weakref.WeakKeyDictionary()
"""Whose plan stands in a model."""


class Contender:
    """A way to run one model's step."""

    def __init__(self, name: str, workload: zoo.Workload, plan: keepless.Plan | None = None) -> None:
        self.name, self.workload, self.plan = name, workload, plan
        self.optimizer = torch.optim.AdamW(workload.model.parameters(), lr=0.0)

    def put_in(self) -> None:
        """The model runs by this contender's plan, or by its own code."""
        model = self.workload.model
        if PUT_IN.get(model) is not self:
            PUT_IN[model] = self
            if self.plan is None:
                keepless.remove(model)
            else:
                keepless.apply(model, self.plan)

    def step(self, number: int) -> torch.Tensor:
        """One whole step; the weights stay as they are."""
        self.put_in()
        inputs, targets = self.workload.batch(number)
        self.optimizer.zero_grad()
        loss = self.workload.loss_of(self.workload.forward(inputs), targets)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def peak(self) -> int:
        """Highest bytes above the level at the start of a forward and backward."""
        self.step(0)
        self.optimizer.zero_grad()
        inputs, targets = self.workload.batch(0)

        def run() -> None:
            self.workload.loss_of(self.workload.forward(inputs), targets).backward()

        return increments(run, torch.device("cpu"))

    def bits(self) -> str:
        """A hash of a seeded step's loss and gradients."""
        torch.manual_seed(3)
        loss = self.step(0)
        grads = {n: p.grad for n, p in self.workload.model.named_parameters() if p.grad is not None}
        return zoo.digest_all({"loss": zoo.digest(loss), **{name: zoo.digest(grad) for name, grad in grads.items()}})


def contenders(make: Callable[[], zoo.Workload], seed: int) -> list[Contender]:
    """Plain eager, every block checkpointed, both engines at that peak, the eager engine's smallest."""
    torch.manual_seed(seed)
    workload = make()
    checkpointed = make()
    checkpointed.model.load_state_dict(workload.model.state_dict())
    checkpointed.checkpoint_blocks()
    every = Contender("checkpoint every block", checkpointed)
    resident = sum(t.nbytes for t in (*workload.model.parameters(), *workload.model.buffers()))
    resident += sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(workload.batch(0)[0]))
    budget = keepless_budget(resident + every.peak())
    found = [Contender("plain", workload), every]
    first = workload.plan(1 << 40, engine="eager", release_outputs=False)
    for name, engine, nbytes in (
        ("modules at that peak", "eager", budget),
        ("ops at that peak", "graph", budget),
        ("modules, smallest", "eager", first.smallest_budget),
    ):
        try:
            found.append(Contender(name, workload, workload.plan(nbytes, engine=engine)))
        except InfeasibleBudget as error:
            print(f"{name}: {error}")
    return found


def keepless_budget(peak: int) -> int:
    """The budget whose plans may reach a peak: with the reserve that budgets have."""
    from keepless.control.reserve import with_reserve

    return with_reserve(peak)


def run(name: str, table: Table, rounds: int, seed: int) -> None:
    """One model's rows."""
    found = contenders(MODELS[name], seed)
    plain_bits, plain_peak = found[0].bits(), found[0].peak()
    samples: dict[str, list[float]] = {one.name: [] for one in found}
    for one in found:
        table.add(name, one.name, "equal_to_plain", "count", float(one.bits() == plain_bits))
        table.add(name, one.name, "peak_over_plain", "ratio", one.peak() / plain_peak)
        if one.plan is not None:
            table.add(name, one.name, "predicted_over_measured", "ratio", one.plan.predicted_peak / _measured(one))
            table.add(name, one.name, "predicted_overhead", "ratio", one.plan.overhead)
            table.add(name, one.name, "gap", "ratio", _gap(one.plan))
            table.add(name, one.name, "solve", "s", one.plan.certificate.solve_seconds)
    draw = random.Random(seed)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + 1):
            for one in draw.sample(found, len(found)):
                one.step(0)  # the plan is put in
                start = time.perf_counter()
                one.step(number)
                if number:
                    samples[one.name].append(time.perf_counter() - start)
            gc.collect()
    finally:
        gc.enable()
    for one in found:
        table.add(name, one.name, "step", "s", samples[one.name])
        over = [mine / theirs for mine, theirs in zip(samples[one.name], samples["plain"], strict=True)]
        table.add(name, one.name, "step_over_plain", "ratio", over)


def _measured(one: Contender) -> int:
    assert one.plan is not None
    resident = sum(one.plan.graph.values[v].nbytes for v in one.plan.graph.inputs)
    return resident + one.peak()


def _gap(plan: keepless.Plan) -> float:
    bound = plan.certificate.bound_seconds
    return max(0.0, plan.predicted_seconds / bound - 1) if bound else 0.0


def show(console: Console, table: Table, names: Sequence[str]) -> None:
    """A row per model and contender."""
    shown = RichTable("model", "contender", "equal", "peak over plain", "step over plain", "predicted peak", "gap")
    for row in table.rows:
        if row.metric == "step_over_plain" and row.model in names:
            values = [table.find(row.model, row.contender, m) for m in ("equal_to_plain", "peak_over_plain")]
            more = [table.find(row.model, row.contender, m) for m in ("predicted_over_measured", "gap")]
            shown.add_row(
                row.model,
                row.contender,
                "yes" if values[0] else "NO",
                f"{values[1]:.2f}",
                f"{row.value:.2f} ({row.p20:.2f} to {row.p80:.2f})",
                "" if more[0] is None else f"{more[0] - 1:+.2%}",
                "" if more[1] is None else f"{more[1]:.1%}",
            )
    console.print(shown)


def main() -> None:
    """Runs the benchmark and writes its rows; a model's rows are on disk as soon as it is done."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.modules", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=default, help="default: all but tiny")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds")
    parser.add_argument("--seed", type=int, default=0, help="of weights, plans and the order of timed steps")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of modules.csv; default: benchmarks/results")
    args = parser.parse_args()
    console = Console() if Console().is_terminal else Console(width=160)
    table = Table("cpu", args.seed)
    for name in args.models:
        console.print(name)
        run(name, table, args.rounds, args.seed)
        table.write(args.out / "modules.csv")
    show(console, table, args.models)


if __name__ == "__main__":
    main()
