"""Files that cannot be written are refused before any work; a closed pipe and Ctrl-C end a command quietly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Invoke = Callable[..., Any]


@pytest.mark.parametrize("command", [("curve", "factories:tiny"), ("plan", "factories:tiny", "-b", "8MiB")])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--picture", "none/x.png"), "its folder does not exist"),
        (("--picture", "x.foo"), "its name ends in no format"),
        (("--picture", "x"), "its name ends in no format"),
        (("--picture", "taken.png"), "it is a folder"),
        (("--save", "none/step.plan", "--save-at", "8MiB"), "its folder does not exist"),
        (("--save", "locked/step.plan", "--save-at", "8MiB"), "read-only"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_any_work(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], words: tuple[str, ...], told: str
) -> None:
    Path("taken.png").mkdir()
    Path("locked").mkdir()
    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "locked" and writable(path, mode))
    if command[0] == "plan":
        words = tuple(word for word in words if word not in ("--save-at", "8MiB"))
    result = invoke(*command, *words)
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert "capture" not in result.stderr


def test_training_is_not_begun_where_its_plan_cannot_be_saved(invoke: Invoke) -> None:
    result = invoke("train", "factories:tiny", "-b", "8MiB", "--save", "none/step.plan")
    assert result.exit_code == 2
    assert "capture" not in result.stderr


@pytest.mark.parametrize("number", [1, 0, -3, 1_000_000])
def test_a_curve_has_two_points_at_least(invoke: Invoke, number: int) -> None:
    result = invoke("curve", "factories:tiny", "--points", str(number))
    assert result.exit_code == 2
    assert f"A curve has 2 to 200 points, not {number}." in result.stderr


@pytest.mark.slow
def test_a_closed_pipe_ends_a_command_without_a_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m keepless.cli env --json | head -1", shell=True, capture_output=True, text=True
    )
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_before_there_is_anything_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    running = subprocess.Popen(
        [sys.executable, "-m", "keepless.cli", "curve", "slow:model"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n"
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130
    assert told.splitlines()[-1] == "Ended by Ctrl-C, before there was anything to give."
