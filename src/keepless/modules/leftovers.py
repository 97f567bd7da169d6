"""What the steps before leave standing when a forward begins, and when it lets go of that.

A model that keeps features for others to read holds those of the step before until it overwrites them::

    forward      self.features = []                 or   ...
                 ...                                     self.features = found
    stands       the old ones until here, then new       the old ones and the new ones until here
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keepless.modules.sites import StorageBook

STEPS_BEFORE = "steps_before"
"""Key of a plan's signature: `Leftovers.num_steps`, where there are any."""
_MOST_FORWARDS = 6
"""What still grows after so many forwards is taken for something that the training loop empties."""


@dataclass(frozen=True)
class Leftovers:
    """What the steps before left.

    Arguments:
        num_steps: so many of them, until it is no more and no less from one to the next.
        until: moment of the forward, as in `Survey` -> bytes that are let go of then.
        throughout: bytes that are not.
    """

    num_steps: int = 0
    until: Mapping[int, int] = field(default_factory=dict)
    throughout: int = 0


def steps_before(signature: Mapping[str, Any]) -> int:
    """How many steps a plan's step stands behind, to be measured as one of a loop."""
    found = signature.get(STEPS_BEFORE)
    return found if type(found) is int and 0 <= found < _MOST_FORWARDS else 0


@dataclass(frozen=True)
class Forward:
    """A forward that ended, and whose outputs are gone.

    Arguments:
        made: the storages that it made.
        let_go: moment -> bytes of older forwards that it let go of.
        end: the last moment.
        events: its calls, and when they were: two forwards with the same ones did the same.
    """

    made: StorageBook
    let_go: Mapping[int, int]
    end: int
    events: tuple[Any, ...]


def leftovers(first: Forward, forward: Callable[[Sequence[StorageBook]], Forward]) -> Leftovers:
    """Runs more forwards, each from the state that the one before left, until what stands stays the same.

    Arguments:
        first: the forward from whose state they go on.
        forward: runs one that watches older books.
    """
    books = [first.made]
    if not first.made.standing_nbytes():
        return Leftovers()
    gc.collect(1)  # rings of objects hold tensors for a while: they are not what the model keeps
    kept = level = highest = first.made.standing_nbytes()
    while level and len(books) < _MOST_FORWARDS:
        try:
            last = forward(books)
        except Exception:  # it needs the training loop's part first: that may detach a state, or empty a list
            return Leftovers()
        gc.collect(1)
        old = sum(book.standing_nbytes() for book in books)
        new = last.made.standing_nbytes()
        if old + new <= highest:
            once = kept - new  # made by the first forward only, as tables are: they stand for their own
            until = dict(last.let_go) if last.events == first.events else {}
            until[last.end] = until.get(last.end, 0) + level - old - sum(until.values())
            until = {moment: nbytes for moment, nbytes in until.items() if nbytes}
            throughout = max(0, old - max(0, once))
            return Leftovers(len(books), until, throughout) if until or throughout else Leftovers()
        books.append(last.made)
        level = old + new
        highest = max(highest, level)
    return Leftovers()
