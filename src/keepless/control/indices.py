"""Indices for trials: spread as real ones are.

An op that adds into places takes long where all are one place: a pool's backward with zeros for indices took 0.6 s on
an H100, ten times the step that it is part of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from keepless.binding import Call, Ref

aten = torch.ops.aten
_SPREAD = 2654435761
"""A prime near 2^32 over the golden ratio (Knuth, The Art of Computer Programming 3, 6.4): its multiples scatter."""


def spread_indices(call: Call, examples: Mapping[int, torch.Tensor]) -> dict[int, Callable[[int], torch.Tensor]]:
    """Slots of a call's indices -> so many of them, as int64 on the CPU; for ops that are known."""
    known = _KNOWN.get(call.target)
    listed = [arg for arg in call.args[1] if isinstance(arg, Ref)] if known is _of_list else []
    if known is None or any(examples[arg.slot].dtype in (torch.bool, torch.uint8) for arg in listed):
        return {}  # a mask stands for as many dimensions as it has
    shapes = [_shape(arg, examples) for arg in call.args]
    found: dict[int, Callable[[int], torch.Tensor]] = {}
    for position, make in known(call.args, shapes):
        arg = position if isinstance(position, Ref) else call.args[position]
        if isinstance(arg, Ref) and examples[arg.slot].dtype in (torch.int64, torch.int32):
            found[arg.slot] = make
    return found


def _shape(arg: Any, examples: Mapping[int, torch.Tensor]) -> tuple[int, ...]:
    return tuple(int(n) for n in examples[arg.slot].shape) if isinstance(arg, Ref) else ()


def _scattered(bound: int) -> Callable[[int], torch.Tensor]:
    return lambda count: torch.arange(count).mul_(_SPREAD).remainder_(max(1, bound))


def _in_order(bound: int, plane: int) -> Callable[[int], torch.Tensor]:
    """Evenly over each plane, as a pool's are."""
    return lambda count: (
        torch.arange(count).remainder_(max(1, plane)).mul_(bound).div_(max(1, plane), rounding_mode="floor")
    )


_Made = Sequence[tuple[Any, Callable[[int], torch.Tensor]]]
_Shapes = Sequence[tuple[int, ...]]


def _pool(dims: int) -> Callable[[Any, _Shapes], _Made]:
    return lambda args, shapes: [(7, _in_order(prod(shapes[1][-dims:]), prod(shapes[0][-dims:])))]


def _of_classes(place: int) -> Callable[[Any, _Shapes], _Made]:
    """Targets after the scores, whose classes are dimension 1 (0 without a batch)."""
    return lambda args, shapes: [(place + 1, _scattered(shapes[place][min(1, len(shapes[place]) - 1)]))]


def _of_dim(place: int) -> Callable[[Any, _Shapes], _Made]:
    return lambda args, shapes: [(place, _scattered(shapes[0][args[1]] if shapes[0] else 1))]


def _of_list(args: Any, shapes: _Shapes) -> _Made:
    return [(ref, _scattered(shapes[0][dim])) for dim, ref in enumerate(args[1]) if isinstance(ref, Ref)]


_KNOWN: dict[Any, Callable[[Any, _Shapes], _Made]] = {
    aten.embedding.default: lambda args, shapes: [(1, _scattered(shapes[0][0]))],
    aten.embedding_dense_backward.default: lambda args, shapes: [(1, _scattered(int(args[2])))],
    aten.max_pool2d_with_indices_backward.default: _pool(2),
    aten.max_pool3d_with_indices_backward.default: _pool(3),
    aten.nll_loss_forward.default: _of_classes(0),
    aten.nll_loss_backward.default: _of_classes(1),
    aten.nll_loss2d_forward.default: _of_classes(0),
    aten.nll_loss2d_backward.default: _of_classes(1),
    aten.gather.default: _of_dim(2),
    aten.scatter.src: _of_dim(2),
    aten.scatter.value: _of_dim(2),
    aten.scatter_add.default: _of_dim(2),
    aten.index_select.default: _of_dim(2),
    aten.index_add.default: _of_dim(2),
    aten.index.Tensor: _of_list,
    aten.index_put.default: _of_list,
}
