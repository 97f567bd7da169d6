"""What a step did, or will do, over time. Predicted and measured timelines are this one type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Event:
    """One instruction on the timeline.

    Arguments:
        index: the instruction's number in the program (-1 where it is not known).
        start, end: seconds from the step's start.
        stall: seconds of `end - start` spent waiting for a copy.
        resident: bytes on the device after the instruction.
        peak: highest bytes on the device while it runs, scratch included.
        label: what ran, where that is more than one instruction: a phase of the step.
    """

    index: int
    start: float
    end: float
    stall: float
    resident: int
    peak: int
    label: str = ""


@dataclass(frozen=True)
class Timeline:
    """Events in order.

    Arguments:
        events: one per instruction. Measured ones may be missing, or be of whole phases (index -1, and a label).
        peaks: highest bytes per tier over the step.
        origin: "predicted" or "measured".
    """

    events: tuple[Event, ...]
    peaks: Mapping[str, int] = field(default_factory=dict)
    origin: str = "predicted"

    @property
    def seconds(self) -> float:
        """Length of the step."""
        return self.events[-1].end if self.events else 0.0

    @property
    def peak(self) -> int:
        """Highest bytes on the device."""
        return self.peaks.get("device", 0)

    @property
    def peak_index(self) -> int:
        """The first instruction that reaches the peak."""
        return max(self.events, key=lambda event: (event.peak, -event.index)).index
