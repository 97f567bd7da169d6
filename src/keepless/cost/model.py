"""What ops and links cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Origin(Enum):
    """Where a cost comes from."""

    ANALYTIC = "analytic"
    MEASURED = "measured"
    LEARNED = "learned"


@dataclass(frozen=True, slots=True)
class Link:
    """A way between two tiers: bytes per second and seconds of latency."""

    bytes_per_s: float
    latency: float = 0.0


@dataclass(frozen=True)
class CostModel:
    """Costs of one graph's ops on one device.

    Arguments:
        seconds: per op, of one run.
        scratch: per op, bytes beyond its outputs while it runs.
        links: (src tier, dst tier) -> Link.
        origin: where the numbers come from.
        spread: relative spread of the seconds (p80 / p20 - 1), 0 if not known.
        disturbed: share of the seconds, from 0 to 1, that was measured while other processes had the cores: these are
            too long by an unknown factor.
    """

    seconds: tuple[float, ...]
    scratch: tuple[int, ...]
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    origin: Origin = Origin.ANALYTIC
    spread: float = 0.0
    disturbed: float = 0.0
