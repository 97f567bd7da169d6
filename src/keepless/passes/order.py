"""From an order of ops to the program of least memory that runs it.

Solvers decide which ops run, and when; everything else follows. For the graph `0 -> a, 1: a -> b, 2: a, b -> c`
(c pinned), the order `0 1 0 2` gives::

    run 0 keep 0
    run 1 keep 1
    drop 0
    run 0 replay 1 keep 0
    run 2 keep 2
    drop 0
    drop 1

An instance of a value begins where one of its producers runs and dies at its last use before the next run of one
of its producers. Pinned values are made once, by the first of these runs: whoever was given them (the caller an output,
autograd a gradient) holds them from then on, and to make them again would be a second copy. A generator state lives
from its op's first run to the op's last replay. O(edges of the order).
"""

from __future__ import annotations

from collections.abc import Sequence

from keepless.errors import ProgramError
from keepless.ir.graph import Graph
from keepless.ir.program import Drop, Instr, Program, Run
from keepless.machine.rules import rng_states


def from_order(graph: Graph, order: Sequence[int]) -> Program:
    """The unique program of least memory that runs these ops in this order.

    Arguments:
        order: op ids, repeats allowed.

    Raises:
        ProgramError: R1 where an op reads a value that nothing made before, or is not in the graph; R6 where
            a pinned value is never made. Other rules are left to `verify`.
    """
    ops, num_ops = graph.ops, len(graph.ops)
    held = graph.pinned - graph.inputs
    replays = []
    counts = [0] * num_ops
    first_made: dict[int, int] = {}
    for position, op_id in enumerate(order):
        if not 0 <= op_id < num_ops:
            raise ProgramError(f"Position {position} of the order: there is no op {op_id}.", rule="R1", index=position)
        replays.append(counts[op_id])
        counts[op_id] += 1
        for value in ops[op_id].outputs:
            if value in held:
                first_made.setdefault(value, position)
    states = rng_states(graph)
    needed = bytearray(len(graph.values))
    for value in graph.pinned:
        needed[value] = 1
    backwards: list[Instr] = []
    for position in range(len(order) - 1, -1, -1):
        op, replay = ops[order[position]], replays[position]
        state = states.get(op.id)
        kept = []
        for value in op.outputs:
            if needed[value] and not (replay and value == state) and first_made.get(value, position) == position:
                needed[value] = 0
                kept.append(value)
        dying = []
        for value in op.inputs:
            if not needed[value]:
                needed[value] = 1
                dying.append(value)
        if replay and state is not None and not needed[state]:
            needed[state] = 1
            dying.append(state)
        backwards.extend(Drop(value) for value in reversed(dying))
        backwards.append(Run(op.id, replay, tuple(kept)))
    for value in sorted(graph.inputs, reverse=True):
        if not needed[value]:
            backwards.append(Drop(value))
        needed[value] = 0
    if any(needed):
        raise missing(graph, order)
    backwards.reverse()
    return Program(tuple(backwards))


def missing(graph: Graph, order: Sequence[int]) -> ProgramError:
    """The error of an order that reads a value which nothing made before, or that never makes a pinned one."""
    made = set(graph.inputs)
    for position, op_id in enumerate(order):
        op = graph.ops[op_id]
        for value in op.inputs:
            if value not in made:
                name = graph.values[value].name
                makers = [graph.where(graph.ops[maker]) for maker in graph.producers[value]]
                return ProgramError(
                    f"R1: position {position} of the order runs op {op_id} {graph.where(op)}, which reads value "
                    f"{value} {name!r} that nothing made before. Made by: {', '.join(makers) or 'no op'}.",
                    rule="R1",
                    index=position,
                )
        made.update(op.outputs)
    absent = sorted(graph.pinned - made)
    names = ", ".join(f"{value} {graph.values[value].name!r}" for value in absent[:5])
    return ProgramError(f"R6: the order never makes {len(absent)} pinned values: {names}.", rule="R6", index=len(order))
