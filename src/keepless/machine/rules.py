"""The rules of the machine: the one place that says what a program may do.

The verifier, the simulator and the engines all step through `Machine`. A tiny worked use::

    machine = Machine(graph, limits={"device": 1 << 30}, cost=cost)
    for instr in program:
        peak = machine.step(instr)    # highest bytes on the device while it runs, or ProgramError
    machine.finish()

"In flight" is a copy that was issued and not yet waited for. Values are symbols here: every producer of a value
makes the same value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NoReturn

from keepless.cost import CostModel
from keepless.errors import ProgramError
from keepless.ir.budget import Budget, format_bytes
from keepless.ir.graph import RUNS_ONCE, Effect, Graph, Kind, Op, Phase
from keepless.ir.program import DEVICE, Copy, Drop, Instr, Program, Run, Wait
from keepless.ir.text import format_instr

RULES: Mapping[str, str] = {
    "R1": "Inputs of a run are on the device and not in flight; a replay of an RNG op also has its recorded state.",
    "R2": "A run binds only the outputs that it keeps, none of them resident; an output that reuses storage ends its "
    "input.",
    "R3": "Replays count. RNG ops, and collectives, first run in the graph's order; ops with side effects and the "
    "LOSS op run once; buffers that the forward changes are changed before the LOSS op; parameters are not read once "
    "they are updated.",
    "R4": "A copy starts where the value is, ends where it is not, charges its destination at once, and holds its "
    "source until the wait.",
    "R5": "A wait has a copy in flight.",
    "R6": "A drop needs residence. Pinned outputs are not dropped from the device, as the caller holds them. At the "
    "end exactly the pinned values are resident, and nothing is in flight.",
    "R7": "Every tier is within its limit at every instruction, scratch included.",
}
"""Each rule, as people read it."""

_NEVER_REUSED = frozenset({Kind.PARAM, Kind.BUFFER, Kind.INPUT})


def reuse_pairs(graph: Graph, op: Op) -> tuple[tuple[int, int], ...]:
    """The pairs (output, input) of a run with `reuse`: those of `op.reuses` that may ever share storage.

    Each output and each input comes once (the first pair counts), sizes are equal, and the input is not the
    caller's (kinds PARAM, BUFFER and INPUT). A run with `reuse` applies all of them whose output it keeps.
    """
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for out, source in op.reuses:
        value = graph.values[source]
        if out in taken or source in taken or value.kind in _NEVER_REUSED or source in graph.inputs:
            continue
        if value.nbytes == graph.values[out].nbytes:
            taken |= {out, source}
            pairs.append((out, source))
    return tuple(pairs)


class Machine:
    """The state of a step, and the rules that each instruction must keep.

    Arguments:
        limits: bytes per tier; a tier that is not named may not be used. None: no limits.
        cost: adds scratch, and says which links exist. None: no scratch, all links.
        program: shown around the fault in error messages.

    Attributes:
        index: number of the next instruction.
        resident: bytes per tier, copies on their way included.
        peaks: highest bytes per tier so far.

    Raises:
        ProgramError: R7 where the graph's inputs alone do not fit.
    """

    def __init__(
        self,
        graph: Graph,
        limits: Mapping[str, int] | None = None,
        cost: CostModel | None = None,
        program: Program | None = None,
    ) -> None:
        self.graph = graph
        self.index = 0
        self._program = program
        self._limits = limits
        self._limit = None if limits is None else limits.get(DEVICE, 0)
        self._links = None if cost is None else cost.links
        self._scratch: tuple[int, ...] | list[int] = [0] * len(graph.ops) if cost is None else cost.scratch
        assert len(self._scratch) == len(graph.ops), "the cost model belongs to another graph"
        self._nbytes = [value.nbytes for value in graph.values]
        self._out_nbytes = [sum(self._nbytes[value] for value in op.outputs) for op in graph.ops]
        self._states = rng_states(graph)
        self._held = {v for v in graph.pinned - graph.inputs if graph.values[v].kind is Kind.OUTPUT}
        self._once = [bool(op.effects & RUNS_ONCE) or op.phase is Phase.LOSS for op in graph.ops]
        self._special = [bool(op.effects) or op.phase is Phase.LOSS for op in graph.ops]
        self._runs = [0] * len(graph.ops)
        self._last = {Effect.RNG: -1, Effect.COLLECTIVE: -1}
        self._lost = False
        self._updates = any(Effect.UPDATE in op.effects for op in graph.ops)
        self._updated: set[int] = set()
        self._device: set[int] = set(graph.inputs)
        self._on: dict[str, set[int]] = {DEVICE: self._device}
        self._flying: dict[tuple[int, str], str] = {}
        self._pins: dict[tuple[int, str], int] = {}
        self.resident = {DEVICE: sum(self._nbytes[value] for value in graph.inputs)}
        self.peaks = dict(self.resident)
        self._charge(DEVICE, 0)

    def step(self, instr: Instr) -> int:
        """Apply an instruction.

        Returns:
            The highest bytes on the device while it runs, scratch included.

        Raises:
            ProgramError: it breaks a rule; the machine's state is then not defined.
        """
        if isinstance(instr, Run):
            peak = self._run(instr)
        elif isinstance(instr, Drop):
            peak = self.resident[DEVICE]
            self._drop(instr)
        elif isinstance(instr, Copy):
            self._copy(instr)
            peak = self.resident[DEVICE]
        else:
            self._wait(instr)
            peak = self.resident[DEVICE]
        self.index += 1
        return peak

    def is_resident(self, value: int, tier: str = DEVICE) -> bool:
        """Whether the value is on the tier, arrived."""
        return value in self._on.get(tier, ())

    def on_device(self) -> frozenset[int]:
        """The values on the device, arrived."""
        return frozenset(self._device)

    def source_of(self, value: int, tier: str) -> str | None:
        """The tier from which a copy of the value to this tier is in flight, or None."""
        return self._flying.get((value, tier))

    def finish(self) -> None:
        """Check the rules of a program's end.

        Raises:
            ProgramError: R3 or R6, with the program's length as index.
        """
        for op in self.graph.ops:
            if not self._runs[op.id] and (self._once[op.id] or Effect.RNG in op.effects):
                self._fail("R3", f"{self._op(op)} never ran, and its effects must happen")
        for value, tier in sorted(self._flying):
            self._fail("R6", f"at the end, {self._value(value)} is still in flight to {tier!r}")
        for tier, values in self._on.items():
            expected = self.graph.pinned if tier == DEVICE else frozenset[int]()
            if values != expected:
                left, absent = sorted(values - expected), sorted(expected - values)
                self._fail("R6", f"at the end, {self._some(left)} left on {tier!r}, {self._some(absent)} missing there")

    def _run(self, run: Run) -> int:
        if not 0 <= run.op < len(self._runs):
            self._fail("R1", f"there is no op {run.op}")
        op, device = self.graph.ops[run.op], self._device
        for value in op.inputs:
            if value not in device:
                self._fail("R1", f"{self._op(op)} reads {self._value(value)}, which {self._whereabouts(value)}")
        if run.replay != self._runs[op.id]:
            self._fail("R3", f"{self._op(op)} runs as replay {run.replay} after {self._runs[op.id]} runs")
        if self._updates:
            self._check_updated(op)
        if self._special[op.id]:
            self._check_effects(op, run)
        self._runs[op.id] += 1
        reused = self._reuse(op, run) if run.reuse else 0
        kept = -reused
        outputs = op.outputs if len(run.keep) < 9 else frozenset(op.outputs)
        for value in run.keep:
            if value in device or (value, DEVICE) in self._flying:
                self._fail("R2", f"{self._op(op)} keeps {self._value(value)}, which is already there")
            if value not in outputs:
                self._fail("R2", f"{self._op(op)} keeps value {value}, which it does not make")
            device.add(value)
            kept += self._nbytes[value]
        before = self.resident[DEVICE]
        peak = before + self._out_nbytes[op.id] - reused + self._scratch[op.id]
        if self._limit is not None and peak > self._limit:
            made = f"{format_bytes(before)} resident, {format_bytes(peak - before)} made"
            self._fail("R7", f"{self._op(op)} needs {self._over(DEVICE, peak)}: {made}, scratch included")
        if peak > self.peaks[DEVICE]:
            self.peaks[DEVICE] = peak
        self.resident[DEVICE] = before + kept
        return peak

    def _check_effects(self, op: Op, run: Run) -> None:
        state = self._states.get(op.id)
        if run.replay:
            if self._once[op.id]:
                self._fail("R3", f"{self._op(op)} may run only once")
            if state is not None and state not in self._device:
                self._fail("R1", f"a replay of {self._op(op)} needs {self._value(state)}, its recorded state")
            if state in run.keep:
                self._fail("R3", f"only the first run of {self._op(op)} records its state")
            return
        for effect in op.effects & self._last.keys():
            if op.id < self._last[effect]:
                later = self._op(self.graph.ops[self._last[effect]])
                self._fail("R3", f"{self._op(op)} first runs after {later}, which comes after it in the graph")
            self._last[effect] = op.id
        if op.phase is Phase.LOSS:
            self._lost = True
        elif self._lost and Effect.BUFFER in op.effects and op.phase is Phase.FORWARD:
            self._fail("R3", f"{self._op(op)} changes a buffer of the forward after the LOSS op")

    def _check_updated(self, op: Op) -> None:
        for value in op.inputs:
            if value in self._updated:
                self._fail("R3", f"{self._op(op)} reads {self._value(value)}, which was updated before")
        if Effect.UPDATE in op.effects:
            self._updated.update(v for v in op.inputs if self.graph.values[v].kind is Kind.PARAM)

    def _reuse(self, op: Op, run: Run) -> int:
        """End the inputs whose storage is taken over; bytes taken over."""
        reused = 0
        keep = frozenset(run.keep)
        pairs = [pair for pair in reuse_pairs(self.graph, op) if pair[0] in keep]
        if not pairs:
            self._fail("R2", f"{self._op(op)} keeps no output that may take over an input's storage")
        for _, source in pairs:
            if (source, DEVICE) in self._pins:
                self._fail("R4", f"{self._op(op)} takes over {self._value(source)} while a copy of it is in flight")
            self._device.remove(source)
            reused += self._nbytes[source]
        return reused

    def _copy(self, copy: Copy) -> None:
        value, src, dst = copy.value, copy.src, copy.dst
        self._check_value("R4", value)
        if value not in self._on.get(src, ()):
            self._fail("R4", f"{self._value(value)} is not on {src!r}, from where it is copied")
        if (value, dst) in self._flying or value in self._on.get(dst, ()):
            self._fail("R4", f"{self._value(value)} is already on {dst!r} or on its way there")
        if self._links is not None and (src, dst) not in self._links:
            self._fail("R4", f"the cost model has no link from {src!r} to {dst!r}")
        self._flying[value, dst] = src
        self._pins[value, src] = self._pins.get((value, src), 0) + 1
        self._charge(dst, self._nbytes[value])

    def _wait(self, wait: Wait) -> None:
        value, tier = wait.value, wait.tier
        src = self._flying.pop((value, tier), None)
        if src is None:
            self._check_value("R5", value)
            self._fail("R5", f"no copy of {self._value(value)} to {tier!r} is in flight")
        self._on.setdefault(tier, set()).add(value)
        if self._pins[value, src] == 1:
            del self._pins[value, src]
        else:
            self._pins[value, src] -= 1

    def _drop(self, drop: Drop) -> None:
        value, tier = drop.value, drop.tier
        self._check_value("R6", value)
        if value not in self._on.get(tier, ()):
            where = "in flight to" if (value, tier) in self._flying else "not on"
            self._fail("R6", f"{self._value(value)} is dropped while {where} {tier!r}")
        if tier == DEVICE and value in self._held:
            self._fail("R6", f"{self._value(value)} is dropped, and the caller holds it: it is pinned")
        if (value, tier) in self._pins:
            self._fail("R4", f"{self._value(value)} is dropped on {tier!r} while a copy of it is in flight")
        self._on[tier].remove(value)
        self.resident[tier] -= self._nbytes[value]

    def _charge(self, tier: str, nbytes: int) -> None:
        total = self.resident.get(tier, 0) + nbytes
        self.resident[tier] = total
        self.peaks[tier] = max(total, self.peaks.get(tier, 0))
        if self._limits is not None and (tier not in self._limits or total > self._limits[tier]):
            self._fail("R7", f"{tier!r} holds {self._over(tier, total)}")

    def _over(self, tier: str, nbytes: int) -> str:
        limit = 0 if self._limits is None else self._limits.get(tier, 0)
        return f"{format_bytes(nbytes)} ({nbytes} bytes), and the limit is {format_bytes(limit)} ({limit} bytes)"

    def _check_value(self, rule: str, value: int) -> None:
        if not 0 <= value < len(self._nbytes):
            self._fail(rule, f"there is no value {value}")

    def _op(self, op: Op) -> str:
        return f"op {op.id} {self.graph.where(op)}"

    def _value(self, value: int) -> str:
        return f"value {value} {self.graph.values[value].name!r} ({format_bytes(self._nbytes[value])})"

    def _some(self, values: Iterable[int]) -> str:
        listed = list(values)
        shown = ", ".join(self._value(value) for value in listed[:3]) + (", ..." if len(listed) > 3 else "")
        return shown or "nothing"

    def _whereabouts(self, value: int) -> str:
        if (value, DEVICE) in self._flying:
            return "is still in flight to the device"
        tiers = [tier for tier, values in self._on.items() if value in values]
        return f"is only on {', '.join(tiers)}" if tiers else "is nowhere"

    def _fail(self, rule: str, what: str) -> NoReturn:
        message = f"Instruction {self.index} breaks {rule}: {what}. {RULES[rule]}"
        if self._program is not None:
            message += "\n" + excerpt(self._program, self.index)
        raise ProgramError(message, rule=rule, index=self.index)


def rng_states(graph: Graph) -> dict[int, int]:
    """For each RNG op, the value of its recorded generator state."""
    return {
        op.id: value
        for op in graph.ops
        if Effect.RNG in op.effects
        for value in op.outputs
        if graph.values[value].kind is Kind.RNG
    }


def limits_of(budget: Budget | None) -> dict[str, int] | None:
    """The machine's limits under a budget: bytes per tier, the device's reserve taken off."""
    return None if budget is None else {**budget.limits, DEVICE: budget.device}


def excerpt(program: Program, index: int) -> str:
    """Three lines of the program's text around an instruction, which is marked."""
    lines = []
    for number in range(max(0, index - 1), min(len(program), index + 2)):
        mark = "    <-- here" if number == index else ""
        text = format_instr(program[number])
        lines.append(f"{number:>8}  {text if len(text) <= 100 else text[:97] + '...'}{mark}")
    if index >= len(program):
        lines.append(f"{len(program):>8}  (end)    <-- here")
    return "\n".join(lines)
