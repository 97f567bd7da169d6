"""Watching a region's first call: what it reads, writes and draws that is not an argument."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from keepless import _compat
from keepless.eager import containers, hooks, randomness, world
from keepless.eager.calls import draws_of, fills_late, reads_values, storage_of, tensors_in, writes_of
from keepless.eager.world import Variable
from keepless.errors import StaleTensorError

_SMALL = 1 << 20


class Refuse(TorchFunctionMode):
    """Raises where a call uses one of the tensors that changed since the forward."""

    def __init__(self, changed: Iterable[torch.Tensor], say: Callable[[torch.Tensor], str]) -> None:
        super().__init__()
        self.changed = {storage_of(tensor): tensor for tensor in changed}
        self.say = say

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if reads_values(func):
            for tensor in tensors_in((*args, *kwargs.values())):
                found = self.changed.get(storage_of(tensor))
                if found is not None:
                    raise StaleTensorError(self.say(found))
        return func(*args, **kwargs)


class Effects(TorchFunctionMode):
    """Counts the calls that write in place or draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if draws_of(func, args, kwargs) is not False or writes_of(func, args, kwargs):
            self.count += 1
        return func(*args, **kwargs)


class Unseen(TorchFunctionMode):
    """Around a recompute whose forward went a way that was not watched: raises where that would not be right."""

    def __init__(
        self,
        state: Iterable[tuple[torch.Tensor, Any]],
        clones: Iterable[int],
        random: randomness.State,
        inputs: list[torch.Tensor],
        error: Callable[[str], Exception],
    ) -> None:
        super().__init__()
        self.made = {storage_of(tensor) for tensor, _ in state} | {storage_of(inputs[position]) for position in clones}
        self.streams = {stream.key for stream, _ in random}
        self.error = error
        self.start = _compat.next_node_number()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = draws_of(func, args, kwargs)
        if isinstance(drawn, torch.Generator) and id(drawn) not in self.streams:
            raise self.error("drew from a torch.Generator that it had not used")
        for tensor in writes_of(func, args, kwargs):
            if storage_of(tensor) not in self.made and not _compat.is_made_since(tensor, self.start):
                raise self.error(f"changed a tensor of shape {list(tensor.shape)} in place")
        result = func(*args, **kwargs)
        self.made.update(storage_of(tensor) for tensor in tensors_in((result,)))
        return result


class Watch(TorchFunctionMode):
    """Sees every call of torch in a region, and every module that it calls.

    Attributes:
        inputs: position of an input whose memory was written -> its values before.
        before: id of a tensor that is neither made here nor an input, and was written -> (tensor, its values before).
        read: id of such a tensor that was read or written -> weak reference.
        generators: id -> (stream, state before the first draw).
        called: id -> module.
    """

    def __init__(self, inputs: list[torch.Tensor], count: Callable[[], int]) -> None:
        super().__init__()
        self.given: dict[Any, list[tuple[int, torch.Tensor]]] = {}
        for position, tensor in enumerate(inputs):
            self.given.setdefault(storage_of(tensor), []).append((position, tensor))
        itself = weakref.proxy(self)  # a ring would hold the inputs where an early stop ends the call
        self.judge = hooks.Judge(lambda: (itself.effects, count()))
        self.made: set[Any] = set()
        self.start = _compat.next_node_number()
        self.lost = ""
        self.fills_late = False
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

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outer = []
        for tensor in tensors_in((*args, *kwargs.values())):
            key = storage_of(tensor)
            if key in self.made:
                continue
            if key not in self.given and key not in self.owners:
                if _compat.is_made_since(tensor, self.start):  # by a custom function
                    self.made.add(key)
                    continue
                self.owners[key] = tensor
                self.read[id(tensor)] = weakref.ref(tensor)
            outer.append(tensor)
        written = writes_of(func, args, kwargs)
        for tensor in written:
            self._before_write(tensor)
        drawn = draws_of(func, args, kwargs)
        if isinstance(drawn, torch.Generator) and id(drawn) not in self.generators:
            stream = randomness.of_generator(drawn)
            self.generators[id(drawn)] = (stream, stream.get())
        self.fills_late = self.fills_late or fills_late(func)
        self.effects += len(written) + (drawn is not False)
        versions = _compat.versions(outer)
        result = func(*args, **kwargs)
        if outer and _compat.versions(outer) != versions:
            self._after_write(func, outer, versions)
        for tensor in tensors_in((result,)):
            key = storage_of(tensor)
            if key not in self.given and key not in self.owners:
                self.made.add(key)
        return result

    def _after_write(self, func: Any, outer: list[torch.Tensor], versions: list[int]) -> None:
        for tensor, now, before in zip(outer, _compat.versions(outer), versions, strict=True):
            key = storage_of(tensor)
            owner = self.owners.get(key)
            is_saved = owner is not None and (
                id(owner) in self.before or any(b is owner for b, _ in self.small_buffers)
            )
            is_cloned = all(position in self.inputs for position, _ in self.given.get(key, ())) and key in self.given
            if now != before and not is_saved and not is_cloned:
                self.lost = f"{getattr(func, '__name__', func)} changed a tensor of shape {list(tensor.shape)}"
        self.effects += 1

    def _before_write(self, tensor: torch.Tensor) -> None:
        key = storage_of(tensor)
        with _compat.own_ops():
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
            self.meet(module)
            if hooks.hooks_of(module):
                self.hook_variables[id(module)] = world.variables_of_hooks(module, set())
                self.judge.judge_in(*hooks.hook_dictionaries(module))
        return call(module, *args, **kwargs)

    def meet(self, module: torch.nn.Module) -> None:
        """Remembers a module's attributes, and the values of its small buffers."""
        self.called[id(module)] = module
        self.look_at(module)
        with torch.no_grad(), _compat.own_ops():
            for buffer in module._buffers.values():
                if buffer is not None and buffer.layout is torch.strided and buffer.nbytes <= _SMALL:
                    self.small_buffers.append((buffer, buffer.detach().clone()))

    def finish(self) -> None:
        """Adds the small buffers that changed without an op that says so."""
        with _compat.own_ops():
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
