"""Plans of blocks and of module calls on CUDA: bits, measured peaks, predictions."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Blocks(torch.nn.Module):
    """Residual blocks with dropout and a branch on data."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.LayerNorm(width),
                torch.nn.Linear(width, 4 * width),
                torch.nn.GELU(),
                torch.nn.Dropout(0.1),
                torch.nn.Linear(4 * width, width),
            )
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if x.abs().max().item() < 1e6:
                x = x + block(x)
        return x.square().mean()


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("engine", ["blocks", "eager"])
def test_a_plan_of_module_calls_keeps_its_budget(engine: str, share: float) -> None:
    import keepless

    torch.manual_seed(0)
    model = Blocks(8, 512).cuda()
    x = torch.randn(2048, 512, device="cuda")
    everything = keepless.plan(model, x, "8GiB", engine=engine)
    low, high = everything.smallest_budget, everything.baseline_peak
    plan = keepless.plan(model, x, int(low + share * (high - low)), engine=engine)
    found = keepless.verify(model, x, plan, repeats=1)
    assert found.equal, found.differences
    assert found.reference == "plain eager"
    assert found.measured_peak <= plan.budget.limits["device"]
