"""An address for every block of a program, so that blocks which stand at once do not overlap.

A *block* is one piece of storage from the run that allocates it to the drop that frees it; where outputs take over an
input's storage, the block goes on. This is dynamic storage allocation: NP-hard (Garey and Johnson 1979, problem SR2).
`plan_addresses` places blocks one by one, each into the lowest gap that is free over its whole life (or the smallest),
in several orders, large and long-lived ones first; then it shakes the best order and places again. A tiny worked use::

    blocks = blocks_of(graph, program, cost)
    plan = plan_addresses(blocks, alignment=512)
    plan.nbytes, plan.bound       # bytes of the arena, and the most that stands at once: no plan needs less
    check_addresses(blocks, plan)

Quality is `plan.nbytes / plan.bound`; at 1 the plan is optimal.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keepless.cost import CostModel
from keepless.errors import ArenaError
from keepless.ir.graph import Graph, Kind
from keepless.ir.program import DEVICE, Copy, Drop, Program, Run
from keepless.machine.rules import reuse_pairs

ROUNDS = 24
"""Placements that are tried at most after the first orders."""
SHAKE = 0.02
"""Deviation by which a block changes its place in the order, as a share of all places."""


@dataclass(frozen=True, slots=True)
class Block:
    """Storage over a part of a program.

    Arguments:
        start: the instruction that allocates it.
        end: the first instruction at which it is free again.
        nbytes: of it.
        members: (instruction, value) of each run that writes a value into it, in order; empty for scratch.
        kept: whether the first of these is kept by its run.
    """

    start: int
    end: int
    nbytes: int
    members: tuple[tuple[int, int], ...] = ()
    kept: bool = True


@dataclass(frozen=True, slots=True)
class AddressPlan:
    """Offsets for blocks.

    Arguments:
        offsets: bytes from the arena's beginning, per block.
        nbytes: of the arena.
        bound: the most that stands at once, rounded to the alignment: no plan needs less.
        alignment: of which each offset is a multiple.
    """

    offsets: tuple[int, ...]
    nbytes: int
    bound: int
    alignment: int

    @property
    def quality(self) -> float:
        """Bytes over the bound; 1 is optimal."""
        return self.nbytes / self.bound if self.bound else 1.0


def blocks_of(graph: Graph, program: Program, cost: CostModel | None = None) -> list[Block]:
    """The blocks that a verified program allocates on the device, what stands before the step left out.

    Outputs that a run does not keep are blocks of that instruction, and so is its scratch where there is a cost model.
    Generator states are not storage of the device.
    """
    found: list[Block] = []
    living: dict[int, tuple[int, list[tuple[int, int]]]] = {}
    end = len(program)

    def close(value: int, index: int) -> None:
        start, members = living.pop(value, (0, []))
        if members and graph.values[members[0][1]].nbytes:
            found.append(Block(start, index, graph.values[members[0][1]].nbytes, tuple(members)))

    for index, instr in enumerate(program):
        if isinstance(instr, Drop) and instr.tier == DEVICE:
            close(instr.value, index)
        elif isinstance(instr, Copy) and instr.dst == DEVICE:
            living[instr.value] = (index, [(index, instr.value)])
        elif isinstance(instr, Run):
            op, kept = graph.ops[instr.op], frozenset(instr.keep)
            taken = {out: source for out, source in reuse_pairs(graph, op) if out in kept} if instr.reuse else {}
            for value in op.outputs:
                item = graph.values[value]
                if value in taken or item.kind is Kind.RNG:
                    continue
                if value in kept:
                    living[value] = (index, [(index, value)])
                elif item.nbytes:
                    found.append(Block(index, index + 1, item.nbytes, ((index, value),), kept=False))
            for out, source in taken.items():
                if source in living:
                    start, members = living.pop(source)
                    living[out] = (start, [*members, (index, out)])
            if cost is not None and cost.scratch[op.id]:
                found.append(Block(index, index + 1, cost.scratch[op.id]))
    for value in list(living):
        close(value, end)
    return sorted(found, key=lambda block: (block.start, block.end, block.members))


def plan_addresses(blocks: Sequence[Block], *, alignment: int = 512, rounds: int = ROUNDS) -> AddressPlan:
    """Offsets for blocks. O(placements * blocks^2), in vectors.

    The same blocks give the same plan.

    Arguments:
        alignment: bytes, to which sizes are rounded up, too.
        rounds: placements after the first orders; it ends early where the bound is met.
    """
    if not blocks:
        return AddressPlan((), 0, 0, alignment)
    sizes = np.array([-(-block.nbytes // alignment) * alignment for block in blocks], dtype=np.int64)
    starts = np.array([block.start for block in blocks], dtype=np.int64)
    ends = np.array([block.end for block in blocks], dtype=np.int64)
    bound = _most_at_once(sizes, starts, ends)
    spans = ends - starts
    scale = np.floor(np.log2(sizes))
    keys = [(-sizes, -spans), (-sizes, starts), (-scale, -spans), (-scale, starts), (starts, -sizes)]
    best, height, order = np.zeros_like(sizes), -1, np.arange(len(sizes))
    for key in keys:
        tried = np.lexsort(key[::-1])
        for tight in (False, True):
            if height != bound:
                offsets, top = _place(tried, sizes, starts, ends, tight=tight)
                if height < 0 or top < height:
                    best, height, order = offsets, top, tried
    generator = np.random.default_rng(0)
    for _ in range(rounds):
        if height == bound:
            break
        # What sticks out over the bound is placed earlier, and some blocks change their places in the order.
        rank = np.empty(len(order))
        rank[order] = np.arange(len(order)) + generator.normal(0, len(order) * SHAKE, len(order))
        rank[(best + sizes) > bound] *= generator.random()
        tried = np.argsort(rank, kind="stable")
        offsets, top = _place(tried, sizes, starts, ends, tight=False)
        if top <= height:
            best, height, order = offsets, top, tried
    return AddressPlan(tuple(int(offset) for offset in best), height, bound, alignment)


def _place(
    order: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    *,
    tight: bool,
) -> tuple[npt.NDArray[np.int64], int]:
    """Offsets and height where each block in turn takes the lowest gap that holds it among those placed before that
    stand at the same time (`tight`: the smallest such gap)."""
    sizes, starts, ends = sizes[order], starts[order], ends[order]
    placed = np.zeros(len(order), dtype=np.int64)
    for number in range(len(order)):
        meets = (starts[:number] < ends[number]) & (ends[:number] > starts[number])
        lows = placed[:number][meets]
        if not len(lows):
            continue
        by_low = np.argsort(lows, kind="stable")
        reach = np.maximum.accumulate((lows + sizes[:number][meets])[by_low])
        gaps = lows[by_low] - np.concatenate(([0], reach[:-1]))
        fits = np.flatnonzero(gaps >= sizes[number])
        if not len(fits):
            placed[number] = reach[-1]
            continue
        chosen = fits[np.argmin(gaps[fits])] if tight else fits[0]
        placed[number] = reach[chosen - 1] if chosen else 0
    offsets = np.empty_like(placed)
    offsets[order] = placed
    return offsets, int((placed + sizes).max())


def _most_at_once(sizes: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> int:
    change = np.zeros(int(ends.max()) + 1, dtype=np.int64)
    np.add.at(change, starts, sizes)
    np.subtract.at(change, ends, sizes)
    return int(np.cumsum(change).max())


def check_addresses(blocks: Sequence[Block], plan: AddressPlan) -> None:
    """Checks that no two blocks overlap while both stand, by a sweep over the program. O(blocks log blocks).

    It shares nothing with the solver.

    Raises:
        ArenaError: they do, or an offset is not aligned or outside of the arena.
    """
    if len(blocks) != len(plan.offsets):
        raise ArenaError(f"The address plan has {len(plan.offsets)} offsets for {len(blocks)} blocks.")
    changes = [(block.end, 0, number) for number, block in enumerate(blocks)]
    changes += [(block.start, 1, number) for number, block in enumerate(blocks)]
    standing: list[tuple[int, int, int]] = []  # (offset, end, block)
    for _, begins, number in sorted(changes):
        block, offset = blocks[number], plan.offsets[number]
        here = (offset, offset + block.nbytes, number)
        if not begins:
            if block.end > block.start:
                standing.pop(bisect_left(standing, here))
            continue
        if block.end <= block.start or not block.nbytes:
            raise ArenaError(f"Block {number} stands at no time, or has no bytes: {block}.")
        if offset % plan.alignment or offset < 0 or here[1] > plan.nbytes:
            raise ArenaError(
                f"Block {number} at {offset} of {block.nbytes} bytes is not aligned to {plan.alignment}, or outside of "
                f"the arena of {plan.nbytes}."
            )
        at = bisect_left(standing, here)
        for other in standing[max(0, at - 1) : at + 1]:
            if other[0] < here[1] and here[0] < other[1]:
                raise ArenaError(
                    f"Blocks {other[2]} (bytes {other[0]} to {other[1]}) and {number} ({here[0]} to {here[1]}) overlap "
                    f"while both stand, at instruction {block.start}."
                )
        insort(standing, here)
