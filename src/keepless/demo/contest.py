"""The contest: measure, plan, measure, race, compare. What is printed and drawn is left to others."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from keepless import api
from keepless.control import planned_forward
from keepless.demo.contenders import BUDGET, CHECKPOINT, CONTENDERS, KEPT, PLAIN, TIGHT, Contender
from keepless.demo.task import Task, batches, build_model, hash_parameters, quiet_transformers
from keepless.errors import InfeasibleBudget
from keepless.files import temporary_folder
from keepless.machine import Plan
from keepless.measure import PeakMeasurement, measure_peak

METERED_STEPS = 3
FILES = {KEPT: "everything-kept.plan", BUDGET: "step.plan", TIGHT: "checkpoint-peak.plan"}
MIN_ROUNDS, MAX_RACE_SECONDS = 3, 90.0
MAX_PREDICTION_ERROR = 0.02
"""A prediction that is further off is a broken promise."""

Tell = Callable[[str, float, float], None]
"""Called with (stage, share done, seconds that the stage is thought to take)."""

SECONDS = {"peak": 15.0, "plan": 25.0, "race": 45.0}
"""About, on 2 cores; for the display only."""


@dataclass(frozen=True)
class Row:
    """One contender's figures.

    Arguments:
        peak: measured bytes over all metered steps, the first included.
        budget: bytes; 0 where there is none.
        predicted_peak: bytes; 0 where nothing is predicted.
        seconds: median of the step's times.
        ratio: median over the rounds of its time over plain eager's in the same round.
        replays: runs of ops beyond the first, per step.
        equal: losses of every step and final parameters are bitwise those of plain eager, in the race and in the
            meter's processes.
        parameters: SHA-256 of the final parameters after the race.
        losses: of every step of the race.
    """

    name: str
    peak: int
    budget: int
    predicted_peak: int
    seconds: float
    ratio: float
    replays: int
    equal: bool
    parameters: str
    losses: tuple[float, ...]

    @property
    def prediction_error(self) -> float:
        """Predicted over measured, less one; 0 where nothing is predicted."""
        return self.predicted_peak / self.peak - 1 if self.predicted_peak and self.peak else 0.0


@dataclass(frozen=True)
class Outcome:
    """The contest's result.

    Arguments:
        broken: promises that were not kept, in words; empty if all were.
        plan: under which the budgeted contender trained.
        plan_path: its file.
    """

    task: Task
    rows: tuple[Row, ...]
    broken: tuple[str, ...]
    plan: Plan
    plan_path: str

    def row(self, name: str) -> Row:
        """The row of a contender."""
        return next(row for row in self.rows if row.name == name)

    def as_dict(self) -> dict[str, Any]:
        """JSON values only."""
        rows = [asdict(row) | {"prediction_error": row.prediction_error} for row in self.rows]
        facts = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        return {
            "task": asdict(self.task),
            "rows": rows,
            "reference": PLAIN,
            "broken_promises": list(self.broken),
            "plan_file": self.plan_path,
            **facts,
        }


def contest(task: Task, out: Path, *, share: float = 0.45, rounds: int = 6, tell: Tell | None = None) -> Outcome:
    """Trains the task four ways and compares them.

    Arguments:
        out: folder for the plan files.
        share: the budget, as a share of plain eager's measured peak.
        rounds: timed steps of each contender, after one that warms up.
        tell: progress.
    """
    tell = tell or (lambda stage, done, seconds: None)
    out.mkdir(parents=True, exist_ok=True)
    peaks = {name: _peak(name, task, "", tell) for name in (PLAIN, CHECKPOINT)}
    plans = _plans(task, int(share * peaks[PLAIN].peak), peaks[CHECKPOINT].peak, tell)
    paths = {name: str(out / FILES[name]) for name in plans}
    for name, plan in plans.items():
        plan.save(paths[name])
        peaks[name] = _peak(name, task, paths[name], tell)
    contenders = _race(task, plans, rounds, tell)
    for name, plan in plans.items():
        plan.measured_peak = peaks[name].peak
        plan.save(paths[name])
    rows = tuple(_row(contenders, name, peaks, plans.get(name)) for name in contenders)
    broken = tuple(_broken(rows, contenders, plans))
    return Outcome(task, rows, broken, plans[BUDGET], paths[BUDGET])


def _peak(name: str, task: Task, plan_path: str, tell: Tell) -> PeakMeasurement:
    stage = f"peak of {name}"
    tell(stage, 0.0, SECONDS["peak"])
    arguments = {"name": name, "task": asdict(task), "plan_path": plan_path, "steps": METERED_STEPS}
    found = measure_peak("keepless.demo.contenders:metered", arguments, steps=METERED_STEPS)
    tell(stage, 1.0, SECONDS["peak"])
    return found


def _plans(task: Task, budget: int, tight: int, tell: Tell) -> dict[str, Plan]:
    """The plans, from costs that are measured now: earlier ones may come from a busier machine."""
    spans = {"capture": (0.0, 0.1), "measure": (0.1, 0.7), "solve": (0.7, 0.8)}

    def told(stage: str, done: int, total: int) -> None:
        begin, end = spans[stage]
        tell("plan", begin + (end - begin) * done / max(1, total), SECONDS["plan"])

    model = build_model(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate)
    batch = batches(task, 1)[0]
    with quiet_transformers(), _fresh_costs():
        planned = api.plan(model, batch, budget, optimizer=optimizer, release_outputs=True, progress=told)
        kept = api.plan(model, batch, "1TiB", optimizer=optimizer, release_outputs=True, solver="keep_all")
        plans = {KEPT: kept, BUDGET: planned}
        with contextlib.suppress(InfeasibleBudget):
            plans[TIGHT] = api.plan(model, batch, tight, optimizer=optimizer, release_outputs=True)
    tell("plan", 1.0, SECONDS["plan"])
    return plans


@contextlib.contextmanager
def _fresh_costs() -> Iterator[None]:
    before = os.environ.get("KEEPLESS_CACHE_DIR")
    with temporary_folder("demo") as folder:
        os.environ["KEEPLESS_CACHE_DIR"] = str(folder)
        try:
            yield
        finally:
            del os.environ["KEEPLESS_CACHE_DIR"]
            if before is not None:
                os.environ["KEEPLESS_CACHE_DIR"] = before


def _race(task: Task, plans: dict[str, Plan], rounds: int, tell: Tell) -> dict[str, Contender]:
    """Every contender takes one step in turn; the first round warms up. The one that begins changes every round.

    On a machine that is busy with other things, rounds are cut short after three and MAX_RACE_SECONDS.
    """
    begun = time.monotonic()
    tell("race", 0.0, SECONDS["race"])
    names = [name for name in CONTENDERS if name in (PLAIN, CHECKPOINT) or name in plans]
    contenders = [Contender(name, task, plans.get(name)) for name in names]
    total = (rounds + 1) * len(contenders)
    done = 0
    with quiet_transformers():
        for number, batch in enumerate(batches(task, rounds + 1)):
            if number > MIN_ROUNDS and time.monotonic() - begun > MAX_RACE_SECONDS:
                break
            first = number % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                contender.step(batch)
                done += 1
                tell("race", done / (total + 1), SECONDS["race"])
    tell("race", 1.0, SECONDS["race"])
    return {contender.name: contender for contender in contenders}


def _row(contenders: dict[str, Contender], name: str, peaks: dict[str, PeakMeasurement], plan: Plan | None) -> Row:
    own, plain = contenders[name], contenders[PLAIN]
    parameters = hash_parameters(own.model)
    metered, reference = peaks[name].result, peaks[PLAIN].result
    both = min(METERED_STEPS, len(plain.losses))
    ratios = [a / b for a, b in zip(own.seconds[1:], plain.seconds[1:], strict=True)]
    return Row(
        name=name,
        peak=peaks[name].peak,
        budget=plan.budget.limits["device"] if plan is not None and name != KEPT else 0,
        predicted_peak=plan.predicted_peak if plan is not None else 0,
        seconds=statistics.median(own.seconds[1:]),
        ratio=statistics.median(ratios),
        replays=plan.num_replays if plan is not None else 0,
        equal=own.losses == plain.losses
        and parameters == hash_parameters(plain.model)
        and metered["losses"] == reference["losses"]
        and metered["losses"][:both] == plain.losses[:both]
        and metered["parameters"] == reference["parameters"],
        parameters=parameters,
        losses=tuple(float.fromhex(loss) for loss in own.losses),
    )


def _broken(rows: tuple[Row, ...], contenders: dict[str, Contender], plans: dict[str, Plan]) -> Iterator[str]:
    for row in rows:
        if row.budget and row.peak > row.budget:
            yield f"{row.name}: the measured peak of {row.peak} bytes is above the budget of {row.budget} bytes"
        if abs(row.prediction_error) > MAX_PREDICTION_ERROR:
            yield f"{row.name}: the predicted peak is {row.prediction_error:+.1%} off"
        if not row.equal:
            yield f"{row.name}: losses or parameters differ from {PLAIN}"
    for name in plans:
        planned = planned_forward(contenders[name].model)
        steps = len(contenders[name].losses)
        if planned is None or planned.counters.steps != steps or planned.counters.unplanned_calls:
            yield f"{name}: not every step ran under the plan"
    if not plans[BUDGET].num_replays:
        yield f"{BUDGET}: nothing was recomputed, so that nothing was shown"
