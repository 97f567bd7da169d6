"""What one call of a region keeps instead of its saved tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch

from keepless import _compat
from keepless.eager import closures, randomness, world
from keepless.eager.ambient import Ambient
from keepless.eager.arguments import Arguments
from keepless.eager.determinism import Trait
from keepless.eager.failures import CheckpointError
from keepless.eager.profile import Profile
from keepless.eager.world import Variable

Unpack = Callable[[], torch.Tensor]


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
        function: the region, with its closure as it was at the call.
        arguments: its arguments without their tensors; `inputs` reads those back.
        clones: position of an input that the region changes -> its values before.
        grads: whether each input requires a gradient.
        holders: weak references, one for each tensor that the region saved; `traits` is what is known of each.
        random: streams of random numbers and their states before.
        state: tensors that the region writes, and their values before.
        fixed, versions: tensors that it may read, and the version of each before.
        variables: attributes and globals that it sets or reads, before.
        acting: ids of hooks that did something in this call, though they only looked when watched.
        profile: what is known of the region; `known` is the same where this call was not watched.
    """

    __slots__ = (
        "__weakref__",
        "acting",
        "ambient",
        "arguments",
        "clones",
        "context",
        "early_stop",
        "fixed",
        "function",
        "grads",
        "holders",
        "inputs",
        "is_elsewhere",
        "is_over",
        "is_selective",
        "known",
        "name",
        "on_failure",
        "own_objects",
        "own_streams",
        "profile",
        "random",
        "state",
        "trait",
        "traits",
        "variables",
        "versions",
    )

    def __init__(self, function: Callable[..., Any], trait: Trait, early_stop: bool) -> None:
        self.name = closures.name_of(function)
        self.function = closures.frozen(function)
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
        self.versions: list[int] = []
        self.variables: list[Variable] = []
        self.acting: set[int] = set()
        self.context: AbstractContextManager[Any] | None = None
        self.is_over = self.is_selective = self.is_elsewhere = False
        self.known: Profile | None = None
        self.profile: Profile | None = None
        self.on_failure: Callable[[CheckpointError], None] | None = None

    def hold_inputs(self, tensors: list[torch.Tensor], changed: tuple[int, ...]) -> None:
        """Saves the inputs as an op would save them; those that the region changes are cloned."""
        self.grads = [tensor.requires_grad for tensor in tensors]
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
        state = profile.state()
        if state:
            with torch.no_grad(), _compat.own_ops():
                self.state = [(tensor, tensor.detach().clone()) for tensor in state]
        self.fixed = profile.fixed()
        streams = [*profile.streams, *self.own_streams]
        variables = profile.variables()
        for holder in self.own_objects:
            if not profile.is_known(holder):
                variables += world.variables_of(holder)
        for module in profile.hooked():
            variables += [item for _, item in world.variables_of_hooks(module, profile.observers)]
        for variable in variables:
            value = variable.value
            if isinstance(value, torch.Tensor):
                if all(value is not tensor for tensor, _ in self.state):
                    self.fixed.append(value)
            elif value.__class__ not in closures.PLAIN and variable.content is None:
                streams += randomness.streams_in((value,))
            self.variables.append(variable)
        self.fixed += closures.held_tensors(self.function)
        self.versions = _compat.versions(self.fixed)
        if preserve or profile.draws:
            streams.append(randomness.DEFAULT)
        self.random = randomness.save(streams)

    def pack(self, tensor: torch.Tensor) -> Holder:
        """The pack hook of the forward."""
        holder = Holder(self, len(self.holders))
        self.holders.append(weakref.ref(holder))
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
