"""The arena: one buffer for the values of a step, from the forward's start to the backward's end.

The generated program writes results straight into it, at offsets that an address plan gives them, by forms that take
their result tensors (`keepless.capture.outs`). In it are the values for which such a form was tried and gives the same
bits (`keepless.execute.trying`); values that the caller gets, and the rest, are allocated as ever.

The tensors of the arena are made once. Between steps its storage is resized to nothing, so that the memory is free
then; a step takes it with a lease, and a second step that begins meanwhile runs without.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from keepless.binding import Binding
from keepless.capture.outs import OutForm, out_form
from keepless.errors import ArenaError
from keepless.execute.trying import refusal
from keepless.ir import Effect, Phase, Program, Run, Timeline, format_bytes
from keepless.measure import is_out_of_memory
from keepless.passes import AddressPlan, Block, blocks_of, check_addresses, plan_addresses

ALIGNMENT = {"cpu": 64, "cuda": 512}
"""Bytes, as torch's own allocators align."""
HANDED = "the caller gets it"
_HALVINGS = 8


@dataclass(frozen=True, slots=True)
class ArenaReport:
    """What an arena is, in bytes.

    Arguments:
        nbytes: of the arena.
        bound: the most that stands in it at once.
        inside: of all blocks in it, one after another in a step.
        total: of all blocks that the step makes.
        predicted_peak: of a step with the arena.
        left_out: (name of an op, or of why, bytes of its blocks outside, why), the largest first.
    """

    nbytes: int
    bound: int
    inside: int
    total: int
    predicted_peak: int
    left_out: tuple[tuple[str, int, str], ...]

    @property
    def share(self) -> float:
        """Of the bytes that a step makes, those that are made in the arena."""
        return self.inside / self.total if self.total else 0.0

    def __str__(self) -> str:
        lines = [
            f"arena of {format_bytes(self.nbytes)} ({self.nbytes / self.bound if self.bound else 1:.3f} of what stands "
            f"in it at once), {self.share:.1%} of {format_bytes(self.total)} made in it; predicted peak "
            f"{format_bytes(self.predicted_peak)}"
        ]
        lines += [f"outside: {format_bytes(nbytes)} of {name}: {why}" for name, nbytes, why in self.left_out[:8]]
        return "\n".join(lines)


class Arena:
    """The buffer and its tensors.

    Arguments:
        runs: by instruction, the form that stands for its op's call, and the result tensors by value.
        report: what it is.
    """

    def __init__(
        self,
        storage: torch.UntypedStorage,
        runs: Mapping[int, tuple[OutForm, tuple[torch.Tensor, ...]]],
        report: ArenaReport,
    ) -> None:
        self.storage = storage
        self.runs = runs
        self.report = report
        self._busy = threading.Lock()
        storage.resize_(0)

    def lease(self) -> Lease | None:
        """The arena for one step; None where another step has it, or where there is no memory for it."""
        if not self._busy.acquire(blocking=False):
            return None
        try:
            self.storage.resize_(self.report.nbytes)
        except BaseException as error:
            self._busy.release()
            if is_out_of_memory(error):
                return None
            raise
        return Lease(self)

    def free(self) -> None:
        """Ends a lease. Only its holder calls this."""
        self.storage.resize_(0)
        self._busy.release()


class Lease:
    """A step's hold on an arena; it ends by itself where the step is forgotten."""

    __slots__ = ("_arena",)

    def __init__(self, arena: Arena) -> None:
        self._arena: Arena | None = arena

    def end(self) -> None:
        """Frees the arena; a second time does nothing."""
        arena, self._arena = self._arena, None
        if arena is not None:
            arena.free()

    def __del__(self) -> None:
        self.end()


def make_arena(binding: Binding, program: Program, predicted: Timeline, limit: int) -> Arena:
    """An arena for a program.

    Where the step with all that could be in it would be above the limit (the arena stands to the backward's end, while
    gradients pile up beside), fewer blocks are in it.

    Arguments:
        predicted: the program's timeline.
        limit: bytes of the device that a step may have.

    Raises:
        ArenaError: nothing can be in it, or not within the limit.
    """
    graph = binding.graph
    blocks = blocks_of(graph, program)
    names = [_maker(binding, program, block) for block in blocks]
    reasons, forms = _eligible(binding, program, blocks)
    candidates = [number for number, reason in enumerate(reasons) if not reason]
    peaks = np.array([event.peak for event in predicted.events], dtype=np.int64)
    backward = [
        index
        for index, instr in enumerate(program)
        if isinstance(instr, Run) and graph.ops[instr.op].phase in (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD)
    ]
    stands = np.zeros(len(peaks), dtype=bool)
    stands[: backward[-1] + 1 if backward else 0] = True
    alignment = ALIGNMENT.get(binding.device.type, 512)
    sizes = {number: -(-blocks[number].nbytes // alignment) * alignment for number in candidates}
    chosen, plan, peak = _fitting(blocks, candidates, sizes, peaks, stands, limit, alignment, forms)
    if not chosen:
        if not candidates:
            raise ArenaError(f"No value of the step can be made in an arena: {_why(names, reasons)}.")
        raise ArenaError(
            f"An arena does not fit beside what is outside of it: the limit is {format_bytes(limit)} ({limit} bytes), "
            f"and the step's peak without one is {format_bytes(int(peaks.max()))}. Give a larger budget, or no arena."
        )
    check_addresses([blocks[number] for number in chosen], plan)
    for number in set(candidates) - set(chosen):
        reasons[number] = "it would be above the budget"
    storage = torch.empty(plan.nbytes, dtype=torch.uint8, device=binding.device).untyped_storage()
    offsets = dict(zip(chosen, plan.offsets, strict=True))
    runs = _runs(binding, program, blocks, offsets, forms, storage)
    left: dict[tuple[str, str], int] = {}
    for number, block in enumerate(blocks):
        if number not in offsets:
            key = (names[number], reasons[number])
            left[key] = left.get(key, 0) + block.nbytes
    report = ArenaReport(
        plan.nbytes,
        plan.bound,
        sum(blocks[number].nbytes for number in chosen),
        sum(block.nbytes for block in blocks),
        peak,
        tuple((name, nbytes, why) for (name, why), nbytes in sorted(left.items(), key=lambda item: -item[1])),
    )
    return Arena(storage, runs, report)


def _maker(binding: Binding, program: Program, block: Block) -> str:
    """The name of the op that makes a block."""
    instr = program[block.members[0][0]]
    return binding.graph.ops[instr.op].name if isinstance(instr, Run) else "copy"


def _why(names: list[str], reasons: list[str]) -> str:
    found = dict.fromkeys(f"{name}: {reason}" for name, reason in zip(names, reasons, strict=True))
    return "; ".join(list(found)[:3]) or "it makes none"


def _eligible(binding: Binding, program: Program, blocks: list[Block]) -> tuple[list[str], dict[int, OutForm]]:
    """Why each block cannot be in the arena (empty: it can), and the form of each instruction that has one.

    All results of a run are in it, or none.
    """
    graph = binding.graph
    handed = set(graph.pinned) | {binding.slot_value[slot] for slot in binding.outputs.values()}
    handed |= {binding.slot_value[slot] for _, slot in binding.grads} | {
        binding.slot_value[t] for t in binding.tangents
    }
    for op, code in zip(graph.ops, binding.ops, strict=True):
        if code is None:
            handed.update(op.inputs)
    reasons: list[str] = []
    forms: dict[int, OutForm] = {}
    starting: dict[int, dict[int, int]] = {}
    for number, block in enumerate(blocks):
        index, value = block.members[0]
        starting.setdefault(index, {})[value] = number
        reasons.append(HANDED if any(v in handed for _, v in block.members) else "")
    for index, at in starting.items():
        reason = _run_reason(binding, program, index, at, reasons, forms)
        if reason:
            forms.pop(index, None)
            for number in at.values():
                reasons[number] = reasons[number] or reason
    return reasons, forms


def _run_reason(
    binding: Binding,
    program: Program,
    index: int,
    at: Mapping[int, int],
    reasons: list[str],
    forms: dict[int, OutForm],
) -> str:
    """Why the results of an instruction cannot be in the arena; puts down its form where they can."""
    instr = program[index]
    if not isinstance(instr, Run):
        return "it is copied to the device"
    op, code = binding.graph.ops[instr.op], binding.ops[instr.op]
    if code is None or instr.reuse or (instr.replay and code.replay is not None):
        return "it is made in another way"
    if op.effects - {Effect.RNG, Effect.CHOICE}:
        return "its op has side effects"
    if binding.device.type != "cpu" and any(binding.examples[slot].device.type == "cpu" for _, slot, _ in code.outputs):
        return "it is on the host"
    if {value for _, _, value in code.outputs} != set(at):
        return "not all results of its op are storage of their own"
    if any(reasons[number] for number in at.values()):
        return "other results of its op are outside"
    form = out_form(code.call.target)
    if form is None:
        return "its op has no form that writes into a given tensor"
    reason = refusal(binding, op, code, form)
    if not reason:
        forms[index] = form
    return reason


def _fitting(
    blocks: list[Block],
    candidates: list[int],
    sizes: Mapping[int, int],
    peaks: npt.NDArray[np.int64],
    stands: npt.NDArray[np.bool_],
    limit: int,
    alignment: int,
    forms: Mapping[int, OutForm],
) -> tuple[list[int], AddressPlan, int]:
    """The blocks that are in the arena, their addresses, and the step's peak: as many as fit the limit.

    By halving: the largest capacity of the arena with which the step fits. Blocks of one run are together.
    """
    by_run: dict[int, list[int]] = {}
    for number in candidates:
        by_run.setdefault(blocks[number].start, []).append(number)
    highest = int(peaks.argmax())

    def at_peak(group: list[int]) -> bool:
        return any(blocks[n].start <= highest < blocks[n].end for n in group)

    # What stands at the peak costs nothing there, and what it leaves behind in the arena holds others.
    order = sorted(by_run.values(), key=lambda group: (not at_peak(group), -max(blocks[n].nbytes for n in group)))

    def chosen_for(capacity: int, careful: bool) -> list[int]:
        """Groups in this order, each where it keeps the capacity (`careful`: and the step the limit, with each)."""
        live, inside = np.zeros_like(peaks), np.zeros_like(peaks)
        found: list[int] = []
        top = 0
        for group in order:
            before = [(live[blocks[n].start : blocks[n].end], inside[blocks[n].start : blocks[n].end]) for n in group]
            for n, (lives, insides) in zip(group, before, strict=True):
                lives += sizes[n]
                insides += blocks[n].nbytes
            here = max(top, *(int(lives.max()) for lives, _ in before))
            over = careful and here > top and int((peaks - inside + np.where(stands, here, 0)).max()) > limit
            if here > capacity or over:
                for n, (lives, insides) in zip(group, before, strict=True):
                    lives -= sizes[n]
                    insides -= blocks[n].nbytes
            else:
                found += group
                top = here
        return sorted(found)

    def tried(capacity: int, rounds: int, careful: bool) -> tuple[list[int], AddressPlan, int]:
        chosen = chosen_for(capacity, careful)
        plan = plan_addresses([blocks[n] for n in chosen], alignment=alignment, rounds=rounds)
        inside = np.zeros(len(peaks) + 1, dtype=np.int64)
        for n in chosen:
            inside[blocks[n].start] += blocks[n].nbytes
            inside[blocks[n].end] -= blocks[n].nbytes
        level = peaks - np.cumsum(inside)[:-1] + np.where(stands, plan.nbytes, 0)
        return chosen, plan, int(level.max())

    best = tried(sum(sizes.values()), 24, False)
    if best[2] <= limit or not candidates:
        return best
    full = best[1].bound
    best = [], AddressPlan((), 0, 0, alignment), int(peaks.max())
    for careful in (True, False):
        low, high = 0, 2 * full
        for _ in range(_HALVINGS):
            middle = (low + high) // 2
            found = tried(middle, 0, careful)
            if found[2] <= limit and found[0]:
                low = middle
                if sum(blocks[n].nbytes for n in found[0]) > sum(blocks[n].nbytes for n in best[0]):
                    best = found
            else:
                high = middle
    return best


def _runs(
    binding: Binding,
    program: Program,
    blocks: list[Block],
    offsets: Mapping[int, int],
    forms: Mapping[int, OutForm],
    storage: torch.UntypedStorage,
) -> dict[int, tuple[OutForm, tuple[torch.Tensor, ...]]]:
    """By instruction, its form and the tensors for its results, in the order of the op's results."""
    place = {blocks[number].members[0]: offset for number, offset in offsets.items()}
    runs: dict[int, tuple[OutForm, tuple[torch.Tensor, ...]]] = {}
    for index in sorted({index for index, _ in place}):
        instr = program[index]
        assert isinstance(instr, Run)
        code = binding.ops[instr.op]
        assert code is not None
        tensors = []
        for _, slot, value in code.outputs:
            example = binding.examples[slot]
            empty = torch.empty(0, dtype=example.dtype, device=binding.device)
            start = place[index, value] // example.element_size()
            tensors.append(empty.set_(storage, start, example.size(), example.stride()))
        runs[index] = forms[index], tuple(tensors)
    return runs
