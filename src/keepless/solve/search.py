"""How long a search may go on, who is told, and who may end it.

Work is counted, never timed, so that the same input and seed give the same plan on any machine; a wall-clock limit is
offered beside it, and a plan that it cut short says TIME_LIMITED. A solver asks `search.spend()` once per unit of its
work and ends with its best so far where the answer is False::

    search = Search(work=10_000, seconds=5.0)
    while search.spend():
        ...                       # evaluate one more order
    search.is_cut_by_clock        # True: the certificate must say so
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Standing:
    """What a search has so far.

    Arguments:
        solver: its name.
        seconds: of the best step that fits; infinite while none does.
        peak: its bytes, or the lowest bytes so far while none fits.
        bound_seconds: no plan in the solver's space is faster; 0 while nothing is proven.
        work: units spent.
    """

    solver: str
    seconds: float
    peak: int
    bound_seconds: float
    work: int

    @property
    def gap(self) -> float:
        """How much slower than the bound the best step is at most; infinite where one of them is missing."""
        if self.bound_seconds <= 0 or self.seconds == float("inf"):
            return float("inf")
        return max(0.0, self.seconds / self.bound_seconds - 1)


@dataclass
class Search:
    """The limits of one search. Use one per call of a solver.

    Arguments:
        work: units of work: evaluated orders in local searches, nodes of a MILP, states of an exhaustive search,
            hundredths of CP-SAT's deterministic seconds. None: the solver's own default.
        seconds: of wall clock. None: no such limit, and a reproducible plan.
        tell: called with what there is, whenever it becomes better.

    Attributes:
        spent: units so far.
        is_cut_by_clock, is_interrupted, is_out_of_work: who ended the search before its own end.
    """

    work: int | None = None
    seconds: float | None = None
    tell: Callable[[Standing], None] | None = None
    spent: int = 0
    is_cut_by_clock: bool = False
    is_interrupted: bool = False
    is_out_of_work: bool = False
    _begin: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since the search was made."""
        return time.monotonic() - self._begin

    @property
    def seconds_left(self) -> float:
        """Seconds until the wall clock ends it; infinite without such a limit."""
        return float("inf") if self.seconds is None else max(0.0, self.seconds - self.elapsed)

    def spend(self, units: int = 1) -> bool:
        """Counts units of work; False where a limit is reached and the solver must end with its best so far."""
        if self.work is not None and self.spent + units > self.work:
            self.is_out_of_work = True
        if self.is_interrupted or self.is_cut_by_clock or self.is_out_of_work:
            return False
        if self.seconds is not None and self.elapsed > self.seconds:
            self.is_cut_by_clock = True
            return False
        self.spent += units
        return True

    @property
    def is_over(self) -> bool:
        """Whether a limit is reached or somebody ended it; counts nothing."""
        if self.seconds is not None and self.elapsed > self.seconds:
            self.is_cut_by_clock = True
        if self.work is not None and self.spent >= self.work:
            self.is_out_of_work = True
        return self.is_interrupted or self.is_cut_by_clock or self.is_out_of_work

    @property
    def ending(self) -> str:
        """What ended the search before its own end, in words; empty where nothing did."""
        if self.is_interrupted:
            return "ended by Ctrl-C"
        if self.is_cut_by_clock:
            return "cut by the clock"
        return f"ended by the limit of {self.work} units of work" if self.is_out_of_work else ""

    def inner(self) -> Search:
        """A search of its own work within what this one's clock has left."""
        return Search(seconds=None if self.seconds is None else self.seconds_left)

    def interrupt(self) -> None:
        """Ends the search at its next unit of work: what Ctrl-C does."""
        self.is_interrupted = True

    def report(self, standing: Standing) -> None:
        """Tells what there is."""
        if self.tell is not None:
            self.tell(standing)
