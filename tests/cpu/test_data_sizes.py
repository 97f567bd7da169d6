"""Steps whose sizes depend on the data keep some of the budget free, and stay below it with other data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import keepless
from keepless.machine.parts import describe_parts
from keepless.measure.steps import increments

WIDTH = 64


class Edges(nn.Module):
    """Messages along edges, half of which are drawn anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """A loss."""
        for layer in self.layers:
            here, there = edges[:, torch.rand(edges.shape[1]) > 0.5]
            x = x + torch.zeros_like(x).index_add(0, there, layer(torch.cat([x[here], x[there]], 1)))
        return x.pow(2).mean()


class Positions(Edges):
    """Picks rows by position: as many as there are positions."""

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """A loss."""
        for layer in self.layers:
            x = x + torch.zeros_like(x).index_add(0, edges[1], layer(torch.cat([x[edges[0]], x[edges[1]]], 1)))
        return x.pow(2).mean()


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(200, WIDTH), "edges": torch.randint(0, 200, (2, 3000))}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["eager", "auto"])
@pytest.mark.parametrize("level", ["kept", "mid", "smallest"])
def test_other_data_stay_within_the_budget(engine: str, level: str) -> None:
    """The sizes vary by a few percent from draw to draw."""
    torch.manual_seed(0)
    model = Edges()
    options: dict[str, Any] = {"engine": engine, "cache": False}
    ends = keepless.plan(model, batch(), "1GiB", **options)
    low, high = ends.smallest_budget, ends.baseline_peak
    budget = {"kept": high, "mid": (low + high) // 2, "smallest": int(1.02 * low)}[level]
    plan = keepless.plan(model, batch(), budget, **options)
    names, spare = plan.signature["data_sizes"]
    assert any("index" in name for name in names)
    assert 0 < spare < 0.06 * budget
    assert any("kept free" in line for line in describe_parts(plan.signature))
    keepless.apply(model, plan)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs).backward()

    for _ in range(20):
        inputs = batch()
        model.zero_grad(set_to_none=True)
        assert plan.graph.start_nbytes + increments(step, torch.device("cpu")) <= budget


def test_rows_by_position_keep_nothing_free() -> None:
    """Their number is a shape."""
    torch.manual_seed(0)
    plan = keepless.plan(Positions(), batch(), "1GiB", engine="eager", cache=False)
    assert "data_sizes" not in plan.signature


@pytest.mark.slow
def test_landing_leaves_it_free() -> None:
    """A plan that was landed on one batch has no more room than before."""
    torch.manual_seed(0)
    model = Edges()
    kept = keepless.plan(model, batch(), "1GiB", engine="eager", cache=False).baseline_peak
    plan = keepless.plan(model, batch(), kept, engine="eager", cache=False)
    landed = keepless.land(model, batch(), plan)
    assert landed.predicted_peak <= kept - plan.signature["data_sizes"][1]
    assert landed.budget.reserve >= plan.signature["data_sizes"][1]
