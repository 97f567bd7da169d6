"""The planner's parts by themselves: replays taken out together, mixtures of two cuts, tables at other seconds."""

from __future__ import annotations

import pytest
from test_solve import least_seconds, tiny
from test_solve_models import Tape, dense, gpt, lstm, unet

from keepless.ir import Kind
from keepless.machine import verify
from keepless.passes import evaluate, from_order
from keepless.solve import SOLVERS
from keepless.solve.anytime import plan
from keepless.solve.fill import Fill, take_out
from keepless.solve.gaps import Gaps
from keepless.solve.lagrange import PriceSearch, Woven
from keepless.solve.planner import Planner, proxy_cost
from keepless.solve.search import Search
from keepless.solve.tables import Tables

MODELS = {
    "gpt": lambda: gpt(2, 64, 32, 2),
    "unet": lambda: unet(2),
    "dense": lambda: dense(5),
    "lstm": lambda: lstm(30),
}


def limits_of(planner: Planner) -> list[int]:
    """From the smallest peak to everything kept."""
    low, full = planner.smallest.peak, planner.tables.lives(planner.tables.base).peak
    return [low, (3 * low + full) // 4, (low + full) // 2, (low + 3 * full) // 4, full]


@pytest.mark.parametrize("model", sorted(MODELS))
def test_filled_orders_are_legal_faster_and_within_the_limit(model: str) -> None:
    """Replays taken out many at a time: the program verifies, the limit holds, and nothing is slower."""
    graph, cost = MODELS[model]()
    planner = Planner(graph, cost)
    before = planner.smallest.seconds
    for limit in limits_of(planner):
        gaps = Gaps(planner.tables, planner.smallest.order, 10_000)
        gaps.fill(limit)
        assert gaps.peak <= limit
        assert gaps.seconds <= before
        verify(graph, from_order(graph, gaps.order), cost=cost)
        assert evaluate(graph, cost, gaps.order).peak == gaps.peak
        before = gaps.seconds
    assert gaps.order == list(range(len(graph.ops)))  # where everything fits nothing runs again


@pytest.mark.parametrize("seed", range(8))
def test_what_is_taken_out_together_leaves_no_useless_replay(seed: int) -> None:
    """A group holds the replays that serve nothing but the one that is taken out."""
    graph, cost = tiny(seed, layers=6)
    planner = Planner(graph, cost)
    for limit in limits_of(planner):
        gaps = Gaps(planner.tables, planner.smallest.order, 1000)
        gaps.fill(planner.smallest.peak)
        for group in Fill(planner.tables, gaps.order, gaps.lives, limit).groups():
            rest = [op for at, op in enumerate(gaps.order) if at not in group]
            verify(graph, from_order(graph, rest), cost=cost)
            assert len(from_order(graph, rest)) > len(rest)
            assert len(set(group)) == len(group)


def test_a_group_that_does_not_fit_is_left_and_the_others_are_taken() -> None:
    """Groups are judged together, then in ever smaller parts."""
    order = list(range(40))
    bad, judged = {7, 23}, []

    def judge(rest: list[int]) -> bool:
        judged.append(rest)
        return bad <= set(rest)

    take_out(order, [[at] for at in order], judge, lambda: True)
    assert [rest for rest in judged if bad <= set(rest)][-1] == sorted(bad)
    assert len(judged) < 25
    judged.clear()
    take_out(order, [[at] for at in order], judge, lambda: len(judged) < 3)
    assert len(judged) == 3


@pytest.mark.slow
@pytest.mark.parametrize("steps", [20, 60])
def test_equal_steps_take_a_share_of_each_of_two_cuts(steps: int) -> None:
    """Where all steps share one price a cut takes all or none of them; a mixture comes near the limit."""
    graph, cost = lstm(steps)
    planner = Planner(graph, cost)
    low, full = planner.smallest.peak, planner.tables.lives(planner.tables.base).peak
    search = PriceSearch(planner.tables, (low + full) // 2)
    found = search.run(planner.cuts)
    assert (low + full) / 2 * 0.93 < found.peak <= (low + full) / 2


@pytest.mark.slow
def test_gaps_of_a_long_lstm_are_small() -> None:
    """From 1.1 times the peak that single replays lead to: the certified gap is at most 5 %, and 2 % in the median.

    Below it, where recomputation is nested, the bound is further away: 11 % at 1.6 times the smallest peak.
    """
    graph, cost = lstm(200)
    planner = Planner(graph, cost)
    low, full = planner.evicted.peak, planner.tables.lives(planner.tables.base).peak
    gaps = []
    for number in range(1, 8):
        found = plan(planner, int(1.1 * low * (full / (1.1 * low)) ** (number / 8)))
        gaps.append(found.seconds / found.certificate.bound_seconds - 1)
    assert max(gaps) <= 0.05
    assert sorted(gaps)[len(gaps) // 2] <= 0.02
    found = plan(planner, int(1.6 * planner.smallest.peak))
    assert found.peak < low
    assert found.seconds / found.certificate.bound_seconds - 1 <= 0.2


@pytest.mark.parametrize("model", sorted(MODELS))
def test_tables_at_other_seconds_are_those_made_anew(model: str) -> None:
    """Orders cost the same by shared arrays as by their own."""
    graph, cost = MODELS[model]()
    other = proxy_cost(graph, cost)
    shared, own = Tables(graph, cost).priced(other), Tables(graph, other)
    order = Planner(graph, cost).smallest.order
    assert (shared.lives(order).profile == own.lives(order).profile).all()
    assert shared.lives(order).seconds == own.lives(order).seconds


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(MODELS))
def test_first_plans_become_faster_with_the_limit(model: str) -> None:
    """What there is room for is taken out of the lowest order: a first plan fits wherever one was found."""
    graph, cost = MODELS[model]()
    planner = Planner(graph, cost)
    before = float("inf")
    for limit in limits_of(planner)[:-1]:
        found = [woven for woven in planner.firsts(limit, Search()) if woven.peak <= limit]
        fastest = min(woven.seconds for woven in found)
        assert fastest <= before
        before = fastest


def test_states_of_generators_are_counted_from_the_first_run_to_the_last_replay() -> None:
    """Recorded states in the profile agree with the machine's own count, with any number of replays."""
    t = Tape()
    x = t.value(4096, Kind.INPUT)
    for _ in range(3):
        mask = t.noise(4096)
        x = t.forward("mul", (x, mask), 4096, [(x, (mask,))] if x else [])[0]
    graph, cost = t.finish(t.forward("sum", (x,), 4, [(x, (x,))])[0])
    planner = Planner(graph, cost)
    draws = [op.id for op in graph.ops if op.name == "bernoulli"]
    backward = (graph.loss_op or 0) + 1
    for again in ([], draws[:1], draws, [*draws, *draws]):
        order = [*range(backward), *again, *range(backward, len(graph.ops))]
        assert planner.tables.lives(order).peak == evaluate(graph, cost, order).peak


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(MODELS))
def test_the_first_plan_is_told_before_the_search_for_it_ends(model: str) -> None:
    """Each order that fits is told as soon as it is met, and each is better than the one before."""
    graph, cost = MODELS[model]()
    planner = Planner(graph, cost)
    told: list[Woven] = []
    limit = limits_of(planner)[2]
    first = next(planner.firsts(limit, Search(), told.append))
    assert told
    assert all(woven.peak <= limit for woven in told)
    assert [w.seconds for w in told] == sorted((w.seconds for w in told), reverse=True)
    assert first.seconds <= told[-1].seconds
    met: list[float] = []
    found = plan(planner, limit, search=Search(tell=lambda standing: met.append(standing.seconds)))
    assert min(met) == pytest.approx(found.seconds)


@pytest.mark.parametrize("seed", range(6))
def test_a_bound_of_several_orders_moments_holds(seed: int) -> None:
    """Moments of other orders join the best one's: never above the exhaustive optimum, never below what was known."""
    graph, cost = tiny(seed, layers=5)
    planner = Planner(graph, cost)
    base = float(planner.tables.seconds.sum())
    for limit in limits_of(planner)[:-1]:
        found = plan(planner, limit)
        best = least_seconds(graph, cost, limit)
        assert best is not None
        orders = [Woven.of(found), *planner.firsts(limit, Search())]
        alone = planner.bound(limit, orders[:1])
        together = planner.bound(limit, orders, alone)
        assert alone.seconds * (1 - 1e-9) <= together.seconds <= (best - base) * (1 + 1e-9) + 1e-12


@pytest.mark.slow
def test_deep_nets_need_little_beside_what_stands() -> None:
    """A recurrent net of 150 steps: recomputation within recomputation, which replays of single values miss, holds less
    than half of what they do, and within limits that they do not keep plans are no slower than the classics'."""
    graph, cost = lstm(150)
    planner = Planner(graph, cost)
    static = planner.tables.static_nbytes
    assert planner.smallest.peak - static < 0.5 * (planner.evicted.peak - static)
    verify(graph, from_order(graph, planner.smallest.order), cost=cost)
    limit = (planner.smallest.peak + planner.evicted.peak) // 2
    found = min((w for w in planner.firsts(limit, Search()) if w.peak <= limit), key=lambda w: w.seconds)
    for name in ("revolve", "rotor"):
        classic = SOLVERS[name].solve(graph, cost, limit)
        assert classic.peak > limit or found.seconds <= classic.seconds
