"""How a planned model survives where the device has less memory than was planned for, and what is written down."""

from __future__ import annotations

import os
import warnings
import weakref
from typing import Any

import torch

from keepless.control.reserve import with_reserve
from keepless.errors import ArgumentError, KeeplessError
from keepless.execute import Failure, Note, Rescue
from keepless.ir import Program
from keepless.machine import Plan, simulate
from keepless.measure import describe_device, free_nbytes
from keepless.reporting.black_box import (
    describe_instruction,
    describe_phases,
    describe_plan,
    describe_timeline,
    program_fingerprint,
)
from keepless.reporting.black_box_file import MOST_FILES, folder_of, write_black_box
from keepless.solve import flow
from keepless.solve.notches import Notches

SURVIVE, RAISE = "survive", "raise"
MOST_NOTCHES = 4
"""After so many the program of the smallest peak follows at once."""


def check_on_oom(on_oom: object) -> None:
    """Raises:
    ArgumentError: it is neither "survive" nor "raise".
    """
    if on_oom not in (SURVIVE, RAISE):
        raise ArgumentError(f'on_oom={on_oom!r} is neither "survive" nor "raise".')


def check_black_box(black_box: object) -> None:
    """Raises:
    ArgumentError: it is no path.
    """
    if black_box is not None and not isinstance(black_box, (str, os.PathLike)):
        raise ArgumentError(f"black_box={black_box!r} is no path of a folder.")


class Survival:
    """The survivor of one planned model.

    Arguments:
        plan: that stands in the model.
        on_oom: "survive", or "raise" to only write failures down.
        black_box: the folder of the files; None as the environment says.
    """

    def __init__(self, plan: Plan, on_oom: str, black_box: str | os.PathLike[str] | None) -> None:
        self.plan = plan
        self.survives = on_oom == SURVIVE
        flow.load()
        self.folder = folder_of(black_box)
        self.files: list[str] = []
        self._told_many = False
        self._notches: weakref.WeakKeyDictionary[Rescue, Notches] = weakref.WeakKeyDictionary()
        self._taken: weakref.WeakKeyDictionary[Rescue, int] = weakref.WeakKeyDictionary()

    def tighter(self, rescue: Rescue, failure: Failure) -> Program | None:
        """See `keepless.execute.Survivor`."""
        taken = self._taken.get(rescue, 0)
        try:
            found = self._below(rescue, failure, at_once=taken >= MOST_NOTCHES)
        except MemoryError:
            return None
        self._taken[rescue] = taken + 1
        return found

    def smallest(self, rescue: Rescue, program: Program) -> Program | None:
        """See `keepless.execute.Survivor`."""
        notches = self._notches_of(rescue)
        return notches.below(program, -1, at_once=True)

    def record(self, rescue: Rescue, failure: Failure, done: str, after: Program | None) -> Note:
        """See `keepless.execute.Survivor`."""
        try:
            return self._recorded(rescue, failure, done, after)
        except Exception as error:
            warnings.warn(f"A failed allocation could not be written down: {error!r}", stacklevel=2)
            return Note("", None)

    def _below(self, rescue: Rescue, failure: Failure, at_once: bool) -> Program | None:
        return self._notches_of(rescue).below(failure.program, failure.index, at_once=at_once)

    def _notches_of(self, rescue: Rescue) -> Notches:
        notches = self._notches.get(rescue)
        if notches is None:
            notches = self._notches[rescue] = Notches(rescue.binding.graph, rescue.cost)
        return notches

    def _recorded(self, rescue: Rescue, failure: Failure, done: str, after: Program | None) -> Note:
        graph, cost, program, index = rescue.binding.graph, rescue.cost, failure.program, failure.index
        less = after if after is not None else self._below(rescue, failure, at_once=False)
        suggested = None
        if less is not None:
            suggested = self._budget(with_reserve(simulate(graph, less, cost).peak))
        document: dict[str, object] = {
            "error": {"type": failure.kind, "text": failure.text},
            "phase": failure.phase,
            "instruction": describe_instruction(graph, program, index, cost) if index >= 0 else {},
            "program": program_fingerprint(program),
            "timeline": describe_timeline(graph, program, cost, index),
            "phases": describe_phases(graph, program, cost),
            "inputs": [{"name": name, "shape": list(shape), "dtype": dtype} for name, shape, dtype in failure.shapes],
            "plan": describe_plan(self.plan),
            "device": device_facts(rescue.binding.device),
            "suggested_budget": suggested,
            "done": done,
            "after": _after(rescue, after),
        }
        return Note(self.write(document), suggested)

    def _budget(self, nbytes: int) -> int | None:
        """A budget that is worth a try: for the whole step, and less than the plan's own."""
        if self.plan.engine != "graph":  # programs are those of single calls
            nbytes = self.plan.smallest_budget
        return nbytes if nbytes < self.plan.budget.limits["device"] else None

    def write(self, document: dict[str, object]) -> str:
        """Writes a black box, and gives its path; empty where it could not be written, or there are many."""
        if len(self.files) >= MOST_FILES:
            if not self._told_many:
                self._told_many = True
                warnings.warn(f"{MOST_FILES} black boxes were written; what fails from now on is not.", stacklevel=2)
            return ""
        path = write_black_box(self.folder, document)
        if path:
            self.files.append(path)
        return path


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the device is and has left."""
    facts: dict[str, Any] = dict(describe_device(device))
    facts["free_nbytes"] = free_nbytes(device)
    if device.type == "cuda":
        facts["allocated_nbytes"] = torch.cuda.memory_allocated(device)
        facts["reserved_nbytes"] = torch.cuda.memory_reserved(device)
    return facts


def _after(rescue: Rescue, program: Program | None) -> dict[str, object] | None:
    if program is None:
        return None
    try:
        timeline = simulate(rescue.binding.graph, program, rescue.cost)
    except KeeplessError:  # pragma: no cover - programs are verified
        return None
    return {
        "program": program_fingerprint(program),
        "predicted_peak": timeline.peak,
        "predicted_seconds": timeline.seconds,
        "num_replays": program.num_replays,
    }
