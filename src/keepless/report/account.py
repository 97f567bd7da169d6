"""Where the bytes are: by category at every instruction, and by module at the peak.

The sums are the machine's own, byte for byte (tests hold the two together)::

    account = peak_account(plan)
    account.categories["activations"]      # bytes of activations at the peak
    sum(account.categories.values())       # account.peak
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from keepless.ir import DEVICE, Copy, Drop, Graph, Kind, Phase, Program, Run, Timeline, Value
from keepless.machine import Plan, reuse_pairs

CATEGORIES = (
    "parameters",
    "buffers",
    "optimizer state",
    "gradients",
    "inputs",
    "outside",
    "outputs",
    "activations",
    "generator states",
    "scratch",
)
"""In the order in which they are stacked: what no plan can move comes first."""

_OF_KIND = {
    Kind.PARAM: "parameters",
    Kind.BUFFER: "buffers",
    Kind.GRAD: "gradients",
    Kind.INPUT: "inputs",
    Kind.OUTPUT: "outputs",
    Kind.ACTIVATION: "activations",
    Kind.RNG: "generator states",
}


def category(value: Value) -> str:
    """The category that a value's bytes count for."""
    if value.name == "optimizer.state" and value.kind is Kind.BUFFER:
        return "optimizer state"
    if value.name == "outside" and value.kind is Kind.INPUT:
        return "outside"
    return _OF_KIND[value.kind]


def block_of(module: str) -> str:
    """The block that a module belongs to: up to the first number in its path, else its first two names.

    "transformer.h.3.mlp.act" is in "transformer.h.3", and "transformer.drop" in itself.
    """
    names = module.split(".")
    for index, name in enumerate(names):
        if name.isdigit():
            return ".".join(names[: index + 1])
    return ".".join(names[:2])


@dataclass(frozen=True, slots=True)
class Holding:
    """What is on the device while one instruction runs.

    Arguments:
        index: the instruction's number.
        nbytes: bytes by category; their sum is the instruction's peak.
        values: ids of the values there: those that stood before, less those whose storage is taken over, and what
            the instruction keeps. Changed by the next step of the iterator.
    """

    index: int
    nbytes: Mapping[str, int]
    values: set[int]


def holdings(graph: Graph, program: Program, timeline: Timeline) -> Iterator[Holding]:
    """What is on the device while each instruction runs. O(edges of the program).

    Arguments:
        program: verified.
        timeline: of this program, from `simulate`.
    """
    categories = [category(value) for value in graph.values]
    present = set(graph.inputs)
    level = dict.fromkeys(CATEGORIES, 0)

    def add(value: int) -> None:
        present.add(value)
        level[categories[value]] += graph.values[value].nbytes

    def remove(value: int) -> None:
        present.discard(value)
        level[categories[value]] -= graph.values[value].nbytes

    for value in graph.inputs:
        level[categories[value]] += graph.values[value].nbytes
    for index, (instr, event) in enumerate(zip(program, timeline.events, strict=True)):
        dropped: int | None = None
        if isinstance(instr, Run):
            if instr.reuse:
                kept = frozenset(instr.keep)
                for out, source in reuse_pairs(graph, graph.ops[instr.op]):
                    if out in kept:
                        remove(source)
            for value in instr.keep:
                add(value)
        elif isinstance(instr, Copy) and instr.dst == DEVICE:
            add(instr.value)
        elif isinstance(instr, Drop) and instr.tier == DEVICE:
            dropped = instr.value
        nbytes = dict(level)
        nbytes["scratch"] = event.peak - sum(level.values())
        yield Holding(index, nbytes, present)
        if dropped is not None:
            remove(dropped)


@dataclass(frozen=True)
class PeakAccount:
    """What the peak is made of.

    Arguments:
        peak: bytes on the device.
        index: the first instruction that reaches it.
        where: its op, module and source line.
        phase: of its op.
        categories: bytes by category, in stacking order; those without bytes are left out.
        blocks: bytes by block of the model, largest first: activations, outputs and gradients of backward and forward.
        static: bytes that are resident before the step and after it.
    """

    peak: int
    index: int
    where: str
    phase: str
    categories: Mapping[str, int]
    blocks: Mapping[str, int]
    static: int

    def as_dict(self) -> dict[str, object]:
        """JSON values only."""
        return {
            "peak": self.peak,
            "instruction": self.index,
            "where": self.where,
            "phase": self.phase,
            "categories": dict(self.categories),
            "blocks": dict(self.blocks),
            "static": self.static,
        }


def peak_account(plan: Plan) -> PeakAccount:
    """The bytes at the plan's peak, by category and by block."""
    graph, index = plan.graph, plan.predicted.peak_index if plan.predicted.events else -1
    held = next((h for h in holdings(graph, plan.program, plan.predicted) if h.index == index), None)
    if held is None:
        return PeakAccount(plan.predicted_peak, -1, "the start of the step", "", {}, {}, graph.static_nbytes)
    blocks: dict[str, int] = {}
    for value in held.values - graph.inputs:
        makers = graph.producers[value]
        block = block_of(graph.ops[makers[0]].module) if makers else ""
        blocks[block] = blocks.get(block, 0) + graph.values[value].nbytes
    instr = plan.program[index]
    op = graph.ops[instr.op] if isinstance(instr, Run) else None
    return PeakAccount(
        peak=sum(held.nbytes.values()),
        index=index,
        where=graph.where(op) if op else type(instr).__name__.lower(),
        phase=op.phase.value if op else "",
        categories={name: held.nbytes[name] for name in CATEGORIES if held.nbytes[name]},
        blocks=dict(sorted(blocks.items(), key=lambda item: (-item[1], item[0]))),
        static=graph.static_nbytes,
    )


def phase_spans(plan: Plan) -> dict[str, tuple[float, float]]:
    """Seconds at which each phase of the step begins and ends, by name; replays count for where they run."""
    spans: dict[str, tuple[float, float]] = {}
    for instr, event in zip(plan.program, plan.predicted.events, strict=True):
        if isinstance(instr, Run) and not instr.replay:
            phase = plan.graph.ops[instr.op].phase
            if phase is Phase.FORWARD and Phase.LOSS.value in spans:
                continue
            begin, _ = spans.get(phase.value, (event.start, event.end))
            spans[phase.value] = (begin, event.end)
    return spans
