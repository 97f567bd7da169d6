"""A crude greedy over op times, the yardstick that any planner must beat: which saved values to make again, in turn.

The values that cross from the forward to the backward are dropped one by one, each time the one whose recomputation
adds the fewest seconds per byte, given what was dropped before. Drawn masks stay, so that dropout's outputs are rebuilt
from them; each op runs again at most once; and the peak is ignored: only the bytes that cross count.

`cut_points` is the planner's side in that measure: its minimum cut at one price for bytes that cross, for many prices,
and the greedy going on from each. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from keepless.cost import CostModel
from keepless.ir import Effect, Graph, Kind
from keepless.solve.min_cut import MinCut
from keepless.solve.tables import Tables
from keepless.solve.weave import lazy_order

_PRICES = np.logspace(-14, -6, 100)
"""Seconds per byte: from a microsecond for 100 MB to one for a byte."""


@dataclass(frozen=True)
class CrudePoint:
    """Some ops that run again.

    Arguments:
        shed: share of the bytes that cross with everything kept, and no longer do.
        added_seconds: of the ops that run again.
        replays: these ops, each once.
    """

    shed: float
    added_seconds: float
    replays: frozenset[int]


def crude_points(tables: Tables, replays: Collection[int] = ()) -> list[CrudePoint]:
    """The greedy's points, from these replays to all that can be dropped. O(values squared times ops)."""
    graph, cost = tables.graph, tables.cost
    saved = {v for v in _crossing(tables) if graph.consumers[v][-1] > tables.loss}
    dropped = {v for v in saved if graph.producers[v][0] in frozenset(replays)}
    left = {v for v in saved - dropped if graph.values[v].nbytes and not _is_drawn(graph, v)}
    chosen = frozenset(replays)
    found = [_point(tables, chosen)]
    while left:
        best: tuple[float, int, frozenset[int]] | None = None
        for v in sorted(left):
            again = _again(graph, saved - dropped - {v}, v, chosen)
            if again is None:
                left.discard(v)
                continue
            ratio = _seconds(cost, again - chosen) / graph.values[v].nbytes
            if best is None or (ratio, v) < best[:2]:
                best = ratio, v, again
        if best is None:
            break
        _, v, chosen = best
        dropped.add(v)
        left.discard(v)
        found.append(_point(tables, chosen))
    return found


def cut_points(tables: Tables) -> list[CrudePoint]:
    """Points of minimum cuts where only bytes that cross have a price, with the greedy going on from each."""
    cut = MinCut(tables)
    prices = np.zeros(tables.num_ops)
    sets: dict[frozenset[int], None] = {}
    for price in _PRICES:
        prices[tables.loss] = price
        sets.setdefault(frozenset(cut.solve(prices)))
    return [point for replays in sets for point in crude_points(tables, replays)]


def fastest(points: Collection[CrudePoint], shed: float) -> CrudePoint | None:
    """Of the points that shed so much, the one that adds the fewest seconds."""
    fits = [point for point in points if point.shed >= shed * (1 - 1e-9)]
    return min(fits, key=lambda point: (point.added_seconds, -point.shed), default=None)


def _crossing(tables: Tables, order: Collection[int] | None = None) -> list[int]:
    """Values that the forward makes, the caller does not hold, and that are there while the LOSS op runs."""
    graph = tables.graph
    given = tables.base if order is None else np.asarray(order, np.int64)
    lives = tables.lives(given)
    at = int(np.flatnonzero(given == tables.loss)[0])
    there = lives.value[(lives.start < at) & (lives.end > at)].tolist()
    return [
        v
        for v in there
        if graph.values[v].kind is not Kind.RNG
        and v not in graph.pinned
        and graph.producers[v]
        and graph.producers[v][0] < tables.loss
    ]


def _point(tables: Tables, replays: frozenset[int]) -> CrudePoint:
    before = sum(tables.sizes[v] for v in _crossing(tables))
    after = sum(tables.sizes[v] for v in _crossing(tables, lazy_order(tables, replays)))
    return CrudePoint(1 - after / before if before else 0.0, _seconds(tables.cost, replays), replays)


def _seconds(cost: CostModel, ops: Collection[int]) -> float:
    return sum(cost.seconds[op] for op in sorted(ops))


def _is_drawn(graph: Graph, value: int) -> bool:
    return any(Effect.RNG in graph.ops[op].effects for op in graph.producers[value])


def _again(graph: Graph, kept: set[int], value: int, replays: frozenset[int]) -> frozenset[int] | None:
    """The ops that run again where `value` is dropped, too; None where one of them draws or may run only once."""
    found = set(replays)
    stack = [value]
    while stack:
        v = stack.pop()
        makers = graph.producers[v]
        if not makers or makers[0] in found:
            continue
        op = graph.ops[makers[0]]
        if not op.can_replay or Effect.RNG in op.effects:
            return None
        found.add(op.id)
        stack.extend(u for u in op.inputs if u not in kept and u not in graph.inputs and u not in graph.pinned)
    return frozenset(found)
