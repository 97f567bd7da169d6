"""A region's arguments, taken apart into tensors and the rest, and put together again."""

from __future__ import annotations

from typing import Any

import torch

from keepless.eager import closures, randomness


class _Slot:
    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


_ONE: list[Any] = [_Slot(0)]


class Arguments:
    """(args, kwargs) without their tensors.

    Lists, tuples and dicts are looked into, and copied: what a region or its caller changes in them later does not
    reach the recompute. Other objects are held as they are.
    """

    __slots__ = ("args", "kwargs", "others", "streams")

    args: list[Any]
    kwargs: dict[str, Any]

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):  # the usual region
            tensors.append(args[0])
            self.args, self.kwargs, self.others, self.streams = _ONE, {}, [], []
            return
        taking = _Taking(tensors)
        self.args = [taking.take(value) for value in args]
        self.kwargs = {name: taking.take(value) for name, value in kwargs.items()} if kwargs else {}
        self.others = taking.others
        self.streams = randomness.streams_in(taking.others) if taking.others else []

    def filled(self, tensors: list[torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with these tensors."""
        args = [_given(value, tensors) for value in self.args]
        return args, {name: _given(value, tensors) for name, value in self.kwargs.items()} if self.kwargs else {}


class _Taking:
    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        self.slots: dict[int, _Slot] = {}
        self.others: list[Any] = []

    def take(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            slot = self.slots.get(id(value))
            if slot is None:
                slot = self.slots[id(value)] = _Slot(len(self.tensors))
                self.tensors.append(value)
            return slot
        kind = value.__class__
        if kind in closures.PLAIN:
            return value
        if kind is list or kind is tuple:
            return kind(self.take(item) for item in value)
        if kind is dict:
            return {key: self.take(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return kind(*(self.take(item) for item in value))
        self.others.append(value)
        return closures.frozen(value)


def _given(value: Any, tensors: list[torch.Tensor]) -> Any:
    kind = value.__class__
    if kind is _Slot:
        return tensors[value.index]
    if kind is list or kind is tuple:
        return kind(_given(item, tensors) for item in value)
    if kind is dict:
        return {key: _given(item, tensors) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(_given(item, tensors) for item in value))
    return value
