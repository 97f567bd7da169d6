"""Watching a region's first call: what it reads, writes and draws that is not an argument."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from keepless import _compat
from keepless._compat import graphs
from keepless.eager import containers, hooks, memory, randomness, world
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
        self.start = graphs.next_node_number()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = draws_of(func, args, kwargs)
        if isinstance(drawn, torch.Generator) and id(drawn) not in self.streams:
            raise self.error("drew from a torch.Generator that it had not used")
        for tensor in writes_of(func, args, kwargs):
            if storage_of(tensor) not in self.made and not graphs.is_made_since(tensor, self.start):
                raise self.error(f"changed a tensor of shape {list(tensor.shape)} in place")
        result = func(*args, **kwargs)
        self.made.update(storage_of(tensor) for tensor in tensors_in((result,)))
        return result


def _unseen(tensors: Iterable[torch.Tensor]) -> AbstractContextManager[Any]:
    """Watches around this one need not see how it looks: each would look three times as often as the one inside.

    Tensors with a class of their own are asked as that class will have it.
    """
    is_plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
    return _compat.without_functions() if is_plain else contextlib.nullcontext()


class Watch(TorchFunctionMode):
    """Sees every call of torch in a region, and every module that it calls.

    Attributes:
        inputs: position of an input whose memory was written -> its values before.
        before: tensors that are neither made here nor an input, and were written, each with its values before; what was
            saved first comes last, so that putting them back in this order is right where they share memory.
        written: the bytes of these that were written.
        lost: what was changed and cannot be put back; empty where there is nothing such.
        read: id of such a tensor that was read or written -> weak reference.
        generators: id -> (stream, state before the first draw).
        called: id -> module.
        tail: how many calls of torch came after the last one that saved something.
    """

    watches_region = True

    def __init__(self, inputs: list[torch.Tensor], count: Callable[[], int]) -> None:
        super().__init__()
        self.given: dict[Any, list[tuple[int, torch.Tensor]]] = {}
        for position, tensor in enumerate(inputs):
            self.given.setdefault(storage_of(tensor), []).append((position, tensor))
        itself = weakref.proxy(self)  # a ring would hold the inputs where an early stop ends the call
        self.judge = hooks.Judge(lambda: (itself.effects, count()))
        self.made: set[Any] = set()
        self.start = graphs.next_node_number()
        self.lost = ""
        self.fills_late = False
        self.owners: dict[Any, torch.Tensor] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.written = memory.Extents()
        self._saved = memory.Extents()
        self.read: dict[int, weakref.ref[torch.Tensor]] = {}
        self.generators: dict[int, tuple[randomness.Stream, Any]] = {}
        self.called: dict[int, torch.nn.Module] = {}
        self.attributes: dict[int, tuple[Any, dict[str, Any]]] = {}
        self.small_buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.globals: list[tuple[dict[str, Any], dict[str, world.Attribute]]] = []
        self.hook_variables: dict[int, list[tuple[int, Variable]]] = {}
        self.effects = 0
        self.tail = 0
        self._count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in((*args, *kwargs.values())))
        with _unseen(given):
            outer, versions = self._before_call(func, args, kwargs, given)
        saved = self._count()
        result = func(*args, **kwargs)
        self.tail = 0 if self._count() != saved else self.tail + 1
        made = list(tensors_in((result,)))
        with _unseen((*outer, *made)):
            if outer and _compat.versions(outer) != versions:
                self._after_write(func, outer, versions)
            for tensor in made:
                key = storage_of(tensor)
                if key not in self.given and key not in self.owners:
                    self.made.add(key)
        return result

    def _before_call(
        self, func: Any, args: Any, kwargs: Any, given: Iterable[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[int]]:
        """The tensors of a call that were there before the region, and the version of each."""
        outer = []
        for tensor in given:
            key = storage_of(tensor)
            if key in self.made:
                continue
            if key not in self.given and key not in self.owners:
                if graphs.is_made_since(tensor, self.start):  # by a custom function
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
        return outer, _compat.versions(outer)

    def _after_write(self, func: Any, outer: list[torch.Tensor], versions: list[int]) -> None:
        for tensor, now, before in zip(outer, _compat.versions(outer), versions, strict=True):
            key = storage_of(tensor)
            owner = self.owners.get(key)
            is_saved = owner is not None and (
                self._saved.cover(memory.extent_of(tensor)) or any(b is owner for b, _ in self.small_buffers)
            )
            is_cloned = all(position in self.inputs for position, _ in self.given.get(key, ())) and key in self.given
            if now != before and not is_saved and not is_cloned:
                self.lost = (
                    f"{getattr(func, '__name__', func)} changed a tensor of shape {list(tensor.shape)} in place, and "
                    "is not known to do that"
                )
        self.effects += 1

    def _before_write(self, tensor: torch.Tensor) -> None:
        key = storage_of(tensor)
        with _compat.own_ops():
            self._before_own_write(key, tensor)

    def _before_own_write(self, key: int, tensor: torch.Tensor) -> None:
        if key in self.given:
            self._before_write_of_input(tensor, self.given[key])
        owner = self.owners.get(key)
        if owner is None:
            return
        extent = memory.extent_of(tensor)
        self.written.add(extent)
        if not self._saved.cover(extent):
            target, saved = memory.whole(owner, extent)
            self._saved.add(saved)
            self.before.insert(0, (target, target.detach().clone()))

    def _before_write_of_input(self, tensor: torch.Tensor, sharing: list[tuple[int, torch.Tensor]]) -> None:
        for position, given in sharing:
            if position not in self.inputs:
                self.inputs[position] = given.detach().clone()
        seen = [p for p, given in sharing if memory.share_elements(given, tensor)] if len(sharing) > 1 else []
        extent = memory.extent_of(tensor)
        if not any(memory.covers(memory.extent_of(given), extent) for _, given in sharing):
            self.lost = f"memory beside its input {sharing[0][0]} was changed in place"
        elif len(seen) > 1:
            self.lost = f"its inputs {seen[0]} and {seen[1]} share the memory that was changed in place"

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
        """Ends the watching; adds the small buffers that changed without an op that says so."""
        with _compat.own_ops():
            for buffer, before in self.small_buffers:
                extent = memory.extent_of(buffer)
                if not self._saved.cover(extent) and not torch.equal(buffer, before):
                    self._saved.add(extent)
                    self.written.add(extent)
                    self.before.insert(0, (buffer, before))

    def is_named_input(self, value: Any) -> bool:
        """Whether a tensor that the region finds by name shares memory with an input that it changed."""
        return isinstance(value, torch.Tensor) and any(
            memory.share_elements(given, value)
            for position, given in self.given.get(storage_of(value), ())
            if position in self.inputs
        )

    def variables(self, names: set[str], stored: set[str], roots: set[int]) -> list[Variable]:
        """The attributes that the region set, or that its code reads as data or may set, as they were before.

        `names` are those in the code, `stored` those of attributes that it sets, on objects of the user's classes
        and on `roots`. A tensor that the region used counts whatever its name, which may be computed.
        """
        found = []
        for holder, before in self.attributes.values():
            changed = set(world.changed(holder, before))
            for name in before.keys() | changed:
                value, content = before.get(name, (world.MISSING, None))
                is_buffer = isinstance(holder, torch.nn.Module) and name in holder._buffers
                is_read = name in names or (isinstance(value, torch.Tensor) and storage_of(value) in self.owners)
                if name in changed or (is_read and not is_buffer and world.is_kept_data(value)):
                    found.append(Variable(holder, name, value, content, name in changed))
            if stored and (id(holder) in roots or not world.is_foreign(holder)):
                missing = world.may_get(holder, stored) - before.keys() - changed
                found += [Variable(holder, name, world.MISSING, None, False) for name in sorted(missing)]
        for home, before in self.globals:
            for name, (value, content) in before.items():
                is_set = home.get(name) is not value or (content is not None and not content.is_now())
                if is_set or world.is_kept_data(value):
                    found.append(Variable(home, name, value, content, is_set))
        return found
