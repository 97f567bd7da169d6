"""Planning stays within the budget: ops for which it has no room are not run, and parameters are not copied."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch

from keepless.control import room
from keepless.control.trials import may_write, measure_costs, op_trials
from keepless.errors import InfeasibleBudget
from keepless.measure import measure_peak

MIB = 1 << 20


@pytest.mark.slow
def test_an_op_beyond_the_budget_is_not_run() -> None:
    """128 MiB of one op's output are not allocated to tell that 32 MiB do not suffice; with room they are measured."""
    found = measure_peak("targets:planning_within", {"kind": "large op", "budget": 32 * MIB}, steps=1)
    assert found.result["told"] is True
    assert found.result["smallest"] > 128 * MIB
    assert found.peak <= room.ALWAYS_NBYTES + found.result["state"] + MIB
    found = measure_peak("targets:planning_within", {"kind": "large op", "budget": 1 << 30}, steps=1)
    assert found.result["told"] is False
    assert found.peak > 128 * MIB


@pytest.mark.slow
def test_parameters_are_read_where_they_are() -> None:
    """64 MiB of frozen weights are not copied to time the op that reads them."""
    found = measure_peak("targets:planning_within", {"kind": "frozen", "budget": 1 << 30}, steps=1)
    assert found.result["state"] > 64 * MIB
    assert found.peak <= found.result["state"] + 8 * MIB


def test_costs_are_the_same_on_the_own_parameters() -> None:
    """Keys, inputs without parameters, and scratch bytes; what is not run says so."""
    model = models.convnet()
    _, binding = models.capture(model, torch.randn(4, 3, 8, 8))
    copied, own = op_trials(binding), op_trials(binding, model)
    assert [trial.key for trial in copied] == [trial.key for trial in own]
    made = [(a.input_nbytes, b.input_nbytes) for a, b in zip(copied, own, strict=True)]
    assert all(a >= b for a, b in made)
    assert any(a > b for a, b in made)
    before = [p.detach().clone() for p in model.parameters()]
    costs = measure_costs(binding, None, model=model, room=1 << 30)
    assert {key: cost.scratch for key, cost in costs.items()} == {
        key: cost.scratch for key, cost in measure_costs(binding, None).items()
    }
    assert all(cost.n > 0 for cost in costs.values())
    assert all(models.same_bits(a, b) for a, b in zip(before, model.parameters(), strict=True))
    least = min(trial.input_nbytes + trial.output_nbytes for trial in own)
    few = measure_costs(binding, None, model=model, room=least)
    assert few.keys() == costs.keys()
    assert 0 < sum(cost.n > 0 for cost in few.values()) < len(costs)


def test_ops_that_may_write_get_copies() -> None:
    """A schema says who writes; what has none may."""
    assert not may_write(torch.ops.aten.mm.default)
    assert may_write(torch.ops.aten.add_.Tensor)
    assert may_write(lambda x: x)


def test_a_call_of_a_planned_model_that_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan book refuses a batch whose ops are larger than the budget, and runs none of these."""
    import keepless
    from keepless.control.plan_book import similar

    monkeypatch.setattr(room, "ALWAYS_NBYTES", 0)
    model = models.mlp(width=64)
    rows: list[int] = []
    own = similar.measure_scratch

    def watched(trials: Any, **options: Any) -> Any:
        rows.extend(trial.input_nbytes + trial.output_nbytes for trial in trials)
        return own(trials, **options)

    monkeypatch.setattr(similar, "measure_scratch", watched)
    keepless.apply(model, keepless.plan(model, torch.randn(16, 8), "256KiB", cache=False))
    model(torch.randn(24, 8)).backward()
    assert rows
    with pytest.raises(InfeasibleBudget, match="not run"):
        model(torch.randn(4096, 8))
    assert max(rows) <= 256 << 10


class Frozen(torch.nn.Module):
    """A block that reads 1 MiB of frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.large = torch.nn.Linear(512, 512).requires_grad_(False)
        self.small = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, 8) in and out."""
        return self.small(torch.tanh(self.large(x.repeat(1, 64)))[:, :8])


@pytest.mark.slow
def test_ops_of_blocks_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's ops are measured on its own parameters, and those for which the budget has no room are not run."""
    import keepless
    from keepless.control import trials

    rows: list[int] = []
    own = trials.measure_ops

    def watched(given: Any, **options: Any) -> Any:
        rows.extend(trial.input_nbytes + trial.output_nbytes for trial in given)
        return own(given, **options)

    monkeypatch.setattr(trials, "measure_ops", watched)
    model = torch.nn.Sequential(Frozen(), Frozen(), Frozen())
    options: dict[str, Any] = {"engine": "blocks", "cache": False, "loss_fn": lambda out, _: out.square().mean()}
    plan = keepless.plan(model, torch.randn(4, 8), "1GiB", **options)
    assert plan.signature["segments"]
    assert rows
    assert max(rows) < MIB // 2
    rows.clear()
    monkeypatch.setattr(room, "ALWAYS_NBYTES", 0)
    state = sum(p.nbytes for p in model.parameters())
    with pytest.raises(InfeasibleBudget, match="not run"):
        keepless.plan(model, torch.randn(1024, 8), state + MIB, **options)
    assert rows
    assert max(rows) <= MIB


def test_estimates_run_what_the_device_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is larger than the device is left out, and it is said."""
    import keepless
    from keepless.control import estimating

    model, rows = models.mlp(width=64), list[int]()
    own = estimating.measure_scratch

    def watched(given: Any, **options: Any) -> Any:
        rows.extend(trial.input_nbytes + trial.output_nbytes for trial in given)
        return own(given, **options)

    monkeypatch.setattr(estimating, "measure_scratch", watched)
    whole = keepless.estimate(model, torch.randn(4096, 8))
    assert (whole.num_unrun, "left out" in str(whole)) == (0, False)
    largest = max(rows)
    rows.clear()
    monkeypatch.setattr(room, "ALWAYS_NBYTES", 0)
    monkeypatch.setattr(room, "device_nbytes", lambda device: largest - 1)
    part = keepless.estimate(model, torch.randn(4096, 8))
    assert part.num_unrun == part.as_dict()["num_unrun"] > 0
    assert "left out" in str(part)
    assert max(rows) < largest
    assert part.plain.predicted_peak <= whole.plain.predicted_peak
