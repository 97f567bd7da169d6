"""The same step captured in another order: which op and which value is which.

A model whose code goes through a set gives its ops in another order from process to process. Ops are matched by what
they compute: an op's label is a hash of its operator, its place and the labels of its inputs, as in value numbering
(Cocke, 1970). What is found is then checked op by op. Which argument stands where is not part of a graph: what runs are
the calls of this process's own capture.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from keepless.ir import Effect, Graph, Op

IN_ORDER = frozenset({Effect.RNG, Effect.BUFFER, Effect.COLLECTIVE, Effect.UPDATE})
"""Effects whose order is part of the step. Gradients may be handed over in another order."""


@dataclass(frozen=True, slots=True)
class Match:
    """Ids of one graph by those of the other.

    Arguments:
        ops: of each op of the other graph, the op here.
        values: of each value of the other graph, the value here.
    """

    ops: tuple[int, ...]
    values: tuple[int, ...]


def match(here: Graph, there: Graph) -> Match | None:
    """How `there` is `here` in another order; None where it is another step. O(ops + values).

    Random draws must come in the same order, and what reads a buffer must be on the same side of what writes it: one
    order may then stand for the other.
    """
    if len(here.ops) != len(there.ops) or len(here.values) != len(there.values):
        return None
    left, right = _Labels(here), _Labels(there)
    values = _pairs(left.values, right.values)
    ops = _pairs(left.ops, right.ops)
    if values is None or ops is None:
        return None
    found = Match(ops, values)
    same = all(_is_same(here.ops[ops[op.id]], op, found) for op in there.ops)
    alike = all(here.values[values[v.id]].nbytes == v.nbytes for v in there.values)
    sets = all(
        {values[v] for v in theirs} == set(ours)
        for ours, theirs in ((here.inputs, there.inputs), (here.pinned, there.pinned))
    )
    return found if same and alike and sets and _keeps_effects(here, there, found) else None


class _Labels:
    """A label for each op and value, equal for those that are computed alike."""

    def __init__(self, graph: Graph) -> None:
        self.values = [""] * len(graph.values)
        self.ops = [""] * len(graph.ops)
        made = {value for op in graph.ops for value in op.outputs}
        for value in graph.values:
            if value.id not in made:
                self.values[value.id] = _hash((value.name, value.kind.value, value.nbytes, value.dtype, value.shape))
        for op in graph.ops:
            inputs = sorted(self.values[value] for value in op.inputs)  # an op lists them by number
            facts = (op.name, op.key, op.phase.value, op.module, sorted(e.value for e in op.effects), inputs)
            self.ops[op.id] = _hash(facts)
            for place, number in enumerate(op.outputs):
                # A value that two ops write has the label of both, in order.
                self.values[number] = _hash((self.values[number], self.ops[op.id], place))


def _hash(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _pairs(here: Sequence[str], there: Sequence[str]) -> tuple[int, ...] | None:
    """Of each label there, the place of its like here; likes among themselves in order."""
    places: dict[str, list[int]] = defaultdict(list)
    for place in range(len(here) - 1, -1, -1):
        places[here[place]].append(place)
    found = []
    for label in there:
        if not places[label]:
            return None
        found.append(places[label].pop())
    return tuple(found)


def _is_same(ours: Op, theirs: Op, found: Match) -> bool:
    return (
        sorted(ours.inputs) == sorted(found.values[value] for value in theirs.inputs)
        and ours.outputs == tuple(found.values[value] for value in theirs.outputs)
        and (ours.name, ours.key, ours.phase, ours.effects) == (theirs.name, theirs.key, theirs.phase, theirs.effects)
    )


def reordered(there: Graph, found: Match, legal: Sequence[Container[tuple[int, int]]]) -> Graph:
    """The other graph, in which outputs may take over only what they may take over here, too.

    Arguments:
        legal: of each op here, pairs (output, input) for which there is an exact in-place form: which inputs an op can
            write over depends on how its call names them.
    """
    ops = []
    for op in there.ops:
        ours = legal[found.ops[op.id]]
        pairs = [pair for pair in op.reuses if (found.values[pair[0]], found.values[pair[1]]) in ours]
        ops.append(replace(op, reuses=tuple(pairs)))
    return replace(there, ops=tuple(ops))


def _keeps_effects(here: Graph, there: Graph, found: Match) -> bool:
    """Whether ops with effects come in the same order, and readers of what is written on the same side of the write."""
    if [op.id for op in here.ops if op.effects & IN_ORDER] != [
        found.ops[op.id] for op in there.ops if op.effects & IN_ORDER
    ]:
        return False
    place_there = {ours: theirs for theirs, ours in enumerate(found.ops)}
    for write in here.ops:
        if Effect.BUFFER not in write.effects:
            continue
        for value in write.inputs:
            for reader in here.consumers[value]:
                before_here = reader < write.id
                if before_here != (place_there[reader] < place_there[write.id]):
                    return False
    return True
