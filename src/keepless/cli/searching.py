"""A search on the command line: progress on stderr, and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from keepless.cli.session import is_quiet
from keepless.ir import format_bytes
from keepless.reporting.decisions import format_seconds

if TYPE_CHECKING:
    from keepless.solve import Search, Standing

_LINE_EVERY = 5.0
"""Seconds between two lines of progress where stderr is no terminal."""


@contextlib.contextmanager
def ended_by_ctrl_c(search: Search) -> Iterator[None]:
    """Ctrl-C ends the search with its best so far; a second one ends the command."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def end(number: int, frame: FrameType | None) -> None:
        search.interrupt()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"Ending with the best so far; Ctrl-C again ends at once.\n")  # handlers must not print

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def searching(search: Search) -> Iterator[None]:
    """Shows on stderr what the search has so far: best, bound, gap."""
    if is_quiet():
        yield
        return
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        from rich.text import Text

        with console.status(Text("searching ...")) as status:
            search.tell = lambda standing: status.update(Text(standing_line(standing)))
            yield
        return
    told, last, shown = -_LINE_EVERY, "", ""

    def tell(standing: Standing) -> None:
        nonlocal told, last, shown
        last = standing_line(standing)
        if search.elapsed - told >= _LINE_EVERY:
            told, shown = search.elapsed, last
            print(last, file=sys.stderr)

    search.tell = tell
    yield
    if last != shown:
        print(last, file=sys.stderr)


def standing_line(standing: Standing) -> str:
    """Read as: best 1.20 s at 3.00 GiB | bound 1.15 s | gap 4.3 % | work 1200."""
    if standing.seconds == float("inf"):
        return f"nothing fits yet | lowest peak {format_bytes(standing.peak)} | work {standing.work}"
    known = standing.bound_seconds > 0
    bound = f"bound {format_seconds(standing.bound_seconds)} | gap {standing.gap:.2%}" if known else "no bound yet"
    best = f"best {format_seconds(standing.seconds)} at {format_bytes(standing.peak)}"
    return f"{best} | {bound} | work {standing.work}"
