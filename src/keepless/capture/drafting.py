"""From the nodes of a traced joint graph to slots, values and drafts of ops.

Views fold into the storage that they look at; dropout on the CPU is taken apart into a draw (kept as one byte per
element, or replayed) and two exact products; BatchNorm gets a replay without its statistics.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from keepless import _compat
from keepless.binding import Call, Ref, ViewCode, map_refs, slots_of
from keepless.capture import aten as known
from keepless.capture import convolutions, cudnn
from keepless.capture.constants import Getter, find_home
from keepless.capture.inputs import FlatInputs
from keepless.capture.ordering import MARK
from keepless.capture.state import named_state, planned_device
from keepless.capture.trace import Traced
from keepless.errors import CaptureError
from keepless.ir import Effect, Kind, Phase, Value


@dataclass(frozen=True)
class StepShape:
    """What the step is beside forward and backward.

    Arguments:
        accumulate: gradients are added to existing ones (else they are made afresh).
        release_outputs: the caller drops the outputs before the backward, all but the loss.
        has_optimizer: the step ends with `optimizer.step()`.
        state_nbytes: bytes of optimizer state.
        outside_nbytes: bytes on the device beside model, batch and optimizer.
        rewrites: names of `keepless.machine.REWRITES` that change it.
        shared_inputs: flat positions of inputs that code behind this step reads, too. Autograd adds the parts of such a
            gradient one by one to what came before, so that they are delivered one by one.
        shared_parameters: so may its parameters be, all of them.
    """

    accumulate: bool = False
    release_outputs: bool = False
    has_optimizer: bool = False
    state_nbytes: int = 0
    outside_nbytes: int = 0
    rewrites: tuple[str, ...] = ()
    shared_inputs: frozenset[int] = frozenset()
    shared_parameters: bool = False

    @property
    def is_block(self) -> bool:
        """Whether it is one of several calls that make up a step."""
        return self.shared_parameters


CAST_ONCE = (
    "Autocast casts the parameter {} once for several uses, and adds up its gradient in the lower precision: a "
    "captured step would cast it for each use, and round otherwise. Train under torch.autocast(..., "
    "cache_enabled=False), which casts it each time, too."
)


def _casts(node: torch.fx.Node) -> int:
    """How often the forward casts an argument to a lower precision."""
    return sum(
        user.target is torch.ops.aten._to_copy.default and user.kwargs.get("dtype") in LOWER for user in node.users
    )


LOWER = (torch.bfloat16, torch.float16)


def name_of(target: Any) -> str:
    """An op's name: torch's own, or that of the function that stands for it."""
    return str(target) if isinstance(target, _compat.OpOverload) else f"keepless.{target.__name__}"


@dataclass
class Draft:
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


def draft_slots(draft: Draft) -> list[int]:
    return slots_of(draft.call) if draft.call is not None else []


class Drafting:
    """One pass over the nodes, gathering slots, values and drafts of ops."""

    def __init__(self, traced: Traced, flat: FlatInputs, model: torch.nn.Module, shape: StepShape) -> None:
        self.traced = traced
        self.names = [name for name, _ in named_state(model)]
        self.param_names = {name for name, _ in torch.nn.Module.named_parameters(model)}
        self.trained = {name for name, p in torch.nn.Module.named_parameters(model) if p.requires_grad}
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
        self.forward: list[Draft] = []
        self.mutations: list[Draft] = []
        self.backward: list[Draft] = []
        self.reserve_of: dict[int, int] = {}
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
        nbytes = 0 if self.on_host(example) else example.untyped_storage().nbytes()
        self.values.append(Value(value, name, nbytes, kind, dtype, tuple(example.shape)))
        if shared:
            self.value_of_storage[_compat.storage_key(example)] = value
        return value

    def on_host(self, example: torch.Tensor) -> bool:
        """Whether a tensor of a step on a card is not there: it takes none of the card's bytes."""
        return self.device.type != "cpu" and example.device.type == "cpu"

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
            if _casts(node) > 1 and what in self.trained and torch.is_autocast_cache_enabled():
                raise CaptureError(CAST_ONCE.format(what))
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
        is_fresh = all(user.target in known.FRESH for user in node.users)  # torch.tensor(...), put together on the host
        if tensor.device != self.device and not (self.on_host(tensor) and (is_fresh or not tensor.dim())):
            raise CaptureError(
                f"The forward reads a tensor of shape {tuple(tensor.shape)} on {tensor.device}; the model is planned "
                f"for {self.device}, where only single numbers may be on the cpu. Register it as a buffer, or pass it "
                "in the batch."
            )
        example = node.meta.get("val", tensor)
        home = None
        if not is_fresh:
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
        if node.meta.get(MARK):
            self.in_order(node)
            return
        phase = Phase.BACKWARD if node.meta.get("partitioner_tag") == "is_backward" else Phase.FORWARD
        module, source = self.place(node, phase)
        args, kwargs = self.refs(node.args), self.refs(node.kwargs)
        if node.target is torch.ops.aten.copy_.default and isinstance(node.args[0], torch.fx.Node):
            self.mutation(node, args, module, source)
            return
        target: Any = node.target
        if target is torch.ops.aten.clone.default and phase is Phase.FORWARD and self.same_bytes(node):
            return
        if target is torch.ops.aten.native_dropout.default and self.dropout(node, args, phase, module, source):
            return
        if target is torch.ops.aten.native_dropout_backward.default:
            mask_value = self.slot_value[args[1].slot]
            if mask_value in self.scale_of_mask:
                target, args, kwargs = known.apply_mask, (args[0], args[1], self.scale_of_mask[mask_value]), {}
        if target is torch.ops.aten.bernoulli.p and self.is_uninitialized(node.args[0]):
            like = self.examples[args[0].slot]
            args = (tuple(like.shape), tuple(like.stride()), like.dtype, like.device, *args[1:])
            target = known.draw_in_place
        if target is torch.ops.aten.mkldnn_rnn_layer.default and args[-1]:
            target = known.lstm_layer
        target, args, replay = self.batch_norm(node, target, args)
        call = Call(target, args, kwargs)
        outputs = self.results(node, call)
        if outputs is None:
            return
        if target is cudnn.cudnn_batch_norm:
            outputs.append(self.reserve(node, args))
        if target is known.lstm_layer:
            workspace = self.slot_value[outputs[3][1]]
            nbytes = known.lstm_workspace_nbytes(map_refs(args, self.real_example))
            self.values[workspace] = replace(self.values[workspace], nbytes=nbytes)
        effects = {Effect.RNG} if known.draws_random(target, args, kwargs) else set()
        if effects and phase is Phase.BACKWARD:
            raise CaptureError(f"The backward draws random numbers ({node.target}); a captured step would draw others.")
        if effects and any(self.on_host(self.examples[slot]) for _, slot in outputs):
            raise CaptureError(
                f"The forward draws random numbers on the cpu ({node.target}); the model is planned for {self.device}, "
                "and only that device's generator is put back. Draw them there, or pass them in the batch."
            )
        draft = Draft(name_of(target), call, outputs, phase, effects, node, replay, module=module, source=source)
        (self.backward if phase is Phase.BACKWARD else self.forward).extend(self.as_run(draft))

    def as_run(self, draft: Draft) -> list[Draft]:
        """An op as the step runs it: a convolution's backward on the CPU in two parts, any other as it is."""
        call = draft.call
        if call is None or call.target is not convolutions.CONVOLUTION_BACKWARD or self.device.type != "cpu":
            return [draft]
        args = map_refs(call.args, self.examples.__getitem__)
        if not self.traced.is_here or not convolutions.is_in_parts(args):
            return [draft]
        target = convolutions.convolution_input_gradient
        of_input = Call(target, convolutions.of_input(call.args, args[1]))
        slots = dict(draft.outputs)
        parts = [replace(draft, name=name_of(target), call=of_input, outputs=[(None, slots.pop(0))])]
        if slots:
            of_weight = Call(call.target, convolutions.of_weight(call.args))
            parts.insert(0, replace(draft, call=of_weight, outputs=list(slots.items())))
        return parts

    def in_order(self, node: torch.fx.Node) -> None:
        """A node that puts a gradient in order: the real gradient comes so, and is what the captured step is given."""
        slot = self.slot_of[(node.args[0], None)]  # type: ignore[index]
        self.examples[slot] = node.meta["val"]
        self.value_of_storage[_compat.storage_key(node.meta["val"])] = self.slot_value[slot]
        self.slot_of[(node, None)] = slot

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
            part = self.as_computed(call, item, part)
            if key in self.value_of_storage and not fresh[0]:
                value = self.value_of_storage[key]
                source = next((slot for slot in slots_of(call) if self.slot_value[slot] == value), None)
                if source is None:
                    raise CaptureError(f"{node.target} returns storage that is none of its arguments'.")
                slot = self.new_slot(part, value)
                self.views[slot] = ViewCode(source, call, item)
            else:
                twin = known.SAME_RESULTS.get(call.target, {}).get(item)
                twin_key = key if twin is None else _compat.storage_key(result[twin])
                value = self.value_of_storage.get(twin_key, -1)
                if value < 0:
                    value = self.new_value(node.name if item is None else f"{node.name}.{item}", part, Kind.ACTIVATION)
                self.value_of_storage[key] = value
                slot = self.new_slot(part, value)
                outputs.append((item, slot))
            self.slot_of[(node, item)] = slot
        return outputs if fresh[0] else None

    def as_computed(self, call: Call, item: int | None, part: torch.Tensor) -> torch.Tensor:
        """A result as the kernel gives it, where fake tensors are wrong about its dtype or the bytes behind it.

        On the CPU a norm of half precision with weights (or running statistics) in full gives statistics in full, as
        under autocast.
        """
        if call.target in known.WHOLE_LOSSES and not part.dim():
            given = [self.examples[arg.slot] for arg in call.args[:2] if isinstance(arg, Ref)]
            shape = torch.broadcast_shapes(*(example.shape for example in given))  # type: ignore[no-untyped-call]
            return given[0].new_empty(shape, dtype=part.dtype).as_strided((), ())
        if item not in (1, 2) or call.target not in known.NORMS or part.device.type != "cpu":
            return part
        weights = [self.examples[arg.slot] for arg in call.args[1:] if isinstance(arg, Ref)]
        if not weights or weights[0].dtype == part.dtype or weights[0].dtype is not torch.float32:
            return part
        return torch.empty_strided(part.size(), part.stride(), dtype=torch.float32, device="meta")

    def batch_norm(
        self, node: torch.fx.Node, target: Any, args: tuple[Any, ...]
    ) -> tuple[Any, tuple[Any, ...], Call | None]:
        """Target, arguments and replay of a call: of a BatchNorm as eager runs it; of any other call as they are."""
        if target in known.BATCH_NORM_BACKWARD:
            reserve = self.reserve_of.get(self.slot_value[args[5].slot]) if isinstance(args[5], Ref) else None
            if reserve is None:
                return target, known.batch_norm_backward_args(args), None
            return cudnn.cudnn_batch_norm_backward, (*args[:3], *args[5:7], args[8], Ref(reserve)), None
        if target in known.BATCH_NORM_INFERENCE and self.by_cudnn(args):
            return cudnn.cudnn_batch_norm_inference, args, None
        if target in known.BATCH_NORM_ALONE and args[3]:
            full = (*args[:3], None, None, *args[3:])
            return (cudnn.cudnn_batch_norm, full, None) if self.by_cudnn(full) else (target, args, None)
        if target not in known.BATCH_NORM_FORWARD:
            return target, args, None
        by_cudnn = args[5] and self.by_cudnn(args)
        target = cudnn.cudnn_batch_norm if by_cudnn else target
        if not self.only_updates_statistics(node):
            return target, args, None
        if by_cudnn:
            return target, args, Call(target, (*args[:3], None, None, *args[5:]))
        form = known.batch_norm_replay(args, *(self.examples[args[place].slot].dtype for place in (0, 3)))
        return target, args, Call(form[0], form[1]) if form else None

    def by_cudnn(self, args: tuple[Any, ...]) -> bool:
        """Whether eager takes cuDNN for a BatchNorm with these arguments (without a mode: evaluation)."""
        x, weight, bias, mean, var, *mode, _, eps = map_refs(args, self.examples.__getitem__)
        return cudnn.runs_by_cudnn(x, weight, bias, mean, var, bool(mode and mode[0]), eps)

    def reserve(self, node: torch.fx.Node, args: tuple[Any, ...]) -> tuple[int, int]:
        """Place and slot of what cuDNN's BatchNorm keeps for its backward."""
        x = self.examples[args[0].slot]
        nbytes = _compat.batch_norm_reserve_nbytes(x, True)
        example = torch.empty((nbytes,), dtype=torch.uint8, device="meta")
        slot = self.new_slot(example, self.new_value(f"{node.name}.reserve", example, Kind.ACTIVATION, shared=False))
        self.reserve_of[self.slot_value[self.slot_of[(node, 1)]]] = slot
        return cudnn.RESERVE, slot

    def same_bytes(self, node: torch.fx.Node) -> bool:
        """Whether a copy can be its source, which it then is: what autograd saves of an op that works in place.

        In the captured step nothing is written over while it is read later, so that a copy of an activation in the
        same layout holds the same bytes. What the caller is given, or gave, keeps its own storage.
        """
        source = self.slot_of[(node.args[0], None)]  # type: ignore[index]
        value, was, copy = self.slot_value[source], self.examples[source], node.meta["val"]
        is_same = was.shape == copy.shape and was.stride() == copy.stride() and not was.storage_offset()
        is_whole = was.untyped_storage().nbytes() == copy.untyped_storage().nbytes()
        keys = {_compat.storage_key(was), _compat.storage_key(copy)}
        if not (is_same and is_whole) or value in self.resident or keys & self.given_back:
            return False
        self.value_of_storage[_compat.storage_key(copy)] = value
        self.slot_of[(node, None)] = source
        return True

    @cached_property
    def given_back(self) -> set[Any]:
        """Storages of what the captured step returns."""
        last = next(node for node in self.traced.module.graph.nodes if node.op == "output")
        found = [item.meta["val"] for item in last.args[0] if isinstance(item, torch.fx.Node)]
        return {_compat.storage_key(val) for val in found if isinstance(val, torch.Tensor)}

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
        draft = Draft(str(target), Call(target, args), [], Phase.FORWARD, {Effect.BUFFER}, node)
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
            self.forward.append(Draft(name, call, [(None, slot)], phase, effects, node, module=module, source=source))
        return True
