"""Timelines and accounts on a CUDA device: the allocator's bytes at each mark against the prediction."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import keepless  # noqa: E402
from keepless.ir import Run  # noqa: E402
from keepless.reporting import predicted_steps  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def subject() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    parts = [torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.GELU(), torch.nn.Dropout()) for _ in range(6)]
    model = keepless.with_loss(torch.nn.Sequential(*parts).cuda(), lambda output, _: output.square().mean())
    return model, torch.randn(4096, 512, device="cuda")


def test_measured_bytes_are_the_predicted_ones() -> None:
    """At every op within 2 % of the peak, and the residue at the peak within 1 %."""
    model, batch = subject()
    optimizer = torch.optim.AdamW(model.parameters())
    plan = keepless.plan(model, batch, "8GiB", optimizer=optimizer, solver="every_k", cache=False)
    found = keepless.timeline(model, batch, plan, repeats=2)
    assert len(found.events) >= len(plan.program) - 2
    for event in found.events:
        if isinstance(plan.program[event.index], Run):
            assert abs(event.peak - plan.predicted.events[event.index].peak) <= 0.02 * plan.predicted_peak
    account = keepless.account(model, batch, plan)
    assert abs(account.residue) <= 0.01 * account.measured


def test_an_estimate_has_an_allocation() -> None:
    """What the allocator holds for both programs is stated; kinds of steps are ordered."""
    model, batch = subject()
    found = keepless.estimate(model, batch, optimizer=torch.optim.AdamW(model.parameters()))
    assert len(found.allocations) == 2
    assert found.plain_budget >= found.allocations[0].reserved
    steps = predicted_steps(found.plain)
    assert steps["first"].peak <= steps["steady"].peak
