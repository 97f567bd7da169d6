"""A graph as bit masks over its values and ops, for searches over sets of resident values.

Values that are resident before and after the step and that no op makes never move; they have no bit. For values of
3, 5 and 9 bytes on bits 0, 1 and 2, the set {3 bytes, 9 bytes} is 0b101 and holds 12 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import inf

from keepless.cost import CostModel
from keepless.ir import Effect, Graph, Kind, Phase
from keepless.machine import reuse_pairs
from keepless.machine.rules import rng_states

_CHUNK = 12
_ORDERED = (Effect.RNG, Effect.COLLECTIVE, Effect.BUFFER)
"""Effects whose ops keep the graph's order among themselves."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """One way in which a run may take over storage.

    Arguments:
        taken: bytes that are taken over.
        sources: inputs that are gone with the run.
        left: outputs that must not be kept.
        credited: outputs that take the storage; each must be read, or be pinned, for the bytes to count.
    """

    taken: int
    sources: int
    left: int
    credited: int


class Masks:
    """What the search reads at each state. Lists are per op; masks have one bit per value that moves.

    Arguments:
        is_again: per op, whether the search may run it more than once.
    """

    def __init__(self, graph: Graph, cost: CostModel, is_again: list[bool]) -> None:
        producers = graph.producers
        always = {v for v in graph.inputs & graph.pinned if not producers[v]}
        moving = [value.id for value in graph.values if value.id not in always]
        self.bits = {v: 1 << i for i, v in enumerate(moving)}
        self.sizes = [graph.values[v].nbytes for v in moving]
        self.base_nbytes = sum(graph.values[v].nbytes for v in always)
        self.start = self.mask(graph.inputs)
        self.pinned = self.mask(graph.pinned)
        self.num_ops = len(graph.ops)
        self.all_done = (1 << self.num_ops) - 1
        self.is_again = is_again
        self.seconds = cost.seconds
        states = rng_states(graph)
        self.reads = [self.mask(op.inputs) for op in graph.ops]
        self.writes = [self.mask(op.outputs) for op in graph.ops]
        self.states = [self.bits[states[op.id]] if op.id in states else 0 for op in graph.ops]
        self.rewrites = [w & ~s for w, s in zip(self.writes, self.states, strict=True)]
        self.needs = [r | s for r, s in zip(self.reads, self.states, strict=True)]
        self.makes = [sum(graph.values[v].nbytes for v in op.outputs) + cost.scratch[op.id] for op in graph.ops]
        self.reuses = [self._reuses(graph, op_id) for op_id in range(self.num_ops)]
        self.makers = [producers[v] for v in moving]
        again = {v for op in graph.ops if is_again[op.id] for v in op.outputs if v != states.get(op.id)}
        self.several = self.mask(v for v in moving if len(producers[v]) > 1)
        given = graph.inputs
        self.makeable = self.mask(v for v in moving if v in again or len(producers[v]) + (v in given) > 1)
        self.before = self._before(graph)

    def mask(self, values: Iterable[int]) -> int:
        """The set as a mask; values without a bit are left out."""
        found = 0
        for v in values:
            found |= self.bits.get(v, 0)
        return found

    def nbytes(self, mask: int) -> int:
        """Bytes of a set of values."""
        total = 0
        for table in self._tables:
            if not mask:
                break
            total += table[mask & ((1 << _CHUNK) - 1)]
            mask >>= _CHUNK
        return total

    @cached_property
    def _tables(self) -> list[list[int]]:
        tables = []
        for first in range(0, len(self.sizes), _CHUNK):
            table = [0]
            for size in self.sizes[first : first + _CHUNK]:
                table += [total + size for total in table]
            tables.append(table)
        return tables

    def _reuses(self, graph: Graph, op_id: int) -> list[Reuse]:
        op = graph.ops[op_id]
        pairs = reuse_pairs(graph, op)
        usable = [pair for pair in pairs if pair[1] in op.inputs and pair[0] in self.bits]
        outs = self.mask(tuple(out for out, _ in pairs))
        found = []
        for count in range(1, len(usable) + 1):
            for chosen in combinations(usable, count):
                credited = self.mask(tuple(out for out, _ in chosen))
                taken = sum(graph.values[out].nbytes for out, _ in chosen)
                found.append(Reuse(taken, self.mask(tuple(s for _, s in chosen)), outs & ~credited, credited))
        return found

    def _before(self, graph: Graph) -> list[int]:
        """Per op, the ops that the rules want to have run before its first run, beside those whose values it reads."""
        last: dict[Effect, int] = dict.fromkeys(_ORDERED, 0)
        before = []
        forward_buffers = 0
        for op in graph.ops:
            wanted = 0
            for effect in _ORDERED:
                if effect in op.effects:
                    wanted |= last[effect]
                    last[effect] |= 1 << op.id
            if Effect.UPDATE in op.effects:
                for value in op.inputs:
                    if graph.values[value].kind is Kind.PARAM:
                        wanted |= sum(1 << reader for reader in graph.consumers[value] if reader < op.id)
            if op.phase is Phase.LOSS:
                wanted |= forward_buffers
            elif op.phase is Phase.FORWARD and Effect.BUFFER in op.effects:
                forward_buffers |= 1 << op.id
            before.append(wanted)
        return before

    def useful(self, done: int) -> int:
        """Values that a run after the ops `done` may read with effect on the result, and pinned ones."""
        found = self.pinned
        for op_id in range(self.num_ops):
            if not done >> op_id & 1:
                found |= self.reads[op_id]
        again = [p for p in range(self.num_ops - 1, -1, -1) if done >> p & 1 and self.is_again[p]]
        size = -1
        while found.bit_count() > size:
            size = found.bit_count()
            for op_id in again:
                if self.rewrites[op_id] & found:
                    found |= self.needs[op_id]
        return found

    def wanted(self, done: int) -> int:
        """Values that are read after the ops `done`, or pinned, and that no first run after them makes."""
        found, made = self.pinned, 0
        for op_id in range(self.num_ops):
            if not done >> op_id & 1:
                found |= self.reads[op_id]
                made |= self.writes[op_id]
        return found & ~made

    def make_again(self, missing: int, met: int) -> tuple[float, int]:
        """Seconds of runs without which these values cannot be made again, and `met` with all that they make or want.

        Infinite where nothing can make them. Each op is counted once, a value with several producers not at all, and
        what is in `met` not either: a lower bound.
        """
        total = 0.0
        met |= missing
        while missing:
            low = missing & -missing
            missing ^= low
            makers = self.makers[low.bit_length() - 1]
            if len(makers) > 1:
                continue
            if not low & self.makeable:
                return inf, met
            op_id = makers[0]
            total += self.seconds[op_id]
            missing &= ~self.rewrites[op_id]
            new = self.needs[op_id] & ~met
            missing |= new
            met |= new | self.rewrites[op_id]
        return total, met

    def drops(self, among: int, excess: int) -> Iterator[int]:
        """Each smallest set among these values that frees `excess` bytes; nothing where all are too few."""
        items = []
        while among:
            low = among & -among
            among ^= low
            size = self.sizes[low.bit_length() - 1]
            if size:
                items.append((size, low))
        # Largest first: a set that reaches the excess with its last and smallest member has no smaller one inside.
        items.sort(key=lambda item: (-item[0], item[1]))
        rest = [0] * (len(items) + 1)
        for i in range(len(items) - 1, -1, -1):
            rest[i] = rest[i + 1] + items[i][0]
        stack = [(0, 0, 0)]
        while stack:
            i, chosen, freed = stack.pop()
            if freed + rest[i] < excess:
                continue
            size, low = items[i]
            stack.append((i + 1, chosen, freed))
            if freed + size >= excess:
                yield chosen | low
            else:
                stack.append((i + 1, chosen | low, freed + size))
