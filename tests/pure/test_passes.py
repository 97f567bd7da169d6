"""Passes: orders become programs of least memory, and programs better programs with the same results."""

from __future__ import annotations

import gc
import math
import random
import weakref
from itertools import product

import pytest
from hypothesis import given, settings
from strategies import SEEDS, Case, cases, interpret, random_cost, random_graph, random_order, with_copies

from keepless.cost import CostModel
from keepless.errors import ProgramError
from keepless.ir import Copy, Drop, Graph, Program, Run
from keepless.ir.text import format_program, parse_graph, parse_program
from keepless.machine import simulate, verify
from keepless.passes import evaluate, from_order, insert_drops, reuse_storage

GRAPH = parse_graph(
    """
value 0 "x" 4 input float32
value 1 "a" 8 activation float32
value 2 "b" 8 activation float32
value 3 "state" 2 rng uint8
value 4 "c" 8 activation float32
value 5 "unused" 1 activation float32
value 6 "idle" 16 input float32
op 0 "f" forward in 0 out 1
op 1 "draw" forward in 1 out 2 5 3 effects rng reuse 2 1
op 2 "g" forward in 2 out 4 reuse 4 2
op 3 "h" backward in 1 2 4 out
inputs 0 6
pinned 4
""".replace(" out\n", "\n")
)


def test_order_becomes_program() -> None:
    """Instances die at last uses, states live to the last replay, idle inputs go at once."""
    text = format_program(from_order(GRAPH, [0, 1, 2, 0, 1, 3]))
    assert text.splitlines() == [
        "drop 6",
        "run 0 keep 1",
        "run 1 keep 2 3",
        "drop 1",
        "run 2 keep 4",
        "drop 2",
        "run 0 replay 1 keep 1",
        "drop 0",
        "run 1 replay 1 keep 2",
        "drop 3",
        "run 3",
        "drop 1",
        "drop 2",
    ]


HELD = parse_graph(
    """
value 0 "x" 4 input float32
value 1 "logits" 100 output float32
value 2 "statistics" 8 activation float32
value 3 "tangent" 4 grad float32
value 4 "gradient" 4 grad float32
op 0 "head" forward in 0 out 1 2
op 1 "loss" loss in 1 out 3
op 2 "head_backward" backward in 0 2 3 out 4
inputs 0
pinned 0 1 4
"""
)


def test_an_output_that_the_caller_holds_is_made_once() -> None:
    """An op runs again for its other result: the output stays from its first run on, and that run of it is scratch."""
    program = from_order(HELD, [0, 1, 0, 2])
    assert format_program(program).splitlines() == [
        "run 0 keep 1",
        "run 1 keep 3",
        "run 0 replay 1 keep 2",
        "run 2 keep 4",
        "drop 2",
        "drop 3",
    ]
    cost = CostModel((1.0,) * 3, (0,) * 3)
    found = evaluate(HELD, cost, [0, 1, 0, 2])
    assert found.peak == simulate(HELD, program, cost).peak == 4 + 100 + 4 + 108
    twice = parse_program("run 0 keep 1\nrun 1 keep 3\ndrop 1\nrun 0 replay 1 keep 1 2\nrun 2 keep 4\ndrop 2\ndrop 3")
    with pytest.raises(ProgramError, match="the caller holds it") as caught:
        verify(HELD, twice)
    assert caught.value.rule == "R6"


@given(SEEDS)
@settings(max_examples=150, deadline=None)
def test_pinned_values_are_made_once(seed: int) -> None:
    """In any order, and its evaluation counts what its program holds."""
    rng = random.Random(seed)
    graph = random_graph(seed, 14)
    order, cost = random_order(graph, rng), random_cost(graph, rng)
    program, held = reuse_storage(graph, from_order(graph, order)), graph.pinned - graph.inputs
    kept = [value for instr in program if isinstance(instr, Run) for value in instr.keep if value in held]
    assert len(kept) == len(set(kept))
    assert evaluate(graph, cost, order).peak == simulate(graph, program, cost).peak


def test_state_of_op_without_replay_is_not_kept() -> None:
    """An RNG op that runs once records nothing."""
    program = from_order(GRAPH, [0, 1, 2])
    assert Run(1, keep=(2,)) in program.instrs


def test_reuse_takes_dying_inputs() -> None:
    """A run takes over its input's storage where the input dies there, and the drop goes."""
    program = reuse_storage(GRAPH, from_order(GRAPH, [0, 1, 2]))
    assert format_program(program).splitlines() == [
        "drop 6",
        "run 0 keep 1",
        "drop 0",
        "run 1 keep 2 reuse",
        "run 2 keep 4 reuse",
    ]
    kept = reuse_storage(GRAPH, from_order(GRAPH, [0, 1, 2, 3]))
    assert not any(isinstance(instr, Run) and instr.reuse for instr in kept)


@pytest.mark.parametrize(
    ("order", "rule", "index"),
    [([1], "R1", 0), ([0, 2], "R1", 1), ([0, 1, 3], "R1", 2), ([0, 7], "R1", 1), ([0], "R6", 1), ([-1], "R1", 0)],
)
def test_illegal_order_is_refused(order: list[int], rule: str, index: int) -> None:
    """An order that reads what nothing made, or leaves out what must be there, names the place."""
    with pytest.raises(ProgramError) as caught:
        from_order(GRAPH, order)
    assert (caught.value.rule, caught.value.index) == (rule, index)


@given(cases(24))
@settings(max_examples=300, deadline=None)
def test_random_orders_give_right_programs(case: Case) -> None:
    """The program runs the order, keeps the rules, and gives the caller the right values."""
    program = from_order(case.graph, case.order)
    assert tuple(instr.op for instr in program if isinstance(instr, Run)) == case.order
    verify(case.graph, program, cost=case.cost)
    results = interpret(case.graph, program)
    assert results == {value: ("right", value) for value in sorted(case.graph.pinned)}


@given(cases(24))
@settings(max_examples=300, deadline=None)
def test_reuse_keeps_results_and_memory(case: Case) -> None:
    """Reuse changes no result, runs the same ops, and raises no peak."""
    plain = from_order(case.graph, case.order)
    reused = reuse_storage(case.graph, plain)
    verify(case.graph, reused, cost=case.cost)
    assert interpret(case.graph, reused) == interpret(case.graph, plain)
    before, after = (simulate(case.graph, program, case.cost) for program in (plain, reused))
    assert after.peak <= before.peak
    assert after.seconds == before.seconds
    assert reuse_storage(case.graph, reused) == reused


@given(cases(24))
@settings(max_examples=300, deadline=None)
def test_evaluate_equals_simulate(case: Case) -> None:
    """The fast numbers are those of the slow path: seconds, peak, and the peak at each position."""
    plain = from_order(case.graph, case.order)
    for reuse, program in ((False, plain), (True, reuse_storage(case.graph, plain))):
        timeline = simulate(case.graph, program, case.cost)
        fast = evaluate(case.graph, case.cost, case.order, reuse=reuse, profile=True)
        assert math.isclose(fast.seconds, timeline.seconds, rel_tol=1e-12, abs_tol=1e-12)
        assert fast.peak == timeline.peak
        peaks = [event.peak for event, instr in zip(timeline.events, program, strict=True) if isinstance(instr, Run)]
        peaks[0] = max(peaks[0], timeline.events[0].peak)
        assert fast.profile is not None
        assert fast.profile.tolist() == peaks
        assert fast.peak_position == peaks.index(max(peaks))
        assert evaluate(case.graph, case.cost, list(case.order), reuse=reuse) == fast


@given(cases(24), SEEDS)
@settings(max_examples=200, deadline=None)
def test_evaluate_refuses_what_from_order_refuses(case: Case, seed: int) -> None:
    """Orders cut or shuffled at random are refused by both or by neither, with the same words."""
    rng = random.Random(seed)
    order = list(case.order)
    rng.shuffle(order) if rng.random() < 0.5 else order.pop(rng.randrange(len(order)))
    messages = []
    for call in (lambda: from_order(case.graph, order), lambda: evaluate(case.graph, case.cost, order)):
        try:
            call()
        except ProgramError as error:
            messages.append(str(error))
        else:
            messages.append("")
    assert messages[0] == messages[1]


def _least_peak(graph: Graph, case: Case, order: tuple[int, ...]) -> int:
    """The least peak over all keep sets and all places of drops, by trying keep sets (drops follow from them).

    Pinned values are made once, where they are first made: their owners hold them from then on.
    """
    plain = from_order(graph, order)
    runs = [instr for instr in plain if isinstance(instr, Run)]
    held = graph.pinned - graph.inputs
    choices = []
    for run in runs:
        outputs = graph.ops[run.op].outputs
        first = held.intersection(outputs)
        held -= first
        later = (graph.pinned - graph.inputs).intersection(outputs) - first
        choices.append([keep for keep in _subsets(outputs) if first.issubset(keep) and not later.intersection(keep)])
    least = simulate(graph, plain, case.cost).peak + 1
    for keeps in product(*choices):
        attempt = Program(tuple(Run(run.op, run.replay, keep) for run, keep in zip(runs, keeps, strict=True)))
        try:
            least = min(least, simulate(graph, insert_drops(graph, attempt), case.cost).peak)
        except ProgramError:
            continue
    return least


def _subsets(values: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tuple(value for bit, value in enumerate(values) if mask >> bit & 1) for mask in range(2 ** len(values))]


@given(cases(4))
@settings(max_examples=60, deadline=None)
def test_program_of_an_order_has_least_memory(case: Case) -> None:
    """No choice of keep sets for the same order has a lower peak, where pinned values are made once."""
    order = case.order
    if sum(len(case.graph.ops[op].outputs) for op in order) <= 11:
        peak = evaluate(case.graph, case.cost, order, reuse=False).peak
        assert _least_peak(case.graph, case, order) == peak


@given(cases(24), SEEDS)
@settings(max_examples=300, deadline=None)
def test_drops_are_derived_from_last_uses(case: Case, seed: int) -> None:
    """Derived drops keep rules and results, need no more memory, and deriving them again changes nothing."""
    plain = from_order(case.graph, case.order)
    assert insert_drops(case.graph, plain) == plain
    late = [instr for instr in case.program if not isinstance(instr, Drop) or instr.tier != "device"]
    derived = insert_drops(case.graph, Program(tuple(late)))
    away = any(isinstance(instr, Copy) for instr in derived)
    if not away:
        assert derived == insert_drops(case.graph, case.program)
        verify(case.graph, derived, cost=case.cost)
        assert simulate(case.graph, derived, case.cost).peak <= simulate(case.graph, case.program, case.cost).peak
    copied = with_copies(case.graph, plain, random.Random(seed))
    derived = insert_drops(case.graph, copied)
    verify(case.graph, derived, cost=case.cost)
    assert interpret(case.graph, derived) == interpret(case.graph, copied)
    assert simulate(case.graph, derived, case.cost).peak <= simulate(case.graph, copied, case.cost).peak
    assert insert_drops(case.graph, derived) == derived


def test_drop_waits_for_the_copy() -> None:
    """A source that is being copied is dropped after the wait, not after its last read."""
    text = "run 0 keep 1\ncopy 1 device host\nrun 1 keep 2\nrun 2 keep 4\nwait 1 host\ndrop 1 host\n"
    lines = format_program(insert_drops(GRAPH, parse_program(text))).splitlines()
    assert lines[-2:] == ["drop 1", "drop 1 host"] or lines[-2:] == ["drop 1 host", "drop 1"]
    assert lines.index("wait 1 host") < lines.index("drop 1")


def test_wait_for_another_tier_is_no_use_of_the_device() -> None:
    """A copy from the host to the disk does not hold the value on the device."""
    text = "run 0 keep 1\ncopy 1 device host\nwait 1 host\nrun 1 keep 2\ncopy 1 host disk\nrun 2 keep 4\nwait 1 disk\n"
    lines = format_program(insert_drops(GRAPH, parse_program(text))).splitlines()
    assert lines.index("drop 1") < lines.index("copy 1 host disk")


def test_drop_on_another_tier_is_not_reuse() -> None:
    """Only a drop on the device, right after the run, gives the storage up."""
    for text in ("run 1 keep 2\ndrop 1 host\n", "run 1 keep 2\nrun 0\ndrop 1\n", "run 1 keep 3\ndrop 1\n"):
        program = parse_program(text)
        assert reuse_storage(GRAPH, program) == program
    mixed = reuse_storage(GRAPH, parse_program("run 1 keep 2\ndrop 0\ndrop 1\ndrop 1 host\n"))
    assert format_program(mixed) == "run 1 keep 2 reuse\ndrop 0\ndrop 1 host\n"


def test_tables_go_with_their_graph() -> None:
    """The cached tables of a graph keep no graph alive, and never answer for another one."""
    rng = random.Random(3)
    for seed in range(50):
        graph = random_graph(seed, 8)
        order = random_order(graph, rng)
        cost = random_cost(graph, rng)
        program = reuse_storage(graph, from_order(graph, order))
        assert evaluate(graph, cost, order).peak == simulate(graph, program, cost).peak
    alive = weakref.ref(graph)
    del graph
    gc.collect()
    assert alive() is None
