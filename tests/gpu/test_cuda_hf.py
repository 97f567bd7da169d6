"""Hugging Face's Trainer on a CUDA device: bf16, the same bits, the allocator's peak within the budget."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

from hf_training import differences, llama, run  # noqa: E402

from keepless.integrations.hf import KeeplessCallback  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.usefixtures("deterministic")
def test_same_bits_within_the_budget(tmp_path: Path) -> None:
    """Five steps at bf16 with two batches in each; what is measured is what the allocator had at most."""
    options = {"use_cpu": False, "bf16": True, "gradient_accumulation_steps": 2}
    plain = run(tmp_path / "plain", llama(4), **options)
    roomy = KeeplessCallback("8GiB")
    run(tmp_path / "roomy", llama(4), [roomy], **options)
    assert roomy.plan is not None
    budget = (roomy.plan.smallest_budget + roomy.plan.baseline_peak) // 2
    callback = KeeplessCallback(budget)
    ran = run(tmp_path / "kept", llama(4), [callback], **options)
    assert differences(plain, ran) == []
    assert callback.plan is not None
    assert callback.plan.num_replays > 0
    assert callback.measured_peak is not None
    assert callback.measured_peak <= budget
