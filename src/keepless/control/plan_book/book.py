"""The plan book: what a planned model does about calls that its plan does not cover.

A new call is captured in the foreground. Its ops' seconds come from the plan's (`keepless.cost.transferred_seconds`),
their scratch bytes from running each distinct one once, and its program from the plans that are known
(`keepless.solve.transfer`); where none of these fits, it is the program of the smallest peak. All of it fits the same
budget. A step that comes again is planned in the background, too, and the next call takes over what is better.

The captured steps are kept on a shelf (`keepless.execute.Shelf`), the least recently used ones go first.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from typing import Any

import torch

from keepless._compat import tree_flatten
from keepless.capture import Inputs, flatten_inputs
from keepless.control.captured import Capture, Captures, Measured, Settings
from keepless.control.plan_book import worker
from keepless.control.plan_book.recapturing import bind
from keepless.control.plan_book.similar import measure_like, settings_like
from keepless.control.planning import solve_measured
from keepless.control.reserve import budget_with_reserve
from keepless.errors import InfeasibleBudget, ProgramError
from keepless.execute import Entry, News, PlannedForward, make_entry
from keepless.ir import Graph, Program, Run, Status, format_bytes
from keepless.machine import Plan, verify
from keepless.solve import SOLVERS, Solution, named_solver, smallest
from keepless.solve.transfer import Known, transfer

MANY_CAPTURES = 8
"""Steps that are captured on the spot before the caller is told that they keep coming."""
_MOST_KNOWN = 8
"""Plans of other calls that a new one may take from."""
_MOST_SCRATCH = 20_000
"""Ops whose scratch bytes are remembered."""
_SHOWN = 6


class Book:
    """Plans for the calls of one planned model. It holds no reference to the model, which must be free to go.

    Arguments:
        plan: what the model was planned with.
        background: better programs are searched for in the background.
    """

    def __init__(self, plan: Plan, background: bool) -> None:
        self.plan = plan
        self.background = background
        self._first = known_of(plan.graph, plan.program)
        self._known: deque[Known] = deque(maxlen=_MOST_KNOWN)
        self._lowest: Known | None = None
        self._scratch: dict[str, int] = {}
        self._told_many = self._told_evicted = self._told_compiled = False

    def __call__(
        self,
        planned: PlannedForward,
        model: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reason: str,
    ) -> Entry | None:
        """An entry for a call that none covers, planned on the spot for the same budget; None where nothing will be
        differentiated."""
        leaves, _ = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not any(t.requires_grad for t in (*model.parameters(), *tensors)):
            return None
        inputs = Inputs(*args, **kwargs)
        if not planned.entries:
            capture = bind(model, self.plan, flatten_inputs(inputs))
            entry = make_entry(model, capture.flat, capture.binding, self.plan.program, cost=self.plan.cost)
            bound = entry.guard.check(args, kwargs)
            if not isinstance(bound, str):
                return entry
            planned.add(entry)  # the model's code asks of data, and this batch has other answers than the plan's
            reason = bound
        entry, captured = self._captured(planned, model, inputs, reason)
        planned.counters.captures += 1
        self._warn(planned, entry, reason, captured.as_compiled)
        return entry

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for what is searched for in the background; False where that takes longer."""
        return worker.WORKER.wait(timeout)

    def _captured(
        self, planned: PlannedForward, model: torch.nn.Module, inputs: Inputs, reason: str
    ) -> tuple[Entry, Capture]:
        captures = self.plan.capture
        assert isinstance(captures, Captures)
        settings = settings_like(model, captures)
        if len(self._scratch) > _MOST_SCRATCH:
            self._scratch.clear()
        measured = measure_like(model, inputs, settings, self.plan, self._scratch)
        templates = captures.templates(model)
        planned.counters.specialised += templates is not None and not templates.reason
        try:
            found = self._carried(measured, settings)
            program = found.program if found is not None else solve_measured(measured, settings).program
        except InfeasibleBudget as error:
            raise InfeasibleBudget(
                f"This call is not the step that the model was planned for ({reason}) and needs a plan of its own. "
                f"{error}",
                smallest_budget=error.smallest_budget,
                bound=error.bound,
                blocking=error.blocking,
            ) from None
        self._known.append(known_of(measured.graph, program))
        entry = make_entry(model, measured.capture.flat, measured.capture.binding, program, cost=measured.cost)
        planned.counters.transfers += found is not None
        if self.background and found is not None and found.certificate.status is not Status.OPTIMAL:
            entry.again.append(_Later(self, planned, entry, measured, settings, found))
        return entry, measured.capture

    def _carried(self, measured: Measured, settings: Settings) -> Solution | None:
        """A program within the budget from the known plans, or the one of the smallest peak with replays taken out
        where there is room; None where neither fits, or where a solver was asked for by name."""
        if named_solver(settings.solver) is not SOLVERS["keepless"]:
            return None
        graph, cost, budget = measured.graph, measured.cost, budget_with_reserve(settings.budget, settings.over)
        known = [self._first, *self._known, *([self._lowest] if self._lowest is not None else [])]
        found = transfer(graph, cost, budget.device, known)
        if found.peak > budget.device:
            self._lowest = Known(graph, smallest(graph, cost).order)
            found = transfer(graph, cost, budget.device, [self._lowest])
        if found.peak > budget.device:
            return None
        try:
            verify(graph, found.program, cost=cost, budget=budget)
        except ProgramError:  # a replay that a rewritten step forbids, where the plan that it comes from had it
            if not settings.rewrites:
                raise
            return None
        return found

    def _warn(self, planned: PlannedForward, entry: Entry, reason: str, as_compiled: bool) -> None:
        num, shelf = planned.counters.captures, planned.entries
        if as_compiled and self.plan.signature.get("as_compiled") is False and not self._told_compiled:
            self._told_compiled = True
            warnings.warn(
                "A planned model is called in a way in which its code looks at what it computes, and is captured as it "
                f"would be compiled: its bits may be other ones than plain training's there ({reason}). With "
                "eager_ops=True in keepless.plan that is an error.",
                stacklevel=6,
            )
        if num >= MANY_CAPTURES and not self._told_many:
            self._told_many = True
            warnings.warn(
                f"A planned model has had {num + 1} different steps. Each new one is captured and planned on the spot, "
                f"which takes a second or more; this one is new because {reason}. "
                f"{_what_changes([entry, *shelf])}Pass numbers that change as tensors, and pad batches to a few sizes.",
                stacklevel=6,
            )
        if not shelf.has_room(entry) and not self._told_evicted:
            self._told_evicted = True
            warnings.warn(
                f"A planned model keeps {len(shelf)} captured steps ({format_bytes(shelf.nbytes)}); from now on the "
                "one that was used longest ago is forgotten for each new one, and captured again where it comes back. "
                f"{_what_changes([entry, *shelf])}Pad batches to fewer sizes.",
                stacklevel=6,
            )


def known_of(graph: Graph, program: Program) -> Known:
    """A program as what others may be carried over from."""
    return Known(graph, tuple(instr.op for instr in program if isinstance(instr, Run)))


class _Later:
    """Has a captured step planned in the background when it comes a second time: what comes once is not worth it."""

    def __init__(
        self,
        book: Book,
        planned: PlannedForward,
        entry: Entry,
        measured: Measured,
        settings: Settings,
        found: Solution,
    ) -> None:
        self._book, self._entry, self._news = weakref.ref(book), weakref.ref(entry), planned.news
        self._graph, self._cost = measured.graph, measured.cost
        self._budget, self._seed = budget_with_reserve(settings.budget, settings.over), settings.seed
        self._seconds = found.seconds

    def __call__(self) -> None:
        book = self._book()
        if book is None:
            return
        known, news, entry = book._known, self._news, self._entry

        def tell(found: Solution) -> None:
            known.append(Known(job.graph, found.order))
            news.append(News(entry, found.program))

        job = worker.Job(
            self._graph, self._cost, self._budget, self._seed, self._seconds, tell, lambda: entry() is not None
        )
        weakref.finalize(book, job.search.interrupt)
        worker.WORKER.add(job)


def _what_changes(entries: list[Entry]) -> str:
    """Which arguments differ between the captured steps, in words."""
    parts = []
    for position in range(max(len(entry.flat.leaves) for entry in entries)):
        shapes: dict[str, None] = {}
        for entry in entries:
            flat = entry.flat
            if position in flat.facts:
                shapes[f"shape {tuple(flat.facts[position][1])}"] = None
            elif position < len(flat.leaves) and position not in flat.first:
                shapes[f"{flat.leaves[position]!r:.40}"] = None
        if len(shapes) > 1:
            more = ", ..." if len(shapes) > _SHOWN else ""
            parts.append(f"argument {position} came as {', '.join(list(shapes)[:_SHOWN])}{more}")
    return f"So far {'; '.join(parts)}. " if parts else ""
