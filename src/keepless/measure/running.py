"""The peak of one step of somebody else's loop, which begins and ends in calls of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from keepless.measure._profiler import AllocationWatch, levels_of


class StepMeter:
    """Measures the highest bytes on a device between `begin` and `end`, which are called on one thread.

    On CUDA these are the allocator's, of all that stands on the device. On the CPU they are the bytes that stand at the
    beginning, as far as they are known, and what this thread allocates and frees from then on, by torch's profiler.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._watch = AllocationWatch()
        self._standing = 0
        self._has_begun = False

    @property
    def is_running(self) -> bool:
        """Whether it has begun and not ended."""
        return self._has_begun

    def begin(self, standing: int) -> bool:
        """Begins; False where a profiler of the user's is running.

        Arguments:
            standing: bytes on the device now; the allocator knows better on CUDA.
        """
        self.abort()
        self._standing = standing
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._has_begun = True
        else:
            self._has_begun = self._watch.start()
        return self._has_begun

    def end(self) -> int | None:
        """The highest bytes since it began; None where another measurement came between."""
        assert self._has_begun, "the meter has not begun"
        self._has_begun = False
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        events = self._watch.stop()
        return None if events is None else self._standing + levels_of(events)[1]

    def abort(self) -> None:
        """Ends without an answer, if it has begun."""
        if self._has_begun:
            self._has_begun = False
            self._watch.stop()


def nbytes_of(tensors: Iterable[torch.Tensor | None], device: torch.device) -> int:
    """Bytes that tensors hold on a device, each storage once."""
    storages = {}
    for tensor in tensors:
        if tensor is not None and tensor.device.type == device.type:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
