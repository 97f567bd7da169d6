"""Putting a plan into a model, and taking it out again."""

from __future__ import annotations

import os
from typing import TypeVar

import torch

from keepless import _compat
from keepless.capture import standing_forward
from keepless.control.checks import check_module, check_optimizer, check_plan, check_planned_optimizer
from keepless.control.parts import module_plans, module_steps
from keepless.control.plan_book.book import Book
from keepless.control.plan_book.recapturing import capture_of
from keepless.control.rescue.calls import CallSurvival
from keepless.control.rescue.optimizer import OptimizerGuard
from keepless.control.rescue.survival import SURVIVE, Survival, check_black_box, check_on_oom
from keepless.control.signature import check_signature, model_signature
from keepless.control.takeover import check_checkpointing, give_back, is_allowed, take
from keepless.errors import ArenaError, RewriteError
from keepless.execute import PlannedForward, Updater, make_entry
from keepless.execute.arena import make_arena
from keepless.execute.entry import with_arena
from keepless.machine import OPTIMIZER_IN_BACKWARD, Plan
from keepless.measure import innermost

M = TypeVar("M", bound=torch.nn.Module)


def apply(
    model: M,
    plan: Plan,
    takeover: bool = False,
    background: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    on_oom: str = SURVIVE,
    black_box: str | os.PathLike[str] | None = None,
    *,
    updates: bool = True,
    arena: bool = False,
) -> M:
    """See `keepless.apply`.

    Arguments:
        updates: False leaves gradients to the caller where the plan's optimizer steps in the backward.
    """
    check_module(model)
    check_plan(plan)
    check_on_oom(on_oom)
    check_black_box(black_box)
    updater = _updater(model, plan, optimizer) if updates else None
    if updates and optimizer is not None:
        check_optimizer(optimizer, model)
        check_planned_optimizer(optimizer, model, plan)
    survival = (CallSurvival if module_plans.is_by_modules(plan) else Survival)(plan, on_oom, black_box)
    guard = None
    if optimizer is not None and OPTIMIZER_IN_BACKWARD not in plan.rewrites:
        guard = OptimizerGuard(model, optimizer, survival)
    if arena and (module_plans.is_by_modules(plan) or capture_of(plan, model) is None):
        raise ArenaError(
            "An arena needs a plan of the whole captured step that was made for this very model in this process: "
            'keepless.plan(model, ..., engine="graph").'
        )
    check_checkpointing(model, takeover or is_allowed(plan))
    if not module_plans.is_by_modules(plan):
        check_signature(plan.signature, model_signature(model), "model")
    standing = module_steps.standing_plan(model)
    try:
        remove(model)
        take(model)
        if isinstance(survival, CallSurvival):
            module_plans.apply(model, plan, survival, guard)
        else:
            _put_in(model, plan, background, updater, survival, guard, arena)
    except BaseException:
        remove(model)
        if standing is not None:
            take(model)
            standing.put_in()
        raise
    if plan.allocation is not None:
        _compat.clear_workspaces()  # a backward before this was run by another thread, whose workspace still stands
    return model


def _updater(model: torch.nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None) -> Updater | None:
    """What steps the optimizer in the backward, where the plan says so.

    Raises:
        RewriteError: there is no optimizer, or it is another than the plan's.
    """
    if OPTIMIZER_IN_BACKWARD not in plan.rewrites:
        return None
    if optimizer is None:
        raise RewriteError(
            f"The plan's optimizer steps in the backward (rewrites={plan.rewrites}): give it to apply, too, as "
            "keepless.apply(model, plan, optimizer=optimizer)."
        )
    check_optimizer(optimizer, model)
    kind, planned = type(innermost(optimizer)).__name__, plan.signature.get("optimizer")
    if kind != planned:
        raise RewriteError(f"The plan was made for the optimizer {planned}, and {kind} is given. Plan again.")
    return Updater(optimizer, {name: p for name, p in model.named_parameters() if p.requires_grad})


def _put_in(
    model: torch.nn.Module,
    plan: Plan,
    background: bool,
    updater: Updater | None,
    survival: Survival,
    guard: OptimizerGuard | None,
    arena: bool,
) -> None:
    """A plan of single ops into a model that has none."""
    planned = PlannedForward(model, [], None, survival)
    planned.updater, planned.guard = updater, guard
    capture = capture_of(plan, model)
    if capture is not None:
        entry = make_entry(model, capture.flat, capture.binding, plan.program, cost=plan.cost)
        if arena:
            made = make_arena(capture.binding, plan.program, plan.predicted, plan.budget.device)
            entry, planned.arena = with_arena(entry, made), made.report
        planned.add(entry)
    planned.on_miss = Book(plan, background)
    planned.put_in()


def remove(model: M) -> M:
    """See `keepless.remove`."""
    planned = module_steps.standing_plan(model)
    if planned is not None:
        planned.take_out()
    give_back(model)
    return model


def planned_forward(model: torch.nn.Module) -> PlannedForward | None:
    """The plan that stands in a model, if any."""
    found = standing_forward(model)
    return found if isinstance(found, PlannedForward) and not found.is_out else None
