"""Chains of equal steps, for which the binomial schedule is exact: are the forward's ops one?"""

from __future__ import annotations

from keepless.solve.tables import Tables

_ENDS = 2
"""Ops at either end of the forward that may differ: what makes the first state, what makes the loss of the last."""


def steps_are_alike(tables: Tables) -> bool:
    """Whether the forward is a chain of ops that cost the same, each from the state that the op before it made.

    Alike are seconds, scratch, the sizes of what an op reads and makes, and, behind the loss, the ops that read what it
    makes, by seconds, scratch and sizes. O(edges).
    """
    forward = [p for p in range(tables.loss) if tables.replayable[p]]
    inner = forward[_ENDS : len(forward) - _ENDS]
    if len(inner) < 2 * _ENDS or not all(map(tables.replayable.__getitem__, range(inner[0], inner[-1]))):
        return False
    first = _likeness(tables, inner[0])
    return all(
        {tables.producer[v] for v in tables.reads[p]} == {p - 1} and _likeness(tables, p) == first for p in inner
    )


def _likeness(tables: Tables, p: int) -> tuple[object, ...]:
    """What equal steps have in common."""

    def costs(op: int) -> tuple[object, ...]:
        reads = tuple(sorted(tables.sizes[v] for v in tables.graph.ops[op].inputs))
        makes = tuple(tables.sizes[v] for v in tables.writes[op])
        return tables.cost.seconds[op], int(tables.scratch[op]), reads, makes

    readers = tuple(tuple(costs(c) for c in tables.consumers[v] if c > tables.loss) for v in tables.writes[p])
    return costs(p), readers
