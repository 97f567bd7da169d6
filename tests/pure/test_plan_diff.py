"""Differences of plans: nothing between a plan and itself, each changed decision once, and nothing needs torch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from reports import example, plan_of
from strategies import Case, cases

from keepless.ir import Budget, Graph
from keepless.machine import Plan, make_plan
from keepless.passes import from_order, reuse_storage
from keepless.reporting.decisions import decisions
from keepless.reporting.plan_diff import ABSENT, blocks_changed, plan_diff, verdict


def everything_kept() -> Plan:
    """The example's step without a replay."""
    plan = example()
    graph = plan.graph
    program = reuse_storage(graph, from_order(graph, range(len(graph.ops))))
    claim, baseline = plan.certificate, plan.baseline
    limit = Budget({"device": plan.baseline_peak})
    return make_plan(graph, program, plan.cost, limit, claim, baseline=baseline, signature=plan.signature)


@given(cases())
@settings(max_examples=30)
def test_a_plan_is_like_itself(case: Case) -> None:
    """Whatever a plan does, nothing differs from itself."""
    plan = plan_of(case.graph, case.program, case.cost)
    found = plan_diff(plan, plan)
    assert found.is_alike
    json.dumps(found.as_dict(), allow_nan=False)
    assert verdict(found).startswith("alike: yes")


def test_each_decision_that_differs_is_a_row() -> None:
    """Against everything kept, the rows are the values that the plan makes again, and turned round the same."""
    plan, kept = example(), everything_kept()
    found = plan_diff(kept, plan)
    again = [one for block in decisions(plan) for one in block.decisions if one.choice.value == "recomputed"]
    rows = [row for row in found.rows if row.after == "recomputed"]
    assert sorted((row.module, row.op, row.name, row.times_after) for row in rows) == sorted(
        (one.module, one.op, one.name, one.times) for one in again
    )
    assert sum(row.seconds_after - row.seconds_before for row in found.rows) == pytest.approx(
        sum(one.seconds for one in again)
    )
    back = plan_diff(plan, kept)
    assert {(r.name, r.before, r.after) for r in back.rows} == {(r.name, r.after, r.before) for r in found.rows}
    assert sum(number for *_, number, _, _ in blocks_changed(found)) == len(found.rows)
    facts = {fact.name: fact for fact in found.facts}
    assert facts["step"].is_alike
    assert (facts["replays"].before, facts["replays"].after) == (0, plan.num_replays)
    assert facts["predicted peak"].after == plan.predicted_peak
    assert verdict(found).startswith(f"alike: NO | {len(found.rows)} decisions differ | budget ")


def test_steps_that_differ_are_matched_by_module_and_op() -> None:
    """A value of another size, and one that the other step has not, are differences; order and ids are not."""
    plan = example()
    graph = plan.graph
    number = next(one.value for block in decisions(plan) for one in block.decisions if one.choice.value == "kept")
    values = tuple(replace(v, nbytes=v.nbytes + 4096) if v.id == number else v for v in graph.values)
    larger = plan_of(Graph(graph.ops, values, graph.inputs, graph.pinned), plan.program, plan.cost)
    found = plan_diff(plan, larger)
    assert [row.nbytes for row in found.rows] == [values[number].nbytes]
    assert not {fact.name: fact for fact in found.facts}["step"].is_alike
    maker = graph.producers[number][0]
    ops = tuple(replace(op, module="elsewhere") if op.id == maker else op for op in graph.ops)
    moved = plan_of(Graph(ops, graph.values, graph.inputs, graph.pinned), plan.program, plan.cost)
    changes = {(row.module, row.before, row.after) for row in plan_diff(plan, moved).rows}
    assert ("elsewhere", ABSENT, "kept") in changes
    assert (graph.ops[maker].module, "kept", ABSENT) in changes
