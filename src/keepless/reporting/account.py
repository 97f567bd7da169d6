"""Where the bytes are: by category at every instruction, and by category and module at the peak.

The sums are the machine's own, byte for byte (tests hold the two together)::

    account = peak_account(plan)
    account.categories["activations"]      # bytes of activations at the peak
    sum(account.categories.values())       # account.peak
    account.modules["h.3"]["gradients"]    # and of one block, what stands before the step included

A measured timeline is set against it by `keepless.reporting.measured_account`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from keepless.ir import DEVICE, Copy, Drop, Graph, Kind, Op, Phase, Program, Run, Timeline, Value
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

DELIVER, UPDATE, EXISTING = "keepless.deliver", "keepless.update", "grad.existing"
"""How captured graphs call the hand-over of a gradient, and all gradients that stand before the step."""

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


class Homes:
    """The block that each value's bytes belong to. O(edges of the graph).

    A parameter or buffer belongs to its own block, a gradient to its parameter's, an activation to that of the op which
    makes it. Three values stand for many tensors: optimizer state is shared out as the plan's signature says, or by the
    bytes of the parameters that are trained; gradients that stood before the step by those of the new ones. Inputs
    and what is outside have no block, whose name is empty.
    """

    def __init__(self, graph: Graph, signature: Mapping[str, object]) -> None:
        self.graph = graph
        self._of_grad: dict[int, str] = {}
        for op in graph.ops:
            if op.name in (DELIVER, UPDATE):
                grads = [v for v in op.inputs if graph.values[v].kind is Kind.GRAD]
                self._of_grad.update(dict.fromkeys(grads, block_of(op.module)))
        for value in graph.values:
            if value.kind is Kind.GRAD and value.name.startswith("grad.") and value.name != EXISTING:
                self._of_grad.setdefault(value.id, block_of(value.name[5:].rpartition(".")[0]))
        gradients = _summed((self._of_grad[v], graph.values[v].nbytes) for v in self._of_grad)
        self._existing = gradients
        told = signature.get("state_by_block")
        self._state = (
            {str(block): int(nbytes) for block, nbytes in told.items() if isinstance(nbytes, int) and nbytes > 0}
            if isinstance(told, Mapping)
            else gradients
        )

    def shares(self, value: int) -> Mapping[str, int]:
        """Bytes of a value by block; they sum to its bytes."""
        item = self.graph.values[value]
        kind = category(item)
        if kind == "optimizer state":
            return shared_out(item.nbytes, self._state)
        if item.name == EXISTING:
            return shared_out(item.nbytes, self._existing)
        if kind in ("parameters", "buffers"):
            return {block_of(item.name.rpartition(".")[0]): item.nbytes}
        if value in self._of_grad:
            return {self._of_grad[value]: item.nbytes}
        makers = self.graph.producers[value]
        return {block_of(self.graph.ops[makers[0]].module) if makers else "": item.nbytes}


def shared_out(nbytes: int, weights: Mapping[str, int]) -> dict[str, int]:
    """Bytes in proportion to weights, in whole numbers that sum to them; all to "" where there are no weights."""
    total = sum(weights.values())
    if not total:
        return {"": nbytes}
    shares: dict[str, int] = {}
    given = passed = 0
    for name, weight in weights.items():
        passed += weight
        upto = nbytes * passed // total
        shares[name] = upto - given
        given = upto
    return shares


def _summed(rows: Iterable[tuple[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, nbytes in rows:
        found[name] = found.get(name, 0) + nbytes
    return found


@dataclass(frozen=True)
class PeakAccount:
    """What is on the device at one instruction, that of the peak if no other is asked for.

    Arguments:
        peak: bytes on the device.
        index: the instruction: the first that reaches the peak.
        where: its op, module and source line.
        phase: of its op.
        categories: bytes by category, in stacking order; those without bytes are left out.
        blocks: bytes by block of the model, largest first: activations, outputs and gradients of backward and forward.
        static: bytes that are resident before the step and after it.
        modules: bytes by block and category, largest block first: all of them, static ones included; they sum to the
            peak. Scratch is the running op's.
    """

    peak: int
    index: int
    where: str
    phase: str
    categories: Mapping[str, int]
    blocks: Mapping[str, int]
    static: int
    modules: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

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
            "modules": {name: dict(row) for name, row in self.modules.items()},
        }


def peak_account(plan: Plan, index: int | None = None) -> PeakAccount:
    """The predicted bytes at an instruction, by category and by block.

    Arguments:
        index: of the instruction; None for the first that reaches the peak.
    """
    graph = plan.graph
    if index is None:
        index = plan.predicted.peak_index if plan.predicted.events else -1
    held = next((h for h in holdings(graph, plan.program, plan.predicted) if h.index == index), None)
    if held is None:
        return PeakAccount(plan.predicted_peak, -1, "the start of the step", "", {}, {}, graph.static_nbytes)
    homes = Homes(graph, plan.signature)
    blocks: dict[str, int] = {}
    modules: dict[str, dict[str, int]] = {}
    for value in sorted(held.values):
        kind = category(graph.values[value])
        for block, nbytes in homes.shares(value).items():
            row = modules.setdefault(block, {})
            row[kind] = row.get(kind, 0) + nbytes
            if value not in graph.inputs:
                blocks[block] = blocks.get(block, 0) + nbytes
    op = op_at(plan, index)
    if held.nbytes["scratch"]:
        modules.setdefault(block_of(op.module) if op else "", {})["scratch"] = held.nbytes["scratch"]
    return PeakAccount(
        peak=sum(held.nbytes.values()),
        index=index,
        where=where_at(plan, index),
        phase=op.phase.value if op else "",
        categories={name: held.nbytes[name] for name in CATEGORIES if held.nbytes[name]},
        blocks=dict(sorted(blocks.items(), key=lambda item: (-item[1], item[0]))),
        static=graph.static_nbytes,
        modules={
            name: {kind: row[kind] for kind in CATEGORIES if row.get(kind)}
            for name, row in sorted(modules.items(), key=lambda item: (-sum(item[1].values()), item[0]))
        },
    )


def op_at(plan: Plan, index: int) -> Op | None:
    """The op that an instruction runs; None for one that runs none."""
    instr = plan.program[index] if 0 <= index < len(plan.program) else None
    return plan.graph.ops[instr.op] if isinstance(instr, Run) else None


def where_at(plan: Plan, index: int) -> str:
    """An instruction as people look for it."""
    op = op_at(plan, index)
    if op is not None:
        return plan.graph.where(op)
    return type(plan.program[index]).__name__.lower() if 0 <= index < len(plan.program) else "the start of the step"


def phase_instructions(plan: Plan) -> dict[str, tuple[int, int]]:
    """First and last instruction of each phase, by name. Those after the LOSS op are the backward's, whatever runs
    again there."""
    spans: dict[str, tuple[int, int]] = {}
    now = Phase.FORWARD.value
    for index in range(len(plan.program)):
        op = op_at(plan, index)
        if op is not None and op.phase in (Phase.LOSS, Phase.OPTIMIZER):
            now = op.phase.value
        elif now == Phase.LOSS.value and op is not None:
            now = Phase.BACKWARD.value
        first, _ = spans.get(now, (index, index))
        spans[now] = (first, index)
    return spans


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
