"""Memory events of torch's profilers: the only private torch calls of the measuring half.

They are apart from `keepless._compat` so that the meter shares nothing with the engines that it judges, imports
included. Each function says what it needs from torch and what happens where a release lacks it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


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


def _traced(call: Callable[[], object]) -> tuple[object, list[int]]:
    private: Any = torch._C._autograd
    config = torch._C._profiler.ProfilerConfig(
        torch._C._profiler.ProfilerState.CPU,
        False,  # report_input_shapes
        True,  # profile_memory
        False,  # with_stack
        False,  # with_flops
        False,  # with_modules
        torch._C._profiler._ExperimentalConfig(),
    )
    private._enable_profiler_legacy(config)
    try:
        result = call()
    finally:
        records = private._disable_profiler_legacy()
    events = (event for thread in records for event in thread if event.kind() == "memory_alloc")
    return result, [int(event.cpu_memory_usage()) for event in events]


def _traced_by_kineto(call: Callable[[], object]) -> tuple[object, list[int]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    return result, [nbytes for name, nbytes in profiled_memory_events(profile) if name == "[memory]"]


def profiled_memory_events(profile: torch.profiler.profile) -> list[tuple[str, int]]:
    """Names and bytes of a finished profile's events, in order: "[memory]" rows carry bytes, marks carry none."""
    inner: Any = profile.profiler
    rows = ((event.name(), event) for event in inner.kineto_results.events())
    return [(name, int(event.nbytes()) if name == "[memory]" else 0) for name, event in rows]
