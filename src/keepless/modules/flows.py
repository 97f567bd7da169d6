"""Gradients that wait between pieces of a backward, and in which storages.

Autograd sums up the parts of a tensor's gradient as they come. Some nodes hand on the gradient that they get, or views
of it, in the same storage: sums, reshapes, concatenations. Of a step's graph one by one:

    a gradient waits from the backward of the piece that sends its first part to that of the piece that made its tensor;
    it begins in the storage of the one that is handed on, if that is its only part, else in one of its own;
    another part is added in place if nobody else holds the storage then, else the sum gets a storage of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from keepless._compat import graphs


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a gradient.

    Arguments:
        moment: of the forward op whose backward sends it; None where the caller does.
        handed: the gradient that it is, or is a view of; None where it is computed.
    """

    moment: int | None
    handed: int | None = None


@dataclass(frozen=True, slots=True)
class Gradient:
    """A gradient of a tensor that was made in the forward.

    Arguments:
        made: moment of the op that made the tensor, and whose backward reads the gradient.
        nbytes: of all of it.
        parts: that it is the sum of.
    """

    made: int
    nbytes: int
    parts: tuple[Part, ...]


Edge = tuple[Any, int]
"""A node of autograd's graph, and which of its gradients."""


def gradients_behind(
    readers: dict[Edge, set[Any]], roots: Sequence[Edge], moment_of: Callable[[int], int]
) -> tuple[list[Gradient], dict[Edge, int]]:
    """The gradients of a backward, those that are handed on before those that they become; and which stands where.

    Gradients of parameters and of other leaves are not among them.

    Arguments:
        readers: edges of the graph -> the nodes behind them.
        roots: edges of what is differentiated.
        moment_of: the moment at which a node of that number was made.
    """
    edges = {edge for edge in (*readers, *roots) if edge[0].next_functions and graphs.node_number(edge[0]) >= 0}
    ordered = sorted(edges, key=lambda edge: (-graphs.node_number(edge[0]), edge[1]))
    number_of = {edge: number for number, edge in enumerate(ordered)}
    found: list[Gradient] = []
    for number, edge in enumerate(ordered):
        parts = [Part(None)] if edge in roots else []
        for node in readers.get(edge, ()):
            source = number_of.get((node, 0))
            is_handed = source is not None and source < number and graphs.hands_on(node, edge)
            parts.append(Part(moment_of(graphs.node_number(node)), source if is_handed else None))
        nbytes = graphs.gradient_nbytes(edge)
        found.append(Gradient(moment_of(graphs.node_number(edge[0])), nbytes, tuple(parts)))
    return found, number_of


@dataclass(eq=False, slots=True)
class Storage:
    """Where gradients are.

    Arguments:
        made: the op that makes it.
        piece: the piece whose tensor's gradient it was first.
        used: ops that read it later.
        outlasts: those of them to whose end it stands: what they send is added to it.
        until: gradients that it holds -> the op in which they are read.
    """

    made: int
    nbytes: int
    piece: int
    used: set[int] = field(default_factory=set)
    outlasts: set[int] = field(default_factory=set)
    until: dict[int, int] = field(default_factory=dict)

    def is_alone(self, number: int, op: int) -> bool:
        """Whether behind an op it holds this gradient alone."""
        return all(last <= op for other, last in self.until.items() if other != number)


@dataclass(slots=True)
class Flows:
    """The storages of gradients.

    Arguments:
        begun: gradient -> the op in which it begins, and where it is then.
        ended: gradient -> where it is when it is read.
        storages: all that stand behind the op that makes them, in that order.
    """

    begun: dict[int, tuple[int, Storage]] = field(default_factory=dict)
    ended: dict[int, Storage] = field(default_factory=dict)
    storages: list[Storage] = field(default_factory=list)


def flows(
    gradients: Sequence[Gradient], piece_of: Callable[[int], int], backward: Callable[[int], int], loss: int
) -> Flows:
    """The storages of gradients as a backward makes them, piece by piece.

    Arguments:
        piece_of: the piece of a moment.
        backward: the op that is a piece's backward.
        loss: the op by which the caller sends gradients.
    """
    found = Flows()
    made: list[Storage] = []
    events: list[tuple[int, int, list[Part]]] = []
    last = [backward(piece_of(gradient.made)) for gradient in gradients]
    for number, gradient in enumerate(gradients):
        sent: dict[int, list[Part]] = {}
        for part in gradient.parts:
            op = loss if part.moment is None else backward(piece_of(part.moment))
            sent.setdefault(op, []).append(part)
        events += [(op, number, parts) for op, parts in sent.items()]
    for op, number, parts in sorted(events, key=lambda event: event[:2]):
        nbytes = gradients[number].nbytes
        before = found.ended.get(number)
        if before is not None and before.nbytes == nbytes and before.is_alone(number, op):
            continue
        storage = None
        if before is not None:
            before.used.add(op)
            before.outlasts.add(op)
            del before.until[number]
        elif len(parts) == 1 and parts[0].handed is not None:
            storage = found.ended.get(parts[0].handed)
        if storage is None:
            storage = Storage(op, nbytes, piece_of(gradients[number].made))
            made.append(storage)
        storage.until[number] = last[number]
        found.begun.setdefault(number, (op, storage))
        found.ended[number] = storage
    for number, storage in found.ended.items():
        storage.used.add(last[number])
    for storage in made:
        storage.used.discard(storage.made)
    found.storages = [storage for storage in made if storage.used]
    return found
