"""On a 4-layer GPT-2 with dropout and fixed costs the planner is at or beyond a crude greedy over op times."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from test_solve_models import chain, gpt

from keepless.ir import Effect
from keepless.solve import SOLVERS
from keepless.solve.tables import Tables
from keepless.solve.weave import lazy_order

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


def test_the_greedy_drops_what_is_cheap_and_never_draws() -> None:
    """Shed bytes and seconds grow; masks stay; each point's order runs each op at most twice and adds what it says."""
    from benchmarks import crude

    graph, cost = gpt(4)
    tables = Tables(graph, cost)
    points = crude.crude_points(tables)
    assert points[0] == crude.CrudePoint(0.0, 0.0, frozenset())
    assert all(a.added_seconds <= b.added_seconds and a.shed <= b.shed for a, b in itertools.pairwise(points))
    assert points[-1].shed > 0.8
    drawing = {op.id for op in graph.ops if Effect.RNG in op.effects}
    assert all(drawing.isdisjoint(point.replays) for point in points)
    middle = points[len(points) // 2]
    order = lazy_order(tables, middle.replays)
    assert sorted(order) == sorted([*range(len(graph.ops)), *middle.replays])
    assert tables.lives(order).seconds == pytest.approx(sum(cost.seconds) + middle.added_seconds)


def test_a_chain_of_equal_steps_is_dropped_from_the_start() -> None:
    """Where each gradient reads its own step's input, dropping a value takes one step more for each."""
    from benchmarks import crude

    graph, cost = chain(6)
    points = crude.crude_points(Tables(graph, cost))
    assert [len(point.replays) for point in points] == list(range(len(points)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sheds", [(0.2, 0.47, 0.8), pytest.param((0.4, 0.6, 0.69), marks=pytest.mark.exhaustive)], ids=["three", "more"]
)
def test_the_planner_is_at_or_beyond_the_greedy(sheds: tuple[float, ...]) -> None:
    """At each of its points: faster within the same peak, and with the peak ignored no slower for the same bytes.

    Where it sheds less than a third, both are within the 0.5 % at which the planner stops.
    """
    from benchmarks import crude

    graph, cost = gpt(4)
    tables = Tables(graph, cost)
    base = sum(cost.seconds)
    points = crude.crude_points(tables)
    cuts = crude.cut_points(tables)
    compared = 0
    for shed in sheds:
        slack = 1e-9 if shed > 1 / 3 else 0.005
        point = crude.fastest(points, shed)
        assert point is not None
        rival = tables.lives(lazy_order(tables, point.replays))
        mine = SOLVERS["keepless"].solve(graph, cost, rival.peak)
        assert mine.peak <= rival.peak
        assert mine.seconds <= rival.seconds * (1 + slack)
        by_bytes = crude.fastest(cuts, point.shed)
        assert by_bytes is not None
        assert by_bytes.added_seconds <= point.added_seconds * (1 + 1e-9)
        compared += mine.seconds - base < 0.95 * point.added_seconds
    assert compared >= 2
    assert max(point.shed for point in cuts) > max(point.shed for point in points)
