"""The whole curve: points on a front, bounds below them, plans between them, the knee, strategies, the picture."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solve import SMALL, least_seconds, tiny
from test_solve_models import chain, dense

import keepless.solve.curve as curve_module
import keepless.solve.planner as planner_module
from keepless.cost import CostModel
from keepless.errors import InfeasibleBudget, SolverError
from keepless.ir import Budget, Effect, Graph, Kind, Op, Phase, Status, Value
from keepless.machine import simulate, verify
from keepless.reporting.curve_table import curve_text
from keepless.solve import SOLVERS, Search, Standing, recheck, solve
from keepless.solve.curve import MAX_LIMITS, Curve, trace_curve
from keepless.solve.front import Line, Point, front_of, next_limit
from keepless.solve.lagrange import Woven
from keepless.solve.met import MOST_BETWEEN, sort_out
from keepless.solve.solution import Solution

pytestmark = pytest.mark.slow


@cache
def traced(model: str) -> Curve:
    """The curve of a small model, solved for six limits."""
    return trace_curve(*SMALL[model](), points=6)


def check(curve: Curve) -> None:
    """Whatever holds for every curve."""
    graph, cost = curve.graph, curve.cost
    peaks = [point.peak for point in curve.points]
    seconds = [point.seconds for point in curve.points]
    assert peaks == sorted(set(peaks))
    assert all(a > b for a, b in itertools.pairwise(seconds))
    assert seconds[-1] <= curve.baseline_seconds
    assert peaks[0] <= curve.smallest_nbytes
    for point in curve.points:
        found = point.solution
        verify(graph, found.program, cost=cost, budget=Budget({"device": point.peak}))
        timeline = simulate(graph, found.program, cost)
        assert timeline.peak == found.peak <= point.limit_nbytes
        assert timeline.seconds == pytest.approx(found.seconds)
        assert point.bound_seconds <= point.seconds * (1 + 1e-9)
        assert curve.floor_nbytes <= found.peak
    limits = [bound.limit_nbytes for bound in curve.bounds]
    assert limits == sorted(set(limits))
    assert all(curve.bound_at(line.limit_nbytes) >= line.seconds * (1 - 1e-9) for line in curve.bounds)
    grid = [peaks[0] + (curve.baseline_peak - peaks[0]) * step // 30 for step in range(31)]
    bounds = [curve.bound_at(limit) for limit in grid]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == pytest.approx(sum(cost.seconds))
    for limit, bound in zip(grid, bounds, strict=True):
        assert bound <= curve.seconds_at(limit) * (1 + 1e-9)


@pytest.mark.parametrize("model", ["bn", "gpt", "unet", pytest.param("dense", marks=pytest.mark.exhaustive)])
def test_every_point_is_what_it_claims(model: str) -> None:
    """Points are a front, verify, simulate to their claims, and are at least as fast as the planner at one limit."""
    curve = traced(model)
    check(curve)
    middle = curve.bounds[len(curve.bounds) // 2].limit_nbytes
    alone = SOLVERS["keepless"].solve(curve.graph, curve.cost, middle)
    assert curve.at(middle).peak <= middle
    assert curve.at(middle).seconds <= alone.seconds * (1 + 1e-9)


@given(st.integers(0, 10**6), st.integers(2, 5))
@settings(max_examples=15, deadline=None)
def test_random_graphs_have_honest_curves(seed: int, layers: int) -> None:
    """On tiny random graphs no bound on the curve is above the exhaustive optimum, and no plan below it.

    Ops of the backward run once, as the bounds suppose.
    """
    graph, cost = tiny(seed, layers)
    once = frozenset({Effect.OPAQUE})
    ops = tuple(replace(op, effects=once) if op.phase is Phase.BACKWARD else op for op in graph.ops)
    graph = replace(graph, ops=ops)
    curve = trace_curve(graph, cost, points=4)
    check(curve)
    low, high = curve.points[0].peak, curve.baseline_peak
    for limit in sorted({low, (2 * low + high) // 3, (low + 2 * high) // 3, high}):
        best = least_seconds(graph, cost, limit)
        assert best is not None
        assert curve.bound_at(limit) <= best * (1 + 1e-9)
        assert curve.at(limit).seconds >= best * (1 - 1e-9)
    assert least_seconds(graph, cost, curve.floor_nbytes - 1) is None


def test_at_never_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans at any limit come from the curve, fit, are verified, and get faster with the limit; nothing is searched."""
    curve = traced("gpt")
    graph, cost = curve.graph, curve.cost

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("at() solved again")

    monkeypatch.setattr(planner_module.Planner, "firsts", refuse)
    monkeypatch.setattr(planner_module.Planner, "lower", refuse)
    monkeypatch.setattr(curve_module, "plan", refuse)
    before = float("inf")
    low, high = curve.points[0].peak, curve.baseline_peak
    for step in range(41):
        limit = low + step * (high + 1000 - low) // 40
        found = curve.at(limit)
        verify(graph, found.program, cost=cost, budget=Budget({"device": limit}))
        assert found.peak <= limit
        assert found.seconds <= before * (1 + 1e-9)
        assert found.certificate.bound_seconds == curve.bound_at(limit) <= found.seconds * (1 + 1e-9)
        assert found.certificate.bound_bytes == found.smallest_bound == curve.floor_nbytes
        assert found.smallest_nbytes <= limit
        before = found.seconds
        if step % 8 == 0:
            assert recheck(graph, cost, limit, found.certificate).holds
    assert curve.at(high).certificate.status is Status.OPTIMAL
    assert curve.at(1 << 50).seconds == curve.points[-1].seconds


def test_orders_between_the_points_are_used() -> None:
    """Somewhere between two points an order that the searches met is faster than the point below."""
    curve = traced("gpt")
    assert curve.between
    faster = 0
    for woven in curve.between:
        below = [point for point in curve.points if point.peak <= woven.peak][-1]
        found = curve.at(woven.peak)
        assert woven.seconds < below.seconds
        faster += found.seconds < below.seconds
        assert found.certificate.status in (Status.FEASIBLE, Status.OPTIMAL)
    assert faster > 0


def test_shared_orders_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the searches met too many orders, those that another beats are forgotten, and the curve is the same."""
    graph, cost = SMALL["bn"]()
    planners: list[planner_module.Planner] = []

    class Watched(planner_module.Planner):
        def __init__(self, graph: Graph, cost: CostModel) -> None:
            super().__init__(graph, cost)
            planners.append(self)

    monkeypatch.setattr(curve_module, "Planner", Watched)

    def watched() -> tuple[Curve, int]:
        sizes: list[int] = []
        search = Search(tell=lambda _: sizes.append(len(planners[-1].seen)))
        return trace_curve(graph, cost, points=5, search=search), max(sizes)

    whole, many = watched()
    monkeypatch.setattr(planner_module, "_MOST_SEEN", 0)
    pruned, few = watched()
    assert few < many // 2
    assert pruned.as_dict() == whole.as_dict()
    assert [woven.order for woven in pruned.between] == [woven.order for woven in whole.between]


def test_below_the_curve_is_an_answer() -> None:
    """A limit below the curve says the smallest peak, the proven bound and the op, and whether that is proven."""
    curve = traced("unet")
    graph, cost = curve.graph, curve.cost
    with pytest.raises(InfeasibleBudget, match="no plan exists") as caught:
        curve.at(curve.floor_nbytes - 1)
    assert caught.value.smallest_budget == curve.smallest_nbytes
    assert caught.value.bound == curve.floor_nbytes
    assert caught.value.blocking == curve.blocking != ""
    assert curve.at(caught.value.smallest_budget).peak <= caught.value.smallest_budget
    assert solve(graph, cost, Budget({"device": caught.value.smallest_budget})).peak <= caught.value.smallest_budget


def stub(peak: int, seconds: float) -> Point:
    """A point without a program."""
    some = SOLVERS["keep_all"].solve(*chain(1), 1 << 40)
    return Point(peak, replace(some, peak=peak, seconds=seconds), 0.0)


def curve_of(*pairs: tuple[int, float]) -> Curve:
    """A curve through given points."""
    graph, cost = chain(1)
    points = tuple(stub(peak, seconds) for peak, seconds in pairs)
    low, last = points[0].peak, points[-1]
    return Curve(
        graph, cost, points, (Line(last.peak, last.seconds, 0.0),), (), (), low, low, 0, last.peak, last.seconds
    )


def test_the_knee_of_known_curves() -> None:
    """1 / x bends where slopes of the scaled curve are -1; a straight and a hollow curve have none before the end."""
    hyperbola = curve_of(*((x, 1 + 100 / x) for x in range(1, 101)))
    assert hyperbola.knee.peak == 10  # x with 100 / x**2 = 99 / 99
    two_lines = curve_of((0, 10.0), (2, 4.0), (4, 2.0), (6, 1.5), (10, 1.0))
    assert two_lines.knee.peak == 4
    line = curve_of((0, 3.0), (1, 2.0), (2, 1.0))
    assert line.knee.peak == 2
    hollow = curve_of((0, 3.0), (2, 2.9), (3, 1.0))
    assert hollow.knee.peak == 3
    assert curve_of((5, 1.0)).knee.peak == 5


def test_the_front_keeps_what_nothing_beats() -> None:
    """Pairs that another one is below in bytes and seconds go; ties go too."""
    pairs = [(5, 1.0), (3, 2.0), (4, 2.0), (4, 1.5), (9, 0.9), (10, 0.9), (2, 7.0), (2, 6.0)]
    assert front_of(pairs, lambda pair: pair) == [(2, 6.0), (3, 2.0), (4, 1.5), (5, 1.0), (9, 0.9)]


def test_what_is_dominated_is_replaced() -> None:
    """A limit's plan that another one beats gives way to it, whichever search met it; the others stay between."""
    graph, cost = SMALL["gpt"]()
    lazy = SOLVERS["recompute_all"].solve(graph, cost, 1 << 40)
    kept = SOLVERS["keep_all"].solve(graph, cost, 1 << 40)
    assert lazy.peak + 2 < kept.peak
    woven = Woven(list(lazy.order), lazy.seconds, lazy.peak)
    worse = replace(lazy, peak=lazy.peak + 1, seconds=lazy.seconds * 1.5)
    low = replace(lazy, peak=lazy.peak - 1, seconds=lazy.seconds * 3)
    solved = {low.peak: low, worse.peak + 1: worse, kept.peak: kept}
    points, between = sort_out(graph, cost, solved, [], [woven], 0)
    assert [(limit, found.peak) for limit, found in points] == [
        (low.peak, low.peak),
        (worse.peak + 1, lazy.peak),
        (kept.peak, kept.peak),
    ]
    assert between == ()
    near = Woven(woven.order, woven.seconds * 0.99, woven.peak + 10)
    points, between = sort_out(graph, cost, solved, [], [woven, near], 0)
    assert [found.peak for _, found in points] == [low.peak, lazy.peak, kept.peak]
    assert [one.peak for one in between] == [near.peak]
    points, between = sort_out(graph, cost, {kept.peak: kept}, [low], [woven, near], 0)
    assert [found.peak for _, found in points] == [low.peak, kept.peak]
    assert [one.peak for one in between] == [woven.peak, near.peak]
    many = [Woven(woven.order, 3.0 - n / 1000, n) for n in range(1000)]
    assert len(sort_out(graph, cost, {kept.peak: replace(kept, seconds=1.0)}, [], many, 0)[1]) == MOST_BETWEEN


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0.5, 20.0)), min_size=1, max_size=30))
def test_the_front_dominates_everything(pairs: list[tuple[int, float]]) -> None:
    """For each pair there is one on the front with no more bytes and (to rounding) no more seconds."""
    front = front_of(pairs, lambda pair: pair)
    assert set(front) <= set(pairs)
    for nbytes, seconds in pairs:
        assert any(n <= nbytes and s <= seconds * (1 + 1e-8) for n, s in front)


def test_the_next_limit_is_in_the_widest_gap() -> None:
    """Bytes times seconds decide; a plan below its own limit shortens the gap; without a gap there is no next limit."""

    def solved(peak: int, seconds: float) -> Solution:
        return stub(peak, seconds).solution

    assert next_limit({10: solved(10, 5.0), 20: solved(20, 4.0), 40: solved(40, 1.0)}) == 30
    assert next_limit({10: solved(10, 5.0), 20: solved(20, 4.0), 40: solved(22, 1.0)}) == 15
    assert next_limit({10: solved(10, 5.0), 11: solved(11, 1.0)}) is None
    assert next_limit({10: solved(10, 5.0), 50: solved(50, 5.0)}) is None
    assert next_limit({10: solved(12, 5.0), 50: solved(50, 1.0)}) is None


def test_limits_that_are_asked_for_are_solved() -> None:
    """With budgets given, those between the ends are solved for, and no others."""
    graph, cost = dense(5)
    ends = trace_curve(graph, cost, points=2)
    low, high = ends.smallest_nbytes, ends.baseline_peak
    wanted = [high + 5, (low + high) // 2, 1, (3 * low + high) // 4]
    curve = trace_curve(graph, cost, budgets=iter(wanted))
    assert [bound.limit_nbytes for bound in curve.bounds] == [low, wanted[3], wanted[1], high]
    check(curve)


def test_a_search_counts_limits_and_hears_of_each() -> None:
    """The work of a curve is the limits that it is solved for; the two ends are always there."""
    graph, cost = dense(5)
    heard: list[Standing] = []
    search = Search(work=3, tell=heard.append)
    curve = trace_curve(graph, cost, points=9, search=search)
    assert len(curve.bounds) == len(heard) == search.spent == 3
    assert [standing.work for standing in heard] == [1, 2, 3]
    ended = Search(tell=lambda standing: ended.interrupt() if standing.work == 3 else None)
    short = trace_curve(graph, cost, points=9, search=ended)
    assert len(short.bounds) == 3
    assert short.is_ended_early
    assert not curve.is_ended_early
    assert "ended early" in curve_text(short)
    late = trace_curve(graph, cost, points=9, search=Search(seconds=0.0))
    assert len(late.bounds) == 2
    assert late.is_ended_early
    assert late.at(late.smallest_nbytes).certificate.status in (Status.TIME_LIMITED, Status.OPTIMAL)
    check(late)


def test_the_same_input_gives_the_same_curve() -> None:
    """Two runs agree in every point, order and bound."""
    one, two = (trace_curve(*SMALL["bn"](), points=5) for _ in range(2))
    assert [p.solution.order for p in one.points] == [p.solution.order for p in two.points]
    assert one.as_dict() == two.as_dict()
    assert [w.order for w in one.between] == [w.order for w in two.between]


def test_the_smallest_budget_does_not_follow_measured_seconds() -> None:
    """Measured seconds differ from run to run; the end of the curve does not."""
    graph, cost = dense(6)
    low = trace_curve(graph, cost, points=2).smallest_nbytes
    for seed in range(2):
        noise = random.Random(seed)
        noisy = replace(cost, seconds=tuple(s * noise.uniform(0.5, 2.0) for s in cost.seconds))
        assert trace_curve(graph, noisy, points=2).smallest_nbytes == low


def test_named_strategies_are_beside_the_curve() -> None:
    """Cheap strategies are there by default, block lengths apart; others come by request; the curve is never worse."""
    curve = traced("gpt")
    graph, cost = curve.graph, curve.cost
    names = {one.name for one in curve.strategies}
    assert {"keep_all", "recompute_all", "every_k(1)", "every_k(2)"} <= names
    assert not any(name.startswith("keepless") for name in names)
    for one in curve.strategies:
        if one.peak >= curve.points[0].peak:
            assert curve.at(one.peak).seconds <= one.seconds * (1 + 1e-9)
    asked = trace_curve(graph, cost, points=2, strategies=["keepless", "keep_all"])
    assert {one.name for one in asked.strategies} == {"keepless", "keep_all"}
    kept = next(one for one in asked.strategies if one.name == "keep_all")
    assert (kept.peak, kept.seconds) == (curve.baseline_peak, curve.baseline_seconds)
    assert trace_curve(graph, cost, points=2, strategies=()).strategies == ()


def test_a_strategy_that_beats_the_planner_is_on_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a named solver's plan dominates a point, it takes that point's place."""
    graph, cost = SMALL["unet"]()
    good = traced("unet").points[2].solution

    class Better:
        def solve(self, graph: Graph, cost: CostModel, limit: int, seed: int = 0, search: object = None) -> Solution:
            return replace(good, certificate=replace(good.certificate, solver="better"))

    monkeypatch.setitem(SOLVERS, "better", Better())  # type: ignore[arg-type]
    curve = trace_curve(graph, cost, points=2, strategies=["better"])
    assert good.order in [point.solution.order for point in curve.points]
    assert "by better" in curve_text(curve)
    check(curve)


def test_bad_requests_are_refused() -> None:
    """Numbers of points, limits and names that cannot be are typed errors before any work."""
    graph, cost = chain(4)
    for points in (1, 0, -3, True, 2.5, MAX_LIMITS + 1, "12", None):
        with pytest.raises(SolverError, match="points"):
            trace_curve(graph, cost, points=points)  # type: ignore[arg-type]
    for limit in (True, 0, -1, 1.5, 2**61, "1GiB"):
        with pytest.raises(SolverError, match="number of bytes"):
            trace_curve(graph, cost, budgets=[limit])  # type: ignore[list-item]
    with pytest.raises(SolverError, match="at most"):
        trace_curve(graph, cost, budgets=(n + 1 for n in range(10**12)))
    with pytest.raises(SolverError, match="There is no solver 'magic'"):
        trace_curve(graph, cost, strategies=["magic"])
    with pytest.raises(SolverError, match="list of names"):
        trace_curve(graph, cost, strategies="keep_all")
    with pytest.raises(SolverError, match="not a int"):
        trace_curve(graph, cost, strategies=[3])  # type: ignore[list-item]


def odd_graphs() -> dict[str, tuple[Graph, CostModel]]:
    """No ops, one op, a plain DAG, nothing to recompute, costs of zero."""
    values = (Value(0, "x", 8, Kind.INPUT), Value(1, "y", 8, Kind.ACTIVATION), Value(2, "z", 8, Kind.OUTPUT))
    one = Graph((Op(0, "f", (0,), (1,), Phase.FORWARD),), values[:2], frozenset({0}), frozenset({0, 1}))
    two = (Op(0, "f", (0,), (1,), Phase.FORWARD), Op(1, "g", (0, 1), (2,), Phase.FORWARD))
    free, _ = chain(6)
    return {
        "empty": (Graph((), (), frozenset(), frozenset()), CostModel((), ())),
        "one op": (one, CostModel((1.0,), (0,))),
        "plain dag": (Graph(two, values, frozenset({0}), frozenset({2})), CostModel((1.0, 2.0), (0, 4))),
        "no costs": (free, CostModel((0.0,) * len(free.ops), (0,) * len(free.ops))),
    }


@pytest.mark.parametrize("name", sorted(odd_graphs()))
def test_odd_graphs_have_curves(name: str, tmp_path: Path) -> None:
    """Each has at least one point, a knee, a table, and JSON."""
    graph, cost = odd_graphs()[name]
    curve = trace_curve(graph, cost, points=4)
    check(curve)
    assert curve.knee in curve.points
    assert curve_text(curve)
    json.dumps(curve.as_dict(), allow_nan=False)
    assert curve.at(1 << 40).peak == curve.points[-1].peak


def test_json_and_text_say_the_same() -> None:
    """Every point is a row; the budget of a peak includes a reserve where there is one; the knee is marked."""
    curve = traced("bn")
    cost = curve.cost
    facts = json.loads(json.dumps(curve.as_dict(lambda peak: peak + 1000), allow_nan=False))
    assert [row["peak"] for row in facts["points"]] == [point.peak for point in curve.points]
    assert all(row["budget"] == row["peak"] + 1000 for row in (*facts["points"], *facts["strategies"]))
    assert facts["points"][facts["knee"]]["peak"] == curve.knee.peak
    assert facts["smallest_budget"] == curve.smallest_nbytes + 1000
    assert facts["floor"] == {"nbytes": curve.floor_nbytes, "op": curve.blocking}
    lines = curve_text(curve).splitlines()
    rows = lines[1 : len(curve.points) + 1]
    assert rows[0].endswith("smallest") or "smallest, " in rows[0]
    assert "everything kept" in rows[-1]
    assert sum("knee" in row for row in rows) == (len(curve.points) > 2)
    bars = [row.count("#") for row in rows]
    assert bars == sorted(bars, reverse=True)
    assert bars[0] > bars[-1] == 0
    assert any(line.strip().startswith("every_k(1)") for line in lines)
    assert "too long" not in curve_text(curve)
    assert "20% of the step's seconds" in curve_text(replace(curve, cost=replace(cost, disturbed=0.2)))


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    """For an ordinary curve, a curve of one point and one without costs, as a raster and as text."""
    pytest.importorskip("matplotlib")
    from keepless.reporting.curve_picture import draw_curve

    curve = traced("gpt")
    draw_curve(curve, tmp_path / "curve.svg", budget=curve.knee.peak + 10, budget_of=lambda peak: peak + 10)
    text = (tmp_path / "curve.svg").read_text()
    assert text.count("<path") > 20
    draw_curve(curve, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    for name, (graph, cost) in odd_graphs().items():
        draw_curve(trace_curve(graph, cost, points=3), tmp_path / f"{name}.png", budget=7)
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
