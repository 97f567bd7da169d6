"""Costs and plans carried over to another graph: always legal, within the limit or told, and near a plan of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import SEEDS, random_cost, random_graph, random_order
from test_solve_models import chain, gpt

import keepless
from keepless.cost import CostModel, KnownCosts, format_graph, scaled_scratch, transferred_seconds
from keepless.ir import Budget, Effect, Graph, Run, Status
from keepless.ir.matching import matched_ops
from keepless.machine import verify
from keepless.passes import evaluate
from keepless.solve import smallest, solve
from keepless.solve.tables import Tables
from keepless.solve.transfer import Known, carried, transfer


def resized(graph: Graph, seed: int) -> Graph:
    """The same ops at other sizes, some without their place."""
    rng = random.Random(seed)
    values = tuple(replace(value, nbytes=value.nbytes * rng.choice((1, 2, 3))) for value in graph.values)
    ops = tuple(replace(op, module=op.module if rng.random() < 0.9 else "elsewhere", reuses=()) for op in graph.ops)
    return Graph(ops, values, graph.inputs, graph.pinned)


def checked(graph: Graph, cost: CostModel, limit: int, known: list[Known]) -> None:
    """What is promised of every transfer."""
    found = transfer(graph, cost, limit, known)
    assert found.peak == evaluate(graph, cost, found.order).peak
    verify(graph, found.program, cost=cost)
    if found.certificate.status is Status.NOT_FOUND:
        assert found.peak > limit
    else:
        verify(graph, found.program, cost=cost, budget=Budget({"device": max(limit, 1)}))
    if found.certificate.status is Status.OPTIMAL:
        assert len(found.order) == len(graph.ops)
    assert [op for i, op in enumerate(found.order) if op not in found.order[:i]] == list(range(len(graph.ops)))


@given(SEEDS, st.integers(2, 30), st.booleans(), st.floats(0, 1.2))
@settings(max_examples=300, deadline=None)
def test_transfers_are_legal_and_within_the_limit_or_told(seed: int, num_ops: int, is_like: bool, share: float) -> None:
    """Whatever the known plan is of, also of a quite different graph."""
    rng = random.Random(seed)
    other = random_graph(seed, num_ops)
    graph = resized(other, seed) if is_like else random_graph(seed + 1, rng.randint(2, 30))
    assume(all(len(makers) <= 1 for makers in graph.producers))  # captured graphs are so
    cost = random_cost(graph, rng)
    order = random_order(other, rng)
    checked(graph, cost, int(share * evaluate(graph, cost, range(len(graph.ops))).peak), [Known(other, order)])


SIZES = [(128, 4), (96, 4), (64, 4), (160, 4), (128, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("length", "batch"), SIZES)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_known_plan_serves_other_sizes(length: int, batch: int, share: float) -> None:
    """Within the same budget the carried-over plan is at most 5 % of the step slower than one of its own."""
    known, known_cost = gpt(4, batch=4, seq=128)
    low, kept = smallest(known, known_cost).peak, evaluate(known, known_cost, range(len(known.ops))).peak
    limit = int(low + share * (kept - low))
    plans = [solve(known, known_cost, Budget({"device": limit})), smallest(known, known_cost)]
    graph, cost = gpt(4, batch=batch, seq=length)
    found = transfer(graph, cost, limit, [Known(known, plan.order) for plan in plans])
    own = solve(graph, cost, Budget({"device": limit}))
    assert found.peak <= limit
    assert found.seconds <= own.seconds + 0.05 * sum(cost.seconds)


def test_replays_are_carried_over_in_their_places() -> None:
    """Of the same graph the order is the same, also with a value that is made a third time."""
    graph, cost = chain(12)
    low = smallest(graph, cost)
    assert carried(Tables(graph, cost), Known(graph, low.order))[0] == list(low.order)
    found = transfer(graph, cost, low.peak, [Known(graph, low.order)])
    assert (found.peak, found.seconds) == (low.peak, pytest.approx(low.seconds))


def test_what_fits_with_everything_kept_is_kept() -> None:
    graph, cost = gpt(2, batch=2, seq=32)
    low = smallest(graph, cost)
    found = transfer(graph, cost, 1 << 50, [Known(graph, low.order)])
    assert found.order == tuple(range(len(graph.ops)))
    assert found.certificate.status is Status.OPTIMAL


def test_without_known_plans_it_is_evicted_from_the_start() -> None:
    graph, cost = gpt(2, batch=4, seq=128)
    kept = evaluate(graph, cost, range(len(graph.ops))).peak
    found = transfer(graph, cost, int(0.8 * kept), [])
    assert found.peak <= 0.8 * kept
    impossible = transfer(graph, cost, 1, [])
    assert impossible.certificate.status is Status.NOT_FOUND
    assert impossible.peak > 1


def test_ops_are_matched_by_place_and_number() -> None:
    """Ops are told apart by module and number; where a loop is longer its numbers are matched by their share."""
    graph, _ = gpt(2, batch=2, seq=32)
    assert matched_ops(graph, graph) == list(range(len(graph.ops)))
    longer, _ = chain(20)
    shorter, _ = chain(10)
    like = matched_ops(longer, shorter)
    assert max(like) < len(shorter.ops)
    forward = [like[op.id] for op in longer.ops if op.id < (longer.loss_op or 0)]
    assert forward == sorted(forward)
    odd = replace(graph, ops=tuple(replace(op, name="odd") for op in graph.ops))
    assert set(matched_ops(odd, graph)) == {-1}


def test_seconds_follow_the_bytes_that_change() -> None:
    """At half the length a plan's seconds are near those of the machine that wrote the costs; equal keys are exact."""
    known, known_cost = gpt(4, batch=4, seq=128)
    graph, cost = gpt(4, batch=4, seq=64)
    known, graph = keyed(known), keyed(graph)
    found = transferred_seconds(graph, [KnownCosts(known, known_cost)])
    seconds = [found[op.key] for op in graph.ops]
    assert sum(seconds) == pytest.approx(sum(cost.seconds), rel=0.2)
    assert transferred_seconds(known, [KnownCosts(known, known_cost)]) == {
        op.key: known_cost.seconds[op.id] for op in known.ops
    }
    assert transferred_seconds(graph, [], {graph.ops[0].key: 7.0})[graph.ops[0].key] == 7.0
    assert all(value > 0 for value in transferred_seconds(graph, []).values())


def test_scratch_of_a_loss_grows_with_its_inputs_and_never_shrinks() -> None:
    small, _ = gpt(2, batch=2, seq=32)
    large, cost = gpt(2, batch=4, seq=32)
    loss = large.loss_op or 0
    cost = replace(cost, scratch=tuple(1000 if op == loss else 0 for op in range(len(large.ops))))
    assert scaled_scratch(small, small.loss_op or 0, KnownCosts(large, cost), loss) == 1000
    cost = replace(cost, scratch=tuple(1000 if op == small.loss_op else 0 for op in range(len(small.ops))))
    now = sum(large.values[v].nbytes for v in large.ops[loss].inputs)
    then = sum(small.values[v].nbytes for v in small.ops[small.loss_op or 0].inputs)
    assert scaled_scratch(large, loss, KnownCosts(small, cost), small.loss_op or 0) == -(-1000 * now // then)


def keyed(graph: Graph) -> Graph:
    """The graph with a key per op: operator and bytes, as capture writes them."""

    def key(op_id: int) -> str:
        op = graph.ops[op_id]
        return f"{op.name}|{[graph.values[v].nbytes for v in (*op.inputs, *op.outputs)]}|{op_id}"

    return replace(graph, ops=tuple(replace(op, key=key(op.id)) for op in graph.ops))


@pytest.mark.slow
def test_a_process_of_its_own_plans_the_same() -> None:
    """`python -m keepless.solve` reads a task and answers with the order that the planner finds here."""
    graph, cost = gpt(2, batch=4, seq=64)
    low, kept = smallest(graph, cost).peak, evaluate(graph, cost, range(len(graph.ops))).peak
    limit = (low + kept) // 2
    task = json.dumps({"limit": limit, "seed": 0}) + "\n" + format_graph(graph, cost)
    source = str(Path(keepless.__file__).resolve().parents[1])
    answer = subprocess.run(
        [sys.executable, "-m", "keepless.solve"],
        input=task.encode(),
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": source},
        check=True,
        timeout=120,
    )
    order = tuple(map(int, answer.stdout.split()))
    assert order == solve(graph, cost, Budget({"device": limit})).order
    assert evaluate(graph, cost, order).peak <= limit


def test_a_transfer_does_not_run_what_may_run_once() -> None:
    """Known plans come from elsewhere: a replay of an op that has become opaque here is left out."""
    graph, cost = chain(8)
    low = smallest(graph, cost)
    again = {op for op in low.order if low.order.count(op) > 1}
    assert again
    opaque = replace(
        graph,
        ops=tuple(replace(op, effects=op.effects | {Effect.OPAQUE}) if op.id in again else op for op in graph.ops),
    )
    found = transfer(opaque, cost, low.peak, [Known(graph, low.order)])
    runs = [instr.op for instr in found.program if isinstance(instr, Run)]
    assert all(runs.count(op) == 1 for op in again)
