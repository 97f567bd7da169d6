"""From a binding to the costs of its ops: each distinct op is run alone, on tensors of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from keepless import _compat
from keepless.binding import Binding, Call, OpCode, map_refs, slots_of
from keepless.capture import DELIVER, LOSS, OPTIMIZER, UPDATE
from keepless.cost import CostModel, Origin
from keepless.ir import Effect, Kind, Op
from keepless.measure import CostCache, OpCost, OptimizerFootprint, Trial, measure_ops
from keepless.measure.delivery import hand_over_seconds

ACCUMULATE_BYTES_PER_S = 4e9
"""Rate of `grad += new` before it is measured: three passes over memory at a modest 12 GB/s."""


def op_trials(binding: Binding) -> list[Trial]:
    """A trial per distinct op that the engine runs."""
    trials: dict[str, Trial] = {}
    for op, code in zip(binding.graph.ops, binding.ops, strict=True):
        if code is not None and op.key not in trials:
            nbytes = sum(
                binding.graph.values[value].nbytes
                for value in op.outputs
                if binding.graph.values[value].kind is not Kind.RNG
            )
            trials[op.key] = Trial(op.key, _maker(binding, op, code), nbytes)
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
    """
    graph = binding.graph
    held = held_nbytes(binding) if holds_state else 0
    seconds: list[float] = []
    scratch: list[int] = []
    for op in graph.ops:
        cost = costs.get(op.key)
        if op.name == LOSS:
            seconds.append(loss.seconds if loss else 0.0)
            scratch.append(loss.scratch if loss else 0)
        elif op.name == DELIVER:
            nbytes = sum(graph.values[value].nbytes for value in op.inputs)
            seconds.append(hand_over_seconds() + (nbytes / ACCUMULATE_BYTES_PER_S if accumulate else 0.0))
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
            seconds.append(cost.seconds)
            scratch.append(cost.scratch)
        if op.name != OPTIMIZER:
            scratch[-1] += held
    spreads = sorted(cost.spread for cost in costs.values())
    spread = spreads[len(spreads) // 2] if spreads else 0.0
    total = sum(seconds)
    late = sum(seconds[op.id] for op in graph.ops if (cost := costs.get(op.key)) is not None and cost.disturbed)
    return CostModel(tuple(seconds), tuple(scratch), {}, Origin.MEASURED, spread, late / total if total else 0.0)


def held_nbytes(binding: Binding) -> int:
    """Bytes that the engine itself holds from a step's forward to the end of its backward: the generator's state, for
    a second backward, where the step draws random numbers. They count as scratch of every op but the optimizer's.

    The states of CUDA's generators are not on the device.
    """
    draws = any(Effect.RNG in op.effects for op in binding.graph.ops)
    return torch.get_rng_state().nbytes if draws and binding.device.type == "cpu" else 0


def measure_costs(
    binding: Binding, cache: CostCache | None, progress: Callable[[int, int], None] | None = None
) -> dict[str, OpCost]:
    """Costs by op key, from the cache where it has them."""
    return measure_ops(op_trials(binding), cache=cache, device=binding.device, progress=progress)


def _maker(binding: Binding, op: Op, code: OpCode) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        storages: dict[int, torch.Tensor] = {}
        tensors: dict[int, torch.Tensor] = {}
        call: Call = code.call
        for slot in slots_of(call):
            tensors[slot] = _real(binding, slot, storages)
        args = map_refs(call.args, tensors.__getitem__)
        kwargs = map_refs(dict(call.kwargs), tensors.__getitem__)
        target: Any = call.target
        return lambda: target(*args, **kwargs)

    return make


def _real(binding: Binding, slot: int, storages: dict[int, torch.Tensor]) -> torch.Tensor:
    """A tensor like the slot's, filled with plain numbers; slots of one value share storage."""
    example = binding.examples[slot]
    if slot in binding.constants:
        return binding.constants[slot]
    value = binding.slot_value[slot]
    base = storages.get(value)
    if base is None or base.dtype != example.dtype:
        # A fake may be smaller than the real thing, whose size only its kernel knows (the workspace of an LSTM layer).
        nbytes = max(example.untyped_storage().nbytes(), binding.graph.values[value].nbytes)
        count = -(-nbytes // max(1, example.element_size()))
        fill: Any = 0.5 if example.is_floating_point() or example.is_complex() else example.dtype is torch.bool
        base = torch.full((max(1, count),), fill, dtype=example.dtype, device=binding.device)
        storages[value] = base
    return base.as_strided(example.size(), example.stride(), example.storage_offset())


def measure_loss(binding: Binding, loss_fn: Any, batch: Any) -> OpCost:
    """The caller's own loss, forward and backward, on made-up outputs of the captured shapes."""
    trial = loss_trial(binding, loss_fn, batch)
    return measure_ops([trial], device=binding.device)[trial.key]


def loss_trial(binding: Binding, loss_fn: Any, batch: Any) -> Trial:
    """A trial of the caller's own loss, as `measure_loss` runs it."""
    graph = binding.graph
    outputs: dict[int, torch.Tensor] = {}
    for position, slot in binding.outputs.items():
        tensor = _real(binding, slot, {}).clone()
        outputs[position] = tensor.requires_grad_(position in binding.grad_outputs)
    count = len(binding.outputs) + len(binding.output_constants)
    flat = [outputs.get(i, binding.output_constants.get(i)) for i in range(count)]
    output = _compat.tree_unflatten(flat, binding.output_spec)
    wanted = [outputs[position] for position in binding.grad_outputs]

    def run() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(loss_fn(output, batch), wanted)

    tangents = sum(graph.values[binding.slot_value[slot]].nbytes for slot in binding.tangents)
    return Trial("keepless.loss", lambda: run, tangents)


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Planning leaves gradients and generator states as they were; capture itself looks after the rest."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        yield
