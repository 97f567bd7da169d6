"""Loops of accelerate: a plan that is applied before `prepare`, after it, or in the first step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="the loops are accelerate's")

import accelerate
import torch
from accelerate.state import AcceleratorState
from hf_training import BATCH, LENGTH, llama
from models import same_bits

import keepless
from keepless.capture import standing_forward

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*:FutureWarning")]


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    """Accelerate has one state for each process, which each test sets otherwise."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def model() -> Any:
    return llama(attn_implementation="eager")


def loader() -> Any:
    ids = torch.randint(3, 128, (5 * BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    return torch.utils.data.DataLoader(rows, batch_size=BATCH)


def train(precision: str, when: str, budget: int = 0) -> tuple[dict[str, torch.Tensor], list[float], Any]:
    """Five steps, an evaluation between them, and what stands in the model after them."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    batches = loader()
    batch = next(iter(batches))
    if when == "before":
        with accelerator.autocast():
            keepless.fit(net, batch, budget, optimizer=optimizer)
    net, optimizer, batches = accelerator.prepare(net, optimizer, batches)
    if when == "after":
        keepless.fit(net, batch, budget, optimizer=optimizer)
    if when == "first":
        keepless.fit(net, None, budget, optimizer=optimizer)
    torch.manual_seed(7)
    losses = []
    for number, rows in enumerate(batches):
        optimizer.zero_grad()
        output = net(**rows)
        accelerator.backward(output.loss)
        optimizer.step()
        losses.append(output.loss.item())
        if number == 2:
            net.eval()
            with torch.no_grad():
                losses.append(net(**rows).loss.item())
            net.train()
    planned = standing_forward(accelerator.unwrap_model(net))
    state = copy.deepcopy({name: tensor.detach() for name, tensor in net.state_dict().items()})
    if when:
        assert planned is not None
        assert planned.counters.hits >= 4
        assert planned.counters.captures == 0
        keepless.remove(net)  # also where accelerate's wrapper stands around it
        before = planned.counters.steps
        net(**rows).loss.backward()
        assert planned.counters.steps == before
        assert planned.is_out
    return state, losses, planned


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.exhaustive)])
def test_before_after_and_in_the_first_step(precision: str) -> None:
    """The same bits each time."""
    net = model()
    batch = next(iter(loader()))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        estimate = keepless.estimate(net, batch, optimizer=torch.optim.AdamW(net.parameters()))
    budget = (estimate.smallest_budget + estimate.plain_budget) // 2
    plain, losses, _ = train(precision, "")
    for when in ("before", "after", "first"):
        state, own, _ = train(precision, when, budget)
        assert losses == own, when
        assert [name for name in plain if not same_bits(plain[name], state[name])] == [], when


def test_a_plan_beneath_a_wrapper_is_verified_and_replaced() -> None:
    """It lets calls through while another is planned, and for good where another is applied."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    net, batch = model(), next(iter(loader()))
    with accelerator.autocast():
        keepless.fit(net, batch, "1GiB")
    first = standing_forward(net)
    net = accelerator.prepare(net)
    assert first is not None
    assert net.__dict__["forward"] is not first
    assert standing_forward(net) is first
    plan = keepless.plan(net, batch, "1GiB")
    assert keepless.verify(net, batch, plan).equal
    assert not first.is_out
    keepless.apply(net, plan)
    second = standing_forward(net)
    assert second is not first
    assert first.is_out
    net(**batch).loss.backward()
    assert second is not None
    assert second.counters.hits == 1
    assert first.counters.hits == 0
    keepless.remove(net)
    assert first.is_out
    assert second.is_out
