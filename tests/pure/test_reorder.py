"""Orders of first runs of plain DAGs: legal, low, and planned for."""

from __future__ import annotations

import itertools
import random

import pytest

from keepless.cost import CostModel
from keepless.ir import Budget, Graph, Kind, Op, Phase, Status, Value
from keepless.machine import simulate, verify
from keepless.passes import evaluate
from keepless.solve import SOLVERS, smallest, solve
from keepless.solve.reorder import low_order, permuted
from keepless.solve.tables import Tables


def dag(num: int, seed: int, sinks: int = 2) -> tuple[Graph, CostModel]:
    """A random layered DAG; the last ops are its sinks."""
    rng = random.Random(seed)
    ops, values, ends = [], [], [0]
    while ends[-1] < num:
        ends.append(min(num, ends[-1] + rng.randint(1, max(2, int(num**0.5)))))
    for first, last in itertools.pairwise(ends):
        before = list(range(max(0, first - 2 * int(num**0.5) - 2), first))
        for op in range(first, last):
            inputs = sorted(set(rng.sample(before, min(len(before), rng.randint(1, 3)))))
            values.append(Value(op, f"v{op}", int(2 ** rng.uniform(10, 16)), Kind.ACTIVATION))
            ops.append(Op(op, "op", tuple(inputs), (op,), Phase.FORWARD))
    graph = Graph(tuple(ops), tuple(values), frozenset(), frozenset(range(num - sinks, num)))
    return graph, CostModel(tuple(rng.uniform(1e-4, 1e-2) for _ in ops), (0,) * num)


def lowest_by_trying(graph: Graph, cost: CostModel) -> int:
    """The lowest peak over all topological orders, each op once."""
    best = 1 << 60
    for order in itertools.permutations(range(len(graph.ops))):
        at = {op: position for position, op in enumerate(order)}
        if all(at[u] < at[op.id] for op in graph.ops for u in op.inputs):
            best = min(best, evaluate(graph, cost, order).peak)
    return best


@pytest.mark.parametrize("seed", range(20))
def test_orders_are_topological_and_never_higher(seed: int) -> None:
    """Every op once, after what it reads, and a peak that is at most the given order's."""
    graph, cost = dag(60, seed)
    tables = Tables(graph, cost)
    order = low_order(tables)
    assert sorted(order) == list(range(60))
    at = {op: position for position, op in enumerate(order)}
    assert all(at[u] < at[op.id] for op in graph.ops for u in op.inputs)
    assert evaluate(graph, cost, order).peak <= evaluate(graph, cost, range(60)).peak
    turned, prices = permuted(graph, cost, order)
    assert evaluate(turned, prices, range(60)).peak == evaluate(graph, cost, order).peak


def test_orders_are_near_the_lowest() -> None:
    """On graphs of seven ops the lowest peak of all orders is found in most, and nearly in the rest."""
    ratios = []
    for seed in range(25):
        graph, cost = dag(7, seed)
        found = evaluate(graph, cost, low_order(Tables(graph, cost))).peak
        ratios.append(found / lowest_by_trying(graph, cost))
    assert min(ratios) == 1.0
    assert sum(ratio == 1.0 for ratio in ratios) >= 20
    assert max(ratios) <= 1.25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "num"),
    [
        (0, 100),
        (1, 250),
        *(pytest.param(*one, marks=pytest.mark.exhaustive) for one in ((1, 100), (2, 100), (0, 250), (2, 250))),
    ],
)
def test_less_memory_without_recomputation(seed: int, num: int) -> None:
    """Where another order fits nothing runs twice, and that is optimal; below it plans still verify."""
    graph, cost = dag(num, seed)
    given, order = evaluate(graph, cost, range(num)).peak, low_order(Tables(graph, cost))
    low = evaluate(graph, cost, order).peak
    assert low < given
    found = solve(graph, cost, Budget({"device": low}))
    assert found.certificate.status is Status.OPTIMAL
    assert found.peak <= low
    assert sorted(found.order) == list(range(num))
    verify(graph, found.program, cost=cost)
    assert simulate(graph, found.program, cost).peak == found.peak
    limit = max(smallest(graph, cost).peak, int(0.9 * low))
    tight = solve(graph, cost, Budget({"device": limit}))
    assert tight.peak <= limit
    assert tight.seconds > sum(cost.seconds)
    verify(graph, tight.program, cost=cost)


@pytest.mark.slow
def test_never_slower_than_the_classics_on_plain_graphs() -> None:
    """At 0.9 and 0.8 of the given order's peak, wherever a classic planner has a plan, the default has a faster one."""
    for seed in range(4):
        graph, cost = dag(120, seed)
        given = evaluate(graph, cost, range(120)).peak
        for share in (0.9, 0.8):
            limit = int(share * given)
            mine = SOLVERS["keepless"].solve(graph, cost, limit)
            for name in ("sqrt_n", "revolve", "rotor", "dtr", "every_k"):
                other = SOLVERS[name].solve(graph, cost, limit)
                if other.peak <= limit:
                    assert mine.peak <= limit
                    assert mine.seconds <= other.seconds * (1 + 1e-9)
