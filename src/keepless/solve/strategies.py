"""What named strategies reach, to be shown beside the planner's curve.

Those that need no limit are there once, block checkpointing once per block length; those that solve for a limit are
asked for their lowest peak and for a limit between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from keepless.errors import SolverError
from keepless.ir import Certificate, Status
from keepless.solve import SOLVERS, named_solver
from keepless.solve.baselines import block_ends, checkpointed
from keepless.solve.planner import Planner
from keepless.solve.solution import Solution, solution

CHEAP = ("keep_all", "recompute_all", "every_k", "sqrt_n", "revolve", "rotor", "dtr", "min_cut", "knapsack")
"""Solvers that take little beside the curve itself; the others are shown by request."""
_WITHOUT_LIMIT = ("keep_all", "recompute_all")
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Blocks per checkpoint that are shown."""


@dataclass(frozen=True)
class Strategy:
    """What one strategy reaches.

    Arguments:
        name: in the table of solvers; block checkpointing with its block length, "every_k(2)".
        peak: highest bytes on the device.
        seconds: of the step, predicted.
    """

    name: str
    peak: int
    seconds: float


def named_strategies(
    planner: Planner, names: Sequence[str] | None, limits: Sequence[int], seed: int = 0
) -> list[tuple[Strategy, Solution]]:
    """The strategies with their solutions, each (peak, seconds) of a name once.

    Arguments:
        names: in `keepless.solve.SOLVERS`; None for those of `CHEAP` that are there.
        limits: for solvers that need one.
    """
    chosen = [name for name in CHEAP if name in SOLVERS] if names is None else list(dict.fromkeys(names))
    found: dict[tuple[str, int, float], tuple[Strategy, Solution]] = {}
    for name in chosen:
        for label, solved in _solutions(planner, name, limits, seed):
            one = Strategy(label, solved.peak, solved.seconds)
            found.setdefault((name, one.peak, one.seconds), (one, solved))
    return list(found.values())


def check_strategies(names: Sequence[str] | None) -> None:
    """Refuses names that are not in the table of solvers.

    Raises:
        SolverError: there is no such solver.
    """
    if isinstance(names, str):
        raise SolverError(f"Strategies are a list of names, not the text {names!r}: write [{names!r}].")
    for name in names or ():
        if not isinstance(name, str):
            raise SolverError(f"A strategy is a solver's name, not a {type(name).__name__}.")
        named_solver(name)


def _solutions(planner: Planner, name: str, limits: Sequence[int], seed: int) -> Iterator[tuple[str, Solution]]:
    graph, cost = planner.graph, planner.cost
    if name == "every_k":
        blocks = block_ends(planner.tables)
        for k in (k for k in _LENGTHS if k == 1 or k <= len(blocks) // 2):
            order = checkpointed(planner.tables, blocks, k)
            yield f"every_k({k})", solution(graph, cost, order, Certificate(name, Status.FEASIBLE, seed=seed))
        return
    for limit in limits[:1] if name in _WITHOUT_LIMIT else limits:
        yield name, named_solver(name).solve(graph, cost, limit, seed)
