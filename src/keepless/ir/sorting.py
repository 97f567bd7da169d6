"""An order in which ops can run: the order of listing where that is one, else a topological one close to it.

For ops listed `0: b -> c, 1: a -> b` with `a` given, the order is `1 0`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence

from keepless.errors import GraphError

_MOST_NAMED = 8


def runnable_order(
    reads: Sequence[Sequence[int]],
    makes: Sequence[Sequence[int]],
    given: Collection[int],
    num_values: int,
    ranks: Sequence[int],
    name: Callable[[int], str],
) -> list[int]:
    """The ops in an order in which each reads what was made before it. O(edges log ops).

    The order of listing, if it is one and its ranks never fall. Else the topological order (Kahn 1962) that takes,
    of the ops that can run, the lowest rank first, and of those the one that is listed first.

    Arguments:
        reads: per op, value numbers, each once; every one is given or made by some op.
        makes: per op, value numbers. A value that several ops make is there when one of them has run.
        given: values that are there before.
        ranks: per op: ops of a lower rank go first where they can.
        name: of an op, for the error.

    Raises:
        GraphError: the ops read each other's values in a cycle, which it names.
    """
    there = bytearray(num_values)
    for value in given:
        there[value] = 1
    num_ops = len(reads)
    if all(ranks[op] <= ranks[op + 1] for op in range(num_ops - 1)) and _runs_as_listed(reads, makes, there[:]):
        return list(range(num_ops))
    readers: list[list[int]] = [[] for _ in range(num_values)]
    waits = [0] * num_ops
    for op, values in enumerate(reads):
        for value in values:
            if not there[value]:
                waits[op] += 1
                readers[value].append(op)
    ready = [(ranks[op], op) for op in range(num_ops) if not waits[op]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, op = heapq.heappop(ready)
        order.append(op)
        for value in makes[op]:
            if there[value]:
                continue
            there[value] = 1
            for reader in readers[value]:
                waits[reader] -= 1
                if not waits[reader]:
                    heapq.heappush(ready, (ranks[reader], reader))
    if len(order) < num_ops:
        names = [name(op) for op in _cycle(reads, makes, there, next(op for op in range(num_ops) if waits[op]))]
        between = names if len(names) <= _MOST_NAMED else [*names[:_MOST_NAMED], f"... ({len(names)} ops)"]
        raise GraphError(f"The graph has a cycle, and no op of it can run first: {' -> '.join([*between, names[0]])}.")
    return order


def _runs_as_listed(reads: Sequence[Sequence[int]], makes: Sequence[Sequence[int]], there: bytearray) -> bool:
    for read, made in zip(reads, makes, strict=True):
        if not all(map(there.__getitem__, read)):
            return False
        for value in made:
            there[value] = 1
    return True


def _cycle(reads: Sequence[Sequence[int]], makes: Sequence[Sequence[int]], there: bytearray, stuck: int) -> list[int]:
    """Ops of which each makes what the next one reads, and the last what the first one reads; the lowest is first."""
    maker: dict[int, int] = {}
    for op, values in enumerate(makes):
        for value in values:
            maker.setdefault(value, op)
    met: dict[int, int] = {}
    trail: list[int] = []
    op = stuck
    while op not in met:
        met[op] = len(trail)
        trail.append(op)
        op = maker[next(value for value in reads[op] if not there[value])]
    found = trail[met[op] :][::-1]
    first = found.index(min(found))
    return found[first:] + found[:first]
