"""A malloc interposer: counts every large heap block of a process, whoever allocates it.

It is the second opinion on peaks: it shares nothing with torch. The C source is compiled once per machine into the
cache folder, loaded with LD_PRELOAD into a fresh process, and read there through ctypes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from keepless.errors import MeasureError
from keepless.files import remove_abandoned, temporary_folder
from keepless.measure.cache import cache_folder

_SOURCE = Path(__file__).with_name("interposer.c")
_FLAGS = ("-O2", "-std=gnu11", "-shared", "-fPIC")
REQUIRE = "KEEPLESS_REQUIRE_INTERPOSER"
"""Set to 1, this environment variable turns a skipped comparison into a failure."""


def available() -> str | None:
    """None where the interposer can be used here, else the reason why it cannot."""
    if not sys.platform.startswith("linux"):
        return f"the interposer needs Linux, not {sys.platform}"
    try:
        library()
    except MeasureError as error:
        return str(error)
    return None


def library() -> Path:
    """The compiled library; built on first use.

    Raises:
        MeasureError: no C compiler, or it failed.
    """
    source = _SOURCE.read_bytes()
    marks = source + " ".join((*_FLAGS, platform.machine(), *platform.libc_ver())).encode()
    target = cache_folder() / f"interposer-{hashlib.sha256(marks).hexdigest()[:16]}.so"
    remove_abandoned(_building())
    if not target.exists():
        _build(target)
    return target


def _building() -> Path:
    """Where it is built: beside its place, to be moved there in one go."""
    return cache_folder() / "building"


def _build(target: Path) -> None:
    names = [name for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name]
    compiler = next((found for found in map(shutil.which, names) if found), None)
    if compiler is None:
        raise MeasureError("The interposer needs a C compiler (cc, gcc, clang or $CC), and none was found.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder("interposer", _building()) as folder:
            fresh = folder / "interposer.so"
            command = [compiler, *_FLAGS, "-o", str(fresh), str(_SOURCE), "-ldl"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
            if done.returncode != 0:
                raise MeasureError(
                    f"The interposer could not be compiled with {compiler}: {done.stderr.strip()[-2000:]}"
                )
            os.replace(fresh, target)  # whole or not at all, also when two processes build at once
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MeasureError(f"The interposer could not be built in {target.parent}: {error}") from error


@cache
def _counters() -> ctypes.CDLL:
    counters = ctypes.CDLL(None)
    try:
        counters.keepless_current.restype = ctypes.c_int64
        counters.keepless_peak.restype = ctypes.c_int64
        counters.keepless_reset_peak.restype = None
    except AttributeError as error:
        raise MeasureError("The interposer is not loaded in this process; start it with LD_PRELOAD.") from error
    return counters


def current() -> int:
    """Bytes in counted blocks now; only in a process that was started with the interposer."""
    return int(_counters().keepless_current())


def peak() -> int:
    """Highest `current` since the last `reset_peak`."""
    return int(_counters().keepless_peak())


def reset_peak() -> None:
    """Let `peak` begin again at `current`."""
    _counters().keepless_reset_peak()
