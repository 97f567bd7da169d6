"""Which bytes a tensor takes: what is written through one tensor is seen through all that take the same bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from keepless import _compat
from keepless.eager.calls import storage_of

_ALL = 1 << 62


class Extent(NamedTuple):
    """A range of bytes in a storage; all of it where a tensor's own are not known (sparse ones, wrappers).

    Attributes:
        storage: equal for tensors that share a storage.
        start, end: bytes from the storage's begin.
    """

    storage: Any
    start: int
    end: int


def extent_of(tensor: torch.Tensor) -> Extent:
    """From a tensor's first byte to its last."""
    with _compat.without_function_subclasses():
        if not _has_bytes(tensor):
            return Extent(storage_of(tensor), 0, _ALL)
        start = tensor.storage_offset()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        end = start + (1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0)
        return Extent(storage_of(tensor), int(start * tensor.element_size()), int(end * tensor.element_size()))


def covers(one: Extent, other: Extent) -> bool:
    """Whether a range holds all of another."""
    return one.storage == other.storage and one.start <= other.start and other.end <= one.end


class Extents:
    """Ranges of bytes, by storage."""

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        self._found: dict[Any, set[Extent]] = {}
        for extent in extents:
            self.add(extent)

    def add(self, extent: Extent) -> None:
        """Adds a range."""
        self._found.setdefault(extent.storage, set()).add(extent)

    def cover(self, extent: Extent) -> bool:
        """Whether one of the ranges holds all of this one."""
        return any(covers(item, extent) for item in self._found.get(extent.storage, ()))

    def touch(self, tensor: torch.Tensor) -> bool:
        """Whether one of the ranges has a byte in common with a tensor's."""
        found = self._found.get(storage_of(tensor))
        if not found:
            return False
        extent = extent_of(tensor)
        return any(item.start < extent.end and extent.start < item.end for item in found)


def whole(owner: torch.Tensor, extent: Extent) -> tuple[torch.Tensor, Extent]:
    """A tensor over all bytes of `owner` and of a range beside it: the owner itself where it takes them all."""
    own = extent_of(owner)
    if not _has_bytes(owner) or (covers(own, extent) and _is_dense(owner)):
        return owner, own
    start, end = min(own.start, extent.start), max(own.end, extent.end)
    flat = torch.empty(0, dtype=torch.uint8, device=owner.device)
    flat.set_(owner.untyped_storage(), start, (end - start,), (1,))
    return flat, Extent(own.storage, start, end)


def share_elements(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have an element in common; the thirds of an interleaved projection have none."""
    if one is other:
        return True
    a, b = extent_of(one), extent_of(other)
    if a.storage != b.storage or a.end <= b.start or b.end <= a.start:
        return False
    if not (_has_bytes(one) and _has_bytes(other)) or one.element_size() != other.element_size():
        return True
    size, start = one.element_size(), min(a.start, b.start)
    marks = torch.zeros((max(a.end, b.end) - start) // size, dtype=torch.bool, device="cpu")
    marks.as_strided(one.shape, one.stride(), (a.start - start) // size).fill_(True)
    return bool(marks.as_strided(other.shape, other.stride(), (b.start - start) // size).any())


def _has_bytes(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not hasattr(tensor, "__tensor_flatten__")


def _is_dense(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
