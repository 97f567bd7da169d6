"""What a model keeps of one step stands beside the next one: steps of a loop stay within the budget, too."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_module_bytes import Around, plan_between
from torch import nn

import keepless
from keepless.measure.steps import increments

Keep = Callable[["Keeps", torch.Tensor, int], None]
"""What a model does with the tensor behind a block, which has a number."""
CPU = torch.device("cpu")
STEPS = 7


class Keeps(Around):
    """Keeps something of its forward."""

    def __init__(self, keep: Keep) -> None:
        super().__init__(lambda blocks, x: x, times=(1, 4, 4, 1))
        self.keep = keep
        self.features: Any = []

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss."""
        self.pending: list[torch.Tensor] = []
        x = self.embed(x)
        for number, block in enumerate(self.blocks):
            x = x + block(x)
            self.keep(self, x, number)
        return {"loss": x.square().mean()}


def _at_the_begin(model: Keeps, x: torch.Tensor, number: int) -> None:
    if number == 0:
        model.features = []
    model.features.append((x * 2).detach())


def _at_the_end(model: Keeps, x: torch.Tensor, number: int) -> None:
    model.pending.append((x * 2).detach())
    if number == len(model.blocks) - 1:
        model.features = model.pending


def _one_by_one(model: Keeps, x: torch.Tensor, number: int) -> None:
    model.features = {**(model.features or {}), number: (x * 2).detach()}


def _with_graph(model: Keeps, x: torch.Tensor, number: int) -> None:
    model.pending.append(x * 2)
    if number == len(model.blocks) - 1:
        model.features = model.pending


def _of_three_steps(model: Keeps, x: torch.Tensor, number: int) -> None:
    if not isinstance(model.features, deque):
        model.features = deque(maxlen=3)
    if number == 1:
        model.features.append((x * 2).detach())


def _of_five_steps(model: Keeps, x: torch.Tensor, number: int) -> None:
    if not isinstance(model.features, deque):
        model.features = deque(maxlen=5)
    if number == 1:
        model.features.append((x * 2).detach())


def _table(model: Keeps, x: torch.Tensor, number: int) -> None:
    if not len(model.features):
        model.features = torch.ones(4096, 64)
    x.add(model.features[: len(x)])


def _table_and_features(model: Keeps, x: torch.Tensor, number: int) -> None:
    if "table" not in model.__dict__:
        model.__dict__["table"] = torch.ones(4096, 64)
    _at_the_end(model, x + model.__dict__["table"][: len(x)], number)


KEEPS = [
    _at_the_begin,
    _at_the_end,
    _one_by_one,
    _with_graph,
    _of_three_steps,
    _of_five_steps,
    _table,
    _table_and_features,
]


def made(keep: Keep) -> tuple[Keeps, dict[str, torch.Tensor]]:
    """A model and its batch."""
    torch.manual_seed(0)
    return Keeps(keep), {"x": torch.randn(2048, 64)}


def trained(model: nn.Module, batch: Any, between: Callable[[], object] = lambda: None) -> list[float]:
    """Losses of a loop."""
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        del loss
        optimizer.step()
        between()
    return losses


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("engine", ["blocks", "eager"])
def test_steps_of_a_loop_stay_within_the_budget(engine: str, share: float, keep: Keep) -> None:
    model, batch = made(keep)
    plan = plan_between(model, batch, share, engine=engine, cache=False)
    assert not model.features  # planning leaves nothing behind
    start = plan.graph.start_nbytes
    fresh, _ = made(keep)
    plain = trained(fresh, batch)
    fresh, _ = made(keep)
    keepless.apply(fresh, plan)
    losses: list[float] = []
    peak = start + increments(lambda: losses.extend(trained(fresh, batch)), CPU)
    assert losses == plain
    assert peak <= plan.budget.limits["device"]
    assert 0.985 * peak <= plan.predicted_peak <= 1.03 * peak


def test_verify_and_timeline_look_at_a_step_of_a_loop() -> None:
    model, batch = made(_of_three_steps)
    plan = plan_between(model, batch, 0.0, engine="blocks", cache=False)
    planned = plan.measured_peak
    seen = keepless.verify(model, batch, plan)
    assert seen.equal
    assert seen.measured_peak == pytest.approx(planned, rel=0.002)
    timeline = keepless.timeline(model, batch, plan)
    assert max(event.peak for event in timeline.events) == pytest.approx(planned, rel=0.002)


def test_what_the_loop_empties_is_not_counted() -> None:
    """A list that grows with each forward, unless the loop clears it."""

    def keep(model: Keeps, x: torch.Tensor, number: int) -> None:
        model.features.append((x * 2).detach())

    model, batch = made(keep)
    plan = plan_between(model, batch, 0.0, engine="blocks", cache=False)
    keepless.apply(model, plan)
    peak = plan.graph.start_nbytes + increments(lambda: trained(model, batch, model.features.clear), CPU)
    assert peak <= plan.budget.limits["device"]
    assert plan.predicted_peak <= 1.03 * peak


class Carries(Around):
    """Goes on with a state of the step before, which the loop detaches between two."""

    def __init__(self) -> None:
        super().__init__(lambda blocks, x: x, times=(1, 4, 1))
        self.state: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss."""
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        if self.state is not None:
            x = x + self.state
        self.state = x * 0.5
        return {"loss": x.square().mean()}


@pytest.mark.parametrize("engine", ["blocks", "eager"])
def test_a_state_that_the_loop_detaches_can_be_planned_for(engine: str) -> None:
    torch.manual_seed(0)
    model, batch = Carries(), {"x": torch.randn(2048, 64)}
    plain = copy.deepcopy(model)
    plan = plan_between(model, batch, 0.0, engine=engine, cache=False)
    assert model.state is None

    def detached(one: Carries) -> Callable[[], object]:
        def detach() -> None:
            assert one.state is not None
            one.state = one.state.detach()

        return detach

    expected = trained(plain, batch, detached(plain))
    keepless.apply(model, plan)
    losses: list[float] = []
    peak = increments(lambda: losses.extend(trained(model, batch, detached(model))), CPU)
    assert losses == expected
    assert plan.graph.start_nbytes + peak <= plan.budget.limits["device"]
