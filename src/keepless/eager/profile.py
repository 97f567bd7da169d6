"""What is known of a region from watching it: what later calls must remember, and nothing else."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import torch

from keepless import _compat
from keepless.eager import closures, hooks, memory, randomness, world
from keepless.eager.constants import Constants, is_constant, is_submodule
from keepless.eager.randomness import Stream
from keepless.eager.watch import Watch
from keepless.eager.world import Variable, Way

_MANY = 64
_TINY = 1024
_REMEMBERED = 4096
_NORMS = (_compat.BatchNorm,)

Place = tuple[weakref.ref[torch.nn.Module], tuple[tuple[bool, str], ...]]


def _tensors_at(places: Iterable[Place], loose: Iterable[weakref.ref[torch.Tensor]]) -> list[torch.Tensor | None]:
    found: list[torch.Tensor | None] = []
    for reference, names in places:
        module = reference()
        if module is None:
            found += [None] * len(names)
            continue
        parameters, buffers = module._parameters, module._buffers
        for is_parameter, name in names:
            found.append(parameters.get(name) if is_parameter else buffers.get(name))
    for item in loose:
        found.append(item())
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
        traits: what the last call on a known path saved; `paths` need not be asked where a call saved the same.
        ends_with_save: whether nothing was called after the call that saved last.
        runs_on: whether a recompute that saved `traits` runs to its end: to stop it by an exception costs more.
        modules, constants: submodules that it reads by name, and plain values; these stay mostly as they are.
        has_modules: whether it is, reaches or calls a module.
        varies: whether a call was seen to take such a way: each call is watched.
        written: ways to the tensors that it writes and that are found by name: attributes, globals, cells.
    """

    def __init__(
        self,
        modules: list[torch.nn.Module],
        is_compiled: bool,
        watch: Watch,
        variables: list[Variable],
        held: list[Any],
    ) -> None:
        known = {id(module): module for module in (*modules, *watch.called.values())}
        self._modules = [weakref.ref(module) for module in known.values()]
        self._flags = [(weakref.ref(module), module.training) for module in known.values()]
        self._status = self.status()
        self._names = [(weakref.ref(m), frozenset(m.__dict__), frozenset(m._buffers)) for m in known.values()]
        self.has_modules = bool(known)
        self._variables: list[tuple[Any, str, bool]] = []
        lasting = [
            item
            for item in variables
            if (isinstance(item.holder, dict) or _reference(item.holder) is not None)
            and (item.is_set or item.name != "training" or id(item.holder) not in known)  # the status has these flags
        ]
        self.modules = Constants(item for item in lasting if is_submodule(item))
        self.constants = Constants(item for item in lasting if is_constant(item))
        lasting = [item for item in lasting if item.is_set or not (is_submodule(item) or is_constant(item))]
        for item in lasting:
            self._add_variable(item)
        bound = {(id(item.holder), item.name) for item in variables if item.is_set}
        self.written: set[Way] = set()
        self._objects: dict[int, weakref.ref[Any]] = {}
        named = self._name_tensors(watch, lasting, held)
        self._fixed, self._state, located = _places(known.values(), watch.written, bound)
        others = [t for key, ref in watch.read.items() if key not in located and (t := ref()) is not None]
        loose = [(weakref.ref(t), watch.written.touch(t)) for t in others if id(t) not in named]
        self._loose_fixed = [ref for ref, is_written in loose if not is_written]
        self._loose_state = [ref for ref, is_written in loose if is_written]
        self._parameters = {id(p) for module in known.values() for p in module._parameters.values() if p is not None}
        self._parameters |= {id(t) for t in others if isinstance(t, torch.nn.Parameter)}
        self._hooked = any(hooks.hooks_of(module) for module in known.values())
        self.inputs = tuple(sorted(watch.inputs))
        self.observers = watch.judge.seen - watch.judge.active
        self.streams: list[Stream] = []
        self.draws = True
        self.fills_late = False
        self.paths: set[Hashable] = set()
        self.traits: list[Any] = []
        self.ends_with_save = watch.tail == 0
        self.runs_on = False
        self.varies = False
        self.is_compiled = is_compiled or any(_compat.is_compiled(module) for module in watch.called.values())
        self.anchors: list[weakref.ref[Any]] = []

    def _name_tensors(self, watch: Watch, variables: list[Variable], held: list[Any]) -> set[int]:
        """Notes the ways to tensors that were written, and the objects that were there; ids of tensors with a way."""
        named: set[int] = set()
        leaves: list[tuple[Way, Any, Variable | None]] = [(way, leaf, None) for way, leaf in ways_to_held(held)]
        for index, item in enumerate(variables):
            leaves += [(way, leaf, item) for way, leaf in item.leaves(("variable", index))]
        for holder, _ in watch.attributes.values():
            self._know(holder)
        for way, leaf, variable in leaves:
            if not isinstance(leaf, torch.Tensor):
                self._know(leaf)
                continue
            named.add(id(leaf))
            if watch.written.touch(leaf):
                self.written.add(way)
                if variable is not None and world.is_plain(variable.holder):
                    self.written.add((*way_on(variable), *way[2:]))
        return named

    def _know(self, value: Any) -> None:
        reference = _reference(value)
        if reference is not None:
            self._objects[id(value)] = reference

    def status(self) -> list[Any]:
        """Training flags, hooks and numbers of attributes and buffers of the region's modules.

        A call under another status is watched anew.
        """
        found: list[Any] = [hooks.global_hooks()]
        for reference in self._modules:
            module = reference()
            if module is None:
                found.append(None)
                continue
            found.append(module.training)
            found.append(len(module.__dict__) + len(module._buffers))
            if module._forward_hooks or module._forward_pre_hooks:
                found.append(hooks.hooks_of(module))
        return found

    def holds(self) -> bool:
        """Whether the region is still the one that was watched."""
        for anchor in self.anchors:
            if anchor() is None:
                return False
        if self.status() != self._status:
            return False
        return not self.modules.changed()

    def new_names(self) -> list[Variable]:
        """Attributes and buffers that the region's modules did not have when the call began, as they were: missing."""
        found: list[Variable] = []
        for reference, attributes, buffers in self._names:
            module = reference()
            if module is None:
                continue
            names: set[str] = set()
            if len(module.__dict__) != len(attributes):
                names |= module.__dict__.keys() - attributes
            if len(module._buffers) != len(buffers):
                names |= module._buffers.keys() - buffers
            found += [Variable(module, name, world.MISSING, None, False) for name in names]
        return found

    def settle(self) -> None:
        """Constants that changed are variables from now on."""
        changed = self.constants.changed()
        if changed:
            self.constants = self.constants.without(changed)
            for item in changed:
                self._add_variable(item)

    def _add_variable(self, item: Variable) -> None:
        holder = item.holder if isinstance(item.holder, dict) else _reference(item.holder)
        self._variables.append((holder, item.name, item.is_set))

    def fixed(self) -> list[torch.Tensor | None]:
        """Parameters, buffers and other tensors that the region may read and does not write, each at its place."""
        return _tensors_at(self._fixed, self._loose_fixed)

    def state(self) -> list[torch.Tensor | None]:
        """The tensors that it writes and that are not its inputs: their values of before a call are needed again."""
        return _tensors_at(self._state, self._loose_state)

    def place(self, is_state: bool, position: int) -> tuple[torch.nn.Module, str] | None:
        """The module and name of a parameter or buffer at a position of `fixed()` or `state()`."""
        for reference, names in self._state if is_state else self._fixed:
            if position < len(names):
                module = reference()
                return None if module is None else (module, names[position][1])
            position -= len(names)
        return None

    def name_of(self, tensor: torch.Tensor) -> str:
        """A parameter's or buffer's name with its module's class; an attribute's; empty where it has none."""
        for position, placed in enumerate(self.fixed()):
            place = self.place(False, position) if placed is tensor else None
            if place is not None:
                return f"{type(place[0]).__name__}.{place[1]}"
        for _, item in self.variables():
            if any(leaf is tensor for _, leaf in item.leaves(())):
                return f"{'' if isinstance(item.holder, dict) else type(item.holder).__name__ + '.'}{item.name}"
        return ""

    def variables(self) -> list[tuple[Way, Variable]]:
        """The attributes and globals that it sets or reads as data, as they are now, with the way to each."""
        found: list[tuple[Way, Variable]] = []
        if not self._variables:
            return found
        for index, (holder, name, is_set) in enumerate(self._variables):
            if holder.__class__ is weakref.ref:
                holder = holder()
                if holder is None:
                    continue
            found.append((("variable", index), world.variable_now(holder, name, is_set)))
        return found

    def is_known(self, value: Any) -> bool:
        """Whether an object was there when the region was watched."""
        reference = self._objects.get(id(value))
        return reference is not None and reference() is value

    def hooked(self) -> list[torch.nn.Module]:
        """The modules with forward hooks."""
        return [m for ref in self._modules if (m := ref()) is not None and hooks.hooks_of(m)] if self._hooked else []

    def knows_module(self, module: torch.nn.Module) -> bool:
        """Whether a module is one of the region's, as far as they were found or called."""
        return any(reference() is module for reference in self._modules)

    def knows(self, parameter: torch.Tensor) -> bool:
        """Whether the watched call could have used this parameter."""
        return id(parameter) in self._parameters

    def know_traits(self, traits: list[Any]) -> None:
        """Notes what a call on a known path saved."""
        self.traits = traits
        self.runs_on = self.ends_with_save and all(
            trait is not None and trait[0].numel() <= _TINY and trait[2].type == "cpu" for trait in traits
        )

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


def ways_to_held(held: list[Any]) -> list[tuple[Way, Any]]:
    """The tensors and plain objects that a function's closure holds, with the way to each."""
    if not held:
        return []
    plain = closures.PLAIN
    values = [(position, value) for position, value in enumerate(held) if value.__class__ not in plain]
    return [found for position, value in values for found in world.leaves(value, ("held", position))]


def way_on(item: Variable) -> Way:
    """The way to an attribute of an object that is made anew for each call: by its class."""
    kind = type(item.holder)
    return (f"{kind.__module__}.{kind.__qualname__}", item.name)


def _places(
    known: Iterable[torch.nn.Module], written: memory.Extents, bound: set[tuple[int, str]]
) -> tuple[list[Place], list[Place], set[int]]:
    fixed: list[Place] = []
    state: list[Place] = []
    located: set[int] = set()
    for module in known:
        # Running statistics of a normalisation in training count, whether or not the watched call got there.
        counts = isinstance(module, _NORMS) and module.training and module.track_running_stats
        split: tuple[list[tuple[bool, str]], list[tuple[bool, str]]] = ([], [])
        for is_parameter, tensors in ((True, module._parameters), (False, module._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in located and (id(module), name) not in bound:
                    located.add(id(tensor))
                    is_state = (counts and not is_parameter) or written.touch(tensor)
                    split[is_state].append((is_parameter, name))
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
    """Forgets every region: each is watched at its next call, as in the first step.

    For the place where a loop begins to do otherwise (an average that starts after a warm-up, a cache that is switched
    on): without it the first call that changes what no watched call changed ends in a `keepless.errors.RecomputeError`,
    before a gradient is made.
    """
    with _lock:
        _profiles.clear()
