"""A tied embedding's gradient: its two parts are added in place, so that two buffers of its size stand, not three."""

from __future__ import annotations

import pytest
import torch
import zoo

import keepless
from keepless.ir import Kind, Phase, Program, Run
from keepless.machine import simulate
from keepless.passes import from_order, reuse_storage
from keepless.reporting.account import holdings

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH = 4096, 32
NBYTES = 4 * VOCABULARY * WIDTH


@pytest.fixture(scope="module")
def subject() -> tuple[torch.nn.Module, dict[str, torch.Tensor], keepless.Plan]:
    """A GPT-2 whose peak is in its vocabulary, and a plan of it."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=16, use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config).train()
    model.loss_type = "ForCausalLM"
    ids = torch.randint(0, VOCABULARY, (1, 8))
    batch = {"input_ids": ids, "labels": ids}
    return model, batch, keepless.plan(model, batch, zoo.PLENTY, release_outputs=True, cache=False)


def most_buffers(plan: keepless.Plan, program: Program) -> int:
    """The most values of the embedding's size that stand in the backward at once, beside the parameter."""
    graph = plan.graph
    large = {v.id for v in graph.values if v.nbytes == NBYTES and v.kind is not Kind.PARAM}
    timeline = simulate(graph, program, plan.cost)
    return max(len(held.values & large) for held in holdings(graph, program, timeline))


def test_two_buffers_stand_at_most(subject: tuple[torch.nn.Module, dict[str, torch.Tensor], keepless.Plan]) -> None:
    """Both parts, of which one becomes the sum; without reuse of storage there are three."""
    _, _, plan = subject
    order = range(len(plan.graph.ops))
    plain = from_order(plan.graph, order)
    assert most_buffers(plan, plain) == 3
    assert most_buffers(plan, reuse_storage(plan.graph, plain)) == 2
    assert most_buffers(plan, plan.program) == 2


def test_the_measured_step_holds_no_more(
    subject: tuple[torch.nn.Module, dict[str, torch.Tensor], keepless.Plan],
) -> None:
    """Where the sum is made, and at the peak, measured bytes are the predicted ones; a third buffer would show."""
    model, batch, plan = subject
    found = keepless.timeline(model, batch, plan, repeats=1)
    by_index = {event.index: event for event in found.events}
    graph = plan.graph
    sums = [
        index
        for index, instr in enumerate(plan.program)
        if isinstance(instr, Run)
        and graph.ops[instr.op].phase is Phase.BACKWARD
        and any(graph.values[v].nbytes == NBYTES for v in instr.keep)
        and instr.reuse
    ]
    assert sums
    for index in sums:
        assert abs(by_index[index].peak - plan.predicted.events[index].peak) < NBYTES / 20
    assert abs(found.peak - plan.predicted_peak) < NBYTES / 20
    assert plan.predicted_peak < graph.static_nbytes + 3 * NBYTES
