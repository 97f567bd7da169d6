"""Facts of many tensors at once: what is called alike is alike in all that a captured step depends on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import keepless
from keepless._compat import quick_look

CHANGES: dict[str, Callable[[list[Any]], Any]] = {
    "shape": lambda given: setattr(given[0], "data", torch.zeros(2, 3)),
    "strides": lambda given: setattr(given[0], "data", torch.zeros(4, 3).t()),
    "dtype": lambda given: setattr(given[0], "data", torch.zeros(3, 4, dtype=torch.float64)),
    "requires_grad": lambda given: given[0].requires_grad_(False),
    "class": lambda given: given.__setitem__(0, given[0].detach().clone().requires_grad_()),
    "one twice": lambda given: given.__setitem__(0, given[2]),
    "none": lambda given: given.__setitem__(0, None),
    "one less": lambda given: given.pop(),
    "device": lambda given: given.__setitem__(1, given[1].to("meta")),
}


def made() -> list[Any]:
    return [nn.Parameter(torch.zeros(3, 4)), torch.zeros(5), nn.Parameter(torch.zeros(3, 4))]


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_seen(name: str) -> None:
    given = made()
    look = quick_look(given)
    assert look is not None, "this release has no such check: captured steps compare one by one"
    assert look(given)
    assert look(made())  # others that are alike
    CHANGES[name](given)
    assert not look(given)


def test_the_tensors_are_not_held() -> None:
    given = made()
    look = quick_look(given)
    gone = [weakref.ref(tensor) for tensor in given]
    del given
    gc.collect()
    assert look is not None
    assert all(reference() is None for reference in gone)


def test_a_mode_around_the_call_costs_no_step() -> None:
    """Autocast, inference and back: the guard compares one by one where the quick look does not know the tensors."""
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    keepless.fit(model, x, "1GiB", engine="graph", loss_fn=lambda output, _: output.sum())
    planned = model.__dict__["forward"]
    for number in range(20):
        if number % 2:
            with torch.inference_mode():
                model(x)
        model(x).sum().backward()
        model.zero_grad()
    assert planned.counters.hits == 20
    model.weight.data = model.weight.data.double()
    model.bias.data = model.bias.data.double()
    assert "dtype" in planned.entries[0].guard.check((x,), {})
