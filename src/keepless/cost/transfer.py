"""Seconds of a new graph's ops from graphs of the same model that were measured.

An op that was measured itself (equal key) keeps its seconds. Any other takes those of the op that means the same in
the known graph of the nearest size, times the ratio of the bytes that differ between the two: for a linear layer these
are its activations, not its weight, and so its work. Seconds decide which plan is the fastest, never whether one is
right or fits: scratch bytes are not guessed here (`keepless.measure.measure_scratch` runs each op once for them).

Example: `mm` over 128 rows took 4 ms. Over 64 rows it reads 64 rows, the same weight, and writes 64 rows: 2 ms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keepless.cost.model import CostModel
from keepless.ir.graph import Graph, Op
from keepless.ir.matching import matched_ops

CALL_SECONDS = 4e-6
"""What a call of a small op takes however few bytes it moves."""
BYTES_PER_S = 5e9
"""For an op that nothing known resembles."""


@dataclass(frozen=True)
class KnownCosts:
    """A graph whose ops have costs."""

    graph: Graph
    cost: CostModel


def transferred_seconds(
    graph: Graph, known: Sequence[KnownCosts], exact: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Seconds by op key for every op of a graph. O(ops of the graph and of those known).

    Arguments:
        known: graphs with costs; the nearest in size serves.
        exact: seconds by op key that are known already.
    """
    seconds: dict[str, float] = dict(exact or {})
    for one in known:
        for op in one.graph.ops:
            if op.key and op.key not in seconds:
                seconds[op.key] = one.cost.seconds[op.id]
    size = _moved(graph)
    nearest = min(known, key=lambda one: abs(math.log(max(size, 1) / max(_moved(one.graph), 1))), default=None)
    like = matched_ops(graph, nearest.graph) if nearest is not None else [-1] * len(graph.ops)
    found: dict[str, float] = {}
    for op in graph.ops:
        if op.key in found:
            continue
        if op.key in seconds:
            found[op.key] = seconds[op.key]
        elif nearest is not None and like[op.id] >= 0:
            found[op.key] = _scaled(graph, op, nearest, like[op.id])
        else:
            found[op.key] = CALL_SECONDS + _nbytes(graph, (*op.inputs, *op.outputs)) / BYTES_PER_S
    return found


def scaled_scratch(graph: Graph, op: int, known: KnownCosts, like: int) -> int:
    """Scratch of an op that cannot be run alone (the caller's loss): that of the known one, more where its inputs are
    larger, never less."""
    now = _nbytes(graph, graph.ops[op].inputs)
    then = _nbytes(known.graph, known.graph.ops[like].inputs)
    scratch = known.cost.scratch[like]
    return scratch if now <= then or not then else -(-scratch * now // then)


def _scaled(graph: Graph, op: Op, known: KnownCosts, like: int) -> float:
    seconds, other = known.cost.seconds[like], known.graph.ops[like]
    here, there = (*op.inputs, *op.outputs), (*other.inputs, *other.outputs)
    if len(op.inputs) == len(other.inputs) and len(op.outputs) == len(other.outputs):
        differ = [
            (graph.values[a].nbytes, known.graph.values[b].nbytes)
            for a, b in zip(here, there, strict=True)
            if graph.values[a].nbytes != known.graph.values[b].nbytes
        ]
        now, then = sum(pair[0] for pair in differ), sum(pair[1] for pair in differ)
    else:
        now, then = _nbytes(graph, here), _nbytes(known.graph, there)
    ratio = now / then if now and then else 1.0
    return max(seconds * ratio, min(seconds, CALL_SECONDS))


def _nbytes(graph: Graph, values: Sequence[int]) -> int:
    return sum(graph.values[value].nbytes for value in values)


def _moved(graph: Graph) -> int:
    """Bytes that all ops read and write: the size of a step."""
    return sum(_nbytes(graph, (*op.inputs, *op.outputs)) for op in graph.ops)
