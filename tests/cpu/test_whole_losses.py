"""Losses whose scalar stands in the room of a whole input: predicted bytes have it, as measured ones do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import keepless

LOSSES = [F.mse_loss, F.smooth_l1_loss, F.soft_margin_loss, F.binary_cross_entropy]


class Net(nn.Module):
    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Sigmoid())
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.layers(x), x)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_scalar_of_a_mean_holds_a_whole_inputs_bytes(loss: Callable[..., Tensor]) -> None:
    x = torch.rand(512, 64)
    assert loss(x, x).untyped_storage().nbytes() == x.nbytes  # if not, torch has changed: so must the table
    model = Net(loss)
    plan = keepless.plan(model, x, 1 << 30, engine="graph")
    account = keepless.account(model, x, plan)
    assert account.account.categories["outputs"] == x.nbytes
    assert abs(account.residue) <= 64
