"""A card that really runs out of memory within a planned step: the step completes with the same bits, or says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import keepless  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("deterministic"),
]

MIB = 1 << 20


class Blocks(torch.nn.Module):
    """Blocks with dropout, whose activations are most of what a step takes."""

    def __init__(self, layers: int = 12, width: int = 512) -> None:
        super().__init__()
        made = []
        for _ in range(layers):
            made.append(
                torch.nn.Sequential(
                    torch.nn.Linear(width, 4 * width),
                    torch.nn.GELU(),
                    torch.nn.Dropout(0.1),
                    torch.nn.Linear(4 * width, width),
                )
            )
        self.blocks = torch.nn.ModuleList(made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def subject() -> tuple[Blocks, torch.Tensor]:
    torch.manual_seed(0)
    return Blocks().cuda(), torch.randn(4096, 512, device="cuda")


def step(model: Blocks, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(x)
    loss.backward()
    return [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters()), torch.rand(3, device="cuda").cpu()]


def cut_share(model: Blocks, nbytes: int) -> None:
    """From here on the process may have so many bytes of the card."""
    model.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(nbytes / torch.cuda.get_device_properties(0).total_memory)


def test_a_captured_step_goes_on_where_the_card_is_full(tmp_path: Path) -> None:
    """The process's share of the card is cut below what the plan needs: forward and backward go on with less kept."""
    model, x = subject()
    expected = step(model, x)
    model.zero_grad()
    plan = keepless.plan(model, x, "20GiB", engine="graph", cache=False)
    low, high = plan.smallest_budget, plan.baseline_peak
    keepless.apply(model, plan, black_box=tmp_path)
    assert all(map(torch.equal, step(model, x), expected))
    cut_share(model, low + (high - low) // 3)
    found = step(model, x)
    assert all(map(torch.equal, found, expected))
    counters = model.__dict__["forward"].counters
    print("ooms", counters.ooms, "tightened", counters.tightened, "low", low, "high", high)
    assert counters.ooms >= 1
    assert list(tmp_path.iterdir()), "no black box"
    before = counters.ooms
    assert all(map(torch.equal, step(model, x), expected))
    assert counters.ooms == before, "the tighter plan fits"


@pytest.mark.parametrize("engine", ["blocks", "eager"])
def test_steps_of_module_calls_go_on_or_are_told(engine: str, tmp_path: Path) -> None:
    """A forward begins anew with less kept; a backward ends in the typed error; the next steps are exact."""
    model, x = subject()
    expected = step(model, x)
    model.zero_grad()
    plan = keepless.plan(model, x, "20GiB", engine=engine, cache=False)
    low, high = plan.smallest_budget, plan.baseline_peak
    keepless.apply(model, plan, black_box=tmp_path)
    assert all(map(torch.equal, step(model, x), expected))
    cut_share(model, low + (high - low) // 2)
    told = 0
    found: Any = None
    for _ in range(6):
        try:
            found = step(model, x)
            break
        except keepless.OutOfMemory:
            told += 1
            model.zero_grad()
    print("told", told, [path.name for path in tmp_path.iterdir()])
    assert found is not None, "no step completed"
    assert all(map(torch.equal, found, expected))
    assert list(tmp_path.iterdir()), "no black box"
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(map(torch.equal, step(model, x), expected))


def test_torch_s_error_is_recognised() -> None:
    from keepless.measure.out_of_memory import is_out_of_memory

    torch.cuda.set_per_process_memory_fraction(0.01)
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        torch.empty(2000 * MIB, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(caught.value)
