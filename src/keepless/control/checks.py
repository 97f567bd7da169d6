"""Arguments that are not what they should be, refused before any work."""

from __future__ import annotations

from dataclasses import replace

import torch

from keepless.control.elsewhere import refuse_elsewhere
from keepless.errors import MeasureError, ParameterError, PlanError
from keepless.ir import Phase, format_bytes
from keepless.machine import Plan, simulate
from keepless.measure import optimizer_footprint
from keepless.warning import warn_caller


def check_module(model: object) -> None:
    """Refuses what is not a module.

    Raises:
        ParameterError: it is something else.
    """
    if not isinstance(model, torch.nn.Module):
        raise ParameterError(f"The model is a {type(model).__name__}, not a torch.nn.Module.")


def check_plan(plan: object) -> None:
    """Refuses what is not a plan that can run: a path to one, say, or one for a device that was not there.

    Raises:
        PlanError: it is something else.
    """
    if not isinstance(plan, Plan):
        raise PlanError(
            f"The plan is a {type(plan).__name__}, not a keepless.Plan; keepless.load reads one from a file."
        )
    refuse_elsewhere(plan)


def check_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Refuses an optimizer that steps something else: its bytes would be counted as none.

    Raises:
        ParameterError: none of the model's trainable parameters is in it.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ParameterError(f"optimizer= is a {type(optimizer).__name__}, not a torch.optim.Optimizer.")
    own = {id(p) for p in model.parameters() if p.requires_grad}
    if own and not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ParameterError(
            f"The {type(optimizer).__name__} steps none of the model's trainable parameters: make it from "
            "model.parameters() of this very model."
        )


def check_planned_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module, plan: Plan) -> None:
    """Refuses an optimizer with which the planned step would be above its budget: one that needs more than the plan's,
    or any where the plan counts none. One that the plan leaves out and that is within the budget all the same is a
    warning.

    Raises:
        PlanError: its state, or the temporaries of its step, would come on top.
    """
    last = next((op.id for op in plan.graph.ops if op.phase is Phase.OPTIMIZER), None)
    planned, is_counted = plan.signature.get("state_nbytes"), plan.signature.get("has_optimizer")
    if not isinstance(planned, int) or not isinstance(is_counted, bool):
        return
    params = [p for p in model.parameters() if p.requires_grad]
    try:
        footprint = optimizer_footprint(optimizer, params, device=params[0].device.type if params else "")
    except MeasureError:
        return
    name, limit = type(optimizer).__name__, plan.budget.limits["device"]
    state = f"{format_bytes(footprint.state_nbytes)} and {format_bytes(footprint.scratch_nbytes)} of temporaries"
    peak = plan.predicted_peak + footprint.state_nbytes - planned
    if last is not None:
        scratch = list(plan.cost.scratch)
        scratch[last] = footprint.scratch_nbytes
        cost = replace(plan.cost, scratch=tuple(scratch))
        peak = simulate(plan.graph, plan.program, cost).peak + footprint.state_nbytes - planned
    elif not is_counted:
        after = plan.predicted.events[-1].resident if plan.predicted.events else 0
        peak = max(peak, after + footprint.state_nbytes + footprint.scratch_nbytes)
    if peak > limit and is_counted:
        raise PlanError(
            f"The plan counts {format_bytes(planned)} of optimizer state, and this {name} has {state}: the step would "
            f"need {format_bytes(peak)}, above the budget of {format_bytes(limit)}. Plan again with this optimizer."
        )
    if is_counted or peak <= plan.predicted_peak:
        return
    remedy = "keepless.plan(model, batch, budget, optimizer=optimizer) counts it"
    if peak > limit:
        raise PlanError(
            f"The plan counts no optimizer, and this {name} has {state}: the step would need {format_bytes(peak)}, "
            f"above the budget of {format_bytes(limit)}. {remedy}."
        )
    warn_caller(
        f"Keepless: the plan counts no optimizer: with the state of this {name}, {state}, the step needs "
        f"{format_bytes(peak)}, within the budget, but not what the plan says. {remedy}."
    )
