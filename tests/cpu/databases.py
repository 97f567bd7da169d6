"""torch's database of ops as cases: a region, its arguments, and what plain autograd makes of them."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

SAMPLES = 3
"""Per op and dtype."""

Region = Callable[..., Any]


def thinned(names: list[str], every: int = 10) -> set[str]:
    """One name in `every`, by hash: the same on all machines."""
    return {name for name in names if zlib.crc32(name.encode()) % every == 0}


def dtypes_of(op: Any) -> list[torch.dtype]:
    """The first of float64 and float32 that an op differentiates, and complex128 where it does that."""
    known = op.supported_backward_dtypes("cpu")
    real = [dtype for dtype in (torch.float64, torch.float32) if dtype in known][:1]
    return real + [dtype for dtype in (torch.complex128,) if dtype in known]


def samples_of(op: Any, dtype: torch.dtype) -> Iterator[Any]:
    """The first samples of an op."""
    torch.manual_seed(1)
    yield from itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=True), SAMPLES)


def fresh(value: Any) -> Any:
    """A copy with leaves of its own."""

    def copy(item: Any) -> Any:
        if isinstance(item, torch.nn.Parameter):
            return torch.nn.Parameter(item.detach().clone(), item.requires_grad)
        if isinstance(item, Tensor):
            return item.detach().clone().requires_grad_(item.requires_grad)
        return item

    return tree_map(copy, value)


@dataclass
class Outcome:
    """What a call and its backward made, as plain data.

    Attributes:
        values: outputs, gradients, arguments and state afterwards, the next random number.
        saved: how many tensors autograd packed.
        differentiable: whether an output had a gradient function.
    """

    values: list[Any]
    saved: int
    differentiable: bool


def outcome(call: Region, arguments: Any, finish: Region | None, state: torch.nn.Module | None = None) -> Outcome:
    """Calls with fresh arguments, and differentiates every output that can be by a fixed cotangent."""
    given = fresh(arguments)
    leaves = [item for item in tree_flatten(given)[0] if isinstance(item, Tensor) and item.requires_grad]
    if state is not None:
        leaves += [parameter for parameter in state.parameters() if parameter.requires_grad]
    packed = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal packed
        packed += 1
        return tensor

    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(given)
    shown = result if finish is None else finish(result)
    outputs = [item for item in tree_flatten(result)[0] if isinstance(item, Tensor)]
    ends = [item for item in tree_flatten(shown)[0] if isinstance(item, Tensor) and item.requires_grad]
    gradients: tuple[Any, ...] = ()
    if ends and leaves:
        source = torch.Generator().manual_seed(3)
        tangents = [_tangent(item, source) for item in ends]
        gradients = torch.autograd.grad(ends, leaves, tangents, allow_unused=True)
    after = [item for item in tree_flatten(given)[0] if isinstance(item, Tensor)]
    buffers = [] if state is None else list(state.buffers())
    values = [*outputs, *gradients, *after, *buffers, torch.rand(1)]
    return Outcome([bits(item) for item in values], packed, bool(ends and leaves))


def _tangent(like: Tensor, source: torch.Generator) -> Tensor:
    shape, dtype = like.shape, like.dtype
    dense = torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)
    if like.layout is torch.strided:
        return dense
    return dense.to_sparse_coo() if like.layout is torch.sparse_coo else dense.to_sparse(layout=like.layout)


def bits(value: Any) -> Any:
    """A tensor as its type, layout, sizes and bytes: equal exactly where the bits are, NaN included."""
    if not isinstance(value, Tensor):
        return value
    facts = (value.dtype, tuple(value.shape), value.requires_grad, value.layout)
    value = value.detach()
    if value.layout is torch.sparse_coo:
        return (*facts, bits(value._indices()), bits(value._values()))
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return (*facts, bits(value.crow_indices()), bits(value.col_indices()), bits(value.values()))
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return (*facts, bits(value.ccol_indices()), bits(value.row_indices()), bits(value.values()))
    if value.is_quantized:
        value = value.int_repr()
    stride = value.stride()
    flat = torch.empty(value.shape, dtype=value.dtype).copy_(value).reshape(-1)
    return (*facts, stride, bytes(flat.view(torch.uint8).numpy()))
