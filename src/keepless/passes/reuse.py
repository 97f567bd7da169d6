"""Outputs take over the storage of inputs that die there.

`run 3 keep 7` then `drop 5` becomes `run 3 keep 7 reuse`, where op 3 has an in-place form that writes 7 over 5.
"""

from __future__ import annotations

from keepless.ir.graph import Graph
from keepless.ir.program import DEVICE, Drop, Instr, Program, Run
from keepless.machine.rules import reuse_pairs


def reuse_storage(graph: Graph, program: Program) -> Program:
    """The program with every run that may reuse storage doing so. O(instructions).

    A run does so where all the inputs whose storage its kept outputs would take over (`reuse_pairs`) are dropped
    right after it; those drops go. Results and rules are kept, and no instruction's peak grows.
    """
    pairs_of = {op.id: pairs for op in graph.ops if (pairs := reuse_pairs(graph, op))}
    instrs = program.instrs
    out: list[Instr] = []
    index = 0
    while index < len(instrs):
        instr = instrs[index]
        index += 1
        if not isinstance(instr, Run) or instr.reuse or instr.op not in pairs_of:
            out.append(instr)
            continue
        kept = frozenset(instr.keep)
        sources = {source for made, source in pairs_of[instr.op] if made in kept}
        drops: list[Drop] = []
        while index < len(instrs):
            follower = instrs[index]
            if not isinstance(follower, Drop) or follower.tier != DEVICE:
                break
            drops.append(follower)
            index += 1
        if sources and sources <= {drop.value for drop in drops}:
            out.append(Run(instr.op, instr.replay, instr.keep, reuse=True))
            drops = [drop for drop in drops if drop.value not in sources]
        else:
            out.append(instr)
        out.extend(drops)
    return Program(tuple(out))
