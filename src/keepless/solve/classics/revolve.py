"""The binomial schedule: reversing a chain of equal steps with a number of slots.

Griewank, Walther, "Algorithm 799: revolve", ACM TOMS 26(1), 2000. Let beta(c, r) = C(c + r, c). With c slots, the
start state's among them, and no step run more than r times before its backward, at most beta(c, r) steps can be
reversed, and l steps cost

    t(l, c) = r l - beta(c + 1, r - 1),    r minimal with beta(c, r) >= l

forward runs beside the one that goes with each backward (Theorem 1 there): exactly so many runs again. Recomputation
is multi-level: what is run again keeps checkpoints of its own.

The steps are the chain's stages, taken as equal. The number of slots follows from the limit by bisection over the
exact profiles, on chains from fine to coarse. A schedule costs O(its length).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb

from keepless.cost import CostModel
from keepless.errors import SolverError
from keepless.ir import Graph
from keepless.solve.classics.chain import Chain, chains, order_of
from keepless.solve.classics.trial import MOST_RUNS, Trial, turned
from keepless.solve.search import Search
from keepless.solve.solution import Solution
from keepless.solve.tables import Tables

_SPACE = "binomial schedules of stages with a number of slots"


@dataclass(frozen=True)
class Revolve:
    """Griewank and Walther's schedule; of all numbers of slots the fastest that fits, else the lowest."""

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The best order over chains and slots."""
        tables = Tables(graph, cost)
        trial = Trial("revolve", _SPACE, tables, limit_nbytes, search)
        if not trial.keeps_all:
            base = turned(tables)
            for chain in chains(base):
                _sweep(base, chain, trial)
        return trial.answer(seed)


def binomial_cost(steps: int, slots: int) -> int:
    """The fewest runs again that reverse `steps` equal steps with `slots` slots, the start state's among them.

    Raises:
        SolverError: there are steps and no slot, or a number is negative.
    """
    if steps < 0 or slots < 1:
        raise SolverError(f"A chain of {steps} steps with {slots} slots: steps must be 0 or more, and slots 1 or more.")
    repeats = _repeats(steps, slots)
    return repeats * steps - comb(slots + repeats, repeats - 1) if repeats else 0


def binomial_schedule(steps: int, slots: int) -> Iterator[int]:
    """The actions (`chain`) of an optimal schedule: `k` runs step k, `-k` its backward."""
    stack: list[tuple[int, int, int]] = [(1, steps, slots)]
    while stack:
        start, length, free = stack.pop()
        if length == 1:
            yield start
            yield -start
        elif length > 1:
            split = _split(length, free)
            yield from range(start, start + split)
            stack.append((start, split, free))
            stack.append((start + split, length - split, free - 1))


def _repeats(steps: int, slots: int) -> int:
    """The least r with beta(slots, r) >= steps."""
    repeats = 0
    while comb(slots + repeats, slots) < steps:
        repeats += 1
    return repeats


def _split(steps: int, slots: int) -> int:
    """Steps to run before the next checkpoint.

    Optimal is every split whose left part needs r - 1 or r - 2 repeats with all slots and whose right part needs r or
    r - 1 with one less; this is the smallest.
    """
    repeats = _repeats(steps, slots)
    right = comb(slots - 1 + repeats, slots - 1)
    least = comb(slots + repeats - 2, slots) if repeats >= 2 else 1
    return max(steps - right, least, 1)


def _sweep(tables: Tables, chain: Chain, trial: Trial) -> None:
    def order(index: int) -> list[int] | None:
        slots = index + 1
        if binomial_cost(chain.num, slots) > MOST_RUNS:
            return None
        return order_of(tables, chain, binomial_schedule(chain.num, slots), MOST_RUNS)

    trial.sweep(chain.num, order)
