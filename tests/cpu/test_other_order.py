"""A plan file of a model whose code goes through a set, in a process that goes through it the other way."""

from __future__ import annotations

from pathlib import Path

import models as zoo
import pytest
import torch
from torch import nn

import keepless
from keepless.capture import Inputs
from keepless.errors import PlanError


class Named(nn.Module):
    """Masks by name, made in an order that is not the model's own, as Hugging Face's Gemma 3 does."""

    def __init__(self, names: tuple[str, ...], draws: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.names, self.draws = names, draws

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A loss."""
        masks = {name: x.tanh() if name == "local" else x.sigmoid() for name in self.names}
        if self.draws:
            masks = {name: nn.functional.dropout(mask, 0.1) for name, mask in masks.items()}
        hidden = nn.functional.dropout(self.linear(x), 0.2)
        return self.linear((hidden * masks["local"]).relu() * masks["global"]).square().sum()


ONE, OTHER = ("local", "global"), ("global", "local")


def plan_of(path: Path, model: nn.Module, x: torch.Tensor, everything: bool) -> keepless.Plan:
    """A plan that comes from a file: with everything kept, or the smallest."""
    plan = keepless.plan(model, x, "1MiB", engine="graph")
    if not everything:
        plan = keepless.plan(model, x, plan.smallest_budget, engine="graph")
    plan.save(path / "step.plan")
    return keepless.load(path / "step.plan")


@pytest.mark.parametrize("everything", [True, False])
def test_the_same_ops_run_in_the_plan_s_order(everything: bool, tmp_path: Path) -> None:
    """Bits of plain eager in this process; the step is the plan's, not one that was planned anew."""
    x = torch.randn(64, 8)
    torch.manual_seed(0)
    plan = plan_of(tmp_path, Named(ONE), x, everything)
    model = Named(OTHER)
    expected = zoo.run_step(model, Inputs.of(x), 3)
    keepless.apply(model, plan)
    assert zoo.run_step(model, Inputs.of(x), 3).differences(expected) == []
    planned = model.__dict__["forward"]
    assert planned.counters.steps == 1
    assert [entry.program for entry in planned.entries] == [plan.program]


def test_other_draws_are_another_step(tmp_path: Path) -> None:
    """Random numbers would be drawn in the plan's order, which is not this process's: the remedy is named."""
    x = torch.randn(64, 8)
    plan = plan_of(tmp_path, Named(ONE, draws=True), x, everything=True)
    with pytest.raises(PlanError, match="PYTHONHASHSEED=0"):
        keepless.apply(Named(OTHER, draws=True), plan)(x)
