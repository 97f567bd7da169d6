"""Plain constants that the forward reads from configs, closures and globals: annealing them is seen."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import keepless

RATE = 1.0
RATES = [1.0]
OPTIONS = types.SimpleNamespace(rate=1.0)
X = torch.linspace(-1, 1, 32).reshape(4, 8)


@dataclass
class Config:
    """What many models hold as `self.config`."""

    rate: float = 1.0
    steps_seen: int = 0


class Model(nn.Module):
    """Reads a rate in many ways."""

    def __init__(self, read: Callable[[Any], float]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.config = Config()
        self.nested = {"loss": {"rate": 1.0}}
        self.read = read

    def helper(self) -> float:
        return self.config.rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * self.read(self)).square().mean()


def _set_global(model: Any, rate: float) -> None:
    global RATE
    RATE = rate


CASES: dict[str, tuple[Callable[[Any], float], Callable[[Any, float], None]]] = {
    "config": (lambda m: m.config.rate, lambda m, rate: setattr(m.config, "rate", rate)),
    "config through a method": (lambda m: m.helper(), lambda m, rate: setattr(m.config, "rate", rate)),
    "nested dict": (lambda m: m.nested["loss"]["rate"], lambda m, rate: m.nested["loss"].__setitem__("rate", rate)),
    "global": (lambda m: RATE, _set_global),
    "global list": (lambda m: RATES[0], lambda m, rate: RATES.__setitem__(0, rate)),
    "global namespace": (lambda m: OPTIONS.rate, lambda m, rate: setattr(OPTIONS, "rate", rate)),
}


@pytest.mark.parametrize("name", CASES)
def test_annealed_constant_is_seen(name: str) -> None:
    """Each step has the rate of its time."""
    read, change = CASES[name]
    model = keepless.fit(Model(read), X, "1GiB", cache=False)
    losses = []
    for rate in (1.0, 2.0, 4.0):
        change(model, rate)
        losses.append(model(X).item())
    change(model, 1.0)
    assert losses[1:] == [losses[0] * 4, losses[0] * 16]


def test_annealed_closure_of_a_loss_is_seen() -> None:
    """The weight of a loss term in the loop's own variable."""
    rate = 1.0
    model = keepless.with_loss(nn.Linear(8, 8), lambda output, batch: (output * rate).square().mean())
    keepless.fit(model, X, "1GiB", cache=False)
    first = model(X).item()
    rate = 2.0
    assert model(X).item() == first * 4


def test_what_the_code_does_not_read_costs_no_plan() -> None:
    """A counter in the same config object is not the forward's business."""
    model = keepless.fit(Model(lambda m: m.config.rate), X, "1GiB", cache=False)
    for _ in range(3):
        model.config.steps_seen += 1
        model(X)
    forward: Any = model.__dict__["forward"]
    assert len(forward.entries) == 1


class Registry(dict[str, Any]):
    """A dict that answers in its own way, as some libraries keep as globals."""

    def get(self, key: Any, default: Any = None) -> Any:
        return {}


REGISTRY = Registry(a=None)


def test_registry_among_the_globals_is_no_constant() -> None:
    """Only plain containers are looked into."""
    model = keepless.fit(Model(lambda m: 1.0 if REGISTRY.get("a") == {} else 2.0), X, "1GiB", cache=False)
    model(X)
    forward: Any = model.__dict__["forward"]
    assert len(forward.entries) == 1


class Counted(nn.Module):
    """Its hash is of what it counts, as torchmetrics' are."""

    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(())

    def __hash__(self) -> int:
        return hash((id(self), self.count))


def test_what_only_a_modules_hash_reads_is_no_fact() -> None:
    """Else each step of a model that holds a metric would be another step."""
    model = keepless.with_loss(nn.Linear(8, 8), lambda out, _: out.square().mean())
    model.counted = Counted()
    keepless.fit(model, X, "1GiB")
    for _ in range(2):
        model(X).backward()
        model.zero_grad()
        model.counted.count = model.counted.count + 1
    assert (model.forward.counters.hits, model.forward.counters.captures) == (2, 0)
