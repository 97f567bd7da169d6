"""torch's formulas of floating-point operations, which its public counter keeps in a private table."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import flop_counter


def has_formula(target: Any) -> bool:
    """Whether torch counts the operations of this op."""
    return isinstance(target, torch._ops.OpOverload) and target.overloadpacket in flop_counter.flop_registry


def count_flops(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Operations of one call, a multiplication and an addition as two; tensors need shapes only.

    Arguments:
        target: an op with a formula.
        out: the call's result, a tensor or a tuple with None where nothing is returned.
    """
    return int(flop_counter.flop_registry[target.overloadpacket](*args, **kwargs, out_val=out))


def attention_flops(query: Any, key: Any, value: Any, *, backward: bool) -> int:
    """Operations of scaled dot-product attention on tensors (batch, heads, length, head size), without a mask."""
    counter: Any = flop_counter
    if backward:
        return int(counter.sdpa_backward_flop_count(query.shape, query.shape, key.shape, value.shape))
    return int(counter.sdpa_flop_count(query.shape, key.shape, value.shape))
