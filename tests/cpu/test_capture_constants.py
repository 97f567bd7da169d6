"""Tensors that the forward reads beside its parameters, buffers and arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import keepless
from keepless.errors import CaptureError

GLOBAL = torch.linspace(0, 1, 8)


class Reader(torch.nn.Module):
    """Adds a plain tensor attribute, a tensor in a list, and a global."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.plain = torch.ones(8)
        self.listed = [torch.full((8,), 2.0)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * self.plain + self.listed[0] + GLOBAL + torch.tensor([0.5] * 8)).pow(2).mean()


def _grads(model: torch.nn.Module, *args: Any) -> list[torch.Tensor]:
    model.zero_grad()
    model(*args).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_replaced_attribute_is_seen() -> None:
    """A plain tensor attribute that is replaced after planning is used in the next step."""
    torch.manual_seed(0)
    model, x = Reader(), torch.randn(4, 8)
    keepless.fit(model, x, "1GiB")
    first = _grads(model, x)
    model.plain = torch.full((8,), 3.0)
    model.listed[0] = torch.zeros(8)
    second = _grads(model, x)
    keepless.remove(model)
    expected = _grads(model, x)
    assert all(torch.equal(a, b) for a, b in zip(second, expected, strict=True))
    assert not torch.equal(first[0], second[0])


def test_rebound_closure_is_seen() -> None:
    """A loss that closes over a target which the loop rebinds never trains on the old one."""
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    target = torch.tensor([0, 1, 2, 0])
    model = keepless.with_loss(
        torch.nn.Linear(8, 3), lambda output, batch: torch.nn.functional.cross_entropy(output, target)
    )
    keepless.fit(model, x, "1GiB")
    _grads(model, x)
    target = torch.tensor([2, 2, 1, 1])
    found = _grads(model, x)
    keepless.remove(model)
    assert all(torch.equal(a, b) for a, b in zip(found, _grads(model, x), strict=True))


def test_homeless_tensor_is_refused() -> None:
    """A tensor that only a helper object holds could change unseen."""

    class Holder:
        def __init__(self) -> None:
            self.inner = {"deep": {"er": torch.ones(8)}}

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)
            self.holder = Holder()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.linear(x) * self.holder.inner["deep"]["er"]).mean()

    with pytest.raises(CaptureError, match=r"buffer.*batch"):
        keepless.plan(Model(), torch.randn(4, 8), "1GiB", engine="graph")
