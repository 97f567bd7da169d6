"""From a measured timeline to corrected costs and a new plan."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solve_models import gpt

from keepless.cost import CostModel, Origin, corrected, corrected_scratch, op_ratios
from keepless.cost.correct import MOST_OFF
from keepless.errors import InfeasibleBudget
from keepless.ir import Budget, Event, Graph, Phase, Program, Run, Status, Timeline
from keepless.machine import simulate
from keepless.passes import evaluate
from keepless.solve import Solution, recheck, replan, solve


@functools.cache
def planned(share: float = 0.5) -> tuple[Graph, CostModel, Budget, Solution]:
    """A small GPT-2, and a plan for a share of its peak."""
    graph, cost = gpt(2, 64, 64, 2, 2)
    budget = Budget({"device": int(share * evaluate(graph, cost, range(len(graph.ops))).peak)})
    return graph, cost, budget, solve(graph, cost, budget)


def as_measured(graph: Graph, program: Program, truth: CostModel) -> Timeline:
    """What a machine with these costs would show."""
    return replace(simulate(graph, program, truth), origin="measured")


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.2, 5), st.floats(0, 1))
def test_a_whole_timeline_gives_the_true_costs_back(seed: int, factor: float, missing: float) -> None:
    """Where every op has an event the costs are the machine's; ops without one keep theirs, however many there are."""
    graph, cost, _, found = planned()
    truth = CostModel(
        tuple(s * factor * (1 + (seed >> (i % 32) & 1)) for i, s in enumerate(cost.seconds)), cost.scratch
    )
    whole = as_measured(graph, found.program, truth)
    assert corrected(graph, cost, found.program, whole).seconds == pytest.approx(truth.seconds)
    kept = [event for event in whole.events if (event.index * 7919 + seed) % 1000 / 1000 >= missing]
    known = {instr.op for event in kept if isinstance(instr := found.program[event.index], Run)}
    part = corrected(graph, cost, found.program, replace(whole, events=tuple(kept)))
    for op, (before, after, true) in enumerate(zip(cost.seconds, part.seconds, truth.seconds, strict=True)):
        assert after == pytest.approx(true if op in known else before)
    assert part.scratch == cost.scratch
    assert part.origin is Origin.MEASURED or not known


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_measured_bytes_give_the_true_scratch_back(seed: int) -> None:
    """Of every op that ran, whatever it was thought to be; ops without an event, and the optimizer, keep theirs."""
    graph, cost, _, found = planned()
    more = [(seed * (op + 1)) % 10_007 for op in range(len(graph.ops))]
    truth = replace(cost, scratch=tuple(n + m for n, m in zip(cost.scratch, more, strict=True)))
    wrong = replace(cost, scratch=tuple(n + m for n, m in zip(cost.scratch, reversed(more), strict=True)))
    predicted = simulate(graph, found.program, wrong)
    measured = as_measured(graph, found.program, truth)
    after = corrected_scratch(graph, wrong, found.program, predicted, measured)
    for op in graph.ops:
        expected = wrong if op.phase is Phase.OPTIMIZER else truth
        assert after.scratch[op.id] == expected.scratch[op.id]
    assert after.seconds == cost.seconds
    if graph.ops[-1].phase is not Phase.OPTIMIZER:
        assert simulate(graph, found.program, after).peak == measured.peak
    nothing = replace(measured, events=(Event(10**9, 0.0, 1.0, 0.0, 0, 9),))
    assert corrected_scratch(graph, wrong, found.program, predicted, nothing) == wrong


def test_scratch_is_never_less_than_nothing_and_the_highest_run_decides() -> None:
    """An op that runs twice needs what its higher run needed."""
    graph, cost, _, found = planned()
    replayed = next(instr.op for instr in found.program if isinstance(instr, Run) and instr.replay)
    runs = [i for i, instr in enumerate(found.program) if isinstance(instr, Run) and instr.op == replayed]
    predicted = simulate(graph, found.program, cost)
    for offs in ((500, 90), (90, 500), (-(10**9), -(10**9))):
        events = tuple(
            replace(predicted.events[index], peak=predicted.events[index].peak + off)
            for index, off in zip(runs, offs, strict=False)
        )
        after = corrected_scratch(graph, cost, found.program, predicted, Timeline(events, {}, "measured"))
        assert after.scratch[replayed] == max(0, cost.scratch[replayed] + max(offs))


def test_ops_with_equal_keys_share_their_events() -> None:
    """The median of all their runs; an op that did not run by itself takes it, too."""
    graph, cost, _, found = planned()
    graph = replace(graph, ops=tuple(replace(op, key=op.name) for op in graph.ops))
    events = tuple(
        Event(index, float(index), index + 2 * cost.seconds[instr.op], 0.0, 0, 0)
        for index, instr in enumerate(found.program)
        if isinstance(instr, Run) and instr.op % 2
    )
    ratios = op_ratios(graph, cost, found.program, Timeline(events, {}, "measured"))
    assert set(ratios) == {instr.op for instr in found.program if isinstance(instr, Run) and instr.op % 2}
    seen = {graph.ops[op].name for op in ratios}
    after = corrected(graph, cost, found.program, Timeline(events, {}, "measured"))
    for op in graph.ops:
        factor = 2 if op.name in seen else 1
        assert after.seconds[op.id] == pytest.approx(factor * cost.seconds[op.id])


def test_nonsense_is_left_out_or_bounded() -> None:
    """Unknown instructions, times that are no numbers or run backwards have no say; one slow event is bounded."""
    graph, cost, _, found = planned()
    whole = as_measured(graph, found.program, cost)
    odd = [
        Event(-1, 0.0, 9.0, 0.0, 0, 0),
        Event(10**9, 0.0, 9.0, 0.0, 0, 0),
        Event(3, 0.0, math.nan, 0.0, 0, 0),
        Event(4, 0.0, math.inf, 0.0, 0, 0),
        Event(5, 9.0, 1.0, 0.0, 0, 0),
    ]
    assert corrected(graph, cost, found.program, Timeline(tuple(odd), {}, "measured")) == cost
    assert corrected(graph, cost, found.program, Timeline((), {}, "measured")) == cost
    with_odd = replace(whole, events=(*whole.events, *odd))
    assert corrected(graph, cost, found.program, with_odd).seconds == pytest.approx(cost.seconds)
    first = next(e for e in whole.events if isinstance(found.program[e.index], Run) and e.end > e.start)
    slow = replace(first, end=first.start + 1000 * (first.end - first.start))
    events = tuple(slow if e is first else e for e in whole.events)
    after = corrected(graph, cost, found.program, replace(whole, events=events))
    instr = found.program[first.index]
    assert isinstance(instr, Run)
    assert after.seconds[instr.op] == pytest.approx(MOST_OFF * cost.seconds[instr.op])


def test_waiting_for_copies_is_no_op_time() -> None:
    """A stall within an event is not the op's."""
    graph, cost, _, found = planned()
    whole = as_measured(graph, found.program, cost)
    stalled = replace(whole, events=tuple(replace(e, end=e.end + 1.0, stall=1.0) for e in whole.events))
    assert corrected(graph, cost, found.program, stalled).seconds == pytest.approx(cost.seconds, rel=1e-6)


@pytest.mark.slow
def test_replanning_is_better_on_the_true_machine() -> None:
    """Pointwise ops are ten times as slow as thought: the new plan is faster there, within budget, and certified."""
    graph, cost, budget, found = planned()
    slow = ("pow", "mul", "tanh", "softmax", "div", "layer_norm")
    truth = CostModel(
        tuple(s * (10 if op.name in slow else 1) for op, s in zip(graph.ops, cost.seconds, strict=True)), cost.scratch
    )
    before = simulate(graph, found.program, truth, budget=budget).seconds
    better, again = replan(graph, cost, found.program, as_measured(graph, found.program, truth), budget)
    assert better.seconds == pytest.approx(truth.seconds)
    after = simulate(graph, again.program, truth, budget=budget)
    assert after.seconds == pytest.approx(again.seconds)
    assert after.seconds < 0.99 * before
    assert recheck(graph, better, budget.device, again.certificate).holds


def test_what_ran_stays_where_nothing_is_faster() -> None:
    """A weak solver's answer does not replace a better program; a budget below the floor is refused as ever."""
    graph, cost, budget, found = planned()
    measured = as_measured(graph, found.program, cost)
    _, again = replan(graph, cost, found.program, measured, budget, solver="recompute_all")
    assert again.program == found.program
    assert again.certificate.status is Status.FEASIBLE
    _, again = replan(graph, cost, found.program, measured, budget, solver="dtr")
    assert again.program == found.program
    assert again.seconds == pytest.approx(found.seconds)
    with pytest.raises(InfeasibleBudget):
        replan(graph, cost, found.program, measured, Budget({"device": 1000}))
