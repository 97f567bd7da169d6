"""Module calls, known by where they stand: the module's path and the number of its call within one forward."""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from keepless._compat import tree_leaves
from keepless.eager.world import is_plain


class Site(NamedTuple):
    """A module call. `path` is the module's name in the model; `number` counts its calls in one forward, from 0."""

    path: str
    number: int

    def __str__(self) -> str:
        return f"{self.path}#{self.number}" if self.number else self.path


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors in nested containers, and in the attributes of objects that stand there (a dataclass, say)."""
    found: list[torch.Tensor] = []
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif is_plain(leaf) and not isinstance(leaf, torch.nn.Module):
            found += (item for item in tree_leaves(vars(leaf)) if isinstance(item, torch.Tensor))
    return found


def without_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call without keys and values for generation, which training never reads.

    A block that is run again must not add to them twice: Hugging Face leaves them out where it checkpoints, too.
    """
    if not any(map(is_cache, args)) and not any(map(is_cache, kwargs.values())):
        return args, kwargs
    return (
        tuple(None if is_cache(value) else value for value in args),
        {name: None if is_cache(value) else value for name, value in kwargs.items()},
    )


def is_cache(value: Any) -> bool:
    """Whether something holds keys and values for generation (a `DynamicCache`)."""
    return type(value).__name__.endswith("Cache") and hasattr(value, "get_seq_length")


def own_forward(module: torch.nn.Module) -> Callable[..., Any]:
    """The forward that a module's call runs."""
    own: Callable[..., Any] | None = module.__dict__.get("forward")
    return own if own is not None else types.MethodType(type(module).forward, module)


def wrappable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The modules inside a model whose forward can be replaced, each under its first name."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if path and not isinstance(module, torch.jit.ScriptModule)
    ]


@contextlib.contextmanager
def forwards_replaced(
    model: torch.nn.Module, make: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Every module inside the model runs `make(path, its own forward)` in the place of its forward."""
    replaced: list[tuple[torch.nn.Module, Any]] = []
    try:
        for path, module in wrappable(model):
            replaced.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = make(path, own_forward(module))
        yield
    finally:
        for module, before in reversed(replaced):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


class Calls:
    """Counts the calls of modules within one forward of the model.

    A recompute calls modules again: it starts from the counts that stood when its region began (`state`, `restore`).
    """

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def restart(self) -> None:
        """A forward of the model begins."""
        self._counts = {}

    def next(self, path: str) -> Site:
        """The call that begins now."""
        number = self._counts.get(path, 0)
        self._counts[path] = number + 1
        return Site(path, number)

    def state(self) -> dict[str, int]:
        """The counts as they are."""
        return dict(self._counts)

    def restore(self, state: dict[str, int]) -> None:
        """The counts as they were."""
        self._counts = dict(state)


class StorageBook:
    """Numbers for storages, by identity: a storage that is gone never gives its number to another.

    Tensors without a storage of their own kind (sparse ones, wrapper subclasses) are numbered by themselves.
    """

    def __init__(self) -> None:
        self.nbytes: list[int] = []
        self._known: dict[Any, tuple[int, Any]] = {}
        self._alive: dict[int, Any] = {}

    def number_of(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's storage."""
        try:
            storage = tensor.untyped_storage()
            # The weak reference keeps the storage's address, which is its key here, from being used again.
            key, nbytes = storage._cdata, storage.nbytes()
            known = self._known.get(key)
            if known is not None:
                return known[0]
            reference: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        except (NotImplementedError, RuntimeError, AttributeError):
            key, nbytes = ("tensor", id(tensor)), _nbytes_of(tensor)
            known = self._known.get(key)
            if known is not None and known[1]() is tensor:
                return known[0]
            reference = weakref.ref(tensor)
        number = len(self.nbytes)
        self._known[key] = (number, reference)
        self._alive[number] = reference
        self.nbytes.append(nbytes)
        return number

    def last_throughout(self) -> None:
        """The storages so far are held by the caller: nobody asks whether they are freed."""
        self._alive.clear()

    def lasts_throughout(self, number: int) -> None:
        """A storage is held by the caller, too."""
        self._alive.pop(number, None)

    def standing_nbytes(self) -> int:
        """Bytes of the storages that stand, those that the caller holds left out. Those that are gone are told of."""
        self.freed()
        return sum(self.nbytes[number] for number in self._alive)

    def freed(self) -> list[int]:
        """Numbers of the storages that were freed since the last time."""
        gone = [number for number, reference in self._alive.items() if _is_gone(reference)]
        for number in gone:
            del self._alive[number]
        return gone


def _is_gone(reference: Any) -> bool:
    return reference.expired() if hasattr(reference, "expired") else reference() is None


def _nbytes_of(tensor: torch.Tensor) -> int:
    if tensor.layout is not torch.strided:
        parts = [tensor._values(), tensor._indices()] if tensor.is_sparse else []
        return sum(part.numel() * part.element_size() for part in parts)
    return tensor.numel() * tensor.element_size()
