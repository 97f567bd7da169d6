"""What a solver gives: an order of ops, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

from keepless.cost import CostModel
from keepless.ir import Certificate, Graph, Program
from keepless.passes import evaluate, from_order, reuse_storage
from keepless.solve.search import Search


@dataclass(frozen=True)
class Solution:
    """An order and what follows from it.

    Arguments:
        order: op ids; repeats are recomputation.
        seconds: of the step, predicted.
        peak: highest bytes on the device, predicted.
        certificate: the solver's claim.
        program: drops and storage reuse applied.
        smallest_nbytes: the smallest peak that was found for this graph (0 where it was not looked for).
        smallest_bound: no program has a lower peak.
    """

    order: tuple[int, ...]
    seconds: float
    peak: int
    certificate: Certificate
    program: Program = field(repr=False, compare=False)
    smallest_nbytes: int = 0
    smallest_bound: int = 0

    def stating(self, smallest_nbytes: int, smallest_bound: int) -> Solution:
        """The same solution with the smallest peak stated."""
        return replace(self, smallest_nbytes=smallest_nbytes, smallest_bound=smallest_bound)


class Solver(Protocol):
    """Read as: an order for this graph whose peak is within the limit, or as low as the solver finds.

    A solver does not raise where nothing fits: the solution's peak is then above the limit and its status says so.
    """

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The solver's best order.

        Arguments:
            limit_nbytes: of the peak.
            seed: the same one gives the same order.
            search: limits of work; None for the solver's own.
        """


def solution(graph: Graph, cost: CostModel, order: list[int], certificate: Certificate) -> Solution:
    """A solution from its order, evaluated by the machine's rules."""
    found = evaluate(graph, cost, order)
    program = reuse_storage(graph, from_order(graph, order))
    return Solution(tuple(order), found.seconds, found.peak, certificate, program)
