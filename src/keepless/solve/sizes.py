"""The largest size of a step that fits, from few looks: what a size needs grows nearly in proportion to it.

Two sizes give a line, and the line says where the limit is met; where it misleads (kernels that change with the size,
attention that grows by the square) the bracket is halved instead. The search ends with a size that fits beside one that
does not, so that what it says was looked at, whatever the curve is in between::

    found = largest(look, limit=8 << 30, low=1, high=None)
    found.size, found.above     # 23 fits, and 24 does not
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MAX_SIZE = 2**40
"""Beyond any batch, text or network: a size up to which nothing grows has no largest."""
_GROWTH = 64
"""Times the largest size that is known to fit: a line through small sizes may lead far beyond."""
_PATIENCE = 3
"""Looks in a row that may leave more than half of the bracket; from then on it is halved: needs may rise by steps."""


@dataclass(frozen=True, slots=True)
class Need:
    """What one size needs.

    Arguments:
        fits: whether it is within the limit.
        value: in the limit's unit; None where the size is refused, whatever the limit.
        hint: a size that a refusal speaks of, to look at next.
    """

    fits: bool
    value: float | None
    hint: int | None = None


@dataclass(frozen=True, slots=True)
class Largest:
    """How a search ended.

    Arguments:
        size: the largest that fits; None where not even the lowest does.
        above: the next size, which was looked at and does not fit; None where `high` or MAX_SIZE ended the search.
    """

    size: int | None
    above: int | None


def largest(
    look: Callable[[int], Need], limit: float, low: int, high: int | None = None, step: int = 1, fixed: float = 0.0
) -> Largest:
    """The largest multiple of `step` from `low` to `high` that fits; each size is looked at once.

    Where needs do not rise with the size it is one that fits beside one that does not, and not always the largest.
    Complexity: a handful of looks where needs are a line, O(log(size)) at worst.

    Arguments:
        look: what a size needs.
        low, high: multiples of `step`; None for no end but MAX_SIZE.
        fixed: the part of the need that does not grow, as far as it is known.
    """
    end = MAX_SIZE // step * step if high is None else high
    known: dict[int, Need] = {}

    def at(size: int) -> Need:
        if size not in known:
            known[size] = look(size)
        return known[size]

    if not at(low).fits:
        return Largest(None, low)
    below: int = low
    above: int | None = None
    num_slow, stride = 0, step
    while below < end and (above is None or above - below > step):
        before = None if above is None else above - below
        if above is None:
            guess = _beyond(known, below, limit, fixed)
            if guess < below + stride:
                guess = below + stride
                stride *= 2
            guess = min(guess, below * _GROWTH, end)
        elif num_slow >= _PATIENCE:
            guess = (below + above) // 2
        else:
            guess = _between(known, below, above, limit, fixed)
        guess = max(guess // step * step, below + step)
        if above is not None:
            guess = min(guess, above - step)
        if at(guess).fits:
            below = guess
        else:
            above = guess
        if above is not None:
            is_slow = before is not None and 2 * (above - below) > before
            num_slow = num_slow + 1 if is_slow else num_slow if num_slow >= _PATIENCE else 0
    return Largest(below, above)


def _beyond(known: dict[int, Need], below: int, limit: float, fixed: float) -> int:
    """Where the line through the two largest sizes that fit meets the limit; `fixed` stands for one at size 0."""
    values = {size: need.value for size, need in known.items() if need.value is not None and size <= below}
    if len(values) == 1:
        values[0] = min(fixed, values[below])
    return _meets({size: values[size] for size in sorted(values)[-2:]}, below, below * _GROWTH, limit)


def _between(known: dict[int, Need], below: int, above: int, limit: float, fixed: float) -> int:
    """Where the curve through the sizes that were looked at meets the limit, between one that fits and one that does
    not."""
    here, there = known[below].value, known[above].value
    if here is None or there is None or there <= max(here, limit):
        hint = known[above].hint
        if hint is not None and below <= hint < above:
            return hint  # or the next one, where it is known to fit
        return min((below + above) // 2, _beyond(known, below, limit, fixed))
    # Both ends of the bracket: where needs are flat at first, three sizes below are nearer to the limit than `above`.
    values = {size: need.value for size, need in known.items() if need.value is not None}
    others = sorted(values.keys() - {below, above}, key=lambda size: abs(values[size] - limit))
    return _meets({size: values[size] for size in (below, above, *others[:1])}, below, above, limit)


def _meets(values: dict[int, float], below: int, above: int, limit: float) -> int:
    """The largest size from `below` to `above` at which the parabola through the three values next to the limit, or the
    line through two, is within it. The line also where the parabola falls."""
    near = sorted(values, key=lambda size: abs(values[size] - limit))[:3]
    a = near[0]
    slope = (values[near[1]] - values[a]) / (near[1] - a)
    bend = 0.0
    if len(near) == 3:
        bend = ((values[near[2]] - values[a]) / (near[2] - a) - slope) / (near[2] - near[1])
        if any(slope + bend * (2 * end - a - near[1]) <= 0 for end in (below, above)):
            return _meets({size: values[size] for size in (below, above)}, below, above, limit)
    low, high = below, above
    while high - low > 1:
        middle = (low + high) // 2
        value = values[a] + (middle - a) * (slope + bend * (middle - near[1]))
        low, high = (middle, high) if value <= limit else (low, middle)
    return high if high == above and values[a] + (above - a) * (slope + bend * (above - near[1])) <= limit else low
