"""Modules that a region calls: their hooks, their attributes, their training flags.

While a region is watched or run again, `torch.nn.Module._call_impl` goes through a route of this thread; other threads
keep the module's own. The route is taken down when no thread needs it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_Module: Any = torch.nn.Module
_Route = Callable[[Callable[..., Any], torch.nn.Module, tuple[Any, ...], dict[str, Any]], Any]

_lock = threading.Lock()
_users = 0
_original: Callable[..., Any] = _Module._call_impl
_local = threading.local()

MISSING: Any = object()
CONTAINERS = (list, dict, set)
_OWN = frozenset(name for name in torch.nn.Module().__dict__ if name not in ("training",) and name.startswith("_"))


def _routed(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    route = getattr(_local, "route", None)
    if route is None:
        return _original(self, *args, **kwargs)
    return route(_original, self, args, kwargs)


@contextlib.contextmanager
def calls_through(route: _Route | None) -> Iterator[None]:
    """This thread's module calls go through `route(call, module, args, kwargs)` inside the block."""
    global _users, _original
    before = getattr(_local, "route", None)
    with _lock:
        if _users == 0:
            _original = _Module._call_impl
            _Module._call_impl = _routed
        _users += 1
    _local.route = route
    try:
        yield
    finally:
        _local.route = before
        with _lock:
            _users -= 1
            if _users == 0:
                _Module._call_impl = _original


def routing() -> bool:
    """Whether this thread's module calls are routed."""
    return getattr(_local, "route", None) is not None


def own_attributes(holder: Any) -> dict[str, Any]:
    """The attributes of a module or another object that its own code may set, lists, dicts and sets with a copy.

    A module's buffers are among them (their names may be bound to other tensors); parameters, submodules and hooks are
    not.
    """
    return {
        name: (value, value.copy()) if value.__class__ in CONTAINERS else (value, None)
        for name, value in _attributes(holder).items()
    }


def _attributes(holder: Any) -> dict[str, Any]:
    found = {name: value for name, value in getattr(holder, "__dict__", {}).items() if name not in _OWN}
    if isinstance(holder, _Module):
        found.update(holder._buffers)
    return found


def _home(holder: Any, name: str) -> dict[str, Any]:
    is_buffer = isinstance(holder, _Module) and name in holder._buffers
    home: dict[str, Any] = holder._buffers if is_buffer else holder.__dict__
    return home


def changed_attributes(holder: Any, before: dict[str, Any]) -> list[str]:
    """The attributes that were set, deleted, or whose list, dict or set now holds something else."""
    now = _attributes(holder)
    changed = [name for name in now if name not in before]
    for name, (value, copy) in before.items():
        current = now.get(name, MISSING)
        if current is not value or (copy is not None and not _same_content(current, copy)):
            changed.append(name)
    return changed


def _same_content(one: Any, other: Any) -> bool:
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(key in other and other[key] is value for key, value in one.items())
    if isinstance(one, set):
        return bool(one == other)
    return all(a is b for a, b in zip(one, other, strict=True))


def read_attribute(holder: Any, name: str) -> tuple[Any, Any]:
    """The value of an own attribute, and a copy of its content where it is a list, dict or set."""
    value = _home(holder, name).get(name, MISSING)
    return value, value.copy() if value.__class__ in CONTAINERS else None


def write_attribute(holder: Any, name: str, value: Any, content: Any) -> None:
    """Puts back what `read_attribute` gave: the same object, with the same content."""
    home = _home(holder, name)
    if value is MISSING:
        home.pop(name, None)
        return
    if content is not None:
        if isinstance(value, list):
            value[:] = content
        else:
            value.clear()
            value.update(content)
    home[name] = value


def hooks_of(module: torch.nn.Module) -> tuple[int, ...]:
    """The ids of a module's forward hooks."""
    m: Any = module
    if m._forward_hooks or m._forward_pre_hooks:
        return (*m._forward_pre_hooks, *m._forward_hooks)
    return ()


def global_hooks() -> tuple[int, ...]:
    """The ids of the forward hooks of all modules."""
    state: Any = torch.nn.modules.module
    if state._global_forward_pre_hooks or state._global_forward_hooks:
        return (*state._global_forward_pre_hooks, *state._global_forward_hooks)
    return ()


def hook_dictionaries(module: torch.nn.Module | None = None) -> list[dict[int, Any]]:
    """The dictionaries of forward hooks of one module, or of all."""
    state: Any = torch.nn.modules.module
    if module is None:
        return [state._global_forward_pre_hooks, state._global_forward_hooks]
    m: Any = module
    return [m._forward_pre_hooks, m._forward_hooks]


def call_without(module: torch.nn.Module, skip: set[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a module with the hooks that are not in `skip`; backward hooks belong to the first run's graph only."""
    m: Any = module
    state: Any = torch.nn.modules.module
    for key, hook in (*state._global_forward_pre_hooks.items(), *m._forward_pre_hooks.items()):
        if key in skip:
            continue
        if key in m._forward_pre_hooks_with_kwargs:
            given = hook(module, args, kwargs)
            if given is not None:
                args, kwargs = given
        else:
            given = hook(module, args)
            if given is not None:
                args = given if isinstance(given, tuple) else (given,)
    result = m.forward(*args, **kwargs)
    for key, hook in (*state._global_forward_hooks.items(), *m._forward_hooks.items()):
        if key in skip:
            continue
        with_kwargs = key in m._forward_hooks_with_kwargs or key in state._global_forward_hooks_with_kwargs
        given = hook(module, args, kwargs, result) if with_kwargs else hook(module, args, result)
        if given is not None:
            result = given
    return result
