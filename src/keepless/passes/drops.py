"""Drops on the device, derived from last uses.

`run 0 keep 0; run 1 keep 1; run 2 keep 2` with 2 pinned becomes `run 0 keep 0; run 1 keep 1; drop 0; ...`: a value
is forgotten right after the last instruction that needs it there. A copy from the device needs its source until its
`Wait`. Drops on other tiers stay where they are.
"""

from __future__ import annotations

from keepless.ir.graph import Graph
from keepless.ir.program import DEVICE, Copy, Drop, Instr, Program, Run, Wait
from keepless.machine.rules import reuse_pairs, rng_states


def insert_drops(graph: Graph, program: Program) -> Program:
    """The program with its drops on the device made anew; keep sets and all else stay. O(edges of the program).

    Raises nothing: a program that breaks a rule gives one that breaks a rule.
    """
    instrs = [instr for instr in program if not (isinstance(instr, Drop) and instr.tier == DEVICE)]
    from_device = _waits_for_device(instrs)
    states = rng_states(graph)
    needed = set(graph.pinned)
    backwards: list[Instr] = []
    for index in range(len(instrs) - 1, -1, -1):
        instr = instrs[index]
        made: tuple[int, ...] = ()
        used: tuple[int, ...] = ()
        consumed: set[int] = set()
        if isinstance(instr, Run):
            op = graph.ops[instr.op]
            made, used = instr.keep, op.inputs
            if instr.replay and op.id in states:
                used = (*used, states[op.id])
            if instr.reuse:
                kept = frozenset(made)
                consumed = {source for out, source in reuse_pairs(graph, op) if out in kept}
        elif isinstance(instr, Wait) and instr.tier == DEVICE:
            made = (instr.value,)
        elif (isinstance(instr, Wait) and index in from_device) or (isinstance(instr, Copy) and instr.src == DEVICE):
            used = (instr.value,)
        dying = [value for value in made if value not in needed]
        needed.difference_update(made)
        dying += [value for value in used if value not in needed and value not in consumed]
        needed.update(used)
        backwards.extend(Drop(value) for value in reversed(dying))
        backwards.append(instr)
    backwards.extend(Drop(value) for value in sorted(graph.inputs - needed, reverse=True))
    backwards.reverse()
    return Program(tuple(backwards))


def _waits_for_device(instrs: list[Instr]) -> set[int]:
    """Indices of the waits for copies whose source is the device."""
    flying: dict[tuple[int, str], str] = {}
    found = set()
    for index, instr in enumerate(instrs):
        if isinstance(instr, Copy):
            flying[instr.value, instr.dst] = instr.src
        elif isinstance(instr, Wait) and flying.pop((instr.value, instr.tier), "") == DEVICE:
            found.add(index)
    return found
