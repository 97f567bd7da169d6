"""Local search on an order: evict a value over the gap between two of its uses, or take a replay out again.

`evict` looks at the highest position: a value that is resident there and not read there is forgotten after its
previous use, and its producer runs again right before its next use, with whatever else is missing there. Evicted
values may be replayed ones, so this reaches recomputation within recomputation. `fill` takes replays out where
memory allows, the most seconds for the fewest bytes first. Both judge an order by its exact profile.

The search is counted in evaluated orders, never in time, so that the same input gives the same plan. With a random
generator an eviction's rate of seconds per byte is taken up to twice as high as it is: other evictions get their turn.
"""

from __future__ import annotations

import random

import numpy as np

from keepless.solve.fill import Fill, take_out
from keepless.solve.lagrange import Woven
from keepless.solve.search import Search
from keepless.solve.tables import Ints, Lives, Tables

_TRIED = 6
"""Evictions evaluated exactly per step."""
_SCORED = 64
"""Values whose replays are looked at per step."""
_PASSES = 3


class Gaps:
    """One order under improvement.

    Arguments:
        order: op ids.
        work: orders that may be evaluated.
        rng: blurs the choice of evictions.
        search: counts what is evaluated, and may end it.
    """

    def __init__(
        self,
        tables: Tables,
        order: list[int],
        work: int,
        rng: random.Random | None = None,
        search: Search | None = None,
    ) -> None:
        self.tables = tables
        self.order = order
        self.lives = tables.lives(order)
        self.work = work
        self.rng = rng
        self.search = search

    @property
    def peak(self) -> int:
        """Highest bytes on the device."""
        return self.lives.peak

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.lives.seconds

    @property
    def woven(self) -> Woven:
        """The order as it is now."""
        return Woven(self.order, self.seconds, self.peak)

    def _try(self, order: list[int]) -> Lives:
        self.work -= 1
        if self.search is not None and not self.search.spend():
            self.work = 0
        return self.tables.lives(order)

    def _take(self, order: list[int], lives: Lives) -> None:
        self.order, self.lives = order, lives

    def evict(self, target: int) -> bool:
        """Evict until the peak is within `target`; False where no eviction helps or the work is spent."""
        while self.work > 0:
            if self.lives.peak <= target:
                return True
            if not self._evict_once(target):
                return False
        return self.lives.peak <= target

    def _evict_once(self, target: int) -> bool:
        profile = self.lives.profile
        if not profile.size:  # a graph without ops
            return False
        top = int(profile.argmax())
        now = _excess(profile, target)
        best: tuple[float, list[int], Lives] | None = None
        for order in self._evictions(top, target):
            lives = self._try(order)
            then = _excess(lives.profile, target)
            if lives.peak > self.lives.peak or then >= now:
                continue
            rate = (lives.seconds - self.lives.seconds + 1e-12) / (now - then)
            if self.rng is not None:
                rate *= 1 + self.rng.random()
            if best is None or rate < best[0]:
                best = (rate, order, lives)
        if best is None:
            return False
        self._take(best[1], best[2])
        return True

    def _evictions(self, top: int, target: int) -> list[list[int]]:
        """Orders with one value evicted over position `top`, the best seconds per byte first."""
        tables, lives = self.tables, self.lives
        spans = np.flatnonzero((lives.start < top) & (lives.end > top))
        seen: set[tuple[int, int]] = set()
        found: list[tuple[float, int, int, list[int]]] = []
        resident = [
            v
            for v in lives.value[spans].tolist()
            if tables.sizes[v] and tables.producer[v] >= 0 and tables.replayable[tables.producer[v]]
        ]
        seconds = tables.cost.seconds
        resident.sort(key=lambda v: seconds[tables.producer[v]] / tables.sizes[v])
        for value in resident[:_SCORED]:
            producer = tables.producer[value]
            use = lives.next_read(value, top - 1)
            if use <= top or use >= len(self.order) or (producer, use) in seen:
                continue
            seen.add((producer, use))
            again = self._replays(producer, use, top, target)
            if again is None:
                continue
            cost = sum(map(seconds.__getitem__, again))
            found.append(((cost + 1e-12) / tables.sizes[value], value, use, again))
        found.sort(key=lambda f: f[:2])
        return [[*self.order[:use], *again, *self.order[use:]] for _, _, use, again in found[:_TRIED]]

    def _replays(self, producer: int, use: int, top: int, target: int) -> list[int] | None:
        """The ops to run before position `use` so that `producer`'s outputs are there; None where it cannot be."""
        tables, lives = self.tables, self.lives
        found, stack = {producer}, [producer]
        while stack:
            for u in tables.reads[stack.pop()]:
                born, death = lives.instance(u, use)
                if born < 0:
                    return None
                if death >= use:
                    continue
                maker = tables.producer[u]
                if death >= top and int(lives.profile[death + 1 : use].max(initial=0)) + tables.sizes[u] <= target:
                    continue
                if maker < 0 or not tables.replayable[maker]:
                    continue
                if maker not in found:
                    found.add(maker)
                    stack.append(maker)
        return sorted(found)

    def fill(self, limit: int) -> bool:
        """Take replays out while the peak stays within `limit`; True if any was."""
        changed = False
        for _ in range(_PASSES):
            if not self._fill_pass(limit):
                break
            changed = True
        return changed

    def _fill_pass(self, limit: int) -> bool:
        """Take out what there is room for, the most seconds per byte first."""
        before = self.lives

        def judge(order: list[int]) -> bool:
            lives = self._try(order)
            if lives.peak > limit or lives.seconds >= self.lives.seconds:
                return False
            self._take(order, lives)
            return True

        take_out(self.order, Fill(self.tables, self.order, self.lives, limit).groups(), judge, lambda: self.work > 0)
        return self.lives is not before


def _excess(profile: Ints, target: int) -> float:
    over = np.maximum(profile - target, 0).astype(np.float64)
    return float((over * over).sum())
