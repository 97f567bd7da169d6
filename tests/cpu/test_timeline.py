"""The measured timeline of a planned step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
import zoo

import keepless
from keepless.control import planned_forward
from keepless.errors import MeasureError, ParameterError, PlanError
from keepless.ir import Budget, Phase, Run
from keepless.machine import simulate
from keepless.solve import replan


@pytest.fixture(scope="module")
def subject() -> tuple[zoo.Workload, keepless.Plan]:
    """A small GPT-2 with dropout, and a plan with replays."""
    torch.manual_seed(0)
    workload = zoo.build("gpt2", "tiny")
    plan = workload.plan(zoo.PLENTY, release_outputs=True, cache=False)
    return workload, workload.plan(plan.smallest_budget, release_outputs=True, cache=False)


@pytest.mark.slow
def test_every_instruction_has_an_event(subject: tuple[zoo.Workload, keepless.Plan]) -> None:
    """In order, without gaps; only the optimizer's step, and what follows the last delivery, is not seen."""
    workload, plan = subject
    assert plan.num_replays > 0
    found = keepless.timeline(workload.model, workload.batch(0)[0], plan, repeats=2)
    assert found.origin == "measured"
    assert [event.index for event in found.events] == list(range(len(found.events)))
    left = [instr for instr in plan.program.instrs[len(found.events) :] if isinstance(instr, Run)]
    assert all(plan.graph.ops[run.op].name == "keepless.optimizer" for run in left)
    assert len(left) <= 1
    assert all(b.start == a.end >= a.start for a, b in zip(found.events, found.events[1:], strict=False))
    assert found.events[0].start == 0
    assert all(event.end > event.start for event in found.events if isinstance(plan.program[event.index], Run))
    assert all(event.stall == 0.0 for event in found.events)


STATE = torch.get_rng_state().nbytes


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "resnet50"])
def test_bytes_are_measured_instruction_by_instruction(name: str, accumulate: bool) -> None:
    """They are the predicted ones, but for the generator's state, which the prediction counts as scratch, and numbers
    that torch wraps; where gradients are added to others, also for those that autograd has not yet freed: they are
    handed over together, up to 64 KiB."""
    workload = zoo.build(name)
    optimizer = torch.optim.AdamW(workload.model.parameters())
    options: dict[str, Any] = {"optimizer": optimizer, "release_outputs": True, "accumulate": accumulate}
    plan = workload.plan(zoo.PLENTY, cache=False, solver="every_k", **options)
    assert plan.num_replays > 0
    found = keepless.timeline(workload.model, workload.batch(0)[0], plan, repeats=1)
    off = 2 * STATE + 64 + accumulate * 70 * 1024
    runs = [event for event in found.events if isinstance(plan.program[event.index], Run)]
    assert len(runs) >= len(plan.graph.ops) - 1
    for mine in runs:
        theirs = plan.predicted.events[mine.index]
        assert abs(mine.peak - theirs.peak) <= off, plan.graph.where(plan.graph.ops[plan.program[mine.index].op])
    highest = max(event.peak for event in plan.predicted.events[: len(found.events)])
    assert abs(found.peak - highest) <= 2 * STATE
    account = keepless.account(workload.model, workload.batch(0)[0], plan)
    assert account.account.index == plan.predicted.peak_index
    assert abs(account.residue) <= 2 * STATE
    assert account.measured == account.account.peak + account.residue
    assert sum(sum(row.values()) for row in account.account.modules.values()) == account.account.peak


@pytest.mark.slow
def test_an_op_that_needs_more_than_was_predicted_is_a_residue() -> None:
    """Bytes that the cost model does not know are shown, and where."""
    workload = zoo.build("gpt2")
    plan = workload.plan(zoo.PLENTY, release_outputs=True, cache=False)
    op = max(plan.graph.ops, key=lambda op: plan.cost.scratch[op.id])
    missing = plan.cost.scratch[op.id]
    assert missing > 100_000
    scratch = tuple(0 if plan.graph.ops[i].key == op.key else s for i, s in enumerate(plan.cost.scratch))
    cost = replace(plan.cost, scratch=scratch)
    poorer = replace(plan, cost=cost, predicted=simulate(plan.graph, plan.program, cost))
    account = keepless.account(workload.model, workload.batch(0)[0], poorer)
    assert account.worst == pytest.approx(missing, abs=2 * STATE)
    assert account.worst_where.startswith(op.name)


@pytest.mark.parametrize("engine", ["blocks", "eager"])
def test_plans_of_module_calls_have_phases(engine: str) -> None:
    """Forward, loss and backward, whose highest bytes are those of the step as planning measured it."""
    workload = zoo.build("gpt2", "tiny")
    plan = workload.plan(zoo.PLENTY, release_outputs=True, cache=False, engine=engine)
    found = keepless.timeline(workload.model, workload.batch(0)[0], plan, repeats=1)
    assert [(event.index, event.label) for event in found.events] == [(-1, "forward"), (-1, "loss"), (-1, "backward")]
    assert found.peak == plan.measured_peak
    account = keepless.account(workload.model, workload.batch(0)[0], plan)
    assert account.measured == found.peak
    assert account.account.phase == "backward"
    assert "residue" in str(account)
    with pytest.raises(PlanError, match="another batch"):
        keepless.timeline(workload.model, {n: t[:1] for n, t in workload.batch(0)[0].items()}, plan)


def test_a_running_profiler_is_refused(subject: tuple[zoo.Workload, keepless.Plan]) -> None:
    """Its events cannot be told from the measurement's; the model is left as it was."""
    workload, plan = subject
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), pytest.raises(MeasureError):
        keepless.timeline(workload.model, workload.batch(0)[0], plan, repeats=1)
    assert all(p.grad is None for p in workload.model.parameters())
    assert planned_forward(workload.model) is None


def test_the_model_is_left_as_it_was(subject: tuple[zoo.Workload, keepless.Plan]) -> None:
    """Gradients, generator and an applied plan stay; a step afterwards has the same bits as a plain one."""
    workload, plan = subject
    inputs = keepless.Inputs(**workload.batch(0)[0])
    plain = models.run_step(copy.deepcopy(workload.model), inputs)
    keepless.apply(workload.model, plan)
    try:
        before, state = planned_forward(workload.model), torch.get_rng_state()
        grad = torch.zeros_like(next(workload.model.parameters()))
        next(workload.model.parameters()).grad = grad
        keepless.timeline(workload.model, workload.batch(0)[0], plan, repeats=1)
        assert planned_forward(workload.model) is before
        assert next(workload.model.parameters()).grad is grad
        assert torch.equal(torch.get_rng_state(), state)
        next(workload.model.parameters()).grad = None
        assert models.run_step(workload.model, inputs).differences(plain) == []
    finally:
        keepless.remove(workload.model)


@pytest.mark.slow
def test_it_corrects_the_costs(subject: tuple[zoo.Workload, keepless.Plan]) -> None:
    """Of every op that ran, so that the predicted step is the measured one; and a plan follows."""
    workload, plan = subject
    found = keepless.timeline(workload.model, workload.batch(0)[0], plan, repeats=3)
    budget = Budget({"device": plan.budget.device})
    better, again = replan(plan.graph, plan.cost, plan.program, found, budget)
    changed = {op.id for op in plan.graph.ops if better.seconds[op.id] != plan.cost.seconds[op.id]}
    assert {op.id for op in plan.graph.ops if op.phase is Phase.FORWARD} <= changed
    assert again.peak <= plan.budget.device


def test_a_loss_of_the_callers_counts_for_the_loss_op() -> None:
    """Its event has the time between forward and backward."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 2))
    batch = torch.randn(64, 8)
    calls = []

    def loss_fn(output: Any, _: Any) -> torch.Tensor:
        calls.append(1)
        return output.square().mean()  # type: ignore[no-any-return]

    plan = keepless.plan(model, batch, "1GiB", loss_fn=loss_fn, cache=False)
    calls.clear()
    found = keepless.timeline(model, batch, plan, repeats=2)
    assert len(calls) == 4  # one warms up, two are timed, one tells bytes
    (loss,) = [e for e in found.events if isinstance(i := plan.program[e.index], Run) and i.op == plan.graph.loss_op]
    assert loss.end > loss.start


def test_bad_arguments_are_refused(subject: tuple[zoo.Workload, keepless.Plan]) -> None:
    """Typed errors before any step runs."""
    workload, plan = subject
    batch = workload.batch(0)[0]
    for repeats in (0, True, "3", 10**6):
        with pytest.raises(ParameterError, match="repeats"):
            keepless.timeline(workload.model, batch, plan, repeats=repeats)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"not a keepless\.Plan"):
        keepless.timeline(workload.model, batch, "step.plan")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="another step"):
        keepless.timeline(workload.model, {name: tensor[:1] for name, tensor in batch.items()}, plan)
