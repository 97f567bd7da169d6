"""How a tensor's elements lie in memory."""

from __future__ import annotations

import torch


def dense_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Dimensions by falling stride, those of size 1 where they stand in the shape; None with holes or overlaps."""
    shape, stride = tensor.shape, tensor.stride()
    real = sorted((dim for dim in range(tensor.dim()) if shape[dim] != 1), key=lambda dim: -stride[dim])
    expected = 1
    for dim in reversed(real):
        if stride[dim] != expected:
            return None
        expected *= shape[dim]
    places = iter(real)
    return tuple(dim if shape[dim] == 1 else next(places) for dim in range(tensor.dim()))


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether elements lie one after the other, in whatever order of dimensions."""
    return dense_order(tensor) is not None
