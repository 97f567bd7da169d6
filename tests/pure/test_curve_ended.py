"""Ctrl-C ends a curve with the points that there are."""

from __future__ import annotations

import pytest
from test_solve import SMALL

from keepless.reporting.curve_table import curve_text
from keepless.solve import Search, Standing
from keepless.solve.curve import trace_curve


def interrupting(*after: int) -> Search:
    """A search in which Ctrl-C comes after these many limits."""
    told = 0

    def tell(standing: Standing) -> None:
        nonlocal told
        told += 1
        if told in after:
            raise KeyboardInterrupt

    return Search(tell=tell)


@pytest.mark.slow
def test_ctrl_c_keeps_the_points_that_there_are() -> None:
    graph, cost = SMALL["unet"]()
    whole = trace_curve(graph, cost, points=6)
    short = trace_curve(graph, cost, points=6, search=interrupting(3))
    assert short.is_ended_early
    assert len(short.bounds) == 3 < len(whole.bounds)
    # Later points may find the ends of an order that is still lower.
    assert short.points[0].peak >= whole.points[0].peak
    assert short.points[-1].seconds == whole.points[-1].seconds
    assert short.at(short.smallest_nbytes).peak <= short.smallest_nbytes
    assert short.strategies == ()
    told = curve_text(short)
    assert "ended early, after 3 budgets" in told
    assert "named strategies" not in told
    assert "named strategies" in curve_text(whole)


def test_before_both_ends_there_is_nothing_to_keep() -> None:
    graph, cost = next(iter(SMALL.values()))()
    with pytest.raises(KeyboardInterrupt):
        trace_curve(graph, cost, points=6, search=interrupting(1))
