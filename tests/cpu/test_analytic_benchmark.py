"""The benchmark of analytic seconds: its rows, on a model that takes no time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from keepless.cost import find_device
from keepless.cost.devices import read_device

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


def test_rows_of_a_tiny_model() -> None:
    """Each contender has a ratio; alone, a model has no others to be corrected by and keeps what was probed."""
    from benchmarks.analytic import compare
    from benchmarks.common import Table

    table = Table("cpu", 0)
    compare(["gpt2"], "tiny", 0, table)
    ratios = {row.contender: row.value for row in table.rows if row.metric == "predicted_over_measured"}
    assert set(ratios) == {"as probed", "corrected by its own ops", "corrected by the other models' ops"}
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios.values())
    assert ratios["corrected by the other models' ops"] == ratios["as probed"]


def test_the_large_models_devices_can_be_read() -> None:
    from benchmarks.analytic import LARGE

    tomllib = pytest.importorskip("tomllib")
    for fields, device, rows, _ in LARGE.values():
        table = tomllib.loads(device)
        assert table.pop("like") == "h100"
        assert fields["hidden_size"] % fields["num_attention_heads"] == 0
        assert rows >= 1
        assert read_device(table, base=find_device("h100")).capability == (9, 0)
