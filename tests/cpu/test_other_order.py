"""A plan file of a model whose code goes through a set, in a process that goes through it the other way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import keepless
from keepless.errors import PlanError


class Named(nn.Module):
    """Scales by name, in an order that is not the model's own."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.names = names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A loss."""
        hidden = self.linear(x)
        made = {name: hidden.tanh() if name == "local" else hidden.sigmoid() for name in self.names}
        return (made["local"] * made["global"]).sum()


def test_the_remedy_is_named(tmp_path: Path) -> None:
    """The same ops in another order are no other version of the code."""
    x = torch.randn(4, 8)
    keepless.plan(Named(("local", "global")), x, "1MiB").save(tmp_path / "step.plan")
    plan = keepless.load(tmp_path / "step.plan")
    with pytest.raises(PlanError, match="PYTHONHASHSEED=0"):
        keepless.apply(Named(("global", "local")), plan)(x)
