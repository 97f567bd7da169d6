"""Plans meet models that they have not captured: from a file, or made with another instance."""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch

from keepless.binding import renumbered
from keepless.capture import FlatInputs, lower, trace_step
from keepless.control.captured import Capture, Captures, settings_from, shape_from, whole
from keepless.control.planning import refs_of
from keepless.control.signature import batch_signature, check_signature, model_signature
from keepless.control.trials import untouched
from keepless.errors import PlanError
from keepless.ir import Run
from keepless.ir.text import fingerprint
from keepless.machine import Plan
from keepless.passes.matching import match, reordered


def capture_of(plan: Plan, model: torch.nn.Module) -> Capture | None:
    """The plan's capture of this model, if there is one."""
    return plan.capture.of(model) if isinstance(plan.capture, Captures) else None


def bind(model: torch.nn.Module, plan: Plan, flat: FlatInputs) -> Capture:
    """Captures a model for a plan that has not captured it, and refuses the plan if the captured step is another.

    The same ops in another order, as a model that goes through a set gives them, run in the plan's order.

    Raises:
        PlanError: names what differs.
    """
    check_signature(plan.signature, {**model_signature(model), **batch_signature(flat)}, "model or batch")
    capture = recapture(model, flat, plan)
    now, planned = fingerprint(capture.binding.graph), fingerprint(plan.graph)
    bound = capture if now == planned else _in_order_of(plan, capture)
    if bound is None:
        raise PlanError(
            f"The plan was made for another step: the captured graph's fingerprint is {now[:12]} and the plan's is "
            f"{planned[:12]}, though parameters and batch agree. It differs at {_first_difference(capture, plan)}. "
            f"{_likely_cause(capture, plan)} Plan again."
        )
    if isinstance(plan.capture, Captures):
        plan.capture.add(bound)
    else:
        plan.capture = Captures(bound)
    return bound


def _orders(rows: object) -> dict[int, tuple[int, ...]]:
    """Of a plan's signature: orders of gradients by output position."""
    if not isinstance(rows, list):
        return {}
    numbers = [[whole(number) for number in row] for row in rows if isinstance(row, list)]
    return {row[0]: tuple(row[1:]) for row in numbers if row and sorted(row[1:]) == list(range(len(row) - 1))}


def _in_order_of(plan: Plan, capture: Capture) -> Capture | None:
    """A capture whose ops are the plan's in another order, in the plan's; None where they are others.

    Its program must not write over what cannot be written over here.
    """
    here = capture.binding.graph
    found = match(here, plan.graph)
    if found is None:
        return None
    legal = [code.in_place if code is not None else () for code in capture.binding.ops]
    graph = reordered(plan.graph, found, legal)
    if any(
        isinstance(i, Run) and i.reuse and graph.ops[i.op].reuses != plan.graph.ops[i.op].reuses for i in plan.program
    ):
        return None
    return replace(capture, binding=renumbered(capture.binding, graph, found.ops, found.values))


def _likely_cause(capture: Capture, plan: Plan) -> str:
    here, there = (sorted(graph.where(op) for op in graph.ops) for graph in (capture.binding.graph, plan.graph))
    if here == there:
        return (
            "They are the same ops in another order: a model whose code goes through a set of names does that from "
            "process to process. Set PYTHONHASHSEED=0 in the environment where it is planned and where it is run."
        )
    return "Another version of torch or of the model's code is the usual cause."


def _first_difference(capture: Capture, plan: Plan) -> str:
    graph = capture.binding.graph
    for here, there in zip(graph.ops, plan.graph.ops, strict=False):
        if (here.name, here.inputs, here.outputs, here.key) != (there.name, there.inputs, there.outputs, there.key):
            return f"op {here.id}: {graph.where(here)} here, {plan.graph.where(there)} in the plan"
    return f"its length: {len(graph.ops)} ops here, {len(plan.graph.ops)} in the plan"


def recapture(model: torch.nn.Module, flat: FlatInputs, plan: Plan) -> Capture:
    """Captures a model for a plan from a file, or for one that was made with another instance of the model."""
    signature, shape = plan.signature, shape_from(plan)
    positions = signature.get("grad_outputs")
    chosen = tuple(whole(p) for p in positions) if isinstance(positions, list) else None
    with untouched(model):
        orders = _orders(signature.get("grad_orders"))
        told = signature.get("answers")
        answers = [bool(answer) for answer in told] if isinstance(told, list) else None
        traced = trace_step(
            model,
            flat,
            batch=None,
            loss_fn=None,
            grad_outputs=chosen,
            orders=orders,
            answers=answers,
            as_compiled=signature.get("as_compiled") is True and answers is None,  # of before there were answers
        )
        # Whether an output is the model's own loss, which the caller never releases, only the plan knows.
        own = signature.get("loss_position")
        traced = replace(traced, loss_position=own if type(own) is int else None)
        binding = lower(traced, flat, model, shape)
    known = plan.capture
    settings = known.settings if isinstance(known, Captures) else settings_from(plan, own_loss=type(own) is int)
    return Capture(binding, flat.without_tensors(), settings, traced.as_compiled, weakref.ref(model), refs_of(model))
