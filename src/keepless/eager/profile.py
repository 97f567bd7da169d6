"""What is known of a region from watching it: what later calls must remember, and nothing else."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import torch

from keepless import _compat
from keepless.eager import closures, hooks, randomness, world
from keepless.eager.randomness import Stream
from keepless.eager.watch import Watch
from keepless.eager.world import Variable

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
        inputs: positions of the inputs that it writes; cloned before each call.
        streams: streams of random numbers that it may draw from, besides torch's default on the CPU.
        draws: whether it draws from that one.
        fills_late: whether an op in it fills a tensor after saving it; the recompute then runs to its end.
        observers: ids of the hooks that only look; they run once.
        is_compiled: whether torch.compile's code is in it; that runs otherwise where ops are seen one by one.
        paths: signatures of what watched calls saved; a call with another went a way that nobody watched.
        varies: whether a call was seen to take such a way: each call is watched.
    """

    def __init__(
        self, modules: list[torch.nn.Module], is_compiled: bool, watch: Watch, variables: list[Variable]
    ) -> None:
        known = {id(module): module for module in (*modules, *watch.called.values())}
        self._modules = [weakref.ref(module) for module in known.values()]
        self._flags = [(weakref.ref(module), module.training) for module in known.values()]
        self._status = self.status()
        self._variables: list[tuple[Any, str, bool]] = []
        self._reached: list[tuple[Any, str, weakref.ref[torch.nn.Module]]] = []
        for item in variables:
            holder = item.holder if isinstance(item.holder, dict) else _reference(item.holder)
            if holder is not None:
                self._variables.append((holder, item.name, item.is_set))
                if isinstance(item.value, torch.nn.Module):
                    self._reached.append((holder, item.name, weakref.ref(item.value)))
        bound = {(id(item.holder), item.name) for item in variables if item.is_set}
        written = {id(tensor) for tensor, _ in watch.before.values()}
        written |= _statistics(known.values())
        self._fixed, self._state, located = _places(known.values(), written, bound)
        others = [(key, ref) for key, ref in watch.read.items() if key not in located]
        self._loose_fixed = [ref for key, ref in others if key not in written]
        self._loose_state = [ref for key, ref in others if key in written]
        self._parameters = {id(p) for module in known.values() for p in module._parameters.values() if p is not None}
        self._parameters |= {id(t) for t in (ref() for _, ref in others) if isinstance(t, torch.nn.Parameter)}
        self._hooked = any(hooks.hooks_of(module) for module in known.values())
        self.inputs = tuple(sorted(watch.inputs))
        self.observers = watch.judge.seen - watch.judge.active
        self.streams: list[Stream] = []
        self.draws = True
        self.fills_late = False
        self.paths: set[Hashable] = set()
        self.varies = False
        self.is_compiled = is_compiled or any(_compat.is_compiled(module) for module in watch.called.values())
        self.anchors: list[weakref.ref[Any]] = []

    def status(self) -> list[Any]:
        """Training flags and hooks of the region's modules; a call under another status is watched anew."""
        found: list[Any] = [hooks.global_hooks()]
        for reference in self._modules:
            module = reference()
            if module is None:
                found.append(None)
                continue
            found.append(module.training)
            if module._forward_hooks or module._forward_pre_hooks:
                found.append(hooks.hooks_of(module))
        return found

    def holds(self) -> bool:
        """Whether the region is still the one that was watched."""
        if not all(anchor() is not None for anchor in self.anchors) or self.status() != self._status:
            return False
        for holder, name, module in self._reached:
            at = holder() if holder.__class__ is weakref.ref else holder
            if at is None or world.variable_now(at, name, False).value is not module():
                return False
        return True

    def fixed(self) -> list[torch.Tensor]:
        """Parameters, buffers and other tensors that the region may read and does not write."""
        return _tensors_at(self._fixed, self._loose_fixed)

    def state(self) -> list[torch.Tensor]:
        """The tensors that it writes and that are not its inputs: their values of before a call are needed again."""
        return _tensors_at(self._state, self._loose_state)

    def variables(self) -> list[Variable]:
        """The attributes and globals that it sets or reads as data, as they are now."""
        found = []
        for holder, name, is_set in self._variables:
            if holder.__class__ is weakref.ref:
                holder = holder()
                if holder is None:
                    continue
            found.append(world.variable_now(holder, name, is_set))
        return found

    def is_known(self, holder: Any) -> bool:
        """Whether an object's attributes are among the variables."""
        return any(ref.__class__ is weakref.ref and ref() is holder for ref, _, _ in self._variables)

    def hooked(self) -> list[torch.nn.Module]:
        """The modules with forward hooks."""
        return [m for ref in self._modules if (m := ref()) is not None and hooks.hooks_of(m)] if self._hooked else []

    def knows(self, parameter: torch.Tensor) -> bool:
        """Whether the watched call could have used this parameter."""
        return id(parameter) in self._parameters

    def flags_that_differ(self) -> list[tuple[torch.nn.Module, bool]]:
        """The modules whose training flag is another than in the forward, with the flag now."""
        return [
            (module, module.training)
            for reference, flag in self._flags
            if (module := reference()) is not None and module.training is not flag
        ]


def _reference(holder: Any) -> weakref.ref[Any] | None:
    try:
        return weakref.ref(holder)
    except TypeError:
        return None


def family(root: torch.nn.Module) -> list[torch.nn.Module]:
    """A module with its submodules; only those with buffers or hooks where they are many."""
    found = list(root.modules())
    if len(found) > _MANY:
        return [module for module in found if module is root or module._buffers or hooks.hooks_of(module)]
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


def global_streams() -> list[Stream]:
    """Every device's stream, Python's and NumPy's."""
    found = randomness.device_streams(randomness.every_device())
    found.append(randomness.PYTHON)
    numpy = randomness.numpy_stream()
    return [*found, numpy] if numpy is not None else found


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
        if before is not None:
            profile.varies = profile.varies or before.varies
            profile.paths |= before.paths
        _profiles[key] = profile
        while len(_profiles) > _REMEMBERED:
            _profiles.popitem(last=False)


def forget_regions() -> None:
    """Forgets every region: each is watched again at its next call."""
    with _lock:
        _profiles.clear()
