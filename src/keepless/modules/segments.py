"""Captured module calls: what runs in the place of a block's forward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from keepless.capture import StandingForward
from keepless.eager import forward as regions
from keepless.eager.determinism import CHECKS
from keepless.eager.forward import Options
from keepless.execute import Entry, Survivor, equip, reprogrammed, run_entry
from keepless.ir import Graph, Program
from keepless.modules.sites import without_caches


class Bind(Protocol):
    """Captures a call and lowers its program; or says why this call is not the one that was planned."""

    def __call__(self, standing: StandingForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry | str:
        """The entry, or the reason."""

    def by(self, order: list[int]) -> Bind:
        """The same for another order of the call's ops."""

    def program(self, graph: Graph) -> Program:
        """The verified program of its order."""


@dataclass
class Segment:
    """One call that runs by a program of its own.

    A call that is not the one that was captured is recomputed as a whole, which needs the least memory: its values are
    right whatever has changed.

    Attributes:
        entry: the lowered program, None before the first call.
        missed: why calls ran without it -> how many.
        survivor: how the call goes on where there is no memory.
        is_tight: it runs by the program of the smallest peak.
    """

    bind: Bind
    entry: Entry | None = None
    missed: dict[str, int] | None = None
    survivor: Survivor | None = None
    is_tight: bool = False

    def __call__(self, standing: StandingForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = without_caches(args, kwargs)
        if self.entry is None:
            found = self.bind(standing, args, kwargs)
            if isinstance(found, str):
                return self._missed(found, standing, args, kwargs)
            self.entry = found
            found.recipe.tells_of_layout = False  # the plan has measured its steps
            if self.survivor is not None and found.cost is not None:
                equip(found, found.cost, self.survivor, self._adopt)
                if self.is_tight:
                    self.tighten()
        bound = self.entry.guard.check(args, kwargs)
        if isinstance(bound, str):
            return self._missed(bound, standing, args, kwargs)
        return run_entry(standing, self.entry, bound)

    def tighten(self) -> bool:
        """Later calls run by the program of the smallest peak; whether that is another one."""
        was_tight, self.is_tight = self.is_tight, True
        entry, survivor = self.entry, self.survivor
        if entry is None or survivor is None or entry.recipe.rescue is None:
            return not was_tight
        program = survivor.smallest(entry.recipe.rescue, entry.program)
        if program is not None:
            self._adopt(program)
        return program is not None

    def by(self, order: list[int]) -> Segment:
        """The same call, run by another order of its ops."""
        bind = self.bind.by(order)
        made = replace(self, bind=bind, is_tight=False)
        if self.entry is not None:
            entry = made.entry = reprogrammed(self.entry, bind.program(self.entry.binding.graph))
            if self.survivor is not None and entry.cost is not None:
                equip(entry, entry.cost, self.survivor, made._adopt)
        return made

    def _adopt(self, program: Program) -> None:
        """Later calls run by another program."""
        if self.entry is not None:
            self.entry = reprogrammed(self.entry, program)

    def _missed(self, reason: str, standing: StandingForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.missed = self.missed or {}
        self.missed[reason] = self.missed.get(reason, 0) + 1
        options = Options(CHECKS["default"], True, None, False, True, None, None)
        return regions.run(standing.original, args, kwargs, options)
