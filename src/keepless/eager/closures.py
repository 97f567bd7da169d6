"""What a region's function is, and what its closure held when it ran.

A function sees the variables of its enclosing scope by reference: a loop that rebinds `block` changes what
`lambda x: block(x)` does when it runs again in the backward. The recompute therefore runs a copy of the function whose
cells hold what they held in the forward; lists, dictionaries and sets in cells are copied, so that what a region
appends is appended once.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from keepless.eager import containers

_PLAIN = (bool, int, float, str, bytes, type(None))
_DEPTH = 4


def region_key(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Hashable, list[Any]]:
    """A name for the code and the modules of a region, and the objects by whose identity it goes.

    Two calls with equal keys run the same code on the same modules; tensors do not enter.
    """
    anchors: list[Any] = []
    key = _name(function, anchors, 0)
    for value in args:
        if isinstance(value, torch.nn.Module):
            key = (key, _identity(value, anchors))
    return key, anchors


def _identity(value: Any, anchors: list[Any]) -> Hashable:
    anchors.append(value)
    return id(value)


def _name(value: Any, anchors: list[Any], depth: int) -> Any:
    kind: Any = value.__class__
    if kind is types.FunctionType:
        cells = value.__closure__
        if not cells or depth > _DEPTH:
            return value.__code__
        return (value.__code__, *(_name(inside, anchors, depth + 1) for _, inside in filled(cells)))
    if kind in _PLAIN:
        return (kind, value)
    if kind is types.MethodType:
        return (value.__func__, _identity(value.__self__, anchors))
    if kind is functools.partial:
        parts = (value.func, *value.args, *value.keywords.values())
        return ("partial", *(_name(part, anchors, depth + 1) for part in parts))
    if isinstance(value, torch.nn.Module) or (callable(value) and not isinstance(value, type)):
        return _identity(value, anchors)
    return kind


def filled(cells: tuple[types.CellType, ...]) -> Iterator[tuple[types.CellType, Any]]:
    """The cells that hold something, with what they hold."""
    for cell in cells:
        try:
            yield cell, cell.cell_contents
        except ValueError:
            continue


def references(anchors: list[Any]) -> list[weakref.ref[Any]] | None:
    """Weak references to the anchors; None where one of them cannot be referred to weakly."""
    try:
        return [weakref.ref(anchor) for anchor in anchors]
    except TypeError:
        return None


def frozen(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its closure as it is now; the function itself where it has none."""
    kind = function.__class__
    if kind is types.FunctionType:
        return _frozen(function, {}, 0) if function.__closure__ else function
    if kind is types.MethodType and function.__func__.__closure__:  # type: ignore[attr-defined]
        method: Any = function
        return types.MethodType(_frozen(method.__func__, {}, 0), method.__self__)
    if kind is functools.partial:
        part: Any = function
        return functools.partial(frozen(part.func), *part.args, **part.keywords)
    return function


def _frozen(function: Any, known: dict[int, types.CellType], depth: int) -> Any:
    cells = []
    for cell in function.__closure__:
        copy = known.get(id(cell))
        if copy is None:
            copy = known[id(cell)] = types.CellType()
            try:
                inside = cell.cell_contents
            except ValueError:
                pass
            else:
                copy.cell_contents = _copied(inside, known, depth)
        cells.append(copy)
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    made.__kwdefaults__ = function.__kwdefaults__
    if function.__dict__:
        made.__dict__.update(function.__dict__)
    return made


def _copied(value: Any, known: dict[int, types.CellType], depth: int) -> Any:
    if value.__class__ is types.FunctionType and value.__closure__ and depth < _DEPTH:
        return _frozen(value, known, depth + 1)
    return containers.cloned(value)


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside partials and bound methods."""
    inside: Any = function
    while isinstance(inside, (functools.partial, types.MethodType)):
        inside = inside.func if isinstance(inside, functools.partial) else inside.__func__
    return inside  # type: ignore[no-any-return]


def owner(function: Callable[..., Any]) -> Any:
    """What a bound method, or the method inside a partial, is bound to; None for other functions."""
    while function.__class__ is functools.partial:
        function = function.func
    return getattr(function, "__self__", None) if function.__class__ is types.MethodType else None


def held_values(function: Callable[..., Any]) -> list[Any]:
    """What the cells of a function hold, whatever wraps it."""
    cells = getattr(plain(function), "__closure__", None)
    return [inside for _, inside in filled(cells)] if cells else []


def modules_of(function: Callable[..., Any], args: tuple[Any, ...]) -> list[torch.nn.Module]:
    """The modules that a function is, is bound to, closes over, or is given."""
    found: list[torch.nn.Module] = []
    waiting: list[tuple[Any, int]] = [(function, 0), *((value, _DEPTH) for value in args)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, torch.nn.Module):
            found.append(value)
        elif value.__class__ is types.MethodType:
            waiting += [(value.__self__, _DEPTH), (value.__func__, depth)]
        elif value.__class__ is functools.partial:
            waiting += [(part, depth + 1) for part in (value.func, *value.args, *value.keywords.values())]
        elif value.__class__ is types.FunctionType and depth < _DEPTH:
            waiting += [(inside, depth + 1) for _, inside in filled(value.__closure__ or ())]
    return found


def held_tensors(function: Callable[..., Any]) -> list[torch.Tensor]:
    """The tensors in the cells of a function."""
    return [value for value in held_values(function) if isinstance(value, torch.Tensor)]


def all_held(function: Callable[..., Any]) -> list[Any]:
    """What the cells of a function hold, and the cells of functions in them."""
    found: list[Any] = []
    waiting = [(function, 0)]
    while waiting:
        inside, depth = waiting.pop()
        for value in held_values(inside):
            found.append(value)
            if value.__class__ is types.FunctionType and depth < _DEPTH:
                waiting.append((value, depth + 1))
    return found


def name_of(function: Callable[..., Any]) -> str:
    """A region's name for messages: its qualified name, or its class."""
    inside = plain(function)
    name = getattr(inside, "__qualname__", None)
    return name if isinstance(name, str) else inside.__class__.__qualname__
