"""What `benchmarks.peers.card` asks of a device: levels and peaks of memory, moments, an end to what takes too long."""

from __future__ import annotations

import contextlib
import gc
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from keepless.measure.steps import increments


class TimeLimit(BaseException):
    """A contender took too long. Nobody's `except Exception` but this file's is to answer it."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TimeLimit in what takes longer, as soon as Python has its turn."""

    def ring(number: int, frame: object) -> None:
        raise TimeLimit(f"it took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


class Memory:
    """The allocator of a device; on the CPU, where it has none, levels are 0 and peaks those of the profiler."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_card = self.device.type == "cuda"

    def clean(self) -> None:
        """Nothing is cached."""
        gc.collect()
        if self.is_card:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def level(self) -> tuple[int, int]:
        """Bytes that are allocated, and reserved."""
        if not self.is_card:
            return 0, 0
        return torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)

    def peaks(self, step: Callable[[], object]) -> tuple[int, int]:
        """The highest of both in a step; on the CPU above its start, and 0."""
        if not self.is_card:
            return increments(step, self.device), 0
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

    def mark(self) -> Any:
        """A moment: of the device's own work where it runs behind."""
        if not self.is_card:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, one: Any, other: Any) -> float:
        """Between two moments; the device has come to the later one."""
        return float(one.elapsed_time(other)) / 1e3 if self.is_card else float(other - one)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.is_card:
            torch.cuda.synchronize(self.device)

    def generator(self) -> torch.Tensor:
        """The state of random numbers."""
        return torch.cuda.get_rng_state(self.device) if self.is_card else torch.get_rng_state()
