"""The timeline of one planned step, measured instruction by instruction.

The generated step tells when each instruction ends. Seconds are medians over some steps; bytes are those of the
machine's rules, since memory is measured elsewhere (`verify`). What the caller and autograd do between segments counts
for the instruction at which the step hands over: the LOSS op, or the delivery of gradients.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from keepless.capture import Inputs, flatten_inputs, planned_device
from keepless.control.applying import planned_forward, remove
from keepless.control.checks import check_module, check_plan
from keepless.control.parts.module_plans import is_by_modules
from keepless.control.parts.module_steps import tensors_of
from keepless.control.plan_book.recapturing import bind, capture_of
from keepless.control.runner import Runner
from keepless.control.takeover import is_allowed, turned_off
from keepless.control.verifying import check_ambient, with_program
from keepless.errors import ParameterError, PlanError
from keepless.ir import Event, Timeline
from keepless.machine import Plan
from keepless.modules.untouched import untouched

MAX_REPEATS = 1000


def measure_timeline(model: torch.nn.Module, batch: Any, plan: Plan, *, loss_fn: Any, repeats: int) -> Timeline:
    """See `keepless.timeline`."""
    check_module(model)
    check_plan(plan)
    if is_by_modules(plan):
        raise PlanError(
            "A timeline tells what each instruction of a captured step takes: this plan is one of module calls. Plan "
            "with the graph engine."
        )
    if isinstance(repeats, bool) or not isinstance(repeats, int) or not 1 <= repeats <= MAX_REPEATS:
        raise ParameterError(f"repeats={repeats!r} is not a number of steps from 1 to {MAX_REPEATS}.")
    inputs = Inputs.of(batch)
    standing = planned_forward(model)
    taken: list[dict[int, float]] = []
    marks: list[tuple[int, float]] = []
    with turned_off(model, is_allowed(plan)), untouched(model, planned_device(model), tensors_of(batch)) as before:
        remove(model)
        try:
            capture = capture_of(plan, model) or bind(model, plan, flatten_inputs(inputs))
            check_ambient(capture, "timeline")
            run = Runner(
                model,
                inputs,
                batch,
                loss_fn or capture.settings.loss_fn,
                capture.settings,
                capture.binding.device,
                before,
            )
            with with_program(model, capture, plan.program, _marker(marks, capture.binding.device)):
                for _ in range(repeats + 1):  # the first warms up
                    marks.clear()
                    run.prepare()
                    run.forward_backward()
                    taken.append({marks[i][0]: marks[i][1] - marks[i - 1][1] for i in range(1, len(marks))})
        finally:
            remove(model)
            if standing is not None:
                model.__dict__["forward"] = standing
    return _joined(plan.predicted, taken[1:])


def _marker(marks: list[tuple[int, float]], device: torch.device) -> Callable[[int], None]:
    clock, append = time.perf_counter, marks.append
    if device.type != "cuda":
        return lambda index: append((index, clock()))

    def mark(index: int) -> None:
        torch.cuda.synchronize(device)
        append((index, clock()))

    return mark


def _joined(predicted: Timeline, taken: list[dict[int, float]]) -> Timeline:
    """One timeline of the steps' medians, with the predicted bytes; instructions that no step told of are left out."""
    events: list[Event] = []
    now = 0.0
    for event in predicted.events:
        seconds = [step[event.index] for step in taken if event.index in step]
        if seconds:
            end = now + statistics.median(seconds)
            events.append(replace(event, start=now, end=end, stall=0.0))
            now = end
    return Timeline(tuple(events), predicted.peaks, "measured")
