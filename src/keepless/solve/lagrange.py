"""Prices of memory that make the minimum cut meet a limit: bisection on their level, ascent on their shape.

`MinCut` answers "which ops run again at these prices". Here the prices are found: for a shape w over positions the
level is bisected until the exact peak of the woven order is just within the limit; then positions that were above
the limit in the last failing order gain weight, and again. Every order is evaluated exactly, so nothing rests on
the relaxation but the choice.

A cut of a graph with 4,000 ops takes some milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from keepless.solve.min_cut import MinCut
from keepless.solve.solution import Solution
from keepless.solve.tables import Floats, Ints, Tables
from keepless.solve.weave import lazy_order

_NEAR = 0.005
"""Of the limit: an order that leaves less is not mixed."""


@dataclass(frozen=True)
class Effort:
    """How many cuts one search may make.

    Arguments:
        families: that are bisected at all, those with the lowest peak at full recomputation.
        finalists: families whose prices are reshaped.
        rounds: of reshaping.
        levels: cuts per bisection.
        blends: mixtures of its last two cuts.
    """

    families: int
    finalists: int
    rounds: int
    levels: int
    blends: int

    @staticmethod
    def of(num_ops: int) -> Effort:
        """Some hundred cuts for ordinary graphs, some dozens for very large ones: seconds either way."""
        if num_ops <= 2000:
            return Effort(24, 4, 4, 14, 8)
        if num_ops <= 6000:
            return Effort(8, 3, 3, 10, 8)
        return Effort(5, 2, 2, 8, 8) if num_ops <= 15_000 else Effort(2, 1, 1, 6, 10)


@dataclass(frozen=True)
class Woven:
    """An order with what it costs."""

    order: list[int]
    seconds: float
    peak: int

    @staticmethod
    def judged(tables: Tables, order: Sequence[int]) -> Woven:
        """An order with its exact peak and seconds."""
        lives = tables.lives(order)
        return Woven(list(order), lives.seconds, lives.peak)

    @staticmethod
    def of(found: Solution) -> Woven:
        """A solution's order, which is judged already."""
        return Woven(list(found.order), found.seconds, found.peak)

    def beats(self, other: Woven | None, limit: int) -> bool:
        """Within the limit and faster; where neither fits, lower."""
        if other is None:
            return True
        mine, theirs = max(self.peak - limit, 0), max(other.peak - limit, 0)
        return (mine, self.seconds, self.peak) < (theirs, other.seconds, other.peak)


def better(first: Woven, second: Woven, limit: int) -> Woven:
    """The one that beats the other; the second where neither does."""
    return first if first.beats(second, limit) else second


@dataclass
class PriceSearch:
    """The search for one limit, over families of values that are kept in any case.

    Arguments:
        limit: bytes.
        best: the best order so far.
        seen: orders that other searches met, by their replays.
        tell: called with each order that fits and is the best so far.
    """

    tables: Tables
    limit: int
    best: Woven | None = None
    seen: dict[frozenset[int], tuple[Woven, Ints]] = field(default_factory=dict)
    tell: Callable[[Woven], None] | None = None

    def evaluate(self, replayed: set[int]) -> tuple[Woven, Ints]:
        """The woven order of a set of replays, and the highest bytes at each base position."""
        key = frozenset(replayed)
        if key not in self.seen:
            order = np.array(lazy_order(self.tables, replayed), np.int64)
            lives = self.tables.lives(order)
            woven = Woven(order.tolist(), lives.seconds, lives.peak)
            self.seen[key] = (woven, base_profile(self.tables, order, lives.profile))
        woven = self.seen[key][0]
        if woven.beats(self.best, self.limit):
            self.best = woven
            if self.tell is not None and woven.peak <= self.limit:
                self.tell(woven)
        return self.seen[key]

    def run(self, cuts: Iterable[MinCut]) -> Woven:
        """The best order over the cuts of all families."""
        effort = Effort.of(self.tables.num_ops)
        everything, profile = self.evaluate(set())
        if everything.peak <= self.limit:
            return everything
        shape = np.maximum(profile - self.limit, 0).astype(np.float64)
        starts: list[tuple[int, int, MinCut]] = []
        for cut in cuts:
            starts.append((self.evaluate(cut.everything())[0].peak, len(starts), cut))
        # The lowest of them leave the most room for what the prices choose; the first keeps nothing in any case.
        low = sorted(starts, key=lambda s: s[:2])[: effort.families]
        feasible = [s for s in low if s[0] <= self.limit] or low[:1]
        if effort.families > 2 and starts[0] not in feasible:
            feasible.append(starts[0])
        ranked: list[tuple[float, int, MinCut, Floats]] = []
        for _, _, cut in feasible:
            found, next_shape = self.bisect(cut, shape)
            ranked.append((found.seconds if found else np.inf, len(ranked), cut, next_shape))
        ranked.sort(key=lambda r: r[:2])
        for _, _, cut, next_shape in ranked[: effort.finalists]:
            for _ in range(effort.rounds):
                next_shape = self.bisect(cut, next_shape)[1]
        assert self.best is not None
        return self.best

    def bisect(self, cut: MinCut, shape: Floats) -> tuple[Woven | None, Floats]:
        """The cheapest order within the limit for prices of this shape, and a better shape."""
        total = float(shape.sum()) or 1.0
        unit = shape / total
        scale = float(self.tables.seconds.sum()) / max(self.limit, 1)
        low, high = scale * 1e-5, scale * 1e5
        found, failing = None, None
        fewer: set[int] = set()
        more: set[int] = set()
        for _ in range(Effort.of(self.tables.num_ops).levels):
            level = float(np.sqrt(low * high))
            replayed = cut.solve(unit * level)
            woven, profile = self.evaluate(replayed)
            if woven.peak <= self.limit:
                high, more = level, replayed
                found = woven if found is None or woven.seconds < found.seconds else found
            else:
                low, failing, fewer = level, profile, replayed
        if found is not None:
            found = min(found, self.blend(fewer, more), key=lambda woven: woven.seconds)
        if failing is not None:
            excess = np.maximum(failing - self.limit, 0).astype(np.float64)
            unit = 0.5 * unit + 0.5 * excess / max(float(excess.sum()), 1.0)
        return found, unit

    def blend(self, fewer: set[int], more: set[int]) -> Woven:
        """The fastest order of mixtures of two cuts: the first one's replays up to some op, the other's from there on.

        A cut jumps where many values share a price, as in equal layers or steps. Between the jump's ends the relaxed
        optimum takes a share of each, and so does a mixture. The other way round, the second one's replays first, it is
        rarely better.

        Arguments:
            fewer: replays that do not fit.
            more: replays that do.
        """
        best = self.evaluate(more)[0]
        if best.peak > self.limit * (1 - _NEAR):
            return best
        differing = sorted(fewer ^ more)
        low, high = 0, len(differing)  # the other's from here on fits; from there on not
        for _ in range(Effort.of(self.tables.num_ops).blends):
            if high - low <= 1:
                break
            middle = (low + high) // 2
            border = differing[middle]
            woven, _ = self.evaluate({p for p in fewer if p < border} | {p for p in more if p >= border})
            if woven.peak > self.limit:
                high = middle
            else:
                low = middle
                best = woven if woven.seconds < best.seconds else best
        return best


def base_profile(tables: Tables, order: Ints, profile: Ints) -> Ints:
    """Highest bytes at each base position: a replay counts for the next first run."""
    if not len(order):
        return profile
    first = np.sort(np.unique(order, return_index=True)[1])
    starts = np.concatenate([[0], first[:-1] + 1])
    slots = np.maximum.reduceat(profile, starts)
    result = np.zeros(tables.num_ops, np.int64)
    result[order[first]] = slots
    return result
