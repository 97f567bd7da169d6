"""Plain constants that the model's code reads from elsewhere: config objects, closures, globals.

A captured step has their values in it, so each call asks whether they are still the same: a loss weight that the loop
anneals must not stand still. Watched is what the code of the modules' forwards names, with the methods and functions
that it calls; torch's own code is left out. Numbers, strings and the like are compared, through three levels of
containers and objects. What code reaches in other ways (a file, the environment) is not seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import dis
import inspect
import logging
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from keepless.binding import Fact
from keepless.capture.constants import functions_of

MAX_FACTS = 512
"""Later ones are not watched: a call would notice the time."""
MAX_DEPTH = 3
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_SETTINGS = (dict, list, tuple, argparse.Namespace, types.SimpleNamespace)
_OPAQUE = (
    torch.nn.Module,
    torch.Tensor,
    torch.Generator,
    torch.optim.Optimizer,
    type,
    types.ModuleType,
    logging.Logger,
)


def find_facts(model: torch.nn.Module, attributes: Iterable[tuple[str, str, Any]]) -> tuple[Fact, ...]:
    """The constants behind a model's forward, beside the plain attributes of its modules."""
    finder = _Finder()
    for module in model.modules():
        for function in functions_of(module):
            finder.function(function, module)
    finder.objects += [(f"{path}.{name}".lstrip("."), value) for path, name, value in attributes]
    for label, value in finder.objects:
        finder.inside(label, value, MAX_DEPTH)
    return tuple([fact for fact in finder.facts[:MAX_FACTS] if fact.read(*fact.place) is fact.value])


class _Finder:
    """Walks the functions first, for the names that they read, then the objects that they reach."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self.objects: list[tuple[str, Any]] = []
        self.names: set[str] = set()
        self.seen: dict[tuple[int, int], Any] = {}

    def is_new(self, *things: Any) -> bool:
        """Whether these stand here for the first time; they are held, so that their ids stay theirs."""
        key = (id(things[0]), id(things[-1]))
        if key in self.seen:
            return False
        self.seen[key] = things
        return True

    def function(self, function: Any, owner: Any) -> None:
        """A function or method, what it closes over, and what it calls on `owner` and among its globals."""
        function = getattr(function, "__func__", getattr(function, "func", function))
        if (
            not isinstance(function, types.FunctionType)
            or _is_torchs(function)
            or not self.is_new(function, type(owner))
        ):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.note(f"{name} of {function.__qualname__}", _content, (cell,), owner)
        for code in _codes(function.__code__):
            self.names.update(code.co_names, (item for item in code.co_consts if isinstance(item, str)))
            for name in {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}:
                if name in function.__globals__:
                    self.note(name, function.__globals__.get, (name,), owner, is_global=True)
            for name in code.co_names:
                method = inspect.getattr_static(type(owner), name, None)
                if isinstance(method, property):
                    method = method.fget
                self.function(method, owner)

    def note(
        self, label: str, read: Callable[..., Any], place: tuple[Any, ...], owner: Any, *, is_global: bool = False
    ) -> None:
        """What stands at a place: a constant, a function, or something with constants inside."""
        value = read(*place)
        if isinstance(value, _PLAIN):
            self.facts.append(Fact(label, read, place, value))
        elif isinstance(value, (types.FunctionType, types.MethodType)):
            self.function(value, owner)
        elif not is_global or type(value) in _SETTINGS or dataclasses.is_dataclass(value):
            self.objects.append((label, value))

    def inside(self, label: str, value: Any, depth: int) -> None:
        """The constants in a container or an object, as far as the code names them."""
        if (
            depth == 0
            or len(self.facts) >= MAX_FACTS
            or isinstance(value, (*_OPAQUE, *_PLAIN))
            or not self.is_new(value)
        ):
            return
        items: Iterable[tuple[Any, Any]]
        table: Any
        if type(value) is dict:
            table, items = value, list(value.items())
        elif type(value) in (list, tuple):
            table, items = value, enumerate(value)
        else:
            table = getattr(value, "__dict__", None)
            if not isinstance(table, dict) or callable(value) or isinstance(value, (dict, list, tuple, set)):
                return
            items = [(key, item) for key, item in table.items() if key in self._named_in(type(value))]
        read = table.get if isinstance(table, dict) else _Item(table)
        for key, item in items:
            if len(self.facts) >= MAX_FACTS:
                return
            if not isinstance(key, (str, int)):
                continue
            if isinstance(item, _PLAIN):
                if not isinstance(table, tuple):
                    self.facts.append(Fact(f"{label}.{key}", read, (key,), item))
            else:
                self.inside(f"{label}.{key}", item, depth - 1)

    def _named_in(self, kind: type) -> set[str]:
        """The names that the code reads, and those behind a class's properties of these names."""
        found = set(self.names)
        for name in self.names:
            attribute = inspect.getattr_static(kind, name, None)
            if isinstance(attribute, property) and isinstance(attribute.fget, types.FunctionType):
                found.update(attribute.fget.__code__.co_names)
        return found


class _Item:
    """Reads an item of a list, None where there is none."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __call__(self, place: int) -> Any:
        return self.items[place] if place < len(self.items) else None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _is_torchs(function: types.FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for item in code.co_consts:
        if isinstance(item, types.CodeType):
            yield from _codes(item)


def equal_constants(now: Any, planned: Any) -> bool:
    """Whether two plain constants mean the same; other objects are equal only to themselves."""
    if type(now) is not type(planned):
        return False
    if isinstance(now, tuple):
        return len(now) == len(planned) and all(
            a is b or equal_constants(a, b) for a, b in zip(now, planned, strict=True)
        )
    return isinstance(now, _PLAIN) and bool(now == planned)


MISSING = object()


def attribute_of(own: dict[str, Any], kind: type, name: str) -> Any:
    """What a module's attribute is now, its own or its class's; MISSING where there is none."""
    return own.get(name, getattr(kind, name, MISSING))


def copy_of(value: Any) -> list[Any] | None:
    """The items of a list, dict or set, by which a later change of it is seen."""
    if type(value) is dict:
        return list(value.items())
    return list(value) if type(value) in (list, set) else None


def same_items(now: Any, copy: list[Any]) -> bool:
    """Whether a container still holds the items that `copy_of` gave."""
    items = list(now.items()) if type(now) is dict else list(now)
    return len(items) == len(copy) and all(a is b or equal_constants(a, b) for a, b in zip(items, copy, strict=True))
