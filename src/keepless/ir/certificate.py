"""What a solver claims about a plan, and what the claim rests on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    """How a search ended."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    PROVEN_INFEASIBLE = "proven infeasible"
    NOT_FOUND = "not found"
    TIME_LIMITED = "time limited"


@dataclass(frozen=True, slots=True)
class Certificate:
    """A solver's claim.

    Arguments:
        solver: its name in the table of solvers.
        status: how the search ended.
        space: what it searched, in words: the order, recomputes per op.
        bound_seconds: no plan in that space has a faster step (0 where nothing is proven).
        bound_bytes: no plan at all has a lower peak.
        witness: what the bounds rest on: "moments OP:PRICE ...; bytes at op OP" (see `keepless.solve.bound`).
        solve_seconds: time of the search.
        seed: of the search.
    """

    solver: str
    status: Status
    space: str = ""
    bound_seconds: float = 0.0
    bound_bytes: int = 0
    witness: str = ""
    solve_seconds: float = 0.0
    seed: int = 0
