"""Orders of classic planners on the real engine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import keepless


class Block(nn.Module):
    """Norm, two linear maps around a GELU, dropout, residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.body = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.body(self.norm(x))
        return out


class Net(nn.Module):
    """Four blocks and a scalar."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.blocks(x).square().mean()
        return out


@pytest.mark.parametrize("solver", ["sqrt_n", "revolve", "rotor", "dtr", "knapsack"])
def test_classic_plans_train_bit_for_bit(solver: str) -> None:
    """At three fifths of the memory: replays, the gradients of the engine that keeps everything, the budget kept."""
    torch.manual_seed(0)
    model, batch = Net(), (torch.randn(1024, 32),)
    limit = int(0.6 * keepless.plan(model, batch, "1TiB", solver="keep_all", cache=False).predicted_peak)
    plan = keepless.plan(model, batch, limit, solver=solver, cache=False)
    assert plan.certificate.solver == solver
    assert plan.num_replays > 0
    result = keepless.verify(model, batch, plan, repeats=1)
    assert result.equal
    assert result.measured_peak <= limit
