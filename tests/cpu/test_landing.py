"""Landing: a plan's prediction is corrected by its own step, within the budget, and nothing of the user's changes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import zoo

import keepless
from keepless.control import landing, planned_forward
from keepless.control.trial_steps import Seen, TrialSteps
from keepless.errors import InfeasibleBudget, LossError, ParameterError, PlanError
from keepless.ir import Budget, Phase
from keepless.machine import make_plan, simulate


class Net(torch.nn.Module):
    """Blocks with dropout and a running statistic, wide enough that a plan has a choice."""

    def __init__(self, width: int = 64, count: int = 4) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(width, 4 * width),
                torch.nn.BatchNorm1d(4 * width),
                torch.nn.GELU(),
                torch.nn.Dropout(0.1),
                torch.nn.Linear(4 * width, width),
            )
            for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss."""
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def net() -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(256, 64)


def mid(model: torch.nn.Module, batch: Any, **options: Any) -> keepless.Plan:
    """A plan half-way between the smallest budget and everything kept."""
    ends = keepless.plan(model, batch, "1GiB", cache=False, **options)
    return keepless.plan(model, batch, (ends.smallest_budget + ends.baseline_peak) // 2, cache=False, **options)


def distorted(plan: keepless.Plan, more: int) -> keepless.Plan:
    """The plan with costs that are wrong: every other op a hundred times slower, every op with so many bytes less or
    more of scratch, and a budget in which that program stands."""
    cost = replace(
        plan.cost,
        seconds=tuple(s * (100 if op % 2 else 1) for op, s in enumerate(plan.cost.seconds)),
        scratch=tuple(max(0, n + more) for n in plan.cost.scratch),
    )
    peak = simulate(plan.graph, plan.program, cost).peak
    limit = max(plan.budget.limits["device"], peak + plan.budget.reserve)
    wrong = make_plan(
        plan.graph,
        plan.program,
        cost,
        Budget({"device": limit}, plan.budget.reserve),
        plan.certificate,
        baseline=plan.baseline,
        signature=plan.signature,
        smallest_budget=plan.smallest_budget,
        smallest_bound=plan.smallest_bound,
    )
    wrong.capture = plan.capture
    return wrong


@pytest.mark.slow
def test_after_landing_the_prediction_is_right() -> None:
    """Scratch that was predicted far too high, and seconds that are nonsense: the landed plan predicts what it does."""
    model, batch = net()
    plan = distorted(mid(model, batch), 1 << 20)
    landed = keepless.land(model, batch, plan)
    first = landed.landing[0]
    assert first.predicted_peak == plan.predicted_peak
    assert first.peak_error > 0.2
    assert first.predicted_seconds == plan.predicted_seconds
    assert [one.round for one in landed.landing] == list(range(1, len(landed.landing) + 1))
    (kept,) = [one for one in landed.landing if one.is_kept]
    assert kept.measured_seconds == min(one.measured_seconds for one in landed.landing)
    assert landed.measured_peak == kept.measured_peak
    assert landed.predicted_peak == pytest.approx(kept.measured_peak, rel=0.005)
    seen = keepless.verify(model, batch, landed)
    assert seen.equal
    assert seen.measured_peak == pytest.approx(landed.predicted_peak, rel=0.005)
    assert seen.measured_peak <= plan.budget.limits["device"]
    assert landed.predicted_seconds == pytest.approx(kept.measured_seconds)
    assert plan.landing == ()


@pytest.mark.slow
def test_bytes_that_were_missed_are_found_within_the_budget() -> None:
    """Scratch that was predicted too low: the program that rises above the budget is not what is given out."""
    model, batch = net()
    kept = keepless.plan(model, batch, "1GiB", cache=False)
    none = replace(kept.cost, scratch=(0,) * len(kept.cost.scratch))
    peak = simulate(kept.graph, kept.program, none).peak
    over = replace(
        kept,
        cost=none,
        budget=Budget({"device": peak}),
        predicted=simulate(kept.graph, kept.program, none),
    )
    given = keepless.land(model, batch, over)
    assert given.landing[0].measured_peak > peak
    assert not given.landing[0].is_kept
    assert given.measured_peak is not None
    assert given.measured_peak <= peak
    assert given.predicted_peak <= peak


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 3])
def test_no_round_runs_a_program_above_the_budget(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is measured, what runs next is predicted to fit; what rose above the budget is never given out, and
    where all did, that is an error with the budget that would do."""
    model, batch = net()
    plan = mid(model, batch)
    limit = plan.budget.limits["device"]
    ran: list[keepless.Plan] = []

    class Grows:
        """A machine on which every step rises above the budget."""

        def run(self, plan: keepless.Plan, repeats: int) -> Seen:
            ran.append(plan)
            events = tuple(replace(event, peak=event.peak + (1 << 16)) for event in plan.predicted.events)
            peak = max(limit + 1, max(event.peak for event in events))
            return Seen(peak, plan.predicted_seconds, replace(plan.predicted, events=events, origin="measured"))

    trial: TrialSteps = Grows()
    with pytest.raises(InfeasibleBudget) as caught:
        landing._landed(plan, trial, rounds)
    assert caught.value.smallest_budget > limit
    assert 1 <= len(ran) <= rounds
    assert all(one.predicted_peak <= one.budget.device for one in ran)


@pytest.mark.slow
def test_a_slower_program_is_never_given_out() -> None:
    """The corrected plan turns out slower: the first one stays, and the rows say so."""
    model, batch = net()
    plan = distorted(mid(model, batch), 1 << 20)
    seconds = iter([1.0, 2.0, 3.0])
    true = mid(model, batch)

    class Slower:
        """A machine on which the first program is the fastest."""

        def run(self, plan: keepless.Plan, repeats: int) -> Seen:
            timeline = simulate(plan.graph, plan.program, true.cost)
            return Seen(timeline.peak, next(seconds), replace(timeline, origin="measured"))

    landed = landing._landed(plan, Slower(), 3)
    assert len(landed.landing) >= 2
    assert [one.is_kept for one in landed.landing] == [True] + [False] * (len(landed.landing) - 1)
    assert landed.program == plan.program


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["graph", "blocks", "eager"])
def test_nothing_of_the_users_changes(engine: str) -> None:
    """Parameters, buffers, gradients, generator, modes and a plan that stands: all as before; then the same bits."""
    model, batch = net()
    plan = mid(model, batch, engine=engine)
    plain = models.run_step(copy.deepcopy(model), keepless.Inputs(batch))
    keepless.apply(model, plan)
    standing = planned_forward(model) if engine == "graph" else model.__dict__["forward"]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: torch.full_like(p, 0.5) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = grads[name]
    generator = torch.get_rng_state()
    landed = keepless.land(model, batch, plan)
    assert model.__dict__["forward"] is standing
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    assert all(bool((grad == 0.5).all()) for grad in grads.values())
    assert all(models.same_bits(state[name], tensor) for name, tensor in model.state_dict().items())
    assert landed.engine == engine
    assert landed.measured_peak is not None
    assert landed.measured_peak <= plan.budget.limits["device"]
    assert landed.predicted_peak == pytest.approx(landed.measured_peak, rel=0.005)
    for p in model.parameters():
        p.grad = None
    keepless.remove(model)
    keepless.apply(model, landed)
    assert models.run_step(model, keepless.Inputs(batch)).differences(plain) == []


def test_a_failing_step_leaves_everything() -> None:
    """An error of the user's loss comes through, and the model is as it was."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 2))
    batch = torch.randn(16, 8)
    plan = keepless.plan(model, batch, "1GiB", loss_fn=lambda out, _: out.square().mean(), cache=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fails(output: Any, _: Any) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        keepless.land(model, batch, plan, loss_fn=fails)
    assert "forward" not in model.__dict__
    assert all(p.grad is None for p in model.parameters())
    assert all(models.same_bits(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_it_is_kept_in_the_file_and_printed(tmp_path: Path) -> None:
    """`plan(land=True)`: a file has the rounds, and a plan from a file lands, too."""
    workload = zoo.build("gpt2", "tiny")
    optimizer = torch.optim.AdamW(workload.model.parameters())
    plan = workload.plan(zoo.PLENTY, optimizer=optimizer, land=True, cache=False)
    assert plan.landing
    assert "landing, round 1" in str(plan)
    plan.save(tmp_path / "a.plan")
    loaded = keepless.load(tmp_path / "a.plan")
    assert loaded.landing == plan.landing
    again = keepless.land(workload.model, workload.batch(0)[0], loaded, optimizer=optimizer, rounds=1)
    assert len(again.landing) == 1
    step = next(op.id for op in plan.graph.ops if op.phase is Phase.OPTIMIZER)
    assert again.cost.scratch[step] == plan.cost.scratch[step]


def test_fit_lands() -> None:
    """The option goes through."""
    model, batch = net()
    keepless.fit(model, batch, "1GiB", land=True, cache=False)
    assert planned_forward(model) is not None


def test_bad_arguments_are_refused() -> None:
    """Typed errors before any step runs."""
    model, batch = net()
    plan = keepless.plan(model, batch, "1GiB", cache=False)
    for rounds in (0, 4, True, "3"):
        with pytest.raises(ParameterError, match="rounds"):
            keepless.land(model, batch, plan, rounds=rounds)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"not a keepless\.Plan"):
        keepless.land(model, batch, "step.plan")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="another step"):
        keepless.land(model, batch[:8], plan)
    with pytest.raises(ParameterError, match="counts no optimizer"):
        keepless.land(model, batch, plan, optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(ParameterError, match="meta"):
        keepless.land(Net().to("meta"), batch, plan)
    sgd = keepless.plan(model, batch, "1GiB", optimizer=torch.optim.SGD(model.parameters()), cache=False)
    with pytest.raises(ParameterError, match="counts 0 bytes"):
        keepless.land(model, batch, sgd, optimizer=torch.optim.AdamW(model.parameters()))


def test_a_loss_that_a_file_does_not_hold_is_asked_for(tmp_path: Path) -> None:
    """Plans of module calls with a loss of the caller's."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 2))
    batch = torch.randn(64, 8)

    def loss_fn(output: Any, _: Any) -> torch.Tensor:
        return output.square().mean()  # type: ignore[no-any-return]

    keepless.plan(model, batch, "1GiB", loss_fn=loss_fn, engine="eager", cache=False).save(tmp_path / "a.plan")
    plan = keepless.load(tmp_path / "a.plan")
    with pytest.raises(LossError):
        keepless.land(model, batch, plan)
    assert keepless.land(model, batch, plan, loss_fn=loss_fn, rounds=1).landing
