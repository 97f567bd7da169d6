"""The plan: a verified program with its budget, its predicted timeline, and what is claimed about it.

It is what `keepless.plan` gives, what engines run, and what a user keeps in a file. A tiny worked use::

    plan = make_plan(graph, program, cost, Budget({"device": 1 << 30}), certificate, baseline=Baseline(peak, seconds))
    plan.overhead            # 0.05: five percent slower than with everything kept
    plan.save("gpt2.plan")   # load_plan("gpt2.plan") gives it back, verified and simulated again
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from keepless.cost import CostModel
from keepless.ir.budget import Budget, format_bytes
from keepless.ir.certificate import Certificate
from keepless.ir.graph import HOLD, Graph, Phase
from keepless.ir.program import DEVICE, Program, Run
from keepless.ir.timeline import Timeline
from keepless.machine.allocation import Allocation
from keepless.machine.elsewhere import describe_elsewhere, device_of
from keepless.machine.landed import Landing
from keepless.machine.parts import Part, describe_parts, parts_of
from keepless.machine.rewrites import describe_rewrites, read_rewrites
from keepless.machine.rules import Machine
from keepless.machine.simulate import simulate


@dataclass(frozen=True, slots=True)
class Baseline:
    """The predicted step with everything kept: highest bytes on the device, and seconds."""

    peak: int
    seconds: float


@dataclass
class Plan:
    """A verified program and what is known about it. Make one with `make_plan`.

    Arguments:
        graph: the step.
        program: what to run; it keeps rules R1 to R7 under the budget.
        cost: what the prediction rests on.
        budget: bytes per tier.
        predicted: the timeline that the cost model predicts.
        certificate: what the solver claims.
        baseline: the predicted step with everything kept.
        signature: facts about the model, batch, device and versions that the plan was made for; JSON values only.
        smallest_budget: bytes of the smallest device budget for which a plan was found.
        smallest_bound: bytes that every plan needs at least (proven).
        measured_peak: highest bytes of a measured step, None until there is one.
        landing: the rounds of `keepless.land`, in order; empty before it.
        capture: the engine's side of the plan while the process lives; opaque here, never saved.
    """

    graph: Graph
    program: Program
    cost: CostModel
    budget: Budget
    predicted: Timeline
    certificate: Certificate
    baseline: Baseline
    signature: dict[str, object] = field(default_factory=dict)
    smallest_budget: int = 0
    smallest_bound: int = 0
    measured_peak: int | None = None
    landing: tuple[Landing, ...] = ()
    capture: object | None = field(default=None, repr=False, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """A copy that shares what was captured: tensors without data stand in it, which torch cannot copy."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        copied = {name: value if name == "capture" else deepcopy(value, memo) for name, value in values.items()}
        return type(self)(**copied)

    @property
    def predicted_peak(self) -> int:
        """Highest bytes on the device."""
        return self.predicted.peak

    @property
    def predicted_seconds(self) -> float:
        """Length of the step."""
        return self.predicted.seconds

    @property
    def baseline_peak(self) -> int:
        """Highest bytes on the device with everything kept."""
        return self.baseline.peak

    @property
    def baseline_seconds(self) -> float:
        """Length of the step with everything kept."""
        return self.baseline.seconds

    @property
    def overhead(self) -> float:
        """How much longer the step is than with everything kept: 0.05 is five percent. 0 if the costs are all 0."""
        return self.predicted_seconds / self.baseline_seconds - 1 if self.baseline_seconds else 0.0

    @property
    def num_replays(self) -> int:
        """Runs of ops beyond the first, those apart that only hold what they read."""
        ops = self.graph.ops
        runs = (instr for instr in self.program if isinstance(instr, Run) and instr.replay)
        return sum(ops[run.op].name != HOLD for run in runs)

    @cached_property
    def kept_nbytes(self) -> int:
        """Bytes that the forward leaves on the device for the backward: resident before the LOSS op, beyond those
        that are there before the step. The outputs that the caller reads are among them. 0 without a LOSS op.
        """
        machine = Machine(self.graph)
        for instr in self.program:
            if isinstance(instr, Run) and self.graph.ops[instr.op].phase is Phase.LOSS:
                there_before = sum(self.graph.values[v].nbytes for v in self.graph.inputs if machine.is_resident(v))
                return machine.resident[DEVICE] - there_before
            machine.step(instr)
        return 0

    @cached_property
    def recomputed_nbytes(self) -> int:
        """Bytes that replays make again and keep."""
        runs = [instr for instr in self.program if isinstance(instr, Run) and instr.replay]
        return sum(self.graph.values[value].nbytes for run in runs for value in run.keep)

    @property
    def engine(self) -> str:
        """What runs it: "graph", "blocks" or "eager"."""
        return str(self.signature.get("engine", "graph"))

    @property
    def rewrites(self) -> tuple[str, ...]:
        """Names of the rewrites that it was planned with.

        Raises:
            RewriteError: a file names one that is unknown here.
        """
        return read_rewrites(self.signature.get("rewrites"))

    @property
    def on(self) -> str:
        """The device that it was planned for without being there; "" where ops were measured."""
        return device_of(self.signature)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Which engine runs which part of the model, and why."""
        return parts_of(self.signature)

    @property
    def allocation(self) -> Allocation | None:
        """What CUDA's caching allocator takes for the step by its model; None for a plan that was made for no card.

        Raises:
            PlanError: the plan's file holds something else there.
        """
        facts = self.signature.get("allocation")
        return Allocation.from_dict(facts) if isinstance(facts, dict) else None

    def __str__(self) -> str:
        limit = self.budget.limits[DEVICE]
        fits = max(self.predicted_peak, self.measured_peak or 0) <= limit
        measured = f", measured {format_bytes(self.measured_peak)}" if self.measured_peak else ""
        claim = self.certificate
        gap = ""
        if claim.bound_seconds > 0 and self.predicted_seconds:
            slower = max(0.0, self.predicted_seconds / claim.bound_seconds - 1)
            gap = f"; at most {slower:.1%} slower than any plan of its kind"
        return "\n".join(
            [
                f"{'Fits' if fits else 'DOES NOT FIT'} the budget of {format_bytes(limit)}: predicted peak "
                f"{format_bytes(self.predicted_peak)}{measured}; everything kept needs "
                f"{format_bytes(self.baseline_peak)}",
                f"step {self.predicted_seconds:.4g} s predicted, {self.overhead:+.1%} over "
                f"{self.baseline_seconds:.4g} s with everything kept",
                f"{self._size()}, {self.num_replays} replays: {format_bytes(self.kept_nbytes)} kept for the "
                f"backward, {format_bytes(self.recomputed_nbytes)} made again",
                f"smallest budget found {format_bytes(self.smallest_budget)}; no plan needs less than "
                f"{format_bytes(self.smallest_bound)}",
                f"solver {claim.solver}, {claim.status.value}, {claim.solve_seconds:.2f} s{gap}",
                *map(str, self.landing),
                *([] if self.allocation is None else [str(self.allocation)]),
                *describe_rewrites(self.rewrites),
                *describe_parts(self.signature),
                *self._doubts(),
            ]
        )

    def _size(self) -> str:
        regions, again = self.signature.get("regions"), self.signature.get("recomputed")
        if isinstance(regions, list) and isinstance(again, list):
            return f"eager engine, {len(again)} of {len(regions)} module calls recomputed"
        segments = self.signature.get("segments")
        if isinstance(segments, list):
            return f"block engine, {len(segments)} captured module calls, {len(self.graph.ops)} ops"
        return f"{len(self.graph.ops)} ops"

    def _doubts(self) -> list[str]:
        share = self.cost.disturbed
        elsewhere = describe_elsewhere(self.signature, self.cost.spread)
        if share < 0.05:
            return elsewhere
        return [
            *elsewhere,
            f"other processes had the cores while ops were timed: {share:.0%} of the step's seconds are too long, and "
            "the plan may not be the fastest; plan again when the machine is idle (bytes do not depend on it)",
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file, all of it or nothing.

        Raises:
            PlanError: the signature is not made of JSON values.
            OSError: the file cannot be written.
        """
        from keepless.machine.planfile import dump_plan  # planfile reads plans: it imports this module

        dump_plan(self, path)


def make_plan(
    graph: Graph,
    program: Program,
    cost: CostModel,
    budget: Budget,
    certificate: Certificate,
    *,
    baseline: Baseline,
    signature: Mapping[str, object] | None = None,
    smallest_budget: int = 0,
    smallest_bound: int = 0,
    measured_peak: int | None = None,
    landing: tuple[Landing, ...] = (),
) -> Plan:
    """Verify a program under a budget, predict its timeline, and make the plan.

    Raises:
        ProgramError: the program breaks a rule, or does not fit the budget.
    """
    return Plan(
        graph=graph,
        program=program,
        cost=cost,
        budget=budget,
        predicted=simulate(graph, program, cost, budget=budget),
        certificate=certificate,
        baseline=baseline,
        signature=dict(signature or {}),
        smallest_budget=smallest_budget,
        smallest_bound=smallest_bound,
        measured_peak=measured_peak,
        landing=landing,
    )
