"""Whether a program keeps every rule of the machine."""

from __future__ import annotations

from keepless.cost import CostModel
from keepless.ir.budget import Budget
from keepless.ir.graph import Graph
from keepless.ir.program import Program
from keepless.machine.rules import Machine, limits_of


def verify(graph: Graph, program: Program, *, cost: CostModel | None = None, budget: Budget | None = None) -> None:
    """Check a program against rules R1 to R7. O(edges of the program).

    Arguments:
        cost: adds scratch to the peak, and says which links exist.
        budget: bytes per tier; a tier that it does not name may not be used. Without one, R7 is not checked.

    Raises:
        ProgramError: the first instruction that breaks a rule, with three lines of the program around it.
    """
    machine = Machine(graph, limits=limits_of(budget), cost=cost, program=program)
    for instr in program:
        machine.step(instr)
    machine.finish()
