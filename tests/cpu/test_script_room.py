"""Room for other calls beside the planned one: how much, and what is said where there is too little."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch

from keepless.errors import InfeasibleBudget
from keepless.scripts.resets import Resets
from keepless.scripts.room import with_room

CALL, KEPT = 1000, 600
"""A call alone needs `CALL` bytes and keeps 300 then; with 3000 and more it keeps all of its `KEPT`."""


class Calls:
    """A model's plans: the room that they leave, and what another call by the same plan needs."""

    def __init__(self, limit: int, others: int = 1) -> None:
        self.limit, self.others, self.asked = limit, others, []

    def planned(self, room: int) -> tuple[int, int]:
        """What it may use for itself, and what others need."""
        self.asked.append(room)
        own = self.limit - room
        if own < CALL:
            least = CALL + max(room, 0)
            raise InfeasibleBudget("one call", smallest_budget=least, bound=least, blocking="an op")
        return own, self.others * min(KEPT, 300 + (own - CALL) * 300 // 2000)


@pytest.mark.parametrize(
    ("limit", "others"), [(1400, 1), (1301, 1), (2500, 1), (5000, 1), (2000, 3), (1901, 3), (9000, 3)]
)
def test_a_plan_leaves_what_others_need(limit: int, others: int) -> None:
    limit += 300 * (others - 1)
    calls = Calls(limit, others)
    own = with_room(calls.planned, limit, is_alone=False)
    needed = others * min(KEPT, 300 + (own - CALL) * 300 // 2000)
    assert own + needed <= limit
    assert own + needed >= 0.6 * limit or own >= 3000  # not much is left over
    assert len(calls.asked) <= 8


def test_nothing_is_left_where_nothing_is_needed() -> None:
    calls = Calls(2000, others=0)
    assert with_room(calls.planned, 2000, is_alone=True) == 2000
    assert calls.asked == [0]


@pytest.mark.parametrize("limit", [700, 1000, 1299])
@pytest.mark.parametrize("others", [1, 4])
def test_the_budget_that_is_named_is_enough(limit: int, others: int) -> None:
    with pytest.raises(InfeasibleBudget, match="too small") as caught:
        with_room(Calls(limit, others).planned, limit, is_alone=False)
    named = caught.value.smallest_budget
    assert named == pytest.approx(CALL + 300 * others, rel=0.006)  # it is enough for a call with a bit more, too
    assert f"or a budget of {named} bytes" in str(caught.value)
    assert caught.value.blocking == "an op"
    assert caught.value.bound == CALL  # the room is no part of what is proven
    assert with_room(Calls(named, others).planned, named, is_alone=False) >= CALL


def test_a_call_that_does_not_fit_alone_says_so() -> None:
    for others, is_alone in ((0, True), (0, False)):
        with pytest.raises(InfeasibleBudget, match="one call"):
            with_room(Calls(900, others).planned, 900, is_alone=is_alone)


class Jumping(Calls):
    """A call that with one byte more keeps twice as much for its backward, as its highest point is elsewhere."""

    def planned(self, room: int) -> tuple[int, int]:
        """See `Calls`."""
        own, _ = super().planned(room)
        return own, KEPT if own > CALL else KEPT // 2


def test_the_budget_that_is_named_is_enough_for_a_plan_that_keeps_more() -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        with_room(Jumping(700).planned, 700, is_alone=False)
    named = caught.value.smallest_budget
    assert named == pytest.approx(CALL + KEPT, rel=0.006)
    assert with_room(Jumping(named).planned, named, is_alone=False) >= CALL


@pytest.mark.parametrize("limit", [700, 1301])
def test_what_was_planned_with_is_let_go(limit: int, no_gc: None) -> None:
    """A refusal on the way holds no batch until Python collects."""
    batch = torch.zeros(1)
    gone = weakref.ref(batch)
    calls = Calls(limit)

    def planned(room: int, batch: torch.Tensor = batch) -> tuple[int, int]:
        return calls.planned(room)

    with contextlib.suppress(InfeasibleBudget):
        with_room(planned, limit, is_alone=False)
    del planned, batch
    assert gone() is None
    assert len(calls.asked) > 1


def test_late_resets_are_seen_until_the_end() -> None:
    own = torch.optim.Optimizer.zero_grad, torch.nn.Module.zero_grad
    waits = False
    resets = Resets(lambda: waits)
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    resets.begin()
    try:
        net(torch.ones(2)).sum().backward()
        optimizer.zero_grad()
        assert net.weight.grad is None
        assert not resets.are_late
        waits = True
        net(torch.ones(2)).sum().backward()
        net.zero_grad(set_to_none=False)
        assert net.weight.grad is not None
        assert resets.are_late
    finally:
        resets.end()
    assert (torch.optim.Optimizer.zero_grad, torch.nn.Module.zero_grad) == own
