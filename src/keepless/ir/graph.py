"""The training step as a graph: values, ops, and their order.

A `Value` is one storage (views fold into it); an `Op` is one runnable step. The order of `Graph.ops` is the
order of the captured step: forward, loss, backward, optimizer. Nothing here knows torch.

A tiny worked graph, `loss = sum(relu(x @ w))`::

    values   0 x INPUT   1 w PARAM   2 h ACTIVATION   3 r ACTIVATION   4 loss OUTPUT   5 tangent GRAD  ...
    ops      0 mm(0, 1) -> 2   1 relu(2) -> 3   2 sum(3) -> 4   3 loss(4) -> 5   4 ...

The LOSS op is where the caller holds the step: it takes the model's outputs and gives the tangents. It is there
in every graph that has a backward, also when the loss is one of the model's outputs (then it costs nothing).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property


class Kind(Enum):
    """What a value is for. PARAM, BUFFER and INPUT are resident before the step begins."""

    INPUT = "input"
    PARAM = "param"
    BUFFER = "buffer"
    RNG = "rng"
    ACTIVATION = "activation"
    GRAD = "grad"
    OUTPUT = "output"


class Phase(Enum):
    """The part of the step that an op belongs to."""

    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


class Effect(Enum):
    """What an op does beside computing its outputs (rule R3 says what that forbids).

    CHOICE: it picks indices by comparing numbers (a router's top k). Made again from numbers that differ in a last bit
    it could pick others, which no sum forgives: it runs once, and its indices are kept.
    UPDATE: it writes the parameters that it reads (an optimizer in the backward): nothing may read them after it.
    """

    RNG = "rng"
    BUFFER = "buffer"
    COLLECTIVE = "collective"
    OPAQUE = "opaque"
    CHOICE = "choice"
    UPDATE = "update"


RUNS_ONCE = frozenset({Effect.BUFFER, Effect.COLLECTIVE, Effect.OPAQUE, Effect.CHOICE, Effect.UPDATE})
"""Effects of ops that a plan may not replay."""

HOLD = "keepless.hold"
"""Name of an op that does nothing but read: what it reads is held until it runs."""


@dataclass(frozen=True, slots=True)
class Value:
    """One storage.

    Arguments:
        id: position in `Graph.values`.
        name: unique, readable: a parameter's qualified name, or the captured node's.
        nbytes: bytes of the whole storage.
        kind: what it is for.
        dtype: the element type's short name, "float32".
        shape: of the tensor that the producer returns.
    """

    id: int
    name: str
    nbytes: int
    kind: Kind
    dtype: str = "float32"
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Op:
    """One runnable step.

    Arguments:
        id: position in `Graph.ops`.
        name: the operator, "aten.mm.default".
        inputs: value ids that it reads, each once, ascending.
        outputs: value ids that it makes. An RNG op's outputs end with a value of kind RNG: the generator's state
            before the draw, which a replay needs.
        phase: the part of the step.
        effects: see `Effect`.
        reuses: pairs (output, input): the output may take over the input's storage (an exact in-place form exists).
            Whether a run does so is the program's choice (`Run.reuse`).
        module: path of the module that it came from, "transformer.h.0.mlp".
        source: "file.py:88".
        key: equal for ops that cost the same: operator, shapes, strides, dtypes, scalars.
    """

    id: int
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    phase: Phase
    effects: frozenset[Effect] = frozenset()
    reuses: tuple[tuple[int, int], ...] = ()
    module: str = ""
    source: str = ""
    key: str = ""

    @property
    def can_replay(self) -> bool:
        """Whether a program may run it more than once (an RNG op then needs its recorded state)."""
        return not (self.effects & RUNS_ONCE)


@dataclass(frozen=True)
class Graph:
    """Ops in order, and their values.

    Arguments:
        ops: in the captured order; `ops[i].id == i`.
        values: `values[i].id == i`.
        inputs: ids resident on the device before the first instruction.
        pinned: ids that must be resident on the device after the last one.
    """

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    inputs: frozenset[int]
    pinned: frozenset[int]
    fingerprint: str = field(default="", compare=False)

    @cached_property
    def producers(self) -> tuple[tuple[int, ...], ...]:
        """For each value, the ops that can make it, in order."""
        table: list[list[int]] = [[] for _ in self.values]
        for op in self.ops:
            for value in op.outputs:
                table[value].append(op.id)
        return tuple(tuple(row) for row in table)

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For each value, the ops that read it, in order."""
        table: list[list[int]] = [[] for _ in self.values]
        for op in self.ops:
            for value in op.inputs:
                table[value].append(op.id)
        return tuple(tuple(row) for row in table)

    @cached_property
    def loss_op(self) -> int | None:
        """The op that separates forward from backward, or None for a forward-only graph."""
        return next((op.id for op in self.ops if op.phase is Phase.LOSS), None)

    @cached_property
    def static_nbytes(self) -> int:
        """Bytes that are resident before the step and after it, whatever the program does."""
        return sum(self.values[v].nbytes for v in self.inputs & self.pinned)

    @cached_property
    def start_nbytes(self) -> int:
        """Bytes that are resident before the first instruction."""
        return sum(self.values[v].nbytes for v in self.inputs)

    def where(self, op: Op) -> str:
        """The op as people look for it: "aten.mm.default (transformer.h.0.mlp, model.py:88)"."""
        places = ", ".join(place for place in (op.module, op.source) if place)
        return f"{op.name} ({places})" if places else op.name
