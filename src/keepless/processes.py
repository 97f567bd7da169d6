"""How processes end: those that Keepless starts with the one that started them, and commands in order."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5


def end_with(parent: int) -> None:
    """Called in a child process: it ends at once when its parent does.

    Linux sends the signal itself. Elsewhere a thread looks for it twice a second.

    Arguments:
        parent: process id of the one that started this one.
    """
    if not hasattr(os, "getppid") or os.name != "posix":
        return
    if not _signal_at_end():
        threading.Thread(target=_watch, args=(parent,), name="keepless-parent", daemon=True).start()
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def end_in_order() -> None:
    """Called by a command: asked to end (SIGTERM) it leaves its blocks, and so its temporary files, as after Ctrl-C.

    What a library must not do: it is for programs of our own.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _signal_at_end() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        return int(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)) == 0
    except (OSError, AttributeError):
        return False


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)
