"""Which code a region may run, and which names that code reads: found without running it."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterable
from typing import Any

from keepless.eager import closures

_FOREIGN = ("torch", "numpy", "random", "math", "functools", "typing", "collections", "contextlib")
_MANY = 512


class Code:
    """The Python functions that a region may call, as far as their names tell.

    Attributes:
        functions: the functions: the region's own, forwards of modules, helpers that they name, methods.
        names: every name that these read.
        stored: the names of attributes that they set.
    """

    def __init__(self, function: Any, holders: Iterable[Any]) -> None:
        self.functions: list[types.FunctionType] = []
        self.names: set[str] = set()
        self.stored: set[str] = set()
        classes = {type(holder) for holder in holders}
        self._methods = {name: m for c in classes for name, m in _own_methods(c)}
        waiting = [closures.plain(function), *(m for c in classes for m in _entries(c))]
        seen: set[Any] = set()
        while waiting and len(seen) < _MANY:
            item = waiting.pop()
            if isinstance(item, types.FunctionType) and item.__code__ not in seen:
                seen.add(item.__code__)
                self.functions.append(item)
                waiting += self._named_by(item)

    def _named_by(self, function: types.FunctionType) -> list[Any]:
        names = set(closures.global_names(function.__code__))
        self.names |= names
        if _is_foreign(function):
            return []
        self.stored |= _stored(function.__code__)
        found: list[Any] = [inside for _, inside in closures.filled(function.__closure__ or ())]
        for name in names:
            found += [function.__globals__.get(name), self._methods.get(name)]
        return [closures.plain(item) for item in found if isinstance(item, _CALLABLE) and not _is_foreign(item)]

    def globals_read(self) -> list[tuple[dict[str, Any], list[str]]]:
        """For each namespace, the names in it that the code reads as data."""
        found: dict[int, tuple[dict[str, Any], set[str]]] = {}
        for function in self.functions:
            if not _is_foreign(function):
                home = function.__globals__
                names = {
                    name
                    for name in closures.global_names(function.__code__)
                    if name in home and not isinstance(home[name], _FIXED)
                }
                found.setdefault(id(home), (home, set()))[1].update(names)
        return [(home, sorted(names)) for home, names in found.values() if names]


_FIXED = (types.ModuleType, type)
_CALLABLE = (types.FunctionType, types.MethodType)


@functools.lru_cache(maxsize=4096)
def _stored(code: types.CodeType) -> frozenset[str]:
    own = [item.argval for item in dis.get_instructions(code) if item.opname == "STORE_ATTR"]
    inner = [_stored(item) for item in code.co_consts if isinstance(item, types.CodeType)]
    return frozenset(own).union(*inner)


def _is_foreign(function: Any) -> bool:
    home = getattr(function, "__module__", None) or ""
    return home.split(".")[0] in _FOREIGN


def _entries(cls: type) -> list[Any]:
    return [getattr(cls, name, None) for name in ("forward", "__call__") if name in dir(cls)]


def _own_methods(cls: type) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for base in cls.__mro__
        if base.__module__.split(".")[0] not in (*_FOREIGN, "builtins")
        for name, value in vars(base).items()
        if isinstance(value, types.FunctionType)
    ]
