"""The script's own loss, known by what it took: bytes that it held and used, and the gradients that it sent.

What lies between a model's output and the backward is code of the script, which cannot be called again. It is watched
once; planning gets a stand-in for it, a loss function that needs as much and sends gradients of the same layout.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keepless._compat import tree_flatten
from keepless.capture.ordering import order_of
from keepless.measure import OpCost
from keepless.measure._profiler import AllocationWatch, levels_of
from keepless.measure.steps import increments

UNKNOWN = 4
"""Times the bytes of the outputs that a loss is taken to need where it could not be watched: logits in float32, their
softmax, and the gradients of both."""


class Watch:
    """What is allocated from a model's return to the backward."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._allocations = AllocationWatch()
        self._level = 0

    def start(self) -> None:
        """The model has returned."""
        if self.device.type == "cuda":
            self._level = torch.cuda.memory_allocated(self.device)
        else:
            self._allocations.start()

    def stop(self) -> tuple[int, int] | None:
        """Bytes that are held since the start, and the most that were; None where they are not known."""
        if self.device.type == "cuda":
            held = max(0, torch.cuda.memory_allocated(self.device) - self._level)
            return held, held
        events = self._allocations.stop()
        if events is None:
            return None
        level, highest = levels_of(events)
        return max(0, level), highest


@dataclass(frozen=True)
class SeenLoss:
    """A loss that was watched.

    Arguments:
        scratch: bytes beside the model's outputs and their gradients, at the most.
        seconds: of its backward, and as much again for its forward.
        gradients: of each output, None where it gets none.
    """

    scratch: int
    seconds: float
    gradients: tuple[torch.Tensor | None, ...]


def see(
    roots: Sequence[Any],
    root_gradients: Sequence[Any],
    edges: Sequence[Any],
    outputs: Sequence[torch.Tensor],
    device: torch.device,
    allocated: tuple[int, int] | None,
    elsewhere: int = 0,
) -> SeenLoss:
    """Runs the loss's backward down to the model's outputs; the graph stays for the script's own.

    Arguments:
        roots, root_gradients: of the backward that is about to begin.
        edges: of the model's outputs, in the graph.
        outputs: tensors like those there; on the meta device, say.
        device: of the outputs.
        allocated: what `Watch.stop` gave.
        elsewhere: bytes that this backward makes, and that are counted already: gradients of other models' parameters.
    """
    found: list[Any] = []

    def run() -> None:
        found[:] = torch.autograd.grad(
            list(roots), list(edges), list(root_gradients), retain_graph=True, allow_unused=True
        )

    start = time.perf_counter()
    used = increments(run, device)
    seconds = time.perf_counter() - start
    sent = sum(t.numel() * t.element_size() for t in found if t is not None)
    size = sum(t.numel() * t.element_size() for t in outputs)
    held, highest = allocated if allocated is not None else (UNKNOWN * size, UNKNOWN * size)
    # The first step has the outputs twice, the script's and those of the call that is run again.
    return SeenLoss(max(highest, held + max(0, used - sent - elsewhere), size), 2 * seconds, tuple(found))


class StandIn:
    """A loss function that needs what the script's was seen to need.

    Arguments:
        positions: flat positions of the outputs that get gradients.
        outputs, gradients: at these positions.
        seen: what it needs; of other outputs, more or less by their bytes.
    """

    def __init__(
        self,
        positions: Sequence[int],
        outputs: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        seen: SeenLoss,
    ) -> None:
        self.positions = tuple(positions)
        self.orders = tuple(order_of(grad, out) for grad, out in zip(gradients, outputs, strict=True))
        self.nbytes = sum(out.numel() * out.element_size() for out in outputs)
        self.known_cost = OpCost(seen.seconds, seen.scratch, 0.0, 1)

    def __call__(self, output: Any, batch: Any) -> torch.Tensor:
        leaves, _ = tree_flatten(output)
        wanted = [leaves[position] for position in self.positions]
        nbytes = sum(out.numel() * out.element_size() for out in wanted)
        scratch = self.known_cost.scratch * nbytes // max(1, self.nbytes)
        loss: torch.Tensor = _Loss.apply(scratch, self.orders, *wanted)
        return loss


class _Loss(torch.autograd.Function):
    """A scalar, with gradients that are the same small number everywhere."""

    @staticmethod
    def forward(ctx: Any, scratch: int, orders: tuple[Any, ...], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.held = outputs[0].new_empty(scratch, dtype=torch.uint8)
        ctx.orders = orders
        ctx.like = [(out.shape, out.dtype, out.device) for out in outputs]
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        made = [
            _filled(shape, dtype, device, order)
            for (shape, dtype, device), order in zip(ctx.like, ctx.orders, strict=True)
        ]
        return None, None, *made


def _filled(shape: torch.Size, dtype: torch.dtype, device: torch.device, order: tuple[int, ...] | None) -> torch.Tensor:
    """A gradient whose dimensions lie in memory in this order."""
    order = order if order is not None and len(order) == len(shape) else tuple(range(len(shape)))
    lying = torch.full([shape[dim] for dim in order], 1 / max(1, shape.numel()), dtype=dtype, device=device)
    return lying.permute([order.index(dim) for dim in range(len(shape))])
