"""Hugging Face's Trainer with KeeplessCallback: the same bits, within the budget."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

import torch
from hf_training import Ran, differences, llama, middle, run

from keepless.integrations.hf import KeeplessCallback
from keepless.integrations.metrics import memory_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The training without Keepless."""
    torch.set_num_threads(1)
    return run(tmp_path_factory.mktemp("plain"), llama())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, KeeplessCallback, Path]:
    """The same with it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("kept")
    model = llama()
    callback = KeeplessCallback(middle(model))
    return run(folder, model, [callback]), callback, folder


def files_of(folder: str | Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): 0 for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def test_same_bits_within_the_budget(plain: Ran, kept: tuple[Ran, KeeplessCallback, Path]) -> None:
    """Losses, evaluations, gradient norms and weights of five AdamW steps; the plan recomputes, within its budget."""
    ran, callback, _ = kept
    assert differences(plain, ran) == []
    assert torch.equal(plain.rng, ran.rng)
    plan = callback.plan
    assert plan is not None
    assert plan.num_replays > 0
    assert plan.recomputed_nbytes > 0
    limit = plan.budget.limits["device"]
    assert plan.predicted_peak <= limit < plan.baseline_peak
    assert callback.measured_peak is not None
    assert 0.9 * plan.predicted_peak < callback.measured_peak <= limit
    assert "forward" not in ran.model.__dict__ or not hasattr(ran.model.__dict__["forward"], "counters")


def test_logs_hold_the_metrics(kept: tuple[Ran, KeeplessCallback, Path]) -> None:
    """Reporters that stand before the callback are given them, and the Trainer's history has them; once each."""
    ran, callback, _ = kept
    assert callback.plan is not None
    metrics = memory_metrics(callback.plan, callback.measured_peak)
    names = set(metrics)
    assert names == {
        "memory/peak_predicted_gb",
        "memory/peak_measured_gb",
        "memory/budget_gb",
        "memory/recompute_overhead_pct",
        "memory/params_per_gb",
    }
    for rows in (ran.reporter.rows, ran.trainer.state.log_history):
        told = [row for row in rows if names & set(row)]
        assert 1 <= len(told) <= 2  # with the plan, and with what was measured
        assert {name: value for row in told for name, value in row.items() if name in names} == pytest.approx(metrics)


def test_checkpoints_hold_nothing_of_ours(plain: Ran, kept: tuple[Ran, KeeplessCallback, Path]) -> None:
    """The same files; weights under the same names."""
    ours, theirs = (os.path.join(ran.trainer.args.output_dir, "checkpoint-3") for ran in (kept[0], plain))
    assert files_of(ours) == files_of(theirs)
    assert "Keepless" not in (Path(ours) / "trainer_state.json").read_text()
    assert json.loads((Path(ours) / "config.json").read_text()) == json.loads(
        (Path(theirs) / "config.json").read_text()
    )


def test_resumes(plain: Ran, kept: tuple[Ran, KeeplessCallback, Path], tmp_path: Path) -> None:
    """From the checkpoint in the middle, in another Trainer with a plan of its own: the same end."""
    _, before, folder = kept
    assert before.plan is not None
    callback = KeeplessCallback(before.plan.budget.limits["device"])
    ran = run(tmp_path, llama(), [callback], resume=str(folder / "checkpoint-3"))
    state = ran.model.state_dict()
    assert [name for name, tensor in plain.model.state_dict().items() if not torch.equal(tensor, state[name])] == []
    assert callback.plan is not None
    assert callback.plan.num_replays > 0
    assert callback.plan.signature["state_nbytes"] == before.plan.signature["state_nbytes"]
