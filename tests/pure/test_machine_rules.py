"""The rules of the machine, one by one, and against a naive interpreter on mutated programs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from strategies import SEEDS, Case, WrongError, cases, interpret

from keepless.cost import CostModel, Link
from keepless.errors import ProgramError
from keepless.ir import (
    Budget,
    Copy,
    Drop,
    Effect,
    Graph,
    Instr,
    Kind,
    Op,
    Phase,
    Program,
    Run,
    Value,
    Wait,
    parse_bytes,
)
from keepless.ir.text import format_graph, parse_graph, parse_program
from keepless.machine import RULES, Machine, simulate, verify

GRAPH = parse_graph(
    """
value 0 "x" 4 input float32
value 1 "w" 8 param float32
value 2 "h" 16 activation float32
value 3 "d" 16 activation float32
value 4 "state" 2 rng uint8
value 5 "out" 4 output float32
value 6 "tangent" 4 grad float32
value 7 "gw" 8 grad float32
value 8 "counter" 1 buffer int64
op 0 "mm" forward in 0 1 out 2 module "net.0" source "model.py:7"
op 1 "dropout" forward in 2 out 3 4 effects rng reuse 3 2
op 2 "count_" forward in 8 effects buffer
op 3 "sum" forward in 3 out 5
op 4 "loss" loss in 5 out 6
op 5 "mm_backward" backward in 0 3 6 out 7
inputs 0 1 8
pinned 1 7 8
"""
)
LEGAL = """
run 0 keep 2
run 1 keep 3 4
drop 2
run 2
run 3 keep 5
drop 3
run 4 keep 6
drop 5
run 0 replay 1 keep 2
run 1 replay 1 keep 3
drop 2
drop 4
run 5 keep 7
drop 0
drop 3
drop 6
"""
COST = CostModel((1.0,) * 6, (0, 3, 0, 0, 0, 5), {("device", "host"): Link(8.0), ("host", "device"): Link(8.0)})


def legal(text: str = LEGAL) -> None:
    verify(GRAPH, parse_program(text), cost=COST)


def refused(text: str, cost: CostModel | None = COST) -> ProgramError:
    with pytest.raises(ProgramError) as caught:
        verify(GRAPH, parse_program(text), cost=cost)
    return caught.value


def test_legal_program_passes() -> None:
    """The worked program keeps every rule."""
    legal()


@pytest.mark.parametrize(
    ("old", "new", "rule", "index"),
    [
        ("run 0 keep 2\nrun 1 keep 3 4", "run 1 keep 3 4", "R1", 0),
        ("run 0 keep 2\n", "run 6\nrun 0 keep 2\n", "R1", 0),
        ("run 1 replay 1 keep 3\ndrop 2\ndrop 4", "drop 4\nrun 1 replay 1 keep 3\ndrop 2", "R1", 10),
        ("run 0 replay 1 keep 2\n", "run 0 replay 1 keep 2\nrun 0 replay 2 keep 2\n", "R2", 9),
        ("run 0 keep 2\n", "run 0 keep 2 2\n", "R2", 0),
        ("run 0 keep 2\n", "run 0 keep 2 3\n", "R2", 0),
        ("run 0 keep 2\n", "run 0 keep 2 reuse\n", "R2", 0),
        ("run 0 replay 1", "run 0 replay 2", "R3", 8),
        ("run 0 replay 1", "run 0", "R3", 8),
        ("run 1 replay 1 keep 3\n", "run 1 replay 1 keep 3 4\n", "R3", 9),
        ("run 2\n", "run 2\nrun 2 replay 1\n", "R3", 4),
        ("run 4 keep 6\n", "run 4 keep 6\nrun 4 replay 1\n", "R3", 7),
        ("run 2\n", "", "R3", 15),
        ("run 2\nrun 3 keep 5\ndrop 3\nrun 4 keep 6\n", "run 3 keep 5\ndrop 3\nrun 4 keep 6\nrun 2\n", "R3", 6),
        ("run 2\n", "run 2\ncopy 2 device host\n", "R4", 4),
        ("run 2\n", "run 2\ncopy 3 device device\n", "R4", 4),
        ("run 2\n", "run 2\ncopy 3 host device\n", "R4", 4),
        ("run 2\n", "run 2\ncopy 3 device disk\n", "R4", 4),
        ("run 2\n", "run 2\ncopy 3 device host\ncopy 3 device host\n", "R4", 5),
        ("run 2\n", "run 2\ncopy 99 device host\n", "R4", 4),
        ("drop 2\nrun 2", "copy 2 device host\ndrop 2\nrun 2", "R4", 3),
        ("run 1 keep 3 4\ndrop 2\n", "copy 2 device host\nrun 1 keep 3 4 reuse\n", "R4", 2),
        ("run 2\n", "run 2\nwait 3 host\n", "R5", 4),
        ("run 2\n", "run 2\nwait 99 host\n", "R5", 4),
        ("run 2\n", "run 2\ndrop 3 host\n", "R6", 4),
        ("run 2\n", "run 2\ndrop 99\n", "R6", 4),
        ("run 2\n", "run 2\ncopy 3 device host\ndrop 3 host\n", "R6", 5),
        ("drop 6\n", "", "R6", 15),
        ("drop 6\n", "drop 6\ncopy 7 device host\n", "R6", 17),
        ("drop 6\n", "drop 6\ncopy 7 device host\nwait 7 host\n", "R6", 18),
        ("drop 6\n", "drop 6\ndrop 7\n", "R6", 17),
    ],
)
def test_rule_is_enforced(old: str, new: str, rule: str, index: int) -> None:
    """Each way to break a rule is refused with that rule's name at that instruction."""
    assert LEGAL.count(old) == 1
    error = refused(LEGAL.replace(old, new))
    assert (error.rule, error.index) == (rule, index)
    assert RULES[rule] in str(error)


def test_reuse_and_copies_are_legal() -> None:
    """Reuse ends the input; a value may go to the host and come back."""
    text = LEGAL.replace("run 1 keep 3 4\ndrop 2\n", "run 1 keep 3 4 reuse\n")
    legal(text)
    away = "copy 6 device host\nwait 6 host\ndrop 6\ncopy 6 host device\nwait 6 device\ndrop 6 host\n"
    legal(text.replace("drop 5\n", away + "drop 5\n"))


def test_value_in_flight_is_not_there() -> None:
    """A value on its way to the device can neither be read nor be bound again."""
    away = "copy 6 device host\nwait 6 host\ndrop 6\ncopy 6 host device\n"
    error = refused(LEGAL.replace("run 5", away + "run 5"))
    assert error.rule == "R1"
    assert "in flight" in str(error)
    away = "copy 3 device host\nwait 3 host\ndrop 3\ncopy 3 host device\n"
    assert refused(LEGAL.replace("drop 3\nrun 4", away + "run 4")).rule == "R2"


def test_message_shows_the_fault() -> None:
    """The message says what, where, how big, and marks the line."""
    error = refused(LEGAL.replace("run 0 keep 2\nrun 1", "run 0 keep 2\ndrop 0\nrun 1"))
    text = str(error)
    assert "op 0 mm (net.0, model.py:7)" in text
    assert "value 0 'x' (4 B)" in text
    marked = [line for line in text.splitlines() if line.endswith("<-- here")]
    assert [line.split()[:3] for line in marked] == [["9", "run", "0"]]
    assert len(text.splitlines()) == 4
    assert "(end)    <-- here" in str(refused(LEGAL.replace("drop 6\n", "")))


def test_limit_counts_scratch_and_every_tier() -> None:
    """R7 holds at the peak and fails one byte under it; a tier that has no limit may not be used."""
    program = parse_program(LEGAL)
    peak = simulate(GRAPH, program, COST).peak
    verify(GRAPH, program, cost=COST, budget=Budget({"device": peak}))
    verify(GRAPH, program, cost=COST, budget=Budget({"device": peak + 7}, reserve=7))
    with pytest.raises(ProgramError, match="the limit is") as caught:
        verify(GRAPH, program, cost=COST, budget=Budget({"device": peak + 6}, reserve=7))
    assert caught.value.rule == "R7"
    with pytest.raises(ProgramError) as caught:
        verify(GRAPH, program, budget=Budget({"device": 12}))
    assert (caught.value.rule, caught.value.index) == ("R7", 0)
    away = "run 2\ncopy 3 device host\nwait 3 host\ndrop 3 host\n"
    program = parse_program(LEGAL.replace("run 2\n", away))
    verify(GRAPH, program, budget=Budget({"device": peak, "host": 16}))
    for limits in ({"device": peak}, {"device": peak, "host": 15}):
        with pytest.raises(ProgramError) as caught:
            verify(GRAPH, program, budget=Budget(limits))
        assert (caught.value.rule, caught.value.index) == ("R7", 4)


def test_draws_and_collectives_keep_their_order() -> None:
    """First runs of RNG ops and of collectives come in the graph's order."""
    values = (Value(0, "x", 1, Kind.INPUT), *(Value(i, f"v{i}", 1, Kind.OUTPUT) for i in (1, 2)))
    for effect in (Effect.RNG, Effect.COLLECTIVE):
        ops = tuple(Op(i, "op", (0,), (i + 1,), Phase.FORWARD, frozenset({effect})) for i in (0, 1))
        graph = Graph(ops, values, frozenset({0}), frozenset({0, 1, 2}))
        verify(graph, Program((Run(0, keep=(1,)), Run(1, keep=(2,)))))
        with pytest.raises(ProgramError) as caught:
            verify(graph, Program((Run(1, keep=(2,)), Run(0, keep=(1,)))))
        assert (caught.value.rule, caught.value.index) == ("R3", 1)


def test_machine_tells_where_values_are() -> None:
    """Engines can ask the machine what is resident and what is in flight."""
    machine = Machine(GRAPH, cost=COST)
    assert machine.step(Run(0, keep=(2,))) == 13 + 16
    machine.step(Copy(2, "device", "host"))
    assert machine.source_of(2, "host") == "device"
    assert not machine.is_resident(2, "host")
    machine.step(Wait(2, "host"))
    assert machine.is_resident(2, "host")
    assert machine.source_of(2, "host") is None
    machine.step(Drop(2))
    assert not machine.is_resident(2)
    assert machine.resident == {"device": 13, "host": 16}
    assert machine.peaks == {"device": 29, "host": 16}


def accepts(case: Case, program: Program) -> bool:
    """Whether `verify` lets the program pass."""
    try:
        verify(case.graph, program, cost=case.cost)
    except ProgramError:
        return False
    return True


def is_right(case: Case, program: Program) -> bool:
    """Whether the naive interpreter finds the program right."""
    try:
        results = interpret(case.graph, program)
    except WrongError:
        return False
    return all(symbol == ("right", value) for value, symbol in results.items())


@given(cases())
@settings(max_examples=300, deadline=None)
def test_random_legal_programs_pass(case: Case) -> None:
    """Programs of random orders, with reuse and copies, are right and are accepted."""
    assert is_right(case, case.program)
    verify(case.graph, case.program, cost=case.cost)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_every_deletion_is_caught(case: Case) -> None:
    """A program without useless runs bears the loss of no instruction."""
    instrs = case.program.instrs
    for index in range(len(instrs)):
        program = Program(instrs[:index] + instrs[index + 1 :])
        assert not accepts(case, program), f"without instruction {index}: {instrs[index]}"
        assert not is_right(case, program)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_swaps_are_caught_unless_right(case: Case) -> None:
    """A swap of neighbours is accepted exactly where the naive interpreter finds it right."""
    instrs = list(case.program.instrs)
    for index in range(len(instrs) - 1):
        swapped = Program((*instrs[:index], instrs[index + 1], instrs[index], *instrs[index + 2 :]))
        assert accepts(case, swapped) == is_right(case, swapped), f"swapped {instrs[index : index + 2]}"


def _changed(instr: Instr, case: Case, rng: random.Random) -> Instr:
    value = rng.randrange(len(case.graph.values))
    if isinstance(instr, Run):
        match rng.randrange(4):
            case 0:
                return replace(instr, op=rng.randrange(len(case.graph.ops)))
            case 1:
                return replace(instr, replay=max(0, instr.replay + rng.choice((-1, 1))))
            case 2:
                outputs = case.graph.ops[instr.op].outputs
                flipped = rng.choice(outputs) if outputs and rng.random() < 0.8 else value
                kept = set(instr.keep) ^ {flipped}
                return replace(instr, keep=tuple(sorted(kept)))
            case _:
                return replace(instr, reuse=not instr.reuse)
    if isinstance(instr, Copy):
        return replace(instr, value=value) if rng.random() < 0.5 else replace(instr, dst=rng.choice(("disk", "host")))
    return replace(instr, value=value) if rng.random() < 0.5 else replace(instr, tier=rng.choice(("disk", "device")))


@given(cases(), SEEDS)
@settings(max_examples=300, deadline=None)
def test_changes_are_caught_unless_right(case: Case, seed: int) -> None:
    """A changed, doubled or moved instruction is accepted exactly where the naive interpreter finds it right."""
    rng = random.Random(seed)
    for _ in range(20):
        instrs = list(case.program.instrs)
        index = rng.randrange(len(instrs))
        match rng.randrange(3):
            case 0:
                instrs[index] = _changed(instrs[index], case, rng)
            case 1:
                instrs.insert(rng.randrange(len(instrs)), instrs[index])
            case _:
                instrs.insert(rng.randrange(len(instrs)), instrs.pop(index))
        program = Program(tuple(instrs))
        assert accepts(case, program) == is_right(case, program)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_limit_is_sharp(case: Case) -> None:
    """The simulated peak is the smallest limit that the verifier accepts."""
    timeline = simulate(case.graph, case.program, case.cost)
    limits = {"host": 10**6, "device": timeline.peak}
    verify(case.graph, case.program, cost=case.cost, budget=Budget(limits))
    if timeline.peak:
        limits["device"] -= 1
        with pytest.raises(ProgramError) as caught:
            verify(case.graph, case.program, cost=case.cost, budget=Budget(limits))
        assert caught.value.rule == "R7"
        assert caught.value.index == timeline.peak_index


def test_budget_words_reach_the_verifier() -> None:
    """A budget in words and one in bytes mean the same."""
    verify(GRAPH, parse_program(LEGAL), budget=Budget({"device": parse_bytes("1KiB")}))


def test_nothing_reads_a_parameter_after_its_update() -> None:
    """An optimizer in the backward writes the parameter: a later reader, a replay above all, is refused."""
    text = format_graph(GRAPH).replace("inputs 0 1 8", 'op 6 "update" backward in 1 7 effects update\ninputs 0 1 8')
    graph = parse_graph(text)
    program = LEGAL.replace("run 5 keep 7\n", "run 5 keep 7\nrun 6\n")
    verify(graph, parse_program(program))
    assert graph.ops[6].effects == {Effect.UPDATE}
    late = program.replace("run 6\n", "run 6\nrun 0 replay 2\n")
    with pytest.raises(ProgramError, match=r"reads value 1 'w' \(8 B\), which was updated before") as caught:
        verify(graph, parse_program(late))
    assert (caught.value.rule, caught.value.index) == ("R3", 14)
