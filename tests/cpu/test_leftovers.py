"""What a command leaves behind when it is ended while it measures: no file, no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from factories_text import FACTORIES

import keepless
from keepless.measure import interposer

WAITING = """
import os, sys, time


def waiting():
    if sys.modules["__main__"].__spec__.name == "keepless.measure._child":
        open("metering", "w").write(str(os.getpid()))
        time.sleep(600)
    return tiny()
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model whose second process never ends, with folders for temporary files and for costs."""
    (tmp_path / "factories.py").write_text(FACTORIES + WAITING)
    for name in ("temporary", "cache"):
        (tmp_path / name).mkdir()
    return tmp_path


def command(place: Path, *words: str) -> subprocess.Popen[bytes]:
    source = str(Path(keepless.__file__).resolve().parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([source, str(place)]),
        "TMPDIR": str(place / "temporary"),
        "KEEPLESS_CACHE_DIR": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    words = (sys.executable, "-m", "keepless.cli", *words)
    return subprocess.Popen(words, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(2400):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to that")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_verify_that_is_ended_while_it_measures(place: Path, number: int, code: int) -> None:
    """Its plan file and the process that measures go with it; after a kill the file goes at the next start."""
    mark, temporary = place / "metering", place / "temporary"
    with command(place, "verify", "factories:waiting", "--budget", "1GiB") as running:
        wait_until(lambda: (mark.exists() and bool(mark.read_text())) or running.poll() is not None)
        assert running.poll() is None, running.communicate()[0].decode()
        meter = int(mark.read_text())
        assert len(list(temporary.glob("keepless*/verify-*/step.plan"))) == 1
        running.send_signal(number)
        assert running.wait(120) == code
        wait_until(lambda: not Path(f"/proc/{meter}").exists())
    if number == signal.SIGKILL:
        assert len(list(temporary.glob("keepless*/verify-*/step.plan"))) == 1
        with command(place, "env") as following:
            assert following.wait(120) == 0
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_commands_leave_nothing_beside_what_they_are_asked_for(place: Path) -> None:
    """A plan is made and verified: its file is there, and the costs of ops."""
    with command(place, "plan", "factories:tiny", "--budget", "1GiB", "--save", "step.plan") as planning:
        assert planning.wait(120) == 0
    before = set(os.listdir(place))
    with command(place, "verify", "factories:tiny", "--plan", "step.plan") as verifying:
        assert verifying.wait(120) == 0, verifying.communicate()[0].decode()
    assert set(os.listdir(place)) - {"__pycache__"} == before - {"__pycache__"}
    assert list((place / "temporary").iterdir()) == []
    assert [path.suffix for path in (place / "cache").iterdir()] == [".jsonl"]


def test_the_interposer_is_built_beside_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed build left is removed by the next process that needs the library, if only to find it there."""
    reason = interposer.available()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("KEEPLESS_CACHE_DIR", str(tmp_path / "cache"))
    left = tmp_path / "cache" / "building" / "interposer-dead"
    left.mkdir(parents=True)
    (left / "interposer.so").write_bytes(b"half")
    library = interposer.library()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [library.name]
