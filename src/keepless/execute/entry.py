"""A captured step that is ready to run: its guard, its generated program, and how its outputs are put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from keepless import _compat
from keepless.binding import Binding
from keepless.capture import FlatInputs, StandingForward
from keepless.cost import CostModel
from keepless.errors import ReplayError
from keepless.execute.arena import Arena
from keepless.execute.codegen import Compiled, compile_step
from keepless.execute.guard import Bound, Guard
from keepless.execute.nodes import Recipe, Replayed, Step, run_step
from keepless.execute.recovery import Rescue, Survivor, begin_again
from keepless.ir import Effect, Phase, Program

_TENSOR, _ARGUMENT, _CONSTANT = 0, 1, 2
"""Where a flat output comes from: the step, its arguments as they are, the capture."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One captured step that a planned forward can run.

    Arguments:
        cost: of the captured step's ops; None where it is not known.
        again: what to do when the entry is used a second time; each is called once.
    """

    guard: Guard
    recipe: Recipe
    binding: Binding
    program: Program
    flat: FlatInputs
    output_layout: tuple[tuple[int, Any], ...]
    leaf_arguments: tuple[int, ...]
    replay_blocker: str
    cost: CostModel | None = None
    again: list[Callable[[], None]] = field(default_factory=list)

    @property
    def compiled(self) -> Compiled:
        """The generated step."""
        return self.recipe.compiled


def run_entry(standing: StandingForward, entry: Entry, bound: Bound) -> Any:
    """Runs a captured step for a call that its guard has let pass; the forward's output.

    Arguments:
        standing: what stands in the place of the forward that was captured.
    """
    arguments = bound.arguments
    leaves = [arguments[i] for i in entry.leaf_arguments]
    while True:
        recipe = entry.recipe
        step = Step(recipe, arguments, leaves, _Replay(standing, entry, arguments, bound.inputs))
        try:
            tensors = run_step(step)
            break
        except Exception as error:
            rescue = recipe.rescue
            if rescue is None or not rescue.covers(error):
                raise
            failure = rescue.failure(error, step, recipe.compiled)
            if not rescue.survivor.survives:
                rescue.told(error, failure)
                raise
        entry = reprogrammed(entry, begin_again(step, failure))  # out of the handler, which holds the failed step
    flat = [
        tensors[what] if kind == _TENSOR else arguments[what] if kind == _ARGUMENT else what
        for kind, what in entry.output_layout
    ]
    return _compat.tree_unflatten(flat, entry.binding.output_spec)


class _Replay:
    """Runs the model's own forward as the planned one ran, for a second or double backward."""

    __slots__ = ("ambient", "arguments", "entry", "inputs", "planned")

    def __init__(
        self,
        planned: StandingForward,
        entry: Entry,
        arguments: tuple[torch.Tensor, ...],
        inputs: tuple[torch.Tensor, ...],
    ) -> None:
        self.arguments = arguments
        self.planned = planned
        self.entry = entry
        self.inputs = inputs
        self.ambient = entry.binding.ambient

    def __call__(self, cut_off: bool) -> Replayed:
        """See `ReplayForward`.

        Inputs that come from a graph stand outside of the replayed one: what is before them may lead to the same
        parameters (a module that is called again and again), and is not to run now. A double backward needs the whole.
        """
        binding = self.entry.binding
        if self.entry.replay_blocker:
            raise ReplayError(
                f"{self.entry.replay_blocker}, so that the forward cannot be replayed for a second or double backward, "
                "or for a gradient in another layout than was planned for."
            )
        model = self.planned._model()
        if model is None:
            raise ReplayError("The model is gone; its forward cannot be replayed.")
        stand_ins = {
            id(tensor): tensor.detach().requires_grad_()
            for tensor in self.inputs
            if cut_off and tensor.requires_grad and not tensor.is_leaf
        }
        args, kwargs = self.entry.flat.rebuild([stand_ins.get(id(tensor), tensor) for tensor in self.inputs])
        device_type = binding.device.type
        enabled, dtype, cache = self.ambient[:3]
        if _compat.ambient_state(device_type)[3:] != self.ambient[3:]:
            raise ReplayError("The default dtype or torch's choice of kernels has changed since the forward.")
        with (
            self.entry.guard.as_planned(self.arguments, self.entry.recipe.rewritten),
            torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache),
        ):
            output = self.planned.original(*args, **kwargs)
        leaves, _ = _compat.tree_flatten(output)
        constants = binding.output_constants
        return [t for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and i not in constants], stand_ins


def make_entry(
    model: torch.nn.Module,
    flat: FlatInputs,
    binding: Binding,
    program: Program,
    mark: Callable[[int], None] | None = None,
    cost: CostModel | None = None,
) -> Entry:
    """Lowers a verified program for a model; the model is not changed.

    Arguments:
        mark: told when instructions end.
        cost: of the captured step's ops, for tighter programs where there is no memory.
    """
    compiled = compile_step(binding, program, mark)
    guard = Guard(model, flat, binding, compiled.arguments)
    positions = tuple(sorted(binding.outputs))
    differentiable = tuple(positions.index(p) for p in binding.grad_outputs)
    plain = tuple(i for i, p in enumerate(positions) if not binding.examples_require_grad[p])
    has_rng = any(Effect.RNG in op.effects for op in binding.graph.ops)
    if binding.device.type == "cuda":
        device = binding.device

        def get_state() -> torch.Tensor:
            return torch.cuda.get_rng_state(device)

        def set_state(state: torch.Tensor) -> None:
            torch.cuda.set_rng_state(state, device)
    else:
        get_state = torch.get_rng_state

        def set_state(state: torch.Tensor) -> None:
            torch.set_rng_state(state)

    slots = {slot: i for i, slot in enumerate(compiled.arguments)}

    def argument_of(name: str | int) -> int:
        return slots[binding.params[name] if isinstance(name, str) else binding.inputs[name]]

    layout: dict[int, tuple[int, Any]] = {i: (_CONSTANT, constant) for i, constant in binding.output_constants.items()}
    for i, position in enumerate(positions):
        layout[position] = (_TENSOR, i)
        if position in binding.passed_through and position not in binding.grad_outputs:
            layout[position] = (_ARGUMENT, slots[binding.passed_through[position]])
    for position, first in binding.repeated.items():
        if position not in binding.grad_outputs:
            layout[position] = layout[first]
    others = [
        i for i, p in enumerate(positions) if i not in plain and i not in differentiable and layout[p] == (_TENSOR, i)
    ]
    blocker, rewritten = _what_blocks_replay(binding)
    recipe = Recipe(
        compiled,
        differentiable,
        plain,
        len(positions),
        tuple(range(len(binding.grads))),
        guard.names,
        binding.device.type,
        tuple(others) if binding.aside else (),
        tuple(argument_of(name) for name in binding.aside),
        frozenset(slots[slot] for slot in rewritten),
        has_rng,
        get_state,
        set_state,
        layouts=tuple(binding.examples[slot] for slot in binding.tangents),
    )
    leaf_arguments = tuple(argument_of(name) for name, _ in binding.grads)
    ordered = tuple(layout[position] for position in sorted(layout))
    return Entry(guard, recipe, binding, program, flat, ordered, leaf_arguments, blocker, cost)


def reprogrammed(entry: Entry, program: Program) -> Entry:
    """The entry of another verified program for the same captured step: for the same calls, by the same guard."""
    compiled = compile_step(entry.binding, program)
    assert compiled.arguments == entry.compiled.arguments
    return replace(entry, recipe=replace(entry.recipe, compiled=compiled, arena=None), program=program)


def with_arena(entry: Entry, arena: Arena) -> Entry:
    """The entry with an arena that was made for its program."""
    compiled = compile_step(entry.binding, entry.program, placed=arena.runs)
    assert compiled.arguments == entry.compiled.arguments
    assert compiled.segments == entry.compiled.segments
    return replace(entry, recipe=replace(entry.recipe, arena=(arena, compiled)))


def equip(entry: Entry, cost: CostModel, survivor: Survivor, adopt: Callable[[Program], None]) -> None:
    """Gives an entry what it needs to survive where there is no memory; `adopt` makes later steps run by a program."""
    recipe = entry.recipe
    recipe.rescue = Rescue(entry.binding, cost, entry.replay_blocker, survivor, adopt)
    recipe.keeps_tangents = survivor.survives and recipe.rescue.keeps_tangents


def _what_blocks_replay(binding: Binding) -> tuple[str, tuple[int, ...]]:
    """Why the user's forward cannot run a second time with the same results (empty: it can), and the buffers that
    it changes without reading them back, such as running statistics."""
    graph = binding.graph
    slot_of = {binding.slot_value[slot]: slot for slot in (*binding.params.values(), *binding.buffers.values())}
    buffers = {binding.slot_value[slot] for slot in binding.buffers.values()}
    written: set[int] = set()
    for op, code in zip(graph.ops, binding.ops, strict=True):
        if Effect.BUFFER in op.effects and not op.outputs and code is not None:
            written.add(binding.slot_value[code.call.args[0].slot])
        if code is not None and any(isinstance(arg, torch.Generator) for arg in code.call.kwargs.values()):
            return "The forward draws from a generator of its own", ()
    for value in sorted(written - buffers):
        return f"The forward changes {graph.values[value].name} in place", ()
    needed = {value for op in graph.ops if op.phase is not Phase.FORWARD for value in op.inputs}
    for op, code in zip(reversed(graph.ops), reversed(binding.ops), strict=True):
        if op.phase is not Phase.FORWARD or not needed.intersection(op.outputs):
            continue
        read = written.intersection(op.inputs)
        if read and (code is None or code.replay is None):
            return f"The forward reads {graph.values[min(read)].name}, which it also changes", ()
        needed.update(op.inputs)
    return "", tuple(slot_of[value] for value in written)
