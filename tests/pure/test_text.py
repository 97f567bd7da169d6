"""The text form of programs and graphs: round trips, golden lines, hostile text."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import Case, cases, graphs

from keepless.errors import PlanError
from keepless.ir import Copy, Drop, Effect, Graph, Kind, Op, Phase, Program, Run, Value, Wait
from keepless.ir.text import fingerprint, format_graph, format_program, parse_graph, parse_program


def test_program_reads_as_documented() -> None:
    """Each instruction has its line."""
    program = Program(
        (
            Run(0),
            Run(12, 1, (34, 35), True),
            Run(3, keep=(7,)),
            Copy(3, "device", "host"),
            Wait(3, "host"),
            Drop(34),
            Drop(3, "device:mask"),
        )
    )
    text = (
        "run 0\nrun 12 replay 1 keep 34 35 reuse\nrun 3 keep 7\ncopy 3 device host\nwait 3 host\ndrop 34\n"
        "drop 3 device:mask\n"
    )
    assert format_program(program) == text
    assert parse_program(text) == program
    assert parse_program("# a comment\n\n  run   0\n") == Program((Run(0),))


def test_graph_reads_as_documented() -> None:
    """Values, ops and sets have their lines."""
    values = (
        Value(0, 'odd "name"\n', 4096, Kind.INPUT, "float32", (32, 32)),
        Value(1, "y", 0, Kind.ACTIVATION, "bool"),
    )
    op = Op(0, "relu", (0,), (1,), Phase.FORWARD, frozenset({Effect.RNG}), ((1, 0),), "h.0", "model.py:88", "k 1")
    text = (
        'value 0 "odd \\"name\\"\\n" 4096 input float32 32 32\nvalue 1 "y" 0 activation bool\n'
        'op 0 "relu" forward in 0 out 1 effects rng reuse 1 0 module "h.0" source "model.py:88" key "k 1"\n'
        "inputs 0\npinned 0 1\n"
    )
    graph = Graph((op,), values, frozenset({0}), frozenset({0, 1}))
    assert format_graph(graph) == text
    assert parse_graph(text) == graph
    assert parse_graph("inputs\npinned\n") == Graph((), (), frozenset(), frozenset())


@given(cases(24))
@settings(max_examples=200, deadline=None)
def test_round_trips(case: Case) -> None:
    """Text gives back the program and the graph, and the text of those is the same text."""
    assert parse_program(format_program(case.program)) == case.program
    graph = parse_graph(format_graph(case.graph))
    assert graph == case.graph
    assert format_graph(graph) == format_graph(case.graph)
    assert graph.fingerprint == fingerprint(case.graph)


@given(st.text(), st.text(), st.text())
@example('"', "\\", "\ud800")
def test_any_name_survives(name: str, module: str, key: str) -> None:
    """Names may hold anything."""
    op = Op(0, name, (), (0,), Phase.LOSS, module=module, key=key, source=name)
    graph = Graph((op,), (Value(0, module, 1, Kind.GRAD),), frozenset(), frozenset({0}))
    assert parse_graph(format_graph(graph)) == graph


@given(graphs())
@settings(max_examples=100, deadline=None)
def test_fingerprint_tells_graphs_apart(graph: Graph) -> None:
    """It ignores source lines, and nothing else."""
    ops = tuple(replace(op, source="elsewhere.py:1") for op in graph.ops)
    assert fingerprint(replace(graph, ops=ops)) == fingerprint(graph)
    first = graph.ops[0]
    others = [
        replace(graph, pinned=graph.pinned - {min(graph.pinned)}),
        replace(graph, inputs=graph.inputs - {min(graph.inputs)}),
        replace(graph, values=(replace(graph.values[0], nbytes=12345), *graph.values[1:])),
        replace(graph, values=(replace(graph.values[0], shape=(9, 9, 9)), *graph.values[1:])),
        replace(graph, ops=(replace(first, key="other"), *graph.ops[1:])),
        replace(graph, ops=(replace(first, module="other"), *graph.ops[1:])),
        replace(graph, ops=(replace(first, reuses=()), *graph.ops[1:])),
        replace(graph, ops=(replace(first, effects=first.effects ^ {Effect.OPAQUE}), *graph.ops[1:])),
    ]
    prints = [fingerprint(other) for other in others if other != graph]
    assert fingerprint(graph) not in prints
    assert len(fingerprint(graph)) == 64


@pytest.mark.parametrize(
    "line",
    [
        "run",
        "run -1",
        "run 1.0",
        "run 1_000",
        "run \u0661",
        "run 10000001",
        "run " + "9" * 5000,
        "run 1 replay",
        "run 1 replay 0",
        "run 1 replay x",
        "run 1 keep",
        "run 1 keep reuse",
        "run 1 reuse keep 2",
        "run 1 keep 2 replay 1",
        "run 1 2",
        "RUN 1",
        "drop",
        "drop 1 Device",
        "drop 1 host host",
        "copy 1 device",
        "copy 1 device ../etc",
        "wait 1",
        "wait 1 " + "h" * 100,
        "import os",
        "run 1;",
        "x" * (2 << 20),
    ],
)
def test_bad_program_line_is_refused(line: str) -> None:
    """What is not an instruction is refused with its line number."""
    with pytest.raises(PlanError, match="Line 2 "):
        parse_program(f"run 0\n{line}\nrun 1\n")


GOOD = 'value 0 "x" 1 input f\nvalue 1 "y" 1 input f\nop 0 "f" forward in 0 out 1\ninputs 0\npinned 1\n'


@pytest.mark.parametrize(
    ("old", "new", "number"),
    [
        ('value 1 "y"', 'value 2 "y"', 2),
        ('value 1 "y"', "value 1 y", 2),
        ('value 1 "y"', 'value 1 "y', 2),
        ('value 1 "y"', 'value 1 "\\x"', 2),
        ('value 1 "y"', 'value 1 "y" "y"', 2),
        ('"y" 1', '"y" 1152921504606846977', 2),
        ('"y" 1', '"y" -1', 2),
        ('"y" 1 input f', '"y" 1 thing f', 2),
        ('"y" 1 input f', '"y" 1 input f 3 -4', 2),
        ('"y" 1 input f', '"y" 1 input f;g', 2),
        ('"y" 1 input f', '"y" 1 input', 2),
        ("op 0", "op 1", 3),
        ("forward", "sideways", 3),
        ("in 0", "in 0 0", 3),
        ("in 0", "in 7", 3),
        ("out 1", "out 0", 3),
        ("out 1", "out 1 out 1", 3),
        ("out 1", "out 1 effects magic", 3),
        ("out 1", "out 1 reuse 1", 3),
        ("out 1", "out 1 reuse 0 1", 3),
        ("out 1", 'out 1 module "a" "b"', 3),
        ("out 1", "out 1 module a", 3),
        ("in 0", "5 in 0", 3),
        ("inputs 0", "inputs 9", 4),
        ("inputs 0", "inputs 0\ninputs 0", 5),
        ("pinned 1", 'pinned 1\nvalue 2 "z" 1 input f', 6),
        ("pinned 1", 'pinned 1\nop 1 "z" forward', 6),
        ("pinned 1", "pinned 1\nwhat", 6),
    ],
)
def test_bad_graph_line_is_refused(old: str, new: str, number: int) -> None:
    """What is not a line of a graph is refused with its line number."""
    assert GOOD.count(old) == 1
    with pytest.raises(PlanError, match=f"Line {number} "):
        parse_graph(GOOD.replace(old, new))


def test_cut_graph_is_refused() -> None:
    """A graph's text that ends early is refused."""
    for end in ("inputs 0\n", "pinned 1\n", ""):
        with pytest.raises(PlanError):
            parse_graph(GOOD[: GOOD.index("inputs")] + end)


@pytest.mark.parametrize(
    "text",
    [
        'value 0 "' + '\\"' * 500_000,
        'value 0 "x" 1 input f ' + "1 " * 500_000 + "x",
        'value 0 "x" 1 input f\nop 0 "f" forward in ' + "0 " * 500_000,
        '"' * 1_000_000,
        "\\" * 1_000_000,
        "\n" * 6_000_000,
        'value 0 "x" 1 input f\n' * 400_000,
    ],
)
def test_hostile_graph_is_refused_soon(text: str) -> None:
    """Megabytes of nonsense are refused within seconds."""
    begin = time.process_time()
    with pytest.raises(PlanError):
        parse_graph(text)
    assert time.process_time() - begin < 5


@pytest.mark.slow
def test_hostile_program_is_refused_soon() -> None:
    """Too many lines are refused; ten megabytes of lines are read within seconds."""
    with pytest.raises(PlanError, match="lines"):
        parse_program("\n" * 5_000_001)
    begin = time.process_time()
    with pytest.raises(PlanError):
        parse_program("drop 1\n" * 1_400_000 + "end")
    assert time.process_time() - begin < 10


@given(st.text(alphabet='value op runkpdc"\\ 0123456789\n\t#', max_size=200))
@settings(max_examples=300)
def test_any_text_is_read_or_refused(text: str) -> None:
    """Nothing but a PlanError comes out."""
    for parse in (parse_program, parse_graph):
        try:
            parse(text)
        except PlanError:
            continue
