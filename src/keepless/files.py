"""Files that appear whole or not at all, and temporary folders that nobody has to clean up after.

A temporary folder is locked (flock) by the process that uses it and removed when it is done: after an error and Ctrl-C,
too. A process that is killed loses its locks; the next one that starts removes what it left. Nothing else is ever
removed: a folder that is locked, that belongs to another user, or that is not in a home of ours stays. Process ids
play no part, so that their reuse does no harm.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX: folders are removed by their own process, and not by a later one
    fcntl = None  # type: ignore[assignment]

_TRIES = 20
_held: set[int] = set()
"""Descriptors of this process's locks."""
_swept: set[str] = set()
"""Homes in which this process has looked for what others left."""


def temporary_home() -> Path:
    """The folder of this user's temporary folders. It is there only while there are some."""
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    return Path(tempfile.gettempdir()) / f"keepless{user}"


@contextlib.contextmanager
def temporary_folder(kind: str, home: Path | None = None) -> Iterator[Path]:
    """A new folder, which is gone after the block.

    Arguments:
        kind: the beginning of its name.
        home: the folder in which it is; None for `temporary_home()`. One that is not this user's own is left alone:
            the folder is then made elsewhere, where none but this process removes it.

    Raises:
        OSError: no folder can be made.
    """
    home = temporary_home() if home is None else home
    remove_abandoned(home)
    folder, lock = _locked(kind, home) or (Path(tempfile.mkdtemp(prefix=f"keepless-{kind}-")), None)
    owner = os.getpid()
    try:
        yield folder
    finally:
        if os.getpid() == owner:  # a fork's copy of this block ends, too
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                _held.discard(lock)
                os.close(lock)
            with contextlib.suppress(OSError):
                home.rmdir()  # where it was the last one


def remove_abandoned(home: Path | None = None) -> None:
    """Removes the temporary folders of processes that were killed; looks once per process and home."""
    home = temporary_home() if home is None else home
    if fcntl is None or str(home) in _swept:
        return
    _swept.add(str(home))
    if not _is_own(home):
        return
    with contextlib.suppress(OSError):
        for name in os.listdir(home):
            _remove_if_abandoned(home / name)
        home.rmdir()


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file, all of it or nothing: one that was there stays until the new one is complete.

    What is not complete has no name where the system can do that; else a name of its own, and what a killed process
    left of one is removed when the same file is written again.

    Raises:
        OSError: it cannot be written.
    """
    target = os.path.realpath(os.fspath(path))
    if os.path.exists(target) and not os.path.isfile(target):  # a pipe or a terminal; a folder is an error
        with open(target, "wb") as file:
            file.write(data)
        return
    _remove_unfinished(target)
    temporary = f"{target}.{secrets.token_hex(8)}.tmp"
    descriptor = None
    try:
        descriptor, is_named = _open_nameless(os.path.dirname(target)), False
        if descriptor is None:
            descriptor, is_named = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), True
        with open(descriptor, "wb", closefd=False) as file:
            if is_named:
                _try_lock(descriptor)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            if not is_named:
                # src_dir_fd makes Python call linkat, which alone follows the link in /proc
                os.link(f"/proc/self/fd/{descriptor}", temporary, src_dir_fd=descriptor, follow_symlinks=True)
                _try_lock(descriptor)
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(kind: str, home: Path) -> tuple[Path, int | None] | None:
    """A new folder in a home, and its lock; None where the home is not to be had."""
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError):
            home.mkdir(mode=0o700, parents=True)
        if not _is_own(home):
            if not os.path.lexists(home):  # another process has just removed it, with the last folder in it
                continue
            return None
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=home))
        except FileNotFoundError:
            continue
        if fcntl is None:
            return folder, None
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # taken for an abandoned one before it was locked
            continue
        locked = _try_lock(lock)
        if locked is None:
            os.close(lock)
            return folder, None
        if locked and _is_same(lock, folder):
            _held.add(lock)
            return folder, lock
        os.close(lock)
    return None


def _is_own(home: Path) -> bool:
    """Whether a folder is this user's, and nobody else can write into it."""
    try:
        found = os.lstat(home)
    except OSError:
        return False
    if not stat.S_ISDIR(found.st_mode):
        return False
    return not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)


def _remove_if_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:  # a link, a file, or gone
        return
    try:
        if os.fstat(lock).st_uid == os.getuid() and _try_lock(lock) and _is_same(lock, folder):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _remove_unfinished(target: str) -> None:
    """Removes what killed processes left of this file."""
    if fcntl is None:
        return
    folder, name = os.path.split(target)
    pattern = re.compile(re.escape(name) + r"\.[0-9a-f]{16}\.tmp")
    with contextlib.suppress(OSError):
        for found in filter(pattern.fullmatch, os.listdir(folder)):
            path = Path(folder, found)
            with contextlib.suppress(OSError):
                lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    kind = os.fstat(lock)
                    if stat.S_ISREG(kind.st_mode) and kind.st_uid == os.getuid() and _try_lock(lock):
                        path.unlink()
                finally:
                    os.close(lock)


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock was free and is ours now; None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        there = os.lstat(path)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _open_nameless(folder: str) -> int | None:
    """A new file in a folder without a name; None where the system or the file system has none."""
    flag = getattr(os, "O_TMPFILE", 0)
    if not flag or not sys.platform.startswith("linux") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder or ".", os.O_WRONLY | flag, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            return None
        raise


def _after_fork() -> None:
    """A child's copies of the descriptors would hold the locks after the parent's end."""
    for lock in _held:
        with contextlib.suppress(OSError):
            os.close(lock)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
