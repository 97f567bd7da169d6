"""Putting a plan into a model, and taking it out again."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from keepless.capture import FlatInputs, Inputs, flatten_inputs
from keepless.control.planning import Capture, make_with, recapture
from keepless.control.signature import batch_signature, check_signature, model_signature
from keepless.errors import GuardError, PlanError
from keepless.execute import Entry, PlannedForward, make_entry
from keepless.ir.text import fingerprint
from keepless.machine import Plan

M = TypeVar("M", bound=torch.nn.Module)

MAX_ENTRIES = 8
"""Captured steps that one model keeps; beyond that the oldest goes."""


def apply(model: M, plan: Plan) -> M:
    """See `keepless.apply`."""
    check_signature(plan.signature, model_signature(model), "model")
    planned = PlannedForward(remove(model), [], None)
    capture = plan.capture
    if isinstance(capture, Capture):
        planned.entries.append(make_entry(model, capture.flat, capture.binding, plan.program))
        for entry in planned.entries:
            entry.recipe.counters = planned.counters

    def on_miss(args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Entry:
        if not planned.entries:
            return bind_loaded(model, plan, flatten_inputs(Inputs(*args, **kwargs)))
        if not isinstance(plan.capture, Capture) or plan.capture.settings.budget <= 0:
            raise GuardError(
                f"This call is not the step that the model was planned for: {reason}. The plan came from a file, so "
                "that no other step can be planned from it: call keepless.fit with this batch."
            )
        other = make_with(model, Inputs(*args, **kwargs), plan.capture.settings)
        assert isinstance(other.capture, Capture)
        del planned.entries[MAX_ENTRIES - 1 :]
        return make_entry(model, other.capture.flat, other.capture.binding, other.program)

    planned.on_miss = on_miss
    model.__dict__["forward"] = planned
    return model


def remove(model: M) -> M:
    """See `keepless.remove`."""
    planned = planned_forward(model)
    if planned is not None:
        own = planned._instance_forward
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own
    return model


def planned_forward(model: torch.nn.Module) -> PlannedForward | None:
    """The plan that stands in a model, if any."""
    found = model.__dict__.get("forward")
    return found if isinstance(found, PlannedForward) else None


def bind_loaded(model: torch.nn.Module, plan: Plan, flat: FlatInputs) -> Entry:
    """Captures a model for a plan from a file, and refuses the plan if the captured step is another.

    Raises:
        PlanError: names what differs.
    """
    check_signature(plan.signature, {**model_signature(model), **batch_signature(flat)}, "model or batch")
    capture = recapture(model, flat, plan.signature)
    now, planned = fingerprint(capture.binding.graph), fingerprint(plan.graph)
    if now != planned:
        raise PlanError(
            f"The plan was made for another step: the captured graph's fingerprint is {now[:12]} and the plan's is "
            f"{planned[:12]}, though parameters and batch agree. It differs at {_first_difference(capture, plan)}. "
            "Another version of torch or of the model's code is the usual cause. Plan again."
        )
    plan.capture = capture
    return make_entry(model, flat, capture.binding, plan.program)


def _first_difference(capture: Capture, plan: Plan) -> str:
    graph = capture.binding.graph
    for here, there in zip(graph.ops, plan.graph.ops, strict=False):
        if (here.name, here.inputs, here.outputs, here.key) != (there.name, there.inputs, there.outputs, there.key):
            return f"op {here.id}: {graph.where(here)} here, {plan.graph.where(there)} in the plan"
    return f"its length: {len(graph.ops)} ops here, {len(plan.graph.ops)} in the plan"
