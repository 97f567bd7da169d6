"""What it costs to hand a gradient over to autograd, measured once per process."""

from __future__ import annotations

from functools import lru_cache
from time import perf_counter
from typing import Any

import torch

_NODES = 16
_RUNS = 12
_COLD = 4.0
"""In steps of Llama and ViT a hand-over took 34 to 64 us on a machine where one in this chain takes 8: there, code and
tensors have left the caches since the last one.
"""


@lru_cache(maxsize=1)
def hand_over_seconds() -> float:
    """Of one node of a planned step's chain, and what autograd does with the gradient there."""
    best = float("inf")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        leaves = [torch.zeros(1, requires_grad=True) for _ in range(_NODES)]
        for _ in range(_RUNS):
            start = perf_counter()
            token = torch.zeros(0, requires_grad=True)
            for leaf in leaves:
                token = _Node.apply(token, leaf)
            torch.autograd.backward([token], [torch.empty(0)])
            best = min(best, perf_counter() - start)
            for leaf in leaves:
                leaf.grad = None
    return _COLD * best / _NODES


class _Node(torch.autograd.Function):
    """As the nodes of a planned step: passes an empty token, and gives one gradient."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        return torch.empty(0), torch.empty(1)
