"""Caches are emptied without taking memory, and an op costs what lies between warm and emptied ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keepless.measure import Trial, cold, measure_ops, ops
from keepless.measure._profiler import run_traced


def test_emptying_takes_no_memory() -> None:
    """Planning within a budget must not need the caches' size beside it."""
    cold.empty_caches()
    buffer = cold._something_else()
    assert buffer.nbytes >= min(cold.last_level_nbytes(), cold._MOST)
    _, events = run_traced(cold.empty_caches)
    assert max(events, default=0) <= 4096


def test_the_library_stays_as_it_is() -> None:
    """Its pages are torch's own code."""
    buffer = cold._something_else()
    before = int(buffer[0])
    library = max((Path(torch.__file__).parent / "lib").glob("*torch_cpu*"), key=lambda file: file.stat().st_size)
    written = library.stat().st_mtime_ns
    buffer[0] = before + 1
    buffer[0] = before
    assert library.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("sizes", "nbytes"),
    [(("32K", "1024K", "16384K"), 16 << 20), (("48K", "2M"), 2 << 20), (("nonsense",), 32 << 20), ((), 32 << 20)],
)
def test_sizes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[str, ...], nbytes: int) -> None:
    """As Linux tells them; elsewhere a guess."""
    for number, size in enumerate(sizes):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        (folder / "size").write_text(f"{size}\n")
    monkeypatch.setattr(cold, "_CACHES", str(tmp_path))
    assert cold.last_level_nbytes.__wrapped__() == nbytes


def test_a_cost_is_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never below that with warm caches."""
    trial = Trial("add", lambda: lambda: torch.zeros(8).add(1), 32)
    monkeypatch.setattr(ops, "_cpu_seconds", lambda *_: ([2e-3] * 5, False))
    monkeypatch.setattr(ops, "_cold_seconds", lambda *_: 3e-3)
    assert measure_ops([trial])["add"].seconds == pytest.approx(2e-3 + cold.IN_A_STEP * 1e-3)
    monkeypatch.setattr(ops, "_cold_seconds", lambda *_: 1e-3)
    assert measure_ops([trial])["add"].seconds == 2e-3


@pytest.mark.parametrize(("seconds", "min_seconds", "times"), [(1e-3, 0.003, 3), (1e-3, 0.0, 1), (0.2, 0.003, 0)])
def test_each_cold_run_has_emptied_caches(
    monkeypatch: pytest.MonkeyPatch, seconds: float, min_seconds: float, times: int
) -> None:
    """A long op has none, and in a hurry there is one."""
    emptied: list[int] = []
    monkeypatch.setattr(ops, "empty_caches", lambda: emptied.append(1))
    monkeypatch.setattr(ops, "_cpu_seconds", lambda *_: ([seconds], False))
    measure_ops([Trial("add", lambda: lambda: torch.zeros(8).add(1), 32)], min_seconds=min_seconds)
    assert len(emptied) == times
