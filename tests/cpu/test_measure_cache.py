"""The cost cache: remembered, shared, and never fatal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from keepless.measure import CostCache, OpCost, describe_device, device_nbytes

COST = OpCost(seconds=1.5e-3, scratch=4096, spread=0.1, n=5)


def _only_file(folder: Path) -> Path:
    (file,) = folder.glob("costs-*.jsonl")
    return file


def test_round_trip(tmp_path: Path) -> None:
    """What one cache stores another finds; unknown keys are left out; clearing forgets."""
    CostCache(tmp_path).store("cpu", {"a": COST})
    cache = CostCache(tmp_path)
    assert cache.load("cpu", ["a", "b"]) == {"a": COST}
    cache.clear("cpu")
    assert cache.load("cpu", ["a"]) == {}
    assert CostCache(tmp_path).load("cpu", ["a"]) == {}


def test_other_threads_have_other_costs(tmp_path: Path) -> None:
    """The number of threads is a part of the key."""
    CostCache(tmp_path).store("cpu", {"a": COST})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert CostCache(tmp_path).load("cpu", ["a"]) == {}
    finally:
        torch.set_num_threads(threads)


def test_folder_from_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KEEPLESS_CACHE_DIR says where; without it, XDG_CACHE_HOME."""
    monkeypatch.setenv("KEEPLESS_CACHE_DIR", str(tmp_path / "own"))
    assert CostCache().folder == tmp_path / "own"
    monkeypatch.delenv("KEEPLESS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CostCache().folder == tmp_path / "keepless"


@pytest.mark.parametrize(
    "text",
    [
        b"\x80\x04\x95 a pickle",
        b'{"key": "a"}',
        b'{"key": "a", "seconds": -1, "scratch": 0, "spread": 0, "n": 1}',
        b'{"key": "a", "seconds": NaN, "scratch": 0, "spread": 0, "n": 1}',
        b'{"key": "a", "seconds": 1, "scratch": 0.5, "spread": 0, "n": 1}',
        b'{"key": 3, "seconds": 1, "scratch": 0, "spread": 0, "n": 1}',
        b"[" * 100_000,
        b"5",
        b"null",
    ],
)
def test_corrupt_lines_are_skipped_with_a_warning(tmp_path: Path, text: bytes) -> None:
    """Bad lines cost a warning, good ones around them survive, and storing goes on."""
    CostCache(tmp_path).store("cpu", {"a": COST})
    with _only_file(tmp_path).open("ab") as file:
        file.write(text)  # torn: no newline at its end
    with pytest.warns(UserWarning, match="cannot be read"):
        assert CostCache(tmp_path).load("cpu", ["a"]) == {"a": COST}
    with pytest.warns(UserWarning, match="cannot be read"):
        CostCache(tmp_path).store("cpu", {"b": COST})
    with pytest.warns(UserWarning, match="cannot be read"):
        assert CostCache(tmp_path).load("cpu", ["a", "b"]) == {"a": COST, "b": COST}


def test_unwritable_folder_is_a_warning(tmp_path: Path) -> None:
    """Where nothing can be written, measured costs still hold in this process."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.warns(UserWarning, match="ignored|could not be stored"):
        CostCache(blocked).store("cpu", {"a": COST})


@pytest.mark.slow
def test_processes_append_at_once(tmp_path: Path) -> None:
    """Two processes that store 100 times each lose nothing."""
    code = (
        "import sys; from keepless.measure import CostCache, OpCost\n"
        "cache = CostCache(sys.argv[1])\n"
        "for i in range(100): cache.store('cpu', {f'{sys.argv[2]}-{i}': OpCost(1.0, i, 0.0, 3)})\n"
        "cache.load('cpu', ['x'])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    running = [subprocess.Popen([*command, str(number)], env=env) for number in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0] * 2
    keys = [f"{number}-{i}" for number in range(2) for i in range(100)]
    assert len(CostCache(tmp_path).load("cpu", keys)) == 200


def test_device_is_described() -> None:
    """The device's size is positive and the description names what costs depend on."""
    assert device_nbytes("cpu") > 2**20
    facts = describe_device(torch.device("cpu"))
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
