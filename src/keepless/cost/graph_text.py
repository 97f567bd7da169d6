"""A graph with its costs as a JSON file that people can read and diff: the full form of `keepless.cost.exchange`."""

from __future__ import annotations

import json
from typing import Any

from keepless.cost.exchange import FORMAT, UNITS, VERSION, parse_graph
from keepless.cost.model import CostModel
from keepless.errors import GraphError
from keepless.ir.graph import Graph, Op, Value


def format_graph(graph: Graph, cost: CostModel) -> str:
    """The graph in the full form, one value or op per line; `parse_graph` gives both back.

    Raises:
        GraphError: a file cannot hold it: sizes or names beyond those that are read, or ops out of order.
    """
    head = {"format": FORMAT, "version": VERSION, "units": UNITS}
    links = [
        {"from": src, "to": dst, "bytes_per_second": float(link.bytes_per_s), "latency": float(link.latency)}
        for (src, dst), link in cost.links.items()
    ]
    parts = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in head.items()]
    parts += [_listed("values", [_value_row(value) for value in graph.values])]
    parts += [_listed("ops", [_op_row(op, cost) for op in graph.ops])]
    parts += [_listed("links", links)] if links else []
    parts += [
        f'"{name}": {json.dumps(sorted(ids))}' for name, ids in (("inputs", graph.inputs), ("pinned", graph.pinned))
    ]
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    again = parse_graph(text.encode("ascii"))  # what is written can be read
    if again.graph != graph or again.cost.seconds != cost.seconds:
        raise GraphError("The graph cannot be written: its ops are not in an order in which they can run.")
    return text


def _listed(name: str, rows: list[dict[str, Any]]) -> str:
    lines = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in rows)
    return f'"{name}": [\n{lines}\n]' if rows else f'"{name}": []'


def _value_row(value: Value) -> dict[str, Any]:
    row: dict[str, Any] = {"id": value.id, "name": value.name, "bytes": value.nbytes, "kind": value.kind.value}
    row |= {"dtype": value.dtype} if value.dtype else {}
    return row | ({"shape": value.shape} if value.shape else {})


def _op_row(op: Op, cost: CostModel) -> dict[str, Any]:
    row: dict[str, Any] = {"id": op.id, "name": op.name, "seconds": float(cost.seconds[op.id])}
    found = {
        "scratch": cost.scratch[op.id],
        "inputs": op.inputs,
        "outputs": op.outputs,
        "phase": op.phase.value,
        "effects": sorted(effect.value for effect in op.effects),
        "reuses": op.reuses,
        "module": op.module,
        "source": op.source,
        "key": op.key,
    }
    return row | {key: entry for key, entry in found.items() if entry}
