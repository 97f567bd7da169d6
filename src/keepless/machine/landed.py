"""What a planned step was predicted to do and what it did, round by round."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Landing:
    """One round of landing: a program was run, and compared with what was predicted for it.

    Bytes are the highest on the device, seconds those of the step; the optimizer's part of both is predicted.

    Arguments:
        round: from 1. What round 1 predicted rests on single ops alone.
        predicted_peak, predicted_seconds: before the run.
        measured_peak, measured_seconds: of the run.
        num_replays: of the program that ran.
        is_kept: whether that program is the plan's.
    """

    round: int
    predicted_peak: int
    measured_peak: int
    predicted_seconds: float
    measured_seconds: float
    num_replays: int
    is_kept: bool

    @property
    def peak_error(self) -> float:
        """Predicted over measured, less one; 0 where nothing was measured."""
        return self.predicted_peak / self.measured_peak - 1 if self.measured_peak else 0.0

    @property
    def seconds_error(self) -> float:
        """Predicted over measured, less one; 0 where nothing was measured."""
        return self.predicted_seconds / self.measured_seconds - 1 if self.measured_seconds else 0.0

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return {
            "round": self.round,
            "predicted_peak": self.predicted_peak,
            "measured_peak": self.measured_peak,
            "peak_error": self.peak_error,
            "predicted_seconds": self.predicted_seconds,
            "measured_seconds": self.measured_seconds,
            "seconds_error": self.seconds_error,
            "num_replays": self.num_replays,
            "is_kept": self.is_kept,
        }

    def __str__(self) -> str:
        kept = "" if self.is_kept else "; another program was kept"
        return (
            f"landing, round {self.round}: peak predicted {self.peak_error:+.2%} off the measured one, seconds "
            f"{self.seconds_error:+.1%}; {self.num_replays} replays{kept}"
        )
