"""The timeline that a cost model predicts for a program.

Ops run one after another. Each link between two tiers has one queue of copies beside them, first come first served;
a `Wait` stalls the ops until its copy has arrived. Issuing a copy and forgetting a value take no time.
"""

from __future__ import annotations

from keepless.cost import CostModel
from keepless.ir.budget import Budget
from keepless.ir.graph import Graph
from keepless.ir.program import DEVICE, Copy, Program, Run, Wait
from keepless.ir.timeline import Event, Timeline
from keepless.machine.rules import Machine, limits_of


def simulate(graph: Graph, program: Program, cost: CostModel, *, budget: Budget | None = None) -> Timeline:
    """The predicted timeline of a program. O(edges of the program): about 3 us per instruction.

    Exact on the machine's terms: bytes are those of the rules; seconds are the cost model's.

    Arguments:
        budget: bytes per tier; a tier that it does not name may not be used. Without one, R7 is not checked.

    Raises:
        ProgramError: the program breaks a rule, as in `verify`.
    """
    machine = Machine(graph, limits=limits_of(budget), cost=cost, program=program)
    step, resident = machine.step, machine.resident
    op_seconds, values = cost.seconds, graph.values
    free_at: dict[tuple[str, str], float] = {}
    arrives_at: dict[tuple[int, str], float] = {}
    events: list[Event] = []
    now = 0.0
    for index, instr in enumerate(program):
        peak = step(instr)
        start, stall = now, 0.0
        if isinstance(instr, Run):
            now = start + op_seconds[instr.op]
        elif isinstance(instr, Copy):
            lane = (instr.src, instr.dst)
            link = cost.links[lane]
            done = max(now, free_at.get(lane, 0.0)) + link.latency + values[instr.value].nbytes / link.bytes_per_s
            free_at[lane] = arrives_at[instr.value, instr.dst] = done
        elif isinstance(instr, Wait):
            now = max(now, arrives_at[instr.value, instr.tier])
            stall = now - start
        events.append(Event(index, start, now, stall, resident[DEVICE], peak))
    machine.finish()
    return Timeline(tuple(events), dict(machine.peaks))
