"""Random legal graphs, orders and programs, and a naive interpreter that says which programs are right.

Everything grows from a seed and a size, so that Hypothesis shrinks the size and a failure names both.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import strategies as st

from keepless.cost import CostModel, Link
from keepless.ir import Copy, Drop, Effect, Graph, Instr, Kind, Op, Phase, Program, Run, Value, Wait
from keepless.passes import from_order, reuse_storage

SIZES = (0, 1, 2, 4, 4, 8, 100)
LINKS = {
    ("device", "host"): Link(16.0, 0.5),
    ("host", "device"): Link(32.0, 0.25),
    ("host", "disk"): Link(4.0),
    ("disk", "host"): Link(4.0),
}


@dataclass(frozen=True)
class Case:
    """A graph, a legal order of its ops, a cost model, and a legal program of that order."""

    graph: Graph
    order: tuple[int, ...]
    cost: CostModel
    program: Program


class _Builder:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.inputs: set[int] = set()
        self.pinned: set[int] = set()

    def value(self, kind: Kind) -> int:
        number = len(self.values)
        shape = tuple(self.rng.randrange(5) for _ in range(self.rng.randrange(3)))
        name = f"{kind.value}.{number}" + self.rng.choice(["", ' "quoted" \\', "\n\u2028é"])
        self.values.append(Value(number, name, self.rng.choice(SIZES), kind, "float32", shape))
        return number

    def op(self, phase: Phase, inputs: set[int], outputs: list[int], effects: frozenset[Effect] = frozenset()) -> None:
        pairs = [(out, source) for out in outputs for source in sorted(inputs) if self.rng.random() < 0.5]
        name = self.rng.choice(["aten.mm.default", "aten.relu.default", "odd name"])
        source = f"model.py:{self.rng.randrange(99)}"
        self.ops.append(
            Op(len(self.ops), name, tuple(sorted(inputs)), tuple(outputs), phase, effects, tuple(pairs), "h.0", source)
        )


def random_graph(seed: int, num_ops: int) -> Graph:
    """A legal graph of about `num_ops` ops with every kind of op in it."""
    rng = random.Random(seed)
    build = _Builder(rng)
    for kind in (Kind.INPUT, Kind.INPUT, Kind.PARAM, Kind.PARAM, Kind.BUFFER):
        value = build.value(kind)
        build.inputs.add(value)
        if kind is not Kind.INPUT or rng.random() < 0.5:
            build.pinned.add(value)
    buffers = [value.id for value in build.values if value.kind is Kind.BUFFER]
    pool = list(build.inputs)
    num_forward = rng.randint(1, max(1, num_ops - 1))
    for _ in range(num_forward):
        _random_op(build, Phase.FORWARD, pool, buffers)
    tangent = build.value(Kind.GRAD)
    build.op(Phase.LOSS, set(pool[-1:]), [tangent])
    pool.append(tangent)
    for _ in range(num_ops - num_forward):
        _random_op(build, Phase.BACKWARD, pool, buffers)
    if rng.random() < 0.5:
        build.op(Phase.OPTIMIZER, set(pool[-1:]) | {2}, [], frozenset({Effect.BUFFER}))
    build.pinned.add(pool[-1])
    return Graph(tuple(build.ops), tuple(build.values), frozenset(build.inputs), frozenset(build.pinned))


def _random_op(build: _Builder, phase: Phase, pool: list[int], buffers: list[int]) -> None:
    rng = build.rng
    recent = pool[-6:] if rng.random() < 0.7 else pool
    inputs = set(rng.sample(recent, min(len(recent), rng.randint(1, 3))))
    dice = rng.random()
    effects: frozenset[Effect] = frozenset()
    if dice < 0.25:
        effects = frozenset({Effect.RNG})
    elif dice < 0.32:
        effects = frozenset({Effect.BUFFER})
        inputs.add(buffers[0])
    elif dice < 0.37:
        effects = frozenset({Effect.COLLECTIVE})
    elif dice < 0.42:
        effects = frozenset({Effect.OPAQUE})
    elif dice < 0.47:
        again = [v for v in pool if v not in build.inputs and v not in inputs]
        if again:
            # A second producer: makes a value again, from others that were there before or after it.
            build.op(phase, inputs, [rng.choice(again)])
            return
    kind = Kind.GRAD if phase is Phase.BACKWARD else Kind.ACTIVATION
    outputs = [build.value(kind) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    build.pinned.update(value for value in outputs if rng.random() < (0.3 if phase is Phase.BACKWARD else 0.05))
    pool.extend(outputs)
    build.op(phase, inputs, outputs + [build.value(Kind.RNG)] * (Effect.RNG in effects), effects)


def random_order(graph: Graph, rng: random.Random) -> tuple[int, ...]:
    """A legal order: the graph's own, ops moved where they may be, replays strewn in, useless runs left out."""
    first = {values[0] for values in graph.producers if values}
    order = [op.id for op in graph.ops if op.id in first or not op.outputs]
    for _ in range(rng.randrange(3 * len(order) + 1)):
        index = rng.randrange(len(order))
        if index + 1 < len(order) and _may_swap(graph, order[index], order[index + 1]):
            order[index], order[index + 1] = order[index + 1], order[index]
    for _ in range(rng.randrange(2 * len(order) + 2)):
        position = rng.randrange(len(order) + 1)
        made = set(graph.inputs).union(*(graph.ops[op].outputs for op in order[:position]))
        ready = [
            op.id
            for op in graph.ops
            if op.can_replay
            and op.phase is not Phase.LOSS
            and made.issuperset(op.inputs)
            and (op.id in order[:position] or op.id not in order)
        ]
        if ready:
            order.insert(position, rng.choice(ready))
    return _without_useless_runs(graph, order)


def _may_swap(graph: Graph, left: int, right: int) -> bool:
    a, b = graph.ops[left], graph.ops[right]
    ordered = {Effect.RNG, Effect.COLLECTIVE, Effect.BUFFER}
    if a.effects & b.effects & ordered or (b.phase is Phase.LOSS and Effect.BUFFER in a.effects):
        return False
    return not set(a.outputs) & set(b.inputs)


def _without_useless_runs(graph: Graph, order: list[int]) -> tuple[int, ...]:
    while True:
        runs = [instr for instr in from_order(graph, order) if isinstance(instr, Run)]
        useless = {
            position
            for position, run in enumerate(runs)
            if not run.keep
            and graph.ops[run.op].phase is not Phase.LOSS
            and graph.ops[run.op].can_replay
            and (run.replay or Effect.RNG not in graph.ops[run.op].effects)
        }
        if not useless:
            return tuple(order)
        order = [op for position, op in enumerate(order) if position not in useless]


def random_cost(graph: Graph, rng: random.Random) -> CostModel:
    """Costs with scratch, zeros among them."""
    seconds = tuple(rng.choice((0.0, 0.1, 1.0, 2.5, rng.random())) for _ in graph.ops)
    return CostModel(seconds, tuple(rng.choice((0, 0, 1, 7, 50)) for _ in graph.ops), LINKS)


def with_copies(graph: Graph, program: Program, rng: random.Random) -> Program:
    """The program with some values sent to the host between two uses, and fetched again."""
    instrs = list(program.instrs)
    for _ in range(rng.randrange(4)):
        gaps = _gaps(graph, instrs)
        if not gaps:
            break
        value, begin, end = rng.choice(gaps)
        cuts = sorted(rng.randint(begin + 1, end) for _ in range(6))
        added = [
            Copy(value, "device", "host"),
            Wait(value, "host"),
            Drop(value),
            Copy(value, "host", "device"),
            Wait(value, "device"),
            Drop(value, "host"),
        ]
        for cut, instr in reversed(list(zip(cuts, added, strict=True))):
            instrs.insert(cut, instr)
    return Program(tuple(instrs))


def _gaps(graph: Graph, instrs: list[Instr]) -> list[tuple[int, int, int]]:
    """(value, index, index): the value is on the device between these two, and nothing touches it there."""
    touched: dict[int, int] = {}
    gaps = []
    states = {value.id for value in graph.values if value.kind is Kind.RNG}
    for index, instr in enumerate(instrs):
        if isinstance(instr, Run):
            op = graph.ops[instr.op]
            values = set(op.inputs) | set(op.outputs) if instr.replay else set(op.inputs) | set(instr.keep)
        else:
            values = {instr.value}
        for value in values - states:
            reads = isinstance(instr, Run) and value in graph.ops[instr.op].inputs
            if value in touched and index > touched[value] + 1 and reads:
                gaps.append((value, touched[value], index))
            touched[value] = index
    return gaps


def random_case(seed: int, num_ops: int) -> Case:
    """A graph with an order, costs, and a program with reuse and copies."""
    rng = random.Random(seed + 1)
    graph = random_graph(seed, num_ops)
    order = random_order(graph, rng)
    program = from_order(graph, order)
    if rng.random() < 0.6:
        program = reuse_storage(graph, program)
    if rng.random() < 0.6:
        program = with_copies(graph, program, rng)
    return Case(graph, order, random_cost(graph, rng), program)


SEEDS = st.integers(0, 2**32 - 1)


def graphs(most_ops: int = 14) -> st.SearchStrategy[Graph]:
    """Random legal graphs."""
    return st.builds(random_graph, SEEDS, st.integers(1, most_ops))


def cases(most_ops: int = 14) -> st.SearchStrategy[Case]:
    """Random legal graphs with legal orders and programs."""
    return st.builds(random_case, SEEDS, st.integers(1, most_ops))


class WrongError(Exception):
    """The naive interpreter found a program wrong."""


def _must(condition: bool, why: str) -> None:
    if not condition:
        raise WrongError(why)


class _Storage:
    """Bytes somewhere: what they hold, and who reads them at some later time."""

    def __init__(self, holds: object) -> None:
        self.holds = holds
        self.freed = False


def interpret(graph: Graph, program: Program) -> dict[int, object]:
    """Run a program over symbols, in storages that can be overwritten and freed, and say what the caller gets.

    A value's symbol is right when it was made from right symbols and, for RNG ops, from the right draw. Copies read
    their source when they are waited for, which is the latest time that a queue allows.

    Raises:
        WrongError: a result, an effect or a leak that the step without a program would not have.
    """
    tiers: dict[str, dict[int, _Storage]] = {"device": {v: _Storage(("right", v)) for v in graph.inputs}}
    coming: dict[tuple[int, str], tuple[_Storage, _Storage]] = {}
    log: list[int] = []
    draws = [op.id for op in graph.ops if Effect.RNG in op.effects]
    num_drawn = 0
    for instr in program:
        if isinstance(instr, Run):
            _must(0 <= instr.op < len(graph.ops), "no such op")
            op = graph.ops[instr.op]
            device = tiers["device"]
            symbols = [device[v].holds if v in device else None for v in op.inputs]
            _must(symbols == [("right", v) for v in op.inputs], "a wrong input")
            _must(instr.replay == log.count(op.id), "a wrong count of replays")
            states = [v for v in op.outputs if graph.values[v].kind is Kind.RNG]
            if Effect.RNG in op.effects and not instr.replay:
                _must(draws[num_drawn : num_drawn + 1] == [op.id], "another draw")
                num_drawn += 1
            for state in states if instr.replay else ():
                _must(state in device and device[state].holds == ("right", state), "no recorded state")
                _must(state not in instr.keep, "a state that is not the recorded one")
            log.append(op.id)
            pairs = [(out, source) for out, source in _in_place(graph, op) if out in instr.keep] if instr.reuse else []
            _must(bool(pairs) == instr.reuse, "nothing to reuse")
            taken = {out: device.pop(source) for out, source in pairs}
            for storage in taken.values():
                storage.holds = "overwritten"
            for v in instr.keep:
                _must(v in op.outputs and v not in device and (v, "device") not in coming, "a wrong binding")
                device[v] = taken.get(v, _Storage(None))
                device[v].holds = ("right", v)
        elif isinstance(instr, Copy):
            source_storage = tiers.get(instr.src, {}).get(instr.value)
            _must(source_storage is not None, "a copy of nothing")
            _must(instr.value not in tiers.get(instr.dst, {}), "a copy onto itself")
            _must((instr.value, instr.dst) not in coming and (instr.src, instr.dst) in LINKS, "a copy of a copy")
            assert source_storage is not None
            coming[instr.value, instr.dst] = (source_storage, _Storage(None))
        elif isinstance(instr, Wait):
            _must((instr.value, instr.tier) in coming, "a wait for nothing")
            read, written = coming.pop((instr.value, instr.tier))
            _must(not read.freed and read.holds == ("right", instr.value), "the source went away under a copy")
            written.holds = read.holds
            tiers.setdefault(instr.tier, {})[instr.value] = written
        else:
            _must(instr.value in tiers.get(instr.tier, {}), "a drop of nothing")
            tiers[instr.tier].pop(instr.value).freed = True
    _check_end(graph, log, tiers, coming)
    return {v: tiers["device"][v].holds for v in sorted(graph.pinned)}


def _in_place(graph: Graph, op: Op) -> list[tuple[int, int]]:
    """The pairs that a run with reuse applies, told otherwise than the machine does: strike out, then take the head."""
    kinds = (Kind.PARAM, Kind.BUFFER, Kind.INPUT)
    left = [
        (out, source)
        for out, source in op.reuses
        if graph.values[source].kind not in kinds and graph.values[out].nbytes == graph.values[source].nbytes
    ]
    pairs = []
    while left:
        head, *left = left
        pairs.append(head)
        left = [pair for pair in left if pair[0] != head[0] and pair[1] != head[1]]
    return pairs


def _check_end(
    graph: Graph,
    log: list[int],
    tiers: dict[str, dict[int, _Storage]],
    coming: dict[tuple[int, str], tuple[_Storage, _Storage]],
) -> None:
    _must(not coming, "a copy left in flight")
    loss = graph.loss_op
    _must(loss is None or loss in log, "a step without its loss")
    for op in graph.ops:
        times = log.count(op.id)
        if op.phase is Phase.LOSS or op.effects & {Effect.BUFFER, Effect.COLLECTIVE, Effect.OPAQUE}:
            _must(times == 1, "an effect that did not happen once")
        if Effect.RNG in op.effects:
            _must(times >= 1, "a draw that did not happen")
        if Effect.BUFFER in op.effects and op.phase is Phase.FORWARD and loss is not None:
            _must(log.index(op.id) < log.index(loss), "a buffer changed after the loss")
    shared = [op for op in log if Effect.COLLECTIVE in graph.ops[op].effects]
    _must(shared == sorted(shared), "collectives out of order")
    _must(set(tiers["device"]) == graph.pinned, "leaks or losses on the device")
    _must(all(not values for tier, values in tiers.items() if tier != "device"), "leaks on another tier")
