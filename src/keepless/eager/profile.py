"""What is known of a region from watching it: what later calls must remember, and nothing else."""

from __future__ import annotations

import collections
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from keepless.eager import closures, modules, randomness
from keepless.eager.randomness import Stream
from keepless.eager.watch import Watch

_MANY = 64
_REMEMBERED = 4096
_NORMS = (torch.nn.modules.batchnorm._BatchNorm,)

Place = tuple[weakref.ref[torch.nn.Module], tuple[tuple[bool, str], ...]]


def _tensors_at(places: Iterable[Place], loose: Iterable[weakref.ref[torch.Tensor]]) -> list[torch.Tensor]:
    found = []
    for reference, names in places:
        module = reference()
        if module is None:
            continue
        parameters, buffers = module._parameters, module._buffers
        for is_parameter, name in names:
            tensor = parameters.get(name) if is_parameter else buffers.get(name)
            if tensor is not None:
                found.append(tensor)
    for item in loose:
        tensor = item()
        if tensor is not None:
            found.append(tensor)
    return found


class Profile:
    """Where a region's state is, found by watching one call.

    Attributes:
        fixed: tensors that the region may read and did not write: parameters, buffers, tensors of closures.
        state: tensors that the region writes and that are not its inputs; saved before each call.
        inputs: positions of the inputs that it writes; cloned before each call.
        attributes: attributes of modules and objects that it sets; saved before each call.
        streams: streams of random numbers that it draws from, besides torch's default on the CPU.
        observers: ids of the hooks that only look; they run once.
        home, names: the function's globals, and the names of those that it reads as data.
        draws: whether it draws from torch's default stream on the CPU.
        varies: whether calls were seen to take different paths: each call is watched.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], watch: Watch, drawn: list[Stream]) -> None:
        roots = [m for root in closures.modules_of(function, args) for m in _family(root)]
        known = {id(module): module for module in (*roots, *watch.called.values())}
        self._modules = [weakref.ref(module) for module in known.values()]
        self._status = self.status()
        written = {id(tensor) for tensor, _ in watch.before.values()}
        written |= _statistics(known.values())
        self.attributes = [(weakref.ref(holder), name) for holder, name in watch.changed_attributes()]
        bound = {(id(holder), name) for holder, name in watch.changed_attributes()}
        self._fixed, self._state, located = _places(known.values(), written, bound)
        others = [(key, ref) for key, ref in watch.read.items() if key not in located]
        self._loose_fixed = [ref for key, ref in others if key not in written]
        self._loose_state = [ref for key, ref in others if key in written]
        self._parameters = {id(p) for module in known.values() for p in module._parameters.values() if p is not None}
        self._parameters |= {id(t) for t in (ref() for _, ref in others) if isinstance(t, torch.nn.Parameter)}
        self.inputs = tuple(sorted(watch.inputs))
        self.streams = drawn
        self.observers = watch.seen_hooks - watch.active_hooks
        self.home, self.names = closures.read_globals(function)
        self.draws = True
        self.varies = False
        self.anchors: list[weakref.ref[Any]] = []

    def status(self) -> list[Any]:
        """Training flags and hooks of the region's modules; a call under another status is watched anew."""
        found: list[Any] = [modules.global_hooks()]
        for reference in self._modules:
            module = reference()
            if module is None:
                found.append(None)
                continue
            found.append(module.training)
            if module._forward_hooks or module._forward_pre_hooks:
                found.append(modules.hooks_of(module))
        return found

    def holds(self) -> bool:
        """Whether the region is still the one that was watched."""
        return all(anchor() is not None for anchor in self.anchors) and self.status() == self._status

    def fixed(self) -> list[torch.Tensor]:
        """The tensors that must not change between forward and backward."""
        return _tensors_at(self._fixed, self._loose_fixed)

    def state(self) -> list[torch.Tensor]:
        """The tensors whose values of before the call are needed again."""
        return _tensors_at(self._state, self._loose_state)

    def knows(self, parameter: torch.Tensor) -> bool:
        """Whether the watched call could have used this parameter."""
        return id(parameter) in self._parameters

    @property
    def skips(self) -> bool:
        """Whether a recompute leaves hooks out."""
        return bool(self.observers)

    def without_observers(
        self, call: Callable[..., Any], module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call of a module in a recompute."""
        if self.observers.isdisjoint((*modules.hooks_of(module), *modules.global_hooks())):
            return call(module, *args, **kwargs)
        return modules.call_without(module, self.observers, args, kwargs)

    def training_flags(self) -> list[tuple[torch.nn.Module, bool]]:
        """The modules with their training flags now."""
        return [(module, module.training) for ref in self._modules if (module := ref()) is not None]


def _family(root: torch.nn.Module) -> list[torch.nn.Module]:
    found = []
    for module in root.modules():
        found.append(module)
        if len(found) > _MANY and not isinstance(root, torch.nn.Sequential):
            return [root]
    return found


def _statistics(known: Iterable[torch.nn.Module]) -> set[int]:
    """Ids of the running statistics of normalisations in training, whether or not the watched call got there."""
    return {
        id(buffer)
        for module in known
        if isinstance(module, _NORMS) and module.training and module.track_running_stats
        for buffer in module._buffers.values()
        if buffer is not None
    }


def _places(
    known: Iterable[torch.nn.Module], written: set[int], bound: set[tuple[int, str]]
) -> tuple[list[Place], list[Place], set[int]]:
    fixed: list[Place] = []
    state: list[Place] = []
    located: set[int] = set()
    for module in known:
        split: tuple[list[tuple[bool, str]], list[tuple[bool, str]]] = ([], [])
        for is_parameter, tensors in ((True, module._parameters), (False, module._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in located and (id(module), name) not in bound:
                    located.add(id(tensor))
                    split[id(tensor) in written].append((is_parameter, name))
        for names, places in zip(split, (fixed, state), strict=True):
            if names:
                places.append((weakref.ref(module), tuple(names)))
    return fixed, state, located


def possible_streams(holders: Iterable[Any]) -> list[Stream]:
    """Streams that a region might draw from, looked at while it is watched: every device, Python, NumPy, and the
    generator objects on its modules."""
    found = randomness.device_streams(randomness.every_device())
    found.append(randomness.PYTHON)
    numpy = randomness.numpy_stream()
    if numpy is not None:
        found.append(numpy)
    family = [m for h in holders for m in (_family(h) if isinstance(h, torch.nn.Module) else [h])]
    return found + randomness.streams_in(value for holder in family for value in vars(holder).values())


def named_streams(function: Callable[..., Any], known: Iterable[torch.nn.Module]) -> list[Stream]:
    """Global streams of Python and NumPy that the code of a region names."""
    found: list[Stream] = []
    for code in (function, *(type(module).forward for module in known)):
        plain = closures.plain(code)
        if plain.__class__ is types.FunctionType:
            found += randomness.named_in(plain.__code__, plain.__globals__)
    return found


_profiles: collections.OrderedDict[Hashable, Profile] = collections.OrderedDict()
_lock = threading.Lock()


def recall(key: Hashable) -> Profile | None:
    """The profile of a region, where it was watched and is still the same."""
    profile = _profiles.get(key)
    return profile if profile is not None and profile.holds() else None


def remember(key: Hashable, anchors: list[Any], profile: Profile) -> None:
    """Keeps a profile; the oldest of 4,096 goes."""
    references = closures.references(anchors)
    if references is None:
        return
    profile.anchors = references
    with _lock:
        before = _profiles.pop(key, None)
        if before is not None and before.varies:
            profile.varies = True
        _profiles[key] = profile
        while len(_profiles) > _REMEMBERED:
            _profiles.popitem(last=False)


def forget_regions() -> None:
    """Forgets every region: each is watched again at its next call."""
    with _lock:
        _profiles.clear()
