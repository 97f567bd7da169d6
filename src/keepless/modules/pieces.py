"""From a survey to regions and pieces: where a forward can be cut, and what a recompute of each call would free.

The begins and ends of the chosen calls cut the forward into pieces. A piece is one forward op of the step's graph and
has one backward op; what stands between two calls in the code of the module around them is a piece like any other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property

from keepless.modules.sites import Site
from keepless.modules.survey import Survey
from keepless.solve.regions import Region, RegionTree

_LEAST_SHARE = 0.001
_LEAST_OF_BLOCK = 0.2
"""Calls are no regions whose recompute frees less than the first share of all bytes saved; in models of very many
blocks, less than the second of what the largest block does."""
_SAME = 0.98
"""A call that frees so much of what the call around it frees is no region of its own."""
_MOST_REGIONS = 1500


@dataclass(frozen=True)
class Cut:
    """A forward cut into pieces.

    Arguments:
        survey: what it rests on.
        regions: positions in `survey.calls` of the calls that can be regions, in order.
    """

    survey: Survey
    regions: tuple[int, ...]

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Where the regions' calls stand."""
        return tuple(self.survey.calls[i].site for i in self.regions)

    @cached_property
    def boundaries(self) -> list[int]:
        """Moments at which a piece ends and the next begins."""
        calls = [self.survey.calls[i] for i in self.regions]
        return sorted([*(call.begin for call in calls), *(call.end for call in calls)])

    def piece_of(self, moment: int) -> int:
        """The piece that runs at a moment."""
        return bisect_right(self.boundaries, moment)

    @property
    def num_pieces(self) -> int:
        """How many pieces there are."""
        return len(self.boundaries) + 1

    @cached_property
    def tree(self) -> RegionTree:
        """The regions as ranges of pieces."""
        calls = [self.survey.calls[i] for i in self.regions]
        ranges = tuple(Region(self.piece_of(call.begin), self.piece_of(call.end - 1)) for call in calls)
        saving = frozenset(self.piece_of(item.moment) for item in self.survey.saved)
        return RegionTree(ranges, self.num_pieces, saving)

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """For each piece the call whose code runs in it (position in `survey.calls`), -1 for the model's own."""
        found = [-1] * self.num_pieces
        for number in self.regions:
            call = self.survey.calls[number]
            for piece in range(self.piece_of(call.begin), self.piece_of(call.end - 1) + 1):
                found[piece] = number
        return tuple(found)

    @cached_property
    def repeated(self) -> frozenset[str]:
        """Paths of modules that one forward calls more than once."""
        return frozenset(call.site.path for call in self.survey.calls if call.site.number > 0)


def cut(survey: Survey, without: Container[int] = ()) -> Cut:
    """The calls whose recompute frees something worth naming, and the pieces between their begins and ends.

    Arguments:
        without: positions in `survey.calls` of calls that cannot be recomputed.
    """
    calls = survey.calls
    gains = _gains(survey)
    least = _least(survey, gains)
    worthy = [
        number
        for number, call in enumerate(calls)
        if call.end >= 0 and gains[number] >= least and number not in without
    ]
    if len(worthy) > _MOST_REGIONS:
        worthy = sorted(sorted(worthy, key=lambda i: (-gains[i], i))[:_MOST_REGIONS])
    chosen: list[int] = []
    around: list[int] = []
    for number in worthy:
        while around and calls[around[-1]].end <= calls[number].begin:
            around.pop()
        if around and gains[number] >= _SAME * gains[around[-1]]:
            continue
        chosen.append(number)
        around.append(number)
    return Cut(survey, tuple(chosen))


def cut_at(survey: Survey, paths: Container[str], without: Container[int] = ()) -> Cut:
    """The calls of these modules, as far as they save something worth naming, and the pieces between them.

    A module that is also called inside another of these calls is left out: its calls could not be told by number.

    Arguments:
        paths: of modules none of which is inside another.
        without: positions in `survey.calls` of calls that cannot be recomputed.
    """
    gains = _gains(survey)
    least = _least(survey, gains)
    chosen: list[int] = []
    within: set[str] = set()
    end = -1
    for number, call in enumerate(survey.calls):
        if call.begin < end:
            within.add(call.site.path)
        elif call.site.path in paths and call.end >= 0 and number not in without and gains[number] >= least:
            chosen.append(number)
            end = call.end
    return Cut(survey, tuple(number for number in chosen if survey.calls[number].site.path not in within))


def _least(survey: Survey, gains: Sequence[int]) -> float:
    """The bytes that a call must free to be worth naming."""
    whole = survey.nbytes({item.storage for item in survey.saved if survey.made[item.storage] >= 0})
    block = max((gain for gain in gains if gain <= whole / 2), default=0)
    return max(1.0, min(_LEAST_SHARE * whole, _LEAST_OF_BLOCK * block))


def _gains(survey: Survey) -> list[int]:
    """For each call, bytes that it saves and makes itself, and that nobody saves or holds outside of it; less those of
    its inputs that nobody saves: a recompute would have to hold them.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for item in survey.saved:
        first.setdefault(item.storage, item.moment)
        last[item.storage] = item.moment
    held = set(survey.outputs)
    sizes = survey.book.nbytes
    stones = sorted(
        (last[number], survey.made[number], sizes[number])
        for number in first
        if survey.made[number] >= 0 and number not in held
    )
    moments = [stone[0] for stone in stones]
    found: list[int] = []
    for call in survey.calls:
        low, high = bisect_right(moments, call.begin - 1), bisect_right(moments, call.end - 1)
        new = sum(sizes[s] for s in call.inputs if s not in first and survey.made[s] >= 0 and s not in held)
        found.append(sum(nbytes for _, made, nbytes in stones[low:high] if made >= call.begin) - new)
    return found
