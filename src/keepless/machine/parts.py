"""Which engine runs which part of a model, and why; and how much of what a step saves a plan can decide about.

A plan of blocks says in its signature which module calls are captured, which are recomputed as a whole, and why the
whole step, or a block, was not captured::

    blocks   model.layers.0 ... model.layers.11   12 calls
    as it is everything else                               The model's forward needs a tensor's data at model.py:88 ...
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from keepless.ir import Graph, Kind, Phase
from keepless.ir.budget import format_bytes

GRAPH, BLOCKS, EAGER, AS_IT_IS = "graph", "blocks", "eager", "as it is"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a model.

    Arguments:
        paths: of its modules; empty for the model itself, or for everything else.
        engine: "graph", "blocks" (captured calls), "eager" (calls that are kept, or recomputed as a whole) or "as it
            is" (eager code that the plan does not touch).
        calls: in one step.
        reason: why it is not captured; empty where it is.
    """

    paths: tuple[str, ...]
    engine: str
    calls: int
    reason: str = ""

    @property
    def name(self) -> str:
        """The paths in short: "h.0 ... h.11"."""
        if len(self.paths) <= 2:
            return ", ".join(self.paths) or ("everything else" if self.engine == AS_IT_IS else "(model)")
        return f"{self.paths[0]} ... {self.paths[-1]}"

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return {"paths": list(self.paths), "engine": self.engine, "calls": self.calls, "reason": self.reason}


def parts_of(signature: Mapping[str, object]) -> tuple[Part, ...]:
    """The parts of a plan's model, by its signature."""
    engine = str(signature.get("engine", GRAPH))
    not_graph = str(signature.get("not_graph", ""))
    if engine == GRAPH:
        return (Part((), GRAPH, 1),)
    if engine != BLOCKS:
        why = [str(signature.get(key, "")) for key in ("not_graph", "not_blocks")]
        return (Part((), EAGER, 1, " ".join(dict.fromkeys(filter(None, why)))),)
    segments = _alike((str(row[0]), "") for row in _rows(signature, "segments"))
    captured = [Part(paths, BLOCKS, calls) for paths, calls, _ in segments]
    reasons = {(row[0], row[1]): str(row[2]) for row in _rows(signature, "reasons")}
    regions = _alike((str(row[0]), reasons.get((row[0], row[1]), "")) for row in _rows(signature, "regions"))
    around = _alike((str(row[0]), str(row[2])) for row in _rows(signature, "around"))
    return (
        *captured,
        *(Part(paths, EAGER, calls, reason) for paths, calls, reason in regions),
        *(Part(paths, AS_IT_IS, calls, reason) for paths, calls, reason in around),
        Part((), AS_IT_IS, 1, not_graph),
    )


def describe_parts(signature: Mapping[str, object]) -> list[str]:
    """The parts in sentences; nothing for a step that is captured as a whole."""
    parts = parts_of(signature)
    lines = _data_sizes(signature)
    if len(parts) == 1:
        return ([f"eager engine: {parts[0].reason}"] if parts[0].reason else []) + lines
    for part in parts:
        what = {
            BLOCKS: "captured",
            EAGER: "kept, or recomputed as a whole",
            AS_IT_IS: "as it is",
        }[part.engine]
        calls = f" ({part.calls} calls)" if part.calls > 1 else ""
        lines.append(f"{part.name}{calls}: {what}" + (f". {part.reason}" if part.reason else ""))
    return lines


def _data_sizes(signature: Mapping[str, object]) -> list[str]:
    match signature.get("data_sizes"):
        case [list(names), int(nbytes)]:
            return [f"sizes depend on the data ({', '.join(map(str, names))}): {format_bytes(nbytes)} are kept free"]
    return []


def managed_share(graph: Graph) -> float:
    """Of the bytes that the forward makes and the backward reads, the share that a plan may drop and make again."""
    managed = total = 0
    for op in graph.ops:
        if op.phase is not Phase.FORWARD:
            continue
        for value in op.outputs:
            item = graph.values[value]
            late = any(graph.ops[reader].phase is Phase.BACKWARD for reader in graph.consumers[value])
            if late and item.kind in (Kind.ACTIVATION, Kind.OUTPUT):
                total += item.nbytes
                managed += item.nbytes if op.can_replay and value not in graph.pinned else 0
    return managed / total if total else 0.0


def _rows(signature: Mapping[str, object], name: str) -> list[list[object]]:
    rows = signature.get(name)
    return [row for row in rows if isinstance(row, list) and len(row) > 2] if isinstance(rows, list) else []


def _alike(rows: Iterable[tuple[str, str]]) -> list[tuple[tuple[str, ...], int, str]]:
    """Rows of (path, reason) that differ in numbers alone, together: paths, how many rows, the first reason."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for path, reason in rows:
        groups.setdefault((re.sub(r"\d+", "*", path), re.sub(r"\d+", "*", reason)), []).append((path, reason))
    return [
        (tuple(dict.fromkeys(path for path, _ in members)), len(members), members[0][1]) for members in groups.values()
    ]
