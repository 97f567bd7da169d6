"""A call of a planned model that is not the planned one: captured, and its costs taken from the plan's.

Only bytes are measured: each distinct op runs once. Of a GPT-2 step with 87 distinct ops this takes 15 ms, where timing
them takes 0.25 s, and where the capture takes a second.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from keepless.capture import Inputs, flatten_inputs
from keepless.control.captured import Captures, Measured, Settings
from keepless.control.planning import capture_call, measuring
from keepless.control.room import room_for_trials, split_by_room
from keepless.control.signature import batch_signature, model_signature
from keepless.control.trials import cost_model, held_nbytes, op_trials, untouched
from keepless.cost import KnownCosts, Origin, scaled_scratch, transferred_seconds
from keepless.machine import Plan
from keepless.measure import OpCost, measure_scratch


def settings_like(model: torch.nn.Module, captures: Captures) -> Settings:
    """A plan's settings for another call: where gradients stand already, it is one for accumulation."""
    stand = any(p.is_leaf and p.grad is not None for p in model.parameters())
    return replace(captures.settings, accumulate=captures.settings.accumulate or stand)


def measure_like(
    model: torch.nn.Module, inputs: Inputs, settings: Settings, plan: Plan, scratch: dict[str, int]
) -> Measured:
    """The captured step of another call, for the outputs that received gradients before, with costs.

    Seconds are the plan's, scaled by bytes; scratch bytes are measured. Costs that are known on disk are exact. A loss
    function is not called, as its targets may lie outside this call: its scratch is the known one, more where its
    inputs are larger.

    Arguments:
        scratch: bytes by op key that are known; new ones are added.
    """
    captures = plan.capture
    assert isinstance(captures, Captures)
    flat = flatten_inputs(inputs)
    chosen = None if settings.own_loss else captures.grad_outputs
    with untouched(model):
        capture, given = capture_call(
            model, flat, inputs, settings, chosen, captures.templates(model), orders=captures.orders
        )
        binding = capture.binding
        graph = binding.graph
        trials = op_trials(binding, model)
        cache = settings.cache
        exact = cache.load(binding.device, [trial.key for trial in trials]) if cache is not None else {}
        with measuring():
            missing = [trial for trial in trials if trial.key not in scratch and trial.key not in exact]
            room = room_for_trials(model, flat.tensors, settings.budget, binding.device)
            fitting, others = split_by_room(missing, room)
            scratch |= measure_scratch(fitting, device=binding.device)
            unrun = {trial.key: 0 for trial in others}  # the call does not fit; they are not known for another one
    known = KnownCosts(plan.graph, plan.cost)
    seconds = transferred_seconds(graph, [known], {key: cost.seconds for key, cost in exact.items()})
    known_scratch = scratch | unrun
    costs = {
        trial.key: exact.get(trial.key) or OpCost(seconds[trial.key], known_scratch[trial.key], plan.cost.spread, 0)
        for trial in trials
    }
    loss, before = None, plan.graph.loss_op
    if chosen is not None and before is not None and graph.loss_op is not None:
        nbytes = scaled_scratch(graph, graph.loss_op, known, before)
        loss = OpCost(
            seconds[graph.ops[graph.loss_op].key], max(0, nbytes - held_nbytes(binding.graph, binding.device)), 0.0, 0
        )
    cost = cost_model(binding, costs, optimizer=settings.optimizer, loss=loss, accumulate=settings.accumulate)
    signature = {**model_signature(model), **batch_signature(flat), **given}
    return Measured(capture, replace(cost, origin=Origin.LEARNED), signature, num_unrun=len(unrun))
