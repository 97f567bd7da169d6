"""The objects that a region's code can reach by name: modules, and plain objects with attributes."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch

from keepless.eager import closures, containers
from keepless.eager.containers import Content

MISSING: Any = object()
_MANY = 256
_DEPTH = 3
_SMALL = 4096
_OWN = frozenset(name for name in torch.nn.Module().__dict__ if name.startswith("_"))
_FOREIGN = ("torch", "numpy", "builtins", "random", "functools", "re", "logging", "threading", "weakref")

Attribute = tuple[Any, Content | None]
Way = tuple[Hashable, ...]


def holders_of(function: Callable[..., Any], values: Iterable[Any], modules: Iterable[torch.nn.Module]) -> list[Any]:
    """The modules, and the plain objects with attributes that a region's closure, arguments and modules hold."""
    found: dict[int, Any] = {id(module): module for module in modules}
    waiting = [(value, 0) for value in (function, closures.owner(function), *closures.all_held(function), *values)]
    waiting += [(value, 1) for module in found.values() for value in attributes_of(module).values()]
    while waiting and len(found) < _MANY:
        value, depth = waiting.pop()
        if id(value) in found or depth > _DEPTH:
            continue
        if isinstance(value, (list, tuple, set)):
            waiting += [(item, depth + 1) for item in list(value)[:_MANY]]
        elif isinstance(value, dict):
            waiting += [(item, depth + 1) for item in list(value.values())[:_MANY]]
        elif is_plain(value):
            found[id(value)] = value
            waiting += [(item, depth + 1) for item in value.__dict__.values()]
    return list(found.values())


def is_plain(value: Any) -> bool:
    """Whether a value is an object of the user's with attributes of its own."""
    if isinstance(value, (type, types.ModuleType, types.FunctionType, types.MethodType, torch.Tensor)):
        return False
    return hasattr(value, "__dict__") and not is_foreign(value)


def is_foreign(value: Any) -> bool:
    """Whether an object's class is torch's, NumPy's or the standard library's."""
    return type(value).__module__.split(".")[0] in _FOREIGN


def attributes_of(holder: Any) -> dict[str, Any]:
    """The attributes that an object's own code may set: of a module also its buffers and submodules, but not parameters
    and hooks."""
    found = {name: value for name, value in getattr(holder, "__dict__", {}).items() if name not in _OWN}
    if isinstance(holder, torch.nn.Module):
        found.update(holder._buffers)
        found.update(holder._modules)
    return found


def looked_at(holder: Any) -> dict[str, Attribute]:
    """An object's attributes, with the contents of those that are lists, dicts or sets."""
    return {name: (value, containers.content_of(value)) for name, value in attributes_of(holder).items()}


def changed(holder: Any, before: dict[str, Attribute]) -> list[str]:
    """The attributes that were set or deleted, or whose content is another."""
    now = attributes_of(holder)
    names = [name for name in now if name not in before]
    for name, (value, content) in before.items():
        if now.get(name, MISSING) is not value or (content is not None and not content.is_now()):
            names.append(name)
    return names


def is_kept_data(value: Any) -> bool:
    """Whether what a variable holds may be another in the recompute: all but classes and packages."""
    return value is not MISSING and not isinstance(value, (type, types.ModuleType))


def may_get(holder: Any, names: set[str]) -> set[str]:
    """The names under which an object may get an attribute that it does not have."""
    if not hasattr(holder, "__dict__"):
        return set()
    taken = holder._parameters.keys() if isinstance(holder, torch.nn.Module) else ()
    return {name for name in names if name not in taken and not hasattr(type(holder), name)}


def leaves(value: Any, way: Way, depth: int = 0) -> Iterator[tuple[Way, Any]]:
    """The tensors, modules and plain objects that a value is or holds in containers, with the way to each."""
    if isinstance(value, torch.Tensor):
        yield way, value
    elif isinstance(value, (list, tuple, dict, set, collections.deque)):
        if depth <= _DEPTH and len(value) <= _SMALL:
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in pairs:
                if item.__class__ not in closures.PLAIN:
                    yield from leaves(item, (*way, key), depth + 1)
    elif isinstance(value, torch.nn.Module) or is_plain(value):
        yield way, value


class Variable:
    """A variable as it was: an attribute of an object, or a global.

    Attributes:
        holder: the object, or the namespace of a global.
        value: what it was; `MISSING` where it was not set.
        content: what that held, where it is a list, dict or set.
        is_set: whether the region sets it.
    """

    __slots__ = ("content", "holder", "home", "is_set", "name", "value")

    def __init__(self, holder: Any, name: str, value: Any, content: Content | None, is_set: bool) -> None:
        self.holder, self.name, self.value, self.content, self.is_set = holder, name, value, content, is_set
        if isinstance(holder, dict):
            self.home = holder
        else:
            self.home = holder.__dict__
            if isinstance(holder, torch.nn.Module) and name not in self.home:
                homes: tuple[Any, ...] = (holder._buffers, holder._modules, holder._parameters)
                self.home = next((home for home in homes if name in home), self.home)

    def leaves(self, way: Way) -> Iterator[tuple[Way, Any]]:
        """The tensors, modules and plain objects that it was or held."""
        return leaves(self.value if self.content is None else self.content.items, way)

    def now(self) -> Variable:
        """The variable as it is."""
        value = self.home.get(self.name, MISSING)
        content = containers.content_of(value) if self.content is not None else None
        return Variable(self.holder, self.name, value, content, self.is_set)

    def differs(self) -> bool:
        """Whether it is another now."""
        return self.home.get(self.name, MISSING) is not self.value or not (
            self.content is None or self.content.is_now()
        )

    def put_back(self) -> None:
        """Makes it what it was."""
        if self.content is not None:
            self.content.put_back()
        if self.value is MISSING:
            self.home.pop(self.name, None)
        else:
            self.home[self.name] = self.value


def home_name(item: Variable) -> str:
    """The attribute of a variable's holder that is the dictionary with it; empty for a global."""
    if isinstance(item.holder, dict):
        return ""
    names = ("__dict__", "_modules", "_buffers", "_parameters")
    return next(name for name in names if getattr(item.holder, name, None) is item.home)


def variables_of(holder: Any) -> list[Variable]:
    """Every attribute of an object that is data, as if the region set it: for objects that nobody watched."""
    return [
        Variable(holder, name, value, content, True)
        for name, (value, content) in looked_at(holder).items()
        if is_kept_data(value)
    ]


def variables_of_hooks(module: torch.nn.Module, skip: set[int]) -> list[tuple[int, Variable]]:
    """The lists, dicts and sets in the closures of a module's forward hooks, with what they hold and the hook's id."""
    m: Any = module
    found = []
    for key, hook in (*m._forward_pre_hooks.items(), *m._forward_hooks.items()):
        for value in closures.all_held(hook) if key not in skip else ():
            content = containers.content_of(value)
            if content is not None:
                found.append((key, Variable({"": value}, "", value, content, True)))
    return found


def variable_now(holder: Any, name: str, is_set: bool) -> Variable:
    """An attribute or global as it is now, with its content where the region sets it or it is small."""
    variable = Variable(holder, name, MISSING, None, is_set)
    value = variable.value = variable.home.get(name, MISSING)
    if value.__class__ in containers.KINDS and (is_set or len(value) <= _SMALL):
        variable.content = Content(value)
    return variable
