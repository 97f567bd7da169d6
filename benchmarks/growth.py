"""How much deeper, wider, longer or larger a batch trains in the memory where plain just fits; and how costs grow.

    python -m benchmarks.growth                                   # everything that has no rows yet: make bench-growth
    python -m benchmarks.growth --parts depth batch --models gpt2
    python -m benchmarks.growth --parts cost-depth                # seconds: alone on the machine, please
    python -m benchmarks.growth --quick                           # a small model: does it work? under 2 minutes

The budget of a subject is what the deciding meter measures of plain's steps at the base size. Sizes are found on steps
that really train: two whole steps, the optimizer's included, in a fresh process; a size fits where neither rises above
the budget.

- plain: the base, by definition; the next size up is trained, too, to see that it does not fit.
- checkpoint: torch.utils.checkpoint on every block; the largest size that fits beside the next one, which does not.
- keepless: `keepless.max_batch`, `max_length` and `max_depth` foretell a size (`predicted_size`); steps under the plan
  for it are trained. For the next size up the planner says what it needs at least (`next_smallest`): steps at that are
  trained, too, and where they stay within the budget all the same the search goes on (`size_beyond`).
- keepless, optimizer in backward: the same with `rewrites=("optimizer_in_backward",)`, which the others could have had
  in their ways: gradients do not stand.

The parts "cost-..." are `benchmarks.growth_cost`: planning, predicted overhead and seconds over layers, length, batch.
Rows are in benchmarks/results/growth.csv; what has rows there is not done again (`--again` does).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import keepless
from benchmarks import growth_cost, growth_figures
from benchmarks.common import RESULTS, Row, Table, read_rows, write_rows
from benchmarks.growth_figures import BACKWARD, CHECKPOINT, KEEPLESS, PLAIN
from benchmarks.growth_steps import BASES, QUICK, Subject
from keepless import Fits, InfeasibleBudget, Plan
from keepless.machine import OPTIMIZER_IN_BACKWARD
from keepless.measure import PeakMeasurement, measure_peak
from keepless.reporting.floor import find_floor
from keepless.solve.sizes import Need, largest

METERED_STEPS = 2
"""The first, and one in which the optimizer's state is there from the start."""
MOST_MORE = 1.1
"""A smallest budget that turns out too small is raised to what the error asks for, up to so many times itself."""
TIMEOUT = 1800.0
"""Seconds for the steps of one size."""
PARTS = ("depth", "width", "length", "batch", "image", "volume")


def subjects(quick: bool) -> list[Subject]:
    """What is grown: every axis with AdamW, and depth with SGD, too, as static bytes decide there."""
    bases = {"gpt2": QUICK["gpt2"]} if quick else BASES
    found = [
        Subject(model, base.sizes, axis, step, optimizer)
        for model, base in bases.items()
        for axis, step in base.axes.items()
        for optimizer in (("adamw", "sgd") if axis == "depth" else ("adamw",))
    ]
    return [one for one in found if one.axis == "batch"] if quick else found


@dataclass
class Growth:
    """One subject's contenders.

    Arguments:
        folder: of plan files.
        seed: of plans.
    """

    subject: Subject
    table: Table
    folder: Path
    seed: int
    budget: int = 0
    trained: dict[tuple[str, int, str], PeakMeasurement] = field(default_factory=dict)

    def run(self) -> None:
        """All of them."""
        subject, add = self.subject, self._add
        base = self._train(PLAIN, subject.base)
        self.budget = base.peak
        static = subject.static(subject.base)
        add(PLAIN, "budget", "bytes", self.budget)
        add(PLAIN, "static", "bytes", static)
        add(PLAIN, "static_share", "ratio", static / self.budget)
        for contender, gradients in ((PLAIN, True), (BACKWARD, False)):
            ceiling = subject.ceiling(self.budget, gradients=gradients)
            if ceiling is not None:
                add(contender, "ceiling", "count", ceiling)
                add(contender, "ceiling_factor", "ratio", ceiling / subject.base)
        above = self._train(PLAIN, subject.base + subject.step)
        add(PLAIN, "next_peak", "bytes", above.peak)
        self._found(PLAIN, subject.base, base)
        self.by_steps(CHECKPOINT)
        self.by_plans(KEEPLESS, ())
        self.by_plans(BACKWARD, (OPTIMIZER_IN_BACKWARD,))

    def by_steps(self, contender: str) -> None:
        """The largest size of a contender that is not planned, found on trained steps alone."""
        subject = self.subject

        def look(size: int) -> Need:
            peak = self._train(contender, size).peak
            return Need(peak <= self.budget, peak)

        fixed = 0 if subject.is_of_model else subject.static(subject.base)
        low = subject.base if look(subject.base).fits else subject.step
        found = largest(look, self.budget, low, subject.most, subject.step, fixed)
        if found.size is None:
            return  # not even the smallest: no row says what trains
        if found.above is not None:
            self._add(contender, "next_peak", "bytes", look(found.above).value or 0.0)
        self._found(contender, found.size, self._train(contender, found.size))

    def by_plans(self, contender: str, rewrites: tuple[str, ...]) -> None:
        """The largest size that is foretold, and what trains really."""
        subject, add = self.subject, self._add
        fits = self.fits(rewrites)
        add(contender, "predicted_size", "count", fits.size)
        add(contender, "predicted_factor", "ratio", fits.size / subject.base)
        add(contender, "predicted_peak", "bytes", fits.plan.predicted_peak)
        add(contender, "overhead", "ratio", fits.plan.overhead)
        add(contender, "sizes_looked_at", "count", len(fits.tried))
        size, plan = fits.size, fits.plan
        measured = self._train(contender, size, plan)
        add(contender, "predicted_size_peak", "bytes", measured.peak)
        while measured.peak > self.budget and size > subject.base:  # a bug: the figures are to show it
            size -= subject.step
            plan = self._plan(size, self.budget, rewrites)
            measured = self._train(contender, size, plan)
        add(contender, "inputs", "bytes", sum(t.nbytes for t in _tensors(subject.build(size).batch(0)[0])))
        self._found(contender, size, measured)
        if size == fits.size and fits.next_size is not None:
            beyond = self._beyond(contender, size, fits.next_smallest_budget, rewrites)
            add(contender, "size_beyond", "count", beyond)

    def fits(self, rewrites: tuple[str, ...]) -> Fits:
        """What Keepless foretells, from sizes no smaller than the base."""
        subject = self.subject
        limits = {"low": subject.base, "high": subject.most, "multiple_of": subject.step}
        if subject.is_of_model:
            return keepless.max_depth(
                lambda size: subject.build(size).model,
                subject.build(subject.base).batch(0)[0],
                self.budget,
                make_optimizer=subject.make_optimizer,
                release_outputs=True,
                seed=self.seed,
                rewrites=rewrites,
                **limits,
            )
        workload = subject.build(subject.base)
        find = keepless.max_length if subject.axis == "length" else keepless.max_batch
        return find(
            workload.model,
            lambda size: subject.build(size).batch(0)[0],
            self.budget,
            optimizer=subject.make_optimizer(list(workload.model.parameters())),
            release_outputs=True,
            seed=self.seed,
            rewrites=rewrites,
            **limits,
        )

    def _beyond(self, contender: str, size: int, smallest: int | None, rewrites: tuple[str, ...]) -> int:
        """The largest size at which steps at the smallest budget, which is above this one, are measured within it."""
        subject = self.subject
        while smallest is not None:
            above = size + subject.step
            try:
                plan = self._plan(above, max(smallest, self.budget), rewrites)
            except InfeasibleBudget as error:
                if not smallest < error.smallest_budget < MOST_MORE * smallest:
                    return size
                smallest = error.smallest_budget
                continue
            measured = self._train(contender, above, plan)
            if measured.peak > self.budget:
                floor = find_floor(plan.graph, plan.cost, plan.program)
                held = sum(value.nbytes for value in floor.held)
                self._add(contender, f"{growth_figures.FLOOR_IN} {floor.op.name}", "bytes", floor.peak)
                self._add(contender, "floor_static", "bytes", floor.static)
                self._add(contender, "floor_held", "bytes", held)
                self._add(contender, "floor_scratch", "bytes", floor.scratch)
                self._add(contender, "next_smallest", "bytes", plan.smallest_budget)
                self._add(contender, "next_bound", "bytes", plan.smallest_bound)
                self._add(contender, "next_peak", "bytes", measured.peak)
                return size
            size, smallest = above, plan.smallest_budget
            smallest = self._smallest(size + subject.step, rewrites)
        return size

    def _smallest(self, size: int, rewrites: tuple[str, ...]) -> int | None:
        """The smallest budget of a size; None beyond the last one."""
        if self.subject.most is not None and size > self.subject.most:
            return None
        try:
            return self._plan(size, self.budget, rewrites).smallest_budget
        except InfeasibleBudget as error:
            return error.smallest_budget

    def _plan(self, size: int, budget: int, rewrites: tuple[str, ...]) -> Plan:
        """A plan for a size."""
        workload = self.subject.build(size)
        optimizer = self.subject.make_optimizer(list(workload.model.parameters()))
        options = {"optimizer": optimizer, "release_outputs": True, "seed": self.seed, "rewrites": rewrites}
        return workload.plan(budget, **options)

    def _train(self, contender: str, size: int, plan: Plan | None = None) -> PeakMeasurement:
        """Steps of a size in a fresh process, once for each program."""
        subject = self.subject
        key = (contender, size, "" if plan is None else str(plan.budget))
        if key in self.trained:
            return self.trained[key]
        arguments = {"model": subject.model, "sizes": subject.at(size), "optimizer": subject.optimizer}
        if plan is None:
            arguments["contender"] = contender
        else:
            arguments["plan_path"] = str(self.folder / f"{len(self.trained)}.plan")
            plan.save(arguments["plan_path"])
        measured = measure_peak("benchmarks.growth_steps:target", arguments, steps=METERED_STEPS, timeout=TIMEOUT)
        if measured.result["unplanned"]:
            raise RuntimeError(f"{subject.name} at {size}: a step ran unplanned")
        self.trained[key] = measured
        return measured

    def _found(self, contender: str, size: int, measured: PeakMeasurement) -> None:
        subject, add = self.subject, self._add
        add(contender, "size", "count", size)
        add(contender, "factor", "ratio", size / subject.base)
        add(contender, "peak", "bytes", measured.peak)
        add(contender, "static_of_size", "bytes", subject.static(size, gradients=contender != BACKWARD))
        add(contender, "metered_step", "s", measured.seconds[-1])

    def _add(self, contender: str, metric: str, unit: str, value: float) -> None:
        self.table.add(self.subject.name, contender, metric, unit, value)


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def grown(subject: Subject, seed: int, threads: int) -> list[Row]:
    """The rows of one subject; runs in a process of its own."""
    torch.set_num_threads(threads)
    table = Table("cpu", seed)
    with tempfile.TemporaryDirectory(prefix="keepless-growth-") as folder:
        Growth(subject, table, Path(folder), seed).run()
    return table.rows


class Rows:
    """A file of rows, with those of one name replaced as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path)

    @property
    def names(self) -> set[str]:
        """What has rows."""
        return {row.model for row in self.rows}

    def put(self, rows: list[Row]) -> None:
        """Writes them."""
        names = {row.model for row in rows}
        self.rows = [*(row for row in self.rows if row.model not in names), *rows]
        write_rows(self.path, self.rows)


@contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one's work, also where it is interrupted."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = [*PARTS, *growth_cost.PARTS]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="default: all")
    parser.add_argument("--models", nargs="+", choices=list(BASES), default=list(BASES), help="of what grows")
    parser.add_argument("--quick", action="store_true", help="a small model, few sizes; rows go to out/")
    parser.add_argument("--again", action="store_true", help="do what has rows, too")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="subjects at a time, a thread each; costs are alone"
    )
    parser.add_argument("--threads", type=int, default=0, help="of torch where costs are measured")
    parser.add_argument("--seed", type=int, default=0, help="of plans")
    parser.add_argument("--out", type=Path, help="folder of growth.csv; default: benchmarks/results")
    return parser.parse_args()


def main() -> None:
    """Does what is missing; rows are on disk as soon as a subject, or a point of the costs, is done."""
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    out: Path = args.out or (Path("out") if args.quick else RESULTS)
    rows = Rows(out / "growth.csv")
    known = set() if args.again else rows.names
    grows = [one for one in subjects(args.quick) if one.axis in args.parts and one.model in args.models]
    points = [one for one in growth_cost.points(args.quick) if one.part in args.parts]
    missing = [one for one in grows if one.name not in known]
    unpriced = [one for one in points if one.name not in known]
    console = Console() if Console().is_terminal else Console(width=120)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    failed = 0
    with tempfile.TemporaryDirectory(prefix="keepless-growth-") as folder, Progress(*columns, console=console) as bar:
        os.environ["KEEPLESS_CACHE_DIR"] = folder
        task = bar.add_task("what grows", total=len(missing) + len(unpriced))
        if missing:
            with _workers(max(1, args.jobs)) as pool:
                jobs: dict[Future[list[Row]], Subject] = {pool.submit(grown, one, args.seed, 1): one for one in missing}
                for job in as_completed(jobs):
                    try:
                        rows.put(job.result())
                        console.print(growth_figures.line(rows.rows, jobs[job].name), markup=False, soft_wrap=True)
                    except Exception as error:  # the others go on
                        failed += 1
                        console.print(f"{jobs[job].name}: {type(error).__name__}: {error}", markup=False)
                    bar.advance(task)
        for point in unpriced:
            bar.update(task, description=point.name)
            table = Table("cpu", args.seed)
            try:
                growth_cost.run(table, point)
                rows.put(table.rows)
                console.print(growth_figures.cost_line(rows.rows, point.name), markup=False, soft_wrap=True)
            except Exception as error:  # the others go on
                failed += 1
                console.print(f"{point.name}: {type(error).__name__}: {error}", markup=False)
            bar.advance(task)
    console.print(growth_figures.tables(rows.rows), markup=False)
    console.print(f"rows: {rows.path}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
