"""How high memory rises while something runs in this process."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch

from keepless.measure._profiler import run_traced


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python collects no rings of objects inside the block, and all that there are before it.

    Else tensors that such rings held would go at one moment or another, those from before the block among them.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def increments(call: Callable[[], object], device: torch.device) -> int:
    """Highest bytes above the level at the call's start.

    On the CPU it sums the allocation events of torch's profiler, of this thread; on CUDA it asks the allocator.
    Blocks that stood before the call and are freed in it are not seen on the CPU, so that the figure may be a little
    high for steps that free what they were given.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    with uncollected():
        _, events = run_traced(call)
    level = highest = 0
    for nbytes in events:
        level += nbytes
        highest = max(highest, level)
    return highest
