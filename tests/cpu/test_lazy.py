"""Plans that are made in the first training step, from its own batch."""

from __future__ import annotations

import copy

import pytest
import torch
from models import same_bits
from torch import nn

import keepless


class Net(nn.Module):
    """Blocks with dropout; the loss is the output. `branch` looks at data, so that the step is not one graph."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 32)) for _ in range(4)
        )
        self.branch = branch

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        for block in self.blocks:
            if not self.branch or float(x.detach().abs().max()) > 0:
                x = x + block(x)
        return x.square().mean() * scale


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(64, 32), scale=2.0)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step == 0:
            model.eval()
            with torch.no_grad():
                losses.append(model(torch.ones(8, 32)))
            model.train()
    return [*losses, *(p.detach().clone() for p in model.parameters()), torch.get_rng_state()]


@pytest.mark.parametrize("branch", [False, True])
def test_first_call_plans(branch: bool) -> None:
    """Evaluation before it plans nothing; the first training call does, and gives plain's bits."""
    torch.manual_seed(0)
    model = Net(branch)
    plain = copy.deepcopy(model)
    expected = train(plain, torch.optim.AdamW(plain.parameters()))

    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(64, 32)
    low = keepless.plan(
        model, batch, 2**30, optimizer=optimizer, engine="blocks" if branch else "graph"
    ).smallest_budget
    budget = int(low * 1.05)
    plans: list[keepless.Plan] = []
    assert keepless.fit(model, None, budget, optimizer=optimizer, on_plan=plans.append) is model
    with torch.no_grad():
        model(batch)
    assert not plans
    assert all(same_bits(a, b) for a, b in zip(expected, train(model, optimizer), strict=True))
    assert len(plans) == 1
    plan = plans[0]
    assert (plan.engine == "graph") != branch  # which of the other two is faster differs from run to run
    assert plan.predicted_peak <= budget < plan.baseline_peak
    assert plan.num_replays > 0
    assert plan.recomputed_nbytes > 0
    keepless.remove(model)
    assert "forward" not in model.__dict__


def test_what_is_wrong_is_told() -> None:
    """A budget that cannot be read and an unknown option at once; an infeasible budget by the call, after which the
    model is as before and can be called again."""
    model = Net()
    with pytest.raises(keepless.BudgetError):
        keepless.fit(model, None, "8 bananas")
    with pytest.raises(TypeError, match="optimiser"):
        keepless.fit(model, None, "8GiB", optimiser=None)
    assert "forward" not in model.__dict__
    keepless.fit(model, None, 1000)
    rng = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(keepless.InfeasibleBudget):
            model(torch.ones(8, 32))
    assert same_bits(rng, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    keepless.remove(model)
    assert "forward" not in model.__dict__


def test_a_model_that_waits_is_copied_planned_and_verified() -> None:
    """What waits for the first step stands in nobody's way, and is gone where a plan is applied."""
    model, batch = Net(), torch.randn(16, 32)
    keepless.fit(model, None, "8GiB")
    waiting = model.__dict__["forward"]
    assert list(model.forward.__signature__.parameters) == ["x", "scale"]
    assert "forward" not in copy.deepcopy(model).__dict__ or copy.deepcopy(model).forward is not waiting
    plan = keepless.plan(model, batch, "8GiB")
    assert keepless.verify(model, batch, plan).equal
    assert model.__dict__["forward"] is waiting
    keepless.apply(model, plan)
    model(batch).backward()
    assert model.__dict__["forward"].counters.hits == 1
    keepless.remove(model)
    assert "forward" not in model.__dict__


def test_batches_of_all_kinds_of_calls() -> None:
    """A call's own arguments are the batch: one tensor, several, keywords, a dict in the first place."""
    from keepless.capture import Inputs
    from keepless.control import batch_of

    x, y = torch.ones(1), torch.ones(2)
    for inputs in (Inputs(x), Inputs(x, y), Inputs(a=x), Inputs(x, a=y), Inputs({"a": x}), Inputs((x, y)), Inputs()):
        again = Inputs.of(batch_of(inputs))
        assert (again.args, again.kwargs) == (inputs.args, inputs.kwargs)


def test_under_compile() -> None:
    """torch.compile's call plans, too, and runs the planned step."""
    model = Net()
    plans: list[keepless.Plan] = []
    keepless.fit(model, None, "8GiB", on_plan=plans.append)
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(4, 32)).backward()
    assert len(plans) == 1
    assert all(p.grad is not None for p in model.parameters())
