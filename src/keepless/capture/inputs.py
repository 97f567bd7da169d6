"""Batches: how the model is called, as a flat list of leaves and a spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from keepless import _compat
from keepless.errors import BatchError

_CONSTANT_TYPES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, slice, range)


class Inputs:
    """The arguments of one call of the model: `keepless.Inputs(x, mask=m)` stands for `model(x, mask=m)`."""

    __slots__ = ("args", "kwargs")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    def __repr__(self) -> str:
        parts = [type(arg).__name__ for arg in self.args]
        parts += [f"{name}={type(arg).__name__}" for name, arg in self.kwargs.items()]
        return f"Inputs({', '.join(parts)})"

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """The call that a batch means: a tensor or tuple fills the positions, a mapping the keywords."""
        if isinstance(batch, Inputs):
            return batch
        if isinstance(batch, torch.Tensor):
            return cls(batch)
        if isinstance(batch, Mapping):
            if not all(isinstance(name, str) for name in batch):
                raise BatchError("The batch is a mapping with keys that are not names of the forward's arguments.")
            return cls(**dict(batch))
        if isinstance(batch, tuple | list):
            return cls(*batch)
        raise BatchError(
            f"The batch is a {type(batch).__name__}; give a tensor, a tuple, a dict, or "
            "keepless.Inputs(*args, **kwargs)."
        )


@dataclass(frozen=True)
class FlatInputs:
    """A call, flattened: `leaves` in pytree order.

    A tensor that is given twice (as inputs and as labels, say) is one argument of the captured step: `first` maps
    every tensor position to the position where its tensor stands first, and `tensor_positions` are those. `facts`
    are those of `tensor_facts` at these positions.
    """

    leaves: tuple[Any, ...]
    spec: Any
    tensor_positions: tuple[int, ...]
    first: dict[int, int]
    facts: dict[int, tuple[Any, ...]]

    def without_tensors(self) -> FlatInputs:
        """The same call without its tensors, so that a plan keeps no batch alive."""
        leaves = [None if position in self.first else leaf for position, leaf in enumerate(self.leaves)]
        return FlatInputs(tuple(leaves), self.spec, self.tensor_positions, self.first, self.facts)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The distinct tensors, in order of their first position."""
        return tuple(self.leaves[i] for i in self.tensor_positions)

    def rebuild(self, tensors: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments (args, kwargs) with these tensors in the tensor positions."""
        leaves = list(self.leaves)
        given = dict(zip(self.tensor_positions, tensors, strict=True))
        for position, first in self.first.items():
            leaves[position] = given[first]
        args, kwargs = _compat.tree_unflatten(leaves, self.spec)
        return args, kwargs


def flatten_inputs(inputs: Inputs) -> FlatInputs:
    """Flattens a call.

    Raises:
        BatchError: a leaf is neither a tensor nor a plain constant, so that a plan could not be guarded on it.
    """
    leaves, spec = _compat.tree_flatten((inputs.args, inputs.kwargs))
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            if type(leaf) not in (torch.Tensor, torch.nn.Parameter):
                raise BatchError(f"The batch holds a {type(leaf).__name__}; tensor subclasses are not supported yet.")
            if leaf.layout is not torch.strided:
                raise BatchError(f"The batch holds a {leaf.layout} tensor; only strided tensors are supported.")
        elif not isinstance(leaf, _CONSTANT_TYPES):
            raise BatchError(
                f"The batch holds a {type(leaf).__name__}, which is neither a tensor nor a plain constant: "
                "a plan could not tell whether a later call means the same step."
            )
    first: dict[int, int] = {}
    seen: dict[int, int] = {}
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            first[position] = seen.setdefault(id(leaf), position)
    facts = {position: tensor_facts(leaves[position]) for position in seen.values()}
    return FlatInputs(tuple(leaves), spec, tuple(seen.values()), first, facts)


def standing_in(flat: FlatInputs) -> FlatInputs:
    """The same call with tensors on the meta device in the places of its own, for a capture later."""
    leaves = list(flat.leaves)
    known: dict[int, torch.Tensor] = {}
    for position, first in flat.first.items():
        if first not in known:
            tensor = leaves[first]
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            known[first] = like.requires_grad_(tensor.requires_grad)
        leaves[position] = known[first]
    return FlatInputs(tuple(leaves), flat.spec, flat.tensor_positions, flat.first, flat.facts)


def tensor_facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What a captured step depends on: (dtype, shape, strides, requires_grad, device, class)."""
    return (tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad, tensor.device, type(tensor))
