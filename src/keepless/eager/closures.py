"""What a region's function is, and what its closure held when it ran.

A function sees the variables of its enclosing scope by reference: a loop that rebinds `block` changes what
`lambda x: block(x)` does when it runs again in the backward. The recompute therefore runs a copy of the function whose
cells hold what they held in the forward; lists, dictionaries and sets in cells are copied, so that what a region
appends is appended once.
"""

from __future__ import annotations

import dis
import functools
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch

from keepless.eager import containers

PLAIN = (bool, int, float, str, bytes, type(None))
_CHANGING = {*containers.KINDS, types.FunctionType}
_OFTEN = (type(None), types.ModuleType, type, types.BuiltinFunctionType)
_NAMED = (torch.nn.Module, types.FunctionType, types.MethodType)
_DEPTH = 4
_MANY = 64
_FOREIGN = ("torch", "numpy", "builtins", "random", "collections")
_PLACEHOLDER: Any = getattr(functools, "Placeholder", object())


def region_key(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], held: list[Any] | None = None
) -> tuple[Hashable, list[Any]]:
    """A name for the code and the modules of a region, and the objects by whose identity it goes.

    `held` is `held_values(function)`, where that is known.

    Two calls with equal keys run the same code on the same modules; tensors do not enter.
    """
    anchors: list[Any] = []
    key = _name(function, anchors, 0, held)
    for value in (*args, *kwargs.values()) if kwargs else args:
        if not isinstance(value, torch.Tensor):
            key = (key, _name(value, anchors, 1))
    return key, anchors


def _identity(value: Any, anchors: list[Any]) -> Hashable:
    anchors.append(value)
    return id(value)


def _name(value: Any, anchors: list[Any], depth: int, known: list[Any] | None = None) -> Any:
    kind: Any = value.__class__
    if kind is types.FunctionType:
        held = _held(value) if known is None else known
        if global_names(value.__code__):
            held = held + modules_named(value)
        if not held or depth > _DEPTH:
            return value.__code__
        return (value.__code__, *[_name(inside, anchors, depth + 1) for inside in held])
    if kind in PLAIN:
        return (kind, value)
    if isinstance(value, torch.Tensor):
        return kind
    if kind is types.MethodType:
        return (value.__func__, _identity(value.__self__, anchors))
    if kind is functools.partial:
        parts = (value.func, *value.args, *value.keywords.values())
        return ("partial", *[_name(part, anchors, depth + 1) for part in parts])
    if isinstance(value, torch.nn.Module) or (callable(value) and not isinstance(value, type)):
        return _identity(value, anchors)
    return (kind, *[_identity(module, anchors) for module in modules_in(value)])


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """The names that code reads, with those of the functions in it."""
    inner = [name for item in code.co_consts if isinstance(item, types.CodeType) for name in global_names(item)]
    return (*code.co_names, *inner)


def modules_named(function: Any) -> list[Any]:
    """The modules and callable objects that a function names as globals."""
    read = function.__globals__.get
    found = [read(name) for name in global_names(function.__code__)]
    return [value for value in found if value.__class__ not in _OFTEN and isinstance(value, _NAMED)]


def _held(function: Any) -> list[Any]:
    cells = function.__closure__ or ()
    try:
        held = [cell.cell_contents for cell in cells]
    except ValueError:
        held = [inside for _, inside in filled(cells)]
    if function.__defaults__:
        held += function.__defaults__
    if function.__kwdefaults__:
        held += function.__kwdefaults__.values()
    return held


def modules_in(value: Any, depth: int = 0) -> list[torch.nn.Module]:
    """The modules that a value is or holds: in lists, tuples and dicts, and as attributes of plain objects."""
    if isinstance(value, torch.nn.Module):
        return [value]
    if depth > 2 or value.__class__ in PLAIN or isinstance(value, torch.Tensor):
        return []
    if isinstance(value, (list, tuple)):
        inside = list(value)
    elif isinstance(value, dict):
        inside = list(value.values())
    elif type(value).__module__.split(".")[0] in _FOREIGN or isinstance(value, type) or callable(value):
        return []
    else:
        inside = list(getattr(value, "__dict__", {}).values())
    return [module for item in inside[:_MANY] for module in modules_in(item, depth + 1)]


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


@functools.lru_cache(maxsize=4096)
def _binds_cells(code: types.CodeType) -> bool:
    inner = any(_binds_cells(item) for item in code.co_consts if isinstance(item, types.CodeType))
    bound = {item.argval for item in dis.get_instructions(code) if item.opname in ("STORE_DEREF", "DELETE_DEREF")}
    return inner or not bound.isdisjoint(code.co_freevars)


def lasting(function: Callable[..., Any], held: list[Any]) -> Callable[..., Any]:
    """The function itself where `as_it_was` can make its copy when it is wanted; else a copy with its closure now.

    A copy is made now where the function, or one in it, binds its cells itself, and where one of the values that it
    holds may be changed in place.
    """
    if function.__class__ is types.FunctionType:
        cells: Any = function.__closure__
        if not cells or (
            not _binds_cells(function.__code__) and len(cells) <= len(held) and _CHANGING.isdisjoint(map(type, held))
        ):
            return function
    return frozen(function)


def as_it_was(function: Callable[..., Any], held: list[Any]) -> Callable[..., Any]:
    """A function that `lasting` returned as it is, with its cells holding these values; itself where they still do."""
    cells = getattr(function, "__closure__", None)
    if not cells:
        return function
    for cell, value in zip(cells, held, strict=False):
        if cell.cell_contents is not value:
            break
    else:
        return function
    return _made(function, tuple(types.CellType(value) for value in held[: len(cells)]))


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
    return _made(function, tuple(cells))


def _made(function: Any, cells: tuple[types.CellType, ...]) -> types.FunctionType:
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    if function.__dict__:
        made.__dict__.update(function.__dict__)
    return made


def _copied(value: Any, known: dict[int, types.CellType], depth: int) -> Any:
    if value.__class__ is types.FunctionType and value.__closure__ and depth < _DEPTH:
        return _frozen(value, known, depth + 1)
    return containers.cloned(value)


def unfolded(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A call of a partial as the call that it makes: what it holds is then an argument as any other."""
    while function.__class__ is functools.partial:
        part: Any = function
        if any(item is _PLACEHOLDER for item in part.args):
            break
        function, args, kwargs = part.func, (*part.args, *args), {**part.keywords, **kwargs}
    return function, args, kwargs


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
    """What the cells and the defaults of a function hold, whatever wraps it."""
    inside = function if function.__class__ is types.FunctionType else plain(function)
    return _held(inside) if inside.__class__ is types.FunctionType else []


def modules_of(function: Callable[..., Any], values: Iterable[Any]) -> list[torch.nn.Module]:
    """The modules that a function is, is bound to, closes over, or is given."""
    found: list[torch.nn.Module] = []
    waiting: list[tuple[Any, int]] = [(function, 0), *((value, 1) for value in values)]
    while waiting:
        value, depth = waiting.pop()
        if value.__class__ is types.MethodType:
            waiting += [(value.__self__, _DEPTH), (value.__func__, depth)]
        elif value.__class__ is functools.partial:
            waiting += [(part, depth + 1) for part in (value.func, *value.args, *value.keywords.values())]
        elif value.__class__ is types.FunctionType:
            if depth < _DEPTH:
                waiting += [(inside, depth + 1) for inside in (*_held(value), *modules_named(value))]
        else:
            found += modules_in(value)
    return found


def all_held(function: Callable[..., Any]) -> list[Any]:
    """What the cells of a function hold, and the cells of functions in them."""
    found = held_values(function)
    if types.FunctionType not in map(type, found):
        return found
    depth, start = 0, 0
    while depth < _DEPTH and start < len(found):
        inner = [value for value in found[start:] if value.__class__ is types.FunctionType]
        start = len(found)
        for value in inner:
            found += _held(value)
        depth += 1
    return found


def name_of(function: Callable[..., Any]) -> str:
    """A region's name for messages: its qualified name, or its class."""
    inside = plain(function)
    name = getattr(inside, "__qualname__", None)
    return name if isinstance(name, str) else inside.__class__.__qualname__
