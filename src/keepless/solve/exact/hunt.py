"""The fastest order of all, for graphs of up to some twenty ops: best-first search over (ops done, resident values).

A* (Hart, Nilsson and Raphael 1968, "A formal basis for the heuristic determination of minimum cost paths") on the
pebble game with recomputation (Sethi 1975, "Complete register allocation problems"). A state is the set of ops that
ran, the set of resident values, and those of them that must be read before they are forgotten: what a replay made
(else it only costs), and what took over storage (else the machine does not count that). A move runs one op, for the
first time or again, after dropping no more than its bytes need. The cost so far is the seconds of replays; `outlook`
bounds what is still to come. A state that another one of the same ops reached no later, with all its values resident
and no more to be read, is not looked at.

It counts what the machine counts: scratch, storage reuse, recorded generator states, inputs that may be dropped.
Pinned values stay once they are made, as the caller may hold them: their ops run once.
States are exponential in the values; the limit of work is in states.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import NamedTuple, TypeAlias

from keepless.cost import CostModel
from keepless.ir import Graph, Phase
from keepless.machine import reuse_pairs
from keepless.passes import evaluate
from keepless.solve.exact.masks import Masks
from keepless.solve.exact.outlook import Outlook
from keepless.solve.search import Search, Standing

_MOST_PAIRS = 6
"""Outputs of one op that may take over storage; every subset of them is a way to run it."""
_SCANNED = 200
"""States of the same ops that a new one is compared with."""
_TOLD_EVERY = 20_000
_SMALL_OPS = 24
MOST_STATES = 20_000
"""That `hunted` looks at."""
_Move: TypeAlias = tuple[float, int, int, float]
"""Estimate and node of the state before, the op that runs, seconds of replays with it."""


def refusal(graph: Graph, most_ops: int) -> str:
    """Why a graph is not searched; nothing where it is."""
    if len(graph.ops) > most_ops:
        return f"not searched: {len(graph.ops)} ops, above {most_ops}"
    if any(len(reuse_pairs(graph, op)) > _MOST_PAIRS for op in graph.ops):
        return f"not searched: an op with more than {_MOST_PAIRS} outputs that may take over storage"
    return ""


def may_run_again(graph: Graph, backward_again: bool) -> list[bool]:
    """Per op, whether the search replays it: never what makes pinned values."""
    end = len(graph.ops) if graph.loss_op is None or backward_again else graph.loss_op
    may = [op.can_replay and op.phase is not Phase.LOSS and op.id < end for op in graph.ops]
    return [may[op.id] and not graph.pinned.intersection(op.outputs) for op in graph.ops]


@dataclass(frozen=True)
class Hunted:
    """What a search of a small graph gave.

    Arguments:
        order: the fastest within the limit; None where none was met.
        is_over: nothing else could be faster (or fit, where there is no order).
        states: that were looked at.
    """

    order: list[int] | None
    is_over: bool
    states: int


def hunted(graph: Graph, cost: CostModel, limit: int, *, any_order: bool, search: Search | None = None) -> Hunted:
    """Searches a graph of few ops until nothing could be faster, or for 20,000 states; larger ones not at all.

    Replays forward ops only, as plans for training steps do.

    Arguments:
        limit: bytes.
        any_order: also over orders of first runs.
        search: may end it.
    """
    if refusal(graph, _SMALL_OPS):
        return Hunted(None, False, 0)
    masks = Masks(graph, cost, may_run_again(graph, backward_again=False))
    peak = evaluate(graph, cost, range(len(graph.ops))).peak
    hunt = Hunt(masks, limit, any_order, search or Search(), MOST_STATES, peak)
    order = hunt.run()
    return Hunted(order, hunt.is_over, hunt.states)


class _State(NamedTuple):
    """Where a search is, as masks.

    Arguments:
        done: ops that ran.
        resident: values that are there.
        owed: values that must be read before they are forgotten: what replays made, and what took over storage.
    """

    done: int
    resident: int
    owed: int


class Hunt:
    """One search. Nodes are kept as columns: the node before, the op that ran, and the seconds of replays.

    Arguments:
        masks: the graph.
        limit: bytes.
        any_order: also over orders of first runs.
        search: counts states, and may end it.
        work: states, where the search says none.
        peak: of the captured order.
    """

    def __init__(self, masks: Masks, limit: int, any_order: bool, search: Search, work: int, peak: int) -> None:
        self.masks, self.limit, self.any_order, self.peak = masks, limit, any_order, peak
        self.search = search
        self.most = work if search.work is None else search.work
        self.states = 0
        self.bound = 0.0
        self.is_over = False
        self.useful = cache(masks.useful)
        self.wanted = cache(masks.wanted)
        self.outlook = None if any_order else Outlook(masks, limit)
        self._before = [-1]
        self._op = [-1]
        self._paid = [0.0]
        self._fronts: dict[int, list[tuple[float, int, int]]] = {}
        self._queue: list[tuple[float, int, int, _State]] = []

    def run(self) -> list[int] | None:
        """The fastest order; None where there is none, or where the work ended before (`is_over` is then False)."""
        masks, queue = self.masks, self._queue
        if masks.base_nbytes + masks.nbytes(masks.start) > self.limit:
            self.is_over = True
            return None
        heapq.heappush(queue, (0.0, 0, 0, _State(0, masks.start & self.useful(0), 0)))
        while queue:
            estimate, _, node, state = heapq.heappop(queue)
            self.bound = max(self.bound, estimate)
            if state.done == masks.all_done and not masks.pinned & ~state.resident and not state.owed & ~masks.pinned:
                self.is_over = True
                self.bound = self._paid[node]
                return self._path(node)
            if not self._expand(estimate, node, state):
                return None
        self.is_over = True
        return None

    def _path(self, node: int) -> list[int]:
        path = []
        while self._before[node] >= 0:
            path.append(self._op[node])
            node = self._before[node]
        return path[::-1]

    def _expand(self, estimate: float, node: int, state: _State) -> bool:
        """Push what one run leads to; False where the work is spent."""
        masks, done, resident = self.masks, state.done, state.resident
        useful = self.useful(done)
        held = masks.base_nbytes + masks.nbytes(resident) - self.limit
        for op_id in range(masks.num_ops):
            is_first = not done >> op_id & 1
            if is_first:
                needs, writes, then = masks.reads[op_id], masks.writes[op_id], done | 1 << op_id
                may = not masks.before[op_id] & ~done and not needs & ~resident
            else:
                needs, writes, then = masks.needs[op_id], masks.rewrites[op_id], done
                may = masks.is_again[op_id] and not needs & ~resident and bool(writes & useful & ~resident)
            # A run makes its outputs anew: what is there of them is forgotten first, unless the run reads it.
            gone = writes & resident & ~needs
            if may and not gone & state.owed:
                paid, promise = self._paid[node], 0
                if not is_first:
                    paid += masks.seconds[op_id]
                    made = writes & useful
                    # A replay that nothing reads only costs, unless it is the read that an input with several
                    # producers owes; with one, the op's first run has read it.
                    promise = made if made & (made - 1) == 0 and not needs & masks.several else 0
                after = _State(then, resident & ~gone, (state.owed & ~needs) | promise)
                excess = held - masks.nbytes(gone) + masks.makes[op_id]
                if not self._leave((estimate, node, op_id, paid), after, needs, writes, excess):
                    return False
            if is_first and not self.any_order:
                break
        return True

    def _leave(self, move: _Move, state: _State, needs: int, writes: int, excess: int) -> bool:
        """Push every way to make room for a run that exceeds the limit by these bytes."""
        masks, resident = self.masks, state.resident
        if excess <= 0:
            return self._push(move, state.done, resident | writes, state.owed)
        spare = resident & ~needs & ~state.owed & ~(self.wanted(state.done) & ~masks.makeable)
        for dropped in masks.drops(spare, excess):
            if not self._push(move, state.done, (resident & ~dropped) | writes, state.owed):
                return False
        for reuse in masks.reuses[move[2]]:
            left = excess - reuse.taken
            after = resident & ~reuse.sources
            for dropped in masks.drops(spare, left) if left > 0 else (0,):
                kept = ((after & ~dropped) | writes) & ~reuse.left
                if not self._push(move, state.done, kept, state.owed | reuse.credited):
                    return False
        return True

    def _push(self, move: _Move, done: int, resident: int, owed: int) -> bool:
        """Queue a state unless another one is as good; False where the work is spent."""
        estimate, node, op_id, paid = move
        if (self.search.work is None and self.states >= self.most) or not self.search.spend():
            return False
        self.states += 1
        resident &= self.useful(done)
        if owed & ~resident:
            return True
        front = self._fronts.setdefault(done, [])
        for other_paid, there, promised in front[-_SCANNED:]:
            if other_paid <= paid and not resident & ~there and not promised & ~owed:
                return True
        if self.outlook is None:
            to_come = self.masks.make_again(self.wanted(done) & ~resident, resident)[0]
        else:
            to_come = self.outlook.to_come(done.bit_count(), resident)
        if to_come == inf:
            return True
        front.append((paid, resident, owed))
        self._before.append(node)
        self._op.append(op_id)
        self._paid.append(paid)
        index = len(self._paid) - 1
        total = max(estimate, paid + to_come)
        heapq.heappush(self._queue, (total, -done.bit_count(), index, _State(done, resident, owed)))
        if self.states % _TOLD_EVERY == 0:
            base = float(sum(self.masks.seconds))
            self.search.report(Standing("exhaustive", inf, self.peak, base + self.bound, self.search.spent))
        return True
