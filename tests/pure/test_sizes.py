"""The search over sizes: right wherever needs rise, honest where they do not, and in few looks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepless.solve.sizes import MAX_SIZE, Largest, Need, largest


class Looks:
    """A function of sizes that counts."""

    def __init__(self, need: Callable[[int], float], limit: float, end: int | None = None) -> None:
        self.need, self.limit, self.end = need, limit, end
        self.seen: list[int] = []

    def __call__(self, size: int) -> Need:
        assert size not in self.seen, f"size {size} is looked at twice"
        self.seen.append(size)
        if self.end is not None and size > self.end:
            return Need(False, None, self.end)
        value = self.need(size)
        return Need(value <= self.limit, value)


@pytest.mark.parametrize(
    ("need", "most"),
    [
        (lambda n: 1000 + 7.3 * n, 7),
        (lambda n: 500 + n + 0.01 * n * n, 7),
        (lambda n: 3 * n + 100 * n**0.5, 10),
        (lambda n: 100 * (n // 37) + n, 13),
    ],
)
@pytest.mark.parametrize("limit", [2000.0, 5e3, 1e5, 1e6, 3.3e7, 1e9])
def test_few_looks(need: Callable[[int], float], most: int, limit: float) -> None:
    """Lines and parabolas take up to seven looks, from 1 to a hundred million; stairs some more."""
    look = Looks(need, limit)
    found = largest(look, limit, 1)
    assert found.size is not None
    assert found.above == found.size + 1
    assert need(found.size) <= limit < need(found.above)
    assert len(look.seen) <= most


def test_flat_at_first() -> None:
    """An optimizer's step is the peak of small sizes: the three sizes nearest to the limit tell nothing."""
    look = Looks(lambda n: max(25.2e6 + 1e3 * n, 23.2e6 + 8.3e3 * n), 30e6)
    assert largest(look, 30e6, 1, fixed=18e6) == Largest(819, 820)
    assert len(look.seen) <= 10, look.seen


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=300),
    st.integers(0, 20_000),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 3000),
)
@settings(max_examples=400, deadline=None)
def test_rising_needs_have_one_answer(rises: list[int], limit: int, step: int, is_ended: bool, fixed: int) -> None:
    """Whatever rises, the answer is the largest multiple that fits, and nothing beyond `high` is looked at."""
    needs = [0]
    for rise in rises:
        needs.append(needs[-1] + rise)

    def need(size: int) -> float:
        return float(needs[size]) if size < len(needs) else needs[-1] + 1000.0 * (size - len(needs) + 1)

    high = step * 40 if is_ended else None
    look = Looks(need, limit)
    found = largest(look, limit, step, high, step, float(fixed))
    fitting = [size for size in range(step, (high or 400) + 1, step) if need(size) <= limit]
    if not fitting:
        assert found == Largest(None, step)
    else:
        assert found.size == max(fitting)
        assert found.above == (None if found.size == high else found.size + step)
    assert all(size % step == 0 and (high is None or size <= high) for size in look.seen)


@given(st.lists(st.integers(0, 100), min_size=2, max_size=200), st.integers(0, 100), st.integers(1, 200))
@settings(max_examples=300, deadline=None)
def test_other_needs_end_at_a_border(needs: list[int], limit: int, end: int) -> None:
    """Where needs go up and down, and where sizes are refused, a size that fits is given beside one that does not."""

    def need(size: int) -> float:
        return float(needs[size % len(needs)]) if size < 1000 else 1e9

    look = Looks(need, limit, end if end < 190 else None)
    found = largest(look, limit, 1, 500)
    if found.size is None:
        assert need(1) > limit
        return
    assert need(found.size) <= limit
    if found.above is None:
        assert found.size == 500
    else:
        assert found.above == found.size + 1
        assert found.above in look.seen
        assert need(found.above) > limit or (end < 190 and found.above > end)


def test_a_refusal_says_where_to_look() -> None:
    """A table of 512 positions ends the search in four looks."""
    look = Looks(lambda n: 10.0 + n, 1e9, end=512)
    assert largest(look, 1e9, 8, None, 8) == Largest(512, 520)
    assert len(look.seen) <= 4


def test_needs_that_do_not_rise_have_no_end() -> None:
    """Then there is nothing above; it takes few looks to know."""
    look = Looks(lambda n: 5.0, 10.0)
    assert largest(look, 10.0, 3, None, 3) == Largest(MAX_SIZE // 3 * 3, None)
    assert len(look.seen) < 12
