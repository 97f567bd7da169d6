"""How high memory rises while something runs in this process."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch

from keepless.measure._profiler import levels_of, run_traced


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python collects no rings of objects inside the block, and what an earlier block left before it.

    Else tensors that such rings held would go at one moment or another, those from before the block among them. Only
    young objects are looked at: what an earlier block left is young, since nothing was collected in it, and older rings
    stand throughout. To look at all takes 0.2 s where transformers is imported, longer than the step of a small model.
    """
    was_on = gc.isenabled()
    try:  # an interrupt behind `disable` enables it again, too
        gc.collect(1)
        gc.disable()
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
    return levels_of(events)[1]
