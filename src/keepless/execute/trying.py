"""Whether a form that writes into given tensors may stand for an op: it is tried on real tensors.

It may where it gives the same bits into memory full of ones, leaves those tensors where and as they are, and allocates
no more than the op does beside its results. Each kind of op (its key) is tried once in a process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from keepless.binding import Binding, Call, OpCode, map_refs, slots_of
from keepless.capture.outs import OutForm
from keepless.ir import Op
from keepless.measure import Trial, measure_scratch

SLACK = 4096
"""Bytes that a form may allocate beyond what the op does: numbers that torch wraps into tensors."""

_TRIED: dict[tuple[str, str], str] = {}


def refusal(binding: Binding, op: Op, code: OpCode, form: OutForm) -> str:
    """Why a form may not stand for an op's call; empty where it may."""
    key = (op.key, binding.device.type)
    if key not in _TRIED:
        devices = [binding.device] if binding.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            try:
                _TRIED[key] = _try(binding, op, code, form)
            except Exception as error:  # whatever a kernel says to such a call
                _TRIED[key] = f"the form fails: {type(error).__name__}: {error}"[:200].splitlines()[0]
    return _TRIED[key]


def _try(binding: Binding, op: Op, code: OpCode, form: OutForm) -> str:
    args, kwargs = _real(binding, code.call)
    target: Any = code.call.target
    torch.manual_seed(1)
    expected = target(*args, **kwargs)
    wanted = [expected if item is None else expected[item] for item, _, _ in code.outputs]
    examples = [binding.examples[slot] for _, slot, _ in code.outputs]
    for tensor, example in zip(wanted, examples, strict=True):
        layout = (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
        if layout != (example.shape, example.stride(), 0, example.dtype):
            return "its results are laid out otherwise than captured"
    results = tuple(_full_of_ones(tensor) for tensor in wanted)
    places = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in results]
    torch.manual_seed(1)
    form(results, *args, **kwargs)
    if places != [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in results]:
        return "the form moves its results"
    for tensor, out in zip(wanted, results, strict=True):
        if not torch.equal(_bytes(tensor), _bytes(out)):
            return "the form gives other bits"
    del expected, wanted
    nbytes = sum(binding.graph.values[value].nbytes for _, _, value in code.outputs)
    scratch = measure_scratch(
        [
            Trial("op", lambda: lambda: target(*args, **kwargs), nbytes),
            Trial("form", lambda: lambda: form(results, *args, **kwargs), 0),
        ],
        device=binding.device,
    )
    if scratch["form"] > scratch["op"] + SLACK:
        return "the form allocates its results all the same"
    return ""


def _full_of_ones(tensor: torch.Tensor) -> torch.Tensor:
    nbytes = tensor.untyped_storage().nbytes()
    raw = torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=tensor.device)
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(raw.untyped_storage(), 0, tensor.shape, tensor.stride())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _real(binding: Binding, call: Call) -> tuple[list[Any], dict[str, Any]]:
    """Real arguments with numbers that differ; integers are 0 and 1, or all 0 where the op does not take these."""
    storages: dict[int, torch.Tensor] = {}
    tensors: dict[int, torch.Tensor] = {}
    generator = torch.Generator(binding.device).manual_seed(0)
    for slot in slots_of(call):
        example = binding.examples[slot]
        if slot in binding.constants:
            tensors[slot] = binding.constants[slot]
            continue
        value = binding.slot_value[slot]
        base = storages.get(value)
        if base is None or base.dtype != example.dtype:
            nbytes = max(example.untyped_storage().nbytes(), binding.graph.values[value].nbytes)
            own = torch.Generator().manual_seed(0) if example.device.type == "cpu" else generator
            base = storages[value] = _numbers(-(-nbytes // example.element_size()), example.dtype, own)
        tensors[slot] = base.as_strided(example.size(), example.stride(), example.storage_offset())
    read: Callable[[int], torch.Tensor] = tensors.__getitem__
    return list(map_refs(tuple(call.args), read)), dict(map_refs(dict(call.kwargs), read))


def _numbers(count: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    device = generator.device
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator, device=device).to(dtype)
    if dtype.is_complex:
        return torch.randn(count, generator=generator, device=device, dtype=torch.complex64).to(dtype)
    return torch.randint(0, 2, (count,), generator=generator, device=device).to(dtype)
