"""The planned step on a CUDA device: same bits, peak within the budget."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import keepless  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_planned_step_is_equal_and_fits() -> None:
    """A model with dropout and BatchNorm trains at the smallest budget with the reference's bits."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *[
            torch.nn.Sequential(
                torch.nn.Linear(256, 256), torch.nn.BatchNorm1d(256), torch.nn.GELU(), torch.nn.Dropout()
            )
            for _ in range(8)
        ],
        torch.nn.Linear(256, 1),
    ).cuda()
    model = keepless.with_loss(model, lambda output, batch: output.mean())
    batch = torch.randn(4096, 256, device="cuda")
    widest = keepless.plan(model, batch, "16GiB")
    plan = keepless.plan(model, batch, widest.smallest_budget)
    result = keepless.verify(model, batch, plan)
    assert result.equal, result
    assert result.num_replays > 0
    assert result.measured_peak <= plan.budget.limits["device"], result
