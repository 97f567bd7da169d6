"""A model's state around trial steps: what a forward changes is put back, before each step and at the end.

Buffers, tensors, arrays and plain values in modules' attributes and in the containers and objects that those hold,
hooks, gradients, the batch, and every stream of random numbers that a forward can reach by name. Parameters are not
copied: a trial step does not change them, and hooks of gradients, which may step an optimizer, are kept out of it.
"""

from __future__ import annotations

import contextlib
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from keepless import _compat
from keepless._compat.backwards import hooks_of
from keepless.capture.side_effects import CONTAINERS, HOSTS
from keepless.eager import randomness, world
from keepless.eager.profile import global_streams

_SCALARS = frozenset({int, float, bool, str, bytes, complex})
_INTERNAL = frozenset(torch.nn.Module().__dict__) - {"training"} | {"_compiled_call_impl"}


class Before:
    """What a model and its batch were like; `again` makes the model so again."""

    def __init__(self, model: torch.nn.Module, device: torch.device, batch: Iterable[torch.Tensor]) -> None:
        self.modules = list(model.modules())
        self.attributes = [_attributes(module) for module in self.modules]
        self.buffers = [dict(module._buffers) for module in self.modules]
        own = [table for m in self.modules for table in (m._parameters, m._modules)]
        self.registered: list[tuple[dict[str, Any], dict[str, Any]]] = [(table, table.copy()) for table in own]
        # Libraries hang hooks on modules in the first forward, and note in an attribute that they did.
        self.hooks = [(table, table.copy()) for module in self.modules for table in _hook_tables(module)]
        given = list(batch)
        held = _held([*self.attributes, *self.buffers], {id(tensor) for tensor in (*given, *model.parameters())})
        self.tensors = [
            (value, value.detach().clone())
            for value in held
            if isinstance(value, torch.Tensor) and _can_be_written(value)
        ]
        self.arrays = [(value, value.copy()) for value in held if type(value) is np.ndarray and value.flags.writeable]
        self.contents = [(value, _copied(value)) for value in held if type(value) in CONTAINERS]
        self.objects = [(vars(value), vars(value).copy()) for value in held if _is_object(value)]
        # The batch may stand in memory that cannot be written: it is put back only where it was changed.
        self.batch = [
            (tensor, tensor.detach().clone(), tensor._version)
            for tensor in given
            if _can_be_written(tensor) and not tensor.is_inference()
        ]
        leaves = (tensor for tensor in given if tensor.requires_grad and tensor.is_leaf)
        written = [tensor for tensor, _ in self.tensors] + [tensor for tensor, _, _ in self.batch]
        written = [tensor for tensor in written if not tensor.is_inference()]
        self.versions = written, _compat.versions(written)
        self.gradients = [(tensor, tensor.grad) for tensor in (*model.parameters(), *leaves)]
        tables = ((p, p._post_accumulate_grad_hooks) for p in model.parameters())
        self.steppers = [(p, table, dict(table or ())) for p, table in tables]
        watched = (hooks_of(tensor) for tensor, _ in self.gradients)
        self.watchers = [(hooks, dict(hooks)) for hooks in watched if hooks]
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
            for index, (tensor, values, version) in enumerate(self.batch):
                if tensor._version != version:
                    tensor.data.copy_(values)
                    self.batch[index] = tensor, values, tensor._version
        for array, content in self.arrays:
            array[...] = content
        # Never empty: other threads may use these.
        for own, attributes in (*self.objects, *self.registered):
            for name in [name for name in own if name not in attributes]:
                del own[name]
            own.update(attributes)
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

    def changed(self, but_random: Iterable[randomness.Stream] = ()) -> str:
        """The first thing that is not as it was, in words; empty where all is. Gradients are left out.

        Arguments:
            but_random: streams of random numbers that may have been drawn from.
        """
        for module, attributes, buffers in zip(self.modules, self.attributes, self.buffers, strict=True):
            kind, now = type(module).__name__, _attributes(module)
            names = [name for name in {**attributes, **now} if name != "forward"]
            other = next((name for name in names if not _is_same(now, attributes, name)), None)
            if other is not None:
                return f"the attribute {other!r} of a {kind}"
            if not _are_same(module._buffers, buffers):
                return f"which buffers a {kind} has"
            for name, buffer in buffers.items():
                held = next((values for tensor, values in self.tensors if tensor is buffer), None)
                if buffer is not None and held is not None and not torch.equal(buffer, held):
                    return f"the buffer {name!r} of a {kind}"
        if any(not torch.equal(tensor, values) for tensor, values in self.tensors):
            return "a tensor that an attribute holds"
        if any(tensor._version != version for tensor, _, version in self.batch):
            return "its batch"
        if any(not np.array_equal(array, content) for array, content in self.arrays):
            return "an array that an attribute holds"
        if not all(_are_same(own, before) for own, before in (*self.objects, *self.registered)):
            return "an object that an attribute holds"
        if not all(list(table.items()) == list(hooks.items()) for table, hooks in self.hooks):
            return "hooks"
        if not all(_is_content(container, content) for container, content in self.contents):
            return "a list, a dictionary or a set that an attribute holds"
        allowed = {stream.key for stream in but_random}
        drawn = next((stream.name for stream in randomness.moved(self.random) if stream.key not in allowed), None)
        return "" if drawn is None else f"the state of {drawn}"

    def versions_again(self) -> None:
        """Sets back how often each tensor was changed: graphs that the caller made before go on to be valid."""
        _compat.set_versions(*self.versions)

    def without_gradients(self) -> None:
        """Takes the gradients off, those of the batch's tensors, too."""
        for tensor, _ in self.gradients:
            tensor.grad = None

    def gradients_again(self) -> None:
        """Puts the gradients back."""
        for tensor, gradient in self.gradients:
            tensor.grad = gradient

    def without_steppers(self) -> None:
        """Takes off what the caller runs whenever a gradient is there: it may step an optimizer, count, or log."""
        for _, table, _ in self.steppers:
            if table:
                table.clear()
        for hooks, _ in self.watchers:
            hooks.clear()

    def steppers_again(self) -> None:
        """Puts it back."""
        for parameter, table, hooks in self.steppers:
            if table is None:
                parameter._post_accumulate_grad_hooks = None
            else:
                table.clear()
                table.update(hooks)
        for hooks, kept in self.watchers:
            hooks.clear()
            hooks.update(kept)


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _INTERNAL}


_NOTHING = object()


def _is_same(now: dict[str, Any], before: dict[str, Any], name: str) -> bool:
    one, other = now.get(name, _NOTHING), before.get(name, _NOTHING)
    return one is other or (type(one) in _SCALARS and type(one) is type(other) and one == other)


def _are_same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(_is_same(now, before, name) for name in now)


def _is_content(container: Any, content: Any) -> bool:
    if isinstance(container, dict):
        return list(container) == list(content) and all(container[key] is content[key] for key in content)
    if isinstance(container, set):
        return len(container) == len(content) and set(map(id, container)) == set(map(id, content))
    return len(container) == len(content) and all(a is b for a, b in zip(container, content, strict=True))


def _hook_tables(module: torch.nn.Module) -> list[dict[Any, Any]]:
    return [value for name, value in module.__dict__.items() if "hook" in name and isinstance(value, dict)]


def _held(tables: list[dict[str, Any]], others: set[int]) -> list[Any]:
    """What the tables hold, and what containers and objects in them do; `others` is left out."""
    found: dict[int, Any] = {}
    left = [value for table in tables for name, value in table.items() if name != "forward"]
    while left:
        value = left.pop()
        if value is None or type(value) in _SCALARS or id(value) in found or id(value) in others:
            continue
        found[id(value)] = value
        if isinstance(value, dict) and type(value) in CONTAINERS:
            left += value.values()
        elif isinstance(value, (list, tuple, deque)):
            left += value
        elif _is_object(value):
            left += vars(value).values()
    return list(found.values())


def _is_object(value: Any) -> bool:
    if isinstance(value, torch.nn.Module) or type(value).__module__.partition(".")[0] in HOSTS:
        return False
    return world.is_plain(value) or type(value) is types.SimpleNamespace


def _can_be_written(tensor: torch.Tensor) -> bool:
    """Whether a copy in place can put a tensor's values back; memory that it overlaps itself in cannot be written."""
    if isinstance(tensor, torch.nn.Parameter) or tensor.is_meta:
        return False
    return tensor.layout is not torch.strided or not _compat.overlaps_itself(tensor)


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, (list, deque)) else value.copy()


@contextlib.contextmanager
def untouched(model: torch.nn.Module, device: torch.device, batch: Iterable[torch.Tensor]) -> Iterator[Before]:
    """The model is as it was when the block ends, whatever happens in it; it begins without gradients.

    Arguments:
        batch: tensors of the call; those that are leaves get no gradient from what runs in the block.
    """
    before = Before(model, device, batch)
    try:
        before.without_gradients()
        before.without_steppers()
        yield before
    finally:
        before.again()
        before.versions_again()
        before.gradients_again()
        before.steppers_again()
