"""Modes that look at ops, and what else torch sends through them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import keepless
from keepless._compat import TorchDispatchMode, WatchingMode
from keepless.control.parts.data_sizes import _Sizes
from keepless.eager.debugging import OpLog
from keepless.eager.selective import Draws, Redraws

pytestmark = [
    pytest.mark.skipif(
        not hasattr(TorchDispatchMode, "ignore_compile_internals"),
        reason="this torch runs flex attention, which it compiles as a whole, under no mode at all",
    ),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


class Looks(torch.nn.Module):
    """Attends by flex attention, which is differentiated on cards only."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width))
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss."""
        for block in self.blocks:
            heads = x.detach().unflatten(-1, (2, -1)).transpose(1, 2)
            x = x + block(x + flex_attention(heads, heads, heads).transpose(1, 2).flatten(-2))
        return {"loss": x.square().mean()}


@pytest.mark.parametrize("make", [_Sizes, OpLog, Draws, lambda: Redraws(Draws())])
def test_higher_order_ops_run_under_modes_that_look(make: Callable[[], WatchingMode]) -> None:
    given = torch.ones(1, 2, 4, 8)
    expected = flex_attention(given, given, given)
    with make():
        found = flex_attention(given, given, given)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("engine", ["blocks", "eager"])
def test_a_model_with_higher_order_ops_is_planned(engine: str) -> None:
    """By engines that need no graph of them."""
    torch.manual_seed(0)
    model, batch = Looks(), {"x": torch.randn(32, 32, 16)}
    ends = keepless.plan(model, batch, "1GiB", engine=engine, cache=False)
    plan = keepless.plan(model, batch, ends.smallest_budget, engine=engine, cache=False)
    assert plan.num_replays
    assert keepless.verify(model, batch, plan, repeats=1).equal
