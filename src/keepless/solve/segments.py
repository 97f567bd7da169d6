"""Where to cut the forward into segments whose border values are kept: families from coarse to fine.

The values alive at a position of the forward (made before, read after) are enough to run everything behind it again.
For a bound W on the bytes that one segment makes, the cheapest cuts are a shortest path over positions: the cost of
a cut is the bytes alive there that were not alive at the cut before it. A chain's cuts are its borders; a long skip
is paid once and carried; a dense block simply costs more inside than between blocks.

Complexity: O(m^2) numpy for m candidate positions, at most `_MAX_POSITIONS`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keepless.solve.tables import Floats, Ints, Tables

_MAX_POSITIONS = 1200


@dataclass(frozen=True)
class Cuts:
    """Candidate cut positions of the forward.

    Arguments:
        positions: op ids; a cut lies right after the op. The first is -1: before the forward.
        fresh: `fresh[i, j]` bytes alive at cut j that were made after cut i.
        work: bytes that the ops up to each position make and the backward may want, cumulated.
        alive: value ids alive at each cut.
    """

    positions: Ints
    fresh: Floats
    work: Floats
    alive: tuple[tuple[int, ...], ...]


def find_cuts(tables: Tables, most: int = _MAX_POSITIONS) -> Cuts:
    """Positions where few bytes are alive, at most `most` of them."""
    loss = tables.loss
    last: dict[int, int] = {}
    for p in range(min(loss + 1, tables.num_ops)):
        for v in tables.reads[p]:
            last[v] = p
    made = [(p, v) for p in range(loss) for v in tables.writes[p] if last.get(v, -1) > p]
    moves = np.zeros(loss + 2)
    for p, v in made:
        moves[p] += tables.sizes[v]
        moves[last[v]] -= tables.sizes[v]
    alive = np.cumsum(moves)[:loss]
    work = np.cumsum([sum(tables.sizes[v] for v in tables.writes[p]) for p in range(loss)], dtype=np.float64)
    chosen = _minima(alive, most)
    sets: list[tuple[int, ...]] = [()]
    births, ids = np.array(made, np.int64).reshape(-1, 2).T
    deaths = np.array([last[v] for _, v in made], np.int64)
    starts = np.concatenate([[-1], chosen])
    fresh = np.zeros((len(chosen) + 1, len(chosen) + 1))
    for j, at in enumerate(chosen, start=1):
        inside = np.flatnonzero((births <= at) & (deaths > at))
        sets.append(tuple(ids[inside].tolist()))
        sums = np.concatenate([[0], np.cumsum(tables.nbytes[ids[inside]])])
        fresh[:, j] = sums[-1] - sums[np.searchsorted(births[inside], starts, "right")]
    positions = np.concatenate([[-1], chosen]).astype(np.int64)
    return Cuts(positions, fresh, np.concatenate([[0.0], work[chosen]]) if loss else np.zeros(1), tuple(sets))


def _minima(alive: Floats, most: int) -> Ints:
    """Positions that are minimal within a window; on a plateau all of them, thinned evenly to `most`."""
    num = len(alive)
    window = 2
    while True:
        keep = [
            p
            for p in range(num - 1)
            if alive[p] <= alive[max(0, p - window) : p].min(initial=np.inf)
            and alive[p] <= alive[p + 1 : p + 1 + window].min(initial=np.inf)
        ]
        if len(keep) <= most:
            return np.array(keep, np.int64)
        if window > 64:
            return np.array(keep, np.int64)[np.linspace(0, len(keep) - 1, most).astype(np.int64)]
        window *= 2


def cut_at(cuts: Cuts, most_work: float) -> list[int]:
    """Indices into `cuts` of the cheapest cuts whose segments make at most `most_work` bytes (where possible)."""
    num = len(cuts.positions)
    best, back = np.full(num, np.inf), np.zeros(num, np.int64)
    best[0] = 0.0
    for j in range(1, num):
        length = cuts.work[j] - cuts.work[:j]
        over = np.maximum(length - most_work, 0.0)
        over[-1] = 0.0
        price = best[:j] + cuts.fresh[:j, j] + 1e3 * over
        back[j] = int(price.argmin())
        best[j] = price[back[j]]
    tail = cuts.work[-1] - cuts.work
    ends = best + 1e3 * np.maximum(tail - most_work, 0.0)
    path = [int(ends.argmin())]
    while path[-1] > 0:
        path.append(int(back[path[-1]]))
    return path[::-1][1:]


def families(tables: Tables, cuts: Cuts) -> list[tuple[int, ...]]:
    """Sets of values to keep, from none to every cut, each once."""
    found: list[tuple[int, ...]] = [()]
    if len(cuts.positions) < 2:
        return found
    total = float(cuts.work[-1])
    for step in range(1, 24):
        chosen = cut_at(cuts, total / 2 ** (step / 2))
        kept = tuple(sorted({v for i in chosen for v in cuts.alive[i]}))
        if kept not in found:
            found.append(kept)
    return found
