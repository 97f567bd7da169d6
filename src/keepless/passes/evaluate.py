"""Seconds and peak of an order of ops, straight from the order: what solvers call in their inner loops.

The numbers are those of `simulate(reuse_storage(from_order(order)))` (tests hold the two together), without an
instruction being built. One backward sweep: the bytes resident after a position are known, what the op keeps and
what dies there give the bytes before it. O(edges of the order), plain lists.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from keepless.cost import CostModel
from keepless.ir.graph import Graph
from keepless.machine.rules import reuse_pairs, rng_states
from keepless.passes.order import missing


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an order costs.

    Arguments:
        seconds: of the step.
        peak: highest bytes on the device.
        peak_position: the first position in the order that reaches the peak.
        profile: highest bytes at each position (int64), where asked for. What is resident at the start counts
            for position 0.
    """

    seconds: float
    peak: int
    peak_position: int
    profile: npt.NDArray[np.int64] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class _Tables:
    """Per graph: what the sweep reads.

    A row per op: its outputs, its inputs but those that are always resident, bytes of all its outputs, and whether
    it may reuse storage (1) or has a recorded generator state (2). `held` has the pinned values that each op makes: the
    first run that makes one keeps it, and no other. `num_held` is the number of these ops' runs where each makes its
    values once; -1 where a value has several makers.
    """

    rows: list[tuple[tuple[int, ...], tuple[int, ...], int, int]]
    nbytes: list[int]
    pairs: dict[int, tuple[tuple[int, int], ...]]
    states: dict[int, int]
    held: dict[int, tuple[int, ...]]
    num_held: int
    needed_at_end: list[bool]
    end_nbytes: int
    start_nbytes: int
    not_inputs: list[int]


_CACHE: dict[int, tuple[weakref.ref[Graph], _Tables]] = {}


def evaluate(
    graph: Graph, cost: CostModel, order: Sequence[int], *, reuse: bool = True, profile: bool = False
) -> Evaluation:
    """What this order of ops costs. O(edges of the order): about 0.5 us per position and edge.

    Arguments:
        order: op ids of the graph, repeats allowed.
        reuse: with outputs taking over the storage of dying inputs where the graph allows it.
        profile: with the peak at each position.

    Raises:
        ProgramError: the order reads a value that nothing made before, or never makes a pinned one. Other rules are
            left to `verify`.
    """
    tables = _tables(graph)
    nbytes, pairs, states = tables.nbytes, tables.pairs, tables.states
    needed = tables.needed_at_end.copy()
    resident = tables.end_nbytes
    remaining = Counter(filter(states.__contains__, order)) if states else Counter()
    backwards = order[::-1]
    peaks: list[int] = []
    add = peaks.append
    rows: Iterable[tuple[tuple[int, ...], tuple[int, ...], int, int]] = map(tables.rows.__getitem__, backwards)
    runs = list(filter(tables.held.__contains__, order))
    again: set[int] = set()
    if len(runs) > tables.num_held:
        made = Counter(value for op in runs for value in tables.held[op])
        again = {value for value, count in made.items() if count > 1}
    if again:
        rows = [(row[0], row[1], row[2], row[3] | (4 if again.intersection(row[0]) else 0)) for row in rows]
    for op, scratch, (outputs, inputs, extra, special) in zip(
        backwards, map(cost.scratch.__getitem__, backwards), rows, strict=True
    ):
        if not special:
            for value in outputs:
                if needed[value]:
                    needed[value] = False
                    resident -= nbytes[value]
            for value in inputs:
                if not needed[value]:
                    needed[value] = True
                    resident += nbytes[value]
            add(resident + extra + scratch)
            continue
        state = -1
        if special & 2 and remaining[op] > 1:
            state = states[op]
            remaining[op] -= 1
        later = set()
        if special & 4:
            later = {value for value in outputs if value in again and made[value] > 1}
            made.subtract(again.intersection(outputs))
        kept = set()
        for value in outputs:
            if needed[value] and value != state and value not in later:
                needed[value] = False
                resident -= nbytes[value]
                kept.add(value)
        dying = set()
        for value in inputs:
            if not needed[value]:
                needed[value] = True
                resident += nbytes[value]
                dying.add(value)
        if state >= 0 and not needed[state]:
            needed[state] = True
            resident += nbytes[state]
        taken = 0
        if reuse and special & 1:
            for out, source in pairs[op]:
                if out in kept:
                    if source not in dying:
                        taken = 0
                        break
                    taken += nbytes[out]
        add(resident + extra + scratch - taken)
    if any(map(needed.__getitem__, tables.not_inputs)):
        raise missing(graph, order)
    peaks.reverse()
    if peaks:
        peaks[0] = max(peaks[0], tables.start_nbytes)
    peak = max(peaks, default=tables.start_nbytes)
    return Evaluation(
        seconds=sum(map(cost.seconds.__getitem__, order)),
        peak=peak,
        peak_position=peaks.index(peak) if peaks else 0,
        profile=np.array(peaks, dtype=np.int64) if profile else None,
    )


def _tables(graph: Graph) -> _Tables:
    found = _CACHE.get(id(graph))
    if found is not None and found[0]() is graph:
        return found[1]
    nbytes = [value.nbytes for value in graph.values]
    states = rng_states(graph)
    pairs = {op.id: found_pairs for op in graph.ops if (found_pairs := reuse_pairs(graph, op))}
    pinned = graph.pinned - graph.inputs
    held = {op.id: made for op in graph.ops if (made := tuple(v for v in op.outputs if v in pinned))}
    always = {value for value in graph.inputs & graph.pinned if not graph.producers[value]}
    rows = [
        (
            op.outputs,
            tuple(value for value in op.inputs if value not in always),
            sum(nbytes[value] for value in op.outputs),
            (op.id in pairs) + 2 * (op.id in states),
        )
        for op in graph.ops
    ]
    tables = _Tables(
        rows=rows,
        nbytes=nbytes,
        pairs=pairs,
        states=states,
        held=held,
        num_held=len(held) if all(len(graph.producers[v]) < 2 for v in pinned) else -1,
        needed_at_end=[value.id in graph.pinned for value in graph.values],
        end_nbytes=sum(nbytes[value] for value in graph.pinned),
        start_nbytes=sum(nbytes[value] for value in graph.inputs),
        not_inputs=[value.id for value in graph.values if value.id not in graph.inputs],
    )
    key = id(graph)
    _CACHE[key] = (weakref.ref(graph, lambda _: _CACHE.pop(key, None)), tables)
    return tables
