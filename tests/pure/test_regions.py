"""The search over nested regions: its orders, its optimum on small steps, its claims."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepless.cost import CostModel
from keepless.ir import Budget, Effect, Graph, Kind, Op, Phase, Status, Value
from keepless.machine import verify
from keepless.passes import evaluate, from_order
from keepless.solve import Search, recheck
from keepless.solve.holds import with_holds
from keepless.solve.regions import Region, Regions, RegionTree


def step(tree: RegionTree, seed: int) -> tuple[Graph, CostModel]:
    """A random step whose ops are pieces: each saves values and hands one on."""
    draw = random.Random(seed)
    count = tree.num_forward
    values = [Value(0, "weights", 1000, Kind.PARAM), Value(1, "batch", draw.randrange(10, 500), Kind.INPUT)]
    reads: list[set[int]] = [set() for _ in range(2 * count + 1)]
    makes: list[set[int]] = [set() for _ in range(2 * count + 1)]
    handed = 1
    inside = {op for region in tree.regions for op in range(region.first, region.last + 1)}
    for op in range(count):
        reads[op] |= {0, handed}
        if op in tree.saving:
            reads[tree.backward(op)].add(handed)
            for _ in range(draw.randrange(1, 3)):
                values.append(Value(len(values), f"saved{op}.{len(values)}", draw.randrange(10, 900), Kind.ACTIVATION))
                makes[op].add(values[-1].id)
                reads[tree.backward(op)].add(values[-1].id)
        values.append(Value(len(values), f"out{op}", draw.randrange(10, 500), Kind.ACTIVATION))
        makes[op].add(values[-1].id)
        handed = values[-1].id
    reads[count].add(handed)
    for op in range(count, 2 * count):
        values.append(Value(len(values), f"flow{op}", draw.randrange(10, 300), Kind.GRAD))
        makes[op].add(values[-1].id)
        reads[op + 1].add(values[-1].id)
    ops = []
    for number in range(2 * count + 1):
        phase = Phase.FORWARD if number < count else Phase.LOSS if number == count else Phase.BACKWARD
        effects = frozenset() if number in inside else frozenset({Effect.OPAQUE})
        inputs = tuple(sorted(reads[number] - makes[number]))
        ops.append(Op(number, f"op{number}", inputs, tuple(sorted(makes[number])), phase, effects))
    graph = Graph(tuple(ops), tuple(values), frozenset({0, 1}), frozenset({0, 1}))
    seconds = tuple(float(draw.randrange(1, 20)) for _ in ops)
    return graph, CostModel(seconds, tuple(draw.randrange(0, 50) for _ in ops))


def random_tree(seed: int, count: int = 9, most: int = 7) -> RegionTree:
    """Nested regions drawn by splitting ranges."""
    draw = random.Random(seed)
    found: list[Region] = []

    def split(first: int, last: int) -> None:
        if len(found) >= most or last < first or draw.random() < 0.2:
            return
        low = draw.randint(first, last)
        high = draw.randint(low, last)
        if not any((r.first, r.last) == (low, high) for r in found):
            found.append(Region(low, high))
        if (low, high) != (first, last):
            split(low, high)
        split(first, low - 1)
        split(high + 1, last)

    split(0, count - 1)
    saving = frozenset(op for op in range(count) if draw.random() < 0.8)
    return RegionTree(tuple(sorted(found, key=lambda r: (r.first, -r.last))), count, saving)


CHAIN = RegionTree(tuple(Region(i, i) for i in range(1, 7)), 8, frozenset(range(8)))
NESTED = RegionTree((Region(1, 6), Region(1, 3), Region(2, 2), Region(4, 6), Region(5, 5)), 8, frozenset(range(8)))


def test_the_order_of_one_region() -> None:
    tree = RegionTree((Region(1, 2),), 3, frozenset({0, 1, 2}))
    assert tree.order(frozenset(), 7) == [0, 1, 2, 3, 4, 5, 6]
    assert tree.order(frozenset({0}), 7) == [0, 1, 2, 3, 1, 2, 4, 5, 6]
    assert tree.order(frozenset({0}), 8)[-1] == 7  # the optimizer keeps its place


def test_a_recompute_ends_at_the_last_tensor_that_is_wanted() -> None:
    tree = RegionTree((Region(0, 3),), 4, frozenset({0, 1}))
    assert tree.order(frozenset({0}), 9) == [0, 1, 2, 3, 4, 5, 6, 0, 1, 7, 8]
    nothing = RegionTree((Region(0, 3),), 4, frozenset())
    assert nothing.order(frozenset({0}), 9) == list(range(9))


def test_a_region_inside_one_runs_a_third_time() -> None:
    tree = RegionTree((Region(0, 3), Region(1, 2)), 4, frozenset({0, 1, 2, 3}))
    # The outer one saves in ops 0 and 3, the inner one in 1 and 2.
    assert tree.order(frozenset({0, 1}), 9) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 1, 2, 6, 7, 8]
    # At the end of the outer one the inner one is not run: only its input is wanted.
    last = RegionTree((Region(0, 3), Region(2, 3)), 4, frozenset({0, 1, 2, 3}))
    assert last.order(frozenset({0, 1}), 9) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 6, 7, 8]


def test_what_a_region_holds_is_let_go_when_all_is_used_up_that_it_saved() -> None:
    # Ops 1 and 3 hold: what an outer region reads, and one inside it.
    tree = RegionTree((Region(1, 5), Region(3, 4)), 6, frozenset({0, 2, 4, 5}), (1, 3))
    assert [tree.backward(op) for op in (5, 4, 2, 0)] == [7, 8, 9, 10]
    assert tree.order(frozenset(), 11) == list(range(11))
    assert tree.order(frozenset({1}), 11) == [0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 8, 3, 9, 10]
    assert tree.order(frozenset({0}), 11) == [0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 7, 8, 9, 1, 10]
    assert tree.order(frozenset({0, 1}), 11) == [0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 7, 3, 4, 8, 3, 9, 1, 10]
    with pytest.raises(AssertionError):
        RegionTree((Region(1, 5),), 6, frozenset({1, 2}), (1,))  # a hold saves nothing


def test_a_kept_region_holds_no_input() -> None:
    """Its input, op 0's, and a generator's state: both stand from the forward to the backward only if it runs again."""
    tree = RegionTree((Region(2, 2),), 3, frozenset({2}))
    sizes = {"input": 100, "saved": 10, "out": 1, "grad": 0}
    values = [
        Value(i, name, nbytes, Kind.ACTIVATION, "uint8", (nbytes,)) for i, (name, nbytes) in enumerate(sizes.items())
    ]
    ops = [
        Op(0, "make", (), (0,), Phase.FORWARD, frozenset({Effect.OPAQUE})),
        Op(1, "between", (0,), (), Phase.FORWARD, frozenset({Effect.OPAQUE})),
        Op(2, "region", (0,), (1, 2), Phase.FORWARD),
        Op(3, "loss", (2,), (), Phase.LOSS, frozenset({Effect.OPAQUE})),
        Op(4, "backward.region", (1,), (3,), Phase.BACKWARD, frozenset({Effect.OPAQUE})),
        Op(5, "backward.between", (), (), Phase.BACKWARD, frozenset({Effect.OPAQUE})),
        Op(6, "backward.make", (), (), Phase.BACKWARD, frozenset({Effect.OPAQUE})),
    ]
    graph = Graph(tuple(ops), tuple(values), frozenset(), frozenset({3}))
    held, own, place = with_holds(graph, tree, [frozenset({0})], ["region"], state_nbytes=7)
    assert (own.holds, place, held.loss_op) == ((2,), [0, 1, 3, 4, 5, 6, 7], 4)
    nothing = CostModel((0.0,) * len(held.ops), (0,) * len(held.ops))

    def levels(chosen: frozenset[int]) -> list[int]:
        order = own.order(chosen, len(held.ops))
        verify(held, from_order(held, order), cost=nothing)
        profile = evaluate(held, nothing, order, profile=True).profile
        assert profile is not None
        return profile.tolist()  # type: ignore[no-any-return]

    kept, again = levels(frozenset()), levels(frozenset({0}))
    # A run of the hold makes a state of 7, which stays only where it runs again.
    assert kept == [100, 100, 107, 111, 11, 10, 0, 0]
    assert again == [100, 100, 107, 118, 108, 114, 118, 117, 114, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_every_set_of_regions_is_a_program_of_the_machine(seed: int) -> None:
    tree = random_tree(seed)
    graph, cost = step(tree, seed)
    for size in range(len(tree.regions) + 1):
        for chosen in itertools.combinations(range(len(tree.regions)), size):
            order = tree.order(frozenset(chosen), len(graph.ops))
            peak = evaluate(graph, cost, order, reuse=False).peak
            verify(graph, from_order(graph, order), cost=cost, budget=Budget({"device": peak}))


def best_of_all(tree: RegionTree, graph: Graph, cost: CostModel, limit: int) -> float | None:
    found = []
    for size in range(len(tree.regions) + 1):
        for chosen in itertools.combinations(range(len(tree.regions)), size):
            judged = evaluate(graph, cost, tree.order(frozenset(chosen), len(graph.ops)))
            if judged.peak <= limit:
                found.append(judged.seconds)
    return min(found, default=None)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, 30), marks=pytest.mark.exhaustive)])
def test_small_steps_are_planned_as_well_as_by_trying_every_set(seeds: range) -> None:
    total = exact = 0
    for seed in seeds:
        tree = random_tree(seed, *((9, 7) if seed % 2 else (14, 11)))
        graph, cost = step(tree, seed)
        everything = evaluate(graph, cost, range(len(graph.ops))).peak
        low, chosen = Regions(tree).lowest(graph, cost)
        assert evaluate(graph, cost, tree.order(chosen, len(graph.ops))).peak == low
        for part in (0.0, 0.3, 0.7):
            limit = int(low + part * (everything - low))
            best = best_of_all(tree, graph, cost, limit)
            found = Regions(tree).solve(graph, cost, limit)
            assert best is not None
            assert found.peak <= limit
            assert found.certificate.bound_seconds <= best * (1 + 1e-9)
            total, exact = total + 1, exact + (found.seconds <= best)
    assert exact >= 0.95 * total


@pytest.mark.slow
@pytest.mark.parametrize("tree", [CHAIN, NESTED])
def test_what_is_claimed_can_be_checked(tree: RegionTree) -> None:
    graph, cost = step(tree, 1)
    low, _ = Regions(tree).lowest(graph, cost)
    everything = evaluate(graph, cost, range(len(graph.ops))).peak
    limit = (low + everything) // 2
    found = Regions(tree).solve(graph, cost, limit)
    assert found.certificate.solver == "regions"
    assert recheck(graph, cost, limit, found.certificate).holds
    again = Regions(tree).solve(graph, cost, limit)
    assert (again.order, again.certificate.witness) == (found.order, found.certificate.witness)
    kept = Regions(tree).solve(graph, cost, everything)
    assert kept.certificate.status is Status.OPTIMAL
    assert len(kept.order) == len(graph.ops)
    nothing = Regions(tree).solve(graph, cost, 1)
    assert nothing.certificate.status is Status.PROVEN_INFEASIBLE
    assert nothing.peak == low


def test_a_limit_of_work_is_kept() -> None:
    graph, cost = step(NESTED, 3)
    low, _ = Regions(NESTED).lowest(graph, cost)
    search = Search(work=3)
    found = Regions(NESTED).solve(graph, cost, low + 200, search=search)
    assert search.spent <= 3
    assert found.peak <= low + 200


@pytest.mark.slow
def test_twice_a_region_in_a_long_chain_is_fast_enough_to_search() -> None:
    tree = RegionTree(tuple(Region(i, i) for i in range(1, 201)), 202, frozenset(range(202)))
    graph, cost = step(tree, 5)
    low, _ = Regions(tree).lowest(graph, cost)
    everything = evaluate(graph, cost, range(len(graph.ops))).peak
    found = Regions(tree).solve(graph, cost, (low + everything) // 2)
    assert found.peak <= (low + everything) // 2
    assert found.seconds <= 1.06 * found.certificate.bound_seconds
