"""A program for a new graph from the plans of similar ones: which ops run again, and when.

A plan of a known graph is its order. Its replays are carried over by what their ops mean (`keepless.ir.matching`): a
replay that stood before the first run of an op stands before the first run of the op that means the same. Any such
order is legal: a value that nothing makes again stays from its first run on. The orders are judged exactly; the best
one is evicted down where it does not fit, and replays are taken out where there is room, both with little work::

    known    0 1 2 loss | 1 3 | 0 4 | 5           (0 and 1 run again)
    new      0 1 2 loss | 1 3 | 0 4 | 5           the same at another size: fits, or goes on from there

At 600 ops this takes some tens of milliseconds, where a plan from nothing takes seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from keepless.cost import CostModel
from keepless.ir import Certificate, Graph, Status
from keepless.ir.matching import matched_ops
from keepless.passes import evaluate
from keepless.solve.floor import floor_bound
from keepless.solve.gaps import Gaps
from keepless.solve.lagrange import Woven
from keepless.solve.planner import SPACE
from keepless.solve.solution import Solution, solution
from keepless.solve.tables import Tables
from keepless.solve.weave import lazy_order, strip

NAME = "transfer"
_WORK_OPS = 30_000
"""Orders times ops that one transfer may evaluate: 50 orders of 600 ops."""
_LEAST_WORK = 12
_HARDER = 3
"""Times as much work where no order fits as it is."""
_REFINED = 2
"""Carried-over orders that are refined."""


@dataclass(frozen=True)
class Known:
    """A graph with an order that was planned for it."""

    graph: Graph
    order: tuple[int, ...]


def transfer(graph: Graph, cost: CostModel, limit: int, known: Sequence[Known], work: int | None = None) -> Solution:
    """The fastest order for a graph that the known plans give within a limit of bytes.

    As with any solver, its peak is above the limit where nothing fits, and the status says NOT_FOUND.

    Arguments:
        limit: bytes.
        known: plans of similar graphs; none is fine.
        work: orders that may be evaluated while refining; None for some tens of milliseconds.
    """
    begin = time.perf_counter()
    bound, where = floor_bound(graph, cost)
    base = list(range(len(graph.ops)))
    least = evaluate(graph, cost, base)
    claim = Certificate(
        NAME,
        Status.OPTIMAL,
        space=SPACE,
        bound_seconds=least.seconds,
        bound_bytes=bound,
        witness=f"bytes at {graph.where(graph.ops[where])}" if graph.ops else "",
    )

    def claimed(order: list[int], status: Status) -> Solution:
        return solution(
            graph, cost, order, replace(claim, status=status, solve_seconds=time.perf_counter() - begin)
        ).stating(0, bound)

    if least.peak <= limit:  # every op runs once, as in every program: none is faster
        return claimed(base, Status.OPTIMAL)
    tables = Tables(graph, cost)
    budget = max(_LEAST_WORK, _WORK_OPS // max(len(base), 1)) if work is None else work
    found = [Woven(base, least.seconds, least.peak)]
    for order in dict.fromkeys(tuple(order) for one in known for order in carried(tables, one)):
        judged = evaluate(graph, cost, order)
        found.append(Woven(list(order), judged.seconds, judged.peak))
    found.sort(key=lambda woven: (max(woven.peak - limit, 0), woven.seconds))
    best = found[0]
    if best.peak > limit:
        budget *= _HARDER
    for start in found[:_REFINED]:
        gaps = Gaps(tables, start.order, budget // _REFINED)
        if gaps.evict(limit):
            gaps.fill(limit)
        if gaps.woven.beats(best, limit):
            best = gaps.woven
    return claimed(best.order, Status.FEASIBLE if best.peak <= limit else Status.NOT_FOUND)


def carried(tables: Tables, known: Known) -> list[list[int]]:
    """Orders for a graph with the replays of a known plan: at their places, and each once as late as can be."""
    graph = tables.graph
    like = matched_ops(graph, known.graph)
    again: dict[int, list[int]] = {}
    for op, other in enumerate(like):
        if other >= 0 and tables.replayable[op]:
            again.setdefault(other, []).append(op)
    there = set(like)
    before: dict[int, list[int]] = {}
    seen: set[int] = set()
    waiting: list[int] = []
    for other in known.order:
        if other in seen:
            waiting += again.get(other, [])
            continue
        seen.add(other)
        if other in there:  # else they wait for the next op that means one here
            before[other] = waiting
            waiting = []
    order: list[int] = []
    taken: set[int] = set()
    done: set[int] = set()
    for op in range(len(graph.ops)):
        other = like[op]
        if other >= 0 and other not in taken:
            taken.add(other)
            order += [replay for replay in before.get(other, ()) if replay in done]
        order.append(op)
        done.add(op)
    replayed = {op for ops in before.values() for op in ops}
    return [strip(tables, order), strip(tables, lazy_order(tables, replayed))]
