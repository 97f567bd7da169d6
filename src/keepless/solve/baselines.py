"""The solvers that the planner is measured against: keep all, block checkpointing, recompute all.

Block checkpointing is what `torch.utils.checkpoint` does around blocks: a block's inputs are kept, and the whole
block runs again at once when its backward begins. Blocks are the repeated children of a module list where the graph
names modules ("transformer.h.0"), else stretches of the forward between narrow places.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from keepless.cost import CostModel
from keepless.ir import Certificate, Graph, Status
from keepless.solve.min_cut import MinCut
from keepless.solve.search import Search
from keepless.solve.segments import cut_at, families, find_cuts
from keepless.solve.solution import Solution, solution
from keepless.solve.tables import Tables
from keepless.solve.weave import lazy_order, strip

_BLOCK = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")
_CHAIN_BLOCKS = 64
"""Stretches that a forward without module names is divided into."""


@dataclass(frozen=True)
class KeepAll:
    """Every op runs once."""

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The captured order."""
        return _claim(graph, cost, list(range(len(graph.ops))), "keep_all", limit_nbytes, seed)


@dataclass(frozen=True)
class RecomputeAll:
    """Keeps borders only, and recomputes each segment lazily; of all families of borders the lowest peak."""

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The lowest of the lazy orders that keep borders only."""
        tables = Tables(graph, cost)
        orders = [lazy_order(tables, MinCut(tables, kept).everything()) for kept in families(tables, find_cuts(tables))]
        best = min(orders, key=lambda order: tables.lives(order).peak)
        return _claim(graph, cost, best, "recompute_all", limit_nbytes, seed)


@dataclass(frozen=True)
class EveryK:
    """Block checkpointing; of all block lengths k the fastest that fits, else the lowest.

    Arguments:
        k: blocks per checkpoint; 0 tries 1, 2, 3 and so on.
    """

    k: int = 0

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The best checkpointed order."""
        tables = Tables(graph, cost)
        best = list(range(len(graph.ops)))
        score: tuple[int, float, int] | None = None
        for order in self.orders(tables):
            lives = tables.lives(order)
            mine = (max(lives.peak - limit_nbytes, 0), lives.seconds, lives.peak)
            if score is None or mine < score:
                best, score = order, mine
        return _claim(graph, cost, best, "every_k", limit_nbytes, seed)

    def orders(self, tables: Tables) -> Iterator[list[int]]:
        """One order per block length."""
        blocks = block_ends(tables)
        for k in [self.k] if self.k else range(1, max(len(blocks) // 2, 1) + 1):
            yield checkpointed(tables, blocks, k)


def block_ends(tables: Tables) -> list[tuple[int, int]]:
    """First and last op of each block of the forward, in order."""
    spans: dict[str, tuple[int, int]] = {}
    for op in tables.graph.ops[: tables.loss]:
        found = _BLOCK.match(op.module)
        if found:
            name = found.group()
            spans[name] = (spans.get(name, (op.id, op.id))[0], op.id)
    if len(spans) > 1:
        return sorted(spans.values())
    cuts = find_cuts(tables)
    if len(cuts.positions) < 3:
        return [(0, tables.loss - 1)]
    chosen = cut_at(cuts, float(cuts.work[-1]) / _CHAIN_BLOCKS)
    ends = [int(cuts.positions[i]) for i in chosen]
    return list(zip([0, *(e + 1 for e in ends)], [*ends, tables.loss - 1], strict=True))


def checkpointed(tables: Tables, blocks: list[tuple[int, int]], k: int) -> list[int]:
    """The order in which every group of k blocks runs again at once when its backward begins."""
    group_of: dict[int, int] = {}
    members: list[list[int]] = []
    for first in range(0, len(blocks), k):
        group = blocks[first : first + k]
        inside = [p for a, b in group for p in range(a, b + 1) if tables.replayable[p]]
        group_of.update((p, len(members)) for p in inside)
        members.append(inside)
    done: set[int] = set()
    order: list[int] = []
    for op in range(tables.num_ops):
        if op > tables.loss:
            makers = {tables.producer[v] for v in tables.reads[op]}
            for group_id in sorted({group_of[p] for p in makers if p in group_of} - done, reverse=True):
                done.add(group_id)
                order.extend(members[group_id])
        order.append(op)
    return strip(tables, order)


def _claim(graph: Graph, cost: CostModel, order: list[int], name: str, limit: int, seed: int) -> Solution:
    found = solution(graph, cost, order, Certificate(name, Status.FEASIBLE, seed=seed))
    if found.peak <= limit:
        return found
    return solution(graph, cost, order, Certificate(name, Status.NOT_FOUND, seed=seed))
