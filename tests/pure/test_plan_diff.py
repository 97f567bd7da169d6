"""Differences of plans: nothing between a plan and itself, each changed decision once, and nothing needs torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from reports import EXAMPLES, example, plan_of
from strategies import Case, cases

from keepless.ir import Budget, Graph
from keepless.machine import Plan, make_plan
from keepless.passes import from_order, reuse_storage
from keepless.reporting.decisions import decisions
from keepless.reporting.plan_diff import ABSENT, blocks_changed, changes_table, facts_table, plan_diff, verdict


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


def test_tables_are_drawn() -> None:
    """Both tables hold what differs, by block and by value."""
    console = pytest.importorskip("rich.console").Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    found = plan_diff(everything_kept(), example())
    with console.file:
        for table in (facts_table(found, "a.plan", "b.plan"), changes_table(found), changes_table(found, values=True)):
            console.print(table)
    text = console.export_text()
    for words in ("a.plan", "points", "recomputed", "layers.0", found.rows[0].op):
        assert words in text


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    """`keepless diff` ends with 0 whatever differs, with 1 where that is asked for, and with 2 for what is no plan."""
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    everything_kept().save(tmp_path / "kept.plan")
    code = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "matplotlib"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from typer.testing import CliRunner
from keepless.cli.app import app
a, b, none = sys.argv[1:]
def run(*words):
    done = CliRunner().invoke(app, ["diff", *words])
    return done.exit_code, done.stdout
assert run(a, a, "--exit-code")[0] == 0
code, text = run(a, b)
assert code == 0 and "alike: NO" in text, text
assert run(a, b, "--exit-code")[0] == 1
code, text = run(a, b, "--json", "--exit-code")
assert code == 1 and json.loads(text)["alike"] is False and json.loads(text)["rows"]
assert run(a, none)[0] == 2 and run(a, sys.executable)[0] == 2
"""
    paths = [str(EXAMPLES / "unfused.plan"), str(tmp_path / "kept.plan"), str(tmp_path / "none.plan")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
