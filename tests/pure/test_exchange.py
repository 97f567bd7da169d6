"""Graphs as JSON: what is written is read again, and what is wrong is refused, soon and with its place."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, random_case

from keepless.cost import CostModel, GraphFile, format_graph, parse_graph, read_graph
from keepless.errors import GraphError, PlanError
from keepless.ir import Effect, Graph, Kind, Op, Phase, Value
from keepless.ir.order_text import format_order, looks_like_program, parse_order
from keepless.ir.strict_json import MAX_FILE_NBYTES
from keepless.ir.text import format_program
from keepless.machine import simulate
from keepless.passes import evaluate, from_order

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def parse(document: Any) -> GraphFile:
    return parse_graph(json.dumps(document).encode())


def node(name: object, inputs: list[Any], **others: Any) -> dict[str, Any]:
    return {"id": name, "seconds": 1.0, "nbytes": 4, "inputs": inputs} | others


def plain() -> dict[str, Any]:
    """A diamond: a -> b, c -> d."""
    return {"nodes": [node("a", []), node("b", ["a"]), node("c", ["a"]), node("d", ["b", "c"])], "sinks": ["d"]}


def full() -> dict[str, Any]:
    """A training step of two layers, with dropout."""
    return {
        "format": "keepless-graph",
        "version": 1,
        "units": {"time": "seconds", "memory": "bytes"},
        "values": [
            {"id": "x", "bytes": 64, "kind": "input"},
            {"id": "w", "bytes": 16, "kind": "param", "dtype": "float32", "shape": [2, 2]},
            {"id": "h", "bytes": 64},
            {"id": "mask", "bytes": 16},
            {"id": "state", "bytes": 8, "kind": "rng"},
            {"id": "y", "bytes": 64},
            {"id": "dy", "bytes": 64},
            {"id": "dw", "bytes": 16},
        ],
        "ops": [
            {"id": "mm", "seconds": 0.5, "inputs": ["x", "w"], "outputs": ["h"], "module": "net.0"},
            {"id": "draw", "seconds": 0.1, "outputs": ["mask", "state"], "effects": ["rng"]},
            {"id": "mul", "seconds": 0.1, "inputs": ["h", "mask"], "outputs": ["y"], "reuses": [["y", "h"]]},
            {"id": "loss", "seconds": 0, "inputs": ["y"], "outputs": ["dy"], "phase": "loss"},
            {
                "id": "mm_back",
                "name": "mm backward",
                "seconds": 1,
                "scratch": 32,
                "inputs": ["dy", "x", "w", "mask"],
                "outputs": ["dw"],
                "phase": "backward",
            },
        ],
        "links": [{"from": "device", "to": "host", "bytes_per_second": 1e9, "latency": 1e-5}],
        "inputs": ["x", "w"],
        "pinned": ["w", "dw"],
    }


@given(SEEDS, st.integers(1, 14))
@settings(max_examples=200, deadline=None)
def test_a_graph_is_read_as_it_was_written(seed: int, num_ops: int) -> None:
    """Ops, values, phases, effects, reuse, inputs, pinned, costs and links survive a file."""
    case = random_case(seed, num_ops)
    found = parse_graph(format_graph(case.graph, case.cost).encode())
    assert found.graph == case.graph
    assert found.cost == case.cost
    assert found.op_ids == tuple(str(op.id) for op in case.graph.ops)


@given(SEEDS, st.integers(1, 14))
@settings(max_examples=200, deadline=None)
def test_ops_may_be_listed_in_any_order(seed: int, num_ops: int) -> None:
    """A shuffled list gives an order that runs, with the same ops, costs and phases in their order."""
    case = random_case(seed, num_ops)
    document = json.loads(format_graph(case.graph, case.cost))
    random.Random(seed).shuffle(document["ops"])
    found = parse(document)
    graph = found.graph
    back = [int(name) for name in found.op_ids]
    assert sorted(back) == list(range(len(case.graph.ops)))
    for op, old in zip(graph.ops, back, strict=True):
        assert op == replace(case.graph.ops[old], id=op.id)
        assert found.cost.seconds[op.id] == case.cost.seconds[old]
        assert found.cost.scratch[op.id] == case.cost.scratch[old]
    phases = list(Phase)
    ranks = [phases.index(op.phase) for op in graph.ops]
    assert ranks == sorted(ranks)
    evaluate(graph, found.cost, list(range(len(graph.ops))))  # every op reads what was made before it
    assert parse(document) == found


@given(st.integers(1, 30), SEEDS)
@settings(max_examples=200, deadline=None)
def test_a_shuffled_dag_is_sorted_with_the_listing_as_tie_break(num: int, seed: int) -> None:
    """The order of nodes is the smallest topological one, by a naive search; a topological listing stays."""
    rng = random.Random(seed)
    reads = [sorted(rng.sample(range(i), min(i, rng.randrange(4)))) for i in range(num)]
    listing = list(range(num))
    rng.shuffle(listing)
    found = parse({"nodes": [node(i, reads[i]) for i in listing]})
    expected: list[int] = []
    while len(expected) < num:
        expected.append(next(i for i in listing if i not in expected and set(reads[i]) <= set(expected)))
    assert found.op_ids == tuple(map(str, expected))
    listed = parse({"nodes": [node(i, reads[i]) for i in range(num)]})
    assert listed.op_ids == tuple(map(str, range(num)))
    assert [list(op.inputs) for op in listed.graph.ops] == reads
    unread = set(range(num)).difference(*reads)
    assert listed.graph.pinned == unread


def test_a_plain_dag() -> None:
    """Nodes with one output each; ids are texts or whole numbers; nothing is there before."""
    document = plain()
    document["nodes"][1] |= {"id": 7, "name": "conv", "scratch": 3}
    document["nodes"][3]["inputs"] = ["7", "c", "c"]
    found = parse(document)
    assert found.op_ids == ("a", "7", "c", "d")
    assert found.graph.ops[1] == Op(1, "conv", (0,), (1,), Phase.FORWARD)
    assert found.graph.ops[3].inputs == (1, 2)
    assert found.graph.pinned == {3}
    assert found.graph.inputs == frozenset()
    assert found.graph.loss_op is None
    assert found.cost == CostModel((1.0,) * 4, (0, 3, 0, 0))
    assert parse({"nodes": []}).graph == Graph((), (), frozenset(), frozenset())


def test_the_full_form() -> None:
    """Kinds that are not given follow from who makes a value; names from ids; links are there."""
    graph = parse(full()).graph
    kinds = [value.kind for value in graph.values]
    expected = [
        Kind.INPUT,
        Kind.PARAM,
        Kind.ACTIVATION,
        Kind.ACTIVATION,
        Kind.RNG,
        Kind.ACTIVATION,
        Kind.GRAD,
        Kind.GRAD,
    ]
    assert kinds == expected
    assert graph.values[1] == Value(1, "w", 16, Kind.PARAM, "float32", (2, 2))
    assert graph.ops[1].effects == {Effect.RNG}
    assert graph.ops[2].reuses == ((5, 2),)
    assert graph.ops[4].name == "mm backward"
    assert graph.loss_op == 3
    assert parse(full()).cost.links["device", "host"].bytes_per_s == 1e9
    assert simulate(graph, from_order(graph, range(5)), parse(full()).cost).seconds == pytest.approx(1.7)


def test_names_serve_where_there_are_no_ids() -> None:
    """A value or op without an id goes by its name; repeated names need ids."""
    document = full()
    for row in document["values"] + document["ops"]:
        row["name"] = row.pop("id")
    assert parse(document).graph == replace_name(parse(full()).graph)
    document["ops"][1]["name"] = "mm"
    with pytest.raises(GraphError, match=r"ops\[1\].name: 'mm' is taken by ops\[0\]; where names repeat, give ids"):
        parse(document)


def replace_name(graph: Graph) -> Graph:
    return replace(graph, ops=(*graph.ops[:4], replace(graph.ops[4], name="mm_back")))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.name)
def test_the_examples_are_graphs(path: Path) -> None:
    """The files in docs/examples can be read, and their given order runs."""
    found = read_graph(path)
    assert evaluate(found.graph, found.cost, list(range(len(found.graph.ops)))).peak > 0


def test_the_documents_graphs_are_graphs() -> None:
    """Both worked examples of the format's page can be read, and the first costs what the page says."""
    text = (EXAMPLES.parent / "graph-format.md").read_text()
    blocks = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    plain_form, full_form = (parse_graph(block.encode()) for block in blocks)
    listed = evaluate(plain_form.graph, plain_form.cost, list(range(5)))
    assert (listed.seconds, listed.peak, listed.peak_position) == (7, 24, 3)
    order = parse_order(re.findall(r"cat order.txt\n(.*?)```", text, re.DOTALL)[0], plain_form.graph, plain_form.op_ids)
    again = evaluate(plain_form.graph, plain_form.cost, order)
    assert (again.seconds, again.peak) == (8, 20)
    assert full_form.graph.loss_op == 2
    assert len(from_order(full_form.graph, range(5)))


def change(where: list[Any], to: Any) -> Callable[[dict[str, Any]], None]:
    """Puts a value at a place of a document; `...` takes the place out."""

    def apply(document: dict[str, Any]) -> None:
        target: Any = document
        for key in where[:-1]:
            target = target[key]
        if to is ...:
            del target[where[-1]]
        else:
            target[where[-1]] = to

    return apply


BAD_NODES = [
    (["nodes", 3, "inputs", 1], "x", r"nodes\[3\].inputs\[1\]: there is no node 'x'"),
    (["nodes", 3, "inputs", 1], None, r"nodes\[3\].inputs\[1\]: it is null, not an id"),
    (["nodes", 3, "inputs", 1], True, r"nodes\[3\].inputs\[1\]: it is true, not an id"),
    (["nodes", 3, "inputs", 1], ["a"], r"nodes\[3\].inputs\[1\]: it is a list, not an id"),
    (["nodes", 3, "inputs", 1], 1.0, r"nodes\[3\].inputs\[1\]: it is the number 1.0, not an id"),
    (["nodes", 3, "inputs"], "ab", r"nodes\[3\].inputs: it is the text 'ab', not a list"),
    (["nodes", 0, "inputs"], ["d"], r"has a cycle, and no op of it can run first: a -> b -> d -> a\."),
    (["nodes", 0, "inputs"], ["a"], "cycle.*: a -> a"),
    (["nodes", 1, "id"], "a", r"nodes\[1\].id: 'a' is taken by nodes\[0\]"),
    (["nodes", 1, "id"], "", r"nodes\[1\].id: .* not an id"),
    (["nodes", 1, "id"], " b", r"nodes\[1\].id: .* not an id"),
    (["nodes", 1, "id"], "b\n", r"nodes\[1\].id: .* one line"),
    (["nodes", 1, "id"], "\x1b[2J", r"nodes\[1\].id: .* one line"),
    (["nodes", 1, "id"], "\ud800", r"nodes\[1\].id"),
    (["nodes", 1, "id"], "b" * 5000, r"nodes\[1\].id: it has 5000 characters"),
    (["nodes", 1, "id"], ..., r"nodes\[1\]: the key 'id' is missing"),
    (["nodes", 1, "seconds"], ..., r"nodes\[1\]: the key 'seconds' is missing"),
    (["nodes", 1, "seconds"], "5 ms", r"nodes\[1\].seconds: it is the text '5 ms'; write a number of seconds, 0.005"),
    (["nodes", 1, "seconds"], -0.1, r"nodes\[1\].seconds: it is -0.1; seconds are from 0 to 1e\+09"),
    (["nodes", 1, "seconds"], 1.1e9, r"nodes\[1\].seconds: it is 1100000000.0; seconds are from 0"),
    (["nodes", 1, "seconds"], float("nan"), "NaN is not a number"),
    (["nodes", 1, "seconds"], float("-inf"), "-Infinity is not a number"),
    (["nodes", 1, "seconds"], False, r"nodes\[1\].seconds: it is false"),
    (["nodes", 1, "seconds"], None, r"nodes\[1\].seconds: it is null"),
    (["nodes", 2, "nbytes"], -1, r"nodes\[2\].nbytes: it is -1"),
    (["nodes", 2, "nbytes"], 2**60 + 1, r"nodes\[2\].nbytes: it is 1152921504606846977; .* from 0 to"),
    (["nodes", 2, "nbytes"], 10**30, "the number 10000000000000000000... is too large"),
    (["nodes", 2, "nbytes"], 1.5, r"nodes\[2\].nbytes: it is the number 1.5; write a whole number of bytes"),
    (["nodes", 2, "nbytes"], "4KiB", r"nodes\[2\].nbytes: it is the text '4KiB'; write a whole number of bytes, 4096"),
    (["nodes", 2, "scratch"], -5, r"nodes\[2\].scratch: it is -5"),
    (["nodes", 2, "time"], 1, r"nodes\[2\]: the key 'time' is not known; keys: id, seconds, nbytes"),
    (["nodes", 2], 3, r"nodes\[2\]: it is the number 3, not an object"),
    (["nodes"], {}, "nodes: it is an object, not a list"),
    (["sinks", 0], "x", r"sinks\[0\]: there is no node 'x'"),
    (["sinks"], "d", "sinks: it is the text 'd', not a list"),
    (["outputs"], ["d"], "the key 'outputs' is not known"),
    (["format"], "onnx", "format: it is 'onnx', not 'keepless-graph'"),
    (["version"], 2, "version: it is 2, and this Keepless reads version 1"),
    (["version"], True, "version: it is True"),
    (["version"], [[]], "version: it is a list"),
    (["units"], {"time": "ms", "memory": "bytes"}, "units: times are in seconds and sizes in bytes"),
]

BAD_FULL = [
    (["ops", 2, "inputs", 1], "z", r"ops\[2\].inputs\[1\]: there is no value 'z'"),
    (
        ["ops", 1, "outputs"],
        ["state"],
        r"ops\[2\].inputs\[1\]: no op makes value 'mask', and it is not among the inputs",
    ),
    (["pinned", 1], "z", r"pinned\[1\]: there is no value 'z'"),
    (["ops", 4, "outputs"], [], r"pinned\[1\]: no op makes value 'dw', and it is not among the inputs"),
    (["inputs", 0], "z", r"inputs\[0\]: there is no value 'z'"),
    (["ops", 1, "outputs"], ["mask"], r"ops\[1\].outputs: an op that draws random numbers"),
    (["ops", 2, "outputs"], ["y", "y"], r"ops\[2\].outputs: it names a value twice"),
    (["ops", 2, "outputs"], ["y", "h"], r"ops\[2\]: the op makes a value that it reads"),
    (["ops", 2, "reuses"], [["h", "y"]], r"ops\[2\].reuses\[0\]: it is not a pair of an output and an input"),
    (["ops", 2, "reuses"], [["y"]], r"ops\[2\].reuses\[0\]: it is not a pair"),
    (["ops", 2, "reuses"], ["yh"], r"ops\[2\].reuses\[0\]: it is the text 'yh', not a list"),
    (["ops", 2, "effects"], ["magic"], r"ops\[2\].effects\[0\]: it is the text 'magic', which is none of rng, buffer"),
    (["ops", 2, "phase"], "middle", r"ops\[2\].phase: it is the text 'middle', which is none of forward, loss"),
    (["ops", 2, "phase"], "loss", r"ops\[3\].phase: it is the second loss op, after 'mul'"),
    (["ops", 3, "phase"], "forward", r"ops\[4\].phase: it is 'backward', and no op has the phase 'loss'"),
    (["ops", 2, "phase"], "backward", r"ops\[3\].phase: it is 'loss', and the op needs what is made in the backward"),
    (["ops", 2, "name"], "two\nlines", r"ops\[2\].name: .* one line"),
    (["ops", 2, "module"], 3, r"ops\[2\].module: it is the number 3, not a text"),
    (["ops", 2, "id"], ..., r"ops\[2\]: it has neither an id nor a name"),
    (["ops", 2, "scratch"], "1MB", r"ops\[2\].scratch: it is the text '1MB'"),
    (["ops", 2, "nbytes"], 1, r"ops\[2\]: the key 'nbytes' is not known"),
    (["ops", 2, "id"], "mm", r"ops\[2\].id: 'mm' is taken by ops\[0\]"),
    (["values", 2, "id"], "x", r"values\[2\].id: 'x' is taken by values\[0\]"),
    (["values", 2, "bytes"], ..., r"values\[2\]: the key 'bytes' is missing"),
    (["values", 2, "kind"], "weight", r"values\[2\].kind: it is the text 'weight', which is none of input, param"),
    (["values", 2, "shape"], [-1], r"values\[2\].shape\[0\]: it is -1; a whole number of elements"),
    (["values", 2, "bytes"], 2**60, "together; at most 2\\*\\*60"),
    (["links", 0, "bytes_per_second"], 0, r"links\[0\].bytes_per_second: it is 0, not a number above 0"),
    (["links"], [{"from": "a", "to": "b", "bytes_per_second": 1}] * 2, r"links\[1\]: there is a link from 'a' to 'b'"),
    (["links"], [{"from": "a", "to": "b"}], r"links\[0\]: the key 'bytes_per_second' is missing"),
    (["format"], ..., "the key 'format' is missing"),
    (["pinned"], ..., "the key 'pinned' is missing"),
    (["nodes"], [], "the key .* is not known"),
]


@pytest.mark.parametrize(
    ("base", "where", "to", "match"),
    [(plain, *case) for case in BAD_NODES] + [(full, *case) for case in BAD_FULL],
)
def test_what_is_wrong_is_refused_with_its_place(
    base: Callable[[], dict[str, Any]], where: list[Any], to: Any, match: str
) -> None:
    """One thing wrong with a good document is a GraphError that says where and what."""
    document = base()
    parse(document)
    change(where, to)(document)
    with pytest.raises(GraphError, match=match):
        parse(document)


WRONG = [None, True, -1, 0, 1.5, 2**61, 1e300, "", "x", "5 ms", [], ["x"], [[]], {}, {"a": 1}]


def places(found: Any, trail: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a document."""
    children = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    return ([trail] if trail else []) + [place for key, child in children for place in places(child, (*trail, key))]


@given(st.booleans(), st.integers(0, 10**6), st.sampled_from([*WRONG, ...]))
@settings(max_examples=500, deadline=None)
def test_anything_anywhere_is_refused_or_a_graph(is_plain: bool, number: int, wrong: Any) -> None:
    """Any place replaced by anything: a GraphError, or a graph whose order runs."""
    document = plain() if is_plain else full()
    found = places(document)
    change(list(found[number % len(found)]), wrong)(document)
    try:
        read = parse(document)
    except GraphError:
        return
    evaluate(read.graph, read.cost, list(range(len(read.graph.ops))))
    assert parse_graph(format_graph(read.graph, read.cost).encode()).graph == read.graph


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not JSON"),
        ("\x00", "not JSON"),
        ("null", "it is null, not an object"),
        ("[]", "it is a list, not an object"),
        ('"nodes"', "it is the text 'nodes', not an object"),
        ("{}", "the key 'format' is missing"),
        ('{"nodes": [], "nodes": []}', "the key 'nodes' twice"),
        ('{"nodes": [{"id": 1, "id": 2}]}', "the key 'id' twice"),
        ('{"nodes": [}', "not JSON"),
        ('{"nodes": []} {}', "not JSON"),
        ("__import__('os').system('true')", "not JSON"),
    ],
)
def test_text_that_is_no_graph_is_refused(text: str, match: str) -> None:
    """Texts that are not graphs are refused with the reason."""
    with pytest.raises(GraphError, match=match):
        parse_graph(text.encode())
    with pytest.raises(GraphError, match=r"not JSON"):
        parse_graph(text.encode() + b"\xff")


def test_a_file_that_is_cut_off_is_refused() -> None:
    """No beginning of a file is a graph."""
    data = json.dumps(full()).encode()
    for end in range(len(data)):
        with pytest.raises(GraphError):
            parse_graph(data[:end])


def test_the_file_is_named(tmp_path: Path) -> None:
    """Errors name the file; a file that is not there is the system's error; a byte order mark is no harm."""
    path = tmp_path / "graph.json"
    path.write_text("{")
    with pytest.raises(GraphError, match=r"graph\.json' cannot be used"):
        read_graph(path)
    with pytest.raises(FileNotFoundError):
        read_graph(tmp_path / "none.json")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(plain()).encode())
    assert read_graph(path) == parse(plain())


def test_a_graph_that_no_file_holds_is_not_written() -> None:
    """What could not be read again is an error of the writer."""
    value = Value(0, "v", 4, Kind.ACTIVATION)
    read = Op(0, "read", (0,), (), Phase.FORWARD)
    make = Op(1, "make", (), (0,), Phase.FORWARD)
    cost = CostModel((1.0, 1.0), (0, 0))
    with pytest.raises(GraphError, match="order"):
        format_graph(Graph((read, make), (value,), frozenset(), frozenset()), cost)
    huge = Graph((replace(make, id=0),), (replace(value, nbytes=2**61),), frozenset(), frozenset())
    with pytest.raises(GraphError, match="bytes"):
        format_graph(huge, CostModel((1.0,), (0,)))


HOSTILE = {
    "ten million ops": 'b\'{"nodes": [\' + b"{}," * 10_000_000 + b"{}]}"',
    "ten million ops in full": 'b\'{"ops": [\' + b"{}," * 10_000_000 + b"{}]}"',
    "more ops than are read": 'b\'{"nodes": [\' + b"{}," * 1_000_000 + b"{}]}"',
    "twenty million lists": 'b\'{"nodes": [\' + b"[]," * 20_000_000 + b"[]]}"',
    "thirty million numbers": 'b\'{"sinks": [\' + b"7," * 30_000_000 + b"7]}"',
    "small objects": 'b\'{"nodes": [\' + b\'{"id":0},\' * 2_900_000 + b"{}]}"',
    "small lists": 'b\'{"nodes": [\' + b"[7]," * 4_900_000 + b"[]]}"',
    "small texts": 'b\'{"sinks": [\' + b\'"ab",\' * 9_900_000 + b\'""], "nodes": []}\'',
    "a deep list": 'b\'{"nodes": \' + b"[" * 5_000_000',
    "a deep object": "b'{\"nodes\":' * 2_900_000",
    "a long number": 'b\'{"nodes": \' + b"9" * 60_000_000 + b"}"',
    "a long text": 'b\'{"format": "\' + b"x" * 60_000_000 + b\'", "nodes": []}\'',
    "one object with a million keys": ('b"{" + b",".join(b\'"%d": 0\' % n for n in range(1_000_000)) + b\', "0": 1}\''),
    "too large": "bytes(65 << 20)",
    "a cycle of a hundred thousand": (
        'b\'{"nodes": [\' + b",".join(b\'{"id": %d, "seconds": 1, "nbytes": 1, "inputs": [%d]}\' '
        '% (n, (n + 1) % 100_000) for n in range(100_000)) + b"]}"'
    ),
    "one op that reuses everything": (
        'b\'{"format": "keepless-graph", "version": 1, "inputs": [], "pinned": [], "values": [\' '
        '+ b",".join(b\'{"id": %d, "bytes": 1}\' % n for n in range(200_000)) + b\'], "ops": [{"id": 0, "seconds": 1, '
        '"inputs": [\' + b",".join(b"%d" % n for n in range(100_000)) + b\'], "outputs": [\' '
        '+ b",".join(b"%d" % n for n in range(100_000, 200_000)) + b\'], "reuses": [\' '
        '+ b",".join(b"[%d, %d]" % (n, n - 100_000) for n in range(100_000, 200_000)) + b"]}]}"'
    ),
}

CHILD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from keepless.cost import parse_graph
from keepless.errors import GraphError
data = {data}
try:
    parse_graph(data)
except GraphError as error:
    assert len(str(error)) < 500, len(str(error))
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_bounded_time_and_memory(kind: str) -> None:
    """In a process that has 1 GiB of memory and 20 s of processor, each ends with a short GraphError."""
    code = CHILD.format(data=HOSTILE[kind])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.strip()


WIDE = """
import resource
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
from keepless.cost import parse_graph
from keepless.ir import Budget
from keepless.ir.text import format_program, parse_program
from keepless.machine import simulate
from keepless.passes import evaluate, from_order, insert_drops, reuse_storage
num = 100_000
values = ", ".join('{"id": %d, "bytes": 1}' % n for n in range(2 * num))
ids, made = ", ".join(map(str, range(num))), ", ".join(map(str, range(num, 2 * num)))
pairs = ", ".join("[%d, %d]" % (num + n, n) for n in range(num))
text = (
    '{"format": "keepless-graph", "version": 1, "values": [' + values + '], "ops": [{"id": "make", "seconds": 1, '
    '"outputs": [' + ids + ']}, {"id": "wide", "seconds": 1, "inputs": [' + ids + '], "outputs": [' + made + '], '
    '"reuses": [' + pairs + ']}], "inputs": [], "pinned": [' + made + ']}'
)
file = parse_graph(text.encode())
found = evaluate(file.graph, file.cost, [0, 1])
program = reuse_storage(file.graph, from_order(file.graph, [0, 1]))
assert insert_drops(file.graph, program) == program
assert parse_program(format_program(program)) == program
assert simulate(file.graph, program, file.cost, budget=Budget({"device": num})).peak == found.peak == num
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_a_wide_op_takes_linear_time() -> None:
    """An op that takes over a hundred thousand storages is evaluated and simulated in 30 s of processor."""
    done = subprocess.run([sys.executable, "-c", WIDE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def test_a_file_of_more_bytes_than_are_read_is_refused_unread(tmp_path: Path) -> None:
    """A sparse file of 64 MiB and a byte is refused."""
    path = tmp_path / "graph.json"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_NBYTES + 1)
    with pytest.raises(GraphError, match="more than 67108864 bytes"):
        read_graph(path)


@pytest.mark.slow
def test_a_large_graph_is_read() -> None:
    """A chain of 100 000 nodes, listed backwards, is put in order."""
    num = 100_000
    nodes = [{"id": n, "seconds": 1e-3, "nbytes": 8, "inputs": [n - 1] if n else []} for n in range(num)]
    found = parse({"nodes": nodes[::-1], "sinks": [num - 1]})
    assert found.op_ids == tuple(map(str, range(num)))
    assert evaluate(found.graph, found.cost, list(range(num))).peak == 16


@given(SEEDS, st.integers(1, 14))
@settings(max_examples=100, deadline=None)
def test_an_order_is_read_as_it_was_written(seed: int, num_ops: int) -> None:
    """An order survives its text, and is not taken for a program, nor a program for an order."""
    case = random_case(seed, num_ops)
    ids = [f"op {op.id}" for op in case.graph.ops]
    text = format_order(case.order, ids)
    assert tuple(parse_order("# a comment\r\n\n" + text, case.graph, ids)) == case.order
    assert not looks_like_program(text, ids)
    assert looks_like_program("# a comment\n" + format_program(case.program), ids)


def test_lines_of_an_order_are_ids_or_names() -> None:
    """A line is an op's id, or the name of one op; anything else is refused with its line."""
    graph = parse(full()).graph
    ids = parse(full()).op_ids
    assert parse_order("mm\nmm backward\n  draw  \n", graph, ids) == [0, 4, 1]
    twins = replace(graph, ops=tuple(replace(op, name="twin") for op in graph.ops))
    assert parse_order("mm\n", twins, ids) == [0]
    with pytest.raises(PlanError, match="Line 2 of the order: 5 ops are called 'twin'; write an id"):
        parse_order("mm\ntwin\n", twins, ids)
    with pytest.raises(PlanError, match="Line 3 of the order: there is no op 'nothing'"):
        parse_order("mm\n\nnothing\n", graph, ids)
    with pytest.raises(PlanError, match="lines"):
        parse_order("\n" * 6_000_000, graph, ids)
    assert not looks_like_program("run 7\n", ["run 7"])
