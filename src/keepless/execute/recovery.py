"""A planned step for which there is no memory goes on, inside the failing call, by a tighter program.

*In the forward* what the step holds is released, the generator gets its first state again, and the forward begins anew
(`begin_again`). Buffers need nothing: the captured step writes them at the forward's end.

*In the backward* the chain of autograd nodes is that of the old program, and some gradients are delivered already. A
replacement for the step's generator (`go_on`) runs the tighter program from the forward's start, without its writes to
buffers, drops what was delivered before, and hands over the rest at the old program's segments. The generator of random
numbers stands afterwards where it stood.

Which program is tighter, and what is written down, a `Survivor` decides, which control makes. Ordinary steps pay
nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from keepless.binding import Binding
from keepless.cost import CostModel
from keepless.errors import OutOfMemory
from keepless.execute.codegen import Compiled, compile_step, failed_at, forget_frame, is_write, locals_at, stale
from keepless.ir import Phase, Program, Run
from keepless.machine import reuse_pairs
from keepless.measure import is_out_of_memory

if TYPE_CHECKING:
    from keepless.execute.nodes import Step

MOST_TANGENT_NBYTES = 4096
"""Gradients that come into the step from outside (a loss's) are held for a replay up to this size; larger ones serve
where the program itself still had them when it failed."""


class OutOfMemoryHere(OutOfMemory, torch.OutOfMemoryError):
    """The typed error for code that knows torch's own.

    Attributes:
        survivor: `id` of the survivor of a captured step that raised it; 0 for none.
    """

    survivor = 0


OutOfMemoryHere.__name__ = OutOfMemoryHere.__qualname__ = "OutOfMemory"


@dataclass(frozen=True)
class Failure:
    """An allocation that failed in a planned step.

    Arguments:
        kind, text: of the error.
        phase: "forward", "recompute" or "backward".
        program, index: what ran, and the instruction that failed; -1 where it is not known.
        shapes: of the step's inputs, as (name, shape, dtype).
    """

    kind: str
    text: str
    phase: str
    program: Program
    index: int
    shapes: tuple[tuple[str, tuple[int, ...], str], ...]


@dataclass(frozen=True)
class Note:
    """What was written down about a failure: the file (empty where none was) and a budget that needs less."""

    path: str
    suggested_budget: int | None


class Survivor(Protocol):
    """Decides how a model survives, and writes it down."""

    @property
    def survives(self) -> bool:
        """Whether steps go on; else failures are only written down."""

    def tighter(self, rescue: Rescue, failure: Failure) -> Program | None:
        """A verified program that needs less than what failed; None where there is none."""

    def smallest(self, rescue: Rescue, program: Program) -> Program | None:
        """The verified program of the smallest peak; None where this is it already."""

    def record(self, rescue: Rescue, failure: Failure, done: str, after: Program | None) -> Note:
        """Writes a failure down; never raises."""


@dataclass(eq=False)
class Rescue:
    """What one captured step needs to survive.

    Arguments:
        cost: of the captured step's ops.
        blocker: why its forward cannot run a second time (empty: it can).
        adopt: makes later steps run by a program.
    """

    binding: Binding
    cost: CostModel
    blocker: str
    survivor: Survivor
    adopt: Callable[[Program], None]

    @property
    def keeps_tangents(self) -> bool:
        """Whether the gradients that come from outside are small enough to be held for a replay."""
        examples = [self.binding.examples[slot] for slot in self.binding.tangents]
        return sum(t.numel() * t.element_size() for t in examples) <= MOST_TANGENT_NBYTES

    def covers(self, error: BaseException) -> bool:
        """Whether an error means that there was no memory, and nobody has dealt with it."""
        return covers(error)

    def failure(self, error: BaseException, step: Step, compiled: Compiled) -> Failure:
        """What is to be known of an error; it may go then, with all that its traceback holds."""
        program, index = failed_at(error) or (compiled.program, -1)
        binding, examples = self.binding, self.binding.examples
        shapes = tuple(
            (f"input {position}", tuple(examples[slot].shape), str(examples[slot].dtype).removeprefix("torch."))
            for position, slot in sorted(binding.inputs.items())
        )
        phase = "backward" if step.versions else "forward"
        instr = program[index] if index >= 0 else None
        if isinstance(instr, Run) and phase == "backward":
            forward = binding.graph.ops[instr.op].phase is Phase.FORWARD
            phase = "recompute" if forward else phase
        return Failure(type(error).__name__, str(error), phase, program, index, shapes)

    def written(self, failure: Failure) -> list[str]:
        """The tensors that the forward had changed for good when it failed."""
        graph, binding = self.binding.graph, self.binding
        done = [instr for instr in failure.program.instrs[: max(failure.index, 0) + 1] if isinstance(instr, Run)]
        codes = [binding.ops[run.op] for run in done if is_write(graph.ops[run.op])]
        return [graph.values[binding.slot_value[code.call.args[0].slot]].name for code in codes if code is not None]

    def given_up(self, failure: Failure, why: str) -> OutOfMemoryHere:
        """The error where a step cannot go on."""
        place = "at an unknown place"
        instr = failure.program[failure.index] if failure.index >= 0 else None
        if isinstance(instr, Run):
            place = f"at {self.binding.graph.where(self.binding.graph.ops[instr.op])}"
        note = self.survivor.record(self, failure, f"raised: {why}", None)
        error = cannot_go_on(failure.phase, place, failure.text, why, note)
        error.survivor = id(self.survivor)
        return error

    def told(self, error: BaseException, failure: Failure) -> None:
        """Where failures are only written down: the error itself says where."""
        tell(error, self.survivor.record(self, failure, "raised the error, as asked for", None))


def covers(error: BaseException) -> bool:
    """Whether an error means that there was no memory, and nobody has dealt with it or written it down."""
    if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
        return False
    return not any(str(note).startswith(_TOLD) for note in getattr(error, "__notes__", ()))


def cannot_go_on(phase: str, place: str, text: str, why: str, note: Note) -> OutOfMemoryHere:
    """The error where a step cannot go on.

    Arguments:
        place: "at ...".
        text: of the error that came.
        note: what was written down.
    """
    budget = note.suggested_budget
    remedy = f"Plan for a budget of {budget} bytes, or use a smaller batch" if budget else "Use a smaller batch"
    where = f" {note.path} has the whole." if note.path else ""
    return OutOfMemoryHere(
        f"The device ran out of memory in the {phase} of a planned step, {place} "
        f"({text.strip()}), and the step cannot go on: {why}. {remedy}.{where}",
        phase=phase,
        suggested_budget=budget,
        black_box=note.path,
    )


_TOLD = "Keepless: a planned step ran out of memory"


def tell(error: BaseException, note: Note) -> None:
    """Adds to an error what was written down about it."""
    budget = note.suggested_budget
    lines = [_TOLD]
    lines += [f"a budget of {budget} bytes needs less"] if budget else []
    lines += [f"see {note.path}"] if note.path else []
    text = "; ".join(lines)
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:  # Python 3.10
        error.__dict__.setdefault("__notes__", []).append(text)


def tangents_at(error: BaseException, binding: Binding) -> tuple[torch.Tensor, ...] | None:
    """The gradients that came into a step from outside, where all of them still stood when its backward raised.

    An op that works in place may have written to one before it failed: that one counts as gone.
    """
    place = failed_at(error)
    if place is None:
        return None
    instr = place[0][place[1]]
    own = {binding.slot_value[slot] for slot in binding.tangents}
    if isinstance(instr, Run) and instr.reuse:
        pairs = reuse_pairs(binding.graph, binding.graph.ops[instr.op])
        if any(made in instr.keep and source in own for made, source in pairs):
            return None
    names = locals_at(error)
    found = [names.get(f"t{slot}") for slot in binding.tangents]
    return tuple(t for t in found if t is not None) if all(t is not None for t in found) else None


def make_room(device: torch.device) -> None:
    """Gives back what only cycles of garbage and the allocator's cache hold."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


_LAST = "this is the program of the smallest peak already"
LATER = "later steps keep less"


def begin_again(step: Step, failure: Failure) -> Program:
    """After a forward that failed: everything is as it was before it; the program to begin anew with.

    Raises:
        OutOfMemory: there is none.
    """
    recipe = step.recipe
    rescue = recipe.rescue
    assert rescue is not None
    step.release()
    if step.rng is not None:
        recipe.set_state(step.rng)
    make_room(rescue.binding.device)
    recipe.counters.steps -= 1
    recipe.counters.ooms += 1
    why = ""
    if rescue.blocker.startswith("The forward draws"):
        why = f"{rescue.blocker}, so that it cannot begin anew"
    if changed := rescue.written(failure):
        why = f"the forward had changed {', '.join(changed)} already"
    if step.versions:
        why = "the forward had come to its end already"
    program = None if why else rescue.survivor.tighter(rescue, failure)
    if program is None:
        raise rescue.given_up(failure, why or _LAST)
    rescue.survivor.record(rescue, failure, "began the forward anew under a tighter program", program)
    rescue.adopt(program)
    recipe.counters.tightened += 1
    return program


def go_on(step: Step, index: int, failure: Failure) -> None:
    """After a backward segment that failed: the gradients of this segment are there, made by a tighter program.

    Raises:
        OutOfMemory: there is no tighter program, or the forward cannot run again as it ran; then later steps run by
            the tighter program.
    """
    recipe = step.recipe
    rescue = recipe.rescue
    assert rescue is not None
    while True:
        step.gen.close()
        step.gen = None
        step.grads.clear()
        make_room(rescue.binding.device)
        recipe.counters.ooms += 1
        why = _cannot_run_again(step, rescue)
        program = rescue.survivor.tighter(rescue, failure)
        if why and program is not None:  # of no use to this step
            rescue.adopt(program)
            recipe.counters.tightened += 1
            why = f"{why}; {LATER}"
        if why or program is None:
            step.release()
            raise rescue.given_up(failure, why or _LAST)
        rescue.survivor.record(rescue, failure, "ran the step again under a tighter program", program)
        compiled = compile_step(rescue.binding, program, is_again=True)
        step.gen = _replacement(step, compiled, index)
        try:
            step.advance()
        except BaseException as error:
            forget_frame(error)
            if not rescue.covers(error):
                step.release()
                raise
            failure = rescue.failure(error, step, compiled)
        else:
            rescue.adopt(program)
            recipe.counters.tightened += 1
            return


def _cannot_run_again(step: Step, rescue: Rescue) -> str:
    if rescue.blocker:
        return f"{rescue.blocker}, so that the forward cannot run again as it ran"
    if step.tangents is None:
        return (
            "the gradients that came into it from outside had been used up, and are larger than is held for this; with "
            "the loss inside of the step (keepless.with_loss) they are small"
        )
    for position, argument in enumerate(step.arguments):
        now = 0 if argument.is_inference() else argument._version
        if position not in step.recipe.rewritten and now != step.versions[position]:
            return f"{step.recipe.names[position]} has changed since the forward"
    return ""


def _replacement(step: Step, compiled: Compiled, index: int) -> Iterator[None]:
    """Stands in the place of a step's generator from its segment `index` on: the same gradients at the same yields.

    Gradients that the tighter program makes earlier than the old one are held until their segment.
    """
    recipe, old = step.recipe, step.recipe.compiled.segments
    delivered = {grad for segment in old[:index] for grad in segment}
    outputs: list[torch.Tensor] = []
    grads: list[torch.Tensor] = []
    made: dict[int, torch.Tensor] = {}
    gen: Any = compiled.function(step.arguments, outputs, grads)
    now = recipe.get_state() if recipe.has_rng else None
    try:
        try:
            if step.rng is not None:
                recipe.set_state(step.rng)
            next(gen)
        finally:
            if now is not None:
                recipe.set_state(now)
        outputs.clear()
        grads.extend(step.tangents or ())
        number = 0
        for wanted in old[index:]:
            while not made.keys() >= set(wanted):
                _check_versions(step, compiled.reads[number])
                next(gen)
                names = compiled.segments[number]
                made.update({grad: grads[i] for i, grad in enumerate(names) if grad not in delivered})
                grads.clear()
                number += 1
            step.grads.extend([made.pop(grad) for grad in wanted])
            yield
    finally:
        gen.close()


def _check_versions(step: Step, reads: tuple[int, ...]) -> None:
    """A tighter program reads some arguments later than the old one, which has looked at others."""
    for position in reads:
        argument = step.arguments[position]
        now = 0 if argument.is_inference() else argument._version
        if now != step.versions[position]:
            stale(step.recipe.names[position], now, step.versions[position])
