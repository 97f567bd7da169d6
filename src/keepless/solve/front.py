"""Plans as pairs of bytes and seconds: which of them nothing beats, and where to look for the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from keepless.ir import Certificate
from keepless.solve.bound import witness_prices
from keepless.solve.solution import Solution
from keepless.solve.tables import Tables

T = TypeVar("T")

LESS = 1 - 1e-9
"""A time counts as shorter below this share of another: sums in another order differ in their last digits."""


@dataclass(frozen=True)
class Point:
    """One plan of a curve: the fastest known for every limit from its peak up to the next point's peak.

    Arguments:
        limit_nbytes: the limit that it was solved for; its own peak if it is a named strategy's.
        solution: order, program, peak and seconds.
        bound_seconds: no plan of the planner's space within `solution.peak` is faster.
    """

    limit_nbytes: int
    solution: Solution
    bound_seconds: float

    @property
    def peak(self) -> int:
        """Highest bytes on the device."""
        return self.solution.peak

    @property
    def seconds(self) -> float:
        """Of the step, predicted."""
        return self.solution.seconds

    @property
    def num_replays(self) -> int:
        """Runs of ops beyond the first."""
        return self.solution.program.num_replays


@dataclass(frozen=True, slots=True)
class Line:
    """A bound for every limit: the dual function of memory at fixed prices (`moments`) is linear in the limit.

    Arguments:
        limit_nbytes: the limit that the prices are best for.
        seconds: no plan of the planner's space within that limit is faster.
        price: of a byte, in seconds, over all moments; 0 where every op runs once.
        witness: moments and prices, as in a certificate.
    """

    limit_nbytes: int
    seconds: float
    price: float
    witness: str = ""

    def at(self, limit_nbytes: int) -> float:
        """Seconds that every step within this limit takes at least."""
        return self.seconds + self.price * (self.limit_nbytes - limit_nbytes)

    @staticmethod
    def of(tables: Tables, limit_nbytes: int, certificate: Certificate) -> Line:
        """What a certificate for one limit says of all."""
        if not certificate.witness.startswith("moments "):  # proven for this limit alone
            return Line(limit_nbytes, float(tables.seconds.sum()), 0.0, "moments none")
        prices = witness_prices(certificate.witness, tables)
        return Line(limit_nbytes, certificate.bound_seconds, sum(prices.values()), certificate.witness)


def front_of(items: Iterable[T], key: Callable[[T], tuple[int, float]]) -> list[T]:
    """Items by (bytes, seconds) that no other item is below in both, ascending in bytes, falling in seconds."""
    kept: list[T] = []
    fastest = float("inf")
    for item in sorted(items, key=key):
        seconds = key(item)[1]
        if seconds < fastest * LESS or not kept:
            kept.append(item)
            fastest = seconds
    return kept


def next_limit(solved: Mapping[int, Solution]) -> int | None:
    """The middle of the widest rectangle between solved limits, bytes times seconds; None where nothing is open."""
    best, chosen = 0.0, None
    limits = sorted(limit for limit in solved if solved[limit].peak <= limit)
    fastest = float("inf")
    for left, right in pairwise(limits):
        fastest = min(fastest, solved[left].seconds)
        until = min(right, solved[right].peak)  # from there on the right one's plan serves
        area = (until - left) * (fastest - solved[right].seconds)
        if until - left > 1 and area > best:
            best, chosen = area, (left + until) // 2
    return chosen
