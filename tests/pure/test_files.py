"""Temporary folders and files are gone when their process is: by itself, by an error, by a signal, by the next one."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import keepless
from keepless import files
from keepless.files import remove_abandoned, temporary_folder, temporary_home, write_whole

SOURCE = str(Path(keepless.__file__).resolve().parents[1])
HOLD = """
import os, sys, time
from keepless.files import temporary_folder
{before}
with temporary_folder("held") as folder:
    (folder / "big").write_text("x")
    (folder / "deep").mkdir()
    {inside}
    print(folder, flush=True)
    {then}
"""
SLEEP = "time.sleep(600)"


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for temporary ones, and a process that has not looked into it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(files, "_swept", set())


def started(code: str) -> subprocess.Popen[str]:
    """A process that has come so far as to print where its folder is, or has ended."""
    environment = os.environ | {"PYTHONPATH": SOURCE}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    process.where = Path(process.stdout.readline().strip())  # type: ignore[attr-defined]
    return process


def ended(code: str, end: Callable[[subprocess.Popen[str]], object] | None = None) -> Path:
    """The folder of a process that is no more."""
    with started(code) as process:
        where: Path = process.where  # type: ignore[attr-defined]
        if end is not None:
            assert (where / "big").exists()
            end(process)
    return where


def held(then: str, before: str = "", inside: str = "") -> str:
    return HOLD.format(then=then, before=before, inside=inside)


def by(number: int) -> Callable[[subprocess.Popen[str]], object]:
    return lambda process: process.send_signal(number)


TERM = "from keepless.processes import end_in_order; end_in_order()"


@pytest.mark.parametrize(
    ("code", "end"),
    [
        (held("pass"), None),
        (held("raise ValueError"), None),
        (held("sys.exit(3)"), None),
        (held(SLEEP), by(signal.SIGINT)),
        (held(SLEEP, before=TERM), by(signal.SIGTERM)),
    ],
    ids=["end", "error", "exit", "ctrl-c", "sigterm"],
)
def test_gone_with_its_process(tmp_path: Path, code: str, end: Callable[..., object] | None) -> None:
    """Whatever ends the block; nothing else stays either, the folder of folders included."""
    where = ended(code, end)
    assert where.parent.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_after_kill_gone_at_the_next_start(tmp_path: Path) -> None:
    """Nothing can be done in a process that is killed: the next one does it, and leaves what is in use."""
    dead = ended(held(SLEEP), by(signal.SIGKILL))
    assert (dead / "big").exists()
    with started(held(SLEEP)) as alive:
        where: Path = alive.where  # type: ignore[attr-defined]
        assert not dead.exists()
        assert (where / "big").exists()
        remove_abandoned()
        assert (where / "big").exists()
        alive.kill()
    remove_abandoned()
    assert where.exists()  # a process looks once
    assert ended("from keepless.files import remove_abandoned; remove_abandoned()") == Path()
    assert list(tmp_path.iterdir()) == []


def test_a_child_does_not_hold_its_parents_folder(tmp_path: Path) -> None:
    """A fork that lives on after its parent was killed: the lock went with the parent. A fork removes nothing."""
    forked = """
    reads, writes = os.pipe()
    child = os.fork()
    if not child: os.write(writes, b"x"), time.sleep(600)
    os.read(reads, 1)  # the child runs
    (folder / "child").write_text(str(child))"""
    dead = ended(held(SLEEP, inside=forked), by(signal.SIGKILL))
    child = int((dead / "child").read_text())
    try:
        remove_abandoned()
        assert not dead.exists()
    finally:
        os.kill(child, signal.SIGKILL)
    with temporary_folder("parent") as folder:
        pid = os.fork()
        if not pid:
            try:
                raise SystemExit  # leaves the block in the child
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert folder.exists()


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Links, files, and folders elsewhere; a home that others can write to, or that is a link, is not used at all."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    home = temporary_home()
    home.mkdir(mode=0o700)
    (home / "link").symlink_to(outside)
    (home / "file").write_text("x")
    (home / "dead").mkdir()
    (home / "dead" / "link").symlink_to(outside)
    remove_abandoned()
    assert sorted(path.name for path in home.iterdir()) == ["file", "link"]
    assert (outside / "precious").exists()

    open_to_all, a_link = tmp_path / "open", tmp_path / "pointer"
    (open_to_all / "dead").mkdir(parents=True)
    open_to_all.chmod(0o777)
    a_link.symlink_to(outside)
    for home in (open_to_all, a_link):
        remove_abandoned(home)
        with temporary_folder("kind", home) as folder:
            assert folder.parent == tmp_path
            assert folder.stat().st_mode & 0o077 == 0
        assert not folder.exists()
    assert (open_to_all / "dead").exists()
    assert (outside / "precious").exists()


@pytest.mark.slow
def test_many_start_and_look_at_once(tmp_path: Path) -> None:
    """Processes that make folders while others look for abandoned ones never lose theirs."""
    code = """
import keepless.files as files
for _ in range(150):
    files._swept.clear()
    with files.temporary_folder("busy") as folder:
        (folder / "a").write_text("x")
        files._swept.clear()
        files.remove_abandoned()
        assert (folder / "a").read_text() == "x"
"""
    environment = os.environ | {"PYTHONPATH": SOURCE}
    crowd = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(4)]
    assert [process.wait() for process in crowd] == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_no_locks_no_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system cannot lock nothing can be known of others' folders: they stay, our own still go."""
    (temporary_home() / "dead").mkdir(parents=True)
    temporary_home().chmod(0o700)

    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with temporary_folder("kind") as folder:
        assert folder.parent == temporary_home()
    assert not folder.exists()
    assert (temporary_home() / "dead").exists()


@pytest.mark.parametrize("nameless", [True, False])
def test_files_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool) -> None:
    """The old file stands until the new one does; what a killed process left of one goes when it is written again."""
    if not nameless:
        monkeypatch.setattr(files, "_open_nameless", lambda folder: None)
    target = tmp_path / "step.plan"
    write_whole(target, b"old")
    left, other = tmp_path / f"step.plan.{'0' * 16}.tmp", tmp_path / f"step.plan2.{'0' * 16}.tmp"
    for path in (left, other, tmp_path / "step.plan.tmp"):
        path.write_bytes(b"ha")
    (tmp_path / f"step.plan.{'1' * 16}.tmp").symlink_to(other)
    write_whole(target, b"new")
    assert target.read_bytes() == b"new"
    assert not left.exists()
    assert other.exists()
    (tmp_path / f"step.plan.{'1' * 16}.tmp").unlink()

    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, b"newer")
    assert target.read_bytes() == b"new"
    assert {path.name for path in tmp_path.iterdir()} == {"step.plan", other.name, "step.plan.tmp"}


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    """And nothing beside it, where files without a name are to be had."""
    target = tmp_path / "step.plan"
    target.write_bytes(b"old")
    code = f"""
import os, time
from keepless import files
def wait(descriptor):
    print(os.getcwd(), flush=True)
    time.sleep(600)
os.fsync = wait
files.write_whole({str(target)!r}, b"new")
"""
    with started(code) as process:
        process.kill()
    assert target.read_bytes() == b"old"
    descriptor = files._open_nameless(str(tmp_path))
    if descriptor is not None:
        os.close(descriptor)
        assert list(tmp_path.iterdir()) == [target]
    write_whole(target, b"newer")
    assert list(tmp_path.iterdir()) == [target]


def test_into_a_pipe(tmp_path: Path) -> None:
    """What is no plain file is written to, not replaced."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        write_whole(pipe, b"text")
        assert reader.communicate()[0] == b"text"


@pytest.mark.slow
def test_children_end_with_a_parent_that_is_killed() -> None:
    """Also where a fork of the parent lives on, and with the parent gone before the child looks."""
    child = "import os, sys, time; from keepless.processes import end_with; {late}end_with({parent}); {then}"
    ready = "print(os.getpid(), flush=True); time.sleep(600)"
    code = f"""
import os, subprocess, sys, time
child = {child.format(late="", parent="int(sys.argv[1])", then=ready)!r}
subprocess.Popen([sys.executable, "-c", child, str(os.getpid())])
time.sleep(600)
"""
    with started(code) as process:
        pid = int(str(process.where))  # type: ignore[attr-defined]
        process.kill()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    late = child.format(late="", parent=2**22 + 1, then="print('lives')")
    done = subprocess.run(
        [sys.executable, "-c", late], env=os.environ | {"PYTHONPATH": SOURCE}, stdout=subprocess.PIPE, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.slow
def test_a_killed_process_takes_its_planner_along(tmp_path: Path) -> None:
    """The planner in the background, while it waits for a graph that does not come."""
    pipe = tmp_path / "task"
    os.mkfifo(pipe)
    code = f"""
import json, os, subprocess, sys
with open({str(pipe)!r}, "r+b", buffering=0) as task:
    task.write(json.dumps({{"limit": 1, "seed": 0, "parent": os.getpid()}}).encode() + b"\\n")
    process = subprocess.Popen([sys.executable, "-m", "keepless.solve"], stdin=task)
print(process.pid, flush=True)
process.wait()
"""
    holder = os.open(pipe, os.O_RDWR)  # so that it is never at its end
    try:
        with started(code) as process:
            pid = int(str(process.where))  # type: ignore[attr-defined]
            wait_until(lambda: has_read_all(holder))
            assert Path(f"/proc/{pid}").exists()
            process.kill()
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
    finally:
        os.close(holder)


def has_read_all(pipe: int) -> bool:
    return not select.select([pipe], [], [], 0)[0]


def wait_until(holds: Callable[[], bool]) -> None:
    """Waits half a minute at most, for a busy machine."""
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to that")
