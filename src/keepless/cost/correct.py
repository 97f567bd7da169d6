"""From a measured timeline to the costs that would have predicted it.

Ops are timed one at a time before planning; in a step they meet warm or cold caches, other threads and each other's
memory. A timeline of a step that ran says what they took there.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

from keepless.cost.model import CostModel, Origin
from keepless.ir.graph import Graph, Phase
from keepless.ir.program import Program, Run
from keepless.ir.timeline import Timeline

MOST_OFF = 10.0
"""An op's ratio of measured to predicted seconds is believed up to this factor from the median ratio."""


def op_ratios(graph: Graph, cost: CostModel, program: Program, measured: Timeline) -> dict[int, float]:
    """Measured over predicted seconds of each op that the timeline has an event of. O(events).

    Runs of one op, and of ops with equal keys, are one sample: their median. Ops that are predicted to take no time
    have no ratio, and neither have events without a known instruction, or with times that are no numbers.
    """
    samples: dict[str, list[float]] = {}
    names: dict[int, str] = {}
    for event in measured.events:
        seconds = event.end - event.start - event.stall
        known = 0 <= event.index < len(program) and math.isfinite(seconds) and seconds >= 0
        instr = program[event.index] if known else None
        if isinstance(instr, Run) and cost.seconds[instr.op] > 0:
            names[instr.op] = graph.ops[instr.op].key or f"op {instr.op}"
            samples.setdefault(names[instr.op], []).append(seconds / cost.seconds[instr.op])
    medians = {name: statistics.median(found) for name, found in samples.items()}
    return {op: medians[name] for op, name in names.items()}


def corrected_scratch(
    graph: Graph, cost: CostModel, program: Program, predicted: Timeline, measured: Timeline
) -> CostModel:
    """The cost model with the scratch bytes with which a measured step would have been predicted.

    An op's scratch grows, or shrinks to no less than zero, by what the measured bytes of its runs are above or below
    the predicted ones; of several runs the highest decides. Ops without a measured run keep theirs, as does the
    OPTIMIZER op, which is never run. What instructions beside `Run` hold is not an op's. O(events).

    Arguments:
        graph: the step.
        cost: what the program was planned with.
        program: what ran.
        predicted: its timeline under `cost`.
        measured: its timeline, whose events' peaks were measured; events may be missing.
    """
    before = {event.index: event.peak for event in predicted.events}
    off: dict[int, int] = {}
    for event in measured.events:
        instr = program[event.index] if 0 <= event.index < len(program) else None
        if isinstance(instr, Run) and event.index in before and graph.ops[instr.op].phase is not Phase.OPTIMIZER:
            found = event.peak - before[event.index]
            off[instr.op] = max(off.get(instr.op, found), found)
    scratch = [max(0, nbytes + off.get(op, 0)) for op, nbytes in enumerate(cost.scratch)]
    return replace(cost, scratch=tuple(scratch))


def corrected(graph: Graph, cost: CostModel, program: Program, measured: Timeline) -> CostModel:
    """The cost model with the seconds that a measured step of this program shows.

    An op that the timeline does not know takes the ratio of ops with its key, else keeps its seconds. A ratio that is
    more than `MOST_OFF` times off the median of all ratios is taken to be that far off. Scratch and links stay.

    Arguments:
        graph: the step.
        cost: what the program was planned with.
        program: what ran.
        measured: of it; events may be missing.
    """
    ratios = op_ratios(graph, cost, program, measured)
    if not ratios:
        return cost
    middle = statistics.median(ratios.values())
    low, high = middle / MOST_OFF, middle * MOST_OFF
    by_key = {graph.ops[op].key: ratio for op, ratio in ratios.items() if graph.ops[op].key}
    seconds = []
    for op, before in zip(graph.ops, cost.seconds, strict=True):
        ratio = ratios.get(op.id, by_key.get(op.key))
        seconds.append(before if ratio is None else before * min(max(ratio, low), high))
    return replace(cost, seconds=tuple(seconds), origin=Origin.MEASURED, disturbed=0.0)
