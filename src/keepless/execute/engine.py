"""The graph engine: a planned forward in the place of the model's own.

`PlannedForward` sits in the module's `__dict__` under "forward". A call that means a captured step runs that step's
program; evaluation, `no_grad` and torch.func transforms run the model's own forward; any other call is a miss.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from keepless import _compat
from keepless.binding import Binding
from keepless.capture import StandingForward, is_tracing
from keepless.errors import GuardError
from keepless.execute.arena import ArenaReport
from keepless.execute.entry import Entry, equip, reprogrammed, run_entry
from keepless.execute.nodes import Counters
from keepless.execute.recovery import Survivor
from keepless.execute.shelf import Shelf
from keepless.execute.updating import Updater
from keepless.ir import Program

Miss = Callable[["PlannedForward", torch.nn.Module, tuple[Any, ...], dict[str, Any], str], Entry | None]
"""What a planned forward does about a call that no entry covers: gives a new entry, None where there is nothing to
plan, or raises."""


class Attached(Protocol):
    """What is in place as long as a planned forward stands in its model."""

    def put_in(self) -> None:
        """It is in place."""

    def take_out(self) -> None:
        """It is not."""


@dataclass(frozen=True)
class News:
    """A better program for an entry, which the next call of a planned forward takes over.

    Arguments:
        entry: weakly, as it may be gone by then.
    """

    entry: weakref.ref[Entry]
    program: Program


class PlannedForward(StandingForward):
    """The forward of a planned model.

    Attributes:
        entries: captured steps, the latest used first.
        counters: what happened beside the plan.
        news: better programs for entries; a thread beside may put them here.
        updater: steps the optimizer in the backward, while this forward stands in its model.
        arena: what the plan's arena is; None without one.
        guard: looks after the optimizer's own steps, as long.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        entries: Sequence[Entry],
        on_miss: Miss | None,
        survivor: Survivor | None = None,
    ) -> None:
        super().__init__(model)
        self._for_training = model.training
        self.entries = Shelf()
        self.survivor = survivor
        self.on_miss = on_miss
        self.news: deque[News] = deque()
        self.updater: Updater | None = None
        self.arena: ArenaReport | None = None
        self.guard: Attached | None = None
        self.counters = Counters()
        for entry in reversed(entries):
            self.add(entry)
        self.__doc__ = model.forward.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            self.is_out
            or not torch.is_grad_enabled()
            or is_tracing()
            or _compat.transforms_active()
            or _compat.forward_ad_active()
            or torch.compiler.is_compiling()
        ):
            if _compat.dynamo_traces() and torch.is_grad_enabled():
                return _outside_compiler(self, args, kwargs)
            return self._unplanned(args, kwargs)
        if self.updater is not None:
            self.updater.check()
        if self.news:
            self._take_over()
        reason = ""
        for entry in self.entries.alike(args, kwargs):
            bound = entry.guard.check(args, kwargs)
            if not isinstance(bound, str):
                over = entry.guard.standing_gradient() if self.on_miss is not None else ""
                if not over:
                    self.entries.use(entry)
                    self.counters.hits += 1
                    while entry.again:
                        entry.again.pop()()
                    return run_entry(self, entry, bound)
                bound = over
            reason = reason or bound
        model = self._model()
        if model is not None and not model.training and self._for_training:  # evaluation
            return self._unplanned(args, kwargs)
        if not reason and self.entries:
            bound = self.entries[0].guard.check(args, kwargs)
            reason = bound if isinstance(bound, str) else "its arguments are of other types"
        if self.on_miss is None:
            raise GuardError(
                f"This call is not the step that the model was planned for: {reason}. Plan for it too, or call "
                "keepless.remove(model) first."
            )
        assert model is not None, "the model is gone"
        made = self.on_miss(self, model, args, kwargs, reason)
        if made is None:
            return self._unplanned(args, kwargs)
        entry = made
        self.add(entry)
        bound = entry.guard.check(args, kwargs)
        if isinstance(bound, str):
            raise GuardError(f"A plan made for this very call does not cover it: {bound}.")
        return run_entry(self, entry, bound)

    def add(self, entry: Entry) -> None:
        """Puts a captured step in front, as one of this model's."""
        entry.recipe.counters = self.counters
        if self.survivor is not None and entry.cost is not None:
            equip(entry, entry.cost, self.survivor, _Adopt(weakref.ref(self), entry.binding))
        self.counters.evicted += len(self.entries.add(entry))

    def put_in(self) -> None:
        """The module runs by its plan."""
        super().put_in()
        for attached in (self.updater, self.guard):
            if attached is not None:
                attached.put_in()

    def take_out(self) -> None:
        """The module runs its own forward again, where this one stands in it, and no optimizer steps in backwards."""
        for attached in (self.updater, self.guard):
            if attached is not None:
                attached.take_out()
        super().take_out()

    def _take_over(self) -> None:
        """Better programs take the places of those that they were found for; a step that runs goes on with its own."""
        while self.news:
            told = self.news.popleft()
            entry = told.entry()
            if entry is not None and entry in self.entries:
                self.entries.swap(entry, reprogrammed(entry, told.program))
                self.counters.solved += 1

    def _unplanned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.counters.unplanned_calls += 1
        return self.original(*args, **kwargs)


@dataclass(frozen=True)
class _Adopt:
    """Later calls of a captured step run by another program."""

    planned: weakref.ref[PlannedForward]
    binding: Binding

    def __call__(self, program: Program) -> None:
        planned = self.planned()
        for entry in list(planned.entries) if planned is not None else ():
            if entry.binding is self.binding and planned is not None:
                planned.entries.swap(entry, reprogrammed(entry, program))


@torch.compiler.disable(reason="a model with a Keepless plan runs its planned step")  # type: ignore[no-untyped-call,untyped-decorator]
def _outside_compiler(planned: PlannedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Under torch.compile the planned step still runs, as it is: what is compiled would not keep the budget."""
    return planned(*args, **kwargs)
