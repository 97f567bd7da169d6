"""The measured timeline of a planned step."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
import zoo

import keepless
from keepless.control import planned_forward
from keepless.errors import ParameterError, PlanError
from keepless.ir import Budget, Phase, Run
from keepless.solve import replan


@pytest.fixture(scope="module")
def subject() -> tuple[zoo.Workload, keepless.Plan]:
    """A small GPT-2 with dropout, and a plan with replays."""
    torch.manual_seed(0)
    workload = zoo.build("gpt2", "tiny")
    plan = workload.plan(zoo.PLENTY, release_outputs=True, cache=False)
    return workload, workload.plan(plan.smallest_budget, release_outputs=True, cache=False)


def test_every_instruction_has_an_event(subject: tuple[zoo.Workload, keepless.Plan]) -> None:
    """In order, without gaps, with the predicted bytes; only what follows the last delivery is not seen."""
    workload, plan = subject
    assert plan.num_replays > 0
    found = keepless.timeline(workload.model, workload.batch(0)[0], plan, repeats=2)
    assert found.origin == "measured"
    assert [event.index for event in found.events] == list(range(len(found.events)))
    left = [instr for instr in plan.program.instrs[len(found.events) :] if isinstance(instr, Run)]
    assert all(plan.graph.ops[run.op].name in ("keepless.deliver", "keepless.optimizer") for run in left)
    assert len(left) <= 2
    assert all(b.start == a.end >= a.start for a, b in zip(found.events, found.events[1:], strict=False))
    assert found.events[0].start == 0
    assert all(event.end > event.start for event in found.events if isinstance(plan.program[event.index], Run))
    for mine, theirs in zip(found.events, plan.predicted.events, strict=False):
        assert (mine.resident, mine.peak, mine.stall) == (theirs.resident, theirs.peak, 0.0)
    assert found.peak == plan.predicted_peak


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
    assert len(calls) == 3
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
