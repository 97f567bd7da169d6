"""Graphs with their costs as JSON, for other people's graphs and tools. `docs/graph-format.md` describes the format.

Two forms are read. The full form has all that a `Graph` has::

    {"format": "keepless-graph", "version": 1, "units": {"time": "seconds", "memory": "bytes"},
     "values": [{"id": "x", "bytes": 4096}, {"id": "y", "bytes": 4096}],
     "ops": [{"id": "relu", "seconds": 0.001, "inputs": ["x"], "outputs": ["y"]}],
     "inputs": ["x"], "pinned": ["x", "y"]}

A plain DAG has one output per node, and every node may run any number of times::

    {"nodes": [{"id": 0, "seconds": 1.0, "nbytes": 8, "inputs": []}, {"id": 1, ..., "inputs": [0]}], "sinks": [1]}

Ops may be listed in any order; `Graph.ops` is that order where the ops can run so, else a topological one. Files come
from strangers: every number, type, key and size is checked, and what is wrong is a `GraphError` that says where.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import Any

from keepless.cost.model import CostModel, Link
from keepless.errors import GraphError
from keepless.ir import strict_json as read
from keepless.ir.budget import MAX_NBYTES
from keepless.ir.graph import Effect, Graph, Kind, Op, Phase, Value
from keepless.ir.sorting import runnable_order

FORMAT = "keepless-graph"
VERSION = 1
MAX_OPS = 1_000_000
MAX_VALUES = 2_000_000
MAX_SECONDS = 1e9
"""Thirty years: a longer op is a mistake."""
UNITS = {"time": "seconds", "memory": "bytes"}

_KINDS = {kind.value: kind for kind in Kind}
_PHASES = {phase.value: phase for phase in Phase}
_EFFECTS = {effect.value: effect for effect in Effect}
_RANKS = {phase: rank for rank, phase in enumerate(Phase)}
_OP_KEYS = ("id", "name", "scratch", "inputs", "outputs", "phase", "effects", "reuses", "module", "source", "key")
"""Of an op in the full form, beside its seconds."""


@dataclass(frozen=True)
class GraphFile:
    """A graph as a file gave it.

    Arguments:
        graph: the graph.
        cost: seconds and scratch of its ops, links between tiers.
        op_ids: the file's id of each op in `graph.ops`, or its name where it has no id.
    """

    graph: Graph
    cost: CostModel
    op_ids: tuple[str, ...]


def read_graph(path: str | os.PathLike[str]) -> GraphFile:
    """The graph in a file of at most 64 MiB.

    Raises:
        GraphError: it cannot be read; says the file, and the place in it.
        OSError: there is no such file, or it cannot be opened.
    """
    try:
        return parse_graph(read.read_bytes(path))
    except GraphError as error:
        raise GraphError(f"The graph file {os.fspath(path)!r} cannot be used. {error}") from error


def parse_graph(data: bytes) -> GraphFile:
    """The graph that the bytes of a file mean. O(bytes, and edges log ops where ops are not listed in order).

    Raises:
        GraphError: it cannot be read; says the place.
    """
    document = read.load(data)
    del data
    is_plain = "nodes" in document
    keys = ("nodes",) if is_plain else ("format", "version", "ops", "values", "inputs", "pinned")
    table = read.fields(document, "", keys, ("format", "version", "units", "sinks") if is_plain else ("units", "links"))
    if table.get("format", FORMAT) != FORMAT:
        read.refuse("format", f"it is {read.shown(table['format'])}, not {FORMAT!r}")
    version = table.get("version", VERSION)
    if type(version) is not int or version != VERSION:
        read.refuse("version", f"it is {read.shown(version)}, and this Keepless reads version {VERSION}")
    if table.get("units", UNITS) != UNITS:
        read.refuse("units", f"times are in seconds and sizes in bytes: {json.dumps(UNITS)}")
    return _plain(table) if is_plain else _full(table)


def _plain(table: dict[str, Any]) -> GraphFile:
    """A DAG of nodes with one output each: value i is what op i makes."""
    nodes = read.rows(table["nodes"], "nodes", MAX_OPS)
    known: dict[str, int] = {}
    ids: list[str] = []
    for number, row in enumerate(nodes):
        place = f"nodes[{number}]"
        read.fields(row, place, ("id", "seconds", "nbytes"), ("inputs", "name", "scratch"))
        ids.append(read.new_identity(row, place, known, number))
    reads, costs, names = [], [], []
    for number, row in enumerate(nodes):
        place = f"nodes[{number}]"
        reads.append(read.distinct(read.references(row.get("inputs", []), f"{place}.inputs", known, "node")))
        costs.append(_costs(row, place))
        names.append(read.text(row.get("name", ids[number]), f"{place}.name"))
    sizes = [read.whole(row["nbytes"], f"nodes[{number}].nbytes", MAX_NBYTES) for number, row in enumerate(nodes)]
    if "sinks" in table:
        sinks = set(read.references(table["sinks"], "sinks", known, "node"))
    else:
        sinks = set(range(len(nodes))).difference(*reads)
    makes = [(number,) for number in range(len(nodes))]
    order = runnable_order(reads, makes, (), len(nodes), [0] * len(nodes), ids.__getitem__)
    place_of = dict(zip(order, range(len(order)), strict=True))
    ops = tuple(
        Op(at, names[number], read.distinct([place_of[v] for v in reads[number]]), (at,), Phase.FORWARD)
        for at, number in enumerate(order)
    )
    values = tuple(
        Value(at, names[number], sizes[number], Kind.OUTPUT if number in sinks else Kind.ACTIVATION, "")
        for at, number in enumerate(order)
    )
    graph = Graph(ops, values, frozenset(), frozenset(place_of[number] for number in sinks))
    return _file(graph, [costs[number] for number in order], {}, [ids[number] for number in order])


def _full(table: dict[str, Any]) -> GraphFile:
    value_rows = read.rows(table["values"], "values", MAX_VALUES)
    op_rows = read.rows(table["ops"], "ops", MAX_OPS)
    known: dict[str, int] = {}
    names = []
    for number, row in enumerate(value_rows):
        place = f"values[{number}]"
        read.fields(row, place, ("bytes",), ("id", "name", "kind", "dtype", "shape"))
        own = read.new_identity(row, place, known, number)
        names.append(read.text(row["name"], f"{place}.name", printable=False) if "name" in row else own)
    inputs = frozenset(read.references(table["inputs"], "inputs", known, "value"))
    drafts, costs, ids = [], [], []
    known_ops: dict[str, int] = {}
    for number, row in enumerate(op_rows):
        place = f"ops[{number}]"
        read.fields(row, place, ("seconds",), _OP_KEYS)
        ids.append(read.new_identity(row, place, known_ops, number))
        drafts.append(_draft(row, place, ids[-1], known))
        costs.append(_costs(row, place))
    made = inputs.union(*(op.outputs for op in drafts))
    pinned = read.references(table["pinned"], "pinned", known, "value")
    _check_made(pinned, made, "pinned", names)
    for number, row in enumerate(op_rows):
        if not made.issuperset(drafts[number].inputs):
            reads = read.references(row["inputs"], f"ops[{number}].inputs", known, "value")
            _check_made(reads, made, f"ops[{number}].inputs", names)
    order = runnable_order(
        [op.inputs for op in drafts],
        [op.outputs for op in drafts],
        inputs,
        len(names),
        [_RANKS[op.phase] for op in drafts],
        ids.__getitem__,
    )
    maker = {value: op for op in reversed(drafts) for value in op.outputs}
    values = tuple(
        _value(row, number, names[number], inputs, maker.get(number)) for number, row in enumerate(value_rows)
    )
    _check_phases(drafts, order, ids)
    _check_states(drafts, values)
    ops = tuple(replace(drafts[number], id=at) for at, number in enumerate(order))
    graph = Graph(ops, values, inputs, frozenset(pinned))
    links = _links(table.get("links", []))
    return _file(graph, [costs[number] for number in order], links, [ids[number] for number in order])


def _draft(row: dict[str, Any], place: str, own: str, known: dict[str, int]) -> Op:
    """The op, with its number in the list still to come."""
    inputs = read.references(row.get("inputs", []), f"{place}.inputs", known, "value")
    outputs = read.references(row.get("outputs", []), f"{place}.outputs", known, "value")
    made, wanted = set(outputs), set(inputs)
    if len(made) < len(outputs):
        read.refuse(f"{place}.outputs", "it names a value twice")
    if not made.isdisjoint(wanted):
        read.refuse(
            place, "the op makes a value that it reads; a changed value is a new value (see 'reuses' for its storage)"
        )
    pairs = []
    for at, entry in enumerate(read.rows(row.get("reuses", []), f"{place}.reuses", MAX_VALUES)):
        pair = read.references(entry, f"{place}.reuses[{at}]", known, "value")
        if len(pair) != 2 or pair[0] not in made or pair[1] not in wanted:
            read.refuse(f"{place}.reuses[{at}]", "it is not a pair of an output and an input of the op")
        pairs.append((pair[0], pair[1]))
    effects = read.rows(row.get("effects", []), f"{place}.effects", len(_EFFECTS))
    return Op(
        id=-1,
        name=read.text(row.get("name", own), f"{place}.name"),
        inputs=read.distinct(inputs),
        outputs=tuple(outputs),
        phase=read.member(row.get("phase", "forward"), f"{place}.phase", _PHASES),
        effects=frozenset(read.member(word, f"{place}.effects[{at}]", _EFFECTS) for at, word in enumerate(effects)),
        reuses=tuple(pairs),
        module=read.text(row.get("module", ""), f"{place}.module"),
        source=read.text(row.get("source", ""), f"{place}.source"),
        key=read.text(row.get("key", ""), f"{place}.key"),
    )


def _value(row: dict[str, Any], number: int, name: str, inputs: frozenset[int], maker: Op | None) -> Value:
    place = f"values[{number}]"
    if "kind" in row:
        kind = read.member(row["kind"], f"{place}.kind", _KINDS)
    elif number in inputs:
        kind = Kind.INPUT
    else:
        kind = Kind.GRAD if maker is not None and maker.phase is not Phase.FORWARD else Kind.ACTIVATION
    shape = read.rows(row.get("shape", []), f"{place}.shape", 64)
    return Value(
        number,
        name,
        read.whole(row["bytes"], f"{place}.bytes", MAX_NBYTES),
        kind,
        read.text(row.get("dtype", ""), f"{place}.dtype"),
        tuple(read.whole(size, f"{place}.shape[{at}]", MAX_NBYTES, "elements") for at, size in enumerate(shape)),
    )


def _costs(row: dict[str, Any], place: str) -> tuple[float, int]:
    return (
        read.seconds(row["seconds"], f"{place}.seconds", MAX_SECONDS),
        read.whole(row.get("scratch", 0), f"{place}.scratch", MAX_NBYTES),
    )


def _links(found: object) -> dict[tuple[str, str], Link]:
    links: dict[tuple[str, str], Link] = {}
    for number, row in enumerate(read.rows(found, "links", 1000)):
        place = f"links[{number}]"
        read.fields(row, place, ("from", "to", "bytes_per_second"), ("latency",))
        lane = read.identity(row["from"], f"{place}.from"), read.identity(row["to"], f"{place}.to")
        if lane in links:
            read.refuse(place, f"there is a link from {lane[0]!r} to {lane[1]!r} already")
        speed = row["bytes_per_second"]
        if isinstance(speed, bool) or not isinstance(speed, (int, float)) or not 0 < speed <= MAX_NBYTES:
            read.refuse(f"{place}.bytes_per_second", f"it is {read.shown(speed)}, not a number above 0 up to 2**60")
        links[lane] = Link(float(speed), read.seconds(row.get("latency", 0.0), f"{place}.latency", MAX_SECONDS))
    return links


def _check_made(values: list[int], made: frozenset[int], place: str, names: list[str]) -> None:
    for at, value in enumerate(values):
        if value not in made:
            read.refuse(
                f"{place}[{at}]", f"no op makes value {read.shown(names[value])}, and it is not among the inputs"
            )


def _check_phases(drafts: list[Op], order: list[int], ids: list[str]) -> None:
    """One loss op at most, and forward, loss, backward and optimizer after one another."""
    losses = [number for number, op in enumerate(drafts) if op.phase is Phase.LOSS]
    if len(losses) > 1:
        read.refuse(f"ops[{losses[1]}].phase", f"it is the second loss op, after {read.shown(ids[losses[0]])}")
    highest = -1
    for number in order:
        phase = drafts[number].phase
        if _RANKS[phase] > _RANKS[Phase.LOSS] and not losses:
            read.refuse(f"ops[{number}].phase", f"it is {phase.value!r}, and no op has the phase 'loss'")
        if highest >= 0 and _RANKS[phase] < _RANKS[drafts[highest].phase]:
            after = drafts[highest].phase.value
            read.refuse(
                f"ops[{number}].phase", f"it is {phase.value!r}, and the op needs what is made in the {after} phase"
            )
        highest = number


def _check_states(drafts: list[Op], values: tuple[Value, ...]) -> None:
    for number, op in enumerate(drafts):
        if Effect.RNG in op.effects and not (op.outputs and values[op.outputs[-1]].kind is Kind.RNG):
            read.refuse(
                f"ops[{number}].outputs",
                "an op that draws random numbers (effect 'rng') has as its last output a value of kind 'rng', the "
                "generator's state before the draw",
            )


def _file(
    graph: Graph, costs: list[tuple[float, int]], links: dict[tuple[str, str], Link], ids: list[str]
) -> GraphFile:
    total = sum(value.nbytes for value in graph.values) + max((scratch for _, scratch in costs), default=0)
    if total > MAX_NBYTES:
        read.refuse("", f"its values and the largest scratch are {total} bytes together; at most 2**60 are read")
    cost = CostModel(tuple(seconds for seconds, _ in costs), tuple(scratch for _, scratch in costs), links)
    return GraphFile(graph, cost, tuple(ids))
