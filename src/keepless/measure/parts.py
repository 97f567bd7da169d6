"""How high memory rises in each part of something that runs in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from keepless.errors import MeasureError
from keepless.measure._profiler import traced_between_marks
from keepless.measure.steps import uncollected

Mark = Callable[[int], None]
"""Called where a part begins, with its label."""


@dataclass(frozen=True, slots=True)
class Part:
    """What ran between two marks. Bytes are above the level at the whole call's start.

    Arguments:
        label: of the mark at its beginning.
        peak: highest level.
        level: at its end.
    """

    label: int
    peak: int
    level: int


def memory_parts(call: Callable[[Mark], object], device: torch.device) -> list[Part]:
    """Runs `call(mark)`; the parts between its marks, in order. What comes before the first mark has the label -1.

    Raises:
        MeasureError: a profiler of the user's is running (CPU).
    """
    if device.type == "cuda":
        return _by_allocator(call, device)
    try:
        with uncollected():
            events = traced_between_marks(lambda mark: call(lambda label: mark(str(label))))
    except RuntimeError as error:
        if "profiler" not in str(error):
            raise
        raise MeasureError(f"{error}; plan outside of it.") from error
    parts: list[Part] = []
    level = highest = 0
    label = -1
    for event in events:
        if isinstance(event, str):
            parts.append(Part(label, highest, level))
            label, highest = int(event), level
        else:
            level += event
            highest = max(highest, level)
    parts.append(Part(label, highest, level))
    return parts


def _by_allocator(call: Callable[[Mark], object], device: torch.device) -> list[Part]:
    parts: list[Part] = []
    last = -1
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)

    def end() -> None:
        level = torch.cuda.memory_allocated(device) - start
        parts.append(Part(last, torch.cuda.max_memory_allocated(device) - start, level))
        torch.cuda.reset_peak_memory_stats(device)

    def mark(label: int) -> None:
        nonlocal last
        end()
        last = label

    call(mark)
    end()
    return parts
