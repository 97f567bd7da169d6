"""Plans whose reserved bytes are bounded, as on CUDA: the card's allocator is given here, and the step is the CPU's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models as zoo
import pytest
import torch
from torch import nn

import keepless
from keepless.control.allocating import allocation_of, restated
from keepless.control.captured import beyond_peak
from keepless.cost import CostModel
from keepless.errors import InfeasibleBudget
from keepless.machine import make_plan, simulate
from keepless.machine.allocation import CUBLAS_DEFAULT
from keepless.measure.card import CardAllocator, card_allocator

MIB = 1 << 20
CARD = CardAllocator((CUBLAS_DEFAULT,), context=300 * MIB)


def stack(depth: int = 3, width: int = 512, rows: int = 1024) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(depth)]
    return zoo.Loss(nn.Sequential(*blocks)), torch.randn(rows, width)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> CardAllocator:
    found: CardAllocator = getattr(request, "param", CARD)
    monkeypatch.setattr("keepless.control.planning.card_allocator", lambda device: found)
    return found


def room(nbytes: int) -> int:
    """Bytes of a budget less the default reserve."""
    return nbytes - 64 * 1024 - nbytes // 1000


def check(plan: keepless.Plan, card: CardAllocator) -> None:
    """Reserved bytes are within the budget; what the plan says of them is what its program gives."""
    found = plan.allocation
    assert found is not None
    assert found == allocation_of(plan.graph, plan.program, plan.cost, card)
    assert found.reserved <= room(plan.budget.limits["device"])
    assert plan.predicted_peak <= found.requested <= found.allocated <= found.reserved


@pytest.mark.slow
@pytest.mark.parametrize("card", [CARD, CardAllocator((CUBLAS_DEFAULT,), expandable=True)], indirect=True)
def test_the_budget_bounds_reserved_bytes(card: CardAllocator, tmp_path: Path) -> None:
    model, batch = stack(rows=1536)
    optimizer = torch.optim.AdamW(model.parameters())
    options: dict[str, Any] = {"optimizer": optimizer, "cache": True, "release_outputs": True}
    widest = keepless.plan(model, batch, "4GiB", **options)
    check(widest, card)
    for share in (0.0, 0.4):
        nbytes = int(widest.smallest_budget + share * (widest.baseline_peak - widest.smallest_budget))
        plan = keepless.plan(model, batch, nbytes, **options)
        check(plan, card)
        if share == 0.0 and not card.expandable:  # a share of the budget, as on the CPU, would not do
            assert plan.budget.reserve > nbytes - room(nbytes) + CUBLAS_DEFAULT + 2 * MIB
        assert "CUDA allocator" in str(plan)
        plan.save(tmp_path / "step.plan")
        assert keepless.load(tmp_path / "step.plan").allocation == plan.allocation
    assert widest.smallest_budget < widest.baseline_peak
    with pytest.raises(InfeasibleBudget, match="is too small") as caught:
        keepless.plan(model, batch, int(widest.smallest_budget * 0.9), **options)
    assert keepless.plan(model, batch, caught.value.smallest_budget, **options).allocation is not None


@pytest.mark.slow
def test_plans_of_a_curve_are_bounded_alike(card: CardAllocator) -> None:
    model, batch = stack(depth=2)
    curve = keepless.curve(model, batch, points=4, strategies=(), cache=True)
    check(curve.plan("4GiB"), card)
    check(curve.plan(curve.plan("4GiB").smallest_budget), card)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["blocks", "eager"])
def test_plans_of_module_calls_too(card: CardAllocator, engine: str) -> None:
    model, batch = stack(depth=2)
    options: dict[str, Any] = {"engine": engine, "cache": True}
    if engine == "blocks":
        options["blocks"] = "module.*"
    widest = keepless.plan(model, batch, "4GiB", **options)
    two = card.with_handles(2)
    check(widest, two)
    plan = keepless.plan(model, batch, (widest.smallest_budget + widest.baseline_peak) // 2, **options)
    check(plan, two)


def test_other_shapes_are_planned_for_as_much_beside_tensors(card: CardAllocator) -> None:
    model, batch = stack()
    widest = keepless.plan(model, batch, "4GiB", cache=True)
    nbytes = (widest.smallest_budget + widest.baseline_peak) // 2
    plan = keepless.plan(model, batch, nbytes, cache=True)
    keepless.apply(model, plan, background=False)
    model(batch[:900]).backward()
    entry = model.__dict__["forward"].entries[0]
    assert entry.binding.graph is not plan.graph
    free = CostModel((0.0,) * len(entry.binding.graph.ops), (0,) * len(entry.binding.graph.ops))
    assert simulate(entry.binding.graph, entry.program, free).peak <= room(nbytes) - beyond_peak(plan)
    keepless.remove(model)


def test_on_the_cpu_no_card_is_asked() -> None:
    assert card_allocator(torch.device("cpu")) is None
    model, batch = stack(depth=1, width=16)
    assert keepless.plan(model, batch, "1GiB", cache=True).allocation is None


def test_a_plan_of_the_cpu_is_shown_with_a_cards_allocator(tmp_path: Path) -> None:
    runner = pytest.importorskip("typer.testing").CliRunner()
    app = pytest.importorskip("keepless.cli.app").app
    model, batch = stack(depth=1, width=64)
    keepless.plan(model, batch, "1GiB").save(tmp_path / "step.plan")
    command = ["show", str(tmp_path / "step.plan"), "--json", "--allocator"]
    plain, expandable = (
        json.loads(runner.invoke(app, [*command, text]).stdout)["allocation"]
        for text in ("segments", "expandable:1MiB")
    )
    assert (plain["mode"], plain["workspaces"]) == ("segments", 0)
    assert (expandable["mode"], expandable["workspaces"]) == ("expandable segments", MIB)
    assert expandable["requested"] == plain["requested"] + MIB
    for wrong in ("pages", "segments:much"):
        assert runner.invoke(app, [*command, wrong]).exit_code == 2


def test_a_plan_that_is_made_again_has_the_allocation_of_its_own_program(card: CardAllocator) -> None:
    model, batch = stack(depth=2)
    widest = keepless.plan(model, batch, "4GiB", cache=True)
    plan = keepless.plan(model, batch, widest.smallest_budget, cache=True)
    assert restated(plan)
    check(plan, card)
    other = make_plan(
        plan.graph,
        widest.program,
        plan.cost,
        widest.budget,
        plan.certificate,
        baseline=plan.baseline,
        signature=plan.signature,
    )
    assert restated(other)
    assert other.allocation == widest.allocation != plan.allocation
    other.budget = plan.budget
    assert not restated(other)


def test_a_plan_for_a_card_that_is_not_there_has_its_allocator() -> None:
    model, batch = stack(depth=2)
    plan = keepless.plan(model, batch, "4GiB", on="rtx4090")
    found = plan.allocation
    assert found is not None
    assert found.workspaces == CUBLAS_DEFAULT
    assert found.requested <= found.allocated <= found.reserved <= room(4 << 30)


@pytest.mark.slow
def test_budgets_in_the_middle_are_made_use_of() -> None:
    """Fragmentation differs from program to program: a margin in the later rounds meets a budget by a fast plan."""
    model, batch = stack(depth=8)
    widest = keepless.plan(model, batch, "4GiB", on="rtx4090")
    smallest = keepless.plan(model, batch, widest.smallest_budget, on="rtx4090")
    for share in (0.5, 0.8):
        nbytes = int(widest.smallest_budget + share * (widest.baseline_peak - widest.smallest_budget))
        plan = keepless.plan(model, batch, nbytes, on="rtx4090")
        assert plan.allocation is not None
        assert 0.75 * nbytes < plan.allocation.reserved <= room(nbytes)
        assert plan.predicted_seconds < smallest.predicted_seconds
