"""Solvers: conformance over the table, quality against block checkpointing, odd graphs."""

from __future__ import annotations

import heapq
import random
from dataclasses import replace
from importlib.util import find_spec

import pytest
from test_solve_models import Tape, batch_norm_net, chain, dense, gpt, unet

from keepless.cost import CostModel
from keepless.errors import InfeasibleBudget, SolverError
from keepless.ir import Budget, Effect, Graph, Kind, Phase, Run, Status, Value
from keepless.machine import simulate, verify
from keepless.passes import evaluate
from keepless.solve import SOLVERS, Search, Standing, can_recheck, floor_bound, recheck, smallest, solve
from keepless.solve.anytime import plan
from keepless.solve.baselines import EveryK
from keepless.solve.moment_cut import cut_bound
from keepless.solve.moments import Relaxation
from keepless.solve.planner import Planner
from keepless.solve.tables import Tables

NEEDS = {"intervals": "ortools"}
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(NEEDS.get(name, "numpy")) is None, reason="not installed"))
    for name in sorted(SOLVERS)
]
SMALL = {"gpt": lambda: gpt(2, 64, 32, 2), "unet": lambda: unet(2), "dense": lambda: dense(5), "bn": batch_norm_net}


def tiny(seed: int, layers: int = 4) -> tuple[Graph, CostModel]:
    """A random training graph of about a dozen ops, small enough to search exhaustively."""
    rng, t = random.Random(seed), Tape()
    xs = [t.value(rng.choice([2000, 4000]), Kind.INPUT)]
    for _ in range(layers):
        x = rng.choice(xs[-2:])
        size = rng.choice([1000, 4000, 8000])
        saves = rng.random() < 0.5
        reads = (x,) if not saves else ()
        grads = [(v, reads) for v in (x,) if v != xs[0]]
        out = t.forward("op", (x,), size, grads, flops=rng.choice([1e5, 1e6, 4e6]), saves_output=saves)[0]
        xs.append(out)
    graph, cost = t.finish(t.forward("sum", (xs[-1],), 4, [(xs[-1], (xs[-1],))])[0])
    return replace(graph, ops=tuple(replace(op, reuses=()) for op in graph.ops)), cost


def least_seconds(graph: Graph, cost: CostModel, limit: int) -> float | None:
    """The fastest step within the limit over all programs: shortest path over (base ops done, resident values)."""
    sizes = [v.nbytes for v in graph.values]
    start = (0, frozenset(graph.inputs))
    queue: list[tuple[float, int, tuple[int, frozenset[int]]]] = [(0.0, 0, start)]
    settled: set[tuple[int, frozenset[int]]] = set()
    count = 0
    while queue:
        seconds, _, (done, resident) = heapq.heappop(queue)
        if (done, resident) in settled:
            continue
        settled.add((done, resident))
        if done == len(graph.ops) and graph.pinned <= resident:
            return seconds
        for v in resident - graph.pinned:
            count += 1
            heapq.heappush(queue, (seconds, count, (done, resident - {v})))
        for op in graph.ops[: done + 1]:
            fresh = set(op.outputs) - resident
            if not set(op.inputs) <= resident or (op.id < done and (not op.can_replay or not fresh)):
                continue
            nbytes = sum(sizes[v] for v in resident) + sum(sizes[v] for v in op.outputs) + cost.scratch[op.id]
            if nbytes > limit:
                continue
            count += 1
            state = (max(done, op.id + 1), resident | fresh)
            heapq.heappush(queue, (seconds + cost.seconds[op.id], count, state))
    return None


@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize(
    "model",
    [
        "dense",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("bn", "gpt")),
        pytest.param("unet", marks=pytest.mark.exhaustive),
    ],
)
def test_solutions_are_legal_and_say_the_truth(solver: str, model: str) -> None:
    """Every solver's program passes the verifier, and its seconds and peak are the simulator's."""
    graph, cost = SMALL[model]()
    full = SOLVERS["keep_all"].solve(graph, cost, 0)
    for share in (1.0, 0.7, 0.4):
        limit = int(share * full.peak)
        found = SOLVERS[solver].solve(graph, cost, limit)
        again = SOLVERS[solver].solve(graph, cost, limit)
        assert found.order == again.order
        verify(graph, found.program, cost=cost)
        timeline = simulate(graph, found.program, cost)
        assert timeline.peak == found.peak
        assert timeline.seconds == pytest.approx(found.seconds)
        assert (found.peak <= limit) == (found.certificate.status in (Status.FEASIBLE, Status.OPTIMAL))
        first_runs = list(dict.fromkeys(found.order))
        assert first_runs == list(range(len(graph.ops)))


@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_no_solver_beats_exhaustive_search(solver: str, seed: int) -> None:
    """On tiny graphs without storage reuse, nobody is faster than the exhaustive search at the same peak."""
    graph, cost = tiny(seed)
    full = SOLVERS["keep_all"].solve(graph, cost, 0)
    for share in (1.0, 0.85, 0.7):
        found = SOLVERS[solver].solve(graph, cost, int(share * full.peak))
        best = least_seconds(graph, cost, found.peak)
        assert best is not None
        assert found.seconds >= best * (1 - 1e-9)
    assert least_seconds(graph, cost, floor_bound(graph, cost)[0] - 1) is None


@pytest.mark.parametrize("seed", range(6))
def test_planner_is_near_the_optimum_on_tiny_graphs(seed: int) -> None:
    """At the smallest peak of the planner and between, its time is within a fifth of the optimum."""
    graph, cost = tiny(seed, layers=5)
    full = SOLVERS["keep_all"].solve(graph, cost, 0)
    low = smallest(graph, cost)
    for limit in (low.peak, (low.peak + full.peak) // 2):
        found = SOLVERS["keepless"].solve(graph, cost, limit)
        best = least_seconds(graph, cost, limit)
        assert best is not None
        assert found.peak <= limit
        assert found.seconds <= 1.2 * best


@pytest.mark.parametrize("seed", range(4))
def test_bounds_on_time_are_below_the_optimum(seed: int) -> None:
    """The minimum cut at the LOSS op bounds every program; the certificate's bound is below its own plan."""
    graph, cost = tiny(seed, layers=5)
    tables = Tables(graph, cost)
    full, low = tables.lives(tables.base).peak, smallest(graph, cost).peak
    for limit in (low, (low + full) // 2, full - 1, full):
        bound = float(tables.seconds.sum()) + Relaxation(tables).bound(limit, [tables.loss]).seconds
        best = least_seconds(graph, cost, limit)
        assert best is not None
        assert bound <= best * (1 + 1e-9)
        found = SOLVERS["keepless"].solve(graph, cost, limit)
        assert found.certificate.bound_seconds <= found.seconds * (1 + 1e-9)


@pytest.mark.slow
def test_the_certified_gap_is_small_on_gpt() -> None:
    """Where single recomputation is enough, the plan is within two percent of the proven bound."""
    graph, cost = gpt(6)
    planner = Planner(graph, cost)
    full = evaluate(graph, cost, range(len(graph.ops))).peak
    for share in (0.8, 0.5, 0.3):
        found = plan(planner, int(share * full))
        assert found.peak <= share * full
        assert found.seconds <= 1.02 * found.certificate.bound_seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: dense(8), id="dense"),
        pytest.param(lambda: gpt(3), id="gpt", marks=pytest.mark.exhaustive),
        pytest.param(unet, id="unet", marks=pytest.mark.exhaustive),
    ],
)
def test_the_smallest_budget_is_the_same_in_every_run(build) -> None:
    """Measured seconds differ from run to run; the smallest budget does not, and is always reached when asked for."""
    graph, cost = build()
    low = smallest(graph, cost).peak
    for seed in range(3):
        noise = random.Random(seed)
        noisy = replace(cost, seconds=tuple(s * noise.uniform(0.5, 2.0) for s in cost.seconds))
        assert smallest(graph, noisy).peak == low
        found = solve(graph, noisy, Budget({"device": low}))
        assert found.peak <= low
        assert found.smallest_nbytes == low


def test_an_unknown_solver_is_refused() -> None:
    """The message lists the solvers that there are."""
    graph, cost = batch_norm_net(2)
    with pytest.raises(SolverError, match="keepless"):
        solve(graph, cost, Budget({"device": 1 << 30}), solver="magic")


@pytest.mark.slow
def test_infeasible_budgets_are_answered_with_numbers() -> None:
    """An impossible budget says the smallest peak found, the proven bound and the op that blocks."""
    graph, cost = gpt(2, 64, 32, 2)
    bound, _ = floor_bound(graph, cost)
    with pytest.raises(InfeasibleBudget) as caught:
        solve(graph, cost, Budget({"device": bound - 1}))
    error = caught.value
    assert error.bound == bound
    assert error.smallest_budget >= bound
    assert error.blocking
    assert str(error.smallest_budget) in str(error)
    found = solve(graph, cost, Budget({"device": error.smallest_budget}))
    assert found.peak <= error.smallest_budget
    assert found.smallest_nbytes <= error.smallest_budget
    assert found.smallest_bound == bound


def test_reserve_is_left_free() -> None:
    """The limit is the device's bytes less the reserve."""
    graph, cost = unet(2)
    full = SOLVERS["keep_all"].solve(graph, cost, 0).peak
    found = solve(graph, cost, Budget({"device": full}, reserve=full // 10))
    assert found.peak <= full - full // 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layers"), [(gpt, 3), (unet, 3), (dense, 16), pytest.param(gpt, 6, marks=pytest.mark.exhaustive)]
)
def test_planner_beats_block_checkpointing_at_its_own_peak(model, layers: int) -> None:
    """At the peak of every block length that beats keep-all, the planner is within it and faster."""
    graph, cost = model(layers)
    planner, tables = Planner(graph, cost), Tables(graph, cost)
    full = tables.lives(tables.base).peak
    lowest = full
    for order in list(EveryK().orders(tables))[:6]:
        rival = evaluate(graph, cost, order)
        lowest = min(lowest, rival.peak)
        if rival.peak >= full:
            continue
        mine = plan(planner, rival.peak)
        assert mine.peak <= rival.peak
        assert mine.seconds <= rival.seconds
    assert planner.smallest.peak <= lowest


def test_gpt_reaches_the_promised_shares() -> None:
    """On the demo's graph: the smallest peak, and the time at two peaks."""
    graph, cost = gpt(6)
    planner = Planner(graph, cost)
    full = evaluate(graph, cost, range(len(graph.ops)))
    assert planner.smallest.peak <= 0.2 * full.peak
    assert plan(planner, int(0.36 * full.peak)).seconds <= 1.105 * full.seconds
    assert plan(planner, int(0.54 * full.peak)).seconds <= 1.06 * full.seconds


@pytest.mark.slow
def test_deep_chains_reach_the_square_root_regime() -> None:
    """A thousand layers fit into a tenth of their memory in seconds."""
    graph, cost = chain(1000)
    full = evaluate(graph, cost, range(len(graph.ops)))
    found = SOLVERS["keepless"].solve(graph, cost, full.peak // 8)
    assert found.peak <= full.peak // 8
    assert found.seconds <= 1.34 * full.seconds


@pytest.mark.parametrize("model", ["bn", "gpt"])
def test_ops_that_may_not_run_again_run_once(model: str) -> None:
    """Running statistics are copied once, and an op that reads them afterwards never runs again."""
    graph, cost = SMALL[model]()
    found = smallest(graph, cost)
    once = {op.id for op in graph.ops if not op.can_replay}
    assert once
    runs = [i.op for i in found.program if isinstance(i, Run)]
    assert all(runs.count(op) == 1 for op in once)
    assert all(graph.ops[op].phase is Phase.FORWARD for op in runs if runs.count(op) > 1)


def test_an_op_that_reads_what_the_step_overwrites_is_not_replayed() -> None:
    """An op that capture marks with the effect BUFFER runs once, although replaying its outputs would free memory."""
    graph, cost = batch_norm_net(4)
    marked = tuple(replace(op, effects=op.effects | {Effect.BUFFER}) if op.name == "norm" else op for op in graph.ops)
    found = smallest(replace(graph, ops=marked), cost)
    counts = [found.order.count(op.id) for op in marked if op.name == "norm"]
    assert counts == [1] * 4


@pytest.mark.parametrize("model", sorted(SMALL))
def test_fast_profiles_agree_with_the_passes(model: str) -> None:
    """The solvers' own evaluation equals `passes.evaluate` position by position, replays included."""
    graph, cost = SMALL[model]()
    tables = Tables(graph, cost)
    for order in (list(range(len(graph.ops))), list(smallest(graph, cost).order), *EveryK().orders(tables)):
        mine, theirs = tables.lives(order), evaluate(graph, cost, order, profile=True)
        assert theirs.profile is not None
        assert mine.profile.tolist() == theirs.profile.tolist()
        assert mine.seconds == pytest.approx(theirs.seconds)


def test_forward_only_and_empty_graphs() -> None:
    """A graph without backward, and one without ops, are planned too."""
    graph, cost = unet(2)
    cut = graph.loss_op
    assert cut is not None
    made = {v for op in graph.ops[:cut] for v in op.outputs}
    forward = Graph(graph.ops[:cut], graph.values, graph.inputs, graph.inputs | {max(made)})
    kept = CostModel(cost.seconds[:cut], cost.scratch[:cut])
    full = evaluate(forward, kept, range(cut))
    assert solve(forward, kept, Budget({"device": full.peak})).peak <= full.peak
    empty = Graph((), (), frozenset(), frozenset())
    assert solve(empty, CostModel((), ()), Budget({"device": 1})).peak == 0


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_graphs_without_ops_in_less_than_their_inputs(solver: str) -> None:
    """A typed error with the inputs' bytes, whether they stay or not; and so where there is nothing at all."""
    if solver == "intervals" and find_spec("ortools") is None:
        pytest.skip("OR-tools is not installed")
    values = (Value(0, "x", 1000, Kind.INPUT),)
    for pinned, limit in ((frozenset[int](), 10), (frozenset({0}), 999), (frozenset({0}), -1)):
        graph = Graph((), values, frozenset({0}), pinned)
        with pytest.raises(InfeasibleBudget, match="no ops") as caught:
            solve(graph, CostModel((), ()), Budget({"device": limit}), solver=solver)
        assert (caught.value.smallest_budget, caught.value.bound, caught.value.blocking) == (1000, 1000, "")
    empty = Graph((), (), frozenset(), frozenset())
    with pytest.raises(InfeasibleBudget):
        solve(empty, CostModel((), ()), Budget({"device": -1}), solver=solver)


def test_a_solver_is_a_name_or_an_object() -> None:
    """An object with a solve method is taken as it is; what is neither is refused, and so is a wrong program."""
    graph, cost = gpt(2, 64, 32, 2)
    budget = Budget({"device": 2**40})
    found = solve(graph, cost, budget, EveryK(1))
    assert found.order == EveryK(1).solve(graph, cost, 2**40).order != tuple(range(len(graph.ops)))
    with pytest.raises(SolverError, match="neither a name nor an object"):
        solve(graph, cost, budget, 3)  # type: ignore[arg-type]
    with pytest.raises(SolverError, match="There is no solver 'magic'"):
        solve(graph, cost, budget, "magic")


def test_a_search_counts_work_and_says_when_the_clock_ends_it() -> None:
    """Work is counted; a clock that runs out and an interrupt end the search, and only the first is said."""
    search = Search(work=3)
    assert [search.spend() for _ in range(4)] == [True, True, True, False]
    assert (search.spent, search.is_cut_by_clock, search.is_out_of_work) == (3, False, True)
    enough = Search(work=3)
    assert [enough.spend() for _ in range(3)] == [True, True, True]
    assert enough.ending == ""
    late = Search(seconds=0.0)
    assert not late.spend()
    assert late.is_cut_by_clock
    assert late.seconds_left == 0
    told: list[Standing] = []
    stopped = Search(tell=told.append)
    stopped.report(Standing("s", 2.0, 10, 1.0, 0))
    stopped.interrupt()
    assert not stopped.spend()
    assert not stopped.is_cut_by_clock
    assert [standing.gap for standing in told] == [1.0]


@pytest.mark.slow
@pytest.mark.parametrize("build", [lambda: gpt(3), lambda: unet(), lambda: dense(8)], ids=["gpt", "unet", "dense"])
def test_certificates_are_checked_from_their_witness(build) -> None:
    """The bound follows from the witness alone; a larger claim, another limit or another witness does not hold."""
    graph, cost = build()
    full, low = evaluate(graph, cost, range(len(graph.ops))).peak, smallest(graph, cost).peak
    for limit in (low, (low + full) // 2):
        found = SOLVERS["keepless"].solve(graph, cost, limit)
        claim = found.certificate
        assert claim.bound_seconds > sum(cost.seconds)
        checked = recheck(graph, cost, limit, claim)
        assert checked.holds
        assert checked.bound_seconds == pytest.approx(claim.bound_seconds, rel=1e-6)
        assert not recheck(graph, cost, limit, replace(claim, bound_seconds=1.01 * claim.bound_seconds)).holds
        assert not recheck(graph, cost, limit, replace(claim, bound_bytes=claim.bound_bytes + 1)).holds
        assert not recheck(graph, cost, limit, replace(claim, witness="moments none; bytes at op 0")).holds
        assert not recheck(graph, cost, 2 * full, claim).holds


@pytest.mark.parametrize("witness", ["moments x:1", "moments 3", "moments 0:1.0", "moments 99999:1", "moments 70:nan"])
def test_a_witness_that_cannot_be_read(witness: str) -> None:
    """A typed error that names the moment."""
    graph, cost = gpt(2, 64, 32, 2)
    claim = SOLVERS["keep_all"].solve(graph, cost, 0).certificate
    with pytest.raises(SolverError, match="witness's moment"):
        recheck(graph, cost, 10**9, replace(claim, witness=witness))


@pytest.mark.parametrize("seed", range(6))
def test_bounds_of_many_moments_hold(seed: int) -> None:
    """No program is faster than the bound of any set of moments: against exhaustive search."""
    graph, cost = tiny(seed, layers=5)
    tables = Tables(graph, cost)
    relaxation = Relaxation(tables)
    full, low = tables.lives(tables.base).peak, smallest(graph, cost).peak
    after = range(tables.loss, tables.num_ops)
    for limit in (low, (2 * low + full) // 3, (low + full) // 2):
        best = least_seconds(graph, cost, limit)
        assert best is not None
        everything = relaxation.bound(limit, after)
        one = max(relaxation.bound(limit, [op]).seconds for op in after)
        for op in after:
            cut = cut_bound(relaxation, limit, op)
            assert cut.seconds <= relaxation.bound(limit, [op]).seconds * (1 + 1e-6) + 1e-12
            assert cut.seconds >= 0.99 * relaxation.bound(limit, [op]).seconds
            assert cut_bound(relaxation, limit, op, cut.prices.get(op, 0.0)).seconds == cut.seconds
        assert max(everything.seconds, one) + float(tables.seconds.sum()) <= best * (1 + 1e-9)
        assert relaxation.bound(limit, after, everything.prices).seconds == pytest.approx(everything.seconds, abs=1e-9)


@pytest.mark.slow
def test_a_search_ends_early_and_says_so() -> None:
    """Work, a clock and Ctrl-C end the search with a plan that fits; only the last two are called TIME_LIMITED."""
    graph, cost = gpt(6)
    limit = int(1.15 * smallest(graph, cost).peak)
    told: list[Standing] = []
    free = SOLVERS["keepless"].solve(graph, cost, limit, search=Search(tell=told.append))
    assert free.certificate.status is Status.FEASIBLE
    assert [s.seconds for s in told] == sorted((s.seconds for s in told), reverse=True)
    assert told[-1].seconds == pytest.approx(free.seconds)
    some = Search(work=40)
    short = SOLVERS["keepless"].solve(graph, cost, limit, search=some)
    assert some.spent <= 40
    assert short.seconds >= free.seconds
    late = SOLVERS["keepless"].solve(graph, cost, limit, search=Search(seconds=0.0))
    assert late.certificate.status in (Status.TIME_LIMITED, Status.NOT_FOUND)

    def stop(standing: Standing) -> None:
        if standing.bound_seconds > sum(cost.seconds):
            raise KeyboardInterrupt

    stopped = SOLVERS["keepless"].solve(graph, cost, limit, search=Search(tell=stop))
    assert stopped.certificate.status is Status.TIME_LIMITED
    assert stopped.peak <= limit


def test_small_graphs_are_checked_by_searching_again() -> None:
    """The certificate of an exhaustive search holds, and a larger claim does not."""
    graph, cost = tiny(2, layers=5)
    full, low = evaluate(graph, cost, range(len(graph.ops))).peak, smallest(graph, cost).peak
    found = SOLVERS["keepless"].solve(graph, cost, (low + full) // 2)
    claim = found.certificate
    assert claim.status is Status.OPTIMAL
    assert claim.witness.startswith("exhaustive: ")
    assert can_recheck(claim)
    assert recheck(graph, cost, (low + full) // 2, claim).holds
    assert not recheck(graph, cost, (low + full) // 2, replace(claim, bound_seconds=1.01 * found.seconds)).holds
    assert not can_recheck(SOLVERS["keep_all"].solve(graph, cost, full).certificate)
