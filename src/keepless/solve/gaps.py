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

from keepless.solve.lagrange import Woven
from keepless.solve.search import Search
from keepless.solve.tables import Ints, Lives, Tables
from keepless.solve.weave import useful

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
        """Try each replay once, the most seconds per byte first."""
        seconds = self.tables.cost.seconds
        runs = np.asarray(self.order, np.int64)
        replays = np.setdiff1d(np.arange(len(runs)), np.unique(runs, return_index=True)[1])
        scored = []
        for position in replays.tolist():
            room, nbytes = self._room(position, limit)
            if room >= 0:
                scored.append((seconds[self.order[position]] / (nbytes + 1.0), position))
        scored.sort(reverse=True)
        changed = False
        now = np.arange(len(runs))  # where each position of the pass's first order is now; -1 if it is gone
        for _, original in scored:
            position = int(now[original])
            if position < 0 or self._room(position, limit)[0] < 0:
                continue
            if self.work <= 0:
                break
            without = [*self.order[:position], *self.order[position + 1 :]]
            kept = useful(self.tables, without) if self._orphans(position) else range(len(without))
            candidate = [without[p] for p in kept] if len(kept) < len(without) else without
            lives = self._try(candidate)
            if lives.peak <= limit and lives.seconds < self.lives.seconds:
                old = np.array(kept, np.int64)
                moved = np.full(len(self.order), -1, np.int64)
                moved[old + (old >= position)] = np.arange(len(old))
                now = np.where(now >= 0, moved[now], -1)
                self._take(candidate, lives)
                changed = True
        return changed

    def _orphans(self, position: int) -> bool:
        """Whether a replay serves only the run at this position."""
        for u in self.tables.reads[self.order[position]]:
            born, end = self.lives.instance(u, position)
            if born >= 0 and end == position and self.order.index(self.order[born]) < born:
                return True
        return False

    def _room(self, position: int, limit: int) -> tuple[int, int]:
        """Bytes below the limit if the run at `position` were taken out, and the bytes of its outputs."""
        tables, lives = self.tables, self.lives
        op_id = self.order[position]
        begin, total = position, 0
        parts: list[tuple[int, int]] = []
        for v in tables.writes[op_id]:
            born, end = lives.instance(v, position + 1)
            if born < 0 or end <= position:
                continue
            before, death = lives.instance(v, position)
            if before < 0:
                continue
            parts.append((death + 1, tables.sizes[v]))
            begin = min(begin, death + 1)
            total += tables.sizes[v]
        if not parts or begin >= position:
            return limit, total
        delta = lives.profile[begin:position]
        if len(parts) == 1 and limit - int(delta.max()) >= total:
            return limit - int(delta.max()) - total, total
        delta = delta.copy()
        for start, size in parts:
            delta[start - begin :] += size
        for u in tables.reads[op_id]:
            born, end = lives.instance(u, position)
            if born >= 0 and end == position:
                back = max(lives.last_read(u, position), born) + 1
                delta[max(back - begin, 0) :] -= tables.sizes[u]
        return limit - int(delta.max()), total


def _excess(profile: Ints, target: int) -> float:
    over = np.maximum(profile - target, 0).astype(np.float64)
    return float((over * over).sum())
