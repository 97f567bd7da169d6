"""A peak that no program is below, with its witness."""

from __future__ import annotations

from keepless.cost import CostModel
from keepless.ir import Graph
from keepless.machine import reuse_pairs


def floor_bound(graph: Graph, cost: CostModel) -> tuple[int, int]:
    """Bytes that every program needs at some op, and that op's id.

    While an op runs, what stays for the whole step, its inputs, its outputs and its scratch are resident; outputs
    that may take over an input's storage count once. Pinned values whose producers run only once are resident at
    every op that depends on them. All pinned values are resident at the end. True for any order and any number of
    recomputations; O(edges).
    """
    static = graph.inputs & graph.pinned
    values, base = graph.values, graph.static_nbytes
    # What stays from its only run on: pinned outputs of ops that may not run again.
    kept = graph.pinned - static
    stays = {v for op in graph.ops if not op.can_replay for v in op.outputs if v in kept}
    held_after: dict[int, frozenset[int]] = {}
    best, where = -1, 0
    for op in graph.ops:
        held: frozenset[int] = (
            frozenset().union(*(held_after.get(v, frozenset()) for v in op.inputs)) if stays else (frozenset())
        )
        moving = (set(op.inputs) | set(op.outputs) | held) - static
        taken = sum(values[out].nbytes for out, _ in reuse_pairs(graph, op))
        need = base + sum(values[v].nbytes for v in moving) - taken + cost.scratch[op.id]
        if need > best:
            best, where = need, op.id
        if stays:
            after = held | (stays & set(op.outputs))
            if after:
                held_after.update((v, after) for v in op.outputs)
    end = sum(values[v].nbytes for v in graph.pinned)
    start = graph.start_nbytes
    if graph.ops and end > best:
        best, where = end, graph.ops[-1].id
    if graph.ops and start > best:
        best, where = start, 0
    return max(best, start, end), where
