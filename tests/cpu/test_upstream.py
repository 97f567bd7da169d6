"""The runner of PyTorch's own checkpoint tests, on a checkout that is made here: what passes, differs, is known."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FILE = "test/test_utils.py"
RUNNER = ROOT / "tests" / "upstream" / "run.py"

CASES = """
import unittest
import torch
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


def region(x):
    return x.sin().exp()


class TestCheckpoint(unittest.TestCase):
    def test_gradient(self):
        x = torch.ones(3, requires_grad=True)
        checkpoint(region, x, use_reentrant=False).sum().backward()
        self.assertTrue(torch.equal(x.grad, torch.autograd.grad(region(x).sum(), x)[0]))

    def test_sequence(self):
        x = torch.ones(4, requires_grad=True)
        twice = checkpoint_sequential([region, region], 2, x, use_reentrant=False)
        self.assertTrue(torch.equal(twice, region(region(x))))

    def test_value(self):
        for size in (2, 3):
            with self.subTest(size=size):
                x = torch.ones(size, requires_grad=True)
                self.assertTrue(torch.equal(checkpoint(region, x, use_reentrant=False), region(x)), "another value")

    def test_of_another_release(self):
        self.fail("fails with anybody's")

    @unittest.skip("no device")
    def test_device(self):
        pass


class TestAutograd(unittest.TestCase):
    def test_by_its_code(self):
        def run():
            return torch.utils.checkpoint.checkpoint(region, torch.ones(2), use_reentrant=False)

        self.assertTrue(torch.equal(run(), region(torch.ones(2))))

    def test_something_else(self):
        self.fail("is not run")
"""

BROKEN = """
from torch.utils.checkpoint import checkpoint as torchs, checkpoint_sequential


def checkpoint(function, *args, **kwargs):
    result = torchs(function, *args, **kwargs)
    return result + 1 if result.requires_grad and result.shape[0] == 3 else result
"""

DYING = """
import os
from torch.utils.checkpoint import checkpoint


def checkpoint_sequential(*args, **kwargs):
    os._exit(3)
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("upstream_run", RUNNER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


run = load()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout with one file of cases, which run with torch's function once for all tests here."""
    place = tmp_path_factory.mktemp("checkout")
    (place / "test").mkdir()
    (place / "test" / "test_utils.py").write_text(CASES)
    (place / "broken.py").write_text(BROKEN)
    (place / "dying.py").write_text(DYING)
    genuine: Any = run.outcomes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{place}")
        torchs = genuine(place, FILE, None)
        patch.setattr(run, "outcomes", lambda *words: dict(torchs) if words == (place, FILE, None) else genuine(*words))
        yield place


def outcomes_of(text: str) -> dict[str, list[str]]:
    """Case -> [torch's, ours] of the printed table."""
    rows = [line.split() for line in text.splitlines() if "::" in line]
    return {row[0].partition("::")[2].replace("::", "."): row[1:3] for row in rows}


@pytest.mark.slow
def test_ours_passes_what_torchs_passes(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(checkout)]) == 0
    told = capsys.readouterr().out
    assert outcomes_of(told) == {
        "TestCheckpoint.test_gradient": ["passed", "passed"],
        "TestCheckpoint.test_sequence": ["passed", "passed"],
        "TestCheckpoint.test_value": ["passed", "passed"],
        "TestCheckpoint.test_of_another_release": ["failed", "failed"],
        "TestCheckpoint.test_device": ["skipped", "skipped"],
        "TestAutograd.test_by_its_code": ["passed", "passed"],
    }
    assert "6 cases: 4 pass with torch's, 4 with ours; 0 differ, 0 known" in told
    assert "not in this checkout: test/test_autograd.py" in told


@pytest.mark.slow
def test_what_fails_only_with_the_substitute_counts(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = checkout / "known.json"
    entries = [
        {"case": "TestCheckpoint.test_grad*", "error": "", "reason": "not any more"},
        {"case": "TestCheckpoint.test_value", "error": "some other error", "reason": "no"},
    ]
    known.write_text(json.dumps(entries))
    assert run.main([str(checkout), "--substitute", "broken", "--known", str(known)]) == 1
    told = capsys.readouterr().out
    differing = {case for case, (torchs, ours) in outcomes_of(told).items() if torchs != ours}
    assert differing == {"TestCheckpoint.test_value"}
    assert "DIFFERS: " in told
    assert "another value" in told
    assert "no difference any more: TestCheckpoint.test_grad*" in told

    assert "1 differ, 0 known" in told


def test_a_difference_that_is_meant_is_told_with_its_reason() -> None:
    passed, failed = run.Outcome("passed"), run.Outcome("failed", "AssertionError: Expected 2 but got 1")
    for error, counts in (("got 1", False), ("got 3", True)):
        (row,) = run.compared({"f.py::T::test": passed}, {"f.py::T::test": failed}, [run.Known("T.te*", error, "why")])
        assert row.counts == counts
        assert ("known: why" in run.table([row])) != counts


@pytest.mark.slow
def test_a_case_whose_process_dies_counts_and_so_do_those_after_it(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([str(checkout), "--substitute", "dying"]) == 1
    told = capsys.readouterr().out
    assert outcomes_of(told)["TestCheckpoint.test_sequence"] == ["passed", "lost"]
    assert "its process ended first" in told


@pytest.mark.slow
def test_a_file_that_does_not_run_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / FILE).write_text("import torch_of_tomorrow\n")
    assert run.main([str(tmp_path)]) == 2
    assert "No module named 'torch_of_tomorrow'" in capsys.readouterr().err


def test_skipping_what_torchs_passes_counts() -> None:
    passed, skipped, failed = (run.Outcome(word) for word in ("passed", "skipped", "failed"))
    known = [run.Known("T.test_c", "", "meant")]
    there = {
        "f.py::T::test_a": passed,
        "f.py::T::test_b": skipped,
        "f.py::T::test_c": passed,
        "f.py::T::test_d": failed,
    }
    here = {"f.py::T::test_a": skipped, "f.py::T::test_b": passed, "f.py::T::test_c": failed, "f.py::T::test_d": failed}
    assert [row.counts for row in run.compared(there, here, known)] == [True, False, False, False]
    assert [row.counts for row in run.compared(there, {}, known)] == [True, True, False, False]


def test_every_known_difference_has_a_reason() -> None:
    known = run.known_differences(RUNNER.parent / "known.json")
    assert all(len(item.reason) > 20 and item.error for item in known)
    assert len({item.case for item in known}) == len(known)


def test_without_a_checkout_it_says_what_to_give(tmp_path: Path) -> None:
    for place in ("", str(tmp_path)):
        done = subprocess.run([sys.executable, str(RUNNER), place], capture_output=True, text=True)
        assert done.returncode == 2
        assert "make test-upstream TORCH_SRC=" in done.stderr
