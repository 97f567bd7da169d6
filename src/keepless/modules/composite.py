"""The graph of a step of which some module calls are captured: their ops one by one, all else in pieces.

::

    piece 0   block 0: its ops ...  hand over   piece 2   block 1: its ops ...   LOSS   backward ...

A captured call (a *segment*) runs its ops by a program of its own, in its own place in the forward and the backward.
What it gives to the outside is never made twice: a `keepless.hand_over` op, which never runs again and costs nothing,
turns an output of the segment into the value that others read, in the same storage. So every order of these ops falls
apart into one order for each segment. A call that is recomputed as a whole (a *region*) is one op, whose saved
tensors are one value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from keepless.binding import Binding
from keepless.capture import DELIVER, StepShape
from keepless.cost import CostModel
from keepless.ir import Effect, Graph, Kind, Op, Phase
from keepless.modules.pieces import Cut
from keepless.modules.sites import Site
from keepless.modules.stepgraph import StepGraph

HAND_OVER = "keepless.hand_over"
REST = "keepless.rest"
"""Ops of a segment that are not its own: what it gives to others, and what it holds to its end."""
_OPAQUE = frozenset({Effect.OPAQUE})


@dataclass(frozen=True)
class Segment:
    """A captured call in the composite graph: first and last op of its forward and of its backward."""

    site: Site
    forward: tuple[int, int]
    backward: tuple[int, int]


@dataclass(frozen=True)
class Composite:
    """A step with segments.

    Arguments:
        regions: calls that can be recomputed as a whole -> their op.
    """

    graph: Graph
    cost: CostModel
    segments: tuple[Segment, ...]
    regions: dict[Site, int]


@dataclass(frozen=True)
class Costed:
    """A captured call: its binding, and what its ops cost."""

    binding: Binding
    cost: CostModel


class Composer(StepGraph):
    """Builds the composite graph.

    Arguments:
        cut: its regions are the calls that are captured or can be recomputed, none inside another.
        pieces: costs of the graph of pieces alone.
        captured: region -> its capture.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        cut: Cut,
        gradients: Mapping[str, int],
        shape: StepShape,
        loss: int | None,
        pieces: CostModel,
        captured: Mapping[int, Costed],
    ) -> None:
        self.place = {region.first: number for number, region in enumerate(cut.tree.regions)}
        super().__init__(model, cut, gradients, shape, loss, self.place)
        self.pieces = pieces
        self.captured = captured
        self.ops: list[Op] = []
        self.seconds: list[float] = []
        self.scratch: list[int] = []
        self.begun: dict[int, _Segment] = {}
        self.constants: dict[int, int] = {}
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.segments: list[Segment] = []
        self.regions: dict[Site, int] = {}

    def compose(self) -> Composite:
        """The composite graph with its costs."""
        self.lay_out()
        for number in range(2 * self.count + 1):
            piece = number if number <= self.count else 2 * self.count - number
            region = self.place.get(piece)
            if number == self.count or region is None:
                op = self.op(number)
                effects = op.effects if op.phase is Phase.LOSS else op.effects | _OPAQUE
                self.add(replace(op, effects=effects), self.pieces.seconds[number], self.pieces.scratch[number])
            elif region in self.captured:
                if number < self.count:
                    self.begun[region] = _Segment(self, region, number)
                    self.begun[region].forward()
                else:
                    self.begun[region].backward(number)
            elif number < self.count:
                self.whole(region, number)
            else:
                self.add(self.op(number), self.pieces.seconds[number], self.pieces.scratch[number])
        graph = self.graph_of(self.ops)
        rest = len(graph.ops) - len(self.ops)
        if rest:
            self.seconds.append(self.pieces.seconds[-1])
            self.scratch.append(self.pieces.scratch[-1])
        cost = CostModel(tuple(self.seconds), tuple(self.scratch), {}, self.pieces.origin, self.pieces.spread)
        segments = tuple(sorted(self.segments, key=lambda segment: segment.forward))
        return Composite(graph, cost, segments, self.regions)

    def add(self, op: Op, seconds: float = 0.0, scratch: int = 0) -> int:
        """Appends an op under the next id."""
        number = len(self.ops)
        self.ops.append(replace(op, id=number))
        self.seconds.append(seconds)
        self.scratch.append(scratch)
        return number

    def hand_over(self, inner: int, outer: int, module: str) -> None:
        """An inner value becomes one of the outside's."""
        reuses = ((outer, inner),)
        self.add(Op(0, HAND_OVER, (inner,), (outer,), Phase.FORWARD, _OPAQUE, reuses, module, key=HAND_OVER))

    def rest(self, phase: Phase, reads: Iterable[int], makes: Iterable[int], module: str) -> int:
        """What a segment holds to its end, and what it makes in ways that its graph does not show."""
        inputs, outputs = tuple(sorted(reads)), tuple(sorted(makes))
        return self.add(Op(0, REST, inputs, outputs, phase, _OPAQUE, (), module, key=REST))

    def whole(self, region: int, number: int) -> None:
        """A call that is recomputed as a whole."""
        op = self.op(number)
        call = self.survey.calls[self.cut.regions[region]]
        handed: list[tuple[int, int]] = []
        for outer in op.outputs:
            value = self.values.items[outer]
            handed.append((self.values.new(f"{value.name}.inner", value.nbytes, Kind.ACTIVATION), outer))
        own = {
            item.storage
            for item in self.survey.saved
            if self.cut.piece_of(item.moment) == number and self._is_inside(number, item.storage)
        }
        saved = self.values.new(f"{call.site}.saved", self.survey.nbytes(own), Kind.ACTIVATION)
        self.reads[2 * self.count - number].add(saved)
        outputs = tuple(sorted([saved, *(inner for inner, _ in handed)]))
        found = self.add(
            replace(op, outputs=outputs, effects=frozenset()), self.pieces.seconds[number], self.pieces.scratch[number]
        )
        self.regions[call.site] = found
        for inner, outer in handed:
            self.hand_over(inner, outer, op.module)


class _Segment:
    """One captured call on its way into the composite graph."""

    def __init__(self, composer: Composer, region: int, piece: int) -> None:
        self.composer = composer
        self.piece = piece
        self.call = composer.survey.calls[composer.cut.regions[region]]
        found = composer.captured[region]
        self.binding, self.cost = found.binding, found.cost
        self.path = self.call.site.path
        self.value_of: dict[int, int] = {}
        self.handed: dict[int, int] = {}
        loss = self.binding.graph.loss_op
        assert loss is not None
        self.loss = loss
        self.held: set[int] = set()
        self.first = 0
        self._bind_state()

    def _bind_state(self) -> None:
        composer, binding, noted = self.composer, self.binding, self.call.noted
        assert noted is not None
        module = composer.model.get_submodule(self.path)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        slot_value, of = binding.slot_value, composer.values.of
        for name, slot in (*binding.params.items(), *binding.buffers.items()):
            self.value_of[slot_value[slot]] = of[composer.survey.book.number_of(tensors[name])]
        for position, slot in binding.inputs.items():
            self.value_of[slot_value[slot]] = of[noted.given[position]]
        for slot, tensor in binding.constants.items():
            value = composer.constants.get(id(tensor))
            if value is None:
                nbytes = binding.graph.values[slot_value[slot]].nbytes
                value = composer.constants[id(tensor)] = composer.values.new("constant", nbytes, Kind.INPUT)
                composer.static.add(value)
            self.value_of[slot_value[slot]] = value
        self.outer: dict[int, int] = {}
        for position, slot in binding.outputs.items():
            inner = slot_value[slot]
            outer = of.get(noted.returned.get(position, -1))
            if inner not in self.value_of and outer in composer.makes[self.piece]:
                self.outer[inner] = outer

    def inner(self, value: int) -> int:
        """The composite graph's value of one of the segment's."""
        found = self.value_of.get(value)
        if found is None:
            item = self.binding.graph.values[value]
            name = f"{self.call.site}.{item.name}"
            kind = Kind.ACTIVATION if item.kind is Kind.OUTPUT else item.kind
            found = self.value_of[value] = self.composer.values.new(name, item.nbytes, kind, item.dtype)
        return found

    def forward(self) -> None:
        """The forward's ops, each output handed over as soon as it is made."""
        composer, graph = self.composer, self.binding.graph
        self.first = len(composer.ops)
        if any(Effect.RNG in op.effects for op in graph.ops):
            state = next(value.nbytes for value in graph.values if value.kind is Kind.RNG)
            self.held.add(composer.values.new(f"{self.call.site}.generator", state, Kind.ACTIVATION))
            composer.rest(Phase.FORWARD, (), self.held, self.path)
        for op in graph.ops[: self.loss]:
            self.copy(op)
            for value in op.outputs:
                outer = self.outer.get(value)
                if outer is not None:
                    self._resize(outer, graph.values[value].nbytes)
                    composer.hand_over(self.inner(value), outer, self.path)
                    self.value_of[value] = outer
        made = set(self.outer.values())
        left = composer.makes[self.piece] - made
        self.last = composer.rest(Phase.FORWARD, composer.reads[self.piece] - left, left, self.path)

    def _resize(self, value: int, nbytes: int) -> None:
        item = self.composer.values.items[value]
        self.composer.values.items[value] = replace(item, nbytes=nbytes, shape=(nbytes,))

    def backward(self, number: int) -> None:
        """The backward's ops."""
        composer, binding = self.composer, self.binding
        noted, module = self.call.noted, composer.model.get_submodule(self.path)
        assert noted is not None
        makes = composer.makes[number]
        missing: set[int] = set()
        taken: set[int] = set()
        for position, slot in zip(binding.grad_outputs, binding.tangents, strict=True):
            flow = composer.flow_to(noted.returned_gradients.get(position))
            if flow is None:
                flow = composer.values.new(f"flow.{self.call.site}", self._nbytes(slot), Kind.GRAD)
                missing.add(flow)
            self.value_of[binding.slot_value[slot]] = flow
            taken.add(flow)
        made: set[int] = set()
        added: dict[int, int] = {}
        again: set[str] = set()
        for name, slot in binding.grads:
            inner = binding.slot_value[slot]
            if isinstance(name, str):
                own = composer.names[id(module.get_parameter(name))]
                outer = composer.gradient_of.get(own, composer.sum_of.get(own))
            else:
                outer = composer.flow_from(noted.gradients.get(name), number)
            if outer is not None and outer in makes and outer not in made and inner not in self.value_of:
                self._resize(outer, binding.graph.values[inner].nbytes)
                self.value_of[inner] = outer
                made.add(outer)
            elif not isinstance(name, str) or name in again:
                added[inner] = self._nbytes(slot)  # a sum with what came before, in storage of its own
            if isinstance(name, str):
                again.add(name)
        first = len(composer.ops)
        if missing:
            composer.rest(Phase.BACKWARD, (), missing, self.path)
        for op in binding.graph.ops[self.loss + 1 :]:
            extra = added.get(op.inputs[0], 0) if op.name == DELIVER else 0
            self.copy(op, extra)
        # Inputs stand until the segment's end; what it gave out, until the last of its own ops that reads it.
        taken |= set(self.outer.values())
        held = (composer.reads[number] - (taken - composer.outlasting[number])) | self.held
        last = composer.rest(Phase.BACKWARD, held, makes - made, self.path)
        composer.segments.append(Segment(self.call.site, (self.first, self.last), (first, last)))

    def _nbytes(self, slot: int) -> int:
        return self.binding.graph.values[self.binding.slot_value[slot]].nbytes

    def copy(self, op: Op, extra: int = 0) -> None:
        """One of the segment's ops."""
        inputs = tuple(sorted({self.inner(value) for value in op.inputs}))
        outputs = tuple(self.inner(value) for value in op.outputs)
        reuses = tuple((self.inner(made), self.inner(source)) for made, source in op.reuses)
        module = f"{self.path}.{op.module}" if op.module else self.path
        copied = replace(op, inputs=inputs, outputs=outputs, reuses=reuses, module=module)
        self.composer.add(copied, self.cost.seconds[op.id], self.cost.scratch[op.id] + extra)


def own_costs(segments: Sequence[Segment], graph: Graph, cost: CostModel) -> dict[Site, CostModel]:
    """The costs of each segment's own ops, in their numbers there; its LOSS op costs nothing."""
    found: dict[Site, CostModel] = {}
    for segment in segments:
        seconds: list[float] = []
        scratch: list[int] = []
        for first, last in (segment.forward, segment.backward):
            own = [op for op in range(first, last + 1) if graph.ops[op].name not in (HAND_OVER, REST)]
            seconds += [cost.seconds[op] for op in own]
            scratch += [cost.scratch[op] for op in own]
            if first == segment.forward[0]:
                seconds.append(0.0)
                scratch.append(0)
        found[segment.site] = CostModel(tuple(seconds), tuple(scratch), cost.links, cost.origin)
    return found


def own_orders(segments: Sequence[Segment], graph: Graph, order: Iterable[int]) -> dict[Site, list[int]]:
    """An order of the composite graph as an order of each segment's own ops, its LOSS op between the halves.

    Replays that stand outside of their segment's place go to where its backward first may want them.
    """
    place: dict[int, tuple[int, int]] = {}
    losses: list[int] = []
    for number, segment in enumerate(segments):
        own = 0
        for op in range(segment.forward[0], segment.forward[1] + 1):
            if graph.ops[op].name not in (HAND_OVER, REST):
                place[op] = number, own
                own += 1
        losses.append(own)
        own += 1
        for op in range(segment.backward[0], segment.backward[1] + 1):
            if graph.ops[op].name not in (HAND_OVER, REST):
                place[op] = number, own
                own += 1
    found: list[list[int]] = [[] for _ in segments]
    ends = {segment.forward[1]: number for number, segment in enumerate(segments)}
    for op in order:
        if op in ends:
            found[ends[op]].append(losses[ends[op]])
        elif op in place:
            number, own = place[op]
            found[number].append(own)
    return {segment.site: rows for segment, rows in zip(segments, found, strict=True)}
