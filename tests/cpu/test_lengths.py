"""The benchmark of many lengths, with few steps: bits of plain training, and no step above the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

SMALL = {"layers": 2, "width": 32, "heads": 2, "batch": 4, "longest": 80, "steps": 14}


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from benchmarks import lengths

    return lengths


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.filterwarnings("ignore:A planned model has had")
def test_lengths_within_one_budget(lengths: Any) -> None:
    """Every step within the budget that plain training exceeds; a capture per length, and never one more."""
    from benchmarks.common import Table

    scale = lengths.Scale(**SMALL)
    steps = lengths.batches(scale, 3)
    sizes = [batch["input_ids"].shape[1] for batch in steps]
    assert len(set(sizes)) >= 4
    table = Table("cpu", 0)
    lengths.bench(table, scale, seed=3, share=0.4, tell=lambda _: None)

    def value(contender: str, metric: str) -> float:
        found = table.find(lengths.NAME, contender, metric)
        assert found is not None
        return found

    assert value("keepless", "equal_losses") == value("keepless", "equal_state") == 1
    assert value("keepless", "measured_steps_above_budget") == 0
    assert value("keepless", "measured_steps") == scale.steps
    assert value("plain", "measured_steps_above_budget") > 0
    assert value("keepless", "highest_peak") > 0.5 * value("keepless", "budget")
    assert value("keepless", "captures") == value("keepless", "transfers") == len(set(sizes)) - 1
    assert value("keepless", "hits") == scale.steps - 1 - value("keepless", "captures")  # the first binds the plan
    assert value("keepless", "evicted") == 0


def test_batches_are_padded_texts(lengths: Any) -> None:
    """What is padded is left out of the loss, and nothing else is."""
    for batch in lengths.batches(lengths.Scale(**SMALL), 0):
        ids, labels = batch["input_ids"], batch["labels"]
        assert ids.shape[1] % lengths.PAD == 0
        told = labels != lengths.IGNORED
        assert torch.equal(ids[told], labels[told])
        assert not ids[~told].any()
        assert int(told.sum(1).max()) > ids.shape[1] - lengths.PAD
