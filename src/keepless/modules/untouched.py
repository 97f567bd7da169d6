"""A model's state around trial steps: what a forward changes is put back, before each step and at the end.

Buffers, tensors and plain values in modules' attributes, lists, dicts and sets there, hooks, gradients, and every
stream of random numbers that a forward can reach by name. Parameters are not copied: a trial step does not change them.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from keepless.eager import randomness
from keepless.eager.profile import global_streams

_CONTAINERS = (list, dict, set, deque)
_INTERNAL = frozenset(torch.nn.Module().__dict__) - {"training"}


class Before:
    """What a model and its batch were like; `again` makes the model so again."""

    def __init__(self, model: torch.nn.Module, device: torch.device, batch: Iterable[torch.Tensor]) -> None:
        self.modules = list(model.modules())
        self.attributes = [_attributes(module) for module in self.modules]
        self.buffers = [dict(module._buffers) for module in self.modules]
        # Libraries hang hooks on modules in the first forward, and note in an attribute that they did.
        self.hooks = [(table, table.copy()) for module in self.modules for table in _hook_tables(module)]
        held = [*_values(self.attributes), *_values(self.buffers)]
        self.tensors = [
            (value, value.detach().clone())
            for value in held
            if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and not value.is_meta
        ]
        self.contents = [(value, _copied(value)) for value in held if type(value) in _CONTAINERS]
        leaves = (tensor for tensor in batch if tensor.requires_grad and tensor.is_leaf)
        self.gradients = [(tensor, tensor.grad) for tensor in (*model.parameters(), *leaves)]
        streams = [randomness.DEFAULT, *global_streams(), *randomness.streams_in(held)]
        if device.type != "cpu":
            streams += randomness.device_streams([device])
        self.random = randomness.save({stream.key: stream for stream in streams}.values())

    def again(self) -> None:
        """Puts everything back but the gradients."""
        for module, attributes, buffers in zip(self.modules, self.attributes, self.buffers, strict=True):
            own = module.__dict__
            for name in [name for name in own if name not in attributes and name not in _INTERNAL]:
                if name != "forward":
                    del own[name]
            own.update((name, value) for name, value in attributes.items() if name != "forward")
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, values in self.tensors:
                tensor.data.copy_(values)
        for table, hooks in self.hooks:
            table.clear()
            table.update(hooks)
        for container, content in self.contents:
            container.clear()
            if isinstance(container, (list, deque)):
                container.extend(content)
            else:
                container.update(content)
        randomness.put(self.random)

    def without_gradients(self) -> None:
        """Takes the gradients off, those of the batch's tensors, too."""
        for tensor, _ in self.gradients:
            tensor.grad = None

    def gradients_again(self) -> None:
        """Puts the gradients back."""
        for tensor, gradient in self.gradients:
            tensor.grad = gradient


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _INTERNAL}


def _hook_tables(module: torch.nn.Module) -> list[dict[Any, Any]]:
    return [value for name, value in module.__dict__.items() if "hook" in name and isinstance(value, dict)]


def _values(tables: list[dict[str, Any]]) -> list[Any]:
    found: dict[int, Any] = {id(value): value for table in tables for value in table.values()}
    return list(found.values())


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, (list, deque)) else value.copy()


@contextlib.contextmanager
def untouched(model: torch.nn.Module, device: torch.device, batch: Iterable[torch.Tensor]) -> Iterator[Before]:
    """The model is as it was when the block ends, whatever happens in it; it begins without gradients.

    Arguments:
        batch: tensors of the call; those that are leaves get no gradient from what runs in the block.
    """
    before = Before(model, device, batch)
    before.without_gradients()
    try:
        yield before
    finally:
        before.again()
        before.gradients_again()
