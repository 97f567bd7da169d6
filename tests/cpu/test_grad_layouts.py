"""Gradients that come in another layout than the outputs have: a loss over transposed logits, code between blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import models as zoo
import pytest
import torch
import torch.nn.functional as F
from test_block_plans import replays
from torch import nn

import keepless
from keepless.capture.ordering import has_other_layout, order_of

IDS = torch.arange(36).reshape(4, 9) % 23


class Logits(nn.Module):
    """A small language model that returns its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(23, 16), nn.Linear(16, 23)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = F.dropout(F.gelu(layer(x)), 0.1)
        return self.head(x)


class Block(nn.Module):
    """Its backward is traced with views that only a contiguous gradient has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.conv(x).flatten(1).tanh(), 0.1).view(x.shape)


class Between(nn.Module):
    """Code that cannot be captured sends each block a gradient with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.mixes = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, mix in zip(self.blocks, self.mixes, strict=True):
            x = block(x)
            if x.abs().max().item() < 1e9:
                x = mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        return x.square().mean()


def loss_of(logits: torch.Tensor, _: object) -> torch.Tensor:
    return F.cross_entropy(logits.transpose(1, 2), IDS[:, : logits.shape[1]])


def steps(model: nn.Module, ids: torch.Tensor, loss: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    found = loss(model(ids), None)
    found.backward()
    return [found.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("engine", ["graph", "eager"])
@pytest.mark.parametrize("everything", [True, False])
def test_a_loss_over_transposed_logits(engine: str, everything: bool, tmp_path: Path) -> None:
    """Bits of plain eager; also from a file, with another instance, and for sizes that were not planned for."""
    model = Logits()
    plan = keepless.plan(model, IDS, "1GiB", loss_fn=loss_of, engine=engine)
    if not everything:
        plan = keepless.plan(model, IDS, plan.smallest_budget, loss_fn=loss_of, engine=engine)
    found = keepless.verify(model, IDS, plan, loss_fn=loss_of, repeats=1)
    assert (found.equal, found.reference) == (True, "plain eager")
    plan.save(tmp_path / "step.plan")
    twin = Logits()
    twin.load_state_dict(model.state_dict())
    keepless.apply(twin, keepless.load(tmp_path / "step.plan"), background=False)
    for length in (9, 9, 7, 5):
        ids = IDS[:, :length]
        expected, got = steps(model, ids, loss_of), steps(twin, ids, loss_of)
        assert all(map(zoo.same_bits, expected, got)), length
    if engine == "graph":
        assert twin.__dict__["forward"].counters.replays == 0


def test_another_loss_than_planned_for_is_replayed() -> None:
    """Its gradient has another layout: the model's own forward gives the bits, outside the budget."""
    model = Logits()
    plan = keepless.plan(model, IDS, "1GiB", loss_fn=lambda logits, _: logits.square().mean(), engine="graph")
    expected = steps(model, IDS, loss_of)
    keepless.apply(model, plan)
    with pytest.warns(UserWarning, match="another memory layout"):
        assert all(map(zoo.same_bits, expected, steps(model, IDS, loss_of)))
    assert all(map(zoo.same_bits, expected, steps(model, IDS, loss_of)))  # told once
    assert model.__dict__["forward"].counters.replays == 2


class Turned(Logits):
    """Returns its logits transposed."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).transpose(1, 2)


def test_outputs_in_another_layout() -> None:
    """A gradient that lies as its output does is the planned one, on each release of torch."""
    model = Turned()
    loss = lambda logits, _: logits.square().mean()  # noqa: E731
    plan = keepless.plan(model, IDS, "1GiB", loss_fn=loss, engine="graph")
    expected = steps(model, IDS, loss)
    keepless.apply(model, plan)
    assert all(map(zoo.same_bits, expected, steps(model, IDS, loss)))
    assert model.__dict__["forward"].counters.replays == 0


def test_blocks_get_other_layouts() -> None:
    """Planned by blocks for the layouts of a measured step: the bits of plain eager, within the budget, no replay."""
    model, x = Between(), torch.randn(16, 6, 32, 32)
    widest = keepless.plan(model, x, "1GiB", engine="blocks")
    for plan in (widest, keepless.plan(model, x, widest.smallest_budget, engine="blocks")):
        found = keepless.verify(model, x, plan, repeats=1)
        assert found.equal, found.differences
        assert found.measured_peak <= plan.budget.limits["device"]
        keepless.apply(model, plan)
        model(x).backward()
        assert replays(model) == 0
        model.zero_grad()
        keepless.remove(model)


def test_orders() -> None:
    """Of dense tensors; sizes of 1 and holes make none."""
    like = torch.empty(2, 3, 4, 5)
    assert order_of(torch.empty(2, 3, 4, 5), like) is None
    assert order_of(torch.empty(2, 4, 5, 3).permute(0, 3, 1, 2), like) == (0, 2, 3, 1)
    assert order_of(torch.ones(()).expand(2, 3, 4, 5), like) is None
    assert order_of(torch.empty(2, 3, 4, 10)[..., ::2], like) is None
    thin = torch.empty(2, 1, 4, 5)
    assert order_of(torch.empty(2, 4, 5, 1).permute(0, 3, 1, 2), thin) is None
    assert has_other_layout(torch.empty(3, 2).t(), torch.empty(2, 3))
    assert not has_other_layout(torch.ones(()).expand(2, 3), torch.empty(2, 3))
