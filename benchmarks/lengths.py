"""Training on texts of many lengths within one budget, beside plain eager and torch's checkpointing on every block.

    python -m benchmarks.lengths               # 300 steps of a small GPT-2, some minutes
    python -m benchmarks.lengths --quick       # 24 steps; results go to out/

The texts are the paragraphs of the Python reference that comes with Python (`pydoc_data.topics`), as bytes; a batch is
padded to a multiple of 16. The model is planned for its first batch only, within a budget between the least that the
longest batch needs and what keeps everything of it. Every other length is captured on the spot and takes its plan from
those before it.

Two passes over the same steps: one that measures peaks (of every planned step, captures included, and of the longest
batches of the others), and one that times them, all contenders a step each per round. "equal_losses" is 1 where the
losses of all steps are those of plain eager, bit for bit; "equal_state" where the weights after them are.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console

import keepless
from benchmarks.common import RESULTS, Table
from keepless.execute import Counters, PlannedForward
from keepless.measure.steps import increments

import zoo  # isort: skip  (found through benchmarks.common)

PAD = 16
WINDOW = 10
IGNORED = -100
"""What Hugging Face's losses leave out."""
CONTENDERS = ("plain", "checkpoint", "keepless")
NAME = "gpt2 lengths"

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Scale:
    """How large a run is: layers, width and heads of the model, texts per batch, the longest text, steps."""

    layers: int = 4
    width: int = 64
    heads: int = 4
    batch: int = 8
    longest: int = 256
    steps: int = 300


QUICK = Scale(layers=2, batch=4, longest=96, steps=24)


def texts(longest: int, seed: int) -> list[bytes]:
    """Paragraphs in an order drawn from a seed; longer ones are cut."""
    found = [part.strip().encode() for _, text in sorted(topics.items()) for part in re.split(r"\n\s*\n", text)]
    found = [part[:longest] for part in found if len(part) > 1]
    random.Random(seed).shuffle(found)
    return found


def batches(scale: Scale, seed: int) -> list[Batch]:
    """Texts of like lengths together, as data loaders do: those of `WINDOW` batches are sorted, cut, and shuffled. Each
    is padded to the next multiple of `PAD` of its longest text; what is padded does not count."""
    found, made = texts(scale.longest, seed), []
    cut: list[list[bytes]] = []
    for window in range(-(-scale.steps // WINDOW)):
        size = WINDOW * scale.batch
        drawn = sorted((found[(window * size + row) % len(found)] for row in range(size)), key=len)
        there = [drawn[at : at + scale.batch] for at in range(0, size, scale.batch)]
        random.Random(seed + window).shuffle(there)
        cut += there
    for rows in cut[: scale.steps]:
        length = -(-max(map(len, rows)) // PAD) * PAD
        ids = torch.zeros(scale.batch, length, dtype=torch.int64)
        labels = torch.full((scale.batch, length), IGNORED)
        for row, text in enumerate(rows):
            ids[row, : len(text)] = labels[row, : len(text)] = torch.tensor(list(text))
        made.append({"input_ids": ids, "labels": labels})
    return made


def workload(scale: Scale) -> zoo.Workload:
    """The model, with the same weights each time."""
    torch.manual_seed(0)
    return zoo.gpt2(scale.layers, scale.width, scale.heads, scale.longest, scale.batch)


@dataclass
class Run:
    """One contender's training."""

    contender: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)

    def step(self, number: int, batch: Batch) -> None:
        """One step, its dropout drawn from the step's number."""
        torch.manual_seed(1000 + number)
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    @property
    def counters(self) -> Counters:
        """Of the plan."""
        forward = self.model.__dict__["forward"]
        assert isinstance(forward, PlannedForward)
        return forward.counters

    def peak(self, number: int, batch: Batch) -> int:
        """Highest bytes of one step, all that stands before it included."""
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        standing = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), *state, *batch.values()))
        return standing + increments(lambda: self.step(number, batch), torch.device("cpu"))


def budget_of(scale: Scale, first: Batch, longest: Batch, share: float) -> tuple[int, keepless.Plan]:
    """The budget at a share of the way from the least for the longest batch to everything kept, and a plan for the
    first batch within it."""
    work = workload(scale)
    options = {"optimizer": torch.optim.AdamW(work.model.parameters()), "release_outputs": True}
    ends = keepless.plan(work.model, longest, "1TB", **options)
    budget = int(ends.smallest_budget + share * (ends.baseline_peak - ends.smallest_budget))
    return budget, keepless.plan(work.model, first, budget, **options)


def start(scale: Scale, contender: str, plan: keepless.Plan, background: bool = True) -> Run:
    """A contender before its first step."""
    work = workload(scale)
    if contender == "checkpoint":
        work.checkpoint_blocks()
    if contender == "keepless":
        keepless.apply(work.model, plan, background=background)
    return Run(contender, work.model, torch.optim.AdamW(work.model.parameters()))


def bench(
    table: Table,
    scale: Scale,
    seed: int,
    share: float,
    tell: Callable[[str], None],
    save: Callable[[], None] = lambda: None,
) -> None:
    """Both passes; rows go to the table, which is saved after each."""
    steps = batches(scale, seed)
    lengths = [batch["input_ids"].shape[1] for batch in steps]
    longest = steps[lengths.index(max(lengths))]
    tell("planning")
    budget, plan = budget_of(scale, steps[0], longest, share)
    add = table.add
    add(NAME, "plain", "steps", "count", scale.steps)
    add(NAME, "plain", "distinct_lengths", "count", len(set(lengths)))
    add(NAME, "plain", "length", "count", lengths)
    add(NAME, "keepless", "budget", "bytes", budget)

    runs = {contender: start(scale, contender, plan) for contender in CONTENDERS}
    for contender, run in runs.items():
        tell(f"peaks of {contender}")
        peaks = []
        for number, batch in enumerate(steps):
            if contender == "keepless" or (number and batch["input_ids"].shape == longest["input_ids"].shape):
                peaks.append(run.peak(number, batch))
            else:
                run.step(number, batch)
        add(NAME, contender, "highest_peak", "bytes", max(peaks))
        add(NAME, contender, "measured_steps", "count", len(peaks))
        add(NAME, contender, "measured_steps_above_budget", "count", sum(peak > budget for peak in peaks))
    for contender, run in runs.items():
        add(NAME, contender, "equal_losses", "count", run.losses == runs["plain"].losses)
    parameters = {contender: list(run.model.parameters()) for contender, run in runs.items()}
    for contender in CONTENDERS:
        pairs = zip(parameters[contender], parameters["plain"], strict=True)
        add(NAME, contender, "equal_state", "count", all(torch.equal(p, q) for p, q in pairs))
    _counts(table, runs["keepless"].counters, "")
    save()

    runs = {contender: start(scale, contender, plan) for contender in CONTENDERS}
    seconds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    missed: list[int] = []
    rng = random.Random(seed)
    for number, batch in enumerate(steps):
        tell(f"time of step {number + 1}")
        before = runs["keepless"].counters.captures
        for contender in rng.sample(CONTENDERS, len(CONTENDERS)):
            begin = time.perf_counter()
            runs[contender].step(number, batch)
            seconds[contender].append(time.perf_counter() - begin)
        if not number or runs["keepless"].counters.captures > before:
            missed.append(number)
    plain = [s for number, s in enumerate(seconds["plain"]) if number not in missed]
    for contender, samples in seconds.items():
        add(NAME, contender, "training", "s", sum(samples))
        mine = [s for number, s in enumerate(samples) if number not in missed]
        add(NAME, contender, "step", "s", mine)
        add(NAME, contender, "step_over_plain", "ratio", [a / b for a, b in zip(mine, plain, strict=True)])
        add(NAME, contender, "training_without_captures_over_plain", "ratio", sum(mine) / sum(plain))
    later = [number for number in missed if number]
    if later:
        add(NAME, "keepless", "capture_and_step", "s", [seconds["keepless"][number] for number in later])
    _counts(table, runs["keepless"].counters, "timed_")
    save()


def _counts(table: Table, counters: Counters, prefix: str) -> None:
    for name in ("captures", "specialised", "transfers", "solved", "evicted", "hits"):
        table.add(NAME, "keepless", prefix + name, "count", getattr(counters, name))


def main() -> None:
    """Runs the benchmark and writes its rows."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.lengths", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model, 24 steps; results go to out/")
    parser.add_argument("--share", type=float, default=0.4, help="where the budget is between least and everything")
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: as torch chooses")
    parser.add_argument("--seed", type=int, default=0, help="of the order of texts and of timed steps")
    parser.add_argument("--out", type=Path, help="folder of lengths.csv; default: benchmarks/results")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    out: Path = args.out or (Path("out") if args.quick else RESULTS)
    console, table, path = Console(width=120), Table("cpu", args.seed), out / "lengths.csv"
    with console.status("starting") as status:
        bench(table, QUICK if args.quick else Scale(), args.seed, args.share, status.update, lambda: table.write(path))
    for row in table.rows:
        console.print(
            f"{row.contender:12s} {row.metric:40s} {row.value:>14.6g} {row.unit:6s} {row.p20:.4g} {row.p80:.4g}"
        )


if __name__ == "__main__":
    main()
