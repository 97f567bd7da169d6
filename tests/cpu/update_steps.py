"""Steps whose optimizer updates in the backward, for their tests."""

from __future__ import annotations

from typing import Any

import models
import torch
from torch import nn

from keepless.machine import OPTIMIZER_IN_BACKWARD

optim = torch.optim

REWRITES = (OPTIMIZER_IN_BACKWARD,)
PLENTY = 1 << 30


def train(
    model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, steps: int = 5, seed: int = 3
) -> dict[str, torch.Tensor]:
    """A plain loop with a scheduler; everything that it leaves."""
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(**batch) if isinstance(batch, dict) else model(batch)
        loss = models.loss_in(output)
        loss.backward()
        if isinstance(model.__dict__.get("forward"), object) and "forward" in model.__dict__:
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    left = {f"loss {i}": loss for i, loss in enumerate(losses)} | {"generator": torch.get_rng_state()}
    left |= {name: p.detach().clone() for name, p in model.named_parameters()}
    left |= {f"buffer {name}": b.clone() for name, b in model.named_buffers()}
    for number, state in optimizer.state_dict()["state"].items():
        left |= {f"state {number} {k}": torch.as_tensor(v).clone() for k, v in state.items()}
    return left


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in sorted(a.keys() | b.keys()) if not models.same_bits(a[name], b[name])]
