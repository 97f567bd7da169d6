"""The peaks of the kinds of steps that a loop has: the first one, the steady one, and one that accumulates::

    for kind, step in predicted_steps(plan).items():
        print(kind, step.peak, step.where)

A plan counts optimizer state from the step's start on, since it must hold for every step. The first one has none
until `optimizer.step()` makes it; a step after `zero_grad()` begins without gradients, one that accumulates with all of
them, and then adds each new one and frees it. The program is the same; the levels differ by what stands. Where the
optimizer steps in the backward, the first step makes the state of a parameter at its update, taken to be in proportion
to its bytes, and no gradient outlives the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from keepless.ir import DEVICE, Drop, Kind, Phase, Run
from keepless.machine import Plan
from keepless.reporting.account import DELIVER, EXISTING, UPDATE, category, op_at, where_at

FIRST, STEADY, ACCUMULATING = "first", "steady", "accumulating"
KINDS = (FIRST, STEADY, ACCUMULATING)


@dataclass(frozen=True)
class StepPrediction:
    """The predicted peak of one kind of step.

    Arguments:
        kind: "first", "steady" or "accumulating".
        peak: bytes on the device.
        index: the first instruction that reaches it.
        where: its op, module and source line.
        phase: of its op.
        is_planned: the plan is for such steps. An accumulating step under a plan that is not gets a plan of its own
            when it comes, within the same budget: `peak` is what it would need by this program.
    """

    kind: str
    peak: int
    index: int
    where: str
    phase: str
    is_planned: bool

    def as_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {
            "kind": self.kind,
            "peak": self.peak,
            "instruction": self.index,
            "where": self.where,
            "phase": self.phase,
            "is_planned": self.is_planned,
        }


def predicted_steps(plan: Plan) -> dict[str, StepPrediction]:
    """The three kinds of steps, by name. O(edges of the program).

    Of plans of blocks and of module calls that accumulate, single gradients are not known: a step that begins without
    any is taken to have all of them from the loss on.
    """
    levels = _levels(plan)
    accumulates = _accumulates(plan)
    found: dict[str, StepPrediction] = {}
    for kind in KINDS:
        rows = levels[kind]
        index = max(range(len(rows)), key=lambda i: (rows[i], -i), default=-1)
        op = op_at(plan, index)
        found[kind] = StepPrediction(
            kind,
            rows[index] if rows else plan.predicted_peak,
            index,
            where_at(plan, index),
            op.phase.value if op else "",
            kind != ACCUMULATING or accumulates,
        )
    return found


def _accumulates(plan: Plan) -> bool:
    return any(plan.graph.values[v].name == EXISTING for v in plan.graph.inputs)


def _levels(plan: Plan) -> dict[str, list[int]]:
    """Highest bytes at each instruction, by kind of step."""
    graph = plan.graph
    state = sum(graph.values[v].nbytes for v in graph.inputs if category(graph.values[v]) == "optimizer state")
    missing = min(state, _number(plan.signature, "missing_state_nbytes", state))
    handed = _handed_over(plan)
    accumulates = _accumulates(plan)
    total = sum(graph.values[v].nbytes for v in graph.inputs if graph.values[v].name == EXISTING)
    if accumulates and sum(graph.values[v].nbytes for v in handed) != total:
        handed = {}  # captured blocks hand over gradients of what passes between them, too
    total = total or sum(graph.values[v].nbytes for v in handed)
    levels: dict[str, list[int]] = {kind: [] for kind in KINDS}
    is_after_loss = False
    trained = _updated_nbytes(plan)
    updated = 0
    given = there = 0  # bytes of gradients that were handed over, and of those that the program has not dropped
    handed_at: dict[int, int] = {}
    for value, at in handed.items():
        handed_at[at] = handed_at.get(at, 0) + graph.values[value].nbytes
    for index, (instr, event) in enumerate(zip(plan.program, plan.predicted.events, strict=True)):
        peak, op = event.peak, op_at(plan, index)
        is_after_loss = is_after_loss or (op is not None and op.phase is Phase.LOSS)
        if not accumulates:
            fresh, standing = peak, peak + total - there
        elif handed or not is_after_loss:
            fresh, standing = peak - total + given - there, peak
        else:
            fresh, standing = peak, peak
        if op is not None and op.name == UPDATE:
            updated += sum(graph.values[v].nbytes for v in op.inputs if graph.values[v].kind is Kind.PARAM)
        made = missing * updated // trained if trained else 0
        first, steady = fresh - missing + made, fresh
        if op is not None and op.phase is Phase.OPTIMIZER:
            scratch = plan.cost.scratch[op.id]
            steady = fresh - scratch + _number(plan.signature, "steady_scratch_nbytes", scratch)
            first = fresh - scratch + _number(plan.signature, "first_scratch_nbytes", scratch)
            standing += steady - fresh
        levels[FIRST].append(first)
        levels[STEADY].append(steady)
        levels[ACCUMULATING].append(standing)
        given += handed_at.get(index, 0)
        there += handed_at.get(index, 0)
        if isinstance(instr, Drop) and instr.tier == DEVICE and handed.get(instr.value, index) < index:
            there -= graph.values[instr.value].nbytes
    return levels


def _updated_nbytes(plan: Plan) -> int:
    """Bytes of the parameters that are updated in the backward."""
    values = plan.graph.values
    updates = [op for op in plan.graph.ops if op.name == UPDATE]
    return sum(values[v].nbytes for op in updates for v in op.inputs if values[v].kind is Kind.PARAM)


def _handed_over(plan: Plan) -> dict[int, int]:
    """Gradients that outlive the step, and the instruction after which they are the caller's."""
    graph = plan.graph
    at: dict[int, int] = {}
    gradients = {
        value.id for value in graph.values if value.kind is Kind.GRAD and value.name.startswith("grad.")
    } - graph.inputs
    delivered = {value for op in graph.ops if op.name in (DELIVER, UPDATE) for value in op.inputs}
    for index, instr in enumerate(plan.program):
        if not isinstance(instr, Run):
            continue
        op = graph.ops[instr.op]
        if op.name == DELIVER:
            at.update(dict.fromkeys(op.inputs, index))
        elif not delivered:
            at.update({value: index for value in instr.keep if value in gradients and value not in at})
    return at if _accumulates(plan) else {value: index for value, index in at.items() if value in graph.pinned}


def _number(signature: Mapping[str, object], name: str, default: int) -> int:
    found = signature.get(name)
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else default
