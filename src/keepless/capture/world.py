"""What a captured step rests on beside its arguments: modules, modes, constants. A template asks if it still is so."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from keepless import _compat
from keepless.capture.constants import find_home
from keepless.capture.facts import attribute_of, copy_of, equal_constants, find_facts, same_items
from keepless.capture.inputs import tensor_facts
from keepless.capture.state import forward_of, named_state, planned_device


class World:
    """The model and what is around it, at the time of a trace.

    Arguments:
        model: in its modes.
        attributes: (module path, name, value) of the plain attributes that the forward read.
        constants: tensors that the forward read and that live elsewhere.
    """

    def __init__(
        self, model: torch.nn.Module, attributes: tuple[tuple[str, str, Any], ...], constants: list[torch.Tensor]
    ) -> None:
        self._model = weakref.ref(model)
        self._modules: list[tuple[str, Any, bool]] = [
            (name, weakref.ref(module), module.training) for name, module in model.named_modules()
        ]
        self._forward = _plain(forward_of(model))
        self._state = [(name, tensor_facts(t)) for name, t in named_state(model)]
        self._aliases = _aliases(model)
        self._attributes = [(path, name, value, copy_of(value)) for path, name, value in attributes]
        self.facts = find_facts(model, attributes)
        self._homes = [(home, t) for t in constants if (home := find_home(model, t)) is not None]
        self._ambient = _compat.ambient_state(planned_device(model).type)

    def difference(self, model: torch.nn.Module) -> str | None:
        """What is not as it was; None where nothing is."""
        if self._model() is not model:
            return "it is another model"
        now: list[tuple[str, torch.nn.Module]] = list(model.named_modules())
        if len(now) != len(self._modules):
            return "the model has gained or lost a submodule"
        for (name, module), (was, ref, training) in zip(now, self._modules, strict=True):
            if name != was or ref() is not module:
                return f"the submodule {was} was replaced"
            if module.training is not training:
                return f"{name or 'the model'} is in another mode (train or eval)"
        if _plain(forward_of(model)) != self._forward:
            return "the model has another forward"
        if [(name, tensor_facts(t)) for name, t in named_state(model)] != self._state:
            return "a parameter or buffer has another shape, dtype, device or requires_grad"
        if _aliases(model) != self._aliases:
            return "parameters or buffers are tied in another way"
        if _compat.ambient_state(planned_device(model).type) != self._ambient:
            return "autocast, the default dtype or another switch of torch is set in another way"
        by_path = dict(now)
        for path, key, value, copy in self._attributes:
            part = by_path[path]
            found = attribute_of(part.__dict__, type(part), key)
            same = same_items(found, copy) if copy is not None and type(found) is type(value) else found is value
            if not same and not (copy is None and equal_constants(found, value)):
                return f"the attribute {f'{path}.{key}'.lstrip('.')} has changed"
        for fact in self.facts:
            found = fact.read(*fact.place)
            if found is not fact.value and not equal_constants(found, fact.value):
                return f"{fact.label}, which the model's code reads, has changed"
        for (name, read), tensor in self._homes:
            if read() is not tensor:
                return f"{name}, which the forward reads, is another tensor"
        return None


def _plain(forward: Any) -> tuple[Any, Any]:
    """A bound method by its two halves, which can be compared."""
    return getattr(forward, "__func__", forward), id(getattr(forward, "__self__", None))


def _aliases(model: torch.nn.Module) -> list[int]:
    """For every place of a tensor in the model, the first place of one with its storage."""
    first: dict[Any, int] = {}
    tensors = [t for m in model.modules() for table in (m._parameters, m._buffers) for t in table.values()]
    return [-1 if t is None else first.setdefault(_compat.storage_key(t), i) for i, t in enumerate(tensors)]
