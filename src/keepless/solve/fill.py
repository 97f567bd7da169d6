"""Replays taken out of an order where memory allows: many at a time, on a profile that is kept up to date.

Taking a replay out leaves what it made resident from its last read before, and its inputs free earlier; both are
known from the order's instances, so one replay costs O(its span) instead of a new evaluation of the order. What is
taken out together is then judged exactly: instances that two removals touch are only estimated here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from keepless.solve.tables import Lives, Tables


class Fill:
    """One pass over the replays of an order, the most seconds per byte first.

    Arguments:
        order: op ids.
        lives: its instances.
        limit: bytes.
    """

    def __init__(self, tables: Tables, order: Sequence[int], lives: Lives, limit: int) -> None:
        self._tables, self._order, self._lives, self._limit = tables, order, lives, limit
        self._profile = lives.profile.copy()
        self._gone: set[int] = set()
        self._ends: dict[tuple[int, int], int] = {}
        self._longer: set[tuple[int, int]] = set()
        runs = np.asarray(order, np.int64)
        self._is_replay = np.ones(len(runs), bool)
        self._is_replay[np.unique(runs, return_index=True)[1]] = False

    def groups(self) -> list[list[int]]:
        """Positions to take out: each replay that there is room for, with those that serve nothing but it."""
        seconds = self._tables.cost.seconds
        scored = []
        for position in np.flatnonzero(self._is_replay).tolist():
            nbytes = sum(self._tables.sizes[v] for v, _, _ in self._stays(position))
            scored.append((seconds[self._order[position]] / (nbytes + 1.0), position))
        scored.sort(reverse=True)
        found = []
        for _, position in scored:
            if position in self._gone:
                continue
            more = self._stays(position)
            less = self._is_freed(position) if more else []
            if not self._has_room(position, more, less):
                continue
            group = self._group(position)
            self._gone.update(group)
            for value, born, start in more:
                self._profile[start:position] += self._tables.sizes[value]
                self._longer.add((value, born))
            for value, born, start in less:
                self._profile[start : position + 1] -= self._tables.sizes[value]
                self._ends[value, born] = start - 1
            found.append(group)
        return found

    def _stays(self, position: int) -> list[tuple[int, int, int]]:
        """What is resident longer without the run at `position`: (value, start of its instance, from where on)."""
        lives, found = self._lives, []
        for v in self._tables.writes[self._order[position]]:
            born, end = lives.instance(v, position + 1)
            if born < 0 or end <= position:
                continue
            before, death = lives.instance(v, position)
            if before >= 0:
                found.append((v, before, min(self._ends.get((v, before), death), death) + 1))
        return found

    def _is_freed(self, position: int) -> list[tuple[int, int, int]]:
        """What is free earlier without it: (value, start of its instance, from where on)."""
        lives, found = self._lives, []
        for u in self._tables.reads[self._order[position]]:
            born, end = lives.instance(u, position)
            if born >= 0 and end == position and (u, born) not in self._longer:
                found.append((u, born, max(lives.last_read(u, position), born) + 1))
        return found

    def _has_room(
        self, position: int, more: Sequence[tuple[int, int, int]], less: Sequence[tuple[int, int, int]]
    ) -> bool:
        """Whether the profile stays within the limit without the run at `position`."""
        sizes = self._tables.sizes
        begin = min((start for _, _, start in more), default=position)
        if begin >= position:
            return True
        delta = self._profile[begin:position]
        if int(delta.max()) + sum(sizes[v] for v, _, _ in more) <= self._limit:
            return True
        delta = delta.copy()
        for value, _, start in more:
            delta[start - begin :] += sizes[value]
        for value, _, start in less:
            delta[max(start - begin, 0) :] -= sizes[value]
        return int(delta.max()) <= self._limit

    def _group(self, position: int) -> list[int]:
        """The position with those of replays that serve nothing else."""
        tables, lives, order = self._tables, self._lives, self._order
        found = {position}
        stack = [position]
        while stack:
            at = stack.pop()
            for u in tables.reads[order[at]]:
                born = lives.instance(u, at)[0]
                while born in self._gone or born in found:  # what it made is there from its run before
                    born = lives.instance(u, born)[0]
                if born >= 0 and self._is_replay[born] and not self._serves(born, found):
                    found.add(born)
                    stack.append(born)
        return sorted(found)

    def _serves(self, position: int, found: set[int]) -> bool:
        """Whether a run that stays reads what the one at `position` makes."""
        lives, gone = self._lives, self._gone
        for v in self._tables.writes[self._order[position]]:
            read = lives.next_read(v, position)
            while read >= 0:
                born = lives.instance(v, read)[0]
                while born > position and (born in gone or born in found):
                    born = lives.instance(v, born)[0]
                if born != position:
                    break
                if read not in gone and read not in found:
                    return True
                read = lives.next_read(v, read)
        return False


def take_out(
    order: list[int], groups: Sequence[Sequence[int]], judge: Callable[[list[int]], bool], may_go_on: Callable[[], bool]
) -> None:
    """Takes groups of positions out of an order, as many at once as `judge` takes.

    Arguments:
        judge: whether an order without them is taken.
        may_go_on: whether another order may be judged.
    """
    gone = np.zeros(len(order), bool)
    runs = np.asarray(order, np.int64)
    at, step = 0, len(groups)
    while at < len(groups) and may_go_on():
        step = min(step, len(groups) - at)
        trial = gone.copy()
        for group in groups[at : at + step]:
            trial[list(group)] = True
        if judge(runs[~trial].tolist()):
            gone = trial
            at += step
            step = 2 * step
        elif step == 1:
            at += 1
        else:
            step = max(1, step // 4)
