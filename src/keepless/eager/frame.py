"""What one call of a region keeps instead of its saved tensors."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from keepless import _compat
from keepless.eager import closures, randomness, world
from keepless.eager.ambient import Ambient
from keepless.eager.arguments import Arguments
from keepless.eager.constants import Constants
from keepless.eager.determinism import Trait
from keepless.eager.failures import CheckpointError
from keepless.eager.profile import Profile, way_on, ways_to_held
from keepless.eager.world import Variable, Way

_DEPTH = 3
_reference = weakref.ref

Unpack = Callable[[], torch.Tensor]


class Tap(Protocol):
    """Told when a region saves, and when it runs again."""

    def hooks(self, pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> tuple[Any, Any]:
        """The saved-tensor hooks to use in the place of the region's own, which they must call."""

    def begins(self) -> None:
        """The region's function is about to run again."""


class Holder:
    """Stands for a saved tensor of a region until a backward wants it."""

    __slots__ = ("__weakref__", "found", "frame", "index")

    def __init__(self, frame: Frame, index: int) -> None:
        self.frame = frame
        self.index = index
        self.found: dict[Any, torch.Tensor] | None = None


class Frame:
    """What one call of a region keeps.

    Attributes:
        region: the region's function.
        function: the same; with a copy of its closure where the region may change what that holds.
        arguments: its arguments without their tensors; `inputs` reads those back.
        clones: position of an input that the region changes -> its values before.
        grads: whether each input requires a gradient.
        holders: weak references, one for each tensor that the region saved; `traits` is what is known of each.
        random: streams of random numbers and their states before.
        state: tensors that the region writes, and their values before.
        fixed, versions: tensors that it may read, and the version of each before.
        placed, written: parameters, buffers and other tensors at the places of `profile.fixed()` and `.state()`.
        held: what the function's closure holds.
        variables: attributes and globals that it sets or reads, before; `constants` are those that stay mostly,
            `submodules` what `profile.modules` must not lose.
        acting: ids of hooks that did something in this call, though they only looked when watched.
        profile: what is known of the region; `known` is the same where this call was not watched.
    """

    __slots__ = (
        "__weakref__",
        "acting",
        "ambient",
        "arguments",
        "clones",
        "constants",
        "context",
        "early_stop",
        "fixed",
        "function",
        "grads",
        "held",
        "holders",
        "inputs",
        "is_elsewhere",
        "is_over",
        "is_selective",
        "known",
        "on_failure",
        "own_objects",
        "own_streams",
        "placed",
        "profile",
        "random",
        "region",
        "state",
        "submodules",
        "tap",
        "trait",
        "traits",
        "variables",
        "versions",
        "written",
    )

    def __init__(self, function: Callable[..., Any], trait: Trait, early_stop: bool) -> None:
        self.region = function
        self.held = closures.all_held(function)
        self.function = closures.lasting(function, self.held)
        self.trait = trait
        self.traits: list[Any] = []
        self.early_stop = early_stop
        self.holders: list[weakref.ref[Holder]] = []
        self.ambient = Ambient()
        self.arguments: Arguments
        self.inputs: list[Unpack | None] = []
        self.clones: dict[int, torch.Tensor] = {}
        self.grads: list[bool] = []
        self.random: randomness.State = []
        self.own_streams: list[randomness.Stream] = []
        self.own_objects: list[Any] = []
        self.state: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.fixed: list[torch.Tensor] = []
        self.placed: list[torch.Tensor | None] = []
        self.written: list[torch.Tensor | None] = []
        self.versions: list[int] = []
        self.variables: list[Variable] = []
        self.constants: Constants | None = None
        self.submodules: list[Any] = []
        self.acting: set[int] = set()
        self.context: AbstractContextManager[Any] | None = None
        self.is_over = self.is_selective = self.is_elsewhere = False
        self.known: Profile | None = None
        self.profile: Profile | None = None
        self.on_failure: Callable[[CheckpointError], None] | None = None
        self.tap: Tap | None = None

    @property
    def name(self) -> str:
        """The region's name for messages."""
        return closures.name_of(self.region)

    def hold_inputs(self, tensors: list[torch.Tensor], changed: tuple[int, ...]) -> None:
        """Saves the inputs as an op would save them; those that the region changes are cloned."""
        if changed:
            with _compat.own_ops():
                self.clones = {i: tensors[i].detach().clone() for i in changed}
        self.inputs = [None if i in self.clones else _compat.save_tensor(tensor) for i, tensor in enumerate(tensors)]

    def hold_profile(self, profile: Profile, preserve: bool) -> None:
        """Saves what a known region needs: the states that it writes, the versions of what it reads.

        Without `preserve` torch's default stream is left alone where the region was not seen to draw from it.
        """
        self.known = self.profile = profile
        self.early_stop = self.early_stop and not profile.fills_late
        profile.settle()
        self.constants, self.submodules = profile.constants, profile.modules.modules()
        self.placed, self.written = profile.fixed(), profile.state()
        self.fixed = [tensor for tensor in self.placed if tensor is not None]
        streams = [*profile.streams, *self.own_streams]
        state = {id(tensor): tensor for tensor in self.written if tensor is not None}
        variables, leaves = profile.variables(), ways_to_held(self.held)
        if variables or leaves or self.own_objects:
            gathering = _Gathering(self, profile, state, streams)
            for way, variable in variables:
                gathering.variable(way, variable)
            for way, leaf in (*leaves, *(((), holder) for holder in self.own_objects)):
                gathering.leaf(way, leaf)
        for module in profile.hooked():
            self.variables += [item for _, item in world.variables_of_hooks(module, profile.observers)]
        if state:
            with torch.no_grad(), _compat.own_ops():
                self.state = [(tensor, tensor.detach().clone()) for tensor in state.values()]
            self.fixed = [tensor for tensor in self.fixed if id(tensor) not in state]
        self.versions = _compat.versions(self.fixed)
        if preserve or profile.draws:
            streams.append(randomness.DEFAULT)
        self.random = randomness.save(streams)

    def rebound(self) -> list[Variable]:
        """Parameters, buffers, submodules and constants that are others now, and names that are new: as they were."""
        profile = self.profile
        if profile is None or not (self.placed or self.written or self.constants or profile.has_modules):
            return []
        found = [*self.constants.changed(), *profile.modules.changed()] if self.constants is not None else []
        found += profile.new_names()
        for is_state, before, now in ((False, self.placed, profile.fixed()), (True, self.written, profile.state())):
            if not all(map(operator.is_, before, now)):
                for position, (one, other) in enumerate(zip(before, now, strict=True)):
                    place = profile.place(is_state, position) if one is not other else None
                    if place is not None:
                        found.append(Variable(*place, one, None, False))
        return found

    def pack(self, tensor: torch.Tensor) -> Holder:
        """The pack hook of the forward."""
        holders = self.holders
        holder = Holder(self, len(holders))
        holders.append(_reference(holder))
        self.traits.append(self.trait(tensor))
        known = self.known
        if known is not None and tensor.requires_grad:
            parameter = tensor if tensor.__class__ is torch.nn.Parameter else tensor._base
            if parameter.__class__ is torch.nn.Parameter and not known.knows(parameter):
                known.varies = self.is_elsewhere = True
                self.fixed.append(parameter)
                self.versions.append(parameter._version)
        return holder

    def count(self) -> int:
        """How many tensors were saved so far."""
        return len(self.holders)

    def path(self) -> Hashable:
        """What the call saved, but for sizes: calls that took another way mostly differ."""
        return (len(self.traits), *((len(t[0]), t[1]) for t in self.traits if t is not None))

    def clear(self, task: Any) -> None:
        """Drops what a recompute for this backward left in the holders."""
        for reference in self.holders:
            holder = reference()
            if holder is not None and holder.found is not None:
                holder.found.pop(task, None)


class _Gathering:
    """Sorts what a later call finds by name into the tensors that it writes and those that it only reads.

    Objects that were not there when the region was watched are looked into: three deep, as they are while watching.
    """

    def __init__(
        self, frame: Frame, profile: Profile, state: dict[int, torch.Tensor], streams: list[randomness.Stream]
    ) -> None:
        self.frame, self.profile, self.state, self.streams = frame, profile, state, streams
        self.seen: set[int] = set()

    def variable(self, way: Way, variable: Variable, depth: int = 0) -> None:
        """A variable, and what it holds."""
        self.frame.variables.append(variable)
        value = variable.value
        if value.__class__ in closures.PLAIN:
            return
        for further, leaf in variable.leaves(way):
            self.leaf(further, leaf, depth)
        if variable.content is None:
            self.streams += randomness.streams_in((value,))

    def leaf(self, way: Way, leaf: Any, depth: int = 0) -> None:
        """A tensor, a module, or an object with attributes."""
        if isinstance(leaf, torch.Tensor):
            if way in self.profile.written:
                self.state[id(leaf)] = leaf
            else:
                self.frame.fixed.append(leaf)
        elif isinstance(leaf, torch.nn.Module):
            if not self.profile.knows_module(leaf):  # in a list, too deep to be found: it must not write its buffers
                self.frame.fixed += [*leaf.parameters(), *leaf.buffers()]
        elif depth < _DEPTH and id(leaf) not in self.seen and not self.profile.is_known(leaf):
            self.seen.add(id(leaf))
            for item in world.variables_of(leaf):
                self.variable(way_on(item), item, depth + 1)
