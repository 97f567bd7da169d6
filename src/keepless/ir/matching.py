"""Ops of two graphs that mean the same: one model captured at two sizes, in two modes, or in two dtypes.

An op is known by its phase, its operator, its module's path, and its number among the ops that have these in common::

    here     mm(h.0.attn) #0   mm(h.0.attn) #1   relu(h.0) #0   mm(h.1.attn) #0
    there    mm(h.0.attn) #0   mm(h.0.attn) #1                  mm(h.1.attn) #0
    matched  0                 1                 -1             2
"""

from __future__ import annotations

from collections.abc import Hashable

from keepless.ir.graph import Graph, Op


def matched_ops(graph: Graph, other: Graph) -> list[int]:
    """For each op of `graph` the op of `other` that means the same, -1 where there is none. O(ops).

    Where the two have unequally many ops of a kind at a place (a loop over more steps), numbers are matched by their
    share of the whole, so that several ops may mean one.
    """
    here, there = _by_place(graph), _by_place(other)
    found = [-1] * len(graph.ops)
    for place, ops in here.items():
        others = there.get(place)
        if others:
            for number, op in enumerate(ops):
                found[op] = others[number * len(others) // len(ops)]
    return found


def _by_place(graph: Graph) -> dict[Hashable, list[int]]:
    table: dict[Hashable, list[int]] = {}
    for op in graph.ops:
        table.setdefault(_place(op), []).append(op.id)
    return table


def _place(op: Op) -> Hashable:
    return op.phase, op.name, op.module
