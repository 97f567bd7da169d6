"""From a traced joint graph to a `Graph` and its `Binding`.

Views fold into the storage that they look at; copies into buffers move to the forward's end; dropout on the CPU is
taken apart into a draw (kept as one byte per element, or replayed) and two exact products; each parameter gradient
gets a deliver op, the place where autograd takes it over.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch

from keepless import _compat
from keepless.binding import Binding, Call, OpCode, Ref, ViewCode, map_refs, slots_of
from keepless.capture import aten as known
from keepless.capture.constants import Getter, find_home
from keepless.capture.inputs import FlatInputs
from keepless.capture.trace import Traced, named_state, planned_device
from keepless.errors import CaptureError
from keepless.ir import Effect, Graph, Kind, Op, Phase, Value

LOSS = "keepless.loss"
DELIVER = "keepless.deliver"
OPTIMIZER = "keepless.optimizer"
CPU_RNG_NBYTES = 5056
"""Bytes of the CPU generator's state (`torch.get_rng_state().nbytes`)."""
CUDA_RNG_NBYTES = 16


@dataclass(frozen=True)
class StepShape:
    """What the step is beside forward and backward.

    Arguments:
        accumulate: gradients are added to existing ones (else they are made afresh).
        release_outputs: the caller drops the outputs before the backward, all but the loss.
        has_optimizer: the step ends with `optimizer.step()`.
        state_nbytes: bytes of optimizer state.
        outside_nbytes: bytes on the device beside model, batch and optimizer.
    """

    accumulate: bool = False
    release_outputs: bool = False
    has_optimizer: bool = False
    state_nbytes: int = 0
    outside_nbytes: int = 0


@dataclass
class _Draft:
    """An op before it has its id."""

    name: str
    call: Call | None
    outputs: list[tuple[int | None, int]]
    phase: Phase
    effects: set[Effect]
    node: torch.fx.Node | None = None
    replay: Call | None = None
    extra_inputs: tuple[int, ...] = ()
    module: str = ""
    source: str = ""
    grad: int | None = None


class _Lowering:
    """One pass over the nodes, gathering slots, values and drafts of ops."""

    def __init__(self, traced: Traced, flat: FlatInputs, model: torch.nn.Module, shape: StepShape) -> None:
        self.traced = traced
        self.names = [name for name, _ in named_state(model)]
        self.param_names = {name for name, _ in model.named_parameters()}
        self.flat = flat
        self.shape = shape
        self.device = planned_device(model)
        self.slot_of: dict[tuple[torch.fx.Node, int | None], int] = {}
        self.examples: dict[int, torch.Tensor] = {}
        self.slot_value: dict[int, int] = {}
        self.value_of_storage: dict[int, int] = {}
        self.values: list[Value] = []
        self.value_names: set[str] = set()
        self.views: dict[int, ViewCode] = {}
        self.params: dict[str, int] = {}
        self.buffers: dict[str, int] = {}
        self.inputs: dict[int, int] = {}
        self.constants: dict[int, torch.Tensor] = {}
        self.homes: dict[int, tuple[str, Getter]] = {}
        self.model = model
        self.tangent_of: dict[int, int] = {}
        self.resident: set[int] = set()
        self.forward: list[_Draft] = []
        self.mutations: list[_Draft] = []
        self.backward: list[_Draft] = []
        self.scale_of_mask: dict[int, float] = {}
        self.module_of_seq: dict[int, tuple[str, str]] = {}
        self.num_slots = 0

    # ---- slots and values

    def new_slot(self, example: torch.Tensor, value: int) -> int:
        slot = self.num_slots
        self.num_slots += 1
        self.examples[slot] = example
        self.slot_value[slot] = value
        return slot

    def new_value(self, name: str, example: torch.Tensor, kind: Kind, *, shared: bool = True) -> int:
        value = len(self.values)
        while name in self.value_names:
            name += "'"
        self.value_names.add(name)
        dtype = str(example.dtype).removeprefix("torch.")
        nbytes = example.untyped_storage().nbytes()
        self.values.append(Value(value, name, nbytes, kind, dtype, tuple(example.shape)))
        if shared:
            self.value_of_storage[_compat.storage_key(example)] = value
        return value

    def set_kind(self, value: int, kind: Kind) -> None:
        old = self.values[value]
        self.values[value] = Value(old.id, old.name, old.nbytes, kind, old.dtype, old.shape)

    def refs(self, item: Any) -> Any:
        if isinstance(item, torch.fx.Node):
            return Ref(self.slot_of[(item, None)])
        if isinstance(item, tuple | list):
            return (
                type(item)(self.refs(part) for part in item)
                if type(item) in (tuple, list)
                else [self.refs(part) for part in item]
            )
        if isinstance(item, dict):
            return {key: self.refs(part) for key, part in item.items()}
        return item

    # ---- nodes

    def role(self, kind: str, what: Any) -> tuple[str, Any]:
        """What an argument of the captured step is: parameters, buffers and inputs come in this order."""
        if kind != "input":
            return kind, what
        if what < len(self.names):
            name = self.names[what]
            return ("param" if name in self.param_names else "buffer"), name
        return "input", self.flat.tensor_positions[what - len(self.names)]

    def placeholder(self, node: torch.fx.Node) -> None:
        role, what = self.role(*_compat.describe_input(node.meta.get("desc")))
        example = node.meta["val"]
        if not isinstance(example, torch.Tensor):
            raise CaptureError(f"The captured step takes a {type(example).__name__} as an argument: {node.name}.")
        key = _compat.storage_key(example)
        if role in ("param", "buffer"):
            value = self.value_of_storage.get(key, -1)
            if value < 0:
                value = self.new_value(what, example, Kind.PARAM if role == "param" else Kind.BUFFER)
            slot = self.new_slot(example, value)
            (self.params if role == "param" else self.buffers)[what] = slot
        elif role == "input":
            value = self.value_of_storage.get(key, -1)
            if value < 0:
                value = self.new_value(f"input.{what}", example, Kind.INPUT)
            slot = self.new_slot(example, value)
            self.inputs[what] = slot
        elif role == "tangent":
            value = self.new_value(f"tangent.{what}", example, Kind.GRAD)
            slot = self.new_slot(example, value)
            self.tangent_of[what] = slot
        else:
            raise CaptureError(
                f"The captured step has an argument of a kind that this engine does not know ({what}): the forward "
                "changes a parameter, or an input that requires a gradient, in place."
            )
        if role != "tangent":
            self.resident.add(value)
        self.slot_of[(node, None)] = slot

    def constant(self, node: torch.fx.Node) -> None:
        tensor = getattr(self.traced.module, str(node.target))
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, _compat.FakeTensor):
            kind = "a generator of its own" if "opaque" in str(node.target) else f"a {type(tensor).__name__}"
            raise CaptureError(
                f"The forward uses {kind} ({node.target}), which a captured step cannot replay. Draw from torch's "
                "default generator, or hold tensors as parameters and buffers."
            )
        if tensor.requires_grad:
            raise CaptureError(
                f"The forward reads a tensor of shape {tuple(tensor.shape)} that requires a gradient but is no "
                "parameter of the model: its gradient would be lost. Register it, or pass it in the batch."
            )
        if tensor.device != self.device:
            raise CaptureError(
                f"The forward reads a tensor on {tensor.device}; the model is planned for {self.device}."
            )
        example = node.meta.get("val", tensor)
        home = None
        if any(user.target not in known.FRESH for user in node.users):
            home = find_home(self.model, tensor)
            if home is None:
                raise CaptureError(
                    f"The forward reads a tensor of shape {tuple(tensor.shape)} that is no parameter, buffer or "
                    "argument, and whose home is not found; a captured step would read this very tensor for ever. "
                    "Register it as a buffer, or pass it in the batch."
                )
        value = self.new_value(f"constant.{node.name}", example, Kind.INPUT)
        self.resident.add(value)
        slot = self.new_slot(example, value)
        self.constants[slot] = tensor
        if home is not None:
            self.homes[slot] = home
        self.slot_of[(node, None)] = slot

    def call(self, node: torch.fx.Node) -> None:
        if node.target is operator.getitem:
            parent, item = node.args
            self.slot_of[(node, None)] = self.slot_of[(parent, item)]  # type: ignore[index]
            return
        phase = Phase.BACKWARD if node.meta.get("partitioner_tag") == "is_backward" else Phase.FORWARD
        module, source = self.place(node, phase)
        args, kwargs = self.refs(node.args), self.refs(node.kwargs)
        if node.target is torch.ops.aten.copy_.default and isinstance(node.args[0], torch.fx.Node):
            self.mutation(node, args, module, source)
            return
        target: Any = node.target
        if target is torch.ops.aten.native_dropout.default and self.dropout(node, args, phase, module, source):
            return
        if target is torch.ops.aten.native_dropout_backward.default:
            mask_value = self.slot_value[args[1].slot]
            if mask_value in self.scale_of_mask:
                target, args, kwargs = known.apply_mask, (args[0], args[1], self.scale_of_mask[mask_value]), {}
        if target is torch.ops.aten.bernoulli.p and self.is_uninitialized(node.args[0]):
            like = self.examples[args[0].slot]
            args = (tuple(like.shape), tuple(like.stride()), like.dtype, *args[1:])
            target = known.draw_in_place
        if target is torch.ops.aten.mkldnn_rnn_layer.default and args[-1]:
            target = known.lstm_layer
        replay = None
        if target in known.BATCH_NORM_BACKWARD:
            args = known.batch_norm_backward_args(args)
        if target in known.BATCH_NORM_FORWARD and self.only_updates_statistics(node):
            form = known.batch_norm_replay(args)
            replay = Call(form[0], form[1]) if form else None
        call = Call(target, args, kwargs)
        outputs = self.results(node, call)
        if outputs is None:
            return
        if target is known.lstm_layer:
            workspace = self.slot_value[outputs[3][1]]
            nbytes = known.lstm_workspace_nbytes(map_refs(args, self.real_example))
            self.values[workspace] = replace(self.values[workspace], nbytes=nbytes)
        effects = {Effect.RNG} if known.draws_random(target, args, kwargs) else set()
        if effects and phase is Phase.BACKWARD:
            raise CaptureError(f"The backward draws random numbers ({node.target}); a captured step would draw others.")
        name = str(target) if isinstance(target, torch._ops.OpOverload) else f"keepless.{target.__name__}"
        draft = _Draft(name, call, outputs, phase, effects, node, replay, module=module, source=source)
        (self.backward if phase is Phase.BACKWARD else self.forward).append(draft)

    def results(self, node: torch.fx.Node, call: Call) -> list[tuple[int | None, int]] | None:
        """The slots of a node's new storages; None where the node is a view (its slots are then recorded)."""
        result: Any = node.meta.get("val")
        if isinstance(result, torch.Tensor) and result.layout is not torch.strided:
            raise CaptureError(
                f"{node.target} returns a {result.layout} tensor; only strided tensors are supported (an embedding "
                "with sparse=True is the usual cause)."
            )
        many = isinstance(result, tuple | list)
        parts = list(enumerate(result)) if many else [(None, result)]
        tensors = [(item, part) for item, part in parts if isinstance(part, torch.Tensor)]
        if not tensors:
            raise CaptureError(f"{node.target} returns no tensor ({_compat.user_source() or node.name}).")
        fresh = [_compat.storage_key(part) not in self.value_of_storage for _, part in tensors]
        if any(fresh) and not all(fresh):
            raise CaptureError(f"{node.target} returns a view and a new tensor at once.")
        outputs: list[tuple[int | None, int]] = []
        for item, part in tensors:
            key = _compat.storage_key(part)
            if key in self.value_of_storage and not fresh[0]:
                value = self.value_of_storage[key]
                source = next((slot for slot in slots_of(call) if self.slot_value[slot] == value), None)
                if source is None:
                    raise CaptureError(f"{node.target} returns storage that is none of its arguments'.")
                slot = self.new_slot(part, value)
                self.views[slot] = ViewCode(source, call, item)
            else:
                value = self.value_of_storage.get(key, -1)
                if value < 0:
                    value = self.new_value(node.name if item is None else f"{node.name}.{item}", part, Kind.ACTIVATION)
                slot = self.new_slot(part, value)
                outputs.append((item, slot))
            self.slot_of[(node, item)] = slot
        return outputs if fresh[0] else None

    def is_uninitialized(self, node: Any) -> bool:
        """Whether a node is `empty_like`: what is drawn into it was drawn in place."""
        return isinstance(node, torch.fx.Node) and "empty" in str(node.target)

    def real_example(self, slot: int) -> torch.Tensor:
        """Something with the slot's shape and dtype, outside any fake mode."""
        example = self.examples[slot]
        return torch.empty(tuple(example.shape), dtype=example.dtype, device="meta")

    def only_updates_statistics(self, node: torch.fx.Node) -> bool:
        """Whether a BatchNorm's new statistics go into its buffers and nowhere else.

        Its backward is given them too, but reads them in evaluation mode only.
        """
        harmless = (torch.ops.aten.copy_.default, *known.BATCH_NORM_BACKWARD)
        items = [user for user in node.users if user.target is operator.getitem and int(user.args[1]) > 2]  # type: ignore[arg-type]
        return all(user.op == "output" or user.target in harmless for item in items for user in item.users) and all(
            isinstance(arg, torch.fx.Node) and arg.op == "placeholder" for arg in node.args[3:5]
        )

    def place(self, node: torch.fx.Node, phase: Phase) -> tuple[str, str]:
        """Module path and source line; a backward node takes those of the forward node with its sequence number."""
        module, source = node.meta.get("keepless_module", ""), node.meta.get("keepless_source", "")
        number = node.meta.get("seq_nr")
        if phase is Phase.FORWARD:
            if number is not None:
                self.module_of_seq.setdefault(number, (module, source))
            return module, source
        return self.module_of_seq.get(number, ("", "")) if number is not None else ("", "")

    def mutation(self, node: torch.fx.Node, args: tuple[Any, ...], module: str, source: str) -> None:
        target_slot = args[0].slot
        if self.slot_value[target_slot] not in self.resident or target_slot in self.views:
            raise CaptureError(f"The step writes into a tensor that is not an argument ({node.name}, {source}).")
        target: Any = node.target
        draft = _Draft(str(target), Call(target, args), [], Phase.FORWARD, {Effect.BUFFER}, node)
        draft.module, draft.source = module, source
        self.slot_of[(node, None)] = target_slot
        self.mutations.append(draft)

    def dropout(self, node: torch.fx.Node, args: tuple[Any, ...], phase: Phase, module: str, source: str) -> bool:
        x, p, train = (*args, True)[:3]
        example = self.examples[x.slot]
        if example.device.type != "cpu" or not (train is None or train) or not 0.0 < p <= 1.0:
            return False
        scale = known.eager_scale(p, example.dtype) if p < 1.0 else 0.0
        out, mask = node.meta["val"]
        mask_slot = self.new_slot(mask, self.new_value(f"{node.name}.mask", mask, Kind.ACTIVATION))
        out_slot = self.new_slot(out, self.new_value(node.name, out, Kind.ACTIVATION))
        self.slot_of[(node, 0)], self.slot_of[(node, 1)] = out_slot, mask_slot
        self.scale_of_mask[self.slot_value[mask_slot]] = scale
        draw = Call(known.draw_mask, (tuple(mask.shape), tuple(mask.stride()), 1 - p))
        if p == 1.0:  # eager draws nothing here: it multiplies by zero
            draw = Call(known.full_mask, (tuple(mask.shape), tuple(mask.stride())))
        apply = Call(known.apply_mask, (x, Ref(mask_slot), scale))
        for name, call, slot, effects in (
            (f"keepless.{draw.target.__name__}", draw, mask_slot, {Effect.RNG} if p < 1.0 else set[Effect]()),
            ("keepless.apply_mask", apply, out_slot, set[Effect]()),
        ):
            self.forward.append(_Draft(name, call, [(None, slot)], phase, effects, node, module=module, source=source))
        return True


def lower(traced: Traced, flat: FlatInputs, model: torch.nn.Module, shape: StepShape) -> Binding:
    """The graph and binding of a traced step.

    Raises:
        CaptureError: the step does something that this engine cannot run exactly.
    """
    work = _Lowering(traced, flat, model, shape)
    for node in traced.module.graph.nodes:
        if node.op == "placeholder":
            work.placeholder(node)
        elif node.op == "get_attr":
            work.constant(node)
        elif node.op == "call_function":
            work.call(node)
        elif node.op != "output":
            raise CaptureError(f"The captured step holds a node of kind {node.op}.")
    return _Assembly(work, model).binding()


class _Assembly:
    """Puts the drafts in order, adds loss, deliver and optimizer ops, and builds the graph."""

    def __init__(self, work: _Lowering, model: torch.nn.Module) -> None:
        self.work = work
        self.shape = work.shape
        self.parameters = dict(model.named_parameters())
        self.device = planned_device(model)
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
                    self.grads.append((name, work.slot_of[(item, None)]))
            elif role == "unknown":
                raise CaptureError(f"The captured step returns something that this engine does not know ({what}).")

    def own_grads(self) -> None:
        """Gives each gradient storage of its own, in its parameter's layout, by a copy where it has not."""
        work = self.work
        seen: set[int] = set(self.loss_inputs) | work.resident | {work.slot_value[s] for s in work.tangent_of.values()}
        readers: set[int] = set()
        for draft in work.backward:
            readers.update(work.slot_value[s] for s in _draft_slots(draft))
        for index, (name, slot) in enumerate(self.grads):
            example, value = work.examples[slot], work.slot_value[slot]
            like: Any = self.parameters[name] if isinstance(name, str) else work.examples[work.inputs[name]]
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
                _Draft("keepless.materialize", call, [(None, own_slot)], Phase.BACKWARD, set(), module=str(name))
            )
            self.grads[index] = (name, own_slot)
            seen.add(own)

    def order(self) -> list[_Draft]:
        """Forward, writes to buffers, loss, backward with deliveries, optimizer; dead ops left out."""
        work = self.work
        loss = _Draft(LOSS, None, [], Phase.LOSS, {Effect.OPAQUE}, extra_inputs=tuple(self.loss_inputs))
        for position in sorted(work.tangent_of):
            loss.outputs.append((None, work.tangent_of[position]))
        backward = self.deliveries(_early_copies(work, work.backward))
        tail = []
        if self.shape.has_optimizer:
            tail.append(_Draft(OPTIMIZER, None, [], Phase.OPTIMIZER, {Effect.OPAQUE}))
        drafts = [*work.forward, *work.mutations, loss, *backward, *tail]
        live: set[int] = set()
        kept: list[_Draft] = []
        for draft in reversed(drafts):
            made = {work.slot_value[slot] for _, slot in draft.outputs}
            if draft.effects or draft.grad is not None or made & live:
                kept.append(draft)
                live.update(work.slot_value[s] for s in _draft_slots(draft))
                live.update(draft.extra_inputs)
        return kept[::-1]

    def deliveries(self, backward: list[_Draft]) -> list[_Draft]:
        """Inserts deliver ops: a gradient is handed over once it and the last reader of its parameter have run.

        Small gradients wait for each other, up to 1/256 of all gradient bytes (at least 64 KiB): each hand-over costs
        about 30 us of autograd.
        """
        work = self.work
        ready: dict[int, list[int]] = {}
        last_reader: dict[int, int] = {}
        maker: dict[int, int] = {}
        for position, draft in enumerate(backward):
            for slot in _draft_slots(draft):
                last_reader[work.slot_value[slot]] = position
            for _, slot in draft.outputs:
                maker[work.slot_value[slot]] = position
        total = 0
        for index, (name, slot) in enumerate(self.grads):
            position = maker.get(work.slot_value[slot], -1)
            if isinstance(name, str):
                position = max(position, last_reader.get(work.slot_value[work.params[name]], -1))
            ready.setdefault(position, []).append(index)
            total += work.values[work.slot_value[slot]].nbytes
        threshold = max(64 * 1024, total // 256)
        result: list[_Draft] = []
        waiting: list[int] = []
        pending = 0
        for position in range(-1, len(backward)):
            if position >= 0:
                result.append(backward[position])
            for index in ready.get(position, ()):
                waiting.append(index)
                pending += work.values[work.slot_value[self.grads[index][1]]].nbytes
            if waiting and (pending >= threshold or position == len(backward) - 1):
                for index in waiting:
                    name, slot = self.grads[index]
                    draft = _Draft(DELIVER, None, [], Phase.BACKWARD, {Effect.OPAQUE}, module=_module_of(name))
                    draft.extra_inputs, draft.grad = (work.slot_value[slot],), index
                    result.append(draft)
                waiting, pending = [], 0
        return result

    def binding(self) -> Binding:
        """The finished graph and binding."""
        work, shape = self.work, self.shape
        static = set(work.resident)
        if shape.state_nbytes:
            static.add(self.extra_value("optimizer.state", Kind.BUFFER, shape.state_nbytes))
        if shape.outside_nbytes:
            static.add(self.extra_value("outside", Kind.INPUT, shape.outside_nbytes))
        grad_values = {work.slot_value[slot] for _, slot in self.grads}
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
            output_constants={i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)},
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

    def op(self, index: int, draft: _Draft, stale: set[int], fixed: set[int]) -> tuple[Op, OpCode | None]:
        work = self.work
        inputs = sorted({work.slot_value[s] for s in _draft_slots(draft)} | set(draft.extra_inputs))
        outputs = [work.slot_value[slot] for _, slot in draft.outputs]
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
        return op, OpCode(draft.call, named, draft.replay, in_place, state)

    def in_place(
        self, draft: _Draft, fixed: set[int]
    ) -> tuple[tuple[tuple[int, int], ...], dict[tuple[int, int], Call]]:
        """The pairs (output, input) for which an exact in-place form exists, and those forms."""
        work = self.work
        if draft.call is None or len(draft.outputs) != 1 or draft.effects:
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
            if value not in fixed and not aliased and whole and dense and same:
                pairs[(work.slot_value[out_slot], value)] = Call(form, draft.call.args, draft.call.kwargs)
        return tuple(pairs), pairs

    def in_place_of(self, call: Call, out: torch.Tensor) -> dict[int, Any]:
        return known.in_place_forms(call.target, call.args, out.dim(), self.device.type)

    def key(self, draft: _Draft) -> str:
        """Equal for ops that cost the same."""
        if draft.call is None:
            nbytes = sum(self.work.values[v].nbytes for v in draft.extra_inputs)
            return f"{draft.name}|{nbytes}"

        def describe(slot: int) -> str:
            example = self.work.examples[slot]
            dtype = str(example.dtype).removeprefix("torch.")
            shape = "x".join(str(n) for n in example.shape)
            return f"<{dtype}:{shape}:{','.join(str(n) for n in example.stride())}>"

        arguments = map_refs((draft.call.args, dict(draft.call.kwargs)), describe)
        return f"{draft.name}|{arguments}"


def _draft_slots(draft: _Draft) -> list[int]:
    return slots_of(draft.call) if draft.call is not None else []


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
    by_stride = sorted((stride, size) for size, stride in zip(like.shape, like.stride(), strict=True) if size != 1)
    expected = 1
    for stride, size in by_stride:
        if stride != expected:
            return tuple(torch.empty(like.shape, device="meta").stride())
        expected *= size
    return tuple(like.stride())


def _same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()
    return bool(same)


def _early_copies(work: _Lowering, backward: list[_Draft]) -> list[_Draft]:
    """Moves each materialized gradient to just behind its producer."""
    made: dict[int, int] = {}
    plain: list[_Draft] = []
    behind: dict[int, list[_Draft]] = {}
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
