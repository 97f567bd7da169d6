"""Bytes over the step, by category and by module; and the JSON file of a predicted and a measured timeline.

The format is versioned (`docs/account.md`)::

    save_timeline("step.json", plan, measured=keepless.timeline(model, batch, plan))
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

from keepless.files import write_whole
from keepless.ir import DEVICE, Copy, Drop, Event, Phase, Run, Timeline, Wait
from keepless.machine import Plan, reuse_pairs
from keepless.reporting.account import CATEGORIES, Homes, block_of, holdings, op_at, peak_account
from keepless.reporting.measured_account import measured_account
from keepless.reporting.steps import predicted_steps

FORMAT, VERSION = "keepless-timeline", 1
PHASES = tuple(phase.value for phase in Phase)


def module_levels(plan: Plan) -> Iterator[dict[str, int]]:
    """Bytes by block of the model while each instruction runs, scratch at the running op's. They sum to its peak.

    O(edges of the program, and blocks for each instruction).
    """
    graph = plan.graph
    homes = Homes(graph, plan.signature)
    level: dict[str, int] = {}

    def add(value: int, sign: int) -> None:
        for block, nbytes in homes.shares(value).items():
            level[block] = level.get(block, 0) + sign * nbytes

    for value in sorted(graph.inputs):
        add(value, 1)
    for index, (instr, event) in enumerate(zip(plan.program, plan.predicted.events, strict=True)):
        dropped: int | None = None
        if isinstance(instr, Run):
            if instr.reuse:
                for out, source in reuse_pairs(graph, graph.ops[instr.op]):
                    if out in instr.keep:
                        add(source, -1)
            for value in instr.keep:
                add(value, 1)
        elif isinstance(instr, Copy) and instr.dst == DEVICE:
            add(instr.value, 1)
        elif isinstance(instr, Drop) and instr.tier == DEVICE:
            dropped = instr.value
        now = {block: nbytes for block, nbytes in level.items() if nbytes}
        op = op_at(plan, index)
        home = block_of(op.module) if op else ""
        scratch = event.peak - sum(level.values())
        if scratch:
            now[home] = now.get(home, 0) + scratch
        yield now
        if dropped is not None:
            add(dropped, -1)


def category_levels(plan: Plan) -> Iterator[dict[str, int]]:
    """Bytes by category while each instruction runs, in stacking order. They sum to its peak."""
    for held in holdings(plan.graph, plan.program, plan.predicted):
        yield {name: held.nbytes[name] for name in CATEGORIES}


def columns(rows: list[dict[str, int]]) -> dict[str, list[int]]:
    """One list per name, largest first; names that are nowhere are left out."""
    names = dict.fromkeys(name for row in rows for name, nbytes in row.items() if nbytes)
    found = {name: [row.get(name, 0) for row in rows] for name in names}
    return dict(sorted(found.items(), key=lambda item: (-max(item[1]), item[0])))


def what_runs(plan: Plan, index: int) -> str:
    """What an instruction does: "run", "replay", "copy", "wait" or "drop"."""
    instr = plan.program[index]
    if isinstance(instr, Run):
        return "replay" if instr.replay else "run"
    kinds: Mapping[type, str] = {Copy: "copy", Wait: "wait", Drop: "drop"}
    return kinds[type(instr)]


def event_row(plan: Plan, event: Event) -> dict[str, object]:
    """One event, with what ran; JSON values only."""
    row: dict[str, object] = {
        "instruction": event.index,
        "start": event.start,
        "end": event.end,
        "stall": event.stall,
        "resident": event.resident,
        "peak": event.peak,
    }
    op = op_at(plan, event.index)
    if event.label:
        row["phase"] = event.label
    elif op is not None:
        row |= {"phase": op.phase.value, "op": op.name, "module": op.module, "source": op.source}
    if event.index >= 0:
        row["what"] = what_runs(plan, event.index)
    return row


def timeline_dict(plan: Plan, measured: Timeline | None = None) -> dict[str, object]:
    """The predicted timeline of a plan, and a measured one beside it, as JSON values; see `docs/account.md`."""
    predicted = plan.predicted
    found: dict[str, object] = {
        "format": FORMAT,
        "version": VERSION,
        "tiers": sorted(predicted.peaks),
        "budget": dict(plan.budget.limits),
        "peaks": dict(predicted.peaks),
        "at_peak": peak_account(plan).as_dict(),
        "steps": {kind: step.as_dict() for kind, step in predicted_steps(plan).items()},
        "predicted": {
            "seconds": predicted.seconds,
            "events": [event_row(plan, event) for event in predicted.events],
            "categories": columns(list(category_levels(plan))),
            "modules": columns(list(module_levels(plan))),
        },
        "measured": None,
    }
    if measured is not None:
        found["measured"] = {
            "seconds": measured.seconds,
            "peaks": dict(measured.peaks),
            "events": [event_row(plan, event) for event in measured.events],
            "residues": residues(plan, measured),
            "account": measured_account(plan, measured).as_dict(),
        }
    return found


def residues(plan: Plan, measured: Timeline) -> list[int | None]:
    """Measured less predicted bytes of each measured event; None for one that is of no single instruction."""
    events = plan.predicted.events
    return [
        event.peak - events[event.index].peak if 0 <= event.index < len(events) else None for event in measured.events
    ]


def save_timeline(path: str | os.PathLike[str], plan: Plan, measured: Timeline | None = None) -> None:
    """Writes `timeline_dict` into a file, all of it or nothing.

    Raises:
        OSError: the file cannot be written.
    """
    write_json(path, timeline_dict(plan, measured))


def write_json(path: str | os.PathLike[str], content: Mapping[str, object]) -> None:
    """Writes JSON values into a file, all of them or nothing."""
    write_whole(path, json.dumps(content, allow_nan=False, separators=(",", ":")).encode())
