"""At the peak of each peer: the fastest of ours within it beside the fastest of the peers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import keepless
from benchmarks.peers.contenders import Contender
from benchmarks.peers.ways import Way

ALIKE = 1.002
"""Peaks that are nearer to each other than this are met by one budget."""
SPLIT = 6
"""With so many rounds and more, every other one chooses the fastest, and the rest is reported."""

S = TypeVar("S")


@dataclass
class Entrant:
    """A contender in this race; ours have a plan.

    Arguments:
        is_exact: loss, gradients and buffers are plain eager's, bit for bit.
        has_gradients: loss and gradients are; buffers may be wrong, as a BatchNorm's that runs twice are.
        is_wrong: gradients or buffers are wrong, beyond another order of sums.
    """

    name: str
    contender: Contender | None = None
    plan: keepless.Plan | None = None
    peak: int = 0
    way: Way | None = None
    samples: list[tuple[float, float]] = field(default_factory=list)
    is_exact: bool = False
    has_gradients: bool = False
    is_wrong: bool = False
    is_timed: bool = True
    own_seconds: float = 0.0
    """Of its second step in its own process, the meter's overhead in it."""

    @property
    def is_ours(self) -> bool:
        """Whether it is Keepless."""
        return self.contender is None

    @property
    def kernels(self) -> str:
        """ "eager" or "inductor"."""
        return "eager" if self.contender is None else self.contender.kernels


E = TypeVar("E", bound=Entrant)


def apart(peaks: Iterable[int]) -> list[int]:
    """Those that are further apart than `ALIKE`, ascending."""
    found: list[int] = []
    for peak in sorted(peaks):
        if not found or peak > ALIKE * found[-1]:
            found.append(peak)
    return found


def matches(timed: Iterable[E], height: Callable[[E], int] = lambda e: e.peak) -> Iterator[tuple[E, E | None, E]]:
    """At the height of each peer with eager kernels and exact gradients: it, the fastest exact plan of ours within it,
    and the fastest such peer within it, whose buffers may be wrong.
    """
    timed = list(timed)
    theirs = [e for e in timed if not e.is_ours and e.kernels == "eager" and e.has_gradients]
    ours = [e for e in timed if e.is_ours and e.is_exact]
    for point in theirs:
        best = fastest(theirs, height(point), height)
        assert best is not None
        yield point, fastest(ours, height(point), height), best


def name_of_cell(metric: str, mine: Entrant, best: Entrant) -> str:
    """The metric of ours over the best one; it says where the latter's buffers are wrong."""
    return f"{metric}{'' if best.is_exact else '_of_wrong_buffers'}: {mine.name} / {best.name}"


def fastest(entrants: Iterable[E], peak: int, height: Callable[[E], int] = lambda e: e.peak) -> E | None:
    """The one whose median step is the shortest, of those within a peak, or within another height."""
    within = [entrant for entrant in entrants if height(entrant) <= peak]
    return min(within, key=lambda e: statistics.median(s[1] for s in chosen(e.samples)), default=None)


def ratios(mine: Entrant, theirs: Entrant, part: int = 1) -> list[float]:
    """Of whole steps, or of forward and backward (`part` 0), in the rounds that both have run."""
    return [a[part] / b[part] for a, b in zip(mine.samples, theirs.samples, strict=False)]


def cell(mine: Entrant, best: Entrant) -> list[float]:
    """The ratios of two that were chosen for their speed."""
    return list(reported(ratios(mine, best)))


def chosen(samples: Sequence[S]) -> Sequence[S]:
    """The rounds by which the fastest is chosen."""
    return samples[::2] if len(samples) >= SPLIT else samples


def reported(samples: Sequence[S]) -> Sequence[S]:
    """The rounds whose ratios are reported: others, so that luck that chose one is not reported with it."""
    return samples[1::2] if len(samples) >= SPLIT else samples
