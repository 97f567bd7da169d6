"""The meter's process: builds the target, runs its steps, counts bytes. Started by `keepless.measure.meter` only."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import torch

from keepless.measure import interposer
from keepless.measure._profiler import profiled_memory_events
from keepless.processes import end_with

_MARK = "keepless.meter"


class _Counter(Protocol):
    """Counts between marks: the build is span 0, then per step one span for it and one for what follows."""

    def begin(self) -> None: ...

    def mark(self) -> None: ...

    def finish(self) -> tuple[list[int], list[int], list[int]]:
        """Levels at the marks, the highest level after each mark, and the highest reserved bytes (CUDA)."""
        ...


class _Profiler:
    """One profile over everything, the first of the process: sums of its memory events between marks."""

    def __init__(self) -> None:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def begin(self) -> None:
        self.profile.start()

    def mark(self) -> None:
        with torch.profiler.record_function(_MARK):
            pass

    def finish(self) -> tuple[list[int], list[int], list[int]]:
        self.profile.stop()
        level = 0
        levels, peaks = [0], [0]
        for name, nbytes in profiled_memory_events(self.profile):
            if name == _MARK:
                levels.append(level)
                peaks.append(level)
            level += nbytes
            peaks[-1] = max(peaks[-1], level)
        return levels, peaks, []


class _Interposer:
    """Levels of the heap."""

    def __init__(self) -> None:
        interposer.current()  # fails here where the library is not loaded
        self.levels: list[int] = []
        self.peaks: list[int] = []
        self.base = 0

    def begin(self) -> None:
        self.base = interposer.current()
        self.levels = [0]
        interposer.reset_peak()

    def mark(self) -> None:
        self.peaks.append(interposer.peak() - self.base)
        self.levels.append(interposer.current() - self.base)
        interposer.reset_peak()

    def finish(self) -> tuple[list[int], list[int], list[int]]:
        self.peaks.append(interposer.peak() - self.base)
        return self.levels, self.peaks, []


class _Allocator:
    """CUDA's caching allocator."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        torch.empty(1, device=self.device)  # the context is outside the count
        self.levels: list[int] = []
        self.peaks: list[int] = []
        self.reserved: list[int] = []
        self.base = 0

    def begin(self) -> None:
        self.base = torch.cuda.memory_allocated(self.device)
        self.levels = [0]
        torch.cuda.reset_peak_memory_stats(self.device)

    def mark(self) -> None:
        self._note()
        self.levels.append(torch.cuda.memory_allocated(self.device) - self.base)
        torch.cuda.reset_peak_memory_stats(self.device)

    def finish(self) -> tuple[list[int], list[int], list[int]]:
        self._note()
        return self.levels, self.peaks, self.reserved

    def _note(self) -> None:
        torch.cuda.synchronize(self.device)
        self.peaks.append(torch.cuda.max_memory_allocated(self.device) - self.base)
        self.reserved.append(torch.cuda.max_memory_reserved(self.device))


def _counter(method: str, device: str) -> _Counter:
    if method == "interposer":
        return _Interposer()
    return _Allocator(device) if method == "allocator" else _Profiler()


def _load(target: str) -> Callable[..., Callable[[], Any]]:
    module, _, name = target.partition(":")
    found: Callable[..., Callable[[], Any]] = getattr(importlib.import_module(module), name)
    return found


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Run the request; garbage is collected between steps only, so each step's peak holds its own cycles."""
    sys.path.extend(path for path in request["sys_path"] if path not in sys.path)
    torch.set_num_threads(request["num_threads"])
    build = _load(request["target"])
    counter = _counter(request["method"], request["device"])
    seconds: list[float] = []
    answer: Any = None
    gc.collect()
    counter.begin()
    try:
        step = build(**request["arguments"])
        for _ in range(request["steps"]):
            answer = None
            gc.collect()
            gc.disable()
            counter.mark()
            start = time.perf_counter()
            answer = step()
            seconds.append(time.perf_counter() - start)
            counter.mark()
            gc.enable()
    finally:
        levels, peaks, reserved = counter.finish()  # a profiler left running crashes the process at its end
    return {
        "starts": levels[1::2],
        "peaks": peaks[1::2],
        "ends": levels[2::2],
        "build_peak": peaks[0],
        "reserved": reserved[1::2],
        "seconds": seconds,
        "result": answer,
    }


def main() -> None:
    """Read the request from stdin, write the answer to stdout; what the target prints goes to stderr."""
    answer = os.dup(1)
    os.dup2(2, 1)
    os.environ.pop("LD_PRELOAD", None)  # processes that the target starts are not measured
    request = json.loads(sys.stdin.read())
    end_with(int(request["parent"]))
    try:
        text = json.dumps(measure(request))
    except Exception:
        text = json.dumps({"error": traceback.format_exc()[-8000:]})
    with open(answer, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
