"""Exact solvers against each other, against brute force, and on graphs that they cannot search."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import combinations, pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random_cost, random_graph
from test_solve import least_seconds, tiny
from test_solve_models import Tape, batch_norm_net, chain, gpt, unet

from keepless.cost import CostModel
from keepless.errors import SolverError
from keepless.ir import Budget, Effect, Graph, Kind, Op, Phase, Status, Value
from keepless.machine import verify
from keepless.passes import evaluate
from keepless.solve import SOLVERS, Search, Solution, Solver, Standing, floor_bound
from keepless.solve.exact import Checkmate, Exhaustive, Intervals, intervals
from keepless.solve.exact.masks import Masks
from keepless.solve.exact.stages import Stages
from keepless.solve.planner import Planner
from keepless.solve.tables import Tables

FITS = (Status.OPTIMAL, Status.FEASIBLE)
needs_ortools = pytest.mark.skipif(find_spec("ortools") is None, reason="OR-tools is not installed")
THREE = ["exhaustive", "checkmate", pytest.param("intervals", marks=needs_ortools)]


def plain_dag(seed: int, num_ops: int, sizes: Sequence[int] = (1, 2, 4, 7)) -> tuple[Graph, CostModel]:
    """A random graph of forward ops only, whose sinks are pinned; one input may be dropped. Most outputs may take over
    the storage of an input of their size."""
    rng = random.Random(seed)
    values = [Value(0, "x", 3, Kind.INPUT)]
    ops = []
    for i in range(num_ops):
        inputs = tuple(sorted(rng.sample(range(len(values)), min(len(values), rng.randint(1, 3)))))
        values.append(Value(i + 1, f"v{i}", rng.choice(sizes), Kind.ACTIVATION))
        reuses = tuple((i + 1, v) for v in inputs if v and values[v].nbytes == values[-1].nbytes)
        ops.append(Op(i, "op", inputs, (i + 1,), Phase.FORWARD, reuses=reuses if rng.random() < 0.7 else ()))
    read = {v for op in ops for v in op.inputs}
    sinks = frozenset(value.id for value in values if value.id not in read)
    graph = Graph(tuple(ops), tuple(values), frozenset({0}), sinks - {0})
    seconds = tuple(rng.choice([1.0, 2.0, 5.0]) for _ in ops)
    return graph, CostModel(seconds, tuple(rng.choice([0, 0, 3]) for _ in ops))


def noisy(seed: int) -> tuple[Graph, CostModel]:
    """A random training step with dropout: draws with recorded states, products that may run in place."""
    rng, t = random.Random(seed), Tape()
    x = t.value(4000, Kind.INPUT)
    for i in range(3):
        size, saves = rng.choice([4000, 8000]), rng.random() < 0.5
        grads = [(x, () if saves else (x,))] if i else []
        x = t.forward("op", (x,), size, grads, rng.choice([1e5, 1e6]), saves_output=saves, inplace=i > 0)[0]
        x = t.dropout(x) if rng.random() < 0.7 else x
    return t.finish(t.forward("sum", (x,), 4, [(x, (x,))])[0])


def captured(graph: Graph, cost: CostModel) -> Planner:
    """The planner, first runs in the captured order."""
    return Planner(graph, cost, first_runs=tuple(range(len(graph.ops))))


def limits(graph: Graph, cost: CostModel) -> list[int]:
    """Limits from the planner's lowest peak to just below the captured order's."""
    full, low = full_peak(graph, cost), captured(graph, cost).smallest.peak
    return sorted({low, (low + full) // 2, full - 1} - {full})


def full_peak(graph: Graph, cost: CostModel) -> int:
    """The captured order's peak."""
    return evaluate(graph, cost, range(len(graph.ops))).peak


def orders_with_replays(graph: Graph, most: int) -> set[tuple[int, ...]]:
    """The captured order with up to so many replays anywhere."""
    may = [op.can_replay and op.phase is not Phase.LOSS and not graph.pinned & set(op.outputs) for op in graph.ops]
    found = newest = {tuple(range(len(graph.ops)))}
    for _ in range(most):
        newest = {
            (*order[:at], op_id, *order[at:])
            for order in newest
            for at in range(1, len(order) + 1)
            for op_id in set(order[:at])
            if may[op_id]
        }
        found = found | newest
    return found


def is_true(graph: Graph, cost: CostModel, limit: int, found: Solution) -> bool:
    """Whether the solution is legal and its status and numbers are the machine's; asserts each."""
    exact = evaluate(graph, cost, found.order)
    assert (found.seconds, found.peak) == (exact.seconds, exact.peak)
    fits = found.peak <= limit
    assert fits == (found.certificate.status in FITS)
    verify(graph, found.program, cost=cost, budget=Budget({"device": max(limit, found.peak, 1)}))
    if fits:
        assert found.certificate.bound_seconds <= found.seconds * (1 + 1e-6) + 1e-12
    return fits


@pytest.mark.parametrize("layers", [3, 4])
@pytest.mark.parametrize("seed", range(12))
def test_the_oracle_agrees_with_plain_shortest_paths(seed: int, layers: int) -> None:
    """A* with dominance and bounds finds what Dijkstra over all drops finds, and proves what does not exist."""
    graph, cost = tiny(seed, layers)
    bound, _ = floor_bound(graph, cost)
    for limit in {*limits(graph, cost), bound, bound - 1, full_peak(graph, cost)}:
        found = Exhaustive().solve(graph, cost, limit)
        best = least_seconds(graph, cost, limit)
        assert is_true(graph, cost, limit, found) == (best is not None)
        if best is None:
            assert found.certificate.status is Status.PROVEN_INFEASIBLE
        else:
            assert found.certificate.status is Status.OPTIMAL
            assert found.seconds == pytest.approx(best)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_no_order_with_a_few_replays_beats_the_oracle(seed: int, num_ops: int) -> None:
    """With storage reuse, generator states, several producers and once-only ops, on the machine's own numbers."""
    graph = random_graph(seed, num_ops)
    cost = random_cost(graph, random.Random(seed))
    costs = [evaluate(graph, cost, order) for order in orders_with_replays(graph, 2)]
    peaks = sorted({found.peak for found in costs})
    for limit in [*peaks[:4], peaks[0] - 1]:
        found = Exhaustive().solve(graph, cost, limit)
        fits = is_true(graph, cost, limit, found)
        best = min((rival.seconds for rival in costs if rival.peak <= limit), default=None)
        if best is not None:
            assert fits
            assert found.certificate.status is Status.OPTIMAL
            assert found.seconds <= best + 1e-9


def test_what_is_higher_than_the_search_took_it_for_is_no_proof() -> None:
    """A value that two ops make: the order that the search finds does not fit, and nothing is claimed."""
    graph = random_graph(360, 2)
    cost = random_cost(graph, random.Random(360))
    assert evaluate(graph, cost, [0, 1, 2, 3]).peak == 129
    found = Exhaustive().solve(graph, cost, 128)
    assert found.certificate.status is Status.NOT_FOUND
    assert "higher" in found.certificate.witness


def two_in_place(seed: int) -> tuple[Graph, CostModel]:
    """A random DAG of ops with one or two outputs, each of which may take over an input of its size."""
    rng = random.Random(seed)
    values = [Value(0, "x", 2, Kind.INPUT)]
    ops: list[Op] = []
    for i in range(5):
        inputs = tuple(sorted(rng.sample(range(len(values)), min(len(values), rng.randint(1, 3)))))
        outputs = tuple(len(values) + k for k in range(rng.randint(1, 2)))
        values.extend(Value(v, f"v{v}", rng.choice([2, 2, 4]), Kind.ACTIVATION) for v in outputs)
        pairs = [(out, v) for out in outputs for v in inputs if v and values[v].nbytes == values[out].nbytes]
        rng.shuffle(pairs)
        ops.append(Op(i, "op", inputs, outputs, Phase.FORWARD, reuses=tuple(pairs)))
    kept = frozenset(rng.sample(range(1, len(values)), 2))
    seconds = tuple(rng.choice([0.0, 1.0, 2.0]) for _ in ops)
    return Graph(tuple(ops), tuple(values), frozenset({0}), kept), CostModel(seconds, (0,) * len(ops))


@pytest.mark.slow
def test_storage_reuse_is_counted_as_the_machine_counts_it() -> None:
    """Oracle and brute force agree at every limit where up to two replays decide."""
    improved = 0
    for seed in range(1500):
        graph, cost = two_in_place(seed)
        costs = [evaluate(graph, cost, order) for order in orders_with_replays(graph, 2)]
        for limit in range(min(found.peak for found in costs), full_peak(graph, cost)):
            best = min((rival.seconds for rival in costs if rival.peak <= limit), default=None)
            found = Exhaustive().solve(graph, cost, limit)
            fits = is_true(graph, cost, limit, found)
            if best is not None:
                assert fits
                assert found.seconds <= best
                improved += 1
    assert improved > 300


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_orders_of_first_runs_are_searched_when_asked_for(seed: int, num_ops: int) -> None:
    """Where some legal permutation fits without replays, it is found; never slower than with the captured order."""
    graph, cost = plain_dag(seed, num_ops)
    legal = []
    for order in permutations(range(len(graph.ops))):
        made = set(graph.inputs)
        if all(made.issuperset(graph.ops[p].inputs) and not made.update(graph.ops[p].outputs) for p in order):
            legal.append(evaluate(graph, cost, order).peak)
    for limit in sorted(set(legal)):
        found = Exhaustive(any_order=True).solve(graph, cost, limit)
        assert is_true(graph, cost, limit, found)
        assert found.seconds == pytest.approx(sum(cost.seconds))
    captured = Exhaustive().solve(graph, cost, min(legal) - 1)
    free = Exhaustive(any_order=True).solve(graph, cost, min(legal) - 1)
    if captured.certificate.status is Status.OPTIMAL:
        assert free.certificate.status is Status.OPTIMAL
        assert free.seconds <= captured.seconds + 1e-9


def test_free_orders_keep_draws_and_buffers_where_the_rules_want_them() -> None:
    """Random graphs with draws, collectives and buffer updates: every free order passes the verifier."""
    searched = 0
    for seed in range(40):
        graph = random_graph(seed, 6)
        cost = random_cost(graph, random.Random(seed))
        for limit in range(full_peak(graph, cost) - 1, floor_bound(graph, cost)[0] - 1, -40):
            found = Exhaustive(any_order=True).solve(graph, cost, limit)
            searched += is_true(graph, cost, limit, found)
    assert searched > 20


def stages_of(order: Sequence[int]) -> list[list[int]]:
    """The replays before each first run, and those behind the last one."""
    seen: set[int] = set()
    stages: list[list[int]] = [[]]
    for op_id in order:
        if op_id in seen:
            stages[-1].append(op_id)
        else:
            seen.add(op_id)
            stages.append([])
    return stages


def cases() -> Iterator[tuple[Graph, CostModel]]:
    """Dozens of tiny graphs whose values have one producer each: training steps, plain DAGs, odd effects."""
    for seed in range(10):
        yield tiny(seed, 5)
        yield plain_dag(seed, 7, (2, 2, 4))
        if seed < 3:
            yield noisy(seed)
    for seed in range(20):
        graph = random_graph(seed, 7)
        cost = random_cost(graph, random.Random(seed))
        yield graph, replace(cost, seconds=tuple(s + 0.1 for s in cost.seconds))


@pytest.mark.slow
@needs_ortools
def test_the_three_agree_within_their_spaces() -> None:
    """The oracle is never beaten; where its order lies in the space of another solver, both have the same seconds."""
    compared = {"Checkmate": 0, "Intervals": 0}
    for graph, cost in cases():
        tables = Tables(graph, cost)
        for limit in limits(graph, cost):
            best = Exhaustive(backward_again=False).solve(graph, cost, limit)
            is_found = best.certificate.status is Status.OPTIMAL
            inside = is_found and Stages(tables).is_whole_truth
            inside = inside and all(a < b for stage in stages_of(best.order) for a, b in pairwise(stage))
            inside = inside and all(tables.replayable[p] for stage in stages_of(best.order) for p in stage)
            inside = inside and not stages_of(best.order)[-1]
            twice = max((best.order.count(p) for p in set(best.order)), default=0) <= 2
            rivals: list[tuple[Solver, bool]] = [(Checkmate(), inside), (Intervals(), inside and twice)]
            for solver, is_inside in rivals:
                found = solver.solve(graph, cost, limit)
                fits = is_true(graph, cost, limit, found)
                if fits:
                    assert is_found
                    assert found.seconds >= best.seconds * (1 - 1e-9)
                if is_inside:
                    assert found.certificate.status is Status.OPTIMAL
                    assert found.seconds == pytest.approx(best.seconds, rel=1e-6)
                    compared[type(solver).__name__] += 1
    assert min(compared.values()) > 40


@pytest.mark.slow
@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"exhaustive", "checkmate", "intervals"}))
def test_the_oracle_is_not_beaten_by_other_planners(solver: str) -> None:
    """At the peak that another solver reached, the oracle is at least as fast, with storage reuse."""
    for graph, cost in cases():
        for limit in limits(graph, cost):
            rival = SOLVERS[solver].solve(graph, cost, limit)
            is_captured = list(dict.fromkeys(rival.order)) == list(range(len(graph.ops)))
            found = Exhaustive(any_order=not is_captured).solve(graph, cost, rival.peak)
            assert found.certificate.status is Status.OPTIMAL
            assert found.seconds <= rival.seconds * (1 + 1e-9)


@pytest.mark.slow
@needs_ortools
@pytest.mark.parametrize("seed", range(3))
def test_bounds_of_searches_that_end_early_are_bounds(seed: int) -> None:
    """A bound is below the optimum however little work there was, and the planner's order is answered."""
    graph, cost = tiny(seed, 5)
    for limit in limits(graph, cost):
        best = Exhaustive(backward_again=False).solve(graph, cost, limit)
        rough: list[Solver] = [Exhaustive(), Checkmate(), Checkmate(approximation=True), Intervals()]
        for solver in rough:
            for work in (0, 1, 7):
                search = Search(work=work)
                found = solver.solve(graph, cost, limit, search=search)
                fits = is_true(graph, cost, limit, found)
                if best.certificate.status is Status.OPTIMAL and fits:
                    assert found.certificate.bound_seconds <= best.seconds * (1 + 1e-6)
                if isinstance(solver, Exhaustive | Intervals):
                    assert fits == (captured(graph, cost).smallest.peak <= limit)


def test_the_rounded_relaxation_fits_or_says_so() -> None:
    """Two-phase rounding gives plans that fit; its bound is the relaxation's, above that of every op once."""
    fitting = 0
    for seed in range(8):
        graph, cost = tiny(seed, 6)
        for limit in limits(graph, cost):
            found = Checkmate(approximation=True).solve(graph, cost, limit)
            fits = is_true(graph, cost, limit, found)
            assert found.certificate.status is not Status.OPTIMAL
            best = Exhaustive(backward_again=False).solve(graph, cost, limit)
            if best.certificate.status is Status.OPTIMAL:
                fitting += fits
                assert sum(cost.seconds) < found.certificate.bound_seconds <= best.seconds * (1 + 1e-6)
    assert fitting > 8


def test_checkmate_refuses_graphs_that_are_too_large() -> None:
    """The captured order is the answer, and the certificate says why."""
    graph, cost = chain(60, 1000)
    limit = full_peak(graph, cost) // 2
    found = Checkmate().solve(graph, cost, limit)
    assert len(graph.ops) > 120
    assert found.order == tuple(range(len(graph.ops)))
    assert found.certificate.status is Status.NOT_FOUND
    assert found.certificate.witness == f"refused: {len(graph.ops)} ops, above 120"


def test_ops_without_cost_share_a_stage() -> None:
    """An op that costs nothing has no stage of its own; the plan is as good."""
    graph, cost = tiny(1, 5)
    seconds = tuple(0.0 if op.phase is Phase.LOSS else cost.seconds[op.id] for op in graph.ops)
    free = replace(cost, seconds=seconds)
    merged, apart = Stages(Tables(graph, free)), Stages(Tables(graph, free), is_merging=False)
    assert (merged.num, apart.num) == (len(graph.ops) - 1, len(graph.ops))
    for limit in limits(graph, free):
        found, best = (solver.solve(graph, free, limit) for solver in (Checkmate(), Exhaustive(backward_again=False)))
        assert found.certificate.status is best.certificate.status is Status.OPTIMAL
        assert found.seconds == pytest.approx(best.seconds)


@pytest.mark.slow
@needs_ortools
def test_intervals_improve_on_the_planner() -> None:
    """On batch normalisation at 0.7 of the peak CP-SAT proves a plan faster than the planner's."""
    graph, cost = batch_norm_net(4)
    limit = int(0.7 * full_peak(graph, cost))
    told: list[Standing] = []
    found = Intervals().solve(graph, cost, limit, search=Search(work=400, tell=told.append))
    known = SOLVERS["keepless"].solve(graph, cost, limit)
    assert is_true(graph, cost, limit, found)
    assert found.certificate.status is Status.OPTIMAL
    assert found.seconds <= known.seconds
    assert found.certificate.bound_seconds == pytest.approx(found.seconds)
    assert told
    assert told[-1].seconds == found.seconds
    assert [standing.seconds for standing in told] == sorted((s.seconds for s in told), reverse=True)


@pytest.mark.slow
@needs_ortools
def test_intervals_of_one_run_find_no_more_than_the_planner() -> None:
    """With one run per op the model has no replay; the planner's order is the answer then."""
    graph, cost = unet(1)
    limit = int(0.7 * full_peak(graph, cost))
    found = Intervals(copies=1).solve(graph, cost, limit)
    known = SOLVERS["keepless"].solve(graph, cost, limit)
    assert found.order == known.order
    assert found.certificate.status is Status.FEASIBLE
    assert sum(cost.seconds) < found.certificate.bound_seconds <= known.seconds


@needs_ortools
def test_bytes_beyond_the_models_units_are_rounded_up() -> None:
    """Terabytes with odd sizes: rounded in the model, exact in the answer."""
    graph, cost = tiny(2, 5)
    values = tuple(replace(value, nbytes=value.nbytes * 10**9 + value.id) for value in graph.values)
    large = replace(graph, values=values)
    for limit in limits(large, cost):
        found = Intervals().solve(large, cost, limit)
        best = Exhaustive().solve(large, cost, limit)
        assert is_true(large, cost, limit, found)
        assert found.seconds >= best.seconds * (1 - 1e-9)
        assert "rounded up" in found.certificate.space


def test_without_ortools_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typed error that names the extra."""
    monkeypatch.setattr(intervals, "find_spec", lambda name: None)
    graph, cost = tiny(0)
    with pytest.raises(SolverError, match=r"keepless\[solvers\]"):
        Intervals().solve(graph, cost, full_peak(graph, cost) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("solver", THREE)
def test_odd_graphs(solver: str) -> None:
    """No ops, one op, no LOSS op, values that nothing reads, no bytes at all: answers, never exceptions."""
    empty = Graph((), (), frozenset(), frozenset())
    assert SOLVERS[solver].solve(empty, CostModel((), ()), 0).certificate.status is Status.OPTIMAL
    values = (Value(0, "x", 5, Kind.INPUT), Value(1, "y", 7, Kind.OUTPUT))
    one = Graph((Op(0, "op", (0,), (1,), Phase.FORWARD),), values, frozenset({0}), frozenset({1}))
    cost = CostModel((1.0,), (2,))
    assert SOLVERS[solver].solve(one, cost, 14).certificate.status is Status.OPTIMAL
    assert SOLVERS[solver].solve(one, cost, 13).certificate.status is Status.PROVEN_INFEASIBLE
    for seed in range(4):
        graph, cost = plain_dag(seed, 6)
        nothing = replace(graph, pinned=frozenset(), values=tuple(replace(v, nbytes=0) for v in graph.values))
        for limit in (0, full_peak(graph, cost) - 1):
            is_true(graph, cost, limit, SOLVERS[solver].solve(graph, cost, limit))
            is_true(nothing, cost, limit, SOLVERS[solver].solve(nothing, cost, limit))


@pytest.mark.parametrize("solver", THREE)
def test_a_clock_ends_the_search_and_says_so(solver: str) -> None:
    """With no seconds left, what is known is the answer, and a plan that the clock cut short says so."""
    graph, cost = gpt(1, 64, 32, 2)
    small, its_cost = tiny(2, 10)
    for model, costs, limit in ((graph, cost, int(0.8 * full_peak(graph, cost))), (small, its_cost, 26004)):
        search = Search(seconds=0.0)
        found = SOLVERS[solver].solve(model, costs, limit, search=search)
        assert found.certificate.status is not Status.OPTIMAL
        assert (found.certificate.status is Status.TIME_LIMITED) == (search.is_cut_by_clock and found.peak <= limit)


def test_states_that_take_over_storage_must_be_read() -> None:
    """A value counts as taking over storage only where something reads it: `evaluate` and the search agree on that."""
    sizes = [(4, Kind.ACTIVATION)] * 4 + [(1, Kind.OUTPUT)]
    values = (Value(0, "x", 4, Kind.INPUT), *(Value(i + 1, f"v{i}", n, k) for i, (n, k) in enumerate(sizes)))
    ops = (
        Op(0, "a", (0,), (1,), Phase.FORWARD),
        Op(1, "relu_", (1,), (2,), Phase.FORWARD, reuses=((2, 1),)),
        Op(2, "b", (0,), (3,), Phase.FORWARD),
        Op(3, "c", (3,), (4,), Phase.FORWARD, reuses=((4, 3),)),
        Op(4, "d", (2, 4), (5,), Phase.FORWARD),
    )
    graph = Graph(ops, values, frozenset({0}), frozenset({0, 5}))
    cost = CostModel((1.0,) * 5, (0,) * 5)
    rivals = [evaluate(graph, cost, order) for order in orders_with_replays(graph, 3)]
    for limit in range(8, full_peak(graph, cost)):
        best = min((rival.seconds for rival in rivals if rival.peak <= limit), default=None)
        found = Exhaustive().solve(graph, cost, limit)
        assert is_true(graph, cost, limit, found) == (best is not None)
        if best is not None:
            assert found.seconds == best


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 30), st.integers(0, 255))
def test_drops_are_the_smallest_sets_that_free_enough(sizes: list[int], excess: int, among: int) -> None:
    """Every set that frees enough and has no smaller one inside, each once."""
    values = tuple(Value(i, f"v{i}", n, Kind.INPUT) for i, n in enumerate(sizes))
    graph = Graph((), values, frozenset(range(len(sizes))), frozenset())
    masks = Masks(graph, CostModel((), ()), [])
    among &= (1 << len(sizes)) - 1
    items = [i for i in range(len(sizes)) if among >> i & 1]
    found = list(masks.drops(among, excess))
    expected = set()
    for count in range(1, len(items) + 1):
        for chosen in combinations(items, count):
            total = sum(sizes[i] for i in chosen)
            if total >= excess > total - min(sizes[i] for i in chosen):
                expected.add(sum(1 << i for i in chosen))
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_ops_with_effects_run_once() -> None:
    """The oracle replays no op that may not run again."""
    graph, cost = batch_norm_net(1)
    for limit in limits(graph, cost):
        found = Exhaustive().solve(graph, cost, limit)
        assert is_true(graph, cost, limit, found)
        once = [op.id for op in graph.ops if Effect.BUFFER in op.effects or op.phase is Phase.LOSS]
        assert once
        assert all(found.order.count(op_id) == 1 for op_id in once)
