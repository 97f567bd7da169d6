"""Guards: whether a call of the model means the step that was captured."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from keepless import _compat
from keepless.binding import Binding
from keepless.capture import FlatInputs
from keepless.capture.facts import MISSING, attribute_of, copy_of, equal_constants, same_items
from keepless.capture.inputs import tensor_facts
from keepless.errors import ReplayError

_AMBIENT_NAMES = (
    "autocast",
    "autocast dtype",
    "autocast cache",
    "default dtype",
    "deterministic algorithms",
    "attention and mkldnn kernels",
    "torch-function modes",
)


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
        tables = [getattr(m, t) for m in model.modules() for t in ("_parameters", "_buffers", "_modules")]
        self._tables = tables
        self._table_size = sum(map(len, tables))
        self._absent = [(t, key) for t in tables for key, item in t.items() if item is None]
        self._hooks = [getattr(m, table) for m in self._modules for table in _HOOKS]
        by_path = dict(model.named_modules())
        self._attributes = [
            (by_path[path].__dict__ if path else None, type(by_path[path]), name, value, copy_of(value))
            for path, name, value in binding.attributes
            if path in by_path
        ]
        self._spec = flat.spec
        # A call whose arguments are all leaves needs no flattening, which takes as long as all else here.
        args, kwargs = _compat.tree_unflatten(list(range(len(flat.leaves))), flat.spec)
        plain = [*args, *kwargs.values()] == list(range(len(flat.leaves)))
        self._num_args = len(args) if plain else -1
        self._names = tuple(kwargs)
        self._constants = [(i, leaf) for i, leaf in enumerate(flat.leaves) if i not in flat.first]
        self._tensors = [(i, flat.facts[i]) for i in flat.tensor_positions]
        self._repeats = [(i, first) for i, first in flat.first.items() if i != first]
        self._ambient = binding.ambient
        self._device_type = binding.device.type
        state = {**_homes(model, "_parameters"), **_homes(model, "_buffers")}
        wanted = {slot: name for name, slot in (*binding.params.items(), *binding.buffers.items())}
        inputs = {slot: position for position, slot in binding.inputs.items()}
        self._state = [(*state[name], name) for name in wanted.values()]
        order_of = {name: i for i, name in enumerate(wanted.values())}
        first_name = {id(home[key]): name for home, key, name in self._state}
        self._twins = [
            (home, key, order_of[first_name[id(home[key])]])
            for name, (home, key) in state.items()
            if name not in order_of and home[key] is not None and id(home[key]) in first_name
        ]
        self._state_facts = [tensor_facts(home[key]) for home, key, _ in self._state]
        order = {slot: i for i, slot in enumerate(wanted)}
        self._are_as_planned: Callable[[list[torch.Tensor]], bool] | None = None
        self._looks_left = _MOST_LOOKS
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
        # Of each argument among state, constants and the call's leaves, one after the other.
        begins = (0, len(self._state) + len(self._fixed), len(self._state))
        self._places = [begins[kind] + index for kind, index in self._plan]
        self._facts, self._asked = binding.facts, binding.asked
        made = {name for name, _ in binding.grads}
        self._gradless = [] if binding.accumulates else [i for i, name in enumerate(wanted.values()) if name in made]
        self._homes = [(name, read, binding.constants[slot]) for slot, (name, read) in binding.constant_homes.items()]
        self.names = tuple(
            wanted.get(slot) or (f"input {inputs[slot]}" if slot in inputs else "a constant") for slot in arguments
        )

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound | str:
        """The call's tensors, or what differs from the captured step."""
        leaves: Any = (*args, *kwargs.values())
        if len(args) != self._num_args or tuple(kwargs) != self._names or not _LEAVES.issuperset(map(type, leaves)):
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
            now = tensor_facts(leaf)
            if now != facts:
                return _difference(f"argument {position}", _TENSOR_NAMES, now, facts)
        for position, first in self._repeats:
            if leaves[position] is not leaves[first]:
                return f"arguments {first} and {position} are two tensors, planned for one given twice"
        if len(self._tensors) > 1 and len({id(leaves[i]) for i, _ in self._tensors}) != len(self._tensors):
            return "two arguments are one tensor, planned for two"
        ambient = _compat.ambient_state(self._device_type)
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
        if sum(map(len, self._tables)) != self._table_size:
            return "the model has gained or lost a parameter, a buffer or a submodule"
        for table, key in self._absent:
            if table[key] is not None:
                return f"{key}, which was None, is set"
        if any(self._hooks):
            return "a submodule has hooks"
        for attributes, kind, name, value, copy in self._attributes:
            now = (model.__dict__ if attributes is None else attributes).get(name, MISSING)
            if now is MISSING:
                now = getattr(kind, name, MISSING)
            if copy is not None and type(now) is type(value):
                changed = not same_items(now, copy)
            else:
                changed = now is not value and not equal_constants(now, value)
            if changed:
                return f"the attribute {name} was {_short(value)[:80]} and is {_short(now)[:80]}"
        for fact in self._facts:
            now = fact.read(*fact.place)
            if now is not fact.value and not equal_constants(now, fact.value):
                return f"{fact.label}, which the model's code reads, was {fact.value!r:.80} and is {now!r:.80}"
        for name, read, constant in self._homes:
            if read() is not constant:
                return f"{name}, which the forward reads, is another tensor"
        state = [home[key] for home, key, _ in self._state]
        for home, key, index in self._twins:
            if home[key] is not state[index]:
                return f"{self._state[index][2]} is no longer tied to {key}"
        if self._are_as_planned is None or not self._are_as_planned(state):
            reason = self._other_state(state)
            if reason:
                return reason
            self._looks_left -= 1  # where the mode around calls changes each time, they only cost
            self._are_as_planned = _compat.quick_look(state) if self._looks_left > 0 else None
        if self._asked is not None and (reason := self._asked(leaves)):
            return reason
        arguments = tuple(map([*state, *self._fixed, *leaves].__getitem__, self._places))
        return Bound(arguments, tuple([leaves[i] for i, _ in self._tensors]))

    def _other_state(self, state: list[torch.Tensor]) -> str:
        """What is not as planned of parameters and buffers, in words."""
        if len(set(map(id, state))) != len(state):
            return "two parameters or buffers have become one tensor"
        for tensor, facts, (_, _, name) in zip(state, self._state_facts, self._state, strict=True):
            if (
                tensor is None
                or tensor.requires_grad is not facts[3]
                or tensor.shape != facts[1]
                or tensor.dtype is not facts[0]
                or tensor.device != facts[4]
                or tensor.stride() != facts[2]
            ):
                if tensor is None:
                    return f"{name} is None"
                return _difference(name, _TENSOR_NAMES, tensor_facts(tensor), facts)
        return ""

    def standing_gradient(self) -> str:
        """What is wrong if gradients stand already and the step has no room for them; else empty."""
        for index in self._gradless:
            home, key, name = self._state[index]
            if home[key].is_leaf and home[key].grad is not None:
                return f"{name} has a gradient already (accumulation, or zero_grad after the forward), planned for none"
        return ""

    @contextlib.contextmanager
    def as_planned(self, arguments: tuple[torch.Tensor, ...], rewritten: frozenset[int]) -> Iterator[None]:
        """The modes of the planned step, for a replay; buffers that the forward changes are copies while it runs.

        Raises:
            ReplayError: the model no longer holds the tensors of that step, or has other attributes.
        """
        model = self._model()
        assert model is not None
        for (kind, index), argument in zip(self._plan, arguments, strict=True):
            home, key, name = self._state[index] if kind == 0 else ({}, "", "")
            if kind == 0 and home.get(key) is not argument:
                raise ReplayError(f"{name} has been replaced since the forward, so that it cannot be replayed.")
        for attributes, owner, name, value, _ in self._attributes:
            now = attribute_of(model.__dict__ if attributes is None else attributes, owner, name)
            if now is not value and not equal_constants(now, value):
                raise ReplayError(f"The attribute {name} has changed since the forward, so that it cannot be replayed.")
        for fact in self._facts:
            now = fact.read(*fact.place)
            if now is not fact.value and not equal_constants(now, fact.value):
                raise ReplayError(f"{fact.label} has changed since the forward, so that it cannot be replayed.")
        before = [model.training, *[module.training for module in self._modules]]
        modules = [model, *self._modules]
        homes = [self._state[self._plan[position][1]][:2] for position in sorted(rewritten)]
        buffers = [home[key] for home, key in homes]
        try:
            for (home, key), buffer in zip(homes, buffers, strict=True):
                home[key] = buffer.clone()
            for module, training in zip(modules, [self._root_training, *self._training], strict=True):
                module.training = training
            yield
        finally:
            for module, training in zip(modules, before, strict=True):
                module.training = training
            for (home, key), buffer in zip(homes, buffers, strict=True):
                home[key] = buffer


_MOST_LOOKS = 8
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LEAVES = frozenset({torch.Tensor, torch.nn.Parameter, bool, int, float, str, type(None)})


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
