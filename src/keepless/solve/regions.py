"""Plans of nested regions: module calls that are kept, or recomputed as a whole in the backward.

The eager engine can replay a module call only from its beginning, with everything that its forward does. Its plans are
therefore sets of regions, nested or apart. A set fixes the order of ops: before the backward of the last op of a region
that saves anything, the region's forward ops run again, those of regions inside it among them, which then save nothing
and run once more before their own backward.

The search knows nothing but that order; what it costs, and what is resident when, follows from the machine's rules as
for every other solver. Nested checkpointing: Chen et al., arXiv 1604.06174, section 4.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, combinations

from keepless.cost import CostModel
from keepless.ir import Certificate, Graph, Status
from keepless.passes import evaluate
from keepless.solve.anytime import plan as plan_freely
from keepless.solve.bound import witness_text
from keepless.solve.floor import floor_bound
from keepless.solve.lagrange import Woven
from keepless.solve.planner import Planner
from keepless.solve.search import Search, Standing
from keepless.solve.solution import Solution, solution

NAME = "regions"
SPACE = "nested regions of module calls; the bound allows any number of recomputations of single forward ops"
_MOST_WORK = 20_000
_WORK_OPS = 4_000_000
"""Orders that are evaluated: so many in all, or as many as make so many ops."""
_FREE_OPS = 600
_BOUND_WORK = 300
"""Up to so many ops the default planner plans, too, evaluating so many orders: for its bound, and for a start."""
_FEW_REGIONS = 8
"""So many regions and fewer: every set is tried."""
_TAKEN = (1, 1, 1, 2, 2, 3)
"""How many regions an exchange takes in; it leaves out one less than another of these."""
_PATIENCE = 150
_RETURN = 25
"""Exchanges in vain before the search ends, and before it goes on from the best set again."""
_SLACK = 0.02
"""What a set to go on from may be slower than the best."""
_SAME = 1e-9
"""Relative: sums of seconds in another order."""
_MOSTLY = 0.9
"""Share of a region's seconds that the default planner runs again where the region is worth starting with."""

Chosen = frozenset[int]
"""Positions in `RegionTree.regions`."""


@dataclass(frozen=True, slots=True)
class Region:
    """Forward ops that can only be replayed together: ids `first` to `last`, both included."""

    first: int
    last: int


@dataclass(frozen=True)
class RegionTree:
    """The regions of a step: nested or apart, the outer one first.

    Forward ops have the ids 0 to `num_forward - 1`, then comes the LOSS op, then one backward op per forward op that is
    no hold, in reverse, then whatever the step ends with.

    Arguments:
        regions: by first op; of those that begin together the longer first.
        num_forward: forward ops.
        saving: forward ops that save a tensor for the backward.
        holds: for each region its first op, which only reads what a recompute holds. It runs once more where that is
            let go: when all is used up that the region saved. Empty where regions hold nothing.
    """

    regions: tuple[Region, ...]
    num_forward: int
    saving: frozenset[int]
    holds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for region, after in zip(self.regions, self.regions[1:], strict=False):
            assert region.first < after.first or (region.first == after.first and region.last > after.last)
        for number, outer in enumerate(self.parents):
            region = self.regions[number]
            assert 0 <= region.first <= region.last < self.num_forward
            assert outer < 0 or region.last <= self.regions[outer].last, "regions overlap"
        assert not self.holds or self.holds == tuple(region.first for region in self.regions)
        assert self.saving.isdisjoint(self.holds)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """For each region the innermost one around it, or -1."""
        found: list[int] = []
        around: list[int] = []
        for number, region in enumerate(self.regions):
            while around and self.regions[around[-1]].last < region.first:
                around.pop()
            found.append(around[-1] if around else -1)
            around.append(number)
        return tuple(found)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For each region those directly inside it."""
        table: list[list[int]] = [[] for _ in self.regions]
        for number, parent in enumerate(self.parents):
            if parent >= 0:
                table[parent].append(number)
        return tuple(map(tuple, table))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """How many regions are around each."""
        found: list[int] = []
        for parent in self.parents:
            found.append(found[parent] + 1 if parent >= 0 else 0)
        return tuple(found)

    def inside(self, number: int) -> Iterator[int]:
        """The regions inside one."""
        for child in self.children[number]:
            yield child
            yield from self.inside(child)

    def backward(self, op: int) -> int:
        """The backward op of a forward op; of a hold, which has none, that of the op before; of the LOSS op, itself."""
        return self._backward[op]

    @cached_property
    def _backward(self) -> tuple[int, ...]:
        holds = frozenset(self.holds)
        later = 2 * self.num_forward - len(holds)
        found: list[int] = []
        for op in range(self.num_forward):
            found.append(later)
            later -= op not in holds
        return (*found, self.num_forward)

    @cached_property
    def last_saving(self) -> tuple[int, ...]:
        """For each forward op the last one up to it that saves something, or -1."""
        found: list[int] = []
        for op in range(self.num_forward):
            found.append(op if op in self.saving else found[-1] if found else -1)
        return tuple(found)

    @cached_property
    def first_saving(self) -> tuple[int, ...]:
        """For each forward op the first one from it on that saves something, or `num_forward`."""
        found: list[int] = []
        for op in reversed(range(self.num_forward)):
            found.append(op if op in self.saving else found[-1] if found else self.num_forward)
        return tuple(reversed(found))

    def order(self, chosen: Chosen, num_ops: int) -> list[int]:
        """The order of ops in which a step runs whose chosen regions are recomputed.

        Arguments:
            num_ops: of the graph; ops beyond the backward keep their place.
        """
        # Before which backward op a region is let go (0) or runs again (1), and what runs there.
        rows = [(self.backward(begin), 1, first, -last) for begin, first, last in self.replays(chosen)]
        for number in chosen if self.holds else ():
            saver = self.first_saving[self.regions[number].first]
            if saver <= self.regions[number].last:
                rows.append((self.backward(saver) + 1, 0, self.holds[number], -self.holds[number]))
        order = list(range(self.num_forward + 1))
        here = self.num_forward + 1
        for place, _, first, last in sorted(rows):
            order.extend(range(here, place))
            here = place
            order.extend(range(first, 1 - last))
        order.extend(range(here, num_ops))
        return order

    def replays(self, chosen: Chosen) -> list[tuple[int, int, int]]:
        """For each chosen region: the forward op before whose backward it runs again, its first op then, and its last.

        A recompute ends at the last tensor that is wanted: one that the region itself saves, or the input of a region
        inside it.
        """
        found: list[tuple[int, int, int]] = []
        regions, last_saving = self.regions, self.last_saving
        inner: dict[int, list[Region]] = {}
        around: list[int] = []
        numbers = sorted(chosen)
        for number in numbers:
            while around and regions[around[-1]].last < regions[number].first:
                around.pop()
            if around:
                inner.setdefault(around[-1], []).append(regions[number])
            around.append(number)
        for number in numbers:
            region = regions[number]
            begin = last_saving[region.last]
            if begin < region.first:
                continue
            own, inside = begin, inner.get(number, [])
            for one in reversed(inside):
                if own > one.last:
                    break
                own = last_saving[one.first - 1] if one.first else -1
            last = max(own if own >= region.first else -1, inside[-1].first - 1 if inside else -1)
            found.append((begin, region.first, last))
        return found


@dataclass(frozen=True)
class Regions:
    """The search over sets of regions, as a solver."""

    tree: RegionTree

    def solve(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> Solution:
        """The fastest set of regions that was found within the limit."""
        return self.choose(graph, cost, limit_nbytes, seed, search)[0]

    def choose(
        self, graph: Graph, cost: CostModel, limit_nbytes: int, seed: int = 0, search: Search | None = None
    ) -> tuple[Solution, Chosen]:
        """The solution, and the regions that it recomputes."""
        course = _Course(self.tree, graph, cost, limit_nbytes, seed, search or Search())
        return course.run()

    def lowest(self, graph: Graph, cost: CostModel) -> tuple[int, Chosen]:
        """The lowest peak that the search finds, in bytes, and the regions that reach it."""
        course = _Course(self.tree, graph, cost, 0, 0, Search())
        best = course.lower(min(map(course.judged, course.starts()), key=lambda s: (s.peak, s.seconds)))
        return best.peak, best.chosen


@dataclass(frozen=True, slots=True)
class _Set:
    """A set of regions and what it costs."""

    chosen: Chosen
    seconds: float
    peak: int


@dataclass
class _Course:
    """One search on its way."""

    tree: RegionTree
    graph: Graph
    cost: CostModel
    limit: int
    seed: int
    search: Search
    bound: float = 0.0
    _known: dict[Chosen, _Set] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._begin = time.perf_counter()
        self._left = min(_MOST_WORK, _WORK_OPS // max(1, len(self.graph.ops)))
        seconds = self.cost.seconds
        self._weights = [sum(seconds[r.first : r.last + 1]) for r in self.tree.regions]
        self._until = list(accumulate(seconds[: self.tree.num_forward], initial=0.0))
        self._once = sum(seconds)

    def run(self) -> tuple[Solution, Chosen]:
        best = self.judged(frozenset())
        claim = Certificate(NAME, Status.OPTIMAL, SPACE, best.seconds, seed=self.seed)
        if best.peak > self.limit:
            planner = Planner(self.graph, self.cost)
            if len(self.graph.ops) <= _FREE_OPS:
                free = plan_freely(planner, self.limit, self.seed, Search(work=_BOUND_WORK))
                claim = replace(free.certificate, solver=NAME, space=SPACE, seed=self.seed)
                self.bound = claim.bound_seconds
                best = self._best([self._like(free.order)])
            else:
                best = self._best([])
                claim = self._certified(planner, best)
                self.bound = claim.bound_seconds
            if best.peak <= self.limit and len(self.tree.regions) > _FEW_REGIONS:
                best = self._exchange(best)
            self._tell(best)
        claim = replace(claim, bound_bytes=floor_bound(self.graph, self.cost)[0], status=self._status(best, claim))
        if best.peak <= self.limit:
            claim = replace(claim, bound_seconds=min(claim.bound_seconds, best.seconds))
        claim = replace(claim, solve_seconds=time.perf_counter() - self._begin)
        order = self.tree.order(best.chosen, len(self.graph.ops))
        return solution(self.graph, self.cost, order, claim), best.chosen

    def _status(self, best: _Set, claim: Certificate) -> Status:
        if best.peak > self.limit:
            floor = floor_bound(self.graph, self.cost)[0]
            return Status.PROVEN_INFEASIBLE if self.limit < floor else Status.NOT_FOUND
        if best.seconds <= claim.bound_seconds * (1 + 1e-9):
            return Status.OPTIMAL
        is_cut = self.search.is_cut_by_clock or self.search.is_interrupted
        return Status.TIME_LIMITED if is_cut else Status.FEASIBLE

    def _certified(self, planner: Planner, best: _Set) -> Certificate:
        """The bound of the relaxation where the best order is tight."""
        where = floor_bound(self.graph, self.cost)[1]
        order = self.tree.order(best.chosen, len(self.graph.ops))
        bound = planner.bound(self.limit, [Woven.judged(planner.tables, order)])
        seconds = self._once + bound.seconds
        return Certificate(NAME, Status.FEASIBLE, SPACE, seconds, witness=witness_text(bound, where), seed=self.seed)

    def _best(self, more: list[Chosen]) -> _Set:
        starts = [self.judged(chosen) for chosen in [*self.starts(), *more]]
        fits = sorted({s.chosen: s for s in starts if s.peak <= self.limit}.values(), key=lambda s: s.seconds)
        if not fits:
            low = self.lower(min(starts, key=lambda s: (s.peak, s.seconds)))
            if low.peak > self.limit:
                return low
            fits = [low]
        if len(self.tree.regions) <= _FEW_REGIONS:
            return self._best_of_all(fits[0])
        return min((self._descend(start) for start in fits[:3]), key=lambda s: (s.seconds, s.peak))

    def _best_of_all(self, best: _Set) -> _Set:
        """The best of every set of regions."""
        everything = range(len(self.tree.regions))
        for size in range(len(everything) + 1):
            for chosen in map(frozenset, combinations(everything, size)):
                if self._seconds(chosen) < best.seconds * (1 - _SAME):
                    if not self._may():
                        return best
                    other = self.judged(chosen)
                    best = other if other.peak <= self.limit else best
        return best

    def starts(self) -> list[Chosen]:
        """Sets to begin with: those of one depth, those down to a depth, the innermost ones, all."""
        tree = self.tree
        everything = frozenset(range(len(tree.regions)))
        found = [everything, frozenset(i for i in everything if not tree.children[i])]
        for depth in range(max(tree.depths, default=0) + 1):
            found.append(frozenset(i for i in everything if tree.depths[i] == depth))
            found.append(frozenset(i for i in everything if tree.depths[i] <= depth))
        return list(dict.fromkeys(found))

    def _like(self, order: Iterable[int]) -> Chosen:
        """The regions most of whose ops run again in an order of single ops."""
        times = [0] * self.tree.num_forward
        for op in order:
            if op < self.tree.num_forward:
                times[op] += 1
        seconds = self.cost.seconds
        found: set[int] = set()
        for number, region in enumerate(self.tree.regions):
            ops = range(region.first, region.last + 1)
            around = self.tree.parents[number]
            nested = 1
            while around >= 0:
                nested += around in found
                around = self.tree.parents[around]
            again = sum(seconds[op] for op in ops if times[op] > nested and op in self.tree.saving)
            whole = sum(seconds[op] for op in ops if op in self.tree.saving)
            if whole and again >= _MOSTLY * whole:
                found.add(number)
        return frozenset(found)

    def judged(self, chosen: Chosen) -> _Set:
        known = self._known.get(chosen)
        if known is None:
            order = self.tree.order(chosen, len(self.graph.ops))
            found = evaluate(self.graph, self.cost, order)
            known = self._known[chosen] = _Set(chosen, found.seconds, found.peak)
        return known

    def _may(self) -> bool:
        self._left -= 1
        return self._left >= 0 and self.search.spend()

    def _seconds(self, chosen: Chosen) -> float:
        until = self._until
        return self._once + sum(until[last + 1] - until[first] for _, first, last in self.tree.replays(chosen))

    def _tell(self, best: _Set) -> None:
        seconds = best.seconds if best.peak <= self.limit else float("inf")
        self.search.report(Standing(NAME, seconds, best.peak, self.bound, self.search.spent))

    def _first_better(self, best: _Set, moves: Callable[[_Set], Iterator[Chosen]]) -> _Set:
        """Goes through the moves, from the better set on after each that is faster and fits."""
        is_moving = True
        while is_moving:
            is_moving = False
            for chosen in moves(best):
                if not self._may():
                    return best
                if self._seconds(chosen) >= best.seconds * (1 - _SAME):
                    continue
                other = self.judged(chosen)
                if other.peak <= self.limit:
                    best, is_moving = other, True
                    self._tell(best)
                    break
        return best

    def _descend(self, best: _Set) -> _Set:
        """Leaves regions out, or takes others in their place, as long as the step becomes faster."""
        before = None
        while before is not best:
            before = best
            best = self._thinned(best, sorted(best.chosen, key=lambda i: (-self._weights[i], i)))
            best = self._first_better(best, self._replaced)
        return best

    def _thinned(self, best: _Set, order: Iterable[int]) -> _Set:
        """One pass over its regions in an order: each is left out where the rest still fits."""
        for number in order:
            if not self._may():
                break
            other = self.judged(best.chosen - {number})
            if other.peak <= self.limit and other.seconds <= best.seconds:
                best = other
        return best

    def _replaced(self, best: _Set) -> Iterator[Chosen]:
        """Sets in which a region gives way to those inside it, or to the one around it."""
        tree = self.tree
        for number in sorted(best.chosen, key=lambda i: (-self._weights[i], i)):
            rest = best.chosen - {number}
            if tree.children[number]:
                yield rest | frozenset(tree.children[number])
                for child in tree.children[number]:
                    if child not in rest:
                        yield rest | {child}
            parent = tree.parents[number]
            if parent >= 0 and parent not in best.chosen:
                yield best.chosen - frozenset(tree.inside(parent)) | {parent}

    def _exchange(self, best: _Set) -> _Set:
        """Takes in regions drawn at random, and leaves out again what the rest allows, in an order drawn at random.

        Goes on from what fits as long as it is not much slower; from the best where that gave nothing for a while.
        """
        draw = random.Random(self.seed)
        everything = range(len(self.tree.regions))
        vain, now = 0, best
        while vain < _PATIENCE and self._left > 0 and best.seconds > self.bound * (1 + 1e-9):
            if vain % _RETURN == _RETURN - 1:
                now = best
            vain += 1
            absent = [i for i in everything if i not in now.chosen]
            new = frozenset(draw.sample(absent, min(len(absent), draw.choice(_TAKEN))))
            old = frozenset(draw.sample(sorted(now.chosen), min(len(now.chosen), draw.choice(_TAKEN) - 1)))
            other = self.judged(now.chosen - old | new)
            if not self._may():
                break
            if other.peak > self.limit:
                continue
            dear = sorted(other.chosen, key=lambda i: -self._weights[i] * draw.uniform(0.3, 1.0))
            other = self._thinned(other, dear)
            if other.seconds <= best.seconds * (1 + _SLACK):
                now = other
            if other.seconds < best.seconds * (1 - _SAME):
                best, vain = other, 0
                self._tell(best)
        return best

    def lower(self, best: _Set) -> _Set:
        """Takes in or leaves out single regions as long as the peak falls, and no longer than it must."""
        is_moving = True
        while is_moving and best.peak > self.limit:
            is_moving = False
            for number in range(len(self.tree.regions)):
                if not self._may():
                    return best
                other = self.judged(best.chosen ^ {number})
                if (other.peak, other.seconds) < (best.peak, best.seconds):
                    best, is_moving = other, True
                    if best.peak <= self.limit:
                        break
        return best
