"""The optimal persistent schedule of a heterogeneous chain: the paper and the recursion are in `rotor_table`.

The model's memory is that of the chain; gradients of parameters, values that may not be made again and storage reuse
are not in it. So the table is solved once for all memory sizes up to a little more than the limit, and the size is
found by bisection over the exact profiles. Chains from fine to coarse; a chain whose table would be too large is left
to the coarser ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from keepless.cost import CostModel
from keepless.ir import Graph
from keepless.solve.classics.chain import Chain, chains, order_of
from keepless.solve.classics.rotor_table import RotorTable, Slotted, rows_of
from keepless.solve.classics.trial import MOST_RUNS, Trial, turned
from keepless.solve.search import Search
from keepless.solve.solution import Solution
from keepless.solve.tables import Tables

_SPACE = "persistent schedules of stages: all of a stage or its input is kept"
_CELLS = 250_000_000
"""Largest table: the sum over rows of length times slots. Some seconds."""
_FEWEST_SLOTS = 100
_FINEST = 4
_UNITS = 200
"""Sizes of a slot that are compared."""
_MARGIN = 1.3
"""The model's memory reaches so far above the limit: sizes are rounded up, and storage reuse is not in it."""


@dataclass(frozen=True)
class Rotor:
    """Beaumont et al.'s schedule; of all memory sizes of the model the fastest that fits, else the lowest.

    Arguments:
        slots: that memory is divided into; up to 4 times as many where that rounds better.
    """

    slots: int = 400

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The best order over chains and memory sizes."""
        tables = Tables(graph, cost)
        trial = Trial("rotor", _SPACE, tables, limit_nbytes, search)
        if not trial.keeps_all:
            base = turned(tables)
            for chain in chains(base):
                if trial.is_over:
                    break
                self._sweep(base, chain, trial)
        return trial.answer(seed)

    def _sweep(self, tables: Tables, chain: Chain, trial: Trial) -> None:
        everything = float(chain.saved.sum() + np.maximum(chain.saving, chain.back).max() + chain.grads.max())
        room = max(_MARGIN * (trial.limit - tables.static_nbytes), 0.0)
        most = min(everything, max(room, everything / 64))
        while True:
            table = self._table(chain, most, trial.search)
            if table is None:
                return
            seconds = table.cost(1, chain.num)
            if np.isfinite(seconds).any() or most >= everything:
                break
            most = min(2 * most, everything)
        steps = np.flatnonzero(np.isfinite(seconds) & np.append(True, seconds[1:] < seconds[:-1])).tolist()
        trial.sweep(
            len(steps),
            lambda index: order_of(tables, chain, table.schedule(1, chain.num, steps[index]), MOST_RUNS),
        )

    def _table(self, chain: Chain, most: float, search: Search) -> RotorTable | None:
        """The table for up to `most` bytes; None where it would be too large, or the search ends it."""
        rows = rows_of(Slotted.of(chain, most / self.slots or 1.0), _CELLS // _FEWEST_SLOTS)
        if rows is None:
            return None
        allowed = min(_CELLS // int(rows.length.sum()), _FINEST * self.slots)
        unit = _unit(chain, most, min(self.slots, allowed), allowed)
        sizes = Slotted.of(chain, unit)
        rows = rows_of(sizes, _CELLS // _FEWEST_SLOTS)
        if rows is None:
            return None
        table = RotorTable(sizes, rows, math.ceil(most / unit), search)
        return table if table.is_complete else None


def _unit(chain: Chain, most: float, fewest: int, slots: int) -> float:
    """Bytes per slot, for `fewest` to `slots` slots: where rounding up adds the least to what may be kept."""
    cuts = chain.fresh[np.arange(chain.num), np.arange(1, chain.num + 1)]
    sizes, counts = np.unique(np.concatenate([chain.saved, cuts]), return_counts=True)
    total = float(sizes @ counts) or 1.0
    best, found = math.inf, 1.0
    for step in range(_UNITS):
        unit = max(most / fewest * (fewest / slots) ** (step / (_UNITS - 1)), 1.0)
        waste = float((np.ceil(sizes / unit - 1e-9) * unit) @ counts) / total
        if waste < best:
            best, found = waste, unit
    return found
