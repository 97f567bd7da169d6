"""From a binding to the costs of its ops: each distinct op is run alone, on tensors of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch

from keepless import _compat
from keepless.binding import Binding, Call, OpCode, map_refs, slots_of
from keepless.capture import DELIVER, LOSS, OPTIMIZER, UPDATE
from keepless.control.indices import spread_indices
from keepless.control.room import cost_of_unrun, own_params, split_by_room
from keepless.cost import CostModel, Origin
from keepless.ir import Effect, Graph, Kind
from keepless.measure import CostCache, OpCost, OptimizerFootprint, Trial, measure_ops
from keepless.measure.delivery import hand_over_seconds

ACCUMULATE_BYTES_PER_S = 4e9
ACCUMULATE_BYTES_PER_S_CUDA = 5e11
"""Rate of `grad += new` before it is measured: three passes over memory at a modest 12 GB/s, on a card at 1.5 TB/s."""


def op_trials(binding: Binding, model: torch.nn.Module | None = None) -> list[Trial]:
    """A trial per distinct op that the engine runs.

    Arguments:
        model: that was captured: ops read its own parameters, and no copies are made of them.
    """
    trials: dict[str, Trial] = {}
    params = own_params(binding, model) if model is not None else {}
    on_host = host_values(binding)
    for op, code in zip(binding.graph.ops, binding.ops, strict=True):
        if code is not None and op.key not in trials:
            nbytes = sum(
                binding.graph.values[value].nbytes
                for value in op.outputs
                if binding.graph.values[value].kind is not Kind.RNG
            )
            own = {} if may_write(code.call.target) else params
            maker = _maker(binding, code, own, on_host)
            trials[op.key] = Trial(op.key, maker, nbytes, _made_nbytes(binding, code, own))
    return list(trials.values())


def cost_model(
    binding: Binding,
    costs: Mapping[str, OpCost],
    *,
    optimizer: OptimizerFootprint | None,
    loss: OpCost | None,
    accumulate: bool,
    holds_state: bool = True,
) -> CostModel:
    """The costs of every op of the graph, the opaque ones included.

    Arguments:
        costs: by op key, for the ops that the engine runs.
        optimizer: of the user's optimizer, for the OPTIMIZER op.
        loss: of the caller's own loss, forward and backward; None where the model's output holds it.
        accumulate: gradients are added to existing ones.
        holds_state: what the engine holds itself is counted here, as scratch.

    A card's step takes as long as the host needs to launch its ops, where that is longer than the device needs to run
    them: all ops then cost their launches.
    """
    graph = binding.graph
    held = held_nbytes(binding.graph, binding.device) if holds_state else 0
    seconds: list[float] = []
    scratch: list[int] = []
    known = [cost for op in graph.ops if (cost := costs.get(op.key)) is not None]
    on_device = binding.device.type == "cuda"
    rate = ACCUMULATE_BYTES_PER_S_CUDA if on_device else ACCUMULATE_BYTES_PER_S
    by_launches = sum(cost.launch for cost in known) > sum(cost.seconds for cost in known)
    for op in graph.ops:
        cost = costs.get(op.key)
        if op.name == LOSS:
            seconds.append(loss.seconds if loss else 0.0)
            scratch.append(loss.scratch if loss else 0)
        elif op.name == DELIVER:
            nbytes = sum(graph.values[value].nbytes for value in op.inputs)
            by_host = 0.0 if on_device and not by_launches else hand_over_seconds()
            seconds.append(by_host + (nbytes / rate if accumulate else 0.0))
            scratch.append(0)
        elif op.name == UPDATE:
            name = next(graph.values[value].name for value in op.inputs if graph.values[value].kind is Kind.PARAM)
            assert optimizer is not None, "a step that updates has an optimizer"
            seconds.append(optimizer.updates[name].seconds)
            scratch.append(optimizer.updates[name].scratch_nbytes)
        elif op.name == OPTIMIZER:
            seconds.append((optimizer.seconds_estimate or 0.0) if optimizer else 0.0)
            scratch.append(optimizer.scratch_nbytes if optimizer else 0)
        else:
            assert cost is not None, f"op {graph.where(op)} was not measured"
            seconds.append(cost.launch if by_launches and cost.launch else cost.seconds)
            scratch.append(cost.scratch)
        if op.name != OPTIMIZER:
            scratch[-1] += held
    spreads = sorted(cost.spread for cost in costs.values())
    spread = spreads[len(spreads) // 2] if spreads else 0.0
    total = sum(seconds)
    late = sum(seconds[op.id] for op in graph.ops if (cost := costs.get(op.key)) is not None and cost.disturbed)
    return CostModel(tuple(seconds), tuple(scratch), {}, Origin.MEASURED, spread, late / total if total else 0.0)


def held_nbytes(graph: Graph, device: torch.device) -> int:
    """Bytes that the engine itself holds from a step's forward to the end of its backward: the generator's state, for
    a second backward, where the step draws random numbers. They count as scratch of every op but the optimizer's.

    The states of CUDA's generators are not on the device.
    """
    draws = any(Effect.RNG in op.effects for op in graph.ops)
    return torch.get_rng_state().nbytes if draws and device.type == "cpu" else 0


def measure_costs(
    binding: Binding,
    cache: CostCache | None,
    progress: Callable[[int, int], None] | None = None,
    *,
    model: torch.nn.Module | None = None,
    room: int | None = None,
    known: Container[str] = (),
) -> dict[str, OpCost]:
    """Costs by op key, from the cache where it has them.

    Arguments:
        model: that was captured, see `op_trials`.
        room: bytes that a trial may take; ops that need more are not run, and their costs have `n` 0 (`control.room`).
        known: keys that are left out.
    """
    trials = [trial for trial in op_trials(binding, model) if trial.key not in known]
    if room is None:
        return measure_ops(trials, cache=cache, device=binding.device, progress=progress)
    fitting, others = split_by_room(trials, room)
    costs = measure_ops(fitting, cache=cache, device=binding.device, progress=progress)
    stored = cache.load(binding.device, [trial.key for trial in others]) if cache is not None else {}
    return costs | {trial.key: stored.get(trial.key) or cost_of_unrun(trial) for trial in others}


def may_write(target: Any) -> bool:
    """Whether an op may write what it is given: only what has a schema says that it does not."""
    schema = getattr(target, "_schema", None)
    return schema is None or bool(schema.is_mutable)


def _made_nbytes(binding: Binding, code: OpCode, params: Mapping[int, torch.Tensor]) -> int:
    """Bytes of the inputs that a trial makes."""
    values = {binding.slot_value[slot] for slot in slots_of(code.call) if slot not in binding.constants}
    return sum(binding.graph.values[value].nbytes for value in values if value not in params)


def host_values(binding: Binding) -> frozenset[int]:
    """Values of a step on a card that are on the host, of whose fakes some are on the device all the same."""
    if binding.device.type == "cpu":
        return frozenset()
    there = {binding.slot_value[slot] for slot, example in binding.examples.items() if example.device.type == "cpu"}
    return frozenset(there) | frozenset(
        value
        for code in binding.ops
        if code is not None
        for position, _, value in code.outputs
        if position in _compat.host_outputs(code.call.target)
    )


def _maker(
    binding: Binding, code: OpCode, params: Mapping[int, torch.Tensor], on_host: Container[int]
) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        storages: dict[int, torch.Tensor] = {}
        tensors: dict[int, torch.Tensor] = {}
        call: Call = code.call
        for slot, indices in spread_indices(call, binding.examples).items():
            example, value = binding.examples[slot], binding.slot_value[slot]
            is_made = slot not in binding.constants and value not in params
            if is_made and all(
                stride or size < 2 for size, stride in zip(example.shape, example.stride(), strict=True)
            ):
                _real(binding, slot, storages, params, on_host).copy_(indices(example.numel()).view(example.shape))
        for slot in slots_of(call):
            tensors[slot] = _real(binding, slot, storages, params, on_host)
        args = map_refs(call.args, tensors.__getitem__)
        kwargs = map_refs(dict(call.kwargs), tensors.__getitem__)
        target: Any = call.target
        return lambda: target(*args, **kwargs)

    return make


def _real(
    binding: Binding,
    slot: int,
    storages: dict[int, torch.Tensor],
    params: Mapping[int, torch.Tensor],
    on_host: Container[int] = (),
) -> torch.Tensor:
    """A tensor like the slot's, filled with plain numbers; slots of one value share storage.

    Arguments:
        params: values that are there, and are only read.
        on_host: values that are not on the device of the step.
    """
    example = binding.examples[slot]
    if slot in binding.constants:
        return binding.constants[slot]
    value = binding.slot_value[slot]
    if value in params and params[value].dtype == example.dtype:
        return params[value].as_strided(example.size(), example.stride(), example.storage_offset())
    base = storages.get(value)
    if base is None or base.dtype != example.dtype:
        # A fake may be smaller than the real thing, whose size only its kernel knows (the workspace of an LSTM layer).
        nbytes = max(example.untyped_storage().nbytes(), binding.graph.values[value].nbytes)
        count = -(-nbytes // max(1, example.element_size()))
        fill: Any = 0.5 if example.is_floating_point() or example.is_complex() else example.dtype is torch.bool
        base = torch.full(
            (max(1, count),), fill, dtype=example.dtype, device="cpu" if value in on_host else binding.device
        )
        storages[value] = base
    return base.as_strided(example.size(), example.stride(), example.storage_offset())


def measure_loss(binding: Binding, loss_fn: Any, batch: Any, room: int | None = None) -> OpCost:
    """The caller's own loss, forward and backward, on made-up outputs of the captured shapes.

    Arguments:
        loss_fn: one with a `known_cost` is not run.
        room: as in `measure_costs`.
    """
    known: OpCost | None = getattr(loss_fn, "known_cost", None)
    if known is not None:
        return known
    trial = loss_trial(binding, loss_fn, batch)
    if room is not None and trial.input_nbytes + trial.output_nbytes > room:
        return cost_of_unrun(trial)
    return measure_ops([trial], device=binding.device)[trial.key]


def loss_trial(binding: Binding, loss_fn: Any, batch: Any) -> Trial:
    """A trial of the caller's own loss, as `measure_loss` runs it."""
    graph = binding.graph

    def make() -> Callable[[], object]:
        outputs: dict[int, torch.Tensor] = {}
        for position, slot in binding.outputs.items():
            tensor = _real(binding, slot, {}, {})
            tensor = tensor.clone() if slot in binding.constants else tensor
            outputs[position] = tensor.requires_grad_(position in binding.grad_outputs)
        count = len(binding.outputs) + len(binding.output_constants)
        flat = [outputs.get(i, binding.output_constants.get(i)) for i in range(count)]
        output = _compat.tree_unflatten(flat, binding.output_spec)
        wanted = [outputs[position] for position in binding.grad_outputs]

        def run() -> object:
            with torch.enable_grad():
                return torch.autograd.grad(loss_fn(output, batch), wanted)

        return run

    tangents = sum(graph.values[binding.slot_value[slot]].nbytes for slot in binding.tangents)
    made = sum(graph.values[binding.slot_value[slot]].nbytes for slot in binding.outputs.values())
    return Trial("keepless.loss", make, tangents, made)


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Planning leaves gradients and generator states as they were; capture itself looks after the rest."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        yield
