"""From "these ops run again" to an order: every replay is placed right before the backward op that first needs it.

Placing late keeps recomputed values out of memory until they serve. For a forward `0 1 2`, loss `3` and backward
`4 5` where `4` needs only what `2` makes, replaying `{0, 1, 2}` with `2` reading the stored output of `0`, the
order is `0 1 2 3 | 2 4 | 0 1 5`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from keepless.solve.tables import Tables


def lazy_order(tables: Tables, replayed: Collection[int]) -> list[int]:
    """The order in which each op of `replayed` that the backward needs runs a second time, as late as possible.

    What replays read and is not replayed itself is kept from the forward. O(edges).
    """
    order = list(range(min(tables.loss + 1, tables.num_ops)))
    pending = bytearray(tables.num_ops)
    for op_id in replayed:
        pending[op_id] = 1
    makers = tables.makers
    for base in range(tables.loss + 1, tables.num_ops):
        wanted = [p for p in makers[base] if pending[p]]
        if wanted:
            replays = closure(tables, wanted, pending.__getitem__)
            for op_id in replays:
                pending[op_id] = 0
            order.extend(replays)
        order.append(base)
    return order


def closure(tables: Tables, wanted: Sequence[int], missing: Callable[[int], int | bool]) -> list[int]:
    """The ops of `wanted` and all their producers for which `missing` holds, in graph order."""
    makers = tables.makers
    found = set(wanted)
    stack = list(found)
    while stack:
        for p in makers[stack.pop()]:
            if p not in found and missing(p):
                found.add(p)
                stack.append(p)
    return sorted(found)


def strip(tables: Tables, order: Sequence[int]) -> list[int]:
    """The order without replays whose outputs nothing reads before they are made again. O(edges)."""
    return [order[position] for position in useful(tables, order)]


def useful(tables: Tables, order: Sequence[int]) -> list[int]:
    """Positions of first runs, and of replays whose outputs are read before they are made again. O(edges)."""
    reads, writes = tables.reads, tables.writes
    seen = bytearray(tables.num_ops)
    replay = bytearray(len(order))
    for position, op_id in enumerate(order):
        replay[position] = seen[op_id]
        seen[op_id] = 1
    needed = bytearray(len(tables.sizes))
    kept: list[int] = []
    for position in range(len(order) - 1, -1, -1):
        op_id = order[position]
        if replay[position] and not any(map(needed.__getitem__, writes[op_id])):
            continue
        for v in writes[op_id]:
            needed[v] = 0
        for v in reads[op_id]:
            needed[v] = 1
        kept.append(position)
    kept.reverse()
    return kept
