"""The step as a chain of stages, and from a schedule of stages to an order of ops.

A stage is a stretch of the forward between two of `find_cuts`' positions, with the backward ops that go with it::

    cut 0 | stage 1 | cut 1 | stage 2 | ... | stage n | LOSS | backward n | ... | backward 1

What is alive at a cut (made before, read after by the forward) is enough to run all behind it again. Skips over many
stages are alive at many cuts: they are priced by what a cut adds to an earlier one (`Chain.fresh`), which is exact.
A schedule is a list of actions on stages, from 1 to n: `k` runs stage k's forward, `-k` its backward. The schedule
of two stages that keeps the first's input only is `1 2 -2 1 -1`.

Backward ops go with the highest stage that has made, or reads in the forward, everything that they want. What the
stages do not explain (values read late, ops that may not run again) stays as long as it is read: an order is legal
whatever the schedule, and its exact profile decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from keepless.solve.segments import cut_at, find_cuts
from keepless.solve.tables import Floats, Ints, Tables
from keepless.solve.weave import strip

MOST_STAGES = 1200
_GRAINS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Chain:
    """Stages and what they need; index 0 of the arrays is stage 1.

    Arguments:
        ops: per stage, the forward ops that may run again.
        first: per stage, the first backward op that wants it; the number of ops where none does. Never ascends.
        seconds: per stage, of one forward again.
        leaf: per stage, of the part of its forward that its backward wants where its input is there.
        fresh: `fresh[i, j]` bytes alive at cut j that were made after cut i, for cuts 0 to n.
        saved: per stage, bytes that it makes and that the backward or the next stage reads.
        passing: per stage, highest bytes beyond its input while its forward runs and nothing is saved.
        saving: the same where everything is saved.
        back: per stage, highest bytes of its own values, gradients and scratch while its backward runs.
        grads: per stage, bytes of gradients that wait for its backward.
    """

    ops: tuple[tuple[int, ...], ...]
    first: tuple[int, ...]
    seconds: Floats
    leaf: Floats
    fresh: Floats
    saved: Floats
    passing: Floats
    saving: Floats
    back: Floats
    grads: Floats

    @property
    def num(self) -> int:
        """How many stages."""
        return len(self.ops)


def chains(tables: Tables) -> list[Chain]:
    """Chains of the graph from fine to coarse, each length once; none where the forward has no op that may run again.

    The finest is cut at all of `find_cuts`' positions and wherever a single value is alive; it has at most
    `MOST_STAGES` stages.
    """
    cuts = find_cuts(tables, MOST_STAGES - 1)
    positions = cuts.positions.tolist()
    finest = sorted({*positions[1:], *_single(tables)})
    found: list[list[int]] = [finest if len(finest) < MOST_STAGES else positions[1:]]
    for grain in reversed(_GRAINS):
        if grain < len(positions):
            ends = [int(positions[i]) for i in cut_at(cuts, float(cuts.work[-1]) / grain)]
            if len(ends) < len(found[-1]):
                found.append(ends)
    return [chain for ends in found if (chain := chain_at(tables, ends)).num]


def chain_at(tables: Tables, ends: Iterable[int]) -> Chain:
    """The chain whose cuts lie right after these forward ops. O(edges + stages squared)."""
    loss = tables.loss
    borders = [*sorted({e for e in ends if 0 <= e < loss - 1}), loss - 1]
    stage_of = np.searchsorted(np.array(borders), np.arange(loss), "left") + 1 if loss else np.zeros(0, np.int64)
    ops: list[list[int]] = [[] for _ in borders]
    for p in range(loss):
        if tables.replayable[p]:
            ops[int(stage_of[p]) - 1].append(p)
    if not any(ops):
        return _empty()
    values = np.array([v for p in range(loss) if tables.replayable[p] for v in _made(tables, p)], np.int64)
    made = np.array([tables.producer[v] for v in values.tolist()], np.int64)
    last = np.array([_last_forward(tables, v) for v in values.tolist()], np.int64)
    wanted = np.array([bool(row := tables.consumers[v]) and row[-1] > loss for v in values.tolist()], bool)
    stage_ends = np.array(borders, np.int64)
    low = stage_of[made]
    high = np.searchsorted(stage_ends, np.minimum(np.maximum(last, made), loss - 1), "left") + 1
    num = len(borders)
    size = tables.nbytes[values]
    first = _triggers(tables, num, values, high)
    alive = np.zeros((num + 2, num + 2))
    np.add.at(alive, (low, low), size)
    np.subtract.at(alive, (low, high), size)
    alive = np.cumsum(alive, axis=1)[: num + 1, : num + 1]
    fresh = np.zeros((num + 1, num + 1))
    fresh[:-1] = np.cumsum(alive[:0:-1], axis=0)[::-1]
    keeps = wanted | (high > low)
    saved = np.bincount(low[keeps], size[keeps], num + 1)[1:].astype(np.float64)
    edge = stage_ends[low - 1]
    inside = np.minimum(np.maximum(last, made), edge)
    passing = _highest(tables, stage_of, num, size, made, inside)
    saving = _highest(tables, stage_of, num, size, made, np.where(keeps, edge, inside))
    back, grads = _backward(tables, first, values, low)
    return Chain(
        ops=tuple(map(tuple, ops)),
        first=tuple(first),
        seconds=np.array([sum(tables.cost.seconds[p] for p in row) for row in ops]),
        leaf=_leaves(tables, stage_of, first),
        fresh=fresh,
        saved=saved,
        passing=passing,
        saving=saving,
        back=back,
        grads=grads,
    )


def order_of(tables: Tables, chain: Chain, schedule: Iterable[int], most_runs: int) -> list[int] | None:
    """The order of ops that a schedule means; None where it has more than `most_runs` runs.

    A stage's first forward is the captured one. Replays stand right before the backward that they serve; those whose
    outputs nothing reads are left out.
    """
    before: list[list[int]] = [[] for _ in range(chain.num + 1)]
    pending: list[int] = []
    seen: set[int] = set()
    count = tables.num_ops
    for action in schedule:
        if action < 0:
            before[-action] = pending
            pending = []
        elif action in seen:
            pending.append(action)
            count += len(chain.ops[action - 1])
            if count > most_runs:
                return None
        else:
            seen.add(action)
    order = list(range(min(tables.loss + 1, tables.num_ops)))
    stage = chain.num
    for p in range(tables.loss + 1, tables.num_ops):
        while stage and chain.first[stage - 1] <= p:
            for again in before[stage]:
                order.extend(chain.ops[again - 1])
            stage -= 1
        order.append(p)
    return strip(tables, order)


def _single(tables: Tables) -> list[int]:
    """Forward positions at which one value alone is alive."""
    num = tables.loss
    moves = np.zeros(num + 2, np.int64)
    for p in range(num):
        for v in _made(tables, p):
            last = _last_forward(tables, v)
            if tables.producer[v] == p and last > p:
                moves[p] += 1
                moves[last] -= 1
    found: list[int] = np.flatnonzero(np.cumsum(moves)[:num] == 1).tolist()
    return found


def _empty() -> Chain:
    none = np.zeros(0)
    return Chain((), (), none, none, np.zeros((1, 1)), none, none, none, none, none)


def _made(tables: Tables, p: int) -> list[int]:
    """What a run of the op makes again: everything but static values and its recorded generator state."""
    return [v for v in tables.writes[p] if v not in tables.static and v != tables.state.get(p)]


def _last_forward(tables: Tables, v: int) -> int:
    return next((c for c in reversed(tables.consumers[v]) if c <= tables.loss), -1)


def _triggers(tables: Tables, num: int, values: Ints, high: Ints) -> list[int]:
    """Per stage, the first backward op that wants values which no cut above the stage has."""
    top = dict(zip(values.tolist(), high.tolist(), strict=True))
    first = [tables.num_ops] * num
    stage = num + 1
    for p in range(tables.loss + 1, tables.num_ops):
        goal = min((top[v] for v in tables.reads[p] if v in top), default=stage)
        while stage > goal:
            stage -= 1
            first[stage - 1] = p
    return first


def _leaves(tables: Tables, stage_of: Ints, first: list[int]) -> Floats:
    """`Chain.leaf`: seconds of the ops whose outputs the stage's own backward or such an op of the stage reads."""
    found = np.zeros(len(first))
    inner: set[int] = set()
    for p in range(tables.loss - 1, -1, -1):
        stage = int(stage_of[p])
        wanted = any(v in inner or tables.consumers[v][-1:] >= (first[stage - 1],) for v in tables.writes[p])
        if wanted and tables.replayable[p]:
            found[stage - 1] += tables.cost.seconds[p]
            inner.update(u for u in tables.reads[p] if 0 <= (q := tables.producer[u]) < p and stage_of[q] == stage)
    return found


def _highest(tables: Tables, stage_of: Ints, num: int, size: Ints, start: Ints, end: Ints) -> Floats:
    """Per stage, the highest bytes while its ops run, for values alive from `start` to `end`."""
    moves = np.bincount(start, size, tables.num_ops + 1) - np.bincount(end + 1, size, tables.num_ops + 1)
    profile = np.cumsum(moves)[: len(stage_of)] + tables.scratch[: len(stage_of)]
    found = np.zeros(num + 1)
    np.maximum.at(found, stage_of, profile)
    return found[1:]


def _backward(tables: Tables, first: list[int], values: Ints, low: Ints) -> tuple[Floats, Floats]:
    """`Chain.back` and `Chain.grads`, from the profile of the step that keeps everything."""
    num_ops = tables.num_ops
    lives = tables.lives(tables.base)
    pinned = np.zeros(len(tables.sizes), bool)
    pinned[list(tables.graph.pinned)] = True
    size = tables.nbytes[lives.value]
    gradient = (lives.start > tables.loss) & ~pinned[lives.value]
    ends = np.minimum(lives.end, num_ops - 1)
    held = _alive(num_ops, size[~gradient], lives.start[~gradient], ends[~gradient])
    waiting = _alive(num_ops, size[gradient], lives.start[gradient] + 1, ends[gradient])
    death = np.full(len(tables.sizes), -1, np.int64)
    death[lives.value] = ends
    begin = np.array([num_ops, *first], np.int64)
    until = np.array([num_ops, num_ops, *first[:-1]], np.int64)
    own_until = np.minimum(death[values] + 1, until[low])
    lasting = own_until > begin[low]
    own = _alive(num_ops, tables.nbytes[values][lasting], begin[low][lasting], own_until[lasting] - 1)
    needed = own + lives.profile - tables.static_nbytes - held
    back, grads = np.zeros(len(first)), np.zeros(len(first))
    for stage in range(1, len(first) + 1):
        if begin[stage] < until[stage]:
            back[stage - 1] = needed[begin[stage] : until[stage]].max()
            grads[stage - 1] = waiting[begin[stage]]
    return np.maximum(back, 0.0), grads


def _alive(num_ops: int, size: Ints, start: Ints, end: Ints) -> Floats:
    """Bytes at each position of values that are alive from `start` to `end`."""
    total: Floats = np.cumsum(np.bincount(start, size, num_ops + 2) - np.bincount(end + 1, size, num_ops + 2))
    return total[:num_ops]
