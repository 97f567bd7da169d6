"""Putting a plan into a model, and taking it out again."""

from __future__ import annotations

from typing import TypeVar

import torch

from keepless.control import module_plans
from keepless.control.book import Book
from keepless.control.checks import check_module, check_plan
from keepless.control.recapturing import capture_of
from keepless.control.signature import check_signature, model_signature
from keepless.execute import PlannedForward, make_entry
from keepless.machine import Plan

M = TypeVar("M", bound=torch.nn.Module)


def apply(model: M, plan: Plan, background: bool = True) -> M:
    """See `keepless.apply`."""
    check_module(model)
    check_plan(plan)
    if module_plans.is_eager(plan):
        remove(model)
        module_plans.apply(model, plan)
        return model
    check_signature(plan.signature, model_signature(model), "model")
    planned = PlannedForward(remove(model), [], None)
    capture = capture_of(plan, model)
    if capture is not None:
        planned.entries.add(make_entry(model, capture.flat, capture.binding, plan.program))
        for entry in planned.entries:
            entry.recipe.counters = planned.counters

    planned.on_miss = Book(plan, background)
    model.__dict__["forward"] = planned
    return model


def remove(model: M) -> M:
    """See `keepless.remove`."""
    modules = module_plans.planned_modules(model)
    if modules is not None:
        modules.take_out()
        return model
    planned = planned_forward(model)
    if planned is not None:
        planned.take_out()
    return model


def planned_forward(model: torch.nn.Module) -> PlannedForward | None:
    """The plan that stands in a model, if any."""
    found = model.__dict__.get("forward")
    return found if isinstance(found, PlannedForward) else None
