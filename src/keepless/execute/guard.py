"""Guards: whether a call of the model means the step that was captured."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from keepless import _compat
from keepless.binding import Binding
from keepless.capture import FlatInputs


def ambient_state(device_type: str) -> tuple[Any, ...]:
    """What changes the captured ops without being an argument."""
    return (
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )


_AMBIENT_NAMES = ("autocast", "autocast dtype", "autocast cache", "default dtype", "deterministic algorithms")


def _tensor_facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad, tensor.device, type(tensor))


_TENSOR_NAMES = ("dtype", "shape", "strides", "requires_grad", "device", "class")


@dataclass(frozen=True)
class Bound:
    """Arguments of a call that passed the guard: tensors in the order of the generated function's A."""

    arguments: tuple[torch.Tensor, ...]
    inputs: tuple[torch.Tensor, ...]


class Guard:
    """Facts of the captured step, compared with each call (about 30 us for a hundred modules)."""

    def __init__(self, model: torch.nn.Module, flat: FlatInputs, binding: Binding, arguments: tuple[int, ...]) -> None:
        self._model = weakref.ref(model)
        self._modules = [module for module in model.modules() if module is not model]
        self._training = [module.training for module in self._modules]
        self._root_training = model.training
        self._children = [
            (module._modules, name, child) for module in model.modules() for name, child in module._modules.items()
        ]
        self._spec = flat.spec
        self._constants = [(i, leaf) for i, leaf in enumerate(flat.leaves) if not isinstance(leaf, torch.Tensor)]
        self._tensors = [(i, _tensor_facts(flat.leaves[i])) for i in flat.tensor_positions]
        self._repeats = [(i, first) for i, first in flat.first.items() if i != first]
        self._ambient = ambient_state(binding.device.type)
        self._device_type = binding.device.type
        state = {**_homes(model, "_parameters"), **_homes(model, "_buffers")}
        wanted = {slot: name for name, slot in (*binding.params.items(), *binding.buffers.items())}
        inputs = {slot: position for position, slot in binding.inputs.items()}
        self._state = [(*state[name], name) for name in wanted.values()]
        self._state_facts = [_tensor_facts(home[key]) for home, key, _ in self._state]
        order = {slot: i for i, slot in enumerate(wanted)}
        self._fixed: list[torch.Tensor] = []
        self._plan: list[tuple[int, int]] = []
        for slot in arguments:
            if slot in order:
                self._plan.append((0, order[slot]))
            elif slot in inputs:
                self._plan.append((1, inputs[slot]))
            else:
                self._plan.append((2, len(self._fixed)))
                self._fixed.append(binding.constants[slot])
        self.names = tuple(
            wanted.get(slot) or (f"input {inputs[slot]}" if slot in inputs else "a constant") for slot in arguments
        )

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound | str:
        """The call's tensors, or what differs from the captured step."""
        leaves, spec = _compat.tree_flatten((args, kwargs))
        if spec != self._spec:
            return "the arguments have another structure"
        for position, constant in self._constants:
            leaf = leaves[position]
            if leaf is not constant and (type(leaf) is not type(constant) or leaf != constant):
                return f"argument {position} is {leaf!r}, planned for {constant!r}"
        for position, facts in self._tensors:
            leaf = leaves[position]
            if not isinstance(leaf, torch.Tensor):
                return f"argument {position} is a {type(leaf).__name__}, planned for a tensor"
            now = _tensor_facts(leaf)
            if now != facts:
                return _difference(f"argument {position}", _TENSOR_NAMES, now, facts)
        for position, first in self._repeats:
            if leaves[position] is not leaves[first]:
                return f"arguments {first} and {position} are two tensors, planned for one given twice"
        if len(self._tensors) > 1 and len({id(leaves[i]) for i, _ in self._tensors}) != len(self._tensors):
            return "two arguments are one tensor, planned for two"
        ambient = ambient_state(self._device_type)
        if ambient != self._ambient:
            return _difference("the state around the call", _AMBIENT_NAMES, ambient, self._ambient)
        model = self._model()
        if model is None or model.training is not self._root_training:
            return "the model is in another mode (train or eval)"
        if [module.training for module in self._modules] != self._training:
            return "a submodule is in another mode (train or eval)"
        for modules, name, child in self._children:
            if modules.get(name) is not child:
                return f"the submodule {name} was replaced"
        state = [home[key] for home, key, _ in self._state]
        for tensor, facts, (_, _, name) in zip(state, self._state_facts, self._state, strict=True):
            if (
                tensor.requires_grad is not facts[3]
                or tensor.shape != facts[1]
                or tensor.dtype is not facts[0]
                or tensor.device != facts[4]
                or tensor.stride() != facts[2]
            ):
                return _difference(name, _TENSOR_NAMES, _tensor_facts(tensor), facts)
        arguments: tuple[torch.Tensor, ...] = tuple(
            [state[i] if kind == 0 else leaves[i] if kind == 1 else self._fixed[i] for kind, i in self._plan]
        )
        return Bound(arguments, tuple([leaves[i] for i, _ in self._tensors]))


def _homes(model: torch.nn.Module, table: str) -> dict[str, tuple[dict[str, Any], str]]:
    """Qualified name -> (the module's own table, key), so that a replaced tensor is seen."""
    return {
        f"{prefix}.{key}" if prefix else key: (getattr(module, table), key)
        for prefix, module in model.named_modules()
        for key in getattr(module, table)
    }


def _difference(what: str, names: tuple[str, ...], now: tuple[Any, ...], planned: tuple[Any, ...]) -> str:
    for name, a, b in zip(names, now, planned, strict=True):
        if a != b:
            return f"{what} has {name} {_short(a)}, planned for {_short(b)}"
    return f"{what} differs"


def _short(item: Any) -> str:
    return str(tuple(item)) if isinstance(item, torch.Size) else str(item)
