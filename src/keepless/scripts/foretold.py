"""What is foretold of a script's steps: of a planned call, and others of its model before the same backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keepless.control.parts.module_steps import tensors_of
from keepless.control.trials import held_nbytes
from keepless.ir import DEVICE, Kind
from keepless.machine import CHUNKED_LOSS, Plan
from keepless.reporting.account import phase_instructions
from keepless.scripts.deferred import Deferred


@dataclass(frozen=True)
class Foretold:
    """What is foretold of a script's steps.

    Arguments:
        step_peak: highest bytes of the optimizer's step, where it updates more than the model's; else 0.
        peak: highest bytes of several calls, one beside what the others keep; of one call its plan's.
        more: bytes by which plans of other kinds of calls foretell less than stands beside several of them.
    """

    plan: Plan
    step_peak: int
    peak: int
    more: int


def foretell(
    plan: Plan, call: Deferred, others: int, loss_nbytes: int, later: int, more: int, step_peak: int
) -> tuple[Foretold, int]:
    """What is foretold of a plan, and the bytes that have to be left by it.

    In the last call's forward the outputs of the step before may stand, and what the other calls keep; in its backward
    the gradients of the others' outputs. Gradients of parameters may stand in both: of another backward before the
    step, or where they are reset late.

    Arguments:
        others: calls beside the planned one.
        loss_nbytes: of the gradients of one call's outputs.
        later: bytes by which plans of other kinds of calls may need more.
        more: bytes that the plan leaves already, which are in its peak; negative where its budget is larger by them.
        step_peak: of the optimizer's step, see `Foretold`.
    """
    held = plan.kept_nbytes + held_nbytes(plan.graph, call.device)  # from a call's end to its backward
    kept, returned = others * held, (others + 1) * _returned_nbytes(plan, call)
    forward = peak_in(plan, "forward") + returned + kept
    beside = kept + others * loss_nbytes
    needed = max(forward + later - plan.budget.limits[DEVICE], beside + later)
    if not others and not later:
        return Foretold(plan, step_peak, plan.predicted_peak, 0), needed
    backward = max(peak_in(plan, "loss"), peak_in(plan, "backward"))
    first = beside - held - loss_nbytes + later if others else 0  # beside the call whose backward comes next
    peak = max(forward, backward + max(beside, first), peak_in(plan, "optimizer")) - max(more, 0)
    return Foretold(plan, step_peak, peak, beside + later - max(more, 0)), needed


def more_of_later_kinds(own: Sequence[Deferred]) -> tuple[int, int]:
    """Bytes by which a later call of the same step may need more than the first: gradients that stand already; and
    those of its inputs, where some call's have any.
    """
    params = sum(param.nbytes for param in own[0].module.parameters() if param.requires_grad)
    given = [[tensor for tensor in tensors_of(call.inputs) if tensor.requires_grad] for call in own]
    return params, max(sum(tensor.nbytes for tensor in some) for some in given)


def peak_in(plan: Plan, phase: str) -> int:
    """Predicted highest bytes in a phase: in the forward the script may still hold the outputs of the step before, and
    the optimizer may step parameters of others, too."""
    first, last = phase_instructions(plan).get(phase, (0, -1))
    return max((event.peak for event in plan.predicted.events[first : last + 1]), default=0)


def _returned_nbytes(plan: Plan, call: Deferred) -> int:
    """Bytes that a planned call returns, of what needs a gradient: logits of a chunked loss are none of it."""
    if CHUNKED_LOSS not in plan.rewrites:
        return call.output_nbytes
    return sum(value.nbytes for value in plan.graph.values if value.kind is Kind.OUTPUT)
