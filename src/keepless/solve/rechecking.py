"""Certificates checked by whoever reads them: the bounds again, without the search that found the plan."""

from __future__ import annotations

from dataclasses import dataclass

from keepless.cost import CostModel
from keepless.ir import Certificate, Graph
from keepless.passes import evaluate
from keepless.solve.bound import is_huge, witness_prices
from keepless.solve.exact.hunt import hunted
from keepless.solve.floor import floor_bound
from keepless.solve.moment_cut import cut_bound
from keepless.solve.moments import Relaxation
from keepless.solve.tables import Tables

EXHAUSTIVE = "exhaustive:"
"""How the witness of a graph begins that was searched until nothing could be faster."""
FREE_SPACE = "ops in any order, any number of recomputations"
_TOLERANCE = 1e-6
"""Relative: what a check may fall short of a claim by, for rounding."""


@dataclass(frozen=True)
class Recheck:
    """A certificate beside what its witness gives.

    Arguments:
        bound_seconds: recomputed from the witness's moments and prices.
        bound_bytes: recomputed floor.
        claimed_seconds, claimed_bytes: what the certificate says.
    """

    bound_seconds: float
    bound_bytes: int
    claimed_seconds: float
    claimed_bytes: int

    @property
    def holds(self) -> bool:
        """Whether nothing more is claimed than is proven."""
        return self.claimed_seconds <= self.bound_seconds * (1 + _TOLERANCE) and self.claimed_bytes <= self.bound_bytes


def recheck(graph: Graph, cost: CostModel, limit: int, certificate: Certificate) -> Recheck:
    """Recomputes a certificate's bounds from its witness, without the search that found it.

    A graph that was searched exhaustively is searched again.

    Arguments:
        limit: bytes that the bound on seconds is for.

    Raises:
        SolverError: the witness cannot be read, or names what the graph does not have.
    """
    tables = Tables(graph, cost)
    seconds = float(tables.seconds.sum())
    prices = witness_prices(certificate.witness, tables)
    if certificate.witness.startswith(EXHAUSTIVE):
        found = hunted(graph, cost, limit, any_order=certificate.space == FREE_SPACE)
        if found.is_over and found.order is not None:
            seconds = evaluate(graph, cost, found.order).seconds
        elif found.is_over:
            seconds = float("inf")
    elif prices:
        relaxation = Relaxation(tables)
        if is_huge(tables):
            seconds += max(cut_bound(relaxation, limit, op, price).seconds for op, price in prices.items())
        else:
            seconds += relaxation.bound(limit, list(prices), prices).seconds
    return Recheck(seconds, floor_bound(graph, cost)[0], certificate.bound_seconds, certificate.bound_bytes)


def can_recheck(certificate: Certificate) -> bool:
    """Whether the certificate has a witness that can be checked."""
    return certificate.witness.startswith(("moments ", EXHAUSTIVE))
