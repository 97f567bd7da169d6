"""The curve of a model's step: captured and measured once, a plan for every budget."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from keepless.control.allocating import allocation_of, within_card
from keepless.control.captured import Captures, Measured, Settings
from keepless.control.checks import check_module
from keepless.control.loss_state import loss_untouched
from keepless.control.options import Progress, StepOptions
from keepless.control.planning import (
    measure_step,
    plan_of,
    read_budget,
    read_settings,
    settings_of_plan,
)
from keepless.control.reserve import budget_with_reserve, explain_infeasible, with_reserve
from keepless.control.takeover import note, turned_off
from keepless.errors import InfeasibleBudget
from keepless.ir import Budget, Status
from keepless.machine import Plan
from keepless.machine.elsewhere import ON, describe_elsewhere
from keepless.measure.card import CardAllocator
from keepless.passes import from_order, reuse_storage
from keepless.reporting.curve_picture import draw_curve
from keepless.reporting.curve_table import curve_text
from keepless.reporting.floor import describe_floor, find_floor
from keepless.reporting.page.curve import curve_data
from keepless.reporting.page.data import CurveData
from keepless.solve import Search, Standing
from keepless.solve.curve import Curve, check_points, trace_curve
from keepless.solve.front import Point
from keepless.solve.solution import Solution
from keepless.solve.strategies import check_strategies


@dataclass(frozen=True, slots=True)
class BudgetPoint:
    """One plan of a step's curve.

    Arguments:
        budget: the smallest one that has this plan, in bytes, the reserve for the allocator included.
        peak: highest bytes on the device, predicted.
        seconds: of the step, predicted.
        overhead: over the step with everything kept: 0.05 is five percent.
        bound_seconds: no plan of the planner's kind within this peak is faster.
        num_replays: runs of ops beyond the first.
    """

    budget: int
    peak: int
    seconds: float
    overhead: float
    bound_seconds: float
    num_replays: int


@dataclass(frozen=True)
class StepCurve:
    """The step's time for every budget. `print` shows it as a table.

    Arguments:
        curve: peaks, seconds, bounds and strategies, without reserve.
        measured: the step that it is of.
        settings: what was asked for beside model and batch.
    """

    curve: Curve
    measured: Measured = field(repr=False)
    settings: Settings = field(repr=False)

    @cached_property
    def points(self) -> tuple[BudgetPoint, ...]:
        """The plans, ascending in budget, falling in seconds."""
        return tuple(map(self._budget_point, self.curve.points))

    @property
    def knee(self) -> BudgetPoint:
        """The point beyond which more memory buys little; see `keepless.solve.curve.Curve.knee`."""
        return self._budget_point(self.curve.knee)

    @property
    def smallest_budget(self) -> int:
        """Bytes of the smallest budget for which a plan was found."""
        return self._budget_of(self.curve.smallest_nbytes)

    @property
    def smallest_bound(self) -> int:
        """Bytes that every plan needs at least (proven)."""
        return self.curve.floor_nbytes

    @property
    def baseline_peak(self) -> int:
        """Bytes of the budget in which everything can be kept."""
        return self._budget_of(self.curve.baseline_peak)

    @property
    def baseline_seconds(self) -> float:
        """Length of the step with everything kept, predicted."""
        return self.curve.baseline_seconds

    @cached_property
    def floor(self) -> str:
        """What the smallest peak is made of, in words."""
        graph = self.measured.graph
        return describe_floor(graph, find_floor(graph, self.measured.cost, self.curve.points[0].solution.program))

    def plan(self, budget: str | int | float) -> Plan:
        """The fastest plan met within a budget; nothing is captured, measured or solved again.

        Between two points `keepless.plan` may find a faster one, for the budget itself.

        Raises:
            BudgetError: the budget cannot be read.
            InfeasibleBudget: no plan was met; carries the smallest budget and the op that sets the floor.
        """
        nbytes = read_budget(budget, self.measured.capture.binding.device, self.settings.on)
        graph, curve = self.measured.graph, self.curve

        def make(over: int) -> Plan:
            allowed = budget_with_reserve(nbytes, over)
            try:
                found = curve.at(allowed.device)
            except InfeasibleBudget as error:
                lowest, peak = curve.points[0].solution.program, curve.smallest_nbytes
                raise explain_infeasible(graph, self.measured.cost, nbytes, lowest, peak, error.bound) from None
            return plan_of(self.measured, found if card is None else self._fitting(found, nbytes, card), allowed)

        card = self.settings.card
        plan = make(0) if card is None else within_card(make, lambda: self._lowest(nbytes), nbytes, card)
        if not self.measured.is_here:
            return plan
        settings = settings_of_plan(replace(self.settings, budget=nbytes), plan)
        plan.capture = Captures(replace(self.measured.capture, settings=settings))
        return plan

    def draw(self, path: str | os.PathLike[str], *, budget: str | int | float | None = None, title: str = "") -> None:
        """Draws the curve into a file; its name's end says the format (png, svg, pdf).

        Arguments:
            budget: shown as a vertical line.
            title: above the picture; a default says where the knee is.

        Raises:
            ImportError: matplotlib is not installed.
            OSError: the file cannot be written.
        """
        line = None if budget is None else read_budget(budget, self.measured.capture.binding.device, self.settings.on)
        draw_curve(self.curve, path, budget_of=self._budget_of, budget=line, title=title)

    def as_dict(self) -> dict[str, object]:
        """Everything but the plans themselves, as JSON values."""
        return self.curve.as_dict(self._budget_of) | {
            "smallest_bound": self.smallest_bound,
            "floor_in_words": self.floor,
            "num_ops": len(self.measured.graph.ops),
            "costs_disturbed": self.measured.cost.disturbed,
            "costs_origin": self.measured.cost.origin.value,
            "costs_spread": self.measured.cost.spread,
            "on": self.measured.signature.get(ON),
        }

    def as_report(self, plan: Plan) -> CurveData:
        """What a report of a plan of this step shows of the curve."""
        return curve_data(self.curve, plan, self._budget_of)

    def __str__(self) -> str:
        doubts = describe_elsewhere(self.measured.signature, self.measured.cost.spread)
        return "\n".join([curve_text(self.curve, self._budget_of), self.floor, *doubts])

    @cached_property
    def _reserved(self) -> list[int]:
        """For a card: what its allocator holds for each point's program, in bytes, by its model."""
        card = self.settings.card
        assert card is not None
        programs = [point.solution.program for point in self.curve.points]
        return [allocation_of(self.measured.graph, program, self.measured.cost, card).reserved for program in programs]

    @cached_property
    def _budgets(self) -> tuple[list[int], list[int]]:
        """For a card: peaks, and for each the smallest budget of a plan that is no slower than this peak's."""
        card, graph, cost = self.settings.card, self.measured.graph, self.measured.cost
        assert card is not None
        everything = reuse_storage(graph, from_order(graph, range(len(graph.ops))))
        kept = with_reserve(allocation_of(graph, everything, cost, card).reserved)
        found: dict[int, int] = {}
        for point, reserved in zip(reversed(self.curve.points), reversed(self._reserved), strict=True):
            found[point.peak] = min([with_reserve(reserved), *found.values()])
        top = max(found.values())
        if self.curve.baseline_peak > max(found):
            found[self.curve.baseline_peak] = max(kept, top)
        return sorted(found), sorted(found.values())

    def _budget_of(self, peak: int) -> int:
        """The smallest budget for a peak; between those of the points, on a card, in proportion."""
        if self.settings.card is None:
            return with_reserve(peak)
        peaks, budgets = self._budgets
        index = bisect_left(peaks, peak)
        if index == len(peaks):
            return budgets[-1] + with_reserve(peak) - with_reserve(peaks[-1])
        if peaks[index] == peak or not index:
            return budgets[index]
        share = (peak - peaks[index - 1]) / (peaks[index] - peaks[index - 1])
        return budgets[index - 1] + round(share * (budgets[index] - budgets[index - 1]))

    def _fitting(self, found: Solution, nbytes: int, card: CardAllocator) -> Solution:
        """This solution, or where its allocation is above the budget the fastest point of which it is not."""
        if with_reserve(allocation_of(self.measured.graph, found.program, self.measured.cost, card).reserved) <= nbytes:
            return found
        for point, reserved in zip(reversed(self.curve.points), reversed(self._reserved), strict=True):
            if with_reserve(reserved) <= nbytes and point.peak <= found.peak:
                claim = replace(found.certificate, solver=point.solution.certificate.solver, status=Status.FEASIBLE)
                return replace(point.solution, certificate=claim)
        return found

    def _lowest(self, nbytes: int) -> Plan:
        """The plan of the point for which the card's allocator holds least."""
        measured, curve = self.measured, self.curve
        reserved = min(self._reserved)
        low = curve.points[self._reserved.index(reserved)].solution
        if with_reserve(low.peak) > nbytes:
            raise explain_infeasible(measured.graph, measured.cost, nbytes, low.program, reserved, curve.floor_nbytes)
        return plan_of(measured, low, Budget({"device": nbytes}, reserve=nbytes - low.peak))

    def _budget_point(self, point: Point) -> BudgetPoint:
        return BudgetPoint(
            self._budget_of(point.peak),
            point.peak,
            point.seconds,
            self.curve.overhead(point.seconds),
            point.bound_seconds,
            point.num_replays,
        )


def make_curve(
    model: torch.nn.Module,
    batch: Any,
    optimizer: torch.optim.Optimizer | None,
    options: StepOptions,
    *,
    points: int,
    strategies: Sequence[str] | None,
    progress: Progress | None,
) -> StepCurve:
    """See `keepless.curve`."""
    check_module(model)
    check_points(points)
    check_strategies(strategies)
    seed, takeover = options.seed, options.takeover
    settings = read_settings(model, 0, optimizer, options)
    with turned_off(model, takeover), loss_untouched(options.loss_fn, model):
        measured = measure_step(model, batch, settings, progress)
    note(measured.signature, takeover)
    search = Search()
    if progress is not None:
        tell = progress

        def heard(standing: Standing) -> None:
            tell("solve", standing.work, points)

        tell("solve", 0, points)
        search.tell = heard
    curve = trace_curve(measured.graph, measured.cost, points=points, seed=seed, search=search, strategies=strategies)
    if progress is not None:
        progress("solve", points, points)
    return StepCurve(curve, measured, settings)
