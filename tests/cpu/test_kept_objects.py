"""Tensors that a forward puts deep into its model: planning leaves nothing there, and no captured step is its plan."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import keepless
from keepless import CaptureError


class Box:
    """A plain object."""

    def __init__(self) -> None:
        self.held: Any = None
        self.count = 0


@dataclasses.dataclass
class Inner:
    """A part of another."""

    features: list[torch.Tensor]


@dataclasses.dataclass
class Outer:
    """Has a part."""

    inner: Inner


def _into_box(store: Any, x: torch.Tensor) -> None:
    store["box"].held = x
    store["box"].count += 1


def _into_boxes(store: Any, x: torch.Tensor) -> None:
    store["boxes"][0].held = x


def _into_part(store: Any, x: torch.Tensor) -> None:
    store["outer"].inner = Inner([x])


PLACES: dict[str, Callable[[Any, torch.Tensor], None]] = {
    "deque": lambda store, x: store["deque"].append(x),
    "defaultdict": lambda store, x: store["default"]["a"].append(x),
    "nested": lambda store, x: store["nested"]["a"].append(x),
    "object": _into_box,
    "object in a list": _into_boxes,
    "dataclass in a dataclass": _into_part,
}


class Keeps(nn.Module):
    """Keeps what comes out of its blocks."""

    def __init__(self, put: Callable[[Any, torch.Tensor], None]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3))
        self.put = put
        self.store: dict[str, Any] = {
            "deque": deque(maxlen=3),
            "default": defaultdict(list),
            "nested": {"a": []},
            "box": Box(),
            "boxes": [Box()],
            "outer": Outer(Inner([])),
        }

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss."""
        for block in self.blocks:
            x = x + block(x)
        self.put(self.store, x.detach())
        return {"loss": x.square().mean()}

    def found(self) -> list[Any]:
        """All that is kept."""
        store = self.store
        return [
            *store["deque"],
            *store["default"].get("a", ()),
            *store["nested"]["a"],
            store["box"].held,
            store["box"].count,
            store["boxes"][0].held,
            *store["outer"].inner.features,
        ]


@pytest.mark.parametrize("place", PLACES)
def test_a_captured_step_would_not_keep_them(place: str) -> None:
    """The trace's own tensors stood in the model for ever, and a step kept nothing."""
    torch.manual_seed(0)
    model, batch = Keeps(PLACES[place]), {"x": torch.randn(64, 16)}
    plain = copy.deepcopy(model)
    before = model.found()
    with pytest.raises(CaptureError, match="store"):
        keepless.plan(model, batch, "1GiB", engine="graph", cache=False)
    assert model.found() == before
    plan = keepless.plan(model, batch, "1GiB", cache=False)
    assert plan.engine in ("blocks", "eager")
    assert model.found() == before
    keepless.apply(model, plan)
    for _ in range(2):
        for one in (model, plain):
            one(**batch)["loss"].backward()
            one.zero_grad()
    for mine, other in zip(model.found(), plain.found(), strict=True):
        assert type(mine) is type(other)
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


@pytest.mark.parametrize("engine", ["graph", "blocks", "eager"])
def test_a_plan_can_be_copied(engine: str) -> None:
    """Whatever holds a plan may be copied deeply: torch crashes on tensors without data, which a capture holds."""
    torch.manual_seed(0)
    model = Keeps(lambda store, x: None)
    batch = {"x": torch.randn(64, 16)}
    plan = keepless.plan(model, batch, "1GiB", engine=engine, cache=False)
    copied = copy.deepcopy(plan)
    assert copied == plan
    assert copied is not plan
    assert copied.signature is not plan.signature
    assert keepless.verify(model, batch, copied).equal
