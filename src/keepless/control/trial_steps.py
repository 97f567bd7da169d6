"""Steps of a plan that are run to be compared with its prediction, and undone.

The user's optimizer is never stepped: its part of a step's bytes and seconds is what the plan predicts.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from keepless.control.parts.module_plans import apply as apply_modules
from keepless.control.runner import Runner
from keepless.control.undone import captured_run, modules_run, with_program
from keepless.ir import Event, Phase, Run, Timeline
from keepless.machine import Plan
from keepless.measure.parts import memory_parts

_WARM_UPS = 1


@dataclass(frozen=True)
class Seen:
    """What a planned step did.

    Arguments:
        peak: highest bytes on the device, all that stands before the step included.
        seconds: of the whole step, medians of steps that were not watched.
        timeline: seconds and highest bytes of each instruction that was seen; its seconds add up to those of forward
            and backward. No events where the plan's instructions cannot be told apart.
    """

    peak: int
    seconds: float
    timeline: Timeline


class TrialSteps(Protocol):
    """Runs the steps of plans for one model and batch."""

    def run(self, plan: Plan, repeats: int) -> Seen:
        """Runs one plan's step a few times."""


@contextlib.contextmanager
def captured_steps(model: torch.nn.Module, batch: Any, plan: Plan, loss_fn: Any) -> Iterator[TrialSteps]:
    """Trial steps of plans whose instructions are single ops of the whole step.

    Raises:
        PlanError: the plan was made for another model or batch.
    """
    with captured_run(model, batch, plan, loss_fn, "landing") as (run, capture):
        yield _Captured(run, capture)


@contextlib.contextmanager
def module_steps(model: torch.nn.Module, batch: Any, plan: Plan, loss_fn: Any) -> Iterator[TrialSteps]:
    """Trial steps of plans of module calls; as `captured_steps`."""
    with modules_run(model, batch, plan, loss_fn, "landing") as run:
        yield _Modules(run)


class _Marks:
    """Notes when each instruction of a step ends; called as `make_entry` calls its `mark`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._marks: list[tuple[int, float]] = []
        self._tell: Callable[[int], None] | None = None

    def __call__(self, index: int) -> None:
        if self._tell is not None:
            self._tell(index)
            return
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        self._marks.append((index, time.perf_counter()))

    def begin(self) -> None:
        """Forgets what was noted."""
        self._marks.clear()

    def taken(self) -> dict[int, float]:
        """Seconds by instruction since `begin`."""
        return {index: end - start for (_, start), (index, end) in itertools.pairwise(self._marks)}

    @contextlib.contextmanager
    def instead(self, tell: Callable[[int], None]) -> Iterator[None]:
        """Inside the block another is told, and nothing noted."""
        self._tell = tell
        try:
            yield
        finally:
            self._tell = None


class _Captured:
    """Trial steps of one captured model."""

    def __init__(self, run: Runner, capture: Any) -> None:
        self._run, self._capture = run, capture

    def run(self, plan: Plan, repeats: int) -> Seen:
        """Bytes and seconds by instruction, and seconds of the whole."""
        run, capture, program = self._run, self._capture, plan.program
        marks = _Marks(run.device)
        taken: list[dict[int, float]] = []
        with with_program(run.model, capture, program, marks):
            for _ in range(_WARM_UPS):  # the first step, in which libraries make what they keep
                run.prepare()
                run.forward_backward()
            run.prepare()
            parts = memory_parts(lambda mark: _told(run, marks, mark), run.device)
            for _ in range(repeats):
                marks.begin()
                run.prepare()
                run.forward_backward()
                taken.append(marks.taken())
        with with_program(run.model, capture, program):
            seconds = _whole_seconds(run, repeats)
        levels = [(part.label, part.peak) for part in parts]
        return _seen(plan, seconds, _by_instruction(taken, seconds), _highest(levels))


class _Modules:
    """Trial steps of a model by its module calls."""

    def __init__(self, run: Runner) -> None:
        self._run = run

    def run(self, plan: Plan, repeats: int) -> Seen:
        """Highest bytes and seconds of the whole."""
        run = self._run
        run.prepare()
        planned = apply_modules(run.model, plan)
        try:
            seconds = _whole_seconds(run, repeats)
            peak = run.measure()
        finally:
            planned.take_out()
        return _seen(plan, seconds, {}, {-1: peak})


def _told(run: Runner, marks: _Marks, mark: Any) -> None:
    with marks.instead(mark):
        run.forward_backward()


def _whole_seconds(run: Runner, repeats: int) -> float:
    """The median of some steps after one that is not counted."""
    found = []
    for number in range(_WARM_UPS + repeats):
        run.prepare()
        start = time.perf_counter()
        run.forward_backward()
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        if number >= _WARM_UPS:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def _by_instruction(taken: list[dict[int, float]], whole: float) -> dict[int, float]:
    """Median seconds by instruction, scaled so that they add up to those of the step that nobody watched."""
    found = {
        index: statistics.median(step[index] for step in taken if index in step)
        for index in sorted({index for step in taken for index in step})
    }
    total = sum(found.values())
    return {index: seconds * whole / total for index, seconds in found.items()} if total else found


def _highest(levels: list[tuple[int, int]]) -> dict[int, int]:
    """Highest bytes over the level at the start, by instruction: marks tell where one ends. What comes after the last
    mark is called -1.
    """
    found: dict[int, int] = {}
    for (_, peak), (index, _) in itertools.zip_longest(levels, levels[1:], fillvalue=(-1, 0)):
        found[index] = max(found.get(index, 0), peak)
    return found


def _seen(plan: Plan, seconds: float, by_instruction: dict[int, float], highest: dict[int, int]) -> Seen:
    resident = plan.graph.start_nbytes
    ops = plan.graph.ops
    rest_peak, rest_seconds = 0, 0.0
    events: list[Event] = []
    now = 0.0
    for event in plan.predicted.events:
        instr = plan.program[event.index]
        if isinstance(instr, Run) and ops[instr.op].phase is Phase.OPTIMIZER:
            rest_peak, rest_seconds = max(rest_peak, event.peak), rest_seconds + event.end - event.start
        elif event.index in by_instruction:
            end = now + by_instruction[event.index]
            peak = resident + highest[event.index] if event.index in highest else event.peak
            events.append(replace(event, start=now, end=end, stall=0.0, peak=peak))
            now = end
    peak = max(resident + max(highest.values()), rest_peak)
    return Seen(peak, seconds + rest_seconds, Timeline(tuple(events), {"device": peak}, "measured"))
