"""The table of the heterogeneous chain: the least seconds of every stretch of stages in every amount of memory.

Beaumont, Eyraud-Dubois, Hermann, Joly, Shilova, "Optimal checkpointing for heterogeneous chains: how to train deep
neural networks with limited memory", arXiv 1911.13214 (2019), equations (1) to (3). With the input of stage s there
and m slots beside it, the forwards of stages s to t and their backwards cost (backward seconds left out, since they
are the same in every schedule)

    C(s, s, m) = leaf(s)                                                      if m >= saving(s) + grads(s), back(s)
    C(s, t, m) = min( f(s) + C(s+1, t, m - saved(s))                          keep all of stage s
                      min over k of f(s..k) + C(k+1, t, m - cut(s, k)) + C(s, k, m) )    keep the input of stage k+1

where the stages that are passed and their backward must fit, too. leaf(s) is what the backward wants of f(s) (all of
it in the paper); cut(s, k) is what the cut after k adds to the cut before s, so that skips over several stages are
priced once. The result is the optimum over persistent schedules (what is kept stays until its backward) of the
slotted sizes, which are rounded up.

Stretches that look the same, stage by stage, have one row: n equal stages have n rows, not n squared. Complexity: the
sum over rows of length times slots; 1,000 equal stages between a head and a tail in 300 slots take seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keepless.solve.classics.chain import Chain
from keepless.solve.search import Search
from keepless.solve.tables import Floats, Ints

_KEEP_ALL = 0
_NONE = -1


@dataclass(frozen=True)
class Slotted:
    """A chain in slots: bytes divided by `unit`, rounded up. See `Chain` for the arrays."""

    unit: float
    seconds: Floats
    leaf: Floats
    fresh: Ints
    saved: Ints
    passing: Ints
    saving: Ints
    back: Ints
    grads: Ints

    @staticmethod
    def of(chain: Chain, unit: float) -> Slotted:
        """The chain's sizes in slots of `unit` bytes."""

        def up(nbytes: Floats) -> Ints:
            slots: Ints = np.ceil(nbytes / unit - 1e-9).astype(np.int64)
            return slots

        return Slotted(
            unit,
            chain.seconds,
            chain.leaf,
            up(chain.fresh),
            up(chain.saved),
            up(chain.passing),
            up(chain.saving),
            up(chain.back),
            up(chain.grads),
        )

    @property
    def num(self) -> int:
        """How many stages."""
        return len(self.seconds)


@dataclass(frozen=True)
class Rows:
    """Stretches of stages that look the same share a row.

    Arguments:
        of: `of[s, t]` is the row of stages s to t.
        first: per row, the first stage of one such stretch; rows ascend in length.
        length: per row.
    """

    of: npt.NDArray[np.int32]
    first: Ints
    length: Ints


def rows_of(sizes: Slotted, most_cells: int) -> Rows | None:
    """The rows of a chain; None where the sum of their lengths exceeds `most_cells`. O(stages squared)."""
    num = sizes.num
    columns = (sizes.seconds, sizes.leaf, sizes.saved, sizes.passing, sizes.saving, sizes.back, sizes.grads)
    kinds = np.stack([np.asarray(c, np.float64) for c in columns], axis=1)
    _, example, kind = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    of = np.full((num + 2, num + 2), _NONE, np.int32)
    stages = np.arange(1, num + 1)
    of[stages, stages] = kind.reshape(-1)
    first, length = [example + 1], [np.ones(len(example), np.int64)]
    count, cells = len(example), len(example)
    span = int(sizes.fresh.max(initial=0)) + 1
    for size in range(2, num + 1):
        s = np.arange(1, num - size + 2)
        t = s + size - 1
        keys = of[s, t - 1].astype(np.int64) * count + of[s + 1, t]
        _, keys = np.unique(keys, return_inverse=True)
        _, example, kind = np.unique(keys * span + sizes.fresh[s - 1, t - 1], return_index=True, return_inverse=True)
        of[s, t] = count + kind
        count += len(example)
        cells += size * len(example)
        if cells > most_cells:
            return None
        first.append(s[example])
        length.append(np.full(len(example), size, np.int64))
    return Rows(of, np.concatenate(first), np.concatenate(length))


class RotorTable:
    """The solved table.

    Arguments:
        sizes: the chain in slots.
        rows: of `rows_of`.
        slots: memory from 0 to this many slots.
        search: asked for the clock and interrupts now and then.

    Attributes:
        is_complete: False where the search ended it.
    """

    def __init__(self, sizes: Slotted, rows: Rows, slots: int, search: Search) -> None:
        self._sizes, self._rows, self.slots = sizes, rows, slots
        self._width = slots + 1
        self._cost = np.full((len(rows.first), 2 * self._width), np.inf)
        self._windows = np.lib.stride_tricks.sliding_window_view(self._cost.reshape(-1), self._width)
        self._choice = np.full((len(rows.first), self._width), _NONE, np.int16)
        self._until = np.concatenate([[0.0], np.cumsum(sizes.seconds)])
        self.is_complete = True
        for row in range(len(rows.first)):
            if row % 64 == 0 and not search.spend(0):
                self.is_complete = False
                return
            start, length = int(rows.first[row]), int(rows.length[row])
            if length == 1:
                self._leaf(row, start)
            else:
                self._stretch(row, start, start + length - 1)

    def cost(self, first: int, last: int) -> Floats:
        """Seconds of all forwards of the stages `first` to `last`, for 0 to `slots` slots; infinite where none fits."""
        found: Floats = self._cost[self._rows.of[first, last], self._width :]
        return found

    def schedule(self, first: int, last: int, slots: int) -> Iterator[int]:
        """The actions (`chain`) of an optimal schedule in so many slots, for a finite cost."""
        sizes = self._sizes
        stack: list[tuple[int, int, int]] = [(first, last, slots)]
        while stack:
            s, t, m = stack.pop()
            if s < 0:
                yield s
                continue
            choice = int(self._choice[self._rows.of[s, t], m])
            if choice == _KEEP_ALL:
                yield s
                stack.append((-s, 0, 0))
                if s < t:
                    stack.append((s + 1, t, m - int(sizes.saved[s - 1])))
            else:
                k = s + choice - 1
                yield from range(s, k + 1)
                stack.append((s, k, m))
                stack.append((k + 1, t, m - int(sizes.fresh[s - 1, k])))

    def _leaf(self, row: int, s: int) -> None:
        sizes = self._sizes
        need = max(int(sizes.saving[s - 1] + sizes.grads[s - 1]), int(sizes.back[s - 1]))
        if need < self._width:
            self._cost[row, self._width + need :] = sizes.leaf[s - 1]
            self._choice[row, need:] = _KEEP_ALL

    def _stretch(self, row: int, s: int, t: int) -> None:
        sizes, rows, width = self._sizes, self._rows, self._width
        memory = np.arange(width)
        cuts = np.arange(s, t)
        shift = np.minimum(sizes.fresh[s - 1, s:t], width)
        right = self._shifted(rows.of[s + 1 : t + 1, t], shift)
        total = right + self._cost[rows.of[s, s:t], width:]
        total += (self._until[cuts] - self._until[s - 1])[:, None]
        need = np.maximum.accumulate(sizes.passing[s - 1 : t - 1] + sizes.fresh[s - 1, s - 1 : t - 1])
        need = need + sizes.grads[t - 1]
        few = min(int(need[-1]), width)
        total[:, :few][memory[None, :few] < need[:, None]] = np.inf
        cost = total.min(axis=0)
        best = (total == cost).argmax(axis=0)
        keep = self._shifted(rows.of[s + 1 : s + 2, t], np.minimum(sizes.saved[s - 1 : s], width))[0]
        keep = keep + sizes.seconds[s - 1]
        floor = max(int(sizes.saving[s - 1] + sizes.grads[t - 1]), int(sizes.back[s - 1]))
        keep[: min(floor, width)] = np.inf
        keeps = keep <= cost
        self._cost[row, width:] = np.where(keeps, keep, cost)
        self._choice[row] = np.where(keeps, _KEEP_ALL, best + 1)
        self._choice[row][np.isinf(self._cost[row, width:])] = _NONE

    def _shifted(self, row: npt.NDArray[np.int32], shift: Ints) -> Floats:
        """Rows of the table with `shift` fewer slots: entry m of the result is entry m - shift."""
        at = row.astype(np.int64) * (2 * self._width) + self._width - shift
        found: Floats = self._windows[at]
        return found
