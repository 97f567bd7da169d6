"""Graphs of one step captured in two orders are matched, and others are not."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from strategies import graphs

from keepless.ir import Effect, Graph, Op
from keepless.passes.matching import IN_ORDER, _Labels, match, reordered


def shuffled(graph: Graph, rng: random.Random) -> Graph:
    """The same ops in another order that may stand for theirs, values numbered as they come."""
    order = list(range(len(graph.ops)))
    for _ in range(3 * len(order)):
        i = rng.randrange(max(1, len(order) - 1))
        if i + 1 < len(order) and _may_swap(graph.ops[order[i]], graph.ops[order[i + 1]]):
            order[i], order[i + 1] = order[i + 1], order[i]
    return _renumbered(graph, order)


def _may_swap(a: Op, b: Op) -> bool:
    if a.effects & IN_ORDER and b.effects & IN_ORDER:
        return False
    writes = any(Effect.BUFFER in op.effects for op in (a, b)) and set(a.inputs) & set(b.inputs)
    depends = set(a.outputs) & {*b.inputs, *b.outputs} or set(b.outputs) & set(a.inputs)
    return not writes and not depends


def _renumbered(graph: Graph, order: list[int]) -> Graph:
    made = [value for op in order for value in graph.ops[op].outputs]
    numbers = [v.id for v in graph.values if v.id not in set(made)] + list(dict.fromkeys(made))
    new = {old: number for number, old in enumerate(numbers)}
    ops = tuple(
        replace(
            graph.ops[old],
            id=place,
            inputs=tuple(sorted(new[v] for v in graph.ops[old].inputs)),
            outputs=tuple(new[v] for v in graph.ops[old].outputs),
            reuses=tuple((new[a], new[b]) for a, b in graph.ops[old].reuses),
        )
        for place, old in enumerate(order)
    )
    values = tuple(replace(graph.values[old], id=number) for number, old in enumerate(numbers))
    inputs, pinned = (frozenset(new[v] for v in chosen) for chosen in (graph.inputs, graph.pinned))
    return Graph(ops, values, inputs, pinned)


@given(graphs(), st.integers(0, 2**32))
def test_another_order_is_found(graph: Graph, seed: int) -> None:
    there = shuffled(graph, random.Random(seed))
    found = match(graph, there)
    if found is None:  # ops that compute the same may be taken for one another
        labels = _Labels(graph).ops
        assert len(set(labels)) < len(labels)
        return
    legal = [op.reuses for op in graph.ops]
    for op in there.ops:
        ours = graph.ops[found.ops[op.id]]
        assert (ours.name, ours.key) == (op.name, op.key)
        assert sorted(ours.inputs) == sorted(found.values[v] for v in op.inputs)
        assert ours.outputs == tuple(found.values[v] for v in op.outputs)
    assert [op.reuses for op in reordered(there, found, legal).ops] == [op.reuses for op in there.ops]


@given(graphs())
def test_another_step_is_not(graph: Graph) -> None:
    """One op of another kind, or one value of another size."""
    assert match(graph, graph) is not None
    op = graph.ops[len(graph.ops) // 2]
    ops = tuple(replace(o, key=o.key + "?") if o.id == op.id else o for o in graph.ops)
    assert match(graph, replace(graph, ops=ops)) is None
    larger = tuple(replace(v, nbytes=v.nbytes + 1) if v.id == 0 else v for v in graph.values)
    assert match(graph, replace(graph, values=larger)) is None
    assert match(graph, replace(graph, ops=graph.ops[:-1])) is None
