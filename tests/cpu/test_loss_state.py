"""Planning calls a loss function: the modules that it holds are as they were before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import same_bits
from torch import nn

import keepless
from keepless.control.loss_state import modules_of

GLOBAL = nn.BatchNorm1d(8)


class Criterion(nn.Module):
    """Keeps statistics in buffers and counts its calls in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.calls = 0

    def forward(self, output: torch.Tensor, batch: Any) -> torch.Tensor:
        self.calls += 1
        return self.norm(output).square().mean()

    def method(self, output: torch.Tensor, batch: Any) -> torch.Tensor:
        return self(output, batch)


def losses(criterion: Criterion) -> dict[str, Callable[..., Any]]:
    def inner(output: torch.Tensor) -> torch.Tensor:
        return criterion(output, None)

    return {
        "module": criterion,
        "method": criterion.method,
        "closure": lambda output, batch: criterion(output, batch),
        "nested": lambda output, batch: inner(output),
        "partial": functools.partial(lambda norm, output, batch: norm(output, batch), criterion),
    }


@pytest.mark.parametrize("engine", ["graph", pytest.param("eager", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", ["module", "method", "closure", "nested", "partial"])
def test_a_criterion_is_as_it_was(kind: str, engine: str) -> None:
    criterion = Criterion()
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    plan = keepless.plan(nn.Linear(8, 8), torch.randn(16, 8), "1GiB", loss_fn=losses(criterion)[kind], engine=engine)
    assert plan.engine == engine
    assert all(same_bits(before[name], value) for name, value in criterion.state_dict().items())
    assert criterion.calls == 0
    assert all(p.grad is None for p in criterion.parameters())


def test_a_global_criterion_is_as_it_was() -> None:
    keepless.plan(nn.Linear(8, 8), torch.randn(16, 8), "1GiB", loss_fn=lambda output, _: GLOBAL(output).square().mean())
    assert int(GLOBAL.num_batches_tracked) == 0
    assert same_bits(GLOBAL.running_mean, torch.zeros(8))


def test_what_else_calls_it_leaves_it_as_it_was() -> None:
    model, batch, criterion = nn.Linear(8, 8), torch.randn(16, 8), Criterion()
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    plan = keepless.plan(model, batch, "1GiB", loss_fn=criterion)
    calls: dict[str, Callable[[], Any]] = {
        "estimate": lambda: keepless.estimate(model, batch, loss_fn=criterion),
        "curve": lambda: keepless.curve(model, batch, loss_fn=criterion, points=2, strategies=()),
        "max_batch": lambda: keepless.max_batch(model, lambda n: batch[:n], "1GiB", loss_fn=criterion, high=4),
        "verify": lambda: keepless.verify(model, batch, plan, repeats=1),
        "timeline": lambda: keepless.timeline(model, batch, plan, repeats=1),
        "land": lambda: keepless.land(model, batch, plan, rounds=1),
    }
    for name, call in calls.items():
        call()
        assert all(same_bits(before[key], value) for key, value in criterion.state_dict().items()), name
        assert criterion.calls == 0, name


def test_the_model_itself_and_parts_of_others_are_left_out() -> None:
    model, criterion = nn.Sequential(nn.Linear(8, 8)), Criterion()
    found = modules_of(lambda output, _: criterion(output, model[0]) + criterion.norm(output).sum(), model)
    assert found == [criterion]
    whole = nn.ModuleList([model, criterion])
    assert modules_of(lambda output, _: whole[1](output, None), model) == []
