"""One notch tighter: the next program for a step that found less memory than was planned for.

A failed allocation says that the bytes predicted for that instruction were not there. The next program stays below them
at every instruction; the last one is that of the smallest peak. A worked use::

    notches = Notches(graph, cost)
    program = notches.below(program, index)     # less than `program` needs at `index`, everywhere
    program = notches.below(program, index)     # None: there is nothing tighter
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from keepless.cost import CostModel
from keepless.ir import Certificate, Graph, Phase, Program, Run, Status
from keepless.machine import simulate, verify
from keepless.solve.planner import Planner
from keepless.solve.search import Search
from keepless.solve.solution import solution

_SHARE = 0.75
"""Of what lies between the smallest peak and the bytes that were not there, so much is planned for."""
_NEAR = 1.02
"""Limits below the smallest peak times this are its."""


@dataclass(frozen=True)
class Notches:
    """Tighter programs of one step.

    What the optimizer needs beside the step counts for nothing here: no program of forward and backward changes it, and
    its peak would hide theirs.

    Arguments:
        graph: the step.
        cost: of its ops.
    """

    graph: Graph
    cost: CostModel

    @cached_property
    def planner(self) -> Planner:
        """Prepared once, for all notches."""
        pairs = zip(self.graph.ops, self.cost.scratch, strict=True)
        scratch = tuple(0 if op.phase is Phase.OPTIMIZER else nbytes for op, nbytes in pairs)
        return Planner(self.graph, replace(self.cost, scratch=scratch))

    def needed(self, program: Program, index: int) -> int:
        """Predicted bytes on the device while an instruction runs; the program's peak for an index of -1."""
        timeline = simulate(self.graph, program, self.planner.cost)
        return timeline.events[index].peak if 0 <= index < len(timeline.events) else timeline.peak

    def below(self, program: Program, index: int, *, at_once: bool = False) -> Program | None:
        """A verified program that needs less at every instruction than this one at the given one.

        Where the bytes at the instruction are the smallest peak's or less, it is the program of the smallest peak,
        which holds less on the whole; None where that one has failed.

        Arguments:
            at_once: go to the smallest peak, without the notches between.
        """
        planner, needed = self.planner, self.needed(program, index)
        low = planner.smallest
        limit = int(low.peak + (needed - low.peak) * _SHARE)
        order: list[int] | None = None
        if not at_once and limit > low.peak * _NEAR:
            found = next(iter(planner.firsts(limit, Search())), None)
            if found is not None and found.peak <= limit:
                order = found.order
        if order is None:
            order = low.order
        made = solution(self.graph, self.cost, list(order), Certificate("keepless", Status.FEASIBLE)).program
        if _order(made) == _order(program):
            made = solution(self.graph, self.cost, list(low.order), Certificate("keepless", Status.FEASIBLE)).program
            if _order(made) == _order(program):
                return None
        verify(self.graph, made)
        return made


def _order(program: Program) -> list[int]:
    return [instr.op for instr in program if isinstance(instr, Run)]
