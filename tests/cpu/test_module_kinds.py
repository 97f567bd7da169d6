"""Which kind of step a call begins: the quick reader says what a walk through the whole model says."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from keepless.modules.kinds import KindReader, step_key


class Net(nn.Module):
    """Nested modules, a shared one, a parameter that is None, and one of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.1)))
        self.again = self.body[0]
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_parameter("shift", None)


def _tie(model: Net) -> None:
    model.body[0].weight = nn.Parameter(model.body[0].weight.detach())
    model.head = nn.Linear(4, 4, bias=False)
    model.head.weight = model.body[0].weight


def _stand(model: Net) -> None:
    model.head.bias.grad = torch.zeros(2)


CHANGES: dict[str, Callable[[Net], Any]] = {
    "a submodule's mode": lambda model: model.body[1][1].eval(),
    "the model's mode": lambda model: setattr(model, "training", False),
    "frozen": lambda model: model.body.requires_grad_(False),
    "a dtype, in place": lambda model: model.head.half(),
    "a submodule replaced by one that is alike": lambda model: setattr(model, "head", nn.Linear(4, 2)),
    "a submodule replaced by a frozen one": lambda model: setattr(
        model, "head", nn.Linear(4, 2).double().requires_grad_(False)
    ),
    "a submodule more": lambda model: model.body[1].append(nn.Linear(2, 2)),
    "a submodule less": lambda model: model.body[1].__delitem__(1),
    "no submodule": lambda model: setattr(model, "head", None),
    "a parameter that was None": lambda model: setattr(model, "shift", nn.Parameter(torch.ones(4).double())),
    "a parameter that is None": lambda model: setattr(model.head, "bias", None),
    "a parameter replaced": lambda model: setattr(model, "scale", nn.Parameter(torch.ones(4), requires_grad=False)),
    "tied": _tie,
    "a gradient that stands": _stand,
}
"""What is done to a model after the reader has seen it."""


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_seen(name: str) -> None:
    model, args = Net(), (torch.zeros(2, 4),)
    reader = KindReader(model)
    before = reader(model, args, {})
    assert before == reader(model, args, {}) == step_key(model, args, {})
    CHANGES[name](model)
    assert reader(model, args, {}) == step_key(model, args, {})
    assert (reader(model, args, {}) != before) == (name != "a submodule replaced by one that is alike")


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((torch.zeros(2, 4), 3, 0.5, None, True, "name"), {}),
        ((torch.zeros(2, 4),), {"x": torch.zeros(3, dtype=torch.long), "turns": 2}),
        ((torch.zeros(2, 4),), {"turns": 2, "x": torch.zeros(3, dtype=torch.long)}),
        (([torch.zeros(2), {"a": 1}], (1, 2)), {"x": {"b": torch.zeros(2)}}),
        ((nn.Parameter(torch.zeros(2)),), {"x": torch.device("cpu")}),
    ],
)
def test_calls_are_told_apart_as_by_a_walk(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    model = Net()
    reader = KindReader(model)
    for _ in range(2):
        assert reader(model, args, kwargs) == step_key(model, args, kwargs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert reader(model, args, kwargs) == step_key(model, args, kwargs)


def test_a_model_that_tells_its_own_parameters_is_asked() -> None:
    class Hidden(Net):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return iter(())

    model = Hidden()
    _stand(model)
    key = KindReader(model)(model, (), {})
    assert key == step_key(model, (), {})
    assert key != KindReader(Net())(model, (), {})  # which would see the gradient


def test_neither_the_model_nor_what_it_has_lost_is_held() -> None:
    model = Net()
    reader = KindReader(model)
    reader(model, (), {})
    head = weakref.ref(model.head)
    model.head = nn.Linear(4, 2)
    reader(model, (), {})
    assert head() is None
    rest, root = weakref.ref(model.scale), weakref.ref(model)
    del model
    gc.collect()
    assert root() is None
    del reader
    gc.collect()
    assert rest() is None
