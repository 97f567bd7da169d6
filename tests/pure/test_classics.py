"""The classic planners: closed forms, oracles of their own, plain DAGs and odd graphs."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_graph
from test_solve_models import Tape, chain, dense, gpt, unet

from keepless.cost import CostModel
from keepless.errors import SolverError
from keepless.ir import Budget, Effect, Graph, Kind, Op, Phase, Status, Value
from keepless.machine import simulate, verify
from keepless.passes import evaluate
from keepless.solve import SOLVERS, Search, solve
from keepless.solve.classics import binomial_cost
from keepless.solve.classics.chain import chain_at, chains, order_of
from keepless.solve.classics.dtr import Components, replay
from keepless.solve.classics.operators import base_name
from keepless.solve.classics.partitioner import ByteCut, knapsack
from keepless.solve.classics.revolve import binomial_schedule
from keepless.solve.classics.rotor_table import RotorTable, Slotted, rows_of
from keepless.solve.classics.sqrt import schedule, segments
from keepless.solve.classics.trial import turned
from keepless.solve.tables import Tables

CLASSICS = ("dtr", "knapsack", "min_cut", "revolve", "rotor", "sqrt_n")
NO_LIMIT = 10**9


def steps(num: int, nbytes: int = 1000) -> tuple[Graph, CostModel]:
    """A homogeneous chain whose backward reads a large value that the step itself made: every step runs again."""
    t = Tape()
    x = t.forward("stem", (t.value(nbytes, Kind.INPUT),), nbytes, [])[0]
    t.rules.pop()
    for _ in range(num):
        x = t.forward("step", (x,), nbytes, [(x, ())], 1e6, extra=(100 * nbytes,))[0]
    return t.finish(t.forward("sum", (x,), 4, [(x, ())])[0], optimizer=False)


def as_plain_dag(graph: Graph) -> Graph:
    """The graph with all ops FORWARD and without effects: pinned values and what nothing reads are its sinks."""
    ops = tuple(replace(op, phase=Phase.FORWARD, effects=frozenset()) for op in graph.ops)
    read = {v for op in ops for v in op.inputs}
    sinks = {v for op in ops for v in op.outputs if v not in read}
    return Graph(ops, graph.values, graph.inputs, graph.pinned | sinks)


def test_binomial_cost_is_the_least_of_all_splits() -> None:
    """The closed form equals the recursion over where the next checkpoint stands."""

    @lru_cache(None)
    def least(length: int, slots: int) -> float:
        if length <= 1:
            return 0
        if slots == 0:
            return math.inf
        return min(k + least(length - k, slots - 1) + least(k, slots) for k in range(1, length))

    for slots, length in itertools.product(range(1, 8), range(61)):
        assert binomial_cost(length, slots) == least(length, slots)
    assert binomial_cost(10, 3) == 15
    for bad in ((-1, 2), (3, 0)):
        with pytest.raises(SolverError, match="steps"):
            binomial_cost(*bad)


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 9, 40])
def test_binomial_schedules_cost_what_they_say_in_their_slots(slots: int) -> None:
    """Executed with a set of stored states: never more than the slots, each backward in turn, and the closed form."""
    for num in (1, 2, 3, 7, 20, 33, 64):
        actions = list(binomial_schedule(num, slots))
        assert [-a for a in actions if a < 0] == list(range(num, 0, -1))
        assert sum(a > 0 for a in actions) - num == binomial_cost(num, slots)
        held: list[set[int]] = [set() for _ in actions]
        for i, action in enumerate(actions):
            state = action - 1
            if action > 0 and (i == 0 or actions[i - 1] != state):  # not the state that was just made: loaded
                made = max((j for j in range(i) if actions[j] == state), default=0)
                for t in range(made, i):
                    held[t].add(state)
        assert max(map(len, held)) <= slots


def sizes(num: int, rng: random.Random | None = None, scale: int = 1) -> Slotted:
    """A chain in slots: homogeneous with a large backward, or random with skips."""
    if rng is None:
        fresh = np.triu(np.ones((num + 1, num + 1), np.int64), 1)
        ones, zeros = np.ones(num), np.zeros(num, np.int64)
        big = np.full(num, scale, np.int64)
        return Slotted(1.0, ones, ones, fresh, big, zeros, big, big, zeros)

    def draw(top: int) -> np.ndarray:
        return np.array([rng.randint(0, top) for _ in range(num)], np.int64)

    made = np.triu(np.array([[rng.randint(0, 2) for _ in range(num + 1)] for _ in range(num + 1)]))
    fresh = np.zeros((num + 1, num + 1), np.int64)
    fresh[:-1] = np.cumsum(made[:0:-1], axis=0)[::-1]
    seconds = draw(5) + 1.0
    return Slotted(1.0, seconds, np.minimum(draw(5), seconds), fresh, draw(9), draw(4), draw(6), draw(7), draw(2))


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 6, 10, 30])
def test_rotor_is_the_binomial_optimum_on_homogeneous_chains(slots: int) -> None:
    """1 to 200 equal steps whose backward needs so much that nothing but inputs can be kept.

    The table counts the state that a stage starts from, the binomial formula counts the stored ones: the stage's own
    is in its slots, the first one, which is an input here, is not.
    """
    big = slots + 2
    chain_sizes = sizes(200, scale=big)
    rows = rows_of(chain_sizes, NO_LIMIT)
    assert rows is not None
    assert len(rows.first) == 200
    table = RotorTable(chain_sizes, rows, big + slots, Search())
    for num in range(1, 201):
        assert table.cost(1, num)[big + slots] == binomial_cost(num, slots) + num
    actions = list(table.schedule(1, 200, big + slots))
    assert sum(a > 0 for a in actions) == binomial_cost(200, slots) + 200


@pytest.mark.parametrize("seed", range(60))
def test_rotor_tables_are_the_papers_recursion(seed: int) -> None:
    """The vectorised table with shared rows equals the recursion, and its schedules cost what it says."""
    rng = random.Random(seed)
    num, top = rng.randint(1, 8), 22
    c = sizes(num, rng)
    if seed % 3:  # repeated stages share rows
        names = ("seconds", "leaf", "saved", "passing", "saving", "back", "grads")
        c = replace(c, **{name: np.resize(getattr(c, name)[:2], num) for name in names})
    if seed % 3 == 1:
        c = replace(c, fresh=np.triu(np.ones_like(c.fresh), 1))

    @lru_cache(None)
    def least(s: int, t: int, m: int) -> float:
        if m < 0:
            return math.inf
        fits = m >= max(c.saving[s - 1] + c.grads[t - 1], c.back[s - 1])
        if s == t:
            return float(c.leaf[s - 1]) if fits else math.inf
        found = c.seconds[s - 1] + least(s + 1, t, m - int(c.saved[s - 1])) if fits else math.inf
        need, passed = 0, 0.0
        for k in range(s, t):
            need = max(need, int(c.passing[k - 1] + c.fresh[s - 1, k - 1]))
            passed += float(c.seconds[k - 1])
            if m >= need + c.grads[t - 1]:
                found = min(found, passed + least(k + 1, t, m - int(c.fresh[s - 1, k])) + least(s, k, m))
        return float(found)

    rows = rows_of(c, NO_LIMIT)
    assert rows is not None
    table = RotorTable(c, rows, top, Search())
    for s in range(1, num + 1):
        for t in range(s, num + 1):
            assert table.cost(s, t).tolist() == pytest.approx([least(s, t, m) for m in range(top + 1)])
    finite = [m for m in range(top + 1) if math.isfinite(least(1, num, m))]
    for m in finite[:3] + finite[-1:]:
        actions = list(table.schedule(1, num, m))
        assert [-a for a in actions if a < 0] == list(range(num, 0, -1))
        assert run_seconds(c, actions) == pytest.approx(table.cost(1, num)[m])


def run_seconds(c: Slotted, actions: list[int]) -> float:
    """Seconds of a schedule's forwards; a stage whose backward follows at once counts as a leaf."""
    ends = {i for i, a in enumerate(actions[:-1]) if a > 0 and actions[i + 1] == -a}
    return sum(float((c.leaf if i in ends else c.seconds)[a - 1]) for i, a in enumerate(actions) if a > 0)


def test_a_table_that_would_be_too_large_is_refused() -> None:
    """Rows are counted before anything is solved."""
    assert rows_of(sizes(100, random.Random(0)), 1000) is None


@pytest.mark.parametrize("slots", [2, 4, 7])
def test_revolve_runs_as_often_as_the_closed_form(slots: int) -> None:
    """On a real graph of equal steps the order has exactly the binomial number of replays."""
    num = 40
    graph, cost = steps(num)
    tables = Tables(graph, cost)
    made = chain_at(tables, range(tables.loss - 2))
    assert made.num == num + 1  # the stem beside the steps
    shifted = [a + 1 if a > 0 else a - 1 for a in binomial_schedule(num, slots)]
    order = order_of(tables, made, [1, *shifted, -1], NO_LIMIT)
    assert order is not None
    assert len(order) - len(graph.ops) == binomial_cost(num, slots)
    limit = (100 + slots + 4) * 1000 + 4  # a step's own value, the slots, two states and two gradients, the loss
    assert tables.lives(order).peak == limit
    found = SOLVERS["revolve"].solve(graph, cost, limit)
    assert found.certificate.status is Status.FEASIBLE
    assert binomial_cost(num, slots + 4) <= len(found.order) - len(graph.ops) <= binomial_cost(num, slots)


def test_an_order_that_is_too_long_is_not_written() -> None:
    """The schedule is counted, not executed."""
    graph, cost = steps(30)
    tables = Tables(graph, cost)
    made = chains(tables)[0]
    assert order_of(tables, made, binomial_schedule(made.num, 1), 100) is None
    assert order_of(tables, made, binomial_schedule(made.num, 1), NO_LIMIT) is not None


def test_chen_segments_hold_about_the_same_bytes() -> None:
    """Each segment ends where its bytes first exceed the bound; schedules run all but the last twice."""
    graph, cost = chain(100)
    made = chains(Tables(graph, cost))[0]
    ends = segments(made, 9_500)
    assert ends[-1] == made.num
    for a, b in zip([0, *ends[:-1]], ends, strict=True):
        assert made.saved[a : b - 1].sum() <= 9_500
        assert made.saved[a:b].sum() > 9_500 or b == made.num
    actions = schedule(ends)
    assert [actions.count(stage) for stage in (1, ends[-2], ends[-2] + 1, made.num)] == [2, 2, 1, 1]
    assert [-a for a in actions if a < 0] == list(range(made.num, 0, -1))


def test_sqrt_n_needs_about_the_square_root() -> None:
    """400 layers in the memory of 50 at less than one more forward."""
    graph, cost = chain(400)
    full = SOLVERS["keep_all"].solve(graph, cost, 0)
    found = SOLVERS["sqrt_n"].solve(graph, cost, 50_000)
    assert found.certificate.status is Status.FEASIBLE
    forward = sum(cost.seconds[: graph.loss_op])
    assert full.seconds < found.seconds <= full.seconds + forward
    assert SOLVERS["sqrt_n"].solve(graph, cost, 25_000).certificate.status is Status.NOT_FOUND


@pytest.mark.slow
def test_a_thousand_steps_are_reversed_in_a_tenth_of_their_memory() -> None:
    """Rotor, on rows by length, is at most as slow as the binomial schedule and the square root."""
    graph, cost = chain(1000)
    limit = SOLVERS["keep_all"].solve(graph, cost, 0).peak // 10
    found = {name: SOLVERS[name].solve(graph, cost, limit) for name in ("rotor", "revolve", "sqrt_n")}
    assert all(f.peak <= limit for f in found.values())
    assert found["rotor"].seconds <= 1.001 * min(f.seconds for f in found.values())


@pytest.mark.parametrize("build", [lambda: gpt(4), unet, lambda: dense(10)], ids=["gpt", "unet", "dense"])
def test_rotor_is_no_slower_than_what_it_generalises(build) -> None:
    """At seven tenths of the memory it is at least as fast as the square root's plan, within a percent."""
    graph, cost = build()
    limit = int(0.7 * SOLVERS["keep_all"].solve(graph, cost, 0).peak)
    rotor, rivals = (
        SOLVERS["rotor"].solve(graph, cost, limit),
        [SOLVERS[n].solve(graph, cost, limit) for n in ("sqrt_n", "revolve")],
    )
    assert rotor.peak <= limit
    for rival in rivals:
        assert rival.peak > limit or rotor.seconds <= 1.01 * rival.seconds


def small_forward(seed: int) -> tuple[Graph, CostModel]:
    """A random training graph with ops that the partitioner bans and ops that it does not."""
    rng, t = random.Random(seed), Tape()
    xs = [t.value(100, Kind.INPUT)]
    for _ in range(8):
        x = rng.choice(xs[-3:])
        name = rng.choice(["aten.mm.default", "aten.relu.default", "aten.add.Tensor"])
        grads = [(x, (x,))] if x != xs[0] else []
        xs.append(t.forward(name, (x,), rng.choice([100, 200, 400]), grads, 1e6, saves_output=rng.random() < 0.3)[0])
    return t.finish(t.forward("aten.sum.default", (xs[-1],), 4, [(xs[-1], (xs[-1],))])[0], optimizer=False)


@pytest.mark.parametrize("seed", range(10))
def test_byte_cuts_save_the_least_weight(seed: int) -> None:
    """Of all sets of ops that may run again, none saves less; banned ops never run again."""
    graph, cost = small_forward(seed)
    tables = Tables(graph, cost)
    cut = ByteCut(tables)
    weight = dict(zip(cut.values.tolist(), cut.weights.tolist(), strict=True))
    for banned in cut.bans:
        found = cut.solve(banned)
        assert not found & banned
        free = [p for p in range(tables.loss) if tables.replayable[p] and p not in banned]
        least = min(
            sum(weight[v] for v in cut.saved(chosen))
            for size in range(len(free) + 1)
            for chosen in itertools.combinations(free, size)
        )
        assert sum(weight[v] for v in cut.saved(found)) <= least * (1 + 1e-3)


def test_byte_cuts_price_and_ban_as_torch_does() -> None:
    """Bytes times 1.1 per op to the backward, twice where all is fusible; three sets of bans."""
    t = Tape()
    x = t.value(100, Kind.INPUT)
    a = t.forward("aten.mm.default", (x,), 1000, [])[0]
    b = t.forward("aten.relu.default", (a,), 1000, [(a, ())])[0]
    c = t.forward("aten.exp.default", (b,), 1000, [(b, ())], saves_output=True)[0]
    n = t.noise(1000)
    d = t.forward("aten.mul.Tensor", (c, n), 1000, [(c, (n,))])[0]
    e = t.forward("aten.max_pool2d.default", (d,), 1000, [(d, (d,))])[0]
    graph, cost = t.finish(t.forward("aten.sum.default", (e,), 4, [(e, ())])[0], optimizer=False)
    cut = ByteCut(Tables(graph, cost))
    weight = dict(zip(cut.values.tolist(), cut.weights.tolist(), strict=True))
    assert [weight[v] for v in (a, b, c, d)] == pytest.approx([1000 * 1.1**3, 2 * 1000 * 1.1**2, 1100.0, 1100.0])
    mm, _, exp, draw, mul, pool, total = range(7)
    assert [sorted(banned) for banned in cut.bans] == [
        [mm, exp, draw, mul, pool, total],
        [mm, draw, pool, total],
        [mm, draw, total],
    ]
    assert cut.solve(cut.bans[1]) >= {mul}


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=8), st.integers(0, 20))
def test_knapsacks_are_the_best_subsets(items: list[tuple[int, int]], slots: int) -> None:
    """Every capacity at which the best value changes, with a subset of that value that fits it."""
    weights, values = np.array([i[0] for i in items]), np.array([float(i[1]) for i in items])
    capacities, chosen = knapsack(weights, values, slots)
    subsets = [c for size in range(len(items) + 1) for c in itertools.combinations(range(len(items)), size)]
    best = [
        max(sum(values[list(c)]) for c in subsets if sum(weights[list(c)]) <= capacity) for capacity in range(slots + 1)
    ]
    assert capacities == [m for m in range(slots + 1) if m == 0 or best[m] > best[m - 1]]
    for capacity, subset in zip(capacities, chosen, strict=True):
        assert sum(weights[subset]) <= capacity
        assert sum(values[subset]) == best[capacity]


def test_the_knapsack_reaches_between_the_cuts() -> None:
    """Where a cut alone is too large or needlessly slow, a capacity between serves."""
    graph, cost = gpt(4)
    full = SOLVERS["keep_all"].solve(graph, cost, 0)
    cut, sack = (SOLVERS[n].solve(graph, cost, int(0.5 * full.peak)) for n in ("min_cut", "knapsack"))
    assert cut.certificate.status is Status.NOT_FOUND
    assert sack.certificate.status is Status.FEASIBLE
    faster = SOLVERS["knapsack"].solve(graph, cost, int(0.7 * full.peak))
    assert faster.seconds < sack.seconds


def test_operators_are_known_by_their_base_names() -> None:
    """With and without namespace and overload."""
    assert [base_name(n) for n in ("aten.mm.default", "prims.var", "grad", "")] == ["mm", "var", "grad", ""]


@pytest.mark.parametrize("share", [0.8, 0.6, 0.45])
@pytest.mark.parametrize("plain", [False, True], ids=["training", "plain"])
def test_dtr_keeps_its_own_limit(share: float, plain: bool) -> None:
    """Without storage reuse and draws the exact peak of a replayed order is within the replay's memory."""
    for build in (lambda: unet(3), lambda: chain(60), lambda: dense(8)):
        graph, cost = build()
        graph = replace(graph, ops=tuple(replace(op, reuses=()) for op in graph.ops))
        graph = as_plain_dag(graph) if plain else graph
        tables = Tables(graph, cost)
        limit = int(share * tables.lives(tables.base).peak)
        order = replay(tables, limit)
        if order is None:
            continue
        assert tables.lives(order).peak <= limit
        assert len(order) > len(graph.ops)
    graph, cost = chain(60)
    assert replay(Tables(graph, cost), 45_000) is not None


def replayed(sizes: dict[str, int], seconds: dict[str, float], big: int, room: int, wait: float = 1e6) -> set[str]:
    """Which of a, b (made from a) and d run again: all wait, `big` bytes pass by, and then each is read."""
    names = ["x", "a", "b", "d", "w", "big", *(f"out{i}" for i in range(4))]
    nbytes = {"x": 8, "big": big, **sizes}
    reads = [("x",), ("a",), ("x",), ("x",), ("w",), ("big",), ("b",), ("a",), ("d",)]
    number = {name: i for i, name in enumerate(names)}
    values = tuple(Value(i, name, nbytes.get(name, 0), Kind.ACTIVATION) for name, i in number.items())
    ops = tuple(Op(i, "op", tuple(number[r] for r in row), (i + 1,), Phase.FORWARD) for i, row in enumerate(reads))
    graph = Graph(ops, values, frozenset({0}), frozenset({0, *range(6, 10)}))
    cost = CostModel((seconds["a"], seconds["b"], seconds["d"], wait, *[1e-3] * 5), (0,) * 9)
    order = replay(Tables(graph, cost), room)
    assert order is not None
    assert evaluate(graph, cost, order).peak <= room
    return {names[op + 1] for op in set(order) if order.count(op) > 1}


def test_dtr_evicts_what_is_cheap_large_and_stale() -> None:
    """One value has to go: the least cost per byte and staleness."""
    same, ones = {"a": 100, "b": 100, "d": 100}, {"a": 1.0, "b": 1.0, "d": 1.0}
    assert replayed(same, {**ones, "b": 0.5}, 100, 308) == {"b"}
    assert replayed({**same, "d": 150}, ones, 100, 358) == {"d"}
    assert replayed(same, {**ones, "d": 0.9}, 100, 308, wait=0.1) == {"a"}
    assert replayed(same, {**ones, "d": 0.9}, 100, 308) == {"d"}


def test_dtr_counts_what_was_evicted_nearby() -> None:
    """Two values have to go. When b is gone, a costs b's seconds, too: a little more than d, or less."""
    same = {"a": 100, "b": 100, "d": 100}
    assert replayed(same, {"a": 1.0, "b": 0.5, "d": 1.4}, 200, 308) == {"b", "d"}
    assert replayed(same, {"a": 1.0, "b": 0.5, "d": 1.6}, 200, 308) == {"a", "b"}


def test_dtr_keeps_what_a_later_replay_reads() -> None:
    """What may not be made again stays while something made from it may have to be, although nothing else reads it."""
    values = tuple(Value(i, f"v{i}", n, Kind.ACTIVATION) for i, n in enumerate((8, 10, 100, 100, 0, 0)))
    ops = (
        Op(0, "once", (0,), (1,), Phase.FORWARD, frozenset({Effect.OPAQUE})),
        Op(1, "grow", (1,), (2,), Phase.FORWARD),
        Op(2, "big", (0,), (3,), Phase.FORWARD),
        Op(3, "read", (3,), (4,), Phase.FORWARD),
        Op(4, "read", (2,), (5,), Phase.FORWARD),
    )
    graph = Graph(ops, values, frozenset({0}), frozenset({0, 4, 5}))
    order = replay(Tables(graph, CostModel((1.0,) * 5, (0,) * 5)), 150)
    assert order == [0, 1, 2, 3, 1, 4]


def test_evicted_components_lose_what_is_made_again() -> None:
    """Sets join, and a value that leaves takes its seconds with it, but does not split its set."""
    sets = Components(4)
    for v, seconds in enumerate((1.0, 2.0, 4.0)):
        sets.enter(v, seconds)
    sets.join(0, 1)
    sets.join(1, 2)
    assert len({sets.root(v) for v in (0, 1, 2)}) == 1
    assert sets.cost[sets.root(2)] == 7.0
    sets.leave(1, 2.0)
    assert sets.cost[sets.root(0)] == 5.0
    sets.enter(1, 2.0)
    assert sets.root(1) != sets.root(0) == sets.root(2)


@pytest.mark.parametrize("name", CLASSICS)
def test_plain_dags_are_planned(name: str) -> None:
    """A training graph without phases: legal, exact, and within memory where the method reaches it."""
    for build in (lambda: gpt(2, 64, 32, 2), lambda: unet(2), lambda: chain(50)):
        graph, cost = build()
        graph = as_plain_dag(graph)
        full = SOLVERS["keep_all"].solve(graph, cost, 0)
        for share in (1.0, 0.6):
            limit = int(share * full.peak)
            found = SOLVERS[name].solve(graph, cost, limit)
            verify(graph, found.program, cost=cost)
            assert simulate(graph, found.program, cost).peak == found.peak <= full.peak
            assert (found.peak <= limit) == (found.certificate.status in (Status.FEASIBLE, Status.OPTIMAL))
    graph, cost = as_plain_dag(chain(200)[0]), chain(200)[1]
    limit = SOLVERS["keep_all"].solve(graph, cost, 0).peak // 2
    if name not in ("min_cut", "knapsack"):
        assert SOLVERS[name].solve(graph, cost, limit).peak <= limit


@pytest.mark.parametrize("name", CLASSICS)
@given(seed=st.integers(0, 10**6), num_ops=st.integers(1, 25), share=st.sampled_from([0.0, 0.3, 0.7, 0.95]))
def test_random_graphs_get_legal_programs(name: str, seed: int, num_ops: int, share: float) -> None:
    """Every effect, kind, several producers of a value: the program verifies, and its numbers are the simulator's."""
    graph = random_graph(seed, num_ops)
    rng = random.Random(seed)
    cost = CostModel(
        tuple(rng.choice([0.0, 1.0, 2.5]) for _ in graph.ops), tuple(rng.choice([0, 0, 3]) for _ in graph.ops)
    )
    full = SOLVERS["keep_all"].solve(graph, cost, 0)
    found = SOLVERS[name].solve(graph, cost, int(share * full.peak))
    verify(graph, found.program, cost=cost)
    assert simulate(graph, found.program, cost).peak == found.peak <= full.peak
    assert list(dict.fromkeys(found.order)) == list(range(len(graph.ops)))


@pytest.mark.parametrize("name", CLASSICS)
def test_odd_graphs_do_not_crash(name: str) -> None:
    """No op, one op, no value between two ops, only a loss."""
    x, y = Value(0, "x", 8, Kind.INPUT), Value(1, "y", 8, Kind.OUTPUT)
    empty = Graph((), (), frozenset(), frozenset())
    one = Graph((Op(0, "op", (0,), (1,), Phase.FORWARD),), (x, y), frozenset({0}), frozenset({0, 1}))
    loss = Graph(
        (Op(0, "loss", (0,), (1,), Phase.LOSS, frozenset({Effect.OPAQUE})),), (x, y), frozenset({0}), frozenset({0, 1})
    )
    backward = Graph((Op(0, "op", (0,), (1,), Phase.BACKWARD),), (x, y), frozenset({0}), frozenset({1}))
    for graph in (empty, one, loss, backward):
        num = len(graph.ops)
        for limit in (0, 4, 100):
            found = SOLVERS[name].solve(graph, CostModel((1.0,) * num, (0,) * num), limit)
            assert found.order == tuple(range(num))
            verify(graph, found.program)
    assert solve(empty, CostModel((), ()), Budget({"device": 1}), solver=name).peak == 0


@pytest.mark.parametrize("name", CLASSICS)
def test_searches_are_limited(name: str) -> None:
    """One unit of work, no wall clock left, an interrupt: the best so far, and TIME_LIMITED for the clock alone."""
    graph, cost = gpt(2, 64, 32, 2)
    limit = int(0.5 * SOLVERS["keep_all"].solve(graph, cost, 0).peak)
    few = Search(work=1)
    found = SOLVERS[name].solve(graph, cost, limit, search=few)
    assert few.spent <= 1
    assert found.certificate.status is not Status.TIME_LIMITED
    late = SOLVERS[name].solve(graph, cost, limit, search=Search(seconds=0.0))
    assert late.certificate.status is Status.TIME_LIMITED
    assert late.order == tuple(range(len(graph.ops)))
    stopped = Search()
    stopped.interrupt()
    assert SOLVERS[name].solve(graph, cost, limit, search=stopped).certificate.status is Status.NOT_FOUND
    told: list[float] = []
    free = Search(tell=lambda standing: told.append(standing.peak))
    best = SOLVERS[name].solve(graph, cost, limit, search=free)
    assert best.peak == full_peak(graph, cost) or best.peak in told


def full_peak(graph: Graph, cost: CostModel) -> int:
    """The peak of the step that keeps everything."""
    return SOLVERS["keep_all"].solve(graph, cost, 0).peak


def test_the_turning_point_of_a_plain_dag_is_its_highest_position() -> None:
    """A training graph turns at its LOSS op, a plain one where the most bytes are alive."""
    graph, cost = chain(30)
    assert turned(Tables(graph, cost)).loss == graph.loss_op
    plain = Tables(as_plain_dag(graph), cost)
    assert plain.loss == len(graph.ops)
    assert abs(turned(plain).loss - (graph.loss_op or 0)) <= 4
