"""Watching a region's first call: what it reads, writes and draws that is not an argument."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keepless import _compat
from keepless.eager import containers, hooks, randomness, world
from keepless.eager.world import Variable
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


class Effects(TorchDispatchMode):
    """Counts the ops that write in place or draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if draws_of(func, args, kwargs) is not False or writes_of(func, args, kwargs):
            self.count += 1
        return func(*args, **kwargs)


class Unseen(TorchDispatchMode):
    """Around a recompute whose forward went a way that was not watched: raises where that would not be right."""

    def __init__(
        self,
        state: Iterable[tuple[torch.Tensor, Any]],
        clones: Iterable[int],
        random: randomness.State,
        inputs: list[torch.Tensor],
        error: Callable[[str], Exception],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made = {storage_of(tensor) for tensor, _ in state} | {storage_of(inputs[position]) for position in clones}
        self.streams = {stream.key for stream, _ in random}
        self.error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = draws_of(func, args, kwargs)
        if drawn is not False and drawn is not True and id(drawn) not in self.streams:
            raise self.error("drew from a torch.Generator that it had not used")
        for tensor in writes_of(func, args, kwargs):
            if storage_of(tensor) not in self.made:
                raise self.error(f"changed a tensor of shape {list(tensor.shape)} in place")
        result = func(*args, **kwargs)
        self.made.update(storage_of(tensor) for tensor in tensors_in((result,)))
        return result


class Watch(TorchDispatchMode):
    """Sees every op of a region and every module that it calls.

    Attributes:
        inputs: position of an input whose memory was written -> its values before.
        before: id of a tensor that is neither made here nor an input, and was written -> (tensor, its values before).
        read: id of such a tensor that was read or written -> weak reference.
        generators: id -> (stream, state before the first draw).
        called: id -> module.
    """

    def __init__(self, inputs: list[torch.Tensor], count: Callable[[], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given: dict[Any, list[tuple[int, torch.Tensor]]] = {}
        for position, tensor in enumerate(inputs):
            self.given.setdefault(storage_of(tensor), []).append((position, tensor))
        self.judge = hooks.Judge(lambda: (self.effects, count()))
        self.made: set[Any] = set()
        self.owners: dict[Any, torch.Tensor] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.read: dict[int, weakref.ref[torch.Tensor]] = {}
        self.generators: dict[int, tuple[randomness.Stream, Any]] = {}
        self.called: dict[int, torch.nn.Module] = {}
        self.attributes: dict[int, tuple[Any, dict[str, Any]]] = {}
        self.small_buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.globals: list[tuple[dict[str, Any], dict[str, world.Attribute]]] = []
        self.hook_variables: dict[int, list[tuple[int, Variable]]] = {}
        self.effects = 0

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
            self.attributes[id(holder)] = (holder, world.looked_at(holder))

    def look_at_globals(self, home: dict[str, Any], names: Iterable[str]) -> None:
        """Remembers globals that the region's code names."""
        self.globals.append((home, {name: (home[name], containers.content_of(home[name])) for name in names}))

    def route(
        self, call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call of a module inside the region."""
        if id(module) not in self.called:
            self.called[id(module)] = module
            self.look_at(module)
            if hooks.hooks_of(module):
                self.hook_variables[id(module)] = world.variables_of_hooks(module, set())
                self.judge.judge_in(*hooks.hook_dictionaries(module))
            with torch.no_grad():
                for buffer in module._buffers.values():
                    if buffer is not None and buffer.layout is torch.strided and buffer.nbytes <= _SMALL:
                        self.small_buffers.append((buffer, buffer.detach().clone()))
        return call(module, *args, **kwargs)

    def finish(self) -> None:
        """Ends the watching; adds the small buffers that changed without an op that says so."""
        self.judge.effects = _none
        for buffer, before in self.small_buffers:
            if id(buffer) not in self.before and not torch.equal(buffer, before):
                self.before[id(buffer)] = (buffer, before)

    def variables(self, names: set[str]) -> list[Variable]:
        """The attributes that the region set, or that code with these names reads as data, as they were before."""
        found = []
        for holder, before in self.attributes.values():
            changed = set(world.changed(holder, before))
            for name in before.keys() | changed:
                value, content = before.get(name, (world.MISSING, None))
                is_buffer = isinstance(holder, torch.nn.Module) and name in holder._buffers
                if name in changed or (name in names and not is_buffer and world.is_kept_data(value)):
                    found.append(Variable(holder, name, value, content, name in changed))
        for home, before in self.globals:
            for name, (value, content) in before.items():
                is_set = home.get(name) is not value or (content is not None and not content.is_now())
                if is_set or world.is_kept_data(value):
                    found.append(Variable(home, name, value, content, is_set))
        return found


def _none() -> None:
    return None
