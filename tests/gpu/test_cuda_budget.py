"""On a card: whole steps of bf16 models stay within the budget, reserved bytes included, where plain does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))


def metered(name: str, budget: int, share: float = 0.0) -> Any:
    from keepless.measure import measure_peak

    arguments = {"name": name, "quick": True, "device": "cuda", "budget": budget, "share": share, "timed": 0}
    return measure_peak("benchmarks.gpu:target", arguments, device="cuda", steps=3)


@pytest.mark.parametrize("name", ["llama", "vit", "unet3d"])
def test_whole_steps_stay_within_the_budget(name: str) -> None:
    from benchmarks import gpu

    workload = gpu.workload_of(name, True, "cuda")
    plan = workload.plan(gpu.zoo.PLENTY, **gpu.options_of(workload))
    low, high = plan.smallest_budget, plan.baseline_peak
    kept = metered(name, high)
    for budget in (low, (low + high) // 2):
        found = metered(name, budget)
        assert found.peak <= budget, (found.peak, budget)
        assert max(found.reserved) <= budget, (found.reserved, budget)
        assert found.result["losses"] == kept.result["losses"]
        assert found.result["state"] == kept.result["state"]


def test_plain_runs_out_of_memory_where_the_plan_trains() -> None:
    from benchmarks import gpu

    from keepless.errors import MeasureError
    from keepless.measure import device_nbytes, measure_peak

    workload = gpu.workload_of("llama", False, "cuda")
    low = workload.plan(gpu.zoo.PLENTY, **gpu.options_of(workload)).smallest_budget
    del workload
    budget = int(gpu.ROOM * low)
    share = budget / device_nbytes("cuda")
    arguments = {"name": "llama", "quick": False, "device": "cuda", "share": share, "timed": 0}
    with pytest.raises(MeasureError, match="OutOfMemoryError"):
        measure_peak("benchmarks.gpu:target", {**arguments, "budget": 0}, device="cuda", steps=3)
    found = measure_peak("benchmarks.gpu:target", {**arguments, "budget": budget}, device="cuda", steps=3)
    assert max(found.reserved) <= budget
