"""Reports of plans: sums are the machine's own, decisions name what the program does, all of it without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Case, cases

from keepless.cost import CostModel
from keepless.ir import (
    Budget,
    Certificate,
    Effect,
    Event,
    Graph,
    Kind,
    Op,
    Phase,
    Program,
    Run,
    Status,
    Timeline,
    Value,
)
from keepless.machine import Baseline, Plan, make_plan, simulate
from keepless.passes import from_order, reuse_storage
from keepless.reporting.account import (
    block_of,
    holdings,
    peak_account,
    phase_instructions,
    phase_spans,
    shared_out,
)
from keepless.reporting.decisions import Choice, decisions, format_seconds
from keepless.reporting.measured_account import measured_account
from keepless.reporting.picture import curve_of, everything_kept, picture_dict
from keepless.reporting.steps import predicted_steps
from keepless.reporting.tables import fits, fold, format_percent, plan_dict, steps_text, verdict

KEEP = tuple(range(12))
AGAIN = (0, 1, 2, 3, 4, 5, 6, 7, 4, 8, 2, 9, 10, 11)


def model() -> Graph:
    """Two blocks of mm and relu with a dropout mask, a loss, and their backward: relu's outputs are read again."""
    values = [
        Value(0, "input.0", 10, Kind.INPUT),
        Value(1, "h.0.w", 20, Kind.PARAM),
        Value(2, "optimizer.state", 40, Kind.BUFFER),
    ]
    names = ["mm0", "mask", "relu0", "mm1", "relu1", "loss", "tangent", "g1", "g0", "grad.h.0.w"]
    sizes = [100, 25, 100, 100, 100, 4, 4, 100, 100, 20]
    kinds = [Kind.ACTIVATION] * 5 + [Kind.OUTPUT] + [Kind.GRAD] * 4
    values += [Value(3 + i, n, s, k) for i, (n, s, k) in enumerate(zip(names, sizes, kinds, strict=True))]
    rng = Value(13, "rng.1", 5, Kind.RNG)
    f, b = Phase.FORWARD, Phase.BACKWARD
    ops = [
        Op(0, "aten.mm.default", (0, 1), (3,), f, module="model.h.0.lin", source="model.py:1"),
        Op(1, "keepless.draw_mask", (), (4, 13), f, frozenset({Effect.RNG}), module="model.h.0.drop"),
        Op(2, "aten.relu.default", (3, 4), (5,), f, module="model.h.0"),
        Op(3, "aten.mm.default", (1, 5), (6,), f, module="model.h.1.lin"),
        Op(4, "aten.relu.default", (6,), (7,), f, module="model.h.1"),
        Op(5, "aten.sum.default", (7,), (8,), f, module=""),
        Op(6, "keepless.loss", (8,), (9,), Phase.LOSS, frozenset({Effect.OPAQUE})),
        Op(7, "aten.mul.Tensor", (6, 9), (10,), b, module="model.h.1"),
        Op(8, "aten.mul.Tensor", (7, 10), (11,), b, module="model.h.1"),
        Op(9, "aten.mm.default", (5, 11), (12,), b, module="model.h.0"),
        Op(10, "keepless.deliver", (12,), (), b, frozenset({Effect.OPAQUE})),
        Op(11, "keepless.optimizer", (1, 2, 12), (), Phase.OPTIMIZER, frozenset({Effect.OPAQUE})),
    ]
    return Graph(tuple(ops), (*values, rng), frozenset({0, 1, 2}), frozenset({0, 1, 2, 12}))


COST = CostModel((0.4, 0.1, 0.01, 0.4, 0.01, 0.02, 0.0, 0.1, 0.1, 0.4, 0.0, 0.2), (0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 3))


def plan_of(graph: Graph, program: Program, cost: CostModel, budget: int | None = None) -> Plan:
    timeline = simulate(graph, program, cost)
    limits = dict(timeline.peaks) | {"device": budget or timeline.peak}
    return make_plan(
        graph, program, cost, Budget(limits), Certificate("test", Status.FEASIBLE), baseline=Baseline(500, 1.74)
    )


@pytest.fixture
def plan() -> Plan:
    graph = model()
    return plan_of(graph, reuse_storage(graph, from_order(graph, AGAIN)), COST)


@given(cases())
@settings(max_examples=80, deadline=None)
def test_categories_sum_to_the_machines_bytes(case: Case) -> None:
    """At every instruction the categories sum to the peak that the machine gives."""
    timeline = simulate(case.graph, case.program, case.cost)
    for held in holdings(case.graph, case.program, timeline):
        assert sum(held.nbytes.values()) == timeline.events[held.index].peak
        assert all(nbytes >= 0 for nbytes in held.nbytes.values())


@given(cases())
@settings(max_examples=60, deadline=None)
def test_reports_are_json_for_any_plan(case: Case) -> None:
    """Whatever the program does, its report is made of JSON values, and the peak's account sums to the peak."""
    plan = plan_of(case.graph, case.program, case.cost)
    found = json.loads(json.dumps(plan_dict(plan, values=True), allow_nan=False))
    assert found["predicted_peak"] == plan.predicted_peak
    account = peak_account(plan)
    if account.index >= 0:
        assert sum(account.categories.values()) == plan.predicted_peak
    assert "\n" not in verdict(plan)
    assert len(str(plan).splitlines()) >= 4


def test_decisions_say_what_the_program_does(plan: Plan) -> None:
    """Values that are made again, kept masks and outputs are told apart, with reasons and the replays' seconds."""
    by_name = {d.name: d for block in decisions(plan) for d in block.decisions}
    assert by_name["relu1"].choice is Choice.RECOMPUTED
    assert by_name["relu1"].times == 1
    assert by_name["relu1"].seconds == pytest.approx(0.01)
    assert by_name["relu0"].choice is Choice.RECOMPUTED
    assert by_name["mm1"].choice is Choice.KEPT
    assert "400.0 ms" in by_name["mm1"].reason
    assert by_name["mask"].choice is Choice.KEPT
    assert "recomputing starts here" in by_name["mask"].reason
    assert by_name["loss"].reason == "an output, which the caller holds"
    assert sum(block.kept_nbytes for block in decisions(plan)) == plan.kept_nbytes
    assert sum(block.recomputed_nbytes for block in decisions(plan)) == plan.recomputed_nbytes
    assert sum(block.replays for block in decisions(plan)) == plan.num_replays == 2


def test_everything_kept_has_nothing_recomputed() -> None:
    """With everything kept no value is made again and no block replays."""
    graph = model()
    kept = decisions(plan_of(graph, from_order(graph, KEEP), COST))
    assert {d.choice for block in kept for d in block.decisions} == {Choice.KEPT}
    assert all(block.replays == 0 and block.reason for block in kept)


def test_ops_that_run_once_are_named() -> None:
    """A value whose op writes a buffer is kept because the op runs once."""
    graph = model()
    ops = list(graph.ops)
    ops[3] = replace(ops[3], effects=frozenset({Effect.BUFFER}))
    graph = replace(graph, ops=tuple(ops))
    found = decisions(plan_of(graph, from_order(graph, KEEP), COST))
    reasons = {d.name: d.reason for block in found for d in block.decisions}
    assert reasons["mm1"] == "its op runs once: it writes a buffer"


def test_account_names_categories_and_blocks(plan: Plan) -> None:
    """Optimizer state and parameters are apart, and blocks are named by the model's modules."""
    account = peak_account(plan)
    assert account.categories["parameters"] == 20
    assert account.categories["optimizer state"] == 40
    assert set(account.blocks) <= {"model.h.0", "model.h.1", ""}
    assert account.static == 70
    assert account.where


@given(cases())
@settings(max_examples=60, deadline=None)
def test_modules_sum_to_the_peak(case: Case) -> None:
    """By block and by category, whatever the program does, at every instruction."""
    plan = plan_of(case.graph, case.program, case.cost)
    for event in plan.predicted.events:
        account = peak_account(plan, event.index)
        sums = dict.fromkeys(account.categories, 0)
        for row in account.modules.values():
            for kind, nbytes in row.items():
                sums[kind] += nbytes
        assert sums == account.categories
        assert account.peak == event.peak


def test_static_bytes_have_modules(plan: Plan) -> None:
    """Parameters and gradients are their module's, state as the signature says, scratch the running op's."""
    account = peak_account(plan, 3)
    assert account.modules["h.0"] == {"parameters": 20}
    assert account.modules["model.h.1"]["scratch"] == 7
    assert account.modules[""]["optimizer state"] == 40
    plan.signature["state_by_block"] = {"h.0": 3, "h.1": 1, "bad": "x"}
    account = peak_account(plan, 3)
    assert account.modules["h.0"] == {"parameters": 20, "optimizer state": 30}
    assert account.modules["h.1"] == {"optimizer state": 10}
    assert json.loads(json.dumps(account.as_dict()))["modules"]["h.0"]["parameters"] == 20


@given(st.integers(0, 10**12), st.dictionaries(st.text(max_size=3), st.integers(1, 10**9), max_size=6))
def test_bytes_are_shared_out_to_the_last(nbytes: int, weights: dict[str, int]) -> None:
    """Whole numbers, within one of the proportion, that sum to the bytes."""
    found = shared_out(nbytes, weights)
    assert sum(found.values()) == nbytes
    for name, weight in weights.items():
        assert abs(found[name] - nbytes * weight / sum(weights.values())) <= 1


def test_a_measured_peak_has_a_residue(plan: Plan) -> None:
    """What was measured beyond the predicted bytes of that instruction; where the optimizer is higher, it is named."""
    events = [replace(event, peak=event.peak + 5) for event in plan.predicted.events[:-1]]
    high = max(range(4), key=lambda i: events[i].peak)
    events[high] = replace(events[high], peak=10_000)
    account = measured_account(plan, Timeline(tuple(events), {}, "measured"))
    assert (account.measured, account.account.index, account.is_measured) == (10_000, high, True)
    assert account.residue == account.worst == 10_000 - plan.predicted.events[high].peak
    assert account.account.peak == plan.predicted.events[high].peak
    low = Timeline((replace(events[0], peak=1),), {}, "measured")
    account = measured_account(plan, low)
    assert (account.account.phase, account.is_measured, account.residue) == ("optimizer", False, 0)
    json.dumps(account.as_dict(), allow_nan=False)
    assert measured_account(plan, Timeline((), {}, "measured")).worst == 0


def test_kinds_of_steps_differ_by_what_stands(plan: Plan) -> None:
    """The first step has no state until the optimizer makes it; one that accumulates has all gradients at its start."""
    steps = predicted_steps(plan)
    assert steps["steady"].peak == plan.predicted_peak
    assert steps["first"].peak == plan.predicted_peak - 40
    assert steps["accumulating"].peak == plan.predicted_peak + 20
    assert [step.is_planned for step in steps.values()] == [True, True, False]
    assert "planned for itself" in steps_text(plan)
    plan.signature["missing_state_nbytes"] = 0
    assert predicted_steps(plan)["first"].peak == plan.predicted_peak
    graph = plan.graph
    huge = CostModel(COST.seconds, (*COST.scratch[:-1], 4000))
    late = plan_of(graph, plan.program, huge)
    late.signature |= {"first_scratch_nbytes": 3900, "steady_scratch_nbytes": 3950}
    steps = predicted_steps(late)
    assert {step.phase for step in steps.values()} == {"optimizer"}
    at = late.predicted.events[-1].peak - 4000
    assert [step.peak for step in steps.values()] == [at + 3900, at + 3950, at + 3950]


def test_a_plan_that_accumulates_has_steps_without_gradients() -> None:
    """A gradient that was handed over stands in a fresh step, and is freed where it was added to another."""
    graph = model()
    old = Value(14, "grad.existing", 20, Kind.GRAD)
    ops = [*graph.ops[:11], replace(graph.ops[11], inputs=(1, 2, 14))]
    static = frozenset({0, 1, 2, 14})
    adding = Graph(tuple(ops), (*graph.values, old), static, static)
    big = CostModel((0.1,) * 12, (0,) * 10 + (0, 900))
    plan = plan_of(adding, from_order(adding, KEEP), big)
    fresh = plan_of(graph, from_order(graph, KEEP), big)
    steps, others = predicted_steps(plan), predicted_steps(fresh)
    assert steps["accumulating"].peak == plan.predicted_peak
    assert [steps[kind].peak for kind in ("first", "steady")] == [others[kind].peak for kind in ("first", "steady")]
    assert others["accumulating"].peak == plan.predicted_peak
    assert all(step.is_planned for step in steps.values())


def test_a_measured_phase_is_set_against_its_highest_instruction(plan: Plan) -> None:
    """Events without an instruction have a phase's name."""
    spans = phase_instructions(plan)
    assert list(spans) == ["forward", "loss", "backward", "optimizer"]
    assert [spans[a][1] + 1 for a in ("forward", "loss", "backward")] == [
        spans[a][0] for a in ("loss", "backward", "optimizer")
    ]
    first, last = spans["backward"]
    highest = max(event.peak for event in plan.predicted.events[first : last + 1])
    account = measured_account(plan, Timeline((Event(-1, 0.0, 1.0, 0.0, 0, highest + 9, "backward"),), {}, "measured"))
    assert (account.residue, account.worst) == (9, 9)
    assert first <= account.account.index <= last


def test_accounts_are_drawn(plan: Plan) -> None:
    """As text and as a table that ends with the residue; blocks beyond a number are one row."""
    rich_console = pytest.importorskip("rich.console")
    from keepless.reporting.account_table import account_rows, account_table

    account = measured_account(plan, Timeline(plan.predicted.events, {}, "measured"))
    console = rich_console.Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(account_table(account))
        console.print(account_table(account.account))
    text = console.export_text()
    assert "residue" in text
    assert "+0 B" in text
    assert "optimizer state" in str(account)
    rows = account_rows(account.account, most=2)
    assert len(rows) == 2
    assert sum(sum(row.values()) for _, row in rows) == account.account.peak


def test_blocks_are_named_up_to_their_number() -> None:
    """A block is named up to the first number in its module's path."""
    assert block_of("transformer.h.3.mlp.act") == "transformer.h.3"
    assert block_of("transformer.drop") == "transformer.drop"
    assert block_of("layer1.0.conv.weight") == "layer1.0"
    assert block_of("") == ""


def test_neighbours_that_decide_alike_are_one_row() -> None:
    """Blocks with the same decisions fold into one row; others do not."""
    graph = model()
    blocks = decisions(plan_of(graph, from_order(graph, KEEP), COST))
    twins = [replace(blocks[0], name="h.0"), replace(blocks[0], name="h.1"), replace(blocks[0], name="h.2"), blocks[1]]
    folded = fold(twins)
    assert [(name, count) for name, _, count in folded] == [("h.0 ... h.2", 3), (blocks[1].name, 1)]


def test_verdict_counts_the_measured_peak(plan: Plan) -> None:
    """A plan whose measured peak is above its budget does not fit, whatever was predicted."""
    assert verdict(plan).startswith("fits: yes | budget ")
    plan.measured_peak = plan.budget.limits["device"] + 1
    assert not fits(plan)
    assert verdict(plan).startswith("fits: NO | ")
    assert "step +50.0 %" in verdict(plan, slowdown=0.5)
    plan.measured_peak = plan.predicted_peak * 3
    assert "(+200.0 %)" in verdict(plan)  # the measured peak over the predicted one
    assert str(plan).startswith("DOES NOT FIT")


def test_phases_cover_the_step(plan: Plan) -> None:
    """Forward, loss, backward and optimizer come in this order and fill the step."""
    spans = phase_spans(plan)
    assert list(spans) == ["forward", "loss", "backward", "optimizer"]
    assert spans["forward"][0] == 0
    assert spans["optimizer"][1] == pytest.approx(plan.predicted_seconds)


def test_curves_reach_the_peak(plan: Plan) -> None:
    """The picture's curves reach the peaks that are written beside them."""
    assert max(curve_of(plan.predicted).levels) == plan.predicted_peak
    kept = everything_kept(plan)
    assert max(curve_of(kept).levels) == kept.peak
    json.dumps(picture_dict(plan), allow_nan=False)
    assert curve_of(plan.predicted).at(0.0) > 0


def test_a_plan_without_time_has_reports(plan: Plan) -> None:
    """Costs of zero seconds, and an empty program, break nothing."""
    graph = model()
    still = plan_of(graph, from_order(graph, KEEP), CostModel((0.0,) * 12, (0,) * 12))
    plan_dict(still)
    picture_dict(still)
    empty = Graph((), (Value(0, "x", 8, Kind.INPUT),), frozenset({0}), frozenset({0}))
    nothing = plan_of(empty, Program(()), CostModel((), ()))
    assert plan_dict(nothing, values=True)["blocks"] == []
    assert peak_account(nothing).index == -1
    picture_dict(nothing)


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_the_picture_is_drawn(plan: Plan, tmp_path: Path, name: str) -> None:
    """The picture is written, in the format that the file's name says, for plans with and without time."""
    pytest.importorskip("matplotlib")
    from keepless.reporting.picture import draw

    graph = model()
    draw(plan, tmp_path / name, note="a note")
    assert (tmp_path / name).stat().st_size > 5000
    draw(plan_of(graph, from_order(graph, KEEP), CostModel((0.0,) * 12, (0,) * 12)), tmp_path / name)


def test_tables_are_drawn(plan: Plan) -> None:
    """Tables hold every block, and a row per value where asked."""
    rich_console = pytest.importorskip("rich.console")
    from keepless.reporting.tables import blocks_table, peak_table

    console = rich_console.Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        for table in (blocks_table(plan), blocks_table(plan, values=True), peak_table(plan)):
            console.print(table)
    text = console.export_text()
    assert "model.h.0" in text
    assert "relu1" in text
    assert "optimizer state" in text


def test_units_are_readable() -> None:
    """Times and ratios as people read them."""
    assert [format_seconds(s) for s in (2.5, 0.0032, 0.000045)] == ["2.50 s", "3.2 ms", "45 us"]
    assert [format_percent(r) for r in (0.042, -0.00001, -0.1)] == ["+4.2 %", "+0.0 %", "-10.0 %"]


def test_reports_import_no_drawing_library_and_no_torch() -> None:
    """Importing the reports imports neither torch nor rich nor matplotlib."""
    code = "import sys, keepless.reporting; print(sorted({'torch', 'rich', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_replays_are_counted_for_where_they_run() -> None:
    """An op of the forward that runs again is a replay of its block."""
    graph = model()
    program = from_order(graph, AGAIN)
    assert sum(1 for instr in program if isinstance(instr, Run) and instr.replay) == 2
