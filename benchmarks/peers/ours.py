"""Keepless' plans for a subject, and the way that they are put into its model and taken out again.

The step is captured and measured once per model and solved for each budget: what `keepless.plan` does, without
capturing again. Engines "blocks" and "eager" plan as a whole for each budget.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import keepless
from benchmarks.peers.models import Subject
from benchmarks.peers.ways import Way
from keepless.control.captured import Captures, Measured, Settings
from keepless.control.options import StepOptions
from keepless.control.parts.module_steps import standing_plan
from keepless.control.planning import measure_step, read_settings, solve_measured
from keepless.errors import InfeasibleBudget

PLENTY = 1 << 40
MOST_RAISED = 1.25
"""A smallest budget that turns out too small is raised to what the error asks for, up to so many times itself."""


def name_of_plan(engine: str, budget: int) -> str:
    """What a plan is called in rows."""
    return f"{engine}, all kept" if budget == PLENTY else f"{engine} {budget / 2**20:.2f} MiB"


class Planned(Way):
    """The model runs by a plan."""

    def __init__(self, subject: Subject, plan: keepless.Plan) -> None:
        super().__init__(subject)
        keepless.apply(subject.model, plan, background=False)
        standing = standing_plan(subject.model)
        assert standing is not None
        self.standing = standing
        standing.take_out()

    def put_in(self) -> None:
        """The plan stands in the model."""
        self.standing.put_in()

    def take_out(self) -> None:
        """It does not."""
        self.standing.take_out()


@dataclass
class Planner:
    """Plans of one subject.

    Arguments:
        optimizer: of the steps that are planned.
        seconds: of planning: "capture" and "measure" of the graph engine, once; and of each plan by its name.
    """

    subject: Subject
    optimizer: torch.optim.Optimizer
    seed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    _measured: Measured | None = None
    _settings: Settings | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Of `keepless.plan`."""
        _, targets = self.subject.workload.batch(0)
        loss = self.subject.workload.loss
        loss_fn = None if loss is None else (lambda output, _: loss(output, targets))
        return {"optimizer": self.optimizer, "release_outputs": True, "loss_fn": loss_fn, "seed": self.seed}

    def plan(self, engine: str, budget: int, *, of_reserved: bool = True) -> tuple[str, keepless.Plan]:
        """A plan and its name.

        Arguments:
            of_reserved: on a card the budget bounds reserved bytes, as it does for users; else allocated ones. Of the
                graph engine alone.

        Raises:
            KeeplessError: there is none.
        """
        if engine == "graph" and self._measured is None:
            self._measured, self._settings = self._measure()
        start = time.perf_counter()
        plan = self._graph(budget, of_reserved) if engine == "graph" else self._whole(engine, budget)
        name = name_of_plan(engine, budget)
        self.seconds[name] = time.perf_counter() - start
        return name, plan

    def smallest(self, engine: str, budget: int) -> tuple[str, keepless.Plan]:
        """The plan for a smallest budget, or for the one that it turns out to be."""
        stated = budget
        while True:
            try:
                return self.plan(engine, budget)
            except InfeasibleBudget as error:
                if not budget < error.smallest_budget < MOST_RAISED * stated:
                    raise
                budget = error.smallest_budget

    def _whole(self, engine: str, budget: int) -> keepless.Plan:
        inputs, _ = self.subject.workload.batch(0)
        return keepless.plan(self.subject.model, inputs, budget, engine=engine, **self.options)

    def _graph(self, budget: int, of_reserved: bool) -> keepless.Plan:
        assert self._measured is not None
        assert self._settings is not None
        settings = replace(self._settings, budget=budget, card=self._settings.card if of_reserved else None)
        plan = solve_measured(self._measured, settings)
        plan.capture = Captures(replace(self._measured.capture, settings=settings))
        return plan

    def _measure(self) -> tuple[Measured, Settings]:
        inputs, _ = self.subject.workload.batch(0)
        marks: dict[str, float] = {}

        def tell(stage: str, done: int, total: int) -> None:
            marks.setdefault(stage, time.perf_counter())

        options = self.options
        optimizer = options.pop("optimizer")
        settings = read_settings(self.subject.model, PLENTY, optimizer, StepOptions(**options))
        kept = os.environ.get("KEEPLESS_CACHE_DIR")
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="keepless-peers-") as folder:
            os.environ["KEEPLESS_CACHE_DIR"] = folder
            try:
                measured = measure_step(self.subject.model, inputs, settings, tell)
            finally:
                if kept is None:
                    del os.environ["KEEPLESS_CACHE_DIR"]
                else:
                    os.environ["KEEPLESS_CACHE_DIR"] = kept
        end = time.perf_counter()
        middle = marks.get("measure", end)
        self.seconds |= {"capture": middle - start, "measure": end - middle}
        return measured, settings
