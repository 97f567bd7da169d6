"""The graph engine: a planned forward in the place of the model's own.

`PlannedForward` sits in the module's `__dict__` under "forward". A call that means a captured step runs that step's
program; evaluation, `no_grad` and torch.func transforms run the model's own forward; any other call is a miss.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keepless import _compat
from keepless.binding import Binding
from keepless.capture import FlatInputs, is_tracing
from keepless.errors import GuardError, PlanError, ReplayError
from keepless.execute.codegen import Compiled, compile_step
from keepless.execute.guard import Guard, ambient_state
from keepless.execute.nodes import Counters, Recipe, Step, run_step
from keepless.ir import Effect, Phase, Program


@dataclass(frozen=True)
class Entry:
    """One captured step that a planned forward can run."""

    guard: Guard
    recipe: Recipe
    binding: Binding
    program: Program
    flat: FlatInputs
    output_positions: tuple[int, ...]
    leaf_arguments: tuple[int, ...]

    @property
    def compiled(self) -> Compiled:
        """The generated step."""
        return self.recipe.compiled


Miss = Callable[[tuple[Any, ...], dict[str, Any], str], Entry]
"""What a planned forward does about a call that no entry covers: gives a new entry, or raises."""


class PlannedForward:
    """The forward of a planned model.

    Attributes:
        entries: captured steps, the latest used first.
        counters: what happened beside the plan.
    """

    def __init__(self, model: torch.nn.Module, entries: Sequence[Entry], on_miss: Miss | None) -> None:
        self._model = weakref.ref(model)
        own = model.__dict__.get("forward")
        self._instance_forward = own
        self._function = type(model).forward
        self.entries = list(entries)
        self.on_miss = on_miss
        self.counters = Counters()
        for entry in self.entries:
            entry.recipe.counters = self.counters
        self.__signature__ = inspect.signature(model.forward)
        self.__name__ = "forward"
        self.__doc__ = model.forward.__doc__

    @property
    def original(self) -> Callable[..., Any]:
        """The model's own forward."""
        if self._instance_forward is not None:
            own: Callable[..., Any] = self._instance_forward
            return own
        model = self._model()
        assert model is not None, "the model is gone"
        return types.MethodType(self._function, model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or is_tracing() or _compat.transforms_active():
            return self._unplanned(args, kwargs)
        reason = ""
        for entry in self.entries:
            bound = entry.guard.check(args, kwargs)
            if not isinstance(bound, str):
                return self._planned(entry, bound.arguments, bound.inputs)
            reason = reason or bound
        model = self._model()
        if model is not None and not model.training:
            return self._unplanned(args, kwargs)
        if self.on_miss is None:
            raise GuardError(
                f"This call is not the step that the model was planned for: {reason}. Plan for it too, or call "
                "keepless.remove(model) first."
            )
        entry = self.on_miss(args, kwargs, reason)
        entry.recipe.counters = self.counters
        self.entries.insert(0, entry)
        bound = entry.guard.check(args, kwargs)
        if isinstance(bound, str):
            raise GuardError(f"A plan made for this very call does not cover it: {bound}.")
        return self._planned(entry, bound.arguments, bound.inputs)

    def _unplanned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.counters.unplanned_calls += 1
        return self.original(*args, **kwargs)

    def _planned(self, entry: Entry, arguments: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> Any:
        recipe, binding = entry.recipe, entry.binding
        leaves = [arguments[i] for i in entry.leaf_arguments]
        step = Step(recipe, arguments, leaves, _Replay(self, entry, inputs))
        tensors = run_step(step)
        flat = [None] * (len(binding.outputs) + len(binding.output_constants))
        return _compat.tree_unflatten(_merge(flat, entry.output_positions, tensors, binding), binding.output_spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied model has no plan: its forward is its own."""
        model = self._model()
        copied = memo.get(id(model))
        if copied is None:
            raise PlanError("A planned forward cannot be copied without its model.")
        return types.MethodType(self._function, copied)

    def __reduce__(self) -> Any:
        raise PlanError("A planned model cannot be pickled: call keepless.remove(model) first, or save state_dict().")


def _merge(flat: list[Any], positions: tuple[int, ...], tensors: tuple[Any, ...], binding: Binding) -> list[Any]:
    for position, tensor in zip(positions, tensors, strict=True):
        flat[position] = tensor
    for position, constant in binding.output_constants.items():
        flat[position] = constant
    return flat


class _Replay:
    """Runs the model's own forward as the planned one ran, for a second or double backward."""

    __slots__ = ("ambient", "entry", "inputs", "planned")

    def __init__(self, planned: PlannedForward, entry: Entry, inputs: tuple[torch.Tensor, ...]) -> None:
        self.planned = planned
        self.entry = entry
        self.inputs = inputs
        self.ambient = ambient_state(entry.binding.device.type)

    def __call__(self) -> Sequence[torch.Tensor]:
        binding = self.entry.binding
        graph = binding.graph
        if any(Effect.BUFFER in op.effects and op.phase is Phase.FORWARD and op.outputs for op in graph.ops):
            raise ReplayError(
                "The forward reads a buffer that it also changes, so that it cannot be replayed for a second or "
                "double backward."
            )
        model = self.planned._model()
        if model is None:
            raise ReplayError("The model is gone; its forward cannot be replayed.")
        args, kwargs = self.entry.flat.rebuild(self.inputs)
        device_type = binding.device.type
        enabled, dtype, cache = self.ambient[:3]
        saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            with torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache):
                output = self.planned.original(*args, **kwargs)
        finally:
            with torch.no_grad():
                for buffer, before in saved:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)
        leaves, _ = _compat.tree_flatten(output)
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def make_entry(model: torch.nn.Module, flat: FlatInputs, binding: Binding, program: Program) -> Entry:
    """Lowers a verified program for a model; the model is not changed."""
    compiled = compile_step(binding, program)
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

    recipe = Recipe(
        compiled, differentiable, plain, tuple(range(len(binding.grads))), guard.names, has_rng, get_state, set_state
    )
    slots = {slot: i for i, slot in enumerate(compiled.arguments)}
    leaf_arguments = tuple(
        slots[binding.params[name] if isinstance(name, str) else binding.inputs[name]] for name, _ in binding.grads
    )
    return Entry(guard, recipe, binding, program, flat, positions, leaf_arguments)
