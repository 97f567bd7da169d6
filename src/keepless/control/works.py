"""What each op of a captured step computes and moves: numbers from shapes, without running anything."""

from __future__ import annotations

from typing import Any

import torch

from keepless._compat.flops import attention_flops, count_flops, has_formula
from keepless.binding import Binding, Call, OpCode, Ref, map_refs, slots_of
from keepless.capture import DELIVER, LOSS, OPTIMIZER, UPDATE
from keepless.capture.chunked_ops import chunked_loss, chunked_loss_backward, chunked_work
from keepless.capture.convolutions import CONVOLUTION_BACKWARD, convolution_input_gradient
from keepless.cost import Work
from keepless.cost import efficiency as kinds
from keepless.cost.kinds import op_kind
from keepless.ir import Kind, Op
from keepless.measure import OptimizerFootprint

_BY_TENSOR_CORES = (kinds.MATMUL, kinds.ATTENTION, kinds.CONV, kinds.RNN)
_OPS_PER_ELEMENT = {
    kinds.NORM: 8,
    kinds.SOFTMAX: 24,
    kinds.TRANSCENDENT: 24,
    kinds.RANDOM: 32,
    kinds.LOSS: 4,
    kinds.COPY: 0,
}
"""Operations per element of the larger side; 1 for other classes. Exponentials are polynomials of about twenty."""
_ROWS_ONLY = ("embedding", "index", "gather", "index_select")
"""Names of ops that read of their first argument only what they return."""
OPTIMIZER_KERNELS = 16
"""Launches of an optimizer's step over lists of tensors (foreach AdamW: 12 to 16 per chunk of tensors)."""


def works_of(
    binding: Binding,
    *,
    optimizer: OptimizerFootprint | None = None,
    loss: Work | None = None,
) -> tuple[Work, ...]:
    """Work per op of the captured step.

    Arguments:
        optimizer: for the OPTIMIZER op.
        loss: of the caller's own loss, forward and backward; None where the model's output holds it.
    """
    graph = binding.graph
    nothing = Work(0.0, 0, 0, kernels=0)
    found: list[Work] = []
    by_key: dict[str, Work] = {}
    for op, code in zip(graph.ops, binding.ops, strict=True):
        if op.name == LOSS:
            found.append(loss or nothing)
        elif op.name == DELIVER:
            nbytes = sum(graph.values[value].nbytes for value in op.inputs)
            found.append(Work(0.0, 2 * nbytes, nbytes, kinds.POINTWISE) if binding.accumulates else nothing)
        elif op.name == UPDATE:
            found.append(_of_update(binding, op, optimizer))
        elif op.name == OPTIMIZER:
            found.append(_of_optimizer(binding, op, optimizer))
        else:
            assert code is not None, f"op {graph.where(op)} has no call"
            if op.key not in by_key:
                by_key[op.key] = work_of(binding, op, code)
            found.append(by_key[op.key])
    return tuple(found)


def work_of(binding: Binding, op: Op, code: OpCode) -> Work:
    """Work of one op that the engine runs."""
    call, kind = code.call, op_kind(op.name)
    examples = binding.examples
    if call.target in (chunked_loss, chunked_loss_backward):
        return _of_chunks(binding, call)
    outputs = [examples[slot] for _, slot, _ in code.outputs]
    inputs = [examples[slot] for slot in slots_of(call)]
    written = sum(map(_nbytes, outputs))
    read = sum(map(_nbytes, inputs))
    if op.name.split(".")[1].strip("_") in _ROWS_ONLY and isinstance(call.args[0], Ref):
        read += min(written, _nbytes(examples[call.args[0].slot])) - _nbytes(examples[call.args[0].slot])
    if not outputs:  # a write into a buffer: `copy_(buffer, new)`
        read, written = read - _nbytes(inputs[0]), _nbytes(inputs[0])
    tensors = outputs or inputs
    dtype = str(tensors[0].dtype).removeprefix("torch.") if kind in _BY_TENSOR_CORES else "float32"
    return Work(_flops(binding, call, code, kind, [*inputs, *outputs]), read, written, kind, dtype)


def _of_chunks(binding: Binding, call: Call) -> Work:
    """Work of the loss over the logits in chunks."""
    first = 1 if call.target is chunked_loss_backward else 0
    x, w, loss = (
        binding.examples[call.args[0 + first].slot],
        binding.examples[call.args[1 + first].slot],
        call.args[7 + first],
    )
    flops, moved, scratch, kernels = chunked_work(
        x.shape[0], w.shape[1], x.shape[1], x.element_size(), loss.itemsize, backward=bool(first)
    )
    dtype = str(x.dtype).removeprefix("torch.")
    return Work(flops, moved // 2, moved - moved // 2, kinds.MATMUL, dtype, kernels, scratch)


def _flops(binding: Binding, call: Call, code: OpCode, kind: str, tensors: list[torch.Tensor]) -> float:
    target: Any = call.target
    args = map_refs(call.args, binding.examples.__getitem__)
    name = str(target)
    if "scaled_dot_product" in name:
        backward = "backward" in name
        first = 1 if backward else 0
        causal = any(arg is True for arg in args) or bool(call.kwargs.get("is_causal"))
        return attention_flops(*args[first : first + 3], backward=backward) * (0.5 if causal else 1.0)
    if target is convolution_input_gradient:
        grad, size, stride, dtype, *others = args
        x = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        given = (grad, x, *others, [True, False, False])
        return count_flops(CONVOLUTION_BACKWARD, given, {}, (x, None, None))
    if has_formula(target):
        kwargs = map_refs(dict(call.kwargs), binding.examples.__getitem__)
        return count_flops(target, args, kwargs, _result(binding, code))
    if kind == kinds.RNN and len(args) > 2 and args[0].dim() == 3:  # one layer: input, two weights, biases, state
        rows = args[0].shape[0] * args[0].shape[1]
        return float((4 if "backward" in name else 2) * rows * (args[1].numel() + args[2].numel()))
    largest = max((t.numel() for t in tensors), default=0)
    return float(largest * _OPS_PER_ELEMENT.get(kind, 1))


def _result(binding: Binding, code: OpCode) -> Any:
    """The call's result, as far as the step has a use for it."""
    if any(item is None for item, _, _ in code.outputs):
        return binding.examples[code.outputs[0][1]]
    places = {item: binding.examples[slot] for item, slot, _ in code.outputs if item is not None}
    return tuple(places.get(i) for i in range(max(3, *(item + 1 for item in places))))


def _of_optimizer(binding: Binding, op: Op, optimizer: OptimizerFootprint | None) -> Work:
    values = [binding.graph.values[v] for v in op.inputs]
    params = sum(v.nbytes for v in values if v.kind is Kind.PARAM)
    grads = sum(binding.graph.values[v].nbytes for v in {binding.slot_value[slot] for _, slot in binding.grads})
    state = optimizer.state_nbytes if optimizer else 0
    scratch = optimizer.scratch_nbytes if optimizer else 0
    elements = params / 4
    return Work(
        8 * elements,
        params + grads + state + 2 * scratch,
        params + state + 2 * scratch,
        kinds.OPTIMIZER,
        kernels=OPTIMIZER_KERNELS,
        scratch=scratch,
    )


def _of_update(binding: Binding, op: Op, optimizer: OptimizerFootprint | None) -> Work:
    """One parameter's update: its share of the state, and temporaries of its own."""
    values = binding.graph.values
    param = next(values[v] for v in op.inputs if values[v].kind is Kind.PARAM)
    grad = sum(values[v].nbytes for v in op.inputs if values[v].kind is Kind.GRAD)
    state = scratch = 0
    if optimizer is not None:
        trained = {v for one in binding.graph.ops if one.name == UPDATE for v in one.inputs}
        total = sum(values[v].nbytes for v in trained if values[v].kind is Kind.PARAM)
        state = optimizer.state_nbytes * param.nbytes // max(1, total)
        scratch = optimizer.updates[param.name].scratch_nbytes
    return Work(
        2 * param.nbytes,
        param.nbytes + grad + state + 2 * scratch,
        param.nbytes + state + 2 * scratch,
        kinds.OPTIMIZER,
        kernels=OPTIMIZER_KERNELS,
        scratch=scratch,
    )


def _nbytes(tensor: torch.Tensor) -> int:
    """Bytes that a kernel reads or writes of a tensor: an expanded one has its storage's."""
    return int(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))
