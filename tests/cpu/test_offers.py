"""Where a budget is too small, the error says what rewrites would gain, in bytes that planning then keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import keepless
from keepless.errors import InfeasibleBudget
from keepless.ir import format_bytes
from keepless.machine import CHUNKED_LOSS, OPTIMIZER_IN_BACKWARD
from keepless.machine.allocation import CUBLAS_DEFAULT
from keepless.measure.card import CardAllocator

TOO_SMALL = 100_000


class Words(nn.Module):
    """Some layers, and a loss over many classes."""

    def __init__(self, classes: int = 3000, width: int = 24, layers: int = 1) -> None:
        super().__init__()
        self.wte = nn.Embedding(50, width)
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)])
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.layers(self.wte(ids))).flatten(0, 1), ids.flatten())


def refused(model: nn.Module, ids: torch.Tensor, **options: Any) -> InfeasibleBudget:
    with pytest.raises(InfeasibleBudget) as caught:
        keepless.plan(model, ids, TOO_SMALL, **options)
    return caught.value


def check_kept(error: InfeasibleBudget, model: nn.Module, ids: torch.Tensor, **options: Any) -> None:
    """What is named is what planning needs then, and it plans within it."""
    for names, nbytes in error.rewrites.items():
        plan = keepless.plan(model, ids, int(nbytes * 1.01), rewrites=names, **options)
        assert plan.smallest_budget == pytest.approx(nbytes, rel=0.01)
        gain = format_bytes(error.smallest_budget - nbytes)
        assert f"rewrites={names} lowers the smallest budget by {gain} to {format_bytes(nbytes)}" in str(error)


def test_logits_are_offered_in_chunks() -> None:
    """The logits are the floor: chunks are named, with bytes, as not bitwise; nothing else has changed."""
    torch.manual_seed(0)
    model, ids = Words(), torch.randint(0, 50, (4, 150))
    generator = torch.get_rng_state()
    error = refused(model, ids)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert list(error.rewrites) == [(CHUNKED_LOSS,)]
    assert error.rewrites[(CHUNKED_LOSS,)] < error.smallest_budget - 600 * 3000 * 4
    assert "(not bitwise); it is the logits" in str(error)
    check_kept(error, model, ids)


@pytest.mark.slow
def test_gradients_are_offered_to_go_early() -> None:
    """Weights are all that there is: the optimizer in the backward is named, with the same bits."""
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Linear(200, 200), nn.Tanh())]
    model, batch = models.Loss(nn.Sequential(*layers)), torch.randn(4, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    error = refused(model, batch, optimizer=optimizer)
    assert list(error.rewrites) == [(OPTIMIZER_IN_BACKWARD,)]
    assert error.smallest_budget - error.rewrites[(OPTIMIZER_IN_BACKWARD,)] > 2 * 200 * 200 * 4
    assert "(same bits)" in str(error)
    check_kept(error, model, batch, optimizer=optimizer)
    assert refused(model, batch, optimizer=optimizer, accumulate=True).rewrites == {}
    assert refused(model, batch).rewrites == {}


@pytest.mark.slow
def test_what_is_asked_for_already_is_kept_in_the_offer() -> None:
    """With one rewrite on, the other is offered beside it."""
    torch.manual_seed(0)
    model, ids = Words(classes=1500, width=200, layers=6), torch.randint(0, 50, (2, 150))
    optimizer = torch.optim.AdamW(model.parameters())
    error = refused(model, ids, optimizer=optimizer, rewrites=(CHUNKED_LOSS,))
    assert list(error.rewrites) == [(OPTIMIZER_IN_BACKWARD, CHUNKED_LOSS)]
    assert "(not bitwise)" in str(error)
    check_kept(error, model, ids, optimizer=optimizer)


def test_an_optimizer_that_needs_all_gradients_is_not_offered() -> None:
    """What would be refused is not offered."""

    class Normed(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norm = sum((g.norm() for g in grads), torch.zeros(())) + 1.0
            for grad in grads:
                grad.div_(norm)
            super().step()

    layers = [part for _ in range(6) for part in (nn.Linear(200, 200), nn.Tanh())]
    model = models.Loss(nn.Sequential(*layers))
    assert refused(model, torch.randn(4, 200), optimizer=Normed(model.parameters())).rewrites == {}


@pytest.mark.slow
def test_the_command_says_so(invoke: Callable[..., Any]) -> None:
    """`--rewrite` is taken, an unknown one is bad usage, and JSON has the offers."""
    done = invoke("plan", "factories:tiny", "-b", "4MiB", "--rewrite", "optimizer_in_backward", "--json")
    assert json.loads(done.stdout)["rewrites"] == ["optimizer_in_backward"]
    done = invoke("plan", "factories:tiny", "-b", "4MiB", "--rewrite", "smaller")
    assert done.exit_code == 2
    assert "there is no 'smaller'" in done.stderr
    done = invoke("plan", "factories:tiny", "-b", "100KiB", "--json")
    answer = json.loads(done.stdout)["error"]
    assert done.exit_code == 3
    for offer in answer["rewrites"]:
        assert offer["smallest_budget"] < answer["smallest_budget"]
    assert ["optimizer_in_backward"] in [offer["rewrites"] for offer in answer["rewrites"]]


def test_offers_for_a_card_are_of_reserved_bytes() -> None:
    """The budget bounds what the allocator reserves, and so do the bytes of the offers: they are planned within."""
    torch.manual_seed(0)
    model, ids = Words(classes=30_000, width=96), torch.randint(0, 50, (8, 150))
    options: dict[str, Any] = {"on": "rtx4090", "optimizer": torch.optim.AdamW(model.parameters())}
    with pytest.raises(InfeasibleBudget, match="reserved") as caught:
        keepless.plan(model, ids, "40MiB", **options)
    error = caught.value
    assert (CHUNKED_LOSS,) in error.rewrites
    for names, nbytes in error.rewrites.items():
        plan = keepless.plan(model, ids, nbytes, rewrites=names, **options)
        assert plan.allocation is not None
        assert plan.predicted_peak < plan.allocation.reserved <= nbytes < error.smallest_budget
        assert plan.smallest_budget == nbytes
        gain = format_bytes(error.smallest_budget - nbytes)
        assert f"rewrites={names} lowers the smallest budget by {gain} to {format_bytes(nbytes)}" in str(error)


@pytest.mark.slow
def test_offers_are_of_the_bytes_of_the_error_s_smallest_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ops were not run, too: what a card's allocator reserves is stated for both, and only less is offered."""
    card = CardAllocator((CUBLAS_DEFAULT,))
    monkeypatch.setattr("keepless.control.planning.card_allocator", lambda device: card)
    torch.manual_seed(0)
    model, ids = Words(classes=20_000, width=96), torch.randint(0, 50, (8, 150))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(InfeasibleBudget, match="of what was not run") as caught:
        keepless.plan(model, ids, "30MiB", optimizer=optimizer)
    error = caught.value
    assert error.smallest_budget > error.bound + sum(card.workspaces)
    assert (CHUNKED_LOSS,) in error.rewrites
    for names, nbytes in error.rewrites.items():
        assert nbytes < error.smallest_budget
        gain = format_bytes(error.smallest_budget - nbytes)
        assert f"rewrites={names} lowers the smallest budget by {gain} to {format_bytes(nbytes)}" in str(error)
