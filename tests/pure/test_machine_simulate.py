"""The predicted timeline: ops one after another, one queue of copies per link, stalls at waits."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from strategies import Case, cases

from keepless.cost import CostModel, Link
from keepless.errors import ProgramError
from keepless.ir import Budget, Graph, Kind, Op, Phase, Run, Timeline, Value
from keepless.ir.text import parse_graph, parse_program
from keepless.machine import Machine, reuse_pairs, simulate
from keepless.passes import evaluate, from_order

GRAPH = parse_graph(
    'value 0 "x" 8 input f\nvalue 1 "y" 16 input f\nvalue 2 "z" 4 activation f\n'
    'op 0 "f" forward in 0 out 2\nop 1 "g" forward in 0\ninputs 0 1\npinned 0 1 2\n'
)
LINKS = {
    ("device", "host"): Link(8.0, 0.5),
    ("host", "device"): Link(16.0),
    ("device", "disk"): Link(1.0),
}
COST = CostModel((3.0, 1.0), (5, 0), LINKS)


def timeline(text: str) -> Timeline:
    return simulate(GRAPH, parse_program(text), COST)


def test_copies_overlap_ops_and_queue_on_their_link() -> None:
    """The second copy begins when the first is done; a wait stalls for what the ops did not cover."""
    text = "copy 0 device host\ncopy 1 device host\nrun 0 keep 2\nwait 0 host\nwait 1 host\ndrop 0 host\ndrop 1 host\n"
    events = timeline(text).events
    # The first arrives at 0.5 + 1; the second at 1.5 + 0.5 + 2 = 4; the op ends at 3.
    assert [(event.start, event.end, event.stall) for event in events] == [
        (0, 0, 0),
        (0, 0, 0),
        (0, 3, 0),
        (3, 3, 0),
        (3, 4, 1),
        (4, 4, 0),
        (4, 4, 0),
    ]
    assert [event.index for event in events] == list(range(7))
    assert [event.resident for event in events] == [24, 24, 28, 28, 28, 28, 28]
    assert [event.peak for event in events] == [24, 24, 33, 28, 28, 28, 28]
    assert timeline(text).peaks == {"device": 33, "host": 24}
    assert timeline(text).peak_index == 2
    assert timeline(text).seconds == 4
    assert timeline(text).origin == "predicted"


def test_links_do_not_wait_for_each_other() -> None:
    """Each direction has its own queue, and a queue that was idle begins at once."""
    text = "copy 0 device host\nwait 0 host\ncopy 1 device disk\ndrop 0\ncopy 0 host device\nwait 0 device\n"
    text += "wait 1 disk\nrun 0 keep 2\ndrop 0 host\ndrop 1 disk\n"
    events = timeline(text).events
    assert [event.end for event in events] == [0, 1.5, 1.5, 1.5, 1.5, 2.0, 17.5, 20.5, 20.5, 20.5]
    assert [event.stall for event in events] == [0, 1.5, 0, 0, 0, 0.5, 15.5, 0, 0, 0]


def test_source_is_held_until_the_last_copy_arrives() -> None:
    """Two copies of one value hold it until both were waited for."""
    both = "run 0 keep 2\ncopy 0 device host\ncopy 0 device disk\n"
    for first, second in (("wait 0 host\n", "wait 0 disk\n"), ("wait 0 disk\n", "wait 0 host\n")):
        with pytest.raises(ProgramError) as caught:
            timeline(both + first + "drop 0\n" + second)
        assert (caught.value.rule, caught.value.index) == ("R4", 4)
        away = both + first + second + "drop 0\ncopy 0 host device\nwait 0 device\n"
        assert timeline(away + "drop 0 host\ndrop 0 disk\n").peaks["disk"] == 8


def test_budget_is_checked_where_given() -> None:
    """The simulator refuses what the verifier refuses."""
    program = parse_program("run 0 keep 2\nrun 1\n")
    assert simulate(GRAPH, program, COST, budget=Budget({"device": 33})).peak == 33
    with pytest.raises(ProgramError, match="R7"):
        simulate(GRAPH, program, COST, budget=Budget({"device": 32}))


def test_program_that_ends_wrong_has_no_timeline() -> None:
    """A program that leaves something in flight is refused at its end."""
    with pytest.raises(ProgramError, match="at the end") as caught:
        timeline("run 0 keep 2\ncopy 2 device host\n")
    assert (caught.value.rule, caught.value.index) == ("R6", 2)


def test_messages_without_a_program_and_in_flight() -> None:
    """An engine's machine knows no program, and still says what is wrong."""
    machine = Machine(GRAPH, cost=COST)
    for instr in parse_program("copy 0 device host\nwait 0 host\ndrop 0\ncopy 0 host device\n"):
        machine.step(instr)
    with pytest.raises(ProgramError, match="which is still in flight to the device") as caught:
        machine.step(Run(0, keep=(2,)))
    assert "\n" not in str(caught.value)
    machine = Machine(GRAPH, cost=COST)
    for instr in parse_program("copy 0 device host\nwait 0 host\ndrop 0\n"):
        machine.step(instr)
    with pytest.raises(ProgramError, match="which is only on host"):
        machine.step(Run(0, keep=(2,)))


def test_pairs_that_may_share_storage() -> None:
    """The first pair of each output and input counts, sizes are equal, the caller's values are left alone."""
    kinds = (Kind.ACTIVATION, Kind.PARAM, Kind.GRAD, Kind.ACTIVATION)
    values = [Value(i, f"v{i}", 4 if i != 3 else 5, kind) for i, kind in enumerate(kinds)]
    values += [Value(i, f"v{i}", 4, Kind.ACTIVATION) for i in (4, 5)]
    pairs = ((4, 3), (4, 1), (4, 2), (4, 0), (5, 0), (5, 2))
    op = Op(0, "f", (0, 1, 2, 3), (4, 5), Phase.FORWARD, reuses=pairs)
    graph = Graph((op,), tuple(values), frozenset({1}), frozenset({1}))
    assert reuse_pairs(graph, op) == ((4, 2), (5, 0))
    graph = Graph((op,), tuple(values), frozenset({1, 2}), frozenset({1}))
    assert reuse_pairs(graph, op) == ((4, 0),)


@given(cases(24))
@settings(max_examples=150, deadline=None)
def test_timeline_adds_up(case: Case) -> None:
    """Events touch, the step is its ops and its stalls, and peaks are the highest of their events."""
    events = simulate(case.graph, case.program, case.cost).events
    assert all(a.end == b.start for a, b in pairwise(events))
    ops = sum(case.cost.seconds[instr.op] for instr in case.program if isinstance(instr, Run))
    assert events[-1].end == pytest.approx(ops + sum(event.stall for event in events))
    assert all(event.peak >= event.resident for event in events)
    pinned = sum(case.graph.values[value].nbytes for value in case.graph.pinned)
    assert events[-1].resident == pinned


def test_a_program_of_ten_thousand_ops() -> None:
    """A chain of 5,000 steps and their backward, half of the states made again: every event, exact seconds and peak."""
    half, state = 5_000, 8
    values = [
        Value(0, "x", state, Kind.INPUT),
        *(Value(k + 1, f"v{k}", state, Kind.ACTIVATION) for k in range(2 * half)),
    ]
    ops = [Op(k, "step", (k,), (k + 1,), Phase.FORWARD) for k in range(half)]
    ops += [Op(half + k, "back", (half - k - 1, half + k), (half + k + 1,), Phase.FORWARD) for k in range(half)]
    graph = Graph(tuple(ops), tuple(values), frozenset({0}), frozenset({0, 2 * half}))
    cost = CostModel(tuple(1.0 + op.id % 2 for op in ops), (0,) * len(ops))
    order = list(range(half))
    for op in range(half, 2 * half):
        read = 2 * half - op - 1  # the state that the step began with: what step `read - 1` made
        order += [read - 1, op] if read % 2 else [op]
    found = simulate(graph, from_order(graph, order), cost)
    runs = [event for event in found.events if event.end > event.start]
    assert len(runs) == len(order) == 2 * half + half // 2
    assert found.seconds == sum(cost.seconds[op] for op in order)
    assert found.peak == evaluate(graph, cost, order, reuse=False).peak
    assert found.peak < (half // 2 + 8) * state
    whole = simulate(graph, from_order(graph, range(2 * half)), cost)
    assert len([event for event in whole.events if event.end > event.start]) == 2 * half
    assert whole.peak > half * state
