"""How good the default planner's plans are: beside the exhaustive search, every classic, and closed forms."""

from __future__ import annotations

import random

import pytest
from test_classics import steps
from test_reorder import dag
from test_solve import tiny

from keepless.cost import CostModel
from keepless.ir import Graph, Status
from keepless.passes import evaluate
from keepless.solve import SOLVERS, smallest
from keepless.solve.classics import binomial_cost
from keepless.solve.classics.chain import chain_at, order_of
from keepless.solve.classics.revolve import binomial_schedule
from keepless.solve.exact import Exhaustive
from keepless.solve.tables import Tables

CLASSICS = ("every_k", "sqrt_n", "revolve", "rotor", "dtr", "min_cut", "knapsack")


def limits(graph: Graph, cost: CostModel) -> list[int]:
    """From the smallest peak to just below everything kept."""
    low, full = smallest(graph, cost).peak, evaluate(graph, cost, range(len(graph.ops))).peak
    return sorted({low, (3 * low + full) // 4, (low + full) // 2, full - 1} - {full}) if low < full else []


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(5), pytest.param(range(5, 14), marks=pytest.mark.exhaustive)], ids=repr)
def test_small_graphs_are_planned_optimally(seeds: range) -> None:
    """In at least 95 % of small graphs the optimum, within 1 % in the rest; and a plan wherever there is one."""
    compared, equal = 0, 0
    cases = [tiny(seed, layers) for seed in seeds for layers in (3, 5)] + [dag(9, seed) for seed in seeds]
    for graph, cost in cases:
        is_free = graph.loss_op is None
        for limit in limits(graph, cost):
            oracle = Exhaustive(any_order=is_free, backward_again=False, work=400_000)
            best = oracle.solve(graph, cost, limit)
            mine = SOLVERS["keepless"].solve(graph, cost, limit)
            if best.certificate.status is not Status.OPTIMAL:
                continue
            compared += 1
            assert mine.peak <= limit
            assert mine.seconds >= best.seconds * (1 - 1e-9)
            assert mine.seconds <= 1.01 * best.seconds
            equal += mine.seconds <= best.seconds * (1 + 1e-9)
    assert compared >= 4 * len(seeds)
    assert equal >= 0.95 * compared


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2))])
def test_no_classic_is_faster(seed: int) -> None:
    """At a classic's peak the default is at least as fast: chains of unequal steps, tiny graphs."""
    rng = random.Random(seed)
    chain, cost = steps(12 + 6 * seed, rng.choice([500, 1000]))
    uneven = CostModel(tuple(s * rng.uniform(0.3, 3) for s in cost.seconds), cost.scratch)
    for graph, costs in ((chain, uneven), tiny(seed, 6), tiny(seed + 10, 7)):
        for limit in limits(graph, costs):
            for name in CLASSICS:
                rival = SOLVERS[name].solve(graph, costs, limit)
                if rival.peak < evaluate(graph, costs, range(len(graph.ops))).peak:
                    mine = SOLVERS["keepless"].solve(graph, costs, max(rival.peak, limit))
                    assert mine.peak <= max(rival.peak, limit)
                    assert mine.seconds <= rival.seconds * (1 + 1e-9), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num", "slots"),
    [
        (2, 1),
        (7, 2),
        (20, 3),
        (40, 7),
        (100, 4),
        *(pytest.param(*sizes, marks=pytest.mark.exhaustive) for sizes in ((20, 1), (40, 2), (200, 5))),
    ],
)
def test_equal_steps_run_again_as_often_as_the_binomial_schedule(num: int, slots: int) -> None:
    """On a chain of equal steps no more replays than the binomial optimum for the states that the limit holds.

    The machine counts two states and two gradients beside the stored ones, which the closed form does not.
    """
    graph, cost = steps(num)
    tables = Tables(graph, cost)
    made = chain_at(tables, range(tables.loss - 2))
    shifted = [a + 1 if a > 0 else a - 1 for a in binomial_schedule(num, slots)]
    order = order_of(tables, made, [1, *shifted, -1], 10**9)
    assert order is not None
    limit = tables.lives(order).peak
    found = SOLVERS["keepless"].solve(graph, cost, limit)
    assert found.peak <= limit
    assert binomial_cost(num, slots + 4) <= len(found.order) - len(graph.ops) <= binomial_cost(num, slots)
