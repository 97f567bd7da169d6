"""From drafts to the graph: order, deliveries, loss and optimizer, effects, storage reuse, keys.

Copies into buffers move to the forward's end; each parameter gradient gets storage of its own and a deliver op, the
place where autograd takes it over.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from keepless import _compat
from keepless.binding import Binding, Call, OpCode, Ref, map_refs, slots_of
from keepless.capture import aten as known
from keepless.capture.drafting import Draft, Drafting, draft_slots
from keepless.capture.facts import find_facts
from keepless.capture.layouts import is_dense
from keepless.capture.products import lower_first
from keepless.capture.state import planned_device
from keepless.capture.updating import last_needs
from keepless.errors import CaptureError
from keepless.ir import Effect, Graph, Kind, Op, Phase, Value
from keepless.machine import OPTIMIZER_IN_BACKWARD

LOSS = "keepless.loss"
DELIVER = "keepless.deliver"
OPTIMIZER = "keepless.optimizer"
UPDATE = "keepless.update"
"""A delivery at which the optimizer updates the parameter."""
CPU_RNG_NBYTES = 5056
"""Bytes of the CPU generator's state (`torch.get_rng_state().nbytes`)."""
CUDA_RNG_NBYTES = 16


class Assembly:
    """Puts the drafts in order, adds loss, deliver and optimizer ops, and builds the graph.

    Arguments:
        withheld: flat output positions of tensors that a rewrite does not make: they are None.
    """

    def __init__(self, work: Drafting, model: torch.nn.Module, withheld: frozenset[int] = frozenset()) -> None:
        self.work = work
        self.withheld = withheld
        self.shape = work.shape
        self.parameters = dict(torch.nn.Module.named_parameters(model))
        self.device = planned_device(model)
        self.updates = OPTIMIZER_IN_BACKWARD in self.shape.rewrites
        self.outputs: dict[int, int] = {}
        self.grads: list[tuple[str | int, int]] = []
        self.read_outputs()
        self.loss_inputs = sorted({work.slot_value[slot] for slot in self.outputs.values()})
        self.own_grads()
        self.drafts = self.order()

    def read_outputs(self) -> None:
        """Which slots are the forward's outputs, and which are gradients of what."""
        work = self.work
        node = next(node for node in work.traced.module.graph.nodes if node.op == "output")
        tensor_positions = [i for i, leaf in enumerate(work.traced.output_leaves) if isinstance(leaf, torch.Tensor)]
        trainable = {name for name, p in self.parameters.items() if p.requires_grad}
        for item, desc in zip(node.args[0], node.meta["desc"], strict=True):
            role, what = _compat.describe_output(desc)
            if role == "output":
                self.outputs[tensor_positions[what]] = work.slot_of[(item, None)]
            elif role == "grad" and item is not None:
                kind, name = work.role(*what)
                if (kind == "param" and name in trainable) or kind == "input":
                    shape = self.shape
                    shared = name in shape.shared_inputs if kind == "input" else shape.shared_parameters
                    parts = self.summands(item) if shared else [item]
                    self.grads.extend((name, work.slot_of[(part, None)]) for part in parts)
            elif role == "unknown":
                raise CaptureError(f"The captured step returns something that this engine does not know ({what}).")

    def summands(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """The parts that autograd added up to a gradient, in the order in which they came; the sums are left out.

        Sums that autograd makes between two nodes of its graph carry the last number that the forward came to.
        """
        graph = self.work.traced.module.graph
        last = max(n.meta.get("seq_nr") or 0 for n in graph.nodes if n.meta.get("partitioner_tag") == "is_forward")
        parts: list[torch.fx.Node] = []
        sums: set[torch.fx.Node] = set()
        while (
            node.target is torch.ops.aten.add.Tensor
            and node.meta.get("partitioner_tag") == "is_backward"
            and (node.meta.get("seq_nr") or 0) >= last
            and len(node.args) == 2
            and not node.kwargs
            and len(node.users) == 1
            and all(isinstance(arg, torch.fx.Node) for arg in node.args)
        ):
            sums.add(node)
            before, part = node.args
            parts.append(part)  # type: ignore[arg-type]
            node = before  # type: ignore[assignment]
        self.work.backward = [draft for draft in self.work.backward if draft.node not in sums]
        return [node, *reversed(parts)]

    def own_grads(self) -> None:
        """Gives each gradient storage of its own, by a copy where it has not: in its parameter's layout, or, where it
        goes on to what made an input, as it comes.
        """
        work = self.work
        seen: set[int] = set(self.loss_inputs) | work.resident | {work.slot_value[s] for s in work.tangent_of.values()}
        readers: set[int] = set()
        for draft in work.backward:
            readers.update(work.slot_value[s] for s in draft_slots(draft))
        for index, (name, slot) in enumerate(self.grads):
            example, value = work.examples[slot], work.slot_value[slot]
            like: Any = self.parameters[name] if isinstance(name, str) else work.examples[work.inputs[name]]
            if self.goes_on(name) and example.shape == like.shape:
                like = example
            whole = example.untyped_storage().nbytes() == example.numel() * example.element_size()
            if value not in seen and value not in readers and whole and _same_layout(example, like):
                seen.add(value)
                work.set_kind(value, Kind.GRAD)
                continue
            stride = _gradient_strides(like)
            copy = torch.empty_strided(tuple(like.shape), stride, dtype=example.dtype, device="meta")
            own = work.new_value(f"grad.{name}", copy, Kind.GRAD, shared=False)
            own_slot = work.new_slot(copy, own)
            call = Call(known.materialize, (Ref(slot), tuple(like.shape), stride))
            work.backward.append(
                Draft("keepless.materialize", call, [(None, own_slot)], Phase.BACKWARD, set(), module=str(name))
            )
            self.grads[index] = (name, own_slot)
            seen.add(own)

    def goes_on(self, name: str | int) -> bool:
        """Whether code before this step differentiates further, by a gradient in the layout that eager's has."""
        if isinstance(name, str):
            return False
        return self.shape.is_block or not self.work.flat.leaves[name].is_leaf

    def order(self) -> list[Draft]:
        """Forward, writes to buffers, loss, backward with deliveries, optimizer; dead ops left out."""
        work = self.work
        loss = Draft(LOSS, None, [], Phase.LOSS, {Effect.OPAQUE}, extra_inputs=tuple(self.loss_inputs))
        for position in sorted(work.tangent_of):
            loss.outputs.append((None, work.tangent_of[position]))
        backward = self.deliveries(lower_first(work, _early_copies(work, work.backward)))
        tail = []
        if self.shape.has_optimizer and not self.updates:
            tail.append(Draft(OPTIMIZER, None, [], Phase.OPTIMIZER, {Effect.OPAQUE}))
        drafts = [*work.forward, *work.mutations, loss, *backward, *tail]
        live: set[int] = set()
        kept: list[Draft] = []
        for draft in reversed(drafts):
            made = {work.slot_value[slot] for _, slot in draft.outputs}
            if draft.effects or draft.grad is not None or made & live:
                kept.append(draft)
                live.update(work.slot_value[s] for s in draft_slots(draft))
                live.update(draft.extra_inputs)
        return kept[::-1]

    def deliveries(self, backward: list[Draft]) -> list[Draft]:
        """Inserts deliver ops: a gradient is handed over once it and the last reader of its parameter have run.

        Where that updates the parameter, what a replay could want of it has run, too (`capture.updating`).

        Small gradients wait for each other, up to 1/256 of all gradient bytes (at least 64 KiB): each hand-over costs
        about 30 us of autograd.
        """
        work = self.work
        ready: dict[int, list[int]] = {}
        last_reader: dict[int, int] = {}
        maker: dict[int, int] = {}
        for position, draft in enumerate(backward):
            for slot in draft_slots(draft):
                last_reader[work.slot_value[slot]] = position
            for _, slot in draft.outputs:
                maker[work.slot_value[slot]] = position
        if self.updates:
            last_reader = last_needs(work, backward)
        total = 0
        for index, (name, slot) in enumerate(self.grads):
            position = maker.get(work.slot_value[slot], -1)
            if isinstance(name, str):
                position = max(position, last_reader.get(work.slot_value[work.params[name]], -1))
            ready.setdefault(position, []).append(index)
            total += work.values[work.slot_value[slot]].nbytes
        threshold = max(64 * 1024, total // 256)
        result: list[Draft] = []
        waiting: list[int] = []
        pending = 0
        for position in range(-1, len(backward)):
            if position >= 0:
                result.append(backward[position])
            for index in ready.get(position, ()):
                waiting.append(index)
                pending += work.values[work.slot_value[self.grads[index][1]]].nbytes
            if waiting and (pending >= threshold or position == len(backward) - 1):
                if self.updates:  # the updates come in an order that autograd chooses: the largest first is the worst
                    waiting.sort(key=lambda i: -work.values[work.slot_value[self.grads[i][1]]].nbytes)
                result.extend(map(self.delivery, waiting))
                waiting, pending = [], 0
        return result

    def delivery(self, index: int) -> Draft:
        """Where autograd takes over a gradient, and, in a step that updates then, drops it."""
        work, (name, slot) = self.work, self.grads[index]
        gradient = work.slot_value[slot]
        if self.updates and isinstance(name, str):
            draft = Draft(UPDATE, None, [], Phase.BACKWARD, {Effect.UPDATE}, module=_module_of(name))
            draft.extra_inputs, draft.grad = (gradient, work.slot_value[work.params[name]]), index
        else:
            draft = Draft(DELIVER, None, [], Phase.BACKWARD, {Effect.OPAQUE}, module=_module_of(name))
            draft.extra_inputs, draft.grad = (gradient,), index
        return draft

    def binding(self) -> Binding:
        """The finished graph and binding."""
        work, shape = self.work, self.shape
        static = set(work.resident)
        if shape.state_nbytes:
            static.add(self.extra_value("optimizer.state", Kind.BUFFER, shape.state_nbytes))
        if shape.outside_nbytes:
            static.add(self.extra_value("outside", Kind.INPUT, shape.outside_nbytes))
        grad_values = {
            work.slot_value[slot] for name, slot in self.grads if not self.updates or not isinstance(name, str)
        }
        pinned = set(static)
        if shape.accumulate:
            total = sum(work.values[v].nbytes for v in grad_values)
            existing = self.extra_value("grad.existing", Kind.GRAD, total)
            static.add(existing)
            pinned.add(existing)
        else:
            pinned |= grad_values
        held = [v for v in self.loss_inputs if v not in static]
        for value in held:
            work.set_kind(value, Kind.OUTPUT)
        loss = work.traced.loss_position
        released = held if shape.release_outputs else []
        pinned |= {v for v in held if v not in released or (loss in self.outputs and v == self.loss_value())}
        fixed = pinned | static | set(self.loss_inputs) | {work.slot_value[slot] for slot in work.tangent_of.values()}
        stale = {work.slot_value[d.call.args[0].slot] for d in work.mutations if d.call is not None}
        ops: list[Op] = []
        codes: list[OpCode | None] = []
        for draft in self.drafts:
            op, code = self.op(len(ops), draft, stale, fixed)
            ops.append(op)
            codes.append(code)
        ops = _chosen_reuse(ops)
        graph = Graph(tuple(ops), tuple(work.values), frozenset(static), frozenset(pinned))
        leaves = work.traced.output_leaves
        if set(work.traced.grad_outputs) - set(work.tangent_of):
            raise CaptureError(
                "Outputs that get gradients are views of one another or of an input, and a captured step would give "
                "them a gradient of their own. Return one of them, and make the others from it outside."
            )
        return Binding(
            graph=graph,
            ops=tuple(codes),
            slot_value=work.slot_value,
            views=work.views,
            params=work.params,
            buffers=work.buffers,
            inputs=work.inputs,
            constants=work.constants,
            constant_homes=work.homes,
            outputs=self.outputs,
            output_constants={i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)}
            | dict.fromkeys(self.withheld),
            examples_require_grad={i: leaves[i].requires_grad for i in self.outputs},
            output_spec=work.traced.output_spec,
            grad_outputs=work.traced.grad_outputs,
            tangents=tuple(work.tangent_of[i] for i in sorted(work.tangent_of)),
            grads=tuple(self.grads),
            examples=work.examples,
            device=self.device,
            passed_through={
                i: self.argument_slot(*where) for i, where in work.traced.passed_through.items() if i in self.outputs
            },
            repeated=work.traced.repeated,
            aside=work.traced.aside,
            attributes=work.traced.attributes,
            facts=find_facts(work.model, work.traced.attributes) if work.traced.facts is None else work.traced.facts,
            asked=work.traced.asking,
            ambient=_compat.ambient_state(self.device.type),
            accumulates=shape.accumulate,
            orders=work.traced.orders,
        )

    def argument_slot(self, kind: str, what: str | int) -> int:
        """The slot of a parameter or buffer by name, or of an input by flat position."""
        if isinstance(what, int):
            return self.work.inputs[what]
        return self.work.params[what] if what in self.work.params else self.work.buffers[what]

    def loss_value(self) -> int:
        position = self.work.traced.loss_position
        return -1 if position is None else self.work.slot_value[self.outputs[position]]

    def extra_value(self, name: str, kind: Kind, nbytes: int) -> int:
        value = len(self.work.values)
        self.work.values.append(Value(value, name, nbytes, kind, "uint8", (nbytes,)))
        return value

    def op(self, index: int, draft: Draft, stale: set[int], fixed: set[int]) -> tuple[Op, OpCode | None]:
        work = self.work
        inputs = sorted({work.slot_value[s] for s in draft_slots(draft)} | set(draft.extra_inputs))
        # An LSTM's backward gives one tensor as the gradients of both its biases.
        outputs = list(dict.fromkeys(work.slot_value[slot] for _, slot in draft.outputs))
        effects = set(draft.effects)
        if draft.name == OPTIMIZER:
            grads = {work.slot_value[slot] for _, slot in self.grads}
            by_name = {value.name: value.id for value in work.values}
            extra = {by_name[name] for name in ("optimizer.state", "grad.existing") if name in by_name}
            inputs = sorted({work.slot_value[s] for s in work.params.values()} | extra)
            inputs = sorted(set(inputs) | (grads if not self.shape.accumulate else set()))
        if stale & set(inputs) and draft.phase is Phase.FORWARD and draft.replay is None:
            effects.add(Effect.BUFFER)  # it reads what the step overwrites: it cannot run again
        if stale & set(inputs) and draft.phase is Phase.BACKWARD:
            raise CaptureError(
                f"The backward reads {work.values[min(stale & set(inputs))].name}, which the forward changes in place."
            )
        if draft.phase is Phase.FORWARD and draft.name.split(".")[1] in known.CHOICES:
            effects.add(Effect.CHOICE)
        state = None
        if Effect.RNG in effects:
            nbytes = CPU_RNG_NBYTES if self.device.type == "cpu" else CUDA_RNG_NBYTES
            state = self.extra_value(f"rng.{index}", Kind.RNG, nbytes)
            outputs.append(state)
        reuses, in_place = self.in_place(draft, fixed)
        op = Op(
            index,
            draft.name,
            tuple(inputs),
            tuple(outputs),
            draft.phase,
            frozenset(effects),
            reuses,
            draft.module,
            draft.source,
            self.key(draft),
        )
        if draft.call is None:
            return op, None
        named = tuple((item, slot, work.slot_value[slot]) for item, slot in draft.outputs)
        places = known.NEW_STATISTICS if draft.replay is not None else ()
        first_only = frozenset(value for item, _, value in named if item in places)
        return op, OpCode(draft.call, named, draft.replay, in_place, state, first_only)

    def in_place(
        self, draft: Draft, fixed: set[int]
    ) -> tuple[tuple[tuple[int, int], ...], dict[tuple[int, int], Call]]:
        """The pairs (output, input) for which an exact in-place form exists, and those forms."""
        work = self.work
        if draft.call is None or len(draft.outputs) != 1 or draft.effects - {Effect.OPAQUE}:
            return (), {}
        out_slot = draft.outputs[0][1]
        out = work.examples[out_slot]
        pairs: dict[tuple[int, int], Call] = {}
        refs = [(i, arg.slot) for i, arg in enumerate(draft.call.args) if isinstance(arg, Ref)]
        for position, form in self.in_place_of(draft.call, out).items():
            slot = next((s for i, s in refs if i == position), None)
            if slot is None:
                continue
            value, example = work.slot_value[slot], work.examples[slot]
            others = [s for i, s in refs if i != position]
            aliased = any(work.slot_value[s] == value and not _same_view(work.examples[s], example) for s in others)
            whole = example.untyped_storage().nbytes() == out.untyped_storage().nbytes()
            dense = example.numel() * example.element_size() == example.untyped_storage().nbytes()
            same = out.dtype == example.dtype and out.shape == example.shape and out.stride() == example.stride()
            together = work.on_host(example) == work.on_host(out)
            if value not in fixed and not aliased and whole and dense and same and together:
                pairs[(work.slot_value[out_slot], value)] = Call(form, draft.call.args, draft.call.kwargs)
        return tuple(pairs), pairs

    def in_place_of(self, call: Call, out: torch.Tensor) -> dict[int, Any]:
        return known.in_place_forms(call.target, call.args, out.dim(), self.device.type)

    def key(self, draft: Draft) -> str:
        """Equal for ops that cost the same."""
        if draft.call is None:
            nbytes = sum(self.work.values[v].nbytes for v in draft.extra_inputs)
            whose = "" if draft.name != UPDATE or draft.grad is None else f"|{self.grads[draft.grad][0]}"
            return f"{draft.name}|{nbytes}{whose}"

        def describe(slot: int) -> str:
            example = self.work.examples[slot]
            dtype = str(example.dtype).removeprefix("torch.")
            shape = "x".join(str(n) for n in example.shape)
            return f"<{dtype}:{shape}:{','.join(str(n) for n in example.stride())}>"

        arguments = map_refs((draft.call.args, dict(draft.call.kwargs)), describe)
        return f"{draft.name}|{arguments}"


def _module_of(name: str | int) -> str:
    return name.rpartition(".")[0] if isinstance(name, str) else ""


def _same_layout(grad: torch.Tensor, like: Any) -> bool:
    """Whether autograd takes a gradient over without a copy (`obeys_layout_contract` in accumulate_grad.h)."""
    if grad.shape != like.shape or grad.dtype != like.dtype:
        return False
    pairs = zip(grad.shape, grad.stride(), _gradient_strides(like), strict=True)
    return all(size == 1 or a == b for size, a, b in pairs)


def _gradient_strides(like: Any) -> tuple[int, ...]:
    """The strides that autograd gives a gradient: its tensor's if that is dense, else contiguous ones."""
    if is_dense(like):
        return tuple(like.stride())
    return tuple(torch.empty(like.shape, device="meta").stride())


def _same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()
    return bool(same)


def _early_copies(work: Drafting, backward: list[Draft]) -> list[Draft]:
    """Moves each materialized gradient to just behind its producer."""
    made: dict[int, int] = {}
    plain: list[Draft] = []
    behind: dict[int, list[Draft]] = {}
    for draft in backward:
        if draft.name == "keepless.materialize":
            source = work.slot_value[slots_of(draft.call)[0]] if draft.call else -1
            behind.setdefault(made.get(source, -1), []).append(draft)
            continue
        for _, slot in draft.outputs:
            made[work.slot_value[slot]] = len(plain)
        plain.append(draft)
    result = list(behind.get(-1, []))
    for index, draft in enumerate(plain):
        result.append(draft)
        result.extend(behind.get(index, []))
    return result


def _chosen_reuse(ops: list[Op]) -> list[Op]:
    """Leaves each op one pair: the input that dies there in the captured order, else the one with fewest readers."""
    readers: dict[int, list[int]] = {}
    for op in ops:
        for value in op.inputs:
            readers.setdefault(value, []).append(op.id)
    return [
        replace(op, reuses=(min(op.reuses, key=lambda p: (readers[p[1]][-1] != op.id, len(readers[p[1]]))),))
        if len(op.reuses) > 1
        else op
        for op in ops
    ]
