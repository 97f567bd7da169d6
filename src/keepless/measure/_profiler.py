"""Memory events of torch's profilers: the only private torch calls of the measuring half.

They are apart from `keepless._compat` so that the meter shares nothing with the engines that it judges, imports
included. Each function says what it needs from torch and what happens where a release lacks it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
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


def begin_tracing() -> Callable[[], list[int]] | None:
    """Lists this thread's CPU allocations (+ bytes) and frees (- bytes) until what is given back is called.

    As `run_traced`, for code that is not one call. None where a profiler of the user's is running.
    """
    private: Any = torch._C._autograd
    if private._profiler_enabled():
        return None
    if not hasattr(private, "_enable_profiler_legacy"):
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        profile.start()

        def end_newer() -> list[int]:
            profile.stop()
            return [nbytes for name, nbytes in profiled_memory_events(profile) if name == "[memory]"]

        return end_newer
    private._enable_profiler_legacy(_memory_config())

    def end() -> list[int]:
        if not private._profiler_enabled():
            return []
        records = [event for thread in private._disable_profiler_legacy() for event in thread]
        return [int(event.cpu_memory_usage()) for event in records if event.kind() == "memory_alloc"]

    return end


def traced_between_marks(call: Callable[[Callable[[str], None]], object]) -> list[str | int]:
    """Runs `call(mark)` and lists this thread's marks (text), CPU allocations (+ bytes) and frees (- bytes), in order.

    Blocks from before the call are as uncertain as in `run_traced`.

    Raises:
        RuntimeError: a user's profiler is running.
    """
    private: Any = torch._C._autograd
    if private._profiler_enabled():
        raise RuntimeError("memory cannot be measured between marks inside a running profiler")
    ops: Any = torch.ops.profiler

    def mark(text: str) -> None:
        ops._record_function_exit._RecordFunction(ops._record_function_enter_new(_MARK + text, None))

    if hasattr(private, "_enable_profiler_legacy"):
        records = _legacy_events(lambda: call(mark))[1]
        found: list[str | int] = []
        for event in records:
            if event.kind() == "memory_alloc":
                found.append(int(event.cpu_memory_usage()))
            elif event.kind() == "push" and event.name().startswith(_MARK):
                found.append(event.name().removeprefix(_MARK))
        return found
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call(mark)
    rows = profiled_memory_events(profile)
    return [
        nbytes if name == "[memory]" else name.removeprefix(_MARK)
        for name, nbytes in rows
        if name == "[memory]" or name.startswith(_MARK)
    ]


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
