"""The benchmark for a card, tried on the CPU with small models: that it runs, resumes, and says what it left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


def run(out: Path, *units: str) -> str:
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--quick",
        "--out",
        str(out),
        "--only",
        *units,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_units_are_measured_once(tmp_path: Path) -> None:
    from benchmarks.common import read_rows

    out = tmp_path / "gpu.csv"
    said = run(out, "llama:fidelity", "llama:oom")
    assert "left_out_without_cuda" in said
    rows = read_rows(out)
    within = [row for row in rows if row.metric == "within_budget"]
    assert [row.contender for row in within] == ["everything kept", "half way", "smallest"]
    assert all(row.value for row in within)
    assert all(row.value for row in rows if row.metric.startswith("equal_"))
    assert all(abs(row.value) < 0.01 for row in rows if row.metric == "peak_prediction_error")
    assert "has rows" in run(out, "llama:fidelity")
    assert read_rows(out) == rows
