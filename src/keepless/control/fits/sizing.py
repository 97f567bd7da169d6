"""What a step of a given size needs: captured, its ops run alone for their scratch bytes, its smallest peak found.

No training step is run. Seconds are measured for those sizes only that a plan is made for.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from keepless.capture import FlatInputs, Inputs, flatten_inputs
from keepless.capture.varying import other_call
from keepless.control.allocating import allocation_of
from keepless.control.captured import Capture, Captures, Measured, Settings
from keepless.control.fits.result import SizeTried
from keepless.control.options import Progress
from keepless.control.planning import (
    capture_call,
    measure_step,
    measuring,
    plan_of,
    settings_of_plan,
    solve_measured,
)
from keepless.control.positions import Beyond, read_beyond
from keepless.control.reserve import budget_with_reserve, explain_infeasible, with_reserve
from keepless.control.room import room_for_trials, split_by_room
from keepless.control.signature import batch_signature, model_signature
from keepless.control.trials import cost_model, measure_costs, measure_loss, op_trials, untouched
from keepless.cost import CostModel, Origin
from keepless.errors import BatchError, CaptureError, DataDependentError, InfeasibleBudget, KeeplessError, SizeError
from keepless.ir import Graph, Kind, format_bytes
from keepless.machine import Plan
from keepless.measure import OpCost, measure_scratch
from keepless.passes import evaluate, from_order, reuse_storage
from keepless.solve import Solution, floor_bound, replan, smallest
from keepless.solve.planner import proxy_cost
from keepless.solve.sizes import Need

_NEAR = 1.02
"""Times the budget: sizes whose smallest one is beyond are not asked about again."""
_BYTES_PER_S = 1e10
"""Stands for seconds where only bytes matter: the smallest peak does not depend on it."""


@dataclass(frozen=True)
class Subject:
    """The step of one size.

    Arguments:
        settings: with the budget, and the footprint of this model's optimizer.
    """

    model: torch.nn.Module
    batch: Any
    settings: Settings


@dataclass(frozen=True)
class _Step:
    """One size, captured.

    Arguments:
        measured: with measured scratch bytes where `is_measured`, and seconds that stand for others.
        low: its program of the smallest peak.
    """

    measured: Measured
    flat: FlatInputs
    is_measured: bool
    low: Solution

    @property
    def capture(self) -> Capture:
        return self.measured.capture

    @property
    def graph(self) -> Graph:
        return self.measured.graph

    @property
    def cost(self) -> CostModel:
        return self.measured.cost


class Sizing:
    """The sizes that were looked at.

    Arguments:
        axis: "batch", "length" or "depth".
        subject: the step of a size; raises what the caller's code raises.
        budget: bytes.
        scratch: scratch bytes of ops by key that are known already; what is measured is added.
    """

    def __init__(
        self,
        axis: str,
        subject: Callable[[int], Subject],
        budget: int,
        progress: Progress | None,
        scratch: dict[str, int] | None = None,
    ) -> None:
        self.axis = axis
        self.budget = budget
        self.rows: dict[int, SizeTried] = {}
        self._subject = subject
        self._steps: dict[int, _Step] = {}
        self._plans: dict[int, Plan] = {}
        self._untimed: dict[int, Plan] = {}
        self._scratch: dict[str, int] = {} if scratch is None else scratch
        self._tell = progress or (lambda stage, done, total: None)

    @property
    def tried(self) -> tuple[SizeTried, ...]:
        """Every size that was looked at, ascending."""
        return tuple(self.rows[size] for size in sorted(self.rows))

    def look(self, size: int) -> Need:
        """Whether there is a plan for a size, and the smallest budget for which there is.

        Raises:
            CaptureError: the model cannot be captured at any size so far.
            SizeError: what makes the batch or the model fails, or makes what it made for another size.
        """
        row = self.rows.get(size)
        hint = None
        if row is None:
            self._tell("sizes", len(self.rows), len(self.rows) + 1)
            row, hint = self._row(size)
            self.rows[size] = row
            self._tell("sizes", len(self.rows), len(self.rows) + 1)
        return Need(row.fits, row.smallest_budget, hint)

    def flat(self, size: int) -> FlatInputs | None:
        """The call of a size that was captured."""
        step = self._steps.get(size)
        return None if step is None else step.flat

    def fixed(self, size: int) -> int:
        """Bytes of a size's step that stay for all of it and are no part of the batch."""
        graph = self._steps[size].graph
        standing = graph.inputs & graph.pinned
        return sum(value.nbytes for value in graph.values if value.id in standing and value.kind is not Kind.INPUT)

    def kept_size(self, high: int) -> int:
        """About the size, up to `high`, at which everything can be kept, by the line through those looked at."""
        known = sorted((size, row.baseline_budget) for size, row in self.rows.items() if row.baseline_budget)
        if len(known) < 2:
            return 0
        sizes, needs = zip(*known, strict=True)
        return int(np.interp(self.budget, needs, sizes)) if needs[0] <= self.budget else 0

    def is_found(self, size: int) -> bool:
        """Whether the planner, asked for a budget below the smallest one that it states, meets a plan all the same.

        It is asked at the seconds that it goes back to where measured ones lead to no plan: `plan` meets it, too.
        """
        step = self._steps.get(size)
        needed = self.rows[size].smallest_budget
        if step is None or not step.is_measured or needed is None or needed > self.budget * _NEAR:
            return False
        if floor_bound(step.graph, step.cost)[0] > budget_with_reserve(self.budget).device:
            return False
        try:
            measured = replace(step.measured, cost=proxy_cost(step.graph, step.cost))
            self._untimed[size] = solve_measured(measured, step.capture.settings)
        except InfeasibleBudget:
            return False
        self.rows[size] = replace(self.rows[size], fits=True, reason="")
        return True

    def plan(self, size: int) -> Plan:
        """The plan for a size that was looked at, its seconds measured.

        Raises:
            InfeasibleBudget: there is none.
        """
        if size in self._plans:
            return self._plans[size]
        step = self._steps[size]
        settings = step.capture.settings
        cost = step.cost if settings.on is not None else self._timed(size, step.capture)
        self._tell("solve", 0, 1)
        try:
            plan = self._solved(size, replace(step.measured, cost=cost), settings)
        except InfeasibleBudget as error:
            self.refuse(size, str(error))
            raise
        self._tell("solve", 1, 1)
        if step.measured.is_here:
            plan.capture = Captures(replace(step.capture, settings=settings_of_plan(settings, plan)))
        self._plans[size] = plan
        self.rows[size] = replace(
            self.rows[size], fits=True, reason="", seconds=plan.predicted_seconds, overhead=plan.overhead
        )
        return plan

    def _solved(self, size: int, measured: Measured, settings: Settings) -> Plan:
        """The solver's plan; where it finds none with measured seconds, the one that it found without them."""
        known = self._untimed.get(size)
        if known is None or settings.card is not None:
            return solve_measured(measured, settings)
        budget, timeline = budget_with_reserve(settings.budget), replace(known.predicted, events=())
        graph, cost = measured.graph, measured.cost
        _, found = replan(graph, cost, known.program, timeline, budget, settings.solver, settings.seed)
        return plan_of(measured, found, budget)

    def refuse(self, size: int, reason: str) -> None:
        """Notes that a size that fits the memory does not do all the same."""
        self.rows[size] = replace(self.rows[size], fits=False, reason=reason)

    def infeasible(self, size: int) -> InfeasibleBudget:
        """The error that not even this size fits."""
        step = self._steps[size]
        bound = floor_bound(step.graph, step.cost)[0]
        error = explain_infeasible(step.graph, step.cost, self.budget, step.low.program, step.low.peak, bound)
        if step.capture.settings.card is not None:
            try:
                solve_measured(step.measured, step.capture.settings)
            except InfeasibleBudget as reserved:  # what the card has to give is more than the bytes of tensors
                error = reserved
        return InfeasibleBudget(
            f"Not even {self.axis} {size} fits. {error}",
            smallest_budget=error.smallest_budget,
            bound=error.bound,
            blocking=error.blocking,
        )

    # ---- one size

    def _row(self, size: int) -> tuple[SizeTried, int | None]:
        subject = self._made(size)
        flat = flatten_inputs(Inputs.of(subject.batch))
        self._check_other(size, subject, flat)
        try:
            step: _Step | Beyond = self._step(subject, flat)
        except CaptureError as error:
            if not self._steps or isinstance(error, DataDependentError):
                raise
            return SizeTried(size, False, reason=str(error)), None
        if isinstance(step, Beyond):
            if not self._steps:
                raise BatchError(f"The model has too few positions for {self.axis} {size}: {step}.")
            # The hint is a size only where the axis is the length; elsewhere it is as good as another guess.
            return SizeTried(size, False, reason=f"the model has too few positions: {step}"), step.rows
        self._steps[size] = step
        needed, kept = self._budgets(step)
        fits = needed <= self.budget
        at_least = "" if step.is_measured else "more than "
        reason = "" if fits else f"{self.axis} {size} needs {at_least}{format_bytes(needed)}"
        return SizeTried(size, fits, needed, step.is_measured, kept, reason=reason), None

    def _budgets(self, step: _Step) -> tuple[int, int]:
        """The smallest budget, and the one in which everything can be kept; on a card those of reserved bytes."""
        graph, cost, card = step.graph, step.cost, step.capture.settings.card
        if card is None:
            return with_reserve(step.low.peak), with_reserve(evaluate(graph, cost, range(len(graph.ops))).peak)
        everything = reuse_storage(graph, from_order(graph, range(len(graph.ops))))
        low, kept = (allocation_of(graph, program, cost, card) for program in (step.low.program, everything))
        return with_reserve(low.reserved), with_reserve(kept.reserved)

    def _step(self, subject: Subject, flat: FlatInputs) -> _Step | Beyond:
        settings = subject.settings
        if settings.on is not None:
            measured = measure_step(subject.model, subject.batch, settings, are_positions_checked=False)
            beyond = read_beyond(measured.capture.binding)
            low = smallest(measured.graph, measured.cost)
            return beyond or _Step(measured, flat.without_tensors(), True, low)
        with untouched(subject.model):
            capture, given = capture_call(subject.model, flat, subject.batch, settings, None)
            binding = capture.binding
            beyond = read_beyond(binding)
            if beyond is not None:
                return beyond
            cost = self._cost(capture, {}, None)
            is_measured = floor_bound(binding.graph, cost)[0] <= budget_with_reserve(self.budget).device
            if is_measured:
                room = room_for_trials(subject.model, flat.tensors, self.budget, binding.device)
                cost, is_measured = self._with_scratch(subject, capture, room)
        signature = {**model_signature(subject.model), **batch_signature(flat), **given}
        low = smallest(binding.graph, cost)
        return _Step(Measured(capture, cost, signature), flat.without_tensors(), is_measured, low)

    def _with_scratch(self, subject: Subject, capture: Capture, room: int) -> tuple[CostModel, bool]:
        """Costs with scratch bytes, and whether there was room to run every op."""
        binding, settings = capture.binding, subject.settings
        trials = op_trials(binding, subject.model)
        cache = settings.cache
        known = cache.load(binding.device, [trial.key for trial in trials]) if cache is not None else {}
        self._scratch |= {key: cost.scratch for key, cost in known.items()}
        fitting, others = split_by_room([trial for trial in trials if trial.key not in self._scratch], room)
        with measuring():
            self._scratch |= measure_scratch(fitting, device=binding.device)
        loss = None
        if settings.loss_fn is not None:
            loss = measure_loss(binding, settings.loss_fn, subject.batch, room)
        is_measured = not others and (loss is None or loss.n > 0)
        return self._cost(capture, self._scratch, loss), is_measured

    def _cost(self, capture: Capture, scratch: dict[str, int], loss: OpCost | None) -> CostModel:
        binding, settings = capture.binding, capture.settings
        values = binding.graph.values
        costs = {
            op.key: OpCost(
                sum(values[v].nbytes for v in (*op.inputs, *op.outputs)) / _BYTES_PER_S, scratch.get(op.key, 0), 0.0, 0
            )
            for op in binding.graph.ops
        }
        cost = cost_model(binding, costs, optimizer=settings.optimizer, loss=loss, accumulate=settings.accumulate)
        return replace(cost, origin=Origin.LEARNED)

    def _timed(self, size: int, capture: Capture) -> CostModel:
        """Costs with seconds."""
        binding, settings, loss = capture.binding, capture.settings, None
        subject = self._made(size)
        tensors = flatten_inputs(Inputs.of(subject.batch)).tensors
        room = room_for_trials(subject.model, tensors, self.budget, binding.device)
        with untouched(subject.model):
            with measuring():
                costs = measure_costs(
                    binding,
                    settings.cache,
                    lambda done, total: self._tell("measure", done, total),
                    model=subject.model,
                    room=room,
                )
            if settings.loss_fn is not None:
                loss = measure_loss(binding, settings.loss_fn, subject.batch, room)
        return cost_model(binding, costs, optimizer=settings.optimizer, loss=loss, accumulate=settings.accumulate)

    # ---- what the caller makes

    def _made(self, size: int) -> Subject:
        with _same_randomness():
            try:
                return self._subject(size)
            except KeeplessError:
                raise
            except Exception as error:  # of any kind: it is the caller's code
                raise SizeError(
                    f"What is to make {self.axis} {size} fails: {type(error).__name__}: {error}. Give high= where it "
                    "can make no more."
                ) from error

    def _check_other(self, size: int, subject: Subject, flat: FlatInputs) -> None:
        """Refuses a size whose step is that of another size."""
        for other, step in self._steps.items():
            known = step.capture.model() if step.capture.model is not None else None
            if self.axis == "depth":
                if known is not subject.model and _shapes(step) != sorted(p.shape for p in subject.model.parameters()):
                    continue
                what = "make_model makes models of the same parameters"
            else:
                if other_call(step.flat, flat) or step.flat.facts != flat.facts:
                    continue
                what = "make_batch makes batches of the same shapes"
            raise SizeError(
                f"{what} for {self.axis} {other} and {size}: nothing can be said of sizes. Make it depend on its "
                f"argument, or give high= where it can make no more than {min(size, other)}."
            )


def _shapes(step: _Step) -> list[torch.Size]:
    binding = step.capture.binding
    return sorted(binding.examples[slot].shape for slot in binding.params.values())


@contextlib.contextmanager
def _same_randomness() -> Iterator[None]:
    """The random generators of torch, Python and NumPy are as before afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    own, theirs = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(theirs)
