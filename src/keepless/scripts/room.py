"""A plan beside which there is as much room as the model's other calls need, which keep what the plan keeps.

The more room a plan leaves, the less it keeps, and the less room is needed. What is looked for is little room that is
enough; where even the tightest plan leaves too little, the budget is too small by what is missing there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from keepless.errors import InfeasibleBudget
from keepless.ir import format_bytes

_SEARCHED, _REFINED = 6, 2
"""Plans that are made until one has room enough, and after it for one that leaves less."""
_LITTLE = 0.02
"""Room is not made less by less than this share of the budget."""
_SLACK = 1 / 512
"""Of a budget that is named: a search in another process goes by other seconds, and may end with a bit more."""

P = TypeVar("P")


def with_room(planned: Callable[[int], tuple[P, int]], limit: int, *, is_alone: bool) -> P:
    """A plan that leaves as much room as it needs. Makes 9 plans at most, and one where no room is needed.

    Arguments:
        planned: a plan that leaves so many bytes of the budget, and the bytes that have to be left by it; of a negative
            number, one for a budget that is larger by it.
        limit: the budget, in bytes.
        is_alone: no other call keeps anything: a call that does not fit is all that there is to say.

    Raises:
        InfeasibleBudget: there is none; its smallest budget has the room in it.
    """
    room, failed = 0, None
    short, lacking, bound = 0, 0, 0
    try:
        for _ in range(_SEARCHED):
            try:
                found, needed = planned(room)
            except InfeasibleBudget as error:
                bound = error.bound - max(room, 0)  # the room is no part of what is proven
                failed = failed or error
                alone = error.smallest_budget - max(room, 0)
                room = min(limit - alone, room - 1)
                if room < 0 and is_alone:
                    raise
                continue
            if needed <= room:
                return _with_less(planned, found, short, room, limit)
            short, lacking = room, needed
            if failed is not None:
                break
            room = needed
        if failed is not None and lacking <= 0:
            raise failed
        # Of a bit more the call may make a plan that keeps more for its backward, whose highest point is elsewhere.
        if not is_alone:
            more = int(2 * _SLACK * (limit - short))
            with suppress(InfeasibleBudget):
                _, wider = planned(short - more)
                if wider > lacking:
                    short, lacking = short - more, wider
        raise _too_small(limit, short, lacking, bound, "" if failed is None else failed.blocking)
    finally:
        failed = None  # its traceback holds this frame, and all that was planned with


def _with_less(planned: Callable[[int], tuple[P, int]], found: P, short: int, room: int, limit: int) -> P:
    """One that leaves less, and keeps more, if there is one between too little room and enough."""
    for _ in range(_REFINED):
        if room - short <= _LITTLE * limit:
            break
        middle = (short + room) // 2
        plan, needed = planned(middle)
        if needed <= middle:
            found, room = plan, middle
        else:
            short = middle
    return found


def _too_small(limit: int, room: int, needed: int, bound: int, blocking: str) -> InfeasibleBudget:
    """What is said: a budget with as much more as is missing leaves the same plan the room that it needs."""
    smallest = limit + needed - room
    smallest += int(_SLACK * smallest)
    floor = f" The highest point of one call is {blocking}." if blocking else ""
    return InfeasibleBudget(
        f"The budget {format_bytes(limit)} ({limit} bytes) is too small: even by the plan that keeps least, what other "
        f"calls keep and need until this backward, or what stands of the step before, is {format_bytes(needed)} beside "
        f"the call that is planned, which alone needs {format_bytes(limit - room)}. The smallest budget for which a "
        f"plan was found is {format_bytes(smallest)} ({smallest} bytes).{floor} What would help: a smaller batch; "
        f"fewer calls before one backward; or a budget of {smallest} bytes.",
        smallest_budget=smallest,
        bound=bound,
        blocking=blocking,
    )
