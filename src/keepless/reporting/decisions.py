"""What a plan decides: which values cross from the forward to the backward, and which are made again.

A value is decided about if the forward makes it and something behind the loss reads it, with everything kept or
under the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum

from keepless.ir import DEVICE, Copy, Drop, Effect, Graph, Kind, Op, Phase, Run, format_bytes
from keepless.machine import Plan, reuse_pairs
from keepless.reporting.account import block_of


class Choice(Enum):
    """How the backward gets a value."""

    KEPT = "kept"
    RECOMPUTED = "recomputed"
    MOVED = "moved"


@dataclass(frozen=True)
class Decision:
    """One value's row.

    Arguments:
        value: its id.
        name: of the value.
        op: name of the op that makes it.
        module, source: where that op is.
        nbytes: of the value.
        choice: how the backward gets it.
        times: how often it is made again.
        seconds: that this takes; an op that makes several values again at once counts for the first of them.
        reason: in words.
    """

    value: int
    name: str
    op: str
    module: str
    source: str
    nbytes: int
    choice: Choice
    times: int
    seconds: float
    reason: str

    def as_dict(self) -> dict[str, object]:
        """JSON values only."""
        return asdict(self) | {"choice": self.choice.value}


@dataclass
class Block:
    """The decisions in one block of the model.

    Arguments:
        kept_nbytes: that cross from the forward to the backward.
        recomputed_nbytes: that the backward makes again, each value once.
        replays: runs of the block's ops beyond the first.
        seconds: of those runs.
    """

    name: str
    kept_nbytes: int = 0
    recomputed_nbytes: int = 0
    replays: int = 0
    seconds: float = 0.0
    decisions: list[Decision] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """The block in one phrase: where its seconds or its bytes go."""
        if self.replays:
            again = sorted((d for d in self.decisions if d.choice is Choice.RECOMPUTED), key=lambda d: -d.nbytes)
            names = list(dict.fromkeys(_short(d.op) for d in again))
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            return f"again: {shown}" if shown else "made again on the way to others"
        return "all kept: it fits" if self.kept_nbytes else "nothing is needed later"

    def as_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {
            "block": self.name,
            "kept_nbytes": self.kept_nbytes,
            "recomputed_nbytes": self.recomputed_nbytes,
            "replays": self.replays,
            "seconds": self.seconds,
            "reason": self.reason,
            "values": [decision.as_dict() for decision in self.decisions],
        }


def decisions(plan: Plan, by: Callable[[str], str] = block_of) -> list[Block]:
    """The plan's decisions, by block in the order of the forward. O(edges of the program).

    Arguments:
        by: the block of a module; `str` for rows of single modules.
    """
    seen = _Seen(plan)
    graph, cost = plan.graph, plan.cost
    blocks: dict[str, Block] = {}
    for op in graph.ops:
        if op.phase is Phase.FORWARD:
            name = by(op.module)
            block = blocks.setdefault(name, Block(name))
            block.replays += seen.replays.get(op.id, 0)
            block.seconds += seen.replays.get(op.id, 0) * cost.seconds[op.id]
            for value in op.outputs:
                if op.id == graph.producers[value][0] and (decision := _decide(plan, seen, op, value)):
                    block.decisions.append(decision)
                    if value in seen.at_loss:
                        block.kept_nbytes += decision.nbytes
                    if decision.choice is Choice.RECOMPUTED:
                        block.recomputed_nbytes += decision.nbytes
    return [block for block in blocks.values() if block.decisions or block.replays]


class _Seen:
    """What one walk over the program shows."""

    def __init__(self, plan: Plan) -> None:
        graph = plan.graph
        self.replays: dict[int, int] = {}
        self.made_again: dict[int, int] = {}
        self.moved: dict[int, str] = {}
        self.at_loss: set[int] = set()
        self.at_peak: set[int] = set()
        self.first_made: dict[int, int] = {}
        self.last_read: dict[int, int] = {}
        self.needed = {v for op in graph.ops if op.phase in (Phase.BACKWARD, Phase.OPTIMIZER) for v in op.inputs}
        self.peak_index = plan.predicted.peak_index if plan.predicted.events else -1
        present = set(graph.inputs)
        for index, instr in enumerate(plan.program):
            if isinstance(instr, Run):
                self._run(graph, index, instr, present)
            elif isinstance(instr, Copy):
                if instr.dst == DEVICE:
                    present.add(instr.value)
                else:
                    self.moved[instr.value] = instr.dst
            if index == self.peak_index:
                self.at_peak = set(present)
            if isinstance(instr, Drop) and instr.tier == DEVICE:
                present.discard(instr.value)

    def _run(self, graph: Graph, index: int, run: Run, present: set[int]) -> None:
        op = graph.ops[run.op]
        if op.phase is Phase.LOSS:
            self.at_loss = set(present)
        if run.replay:
            self.replays[op.id] = self.replays.get(op.id, 0) + 1
            for value in run.keep:
                self.made_again[value] = self.made_again.get(value, 0) + 1
        for value in op.inputs:
            self.last_read[value] = index
        for value in op.outputs:
            self.first_made.setdefault(value, index)
        if run.reuse:
            kept = frozenset(run.keep)
            present -= {source for out, source in reuse_pairs(graph, op) if out in kept}
        present.update(run.keep)

    def would_stand_at_peak(self, value: int) -> bool:
        """Whether the value is not there at the peak, and would be if it were kept."""
        spans = self.first_made.get(value, -1) < self.peak_index < self.last_read.get(value, -1)
        return spans and value not in self.at_peak


def _decide(plan: Plan, seen: _Seen, op: Op, value: int) -> Decision | None:
    graph = plan.graph
    times = seen.made_again.get(value, 0)
    kept = value in seen.at_loss
    if value in seen.moved:
        choice, reason = Choice.MOVED, f"moved to {seen.moved[value]} and fetched from there"
    elif kept and not times:
        choice, reason = Choice.KEPT, _why_kept(plan, seen, op, value)
    elif times:
        choice, reason = Choice.RECOMPUTED, _why_recomputed(plan, seen, op, value, times)
    else:
        return None
    first = min((v for v in op.outputs if v in seen.made_again), default=-1) == value
    again = seen.replays.get(op.id, 0) * plan.cost.seconds[op.id] if first else 0.0
    shown = graph.values[value]
    return Decision(value, shown.name, op.name, op.module, op.source, shown.nbytes, choice, times, again, reason)


def _why_kept(plan: Plan, seen: _Seen, op: Op, value: int) -> str:
    graph, shown, seconds = plan.graph, plan.graph.values[value], plan.cost.seconds[op.id]
    if shown.kind is Kind.RNG:
        return f"the generator's state: {op.name} draws from it again"
    if shown.kind is Kind.OUTPUT or value in graph.pinned:
        return "an output, which the caller holds"
    if not op.can_replay:
        effects = {
            Effect.BUFFER: "it writes a buffer",
            Effect.COLLECTIVE: "all ranks take part",
            Effect.CHOICE: "it picks indices, and made again it could pick others",
            Effect.OPAQUE: "no recompute reaches it",
            Effect.UPDATE: "it updates a parameter",
        }
        why = next((text for effect, text in effects.items() if effect in op.effects), "it has side effects")
        return f"its op runs once: {why}"
    if value not in seen.needed:
        readers = [reader for reader in graph.consumers[value] if reader in seen.replays]
        names = ", ".join(sorted({_short(graph.ops[reader].name) for reader in readers})[:3])
        return f"recomputing starts here ({names})" if names else "stays to the end of the forward"
    if Effect.RNG in op.effects:
        return f"the random mask: drawing again takes {format_seconds(seconds)}"
    return f"its op takes {format_seconds(seconds)}: others free more for less"


def _why_recomputed(plan: Plan, seen: _Seen, op: Op, value: int, times: int) -> str:
    graph = plan.graph
    spent = format_seconds(times * plan.cost.seconds[op.id])
    nbytes = format_bytes(graph.values[value].nbytes)
    if value not in seen.needed:
        readers = [graph.ops[reader] for reader in graph.consumers[value] if reader in seen.replays]
        names = ", ".join(sorted({_short(reader.name) for reader in readers})[:3])
        return f"on the way to {names or 'others'}, for {spent}"
    if seen.would_stand_at_peak(value):
        return f"frees {nbytes} at the peak for {spent}"
    return f"frees {nbytes} between forward and backward for {spent}"


def _short(name: str) -> str:
    """ "aten.mm.default" as "mm"."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else name


def format_seconds(seconds: float) -> str:
    """Seconds as people read them: "3.2 ms"."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.0f} us"
