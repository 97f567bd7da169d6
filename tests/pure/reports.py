"""Plans and measurements that tests of reports share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from keepless.cost import CostModel
from keepless.ir import Budget, Certificate, Graph, Program, Status, Timeline
from keepless.machine import Baseline, Plan, load_plan, make_plan, simulate
from keepless.passes import evaluate
from keepless.reporting.page import ReportData, curve_data, report_data
from keepless.solve.curve import trace_curve

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def plan_of(graph: Graph, program: Program, cost: CostModel) -> Plan:
    """A plan whose budget is its peak."""
    limits = dict(simulate(graph, program, cost).peaks)
    everything = evaluate(graph, cost, range(len(graph.ops)))
    baseline = Baseline(everything.peak, everything.seconds)
    claim = Certificate("test", Status.FEASIBLE)
    return make_plan(graph, program, cost, Budget({"device": 1} | limits), claim, baseline=baseline)


@cache
def example() -> Plan:
    """A plan of a transformer, as a user has one in a file."""
    return load_plan(EXAMPLES / "unfused.plan")


def measured_of(plan: Plan, *, slower: float = 1.1, more: int = 1000) -> Timeline:
    """A timeline as `keepless.timeline` gives it, whose every instruction is slower and higher."""
    ops = plan.graph.ops
    phases = [ops[i.op].phase.value if hasattr(i, "op") else "" for i in plan.program]
    events = [
        replace(event, start=event.start * slower, end=event.end * slower, peak=event.peak + more)
        for event in plan.predicted.events
        if phases[event.index] != "optimizer"
    ]
    return Timeline(tuple(events), {"device": max(event.peak for event in events)}, "measured")


@dataclass(frozen=True)
class Checked:
    """As `keepless.Verification`."""

    equal: bool = True
    reference: str = "plain eager"
    noise: float = 0.0
    differences: tuple[str, ...] = ()
    measured_peak: int = 0
    tolerance: float = 0.0
    deviation: float | None = None


class Grid:
    """As `keepless.FitsGrid`, four cells of it."""

    def as_dict(self) -> dict[str, object]:
        """Its JSON values."""
        states = {(1, 64): "kept", (2, 64): "fits", (1, 128): "fits", (2, 128): "too large"}
        cells = [
            {
                "batch": batch,
                "length": length,
                "state": state,
                "smallest_budget": None if state == "kept" else batch * length << 16,
                "baseline_budget": batch * length << 17,
                "reason": "",
            }
            for (batch, length), state in states.items()
        ]
        return {"budget": 84 << 20, "batches": [1, 2], "lengths": [64, 128], "cells": cells}


class Sizes:
    """As `keepless.Fits`."""

    def as_dict(self) -> dict[str, object]:
        """Its JSON values."""
        row = {"size": 8, "fits": True, "smallest_budget": 5 << 20, "is_measured": True, "baseline_budget": 9 << 20}
        tried = [
            row | {"seconds": 0.3, "overhead": 0.07, "reason": ""},
            row | {"size": 9, "fits": False, "seconds": None, "overhead": None, "reason": "batch 9 needs 95.00 MiB"},
        ]
        return {"axis": "batch", "size": 8, "budget": 84 << 20, "reason": "memory ends it", "tried": tried}


@cache
def whole_report(most: int = 1500) -> ReportData:
    """A report with every part, and at most so many levels and values."""
    plan = example()
    curve = trace_curve(plan.graph, plan.cost, points=4)
    return report_data(
        plan,
        measured=measured_of(plan),
        checked=Checked(measured_peak=plan.predicted_peak + 1000),
        curve=curve_data(curve, plan, lambda peak: peak + (1 << 16)),
        fits=[Grid(), Sizes()],
        most_levels=most,
        most_values=most,
    )
