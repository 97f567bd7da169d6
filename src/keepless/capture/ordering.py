"""Gradients of outputs that come in another layout than the outputs have.

A loss over `logits.transpose(1, 2)` gives the logits a gradient whose dimensions lie in that order in memory. Eager
runs the backward on it as it is: which kernels run, and how, depends on the layout. Tracing assumes gradients like the
outputs, so that the trace is told: it puts the assumed gradient into its order by `permute`, `contiguous`, `permute`.
These nodes stand for no op: the real gradient has that layout already (`Drafting.in_order`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from keepless.capture.layouts import dense_order, is_dense

Orders = Mapping[int, tuple[int, ...]]
"""Flat output position -> dimensions of its gradient from the outermost in memory to the innermost."""

MARK = "keepless_in_order"
_state = threading.local()


def order_of(grad: torch.Tensor, output: torch.Tensor) -> tuple[int, ...] | None:
    """The order of a gradient's dimensions in memory; None where it is the output's, or what lies there has holes.

    Sizes that are symbols have no order.
    """
    if not all(type(n) is int for n in (*grad.shape, *grad.stride(), *output.stride())):
        return None
    order = dense_order(grad)
    return None if order is None or order == dense_order(output) else order


def orders_of_holes(leaves: Sequence[Any], positions: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Outputs that lie in memory with holes (`x[:, :-1]`) get dense gradients, whoever sends them."""
    tensors = {i: leaves[i] for i in positions if i < len(leaves) and isinstance(leaves[i], torch.Tensor)}
    return {
        i: tuple(range(t.dim()))
        for i, t in tensors.items()
        if all(type(n) is int for n in (*t.shape, *t.stride())) and t.numel() and not is_dense(t)
    }


def has_other_layout(tensor: torch.Tensor, example: torch.Tensor) -> bool:
    """Whether a dense gradient lies in memory otherwise than the one that was captured."""
    if tensor.stride() == example.stride():
        return False
    order = dense_order(tensor)
    return order is not None and order != dense_order(example)


class Ordered(torch.autograd.Function):
    """What it is given; its gradient is put into an order, in nodes that say so (`is_ordering`)."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        ctx.order = order
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        order: tuple[int, ...] = ctx.order
        back = tuple(order.index(dim) for dim in range(len(order)))
        with _ordering():
            return grad.permute(order).contiguous().permute(back), None


def is_ordering() -> bool:
    """Whether what this thread traces now only puts a gradient in order."""
    return bool(getattr(_state, "active", False))


@contextmanager
def _ordering() -> Iterator[None]:
    _state.active = True
    try:
        yield
    finally:
        _state.active = False
