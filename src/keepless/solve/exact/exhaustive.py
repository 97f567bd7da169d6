"""The oracle as a solver: the fastest order of all for graphs of up to some twenty ops (`hunt`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from keepless.cost import CostModel
from keepless.ir import Certificate, Graph, Status
from keepless.passes import evaluate
from keepless.solve.exact.hunt import Hunt, may_run_again, refusal
from keepless.solve.exact.known import captured_order, known, settle
from keepless.solve.exact.masks import Masks
from keepless.solve.floor import floor_bound
from keepless.solve.search import Search
from keepless.solve.solution import Solution


@dataclass(frozen=True)
class Exhaustive:
    """The oracle for small graphs.

    Arguments:
        any_order: also over the orders of first runs that the rules allow.
        backward_again: also over recomputations of ops from the LOSS op on, as the machine allows.
        most_ops: larger graphs are not searched.
        work: states, where the search says none.
    """

    any_order: bool = False
    backward_again: bool = True
    most_ops: int = 40
    work: int = 100_000

    @property
    def space(self) -> str:
        """What is searched, in words."""
        order = "any order that the rules allow" if self.any_order else "the captured order"
        again = "every op" if self.backward_again else "every forward op"
        return (
            f"every op runs, first runs in {order}, any number of recomputations of {again} that may run again and "
            "makes nothing pinned"
        )

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The fastest order within the limit; the planner's where the search cannot end."""
        begin = time.perf_counter()
        search = search or Search()
        least = float(sum(cost.seconds))
        bound_bytes, _ = floor_bound(graph, cost)
        order: Sequence[int] = captured_order(graph)
        status, witness = Status.FEASIBLE, ""
        peak = evaluate(graph, cost, order).peak
        if peak <= limit_nbytes:
            status, witness = Status.OPTIMAL, "every op runs once"
        elif limit_nbytes < bound_bytes:
            status, witness = Status.PROVEN_INFEASIBLE, f"one op needs {bound_bytes} bytes"
            order = self._known(graph, cost, limit_nbytes, seed, search)
        elif reason := refusal(graph, self.most_ops):
            witness = reason
            order = self._known(graph, cost, limit_nbytes, seed, search)
        else:
            masks = Masks(graph, cost, may_run_again(graph, self.backward_again))
            hunt = Hunt(masks, limit_nbytes, self.any_order, search, self.work, peak)
            path = hunt.run()
            is_higher = path is not None and evaluate(graph, cost, path).peak > limit_nbytes
            if is_higher:  # a value that two ops make once each stands twice where the second is made
                path = None
            least += hunt.bound if hunt.bound < inf else 0.0
            reach = "all that could be faster" if hunt.is_over else "then the limit of work"
            witness = f"{hunt.states} states, {reach}"
            if is_higher:
                witness = f"{hunt.states} states, the last of which is higher than it was taken for"
            elif hunt.is_over:
                status = Status.PROVEN_INFEASIBLE if path is None else Status.OPTIMAL
            order = self._known(graph, cost, limit_nbytes, seed, search) if path is None else path
        claim = Certificate(
            "exhaustive", status, self.space, least, bound_bytes, witness, time.perf_counter() - begin, seed
        )
        return settle(graph, cost, order, claim, limit_nbytes, search)

    def _known(self, graph: Graph, cost: CostModel, limit: int, seed: int, search: Search) -> Sequence[int]:
        return known(graph, cost, limit, seed, search, any_order=self.any_order).order
