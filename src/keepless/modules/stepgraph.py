"""The graph of a step whose ops are pieces of module calls.

Forward op `p` is piece `p`; then comes the LOSS op, then one backward op per piece in reverse, then the optimizer.
Values are storages: the model's state, what pieces save or hand on, gradients of parameters, and the gradients that
flow between pieces. What lives and dies within one piece is scratch of its ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from keepless.capture import LOSS, OPTIMIZER, StepShape
from keepless.ir import Effect, Graph, Kind, Op, Phase, Value
from keepless.modules.flows import Storage, flows
from keepless.modules.pieces import Cut


@dataclass
class Values:
    """Values as they are made; `of` maps storages."""

    items: list[Value] = field(default_factory=list)
    of: dict[int, int] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)

    def new(self, name: str, nbytes: int, kind: Kind, dtype: str = "uint8") -> int:
        count = self.names.get(name, 0)
        self.names[name] = count + 1
        number = len(self.items)
        self.items.append(Value(number, f"{name}.{count}" if count else name, nbytes, kind, dtype, (nbytes,)))
        return number


class StepGraph:
    """Builds the graph.

    Arguments:
        cut: the forward in pieces.
        gradients: name of a parameter -> the backward op in which its gradient first stands.
        shape: what the step is beside forward and backward.
        loss: storage of the model's own loss; None where the caller computes it from the outputs.
        inside: pieces of whose own saved tensors only their outputs are values here.
        holds: the graph gets ops for what a recompute holds (`keepless.solve.holds`): a kept call holds no input.

    Attributes:
        before: values that the steps before left.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        cut: Cut,
        gradients: Mapping[str, int],
        shape: StepShape,
        loss: int | None,
        inside: Mapping[int, int] | None = None,
        holds: bool = False,
    ) -> None:
        self.model, self.cut, self.gradients, self.shape, self.loss = model, cut, gradients, shape, loss
        self.survey = cut.survey
        self.count = cut.num_pieces
        self.inside = inside or {}
        self.holds = holds
        self.values = Values()
        self.static: set[int] = set()
        self.pinned: set[int] = set()
        self.reads: list[set[int]] = [set() for _ in range(2 * self.count + 1)]
        self.makes: list[set[int]] = [set() for _ in range(2 * self.count + 1)]
        self.gradient_of: dict[str, int] = {}
        self.sum_of: dict[str, int] = {}
        self.handed: list[tuple[int, int]] = []
        self.before: set[int] = set()

    def build(self) -> Graph:
        """The graph."""
        self.lay_out()
        return self.graph_of([self.op(number) for number in range(2 * self.count + 1)])

    def lay_out(self) -> None:
        """Finds the values, and which piece reads and makes which."""
        self._state()
        self.grads = self._parameter_gradients()
        self._activations()
        self._leftovers()
        self._flows()

    def graph_of(self, ops: list[Op]) -> Graph:
        """The graph of these ops, and of the optimizer's."""
        if self.shape.has_optimizer:
            by_name = {value.name: value.id for value in self.values.items}
            inputs = {by_name[name] for name in ("optimizer.state", "grad.existing") if name in by_name} | self.grads
            inputs |= {value.id for value in self.values.items if value.kind is Kind.PARAM}
            step = Op(len(ops), OPTIMIZER, tuple(sorted(inputs)), (), Phase.OPTIMIZER, frozenset({Effect.OPAQUE}))
            ops = [*ops, step]
        self.pinned |= self.static
        return Graph(tuple(ops), tuple(self.values.items), frozenset(self.static), frozenset(self.pinned))

    def _state(self) -> None:
        values, survey = self.values, self.survey
        for tensors, kind in ((self.model.named_parameters(), Kind.PARAM), (self.model.named_buffers(), Kind.BUFFER)):
            for name, tensor in tensors:
                storage = survey.book.number_of(tensor)
                if survey.made.get(storage) == -1 and storage not in values.of:
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    values.of[storage] = values.new(name, survey.book.nbytes[storage], kind, dtype)
        for storage, made in survey.made.items():
            if made < 0 and storage not in values.of:
                values.of[storage] = values.new("batch", survey.book.nbytes[storage], Kind.INPUT)
        self.static |= set(values.of.values())
        shape = self.shape
        if shape.state_nbytes:
            self.static.add(values.new("optimizer.state", shape.state_nbytes, Kind.BUFFER))
        if shape.outside_nbytes:
            self.static.add(values.new("outside", shape.outside_nbytes, Kind.INPUT))

    def _parameter_gradients(self) -> set[int]:
        """The values of gradients; where they stand already, one value for all, and it is static."""
        sizes = {name: p.numel() * p.element_size() for name, p in self.model.named_parameters()}
        begun = self._begun(sizes)
        if self.shape.accumulate:
            total = sum(sizes[name] for name in self.gradients)
            self.static.add(self.values.new("grad.existing", total, Kind.GRAD))
            return set()
        found: set[int] = set()
        for name, op in self.gradients.items():
            value = self.values.new(f"grad.{name}", sizes[name], Kind.GRAD)
            self.makes[max(min(op, begun.get(name, op)), self.count)].add(value)
            self.gradient_of[name] = value
            found.add(value)
        self.pinned |= found
        return found

    def _begun(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The backward op in which a parameter that is used several times gets the first part of its gradient.

        Sums that come to a gradient which stands already are values of their own.
        """
        found: dict[str, int] = {}
        backward, piece_of = self.cut.tree.backward, self.cut.piece_of
        for item in self.survey.sums:
            first, last = backward(piece_of(item.last)), backward(piece_of(item.first))
            if not self.shape.accumulate:
                found[item.name] = first
            elif first < last and item.name in self.gradients:
                part = self.values.new(f"sum.{item.name}", sizes[item.name], Kind.GRAD)
                self.makes[first].add(part)
                self.reads[last].add(part)
                self.sum_of[item.name] = part
        return found

    def _activations(self) -> None:
        survey, cut = self.survey, self.cut
        readers: dict[int, set[int]] = {}
        savers: dict[int, set[int]] = {}
        for item in survey.saved:
            piece = cut.piece_of(item.moment)
            if not self._is_inside(piece, item.storage):
                savers.setdefault(item.storage, set()).add(piece)
        for number, region in zip(cut.regions, cut.tree.regions, strict=True):
            for storage in survey.calls[number].inputs:
                readers.setdefault(storage, set()).add(region.first)
                if not self.holds:  # a region holds its inputs until all that it saved is used up
                    savers.setdefault(storage, set()).add(region.first)
            for storage in survey.calls[number].outputs:
                readers.setdefault(storage, set())
        self.savers = savers
        names: dict[int, str] = {}
        for storage in sorted({*readers, *savers, *survey.outputs, *survey.between}):
            if storage in self.values.of:  # state and batch
                for piece in savers.get(storage, ()):
                    self.reads[piece].add(self.values.of[storage])
                    self.reads[cut.tree.backward(piece)].add(self.values.of[storage])
                continue
            maker = cut.piece_of(survey.made[storage])
            used = readers.get(storage, set()) | savers.get(storage, set())
            freed = survey.freed.get(storage)
            held = used if freed is None else used | {min(cut.piece_of(freed), self.count - 1)}
            is_output = storage in survey.outputs
            is_held = is_output and (not self.shape.release_outputs or storage == self.loss)
            stands = storage in survey.standing
            last = max(held, default=maker)
            if not (is_output or stands or savers.get(storage)) and last <= maker:
                continue
            name = names.setdefault(maker, self._name(maker))
            kind = Kind.OUTPUT if is_output else Kind.ACTIVATION
            value = self.values.of[storage] = self.values.new(name, survey.book.nbytes[storage], kind)
            self.makes[maker].add(value)
            if stands:
                self.pinned.add(value)
            for piece in held:
                if piece > maker:
                    self.reads[piece].add(value)
            if is_held and self._is_read_once(maker, held):
                self.reads[self.count].add(value)
                value = self._handed(value)
            for piece in savers.get(storage, ()):
                self.reads[cut.tree.backward(piece)].add(value)
            if is_output and value not in self.makes[self.count]:
                self.reads[self.count].add(value)
                self.pinned |= {value} if is_held else set()

    def _leftovers(self) -> None:
        """What the steps before left: from the first piece on, until one that never runs again has let go of it.

        A first step, from whose start bytes are counted, has none of it.
        """
        found, owners = self.survey.leftovers, self.cut.owners
        sizes = {-1: found.throughout} if found.throughout else {}
        for moment, nbytes in found.until.items():
            piece = self.count
            if moment < self.survey.end:
                piece = next((one for one in range(self.cut.piece_of(moment), self.count) if owners[one] < 0), piece)
            sizes[piece] = sizes.get(piece, 0) + nbytes
        for piece, nbytes in sizes.items():
            value = self.values.new("left_over", nbytes, Kind.ACTIVATION)
            self.makes[0].add(value)
            self.before.add(value)
            if piece < 0:
                self.pinned.add(value)
            else:
                self.reads[piece].add(value)

    def _is_read_once(self, maker: int, readers: set[int]) -> bool:
        """Whether a piece may run again, and none that reads what it makes."""
        owners = self.cut.owners
        return owners[maker] >= 0 and all(owners[piece] < 0 for piece in readers if piece > maker)

    def _handed(self, value: int) -> int:
        """What the caller holds of a value from the loss on.

        The first copy stays, whether or not its piece runs again. Held as the piece's own, it would be dropped before
        that and made anew: too few bytes in between, which the piece's scratch then makes up for in every plan.
        """
        item = self.values.items[value]
        self.values.items[value] = replace(item, kind=Kind.ACTIVATION)
        held = self.values.new(f"{item.name}.held", item.nbytes, Kind.OUTPUT, item.dtype)
        self.makes[self.count].add(held)
        self.handed.append((held, value))
        self.pinned.add(held)
        return held

    def _is_inside(self, piece: int, storage: int) -> bool:
        """Whether a piece keeps what it saves to itself."""
        if piece not in self.inside:
            return False
        call = self.survey.calls[self.cut.regions[self.inside[piece]]]
        return self.survey.made[storage] >= call.begin and storage not in call.outputs

    def _flows(self) -> None:
        """Gradients that wait between pieces."""
        backward = self.cut.tree.backward
        self.flows = flows(self.survey.gradients, self.cut.piece_of, backward, self.count)
        self.flow_of: dict[Storage, int] = {}
        self.outlasting: list[set[int]] = [set() for _ in self.reads]
        for storage in self.flows.storages:
            value = self.values.new(f"flow.{self._name(storage.piece)}", storage.nbytes, Kind.GRAD)
            self.flow_of[storage] = value
            self.makes[storage.made].add(value)
            for op in storage.used:
                self.reads[op].add(value)
            for op in storage.outlasts:
                self.outlasting[op].add(value)

    def flow_to(self, gradient: int | None) -> int | None:
        """The value that a gradient is when it is read."""
        storage = None if gradient is None else self.flows.ended.get(gradient)
        return None if storage is None else self.flow_of.get(storage)

    def flow_from(self, gradient: int | None, op: int) -> int | None:
        """The value that a gradient is if it begins in an op, and is made there."""
        begun, storage = (-1, None) if gradient is None else self.flows.begun.get(gradient, (-1, None))
        return self.flow_of.get(storage) if storage is not None and begun == storage.made == op else None

    def held_by(self, region: int) -> frozenset[int]:
        """The values that a region's recompute holds, beside those that stand anyway."""
        call = self.survey.calls[self.cut.regions[region]]
        by_caller = {value for _, value in self.handed}
        found = {self.values.of[storage] for storage in call.inputs if storage in self.values.of}
        return frozenset(found - self.static - by_caller)

    def _name(self, piece: int) -> str:
        owner = self.cut.owners[piece]
        return f"{self.survey.calls[owner].site}.piece{piece}" if owner >= 0 else f"piece{piece}"

    def op(self, number: int) -> Op:
        """A piece's op, or the LOSS op."""
        inputs = self.reads[number] - self.makes[number]
        row = tuple(sorted(inputs)), tuple(sorted(self.makes[number]))
        if number == self.count:
            return Op(number, LOSS, *row, Phase.LOSS, frozenset({Effect.OPAQUE}), tuple(self.handed))
        is_forward = number < self.count
        owner = self.cut.owners[number if is_forward else 2 * self.count - number]
        call = self.survey.calls[owner] if owner >= 0 else None
        kind = call.kind if call is not None else type(self.model).__name__
        can_replay = is_forward and owner >= 0
        return Op(
            number,
            f"{'forward' if is_forward else 'backward'}.{kind}",
            *row,
            Phase.FORWARD if is_forward else Phase.BACKWARD,
            frozenset() if can_replay else frozenset({Effect.OPAQUE}),
            module=str(call.site) if call is not None else "",
            source=call.source if call is not None else "",
            key=f"{number}",
        )
