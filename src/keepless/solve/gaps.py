"""Local search on an order: evict a value over the gap between two of its uses, or take a replay out again.

`evict` looks at the highest position: a value that is resident there and not read there is forgotten after its
previous use, and its producer runs again right before its next use, with whatever else is missing there. Evicted
values may be replayed ones, so this reaches recomputation within recomputation. `fill` takes replays out where
memory allows, the most seconds for the fewest bytes first. Both judge an order by its exact profile.

The search is counted in evaluated orders, never in time, so that the same input gives the same plan.
"""

from __future__ import annotations

import numpy as np

from keepless.solve.tables import Ints, Lives, Tables
from keepless.solve.weave import strip

_TRIED = 6
"""Evictions evaluated exactly per step."""


class Gaps:
    """One order under improvement."""

    def __init__(self, tables: Tables, order: list[int], work: int) -> None:
        self.tables = tables
        self.order = order
        self.lives = tables.lives(order)
        self.work = work

    @property
    def peak(self) -> int:
        """Highest bytes on the device."""
        return self.lives.peak

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.lives.seconds

    def _try(self, order: list[int]) -> Lives:
        self.work -= 1
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
        top = int(profile.argmax())
        now = _excess(profile, target)
        best: tuple[float, list[int], Lives] | None = None
        for order in self._evictions(top, target)[:_TRIED]:
            lives = self._try(order)
            then = _excess(lives.profile, target)
            if lives.peak > self.lives.peak or then >= now:
                continue
            rate = (lives.seconds - self.lives.seconds + 1e-12) / (now - then)
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
        found: list[tuple[float, int, list[int]]] = []
        for value in lives.value[spans].tolist():
            producer = tables.producer[value]
            if producer < 0 or not tables.replayable[producer] or tables.sizes[value] == 0:
                continue
            use = lives.next_read(value, top - 1)
            if use <= top or use >= len(self.order) or (producer, use) in seen:
                continue
            seen.add((producer, use))
            again = self._replays(producer, use, top, target)
            if again is None:
                continue
            cost = float(tables.seconds[again].sum())
            found.append(((cost + 1e-12) / tables.sizes[value], value, [*self.order[:use], *again, *self.order[use:]]))
        found.sort(key=lambda f: f[:2])
        return [f[2] for f in found]

    def _replays(self, producer: int, use: int, top: int, target: int) -> list[int] | None:
        """The ops to run before position `use` so that `producer`'s outputs are there; None where it cannot be."""
        tables, lives = self.tables, self.lives
        found, stack = {producer}, [producer]
        while stack:
            for u in tables.reads[stack.pop()]:
                at = lives.instance(u, use)
                if at < 0:
                    return None
                death = int(lives.end[at])
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
        refused: set[tuple[int, int]] = set()
        while self.work > 0:
            order = self._unreplay(limit, refused)
            if order is None:
                return changed
            changed = True
        return changed

    def _unreplay(self, limit: int, refused: set[tuple[int, int]]) -> list[int] | None:
        tables, order = self.tables, self.order
        runs = np.asarray(order, np.int64)
        replays = np.setdiff1d(np.arange(len(runs)), np.unique(runs, return_index=True)[1])
        count: dict[int, int] = {}
        scored = []
        for position in replays.tolist():
            op_id = order[position]
            count[op_id] = count.get(op_id, 0) + 1
            if (op_id, count[op_id]) in refused:
                continue
            room, nbytes = self._room(op_id, position, limit)
            if room >= 0:
                scored.append((float(tables.seconds[op_id]) / (nbytes + 1.0), position, count[op_id]))
        scored.sort(reverse=True)
        for _, position, turn in scored:
            if self.work <= 0:
                return None
            candidate = strip(tables, [*order[:position], *order[position + 1 :]])
            lives = self._try(candidate)
            if lives.peak <= limit and lives.seconds < self.lives.seconds:
                self._take(candidate, lives)
                return candidate
            refused.add((order[position], turn))
        return None

    def _room(self, op_id: int, position: int, limit: int) -> tuple[int, int]:
        """Bytes below the limit if the run at `position` were taken out, and the bytes times share it holds."""
        tables, lives = self.tables, self.lives
        begin, total = position, 0
        parts: list[tuple[int, int]] = []
        for v in tables.writes[op_id]:
            at = lives.instance(v, position + 1)
            if at < 0 or lives.end[at] <= position:
                continue
            before = lives.instance(v, position)
            if before < 0:
                continue
            parts.append((int(lives.end[before]) + 1, tables.sizes[v]))
            begin = min(begin, parts[-1][0])
            total += tables.sizes[v]
        if not parts:
            return limit, 0
        delta = lives.profile[begin:position].copy()
        for start, size in parts:
            delta[start - begin :] += size
        for u in tables.reads[op_id]:
            at = lives.instance(u, position)
            if at >= 0 and lives.end[at] == position:
                back = max(lives.last_read(u, position), int(lives.start[at])) + 1
                delta[max(back - begin, 0) :] -= tables.sizes[u]
        return limit - int(delta.max(initial=0)), total


def _excess(profile: Ints, target: int) -> float:
    over = np.maximum(profile - target, 0).astype(np.float64)
    return float((over * over).sum())
