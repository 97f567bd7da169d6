"""The largest batch on a CUDA device: it trains within the budget, reserved bytes included."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import keepless  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_largest_batch_trains_within_the_budget() -> None:
    """Some hundred rows fit, one more does not plan, and the measured peak of the found size is within the budget."""
    torch.manual_seed(0)
    parts = [
        torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512)) for _ in range(6)
    ]
    model = keepless.with_loss(torch.nn.Sequential(*parts).cuda(), lambda output, batch: output.square().mean())
    budget = "1GiB"
    found = keepless.max_batch(model, lambda size: torch.randn(size, 512, device="cuda"), budget, multiple_of=64)
    assert found.ended_by == "memory"
    assert found.next_size == found.size + 64
    result = keepless.verify(model, torch.randn(found.size, 512, device="cuda"), found.plan)
    assert result.equal, result
    assert result.measured_peak <= found.budget, result
    with pytest.raises(keepless.InfeasibleBudget):
        keepless.plan(model, torch.randn(found.next_size, 512, device="cuda"), budget)
