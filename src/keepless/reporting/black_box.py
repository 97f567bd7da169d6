"""The black box: what was going on when an allocation failed, as one JSON document, and that document in words.

`docs/out-of-memory.md` has its format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from keepless.cost import CostModel
from keepless.ir import Graph, Program, Run, format_bytes
from keepless.ir.text import format_program
from keepless.machine import Plan, simulate
from keepless.reporting.account import CATEGORIES, holdings

FORMAT, VERSION = "keepless black box", 1


def program_fingerprint(program: Program) -> str:
    """SHA-256, in hex, of a program's text."""
    return hashlib.sha256(format_program(program).encode("ascii")).hexdigest()


def describe_instruction(graph: Graph, program: Program, index: int, cost: CostModel) -> dict[str, object]:
    """An instruction of a program: its op, where that comes from, and the bytes predicted while it runs."""
    instr = program[index]
    told: dict[str, object] = {"index": index, "of": len(program)}
    if isinstance(instr, Run):
        op = graph.ops[instr.op]
        told |= {
            "op": op.name,
            "phase": op.phase.value,
            "module": op.module,
            "source": op.source,
            "replay": instr.replay,
            "inputs": [_value(graph, value) for value in op.inputs],
            "outputs": [_value(graph, value) for value in op.outputs],
            "scratch_nbytes": cost.scratch[op.id],
        }
    return told


def _value(graph: Graph, value: int) -> dict[str, object]:
    found = graph.values[value]
    return {"name": found.name, "dtype": found.dtype, "shape": list(found.shape), "nbytes": found.nbytes}


def describe_timeline(graph: Graph, program: Program, cost: CostModel, index: int) -> dict[str, object]:
    """Predicted bytes by category, one row an instruction, up to and with the given one (-1: all of them)."""
    timeline = simulate(graph, program, cost)
    rows: list[list[object]] = []
    for held in holdings(graph, program, timeline):
        instr = program[held.index]
        name = graph.ops[instr.op].name if isinstance(instr, Run) else type(instr).__name__.lower()
        rows.append([held.index, name, *[held.nbytes[category] for category in CATEGORIES]])
        if held.index == index:
            break
    return {"columns": ["index", "op", *CATEGORIES], "rows": rows, "predicted_peak": timeline.peak}


def describe_phases(graph: Graph, program: Program, cost: CostModel) -> dict[str, dict[str, int]]:
    """Predicted bytes by category at the highest instruction of each phase; replays are the phase "recompute"."""
    highest: dict[str, dict[str, int]] = {}
    for held in holdings(graph, program, simulate(graph, program, cost)):
        instr = program[held.index]
        if isinstance(instr, Run):
            phase = "recompute" if instr.replay else graph.ops[instr.op].phase.value
            if sum(held.nbytes.values()) > sum(highest.get(phase, {"": -1}).values()):
                highest[phase] = {name: held.nbytes[name] for name in CATEGORIES}
    return highest


def describe_plan(plan: Plan) -> dict[str, object]:
    """The plan that stood in the model."""
    return {
        "engine": plan.engine,
        "budget": dict(plan.budget.limits),
        "predicted_peak": plan.predicted_peak,
        "measured_peak": plan.measured_peak,
        "smallest_budget": plan.smallest_budget,
        "baseline_peak": plan.baseline_peak,
        "solver": plan.certificate.solver,
        "fingerprint": program_fingerprint(plan.program),
    }


def black_box_text(document: Mapping[str, object]) -> str:
    """A black box in words, for people."""
    error, instr, plan, device = (_table(document, key) for key in ("error", "instruction", "plan", "device"))
    lines = [
        f"{document.get('time')}: out of memory in the {document.get('phase')}: {error.get('text')}",
    ]
    if "op" in instr:
        places = ", ".join(str(instr[key]) for key in ("module", "source") if instr.get(key))
        again = ", a replay" if instr.get("replay") else ""
        lines.append(f"at instruction {instr.get('index')} of {instr.get('of')}: {instr['op']} ({places}){again}")
    elif instr.get("source"):
        inside = f"in the module {instr['module']!r}" if instr.get("module") else "in the model's own code"
        lines.append(f"{inside} ({instr['source']})")
    timeline = _table(document, "timeline")
    columns, rows = timeline.get("columns"), timeline.get("rows")
    if "op" in instr and isinstance(columns, Sequence) and isinstance(rows, Sequence) and rows:
        last = rows[-1] if isinstance(rows[-1], Sequence) else ()
        lines.append(f"predicted there: {_bytes_text(dict(zip(columns[2:], last[2:], strict=False)))}")
    for phase, nbytes in _table(document, "phases").items():
        if isinstance(nbytes, Mapping):
            lines.append(f"predicted peak of the {phase}: {_bytes_text(nbytes)}")
    inputs = document.get("inputs")
    if isinstance(inputs, Sequence) and inputs:
        shapes = [f"{row['name']} {row['dtype']} {row['shape']}" for row in inputs if isinstance(row, Mapping)]
        lines.append(f"inputs: {'; '.join(shapes)}")
    budget = plan.get("budget")
    if isinstance(budget, Mapping) and isinstance(budget.get("device"), int):
        peak = plan.get("predicted_peak")
        size = format_bytes(peak) if isinstance(peak, int) else "?"
        lines.append(f"plan: {plan.get('engine')} engine, budget {format_bytes(budget['device'])}, peak {size}")
    facts = ", ".join(f"{key} {value}" for key, value in device.items() if value is not None)
    lines.append(f"device: {facts}")
    suggested = document.get("suggested_budget")
    if isinstance(suggested, int):
        lines.append(f"suggested budget: {suggested} bytes ({format_bytes(suggested)})")
    lines.append(f"what was done: {document.get('done')}")
    return "\n".join(lines)


def _table(document: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = document.get(key)
    return found if isinstance(found, Mapping) else {}


def _bytes_text(nbytes: Mapping[str, object]) -> str:
    held = [(name, n) for name, n in nbytes.items() if isinstance(n, int) and n]
    parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in held)
    return f"{format_bytes(sum(n for _, n in held))} ({parts})"
