"""Putting a plan into a model, and taking it out again."""

from __future__ import annotations

import functools
import warnings
from typing import Any, TypeVar

import torch

from keepless._compat import tree_flatten
from keepless.capture import FlatInputs, Inputs, flatten_inputs
from keepless.control import module_plans, module_steps
from keepless.control.captured import Capture, Captures
from keepless.control.checks import check_module, check_plan
from keepless.control.planning import make_like, recapture
from keepless.control.signature import batch_signature, check_signature, model_signature
from keepless.control.takeover import check_checkpointing, give_back, is_allowed, take
from keepless.errors import InfeasibleBudget, PlanError
from keepless.execute import Entry, PlannedForward, make_entry
from keepless.ir.text import fingerprint
from keepless.machine import Plan

M = TypeVar("M", bound=torch.nn.Module)

MAX_ENTRIES = 8
"""Captured steps that one model keeps; beyond that the oldest goes."""


def apply(model: M, plan: Plan, takeover: bool = False) -> M:
    """See `keepless.apply`."""
    check_module(model)
    check_plan(plan)
    check_checkpointing(model, takeover or is_allowed(plan))
    if not module_plans.is_by_modules(plan):
        check_signature(plan.signature, model_signature(model), "model")
    remove(model)
    take(model)
    try:
        if module_plans.is_by_modules(plan):
            module_plans.apply(model, plan)
        else:
            _put_in(model, plan)
    except BaseException:
        give_back(model)
        raise
    return model


def _put_in(model: torch.nn.Module, plan: Plan) -> None:
    """A plan of single ops into a model that has none."""
    planned = PlannedForward(model, [], None)
    capture = capture_of(plan, model)
    if capture is not None:
        planned.entries.append(make_entry(model, capture.flat, capture.binding, plan.program))
        for entry in planned.entries:
            entry.recipe.counters = planned.counters

    planned.on_miss = functools.partial(_on_miss, plan)
    model.__dict__["forward"] = planned


def _on_miss(
    plan: Plan,
    planned: PlannedForward,
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reason: str,
) -> Entry | None:
    """An entry for a call that none covers: planned on the spot for the same budget.

    It holds no reference to the model, which must be free to go.
    """
    leaves, _ = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not any(t.requires_grad for t in (*model.parameters(), *tensors)):
        return None  # nothing will be differentiated
    inputs = Inputs(*args, **kwargs)
    if not planned.entries:
        capture = bind(model, plan, flatten_inputs(inputs))
        return make_entry(model, capture.flat, capture.binding, plan.program)
    try:
        other = make_like(model, inputs, plan)
    except InfeasibleBudget as error:
        raise InfeasibleBudget(
            f"This call is not the step that the model was planned for ({reason}) and needs a plan of its own. {error}",
            smallest_budget=error.smallest_budget,
            bound=error.bound,
            blocking=error.blocking,
        ) from None
    made = capture_of(other, model)
    assert made is not None
    if len(planned.entries) >= MAX_ENTRIES:
        warnings.warn(
            f"A planned model has had more than {MAX_ENTRIES} different steps. Each new one is planned on the spot, "
            f"which may take seconds; this one is new because {reason}. Pass what changes as a tensor, or pad batches.",
            stacklevel=2,
        )
    del planned.entries[MAX_ENTRIES - 1 :]
    return make_entry(model, made.flat, made.binding, other.program)


def remove(model: M) -> M:
    """See `keepless.remove`."""
    modules = module_steps.planned_modules(model)
    planned = planned_forward(model) if modules is None else modules
    if planned is not None:
        planned.take_out()
    give_back(model)
    return model


def planned_forward(model: torch.nn.Module) -> PlannedForward | None:
    """The plan that stands in a model, if any."""
    found = model.__dict__.get("forward")
    return found if isinstance(found, PlannedForward) else None


def capture_of(plan: Plan, model: torch.nn.Module) -> Capture | None:
    """The plan's capture of this model, if there is one."""
    return plan.capture.of(model) if isinstance(plan.capture, Captures) else None


def bind(model: torch.nn.Module, plan: Plan, flat: FlatInputs) -> Capture:
    """Captures a model for a plan that has not captured it, and refuses the plan if the captured step is another.

    Raises:
        PlanError: names what differs.
    """
    check_signature(plan.signature, {**model_signature(model), **batch_signature(flat)}, "model or batch")
    capture = recapture(model, flat, plan)
    now, planned = fingerprint(capture.binding.graph), fingerprint(plan.graph)
    if now != planned:
        raise PlanError(
            f"The plan was made for another step: the captured graph's fingerprint is {now[:12]} and the plan's is "
            f"{planned[:12]}, though parameters and batch agree. It differs at {_first_difference(capture, plan)}. "
            "Another version of torch or of the model's code is the usual cause. Plan again."
        )
    if isinstance(plan.capture, Captures):
        plan.capture.add(capture)
    else:
        plan.capture = Captures(capture)
    return capture


def _first_difference(capture: Capture, plan: Plan) -> str:
    graph = capture.binding.graph
    for here, there in zip(graph.ops, plan.graph.ops, strict=False):
        if (here.name, here.inputs, here.outputs, here.key) != (there.name, there.inputs, there.outputs, there.key):
            return f"op {here.id}: {graph.where(here)} here, {plan.graph.where(there)} in the plan"
    return f"its length: {len(graph.ops)} ops here, {len(plan.graph.ops)} in the plan"
