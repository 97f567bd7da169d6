"""The benchmark of peers on a card, tried on the CPU with a tiny model: rows, resuming, and contenders that fail."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def deterministic() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(False)


def run_unit(path: Path, name: str = "llama-1b:4k", *, compile: bool = False) -> list[Any]:
    from benchmarks.common import Table, read_rows
    from benchmarks.peers import card

    args = argparse.Namespace(device="cpu", quick=True, seed=0, compile=compile, fast_kernels=False)
    card.Unit(name, Table("cpu", 0), args, 60.0, path).run()
    return read_rows(path)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few contenders and rounds."""
    from benchmarks.peers import card

    monkeypatch.setattr(card, "EAGER", ("plain", "checkpoint every block", "ckptplan"))
    monkeypatch.setattr(card, "BETWEEN", 0)
    monkeypatch.setattr(card, "ROUNDS", (2, 2))


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic", "few")
def test_a_unit_has_rows_for_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks, bits, seconds, cells; a contender that fails and a package that is missing have rows."""
    from benchmarks.peers import answers, card, ways

    def failing(self: Any, batch: Any) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(card, "EAGER", (*card.EAGER, "save_on_cpu"))
    monkeypatch.setattr(ways.SavedOnCpu, "forward_backward", failing, raising=False)
    rows = run_unit(tmp_path / "rows.csv")
    metrics = {(row.contender, row.metric) for row in rows}
    assert ("save_on_cpu", "failed: RuntimeError: CUDA out of memory") in metrics
    assert ("machine", card.DONE) in metrics
    assert ("ckptplan", "missing: ckptplan is not installed") in metrics
    points = {point.name: point for point in answers.points(rows, "llama-1b:4k")}
    assert {"plain", "checkpoint every block", "graph, all kept"} <= points.keys()
    assert {point.family for point in points.values()} >= {"graph", "blocks"}
    assert all(point.is_exact for point in points.values())
    assert points["checkpoint every block"].peak < points["plain"].peak
    assert min(point.peak for point in points.values() if point.is_ours) < points["plain"].peak
    assert {cell.point for cell in answers.cells(rows)} >= {"plain"}
    assert all(row.n == 2 for row in rows if row.metric in ("step", "step_over_plain"))
    assert answers.faults(rows) == []
    assert "llama-1b:4k" in answers.on_card(rows)


def test_deterministic_kernels_that_fail_are_not_used(tmp_path: Path, deterministic: None) -> None:
    from benchmarks.common import Table
    from benchmarks.peers import card

    args = argparse.Namespace(device="cpu", quick=True, seed=0, compile=False, fast_kernels=False)
    unit = card.Unit("unet3d:128", Table("cpu", 0), args, 60.0, tmp_path / "rows.csv")
    step = unit._step

    def failing(way: Any) -> None:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("no engine")
        step(way)

    unit._step = failing  # type: ignore[method-assign]
    unit._build()
    assert not torch.are_deterministic_algorithms_enabled()
    assert "failed: deterministic kernels: RuntimeError: no engine" in {row.metric for row in unit.table.rows}
    assert unit.table.find("unet3d:128", "machine", "deterministic") == 0


@pytest.mark.usefixtures("deterministic", "few")
def test_what_was_measured_before_the_end_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is told to end while plans are made."""
    from benchmarks.peers import card

    def ended(self: Any) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(card.Unit, "_measure_ours", ended)
    with pytest.raises(SystemExit):
        run_unit(tmp_path / "rows.csv")
    from benchmarks.common import read_rows

    metrics = {(row.contender, row.metric) for row in read_rows(tmp_path / "rows.csv")}
    assert ("checkpoint every block", "peak") in metrics
    assert ("machine", card.DONE) not in metrics


def test_what_takes_too_long_is_ended() -> None:
    from benchmarks.peers import card

    with pytest.raises(card.TimeLimit), card.within(0.1), contextlib.suppress(Exception):
        time.sleep(20)
    with card.within(60.0):
        pass


def test_a_unit_takes_its_share_of_what_is_left() -> None:
    from benchmarks.peers import card

    given = argparse.Namespace(unit_seconds=0.0)
    assert card._seconds_of_unit(given, float("inf"), 5) == card.MOST
    assert card._seconds_of_unit(given, 500.0, 5) == pytest.approx(125.0)
    assert card._seconds_of_unit(given, 170.0, 5) == pytest.approx(42.5)
    assert card._seconds_of_unit(given, 25.0, 3) == card.LEAST
    assert card._seconds_of_unit(given, 15.0, 1) == 15.0


@pytest.mark.slow
def test_the_command_resumes(tmp_path: Path) -> None:
    """A unit of a tiny model; a second call has nothing to do."""
    out = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "benchmarks.peers.card", "--device", "cpu", "--quick", "--out", str(out)]
    command += ["--unit-seconds", "15", "--only", "llama-1b:4k"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "llama-1b:4k: 15 s at most" in said
    assert "aot_eager 0.50" in said
    before = out.read_bytes()
    assert "at most" not in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.read_bytes() == before
