"""Watching a region's first call: what it reads, writes and draws that is not an argument."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keepless import _compat
from keepless.eager import modules, randomness
from keepless.errors import StaleTensorError

_SMALL = 1 << 20

# Normalisations write their running statistics without saying so: (running mean, running variance, training).
_SILENT = {
    "aten::native_batch_norm": (3, 4, 5),
    "aten::cudnn_batch_norm": (3, 4, 5),
    "aten::miopen_batch_norm": (3, 4, 5),
}


def storage_of(tensor: torch.Tensor) -> Any:
    """Equal for tensors that share memory; sparse tensors stand for themselves."""
    try:
        return _compat.storage_key(tensor)
    except (NotImplementedError, RuntimeError):
        return ("impl", tensor._cdata)


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an op's arguments or results, lists included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


@functools.cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def writes_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an op changes in place."""
    silent = _SILENT.get(func._schema.name)
    if silent is not None:
        mean, variance, training = silent
        return list(tensors_in(args[mean : variance + 1])) if len(args) > training and args[training] else []
    values = (args[at] if at < len(args) else kwargs.get(name) for at, name in _written(func))
    return list(tensors_in(values))


def draws_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator | bool:
    """The generator that an op was given; True where it draws from a default one, False where it draws nothing."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Generator):
            return value
    return torch.Tag.nondeterministic_seeded in func.tags


class Quiet(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does nothing. A watched forward and its recompute both run under a mode, so that code that asks agrees."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Refuse(TorchDispatchMode):
    """Raises where an op uses one of the tensors that changed since the forward."""

    def __init__(self, changed: Iterable[torch.Tensor], say: Callable[[torch.Tensor], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.changed = {storage_of(tensor): tensor for tensor in changed}
        self.say = say

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((*args, *(kwargs or {}).values())):
            found = self.changed.get(storage_of(tensor))
            if found is not None:
                raise StaleTensorError(self.say(found))
        return func(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Sees every op of a region and every module that it calls.

    Attributes:
        inputs: position of an input whose memory was written -> its values before.
        before: id of a tensor that is neither made here nor an input, and was written -> (tensor, its values before).
        read: id of such a tensor that was read or written -> weak reference.
        generators: id -> (stream, state before the first draw).
        called: id -> module.
    """

    def __init__(self, inputs: list[torch.Tensor], packs: Callable[[], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given: dict[Any, list[tuple[int, torch.Tensor]]] = {}
        for position, tensor in enumerate(inputs):
            self.given.setdefault(storage_of(tensor), []).append((position, tensor))
        self.packs = packs
        self.made: set[Any] = set()
        self.owners: dict[Any, torch.Tensor] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.read: dict[int, weakref.ref[torch.Tensor]] = {}
        self.generators: dict[int, tuple[randomness.Stream, Any]] = {}
        self.called: dict[int, torch.nn.Module] = {}
        self.attributes: dict[int, tuple[Any, dict[str, Any]]] = {}
        self.small_buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.active_hooks: set[int] = set()
        self.seen_hooks: set[int] = set()
        self.effects = 0
        self.stack: contextlib.ExitStack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in((*args, *kwargs.values())):
            key = storage_of(tensor)
            if key not in self.made and key not in self.given and key not in self.owners:
                self.owners[key] = tensor
                self.read[id(tensor)] = weakref.ref(tensor)
        written = writes_of(func, args, kwargs)
        for tensor in written:
            self._before_write(tensor)
        drawn = draws_of(func, args, kwargs)
        if drawn is not False:
            self.effects += 1
            if drawn is not True and id(drawn) not in self.generators:
                stream = randomness.of_generator(drawn)
                self.generators[id(drawn)] = (stream, stream.get())
        self.effects += len(written)
        result = func(*args, **kwargs)
        for tensor in tensors_in((result,)):
            key = storage_of(tensor)
            if key not in self.given and key not in self.owners:
                self.made.add(key)
        return result

    def _before_write(self, tensor: torch.Tensor) -> None:
        key = storage_of(tensor)
        for position, given in self.given.get(key, ()):
            if position not in self.inputs:
                self.inputs[position] = given.detach().clone()
        owner = self.owners.get(key)
        if owner is not None and id(owner) not in self.before:
            self.before[id(owner)] = (owner, owner.detach().clone())

    def look_at(self, holder: Any) -> None:
        """Remembers the attributes of a module or object before the region changes them."""
        if id(holder) not in self.attributes:
            self.attributes[id(holder)] = (holder, modules.own_attributes(holder))

    def route(
        self, call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call of a module inside the region."""
        if id(module) in self.called:
            return call(module, *args, **kwargs)
        self.called[id(module)] = module
        self.look_at(module)
        for dictionary in modules.hook_dictionaries(module):
            self._judge_in(dictionary)
        for buffer in module._buffers.values():
            if buffer is not None and buffer.layout is torch.strided and buffer.nbytes <= _SMALL:
                with torch.no_grad():
                    self.small_buffers.append((buffer, buffer.detach().clone()))
        return call(module, *args, **kwargs)

    def judge_hooks(self, stack: contextlib.ExitStack) -> None:
        """Hooks that run from now until the stack closes are judged: does one do anything but look?"""
        self.stack = stack
        for dictionary in modules.hook_dictionaries():
            self._judge_in(dictionary)

    def _judge_in(self, dictionary: dict[int, Any]) -> None:
        for key, hook in list(dictionary.items()):
            judged = dictionary[key] = self._judge(key, hook)
            self.stack.callback(_unjudge, dictionary, key, judged, hook)

    def _judge(self, key: int, hook: Callable[..., Any]) -> Callable[..., Any]:
        def judged(module: Any, *args: Any, **kwargs: Any) -> Any:
            attributes = modules.own_attributes(module)
            effects, packs = self.effects, self.packs()
            given = hook(module, *args, **kwargs)
            self.seen_hooks.add(key)
            if (
                given is not None
                or effects != self.effects
                or packs != self.packs()
                or modules.changed_attributes(module, attributes)
            ):
                self.active_hooks.add(key)
            return given

        return judged

    def finish(self) -> None:
        """Adds the small buffers that changed without an op that says so."""
        for buffer, before in self.small_buffers:
            if id(buffer) not in self.before and not torch.equal(buffer, before):
                self.before[id(buffer)] = (buffer, before)

    def changed_attributes(self) -> list[tuple[Any, str]]:
        """Attributes of modules and objects that the region set."""
        return [
            (holder, name)
            for holder, before in self.attributes.values()
            for name in modules.changed_attributes(holder, before)
        ]


def _unjudge(dictionary: dict[int, Any], key: int, judged: Any, hook: Any) -> None:
    if dictionary.get(key) is judged:
        dictionary[key] = hook
