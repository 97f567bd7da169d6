"""The captured steps that a planned forward can run: found by how a call looks, the least recently used ones go first.

A call *looks* like its arguments' shapes and types. Guards of entries that look otherwise would refuse it in any case,
so that a model with fifty captured lengths asks one or two guards per call, not fifty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch

from keepless import _compat
from keepless.execute.entry import Entry

MAX_ENTRIES = 64
"""Captured steps that one model keeps."""
MAX_NBYTES = 256 * 2**20
"""Host bytes of them, by `entry_nbytes`."""
_NBYTES_PER_OP = 4500
_NBYTES_PER_SLOT = 1000

Look = tuple[Any, ...]


class Shelf(Sequence[Entry]):
    """Entries, the latest used first, bounded in number and in bytes.

    A step that runs holds its own entry: taking one from the shelf never disturbs it.

    Arguments:
        most, most_nbytes: bounds; the entry that was added last stays in any case.
    """

    def __init__(self, entries: Iterable[Entry] = (), most: int = MAX_ENTRIES, most_nbytes: int = MAX_NBYTES) -> None:
        self.most, self.most_nbytes = most, most_nbytes
        self.nbytes = 0
        self._looks: dict[Entry, Look] = {}  # the latest used one last
        self._by_look: dict[Look, list[Entry]] = {}  # the latest used one first
        for entry in reversed(list(entries)):
            self.add(entry)

    def __len__(self) -> int:
        return len(self._looks)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        return list(self)[index]

    def __iter__(self) -> Iterator[Entry]:
        return reversed(self._looks)

    def alike(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Entry]:
        """The entries that may cover a call, the latest used first."""
        return tuple(self._by_look.get(look_of(args, kwargs), ()))

    def has_room(self, entry: Entry) -> bool:
        """Whether an entry can be added without another's going."""
        return not len(self) or (len(self) < self.most and self.nbytes + entry_nbytes(entry) <= self.most_nbytes)

    def use(self, entry: Entry) -> None:
        """The entry is the latest used one."""
        look = self._looks.pop(entry, None)
        if look is None:  # another thread's call is at it
            return
        self._looks[entry] = look
        same = self._by_look[look]
        if same[0] is not entry:
            same.sort(key=lambda one: one is not entry)

    def add(self, entry: Entry) -> list[Entry]:
        """Puts an entry in front; gives the entries for which there is no room then, which are gone from the shelf."""
        look = _look_of_entry(entry)
        self._looks[entry] = look
        self._by_look.setdefault(look, []).insert(0, entry)
        self.nbytes += entry_nbytes(entry)
        gone: list[Entry] = []
        while len(self) > 1 and (len(self) > self.most or self.nbytes > self.most_nbytes):
            last = next(iter(self._looks))
            same = self._by_look[self._looks.pop(last)]
            same.remove(last)
            self._by_look = {look: entries for look, entries in self._by_look.items() if entries}
            self.nbytes -= entry_nbytes(last)
            gone.append(last)
        return gone

    def swap(self, old: Entry, new: Entry) -> bool:
        """Puts an entry for the same calls in another's place; False where that one is gone."""
        if old not in self._looks:
            return False
        same = self._by_look[self._looks[old]]
        same[same.index(old)] = new
        self._looks = {new if entry is old else entry: look for entry, look in self._looks.items()}
        return True


def entry_nbytes(entry: Entry) -> int:
    """Host bytes of an entry, roughly: capture, program, generated code and guard, and the constants that it holds.

    Of GPT-2 with 400 ops and ResNet-50 with 777, tracemalloc saw 4.5 and 4.3 KB an op; what torch keeps of the fake
    tensors outside of Python is taken to be 1 KB each.
    """
    binding = entry.binding
    constants = sum(tensor.untyped_storage().nbytes() for tensor in binding.constants.values())
    return _NBYTES_PER_OP * len(binding.graph.ops) + _NBYTES_PER_SLOT * len(binding.examples) + constants


def look_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Look:
    """Shapes of the tensors among the arguments, types of all others, and the keywords."""
    leaves = (*args, *kwargs.values())
    looks = [(torch.Tensor, leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in leaves]
    return (*looks, len(args), *kwargs)


class _Shape:
    """Stands for a tensor of a captured call."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape


def _look_of_entry(entry: Entry) -> Look:
    flat = entry.flat
    leaves = [_Shape(flat.facts[flat.first[i]][1]) if i in flat.first else leaf for i, leaf in enumerate(flat.leaves)]
    args, kwargs = _compat.tree_unflatten(leaves, flat.spec)
    everything = (*args, *kwargs.values())
    looks = [(torch.Tensor, leaf.shape) if isinstance(leaf, _Shape) else type(leaf) for leaf in everything]
    return (*looks, len(args), *kwargs)
