"""From a program to one Python generator function: locals are the value table, `del` is free, `yield` hands over.

The generated function takes one tuple of argument tensors and two lists, and looks like this::

    def step(A, O, G):
        (t0, t1, t7) = A
        t9 = f0(t7, t0)
        t10 = f1(t9)
        O.append(t10)
        del t10
        yield                   # the caller has the outputs; the backward begins with the tangents in G
        (t11,) = G
        G.clear()
        t12 = f2(t11, t9)
        G.append(t12)
        del t12
        yield                   # autograd takes the gradients in G
        ...

Views are made where they are first needed and die with their value; one that looks at what a name that stands looks at,
in the same way, is that name again. The names `f0`, `c0` are objects of a table that
becomes the function's globals; nothing of a plan file is ever compiled: the text is made from the captured graph, and
the program adds only the order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch

from keepless import _compat
from keepless.binding import Binding, Call, OpCode, Ref, slots_of
from keepless.capture.aten import Into
from keepless.capture.outs import OutForm, Overload
from keepless.errors import StaleTensorError
from keepless.execute.direct import direct
from keepless.execute.drill import drill_of
from keepless.execute.looks import Looks
from keepless.ir import DEVICE, Drop, Effect, Op, Phase, Program, Run
from keepless.machine import reuse_pairs
from keepless.measure import is_out_of_memory

STEP_FILE = "<keepless step>"
"""What tracebacks call the generated program."""

_LITERALS = (bool, int, str, type(None))


def write_again(error: Exception, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Writes to buffers stand at the forward's end and need next to no memory, so that one that found none is tried
    again where it stands: a forward of which some writes are done cannot begin anew."""
    if not is_out_of_memory(error):
        raise error
    write(*args, **kwargs)


def is_write(op: Op) -> bool:
    """Whether an op does nothing but write to a tensor that was there before the step."""
    return Effect.BUFFER in op.effects and not op.outputs


def stale(name: str, now: int, expected: int) -> None:
    """Says, as autograd does, that what the backward reads was changed since the forward."""
    raise StaleTensorError(
        f"{name} has been modified by an inplace operation between the forward and the backward of a planned step: it "
        f"is at version {now}, expected version {expected}."
    )


@dataclass(frozen=True)
class Compiled:
    """A generated step.

    Arguments:
        text: its source, for people.
        function: (A, O, G) -> generator.
        arguments: slots in the order of A.
        segments: per backward yield, the indices into `Binding.grads` that G then holds, in order.
        reads: per backward segment, the positions in A that it reads.
        num_replays: runs beyond the first of an op.
        program: what it runs.
    """

    text: str
    function: Callable[[tuple[torch.Tensor, ...], list[torch.Tensor], list[torch.Tensor]], Any]
    arguments: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[int, ...], ...]
    num_replays: int
    program: Program


class _Writer:
    """Emits lines, instruction by instruction."""

    def __init__(
        self,
        binding: Binding,
        program: Program,
        mark: Callable[[int], None] | None,
        is_again: bool,
        placed: Mapping[int, tuple[OutForm, tuple[torch.Tensor, ...]]],
    ) -> None:
        self.binding = binding
        self.placed = placed
        self.graph = binding.graph
        self.program = program
        self.is_timed = mark is not None
        self.is_again = is_again
        self.drill = drill_of(program)
        self.table: dict[str, Any] = {"_get_rng": torch.get_rng_state, "_set_rng": torch.set_rng_state, "_stale": stale}
        self.table |= {"_mark": mark, "_drill": self.drill, "_write_again": write_again}
        self.names: dict[int, str] = {}
        self.lines: list[str] = []
        self.arguments: list[int] = sorted(
            {*binding.params.values(), *binding.buffers.values(), *binding.inputs.values(), *binding.constants}
        )
        self.position_of = {slot: position for position, slot in enumerate(self.arguments)}
        argument_set = set(self.arguments)
        self.roots: dict[int, set[int]] = {}
        for slot in argument_set:
            self.roots.setdefault(binding.slot_value[slot], set()).add(slot)
        self.static = {binding.slot_value[slot] for slot in self.arguments}
        self.live: dict[int, list[int]] = {binding.slot_value[slot]: [slot] for slot in self.arguments}
        self.known: set[int] = set(self.arguments)
        self.segments: list[tuple[int, ...]] = []
        self.waiting: list[int] = []
        self.reads: list[tuple[int, ...]] = []
        self.reading: set[int] = set()
        self.in_backward = False
        self.last_read = {
            value: index
            for index, instr in enumerate(program.instrs)
            if isinstance(instr, Run) and self.graph.ops[instr.op].phase is not Phase.OPTIMIZER
            for value in self.graph.ops[instr.op].inputs
        }
        self.held: dict[int, tuple[int, int]] = {}
        self.handed: dict[int, str] = {}
        self.checked: set[int] = set()
        self.looks = Looks(binding)
        self.grad_of_value = {binding.slot_value[slot]: i for i, (_, slot) in enumerate(binding.grads)}
        if binding.device.type == "cuda":
            device = binding.device
            self.table["_get_rng"] = lambda: torch.cuda.get_rng_state(device)
            self.table["_set_rng"] = lambda state: torch.cuda.set_rng_state(state, device)

    # ---- names and expressions

    def named(self, thing: Any, prefix: str) -> str:
        """The global name of an object."""
        name = self.names.get(id(thing))
        if name is None:
            name = f"{prefix}{len(self.names)}"
            self.names[id(thing)] = name
            self.table[name] = thing
        return name

    def expression(self, item: Any) -> str:
        if isinstance(item, Ref):
            return f"t{item.slot}"
        if isinstance(item, torch.Size):
            return self.expression(tuple(item))
        if isinstance(item, tuple):
            return "(" + "".join(self.expression(part) + ", " for part in item) + ")"
        if isinstance(item, list):
            return "[" + ", ".join(self.expression(part) for part in item) + "]"
        if isinstance(item, _LITERALS) or (isinstance(item, float) and math.isfinite(item)):
            return repr(item)
        return self.named(item, "c")

    def call(self, call: Call) -> str:
        target = call.target
        parts = [self.expression(arg) for arg in call.args]
        parts += [f"{key}={self.expression(value)}" for key, value in call.kwargs.items()]
        if isinstance(target, Into):  # without its own call around the op
            parts.append(f"{target.name}={parts[target.position]}")
            target = target.op
        return f"{self.named(direct(target), 'f')}({', '.join(parts)})"

    def ensure(self, call: Call) -> None:
        """Emits the views that a call reads and that do not stand yet."""
        for slot in slots_of(call):
            self.ensure_slot(slot)

    def ensure_slot(self, slot: int) -> None:
        chain = []
        while slot not in self.known:
            twin = next((t for t in self.live.get(self.binding.slot_value[slot], ()) if self.looks.same(slot, t)), None)
            if twin is not None:
                self.lines.append(f"t{slot} = t{twin}")
                self.bind(slot)
                break
            chain.append(slot)
            slot = self.binding.views[slot].source
        self.note_read(slot)
        for view in reversed(chain):
            code = self.binding.views[view]
            item = "" if code.item is None else f"[{code.item}]"
            self.lines.append(f"t{view} = {self.call(code.call)}{item}")
            self.bind(view)

    def note_read(self, slot: int) -> None:
        value = self.binding.slot_value[slot]
        if self.in_backward and value in self.static:
            self.reading.update(self.roots[value])
        elif self.in_backward and value in self.handed and value not in self.checked:
            self.checked.add(value)
            self.lines.append(
                f"t{slot}._version == v{value} or _stale({self.handed[value]!r}, t{slot}._version, v{value})"
            )

    def bind(self, slot: int) -> None:
        names = self.live.setdefault(self.binding.slot_value[slot], [])
        if slot not in names:
            names.append(slot)
        self.known.add(slot)

    def forget(self, value: int) -> None:
        """Emits `del` for every name of a value."""
        if value in self.static or value in self.held:
            return
        slots = self.live.pop(value, [])
        self.handed.pop(value, None)
        if slots:
            self.lines.append("del " + ", ".join(f"t{slot}" for slot in slots))
            self.known.difference_update(slots)

    # ---- instructions

    def run(self, index: int, run: Run) -> None:
        op = self.graph.ops[run.op]
        code = self.binding.ops[run.op]
        if op.phase is Phase.LOSS:
            self.loss(index)
        elif code is not None and is_write(op):
            if not self.is_again:
                self.write_to_buffer(index, code.call)
        elif code is not None:
            self.lines += [f"_drill({index})"] * (self.drill is not None)
            self.compute(index, run, code)
        elif op.phase is Phase.BACKWARD:
            self.deliver(index, run)

    def compute(self, index: int, run: Run, code: OpCode) -> None:
        call = code.call
        if run.replay and code.replay is not None and code.first_only.isdisjoint(run.keep):
            call = code.replay
        if run.reuse:
            pairs = [p for p in reuse_pairs(self.graph, self.graph.ops[run.op]) if p[0] in run.keep]
            assert len(pairs) == 1, "one in-place form per op"
            call = code.in_place[pairs[0]]
        self.ensure(call)
        state = f"r{code.state}"
        restores = code.state is not None and run.replay
        if restores:
            self.lines += ["r = _get_rng()", f"_set_rng({state})", "try:"]
            body = len(self.lines)
        elif code.state in run.keep:
            self.lines.append(f"{state} = _get_rng()")
        kept = [(item, slot) for item, slot, value in code.outputs if value in run.keep]
        placed = self.placed.get(index)
        text = self.call(call) if placed is None else ""
        if placed is not None:
            self.call_into(*placed, call, code, run)
        elif not kept:
            self.lines.append(text)
        elif kept[0][0] is None:
            self.lines.append(f"t{kept[0][1]} = {text}")
        elif len(kept) == 1:
            self.lines.append(f"t{kept[0][1]} = {text}[{kept[0][0]}]")
        else:
            width = max(item for item, _ in kept if item is not None) + 1
            targets = ["_"] * width
            for item, slot in kept:
                targets[item or 0] = f"t{slot}"
            returns = len(call.target._schema.returns) if isinstance(call.target, _compat.OpOverload) else -1
            rest = "" if width == returns else ", *_"
            self.lines.append(f"{', '.join(targets)}{rest} = {text}")
            if rest or "_" in targets:
                self.lines.append("del _")
        if restores:
            self.lines[body:] = ["    " + line for line in self.lines[body:]]
            self.lines += ["finally:", "    _set_rng(r)", "del r"]
        if run.reuse:
            self.forget(pairs[0][1])
        for _, slot in kept:
            self.bind(slot)

    def write_to_buffer(self, index: int, call: Call) -> None:
        self.ensure(call)
        text = self.call(call)
        name, _, arguments = text.partition("(")
        drill = [f"    _drill({index})"] * (self.drill is not None)
        again = f"    _write_again(error, {name}, {arguments}"
        self.lines += ["try:", *drill, "    " + text, "except Exception as error:", again]

    def call_into(self, form: OutForm, results: tuple[torch.Tensor, ...], call: Call, code: OpCode, run: Run) -> None:
        """Emits a call that writes into tensors of the arena, and their names."""
        names = [self.named(tensor, "b") for tensor in results]
        parts = [self.expression(arg) for arg in call.args]
        keywords = [f"{key}={self.expression(value)}" for key, value in call.kwargs.items()]
        if isinstance(form, Overload):
            parts += [*keywords, *(f"{key}={name}" for key, name in zip(form.names, names, strict=True))]
            self.lines.append(f"{self.named(_compat.raw_op(form.found), 'f')}({', '.join(parts)})")
        else:
            parts = [f"({', '.join(names)},)", *parts, *keywords]
            self.lines.append(f"{self.named(form, 'f')}({', '.join(parts)})")
        for name, (_, slot, value) in zip(names, code.outputs, strict=True):
            if value in run.keep:
                self.lines.append(f"t{slot} = {name}")

    def loss(self, index: int) -> None:
        given: set[int] = set()
        later = self.read_later(index)
        shared: dict[int, int] = {}
        for position in sorted(self.binding.outputs):
            slot = self.binding.outputs[position]
            self.ensure_slot(slot)
            # The caller gets tensors of its own: autograd marks them, and they may be changed in place. A tensor that
            # the backward reads stays here, under another name: else the frame would hold its own autograd node.
            value = self.binding.slot_value[slot]
            own = slot not in self.binding.views and slot not in self.arguments and slot not in given
            own = own and value not in later
            if value in later and value not in self.static and value not in shared:
                shared[value] = slot
                self.lines.append(f"v{value} = t{slot}._version")
                self.handed[value] = f"output {position}"
            self.lines.append(f"O.append(t{slot})" if own else f"O.append(t{slot}.detach())")
            given.add(slot)
        for value in self.graph.ops[self.graph.loss_op or 0].inputs:
            if value not in later:  # the caller holds it: it needs no name here
                self.forget(value)
        tangents = "".join(f"t{slot}, " for slot in self.binding.tangents)
        # Tangents come in a list that is emptied here, so that no caller's frame keeps them alive.
        self.lines += ["yield", f"({tangents}) = G", "G.clear()"]
        for slot in self.binding.tangents:
            self.bind(slot)
        self.in_backward = True

    def deliver(self, index: int, run: Run) -> None:
        value = next(v for v in self.graph.ops[run.op].inputs if v in self.grad_of_value)
        grad = self.grad_of_value[value]
        slot = self.binding.grads[grad][1]
        self.ensure_slot(slot)
        name = self.binding.grads[grad][0]
        last = self.last_read[value]
        if isinstance(name, str):
            last = max(last, self.last_read.get(self.binding.slot_value[self.binding.params[name]], -1))
        if last > index:  # an optimizer in the backward may change both: their last readers must have run
            self.held[value] = (last, grad)
        else:
            self.hand_over(value, grad)
        if not self.waiting:
            return
        following = next((i for i in self.program.instrs[index + 1 :] if isinstance(i, Run)), None)
        if following is None or not self.is_delivery(following):
            self.cut()

    def hand_over(self, value: int, grad: int) -> None:
        self.lines.append(f"G.append(t{self.binding.grads[grad][1]})")
        self.waiting.append(grad)
        self.forget(value)

    def is_delivery(self, run: Run) -> bool:
        return self.binding.ops[run.op] is None and self.graph.ops[run.op].phase is Phase.BACKWARD

    def cut(self) -> None:
        """Ends a segment."""
        self.lines.append("yield")
        self.segments.append(tuple(self.waiting))
        self.reads.append(tuple(sorted(self.position_of[slot] for slot in self.reading)))
        self.waiting, self.reading = [], set()
        self.checked.clear()

    def read_later(self, index: int) -> set[int]:
        """Values that a later instruction reads."""
        return {
            value
            for instr in self.program.instrs[index + 1 :]
            if isinstance(instr, Run)
            for value in self.graph.ops[instr.op].inputs
        }

    def write(self) -> Compiled:
        place: list[int] = []
        for index, instr in enumerate(self.program.instrs):
            if isinstance(instr, Run):
                self.run(index, instr)
                for value, (last, grad) in list(self.held.items()):
                    if last <= index:
                        del self.held[value]
                        self.hand_over(value, grad)
            elif isinstance(instr, Drop) and instr.tier == DEVICE:
                self.forget(instr.value)
                if self.graph.values[instr.value].kind.value == "rng":
                    self.lines.append(f"del r{instr.value}")
            self.lines += [f"_mark({index})"] * self.is_timed
            place += [index] * (len(self.lines) - len(place))
        if self.waiting:
            self.cut()
        unpack = f"({''.join(f't{slot}, ' for slot in self.arguments)}) = A"
        head = ["def step(A, O, G):", f"    {unpack}", "    del A", *["    _mark(-1)"] * self.is_timed]
        text = "\n".join([*head, *[f"    {line}" for line in self.lines], ""])
        code: CodeType = compile(text, STEP_FILE, "exec")
        space = dict(self.table)
        space["_failed_at"] = _Place(self.program, tuple(place), len(head) + 1)
        exec(code, space)
        return Compiled(
            text,
            space["step"],
            tuple(self.arguments),
            tuple(self.segments),
            tuple(self.reads),
            self.program.num_replays,
            self.program,
        )


def compile_step(
    binding: Binding,
    program: Program,
    mark: Callable[[int], None] | None = None,
    *,
    is_again: bool = False,
    placed: Mapping[int, tuple[OutForm, tuple[torch.Tensor, ...]]] | None = None,
) -> Compiled:
    """The generated step of a verified program.

    Arguments:
        mark: called with -1 first, then with each instruction's index when it ends.
        is_again: the forward ran before: what it writes to buffers is left out.
        placed: by instruction, a form that stands for its op's call, and the tensors into which it writes.
    """
    return _Writer(binding, program, mark, is_again, placed or {}).write()


@dataclass(frozen=True)
class _Place:
    """Which instruction a line of a generated step belongs to."""

    program: Program
    instr_of_line: tuple[int, ...]
    first_line: int


def failed_at(error: BaseException) -> tuple[Program, int] | None:
    """The program and the instruction in which a generated step raised; None where none did.

    The traceback is enough: ordinary steps do nothing for it.
    """
    found: tuple[Program, int] | None = None
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == STEP_FILE:
            place: _Place = step.tb_frame.f_globals["_failed_at"]
            line = step.tb_lineno - place.first_line
            lines = place.instr_of_line
            found = place.program, lines[min(max(line, 0), len(lines) - 1)] if lines else -1
        step = step.tb_next
    return found


def locals_at(error: BaseException) -> dict[str, Any]:
    """The names that stood in a generated step when it raised; empty where none did."""
    found: dict[str, Any] = {}
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == STEP_FILE:
            found = dict(step.tb_frame.f_locals)
        step = step.tb_next
    return found


def forget_frame(error: BaseException) -> None:
    """A traceback must not keep the activations of a step that failed."""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == STEP_FILE:
            step.tb_frame.clear()
        step = step.tb_next
