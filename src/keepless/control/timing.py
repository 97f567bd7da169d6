"""The timeline of one planned step, measured: seconds and bytes, instruction by instruction.

The generated step tells when each instruction ends. Seconds are medians over some steps; one more step tells bytes: on
the CPU from the allocations and frees between two marks, by torch's profiler, on CUDA from the allocator's statistics.
Levels count from what the plan says is resident before the step (parameters, batch, optimizer state), since that is
what a step begins with, and no allocation tells of it. What the caller and autograd do between segments counts for the
instruction at which the step hands over: the LOSS op, or the delivery of gradients.

Plans of module calls have no instructions that a step could tell of: their events are the step's phases.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from keepless.capture import DELIVER, UPDATE
from keepless.control.checks import check_module, check_plan
from keepless.control.parts.module_plans import apply as apply_modules
from keepless.control.parts.module_plans import is_by_modules
from keepless.control.runner import Runner, dropping
from keepless.control.undone import captured_run, modules_run, with_program
from keepless.errors import ArgumentError
from keepless.ir import DEVICE, Event, Phase, Run, Timeline
from keepless.machine import Plan
from keepless.measure.parts import Part, memory_parts

MAX_REPEATS = 1000
PHASES = (Phase.FORWARD.value, Phase.LOSS.value, Phase.BACKWARD.value)

_Note = Callable[[int], None]


def measure_timeline(model: torch.nn.Module, batch: Any, plan: Plan, *, loss_fn: Any, repeats: int) -> Timeline:
    """See `keepless.timeline`."""
    check_module(model)
    check_plan(plan)
    if isinstance(repeats, bool) or not isinstance(repeats, int) or not 1 <= repeats <= MAX_REPEATS:
        raise ArgumentError(f"repeats={repeats!r} is not a number of steps from 1 to {MAX_REPEATS}.")
    if is_by_modules(plan):
        return _by_phases(model, batch, plan, loss_fn, repeats)
    last = _last_delivery(plan)
    hands: list[_Note] = []

    def note(index: int) -> None:
        hands[0](index)

    with captured_run(model, batch, plan, loss_fn, "timeline") as (run, capture):

        def step(mark: _Note) -> None:
            hands[:] = [mark]
            run.forward_backward(lambda phase: mark(last) if phase == PHASES[-1] else None)

        with with_program(model, capture, plan.program, note), dropping(model, plan):
            taken = _timed(run, step, repeats)
            run.prepare()
            parts = memory_parts(step, run.device)
    order = [(index, index, "") for index in range(len(plan.program))]
    return _joined(plan, order, taken, parts)


def _by_phases(model: torch.nn.Module, batch: Any, plan: Plan, loss_fn: Any, repeats: int) -> Timeline:
    """Events of forward, loss and backward of a plan of module calls."""
    with modules_run(model, batch, plan, loss_fn, "timeline") as run:

        def step(mark: _Note) -> None:
            mark(-1)
            run.forward_backward(lambda phase: mark(PHASES.index(phase)))

        def behind_others(mark: _Note) -> None:
            run.lead_in()
            step(mark)

        planned = apply_modules(run.model, plan)
        try:
            run.prepare()
            run.forward_backward()  # regions are watched the first time
            taken = _timed(run, step, repeats)
            run.prepare()
            parts = memory_parts(behind_others, run.device)
        finally:
            planned.take_out()
    return _joined(plan, [(number, -1, phase) for number, phase in enumerate(PHASES)], taken, parts)


def _last_delivery(plan: Plan) -> int:
    """The instruction at whose hand-over the backward ends, after which the step tells of nothing."""
    runs = (i for i, instr in enumerate(plan.program) if isinstance(instr, Run))
    found = [i for i in runs if plan.graph.ops[plan.program[i].op].name in (DELIVER, UPDATE)]  # type: ignore[union-attr]
    return found[-1] if found else -1


def _timed(run: Runner, step: Callable[[_Note], None], repeats: int) -> list[dict[int, float]]:
    """Seconds by mark, of each step; a mark that is met twice counts for both times."""
    taken: list[dict[int, float]] = []
    marks: list[tuple[int, float]] = []
    clock = time.perf_counter
    is_cuda = run.device.type == "cuda"

    def mark(index: int) -> None:
        if is_cuda:
            torch.cuda.synchronize(run.device)
        marks.append((index, clock()))

    for _ in range(repeats + 1):  # the first warms up
        marks.clear()
        run.prepare()
        step(mark)
        found: dict[int, float] = {}
        for (_, begin), (index, end) in itertools.pairwise(marks):
            found[index] = found.get(index, 0.0) + end - begin
        taken.append(found)
    return taken[1:]


def _joined(
    plan: Plan, order: Sequence[tuple[int, int, str]], taken: Sequence[Mapping[int, float]], parts: Sequence[Part]
) -> Timeline:
    """One timeline of the steps' medians and one step's bytes; what no step told of is left out.

    Arguments:
        order: of the marks: the mark, and its event's index and label.
        parts: each but the first ends at the mark that the next one begins with.
    """
    base = plan.graph.start_nbytes
    levels: dict[int, Part] = {}
    for part, following in itertools.pairwise(parts):
        before = levels.get(following.label)
        peak = max(part.peak, before.peak) if before else part.peak
        levels[following.label] = Part(following.label, peak, part.level)
    start = levels.get(-1)
    events: list[Event] = []
    now = 0.0
    for mark, index, label in order:
        seconds = [step[mark] for step in taken if mark in step]
        if seconds and mark in levels:
            end = now + statistics.median(seconds)
            peak = max(levels[mark].peak, start.peak if start is not None and not events else 0)
            events.append(Event(index, now, end, 0.0, base + levels[mark].level, base + peak, label))
            now = end
    return Timeline(tuple(events), {DEVICE: max((event.peak for event in events), default=base)}, "measured")
