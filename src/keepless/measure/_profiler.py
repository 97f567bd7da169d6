"""Memory events of torch's profilers: the only private torch calls of the measuring half.

They are apart from `keepless._compat` so that the meter shares nothing with the engines that it judges, imports
included. Each function says what it needs from torch and what happens where a release lacks it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch

_MARK = "keepless:"


def run_traced(call: Callable[[], object]) -> tuple[object, list[int]]:
    """Run a call and list its CPU allocations (+ bytes) and frees (- bytes), in order.

    Uses torch's older profiler: it is local to the thread, starts and stops in 0.1 ms, and writes nothing to stderr.
    Inside a user's profiler the call runs in a thread of its own, where that profiler is not.
    A block that was allocated before the call may be missed, or reported with a wrong size, when the call frees it:
    only the call's own blocks are certain. A release without that profiler gets the newer one, which cannot run
    inside a user's.

    Raises:
        RuntimeError: a user's profiler is running, and the older one is gone.
    """
    private = torch._C._autograd
    _end_watch()
    is_profiling = bool(private._profiler_enabled())
    if not hasattr(private, "_enable_profiler_legacy"):
        if is_profiling:
            raise RuntimeError("memory cannot be measured inside a running profiler on this release of torch")
        return _traced_by_kineto(call)
    if not is_profiling:
        return _traced(call)
    done: list[tuple[object, list[int]]] = []
    failed: list[BaseException] = []
    num_threads = torch.get_num_threads()

    def job() -> None:
        torch.set_num_threads(num_threads)  # OpenMP's is the thread's own, and scratch depends on it
        try:
            with torch.no_grad():
                done.append(_traced(call))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=job, name="keepless-trial")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


def levels_of(events: Iterable[int | None]) -> tuple[int, int]:
    """The bytes that allocations and frees come to, and the most on the way, at least 0; marks are passed over."""
    level = highest = 0
    for nbytes in events:
        level += nbytes or 0
        highest = max(highest, level)
    return level, highest


class AllocationWatch:
    """Notes this thread's CPU allocations from `start` to `stop`, wherever these are called.

    Another measurement in this thread ends it, as profilers do not stand in one another.
    """

    def __init__(self) -> None:
        self._newer: torch.profiler.profile | None = None
        self.is_on = False

    def start(self) -> bool:
        """From here on; False where a profiler is running already."""
        private: Any = torch._C._autograd
        _end_watch()
        if private._profiler_enabled():
            return False
        if hasattr(private, "_enable_profiler_legacy"):
            _free_unknown_block()
            private._enable_profiler_legacy(_memory_config())
        else:
            self._newer = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self._newer.start()
        self.is_on = True
        _here.watch = self
        return True

    def mark(self) -> None:
        """Notes that something has happened, as `None` among the bytes."""
        if self.is_on:
            _mark("")

    def stop(self) -> list[int | None] | None:
        """Allocations (+ bytes), frees (- bytes) and marks since the start, in order; None where it was not on."""
        private: Any = torch._C._autograd
        if not self.is_on:
            return None
        self.is_on = False
        _here.watch = None
        if self._newer is not None:
            newer, self._newer = self._newer, None
            newer.stop()
            rows = profiled_memory_events(newer)
            return [nbytes if name == "[memory]" else None for name, nbytes in rows if name in ("[memory]", _MARK)]
        if not private._profiler_enabled():
            return None
        records: list[list[Any]] = private._disable_profiler_legacy()
        found: list[int | None] = []
        for event in (event for thread in records for event in thread):
            if event.kind() == "memory_alloc":
                found.append(int(event.cpu_memory_usage()))
            elif event.kind() == "push" and event.name() == _MARK:
                found.append(None)
        return found


_here = threading.local()
"""The watch that was started last in this thread, under "watch"."""


def _end_watch() -> None:
    watch: AllocationWatch | None = getattr(_here, "watch", None)
    if watch is not None:
        watch.stop()


@cache
def _free_unknown_block() -> None:
    """Torch writes a line to stderr when the first block is freed that was allocated before a profile: it is freed
    here, where that line goes nowhere. Later ones are written of every thousandth block only."""
    private = torch._C._autograd
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
        shown = os.dup(2)
        try:
            block = torch.empty(64)
            os.dup2(nowhere.fileno(), 2)
            private._enable_profiler_legacy(_memory_config())
            del block
            private._disable_profiler_legacy()
        finally:
            os.dup2(shown, 2)
            os.close(shown)


def traced_between_marks(call: Callable[[Callable[[str], None]], object]) -> list[str | int]:
    """Runs `call(mark)` and lists this thread's marks (text), CPU allocations (+ bytes) and frees (- bytes), in order.

    Blocks from before the call are as uncertain as in `run_traced`.

    Raises:
        RuntimeError: a user's profiler is running.
    """
    private: Any = torch._C._autograd
    _end_watch()
    if private._profiler_enabled():
        raise RuntimeError("memory cannot be measured between marks inside a running profiler")
    if hasattr(private, "_enable_profiler_legacy"):
        records = _legacy_events(lambda: call(_mark))[1]
        found: list[str | int] = []
        for event in records:
            if event.kind() == "memory_alloc":
                found.append(int(event.cpu_memory_usage()))
            elif event.kind() == "push" and event.name().startswith(_MARK):
                found.append(event.name().removeprefix(_MARK))
        return found
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call(_mark)
    rows = profiled_memory_events(profile)
    return [
        nbytes if name == "[memory]" else name.removeprefix(_MARK)
        for name, nbytes in rows
        if name == "[memory]" or name.startswith(_MARK)
    ]


def _mark(text: str) -> None:
    ops: Any = torch.ops.profiler
    ops._record_function_exit._RecordFunction(ops._record_function_enter_new(_MARK + text, None))


def _traced(call: Callable[[], object]) -> tuple[object, list[int]]:
    result, events = _legacy_events(call)
    return result, [int(event.cpu_memory_usage()) for event in events if event.kind() == "memory_alloc"]


def _legacy_events(call: Callable[[], object]) -> tuple[object, list[Any]]:
    private: Any = torch._C._autograd
    config = _memory_config()
    records: list[list[Any]] = []
    try:  # an interrupt may come between any two calls, so the first is inside, too
        private._enable_profiler_legacy(config)
        result = call()
    finally:
        if private._profiler_enabled():
            records = private._disable_profiler_legacy()
    return result, [event for thread in records for event in thread]


def _memory_config() -> Any:
    return torch._C._profiler.ProfilerConfig(
        torch._C._profiler.ProfilerState.CPU,
        False,  # report_input_shapes
        True,  # profile_memory
        False,  # with_stack
        False,  # with_flops
        False,  # with_modules
        torch._C._profiler._ExperimentalConfig(),
    )


def _traced_by_kineto(call: Callable[[], object]) -> tuple[object, list[int]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    return result, [nbytes for name, nbytes in profiled_memory_events(profile) if name == "[memory]"]


def profiled_memory_events(profile: torch.profiler.profile) -> list[tuple[str, int]]:
    """Names and bytes of a finished profile's events, in order: "[memory]" rows carry bytes, marks carry none."""
    inner: Any = profile.profiler
    rows = ((event.name(), event) for event in inner.kineto_results.events())
    return [(name, int(event.nbytes()) if name == "[memory]" else 0) for name, event in rows]
